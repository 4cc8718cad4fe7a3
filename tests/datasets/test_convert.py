"""Datasets of each format, made from one truth, come back as that truth; what is odd in them is reported."""

from __future__ import annotations

import base64
import io
import json
import shutil
from pathlib import Path
from typing import Any, Callable
from xml.sax.saxutils import quoteattr

import numpy as np
import pytest
from helpers.tiny import ROOT, edit_json, run
from PIL import Image, ImageDraw

from emo2_mm.config import load_config
from emo2_mm.datasets.convert import FORMATS, convert_dataset, recognise
from emo2_mm.datasets.convert.readers import READERS
from emo2_mm.datasets.custom import apply_custom_dataset
from emo2_mm.errors import UserError

NAMES = ('cat', 'dog')
WIDTH, HEIGHT = 80, 60
# split -> image -> (class, left, top, right, bottom), ...
TRUTH: dict[str, dict[str, list[tuple]]] = {
    'train': {'a': [('cat', 8, 6, 40, 30)], 'b': [('dog', 16, 12, 48, 48), ('cat', 50, 3, 70, 21)], 'c': []},
    'val': {'d': [('dog', 4, 9, 60, 51)]},
}


def outline(box: tuple) -> list[float]:
    """A hexagon in the box, x, y, x, y ..."""
    _, left, top, right, bottom = box
    quarter = (right - left) / 4
    return [left + quarter, top, right - quarter, top, right, (top + bottom) / 2] + [
        *(right - quarter, bottom, left + quarter, bottom, left, (top + bottom) / 2)
    ]


def image(name: str) -> Image.Image:
    return Image.fromarray(np.random.RandomState(ord(name)).randint(0, 255, (HEIGHT, WIDTH, 3), np.uint8))


def save(name: str, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    image(name).save(path)


def write(path: Path, text: str, encoding: str = 'utf-8') -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding=encoding)


def write_coco(root: Path) -> None:
    for split, images in TRUTH.items():
        content: dict[str, list] = {'images': [], 'annotations': [], 'categories': []}
        content['categories'] = [dict(id=7, name='animals'), dict(id=8, name='cat'), dict(id=9, name='dog')]
        for number, (name, boxes) in enumerate(images.items()):
            save(name, root / f'photos/{split}/{name}.png')
            content['images'].append(dict(id=number, file_name=f'{name}.png', width=WIDTH, height=HEIGHT))
            for box in boxes:
                label, left, top, right, bottom = box
                entry = dict(id=0, image_id=number, category_id=8 + NAMES.index(label))
                entry.update(bbox=[left, top, right - left, bottom - top], segmentation=[outline(box)])
                content['annotations'].append(entry)
        write(root / f'labels_{split}.json', json.dumps(content), 'utf-8-sig')


def write_yolo(root: Path, segments: bool = False) -> None:
    for split, images in TRUTH.items():
        for name, boxes in images.items():
            save(name, root / f'{split}/images/{name}.png')
            lines = []
            for box in boxes:
                label, left, top, right, bottom = box
                values = [(left + right) / 2 / WIDTH, (top + bottom) / 2 / HEIGHT]
                values += [(right - left) / WIDTH, (bottom - top) / HEIGHT]
                if segments:
                    values = [x / (WIDTH, HEIGHT)[i % 2] for i, x in enumerate(outline(box))]
                lines.append(' '.join(map(repr, [NAMES.index(label), *values])))
            write(root / f'{split}/labels/{name}.txt', '\n'.join(lines))
    write(root / 'data.yaml', f'train: ../train/images\nval: ../val/images\nnc: 2\nnames: {list(NAMES)}\n')


