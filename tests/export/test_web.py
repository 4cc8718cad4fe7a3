"""`--format web`: the page finds what predict.py finds."""

from __future__ import annotations

import json
import os
from base64 import b64decode, b64encode
from pathlib import Path

import numpy as np
import pytest
import torch
from check_web import CHROMIUM, DESKTOP, compare, launch, open_bundle, serve
from helpers.networks import visible
from helpers.tiny import CLASSIFIER, DETECTOR, SEGMENTOR, model_of, write_config, write_data
from mmengine.config import Config
from mmengine.model import revert_sync_batchnorm
from PIL import Image

from emo2_mm.errors import UserError
from emo2_mm.export import exporter, predict, report
from emo2_mm.export.formats import FORMATS, web

needs_runtime = pytest.mark.skipif(
    bool(FORMATS['web'].missing()), reason=f'run {FORMATS["web"].environment[1]}'
)


# ---------------------------------------------------------------------------------------------- the folder


def test_missing_files_are_named_with_the_command_that_gets_them(monkeypatch, tmp_path):
    monkeypatch.setenv(web.VARIABLE, str(tmp_path))
    (tmp_path / web.NEEDED[0]).touch()
    with pytest.raises(UserError) as error:
        FORMATS['web'].require()
    assert f'needs {web.NEEDED[1]} of onnxruntime-web in {tmp_path}, not' in str(error.value)
    assert f'npm install --prefix ~/.cache/emo2_mm/web onnxruntime-web@{web.VERSION}' in str(error.value)
    (tmp_path / 'dist').mkdir()  # the folder of the package is right as well
    for name in web.NEEDED:
        (tmp_path / 'dist' / name).touch()
    FORMATS['web'].require()


TEXTS = {'mmdet': DETECTOR, 'mmseg': SEGMENTOR, 'mmpretrain': CLASSIFIER}
RESIZE = "dict(type='LoadImageFromFile'), dict(type='Resize', scale=(64, 48), keep_ratio=True)"


@pytest.fixture
def bundle(request, tmp_path, monkeypatch):
    """The bundle of a model of a scope (tiny.py) with random weights that show."""
    pytest.importorskip('onnxruntime')
    pytest.importorskip(request.param)
    interleaved = report.interleaved
    monkeypatch.setattr(report, 'interleaved', lambda runs, device: interleaved(runs, device, 2))
    monkeypatch.chdir(tmp_path)
    write_data(tmp_path)
    text = TEXTS[request.param]
    if request.param == 'mmseg':
        text = text.replace("dict(type='LoadImageFromFile')", RESIZE, 1)
    config = write_config(tmp_path, text)
    model = visible(revert_sync_batchnorm(model_of(Config.fromfile(config))))
    if request.param == 'mmdet':
        torch.nn.init.normal_(model.bbox_head.retina_cls.weight, std=0.3)  # scores that differ
        torch.nn.init.zeros_(model.bbox_head.retina_cls.bias)  # and are not all low
    torch.save(dict(state_dict=model.state_dict()), 'tiny.pth')
    options = exporter.Options(out=Path('b'), formats=['web'], shape=[64])
    assert exporter.export(str(config), 'tiny.pth', options) == 0
    return Path('b').resolve()


ALL = pytest.mark.parametrize('bundle', list(TEXTS), indirect=True)


@needs_runtime
@pytest.mark.parametrize('bundle', ['mmdet'], indirect=True)
def test_the_folder_has_all_that_the_page_needs(bundle):
    entry = json.loads((bundle / 'model.json').read_text())['models']['web']
    files = {str(path.relative_to(bundle)) for path in bundle.rglob('*') if path.is_file()}
    assert entry['files'] == ['model.onnx', 'index.html']
    assert {'model.json', 'web/example.png', *entry['files']} < files
    assert {f'web/{path.name}' for path in web.PAGE.glob('*.js')} < files
    assert {f'web/ort/{name}' for name in web.NEEDED} < files
    assert 'MIT License' in (bundle / 'web/ort/LICENSE').read_text()
    readme = (bundle / 'README.md').read_text()
    assert '| web | model.onnx, index.html | ' in readme
    assert 'python -m http.server 8000' in readme
    assert 'loads the model and 14 MB of WebAssembly' in readme


