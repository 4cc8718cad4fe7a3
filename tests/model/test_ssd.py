"""SSDLite predicts, which MMDetection's own head does not."""

from __future__ import annotations

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
