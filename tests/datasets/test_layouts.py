"""Folders as people have them: what is found is what is trained, and what cannot be used is named."""

from __future__ import annotations

import os
import shutil
from collections import Counter
from pathlib import Path
from typing import Any, Callable, NamedTuple

import numpy as np
import pytest
from helpers.tiny import ROOT, SIDE, edit_json
from mmengine.config import Config
from mmengine.registry import DATASETS, DefaultScope
from PIL import Image

from emo2_mm.config import innermost_dataset
from emo2_mm.datasets import report
from emo2_mm.datasets.check import check_datasets
from emo2_mm.datasets.layouts import FORMATS
from emo2_mm.engine.preflight import check_data
from emo2_mm.errors import UserError

CONFIGS = {
    'coco': 'det/retinanet_emo2_custom.py',
    'masks': 'det/mask-rcnn_emo2_custom.py',
    'maps': 'seg/segformer_emo2_custom.py',
    'folders': 'cls/emo2_custom.py',
}
Change = Callable[[Path], Any]


class Taken(NamedTuple):
    """A config with a folder in it: names of the classes, and (image, labels) of each split."""

    cfg: Config
    count: int
    classes: list[str]
    train: list[tuple[str, tuple]]
    val: list[tuple[str, tuple]]


def load(form: str) -> Config:
    cfg = Config.fromfile(ROOT / 'configs' / CONFIGS[form])
    pytest.importorskip(cfg.default_scope)
    return cfg


def samples(cfg: Config, split: str) -> list[tuple[str, tuple]]:
    """Image and labels of each sample, as the datasets of a config give them."""
    loader = cfg[f'{split}_dataloader']
    if not Path(innermost_dataset(loader.dataset).data_root).is_dir():
        return []
    with DefaultScope.overwrite_default_scope(cfg.default_scope):
        dataset = DATASETS.build({**loader.dataset, 'pipeline': []})
    found = []
    for i in range(len(dataset)):
        info = dataset.get_data_info(i)
        labels = [x['bbox_label'] for x in info.get('instances', ())]
        if 'gt_label' in info:
            labels.append(info['gt_label'])
        elif 'seg_map_path' in info and 'instances' not in info:
            values = np.unique(np.array(Image.open(info['seg_map_path'])).astype(int)).tolist()
            labels += [(info['label_map'] or {}).get(value, value) for value in values]
        found.append((info['img_path'], tuple(labels)))
    return found


def take(form: str, root: Path, validate: bool = True) -> Taken:
    cfg = load(form)
    if not validate:
        cfg.val_cfg = None
    count, classes = FORMATS[cfg.data_format](cfg, root)
    check_data(cfg, *(('train', 'val', 'test') if validate else ('train',)))
    val = samples(cfg, 'val') if cfg.get('test_cfg') is not None else []
    return Taken(cfg, count, classes, samples(cfg, 'train'), val)


@pytest.fixture(autouse=True)
def forget_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(report, '_told', set())


@pytest.fixture
def folder(own: Path) -> Callable[[str], Path]:
    return lambda form: own / 'classes' if form == 'folders' else own


def each_image(change: Callable[[Path], Any]) -> Change:
    def edit(root: Path) -> None:
        for path in sorted(p for p in root.rglob('*.png') if 'masks' not in p.parts):
            change(path)

    return edit


def each_map(change: Callable[[Path], Any]) -> Change:
    return lambda root: [change(path) for path in sorted(root.glob('masks/*/*.png'))]


def convert(suffix: str, kind: str | None = None, mode: str | None = None) -> Callable[[Path], None]:
    """Save an image under another suffix, and with another content."""

    def change(path: Path) -> None:
        image = Image.open(path)
        image = image.convert(mode) if mode else image.copy()
        path.unlink()
        image.save(path.with_suffix(suffix), kind)

    return change


