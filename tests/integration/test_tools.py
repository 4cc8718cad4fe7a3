"""tools/train.py and tools/test.py for each library, from training to evaluation."""

from __future__ import annotations

import pickle

import pytest
from helpers.tiny import CLASSIFIER, DETECTOR, SEGMENTOR, run, write_config, write_data

pytestmark = [pytest.mark.slow, pytest.mark.both_stacks]


CASES = {
    'mmdet': (DETECTOR, 'coco/bbox_mAP: '),
    'mmpretrain': (CLASSIFIER, 'accuracy/top1: '),
    'mmseg': (SEGMENTOR, 'mIoU: '),
}


def check(result):
    assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-4000:]
    return result.stdout + result.stderr


@pytest.mark.parametrize('scope', CASES)
def test_training_resumes_and_its_checkpoint_is_evaluated(tmp_path, scope):
    pytest.importorskip(scope)
    text, metric = CASES[scope]
    write_data(tmp_path)
    config = write_config(tmp_path, text)

    log = check(run(tmp_path, 'train.py', config))
    assert 'Epoch(train) [1][2/2]' in log
    assert metric in log
    assert (tmp_path / 'work_dirs/tiny/epoch_1.pth').is_file()

    gone = [
        'model.backbone.init_cfg.type=Pretrained',
        'model.backbone.init_cfg.checkpoint=gone.pth',
    ]
    more = ['--cfg-options', 'train_cfg.max_epochs=2', *gone]  # all weights are in epoch_1.pth
    log = check(run(tmp_path, 'train.py', config, '--resume', *more))
    assert 'resumed epoch: 1, iter: 2' in log
    assert 'Epoch(train) [1]' not in log
    assert 'Epoch(train) [2][2/2]' in log

    out = 'maps' if scope == 'mmseg' else 'all.pkl'
    arguments = [config, 'work_dirs/tiny/epoch_2.pth', '--work-dir', 'two words', '--out', out]
    log = check(run(tmp_path, 'test.py', *arguments))
    assert metric in log
    assert list((tmp_path / 'two words').glob('*/*.json'))
    if scope == 'mmseg':
        assert len(list((tmp_path / out).glob('*.png'))) == 4
    else:
        assert len(pickle.loads((tmp_path / out).read_bytes())) == 4
