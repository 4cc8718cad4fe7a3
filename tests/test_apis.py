"""tools/infer.py: what it writes is what the models predict, and odd files do not stop it."""

from __future__ import annotations

import json
import os
from types import SimpleNamespace

import cv2
import numpy as np
import pytest
import torch
from helpers.tiny import CONFIGS, ROOT, call_tool, model_of, run, write_config
from mmengine.config import Config
from mmengine.runner import CheckpointLoader
from PIL import Image

from emo2_mm import apis

pytestmark = pytest.mark.both_stacks


@pytest.fixture
def main(monkeypatch, capsys, tmp_path):
    """Run the tool in this process; returns its exit status, its output and its errors."""
    monkeypatch.chdir(tmp_path)

    def run(*args):
        return (call_tool('infer.py', *args), *capsys.readouterr())

    return run


@pytest.fixture
def tiny(request, tmp_path, monkeypatch):
    """In a folder: the config of a scope (tiny.py, the fixture's value), tiny.pth and image.png."""
    pytest.importorskip(request.param)
    monkeypatch.chdir(tmp_path)
    cfg = Config.fromfile(write_config(tmp_path, CONFIGS[request.param]))
    meta = dict(dataset_meta=dict(classes=('night', 'day'), palette=[[0, 0, 128], [255, 255, 0]]))
    torch.save(dict(state_dict=model_of(cfg).state_dict(), meta=meta), 'tiny.pth')
    pixels = np.random.RandomState(0).randint(0, 256, (6, 10, 3), np.uint8)
    Image.fromarray(pixels).resize((80, 48), Image.BICUBIC).save('image.png')
    return cfg


def scopes(*names):
    return pytest.mark.parametrize('tiny', names, indirect=True)


def read(name):
    with open(name, encoding='utf-8') as file:
        return json.load(file)


@scopes('mmdet')
def test_objects_are_those_of_the_detector(tiny, main):
    from mmdet.apis import inference_detector

    assert main('tiny.py', 'tiny.pth', 'image.png', '--score-thr', 0)[0] == 0
    written = read('predictions/preds/image.png.json')
    model = model_of(tiny)
    model.cfg = tiny
    found = inference_detector(model, 'image.png').pred_instances
    objects = written.pop('objects')
    assert written == dict(image='image.png', width=80, height=48)
    assert len(objects) == len(found) > 3
    order = found.scores.argsort(descending=True)
    assert [x['label'] for x in objects] == found.labels[order].tolist()
    assert [x['class'] for x in objects] == [('night', 'day')[x['label']] for x in objects]
    np.testing.assert_allclose([x['score'] for x in objects], found.scores[order], atol=1e-4)
    np.testing.assert_allclose([x['box'] for x in objects], found.bboxes[order], atol=0.01)
    drawn, image = (np.array(Image.open(name)) for name in ('predictions/vis/image.png', 'image.png'))
    assert drawn.shape == image.shape and (drawn != image).any()


@scopes('mmdet')
def test_objects_below_the_score_threshold_are_left_out(tiny, main):
    main('tiny.py', 'tiny.pth', 'image.png', '--score-thr', 0)
    every = read('predictions/preds/image.png.json')['objects']
    middle = (every[2]['score'] + every[3]['score']) / 2
    _, out, _ = main('tiny.py', 'tiny.pth', 'image.png', '--score-thr', middle)
    assert read('predictions/preds/image.png.json')['objects'] == every[:3]
    assert sum(int(part.split(' x ')[0]) for part in out.splitlines()[0].split(': ')[1].split(', ')) == 3


@scopes('mmdet')
def test_the_object_with_the_highest_score_is_drawn_last(tiny, tmp_path, monkeypatch):
    inferencer = apis.init_inferencer(tiny, 'tiny.pth', 'cpu')
    drawn = []
    own = inferencer.visualizer.add_datasample

    def watch(name, image, sample, **kwargs):
        drawn.extend(sample.pred_instances.scores.tolist())
        own(name, image, sample, **kwargs)

    monkeypatch.setattr(inferencer.visualizer, 'add_datasample', watch)
    apis.detect(inferencer, tmp_path / 'image.png', None, 0.0)
    assert len(drawn) > 3 and drawn == sorted(drawn)


