"""Evaluate a checkpoint, be it of MMPretrain, MMDetection or MMSegmentation.

    python tools/test.py configs/det/retinanet_emo2_5m.py work_dirs/retinanet_emo2_5m/epoch_12.pth

The config's ``default_scope`` tells the three apart.
"""

from __future__ import annotations

import argparse
import os
from copy import deepcopy

import faulty_data
import own_data
import runtime
from mmengine.config import Config, ConfigDict
from mmengine.device import get_device
from mmengine.evaluator import DumpResults
from mmengine.runner import Runner


def parse_args() -> argparse.Namespace:
    parser = runtime.new_parser('Evaluate a checkpoint.')
    parser.add_argument('checkpoint', help='checkpoint file')
    parser.add_argument(
        '--out',
        help='keep the predictions: a .pkl file, or for segmentation a folder of label maps',
    )
    parser.add_argument('--show', action='store_true', help='show the predictions in a window')
    parser.add_argument('--show-dir', help='folder for painted predictions')
    parser.add_argument('--wait-time', type=float, default=2, help='seconds that --show waits')
    parser.add_argument('--tta', action='store_true', help='test-time augmentation')
    return parser.parse_args()


def show(cfg: Config, args: argparse.Namespace) -> None:
    """Turn the visualisation hook on, whose arguments have other names in each code base."""
    hook = cfg.get('default_hooks', {}).get('visualization')
    if hook is None:
        runtime.fail(
            '--show and --show-dir need a hook that paints: add visualization='
            "dict(type='DetVisualizationHook') (VisualizationHook in MMPretrain, "
            'SegVisualizationHook in MMSegmentation) to default_hooks of the config'
        )
    classifies = cfg.default_scope == 'mmpretrain'
    if classifies and args.tta:
        runtime.fail("MMPretrain's hook cannot paint augmented images; leave out --tta or --show")
    hook.update({'enable' if classifies else 'draw': True})
    hook.update(show=args.show, wait_time=args.wait_time)
    if classifies:
        hook.update(out_dir=args.show_dir, interval=1)
    elif args.show_dir and cfg.default_scope == 'mmseg':
        cfg.visualizer.save_dir = args.show_dir
    elif args.show_dir:
        hook.test_out_dir = os.path.abspath(args.show_dir)  # else it lies in the work dir


def augment(cfg: Config) -> None:
    """Wrap the model for test-time augmentation; what the config leaves open becomes flipping."""
    dataset = runtime.innermost(cfg.test_dataloader.dataset)
    pack = dict(dataset.pipeline[-1])
    if cfg.default_scope == 'mmdet':
        if cfg.model.get('roi_head', {}).get('mask_head'):
            runtime.fail('--tta: MMDetection cannot merge masks; leave --tta out')
        model = dict(
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
        runtime.fail('--tta needs tta_model and tta_pipeline in the config')
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


def main() -> None:
    args = parse_args()
    cfg = runtime.load_config(args)
    own_data.complete(cfg)
    segments = cfg.get('default_scope') == 'mmseg'
    if args.out and not segments and not args.out.endswith(('.pkl', '.pickle')):
        runtime.fail(f'--out is {args.out}; give a name that ends in .pkl')
    runtime.check_data(cfg, 'test')
    runtime.check_checkpoint(args.checkpoint, 'the checkpoint')

    cfg.load_from, cfg.resume = args.checkpoint, False
    if args.amp:
        if cfg.get('default_scope') == 'mmdet' and get_device() == 'cpu':
            runtime.fail(f'--amp: {runtime.NO_BFLOAT16_NMS}')
        cfg.test_cfg.fp16 = True
    if args.show or args.show_dir:
        show(cfg, args)
    if args.tta:
        augment(cfg)
    if args.out and segments:
        metrics = cfg.test_evaluator
        for metric in metrics if isinstance(metrics, list) else [metrics]:
            metric.update(output_dir=args.out, keep_results=True)

    runner = runtime.build_runner(cfg)
    faulty_data.name_faults(runner)  # before the evaluator is asked for, which builds the data set
    if args.out and not segments:
        keep_predictions(runner, cfg.get('default_scope'), args.out)
    runner.test()


if __name__ == '__main__':
    main()