def map_values(change: Callable[[np.ndarray], np.ndarray]) -> Change:
    def edit(path: Path) -> None:
        pixels = change(np.array(Image.open(path)).astype(int))
        Image.fromarray(pixels.astype(np.uint8)).save(path)

    return each_map(edit)


def move(old: str, new: str) -> Change:
    def edit(root: Path) -> None:
        (root / new).parent.mkdir(parents=True, exist_ok=True)
        shutil.move(root / old, root / new)

    return edit


def steps(*changes: Change) -> Change:
    return lambda root: [change(root) for change in changes]


def names_to(suffix: str) -> Change:
    """Change the suffix in the annotation files, too."""

    def edit(root: Path) -> None:
        for file in root.glob('annotations/*.json'):
            file.write_text(file.read_text().replace('.png"', f'{suffix}"'))

    return edit


def remove(name: str) -> Change:
    def edit(root: Path) -> None:
        path = root / name
        shutil.rmtree(path) if path.is_dir() else path.unlink()

    return edit


def class_names(text: str, encoding: str = 'utf-8') -> Change:
    return lambda root: (root / 'classes.txt').write_bytes(text.encode(encoding))


def hide(root: Path) -> None:
    """What macOS, Windows, Jupyter and archives leave beside images."""
    for path in list(root.rglob('*.png')):
        path.with_name(f'._{path.name}').write_bytes(b'\0' * 20)
    for top in {path.parent for path in root.rglob('*.png')}:
        (top / '.ipynb_checkpoints').mkdir()
        shutil.copy(next(top.glob('[0-9].png')), top / '.ipynb_checkpoints/0-checkpoint.png')
        (top / 'Thumbs.db').write_bytes(b'x')
        (top / '__MACOSX').mkdir()
    for name in ('.ipynb_checkpoints', '__MACOSX'):
        for split in ('train', 'val'):
            if (root / split).is_dir():
                (root / split / name).mkdir(exist_ok=True)


def palette(path: Path) -> None:
    image = Image.open(path)
    image.putpalette([200, 100, 50] * 256)
    image.save(path)


def turn(path: Path) -> None:
    """An image of 80 x 64 stored pixels, displayed upright."""
    tags = Image.Exif()
    tags[0x0112] = 6
    Image.new('RGB', (80, SIDE)).save(path, 'JPEG', exif=tags)


