"""Data sets and configs that train within seconds, and functions that run the tools."""

from __future__ import annotations

import json
import os
import runpy
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any, Callable, Sequence

import numpy as np
import pytest
import torch
from mmengine.config import Config
from mmengine.registry import MODELS, init_default_scope
from PIL import Image

ROOT = Path(__file__).parents[2]
SIDE = 64

ARCH = 'dict(depths=(1, 1, 2, 1), channels=(8, 12, 16, 24), expand_ratios=(2, 2, 2, 2), head_dim=8)'
BACKBONE = f"dict(type='emo2_mm.EMOv2', arch={ARCH}, window_size=4, layer_scale_init_value=0.1)"

SCHEDULE = """
train_cfg = dict(type='EpochBasedTrainLoop', max_epochs=1, val_interval=1)
val_cfg = dict(type='ValLoop')
test_cfg = dict(type='TestLoop')
optim_wrapper = dict(type='OptimWrapper', optimizer=dict(type='AdamW', lr=1e-3))
auto_scale_lr = dict(base_batch_size=2, enable=False)
randomness = dict(seed=0)
default_hooks = dict(logger=dict(type='LoggerHook', interval=1))
env_cfg = dict(mp_cfg=dict(mp_start_method='fork', opencv_num_threads=0))
"""
LOADER = """
def loader(**dataset):
    return dict(
        batch_size=2,
        num_workers=0,
        sampler=dict(type='DefaultSampler', shuffle=False),
        dataset=dataset,
    )
"""
DETECTOR = f"""
default_scope = 'mmdet'
model = dict(
    type='RetinaNet',
    data_preprocessor=dict(type='DetDataPreprocessor', mean=[128.0] * 3, std=[64.0] * 3),
    backbone={BACKBONE},
    neck=dict(
        type='FPN', in_channels=[8, 12, 16, 24], out_channels=16, start_level=1, num_outs=3,
        norm_cfg=dict(type='SyncBN'),
    ),
    bbox_head=dict(
        type='RetinaHead', num_classes=2, in_channels=16, feat_channels=16, stacked_convs=1,
        anchor_generator=dict(
            type='AnchorGenerator', octave_base_scale=3, scales_per_octave=1, ratios=[1.0],
            strides=[8, 16, 32],
        ),
    ),
    train_cfg=dict(
        assigner=dict(type='MaxIoUAssigner', pos_iou_thr=0.5, neg_iou_thr=0.4, min_pos_iou=0),
        sampler=dict(type='PseudoSampler'),
        allowed_border=-1, pos_weight=-1,
    ),
    test_cfg=dict(
        nms_pre=100, score_thr=0.0, nms=dict(type='nms', iou_threshold=0.5), max_per_img=10
    ),
)
pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='Resize', scale=({SIDE}, {SIDE}), keep_ratio=True),
    dict(type='LoadAnnotations', with_bbox=True),
    dict(
        type='PackDetInputs',
        meta_keys=('img_id', 'img_path', 'ori_shape', 'img_shape', 'scale_factor'),
    ),
]
{LOADER}
data = dict(
    type='CocoDataset', data_root='DATA/coco', ann_file='boxes.json',
    data_prefix=dict(img='images'), metainfo=dict(classes=('dark', 'light')), pipeline=pipeline,
)
train_dataloader = loader(**data)
val_dataloader = test_dataloader = loader(test_mode=True, **data)
val_evaluator = test_evaluator = dict(
    type='CocoMetric', ann_file='DATA/coco/boxes.json', metric='bbox'
)
{SCHEDULE}
visualizer = dict(type='DetLocalVisualizer', vis_backends=[dict(type='LocalVisBackend')])
default_hooks['visualization'] = dict(type='DetVisualizationHook')
"""
CLASSIFIER = f"""
default_scope = 'mmpretrain'
model = dict(
    type='ImageClassifier',
    backbone={BACKBONE.replace('window', 'final_norm=True, out_indices=(3,), window')},
    neck=dict(type='GlobalAveragePooling'),
    head=dict(
        type='LinearClsHead', num_classes=2, in_channels=24,
        loss=dict(type='CrossEntropyLoss'), topk=(1,),
    ),
)
data_preprocessor = dict(num_classes=2, mean=[128.0] * 3, std=[64.0] * 3)
{LOADER}
data = dict(
    type='CustomDataset', data_root='DATA', data_prefix='folders',
    pipeline=[dict(type='LoadImageFromFile'), dict(type='PackInputs')],
)
train_dataloader = loader(**data)
val_dataloader = test_dataloader = loader(**data)
val_evaluator = test_evaluator = dict(type='Accuracy', topk=(1,))
{SCHEDULE}
visualizer = dict(type='UniversalVisualizer', vis_backends=[dict(type='LocalVisBackend')])
default_hooks['visualization'] = dict(type='VisualizationHook')
"""
SEGMENTOR = f"""
default_scope = 'mmseg'
model = dict(
    type='EncoderDecoder',
    data_preprocessor=dict(
        type='SegDataPreProcessor', mean=[128.0] * 3, std=[64.0] * 3, size=({SIDE}, {SIDE})
    ),
    backbone={BACKBONE},
    decode_head=dict(
        type='FCNHead', in_channels=24, in_index=3, channels=8, num_convs=1, num_classes=2,
        norm_cfg=dict(type='BN'),
    ),
    test_cfg=dict(mode='whole'),
)
pipeline = [
    dict(type='LoadImageFromFile'), dict(type='LoadAnnotations'), dict(type='PackSegInputs')
]
tta_model = dict(type='SegTTAModel')
tta_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(
        type='TestTimeAug',
        transforms=[
            [dict(type='RandomFlip', prob=0.0), dict(type='RandomFlip', prob=1.0)],
            [dict(type='LoadAnnotations')],
            [dict(type='PackSegInputs')],
        ],
    ),
]
{LOADER}
data = dict(
    type='BaseSegDataset', data_root='DATA', img_suffix='.png', pipeline=pipeline,
    data_prefix=dict(img_path='coco/images', seg_map_path='labels'),
    metainfo=dict(classes=('ground', 'box')),
)
train_dataloader = loader(**data)
val_dataloader = test_dataloader = loader(**data)
val_evaluator = test_evaluator = dict(type='IoUMetric', iou_metrics=['mIoU'])
{SCHEDULE}
visualizer = dict(type='SegLocalVisualizer', vis_backends=[dict(type='LocalVisBackend')])
default_hooks['visualization'] = dict(type='SegVisualizationHook', interval=1)
"""

