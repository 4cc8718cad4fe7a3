"""What a wheel of the project holds, and what building one leaves behind."""

from __future__ import annotations

import shutil
import subprocess
import sys
import tarfile
from email.parser import Parser
from pathlib import Path
from typing import Iterator
from zipfile import ZipFile

import pytest
from packaging.requirements import Requirement
from packaging.version import Version

ROOT = Path(__file__).resolve().parents[2]
SOURCES = ['setup.py', 'pyproject.toml', 'MANIFEST.in', 'README.md', 'LICENSE', 'model-index.yml']
FOLDERS = ['emo2_mm', 'configs', 'tools']


def build(source: Path, kind: str) -> Path:
    """Build an 'sdist', 'wheel' or 'editable' wheel of the tree, as pip does without isolation."""
    out = source.parent / f'{source.name}-{kind}'
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir()
    code = f'from setuptools import build_meta; build_meta.build_{kind}({str(out)!r})'
    done = subprocess.run([sys.executable, '-c', code], cwd=source, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (built,) = out.iterdir()
    return built


def files_below(folder: Path) -> set[str]:
    files = (p for p in folder.rglob('*') if p.is_file() and '__pycache__' not in p.parts)
    return {p.relative_to(folder.parent).as_posix() for p in files}


@pytest.fixture(scope='module')
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the tree: building in the checkout would litter it."""
    copy = tmp_path_factory.mktemp('packaging') / 'source'
    copy.mkdir()
    for name in SOURCES:
        shutil.copy(ROOT / name, copy)
    for name in FOLDERS:
        shutil.copytree(ROOT / name, copy / name)
    (copy / 'configs' / '__pycache__').mkdir(exist_ok=True)
    (copy / 'configs' / '__pycache__' / 'litter.pyc').touch()
    return copy


@pytest.fixture(scope='module')
def wheel(source: Path) -> Iterator[ZipFile]:
    with ZipFile(build(source, 'wheel')) as file:
        yield file


def test_wheel_carries_configs_and_tools(wheel: ZipFile) -> None:
    names = {n for n in wheel.namelist() if '.dist-info/' not in n}
    tools = files_below(ROOT / 'tools') - {'tools/make_env.sh'}
    wanted = files_below(ROOT / 'configs') | tools | {'model-index.yml'}
    assert {f'emo2_mm/.mim/{name}' for name in wanted} == {n for n in names if '/.mim/' in n}
    assert {n for n in names if '/.mim/' not in n} == files_below(ROOT / 'emo2_mm')


def test_installed_config_finds_its_bases(wheel: ZipFile, tmp_path: Path) -> None:
    from mmengine.config import Config

    wheel.extractall(tmp_path)
    path = tmp_path / 'emo2_mm' / '.mim' / 'configs' / 'det' / 'retinanet_emo2_20m.py'
    assert Config.fromfile(path).model.backbone.arch == '20m'


def test_wheel_metadata(wheel: ZipFile) -> None:
    (name,) = (n for n in wheel.namelist() if n.endswith('.dist-info/METADATA'))
    metadata = Parser().parsestr(wheel.read(name).decode())
    exported: dict[str, str] = {}
    exec((ROOT / 'emo2_mm' / 'version.py').read_text(), exported)
    assert metadata['Version'] == exported['__version__']
    assert metadata['License'] == 'Apache-2.0'
    assert metadata['Requires-Python'] == '>=3.8'
    assert set(metadata.get_all('Provides-Extra')) == {'cls', 'kd', 'det', 'seg', 'onnx', 'demo', 'dev'}
    required = [Requirement(r) for r in metadata.get_all('Requires-Dist')]
    # An mmengine here would be put over one of its forks.
    assert [r.name for r in required if r.marker is None] == ['torch']


def test_stack_satisfies_every_extra(wheel: ZipFile) -> None:
    (name,) = (n for n in wheel.namelist() if n.endswith('.dist-info/METADATA'))
    metadata = Parser().parsestr(wheel.read(name).decode())
    lines = ''.join((ROOT / 'requirements' / f).read_text() for f in ('classic.txt', 'dev.txt'))
    lines = (line.split('#')[0].strip() for line in lines.splitlines())
    stack = {r.name: r for r in map(Requirement, filter(None, lines))}
    for wanted in map(Requirement, metadata.get_all('Requires-Dist')):
        assert wanted.name in stack, f'{wanted} is in no file of requirements/'
        for spec in stack[wanted.name].specifier:
            if spec.operator == '==':
                assert Version(spec.version) in wanted.specifier, f'{wanted}, but {spec}'


def test_wheel_holds_nothing_of_an_earlier_build(wheel: ZipFile, source: Path) -> None:
    gone = 'configs/det/retinanet_emo2_20m.py'
    assert f'emo2_mm/.mim/{gone}' in wheel.namelist()
    (source / gone).rename(source / 'moved')
    try:
        with ZipFile(build(source, 'wheel')) as second:
            assert f'emo2_mm/.mim/{gone}' not in second.namelist()
    finally:
        (source / 'moved').rename(source / gone)


def test_editable_install_adds_nothing(source: Path) -> None:
    with ZipFile(build(source, 'editable')) as file:
        assert not [n for n in file.namelist() if '.mim' in n]
    assert not list(source.glob('emo2_mm/.mim'))


def test_sdist_can_build_the_wheel(source: Path, tmp_path: Path) -> None:
    with tarfile.open(build(source, 'sdist')) as file:
        names = {n.partition('/')[2] for n in file.getnames()}
    wanted = set(SOURCES).union(*(files_below(ROOT / f) for f in FOLDERS))
    assert wanted <= names
    assert not [n for n in names if n.endswith('.pyc') or '.mim' in n]
