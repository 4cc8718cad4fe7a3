"""Documentation: commands parse, configs have the keys, Python prints what is said, tables match the code.

``make docs`` checks links, anchors and docstrings.
"""

from __future__ import annotations

import doctest
import inspect
import io
import json
import re
import shlex
import subprocess
import sys
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any, Iterator, NamedTuple

import pytest
import torch
import yaml
from helpers.golden import generated_state_dict
from helpers.tiny import ROOT
from mmengine.config import Config
from mmengine.config.utils import MODULE2PACKAGE
from mmengine.logging import MMLogger
from mmengine.registry import MODELS, DefaultScope
from mmengine.utils import is_installed

from emo2_mm import EMOv2, convert, emov2

PAGES = [*ROOT.glob('*.md'), *ROOT.glob('docs/**/*.md'), *ROOT.glob('configs/*/README.md')]
PAGES.remove(ROOT / 'CHANGELOG.md')  # it names what is gone
RUNS_PYTHON = re.compile(r'(tools|benchmarks|scripts)/.*\.py')


class Block(NamedTuple):
    """A fenced block, and the text block after it: what it prints."""

    language: str
    text: str
    prints: str


def blocks(page: Path) -> list[Block]:
    pattern = r'^```(\w+)\n(.*?)^```$(?:\n\n^```text\n(.*?)^```$)?'
    return [Block(*found) for found in re.findall(pattern, page.read_text(encoding='utf-8'), re.M | re.S)]


def commands() -> Iterator[list[str]]:
    """The words of each command of this project, in shell blocks and in the text."""
    for page in PAGES:
        texts = [block.text for block in blocks(page) if block.language == 'bash']
        texts += re.findall(r'`((?:python |tools/|make )[^`]+)`', page.read_text(encoding='utf-8'))
        for line in '\n'.join(texts).splitlines():
            words = [word for word in shlex.split(line) if not re.match(r'[A-Z_]+=', word)]
            words = words[1:] if words[:1] == ['python'] else words
            if words and (words[0] == 'make' or re.match(r'(tools|benchmarks|scripts)/', words[0])):
                yield words


COMMANDS = list(commands())

# Runs each program up to where its arguments are parsed.
PARSE = """
import argparse, contextlib, io, json, os, runpy, sys

class Parsed(BaseException):
    pass

parse_args = argparse.ArgumentParser.parse_args

def parse(*args, **kwargs):
    parse_args(*args, **kwargs)
    raise Parsed

argparse.ArgumentParser.parse_args = parse
for program, *arguments in json.load(sys.stdin):
    sys.path[0], sys.argv = os.path.dirname(program), [program, *arguments]
    printed = io.StringIO()
    try:
        with contextlib.redirect_stderr(printed):
            runpy.run_path(program, run_name='__main__')
        result = 'did not parse its arguments'
    except Parsed:
        result = ''
    except SystemExit:
        result = printed.getvalue()
    print(json.dumps(result), flush=True)
"""


def test_programs_accept_the_arguments_of_the_pages() -> None:
    found = [
        [str(ROOT / words[0]), *words[1:]]
        for words in COMMANDS
        if RUNS_PYTHON.fullmatch(words[0]) and (len(words) > 1 or 'check_env' in words[0])
    ]
    code = [sys.executable, '-c', PARSE]
    done = subprocess.run(code, input=json.dumps(found), capture_output=True, text=True, cwd=ROOT)
    results = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(results) == len(found) > 20, done.stderr[-2000:]
    assert [(words, result) for words, result in zip(found, results) if result] == []


def test_programs_configs_and_targets_exist() -> None:
    for words in COMMANDS:
        if words[0] == 'make':
            done = subprocess.run(['make', '-n', *words[1:]], cwd=ROOT, capture_output=True, text=True)
            assert done.returncode == 0, (words, done.stderr)
        names = [word for word in words if word.startswith(('tools/', 'benchmarks/', 'scripts/', 'configs/'))]
        # `*_kd.py` and `{1m,2m}` are no names of files
        assert [n for n in names if not re.search(r'[*{]', n) and not (ROOT / n).exists()] == [], words


def has_key(cfg: Config, key: str) -> bool:
    """Whether a config has an entry; the backbone and MMEngine's runner also have arguments with defaults."""
    node: Any = cfg
    *parents, last = key.split('.')
    for part in parents:
        node = node[int(part)] if isinstance(node, list) else node.get(part, {})
    defaults = {'backbone': inspect.signature(EMOv2).parameters, 'teacher': ['checkpoint_path']}
    defaults['randomness'] = ['seed']
    return last in node or last in defaults.get(parents[-1] if parents else '', ())


