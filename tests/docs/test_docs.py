"""The documentation: links lead somewhere, tests run its commands, Python prints what is said."""

from __future__ import annotations

import ast
import doctest
import importlib
import inspect
import io
import json
import re
import shlex
import subprocess
import sys
from contextlib import redirect_stdout
from functools import lru_cache
from itertools import product
from pathlib import Path
from typing import Any, Iterator, NamedTuple

import pytest
import torch
from helpers.golden import generated_state_dict
from helpers.processes import arguments_given
from helpers.tiny import ROOT
from mmengine.config import Config
from mmengine.config.utils import MODULE2PACKAGE
from mmengine.logging import MMLogger
from mmengine.registry import MODELS, DefaultScope
from mmengine.runner import CheckpointLoader
from mmengine.runner.checkpoint import load_from_local
from mmengine.utils import is_installed

import emo2_mm
from emo2_mm import EMOv2

PAGES = [ROOT / 'README.md', ROOT / 'MODEL_ZOO.md', *sorted((ROOT / 'docs').glob('*.md'))]
NAMES = [str(page.relative_to(ROOT)) for page in PAGES]
FOLDERS = ('configs', 'docs', 'emo2_mm', 'requirements', 'tests', 'tools')

# The test that runs a command, and those that use its options; a command or option that is not here fails.
# FILE::TEST of tests/, or for other files FILE::TEXT in it. '_custom.py' are the configs for own data.
TOOLS = 'test_tools.py::test_train_resume_evaluate'
HOOKS = 'test_hooks.py'
TESTED = {
    'tools/train.py': {
        '': TOOLS,
        '--resume': TOOLS,
        '--cfg-options': TOOLS,
        '--work-dir': 'test_distributed.py::test_two_processes',
        '--amp': f'{HOOKS}::test_mixed_precision_without_a_gpu',
        '--auto-scale-lr': f'{HOOKS}::test_learning_rate_scales_with_the_batch',
        '--no-validate': 'test_tools.py::test_augment_and_paint',
        '_custom.py': 'test_own_data.py::test_trains_evaluates_and_infers',
    },
    'tools/test.py': {
        '_custom.py': 'test_own_data.py::test_trains_evaluates_and_infers',
        '': TOOLS,
        '--out': TOOLS,
        '--tta': 'test_tools.py::test_augment_and_paint',
        '--show-dir': 'test_tools.py::test_augment_and_paint',
        '--amp': f'{HOOKS}::test_mixed_precision_in_tests',
    },
    'tools/dist_train.sh': {
        '': 'test_distributed.py::test_two_processes',
        '--cfg-options': 'test_distributed.py::test_two_processes',
        '--auto-scale-lr': f'{HOOKS}::test_learning_rate_scales_with_the_processes',
    },
    'tools/dist_test.sh': {'': 'test_distributed.py::test_two_processes'},
    'tools/slurm_train.sh': {'': 'test_distributed.py::test_slurm_arguments'},
    'tools/slurm_test.sh': {'': 'test_distributed.py::test_slurm_arguments'},
    'tools/check_dataset.py': {
        '': 'test_check_dataset.py::test_command',
        '--split': 'test_check_dataset.py::test_command',
        '--cfg-options': 'test_check_dataset.py::test_command',
        '--max-shown': 'test_check_dataset.py::test_no_more_than_asked_for',
        '_custom.py': 'test_own_data.py::test_check_takes_the_configs',
    },
    'tools/check_env.py': {
        '': 'test_check_env.py::test_environment_at_hand',
        '--json': 'test_check_env.py::test_environment_at_hand',
    },
    'tools/infer.py': {
        '_custom.py': 'test_own_data.py::test_trains_evaluates_and_infers',
        '': 'test_infer.py::test_as_a_program',
        '--out': 'test_infer.py::test_as_a_program',
        '--score-thr': 'test_infer.py::test_lower_scores_are_left_out',
    },
    'tools/plot_logs.py': {
        '': 'test_plot_logs.py::test_curves_of_runs',
        '--out': 'test_plot_logs.py::test_curves_of_runs',
        '--keys': 'test_plot_logs.py::test_missing_key',
    },
    'tools/show_windows.py': {
        '': 'test_show_windows.py::test_picture',
        '--point': 'test_show_windows.py::test_picture',
        '--out': 'test_show_windows.py::test_picture',
    },
    'tools/get_flops.py': {
        '': 'test_sizes.py::test_json_from_a_bare_clone_and_any_folder',
        '--json': 'test_sizes.py::test_json_from_a_bare_clone_and_any_folder',
        '--shape': 'test_sizes.py::test_table_shape_and_options',
        '--cfg-options': 'test_sizes.py::test_table_shape_and_options',
    },
    'tools/convert_checkpoint.py': {'': 'test_convert_checkpoint.py::test_command_line'},
    'tools/publish_model.py': {'': 'test_publish_model.py::test_a_trained_detector'},
    'tools/export_onnx.py': {
        '': 'test_docs.py::test_exported_graph_is_used_as_said',
        '--out': 'test_docs.py::test_exported_graph_is_used_as_said',
        '--shape': 'test_docs.py::test_exported_graph_is_used_as_said',
        '--dynamic': 'test_export_onnx.py::test_segmentor_of_any_size',
        '--backbone': 'test_export_onnx.py::test_backbone_alone',
        '--quantize': 'test_export_onnx.py::test_quantize',
    },
    'tools/model_zoo.py': {'': 'test_model_zoo.py::test_check_names_what_has_drifted'},
    'tools/loader_speed.py': {
        '': 'test_loader_speed.py::test_rate_is_told',
        '--seconds': 'test_loader_speed.py::test_rate_is_told',
    },
    'tools/benchmark.py': {
        '': 'test_benchmark.py::test_report',
        '--device': 'test_benchmark.py::test_report',
        '--out': 'test_benchmark.py::test_report',
        '--scale': 'test_benchmark.py::test_scale_and_profile',
        '--profile': 'test_benchmark.py::test_scale_and_profile',
        '--peers': 'test_benchmark.py::test_peers',
        '--threads': 'test_benchmark.py::test_a_wrong_option_is_named',
        '--only': 'test_benchmark.py::test_report',
    },
    'make env': {'': 'test_make_env.py::test_finished_steps_are_not_redone'},
    'make clean': {'': 'Makefile::rm -rf $(VENV)'},
    'make demo': {'': 'test_demo.py::test_a_failed_step_says_why_and_goes_on_with_what_it_had'},
    'make demo-all': {'': 'test_demo.py::test_methods_train_and_are_reported'},
    'make test': {'': '.ci/run::make test'},
    'mim search': {'': 'test_mim.py::test_session'},
    'mim install': {'': 'test_mim.py::test_session'},
    'mim run': {'': 'test_mim.py::test_session'},
    'mim train': {'': 'test_mim.py::test_session', '--gpus': 'test_mim.py::test_session'},
    'mim download': {'': 'test_mim.py::test_session'},
    'pip wheel': {'': 'test_mim.py::test_session'},
    'pip install': {'': 'test_packaging.py::test_wheel_metadata'},
    # what is not this project's
    'git clone': {},
    'cd emo2_mm': {},
    'source .venv/bin/activate': {},
    'apt-get install': {},
}


