"""predict.py of a bundle reads, prepares and draws as the libraries do, without them."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from PIL import Image

from emo2_mm.export import predict

cv2 = pytest.importorskip('cv2')
mmcv = pytest.importorskip('mmcv')


def picture(height, width, channels=3, seed=0):
    """Waves and noise, (height, width, channels) uint8."""
    y, x = np.mgrid[0:height, 0:width]
    waves = [127 + 90 * np.sin(x / 7 + i) + 30 * np.cos(y / 5 * i + 1) for i in range(channels)]
    noise = np.random.RandomState(seed).normal(0, 8, (height, width, channels))
    return (np.stack(waves, axis=-1) + noise).clip(0, 255).astype(np.uint8)


def write_deep(path, channels):
    pixels = picture(50, 70, channels).astype(np.uint16) * 256 + np.arange(70, dtype=np.uint16)[:, None]
    cv2.imwrite(str(path), pixels)


def write_turned(path, turn):
    exif = Image.Exif()
    exif[0x0112] = turn
    Image.fromarray(picture(50, 70)).save(path, exif=exif)


WRITERS = {
    'odd.jpg': lambda path: Image.fromarray(picture(97, 131)).save(path),
    'progressive.jpg': lambda path: Image.fromarray(picture(51, 33)).save(path, progressive=True),
    'portrait.png': lambda path: Image.fromarray(picture(211, 120)).save(path),
    'grey.png': lambda path: Image.fromarray(picture(80, 61, 1)[..., 0]).save(path),
    'grey.jpg': lambda path: Image.fromarray(picture(80, 61, 1)[..., 0]).save(path),
    'alpha.png': lambda path: Image.fromarray(picture(50, 70, 4)).save(path),
    'grey_alpha.png': lambda path: Image.fromarray(picture(50, 70, 2)).save(path),
    'bits.png': lambda path: Image.fromarray(picture(50, 70, 1)[..., 0] > 128).save(path),
    'palette.png': lambda path: Image.fromarray(picture(50, 70)).quantize(40).save(path),
    'palette_clear.png': lambda path: (
        Image.fromarray(picture(50, 70)).quantize(40).save(path, transparency=3)
    ),
    'deep_grey.png': lambda path: write_deep(path, 1),
    'deep.png': lambda path: write_deep(path, 3),
    'deep_alpha.png': lambda path: write_deep(path, 4),
    'deep_grey.tif': lambda path: write_deep(path, 1),
    'a.bmp': lambda path: Image.fromarray(picture(50, 70)).save(path),
    'a.webp': lambda path: Image.fromarray(picture(50, 70)).save(path),
    **{f'turned_{i}.jpg': lambda path, i=i: write_turned(path, i) for i in range(1, 9)},
    'turned.png': lambda path: write_turned(path, 6),
    'turned.tif': lambda path: write_turned(path, 8),
}


@pytest.mark.parametrize('name', WRITERS)
def test_an_image_is_read_as_by_mmcv(name, tmp_path):
    path = tmp_path / name
    WRITERS[name](path)
    expected = mmcv.imfrombytes(path.read_bytes(), flag='color', backend='cv2')[..., ::-1]
    found = predict.read_image(path)
    assert found.dtype == np.uint8
    assert np.array_equal(found, expected)


@pytest.mark.parametrize('content', [b'', b'no image', None])
def test_a_file_that_cannot_be_read_is_an_error(content, tmp_path):
    path = tmp_path / 'bad.png'
    if content is None:  # cut off
        Image.fromarray(picture(50, 70)).save(path)
        content = path.read_bytes()[:2000]
    path.write_bytes(content)
    with pytest.raises(ValueError, match='bad.png: cannot be read as an image'):
        predict.read_image(path)


SIZES = [(64, 64), (192, 141), (97, 262), (50, 70), (301, 207), (1, 5), (25, 35), (100, 140), (50, 69)]


@pytest.mark.parametrize('old', [(50, 70), (97, 131), (33, 33), (480, 640)])
def test_resizing_is_that_of_opencv(old):
    """Bit for bit: OpenCV computes in fixed point."""
    image = picture(*old)
    for height, width in SIZES:
        for name, code in (('bilinear', cv2.INTER_LINEAR), ('nearest', cv2.INTER_NEAREST)):
            step = dict(backend='cv2', interpolation=name)
            found = predict.resize_image(image, width, height, step)
            expected = cv2.resize(image, (width, height), interpolation=code)
            assert np.array_equal(found, expected), (name, height, width)


RESIZED = dict(type='Resize', keep_ratio=True)
PIPELINES = {
    'detector': [{**RESIZED, 'scale': (133, 80)}],
    'segmentor': [{**RESIZED, 'scale': (204, 51)}],
    'factor': [{**RESIZED, 'scale_factor': 0.7}],
    'stretched': [dict(type='Resize', scale=(64, 48), keep_ratio=False)],
    'pillow': [dict(type='Resize', scale=(64, 48), backend='pillow', interpolation='bicubic')],
    'classifier': [
        dict(type='ResizeEdge', scale=73, backend='pillow', interpolation='bicubic'),
        dict(type='CenterCrop', crop_size=64),
    ],
    'long': [dict(type='ResizeEdge', scale=73, edge='long'), dict(type='CenterCrop', crop_size=(80, 30))],
    'padded': [{**RESIZED, 'scale': (133, 80)}, dict(type='Pad', size_divisor=32, pad_val=114)],
    'square': [dict(type='Pad', pad_to_square=True)],
}


@pytest.mark.parametrize('size', [(97, 131), (131, 97), (64, 64), (40, 200), (31, 33)])
@pytest.mark.parametrize('name', PIPELINES)
def test_a_pipeline_gives_the_same_pixels(name, size):
    pytest.importorskip('mmpretrain')
    from mmengine.config import Config
    from mmpretrain.registry import TRANSFORMS
    from mmpretrain.utils import register_all_modules

    from emo2_mm.export.preprocess import preprocess_steps

    register_all_modules()
    cfg = Config(dict(model={}, test_dataloader=dict(dataset=dict(pipeline=PIPELINES[name]))))
    data = dict(img=picture(*size), img_shape=size, ori_shape=size)
    for transform in PIPELINES[name]:
        data = TRANSFORMS.build(transform)(data)
    found = picture(*size)
    for step in preprocess_steps(cfg, None):
        found = predict.apply_step(found, step)
    assert np.array_equal(found, data['img'])


def test_a_transform_without_counterpart_is_an_error():
    from mmengine.config import Config

    from emo2_mm.export.preprocess import preprocess_steps

    for transform, message in (
        (dict(type='Albu'), 'has Albu'),
        (dict(type='Resize', scale=9, interpolation='area'), 'resizes by area of cv2'),
        (dict(type='Resize', scale_factor=(1, 2)), 'scale_factor'),
    ):
        cfg = Config(dict(model={}, test_dataloader=dict(dataset=dict(pipeline=[transform]))))
        with pytest.raises(ValueError, match=message):
            preprocess_steps(cfg, None)


META = dict(
    color_order='BGR', mean=[10.0, 20.6, 30.0], std=[2.0, 4.0, 8.0], input_size=[96, 64], size_divisor=32
)
FITTED = dict(
    op='resize', keep_ratio=True, scale=[1000, 60], fit=[64, 96], backend='cv2', interpolation='bilinear'
)


@pytest.mark.parametrize('dtype', ['uint8', 'float32'])
def test_an_image_is_shrunk_and_padded_to_a_fixed_size(dtype):
    layout = 'NHWC' if dtype == 'uint8' else 'NCHW'
    image = picture(50, 120)
    found = predict.prepare(
        image, dict(META, preprocess=[FITTED]), dict(input=dict(dtype=dtype, layout=layout))
    )
    assert found.size == (50, 120)
    assert found.valid == (27, 64)
    np.testing.assert_allclose(found.scale, (64 / 120, 27 / 50))
    pixels = found.array[0] if dtype == 'uint8' else found.array[0].transpose(1, 2, 0)
    assert pixels.shape == (96, 64, 3)
    expected = cv2.resize(image, (64, 27))[..., ::-1]
    if dtype == 'uint8':
        assert np.array_equal(pixels[:27], expected)
        assert (pixels[27:] == [10, 21, 30]).all()  # the mean
    else:
        np.testing.assert_allclose(pixels[:27], (expected - np.array(META['mean'])) / META['std'], atol=1e-5)
        assert not pixels[27:].any()


def test_boxes_are_chosen_as_by_mmcv():
    from mmcv.ops import batched_nms

    rng = np.random.RandomState(0)
    corner = rng.uniform(0, 60, (300, 2))
    boxes = np.concatenate([corner, corner + rng.uniform(0, 30, (300, 2))], axis=1).astype(np.float32)
    boxes[7, 2:] = boxes[7, :2]  # without area
    scores = rng.uniform(0, 1, (300, 4)).astype(np.float32)
    scores[7] = 1
    nms = dict(score_thr=0.2, iou_thr=0.4, pre=150, max=60, min_size=0.0)
    found, labels = predict.choose_boxes(boxes, scores, nms, [200, 100])

    chosen = []
    for first, last in ((0, 200), (200, 300)):
        pairs = torch.from_numpy(scores[first:last]).reshape(-1).topk(150)[1] + first * 4
        chosen.append(pairs)
    index = torch.cat(chosen)
    index = index[torch.from_numpy(scores).reshape(-1)[index] > 0.2]
    index = index[index // 4 != 7]
    dets, kept = batched_nms(
        torch.from_numpy(boxes)[index // 4],
        torch.from_numpy(scores).reshape(-1)[index],
        index % 4,
        dict(type='nms', iou_threshold=0.4),
    )
    np.testing.assert_array_equal(found, dets[:60].numpy())
    np.testing.assert_array_equal(labels, (index % 4)[kept][:60].numpy())


@pytest.mark.parametrize('kind', ['empty', 'full', 'noise', 'corner'])
def test_masks_are_encoded_as_by_coco(kind):
    coco = pytest.importorskip('pycocotools.mask')
    mask = np.zeros((37, 53), bool)
    if kind == 'full':
        mask[:] = True
    elif kind == 'noise':
        mask = np.random.RandomState(0).rand(37, 53) > 0.5
    elif kind == 'corner':
        mask[0, 0] = mask[30:, 40:] = True
    expected = coco.encode(np.asfortranarray(mask.astype(np.uint8)))
    found = predict.encode_mask(mask)
    assert found == dict(size=[37, 53], counts=expected['counts'].decode())
    assert np.array_equal(predict.decode_mask(found), mask)


def test_masks_are_pasted_as_by_mmdet():
    pytest.importorskip('mmdet')
    from mmdet.models.roi_heads.mask_heads.fcn_mask_head import _do_paste_mask

    rng = np.random.RandomState(0)
    for _ in range(20):
        mask = rng.rand(28, 28).astype(np.float32)
        corner = rng.uniform(-5, 60, 2)
        box = np.concatenate([corner, corner + rng.uniform(1, 50, 2)]).clip(0, [90, 70] * 2)
        box = box.astype(np.float32)
        if box[2] <= box[0] or box[3] <= box[1]:
            continue
        pasted, _ = _do_paste_mask(
            torch.from_numpy(mask)[None, None], torch.from_numpy(box)[None], 70, 90, skip_empty=False
        )
        expected = pasted[0].numpy() >= 0.5
        found = predict.paste_mask(mask, np.append(box, 0.9), (70, 90), 0.5)
        assert (found == expected).mean() > 0.999


@pytest.mark.parametrize('corners', [False, True])
def test_logits_are_enlarged_as_by_mmseg(corners):
    from torch.nn.functional import interpolate

    logits = np.random.RandomState(0).randn(5, 8, 12).astype(np.float32)
    prepared = predict.Prepared(np.zeros(1), (37, 90), (50, 96), (1.0, 1.0))
    kwargs = dict(mode='bilinear', align_corners=corners)
    large = interpolate(torch.from_numpy(logits)[None], (64, 96), **kwargs)[..., :50, :96]
    expected = interpolate(large, (37, 90), **kwargs)[0]
    found = predict.enlarge_logits(logits, prepared, corners, (64, 96))
    np.testing.assert_allclose(found, expected.numpy(), atol=1e-5)


def bundle(folder, **changes):
    """model.json of a bundle whose files are not there."""
    model = dict(runtime='onnx', files=['model.onnx'], install='onnxruntime', outputs=[])
    content = dict(schema=predict.SCHEMA, models=dict(onnx=model))
    content.update(changes)
    (folder / 'model.json').write_text(json.dumps(content))
    return folder


def test_a_bundle_that_is_not_whole_is_an_error(tmp_path):
    with pytest.raises(FileNotFoundError, match='model.json: no such file'):
        predict.Model(tmp_path)
    with pytest.raises(FileNotFoundError, match='model.onnx is missing; copy the whole folder'):
        predict.Model(bundle(tmp_path))
    with pytest.raises(ValueError, match="no model 'web'; there are onnx"):
        predict.Model(bundle(tmp_path), 'web')
    with pytest.raises(ValueError, match='schema 0, but'):
        predict.Model(bundle(tmp_path, schema=0))
    (tmp_path / 'model.json').write_text('[')
    with pytest.raises(ValueError, match='does not describe a model'):
        predict.Model(tmp_path)


def test_a_missing_runtime_is_named(tmp_path, monkeypatch):
    (bundle(tmp_path) / 'model.onnx').touch()
    monkeypatch.setitem(__import__('sys').modules, 'onnxruntime', None)
    with pytest.raises(ImportError, match='run `pip install onnxruntime`'):
        predict.Model(tmp_path)
