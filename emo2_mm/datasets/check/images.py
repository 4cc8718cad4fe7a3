"""Decode image files as training does, and say what is wrong with them."""

from __future__ import annotations

import io
import os
import sys
from multiprocessing.pool import ThreadPool
from pathlib import Path
from typing import Any, Callable, Iterator, NamedTuple

import cv2
import mmcv
import numpy as np
from PIL import Image, UnidentifiedImageError
from rich.progress import track

from ..files import ORIENTATION


class Picture(NamedTuple):
    """Codes of what is wrong with an image, and its width and height as loaded."""

    codes: list[str]
    size: tuple[int, int] | None = None


def read_all(read: Callable[[Any], Any], items: list, title: str) -> Iterator[tuple[Any, Any]]:
    """Pair each item with what is read of it, in threads and with a progress bar."""
    with ThreadPool(min(16, os.cpu_count() or 1)) as pool:
        pairs = zip(items, pool.imap(read, items, chunksize=8))
        yield from track(pairs, title, total=len(items), disable=not sys.stdout.isatty())


def read_image(path: str, flag: str = 'color') -> Picture:
    """Decode an image as LoadImageFromFile does, and with Pillow, which tells if a JPEG is truncated."""
    try:
        data = Path(path).read_bytes()
    except OSError:
        return Picture(['IMG001'])
    if not data:
        return Picture(['IMG002'])
    try:
        pixels = mmcv.imfrombytes(data, flag=flag)
    except cv2.error:  # too large for OpenCV, for instance
        pixels = None
    if pixels is None:
        return Picture(['IMG003' if cv2.haveImageReader(path) else 'IMG004'])

    height, width = pixels.shape[:2]
    codes = ['IMG014'] if min(width, height) == 1 else []
    try:
        with Image.open(io.BytesIO(data)) as image:
            if image.getexif().get(ORIENTATION, 1) != 1:
                codes.append('IMG018')
            image.load()
            if image.mode in ('1', 'L', 'LA', 'I', 'F') or image.mode.startswith('I;16'):
                codes.append('IMG011')
            if image.mode in ('LA', 'PA', 'RGBA') or 'transparency' in image.info:
                codes.append('IMG012')
            if image.format != 'JPEG' and mmcv.imfrombytes(data, flag='unchanged').dtype != np.uint8:
                codes.append('IMG013')
    except (UnidentifiedImageError, Image.DecompressionBombError):
        pass  # not for Pillow, while OpenCV has read it
    except Exception:  # of many kinds, depending on the format
        codes.append('IMG005')
    return Picture(codes, (width, height))
