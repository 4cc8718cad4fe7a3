"""Find and read the files of a dataset, whatever wrote them."""

from __future__ import annotations

import json
from collections import defaultdict
from pathlib import Path
from typing import Any, Iterator

from ...errors import UserError
from ..files import IMAGE_SUFFIXES, decode, list_files
from .records import Report

SPLIT_NAMES = {
    'train': ('train', 'training', 'train2017', 'train2014'),
    'val': ('val', 'valid', 'validation', 'val2017', 'val2014', 'dev'),
    'test': ('test', 'testing', 'test2017', 'test2014'),
}


def files_in(folder: Path, *suffixes: str) -> list[Path]:
    """Files with one of the suffixes (lower case) at any depth, sorted; none that are hidden."""
    return [folder / name for name in list_files(folder, suffixes).images]


def read_text(path: Path, report: Report | None = None) -> str:
    """Read a text in UTF-8 or as its byte order mark says, else as GB 18030 or Latin-1, which is reported."""
    data = path.read_bytes()
    try:
        return decode(data, path)[0]
    except UserError:
        pass
    for encoding in ('gb18030', 'latin-1'):
        try:
            text = data.decode(encoding)
        except UnicodeDecodeError:
            continue
        if report is not None:
            report.add(f'file is not in UTF-8: read as {encoding}', path)
        return text
    raise AssertionError('Latin-1 decodes everything')


def read_json(path: Path, report: Report | None = None) -> Any:
    """Read a JSON file in any of these encodings.

    Raises:
        UserError: If it is not JSON.
    """
    try:
        return json.loads(read_text(path, report))
    except (ValueError, RecursionError) as error:
        raise UserError(f'{path} is not JSON: {error}') from None


def split_of(path: Path | str) -> str | None:
    """The split that a path names: its folders from the last to the first, then words in its name."""
    parts = str(path).replace('\\', '/').lower().split('/')
    words = parts[-1].rsplit('.', 1)[0].replace('-', '_').replace('.', '_').split('_')
    for part in [*parts[-2::-1], *words]:
        for split, names in SPLIT_NAMES.items():
            if part in names:
                return split
    return None


class ImageIndex:
    """The images in a folder, to be found by the names that annotation files give them."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.by_name: dict[str, list[Path]] = defaultdict(list)
        self.by_stem: dict[str, list[Path]] = defaultdict(list)
        for path in files_in(root, *IMAGE_SUFFIXES):
            self.by_name[path.name.lower()].append(path)
            self.by_stem[path.stem.lower()].append(path)

    def find(self, name: str, near: Path, split: str | None = None) -> Path | None:
        """Find an image.

        Args:
            name: Its name, perhaps with folders, perhaps of another machine.
            near: Folder of the file that names it.
            split: Of several images with that name, the one of this split.
        """
        name = name.replace('\\', '/')
        places = [near / name, self.root / name, near / 'images' / name, self.root / 'images' / name]
        for place in [] if name.startswith('/') else places:
            if place.is_file() and place.suffix.lower() in IMAGE_SUFFIXES:
                return place
        last = name.rsplit('/', 1)[-1].lower()
        found = self.by_name.get(last) or self.by_stem.get(last.rsplit('.', 1)[0]) or []
        tail = name.lower().split('/')
        if not found:
            return None
        best: Path = max(found, key=lambda path: self._closeness(path, tail, near, split))
        return best

    def _closeness(self, path: Path, tail: list[str], near: Path, split: str | None) -> tuple:
        parts = [part.lower() for part in path.relative_to(self.root).parts]
        same = sum(1 for a, b in zip(reversed(parts), reversed(tail)) if a == b)
        return (
            split is not None and split_of(path.relative_to(self.root)) == split,
            same,
            near in path.parents,
        )


def images_of_splits(root: Path) -> Iterator[tuple[Path, str | None]]:
    """All images in a folder, each with the split that its path names."""
    for path in files_in(root, *IMAGE_SUFFIXES):
        yield path, split_of(path.relative_to(root).parent / 'x')
