"""Train what a config describes, with MMPretrain, MMDetection or MMSegmentation."""

from __future__ import annotations

import errno
import os
from contextlib import contextmanager
from typing import Iterator

from mmengine.config import Config
from mmengine.device import get_device

from ..datasets.context import report_failing_files, use_own_datasets
from ..datasets.custom import apply_custom_dataset
from ..errors import UserError, note
from .hooks import CheckInvalidLossHook
from .preflight import check_checkpoint, check_data, check_pretrained, check_save_best
from .resume import ContinueHook, find_resumable, install_safe_loader
from .runner import NO_BFLOAT16_NMS, build_runner

BFLOAT16 = 'emo2_mm.engine.optim_wrapper.BFloat16OptimWrapper'
FULL = (errno.ENOSPC, errno.EDQUOT)
DENIED = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOENT, errno.ENOTDIR, errno.EEXIST)


def train(
    cfg: Config,
    amp: bool = False,
    auto_scale_lr: bool = False,
    validate: bool = True,
    resume: str | None = None,
) -> None:
    """Train a model.

    Args:
        cfg: Config as :func:`~emo2_mm.engine.config.load_config` returns it; it is changed.
        amp: Train in mixed precision: float16 on a GPU, bfloat16 on a CPU.
        auto_scale_lr: Scale the learning rate from ``auto_scale_lr.base_batch_size`` to the batch size.
        validate: Evaluate during training.
        resume: Checkpoint to resume from; ``'auto'``: the last intact one in the work dir, if any.

    Raises:
        UserError: If an option or a file that the config names cannot be used, or the disk is full.
    """
    install_safe_loader()
    if not validate:
        cfg.val_cfg = None
    apply_custom_dataset(cfg)
    apply_options(cfg, amp, auto_scale_lr, validate, resume)
    use_own_datasets(cfg)
    check_data(cfg, 'train', 'val')
    if cfg.get('load_from') and '://' not in cfg.load_from:
        cfg.load_from = os.path.expanduser(cfg.load_from)
    check_checkpoint(cfg.get('load_from'), '--resume' if resume else 'load_from')
    find_resumable(cfg)
    check_pretrained(cfg)
    check_save_best(cfg)
    try:
        runner = build_runner(cfg)
        runner.register_hook(CheckInvalidLossHook())  # not through the config, which other programs read
        runner.register_hook(ContinueHook())
        report_failing_files(runner)
        with explained_batch_norm(cfg):
            runner.train()
    except OSError as error:
        paths = [os.path.abspath(path) for path in (error.filename, cfg.work_dir) if path]
        denied = error.errno in DENIED and os.path.commonpath(paths) in paths  # one contains the other
        if error.errno not in FULL and not (denied and error.filename):
            raise
        raise UserError(
            f'cannot write to {error.filename or cfg.work_dir}: {error.strerror}. What was saved '
            'before is kept: fix it and rerun with --resume'
        ) from error


@contextmanager
def explained_batch_norm(cfg: Config) -> Iterator[None]:
    """Explain torch's error about a batch norm that gets a single value per channel.

    Raises:
        UserError: In its place; it names the batch size.
    """
    try:
        yield
    except ValueError as error:
        if 'more than 1 value per channel' not in str(error):
            raise
        size = cfg.train_dataloader.batch_size
        remedy = (
            'give 2 or more images a batch' if size == 1 else 'drop_last=True drops a last one of 1 image'
        )
        raise UserError(
            'a batch norm cannot train on one value per channel, which a batch of one image has where maps '
            f'are 1 x 1 pixels; train_dataloader.batch_size is {size}: {remedy}'
        ) from error


def apply_options(cfg: Config, amp: bool, auto_scale_lr: bool, validate: bool, resume: str | None) -> None:
    """Write the arguments of :func:`train` into the config."""
    if not validate:
        cfg.val_cfg = cfg.val_dataloader = cfg.val_evaluator = None
        if cfg.get('test_cfg') is None:
            cfg.test_dataloader = cfg.test_evaluator = None

    on_cpu = get_device() == 'cpu'
    kind = cfg.optim_wrapper.get('type', 'OptimWrapper')
    if amp:
        if kind not in ('OptimWrapper', 'AmpOptimWrapper', BFLOAT16):
            raise UserError(f'--amp requires optim_wrapper.type OptimWrapper, got {kind!r}')
        if on_cpu and cfg.model.get('rpn_head'):
            raise UserError(f'--amp: {NO_BFLOAT16_NMS}')
        cfg.optim_wrapper.type = BFLOAT16 if on_cpu else 'AmpOptimWrapper'
    elif on_cpu and kind == 'AmpOptimWrapper':
        note('No GPU: training in full precision; the mixed precision of the config is off.')
        cfg.optim_wrapper.type = 'OptimWrapper'
    if on_cpu and (amp or kind == 'AmpOptimWrapper'):
        for name in ('loss_scale', 'dtype', 'use_fsdp'):
            cfg.optim_wrapper.pop(name, None)

    if auto_scale_lr:
        if 'base_batch_size' not in cfg.get('auto_scale_lr', {}):
            raise UserError(
                '--auto-scale-lr needs the batch size that the learning rate was tuned for: '
                'give --cfg-options auto_scale_lr.base_batch_size=N'
            )
        cfg.auto_scale_lr.enable = True

    if resume is not None:
        cfg.resume = True
        cfg.load_from = None if resume == 'auto' else resume