def write_voc(root: Path) -> None:
    for split, images in TRUTH.items():
        write(root / f'ImageSets/Main/{split}.txt', '\n'.join(images))
        for name, boxes in images.items():
            save(name, root / f'JPEGImages/{name}.png')
            objects = ''.join(
                f'<object><name>{label}</name><bndbox><xmin>{left}</xmin><ymin>{top}</ymin><xmax>{right}.0</xmax>'
                f'<ymax>{bottom}</ymax></bndbox></object>'
                for label, left, top, right, bottom in boxes
            )
            size = f'<size><width>{WIDTH}</width><height>{HEIGHT}</height></size>'
            text = f'<annotation><filename>{name}.png</filename>{size}{objects}</annotation>'
            write(root / f'Annotations/{name}.xml', text)


def write_labelme(root: Path) -> None:
    for split, images in TRUTH.items():
        for name, boxes in images.items():
            save(name, root / f'{split}/{name}.png')
            shapes = [
                dict(
                    label=box[0],
                    shape_type='polygon',
                    group_id=None,
                    points=np.reshape(outline(box), (-1, 2)).tolist(),
                )
                for box in boxes
            ]
            content = dict(
                shapes=shapes, imagePath=f'{name}.png', imageData=None, imageWidth=WIDTH, imageHeight=HEIGHT
            )
            write(root / f'{split}/{name}.json', json.dumps(content))


def write_cvat(root: Path) -> None:
    images = []
    for split, content in TRUTH.items():
        for name, boxes in content.items():
            save(name, root / f'images/{split}/{name}.png')
            polygons = ''
            for box in boxes:
                points = ';'.join(f'{x},{y}' for x, y in np.reshape(outline(box), (-1, 2)).tolist())
                polygons += f'<polygon label={quoteattr(box[0])} points="{points}"/>'
            images.append(
                f'<image name="{split}/{name}.png" width="{WIDTH}" height="{HEIGHT}">{polygons}</image>'
            )
    labels = ''.join(f'<label><name>{name}</name></label>' for name in (*NAMES, 'unused'))
    meta = f'<meta><task><labels>{labels}</labels></task></meta>'
    write(
        root / 'annotations.xml', f'<annotations><version>1.1</version>{meta}{"".join(images)}</annotations>'
    )


COLOURS = {'background': (0, 0, 0), 'cat': (200, 0, 0), 'dog': (0, 0, 200)}


def true_map(boxes: list[tuple]) -> np.ndarray:
    drawn = Image.new('L', (WIDTH, HEIGHT))
    for box in boxes:  # listed from the largest
        ImageDraw.Draw(drawn).polygon(outline(box), fill=1 + NAMES.index(box[0]))
    return np.array(drawn)


def write_colours(root: Path) -> None:
    for split, images in TRUTH.items():
        for name, boxes in images.items():
            save(name, root / f'{split}/images/{name}.png')
            colours = np.array(list(COLOURS.values()), np.uint8)[true_map(boxes)]
            (root / split / 'masks').mkdir(exist_ok=True)
            Image.fromarray(colours).save(root / f'{split}/masks/{name}.png')
    lines = [f'{name}:{",".join(map(str, colour))}::' for name, colour in COLOURS.items()]
    write(root / 'labelmap.txt', '\n'.join(['# label:color_rgb:parts:actions', *lines]))


def read_boxes(root: Path) -> dict[str, dict[str, list[tuple]]]:
    found: dict[str, dict[str, list[tuple]]] = {}
    for file in sorted((root / 'annotations').iterdir()):
        content = json.loads(file.read_text())
        names = {x['id']: x['name'] for x in content['categories']}
        assert list(names.values()) == list(NAMES)
        images = {x['id']: Path(x['file_name']).stem for x in content['images']}
        found[file.stem] = {name: [] for name in images.values()}
        for image in content['images']:
            assert (root / 'images' / file.stem / image['file_name']).is_file()
            assert (image['width'], image['height']) == (WIDTH, HEIGHT)
        for x in content['annotations']:
            left, top, width, height = x['bbox']
            box = (names[x['category_id']], left, top, left + width, top + height)
            found[file.stem][images[x['image_id']]].append(box)
            assert x['iscrowd'] == 0
            assert x['area'] > 0
            if 'segmentation' in x:
                assert np.allclose(x['segmentation'][0], outline(box), atol=0.01)
    return found