class Block(NamedTuple):
    """A fenced block, its language, and what a text block right after it says it prints."""

    language: str
    text: str
    prints: str | None


@lru_cache(maxsize=None)
def read(page: Path) -> str:
    return page.read_text(encoding='utf-8')


def blocks(page: Path) -> list[Block]:
    found = list(re.finditer(r'^```(\w*)\n(.*?)^```$', read(page), re.M | re.S))
    ends = [match.end() for match in found]
    result = []
    for match, end, after in zip(found, ends, [*found[1:], None]):
        printed = after and after[1] == 'text' and not read(page)[end : after.start()].strip()
        result.append(Block(match[1], match[2], after[2] if printed else None))
    return result


def prose(page: Path) -> str:
    """A page without its blocks."""
    return re.sub(r'^```.*?^```$', '', read(page), flags=re.M | re.S)


def inline_code(page: Path) -> list[str]:
    return [' '.join(code.split()) for code in re.findall(r'`([^`]+)`', prose(page))]


def commands(page: Path) -> Iterator[list[str]]:
    """The words of each command: of shell blocks, and of what is called inside the text."""
    texts = [block.text for block in blocks(page) if block.language in ('bash', 'sh', 'console')]
    texts += [
        code
        for code in inline_code(page)
        if re.match(r'([A-Z_]+=\S+ )*(python tools/|tools/\S+ |make |mim )', code)
    ]
    for text in texts:
        for line in text.replace('\\\n', ' ').splitlines():
            lexer = shlex.shlex(line, posix=True, punctuation_chars='&;|')
            lexer.whitespace_split = True
            words: list[str] = []
            for word in [*lexer, ';']:
                if set(word) <= set('&;|'):
                    if words:
                        yield words
                    words = []
                else:
                    words.append(word)


