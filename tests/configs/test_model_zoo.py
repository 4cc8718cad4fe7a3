"""The metafiles, and the page and the plot that are made of them."""

from __future__ import annotations

import shutil
import subprocess
import sys
from itertools import combinations
from pathlib import Path

import model_zoo
import pytest
from helpers.tiny import ROOT
from mmengine.config import Config

MODELS = model_zoo.models()
PUBLISHED = [model for model in MODELS if 'Results' in model]


def by_name(model):
    return model['Name']


@pytest.fixture
def copy(tmp_path, monkeypatch):
    """A folder with the metafiles, which the tool takes for the project's."""
    for path in (ROOT / model_zoo.INDEX, *model_zoo.metafiles()):
        target = tmp_path / path.relative_to(ROOT)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, target)
    (tmp_path / model_zoo.PLOT).parent.mkdir(parents=True)
    monkeypatch.setattr(model_zoo, 'ROOT', tmp_path)
    return tmp_path


@pytest.fixture
def main(monkeypatch, capsys):
    """Run the tool in this process; returns its exit status and its errors."""

    def run(*args):
        monkeypatch.setattr(sys, 'argv', ['model_zoo.py', *args])
        return model_zoo.main(), capsys.readouterr().err

    return run


def test_page_and_plot_say_what_the_metafiles_say():
    command = [sys.executable, str(ROOT / 'scripts' / 'model_zoo.py'), '--check']
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_check_names_what_has_drifted(copy, main):
    assert main('--check')[0] == 1  # nothing is there yet
    assert main() == (0, '')
    assert main('--check') == (0, '')

    page = copy / model_zoo.PAGE
    text = page.read_text(encoding='utf-8')
    page.write_text(text.replace('41.5', '41.6'), encoding='utf-8')
    status, errors = main('--check')
    assert status == 1
    assert errors == 'error: MODEL_ZOO.md differs from the metafiles; run scripts/model_zoo.py\n'

    page.write_text(text, encoding='utf-8')
    metafile = copy / 'configs' / 'det' / 'metafile.yml'
    metafile.write_text(metafile.read_text(encoding='utf-8').replace('41.5', '41.6'), encoding='utf-8')
    status, errors = main('--check')
    assert status == 1
    assert [line.split()[1] for line in errors.splitlines()] == [model_zoo.PAGE, model_zoo.PLOT]


@pytest.mark.parametrize('path', model_zoo.metafiles(), ids=lambda path: path.parent.name)
def test_metafiles_are_as_the_tool_writes_them(path, tmp_path):
    model_zoo.write(tmp_path / 'metafile.yml', model_zoo.read(path))
    assert path.read_text(encoding='utf-8') == (tmp_path / 'metafile.yml').read_text(encoding='utf-8')


def test_measure_writes_sizes_and_nothing_else(copy, main, monkeypatch):
    def count(config):
        auxiliary = 10 * ('pspnet' in config)
        return dict(params=len(config), params_inference=len(config) - auxiliary, flops=7, shape=[320, 512])

    monkeypatch.setattr('emo2_mm.analysis.complexity.count', count)
    assert main('--measure') == (0, '')
    sizes = ('Parameters', 'Inference Parameters', 'FLOPs', 'Input Size')
    for before, after in zip(MODELS, model_zoo.models()):
        length = len(str(copy / after['Config']))
        found = [after['Metadata'].pop(key, None) for key in sizes]
        assert found == [length, length - 10 if 'pspnet' in after['Name'] else None, 7, '320 x 512']
        rest = {key: value for key, value in before['Metadata'].items() if key not in sizes}
        assert after == dict(before, Metadata=rest)
    assert main('--check') == (0, '')


def test_every_config_has_one_entry():
    folders = (ROOT / 'configs' / task for task in ('cls', 'det', 'seg'))
    configs = [path.relative_to(ROOT).as_posix() for folder in folders for path in folder.glob('*.py')]
    configs = [name for name in configs if not name.endswith('_custom.py')]
    assert sorted(model['Config'] for model in MODELS) == sorted(configs)
    for model in MODELS:
        assert model['Name'] == Path(model['Config']).stem


def test_published_results_are_there_and_called_reported():
    tasks = [model['Config'].split('/')[1] for model in PUBLISHED]
    assert [tasks.count(task) for task in ('cls', 'det', 'seg')] == [7, 16, 16]
    for model in MODELS:
        reported = {key for key in model['Metadata'] if key.startswith('Reported')}
        if 'Results' not in model:
            assert not reported
            continue
        unit = 'M' if '/cls/' in model['Config'] else 'G'
        assert reported == {'Reported In', 'Reported Parameters (M)', f'Reported FLOPs ({unit})'}
        assert 'arXiv 2412.06674' in model['Metadata']['Reported In']
        assert all(name.startswith('Reported ') for name in model_zoo.metrics(model))


