"""Annotation files as people have them: what is repaired, what is refused, and that all readers agree."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Callable

import numpy as np
import pytest
import torch
from helpers.tiny import SIDE, edit_json
from mmengine.registry import DATASETS, METRICS, DefaultScope
from mmengine.structures import InstanceData
from PIL import Image

from emo2_mm.datasets.coco_file import read_coco
from emo2_mm.datasets.report import KINDS, Report
from emo2_mm.errors import UserError

NAN = float('nan')
Content = dict


def each(name: str, /, **changes: Any) -> Callable[[Content], None]:
    """An edit of all entries of a list; what is callable gets the entry, None deletes the key."""

    def edit(content: Content) -> None:
        for entry in content[name]:
            for key, value in changes.items():
                entry[key] = value(entry) if callable(value) else value
                if value is None:
                    del entry[key]

    return edit


def first(name: str = 'annotations', /, **changes: Any) -> Callable[[Content], None]:
    def edit(content: Content) -> None:
        part = dict(x=content[name][:1])
        each('x', **changes)(part)

    return edit


def add(name: str, /, **entry: Any) -> Callable[[Content], None]:
    return lambda content: content[name].append({**content[name][0], **entry})


def root(name: str) -> Callable[[Content], None]:
    """Roboflow's category 0, which stands for the project."""

    def edit(content: Content) -> None:
        each('categories', supercategory=name)(content)
        content['categories'].insert(0, dict(id=0, name=name, supercategory='none'))

    return edit


def run_lengths(size: tuple[int, int], swapped: bool = False) -> Callable[[dict], dict]:
    def encode(annotation: dict) -> dict:
        x, y, w, h = annotation['bbox']
        mask = np.zeros(size, np.uint8)
        mask[y : y + h, x : x + w] = 1
        flat = mask.T.ravel()
        edges = np.flatnonzero(np.diff(np.concatenate([[0], flat, [0]])))
        counts = np.diff(np.concatenate([[0], edges, [flat.size]])).tolist()
        return dict(counts=counts, size=list(size)[:: -1 if swapped else 1])

    return encode


def corners(annotation: dict) -> list:
    x, y, w, h = annotation['bbox']
    return [x + 8, y + 8, x + w, y + h]


