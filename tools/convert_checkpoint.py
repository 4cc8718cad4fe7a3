"""Turn a published EMOv2 classification file into an MMPretrain ImageClassifier checkpoint."""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # works in a bare clone too

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
    if dst.is_dir():
        raise ValueError(f'{dst}: DST is a folder; give a file name in it')
    content = read_checkpoint(src)
    try:
        weights = find_state_dict(content)
        arch = find_arch(weights, EMOv2.arch_settings)
        if arch is None:
            raise ValueError(f'these are weights of none of the archs {list(EMOv2.arch_settings)}')
        state_dict = classifier_state_dict(weights, EMOv2(arch, final_norm=True))
    except ValueError as error:
        raise ValueError(f'{src}: {error}') from None

    dst.parent.mkdir(parents=True, exist_ok=True)
    part = dst.with_name(f'.{dst.name}.{os.getpid()}')
    try:
        meta = {'arch': arch, 'emo2_mm_version': __version__}
        if dst.suffix == '.safetensors':
            save_safetensors(state_dict, part, meta)
        else:
            with part.open('wb') as file:  # given a path, torch would write its name into the file
                torch.save({'meta': meta, 'state_dict': state_dict}, file)
        os.replace(part, dst)  # there is never half a file under this name
    finally:
        if part.exists():
            part.unlink()
    classes = len(state_dict['head.fc.bias'])
    return f'{dst}: arch {arch}, {len(state_dict)} tensors, {classes} classes'


def save_safetensors(state_dict: dict[str, torch.Tensor], path: Path, metadata: dict[str, str]) -> None:
    try:
        from safetensors.torch import save_file
    except ImportError:
        raise ValueError(f'{path}: `pip install safetensors` to write such a file') from None
    save_file(state_dict, path, metadata)


def main() -> int:
    args = parse_args()
    try:
        print(convert(args.src, args.dst))
    except (OSError, ValueError) as error:
        print(f'error: {error}', file=sys.stderr)
        return 1
    return 0


if __name__ == '__main__':
    sys.exit(main())