@needs_runtime
@pytest.mark.parametrize('settings', [dict(raw=True), dict(float_input=True), dict(batch=2)])
@pytest.mark.parametrize('bundle', ['mmpretrain'], indirect=True)
def test_what_the_page_does_not_show_is_an_error(bundle, settings, capsys):
    options = exporter.Options(out=Path('other'), formats=['web'], shape=[64], **settings)
    assert exporter.export('tiny.py', 'tiny.pth', options) == 1
    assert f'leave out --{next(iter(settings)).replace("_", "-")}' in capsys.readouterr().err
    assert not Path('other').exists()


# ---------------------------------------------------------------------------------------------- Chromium


@pytest.fixture(scope='module')
def chromium():
    pytest.importorskip('playwright', reason='pip install playwright')
    if not os.path.exists(CHROMIUM):
        pytest.skip(f'{CHROMIUM} is not there; set CHROMIUM to the path of Chromium')
    with launch() as browser:
        yield browser


@pytest.fixture(scope='module')
def scripts(chromium):
    """A page that can import the scripts of the product: ``call(file, body, argument)``."""
    with serve(web.PAGE) as address:
        page = chromium.new_page()
        page.goto(f'{address}icon.svg')

        def call(file, body, argument):
            return page.evaluate(f'async (a) => {{ const m = await import("/{file}"); {body} }}', argument)

        yield call
        page.close()


def picture(height, width, seed=0):
    """Waves and noise, (height, width, 3) uint8."""
    y, x = np.mgrid[0:height, 0:width]
    waves = [127 + 90 * np.sin(x / 7 + i) + 30 * np.cos(y / 5 * i + 1) for i in range(3)]
    noise = np.random.RandomState(seed).normal(0, 8, (height, width, 3))
    return (np.stack(waves, axis=-1) + noise).clip(0, 255).astype(np.uint8)


def resize(backend, interpolation, **settings):
    return dict(op='resize', backend=backend, interpolation=interpolation, **settings)


PIPELINES = {
    'keep ratio': [resize('cv2', 'bilinear', keep_ratio=True, scale=[133, 80], fit=[96, 96])],
    'factor': [resize('cv2', 'bilinear', keep_ratio=True, factor=0.7)],
    'nearest': [resize('cv2', 'nearest', keep_ratio=False, scale=[64, 48])],
    **{
        f'pillow {name}': [resize('pillow', name, keep_ratio=False, scale=[48, 60])]
        for name in ('nearest', 'box', 'bilinear', 'hamming', 'bicubic', 'lanczos')
    },
    'crop': [
        dict(op='resize_edge', scale=73, edge='short', backend='pillow', interpolation='bicubic'),
        dict(op='center_crop', size=[64, 60]),
    ],
    'long': [dict(op='resize_edge', scale=73, edge='long', backend='cv2', interpolation='bilinear')],
    'pad': [dict(op='pad', value=[1, 2, 3], divisor=32), dict(op='pad', value=9, square=True)],
    'pad to a size': [dict(op='pad', value=9, size=[300, 310])],
}


@pytest.mark.slow
@pytest.mark.parametrize('name', PIPELINES)
def test_a_picture_is_prepared_as_by_predict(name, scripts):
    """Bit for bit, also in sizes that are larger, odd or a single pixel high."""
    body = """
        const bytes = Uint8Array.from(atob(a.data), (c) => c.charCodeAt(0));
        const found = m.prepare(m.dropAlpha({...a, data: bytes}), a.meta);
        return {...found, data: btoa(Array.from(found.data, (x) => String.fromCharCode(x)).join(''))};
    """
    for height, width in ((97, 131), (131, 97), (48, 64), (25, 33), (1, 7)):
        image = picture(height, width)
        alpha = np.full((height, width, 1), 255, np.uint8)
        for order, size in (('RGB', None), ('BGR', [320, 330])):
            meta = dict(preprocess=PIPELINES[name], color_order=order, input_size=size)
            meta.update(mean=[123.675, 116.5, 103.53], std=[1.0] * 3)
            entry = dict(input=dict(dtype='uint8', layout='NHWC'))
            data = b64encode(np.concatenate([image, alpha], -1).tobytes()).decode()
            found = scripts('image.js', body, dict(data=data, width=width, height=height, meta=meta))
            expected = predict.prepare(image, meta, entry)
            array = np.frombuffer(b64decode(found['data']), np.uint8)
            array = array.reshape(1, found['height'], found['width'], 3)
            assert np.array_equal(array, expected.array), (height, width, order)
            assert found['size'] == [width, height]
            assert tuple(found['valid'][::-1]) == expected.valid
            assert tuple(found['scale']) == expected.scale