# "format: name" -> change of the folder: the same images and labels are trained and evaluated
SAME: dict[str, Change] = {
    **{f'{form}: hidden files and folders': hide for form in ('coco', 'maps', 'folders')},
    'coco: Roboflow': steps(
        move('annotations/train.json', 'images/train/_annotations.coco.json'),
        move('annotations/val.json', 'images/val/_annotations.coco.json'),
        move('images/train', 'train'),
        move('images/val', 'valid'),
    ),
    'coco: names of COCO 2017': steps(
        move('annotations/train.json', 'annotations/instances_train2017.json'),
        move('annotations/val.json', 'annotations/instances_val2017.json'),
        lambda root: (root / 'annotations/captions_train2017.json').write_text('{}'),
        move('images/train', 'train2017'),
        move('images/val', 'val2017'),
    ),
    'coco: CVAT, a task for each split': steps(
        move('annotations/train.json', 'train/annotations/instances_default.json'),
        move('annotations/val.json', 'val/annotations/instances_default.json'),
        move('images/train', 'train/images/default'),
        move('images/val', 'val/images/default'),
        lambda root: [shutil.move(path, path.parent.parent) for path in root.glob('*/images/default/*.png')],
    ),
    'coco: CVAT, subsets': steps(
        move('annotations/train.json', 'annotations/instances_Train.json'),
        move('annotations/val.json', 'annotations/instances_Validation.json'),
        move('images/train', 'images/Train'),
        move('images/val', 'images/Validation'),
    ),
    'coco: Training and Testing': steps(
        move('annotations/train.json', 'Training/annotations.json'),
        move('annotations/val.json', 'Testing/annotations.json'),
        move('images/train', 'Training/images'),
        move('images/val', 'Testing/images'),
    ),
    'coco: files in the root': steps(
        move('annotations/train.json', 'train.json'),
        move('annotations/val.json', 'my_val_set.json'),
        lambda root: [shutil.move(path, root) for path in root.glob('images/*/*.png')],
    ),
    'coco: upper-case suffixes': each_image(lambda path: path.rename(path.with_suffix('.PNG'))),
    'coco: JPEG in CMYK': steps(each_image(convert('.jpg', None, 'CMYK')), names_to('.jpg')),
    'coco: jfif': steps(each_image(convert('.jfif', 'JPEG')), names_to('.jfif')),
    'coco: tif': steps(each_image(convert('.tif')), names_to('.tif')),
    'maps: train/images': steps(
        *(move(f'{kind}/{s}', f'{s}/{kind}') for kind in ('images', 'masks') for s in ('train', 'val'))
    ),
    'maps: train and train_labels': steps(
        *(move(f'images/{s}', s) for s in ('train', 'val')),
        *(move(f'masks/{s}', f'{s}_labels') for s in ('train', 'val')),
    ),
    'maps: img_dir and ann_dir': steps(move('images', 'img_dir'), move('masks', 'ann_dir')),
    'maps: Images, Masks, Training': steps(
        *(move(f'{kind}/train', f'{kind}/Training') for kind in ('images', 'masks')),
        *(move(f'{kind}/val', f'{kind}/Testing') for kind in ('images', 'masks')),
        move('images', 'Images'),
        move('masks', 'Masks'),
    ),
    'maps: images of several suffixes': lambda root: [
        convert(suffix)(root / f'images/{name}.png')
        for suffix, name in zip(('.JPG', '.webp', '.Tiff', '.bmp'), ('train/0', 'train/1', 'val/2', 'val/3'))
    ],
    'maps: _mask.png': each_map(lambda path: path.rename(path.with_name(f'{path.stem}_mask.png'))),
    'maps: .PNG': each_map(lambda path: path.rename(path.with_suffix('.PNG'))),
    'maps: 0 and 255': map_values(lambda x: x * 255),
    'maps: 0 and 128': map_values(lambda x: x * 128),
    'maps: 1 and 2': map_values(lambda x: x + 1),
    'maps: one bit': each_map(lambda p: Image.open(p).point(lambda x: x * 255).convert('1').save(p)),
    'maps: palette': each_map(palette),
    'maps: subfolders': steps(
        *(move(f'{kind}/train/0.png', f'{kind}/train/more/0.png') for kind in ('images', 'masks'))
    ),
    'maps: names with a mark': class_names('ground\r\n box \r\n\r\n', 'utf-8-sig'),
    'maps: names in UTF-16': class_names('ground\nbox\n', 'utf-16'),
    'folders: Training and Testing': steps(move('train', 'Training'), move('val', 'Testing')),
    'folders: upper-case suffixes': each_image(lambda p: p.rename(p.with_suffix('.PNG'))),
    'folders: webp': each_image(convert('.webp')),
    'folders: tiff of 16 bits': each_image(convert('.tiff', None, 'I;16')),
    'folders: jfif': each_image(convert('.jfif', 'JPEG')),
    'folders: subfolders': each_image(lambda path: move(path.name, f'more/{path.name}')(path.parent)),
    'folders: other files': lambda root: (root / 'train/dark/notes.txt').write_text('x'),
    'folders: images that OpenCV does not read': lambda root: (root / 'train/dark/0.heic').write_bytes(b'x'),
    'folders: links': steps(
        move('train/dark', 'elsewhere/dark'),
        lambda root: (root / 'train/dark').symlink_to(root / 'elsewhere/dark'),
    ),
    'folders: a loop of links': lambda root: (root / 'train/dark/loop').symlink_to(root / 'train/dark'),
}
TOLD = {  # a word of what is told of such a change; of the others, nothing is
    'coco: upper-case suffixes': 'COCO043',
    **{f'maps: {name}': 'SEG023' for name in ('0 and 255', '0 and 128', '1 and 2')},
    'maps: names with a mark': 'utf-8-sig',
    'maps: names in UTF-16': 'utf-16',
    'folders: other files': '1 x .txt',
    'folders: images that OpenCV does not read': '1 x .heic',
}


