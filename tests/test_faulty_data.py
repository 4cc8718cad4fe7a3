"""Data that cannot be used: training names the file, or says how much it leaves out."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Callable, Iterator

import pytest
from mmengine.config import Config
from mmengine.registry import DATASETS, DefaultScope
from PIL import Image
from tiny import CLASSIFIER, DETECTOR, SEGMENTOR, SIDE, imported, run, write_config, write_data

MASKED = DETECTOR.replace('with_bbox=True', 'with_bbox=True, with_mask=True')


@pytest.fixture(scope='module')
def tool() -> Iterator[Any]:
    with imported('faulty_data') as module:
        yield module


@pytest.fixture
def data(tmp_path: Path) -> Path:
    write_data(tmp_path)
    return tmp_path


def build(tool: Any, data: Path, text: str, trains: bool = True) -> Any:
    """The data set of a run, with the pipeline that names files."""
    cfg = Config.fromfile(write_config(data, text))
    pytest.importorskip(cfg.default_scope)
    with DefaultScope.overwrite_default_scope(cfg.default_scope):
        dataset = DATASETS.build(cfg.train_dataloader.dataset)
    dataset.pipeline = tool.NamingPipeline(dataset.pipeline, trains)
    return dataset


def damage(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:40])


def empty(path: Path) -> None:
    path.write_bytes(b'')


@pytest.mark.parametrize(
    'text', [DETECTOR, MASKED, SEGMENTOR, CLASSIFIER], ids=['boxes', 'masks', 'maps', 'classes']
)
def test_good_data_pass(tool: Any, data: Path, text: str) -> None:
    dataset = build(tool, data, text)
    assert len(dataset) == 4
    assert all('inputs' in dataset[i] for i in range(4))


@pytest.mark.parametrize('spoil', [Path.unlink, empty, damage])
@pytest.mark.parametrize(
    ('text', 'file'),
    [(DETECTOR, 'coco/images/0.png'), (SEGMENTOR, 'labels/0.png'), (CLASSIFIER, 'folders/dark/0.png')],
    ids=['detector', 'segmentor', 'classifier'],
)
def test_file_is_named(tool: Any, data: Path, text: str, file: str, spoil: Callable[[Path], None]) -> None:
    dataset = build(tool, data, text)
    spoil(data / file)
    with pytest.raises(tool.FaultyData) as error:
        dataset[0]
    assert f'{data / file}: ' in str(error.value) and 'check_dataset.py' in str(error.value)
    assert 'inputs' in dataset[1]


def test_mask_of_another_size(tool: Any, data: Path) -> None:
    """As many pixels: MMDetection would learn a garbled mask."""
    file = json.loads((data / 'coco/boxes.json').read_text())
    file['annotations'][0]['segmentation'] = dict(size=[SIDE // 2, SIDE * 2], counts=[100, 200, 3796])
    (data / 'coco/boxes.json').write_text(json.dumps(file))
    dataset = build(tool, data, MASKED)
    with pytest.raises(
        tool.FaultyData, match=r'0\.png: a mask is 32 x 128 pixels, its image 64 x 64 \(height'
    ):
        dataset[0]


@pytest.mark.parametrize('crops', [False, True])
def test_map_of_another_size(tool: Any, data: Path, crops: bool) -> None:
    """A crop would hide it, for it cuts both; what is tested may be resized before its map is read."""
    crop = "dict(type='RandomCrop', crop_size=(32, 32)), dict(type='PackSegInputs')\n]\ntta_model"
    text = SEGMENTOR.replace("dict(type='PackSegInputs')\n]\ntta_model", crop) if crops else SEGMENTOR
    assert crops == ('RandomCrop' in text)
    Image.new('L', (SIDE + 2, SIDE)).save(data / 'labels/0.png')
    with pytest.raises(
        tool.FaultyData, match=r'labels/0\.png: its map is 64 x 66 pixels, the image 64 x 64\n'
    ):
        build(tool, data, text)[0]
    assert 'inputs' in build(tool, data, text, trains=False)[0]


def test_inside_wrappers(tool: Any, data: Path) -> None:
    inner = [build(tool, data, DETECTOR) for _ in range(2)]
    with DefaultScope.overwrite_default_scope('mmdet'):
        wrapper = DATASETS.build(
            dict(type='RepeatDataset', times=2, dataset=dict(type='ConcatDataset', datasets=inner))
        )
    assert tool.innermost(wrapper) == inner


@pytest.mark.slow
@pytest.mark.parametrize('workers', [0, 1])
def test_training_stops(data: Path, workers: int) -> None:
    pytest.importorskip('mmdet')
    (data / 'coco/images/1.png').write_bytes(b'')
    options = ['--cfg-options', f'train_dataloader.num_workers={workers}']
    result = run(data, 'train.py', write_config(data, DETECTOR), *options)
    assert result.returncode == 1
    assert f'FaultyData: {data}/coco/images/1.png: error: OpenCV' in result.stderr
    assert '!buf.empty()' in result.stderr


@pytest.mark.slow
def test_what_is_left_out_is_counted(data: Path) -> None:
    pytest.importorskip('mmdet')
    path = data / 'coco/boxes.json'
    file = json.loads(path.read_text())
    file['annotations'][0].update(bbox=[10, 10, 0, 20])  # no area
    file['annotations'][1].update(bbox=[SIDE + 5, 3, 20, 20])  # outside
    file['annotations'].append(dict(file['annotations'][2], id=9, category_id=7))  # unknown
    path.write_text(json.dumps(file))
    text = DETECTOR.replace('train_dataloader = loader(', 'train_dataloader = loader(filter_cfg=FILTER, ')
    text = text.replace('FILTER', 'dict(filter_empty_gt=True)')
    file['annotations'] = [a for a in file['annotations'] if a['image_id'] != 3]  # an image without boxes
    path.write_text(json.dumps(file))
    result = run(data, 'train.py', write_config(data, text))
    assert result.returncode == 0, result.stderr[-4000:]
    said = [line.split(' are left out')[0] for line in result.stdout.splitlines() if 'left out' in line]
    assert said == [f'{path}: 3 of 4 boxes', f'{path}: 1 of 4 images', f'{path}: 3 of 4 boxes']
