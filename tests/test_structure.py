"""Layers of the package, and rules for tools and tests, read from the source without importing it."""

from __future__ import annotations

import ast
import sys
from functools import lru_cache
from pathlib import Path
from typing import Iterator

import pytest
from helpers.tiny import ROOT

if sys.version_info < (3, 10):
    pytest.skip('needs sys.stdlib_module_names', allow_module_level=True)

STDLIB = set(sys.stdlib_module_names)
SOURCES = sorted((ROOT / 'emo2_mm').rglob('*.py'))
TOOLS = sorted((ROOT / 'tools').glob('*.py'))
TESTS = sorted((ROOT / 'tests').rglob('*.py'))

# Part of the package -> its layer. A part imports parts of lower layers, and of its own.
LAYERS = {
    **{'version': 0, 'errors': 0, 'arch': 0, 'fold': 0, 'fonts': 0},
    **{'config': 1, 'cpu': 1},
    **{'attention': 2, 'layers': 2, 'weights': 2},
    'emov2': 3,
    '': 4,  # emo2_mm/__init__.py
    'datasets': 5,
    'engine': 6,
    'datasets.check': 7,
    **{'analysis': 7, 'apis': 7, 'convert': 7, 'distill': 7, 'export': 7, 'publish': 7, 'ssd': 7},
}


def module_name(path: Path) -> str:
    """Dotted name of a source file, such as emo2_mm.weights for emo2_mm/weights/__init__.py."""
    parts = path.relative_to(ROOT).with_suffix('').parts
    return '.'.join(parts[:-1] if parts[-1] == '__init__' else parts)


MODULES = {module_name(path): path for path in SOURCES}


@lru_cache(maxsize=None)
def parse(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding='utf-8'))


def at_module_level(node: ast.AST) -> Iterator[ast.AST]:
    """Iterate over the nodes that run when a module is imported."""
    for child in ast.iter_child_nodes(node):
        yield child
        if not isinstance(child, (ast.FunctionDef, ast.Lambda)):
            yield from at_module_level(child)


@lru_cache(maxsize=None)
def imports(path: Path, module_level: bool = False) -> set[str]:
    """Names of the modules that a file imports; ``from x import y`` gives x and x.y."""
    package = path.relative_to(ROOT).parent.parts
    names = set()
    for node in at_module_level(parse(path)) if module_level else ast.walk(parse(path)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            parents = package[: len(package) - node.level + 1] if node.level else ()
            base = '.'.join([*parents, *filter(None, [node.module])])
            names |= {f'{base}.{alias.name}' for alias in node.names}
            if node.module:  # "from . import x" means x alone
                names.add(base)
    return names


def tops(names: set[str]) -> set[str]:
    return {name.split('.')[0] for name in names}


def dependencies(module: str) -> set[str]:
    """Modules of the package that one of its modules imports, also inside functions."""
    return imports(MODULES[module]) & set(MODULES) - {module}


def layer(module: str) -> int:
    """Layer of a module; a module or part that has none is an error."""
    name = module.partition('.')[2]
    return LAYERS[name if name in LAYERS else name.split('.')[0]]


def test_no_modules_import_each_other_in_a_cycle() -> None:
    done: set[str] = set()

    def visit(module: str, path: tuple[str, ...]) -> None:
        assert module not in path, ' -> '.join((*path, module))
        if module not in done:
            for other in dependencies(module):
                visit(other, (*path, module))
            done.add(module)

    for module in MODULES:
        visit(module, ())


def test_a_module_imports_no_higher_layer() -> None:
    higher = {
        f'{module} imports {other}'
        for module in MODULES
        for other in dependencies(module)
        if layer(other) > layer(module)
    }
    assert not higher


def test_cpu_code_imports_torch_and_folding_only() -> None:
    for path in (ROOT / 'emo2_mm/cpu').glob('*.py'):
        assert tops(imports(path)) <= {'torch', 'emo2_mm', *STDLIB}, path
        own = {name for name in dependencies(module_name(path)) if not name.startswith('emo2_mm.cpu')}
        assert own <= {'emo2_mm.fold'}, path


def test_nothing_in_the_package_imports_tools_or_tests() -> None:
    for path in SOURCES:
        assert not tops(imports(path)) & {'tools', 'tests', '_arguments'}, path


def test_package_and_tools_have_plain_imports() -> None:
    """No edits of the path, no late imports at module level, no mocks."""
    texts = {path: path.read_text(encoding='utf-8') for path in [*SOURCES, *TOOLS]}
    for path, text in texts.items():
        assert 'sys.path' not in text and 'noqa: E402' not in text, path
        assert 'unittest.mock' not in imports(path), path


def test_tools_are_short_and_read_arguments_before_they_import_torch() -> None:
    for path in TOOLS:
        assert len(path.read_text(encoding='utf-8').splitlines()) <= 100, path
        assert tops(imports(path, module_level=True)) <= {'_arguments', *STDLIB}, path


def test_tests_import_helpers_not_other_tests() -> None:
    tests = {path.stem for path in TESTS if path.stem.startswith('test_')}
    for path in TESTS:
        assert not tops(imports(path)) & tests, path


def test_tests_do_not_edit_the_path() -> None:
    edits = ('sys.path.insert', 'sys.path.append', 'sys.path.extend')
    for path in TESTS:
        assert not {ast.unparse(n.func) for n in ast.walk(parse(path)) if isinstance(n, ast.Call)} & {*edits}


def test_names_of_test_modules_are_unique() -> None:
    names = [path.name for path in TESTS if path.name.startswith('test_')]
    assert sorted(names) == sorted(set(names))