# name -> (edit, code of the warning); the objects afterwards are those of the plain file
REPAIRED: dict[str, tuple[Callable[[Content], Any], str]] = {
    'no iscrowd': (each('annotations', iscrowd=None), 'COCO022'),
    'iscrowd null': (each('annotations', iscrowd=lambda _: None), 'COCO022'),
    'crowds only': (each('annotations', iscrowd=1), 'COCO023'),
    'no area': (each('annotations', area=None), 'COCO025'),
    'area 0': (each('annotations', area=0), 'COCO025'),
    'ids from 0': (each('annotations', id=lambda a: a['id'] - 1), 'COCO026'),
    'no ids': (each('annotations', id=None), 'COCO026'),
    'id twice': (each('annotations', id=5), 'COCO026'),
    'ids as texts': (each('annotations', image_id=lambda a: str(a['image_id'])), 'COCO027'),
    'image ids as texts': (each('images', id=lambda a: str(a['id'])), 'COCO027'),
    'category ids as fractions': (each('categories', id=lambda a: float(a['id'])), 'COCO027'),
    'blanks': (each('categories', name=lambda c: f' {c["name"]} '), 'COCO029'),
    'root category': (root('project'), 'COCO030'),
    'root called as a class': (root('dark'), 'COCO030'),
    'category twice': (lambda content: content['categories'].append(dict(id=7, name='dark')), 'COCO031'),
    'unknown image': (add('annotations', id=9, image_id=99), 'COCO035'),
    'annotation twice': (add('annotations', id=9), 'COCO036'),
    'no box': (each('annotations', bbox=None), 'COCO037'),
    'empty box': (each('annotations', bbox=[]), 'COCO037'),
    'box of texts': (each('annotations', bbox=lambda a: list(map(str, a['bbox']))), 'COCO038'),
    'box of nan': (add('annotations', id=9, bbox=[NAN, 1, 2, 3]), 'COCO039'),
    'box drawn backwards': (
        each(
            'annotations',
            bbox=lambda a: [a['bbox'][0] + a['bbox'][2], a['bbox'][1], -a['bbox'][2], a['bbox'][3]],
        ),
        'COCO040',
    ),
    'flat polygon': (each('annotations', segmentation=lambda a: a['segmentation'][0]), 'COCO041'),
    'other classes': (add('categories', id=9, name='cat'), 'COCO033'),
    'backslashes': (each('images', file_name=lambda i: '.\\' + i['file_name']), 'COCO043'),
    'folders of another machine': (
        each('images', file_name=lambda i: f'C:\\me\\{i["file_name"]}'),
        'COCO043',
    ),
    'upper case': (each('images', file_name=lambda i: i['file_name'].upper()), 'COCO043'),
    'no suffix': (each('images', file_name=lambda i: i['file_name'][:-4]), 'COCO043'),
    'no sizes': (each('images', width=None, height=None), 'COCO044'),
    'image twice': (add('images'), 'COCO045'),
}
# name -> (edit, code of the error)
REFUSED: dict[str, tuple[Callable[[Content], Any], str]] = {
    'no categories': (lambda content: content.pop('categories'), 'COCO002'),
    'category without name': (first('categories', name=None), 'COCO002'),
    'image without name': (first('images', file_name=None), 'COCO002'),
    'annotation without category': (first(category_id=None), 'COCO002'),
    'category id is a list': (first(category_id=[1]), 'COCO002'),
    'annotation is a text': (lambda content: content['annotations'].append('x'), 'COCO002'),
    'three numbers': (first(bbox=[1, 2, 3]), 'COCO002'),
    'neither box nor mask': (first(bbox=None, segmentation=None), 'COCO002'),
    'image id twice': (each('images', id=1), 'COCO003'),
    'category id twice': (each('categories', id=1), 'COCO004'),
    'unknown category': (first(category_id=0), 'COCO005'),
    'none of the classes': (each('categories', name=lambda c: f'x{c["id"]}'), 'COCO006'),
    'another size': (each('images', width=2 * SIDE, height=2 * SIDE), 'COCO007'),
    'corners': (each('annotations', bbox=lambda a: [a['bbox'][0], a['bbox'][1], 62, 62]), 'COCO008'),
    'shares': (each('annotations', bbox=lambda a: [n / SIDE for n in a['bbox']]), 'COCO009'),
    'no mask': (first(segmentation=[]), 'COCO010'),
    'mask is a text': (first(segmentation='polygon'), 'COCO011'),
    'mask too far': (first(segmentation=[[1, 2, 1e9, 4, 5, 6]]), 'COCO012'),
    'mask of another size': (first(segmentation=dict(counts=[0, 100], size=[10, 10])), 'COCO013'),
    'image is missing': (first('images', file_name='gone.png'), 'IMG001'),
}


@pytest.fixture
def file(own: Path) -> Path:
    return own / 'annotations/train.json'


def read(file: Path, **options: Any) -> tuple[Content, Report]:
    report = Report()
    options = {'masks': True, 'verify': True, 'classes': ('dark', 'light'), **options}
    return read_coco(file, report, folder=file.parent.parent / 'images/train', **options), report


def objects(content: Content) -> list[tuple]:
    names = {image['id']: image['file_name'] for image in content['images']}
    classes = {category['id']: category['name'] for category in content['categories']}
    return [
        (names[a['image_id']], classes[a['category_id']], tuple(a['bbox']), a['area'], a['iscrowd'])
        for a in content['annotations']
    ]


@pytest.mark.parametrize('name', REPAIRED)
def test_repaired_and_told(file: Path, name: str) -> None:
    plain = objects(read(file)[0])
    edit, code = REPAIRED[name]
    edit_json(file, edit)
    content, report = read(file)
    assert (report.of('error'), code in report.of('warning')) == ([], True), report.found
    assert str(file) in report.summary(code) or str(file.parent.parent) in report.summary(code)
    assert objects(content) == plain
    assert [category['name'] for category in content['categories']][:2] == ['dark', 'light']
    ids = [annotation['id'] for annotation in content['annotations']]
    assert len(set(ids)) == len(ids) and min(ids) > 0


