"""Evaluate a checkpoint, with MMPretrain, MMDetection or MMSegmentation."""

from __future__ import annotations

import os
from copy import deepcopy
from typing import Any

from mmengine.config import Config, ConfigDict
from mmengine.device import get_device
from mmengine.evaluator import DumpResults
from mmengine.runner import Runner

from ..config import innermost_dataset
from ..datasets.context import report_failing_files, use_own_datasets
from ..datasets.custom import apply_custom_dataset
from ..errors import UserError
from .hooks import SwitchToDeployHook
from .preflight import check_checkpoint, check_data
from .resume import install_safe_loader
from .runner import NO_BFLOAT16_NMS, build_runner


def test(
    cfg: Config,
    checkpoint: str,
    amp: bool = False,
    out: str | None = None,
    show: bool = False,
    show_dir: str | None = None,
    wait_time: float = 2.0,
    tta: bool = False,
    deploy: bool = False,
) -> None:
    """Evaluate a checkpoint on the test split.

    Args:
        cfg: Config as :func:`~emo2_mm.engine.config.load_config` returns it; it is changed.
        checkpoint: Checkpoint file of the config's model.
        amp: Compute in mixed precision.
        out: Where to save the predictions: a ``.pkl`` file, or for segmentation a folder of label maps.
        show: Show the predictions in a window.
        show_dir: Folder for visualized predictions.
        wait_time: Seconds for which ``show`` shows an image.
        tta: Use test-time augmentation.
        deploy: Fold batch norms first.

    Raises:
        UserError: If an argument or a file that the config names cannot be used.
    """
    install_safe_loader()
    apply_custom_dataset(cfg)
    use_own_datasets(cfg)
    segments = cfg.get('default_scope') == 'mmseg'
    if out and not segments and not out.endswith(('.pkl', '.pickle')):
        raise UserError(f'--out is {out}; give a name that ends in .pkl')
    check_data(cfg, 'test')
    check_checkpoint(checkpoint, 'the checkpoint')

    cfg.load_from, cfg.resume = checkpoint, False
    if amp:
        if cfg.get('default_scope') == 'mmdet' and get_device() == 'cpu':
            raise UserError(f'--amp: {NO_BFLOAT16_NMS}')
        cfg.test_cfg.fp16 = True
    if show or show_dir:
        enable_visualization(cfg, show, show_dir, wait_time, tta)
    if tta:
        enable_tta(cfg)
    if out and segments:
        metrics = cfg.test_evaluator
        for metric in metrics if isinstance(metrics, list) else [metrics]:
            metric.update(output_dir=out, keep_results=True)

    runner = build_runner(cfg)
    report_failing_files(runner)  # before the first use of the evaluator, which builds the dataset
    if deploy:
        runner.register_hook(SwitchToDeployHook())
    if out and not segments:
        keep_predictions(runner, cfg.get('default_scope'), out)
    runner.test()


def enable_visualization(cfg: Config, show: bool, show_dir: str | None, wait_time: float, tta: bool) -> None:
    """Turn on the visualization hook, whose arguments have different names in each library."""
    hook = cfg.get('default_hooks', {}).get('visualization')
    if hook is None:
        raise UserError(
            '--show and --show-dir need a visualization hook: add visualization='
            "dict(type='DetVisualizationHook') (VisualizationHook in MMPretrain, "
            'SegVisualizationHook in MMSegmentation) to default_hooks of the config'
        )
    classifies = cfg.default_scope == 'mmpretrain'
    if classifies and tta:
        raise UserError("MMPretrain's hook cannot draw augmented images; leave out --tta or --show")
    hook.update({'enable' if classifies else 'draw': True})
    hook.update(show=show, wait_time=wait_time)
    if classifies:
        hook.update(out_dir=show_dir, interval=1)
    elif show_dir and cfg.default_scope == 'mmseg':
        cfg.visualizer.save_dir = show_dir
    elif show_dir:
        hook.test_out_dir = os.path.abspath(show_dir)  # a relative path would start at the work dir


def enable_tta(cfg: Config) -> None:
    """Wrap the model for test-time augmentation: that of the config, else horizontal flipping."""
    dataset = innermost_dataset(cfg.test_dataloader.dataset)
    pack = dict(dataset.pipeline[-1])
    if cfg.default_scope == 'mmdet':
        if cfg.model.get('roi_head', {}).get('mask_head'):
            raise UserError('--tta: MMDetection cannot merge masks; leave --tta out')
        model: Any = dict(
            type='DetTTAModel',
            tta_cfg=dict(nms=dict(type='nms', iou_threshold=0.5), max_per_img=100),
        )
        keys = 'img_id img_path ori_shape img_shape scale_factor flip flip_direction'
        pack['meta_keys'] = tuple(keys.split())
    elif cfg.default_scope == 'mmpretrain':
        model = dict(type='AverageClsScoreTTA')
    elif 'tta_model' in cfg and 'tta_pipeline' in cfg:
        model = None
    else:
        raise UserError('--tta needs tta_model and tta_pipeline in the config')
    flips = [dict(type='RandomFlip', prob=1.0), dict(type='RandomFlip', prob=0.0)]
    flip = dict(type='TestTimeAug', transforms=[flips, [pack]])
    pipeline = cfg.get('tta_pipeline') or [*dataset.pipeline[:-1], flip]
    cfg.model = ConfigDict(**(cfg.get('tta_model') or model), module=cfg.model)
    dataset.pipeline = deepcopy(pipeline)


def keep_predictions(runner: Runner, scope: str, out: str) -> None:
    """Write all predictions to a pickle file."""
    if scope == 'mmdet':
        from mmdet.evaluation import DumpDetResults as Dump  # run-length encodes masks
    else:
        Dump = DumpResults
    runner.test_evaluator.metrics.append(Dump(out_file_path=out))
