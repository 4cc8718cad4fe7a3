"""Checkpoints are read as data: damaged files are named and no code of a file runs."""

from __future__ import annotations

import http.server
import io
import os
import pickle
import sys
import tarfile
import threading
import zipfile
from collections import Counter
from functools import partial

import numpy as np
import pytest
import torch
from helpers.checkpoints import BOMBS, Call, assert_equal, logging_objects
from torch import nn

from emo2_mm.weights.read import read_checkpoint

pytestmark = pytest.mark.both_stacks


def test_logging_objects_are_replaced(tmp_path):
    torch.save({'state_dict': {'a': torch.ones(2)}, 'hub': logging_objects()}, tmp_path / 'f.pth')
    content = read_checkpoint(tmp_path / 'f.pth')
    assert torch.equal(content['state_dict']['a'], torch.ones(2))
    hub = content['hub']
    left = [hub['log_scalars']['loss'], hub['runtime_info']['mean']]
    assert [type(value).__name__ for value in left] == ['_Dropped'] * 2
    assert [vars(value) for value in left] == [{}] * 2
    assert hub['runtime_info']['epoch'] == 1


NUMBERS = [*map(np.float64, (0.5, -2e300)), np.float32(0.1), np.int64(-5), np.uint8(200), np.bool_(True)]


@pytest.mark.parametrize('number', NUMBERS, ids=repr)
def test_numpy_scalars_become_python_numbers(number, tmp_path):
    torch.save({'best': number, 'a': logging_objects()}, tmp_path / 'f.pth')
    read = read_checkpoint(tmp_path / 'f.pth')['best']
    assert read == number and type(read) is type(number.item())


def test_numpy_scalars_without_a_python_type_are_dropped(tmp_path):
    torch.save({'best': np.complex64(1), 'name': np.str_('a')}, tmp_path / 'f.pth')
    assert {type(value).__name__ for value in read_checkpoint(tmp_path / 'f.pth').values()} == {'_Dropped'}


def test_milestones_are_kept(tmp_path):
    torch.save({'milestones': Counter([8, 11]), 'a': logging_objects()}, tmp_path / 'f.pth')
    assert read_checkpoint(tmp_path / 'f.pth')['milestones'] == Counter([8, 11])


@pytest.mark.parametrize('core', ['core', '_core'])  # numpy 1 and 2
def test_arrays_of_numpy_1_and_2_are_dropped(core, tmp_path):
    torch.save({'a': torch.ones(2), 'mean': np.ones(2), 'best': np.float64(1)}, tmp_path / 'f.pth')
    rewrite(
        tmp_path / 'f.pth',
        lambda p: p.replace(b'numpy._core.', b'numpy.core.').replace(
            b'numpy.core.', b'numpy.%s.' % core.encode()
        ),
    )
    assert torch.equal(read_checkpoint(tmp_path / 'f.pth')['a'], torch.ones(2))


def test_shared_storage_is_kept_apart_by_offset_and_stride(tmp_path):
    base = torch.arange(12.0).reshape(3, 4)
    torch.save({'t': base.t(), 'row': base[1], 'hub': logging_objects()}, tmp_path / 'f.pth')
    content = read_checkpoint(tmp_path / 'f.pth')
    assert torch.equal(content['t'], base.t()) and torch.equal(content['row'], base[1])


METADATA = {
    'of this project': (
        {'arch': '1m', 'epoch': '12', 'dataset_meta': '{"classes": ["cat"]}', 'cfg': '1'},
        {'arch': '1m', 'epoch': 12, 'dataset_meta': {'classes': ['cat']}, 'cfg': '1'},
    ),
    'of another program': ({'format': 'pt', 'epoch': 'last', 'arch': '1'}, None),
    'none': (None, {}),
}


@pytest.mark.parametrize('kind', METADATA)
def test_metadata_of_safetensors_becomes_meta(kind, tmp_path):
    safetensors = pytest.importorskip('safetensors.torch')
    written, expected = METADATA[kind]
    safetensors.save_file({'w': torch.ones(2)}, tmp_path / 'f.safetensors', written)
    content = read_checkpoint(tmp_path / 'f.safetensors')
    assert content.keys() == {'state_dict', 'meta'}
    assert content['meta'] == (written if expected is None else expected)
    assert_equal(content['state_dict'], {'w': torch.ones(2)})


def test_safetensors_without_its_package_names_the_remedy(monkeypatch, tmp_path):
    (tmp_path / 'f').write_bytes(b'\x40\0\0\0\0\0\0\0{"w":{"dtype":"F32"}}')
    monkeypatch.setitem(sys.modules, 'safetensors', None)
    with pytest.raises(ImportError, match=r'f is a safetensors file: `pip install safetensors` to read it'):
        read_checkpoint(tmp_path / 'f')


