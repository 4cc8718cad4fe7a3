"""Find and read the files of a dataset: one list of image suffixes, one walker, one reader of text."""

from __future__ import annotations

import codecs
import os
from collections import Counter
from pathlib import Path
from typing import IO, NamedTuple

from PIL import Image

from ..errors import UserError, printable

# What OpenCV, which loads images, reads in any build of it
IMAGE_SUFFIXES = (
    *('.jpg', '.jpeg', '.jpe', '.jfif', '.png', '.bmp', '.tif', '.tiff', '.webp'),
    *('.ppm', '.pgm', '.pbm', '.pnm', '.jp2'),
)
NO_DATA = ('thumbs.db', 'ehthumbs.db', 'desktop.ini', 'icon\r', '__macosx', '@eadir', '$recycle.bin')
MARKS = {  # the longer first: UTF-32's begins with UTF-16's
    codecs.BOM_UTF32_LE: 'utf-32',
    codecs.BOM_UTF32_BE: 'utf-32',
    codecs.BOM_UTF8: 'utf-8-sig',
    codecs.BOM_UTF16_LE: 'utf-16',
    codecs.BOM_UTF16_BE: 'utf-16',
}
ORIENTATION = 0x0112  # EXIF tag


def decode(data: bytes, file: str | os.PathLike[str]) -> tuple[str, str]:
    """Decode a text file: UTF-8, or as its byte order mark says.

    Returns:
        The text, and the name of the encoding.

    Raises:
        UserError: If it is neither.
    """
    encoding = next((name for mark, name in MARKS.items() if data.startswith(mark)), 'utf-8')
    try:
        return data.decode(encoding), encoding
    except UnicodeDecodeError as error:
        raise UserError(
            f'{file} cannot be read as {encoding.upper()} (byte {error.start}: {error.reason}): '
            'save it with the encoding UTF-8'
        ) from None


def is_hidden(name: str) -> bool:
    """Whether a file or folder holds no data: hidden, or left by an operating system."""
    return name.startswith('.') or name.lower() in NO_DATA


def subfolders(folder: str | os.PathLike[str]) -> list[str]:
    """Names of the folders in a folder, sorted, without hidden ones."""
    with os.scandir(folder) as entries:
        return sorted(entry.name for entry in entries if entry.is_dir() and not is_hidden(entry.name))


class Listing(NamedTuple):
    """Files in a folder and the folders in it.

    Attributes:
        images: Paths relative to the folder, with ``/``, sorted.
        others: Suffix in lower case -> files that are no images.
    """

    images: list[str]
    others: Counter


def in_words(others: Counter) -> str:
    """Numbers of files by suffix, in words."""
    return ', '.join(f'{count} x {name or "no suffix"}' for name, count in sorted(others.items()))


def list_files(folder: str | os.PathLike[str], suffixes: tuple[str, ...] = IMAGE_SUFFIXES) -> Listing:
    """List the images in a folder and all folders in it, also linked ones; suffixes in any case."""
    images: list[str] = []
    others: Counter = Counter()
    seen: set[str] = set()
    for top, folders, names in os.walk(folder, followlinks=True):
        real = os.path.realpath(top)
        folders[:] = [] if real in seen else sorted(name for name in folders if not is_hidden(name))
        if real in seen:  # a link to a folder above
            continue
        seen.add(real)
        for name in names:
            if is_hidden(name):
                continue
            suffix = os.path.splitext(name)[1].lower()
            if suffix in suffixes:
                images.append(os.path.relpath(os.path.join(top, name), folder).replace(os.sep, '/'))
            else:
                others[suffix] += 1
    return Listing(sorted(images), others)


def describe(folder: Path, limit: int = 12) -> str:
    """What is in a folder, in words."""
    try:
        names = sorted(f'{path.name}/' if path.is_dir() else path.name for path in folder.iterdir())
    except OSError as error:
        return f'{folder} cannot be listed: {error.strerror}'
    shown = ', '.join(names[:limit]) + (f' and {len(names) - limit} more' if len(names) > limit else '')
    return printable(f'{folder} holds {shown}' if names else f'{folder} is empty')


class Header(NamedTuple):
    """Width and height of an image as stored and as displayed, and its EXIF orientation (1: upright)."""

    stored: tuple[int, int]
    displayed: tuple[int, int]
    orientation: int


def read_header(path: str | os.PathLike | IO[bytes]) -> Header | None:
    """Read the size of an image; None if it cannot be read, which loading it will report."""
    try:
        with Image.open(path) as image:
            size, orientation = image.size, image.getexif().get(ORIENTATION, 1)
    except Exception:  # of many kinds, depending on the format
        return None
    return Header(size, size[::-1] if orientation in (5, 6, 7, 8) else size, orientation)
