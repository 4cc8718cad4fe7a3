"""A trained detector with averaged weights, published in both formats."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from helpers.tiny import DETECTOR, call_tool, run, write_config, write_data

from emo2_mm.publish import publish
from emo2_mm.weights.read import read_checkpoint

pytestmark = [pytest.mark.slow, pytest.mark.both_stacks]


def test_a_published_detector_gives_the_metric_and_boxes_of_its_run(tmp_path, monkeypatch):
    for name in ('mmdet', 'safetensors'):
        pytest.importorskip(name)
    write_data(tmp_path)
    average = "custom_hooks = [dict(type='EMAHook', momentum=0.5)]\n"
    done = run(tmp_path, 'train.py', write_config(tmp_path, DETECTOR + average))
    assert done.returncode == 0, done.stderr
    (log,) = tmp_path.glob('work_dirs/tiny/*/vis_data/scalars.json')
    metrics = [read_metrics(line) for line in log.read_text().splitlines()]

    trained = 'work_dirs/tiny/epoch_1.pth'
    done = run(tmp_path, 'publish_model.py', trained, 'retinanet.safetensors')
    assert (done.returncode, done.stderr) == (0, '')
    file = done.stdout.split(': ')[0]
    assert re.fullmatch(r'retinanet-[0-9a-f]{8}\.safetensors', file)
    assert 'arch custom, recipe tiny, ' in done.stdout
    monkeypatch.chdir(tmp_path)
    other = publish(Path(trained), Path('retinanet.pth')).split(': ')[0]
    meta = read_checkpoint(other)['meta']
    assert (meta['epoch'], meta['iter']) == (1, 2)
    assert 'EMAHook' in meta['cfg']

    # without the hook that averages
    config = write_config(tmp_path, DETECTOR, 'plain.py')
    for i, path in enumerate((file, other)):
        done = run(tmp_path, 'test.py', config, path, '--work-dir', f'test_{i}')
        assert done.returncode == 0, done.stderr
        (log,) = tmp_path.glob(f'test_{i}/*/*.json')
        metrics.append(read_metrics(log.read_text()))
    metrics = [found for found in metrics if found]
    assert len(metrics) == 3 and metrics[0] == metrics[1] == metrics[2]

    # without the names of the classes
    unnamed = DETECTOR.replace("metainfo=dict(classes=('dark', 'light')), ", '')
    assert unnamed != DETECTOR
    config = write_config(tmp_path, unnamed, 'unnamed.py')
    found = []
    for path in (trained, file, other):
        options = ['--score-thr', '0', '--device', 'cpu']
        assert call_tool('infer.py', config, path, 'coco/images/0.png', *options) == 0
        found.append(json.loads(Path('predictions/preds/0.png.json').read_text())['objects'])
    assert len(found[0]) > 3 and {x['class'] for x in found[0]} <= {'dark', 'light'}
    assert found[0] == found[1] == found[2]


def read_metrics(line):
    return {name: value for name, value in json.loads(line).items() if name.startswith('coco/')}
