"""Build step that a table in pyproject.toml, which holds the metadata, cannot express."""

from __future__ import annotations

import shutil
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py

ROOT = Path(__file__).resolve().parent


class BuildPy(build_py):
    """Add ``emo2_mm/.mim``, where `mim` looks for configs and tools, to what is installed.

    The files are copied into the build only, so the source tree holds them once.
    """

    def run(self) -> None:
        super().run()
        if getattr(self, 'editable_mode', False):
            return
        target = Path(self.build_lib) / 'emo2_mm' / '.mim'
        if target.exists():  # from an earlier build, perhaps of other files
            shutil.rmtree(target)
        for name in ('configs', 'tools'):
            shutil.copytree(
                ROOT / name, target / name, ignore=shutil.ignore_patterns('__pycache__', '*.py[co]')
            )
        shutil.copy2(ROOT / 'model-index.yml', target)


setup(cmdclass={'build_py': BuildPy})