@pytest.mark.parametrize('name', REFUSED)
def test_refused_by_file_and_entry(file: Path, name: str) -> None:
    edit, code = REFUSED[name]
    edit_json(file, edit)
    _, report = read(file)
    assert code in report.of('error'), report.found
    with pytest.raises(UserError) as caught:
        report.raise_errors()
    assert str(file) in str(caught.value) and KINDS[code].effect in str(caught.value)


def test_plain_file_is_read_as_it_is(file: Path) -> None:
    content, report = read(file)
    plain = json.loads(file.read_text())
    assert not report.found
    assert {key: content[key] for key in plain} == plain


@pytest.mark.parametrize('text', ['{"images": [', '\x00', '[' * 100_000, '[]', '{}'], ids=str.__len__)
def test_no_annotation_file(file: Path, text: str) -> None:
    file.write_text(text)
    assert set(read(file)[1].of('error')) <= {'COCO001', 'COCO002', 'COCO006'} != set()


@pytest.mark.parametrize('encoding', ['utf-8-sig', 'utf-16', 'utf-32'])
def test_byte_order_marks(file: Path, encoding: str) -> None:
    plain = objects(read(file)[0])
    file.write_text(file.read_text(), encoding=encoding)
    content, report = read(file)
    assert (objects(content), list(report.found)) == (plain, ['COCO021'])


def test_text_in_no_known_encoding(file: Path) -> None:
    file.write_bytes(file.read_bytes().replace(b'dark', b'd\xe9rk'))
    (place,) = read(file)[1].found['COCO001']
    assert f'{file} cannot be read as UTF-8' in place and 'save it' in place


def test_names_of_classes_that_are_numbers(file: Path) -> None:
    edit_json(file, each('categories', name=lambda category: category['id']))
    content, report = read(file, classes=None)
    assert [category['name'] for category in content['categories']] == ['1', '2']
    assert list(report.found) == ['COCO028']


def test_one_class_and_a_root_of_its_name(file: Path) -> None:
    edit_json(file, lambda content: content['categories'].pop())
    edit_json(file, each('annotations', category_id=1))
    edit_json(file, root('dark'))
    content, _ = read(file, classes=None)
    assert [(c['id'], c['name']) for c in content['categories']] == [(1, 'dark')]


def test_class_without_boxes_stays(file: Path) -> None:
    edit_json(file, each('categories', supercategory='none'))
    edit_json(file, add('categories', id=9, name='cat'))
    content, report = read(file, classes=None)
    assert [category['name'] for category in content['categories']] == ['dark', 'light', 'cat']
    assert report.found['COCO034'] == [f"{file}: 'cat'"]


def test_crowds_of_one_class_are_told(file: Path) -> None:
    edit_json(file, first(iscrowd=1))
    content, report = read(file)
    assert report.found['COCO024'] == [f"{file}: 'dark'"]
    assert [annotation['iscrowd'] for annotation in content['annotations']] == [1, 0]


@pytest.mark.parametrize('swapped', [False, True])
def test_run_lengths_of_a_wide_image(own: Path, file: Path, swapped: bool) -> None:
    """Their size is height and width."""
    image = Image.new('RGB', (2 * SIDE, SIDE))
    for path in (own / 'images/train').iterdir():
        image.save(path)
    edit_json(file, each('images', width=2 * SIDE))
    encode = run_lengths((SIDE, 2 * SIDE), swapped)
    edit_json(file, each('annotations', segmentation=encode))
    content, report = read(file)
    assert list(report.found) == ['COCO042'] * swapped
    assert content['annotations'][0]['segmentation']['size'] == [SIDE, 2 * SIDE]