def variables_and_rest(words: list[str]) -> tuple[dict[str, str], list[str]]:
    """Part the variables that are set in front of a command from it."""
    count = next(i for i, word in enumerate(words) if not re.match(r'[A-Z_]+=', word))
    return dict(word.split('=', 1) for word in words[:count]), words[count:]


def rule_of(words: list[str]) -> tuple[str, list[str]]:
    """The key of a command in TESTED, and its arguments."""
    if words[0] == 'python':
        words = words[1:]
    return (words[0], words[1:]) if words[0].startswith('tools/') else (' '.join(words[:2]), words[2:])


ALL = [words for page in PAGES for words in commands(page)]


# --- Links ----------------------------------------------------------------------------------------


def anchors(page: Path) -> set[str]:
    """The anchors that GitHub gives to headings."""
    headings = re.findall(r'^#+ (.*)$', prose(page), re.M)
    return {re.sub(r'[^\w\- ]', '', heading.lower()).replace(' ', '-') for heading in headings}


@pytest.mark.parametrize('page', PAGES, ids=NAMES)
def test_links_lead_somewhere(page: Path) -> None:
    targets = re.findall(r'\]\(([^)\s]+)\)', prose(page))
    broken = []
    for target in targets:
        path, _, anchor = target.partition('#')
        file = (page.parent / path).resolve() if path else page
        if '://' not in target and not (file.exists() and (not anchor or anchor in anchors(file))):
            broken.append(target)
    assert not broken
    assert targets or page.name not in ('README.md', 'MODEL_ZOO.md')


def expand(pattern: str) -> Iterator[str]:
    """The names that braces stand for."""
    parts = re.split(r'\{([^}]*)\}', pattern)
    yield from map(''.join, product(*(part.split(',') if i % 2 else [part] for i, part in enumerate(parts))))


@pytest.mark.parametrize('page', PAGES, ids=NAMES)
def test_files_in_the_text_are_there(page: Path) -> None:
    paths = [
        code.split()[0] for code in inline_code(page) if code.startswith(tuple(f'{f}/' for f in FOLDERS))
    ]
    for block in blocks(page):
        paths += re.findall(rf'\b(?:{"|".join(FOLDERS)})/[\w/]+\.\w+', block.text)
    names = [name for path in paths if not re.search(r'[A-Z]{3}', path) for name in expand(path)]
    assert [name for name in names if not any(ROOT.glob(name.rstrip('/')))] == []


def test_every_page_is_in_the_index() -> None:
    index = read(ROOT / 'docs/README.md')
    linked = re.findall(r'^\d+\. \[.*?\]\((\w+\.md)\)', index, re.M)
    assert sorted(linked) == sorted(
        page.name for page in PAGES if page.parent != ROOT and page.stem != 'README'
    )


# --- Commands -------------------------------------------------------------------------------------