def test_options_change_entries_that_configs_have() -> None:
    pairs = [
        (words[1], option.partition('=')[0])
        for words in COMMANDS
        if '--cfg-options' in words and words[1].startswith('configs/')
        for option in words[words.index('--cfg-options') + 1 :]
        if '=' in option
    ]
    assert len(pairs) > 20
    assert [pair for pair in pairs if not has_key(Config.fromfile(ROOT / pair[0]), pair[1])] == []


# --- Python ---------------------------------------------------------------------------------------


def execute(block: Block, names: dict[str, Any]) -> None:
    """Run a block; it prints what the page says."""
    MMLogger.get_current_instance()  # created here, it would keep writing to `printed`
    printed = io.StringIO()
    with redirect_stdout(printed):
        exec(block.text, names)
    assert printed.getvalue() == block.prints, block.text


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with the configs, and a file in the published format under the published name."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / 'configs').symlink_to(ROOT / 'configs')
    (tmp_path / 'checkpoints').mkdir()
    torch.save({'net': generated_state_dict('5m', 0)}, tmp_path / 'checkpoints/EMOv2_5M_224.pth')
    convert.convert('checkpoints/EMOv2_5M_224.pth', Path('checkpoints/emo2_5m.pth'))
    return tmp_path


def python_blocks(page: Path) -> list[Block]:
    return [block for block in blocks(page) if block.language == 'python']


@pytest.mark.parametrize('name', ['README.md', 'docs/guide/backbone.md', 'docs/guide/deploy.md'])
def test_python_prints_what_the_page_says(name: str, project: Path) -> None:
    names: dict[str, Any] = {}
    for block in python_blocks(ROOT / name):
        if 'mmpretrain' in block.text:
            pytest.importorskip('mmpretrain')
        if not block.text.startswith('_base_') and 'onnx' not in block.text:
            execute(block, names)


INHERITING = {
    block.text for page in PAGES for block in python_blocks(page) if block.text.startswith('_base_')
}


@pytest.mark.slow
@pytest.mark.parametrize('text', sorted(INHERITING), ids=lambda text: text.split("'")[1])
def test_models_of_inheriting_configs_are_built(text: str, tmp_path: Path) -> None:
    scope = re.search(r"_base_ = '(\w+)::", text)[1]
    pytest.importorskip(scope)
    if not is_installed(MODULE2PACKAGE[scope]):
        pytest.skip(f"MMEngine's fork looks for the base configs of {scope} under another package name")
    (tmp_path / 'own.py').write_text(text)
    cfg = Config.fromfile(tmp_path / 'own.py')
    cfg.model.backbone.pop('init_cfg', None)
    with DefaultScope.overwrite_default_scope(scope):
        assert isinstance(MODELS.build(cfg.model).backbone, EMOv2)


def test_examples_in_docstrings() -> None:
    assert doctest.testmod(emov2) == (0, 3)


# --- Tables ---------------------------------------------------------------------------------------


def rows(name: str) -> list[list[str]]:
    """Cells of all table rows of a page."""
    lines = re.findall(r'^\|(.*)\|$', (ROOT / name).read_text(encoding='utf-8'), re.M)
    return [[cell.strip() for cell in line.split('|')] for line in lines]


def test_channels_are_those_of_the_archs() -> None:
    found = {row[0]: row[1] for row in rows('docs/guide/backbone.md') if row[0] in EMOv2.arch_settings}
    assert found == {
        arch: ', '.join(map(str, settings['channels'])) for arch, settings in EMOv2.arch_settings.items()
    }


@pytest.mark.parametrize('task', ['cls', 'det', 'seg'])
def test_reported_results_are_those_of_the_metafile(task: str) -> None:
    found = {row[0]: row[1:4] for row in rows(f'configs/{task}/README.md') if row[0].startswith('[')}
    expected = {}
    for model in yaml.safe_load((ROOT / f'configs/{task}/metafile.yml').read_text())['Models']:
        if 'Results' in model:
            meta, unit = model['Metadata'], 'M' if task == 'cls' else 'G'
            accuracy = next(iter(model['Results'][0]['Metrics'].values()))
            sizes = f'{meta["Reported Parameters (M)"]} M', f'{meta[f"Reported FLOPs ({unit})"]} {unit}'
            expected[f'[{model["Name"]}]({Path(model["Config"]).name})'] = [str(accuracy), *sizes]
    assert found == expected


def test_readmes_have_the_same_code_and_numbers() -> None:
    english, chinese = (
        (ROOT / name).read_text(encoding='utf-8') for name in ('README.md', 'README_zh-CN.md')
    )
    assert blocks(ROOT / 'README.md') == blocks(ROOT / 'README_zh-CN.md')
    numbers = [sorted(re.findall(r'\d+\.\d+', text)) for text in (english, chinese)]
    assert numbers[0] == numbers[1]