@pytest.mark.parametrize(
    ('kind', 'make', 'masks'),
    [
        ('coco', write_coco, True),
        ('yolo', write_yolo, False),
        ('yolo', lambda root: write_yolo(root, segments=True), True),
        ('voc', write_voc, False),
        ('labelme', write_labelme, True),
        ('cvat', write_cvat, True),
    ],
    ids=['coco', 'yolo', 'yolo segments', 'voc', 'labelme', 'cvat'],
)
def test_formats_come_back_as_they_were(tmp_path: Path, kind: str, make: Callable, masks: bool) -> None:
    make(tmp_path / 'src')
    before = {path: path.read_bytes() for path in (tmp_path / 'src').rglob('*') if path.is_file()}
    assert recognise(tmp_path / 'src') == kind
    convert_dataset(tmp_path / 'src', tmp_path / 'dst')
    found = read_boxes(tmp_path / 'dst')
    assert found.keys() == TRUTH.keys()
    for split, images in TRUTH.items():
        assert found[split].keys() == images.keys()
        for name, boxes in images.items():
            got = found[split][name]
            assert [x[0] for x in got] == [x[0] for x in boxes]
            assert np.allclose([x[1:] for x in got], [x[1:] for x in boxes], atol=0.01)
    content = train_file(tmp_path)
    assert all(('segmentation' in x) == masks for x in content['annotations'])
    assert before == {path: path.read_bytes() for path in (tmp_path / 'src').rglob('*') if path.is_file()}

    cfg = load_config(ROOT / 'configs/det/retinanet_emo2_custom.py', [f'data_root={tmp_path}/dst'])
    apply_custom_dataset(cfg)
    assert cfg.train_dataloader.dataset.metainfo.classes == NAMES


@pytest.mark.parametrize(
    'make', [write_colours, write_coco, write_labelme], ids=['colours', 'coco', 'labelme']
)
def test_maps_of_classes(tmp_path: Path, make: Callable) -> None:
    make(tmp_path / 'src')
    to = None if make is write_colours else 'maps'
    convert_dataset(tmp_path / 'src', tmp_path / 'dst', to=to)
    assert (tmp_path / 'dst/classes.txt').read_text().split() == ['background', *NAMES]
    for split, images in TRUTH.items():
        for name, boxes in images.items():
            with Image.open(tmp_path / f'dst/masks/{split}/{name}.png') as found:
                assert found.mode == 'L'
                assert (np.array(found) == true_map(boxes)).all()
    cfg = load_config(ROOT / 'configs/seg/segformer_emo2_custom.py', [f'data_root={tmp_path}/dst'])
    apply_custom_dataset(cfg)
    assert cfg.train_dataloader.dataset.metainfo.classes == ('background', *NAMES)


def test_colours_without_names_are_told_of(tmp_path: Path) -> None:
    write_colours(tmp_path / 'src')
    (tmp_path / 'src/labelmap.txt').unlink()
    _, lines = convert_dataset(tmp_path / 'src', tmp_path / 'dst')
    assert any('3 x colour has no name: list them in labelmap.txt' in line for line in lines)
    assert (tmp_path / 'dst/classes.txt').read_text().split() == [
        'colour_000000',
        'colour_0000c8',
        'colour_c80000',
    ]


def test_blurred_colours_are_refused(tmp_path: Path) -> None:
    write_colours(tmp_path / 'src')
    (tmp_path / 'src/labelmap.txt').unlink()
    image('x').save(tmp_path / 'src/train/masks/a.png')
    with pytest.raises(UserError, match='more than 255 colours'):
        convert_dataset(tmp_path / 'src', tmp_path / 'dst')
    assert not (tmp_path / 'dst').exists()


