"""Python environments of their own, for formats whose packages do not fit next to OpenMMLab's.

An environment is named by its Python: in the variable ``EMO2_MM_NAME_PYTHON``, else ``.venv-NAME/bin/python``
in the working directory. :mod:`emo2_mm.export.worker` converts and runs there.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import weakref
from contextlib import contextmanager
from functools import lru_cache, partial
from pathlib import Path
from tempfile import TemporaryFile
from typing import IO, Any, Iterator, Sequence

import numpy as np

from ..errors import UserError
from . import predict, worker

FIND = 'import sys, importlib.util as u; print(*[m for m in sys.argv[1:] if not u.find_spec(m)])'
LINES = 6  # of what a failed program has printed that are shown


def variable(name: str) -> str:
    """The environment variable that names the Python of a format."""
    return f'EMO2_MM_{name.upper()}_PYTHON'


def commands(name: str, packages: str) -> tuple[str, ...]:
    """Shell commands that make the environment of a format."""
    python = f'.venv-{name}/bin/python'
    return (
        f'python3 -m venv .venv-{name}',
        f'{python} -m pip install {packages}',
        f'export {variable(name)}=$PWD/{python}',
    )


def find_python(name: str) -> str | None:
    """The Python of the environment of a format, or None if there is none."""
    given = os.environ.get(variable(name))
    path = given or f'.venv-{name}/bin/python'
    if given and not os.access(given, os.X_OK):
        raise UserError(f'{variable(name)} is {given}: no such program; give the Python of the environment')
    return os.path.abspath(path) if os.access(path, os.X_OK) else None


@lru_cache(maxsize=None)
def missing_modules(python: str, modules: tuple[str, ...]) -> list[str]:
    """Those of ``modules`` that cannot be imported by another Python."""
    result = subprocess.run([python, '-I', '-c', FIND, *modules], capture_output=True, text=True)
    if result.returncode:
        raise UserError(f'{python}: not a Python that works ({last_lines(result.stderr)})')
    return result.stdout.split()


def last_lines(text: str) -> str:
    """The end of what a program has printed, in one line."""
    return ' '.join(' '.join(text.strip().splitlines()[-LINES:]).split())


def settings() -> dict[str, str]:
    """Environment variables of programs: the own ones, and those that keep libraries off the network."""
    return {**os.environ, 'HF_HUB_OFFLINE': '1', 'TOKENIZERS_PARALLELISM': 'false'}


def convert(python: str, job: dict[str, Any]) -> None:
    """Run :func:`emo2_mm.export.worker.convert` in an environment.

    Raises:
        UserError: If it fails; the message has the end of what it printed.
    """
    command = [python, '-I', worker.__file__, 'convert', json.dumps(job)]
    result = subprocess.run(command, capture_output=True, text=True, env=settings())
    if result.returncode:
        raise UserError(f'{job["format"]} cannot convert this model: {last_lines(result.stderr)}')


class Runtime:
    """A runtime of predict.py in another process, with that process's environment.

    Args:
        python: Of the environment.
        name: Key of ``predict.RUNTIMES``.
        folder: The bundle.
        entry: Of the model, in model.json.
        threads: For the runtime.

    Raises:
        UserError: If the model cannot be loaded, or later run.
    """

    def __init__(
        self, python: str, name: str, folder: Path, entry: dict[str, Any], threads: int | None
    ) -> None:
        self.name = name
        self.errors: IO[bytes] = TemporaryFile()  # noqa: SIM115 (it lives as long as the process)
        self.process = subprocess.Popen(
            [python, '-I', worker.__file__, 'run', predict.__file__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.errors,
            env=settings(),
        )
        weakref.finalize(self, end, self.process)
        self._ask(dict(runtime=name, folder=str(folder), entry=entry, threads=threads))

    def _ask(self, content: dict[str, Any], arrays: Sequence[np.ndarray] = ()) -> list[np.ndarray]:
        assert self.process.stdin and self.process.stdout
        try:
            worker.send(self.process.stdin, content, list(arrays))
            answer, found = worker.receive(self.process.stdout)
        except (EOFError, BrokenPipeError):
            self.process.wait()
            self.errors.seek(0)
            printed = last_lines(self.errors.read().decode(errors='replace'))
            code = self.process.returncode
            raise UserError(f'{self.name} ended with exit code {code}: {printed}') from None
        if 'error' in answer:
            raise UserError(answer['error'])
        return found

    def __call__(self, image: np.ndarray, names: Sequence[str]) -> list[np.ndarray]:
        return self._ask(dict(names=list(names)), [image])

    def repeat(self, names: Sequence[str]) -> None:
        """Run on the last image again, to be timed: no arrays go between the processes."""
        self._ask(dict(names=list(names)))


def end(process: subprocess.Popen[bytes]) -> None:
    """Let a worker end, and wait for it."""
    for stream in (process.stdin, process.stdout):
        assert stream
        stream.close()
    process.wait()


@contextmanager
def runtimes(pythons: dict[str, str]) -> Iterator[None]:
    """Let predict.py run models of formats with their Pythons, where those are not this one."""
    own = dict(predict.RUNTIMES)
    others = {name: python for name, python in pythons.items() if python != sys.executable}
    predict.RUNTIMES.update({name: partial(Runtime, python, name) for name, python in others.items()})
    try:
        yield
    finally:
        predict.RUNTIMES.clear()
        predict.RUNTIMES.update(own)