@pytest.mark.parametrize('page', PAGES, ids=NAMES)
def test_a_test_runs_each_command(page: Path) -> None:
    uncovered = set()
    for words in commands(page):
        key, arguments = rule_of(variables_and_rest(words)[1])
        options = [word.split('=')[0] for word in arguments if word.startswith('--')]
        options += ['_custom.py'] * any(word.endswith('_custom.py') for word in arguments)
        if not key.startswith('tools/'):
            options = []
        tests = TESTED.get(key)
        if tests != {}:
            uncovered.update(f'{key} {option}' for option in ['', *options] if option not in (tests or ()))
    assert not uncovered, 'add to TESTED the tests that run these'


@lru_cache(maxsize=None)
def functions(path: Path) -> set[str]:
    return {node.name for node in ast.walk(ast.parse(read(path))) if isinstance(node, ast.FunctionDef)}


@pytest.mark.parametrize('key', TESTED)
def test_the_test_is_there(key: str) -> None:
    for option, test in TESTED[key].items():
        file, name = test.split('::')
        path = ROOT / ('tests' if file.endswith('.py') else '') / file
        if path.suffix == '.py':
            assert name in functions(path), test
            assert option in read(path), f'{test} does not use {option}'
        else:
            assert name in read(path), test


# Gives each command to the parser of its tool, and ends there.
PARSE = """
import argparse, contextlib, io, json, os, runpy, sys

class Parsed(BaseException):
    pass

own = argparse.ArgumentParser.parse_args

def parse_args(parser, args=None, namespace=None):
    own(parser, args, namespace)
    raise Parsed

argparse.ArgumentParser.parse_args = parse_args
for tool, *arguments in json.load(sys.stdin):
    sys.path[0], sys.argv = os.path.dirname(tool), [tool, *arguments]
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            runpy.run_path(tool, run_name='__main__')
        result = 'its arguments were not parsed'
    except Parsed:
        result = ''
    except SystemExit:
        result = said.getvalue()
    print(json.dumps(result), flush=True)
"""


def in_python(words: list[str], folder: Path) -> list[str] | None:
    """The program and the arguments that Python gets from a command, if that is a tool of this project."""
    variables, words = variables_and_rest(words)
    key, arguments = rule_of(words)
    if not key.startswith('tools/') or not arguments and key.endswith('.sh'):
        return None
    if key.endswith('.py'):
        assert not variables
        return [str(ROOT / key), *arguments]
    unknown = [name for name in variables if f'${{{name}:' not in read(ROOT / key)]
    assert not unknown, f'{key} does not read {unknown}'
    program = 'srun' if 'slurm' in key else 'python'
    variables.update(
        dict(PATH=f'{folder}:/usr/bin:/bin') if program == 'srun' else dict(PYTHON=str(folder / program))
    )
    given = arguments_given(folder, program, Path(key).name, *arguments, **variables)
    return given[next(i for i, word in enumerate(given) if word.startswith(f'{ROOT}/tools/')) :]


def test_tools_know_their_arguments(tmp_path: Path) -> None:
    """By the parsers of the tools themselves, and the launchers' passing on."""
    tools = [(' '.join(words), in_python(words, tmp_path)) for words in ALL]
    tools = [(text, command) for text, command in tools if command]
    given = json.dumps([command for _, command in tools])
    code = [sys.executable, '-c', PARSE]
    done = subprocess.run(code, input=given, cwd=tmp_path, capture_output=True, text=True)
    results = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(results) == len(tools) > 20, done.stderr[-4000:]
    assert {text: result for (text, _), result in zip(tools, results) if result} == {}


@lru_cache(maxsize=None)
def config(name: str) -> Config:
    return Config.fromfile(ROOT / name)


def has_entry(cfg: Config, key: str) -> bool:
    """Whether a config has an entry, or the backbone or the teacher may be given it."""
    *parents, last = key.split('.')
    node: Any = cfg
    if key == 'randomness.seed':  # of MMEngine's runner
        return True
    for part in parents:
        if isinstance(node, list) and int(part) < len(node):
            node = node[int(part)]
        elif part in node:
            node = node[part]
        else:
            return False
    new = list(inspect.signature(EMOv2).parameters) if parents[-1:] == ['backbone'] else []
    new += ['checkpoint_path'] if parents[-1:] == ['teacher'] else []  # of timm
    return last in node or last in new


