"""Report what is wrong with the Python environment that runs this, and how to fix it.

MMEngine's ``collect_env`` describes an environment that works. This judges one, also where torch, mmcv or
another package is missing or fails.
"""

from __future__ import annotations

import argparse
import importlib.util
import runpy
from pathlib import Path


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument('--json', action='store_true', help='print everything that was found, as JSON')
    parser.parse_args()
    # Run from its file, because the package cannot be imported without torch or mmengine. As __main__, the
    # name under which the process that tries the packages imports it.
    package = importlib.util.find_spec('emo2_mm')
    tools = Path(__file__).resolve().parent
    folder = Path(package.origin).parent if package and package.origin else tools.parent / 'emo2_mm'
    runpy.run_path(str(folder / 'analysis/environment.py'), run_name='__main__')


if __name__ == '__main__':
    main()