def label_of(sample: tuple[str, tuple]) -> tuple[str, tuple]:
    path, labels = sample
    return Path(path).stem, labels


@pytest.mark.parametrize('name', SAME)
def test_same_data(folder: Callable, name: str, capsys: pytest.CaptureFixture) -> None:
    form, word = name.split(':')[0], TOLD.get(name, '')
    root = folder(form)
    plain = take(form, root)
    capsys.readouterr()
    SAME[name](root)
    taken = take(form, root)
    said = capsys.readouterr().out
    assert word in said and (word or not said.replace('creating index...\nindex created!\n', '')), said
    assert (taken.count, taken.classes) == (plain.count, plain.classes)
    for split in ('train', 'val'):
        got, wanted = (list(map(label_of, getattr(x, split))) for x in (taken, plain))
        assert Counter(got) == Counter(wanted) and len(got) == 2


def no_val(root: Path) -> None:
    for path in [*root.glob('annotations/val.json'), *root.glob('*/val'), root / 'val']:
        shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)


def two_files(root: Path) -> None:
    shutil.copy(root / 'annotations/train.json', root / 'annotations/b_train.json')
    move('annotations/train.json', 'annotations/a_train.json')(root)


def rename_a_class(root: Path) -> None:
    file = root / 'annotations/val.json'
    file.write_text(file.read_text().replace('"light"', '"Light"'))


def class_in_latin_1(root: Path) -> None:
    for split in ('train', 'val'):
        os.rename(root / split / 'light', os.fsencode(root / split) + b'/l\xefght')


# "format: name" -> change of the folder, and what the message names
REFUSED: dict[str, tuple] = {
    'coco: no split': (no_val, 'annotation file for val', 'holds annotations/', '--no-validate'),
    'coco: two files': (
        two_files,
        'several annotation files for train',
        'a_train.json, annotations/b_train.json',
    ),
    'coco: no images': (remove('images'), 'train.json names the image 0.png', 'in none of these folders'),
    'coco: one image is missing': (remove('images/val/3.png'), '3.png', 'IMG001'),
    'coco: a class in val only': (rename_a_class, "objects of 'Light'", "it has 'light'", 'rename'),
    'maps: no split': (no_val, 'images/val and masks/val', '--no-validate'),
    'maps: no folder of maps': (move('masks', 'things'), 'no folder of maps', 'things/'),
    'maps: no names': (remove('classes.txt'), 'classes.txt'),
    'maps: one name': (class_names('box'), "such as 'background'"),
    'maps: name twice': (class_names('a\nb\na'), "'a' twice"),
    'maps: names in Latin-1': (class_names('café\nbox', 'latin-1'), 'cannot be read as UTF-8', 'byte 3'),
    'maps: a map is missing': (remove('masks/val/3.png'), 'lacks 1', '3.png'),
    'maps: more classes': (map_values(lambda x: x * 2 + x.cumsum(0) % 3), 'SEG007', '0 to 1, and 255'),
    'maps: all 255': (map_values(lambda x: x * 0 + 255), 'SEG008', '255 only'),
    'maps: colours': (each_map(convert('.png', None, 'RGB')), 'SEG003', 'one channel'),
    'maps: alpha': (each_map(convert('.png', None, 'RGBA')), 'SEG003'),
    'maps: another size': (each_map(lambda p: Image.new('L', (SIDE, 32)).save(p)), 'SEG005', '(64, 32)'),
    'maps: no image of a map': (each_image(convert('.gif')), 'holds no image', '0.gif'),
    'maps: one stem twice': (
        lambda root: Image.new('RGB', (SIDE, SIDE)).save(root / 'images/train/0.jpg'),
        'differ in suffix only',
        '0.png',
    ),
    'folders: no split': (no_val, 'no folder val', 'holds train/'),
    'folders: no splits': (steps(move('train/dark', 'dark'), no_val), 'folder'),
    'folders: one class': (remove('train/dark'), 'two classes', 'light/'),
    'folders: a class in val only': (move('val/light', 'val/Light'), 'Light (there is light)'),
    'folders: a class without images': (
        move('train/dark/0.png', 'train/dark/0.gif'),
        'train/dark holds no image',
        '0.gif',
    ),
    'folders: no images in val': (
        lambda root: [path.unlink() for path in root.glob('val/*/*.png')],
        'val holds no image',
    ),
    'folders: a class that is not UTF-8': (class_in_latin_1, 'l\\udcefght', 'not UTF-8', 'rename'),
    'folders: one folder below': (
        steps(move('train', 'set/train'), move('val', 'set/val')),
        'Perhaps data_root=',
    ),
}