def test_colour_of_no_class_is_ignored(tmp_path: Path) -> None:
    write_colours(tmp_path / 'src')
    write(tmp_path / 'src/labelmap.txt', 'background:0,0,0::\ncat:200,0,0::\n')
    _, lines = convert_dataset(tmp_path / 'src', tmp_path / 'dst')
    assert any('mask has colours of no class: ignored (255)' in line and '0000c8' in line for line in lines)
    with Image.open(tmp_path / 'dst/masks/val/d.png') as found:
        assert set(np.unique(found)) == {0, 255}


def lines_of(root: Path) -> str:
    """What the report on a conversion to the folder dst beside it says."""
    return '\n'.join(convert_dataset(root, root.parent / 'dst')[1])


def train_file(root: Path) -> dict[str, Any]:
    return json.loads((root / 'dst/annotations/train.json').read_text(encoding='utf-8'))


def boxes_of(root: Path, name: str) -> list[list[float]]:
    content = train_file(root)
    number = next(x['id'] for x in content['images'] if x['file_name'] == name)
    return [x['bbox'] for x in content['annotations'] if x['image_id'] == number]


@pytest.mark.parametrize(
    ('line', 'said'),
    [
        ('7 0.5 0.5 0.1 0.1', 'class number is not 0 to 1: object left out'),
        ('x 0.5 0.5 0.1 0.1', 'line is not of numbers: left out'),
        ('0 0.5 0.5', 'line has 3 values: no box, no segment, left out'),
        ('0 0.95 0.5 0.3 0.1', 'object is partly outside its image: cut to it'),
        ('0 1.5 0.5 0.1 0.1', 'object is outside its image: left out'),
        ('0 40 30 20 10', 'coordinates are no shares of the image (0 to 1): object left out'),
        ('0 nan 0.5 0.1 0.1', 'object has numbers that are not finite: left out'),
        ('0 0.5 0.5 0 0.1', 'box has no area: left out'),
        ('0 0.5 0.5 0.1 0.1 0.93', 'line has a score: left out, the box is kept'),
    ],
)
def test_odd_lines_of_yolo(tmp_path: Path, line: str, said: str) -> None:
    write_yolo(tmp_path / 'src')
    write(tmp_path / 'src/train/labels/c.txt', line + '\n')
    assert f'1 x {said}' in lines_of(tmp_path / 'src')
    content = train_file(tmp_path)
    for left, top, width, height in (x['bbox'] for x in content['annotations']):
        assert 0 <= left < left + width <= WIDTH
        assert 0 <= top < top + height <= HEIGHT


def test_splits_of_data_yaml(tmp_path: Path) -> None:
    """Roboflow writes ../train/images for a folder beside the file; folders may have any name."""
    write_yolo(tmp_path / 'src')
    (tmp_path / 'src/train').rename(tmp_path / 'src/one')
    (tmp_path / 'src/val').rename(tmp_path / 'src/two')
    file = tmp_path / 'src/data.yaml'
    text = file.read_text().replace('../train', '../one').replace('../val', '../two')
    file.write_text(text.replace(str(list(NAMES)), '{0: cat, 1: dog}'))
    convert_dataset(tmp_path / 'src', tmp_path / 'dst')
    assert {split: set(images) for split, images in read_boxes(tmp_path / 'dst').items()} == {
        split: set(images) for split, images in TRUTH.items()
    }
    write(tmp_path / 'src/list.txt', './one/images/a.png\n./one/images/b.png\n')
    file.write_text(file.read_text().replace('../one/images', 'list.txt'))
    convert_dataset(tmp_path / 'src', tmp_path / 'listed')
    assert set(read_boxes(tmp_path / 'listed')['train']) == {'a', 'b'}


