"""Convert released EMOv2 classification files to checkpoints of MMPretrain's ``ImageClassifier``."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

from .emov2 import EMOv2
from .version import __version__
from .weights.load import classifier_state_dict, find_arch, find_state_dict
from .weights.read import read_checkpoint
from .weights.save import recipe_of, write_weights


def convert(src: str, dst: Path) -> str:
    """Write ``dst``; return a line that describes it.

    Raises:
        OSError: If a file does not exist or cannot be written.
        ValueError: If ``src`` is not a released classifier.
    """
    if os.path.exists(src) and dst.exists() and os.path.samefile(src, dst):
        raise ValueError(f'{dst}: DST is SRC itself; give another name')
    content = read_checkpoint(src)
    try:
        weights = find_state_dict(content)
        arch = find_arch(weights, EMOv2.arch_settings)
        if arch is None:
            raise ValueError(f'the weights match none of the archs {list(EMOv2.arch_settings)}')
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
    """Name of the training config. Only the file name tells whether a released file was distilled."""
    published = re.search(rf'EMOv2_{arch}(_224|_224_KD|_512_KD)\.pth$', src, re.IGNORECASE)
    if published:
        return f'emo2_{arch}' + published[1].lower().replace('_224', '')
    return recipe_of(content)