@pytest.mark.parametrize(
    'method', [pytest.param('mask-rcnn_emo2_1m', marks=pytest.mark.slow), 'ssdlite_emo2_1m_320']
)
def test_masks_are_written_and_ssd_predicts(tmp_path, method):
    """Masks are written; the head of SSD, which lacks what MMDetection 3.3 asks for, predicts."""
    pytest.importorskip('mmdet')
    cfg = Config.fromfile(ROOT / f'configs/det/{method}.py')
    model = model_of(cfg)
    if method.startswith('mask'):
        model.roi_head.bbox_head.fc_cls.bias.data[3] += 6
    torch.save(model.state_dict(), tmp_path / 'tiny.pth')
    Image.fromarray(np.random.RandomState(0).randint(0, 256, (60, 80, 3), np.uint8)).save(tmp_path / 'a.png')
    inferencer = apis.init_inferencer(cfg, str(tmp_path / 'tiny.pth'), 'cpu')
    objects = apis.detect(inferencer, tmp_path / 'a.png', None, 0.0)[0]['objects']
    if method.startswith('mask'):
        assert objects[0]['class'] == 'motorcycle'
        assert objects[0]['mask']['size'] == [60, 80]
        json.dumps(objects)


@scopes('mmseg')
def test_segments_are_those_of_the_segmentor(tiny, main):
    from mmseg.apis import inference_model

    assert main('tiny.py', 'tiny.pth', 'image.png')[0] == 0
    written = read('predictions/preds/image.png.json')
    tiny.test_pipeline = tiny.pipeline
    model = model_of(tiny)
    model.cfg = tiny
    labels = inference_model(model, 'image.png').pred_sem_seg.data[0].numpy()
    assert 0 < labels.mean() < 1
    np.testing.assert_array_equal(Image.open('predictions/' + written['map']), labels)
    shares = {'night': 1 - labels.mean(), 'day': labels.mean()}
    assert {x['class']: x['share'] for x in written['segments']} == pytest.approx(shares, abs=1e-4)
    assert [x['label'] for x in written['segments']] == sorted((0, 1), key=lambda i: -(labels == i).sum())


@scopes('mmseg')
def test_segments_are_drawn_in_their_colours(tiny, main):
    main('tiny.py', 'tiny.pth', 'image.png')
    labels = np.array(Image.open('predictions/preds/image.png.png')).astype(bool)
    blue = np.array(Image.open('predictions/vis/image.png'))[..., 2].astype(int)
    shift = blue - np.array(Image.open('image.png'))[..., 2]
    assert np.median(shift[~labels]) > np.median(shift[labels])


@scopes('mmpretrain')
def test_classes_are_those_of_the_classifier(tiny, main):
    from mmpretrain.structures import DataSample

    status, out, _ = main('tiny.py', 'tiny.pth', 'image.png')
    assert status == 0
    classes = read('predictions/preds/image.png.json')['classes']
    image = torch.from_numpy(cv2.imread('image.png')).permute(2, 0, 1)
    with torch.no_grad():
        scores = model_of(tiny).test_step(dict(inputs=[image], data_samples=[DataSample()]))[0].pred_score
    best = scores.argmax().item()
    assert [x['label'] for x in classes] == [best, 1 - best]
    assert [x['class'] for x in classes] == [('night', 'day')[x['label']] for x in classes]
    assert [x['score'] for x in classes] == pytest.approx(sorted(scores.tolist(), reverse=True), abs=1e-4)
    assert f'image.png: {classes[0]["class"]} ({classes[0]["score"]:.2f})' in out
    assert Image.open('predictions/vis/image.png').size == (224, 134)  # so that words are readable


@scopes('mmdet')
def test_class_names_come_from_the_checkpoint_then_the_config(tiny):
    names = dict(classes=('night', 'day'), palette=[[0, 0, 128], [255, 255, 0]])
    assert apis.find_names(names, tiny) == names
    own = ('dark', 'light')  # the config's
    for known in (None, {}, 'text', dict(classes=('a', 'b', 'c'), palette=[[1, 2, 3]])):
        found = apis.find_names(known, tiny)
        assert found['classes'] == own
        assert np.shape(found['palette']) == (2, 3)
    del tiny.test_dataloader.dataset.metainfo
    assert apis.find_names(None, tiny)['classes'] == ('0', '1')
    tiny.model.bbox_head.num_classes = 80
    assert apis.find_names(None, tiny)['classes'][:2] == ('person', 'bicycle')


