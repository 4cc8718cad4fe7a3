"""Data that cannot be used: training names the file, or says how much it leaves out."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any, Callable

import pytest
from helpers.tiny import CLASSIFIER, DETECTOR, SEGMENTOR, SIDE, edit_json, run, write_config, write_data
from mmengine.config import Config
from mmengine.dataset import Compose
from mmengine.registry import DATASETS, DefaultScope
from mmengine.runner import Runner
from PIL import Image

from emo2_mm.datasets.context import FaultyData, NamedSamples, report_failing_files, use_own_datasets
from emo2_mm.errors import UserError

MASKED = DETECTOR.replace('with_bbox=True', 'with_bbox=True, with_mask=True')
LOADED = "dict(type='LoadAnnotations'), "
CROPPED = SEGMENTOR.replace(LOADED, LOADED + "dict(type='RandomCrop', crop_size=(32, 32)), ", 1)
ITERATIONS = """
train_cfg = dict(type='IterBasedTrainLoop', max_iters=4, val_interval=4)
train_dataloader['sampler'] = dict(type='InfiniteSampler', shuffle=False)
"""


@pytest.fixture
def data(tmp_path: Path) -> Path:
    write_data(tmp_path)
    return tmp_path


def build(data: Path, text: str) -> Any:
    """The data set of a run, which names files."""
    cfg = Config.fromfile(write_config(data, text))
    pytest.importorskip(cfg.default_scope)
    use_own_datasets(cfg)
    with DefaultScope.overwrite_default_scope(cfg.default_scope):
        dataset = DATASETS.build(cfg.train_dataloader.dataset)
    dataset.prepare_data = NamedSamples(dataset)
    return dataset


def damage(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:40])


def empty(path: Path) -> None:
    path.write_bytes(b'')


@pytest.mark.parametrize(
    'text',
    [DETECTOR, MASKED, SEGMENTOR, CROPPED, CLASSIFIER],
    ids=['boxes', 'masks', 'maps', 'crops', 'classes'],
)
def test_good_data_pass(data: Path, text: str) -> None:
    dataset = build(data, text)
    assert len(dataset) == 4
    assert all('inputs' in dataset[i] for i in range(4))


@pytest.mark.parametrize('spoil', [Path.unlink, empty, damage])
@pytest.mark.parametrize(
    ('text', 'file'),
    [(DETECTOR, 'coco/images/0.png'), (SEGMENTOR, 'labels/0.png'), (CLASSIFIER, 'folders/dark/0.png')],
    ids=['detector', 'segmentor', 'classifier'],
)
def test_file_is_named(data: Path, text: str, file: str, spoil: Callable[[Path], None]) -> None:
    dataset = build(data, text)
    spoil(data / file)
    with pytest.raises(FaultyData) as error:
        dataset[0]
    assert f'{data / file}: ' in str(error.value) and 'check_dataset.py' in str(error.value)
    assert 'inputs' in dataset[1]


@pytest.mark.parametrize('wrong', ['mask', 'file'])
def test_mask_of_another_size(data: Path, wrong: str) -> None:
    """As many pixels: MMDetection would learn a garbled mask."""

    def spoil(file: dict) -> None:
        file['annotations'][0]['segmentation'] = dict(size=[32, 128], counts=[100, 200, 3796])
        if wrong == 'file':  # which says of the image what the mask says
            file['images'][0].update(height=32, width=128)

    edit_json(data / 'coco/boxes.json', spoil)
    message = r'a mask is 32 x 128 pixels, its image 64 x 64 \(height x' if wrong == 'file' else 'COCO013'
    with pytest.raises((FaultyData, UserError), match=message):
        build(data, MASKED)[0]
    assert 'inputs' in build(data, DETECTOR)[0]  # where no masks are loaded


@pytest.mark.parametrize('crops', [False, True])
def test_map_of_another_size(data: Path, crops: bool) -> None:
    """A crop would hide it, for it cuts both."""
    Image.new('L', (SIDE + 2, SIDE)).save(data / 'labels/0.png')
    with pytest.raises(FaultyData, match=r'labels/0\.png: .*its map is 64 x 66 pixels, the image 64 x 64\n'):
        build(data, CROPPED if crops else SEGMENTOR)[0]


def test_map_beside_a_resized_image(data: Path) -> None:
    """As a segmentor is tested."""
    load = "dict(type='LoadImageFromFile'), "
    text = SEGMENTOR.replace(load, load + "dict(type='Resize', scale=(80, 80)), ", 1)
    assert tuple(build(data, text)[0]['inputs'].shape) == (3, 80, 80)


def test_switched_pipeline(data: Path) -> None:
    """As MMDetection's PipelineSwitchHook does it."""

    def mix(data: dict[str, Any]) -> None:
        raise KeyError('mosaic')

    dataset = build(data, DETECTOR)
    dataset.pipeline = Compose([mix])
    with pytest.raises(FaultyData, match="0.png: function: KeyError: 'mosaic'"):
        dataset[0]


