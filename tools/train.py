"""Train what a config describes, be it for MMPretrain, MMDetection or MMSegmentation.

    python tools/train.py configs/det/retinanet_emo2_5m.py

The config's ``default_scope`` tells the three apart.
"""

from __future__ import annotations

import argparse
import errno
import math
import os
from contextlib import contextmanager
from typing import Any, Iterator

import faulty_data
import own_data
import runtime
import torch
from mmengine.config import Config
from mmengine.device import get_device
from mmengine.hooks import Hook
from mmengine.optim import OptimWrapper
from mmengine.registry import OPTIM_WRAPPERS
from mmengine.runner import Runner, autocast

FULL = (errno.ENOSPC, errno.EDQUOT)
DENIED = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOENT, errno.ENOTDIR, errno.EEXIST)


@OPTIM_WRAPPERS.register_module(force=True)
class Bfloat16OptimWrapper(OptimWrapper):
    """Mixed precision without a GPU, where AmpOptimWrapper refuses to work.

    Bfloat16 has the range of float32, so that no loss scale is needed.
    """

    @contextmanager
    def optim_context(self, model: torch.nn.Module) -> Iterator[None]:
        """Compute what autocast lists in bfloat16; weights and their gradients stay float32."""
        with super().optim_context(model), autocast(dtype=torch.bfloat16):
            yield


class StopAtInvalidLossHook(Hook):
    """End the run at the first loss that is not finite, before that step is averaged or saved."""

    priority = 'VERY_HIGH'

    def after_train_iter(
        self, runner: Runner, batch_idx: int, data_batch: Any = None, outputs: dict[str, Any] | None = None
    ) -> None:
        for name, value in (outputs or {}).items():
            if 'loss' in name and not math.isfinite(value):
                # whichever process it is: the others' losses may be finite still
                raise SystemExit(
                    f'error: step {runner.iter + 1}: {name} is {float(value)}. The checkpoints before it are '
                    'good: lower the learning rate, or clip gradients (optim_wrapper.clip_grad), and --resume'
                )


def parse_args() -> argparse.Namespace:
    parser = runtime.new_parser('Train what a config describes.')
    parser.add_argument(
        '--resume',
        nargs='?',
        const='auto',
        metavar='CHECKPOINT',
        help='go on from this checkpoint; without a name, from the latest in the work dir, if any',
    )
    parser.add_argument(
        '--auto-scale-lr',
        action='store_true',
        help='scale the learning rate from auto_scale_lr.base_batch_size to the actual batch size',
    )
    parser.add_argument('--no-validate', action='store_true', help='do not evaluate while training')
    return parser.parse_args()


def apply_args(cfg: Config, args: argparse.Namespace) -> None:
    """Put the arguments that training has to itself into the config."""
    if args.no_validate:
        cfg.val_cfg = cfg.val_dataloader = cfg.val_evaluator = None

    on_cpu = get_device() == 'cpu'
    kind = cfg.optim_wrapper.get('type', 'OptimWrapper')
    if args.amp:
        if kind not in ('OptimWrapper', 'AmpOptimWrapper', 'Bfloat16OptimWrapper'):
            runtime.fail(f'--amp goes with optim_wrapper.type OptimWrapper, which here is {kind!r}')
        if on_cpu and cfg.model.get('rpn_head'):
            runtime.fail(f'--amp: {runtime.NO_BFLOAT16_NMS}')
        cfg.optim_wrapper.type = 'Bfloat16OptimWrapper' if on_cpu else 'AmpOptimWrapper'
    elif on_cpu and kind == 'AmpOptimWrapper':
        runtime.note('No GPU: training in full precision, not in the mixed one of the config.')
        cfg.optim_wrapper.type = 'OptimWrapper'
    if on_cpu and (args.amp or kind == 'AmpOptimWrapper'):
        for name in ('loss_scale', 'dtype', 'use_fsdp'):
            cfg.optim_wrapper.pop(name, None)

    if args.auto_scale_lr:
        if 'base_batch_size' not in cfg.get('auto_scale_lr', {}):
            runtime.fail(
                '--auto-scale-lr needs the batch size that the learning rate is meant for: '
                'give --cfg-options auto_scale_lr.base_batch_size=N'
            )
        cfg.auto_scale_lr.enable = True

    if args.resume is not None:
        cfg.resume = True
        cfg.load_from = None if args.resume == 'auto' else args.resume


def main() -> None:
    args = parse_args()
    cfg = runtime.load_config(args)
    own_data.complete(cfg)
    apply_args(cfg, args)
    runtime.check_data(cfg, 'train', 'val')
    runtime.check_checkpoint(cfg.get('load_from'), '--resume' if args.resume else 'load_from')
    runtime.find_resumable(cfg)
    runtime.check_pretrained(cfg)
    try:
        runner = runtime.build_runner(cfg)
        runner.register_hook(StopAtInvalidLossHook())  # not by the config, which others read, too
        faulty_data.name_faults(runner)
        with faulty_data.telling_what_is_left_out(cfg.get('default_scope')):
            runner.train()
    except OSError as error:
        paths = [os.path.abspath(path) for path in (error.filename, cfg.work_dir) if path]
        denied = error.errno in DENIED and os.path.commonpath(paths) in paths  # one in the other
        if error.errno not in FULL and not (denied and error.filename):
            raise
        runtime.fail(
            f'cannot write to {error.filename or cfg.work_dir}: {error.strerror}. What was saved '
            'before stays; once this is mended, the same command with --resume goes on from there'
        )


if __name__ == '__main__':
    main()