def test_yolo_without_some_files(tmp_path: Path) -> None:
    write_yolo(tmp_path / 'src')
    (tmp_path / 'src/train/labels/a.txt').unlink()
    write(tmp_path / 'src/train/labels/b.txt', '')
    said = lines_of(tmp_path / 'src')
    assert '1 x image has no label file: taken as background' in said
    assert '  without objects      3    0' in said
    (tmp_path / 'src/data.yaml').unlink()
    with pytest.raises(UserError, match='no names of classes: add a classes.txt'):
        convert_dataset(tmp_path / 'src', tmp_path / 'new')
    write(tmp_path / 'src/classes.txt', '\ufeffcat\r\ndog\r\n')
    assert convert_dataset(tmp_path / 'src', tmp_path / 'new')[0] == 'boxes'


def test_odd_files_of_voc(tmp_path: Path) -> None:
    write_voc(tmp_path / 'src')
    file = tmp_path / 'src/Annotations/b.xml'
    text = file.read_text().replace('<name>dog', '<difficult>1</difficult><truncated>1</truncated><name>dog')
    text = text.replace('<xmin>50</xmin>', '<xmin>70</xmin>').replace('<xmax>70.0</xmax>', '<xmax>50</xmax>')
    file.write_bytes(f'<?xml version="1.0" encoding="GBK"?>{text}'.replace('b.png', '猫.png').encode('gbk'))
    shutil.move(tmp_path / 'src/JPEGImages/b.png', tmp_path / 'src/JPEGImages/猫.png')
    (tmp_path / 'src/JPEGImages/a.png').unlink()
    said = lines_of(tmp_path / 'src')
    for finding in (
        'object is difficult: written as iscrowd, neither trained on nor counted',
        'object is truncated: kept',
        'box has its corners swapped: put in order',
        'image is missing: left out',
    ):
        assert f'1 x {finding}' in said
    content = train_file(tmp_path)
    assert [x['file_name'] for x in content['images']] == ['猫.png', 'c.png']
    assert [x['iscrowd'] for x in content['annotations']] == [1, 0]
    assert content['annotations'][1]['bbox'] == [50, 3, 20, 18]


def test_encoding_that_is_not_declared(tmp_path: Path) -> None:
    write_voc(tmp_path / 'src')
    file = tmp_path / 'src/Annotations/a.xml'
    file.write_bytes(file.read_text().replace('cat', '猫咪').encode('gbk'))
    assert '1 x file is not in UTF-8: read as gb18030' in lines_of(tmp_path / 'src')
    content = train_file(tmp_path)
    assert [x['name'] for x in content['categories']] == ['cat', 'dog', '猫咪']


def test_shapes_of_labelme(tmp_path: Path) -> None:
    write_labelme(tmp_path / 'src')
    points = [[10, 10], [30, 40]]
    mask = io.BytesIO()
    Image.fromarray(np.ones((10, 20), np.uint8)).save(mask, 'PNG')
    shapes = [
        dict(label='cat', points=points, shape_type='rectangle'),
        dict(label='cat', points=[[40, 30], [50, 30]], shape_type='circle'),
        dict(label='cat', points=points, shape_type='linestrip'),
        dict(label='dog', points=[[0, 0], [5, 0], [5, 5]], shape_type='polygon', group_id=1),
        dict(label='dog', points=[[20, 20], [25, 20], [25, 25]], shape_type='polygon', group_id=1),
        dict(
            label='dog',
            points=[[5, 6], [24, 15]],
            shape_type='mask',
            mask=base64.b64encode(mask.getvalue()).decode(),
        ),
    ]
    new = dict(shapes=shapes, imagePath=r'C:\photos\c.png')
    edit_json(tmp_path / 'src/train/c.json', lambda content: content.update(new), encoding='utf-16')
    said = lines_of(tmp_path / 'src')
    assert '1 x circle is taken as a polygon of 36 points' in said
    assert '1 x shape is a linestrip: left out' in said
    assert '1 x outlines of one group_id are one object' in said
    assert boxes_of(tmp_path, 'c.png') == [[10, 10, 20, 30], [30, 20, 20, 20], [0, 0, 25, 25], [5, 6, 20, 10]]


