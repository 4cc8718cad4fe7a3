"""Custom datasets of four tiny images in each of the three formats."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from helpers.tiny import write_data


@pytest.fixture
def own(tmp_path: Path) -> Path:
    """A folder that holds what the three formats ask for: four images, the last two for validation."""
    write_data(tmp_path / 'raw')
    root = tmp_path / 'own'
    coco = json.loads((tmp_path / 'raw/coco/boxes.json').read_text())
    for split, numbers in (('train', (0, 1)), ('val', (2, 3))):
        for name in ('annotations', f'images/{split}', f'masks/{split}'):
            (root / name).mkdir(parents=True, exist_ok=True)
        for i in numbers:
            shutil.copy(tmp_path / f'raw/coco/images/{i}.png', root / f'images/{split}')
            shutil.copy(tmp_path / f'raw/labels/{i}.png', root / f'masks/{split}')
            kind = ('dark', 'light')[i % 2]
            (root / f'classes/{split}/{kind}').mkdir(parents=True)
            shutil.copy(tmp_path / f'raw/coco/images/{i}.png', root / f'classes/{split}/{kind}')
        content = {
            'images': [x for x in coco['images'] if x['id'] in numbers],
            'annotations': [x for x in coco['annotations'] if x['image_id'] in numbers],
            'categories': coco['categories'],
        }
        (root / f'annotations/{split}.json').write_text(json.dumps(content))
    (root / 'classes.txt').write_text('ground\nbox\n')
    return root
