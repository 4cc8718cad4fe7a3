"""Weights that are not there: their address, and the command that fetches them to the right place."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml
from helpers.tiny import ROOT
from mmengine.config import Config

from emo2_mm.engine.preflight import check_pretrained
from emo2_mm.errors import UserError
from emo2_mm.weights import released


def test_addresses_are_those_of_the_metafile() -> None:
    models = yaml.safe_load((ROOT / 'configs/cls/metafile.yml').read_text())['Models']
    listed = {model['Weights'] for model in models if 'Weights' in model}
    assert {f'{released.ADDRESS}/{name}' for name in released.FILES.values()} == listed


@pytest.mark.parametrize('path', ['checkpoints/EMOv2_2M_224.pth', '/elsewhere/EMOv2_2M_224.pth'])
def test_missing_weights_name_the_command(path: str) -> None:
    backbone = dict(init_cfg=dict(type='Pretrained', checkpoint=path))
    with pytest.raises(UserError) as caught:
        check_pretrained(Config(dict(model=dict(backbone=backbone))))
    address = f'{released.ADDRESS}/EMOv2_2M_224.pth'
    assert f'  curl -L --create-dirs -o {path} {address}\n' in str(caught.value)
    assert 'pretrained=none' in str(caught.value)


def test_other_weights_have_no_address(tmp_path: Path) -> None:
    assert released.how_to_fetch('checkpoints/mine.pth') is None
    assert released.imagenet_weights('20m') is None
    assert released.imagenet_weights('5m') == 'checkpoints/EMOv2_5M_224.pth'
