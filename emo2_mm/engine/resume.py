"""Find the checkpoint that a run resumes from, and read checkpoints as data."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from mmengine.config import Config
from mmengine.hooks import Hook
from mmengine.logging import print_log
from mmengine.model import is_model_wrapper
from mmengine.runner import CheckpointLoader, EpochBasedTrainLoop, Runner

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
    names = [(file, re.fullmatch(r'(epoch|iter)_(\d+)\.pth', file.name)) for file in folder.glob('*.pth')]
    numbers = {file: int(name[2]) for file, name in names if name}
    saved = sorted(numbers, key=numbers.__getitem__, reverse=True)
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


class ContinueHook(Hook):
    """Say what of a checkpoint cannot be used, and resume with the schedule of the config.

    MMEngine restores the schedule in a checkpoint, so that added epochs would run at its last rate. Where the
    config's schedule is another one - another length, batch size, number of processes or rate - this one is
    advanced to the step that is resumed from instead.
    """

    priority = 'VERY_HIGH'

    def before_run(self, runner: Runner) -> None:
        """Remember the schedule and the settings of the optimizer before a checkpoint is loaded."""
        if not hasattr(runner, '_train_loop') or runner.optim_wrapper is None:
            return
        self.plan = [_plan_of(scheduler) for scheduler in _schedulers(runner)]
        self.groups = [_settings(group) for group in _groups(runner)]

    def after_load_checkpoint(self, runner: Runner, checkpoint: dict) -> None:
        """Compare the weights in a checkpoint with the model, and drop those of another shape.

        Raises:
            UserError: If none fits, or a run would resume with other layers.
        """
        model = runner.model.module if is_model_wrapper(runner.model) else runner.model
        weights = checkpoint.get('state_dict', checkpoint)
        own = {name: value.shape for name, value in model.state_dict().items()}
        found = {re.sub('^module\\.', '', name): name for name in weights}
        shared = own.keys() & found.keys()
        other = sorted(n for n in shared if getattr(weights[found[n]], 'shape', None) != own[n])
        lacking = sorted(name for name in own.keys() - shared if 'num_batches' not in name)
        name = runner._load_from
        if len(other) == len(shared):
            raise UserError(
                f'load_from: {name} has none of the {len(own)} weights of the model; it has '
                f'{", ".join(list(found)[:3])}. Weights of a backbone alone go to '
                'model.backbone.init_cfg.checkpoint, or to pretrained in a custom config'
            )
        if not other and not lacking:
            return
        layers = ', '.join(dict.fromkeys(x.rsplit('.', 1)[0] for x in [*other, *lacking]))
        if runner._resume:
            raise UserError(
                f'--resume: {name} is of a model with other layers or classes: {layers}. To start from its '
                f'weights: --cfg-options load_from={name}'
            )
        for key in other:
            del weights[found[key]]
        print_log(
            f'load_from: {name} lacks {len(lacking)} of the {len(own)} weights of the model, and '
            f'{len(other)} have another shape, as with other classes: these layers are new: {layers}',
            'current',
        )

    def before_train(self, runner: Runner) -> None:
        """After a checkpoint is resumed: restore the settings of the config, and advance its schedule."""
        if not runner._resume or not runner._has_loaded or not hasattr(self, 'plan'):
            return
        loop = runner.train_loop
        by_epoch = isinstance(loop, EpochBasedTrainLoop)
        done, end = (loop.epoch, loop.max_epochs) if by_epoch else (loop.iter, loop.max_iters)
        unit = 'epochs' if by_epoch else 'steps'
        if done >= end:
            print_log(
                f'--resume: the checkpoint has {done} of {end} {unit}: nothing is left to train',
                'current',
            )
        changed = []
        for group, settings in zip(_groups(runner), self.groups):
            for key, value in settings.items():
                if (
                    key not in ('lr', 'initial_lr')
                    and group.get(key) != value
                    and key not in _scheduled(runner)
                ):
                    changed.append(f'{key} {group.get(key)} -> {value}')
                    group[key] = value
        if changed:
            names = ', '.join(dict.fromkeys(changed))
            print_log(f'--resume: the optimizer takes the settings of the config: {names}', 'current')
        if by_epoch and loop._iter != done * len(loop.dataloader):
            loop._iter = done * len(loop.dataloader)
        if self.plan == [_plan_of(scheduler) for scheduler in _schedulers(runner)]:
            return
        for group, settings in zip(_groups(runner), self.groups):
            for name in {scheduler.param_name for scheduler in _schedulers(runner)}:
                initial = f'initial_{name}'
                group.update({key: settings[initial] for key in (name, initial) if initial in settings})
        # Built again, these start at step 0. They change the rate in turns, so all take each step together.
        runner.param_schedulers = runner.build_param_scheduler(runner.cfg.param_scheduler)
        for step in range(1, loop.iter + 1):
            for scheduler in _schedulers(runner):
                if not scheduler.by_epoch or (by_epoch and step % len(loop.dataloader) == 0):
                    scheduler.step()
        print_log(
            '--resume: the checkpoint has another schedule (length, batch size, processes or learning rate); '
            f'training goes on after {done} of {end} {unit} with the learning rates of the config',
            'current',
        )


def _schedulers(runner: Runner) -> list[Any]:
    found = runner.param_schedulers or []
    return [x for part in found.values() for x in part] if isinstance(found, dict) else list(found)


def _groups(runner: Runner) -> list[dict]:
    return runner.optim_wrapper.param_groups if hasattr(runner.optim_wrapper, 'param_groups') else []


def _settings(group: dict) -> dict[str, Any]:
    return {key: value for key, value in group.items() if key != 'params'}


def _scheduled(runner: Runner) -> set[str]:
    """What schedulers change: momentum is among the betas of Adam."""
    names = {scheduler.param_name for scheduler in _schedulers(runner)}
    return {*names, *(f'initial_{name}' for name in names), *(['betas'] if 'momentum' in names else [])}


def _plan_of(scheduler: Any) -> dict[str, Any]:
    """What a scheduler does, without how far it has come."""
    moving = ('last_step', '_global_step', '_last_value', 'optimizer', 'verbose', 'step')
    plan = {key: value for key, value in scheduler.__dict__.items() if key not in moving}
    return {'type': type(scheduler).__name__, **plan}