@pytest.fixture
def server(tmp_path, monkeypatch):
    """Serves tmp_path / 'www'; downloads go to tmp_path / 'hub'."""
    monkeypatch.setattr(torch.hub, '_hub_dir', str(tmp_path / 'hub'))
    monkeypatch.setenv('no_proxy', '*')
    (tmp_path / 'www').mkdir()

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *args):
            pass

    handler = partial(Quiet, directory=str(tmp_path / 'www'))
    httpd = http.server.ThreadingHTTPServer(('127.0.0.1', 0), handler)
    threading.Thread(target=httpd.serve_forever, daemon=True).start()
    yield f'http://127.0.0.1:{httpd.server_port}'
    httpd.shutdown()
    httpd.server_close()


def test_downloads_are_cached_by_the_whole_address(server, tmp_path):
    for name in 'ab':
        (tmp_path / 'www' / name).mkdir()
        torch.save({'w': torch.tensor(ord(name))}, tmp_path / 'www' / name / 'latest.pth')
    assert read_checkpoint(f'{server}/a/latest.pth')['w'] == ord('a')
    assert read_checkpoint(f'{server}/b/latest.pth')['w'] == ord('b')
    (tmp_path / 'www' / 'a' / 'latest.pth').unlink()
    assert read_checkpoint(f'{server}/a/latest.pth')['w'] == ord('a')  # not loaded again
    with pytest.raises(OSError, match=r'c/latest.pth: download failed'):
        read_checkpoint(f'{server}/c/latest.pth')


def bytes_of(content, **kwargs):
    buffer = io.BytesIO()
    torch.save(content, buffer, **kwargs)
    return buffer.getvalue()


def rewrite(path, change_pickle=lambda data: data, drop=(), cut=()):
    """Change the records of a file of torch.save."""
    with zipfile.ZipFile(path) as archive:
        records = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, 'w', zipfile.ZIP_STORED) as archive:
        for name, data in records.items():
            if name.endswith('data.pkl'):
                data = change_pickle(data)
            if not name.endswith(tuple(drop)):
                archive.writestr(name, data[:4] if name.endswith(tuple(cut)) else data)