@pytest.mark.parametrize('model', PUBLISHED, ids=by_name)
def test_config_names_the_same_result(model):
    lines = (ROOT / model['Config']).read_text(encoding='utf-8').splitlines()
    comment = ' '.join(line.strip('# ') for line in lines[: lines.index('')] if line.startswith('#'))
    names = {
        'Reported Top 1 Accuracy': 'reported top-1',
        'Reported box mAP': 'reported box mAP',
        'Reported mask mAP': 'mask mAP',
        'Reported mIoU': 'reported mIoU',
    }
    found = model_zoo.metrics(model)
    named = [f'{name} {found[key]}' for key, name in names.items() if key in found]
    assert named
    for text in named:
        assert text in comment


@pytest.mark.parametrize('model', MODELS, ids=by_name)
def test_weights_are_those_of_the_config(model):
    init_cfg = Config.fromfile(ROOT / model['Config']).model.backbone.get('init_cfg')
    weights = model['Metadata'].get('Initial Weights')
    arch = model['Name'].split('_')[2 if 'Initial Weights' in model['Metadata'] else 1]
    if '/cls/' in model['Config']:
        assert init_cfg is weights is None
        recipe = '224_KD' if model['Name'].endswith('_kd') else '224'
        if 'Weights' in model:
            assert model['Weights'].endswith(f'/EMOv2_{arch.upper()}_{recipe}.pth')
    else:
        assert 'Weights' not in model
        if arch == '20m':
            assert (init_cfg, weights) == (None, 'not released')
        else:
            assert init_cfg.checkpoint == f'checkpoints/{weights}'


def test_mim_can_read_the_index():
    load = pytest.importorskip('modelindex.load_model_index').load
    index = load(str(ROOT / model_zoo.INDEX))
    index.check(silent=True)
    assert not index.check_errors
    assert [collection.name for collection in index.collections] == ['EMOv2']
    names = [model.name for model in index.models]
    assert names == [model['Name'] for model in MODELS]
    assert len(set(names)) == len(names)
    for model in index.models:
        assert model.name == model.name.lower()  # mim casts what it is asked for
        assert model.config.startswith('configs/')
        assert model.in_collection == 'EMOv2'
        assert not model.check_errors
        for value in model.metadata.data.values():  # of a list mim takes strings only
            assert isinstance(value, (str, int, float)) or all(isinstance(v, str) for v in value)
        for result in model.results or []:
            assert all(isinstance(value, float) for value in result.metrics.values())


def test_row_keeps_reported_and_measured_apart():
    (model,) = (model for model in MODELS if model['Name'] == 'pspnet_emo2_5m')
    meta = dict(model['Metadata'], **{'Parameters': 8_603_436, 'Inference Parameters': 8_195_734})
    assert model_zoo.row(dict(model, Metadata=dict(meta, FLOPs=8_611_529_728))) == {
        'Config': '[pspnet_emo2_5m](configs/seg/pspnet_emo2_5m.py)',
        'Reported mIoU': '**39.1**',
        'Reported aAcc / mAcc': '78.2 / 51.0',
        'Reported parameters': '8.1 M',
        'Reported FLOPs': '8.6 G',
        'Measured parameters': '8.196 M (8.603 M)',
        'Measured FLOPs': '8.612 G',
        'Image': '512 x 512',
        'Starts from': 'EMOv2_5M_224.pth',
    }


def test_plot_shows_all_results_and_labels_apart(tmp_path):
    plt = pytest.importorskip('matplotlib.pyplot')
    figure = model_zoo.draw(tmp_path / 'zoo.svg')
    shown = []
    for axes in figure.axes:
        for line in axes.lines:
            shown += [(x, y) for x, y in line.get_xydata().tolist()]
        left, right, low, high = *axes.get_xlim(), *axes.get_ylim()
        assert all(left < x < right and low < y < high for line in axes.lines for x, y in line.get_xydata())
    expected = []
    for model in PUBLISHED:
        accuracy, *_ = model_zoo.metrics(model).values()
        params = model['Metadata'].get('Inference Parameters', model['Metadata']['Parameters'])
        expected.append((params / 1e6, accuracy))
    assert sorted(shown) == sorted(expected)
    boxes = [text.get_window_extent() for axes in figure.axes for text in axes.texts]
    assert len(boxes) >= sum(len(axes.lines) for axes in figure.axes)
    assert not any(a.overlaps(b) for a, b in combinations(boxes, 2))
    assert all(figure.bbox.contains(*corner) for box in boxes for corner in box.get_points())
    plt.close(figure)
