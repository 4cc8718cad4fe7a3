"""Errors that a tool reports as one message, without a traceback."""

from __future__ import annotations

import io
import os
import sys
import time
from contextlib import contextmanager
from typing import Iterator


class UserError(ValueError):
    """Input that cannot be used. The message names the thing, its value and the remedy."""


class InvalidLossError(UserError):
    """A loss that is not finite. Unlike other errors, it may occur in one process of several."""


def local_rank() -> int:
    """Rank of this process on its machine; 0 without a launcher."""
    return int(os.environ.get('LOCAL_RANK', 0))


def printable(text: str | os.PathLike) -> str:
    """The text with bytes that are not UTF-8, as file names from other systems may hold, as escapes."""
    return os.fspath(text).encode('utf-8', 'backslashreplace').decode()


def note(message: str) -> None:
    """Print a line, from the first process of each machine."""
    if local_rank() == 0:
        print(printable(message), flush=True)


def print_any_name() -> None:
    """Let this program print names that its terminal cannot show, with escapes in their place."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors='backslashreplace')


@contextmanager
def reported() -> Iterator[None]:
    """Exit with code 1 and ``error: MESSAGE`` when a :class:`UserError` is raised inside.

    All processes of a launcher meet the same error; the first one of a machine prints it.

    Raises:
        SystemExit: In place of the ``UserError``.
    """
    print_any_name()
    try:
        yield
    except InvalidLossError as error:
        raise SystemExit(printable(f'error: {error}')) from None
    except UserError as error:
        if local_rank() != 0:
            # A launcher ends all processes once one has exited: let the first be the one that prints.
            time.sleep(10)
            raise SystemExit(1) from None
        raise SystemExit(printable(f'error: {error}')) from None