def legacy_tar(content):
    """The format of torch 0.1, as far as its reader gets."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode='w') as archive:
        for name in ('storages', 'tensors', 'pickle', 'sys_info'):
            data = pickle.dumps(content if name in ('storages', 'pickle') else 0, protocol=2)
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return buffer.getvalue()


def other_zip():
    buffer = io.BytesIO()
    np.savez(buffer, a=np.ones(2))
    return buffer.getvalue()


WEIGHTS = {'w': torch.arange(6.0)}
BAD_FILES = {
    'empty': (b'', 'the file is empty'),
    'truncated': (bytes_of(WEIGHTS)[:-100], 'the end of the file is missing'),
    'cut early': (bytes_of(WEIGHTS)[:300], 'the end of the file is missing'),
    'HTML': (b'\n<!DOCTYPE html><html>404</html>', 'a web page'),
    'XML': (b'<?xml version="1.0"?><Error>AccessDenied</Error>', 'a web page'),
    'Git LFS': (b'version https://git-lfs.github.com/spec/v1\noid sha256:1\n', 'git lfs pull'),
    'cut safetensors': (b'\x40\0\0\0\0\0\0\0{"w":{"dtype":"F32"}}', 'cannot be read: SafetensorError'),
    'text': (b'no weights', "starts with b'no weights'"),
    'npz': (other_zip(), 'cannot be read'),
    'bare pickle': (pickle.dumps({'w': 1}, protocol=4), 'a bare pickle'),
    'legacy': (bytes_of(WEIGHTS, _use_new_zipfile_serialization=False), 'before 1.6'),
    'tar': (legacy_tar(0), 'old tar format'),
}


@pytest.mark.parametrize('kind', BAD_FILES)
def test_files_that_are_no_checkpoints_are_named(kind, tmp_path):
    data, expected = BAD_FILES[kind]
    path = tmp_path / 'file.pth'
    path.write_bytes(data)
    with pytest.raises(ValueError) as error:
        read_checkpoint(path)
    assert str(path) in str(error.value) and expected in str(error.value)


def test_a_path_that_is_no_file_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r'none.pth: no such checkpoint file'):
        read_checkpoint(tmp_path / 'none.pth')
    with pytest.raises(IsADirectoryError, match='give the checkpoint file in it'):
        read_checkpoint(tmp_path)
    with pytest.raises(ValueError, match='s3://a/b.pth: give a local path or an http'):
        read_checkpoint('s3://a/b.pth')


def test_torchscript_is_refused(tmp_path):
    torch.jit.script(nn.ReLU()).save(str(tmp_path / 'f.pth'))
    with pytest.raises(ValueError, match='a TorchScript archive'):
        read_checkpoint(tmp_path / 'f.pth')


def test_records_that_are_too_short_or_missing_are_named(tmp_path):
    for kwargs, expected in (
        ({'cut': ['data/0']}, 'data/0 has 4 bytes, not 24'),
        ({'drop': ['data/0']}, 'data/0'),
        ({'drop': ['data.pkl']}, 'not one of torch.save'),
    ):
        torch.save(WEIGHTS, tmp_path / 'f.pth')
        rewrite(tmp_path / 'f.pth', **kwargs)
        with pytest.raises(ValueError, match=expected):
            read_checkpoint(tmp_path / 'f.pth')


def refused(path, marker, expected):
    with pytest.raises(ValueError) as error:
        read_checkpoint(path)
    assert expected in str(error.value)
    assert not marker.exists()
    with open(path, 'rb') as file:  # the bomb is live
        try:
            torch.load(file, map_location='cpu', weights_only=False)
        except Exception as failure:
            print(failure)  # after the mark, at best
    assert marker.exists()


@pytest.mark.parametrize('place', ['state dict', 'message hub'])
@pytest.mark.parametrize('name', BOMBS)
def test_code_in_a_pickle_is_refused(name, place, tmp_path):
    marker = tmp_path / 'marker'
    hub = logging_objects()
    if place == 'message hub':
        hub['log_scalars']['loss']._log_history = BOMBS[name](marker)
    content = {'state_dict': dict(WEIGHTS), 'message_hub': hub}
    if place == 'state dict':
        content['state_dict']['x'] = BOMBS[name](marker)
    torch.save(content, tmp_path / 'f.pth')
    refused(tmp_path / 'f.pth', marker, 'is not on the allow-list')


@pytest.mark.parametrize('form', ['legacy', 'tar'])
def test_code_in_old_formats_is_refused(form, tmp_path):
    marker = tmp_path / 'marker'
    bomb = Call(os.system, f'touch {marker}')
    if form == 'legacy':
        torch.save(bomb, tmp_path / 'f.pth', _use_new_zipfile_serialization=False)
    else:
        (tmp_path / 'f.pth').write_bytes(legacy_tar(bomb))
    refused(tmp_path / 'f.pth', marker, 'cannot be read safely')


def save_pickle(path, data):
    torch.save(WEIGHTS, path)
    rewrite(path, lambda _: data)


def text(value):
    return pickle.BINUNICODE + len(value).to_bytes(4, 'little') + value.encode()


def test_placeholders_give_no_access_to_real_objects(tmp_path):
    """getattr(HistoryBuffer, 'update').__globals__ and the like: the real ones are never there."""
    get = b'c__builtin__\ngetattr\n('
    method = get + b'cmmengine.logging.history_buffer\nHistoryBuffer\n' + text('update') + b'tR'
    namespace = get + method + text('__globals__') + b'tR'
    save_pickle(tmp_path / 'f.pth', b'\x80\x02' + namespace + b'.')
    assert type(read_checkpoint(tmp_path / 'f.pth')).__name__ == '_Dropped'
    assert vars(read_checkpoint(tmp_path / 'f.pth')) == {}
    save_pickle(tmp_path / 'f.pth', b'\x80\x02' + method + b'(' + text('x') + b'tR.')
    with pytest.raises(ValueError, match='not callable'):
        read_checkpoint(tmp_path / 'f.pth')


REBUILD = b'ctorch._utils\n_rebuild_tensor_v2\n'
TRICKS = {
    'dotted name': (
        b'\x80\x04\x8c\x0ctorch._utils\x8c\x1e_rebuild_tensor_v2.__globals__\x93.',
        r'torch._utils._rebuild_tensor_v2.__globals__ is not on the allow-list',
    ),
    'change a function': (
        b'\x80\x02' + REBUILD + b'N}' + text('__defaults__') + b')s\x86b.',
        'it modifies a function',
    ),
    'change a class': (
        b'\x80\x02ccollections\nOrderedDict\nN}' + text('get') + b'Ns\x86b.',
        'missing 1 required positional argument',
    ),
    'change a placeholder': (
        b'\x80\x02cnumpy\ndtype\nN}' + text('__new__') + b'Ns\x86b.',
        'missing 1 required positional argument',
    ),
    'another opcode': (
        b'\x80\x02(' + text('true') + b'iposix\nsystem\n.',
        'posix.system is not on the allow-list',
    ),
    'extension code': (b'\x80\x02\x82\x01.', 'unregistered extension code 1'),
    'key that is not text': (
        b'\x80\x02(' + text('storage') + b'ctorch\nFloatStorage\n'
        b'ccollections\nOrderedDict\n)R' + text('cpu') + b'K\x06tQ.',
        'which is not a storage',
    ),
    'not a storage': (
        b'\x80\x02(' + text('module') + b'ctorch\nFloatStorage\n' + text('0') + text('cpu') + b'K\x06tQ.',
        'which is not a storage',
    ),
}


@pytest.mark.parametrize('name', TRICKS)
def test_tricks_of_the_pickle_format_are_refused(name, tmp_path):
    data, expected = TRICKS[name]
    defaults = torch._utils._rebuild_tensor_v2.__defaults__
    save_pickle(tmp_path / 'f.pth', data)
    with pytest.raises(ValueError, match=expected):
        read_checkpoint(tmp_path / 'f.pth')
    assert torch._utils._rebuild_tensor_v2.__defaults__ == defaults
    torch.save({**WEIGHTS, 'hub': logging_objects()}, tmp_path / 'good.pth')
    assert torch.equal(read_checkpoint(tmp_path / 'good.pth')['w'], WEIGHTS['w'])