ODD = {
    'grey.png': Image.new('L', (20, 10), 99),
    'deep.png': Image.fromarray(np.full((10, 20), 60000, np.uint16)),
    'deep.tif': Image.fromarray(np.full((10, 20), 60000, np.uint16)),
    'clear.png': Image.new('RGBA', (20, 10), (10, 20, 30, 40)),
    'palette.png': Image.new('P', (20, 10), 1),
    'print.jpg': Image.new('CMYK', (20, 10)),
    'one.png': Image.new('RGB', (1, 1)),
    'thin.png': Image.new('RGB', (1, 300)),
    'WORDS IN ÜPPER.PNG': Image.new('RGB', (20, 10)),
}


@scopes('mmpretrain', 'mmseg')
def test_images_of_any_mode_and_size_are_read(tiny, main, tmp_path):
    os.mkdir('images')
    for name, image in ODD.items():
        image.save(tmp_path / 'images' / name)
    Image.new('RGB', (20, 10)).save('images/without', format='PNG')
    status, out, err = main('tiny.py', 'tiny.pth', 'images')
    assert (status, err) == (0, '')
    names = sorted([*ODD, 'without'])
    assert sorted(name[:-5] for name in os.listdir('predictions/preds') if name[-5:] == '.json') == names
    drawn = [name + '.jpg' if name in ('deep.tif', 'without') else name for name in names]
    assert sorted(os.listdir('predictions/vis')) == sorted(drawn)
    sizes = [(x['width'], x['height']) for x in (read(f'predictions/preds/{name}.json') for name in names)]
    with open('predictions/preds/WORDS IN ÜPPER.PNG.json', encoding='utf-8') as file:
        assert 'ÜPPER' in file.read()  # for people to read
    assert sizes == [ODD[name].size if name in ODD else (20, 10) for name in names]