@pytest.mark.slow
@pytest.mark.parametrize('align_corners', [False, True])
def test_class_maps_are_those_of_predict(align_corners, scripts):
    body = """
        const logits = {dims: a.dims, data: new Float32Array(a.logits)};
        const map = m.readMap(logits, a.prepared, a.meta, a.longest);
        return [map.width, map.height, Array.from(map.data), m.readSegments(map, a.meta)];
    """
    rng = np.random.RandomState(0)
    for classes in (1, 3):
        logits = rng.normal(size=(classes, 8, 12)).astype(np.float32)
        prepared = predict.Prepared(np.zeros((1, 32, 48, 3), np.uint8), (77, 101), (30, 39), (1.0, 1.0))
        meta = dict(align_corners=align_corners, binary_thr=0.3, classes=['a', 'b', 'c'])
        model = predict.Model.__new__(predict.Model)
        model.meta, model.entry = meta, dict(input=dict(layout='NHWC'))
        model.run = lambda *args, logits=logits: dict(logits=logits[None])
        argument = dict(
            dims=[1, classes, 8, 12],
            logits=logits.ravel().tolist(),
            prepared=dict(width=48, height=32, valid=[39, 30], size=[101, 77]),
            meta=meta,
            longest=1000,
        )
        width, height, found, segments = scripts('answers.js', body, argument)
        expected = model.map(prepared)
        assert (width, height) == (101, 77)
        assert (np.array(found).reshape(height, width) == expected).mean() > 0.9995
        assert [item['label'] for item in segments] == [item['label'] for item in model._segments(expected)]
        smaller = scripts('answers.js', body, {**argument, 'longest': 50})
        assert smaller[:2] == [50, 38]


@pytest.mark.slow
def test_objects_and_masks_are_those_of_predict(scripts):
    body = """
        const tensor = (data, dims) => ({data: new Float32Array(data), dims});
        const outputs = {
            dets: tensor(a.dets, [1, a.count, 5]),
            labels: {data: new BigInt64Array(a.labels.map(BigInt))},
            masks: tensor(a.masks, [1, a.count, 7, 7]),
        };
        const found = m.readObjects(outputs, a.prepared, a.meta, a.meta.score_thr);
        return found.map(({region, ...item}) => item);
    """
    rng = np.random.RandomState(0)
    corners = np.sort(rng.uniform(-5, 70, (12, 2, 2)), 1).reshape(12, 4)
    corners[:3] = [[0, 0, 64, 48], [0, 10, 20, 48], [30, 0, 64, 20]]  # up to the edges
    scores = np.linspace(0.9, 0.2, 12)[:, None]
    dets = np.concatenate([corners, scores], 1).astype(np.float32)
    labels = np.array([0, 1, 0, 1, -1, 0, 1, 0, 1, 0, 1, 0])
    masks = rng.uniform(size=(12, 7, 7)).astype(np.float32)
    masks[0] = 1  # fills the picture
    size, scale = (75, 101), (64 / 101, 48 / 75)
    meta = dict(classes=['a', 'b'], mask_thr=0.5, score_thr=0.3)
    model = predict.Model.__new__(predict.Model)
    model.meta, model.entry = meta, dict(answers='detections')
    model.run = lambda *args: dict(dets=dets[None], labels=labels[None], masks=masks[None])
    expected = model._objects(predict.Prepared(np.zeros(0), size, (48, 64), scale), 0.3)
    argument = dict(
        dets=dets.ravel().tolist(), labels=labels.tolist(), masks=masks.ravel().tolist(), count=12, meta=meta
    )
    argument['prepared'] = dict(size=[101, 75], scale=list(scale))
    found = scripts('answers.js', body, argument)
    assert len(found) == len(expected) > 6
    for ours, theirs in zip(found, expected):
        assert [ours[key] for key in ('class', 'label')] == [theirs[key] for key in ('class', 'label')]
        assert ours['score'] == pytest.approx(theirs['score'], abs=1e-4)
        assert ours['box'] == pytest.approx(theirs['box'], abs=0.011)
        same = predict.decode_mask(ours['mask']) == predict.decode_mask(theirs['mask'])
        assert same.shape == size
        assert same.mean() > 0.999


