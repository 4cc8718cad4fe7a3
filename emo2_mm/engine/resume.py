"""Find the checkpoint that a run resumes from, and read checkpoints as data."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from mmengine.config import Config
from mmengine.runner import CheckpointLoader

from ..errors import UserError, note
from ..weights.read import read_checkpoint

SCHEMES = ('', 'http://', 'https://', r'(\S+\:)?s3://', r'(\S+\:)?petrel://')


def install_safe_loader() -> None:
    """Let MMEngine read every checkpoint with :func:`load_checkpoint_safely` from now on."""
    CheckpointLoader.register_scheme(SCHEMES, loader=load_checkpoint_safely, force=True)


def load_checkpoint_safely(filename: str, map_location: Any = None) -> Any:
    """Read a file for ``load_from``, ``resume`` and ``Pretrained`` as data: no code of it runs.

    The log's running means are dropped, so they start again in a resumed run, and so is the text of the
    config, which MMEngine would execute.

    Args:
        filename: Local path or ``http(s)://`` address.
        map_location: Accepted for MMEngine and not used: tensors are on the CPU.

    Raises:
        UserError: If the file does not exist or cannot be read safely.
    """
    try:
        content = read_checkpoint(filename)
    except (ImportError, OSError, ValueError) as error:
        raise UserError(str(error)) from None
    if isinstance(content, dict):
        for name in ('config', 'cfg'):
            if isinstance(content.get('meta'), dict):
                content['meta'].pop(name, None)
        if isinstance(content.get('message_hub'), dict):
            content['message_hub']['log_scalars'] = {}
    return content


def find_resumable(cfg: Config) -> None:
    """Set ``cfg.load_from`` to the last intact checkpoint if a run resumes without naming a file.

    The last file may be truncated by what ended the run. Then it is reported, and the one before is used.

    Raises:
        UserError: If the named file holds no training state, or no checkpoint in the work dir is intact.
    """
    if not cfg.get('resume'):
        return
    if cfg.get('load_from'):
        content = load_checkpoint_safely(cfg.load_from)
        if not isinstance(content, dict) or not {'meta', 'optimizer'} <= set(content):
            raise UserError(
                f'--resume: {cfg.load_from} contains weights but no optimizer state; '
                f'to start from these weights: --cfg-options load_from={cfg.load_from}'
            )
        return
    pointer = Path(cfg.work_dir, 'last_checkpoint')
    last = Path(pointer.read_text().strip()) if pointer.is_file() else pointer
    folder = last.parent if last.is_file() else Path(cfg.work_dir)  # out_dir of CheckpointHook may differ
    names = {file: re.fullmatch(r'(epoch|iter)_(\d+)\.pth', file.name) for file in folder.glob('*.pth')}
    saved = [file for file, name in names.items() if name]
    saved.sort(key=lambda file: int(names[file][2]), reverse=True)
    if last.is_file():  # a higher number belongs to an earlier run
        saved = saved[saved.index(last) :] if last in saved else [last]
    for file in saved:
        try:
            read_checkpoint(file)
        except (OSError, ValueError) as error:
            note(f'Not resumed from a damaged checkpoint: {error}')
        else:
            cfg.load_from = str(file)
            return
    if saved:
        raise UserError(
            f'--resume: none of the {len(saved)} checkpoints in {folder} is intact; '
            'move them away to start again'
        )
    note(f'{folder} has no checkpoint to resume from: training starts from the beginning.')
    cfg.resume = False
