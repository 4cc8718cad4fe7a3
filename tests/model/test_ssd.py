"""SSDLite predicts, which MMDetection's own head does not."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from helpers.tiny import ROOT
from mmengine.config import Config
from mmengine.registry import MODELS, DefaultScope

pytest.importorskip('mmdet')

pytestmark = pytest.mark.both_stacks


def test_ssdlite_predicts() -> None:
    from mmdet.structures import DetDataSample

    torch.manual_seed(0)
    cfg = Config.fromfile(ROOT / 'configs/det/ssdlite_emo2_1m_320.py').model
    cfg.backbone.init_cfg = None
    cfg.test_cfg.score_thr = 0.0
    with DefaultScope.overwrite_default_scope('mmdet'):
        model = MODELS.build(cfg).eval()
    info = dict(img_shape=(320, 320), ori_shape=(160, 160), pad_shape=(320, 320), scale_factor=(2.0, 2.0))
    data = dict(inputs=[torch.randint(0, 256, (3, 320, 320))], data_samples=[DetDataSample(metainfo=info)])
    with torch.no_grad():
        [found] = model.test_step(data)
    boxes = found.pred_instances.bboxes
    assert len(boxes) == cfg.test_cfg.max_per_img
    assert boxes.min() >= 0 and boxes.max() <= 160


WITHOUT_MMDET = """
import sys

class Absent:
    def find_spec(self, name, *_):
        if name == 'mmdet':
            raise ModuleNotFoundError(name=name)

sys.meta_path.insert(0, Absent())
import emo2_mm.ssd
"""


def test_a_missing_mmdet_is_named() -> None:
    done = subprocess.run([sys.executable, '-c', WITHOUT_MMDET], cwd=ROOT, capture_output=True, text=True)
    assert 'emo2_mm.ssd needs mmdet, which is not installed; install emo2_mm[det]' in done.stderr
