"""MkDocs hooks: pages from outside docs/, the API reference, links that work on GitHub and on the site.

Pages link to files relative to their own place in the repository, as on GitHub. On the site, pages of the
root have another place, and any other linked file is copied into the site.
"""

from __future__ import annotations

import ast
import json
import posixpath
import re
from pathlib import Path
from typing import Any, Iterator

import griffe
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = 'emo2_mm'
NOTEBOOK = 'docs/tutorial.ipynb'

# Pages whose source is not at the same path in docs/: path in the repository, path on the site.
PAGES = {
    'README.md': 'index.md',
    'README_zh-CN.md': 'zh-CN.md',
    'MODEL_ZOO.md': 'model_zoo.md',
    'CHANGELOG.md': 'changelog.md',
    'CONTRIBUTING.md': 'contributing.md',
    'SECURITY.md': 'security.md',
    'CODE_OF_CONDUCT.md': 'code_of_conduct.md',
    NOTEBOOK: 'guide/tutorial.md',
    **{f'configs/{task}/README.md': f'configs/{task}.md' for task in ('cls', 'det', 'seg')},
}
WIDE = {'README.md': 'navigation', 'README_zh-CN.md': 'navigation', 'MODEL_ZOO.md': 'toc'}  # hidden for width
SOURCES = {site: source for source, site in PAGES.items()}
LINK = re.compile(r'(?P<before>\]\(|(?:src|href|srcset)=")(?P<target>[^)\s"#]+)(?=[#)"])')
CODE_BLOCK = re.compile(r'^(```.*?^```)$', re.M | re.S)


def source_of(src_uri: str) -> str:
    """Path of a page's source in the repository."""
    return SOURCES.get(src_uri, f'docs/{src_uri}')


def linked_file(source: str, target: str) -> str | None:
    """Path in the repository that a link of the page ``source`` leads to; None for an address."""
    if '://' in target or target.startswith(('mailto:', 'data:')):
        return None
    return posixpath.normpath(posixpath.join(posixpath.dirname(source), target))


def place_on_site(path: str) -> str:
    """Path on the site of a file of the repository."""
    return PAGES.get(path) or (path[len('docs/') :] if path.startswith('docs/') else path)


