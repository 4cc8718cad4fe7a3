"""tools/check_dataset.py finds each fault, and training does with it what the tool says."""

from __future__ import annotations

import json
import re
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from helpers.tiny import (
    CLASSIFIER,
    DETECTOR,
    ROOT,
    SEGMENTOR,
    SIDE,
    call_tool,
    edit_json,
    run,
    write_config,
    write_data,
)
from mmengine.config import Config
from mmengine.dataset import default_collate, pseudo_collate
from mmengine.registry import DATASETS, MODELS, DefaultScope
from PIL import Image

from emo2_mm.config import innermost_dataset
from emo2_mm.datasets.context import use_own_datasets
from emo2_mm.datasets.report import ERROR, KINDS
from emo2_mm.errors import UserError

ERRORS = {kind.title for kind in KINDS.values() if kind.level == ERROR}


def real(path, data):
    """What a shipped config says of its data and its heads, with one of the tiny data sets."""
    cfg = Config.fromfile(ROOT / 'configs' / path)
    for stage in ('train', 'val'):
        innermost_dataset(cfg[f'{stage}_dataloader'].dataset).update(data)
    if 'ann_file' in data:
        cfg.val_evaluator.ann_file = f'{data["data_root"]}/{data["ann_file"]}'
    keys = ('default_scope', 'model', 'train_dataloader', 'val_dataloader', 'val_evaluator')
    return '\n'.join(f'{key} = {value!r}' for key, value in cfg.to_dict().items() if key in keys)


COCO = dict(data_root='DATA/coco', ann_file='boxes.json', data_prefix=dict(img='images'))
COCO['metainfo'] = dict(classes=('dark', 'light'))
RETINANET = real('det/retinanet_emo2_1m.py', COCO)
MASK_RCNN = real('det/mask-rcnn_emo2_1m.py', COCO)
SSDLITE = real('det/ssdlite_emo2_1m_320.py', COCO)
PREFIX = dict(img_path='photos', seg_map_path='labels')
ADE20K = real('seg/fpn_emo2_1m.py', dict(data_root='DATA', data_prefix=PREFIX))
IMAGENET = real('cls/emo2_1m_kd.py', dict(data_root='DATA', split='', data_prefix='folders'))
CASES = {
    'retinanet': RETINANET,
    'mask-rcnn': MASK_RCNN,
    'ssdlite': SSDLITE,
    'ade20k': ADE20K,
    'segmentor': SEGMENTOR,
    'classifier': CLASSIFIER,
}
NOISE = np.random.RandomState(0).randint(0, 256, (SIDE, SIDE, 3)).astype(np.uint8)
SQUARE = Image.fromarray(NOISE)
LEFT_OUT = 'image has no annotations, and is dropped'
LISTED = CLASSIFIER.replace("data_prefix='folders',", "data_prefix='folders', ann_file='listed.txt',")


@pytest.fixture
def data(tmp_path):
    """Four images as COCO boxes, maps and class folders, and as photographs in JPEG."""
    write_data(tmp_path)
    (tmp_path / 'photos').mkdir()
    for path in (tmp_path / 'coco/images').iterdir():
        Image.open(path).save(tmp_path / f'photos/{path.stem}.jpg')
    return tmp_path


@pytest.fixture
def check(data, monkeypatch, capsys):
    """Run the tool on a config: its exit code, and the places of each fault it found."""
    monkeypatch.delenv('LOCAL_RANK', raising=False)

    def check_config(text, *arguments):
        config = write_config(data, text)
        pytest.importorskip(Config.fromfile(config).default_scope)
        capsys.readouterr()
        code = call_tool('check_dataset.py', config, '--split', 'train', *arguments)
        found = {}
        for line in capsys.readouterr().out.splitlines():
            heading = re.match(r'(?:error|warning) \w+: (.*) \(\d+\)$', line)
            if heading:
                places = found[heading[1]] = []
            elif line.startswith('    '):
                places.append(line.strip().replace(f'{data}/', ''))
        return code, found

    return check_config


