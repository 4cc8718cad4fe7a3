"""Contents of the wheel and of the source archive."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import tarfile
from email.message import Message
from email.parser import Parser
from pathlib import Path
from typing import Iterator
from zipfile import ZipFile

import pytest
from mmengine.config import Config
from packaging.requirements import Requirement
from packaging.version import Version

import emo2_mm

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
    """A copy of the tree: building in the checkout would leave files there."""
    copy = tmp_path_factory.mktemp('packaging') / 'source'
    copy.mkdir()
    for name in SOURCES:
        shutil.copy(ROOT / name, copy)
    for name in FOLDERS:
        shutil.copytree(ROOT / name, copy / name)
    (copy / 'configs/__pycache__').mkdir(exist_ok=True)
    (copy / 'configs/__pycache__/old.pyc').touch()
    return copy


@pytest.fixture(scope='module')
def wheel(source: Path) -> Iterator[ZipFile]:
    with ZipFile(build(source, 'wheel')) as file:
        yield file


@pytest.fixture(scope='module')
def metadata(wheel: ZipFile) -> Message:
    (name,) = (n for n in wheel.namelist() if n.endswith('.dist-info/METADATA'))
    return Parser().parsestr(wheel.read(name).decode())


def test_wheel_has_package_configs_and_tools_only(wheel: ZipFile) -> None:
    names = {n for n in wheel.namelist() if '.dist-info/' not in n}
    extra = files_below(ROOT / 'configs') | files_below(ROOT / 'tools') | {'model-index.yml'}
    assert names == files_below(ROOT / 'emo2_mm') | {f'emo2_mm/.mim/{name}' for name in extra}
    assert 'emo2_mm/py.typed' in names


def test_installed_config_finds_its_bases(wheel: ZipFile, tmp_path: Path) -> None:
    wheel.extractall(tmp_path)
    path = tmp_path / 'emo2_mm/.mim/configs/det/retinanet_emo2_20m.py'
    assert Config.fromfile(path).model.backbone.arch == '20m'


def test_metadata(metadata: Message) -> None:
    assert metadata['Version'] == emo2_mm.__version__
    assert metadata['License'] == 'Apache-2.0'
    assert metadata['Requires-Python'] == '>=3.8'
    extras = {'engine', 'cls', 'kd', 'det', 'seg', 'onnx', 'export', 'demo', 'docs', 'dev'}
    assert set(metadata.get_all('Provides-Extra')) == extras
    required = [Requirement(r) for r in metadata.get_all('Requires-Dist')]
    # A requirement on mmengine would be installed over one of its forks.
    assert [r.name for r in required if r.marker is None] == ['torch']


def test_classic_stack_satisfies_every_extra(metadata: Message) -> None:
    lines = ''.join((ROOT / 'requirements' / f).read_text() for f in ('classic.txt', 'dev.txt')).splitlines()
    pins = [Requirement(line.split('#')[0]) for line in lines if line.split('#')[0].strip()]
    for wanted in map(Requirement, metadata.get_all('Requires-Dist')):
        if re.sub('[-_.]', '-', wanted.name) == 'emo2-mm':  # an extra that includes others
            continue
        found = [pin for pin in pins if pin.name == wanted.name]
        assert found, f'{wanted} is in no file of requirements/'
        versions = [spec.version for pin in found for spec in pin.specifier if spec.operator == '==']
        assert all(Version(version) in wanted.specifier for version in versions), (wanted, versions)


def test_wheel_has_nothing_of_an_earlier_build(wheel: ZipFile, source: Path) -> None:
    removed = 'configs/det/retinanet_emo2_20m.py'
    assert f'emo2_mm/.mim/{removed}' in wheel.namelist()
    (source / removed).rename(source / 'moved')
    try:
        with ZipFile(build(source, 'wheel')) as second:
            assert f'emo2_mm/.mim/{removed}' not in second.namelist()
    finally:
        (source / 'moved').rename(source / removed)


def test_editable_install_adds_nothing(source: Path) -> None:
    with ZipFile(build(source, 'editable')) as file:
        assert not [n for n in file.namelist() if '.mim' in n]
    assert not list(source.glob('emo2_mm/.mim'))


def test_sdist_can_build_the_wheel(source: Path) -> None:
    with tarfile.open(build(source, 'sdist')) as file:
        names = {n.partition('/')[2] for n in file.getnames()}
    wanted = set(SOURCES).union(*(files_below(ROOT / f) for f in FOLDERS))
    assert wanted <= names
    assert not [n for n in names if n.endswith('.pyc') or '.mim' in n]
