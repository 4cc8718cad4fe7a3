"""Published classification files become checkpoints that MMPretrain loads to the last key."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers.golden import generated_state_dict, golden_cases, normal, relative_error
from helpers.tiny import ROOT, call_tool

from emo2_mm import EMOv2, __version__
from emo2_mm import convert as conversion

mmpretrain = pytest.importorskip('mmpretrain')

pytestmark = pytest.mark.both_stacks

TOOL = ROOT / 'tools' / 'convert_checkpoint.py'


def convert(src, dst):
    return conversion.convert(str(src), Path(dst))


@pytest.mark.parametrize('arch', EMOv2.arch_settings)
def test_every_key_is_that_of_the_classifier(arch, tmp_path):
    weights = generated_state_dict(arch, 3)
    torch.save({'net': weights}, tmp_path / 'src.pth')
    said = convert(tmp_path / 'src.pth', tmp_path / 'new' / 'dst.pth')
    assert (
        said == f'{tmp_path}/new/dst.pth: arch {arch}, recipe unknown, {len(weights)} tensors, 1000 classes'
    )

    config = str(ROOT / 'configs' / 'cls' / f'emo2_{arch}.py')
    model = mmpretrain.get_model(config, pretrained=str(tmp_path / 'new' / 'dst.pth'))
    content = torch.load(tmp_path / 'new' / 'dst.pth', weights_only=True)
    assert content['meta']['arch'] == arch
    expected = model.state_dict()
    assert content['state_dict'].keys() == expected.keys()
    for name, tensor in content['state_dict'].items():
        assert torch.equal(tensor, expected[name]), name
        assert tensor.is_contiguous() and tensor.dtype == expected[name].dtype
    assert os.listdir(tmp_path / 'new') == ['dst.pth']


def test_safetensors_contain_the_same_weights_and_metadata(tmp_path):
    safetensors = pytest.importorskip('safetensors')
    torch.save({'net': generated_state_dict('1m', 3)}, tmp_path / 'EMOv2_1M_224.pth')
    for name in ('a.pth', 'b.safetensors'):
        convert(tmp_path / 'EMOv2_1M_224.pth', tmp_path / name)
    expected = torch.load(tmp_path / 'a.pth', weights_only=True)
    assert expected['meta'] == dict(arch='1m', recipe='emo2_1m', emo2_mm_version=__version__)
    with safetensors.safe_open(tmp_path / 'b.safetensors', 'pt') as file:
        assert file.metadata() == expected['meta']
        assert set(file.keys()) == set(expected['state_dict'])
        for name, tensor in expected['state_dict'].items():
            assert torch.equal(file.get_tensor(name), tensor)


RECIPES = {
    'EMOv2_5M_224.pth': 'emo2_5m',
    'https://host/EMOv2_5M_224_KD.pth': 'emo2_5m_kd',
    'a/EMOv2_5M_512_KD.pth': 'emo2_5m_512_kd',
    'EMOv2_1M_224.pth': None,  # a name that lies
    'EMOv2_5M_224_other.pth': None,
    'EMOv2_5M_256.pth': None,
    'mine.pth': None,
}


@pytest.mark.parametrize('name', RECIPES)
def test_the_recipe_follows_from_the_name_of_a_published_file(name):
    recipe = RECIPES[name]
    assert conversion.find_recipe(name, '5m', {}) == recipe
    assert recipe is None or (ROOT / f'configs/cls/{recipe}.py').is_file()


@pytest.mark.parametrize('kind', ['pth', 'safetensors'])
def test_a_converted_file_keeps_its_recipe(kind, tmp_path):
    if kind == 'safetensors':
        pytest.importorskip('safetensors')
    torch.save(generated_state_dict('1m', 3), tmp_path / 'EMOv2_1M_224_KD.pth')
    convert(tmp_path / 'EMOv2_1M_224_KD.pth', tmp_path / f'one.{kind}')
    said = convert(tmp_path / f'one.{kind}', tmp_path / f'two.{kind}')
    assert 'arch 1m, recipe emo2_1m_kd, ' in said
    assert (tmp_path / f'one.{kind}').read_bytes() == (tmp_path / f'two.{kind}').read_bytes()
    assert conversion.find_recipe('a.pth', '1m', {'meta': [1]}) is None


@pytest.mark.parametrize('arch', ['1m', '5m'])
def test_logits_are_the_recorded_ones(arch, tmp_path):
    case = next(c for c in golden_cases() if c['arch'] == arch and c['size'] == [224, 224])
    torch.save({'net_E': generated_state_dict(arch, case['seed'])}, tmp_path / 'src.pth')
    convert(tmp_path / 'src.pth', tmp_path / 'dst.pth')
    config = str(ROOT / 'configs' / 'cls' / f'emo2_{arch}.py')
    model = mmpretrain.get_model(config, pretrained=str(tmp_path / 'dst.pth')).eval()
    with torch.no_grad():
        logits = model(normal((case['batch'], 3, *case['size']), case['seed'] + 1))
    assert relative_error(logits, case['logits']) < 1e-5


def test_the_tool_runs_as_a_program(tmp_path):
    torch.save(generated_state_dict('1m', 3), tmp_path / 'src.pth')
    command = [sys.executable, TOOL, tmp_path / 'src.pth', tmp_path / 'dst.pth']
    done = subprocess.run(command, capture_output=True, text=True, cwd=os.path.sep)
    assert (done.returncode, done.stderr) == (0, '')
    assert done.stdout == f'{tmp_path}/dst.pth: arch 1m, recipe unknown, 228 tensors, 1000 classes\n'


def test_errors_on_the_command_line(tmp_path, capsys):
    assert call_tool('convert_checkpoint.py', tmp_path / 'none.pth', tmp_path / 'dst.pth') == 1
    said = capsys.readouterr()
    assert (said.out, said.err) == ('', f'error: {tmp_path}/none.pth: no such checkpoint file\n')
    for arg, code in (('--help', 0), ('only_src.pth', 2)):
        with pytest.raises(SystemExit) as stop:
            call_tool('convert_checkpoint.py', arg)
        assert stop.value.code == code


def test_src_is_not_overwritten(tmp_path):
    torch.save(generated_state_dict('1m', 3), tmp_path / 'src.pth')
    (tmp_path / 'link.pth').symlink_to(tmp_path / 'src.pth')
    before = (tmp_path / 'src.pth').read_bytes()
    for dst in (tmp_path / 'src.pth', tmp_path / 'link.pth'):
        with pytest.raises(ValueError, match='DST is SRC itself'):
            convert(tmp_path / 'src.pth', dst)
    with pytest.raises(ValueError, match='a folder; give a name for the file in it'):
        convert(tmp_path / 'src.pth', tmp_path)
    assert (tmp_path / 'src.pth').read_bytes() == before


def test_a_failed_write_leaves_the_old_file(tmp_path):
    torch.save(generated_state_dict('1m', 3), tmp_path / 'src.pth')
    (tmp_path / 'dst.pth').write_text('old')
    limit = 'ulimit -f 100; exec "$@"'  # blocks of 1024 bytes
    command = ['bash', '-c', limit, 'bash', sys.executable, TOOL, tmp_path / 'src.pth', tmp_path / 'dst.pth']
    done = subprocess.run(command, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (1, '')
    assert 'error: ' in done.stderr and 'File too large' in done.stderr and 'Traceback' not in done.stderr
    assert (tmp_path / 'dst.pth').read_text() == 'old'
    assert sorted(os.listdir(tmp_path)) == ['dst.pth', 'src.pth']


@pytest.mark.parametrize(
    ('change', 'expected'),
    [
        (lambda w: {k: v for k, v in w.items() if 'head' not in k}, 'has no classifier head'),
        (lambda w: {k: v for k, v in w.items() if k != 'norm.norm.bias'}, '1 missing: norm.bias'),
        (lambda w: {'conv1.weight': torch.ones(1)}, 'the weights match none of the archs'),
    ],
    ids=['dense', 'without norm', 'another network'],
)
def test_files_that_cannot_be_converted_are_named(change, expected, tmp_path):
    torch.save(change(generated_state_dict('1m', 3)), tmp_path / 'src.pth')
    with pytest.raises(ValueError) as error:
        convert(tmp_path / 'src.pth', tmp_path / 'dst.pth')
    assert str(error.value).startswith(f'{tmp_path}/src.pth: ') and expected in str(error.value)
    assert not (tmp_path / 'dst.pth').exists()