CONFIGS = {'mmdet': DETECTOR, 'mmpretrain': CLASSIFIER, 'mmseg': SEGMENTOR}  # by default_scope


def write_data(folder: Path, images: int = 4) -> None:
    """Images of one dark or light rectangle each, as COCO boxes, label maps and class folders."""
    rng = np.random.RandomState(0)
    for name in ('coco/images', 'labels', 'folders/dark', 'folders/light'):
        (folder / name).mkdir(parents=True)
    coco = {'images': [], 'annotations': [], 'categories': []}
    for i, name in enumerate(('dark', 'light')):
        coco['categories'].append({'id': i + 1, 'name': name})
    for i in range(images):
        kind = ('dark', 'light')[i % 2]
        x, y = rng.randint(4, 24, 2).tolist()
        w, h = rng.randint(20, 36, 2).tolist()
        pixels = np.full((SIDE, SIDE, 3), 128, np.uint8)
        pixels[y : y + h, x : x + w] = 32 if kind == 'dark' else 224
        label = np.zeros((SIDE, SIDE), np.uint8)
        label[y : y + h, x : x + w] = 1
        Image.fromarray(pixels).save(folder / f'coco/images/{i}.png')
        Image.fromarray(pixels).save(folder / f'folders/{kind}/{i}.png')
        Image.fromarray(label).save(folder / f'labels/{i}.png')
        coco['images'].append({'id': i, 'file_name': f'{i}.png', 'width': SIDE, 'height': SIDE})
        coco['annotations'].append(
            {'id': i + 1, 'image_id': i, 'category_id': i % 2 + 1, 'bbox': [x, y, w, h]}
        )
        outline = [x, y, x + w, y, x + w, y + h, x, y + h]
        coco['annotations'][-1].update(area=w * h, iscrowd=0, segmentation=[outline])
    (folder / 'coco/boxes.json').write_text(json.dumps(coco))