@scopes('mmdet')
def test_files_that_cannot_be_read_are_skipped_and_named(tiny, main, tmp_path):
    folder = tmp_path / 'images'
    folder.mkdir()
    whole = np.random.RandomState(0).randint(0, 256, (40, 50, 3), np.uint8)
    for kind in ('png', 'jpg'):
        Image.fromarray(whole).save(folder / f'whole.{kind}')
        content = (folder / f'whole.{kind}').read_bytes()
        (folder / f'cut.{kind}').write_bytes(content[: len(content) * 2 // 3])
    Image.fromarray(whole).save(folder / 'icon.ico')
    (folder / 'empty.jpg').touch()
    (folder / 'notes.txt').write_text('no image')
    status, out, err = main('tiny.py', 'tiny.pth', 'images')
    assert status == 1
    assert err == '5 of 7 files were skipped: cut.jpg, cut.png, empty.jpg, icon.ico, notes.txt\n'
    said = dict(line.split('] ')[1].split(': ', 1) for line in out.splitlines()[:-1])
    assert said['cut.jpg'].startswith('skipped, cannot be read: image file is truncated')
    assert said['cut.png'].startswith('skipped, cannot be read: image file is truncated')
    assert said['empty.jpg'] == said['notes.txt'] == 'skipped, not an image'
    assert said['icon.ico'] == 'skipped, ICO cannot be read by OpenCV'
    assert sorted(os.listdir('predictions/preds')) == ['whole.jpg.json', 'whole.png.json']


@scopes('mmdet')
def test_an_image_that_the_network_cannot_process_is_skipped(tiny, main):
    Image.new('RGB', (1, 3000)).save('image.png')  # resized to a width of 0
    status, out, err = main('tiny.py', 'tiny.pth', 'image.png')
    assert (status, err) == (1, '1 of 1 files were skipped: image.png\n')
    assert 'image.png: skipped, OpenCV' in out


@scopes('mmpretrain')
def test_files_of_a_folder_are_processed_in_order(tiny, main, tmp_path, monkeypatch):
    """In order, with the time left; hidden ones and those in folders are left out."""
    (tmp_path / 'images/inner').mkdir(parents=True)
    for name in ('b.png', 'a.png', '.hidden.png', 'inner/c.png'):
        Image.new('RGB', (20, 10)).save(tmp_path / 'images' / name)
    clock = iter((100, 130, 160))  # half a minute for each
    monkeypatch.setattr(apis, 'time', SimpleNamespace(time=lambda: next(clock)))
    status, out, _ = main('tiny.py', 'tiny.pth', 'images', '--out', 'new/folder')
    assert status == 0
    lines = out.splitlines()
    assert [line.split(':')[-2].split('] ')[1] for line in lines[:2]] == ['a.png', 'b.png']
    assert lines[0].startswith('[1/2, 0:00:30 left]') and lines[1].startswith('[2/2, 0:00:00 left]')
    assert lines[2:] == ['2 pictures in new/folder/vis, as JSON in new/folder/preds']


class Touch:
    """Unpickled, it makes a file."""

    def __reduce__(self):
        return open, ('touched', 'w')


@scopes('mmdet', 'mmseg', 'mmpretrain')
def test_no_code_of_a_checkpoint_runs(tiny, main):
    content = torch.load('tiny.pth')
    torch.save(dict(content, message_hub=Touch()), 'tiny.pth')
    status, _, err = main('tiny.py', 'tiny.pth', 'image.png')
    assert status == 2
    assert err.startswith('error: tiny.pth: cannot be read: ')
    assert not os.path.exists('touched')
    torch.load('tiny.pth', weights_only=False)
    assert os.path.exists('touched')  # it would have


@scopes('mmdet')
def test_the_checkpoint_loader_is_restored(tiny):
    before = CheckpointLoader._get_checkpoint_loader('x.pth')
    with apis.loads({'a': 1}):
        assert CheckpointLoader.load_checkpoint('x.pth') == {'a': 1}
    assert CheckpointLoader._get_checkpoint_loader('x.pth') is before


@scopes('mmseg')
def test_weights_of_another_model_are_an_error(tiny, main):
    content = torch.load('tiny.pth')
    weights = content['state_dict']
    weights['decode_head.conv_seg.bias'] = torch.zeros(3)
    del weights['backbone.stem.conv.weight']
    torch.save(content, 'tiny.pth')
    status, _, err = main('tiny.py', 'tiny.pth', 'image.png')
    assert status == 2
    assert ': 2 of the ' in err
    assert 'such as backbone.stem.conv.weight, decode_head.conv_seg.bias; give the config' in err
    torch.save([1, 2], 'tiny.pth')
    assert main('tiny.py', 'tiny.pth', 'image.png')[2] == 'error: tiny.pth: it holds no state dict\n'


@scopes('mmseg')
def test_arguments_that_cannot_be_used_are_one_message(tiny, main, tmp_path):
    for arguments, message in (
        (['tiny.py', 'tiny.pth', 'gone'], 'error: gone: no such image or folder'),
        (['tiny.py', 'gone.pth', 'image.png'], 'error: gone.pth: no such checkpoint file'),
        (['gone.py', 'tiny.pth', 'image.png'], 'gone.py'),
        (['tiny.py', 'tiny.pth', 'image.png', '--device', 'nowhere'], 'nowhere'),
        (['tiny.py', 'tiny.pth', 'image.png', '--out', 'tiny.py'], 'tiny.py'),
    ):
        status, out, err = main(*arguments)
        assert (status, out) == (2, '')
        assert message in err
    (tmp_path / 'other.py').write_text("default_scope = 'mmaction'")
    assert "default_scope is 'mmaction', not one of" in main('other.py', 'tiny.pth', 'image.png')[2]
    (tmp_path / 'out/vis').mkdir(parents=True)
    assert 'out/vis: the folder holds no files' in main('tiny.py', 'tiny.pth', 'out/vis')[2]
    assert 'give another folder' in main('tiny.py', 'tiny.pth', 'out/vis', '--out', 'out')[2]


@pytest.mark.slow
@scopes('mmdet')
def test_the_tool_runs_as_a_program(tiny, tmp_path):
    result = run(tmp_path, 'infer.py', 'tiny.py', 'tiny.pth', 'image.png', '--device', 'cpu')
    assert result.returncode == 0, result.stderr
    assert result.stderr == ''
    assert result.stdout.splitlines()[1:] == ['1 pictures in predictions/vis, as JSON in predictions/preds']
    assert run(tmp_path, 'infer.py', 'tiny.py').returncode == 2