def test_inside_wrappers(data: Path) -> None:
    cfg = Config.fromfile(write_config(data, DETECTOR))
    pytest.importorskip('mmdet')
    parts = dict(type='ConcatDataset', datasets=[cfg.train_dataloader.dataset] * 2)
    loader = dict(cfg.train_dataloader, dataset=dict(type='RepeatDataset', times=2, dataset=parts))
    runner = SimpleNamespace(build_dataloader=Runner.build_dataloader)
    report_failing_files(runner)
    empty(data / 'coco/images/1.png')
    with DefaultScope.overwrite_default_scope('mmdet'):
        dataset = runner.build_dataloader(loader).dataset
    assert len(dataset) == 16 and 'inputs' in dataset[4]
    with pytest.raises(FaultyData, match='1.png: LoadImageFromFile: error: OpenCV'):
        dataset[5]


@pytest.mark.slow
@pytest.mark.parametrize('workers', [0, 1])
@pytest.mark.parametrize('kind', ['epochs', 'iterations'])
def test_training_stops(data: Path, kind: str, workers: int) -> None:
    """In the process that trains, and in one that loads: by iterations, that starts before the training."""
    text = DETECTOR if kind == 'epochs' else CROPPED + ITERATIONS
    pytest.importorskip('mmdet' if kind == 'epochs' else 'mmseg')
    if kind == 'epochs':
        empty(data / 'coco/images/1.png')
    else:
        Image.new('L', (SIDE + 2, SIDE)).save(data / 'labels/0.png')
    options = ['--cfg-options', f'train_dataloader.num_workers={workers}']
    result = run(data, 'train.py', write_config(data, text), *options)
    assert result.returncode == 1
    if kind == 'epochs':
        assert f'FaultyData: {data}/coco/images/1.png: LoadImageFromFile: error: OpenCV' in result.stderr
        assert '!buf.empty()' in result.stderr
    else:
        files = f'{data}/coco/images/0.png with {data}/labels/0.png'
        assert f'FaultyData: {files}: LoadAnnotations: ValueError: its map is 64 x 66' in result.stderr


@pytest.mark.slow
@pytest.mark.parametrize('options', [[], ['--out', 'all.pkl']], ids=['', 'out'])
def test_evaluation_stops(data: Path, options: list[str]) -> None:
    pytest.importorskip('mmpretrain')
    config = write_config(data, CLASSIFIER)
    assert run(data, 'train.py', config).returncode == 0
    empty(data / 'folders/dark/0.png')
    result = run(data, 'test.py', config, data / 'work_dirs/tiny/epoch_1.pth', *options)
    assert result.returncode == 1
    assert f'FaultyData: {data}/folders/dark/0.png: LoadImageFromFile: error: OpenCV' in result.stderr