def outside_code(markdown: str, edit: Any) -> str:
    """Apply ``edit`` to all of a page but its fenced code."""
    parts = CODE_BLOCK.split(markdown)
    return ''.join(part if part.startswith('```') else edit(part) for part in parts)


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Fill the navigation of the API reference."""
    for entry in config.nav:
        if 'API reference' in entry:
            entry['API reference'] = [{name: f'reference/{name}.md'} for name, _ in reference_pages()]
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages of PAGES, those of the API reference, and the files that pages link to."""
    for source, site in PAGES.items():
        text = (ROOT / source).read_text(encoding='utf-8')
        files.append(
            File.generated(config, site, content=notebook_page(text) if source == NOTEBOOK else text)
        )
    for name, text in reference_pages():
        files.append(File.generated(config, f'reference/{name}.md', content=text))
    for page in list(files.documentation_pages()):
        source = source_of(page.src_uri)
        for match in LINK.finditer(page.content_string):
            path = linked_file(source, match['target'])
            if path and not files.get_file_from_path(place_on_site(path)) and (ROOT / path).is_file():
                files.append(File.generated(config, place_on_site(path), abs_src_path=str(ROOT / path)))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Let links lead to the places of their files on the site."""
    source = source_of(page.file.src_uri)
    if source in WIDE:
        page.meta['hide'] = [WIDE[source]]
    folder = posixpath.dirname(page.file.src_uri)

    def moved(match: re.Match[str]) -> str:
        path = linked_file(source, match['target'])
        if path is None:
            return match[0]
        place = posixpath.relpath(place_on_site(path), folder or '.')
        # MkDocs leaves addresses in HTML as they are: these are relative to the page's folder on the site
        if match['before'] != '](':
            linked = files.get_file_from_path(place_on_site(path))
            place = linked.url_relative_to(page.file) if linked else place
        return match['before'] + place

    return outside_code(markdown, lambda text: LINK.sub(moved, text))


# --- API reference --------------------------------------------------------------------------------


def public_modules(folder: Path) -> list[Path]:
    return sorted(path for path in folder.glob('*.py') if not path.stem.startswith('_'))


def reference_pages() -> Iterator[tuple[str, str]]:
    """Name and text of each page: the package, each of its modules, each subpackage with its modules."""
    package = ROOT / PACKAGE
    yield PACKAGE, package_page(PACKAGE, package, [])
    for path in public_modules(package):
        if path.stem != 'version':
            yield (
                f'{PACKAGE}.{path.stem}',
                f'# {PACKAGE}.{path.stem}\n\n{directive(f"{PACKAGE}.{path.stem}")}',
            )
    for init in sorted(package.glob('*/__init__.py')):
        name = f'{PACKAGE}.{init.parent.name}'
        yield name, package_page(name, init.parent, public_modules(init.parent))


def directive(name: str, **options: Any) -> str:
    """A block that mkdocstrings replaces by the docstrings of a module."""
    options = dict(show_root_heading='false', show_root_toc_entry='false', **options)
    lines = ''.join(f'\n      {option}: {value}' for option, value in options.items())
    return f'::: {name}\n    options:{lines}'


def package_page(name: str, folder: Path, modules: list[Path]) -> str:
    """A package: its docstring, what it defines and exports, and its modules."""
    body = ast.parse((folder / '__init__.py').read_text(encoding='utf-8')).body
    defined = [node.name for node in body if isinstance(node, (ast.FunctionDef, ast.ClassDef))]
    parts = [f'# {name}', directive(name, members=json.dumps(defined) if defined else 'false')]
    exports = exported(body, name)
    if exports:
        parts.append('\n'.join(f'- [`{name}.{export}`][{target}]' for export, target in exports))
    for path in modules:
        parts += [f'## {name}.{path.stem}', directive(f'{name}.{path.stem}', heading_level=3)]
    return '\n\n'.join(parts)


def exported(body: list[ast.stmt], name: str) -> list[tuple[str, str]]:
    """Names that a package imports from its modules for its users, with the names of their definitions."""
    found = []
    for node in body:
        if isinstance(node, ast.ImportFrom) and node.level == 1 and node.module:
            found += [(a.name, f'{name}.{node.module}.{a.name}') for a in node.names if a.name[0] != '_']
    return sorted(found)


class MarkdownDocstrings(griffe.Extension):
    """Convert the reStructuredText in docstrings: roles, links, and ``::`` before a literal block."""

    def on_instance(self, *, obj: griffe.Object, **kwargs: Any) -> None:
        """Change the docstring of a module, class, function or attribute."""
        if not obj.is_alias and obj.docstring:
            text = obj.docstring.value
            text = re.sub(r':(?:class|func|meth|mod|attr|data|exc|obj):`~?([^`]+)`', r'`\1`', text)
            text = re.sub(r'`([^`<]+?)\s*<([^>`]+)>`_+', r'[\1](\2)', text)
            obj.docstring.value = re.sub(r'::\n(?=\n)', '\n', text)


# --- Notebook -------------------------------------------------------------------------------------


def notebook_page(text: str) -> str:
    """Markdown of a notebook, with its code and its outputs."""
    parts = []
    for cell in json.loads(text)['cells']:
        source = ''.join(cell['source'])
        parts.append(source if cell['cell_type'] == 'markdown' else f'```python\n{source}\n```')
        for output in cell.get('outputs', []):
            data = output.get('data', {})
            printed = ''.join(output.get('text', data.get('text/plain', ''))).rstrip()
            picture = next((kind for kind in ('image/png', 'image/jpeg') if kind in data), None)
            if picture:
                parts.append(f'![Output of the cell above](data:{picture};base64,{data[picture].strip()})')
            elif printed:
                parts.append(f'```text\n{printed}\n```')
    return '\n\n'.join(parts)