def test_area_of_a_mask(file: Path) -> None:
    """The half of its box that a triangle fills."""
    edit_json(file, first(area=None, bbox=[10, 10, 20, 30], segmentation=[[10, 10, 30, 10, 10, 40]]))
    assert read(file)[0]['annotations'][0]['area'] == 300
    edit_json(file, first(area=None, bbox=[10, 10, 20, 30], segmentation=None))
    assert read(file, masks=False)[0]['annotations'][0]['area'] == 600
    encode = run_lengths((SIDE, SIDE))
    edit_json(file, first(area=None, bbox=[10, 10, 20, 30], segmentation=encode(dict(bbox=[10, 10, 5, 4]))))
    assert read(file)[0]['annotations'][0]['area'] == 20


def tag(path: Path, size: tuple[int, int], orientation: int) -> None:
    tags = Image.Exif()
    tags[0x0112] = orientation
    Image.new('RGB', size).save(path, 'JPEG', exif=tags)


@pytest.mark.parametrize(
    ('listed', 'codes'),
    [
        ((64, 80), []),
        ((80, 64), ['COCO046']),
        ('both', ['COCO014', 'COCO046']),
        ((64, 70), ['IMG018', 'COCO007']),
    ],
    ids=str,
)
def test_exif_orientation(own: Path, file: Path, listed: Any, codes: list[str]) -> None:
    """Images of 80 x 64 stored pixels that are displayed upright."""
    for path in (own / 'images/train').iterdir():
        tag(path, (80, 64), 6)
    sizes = iter([(64, 80), (80, 64)] if listed == 'both' else [listed] * 2)

    def set_size(content: Content) -> None:
        for image in content['images']:
            image['width'], image['height'] = next(sizes)

    edit_json(file, set_size)
    assert sorted(read(file)[1].found) == sorted(codes)


def test_turned_by_180_degrees_is_told(own: Path, file: Path) -> None:
    tag(own / 'images/train/0.png', (SIDE, SIDE), 3)
    assert list(read(file)[1].found) == ['IMG018']


def test_swapped_width_and_height(own: Path, file: Path) -> None:
    Image.new('RGB', (80, SIDE)).save(own / 'images/train/0.png')
    edit_json(file, first('images', width=SIDE, height=80))
    content, report = read(file)
    assert list(report.found) == ['COCO044']
    assert [content['images'][0][name] for name in ('width', 'height')] == [80, SIDE]


# ---------------------------------------------------------------- the dataset and the metric


def dataset(file: Path, classes: tuple[str, ...] = ('dark', 'light'), **options: Any) -> Any:
    pytest.importorskip('mmdet')
    with DefaultScope.overwrite_default_scope('mmdet'):
        return DATASETS.build(
            dict(
                type='emo2_mm.datasets.coco.CocoDataset',
                ann_file=str(file),
                data_prefix=dict(img=str(file.parent.parent / 'images/train')),
                metainfo=dict(classes=classes),
                pipeline=[dict(type='LoadImageFromFile')],
                **options,
            )
        )


def trained(file: Path, classes: tuple[str, ...] = ('dark', 'light'), **options: Any) -> list[tuple]:
    """File, class and box of each object that is trained."""
    found = dataset(file, classes, **options)
    infos = [found.get_data_info(i) for i in range(len(found))]
    return [
        (Path(info['img_path']).name, classes[x['bbox_label']], tuple(x['bbox']))
        for info in infos
        for x in info['instances']
    ]


def score(file: Path, objects: list[tuple], classes: tuple[str, ...] = ('dark', 'light')) -> dict[str, float]:
    """The figures of a detector that finds these objects (file, class, box)."""
    with DefaultScope.overwrite_default_scope('mmdet'):
        metric = METRICS.build(dict(type='emo2_mm.datasets.coco.CocoMetric', ann_file=str(file)))
    metric.dataset_meta = dict(classes=classes)
    images = read_coco(file, Report())['images']
    names = {
        image['file_name'].replace('\\', '/').rsplit('/', 1)[-1].lower()[:5]: image['id'] for image in images
    }
    for name, number in names.items():
        own = [x for x in objects if x[0].startswith(name[:1])]
        found = InstanceData(
            bboxes=torch.tensor([x[2] for x in own], dtype=torch.float).reshape(-1, 4),
            scores=torch.full((len(own),), 0.9),
            labels=torch.tensor([classes.index(x[1]) for x in own], dtype=torch.long),
        )
        metric.process({}, [dict(pred_instances=found, img_id=number, ori_shape=(SIDE, SIDE))])
    return metric.evaluate(len(names))