@pytest.mark.parametrize('page', PAGES, ids=NAMES)
def test_configs_and_their_entries_are_there(page: Path) -> None:
    for words in commands(page):
        configs = [word for word in words if word.startswith('configs/')]
        assert all((ROOT / name).is_file() for name in configs), words
        if '--cfg-options' in words and configs:
            for option in words[words.index('--cfg-options') + 1 :]:
                if option.startswith('--'):
                    break
                key = option.partition('=')[0]
                assert has_entry(config(configs[0]), key), f'{configs[0]} has no {key}'


def test_make_knows_its_targets() -> None:
    known = read(ROOT / 'Makefile') + read(ROOT / 'tools/make_env.sh')
    for words in ALL:
        if words[0] == 'make':
            done = subprocess.run(['make', '-n', *words[1:]], cwd=ROOT, capture_output=True, text=True)
            assert done.returncode == 0, done.stderr
            assert all(re.search(rf'\b{word.split("=")[0]}\b', known) for word in words[2:]), words


def test_packages_and_names_are_there() -> None:
    """Extras, constraints, scripts and configs by name."""
    extras = re.findall(r"^        '(\w+)': ", read(ROOT / 'setup.py'), re.M)
    for words in ALL:
        if words[0] not in ('pip', 'mim'):
            continue
        for before, word in zip(words, words[1:]):
            extra = re.fullmatch(r'\.\[(.*)\]', word)
            assert not extra or set(extra[1].split(',')) <= set(extras)
            assert before != '-c' or (ROOT / word).is_file()
            assert before != '--config' or any(ROOT.glob(f'configs/*/{word}.py'))
        if words[:2] == ['mim', 'run']:
            assert any(ROOT.glob(f'tools/**/{words[3]}.py'))
        if words[:2] == ['mim', 'train']:
            assert any(ROOT.glob(f'configs/*/{words[3]}'))


# --- Python ---------------------------------------------------------------------------------------


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with the configs and tools, and with files called like the published ones."""
    monkeypatch.chdir(tmp_path)
    for name in ('configs', 'tools'):
        (tmp_path / name).symlink_to(ROOT / name)
    (tmp_path / 'checkpoints').mkdir()
    weights = generated_state_dict('5m', 0)
    torch.save({'net': weights}, tmp_path / 'checkpoints/EMOv2_5M_224.pth')
    return tmp_path


def python_blocks(page: Path) -> list[Block]:
    return [block for block in blocks(page) if block.language == 'python']


def execute(block: Block, names: dict[str, Any]) -> None:
    """Run a block, and see that it prints what the page says."""
    MMLogger.get_current_instance()  # or it would be made here, and write to `printed` ever after
    printed = io.StringIO()
    with redirect_stdout(printed):
        exec(block.text, names)
    assert printed.getvalue() == (block.prints or ''), block.text


def convert() -> None:
    """What the pages convert before they use it."""
    pytest.importorskip('mmpretrain')
    from test_convert_checkpoint import convert

    convert('checkpoints/EMOv2_5M_224.pth', 'checkpoints/emo2_5m.pth')


@pytest.mark.parametrize('page', [page for page in PAGES if python_blocks(page)], ids=lambda page: page.name)
def test_python_prints_what_is_said(page: Path, project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The blocks of a page, one after the other; MMEngine's own loader reads files, not that of the tools."""
    monkeypatch.setitem(CheckpointLoader._schemes, '', load_from_local)
    found = [b for b in python_blocks(page) if not b.text.startswith('_base_') and 'onnx' not in b.text]
    if any('mmpretrain' in block.text for block in found):
        convert()
    names: dict[str, Any] = {}
    for block in found:
        execute(block, names)