@pytest.fixture
def coco(data):
    """Change the annotation file."""
    return lambda edit: edit_json(data / 'coco/boxes.json', edit)


def build(data, text):
    """The data set that training gets."""
    cfg = Config.fromfile(write_config(data, text))
    use_own_datasets(cfg)
    with DefaultScope.overwrite_default_scope(cfg.default_scope):
        return DATASETS.build(cfg.train_dataloader.dataset)


def kept(data, text=RETINANET):
    """How many objects of the first image are trained, and how many are ignored."""
    sample = build(data, text)[0]['data_samples']
    return len(sample.gt_instances), len(sample.ignored_instances)


def loss(data, text):
    """The losses of the first two images of a tiny config."""
    cfg = Config.fromfile(write_config(data, text))
    dataset = build(data, text)
    torch.manual_seed(0)
    collate = default_collate if cfg.default_scope == 'mmpretrain' else pseudo_collate
    with DefaultScope.overwrite_default_scope(cfg.default_scope):
        if 'data_preprocessor' in cfg:
            cfg.model.data_preprocessor = cfg.data_preprocessor
        model = MODELS.build(cfg.model).train()
        return model(**model.data_preprocessor(collate([dataset[0], dataset[1]]), True), mode='loss')


def cut(path, size):
    path.write_bytes(path.read_bytes()[:size])


def first(**changes):
    """A change of the first annotation."""
    return lambda file: file['annotations'][0].update(changes)


@pytest.mark.parametrize('case', CASES)
def test_clean(check, case):
    assert check(CASES[case]) == (0, {})


def test_output(data, capsys):
    """Equal splits once, each kind of finding with what training does, the sums."""
    pytest.importorskip('mmdet')
    (data / 'coco/images/1.png').unlink()
    config = write_config(data, DETECTOR)
    assert call_tool('check_dataset.py', config, '--split', 'val', 'test') == 1
    assert capsys.readouterr().out.splitlines() == [
        f'{data}/coco/boxes.json: 4 images, 4 annotations',
        '',
        'error IMG001: image is missing (1)',
        '  training stops and names the file',
        f'    {data}/coco/images/1.png',
        '',
        '1 errors, 0 warnings',
    ]


@pytest.mark.slow
def test_command(data):
    """With a shipped config, as users start it."""
    pytest.importorskip('mmseg')
    options = [
        f'train_dataloader.dataset.data_root={data}',
        'train_dataloader.dataset.data_prefix.img_path=photos',
        'train_dataloader.dataset.data_prefix.seg_map_path=labels',
    ]
    config = ROOT / 'configs/seg/segformer_emo2_5m.py'
    command = ['check_dataset.py', config, '--split', 'train', '--cfg-options', *options]
    result = run(data, *command)
    assert result.returncode == 0, result.stdout + result.stderr
    assert f'{data}/photos: 4 images, 150 classes\n' in result.stdout
    (data / 'labels/0.png').unlink()
    result = run(data, *command)
    assert result.returncode == 1
    assert 'error SEG001: map is missing (1)' in result.stdout


def test_warnings_pass(data, check):
    Image.open(data / 'folders/dark/0.png').convert('L').save(data / 'folders/dark/0.png')
    assert check(CLASSIFIER) == (0, {'image is grey': ['folders/dark/0.png']})


def test_no_more_than_asked_for(data, check):
    for i in range(3):
        (data / f'coco/images/{i}.png').unlink()
    places = ['coco/images/0.png', 'coco/images/1.png', 'and 1 more']
    assert check(DETECTOR, '--max-shown', '2') == (1, {'image is missing': places})