@pytest.mark.parametrize('name', REFUSED)
def test_refused_by_name(folder: Callable, name: str) -> None:
    form = name.split(':')[0]
    change, *words = REFUSED[name]
    root = folder(form)
    change(root)
    with pytest.raises(UserError) as caught:
        take(form, root)
    message = str(caught.value).encode('utf-8', 'backslashreplace').decode()
    assert [word for word in (str(root), *words) if word not in message] == [], message


@pytest.mark.parametrize('form', ['coco', 'maps', 'folders'])
def test_no_validation_split_is_needed(folder: Callable, form: str) -> None:
    root = folder(form)
    taken = take(form, root, validate=False)
    assert len(taken.val) == 2 and taken.cfg.test_cfg is not None  # one that is there is kept for later
    no_val(root)
    taken = take(form, root, validate=False)
    assert (len(taken.train), taken.val, taken.cfg.test_cfg) == (2, [], None)


def test_one_file_is_for_training(own: Path) -> None:
    no_val(own)
    move('annotations/train.json', 'result.json')(own)
    assert len(take('coco', own, validate=False).train) == 2


@pytest.mark.parametrize('form', ['coco', 'maps', 'folders'])
def test_missing_folder_names_what_is_there(own: Path, form: str) -> None:
    with pytest.raises(UserError, match=f'no folder {own}/nowhere; {own} holds annotations/'):
        take(form, own / 'nowhere')