def write_custom_data(root: Path, **splits: Sequence[int]) -> None:
    """The tiny data as custom configs read them: the numbers of the images of each split.

    There are boxes, maps with their ``classes.txt``, and folders of classes in ``classes``.
    """
    raw = root.with_name('raw')
    write_data(raw, sum(map(len, splits.values())))
    coco = json.loads((raw / 'coco/boxes.json').read_text())
    for split, numbers in splits.items():
        for i in numbers:
            for source, target in (
                (f'coco/images/{i}.png', f'images/{split}'),
                (f'labels/{i}.png', f'masks/{split}'),
                (f'coco/images/{i}.png', f'classes/{split}/{("dark", "light")[i % 2]}'),
            ):
                (root / target).mkdir(parents=True, exist_ok=True)
                shutil.copy(raw / source, root / target)
        images = [x for x in coco['images'] if x['id'] in numbers]
        annotations = [x for x in coco['annotations'] if x['image_id'] in numbers]
        (root / 'annotations').mkdir(exist_ok=True)
        file = root / f'annotations/{split}.json'
        file.write_text(json.dumps(dict(coco, images=images, annotations=annotations)))
    (root / 'classes.txt').write_text('ground\nbox\n')


def edit_json(file: Path, edit: Callable[[Any], Any], encoding: str = 'utf-8') -> None:
    """Change the content of a JSON file."""
    content = json.loads(file.read_text(encoding='utf-8-sig'))
    edit(content)
    file.write_text(json.dumps(content), encoding=encoding)


def write_config(folder: Path, text: str, name: str = 'tiny.py') -> Path:
    """Write one of the configs above, reading the data in ``folder``."""
    path = folder / name
    path.write_text(text.replace('DATA', str(folder)))
    return path


def model_of(cfg: Config) -> torch.nn.Module:
    """Build the model of a config with random weights, the same each time."""
    init_default_scope(cfg.default_scope)
    if cfg.default_scope == 'mmpretrain':
        cfg.model.setdefault('data_preprocessor', cfg.data_preprocessor)
    torch.manual_seed(0)
    model = MODELS.build(cfg.model)
    if cfg.default_scope == 'mmseg':
        model.decode_head.conv_seg.weight.data.mul_(100)  # both classes somewhere
    return model.eval()


def call_tool(name: str, *arguments: object) -> Any:
    """Run the main function of tools/NAME in this process, and return what it returns."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv('LOCAL_RANK', '')  # restored afterwards: tools set it
        patch.delenv('LOCAL_RANK')
        patch.setattr(sys, 'path', [str(ROOT / 'tools'), *sys.path])
        patch.setattr(sys, 'argv', [name, *map(str, arguments)])
        return runpy.run_path(str(ROOT / 'tools' / name))['main']()


def run(folder: Path, *command: object, **env: str) -> subprocess.CompletedProcess:
    """Run a tool of this repository in another folder, on the CPU."""
    own = ('PYTHONPATH', 'LOCAL_RANK', 'RANK', 'WORLD_SIZE', 'CUDA_VISIBLE_DEVICES')
    full = {name: value for name, value in os.environ.items() if name not in own}
    full.update(PYTHON=sys.executable, OMP_NUM_THREADS='1', CUDA_VISIBLE_DEVICES='')
    full.update(env)
    tool = ROOT / 'tools' / str(command[0])
    prefix = [sys.executable] if tool.suffix == '.py' else []
    return subprocess.run(
        [*prefix, str(tool), *map(str, command[1:])],
        cwd=folder,
        env=full,
        capture_output=True,
        text=True,
        timeout=240,
    )