def test_inside_wrappers(data, check):
    (data / 'listed.txt').write_text('dark/0.png 0\nlight/gone.png 1\n')
    text = CLASSIFIER.replace(
        'train_dataloader = loader(**data)',
        "twice = dict(type='RepeatDataset', times=2, dataset=data)\n"
        "other = dict(data, ann_file='listed.txt')\n"
        "train_dataloader = loader(type='ConcatDataset', datasets=[twice, other])",
    )
    (data / 'folders/dark/0.png').write_bytes(b'')
    assert check(text)[1] == {
        'image is empty': ['folders/dark/0.png'] * 2,
        'image is missing': ['folders/light/gone.png'],
    }


@pytest.mark.parametrize('case', ['retinanet', 'ade20k', 'classifier'])
def test_no_folder(data, capsys, case):
    pytest.importorskip(Config.fromfile(write_config(data, CASES[case])).default_scope)
    option = 'train_dataloader.dataset.data_root=gone'
    assert call_tool('check_dataset.py', data / 'tiny.py', '--cfg-options', option) == 1
    assert "train_dataloader.dataset.data_root = 'gone'" in capsys.readouterr().err


def test_no_annotation_file(data, capsys):
    pytest.importorskip('mmdet')
    (data / 'coco/boxes.json').unlink()
    assert call_tool('check_dataset.py', write_config(data, RETINANET)) == 1
    assert "train_dataloader.dataset.ann_file = 'boxes.json'" in capsys.readouterr().err


@pytest.mark.parametrize(
    'changes, message',
    [
        ({'train_dataloader': None}, 'it has no dataset to train with'),
        ({'train_dataloader.dataset.type': 'CIFAR10'}, 'CIFAR10 cannot be checked, only CocoDataset'),
        ({'train_dataloader.dataset.data_root': 's3://bucket'}, 's3://bucket is no local folder'),
        ({'train_dataloader.dataset.type': 'Gone'}, 'Gone is not in the mmpretrain::dataset registry'),
        ('x = ', 'invalid syntax'),
    ],
)
def test_wrong_use(data, capsys, changes, message):
    pytest.importorskip('mmpretrain')
    config = write_config(data, CLASSIFIER)
    if isinstance(changes, dict):
        cfg = Config.fromfile(config)
        cfg.merge_from_dict(changes)
        if 'CIFAR10' in changes.values():
            cfg.train_dataloader.dataset = dict(type='CIFAR10', data_root=str(data))
        cfg.dump(config)
    else:
        config.write_text(changes)
    with pytest.raises(SystemExit) as end:
        call_tool('check_dataset.py', config, '--split', 'train')
    assert end.value.code == 2
    assert message in capsys.readouterr().err


# --- Images ---------------------------------------------------------------------------------------


UNKNOWN = 'image is of a kind that OpenCV does not read'


@pytest.mark.parametrize(
    ('spoil', 'finding', 'error', 'message'),
    [
        (Path.unlink, 'image is missing', FileNotFoundError, '0.png'),
        (lambda path: path.write_bytes(b''), 'image is empty', cv2.error, '!buf.empty()'),
        (lambda path: cut(path, 40), 'image is damaged', AssertionError, 'failed to load image: .*0.png'),
        (lambda path: path.write_text('no image'), UNKNOWN, AssertionError, 'failed to load image: .*0.png'),
        (lambda path: SQUARE.save(path, 'ICO'), UNKNOWN, AssertionError, 'failed to load image: .*0.png'),
    ],
    ids=['missing', 'empty', 'damaged', 'text', 'ICO'],
)
def test_image_that_cannot_be_loaded(data, check, spoil, finding, error, message):
    spoil(data / 'coco/images/0.png')
    assert check(RETINANET) == (1, {finding: ['coco/images/0.png']})
    with pytest.raises(error, match=message):
        build(data, RETINANET)[0]


def loaded(data):
    """The pixels of the first image before any other step of the pipeline, (height, width, BGR)."""
    text = CLASSIFIER.replace("data_prefix='folders'", "data_prefix='coco', with_label=False")
    return build(data, text)[0]['inputs'].numpy().transpose(1, 2, 0)