NOT_ALONE = ('folders of another machine', 'no suffix', 'upper case', 'image twice')


@pytest.mark.parametrize('name', [name for name in REPAIRED if name not in NOT_ALONE])
def test_training_and_evaluation_agree(file: Path, name: str) -> None:
    """What is trained is what a perfect detector has to find."""
    plain = trained(file)
    edit_json(file, REPAIRED[name][0])
    assert trained(file) == plain
    assert score(file, plain)['coco/bbox_mAP'] == 1


@pytest.mark.parametrize('name', ['image id twice', 'unknown category', 'three numbers', 'corners'])
def test_training_and_evaluation_refuse(file: Path, name: str) -> None:
    edit_json(file, REFUSED[name][0])
    for use in (trained, lambda file: score(file, [])):
        with pytest.raises(UserError, match=str(file)):
            use(file)


@pytest.mark.parametrize('classes', [('light', 'dark'), ('dark', 'medium', 'light'), ('light',)])
def test_labels_follow_the_classes(file: Path, classes: tuple[str, ...]) -> None:
    """Not the order of the categories in the file, which may lack some."""
    found = trained(file, classes)
    wanted = [x for x in trained(file) if x[1] in classes]
    assert found == wanted != []
    assert score(file, found, classes)['coco/bbox_mAP'] == 1


def test_missing_sizes_are_read(file: Path) -> None:
    edit_json(file, each('images', width=None, height=None))
    assert dataset(file).get_data_info(0)['width'] == SIDE


def test_stored_orientation_is_loaded(own: Path, file: Path) -> None:
    for path in (own / 'images/train').iterdir():
        tag(path, (80, 64), 6)
    edit_json(file, each('images', width=80))
    assert dataset(file, verify_images=True)[0]['img'].shape == (64, 80, 3)
    assert dataset(file)[0]['img'].shape == (80, 64, 3)


def test_what_is_dropped_is_told(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    pytest.importorskip('mmdet')
    monkeypatch.setattr('emo2_mm.datasets.coco.print_log', lambda line, _: said.append(line))
    edit_json(file, first(bbox=[5, 5, 0, 9]))
    dataset(file, filter_cfg=dict(filter_empty_gt=True))
    edit_json(file, lambda content: content['annotations'].pop(0))
    dataset(file, filter_cfg=dict(filter_empty_gt=True))
    assert f'{file}: 1 of 2 boxes (no area, outside, or of no class of the config) are dropped' in said
    assert f'{file}: 1 of 2 images (no boxes, or too small) are dropped' in said


def test_no_image_left(file: Path) -> None:
    edit_json(file, each('annotations', bbox=[5, 5, 0, 9]))
    edit_json(file, each('images', width=20))
    with pytest.raises(UserError, match='none of its 2 images can be used; 0 of its 2 boxes'):
        dataset(file, filter_cfg=dict(filter_empty_gt=True, min_size=32))


def test_figures_of_a_plain_file_are_those_of_mmdetection(file: Path) -> None:
    pytest.importorskip('mmdet')
    objects = [(name, kind, (x1, y1, x2 - 3, y2)) for name, kind, (x1, y1, x2, y2) in trained(file)]
    own = score(file, objects)
    from mmdet.evaluation import CocoMetric

    metric = CocoMetric(ann_file=str(file))
    metric.dataset_meta = dict(classes=('dark', 'light'))
    for i, (_, kind, box) in enumerate(objects):
        found = InstanceData(
            bboxes=torch.tensor([box], dtype=torch.float),
            scores=torch.tensor([0.9]),
            labels=torch.tensor([('dark', 'light').index(kind)]),
        )
        metric.process({}, [dict(pred_instances=found, img_id=i, ori_shape=(SIDE, SIDE))])
    theirs = metric.evaluate(2)
    assert own == pytest.approx(theirs) and 0 < own['coco/bbox_mAP'] < 1