@pytest.mark.slow
def test_exported_graph_is_used_as_said(project: Path) -> None:
    """The command of docs/deploy.md that writes the graph, and the Python that runs it."""
    for name in ('onnx', 'onnxruntime'):
        pytest.importorskip(name)
    page = ROOT / 'docs/deploy.md'
    (command,) = (words for words in commands(page) if words[-2:] == ['--out', 'emo2_5m.onnx'])
    assert '--shape' in command
    convert()
    done = subprocess.run([sys.executable, *command[1:]], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    (block,) = (block for block in python_blocks(page) if 'onnx' in block.text)
    execute(block, {})


CONFIGS = [block.text for page in PAGES for block in python_blocks(page) if block.text.startswith('_base_')]


@pytest.mark.slow  # they import a code base each
@pytest.mark.parametrize('text', CONFIGS, ids=lambda text: text.split("'")[1])
def test_models_of_configs_are_built(text: str, tmp_path: Path) -> None:
    build_config(text, tmp_path / 'mine.py')


def build_config(text: str, path: Path) -> None:
    """Read a config of another project, and build its model without weights."""
    scope = re.search(r"_base_ = '(\w+)::", text)[1]
    pytest.importorskip(scope)
    if not is_installed(MODULE2PACKAGE[scope]):
        pytest.skip(f"MMEngine's fork does not know the name of the package that {scope} is in there")
    path.write_text(text)
    cfg = Config.fromfile(path)
    cfg.model.backbone.pop('init_cfg', None)
    with DefaultScope.overwrite_default_scope(scope):
        assert isinstance(MODELS.build(cfg.model).backbone, EMOv2)


def test_only_languages_that_are_checked() -> None:
    assert {block.language for page in PAGES for block in blocks(page)} <= {
        'bash',
        'python',
        'text',
        'bibtex',
    }


# --- What the pages say of the code ---------------------------------------------------------------


def table(page: str, first: str) -> list[list[str]]:
    """The rows of all tables of a page whose first heading is this."""
    found = re.findall(rf'^\| {first} \|.*\n\|[-| :]+\n((?:\|.*\n)+)', read(ROOT / page), re.M)
    return [
        [cell.strip() for cell in row.strip('|').split('|')] for rows in found for row in rows.splitlines()
    ]


@lru_cache(maxsize=None)
def strings() -> str:
    """All strings of the code and the tests, one a line, and the shell scripts."""
    paths = [path for folder in ('emo2_mm', 'tools', 'tests') for path in (ROOT / folder).rglob('*.py')]
    nodes = [node for path in paths if path != Path(__file__) for node in ast.walk(ast.parse(read(path)))]
    found = [node.value for node in nodes if isinstance(node, ast.Constant) and isinstance(node.value, str)]
    return '\n'.join([*found, read(ROOT / 'tools/make_env.sh'), read(ROOT / 'Makefile')])


ROWS = table('docs/questions.md', 'message')


# of others; the last one is provoked below
FOREIGN = (
    'mmsegmentation is not installed, please install mmsegmentation manually',
    "No module named 'pkg_resources'",
    'numpy.core.multiarray failed to import',
    "got an unexpected keyword argument 'pretrained'",
)


def test_messages_exist() -> None:
    assert len(ROWS) > 50
    for row in ROWS:
        assert len(row) == 3 and all(row), row
        messages = re.findall(r'`([^`]+)`', row[0])
        assert messages, row
        parts = [part.strip() for m in messages if m not in FOREIGN for part in m.split('...')]
        assert [part for part in parts if part not in strings()] == []


# for those who work on the project
INTERNAL = ('benchmark', 'benchmark_report', 'measuring', 'model_zoo', 'plain_emov2')


def errors(path: Path) -> Iterator[list[str]]:
    """The constant parts of each message that a module ends with: what it raises, or gives to fail()."""
    for node in ast.walk(ast.parse(read(path))):
        function = getattr(node, 'func', None)
        fails = 'fail' in (getattr(function, 'id', ''), getattr(function, 'attr', ''))
        if fails or isinstance(node, ast.Raise):
            parts = [part.value for part in ast.walk(node) if isinstance(part, ast.Constant)]
            parts = [part for part in parts if isinstance(part, str) and ' ' in part.strip()]
            if parts:
                yield parts


@pytest.mark.parametrize('folder', ['emo2_mm', 'tools'])
def test_every_message_is_there(folder: str) -> None:
    said = [part.strip() for row in ROWS for m in re.findall(r'`([^`]+)`', row[0]) for part in m.split('...')]
    said = [part for part in said if ' ' in part]
    files = [path for path in (ROOT / folder).glob('*.py') if path.stem not in INTERNAL]
    found = [(path.name, parts) for path in files for parts in errors(path)]
    assert len(found) > 20
    missing = [
        (name, parts) for name, parts in found if not any(part in text for part in said for text in parts)
    ]
    assert not missing, 'add to docs/questions.md what these mean'


@pytest.mark.slow
def test_message_of_a_segmentor_with_a_pretrained_backbone(tmp_path: Path) -> None:
    """The cure in docs/questions.md."""
    (row,) = (row for row in ROWS if "'pretrained'" in row[0])
    pytest.importorskip('mmseg')
    text = next(text for text in CONFIGS if 'mmseg::' in text)
    assert 'pretrained=None' in text and 'pretrained=None' in row[2]
    with pytest.raises(TypeError, match=re.escape(row[0].strip('`'))):
        build_config(text.replace('pretrained=None,', ''), tmp_path / 'mine.py')


def test_findings_are_those_of_the_tool(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / 'tools'))
    check_dataset = importlib.import_module('check_dataset')
    rows = table('docs/train.md', 'finding')
    named = [finding for row in rows for finding in row[0].split('; ')]
    assert len(named) == len(set(named)) > 15
    assert set(named) <= {*check_dataset.ERRORS, *check_dataset.WARNINGS}