def test_image_in_a_labelme_file(tmp_path: Path) -> None:
    write_labelme(tmp_path / 'src')
    data = base64.b64encode((tmp_path / 'src/train/a.png').read_bytes()).decode()
    edit_json(tmp_path / 'src/train/a.json', lambda content: content.update(imageData=data))
    (tmp_path / 'src/train/a.png').unlink()
    assert '1 x image is missing: taken from the annotation file' in lines_of(tmp_path / 'src')
    with Image.open(tmp_path / 'dst/images/train/a.png') as found:
        assert (np.array(found) == np.array(image('a'))).all()


def test_shapes_of_cvat(tmp_path: Path) -> None:
    write_cvat(tmp_path / 'src')
    file = tmp_path / 'src/annotations.xml'
    shapes = (
        '<box label="cat" xtl="10" ytl="10" xbr="30" ybr="20" rotation="90">'
        '<attribute name="x">1</attribute></box>'
        '<mask label="dog" rle="0, 6" left="3" top="4" width="3" height="2"/>'
        '<polyline label="cat" points="1,1;2,2"/>'
    )
    text = file.read_text().replace('height="60"></image>', f'height="60">{shapes}</image>')
    file.write_text(text)
    said = lines_of(tmp_path / 'src')
    for finding in (
        'box is rotated: taken as an outline',
        'attributes are left out, the object is kept',
        'polyline is neither box nor outline: left out',
        'label has no object: no class (such as unused)',
    ):
        assert f'1 x {finding}' in said
    assert np.allclose(boxes_of(tmp_path, 'c.png'), [[15, 5, 10, 20], [3, 4, 3, 2]])


def test_tracks_of_cvat_are_refused(tmp_path: Path) -> None:
    write_cvat(tmp_path / 'src')
    file = tmp_path / 'src/annotations.xml'
    file.write_text(file.read_text().replace('</annotations>', '<track id="0" label="cat"/></annotations>'))
    with pytest.raises(UserError, match='export it as "CVAT for images 1.1"'):
        convert_dataset(tmp_path / 'src', tmp_path / 'dst')


def test_odd_entries_of_coco(tmp_path: Path) -> None:
    write_coco(tmp_path / 'src')
    file = tmp_path / 'src/labels_train.json'
    content = json.loads(file.read_text(encoding='utf-8-sig'))
    first, second, third = content['annotations']
    first['category_id'] = 99
    del second['bbox']
    third.update(iscrowd=1, image_id=5)
    content['images'][2]['width'] = 1
    file.write_text(json.dumps(content))
    said = lines_of(tmp_path / 'src')
    for finding in (
        'category id is unknown: object left out',
        'box is missing: taken from the outline',
        'object is of an unknown image: left out',
        'image has another size than its annotations say',
    ):
        assert f'1 x {finding}' in said
    assert '2 x category has no object: no class (such as animals)' in said


def test_image_in_both_splits_is_told_of(tmp_path: Path) -> None:
    write_yolo(tmp_path / 'src')
    shutil.copy(tmp_path / 'src/train/images/a.png', tmp_path / 'src/val/images/other.png')
    assert '1 x image of val is also in train: an evaluation on it is no test' in lines_of(tmp_path / 'src')


def write_folders(root: Path, numbers: dict[str, int]) -> None:
    for label, number in numbers.items():
        for i in range(number):
            save(chr(i + 64), root / label / f'{i}.png')


def test_each_class_is_split(tmp_path: Path) -> None:
    """The same in each run; with more images, those validated on before still are, but for their number."""
    write_folders(tmp_path / 'src', dict(cat=10, dog=20))
    assert recognise(tmp_path / 'src') == 'folders'
    val = []
    for name in ('one', 'two'):
        convert_dataset(tmp_path / 'src', tmp_path / name, val_fraction=0.2)
        val.append(
            sorted(
                path.relative_to(tmp_path / name / 'val') for path in (tmp_path / name / 'val').rglob('*.png')
            )
        )
    assert val[0] == val[1]
    assert [sum(path.parts[0] == label for path in val[0]) for label in NAMES] == [2, 4]
    assert len(list((tmp_path / 'one/train').rglob('*.png'))) == 24