def test_backslashes_in_the_path(own: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(own.parent)
    with pytest.raises(UserError, match='write the path with / for'):
        take('folders', Path('own\\classes'))


@pytest.mark.parametrize('form', ['coco', 'maps', 'folders'])
def test_images_in_both_splits_are_told(folder: Callable, form: str, capsys: pytest.CaptureFixture) -> None:
    root = folder(form)
    old, new = (
        ('train/dark/0.png', 'val/dark/0.png')
        if form == 'folders'
        else ('images/train/0.png', 'images/val/0.png')
    )
    shutil.copy(root / old, root / new)
    if form == 'maps':
        shutil.copy(root / 'masks/train/0.png', root / 'masks/val/0.png')
    elif form == 'coco':
        image = dict(id=77, file_name='0.png', width=SIDE, height=SIDE)
        edit_json(root / 'annotations/val.json', lambda content: content['images'].append(image))
    take(form, root)
    assert '1 of 3 images of the validation split are also in the training split' in capsys.readouterr().out


def test_equal_names_of_other_images_are_no_copies(own: Path, capsys: pytest.CaptureFixture) -> None:
    for path in sorted(own.glob('*/val/*.png')):
        path.rename(path.with_name(f'{int(path.stem) - 2}.png'))
    take('maps', own)
    assert 'also in' not in capsys.readouterr().out


def test_class_without_pixel_is_told(own: Path, capsys: pytest.CaptureFixture) -> None:
    (own / 'classes.txt').write_text('ground\nbox\nsky\n')
    map_values(lambda x: x * 255)(own)
    take('maps', own)
    said = capsys.readouterr().out
    assert f"{own}/masks/train: 'box' (1), 'sky' (2): class has no pixel" in said


def test_class_without_image_in_val_is_told(own: Path, capsys: pytest.CaptureFixture) -> None:
    """Labels follow the names, not the place among the folders."""
    shutil.rmtree(own / 'classes/val/dark')
    taken = take('folders', own / 'classes')
    assert [labels for _, labels in taken.val] == [(1,)]
    assert 'val: dark: class folder holds no images' in capsys.readouterr().out


def test_one_class_of_boxes(own: Path) -> None:
    def leave_one(content: dict) -> None:
        del content['categories'][1]
        for box in content['annotations']:
            box['category_id'] = 1

    for file in own.glob('annotations/*.json'):
        edit_json(file, leave_one)
    assert take('coco', own).classes == ['dark']


def test_order_of_categories_in_val(own: Path) -> None:
    plain = take('coco', own).val
    edit_json(own / 'annotations/val.json', lambda content: content['categories'].reverse())
    assert take('coco', own).val == plain


def test_masks_are_needed_by_mask_rcnn_only(own: Path) -> None:
    edit_json(own / 'annotations/train.json', lambda content: content['annotations'][0].pop('segmentation'))
    assert len(take('coco', own).train) == 2
    with pytest.raises(UserError, match=r'annotation 1: mask is missing.* \[COCO010\]'):
        take('masks', own)


@pytest.mark.parametrize('stored', [False, True])
def test_orientation_of_images_with_maps(own: Path, stored: bool) -> None:
    each_image(turn)(own / 'images')
    each_map(lambda path: Image.new('L', (80, SIDE) if stored else (SIDE, 80), 1).save(path))(own)
    loader = take('maps', own).cfg.train_dataloader.dataset.pipeline[0]
    assert loader.get('color_type', 'color') == ('color_ignore_orientation' if stored else 'color')


def test_wrappers_stay(own: Path) -> None:
    cfg = load('coco')
    wrapped = dict(type='ClassBalancedDataset', oversample_thr=0.5, dataset=cfg.train_dataloader.dataset)
    cfg.train_dataloader.dataset = wrapped
    FORMATS['coco'](cfg, own)
    assert cfg.train_dataloader.dataset.type == 'ClassBalancedDataset'
    assert cfg.train_dataloader.dataset.dataset.data_root == f'{own}/'
    cfg.train_dataloader.dataset = dict(type='ConcatDataset', datasets=[])
    with pytest.raises(UserError, match='ConcatDataset of several datasets'):
        FORMATS['coco'](cfg, own)


@pytest.mark.parametrize('form', ['coco', 'maps', 'folders'])
def test_check_agrees(folder: Callable, form: str, capsys: pytest.CaptureFixture) -> None:
    """What training takes has no errors; what it refuses, the check refuses with the same words."""
    root = folder(form)

    def check() -> int:
        cfg = load(form)
        cfg.data_root = str(root)
        cfg.cfg_options = dict(data_root=str(root))
        return check_datasets(cfg, ('train', 'val'))

    assert check() == 0
    change = {'coco': 'coco: one image is missing', 'maps': 'maps: colours', 'folders': 'folders: one class'}
    REFUSED[change[form]][0](root)
    with pytest.raises(UserError) as checked:
        check()
    with pytest.raises(UserError) as trained:
        take(form, root)
    assert str(checked.value) == str(trained.value)