def test_channels_are_those_of_the_archs() -> None:
    said = {arch: tuple(map(int, channels.split(', '))) for arch, channels in table('docs/api.md', 'arch')}
    assert said == {arch: tuple(settings['channels']) for arch, settings in EMOv2.arch_settings.items()}


# --- Docstrings -----------------------------------------------------------------------------------

MODULES = sorted(path.stem for path in Path(emo2_mm.__file__).parent.glob('*.py') if path.stem[0] != '_')
SECTIONS = ('Args', 'Returns', 'Raises', 'Examples')


def load(name: str) -> Any:
    needs = dict(distill='mmpretrain', ssd='mmdet').get(name)
    if needs:
        pytest.importorskip(needs)
    return importlib.import_module(f'emo2_mm.{name}')


def named(module: Any) -> Iterator[tuple[str, Any]]:
    """The public functions and classes of a module, and the methods of the backbone."""
    for name, thing in vars(module).items():
        if not name.startswith('_') and getattr(thing, '__module__', '') == module.__name__:
            yield name, thing
    if module.__name__ == 'emo2_mm.emov2':
        for name, method in vars(EMOv2).items():
            if not name.startswith('_') and callable(method):
                yield f'EMOv2.{name}', method


@pytest.mark.parametrize('module', MODULES)
def test_docstrings_render(module: str) -> None:
    """A sentence or paragraphs, then sections of Google's style that name real parameters."""
    for name, thing in named(load(module)):
        text = inspect.cleandoc(thing.__doc__ or '')
        begins = text.split('\n\n')[0]
        assert begins.endswith(('.', ':')), (
            f'{name} has no docstring, or one whose first paragraph has no end'
        )
        assert not begins.startswith(SECTIONS), f'{name} is not told what it is for'
        assert text.count('`') % 2 == 0, name
        headings = re.findall(r'^(\w+):$', text, re.M)
        assert [h for h in SECTIONS if h in headings] == headings, f'sections of {name}: {headings}'
        arguments = re.search(r'^Args:\n((?:    .*\n?|\n)+)', text, re.M)
        if arguments:
            said = re.findall(r'^    \**(\w+): ', arguments[1], re.M)
            real = [p for p in inspect.signature(thing).parameters if p != 'self']
            assert said == [p for p in real if p in said], f'{name}: {said}, not {real}'
            assert said == real or name != 'EMOv2', f'{name}: {said}, not {real}'


@pytest.mark.parametrize('module', MODULES)
def test_examples_in_docstrings(module: str) -> None:
    failed, tried = doctest.testmod(load(module))
    assert not failed
    assert tried or module != 'emov2'