def test_split_refuses_what_it_cannot_do(tmp_path: Path) -> None:
    write_folders(tmp_path / 'src', dict(cat=1, dog=20))
    with pytest.raises(UserError, match='leaves no training image of class cat'):
        convert_dataset(tmp_path / 'src', tmp_path / 'dst', val_fraction=0.2)
    write_yolo(tmp_path / 'yolo')
    with pytest.raises(UserError, match='there is a validation split of 1 images already'):
        convert_dataset(tmp_path / 'yolo', tmp_path / 'dst', val_fraction=0.2)


@pytest.mark.parametrize('task', ['det', 'seg', 'cls'])
def test_val_fraction_of_a_custom_config(tmp_path: Path, task: str, capsys: pytest.CaptureFixture) -> None:
    """One split is enough: the other comes from it, in the work dir."""
    make, name = {
        'det': (write_coco, 'configs/det/retinanet_emo2_custom.py'),
        'seg': (write_colours, 'configs/seg/segformer_emo2_custom.py'),
        'cls': (lambda root: write_folders(root / 'train', dict(cat=3, dog=3)), 'configs/cls/emo2_custom.py'),
    }[task]
    make(tmp_path / 'raw')
    if task != 'cls':
        convert_dataset(tmp_path / 'raw', tmp_path / 'own')
        for path in (tmp_path / 'own').glob('*/val*'):
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    root = tmp_path / ('raw' if task == 'cls' else 'own')
    for _ in range(2):
        cfg = load_config(ROOT / name, [f'data_root={root}', 'val_fraction=0.3'], str(tmp_path / 'work'))
        apply_custom_dataset(cfg)
        assert 'val_fraction=0.3' in capsys.readouterr().out
    assert str(tmp_path / 'work/split_data') in str(cfg.val_dataloader.dataset.data_root)
    number = {'det': 1, 'seg': 1, 'cls': 2}[task]
    images = tmp_path / 'work/split_data' / ('val' if task == 'cls' else 'images/val')
    assert len(list(images.rglob('*.png'))) == number


@pytest.mark.parametrize(
    ('source', 'target', 'message'),
    [
        ('nowhere', 'dst', 'there is no folder'),
        ('src', 'src', 'exists and is not empty'),
        ('src', 'src/dst', 'which is not to be changed'),
        ('odd', 'dst', 'is of no format that can be read (YOLO, CVAT XML'),
    ],
)
def test_folders_that_cannot_be_used(tmp_path: Path, source: str, target: str, message: str) -> None:
    write_voc(tmp_path / 'src')
    write(tmp_path / 'odd/readme.md', 'x')
    with pytest.raises(UserError) as caught:
        convert_dataset(tmp_path / source, tmp_path / target)
    assert message in str(caught.value)


def test_each_format_has_a_reader() -> None:
    assert set(FORMATS) == set(READERS)


def test_same_names_in_two_folders_stay_two_images(tmp_path: Path) -> None:
    write_cvat(tmp_path / 'src')
    file = tmp_path / 'src/annotations.xml'
    file.write_text(file.read_text().replace('train/', 'one/').replace('val/d', 'two/a'))
    shutil.move(tmp_path / 'src/images/train', tmp_path / 'src/images/one')
    save('d', tmp_path / 'src/images/two/a.png')
    convert_dataset(tmp_path / 'src', tmp_path / 'dst')
    names = sorted(path.name for path in (tmp_path / 'dst/images/train').iterdir())
    assert names == ['b.png', 'c.png', 'one_a.png', 'two_a.png']


