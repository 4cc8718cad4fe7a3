"""tools/show_windows.py: its attention is the network's, at the right places of the image."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers.tiny import BACKBONE, CLASSIFIER, DETECTOR, SEGMENTOR, call_tool, write_config
from mmengine.config import Config
from mmengine.registry import MODELS
from PIL import Image

from emo2_mm import EMOv2
from emo2_mm.analysis import attention_maps
from emo2_mm.attention import SEWMHSA, add_windows, split_windows

SIZES = [(6, 6, 3), (6, 9, 3), (5, 7, 3), (2, 1, 4), (4, 4, 4)]  # height, width, window
ARCH = dict(depths=(1, 1, 3, 2), channels=(8, 12, 16, 24), expand_ratios=(2, 2, 2, 2), head_dim=8)


@pytest.fixture
def main(monkeypatch, capsys, tmp_path):
    """Run the tool in this process; returns its exit status and its errors."""
    monkeypatch.chdir(tmp_path)

    def run(*args):
        return call_tool('show_windows.py', *args), capsys.readouterr().err

    return run


def attention_module(window):
    torch.manual_seed(0)
    module = SEWMHSA(16, 24, head_dim=4, window_size=window).double()
    module.qk.weight.data.mul_(4)  # far from even
    return module


def padded(x, window):
    return F.pad(x, (0, 0, 0, -x.shape[2] % window, 0, -x.shape[1] % window))


@pytest.mark.parametrize(('h', 'w', 'window'), SIZES)
def test_attention_times_v_is_the_output_of_the_module(h, w, window):
    module = attention_module(window)
    x = torch.randn(2, h, w, 16, dtype=torch.double)
    y = padded(x, window)
    q, k = (split_windows(part, window, module.heads) for part in module.qk(y).chunk(2, dim=-1))
    v = split_windows(module.act(module.v(y)), window, module.heads)
    ours = add_windows(attention_maps.attend(q, k) @ v, window, y.shape[1] // window, y.shape[2] // window)
    torch.testing.assert_close(ours[:, :h, :w], module(x), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(('h', 'w', 'window'), SIZES)
def test_attention_of_each_token_lies_in_its_windows(h, w, window):
    module = attention_module(window)
    qk = module.qk(padded(torch.randn(1, h, w, 16, dtype=torch.double), window)).detach()
    rows, columns = qk.shape[1:3]
    n1, n2 = rows // window, columns // window
    q, k = (part.view(rows, columns, 4, 4) for part in qk[0].chunk(2, dim=-1))
    for row, column in np.ndindex(h, w):
        i, j = row // window, column // window
        neighbour = [(i * window + a, j * window + b) for a, b in np.ndindex(window, window)]
        i, j = row % n1, column % n2
        distant = [(a * n1 + i, b * n2 + j) for a, b in np.ndindex(window, window)]
        maps = attention_maps.attention_of((row, column), qk, window, heads=4)
        for found, tokens in zip(maps, (neighbour, distant)):
            logits = torch.stack(
                [(q[row, column] * k[token]).sum(-1) / 2 for token in tokens]
            )  # (tokens, heads)
            expected = torch.full_like(found, torch.nan)
            for token, value in zip(tokens, logits.softmax(0).mean(1)):
                expected[token] = value
            torch.testing.assert_close(found, expected, equal_nan=True)


def test_maps_of_a_stage_are_the_mean_over_its_blocks():
    """At (130, 70) of an image of 100 x 150 pixels, in the blocks' mean."""
    torch.manual_seed(0)
    backbone = EMOv2(ARCH, window_size=3, layer_scale_init_value=1.0).eval()
    x = torch.randn(1, 3, 100, 150)
    stages = attention_maps.look(backbone, x, (130, 70))
    assert [(s.stride, s.blocks, s.shape) for s in stages] == [(16, 2, (7, 10)), (32, 1, (4, 5))]
    assert [s.maps.shape for s in stages] == [(2, 9, 12), (2, 6, 6)]
    given = []
    for module in (block.expand for block in backbone.stages[2][1:]):
        module.register_forward_pre_hook(lambda module, args: given.append((module, args[0])))
    with torch.no_grad():
        backbone(x)
        maps = [attention_maps.attention_of((4, 8), m.qk(padded(y, 3)), 3, m.heads) for m, y in given]
    assert not np.allclose(*maps, equal_nan=True)
    np.testing.assert_allclose(stages[0].maps, torch.stack(maps).mean(0), rtol=1e-4)


def test_no_hook_stays_on_the_backbone():
    backbone = EMOv2(ARCH, window_size=3).eval()
    attention_maps.look(backbone, torch.randn(1, 3, 64, 64), (0, 0))
    assert not any(module._forward_hooks for module in backbone.modules())


@pytest.mark.parametrize(
    'settings',
    [
        dict(type='mmdet.DetDataPreprocessor', bgr_to_rgb=True, pad_size_divisor=32),
        dict(type='mmdet.DetDataPreprocessor'),
        dict(type='mmpretrain.ClsDataPreprocessor', to_rgb=True),
    ],
    ids=['rgb, padded', 'bgr', 'classification'],
)
def test_images_are_normalized_as_by_the_data_preprocessor(settings):
    pytest.importorskip(settings['type'].split('.')[0])
    settings = dict(mean=[120.0, 110.0, 100.0], std=[50.0, 60.0, 70.0], **settings)
    image = np.random.RandomState(0).randint(0, 256, (40, 50, 3), np.uint8)  # BGR
    inputs = torch.from_numpy(image).permute(2, 0, 1)
    if 'Det' in settings['type']:
        from mmdet.structures import DetDataSample

        data = dict(inputs=[inputs], data_samples=[DetDataSample(metainfo=dict(img_shape=(40, 50)))])
    else:
        data = dict(inputs=inputs[None])
    expected = MODELS.build(settings)(data)['inputs']
    ours = attention_maps.normalise(image[..., ::-1], Config(dict(model=dict(data_preprocessor=settings))))
    torch.testing.assert_close(ours, expected)