def write_photos(folder):
    """Pictures of several sizes, one turned by its EXIF data, one a JPEG; their paths."""
    folder.mkdir()
    for name, height, width in (('a.png', 64, 64), ('b.png', 50, 71), ('c.jpg', 90, 40)):
        exif = Image.Exif()
        if name == 'b.png':
            exif[0x0112] = 6
        Image.fromarray(picture(height, width)).save(folder / name, exif=exif, quality=95)
    return sorted(folder.iterdir())


@pytest.mark.slow
@needs_runtime
@ALL
def test_the_page_finds_what_predict_finds(bundle, chromium, tmp_path):
    model = predict.Model(bundle, 'web', 1)
    with open_bundle(chromium, bundle, **DESKTOP) as browser:
        assert browser.page.evaluate('window.lastResult') is not None  # the example, at once
        assert browser.page.text_content('#list')
        assert compare(browser, model, write_photos(tmp_path / 'photos')) == []
        browser.page.evaluate('window.lastResult = null')
        browser.page.click('#camera')  # a test pattern
        assert browser.wait()['width'] == 640
        browser.page.click('#camera')
        assert browser.page.get_attribute('#camera', 'aria-pressed') == 'false'
        assert browser.errors == []


@pytest.mark.slow
@needs_runtime
@pytest.mark.parametrize('bundle', ['mmdet'], indirect=True)
def test_the_page_by_keyboard(bundle, chromium, tmp_path):
    """Every control can be reached and has a name; the threshold follows the arrows; a bad file is named."""
    with open_bundle(chromium, bundle, **DESKTOP) as browser:
        page, reached = browser.page, []
        while 'JSON' not in reached and len(reached) < 20:
            page.keyboard.press('Tab')
            reached.append(page.evaluate('document.activeElement.id || document.activeElement.textContent'))
            if reached[-1] == 'score':
                before = browser.page.evaluate('window.lastResult.objects.length')
                for _ in range(13):
                    page.keyboard.press('ArrowRight')
                browser.wait_for(f'window.lastResult.objects.length < {before}')
        assert reached == ['file', 'camera', 'example', 'score', 'JSON']
        names = page.evaluate("""Array.from(document.querySelectorAll('input, select, button'))
            .filter((e) => e.checkVisibility()).map((e) => e.labels?.[0]?.innerText || e.innerText)""")
        assert all(names)
        assert page.inner_text('[role=status]') == 'Nothing found'  # above that score
        (tmp_path / 'bad.png').write_bytes(b'no picture')
        page.set_input_files('#file', tmp_path / 'bad.png')
        page.wait_for_selector('#error:not([hidden])')
        assert 'cannot read that file' in page.inner_text('[role=alert]')
        assert browser.errors == []


@pytest.mark.slow
@needs_runtime
@pytest.mark.parametrize('bundle', ['mmpretrain'], indirect=True)
def test_the_page_uses_threads_where_the_server_allows_it(bundle, chromium):
    for isolated in (False, True):
        with open_bundle(chromium, bundle, isolated=isolated, **DESKTOP) as browser:
            threads = browser.page.text_content('#threads')
            assert (int(threads) > 1) == (isolated and os.cpu_count() > 1)
            assert browser.errors == []
