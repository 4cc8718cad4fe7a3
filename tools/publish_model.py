"""Turn a checkpoint of a training run into a small file to hand on.

    python tools/publish_model.py IN_FILE OUT_FILE

keeps the weights to use, which are the averaged ones where a run averages them, and what says what they are:

    arch          size of EMOv2, such as 5m; left out if it is none of the published ones
    recipe        name of the config of the training
    epoch, iter   how far the training was
    cfg           text of that config, with the paths of its data; it never runs here
    dataset_meta  names and colours of the classes
    emo2_mm_version

Optimiser, schedule, logs and the weights before averaging are left out. If OUT_FILE ends in .safetensors, the
result is a file that can hold nothing but tensors and text, and this is its metadata; else it is `meta` in a
file of torch.save. The first 8 digits of the file's SHA-256 are added to its name.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any, Mapping

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # works in a bare clone too

from torch import Tensor  # noqa: E402
from weights_file import recipe_of, write_weights  # noqa: E402

from emo2_mm import EMOv2, __version__  # noqa: E402
from emo2_mm.checkpoint import find_arch, find_state_dict  # noqa: E402
from emo2_mm.reading import read_checkpoint, restore_colours  # noqa: E402


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument('in_file', metavar='IN_FILE', type=Path, help='checkpoint of a training run')
    parser.add_argument('out_file', metavar='OUT_FILE', type=Path, help='file to write')
    return parser.parse_args()


def find_weights(content: Any) -> dict[str, Tensor]:
    """Find the weights of a whole model; MMEngine saves the averaged ones, if there are, under this name."""
    weights = content.get('state_dict') if isinstance(content, Mapping) else None
    if not isinstance(weights, Mapping) or not weights:
        raise ValueError(
            'it holds no state_dict; give a checkpoint of a training run, such as '
            'work_dirs/NAME/epoch_12.pth (a published classifier goes through tools/convert_checkpoint.py)'
        )
    for name, value in weights.items():
        if not isinstance(name, str) or not isinstance(value, Tensor):
            raise ValueError(f'{name!r} in its state_dict is no tensor but {value!r:.60}; remove it')
    return dict(weights)


def find_meta(content: Mapping[str, Any], weights: dict[str, Tensor]) -> dict[str, Any]:
    """Gather as plain data what is known of the weights."""
    known = content.get('meta')
    known = known if isinstance(known, Mapping) else {}
    meta = {
        'arch': find_arch(find_state_dict(weights), EMOv2.arch_settings),
        'recipe': recipe_of(content),
        **{key: known.get(key) for key in ('epoch', 'iter', 'cfg', 'dataset_meta')},
        'emo2_mm_version': __version__,
    }
    # what is no plain data, such as an array, was not read
    plain = json.loads(json.dumps(meta, default=lambda _: None, skipkeys=True))
    if isinstance(plain['dataset_meta'], dict):
        restore_colours(plain['dataset_meta'])
    return {key: value for key, value in plain.items() if value is not None}


def publish(in_file: Path, out_file: Path) -> str:
    """Write the file and say what was written."""
    content = read_checkpoint(in_file)
    try:
        weights = find_weights(content)
        meta = find_meta(content, weights)
    except ValueError as error:
        raise ValueError(f'{in_file}: {error}') from None
    path = write_weights(out_file, weights, meta, add_hash=True)
    before, after = (file.expanduser().stat().st_size / 1e6 for file in (in_file, path))
    about = f'arch {meta.get("arch", "of its own")}, recipe {meta.get("recipe", "unknown")}'
    return f'{path}: {about}, {len(weights)} tensors, {after:.1f} MB ({in_file}: {before:.1f} MB)'


def main() -> int:
    args = parse_args()
    try:
        print(publish(args.in_file, args.out_file))
    except (ImportError, OSError, ValueError) as error:
        print(f'error: {error}', file=sys.stderr)
        return 1
    return 0


if __name__ == '__main__':
    sys.exit(main())