def test_tool_prints_the_next_command(tmp_path: Path) -> None:
    write_yolo(tmp_path / 'my data')
    done = run(tmp_path, 'convert_dataset.py', 'my data', 'dst')
    assert done.returncode == 0, done.stderr
    assert 'my data: YOLO' in done.stdout
    assert (
        'python tools/train.py configs/det/retinanet_emo2_custom.py --cfg-options "data_root=dst"'
        in done.stdout
    )
    again = run(tmp_path, 'convert_dataset.py', 'my data', 'dst')
    assert (again.returncode, again.stderr) == (1, 'error: dst exists and is not empty; give a new folder\n')


@pytest.mark.parametrize(
    ('make', 'name', 'command'),
    [
        (write_yolo, 'det/retinanet', 'looks like YOLO'),
        (write_voc, 'det/ssdlite', 'looks like Pascal VOC'),
        (write_labelme, 'seg/segformer', 'NEW_FOLDER --to maps'),
        (write_cvat, 'det/mask-rcnn', 'looks like CVAT XML'),
        (write_colours, 'seg/fpn', 'looks like images with masks'),
    ],
)
def test_training_names_the_command(tmp_path: Path, make: Callable, name: str, command: str) -> None:
    """A folder in a foreign format is refused with what it is and what converts it."""
    make(tmp_path / 'my data')
    cfg = load_config(ROOT / f'configs/{name}_emo2_custom.py', [f'data_root={tmp_path}/my data'])
    with pytest.raises(UserError) as caught:
        apply_custom_dataset(cfg)
    assert command in str(caught.value)
    assert f"python tools/convert_dataset.py '{tmp_path}/my data' NEW_FOLDER" in str(caught.value)


def test_one_split_is_no_foreign_format(tmp_path: Path) -> None:
    write_coco(tmp_path / 'src')
    convert_dataset(tmp_path / 'src', tmp_path / 'dst')
    (tmp_path / 'dst/annotations/val.json').unlink()
    cfg = load_config(ROOT / 'configs/det/retinanet_emo2_custom.py', [f'data_root={tmp_path}/dst'])
    with pytest.raises(UserError) as caught:
        apply_custom_dataset(cfg)
    assert 'val_fraction=0.2 splits some images off' in str(caught.value)
    assert 'convert_dataset' not in str(caught.value)


def test_small_objects_lie_over_large_ones_in_maps(tmp_path: Path) -> None:
    """Whatever the order of the objects; crowds are ignored (255)."""
    write_coco(tmp_path / 'src')
    file = tmp_path / 'src/labels_train.json'
    content = json.loads(file.read_text(encoding='utf-8-sig'))
    square = [dict(id=i, image_id=2, category_id=8 + i % 2, bbox=[0, 0, 1, 1]) for i in range(3)]
    for entry, (left, right) in zip(square, ((20, 30), (10, 40), (60, 70))):
        entry['bbox'] = [left, left, right - left, right - left]
        entry['segmentation'] = [[left, left, right, left, right, right, left, right]]
    square[2]['iscrowd'] = 1
    content['annotations'] += square
    file.write_text(json.dumps(content))
    convert_dataset(tmp_path / 'src', tmp_path / 'dst', to='maps')
    with Image.open(tmp_path / 'dst/masks/train/c.png') as found:
        pixels = np.array(found)
    assert (pixels[25, 25], pixels[15, 15], pixels[5, 5]) == (1, 2, 0)
    assert 255 not in pixels  # the crowd lies outside of the image, which is 60 pixels high
    square[2]['segmentation'] = [[50, 50, 70, 50, 70, 58, 50, 58]]
    square[2]['bbox'] = [50, 50, 20, 8]
    file.write_text(json.dumps(content))
    convert_dataset(tmp_path / 'src', tmp_path / 'again', to='maps')
    with Image.open(tmp_path / 'again/masks/train/c.png') as found:
        assert np.array(found)[54, 60] == 255
