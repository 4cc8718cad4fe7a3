"""Turn a published EMOv2 classification file into an MMPretrain ImageClassifier checkpoint."""

from __future__ import annotations

import argparse
import os
import re
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # works in a bare clone too

from weights_file import recipe_of, write_weights  # noqa: E402

from emo2_mm import EMOv2, __version__  # noqa: E402
from emo2_mm.checkpoint import (  # noqa: E402
    classifier_state_dict,
    find_arch,
    find_state_dict,
)
from emo2_mm.reading import read_checkpoint  # noqa: E402


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__,
        epilog="Load DST with mmpretrain.get_model('configs/cls/emo2_5m.py', pretrained=DST). "
        'A backbone alone needs no conversion: init_cfg takes published files as they are.',
    )
    parser.add_argument('src', metavar='SRC', help='published file (path or http address)')
    parser.add_argument(
        'dst',
        metavar='DST',
        type=Path,
        help='checkpoint to write; of safetensors if its name ends in .safetensors, else of torch.save',
    )
    return parser.parse_args()


def convert(src: str, dst: Path) -> str:
    """Write ``dst`` and say what was written."""
    if os.path.exists(src) and dst.exists() and os.path.samefile(src, dst):
        raise ValueError(f'{dst}: DST is SRC itself; give another name')
    content = read_checkpoint(src)
    try:
        weights = find_state_dict(content)
        arch = find_arch(weights, EMOv2.arch_settings)
        if arch is None:
            raise ValueError(f'these are weights of none of the archs {list(EMOv2.arch_settings)}')
        state_dict = classifier_state_dict(weights, EMOv2(arch, final_norm=True))
    except ValueError as error:
        raise ValueError(f'{src}: {error}') from None

    meta = {'arch': arch, 'emo2_mm_version': __version__}
    recipe = find_recipe(src, arch, content)
    if recipe:
        meta['recipe'] = recipe
    write_weights(dst, state_dict, meta)
    classes = len(state_dict['head.fc.bias'])
    return f'{dst}: arch {arch}, recipe {recipe or "unknown"}, {len(state_dict)} tensors, {classes} classes'


def find_recipe(src: str, arch: str, content: Any) -> str | None:
    """Name the config of the training. Only the name of a published file tells whether it had a teacher."""
    published = re.search(rf'EMOv2_{arch}(_224|_224_KD|_512_KD)\.pth$', src, re.IGNORECASE)
    if published:
        return f'emo2_{arch}' + published[1].lower().replace('_224', '')
    return recipe_of(content)


def main() -> int:
    args = parse_args()
    try:
        print(convert(args.src, args.dst))
    except (ImportError, OSError, ValueError) as error:
        print(f'error: {error}', file=sys.stderr)
        return 1
    return 0


if __name__ == '__main__':
    sys.exit(main())