@pytest.mark.parametrize(
    ('scope', 'step', 'shape'),
    [
        ('mmdet', dict(type='Resize', scale=(200, 100), keep_ratio=True), (100, 167)),
        ('mmseg', dict(type='Resize', scale=(60, 30), keep_ratio=False), (30, 60)),
        ('mmpretrain', dict(type='ResizeEdge', scale=90), (90, 150)),
        ('mmpretrain', dict(type='CenterCrop', crop_size=20), (60, 100)),
    ],
)
def test_images_are_resized_as_in_testing_without_crop(scope, step, shape):
    pytest.importorskip(scope)
    pipeline = [dict(type='LoadImageFromFile'), step]
    data = dict(dataset=dict(type='RepeatDataset', dataset=dict(pipeline=pipeline)))
    cfg = Config(dict(default_scope=scope, test_dataloader=data))
    assert attention_maps.resize(np.zeros((60, 100, 3), np.uint8), cfg).shape == (*shape, 3)


def save(tmp_path, config):
    """An image of 90 x 150 (height x width) and a checkpoint of a config's backbone."""
    Image.new('RGB', (150, 90), 'teal').save(tmp_path / 'image.png')
    torch.manual_seed(0)
    backbone = MODELS.build(Config.fromfile(config).model.backbone)
    torch.save({'backbone.' + name: tensor for name, tensor in backbone.state_dict().items()}, 'tiny.pth')


@pytest.mark.parametrize('text', [CLASSIFIER, DETECTOR, SEGMENTOR], ids=['cls', 'det', 'seg'])
def test_the_picture_marks_the_point_in_each_panel(main, figure, tmp_path, text):
    scope = next(name for name in ('mmpretrain', 'mmdet', 'mmseg') if name in text)
    pytest.importorskip(scope)
    config = write_config(tmp_path, text)
    save(tmp_path, config)
    assert main(config, 'tiny.pth', 'image.png', '--point', 149, 0, '--out', 'new/windows.png')[0] == 0
    assert Image.open('new/windows.png').format == 'PNG'
    windows, neighbour, distant = figure().axes
    assert neighbour.get_title() == 'attention to the neighbour window'
    shown = windows.images[0].get_array().shape[:2]
    marks = [line.get_xydata()[0].tolist() for line in distant.lines]
    assert marks == [[149 / 150 * shown[1], 0]] * 2
    if text is DETECTOR:  # resized to 64 x 38 pixels, 4 x 3 tokens
        assert shown == (38, 64)
        assert windows.get_ylabel() == 'stride 16, 1 blocks\n3 x 4 tokens\nwindows of 4 x 4'


def test_labels_tell_the_share_of_the_brightest_token_and_of_padding(figure, tmp_path):
    """4 x 4 tokens, of which the last row and column are padding; one of them is the most attended."""
    maps = np.full((2, 4, 4), 0.04)
    maps[0, 1, 1], maps[0, 3, 3] = 0.14, 0.3
    maps[1, :, 3] = maps[1, 3] = 0.0
    maps[1, 0, 0] = 0.68
    stage = attention_maps.Stage(16, 2, (3, 3), maps)
    attention_maps.draw([stage], np.zeros((48, 48, 3), np.uint8), (5, 5), tmp_path / 'windows.png')
    _, neighbour, distant = figure().axes
    assert neighbour.get_xlabel() == 'brightest token 14.0%  (even: 6.2%)  padding 54%'
    assert distant.get_xlabel() == 'brightest token 68.0%  (even: 6.2%)'
    heat = neighbour.images[1].get_array()
    assert np.unravel_index(heat[:3, :3].sum(-1).argmax(), (3, 3)) == (1, 1)
    np.testing.assert_allclose(heat[1, 1], [*attention_maps.colormaps['inferno'](1.0)[:3], 0.95])


def test_arguments_that_cannot_be_used_are_one_message(main, tmp_path):
    pytest.importorskip('mmdet')
    config = write_config(tmp_path, DETECTOR)
    save(tmp_path, config)
    message = 'error: --point is 150 0, but image.png is 150 x 90 (width x height)\n'
    assert main(config, 'tiny.pth', 'image.png', '--point', 150, 0) == (1, message)
    assert main(config, 'tiny.pth', 'tiny.pth') == (1, 'error: tiny.pth: no such file, or not an image\n')
    status, message = main(config, 'gone.pth', 'image.png')
    assert (status, message) == (1, 'error: gone.pth: no such checkpoint file\n')
    status, message = main('gone.py', 'tiny.pth', 'image.png')
    assert status == 1 and 'gone.py' in message
    other = write_config(tmp_path, DETECTOR.replace(BACKBONE, "dict(type='mmdet.ResNet', depth=18)"))
    assert main(other, 'tiny.pth', 'image.png')[1].endswith('its backbone is ResNet, not EMOv2\n')
