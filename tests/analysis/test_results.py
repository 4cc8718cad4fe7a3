"""Pictures of results and of datasets: what they count is right, and they are written."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from helpers.tiny import CLASSIFIER, DETECTOR, SEGMENTOR, run, write_config, write_data
from mmengine.structures import BaseDataElement, InstanceData, PixelData
from PIL import Image

from emo2_mm.analysis.results import (
    Collected,
    ResultsHook,
    _ious,
    _match,
    average_precision,
    class_ious,
    curve,
)
from emo2_mm.config import load_config

pytest.importorskip('matplotlib')


def boxes(*rows: tuple, **more: Any) -> InstanceData:
    """Boxes of (label, left, top, right, bottom) or, with a score at the end, predictions."""
    data = np.array(rows, float).reshape(-1, len(rows[0]) if rows else 6)
    found = InstanceData(bboxes=torch.tensor(data[:, 1:5]), labels=torch.tensor(data[:, 0]).long(), **more)
    if data.shape[1] == 6:
        found.scores = torch.tensor(data[:, 5])
    return found


def image(path: Path) -> str:
    Image.new('RGB', (80, 60), (120, 130, 140)).save(path)
    return str(path)


def test_boxes_are_matched_and_counted(tmp_path: Path) -> None:
    """A hit, one of the wrong class, one nowhere, one on a crowd, one of a low score; an object missed."""
    collected = Collected(['cat', 'dog'])
    sample = BaseDataElement(metainfo=dict(img_path=image(tmp_path / 'a.png')))
    sample.gt_instances = boxes((0, 0, 0, 20, 20), (1, 30, 0, 50, 20), (1, 0, 40, 20, 60))
    sample.ignored_instances = boxes((0, 60, 0, 80, 20))
    sample.pred_instances = boxes(
        (0, 1, 0, 20, 20, 0.9), (0, 30, 0, 50, 20, 0.8), (1, 60, 40, 80, 60, 0.7), (0, 61, 0, 79, 20, 0.6),
        (1, 0, 40, 20, 60, 0.1),
    )  # fmt: skip
    collected.add(sample)
    assert collected.counts.tolist() == [[1, 0, 0], [1, 0, 1], [0, 1, 0]]
    assert collected.results[0].quality == 1 / 4
    assert collected.there.tolist() == [1, 2]
    assert collected.ranked[0] == [(0.9, True), (0.8, False)]
    assert collected.ranked[1] == [(0.7, False), (0.1, True)]
    collected.draw(tmp_path)
    for name in ('results', 'confusion_matrix', 'precision_recall'):
        with Image.open(tmp_path / f'{name}.png') as picture:
            assert min(picture.size) > 200


def test_an_object_is_found_once() -> None:
    truth = np.array([[0, 0, 20, 20]])
    found = np.array([[0, 0, 20, 19], [0, 0, 20, 20]])
    assert _match(_ious(found, truth)).tolist() == [0, -1]
    assert _match(np.zeros((2, 0))).tolist() == [-1, -1]


def test_average_precision_is_that_of_coco() -> None:
    """By pycocotools, as the mean of three classes in many images."""
    pytest.importorskip('pycocotools')
    from helpers.coco_results import figures, made_up
    from pycocotools.cocoeval import COCOeval

    truth, found = made_up(0)
    truth['annotations'] = [dict(x, iscrowd=0) for x in truth['annotations']]
    collected = Collected(['cat', 'dog', 'owl'])

    def row(x: dict[str, Any]) -> tuple:
        left, top, width, height = x['bbox']
        scores = [x['score']] if 'score' in x else []
        return (x['category_id'] - 1, left, top, left + width, top + height, *scores)

    for image in truth['images']:
        sample = BaseDataElement(metainfo=dict(img_path='none'))
        sample.gt_instances, sample.pred_instances = (
            boxes(*(row(x) for x in part if x['image_id'] == image['id']))
            for part in (truth['annotations'], found)
        )
        collected.add(sample)
    own = [average_precision(*curve(*pair)) for pair in zip(collected.ranked, collected.there)]
    _, stats = figures(COCOeval, truth, found, 'bbox', [1, 10, 100])
    assert 0.2 < stats[1] < 0.95
    assert np.mean(own) == pytest.approx(stats[1], abs=1e-6)


def test_maps_and_classes_are_counted(tmp_path: Path) -> None:
    path = image(tmp_path / 'a.png')
    maps = Collected(['ground', 'weed', 'never'])
    truth = torch.zeros(1, 60, 80, dtype=torch.long)
    truth[:, :, 40:] = 1
    truth[:, :6] = 255  # of no class
    sample = BaseDataElement(metainfo=dict(img_path=path))
    sample.gt_sem_seg, sample.pred_sem_seg = PixelData(data=truth), PixelData(data=torch.zeros_like(truth))
    maps.add(sample)
    assert maps.counts[0, 0] == maps.counts[1, 0] == 54 * 40
    assert class_ious(maps.counts)[:2].tolist() == [0.5, 0.0]
    assert np.isnan(class_ious(maps.counts)[2])
    maps.draw(tmp_path / 'maps')
    assert {x.name for x in (tmp_path / 'maps').iterdir()} == {'results.png', 'confusion_matrix.png'}

    classes = Collected(['cat', 'dog'])
    for label, scores in ((0, [0.9, 0.1]), (1, [0.7, 0.3]), (1, [0.2, 0.8])):
        sample = BaseDataElement(metainfo=dict(img_path=path))
        sample.gt_label, sample.pred_score = torch.tensor([label]), torch.tensor(scores)
        sample.pred_label = sample.pred_score.argmax(keepdim=True)
        classes.add(sample)
    assert classes.counts.tolist() == [[1, 0], [1, 1]]
    assert [round(result.quality, 1) for result in classes.results] == [0.3, 0.8, 0.9]
    classes.draw(tmp_path / 'classes')
    assert len(list((tmp_path / 'classes').iterdir())) == 3


def test_hook_shows_the_last_evaluation(tmp_path: Path) -> None:
    """And nothing if the dataset has no names of classes."""
    hook = ResultsHook()
    dataset = SimpleNamespace(metainfo=dict(classes=('cat', 'dog')))
    loader = SimpleNamespace(dataset=dataset)
    runner = SimpleNamespace(val_dataloader=loader, test_dataloader=loader, work_dir=str(tmp_path))
    sample = BaseDataElement(metainfo=dict(img_path=image(tmp_path / 'a.png')))
    sample.gt_label, sample.pred_score = torch.tensor([0]), torch.tensor([0.5, 0.5])
    sample.pred_label = torch.tensor([0])
    for _ in range(2):
        hook.before_val_epoch(runner)
        hook.after_val_iter(runner, 0, None, [sample])
    assert hook.collected.seen == 1
    hook.after_train(runner)
    assert (tmp_path / 'results.png').is_file()
    dataset.metainfo = {}
    hook.before_test_epoch(runner)
    hook.after_test_iter(runner, 0, None, [sample])
    hook.after_test(runner)


@pytest.mark.parametrize('text', [DETECTOR, SEGMENTOR, CLASSIFIER], ids=['det', 'seg', 'cls'])
@pytest.mark.parametrize('split', ['train', 'val'])
def test_browse_draws_samples_and_distributions(tmp_path: Path, text: str, split: str) -> None:
    scope = {DETECTOR: 'mmdet', SEGMENTOR: 'mmseg', CLASSIFIER: 'mmpretrain'}[text]
    pytest.importorskip(scope)
    from emo2_mm.analysis.dataset_figure import browse_dataset

    write_data(tmp_path)
    cfg = load_config(write_config(tmp_path, text))
    files = browse_dataset(cfg, split, tmp_path / 'out', 3)
    assert [x.name for x in files] == [f'{split}_samples.png', f'{split}_distribution.png']
    for file in files:
        with Image.open(file) as picture:
            assert np.asarray(picture.convert('L')).std() > 5


def test_boxes_that_were_loaded_late_are_drawn_in_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A validation pipeline resizes images before it loads boxes, which stay those of the file."""
    pytest.importorskip('mmdet')
    from emo2_mm.analysis import dataset_figure

    write_data(tmp_path)
    cfg = load_config(write_config(tmp_path, DETECTOR))
    for step in cfg.val_dataloader.dataset.pipeline:
        if step.type == 'Resize':
            step.scale = (32, 32)
    drawn = []
    monkeypatch.setattr(dataset_figure, 'draw', lambda *args, **kwargs: drawn.append(args))
    dataset_figure.browse_dataset(cfg, 'val', tmp_path / 'out', 4)
    content = json.loads((tmp_path / 'coco/boxes.json').read_text())
    wanted = [np.array(x['bbox']) / 2 for x in content['annotations']]
    for (_, pixels, _, _, found, _), (left, top, width, height) in zip(drawn, wanted):
        assert pixels.shape == (32, 32, 3)
        assert np.allclose(found, [[left, top, left + width, top + height]])


@pytest.mark.slow
def test_training_and_test_write_pictures(tmp_path: Path) -> None:
    write_data(tmp_path)
    text = DETECTOR + "\ncustom_hooks = [dict(type='emo2_mm.analysis.results.ResultsHook')]\n"
    config = write_config(tmp_path, text)
    done = run(tmp_path, 'train.py', config)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / 'work_dirs/tiny/results.png').is_file()
    done = run(tmp_path, 'test.py', config, 'work_dirs/tiny/epoch_1.pth', '--work-dir', 'tested')
    assert done.returncode == 0, done.stderr
    assert (tmp_path / 'tested/precision_recall.png').is_file()
