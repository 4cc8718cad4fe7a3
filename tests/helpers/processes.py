"""Help with processes that tests start."""

from __future__ import annotations

import socket

from .tiny import run


def free_port():
    with socket.socket() as s:
        s.bind(('127.0.0.1', 0))
        return str(s.getsockname()[1])


def arguments_given(folder, program, *command, **env):
    """What a script passes to the program it starts, one argument a line."""
    fake = folder / program
    fake.write_text('#!/bin/sh\nprintf "%s\\n" "$@"\n')
    fake.chmod(0o755)
    result = run(folder, *command, **env)
    assert result.returncode == 0, result.stderr
    return result.stdout.split('\n')[:-1]