def test_cut_off_photograph(data, check):
    pytest.importorskip('mmpretrain')
    path = data / 'coco/images/0.png'
    SQUARE.save(path, 'JPEG')
    whole = np.array(Image.open(path))[..., ::-1]
    cut(path, path.stat().st_size // 2)
    decoded = cv2.imdecode(np.frombuffer(path.read_bytes(), np.uint8), cv2.IMREAD_COLOR)
    finding = 'image is truncated, but loaded' if decoded is not None else 'image is damaged'
    assert check(RETINANET) == (1, {finding: ['coco/images/0.png']})
    if finding == 'image is damaged':  # to OpenCV 4.12 and newer
        return
    pixels = loaded(data)
    assert pixels.shape == (SIDE, SIDE, 3)
    assert (
        np.abs(pixels[:8].astype(float) - whole[:8]).max() < 9
    )  # decoders round; of the rest nothing is known


def test_grey_image(data, check):
    SQUARE.convert('L').save(data / 'coco/images/0.png')
    assert check(RETINANET) == (0, {'image is grey': ['coco/images/0.png']})
    assert np.array_equal(loaded(data), np.repeat(np.array(SQUARE.convert('L'))[..., None], 3, 2))


def test_transparent_image(data, check):
    image = SQUARE.copy()
    image.putalpha(0)
    image.save(data / 'coco/images/0.png')
    assert check(RETINANET) == (0, {'image has an alpha channel': ['coco/images/0.png']})
    assert np.array_equal(loaded(data), NOISE[..., ::-1])


def test_16_bit_image(data, check):
    pixels = np.random.RandomState(0).randint(0, 2**16, (SIDE, SIDE, 3)).astype(np.uint16)
    cv2.imwrite(str(data / 'coco/images/0.png'), pixels)
    assert check(RETINANET) == (0, {'image has 16 bits a channel': ['coco/images/0.png']})
    assert np.array_equal(loaded(data), pixels // 256)


def test_turned_image(data, check, coco):
    """OpenCV turns a photograph as its EXIF entry says; boxes stay where they were."""
    tags = Image.Exif()
    tags[274] = 6
    Image.new('RGB', (80, 64)).save(data / 'coco/images/0.png', 'JPEG', exif=tags)
    coco(lambda file: file['images'][0].update(width=80))
    found = {
        'width and height are not those of the image': ['coco/images/0.png'],
        'image has an EXIF orientation': ['coco/images/0.png'],
    }
    assert check(RETINANET) == (1, found)
    assert build(data, RETINANET)[0]['data_samples'].ori_shape == (80, 64)
    text = RETINANET + "\ntrain_dataloader['dataset'].update(type=OWN, verify_images=True)"
    text = text.replace('OWN', "'emo2_mm.datasets.coco.CocoDataset'")
    del found['width and height are not those of the image']
    assert check(text) == (
        0,
        {'images are annotated without their EXIF orientation': ['coco/images/0.png'], **found},
    )
    assert build(data, text)[0]['data_samples'].ori_shape == (64, 80)


def resize_first(data, coco, width, height):
    """An image of this size, its box and its map."""
    for folder in ('coco/images/0.png', 'photos/0.jpg', 'folders/dark/0.png'):
        SQUARE.resize((width, height)).save(data / folder)
    Image.fromarray(np.ones((height, width), np.uint8)).save(data / 'labels/0.png')
    coco(lambda file: file['images'][0].update(width=width, height=height))
    coco(first(bbox=[0, 0, width, height]))


@pytest.mark.parametrize('size', [(1, SIDE), (SIDE, 1)])
def test_thin_image_for_detection(data, check, coco, size):
    resize_first(data, coco, *size)
    found = {
        'image is 1 pixel wide or tall': ['coco/images/0.png'],
        'image is smaller than filter_cfg.min_size': [f'coco/images/0.png: {size}'],
    }
    assert check(RETINANET) == (0, found)
    assert [build(data, RETINANET)[i]['data_samples'].img_id for i in range(3)] == [1, 2, 3]
    text = RETINANET + '\ntrain_dataloader["dataset"]["filter_cfg"] = None'
    assert check(text) == (0, {'image is 1 pixel wide or tall': ['coco/images/0.png']})
    assert max(build(data, text)[0]['inputs'].shape) == 1333
    resize_first(data, coco, 1, 4000)
    with pytest.raises(cv2.error, match='resize'):
        build(data, text)[0]


def test_thin_image_for_segmentation(data, check, coco):
    resize_first(data, coco, 1, SIDE)
    found = {
        'map is 1 pixel wide or tall': ['labels/0.png'],
        'image is 1 pixel wide or tall': ['photos/0.jpg'],
    }
    assert check(ADE20K) == (1, found)
    with pytest.raises(ValueError, match=r'expected 2, got 1'):
        build(data, ADE20K)[0]


def test_thin_image_for_classification(data, check, coco):
    resize_first(data, coco, 1, SIDE)
    assert check(CLASSIFIER) == (0, {'image is 1 pixel wide or tall': ['folders/dark/0.png']})
    text = CLASSIFIER.replace(
        "dict(type='PackInputs')", "dict(type='Resize', scale=9), dict(type='PackInputs')"
    )
    assert build(data, text)[0]['inputs'].shape == (3, 9, 9)


# --- COCO's format --------------------------------------------------------------------------------


def test_what_the_reader_finds(data, check, coco):
    """Both kinds, of which tests/datasets/test_coco.py has all."""
    coco(first(iscrowd=None, id=0))
    coco(lambda file: file['annotations'][1].update(category_id=9))
    code, found = check(RETINANET)
    assert code == 1
    assert found['annotation has no iscrowd'] == ['coco/boxes.json: annotation 0']
    assert found['annotation ids are missing, 0 or not unique'] == ['coco/boxes.json: 0']
    assert found['category id of an annotation is not among the categories'] == [
        'coco/boxes.json: annotation 2: category_id 9'
    ]
    with pytest.raises(
        UserError, match='annotation 2: category_id 9: category id of an annotation is not among'
    ):
        build(data, RETINANET)


def test_category_of_no_class(data, check):
    text = RETINANET.replace("('dark', 'light')", "('light',)")
    assert check(text) == (
        0,
        {
            'category is no class of the config': ["coco/boxes.json: 'dark'"],
            LEFT_OUT: ['coco/images/0.png', 'coco/images/2.png'],
        },
    )
    assert len(build(data, text)) == 2


def test_image_without_annotations(data, check, coco):
    coco(lambda file: file['annotations'].pop(0))
    assert check(RETINANET) == (0, {LEFT_OUT: ['coco/images/0.png']})
    assert len(build(data, RETINANET)) == 3
    assert check(DETECTOR) == (0, {'image has no annotations': ['coco/images/0.png']})
    assert kept(data, DETECTOR) == (0, 0)
    assert all(np.isfinite(sum(map(float, terms))) for terms in loss(data, DETECTOR).values())


@pytest.mark.parametrize('key', ['annotations', 'images'])
def test_no_image_left(data, check, coco, key):
    coco(lambda file: file[key].clear())
    code, found = check(RETINANET)
    assert (code, len(found['dataset holds no images'])) == (1, 1)
    with pytest.raises(UserError, match='none of its . images can be used'):
        build(data, RETINANET)


def test_test_set_without_annotations(check, coco):
    """Nothing is filtered in test mode, whatever the config says."""
    coco(lambda file: file.pop('annotations'))
    text = RETINANET + "\nval_dataloader['dataset']['filter_cfg'] = dict(filter_empty_gt=True, min_size=99)"
    code, found = check(text, '--split', 'val')
    assert (code, list(found)) == (0, ['image has no annotations'])


@pytest.mark.parametrize(
    'fault, changes, objects',
    [
        ('box has no area', dict(bbox=[5, 5, 0, 9]), 0),
        ('box is less than 1 pixel wide or tall', dict(bbox=[5, 5, 9, 0.5]), 0),
        ('box is outside its image', dict(bbox=[SIDE, 5, 9, 9]), 0),
        ('box is outside its image', dict(bbox=[5, -9, 9, 9]), 0),
        ('box is partly outside its image', dict(bbox=[50, 50, 15, 9]), 1),
        ('box is partly outside its image', dict(bbox=[5, -1, 9, 9]), 1),
        (None, dict(bbox=[-0.5, 5, 64.9, 9]), 1),
        (None, dict(bbox=[5, 5, 0, 9], ignore=1), 0),
        (None, dict(iscrowd=1), 0),
    ],
    ids=str,
)
def test_box(data, check, coco, fault, changes, objects):
    coco(first(**changes))
    code, found = check(RETINANET)
    if fault:
        size = (SIDE, SIDE)
        box = json.loads((data / 'coco/boxes.json').read_text())['annotations'][0]['bbox']
        assert found == {fault: [f'coco/boxes.json: annotation 1 of 0.png: {box} in {size}']}
    else:
        assert found == {}
    assert code == (fault in ERRORS)
    assert kept(data)[0] == objects


def test_validation_misses_what_training_leaves_out(data, coco):
    api = pytest.importorskip('mmdet.datasets.api_wrappers')
    coco(first(bbox=[5, 5, 0, 9], area=0))
    truth = api.COCO(str(data / 'coco/boxes.json'))
    others = list(truth.anns.values())[1:]
    keys = ('image_id', 'category_id', 'bbox')
    found = truth.loadRes([dict(score=0.9, **{key: other[key] for key in keys}) for other in others])
    evaluation = api.COCOeval(truth, found, 'bbox')
    evaluation.evaluate()
    evaluation.accumulate()
    evaluation.summarize()
    assert evaluation.stats[8] == 0.75  # recall: the class of the first image has two objects, one unfound


@pytest.mark.parametrize(
    'fault, mask, objects',
    [
        ('mask has no polygon of three points', [[1, 2, 30, 4]], (0, 1)),
        ('mask has no polygon of three points', [[1, 2, 30, 4, 5, 60, 7]], (0, 1)),
        ('mask has polygons of less than three points', [[1, 2], [5, 5, 20, 5, 20, 20]], (1, 0)),
        ('mask is one flat list', [1, 2, 30, 4, 5, 60], (1, 0)),
        (None, dict(size=[SIDE, SIDE], counts=[0, 4096]), (1, 0)),
    ],
    ids=str,
)
def test_mask(data, check, coco, fault, mask, objects):
    """Those that training takes; tests/datasets/test_coco.py has those that it refuses."""
    coco(first(segmentation=mask))
    place = ['coco/boxes.json: annotation 1']
    assert check(MASK_RCNN) == (int(fault in ERRORS), {fault: place} if fault else {})
    assert check(RETINANET)[0] == 0  # it takes no masks
    assert kept(data, MASK_RCNN) == objects


def test_mask_that_cannot_be_used(data, check, coco):
    coco(first(segmentation=[]))
    assert check(MASK_RCNN) == (1, {'mask is missing': ['coco/boxes.json: annotation 1']})
    with pytest.raises(UserError, match='mask is missing'):
        build(data, MASK_RCNN)


@pytest.mark.parametrize(
    'fault, width', [('box has no area', 0), ('box is less than 1 pixel wide or tall', 0.5)]
)
def test_mask_of_a_box_left_out(data, check, coco, fault, width):
    coco(first(bbox=[5, 5, width, 9], segmentation=[]))
    assert list(check(MASK_RCNN)[1]) == [fault]
    assert kept(data, MASK_RCNN) == (0, 0)


# --- Segmentation ---------------------------------------------------------------------------------


def put_map(data, pixels):
    Image.fromarray(pixels).save(data / 'labels/0.png')


@pytest.mark.parametrize(
    ('spoil', 'finding', 'message'),
    [
        (Path.unlink, 'map is missing', 'labels/0.png'),
        (lambda path: cut(path, 0), 'map cannot be read', 'image file'),
        (lambda path: cut(path, 60), 'map cannot be read', 'image file'),
    ],
    ids=['missing', 'empty', 'damaged'],
)
def test_map_that_cannot_be_loaded(data, check, spoil, finding, message):
    spoil(data / 'labels/0.png')
    assert check(ADE20K) == (1, {finding: ['labels/0.png']})
    with pytest.raises(OSError, match=message):
        build(data, ADE20K)[0]


@pytest.mark.parametrize('channels', [2, 3, 4])
def test_coloured_map(data, check, channels):
    put_map(data, np.ones((SIDE, SIDE, channels), np.uint8))
    assert check(SEGMENTOR) == (1, {'map has colours or alpha': ['labels/0.png']})
    with pytest.raises(RuntimeError, match='equal size'):
        loss(data, SEGMENTOR)


def test_map_with_palette(data, check):
    """Indices count, not the colours that they stand for."""
    image = Image.fromarray(np.ones((SIDE, SIDE), np.uint8))
    image.putpalette([200, 100, 50] * 256)
    image.save(data / 'labels/0.png')
    assert check(SEGMENTOR) == (0, {})
    assert build(data, SEGMENTOR)[0]['data_samples'].gt_sem_seg.data.unique() == 1


def test_map_of_another_size(data, check):
    put_map(data, np.ones((SIDE, SIDE - 1), np.uint8))
    fault = 'map is of another size than its image'
    assert check(SEGMENTOR) == (1, {fault: ['labels/0.png: (63, 64), image (64, 64)']})
    with pytest.raises(RuntimeError, match='equal size'):
        loss(data, SEGMENTOR)


def test_map_beyond_8_bits(data, check):
    put_map(data, np.full((SIDE, SIDE), 257, np.uint16))
    assert check(SEGMENTOR) == (1, {'map has values beyond 0..255': ['labels/0.png: [257]']})
    assert build(data, SEGMENTOR)[0]['data_samples'].gt_sem_seg.data.unique() == 1


WRONG_VALUES = 'map has values that are no class'


def test_values_that_are_no_class(data, check):
    pixels = np.ones((SIDE, SIDE), np.uint8)
    pixels[:9] = 255
    put_map(data, pixels)
    assert check(SEGMENTOR) == (0, {})
    assert float(loss(data, SEGMENTOR)['decode.loss_ce']) > 0
    pixels[:2], pixels[2] = 2, 7
    put_map(data, pixels)
    place = 'labels/0.png: [2, 7], classes are 0..1, 255 for none'
    assert check(SEGMENTOR) == (1, {WRONG_VALUES: [place]})
    with pytest.raises(IndexError, match='Target . is out of bounds'):
        loss(data, SEGMENTOR)


def test_values_with_reduced_zero(data, check):
    """ADE20K: 1..150 are classes, 0 and 255 are none."""
    pixels = np.arange(SIDE * SIDE).reshape(SIDE, SIDE) % 151
    pixels[0] = 255
    put_map(data, pixels.astype(np.uint8))
    assert check(ADE20K) == (0, {})
    labels = build(data, ADE20K)[0]['data_samples'].gt_sem_seg.data.unique().tolist()
    assert set(labels) <= {*range(150), 255}
    pixels[1] = 151
    put_map(data, pixels.astype(np.uint8))
    place = 'labels/0.png: [151], classes are 1..150, 0 and 255 for none'
    assert check(ADE20K) == (1, {WRONG_VALUES: [place]})


def test_values_of_some_classes(data, check):
    """A config that takes two classes of a data set ignores the others."""
    put_map(data, np.full((SIDE, SIDE), 150, np.uint8))
    text = ADE20K + "\ntrain_dataloader['dataset']['metainfo'] = dict(classes=('wall', 'sky'))"
    assert check(text) == (0, {})
    assert build(data, text)[0]['data_samples'].gt_sem_seg.data.unique() == 255


def test_map_without_image(data, check):
    (data / 'photos/0.jpg').rename(data / 'photos/0.jpeg')
    assert check(ADE20K) == (0, {'map has no image': ['labels/0.png']})
    assert len(build(data, ADE20K)) == 3


def test_equal_names(data, check):
    (data / 'photos/more').mkdir()
    (data / 'labels/more').mkdir()
    (data / 'photos/0.jpg').rename(data / 'photos/more/1.jpg')
    (data / 'labels/0.png').rename(data / 'labels/more/1.png')
    assert check(ADE20K) == (0, {'images in two folders have one name': ['1']})


def test_listed_images(data, check):
    (data / 'listed.txt').write_text('0\n1\n0\n')
    text = ADE20K + "\ntrain_dataloader['dataset']['ann_file'] = 'listed.txt'"
    assert check(text) == (0, {'image is listed twice': ['photos/0.jpg']})
    assert len(build(data, text)) == 3


def test_no_images(data, check):
    text = SEGMENTOR.replace("img_suffix='.png'", "img_suffix='.bmp'")
    assert check(text)[1]['dataset holds no images'] == ['coco/images']
    with pytest.raises(ValueError, match='need at least one array to concatenate'):
        build(data, text)


# --- Classification -------------------------------------------------------------------------------


def test_folders_that_are_not_the_classes(data, check):
    code, found = check(IMAGENET)
    assert (code, list(found)) == (1, ['images cannot be listed'])
    message = r"The number of subfolders \(2\) doesn't match the number of specified classes \(1000\)"
    assert re.search(message, found['images cannot be listed'][0])
    with pytest.raises(AssertionError, match=message):
        build(data, IMAGENET)


def test_label_beyond_the_head(data, check):
    (data / 'listed.txt').write_text('dark/0.png 0\nlight/1.png 2\n')
    place = 'folders/light/1.png: 2, classes are 0..1'
    assert check(LISTED) == (1, {'label is no class of the head': [place]})
    with pytest.raises(IndexError, match='Target 2 is out of bounds'):
        loss(data, LISTED)


def test_more_folders_than_classes(data, check):
    """A folder of something else moves the labels of those after it, too."""
    (data / 'folders/.cache').mkdir()
    assert check(CLASSIFIER) == (0, {})
    (data / 'folders/cache').mkdir()
    code, found = check(CLASSIFIER)
    assert code == 1
    assert len(found['label is no class of the head']) == 2
    assert found['class folder holds no images'] == ['folders/cache']
    assert build(data, CLASSIFIER).get_gt_labels().tolist() == [1, 1, 2, 2]


def test_fewer_folders_than_classes(data, check):
    text = CLASSIFIER.replace('num_classes=2', 'num_classes=3')
    place = 'folders: 2 folders, 3 classes'
    assert check(text) == (0, {'folders are fewer than classes of the head': [place]})


def test_list_of_labels(data, check):
    (data / 'listed.txt').write_text('dark/0.png 2\ndark/0.png 1\nlight/9.png 1\n')
    found = {
        'label is no class of the head': ['folders/dark/0.png: 2, classes are 0..1'],
        'image is missing': ['folders/light/9.png'],
        'image is listed twice': ['folders/dark/0.png'],
    }
    assert check(LISTED) == (1, found)
    assert build(data, LISTED).get_gt_labels().tolist() == [2, 1, 1]


def test_list_without_labels(data, check):
    (data / 'listed.txt').write_text('dark/0.png 0\nlight/1.png\n')
    code, found = check(LISTED)
    assert (code, list(found)) == (1, ['images cannot be listed'])
    with pytest.raises(ValueError, match='not enough values'):
        build(data, LISTED)
