"""Each option of a custom config sets all that follows from it; MMEngine's names have the last word."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.tiny import ROOT, write_custom_data
from mmengine.config import Config
from mmengine.registry import MODELS, DefaultScope

from emo2_mm import EMOv2
from emo2_mm.config import innermost_dataset, iter_nodes, load_config
from emo2_mm.datasets import options
from emo2_mm.datasets.custom import apply_custom_dataset
from emo2_mm.errors import UserError

CONFIGS = sorted(path.relative_to(ROOT).as_posix() for path in ROOT.glob('configs/*/*_custom.py'))
RETINANET, SSDLITE, MASK_RCNN = (
    f'configs/det/{x}_emo2_custom.py' for x in ('retinanet', 'ssdlite', 'mask-rcnn')
)
SEGFORMER = 'configs/seg/segformer_emo2_custom.py'
CLASSIFIER = 'configs/cls/emo2_custom.py'
SIZES = {'det': '96,128', 'seg': '64', 'cls': '64'}


@pytest.fixture(scope='module')
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Data that each custom config can read: eight images, the last two for validation."""
    root = tmp_path_factory.mktemp('data') / 'own'
    write_custom_data(root, train=range(6), val=(6, 7))
    return root


def complete(name: str, data: Path, *given: str, work_dir: Path | None = None) -> Config:
    root = data / 'classes' if name == CLASSIFIER else data
    cfg = load_config(ROOT / name, [f'data_root={root}', *given], work_dir and str(work_dir))
    pytest.importorskip(cfg.default_scope)
    apply_custom_dataset(cfg)
    return cfg


def channels(cfg: Config) -> list[Any]:
    """What the neck and the heads expect of the backbone."""
    return [
        value
        for key, part in iter_nodes(cfg.model, 'model')
        for name, value in part.items()
        if name == 'in_channels' and key != 'model.backbone'
    ]


def test_each_method_has_one_config() -> None:
    names = {Path(name).stem for name in CONFIGS}
    methods = {'retinanet', 'ssdlite', 'mask-rcnn', 'segformer', 'fpn', 'deeplabv3', 'pspnet'}
    assert names == {'emo2_custom', *(f'{method}_emo2_custom' for method in methods)}


VALUES = {
    'arch': ('1m', '50m'),
    'image_size': ('64', '96,160'),
    'pretrained': ('none', 'weights.pth'),
    'max_epochs': ('1', '40'),
    'batch_size': ('1', '4'),
    'lr': ('None', '3e-3'),
    'light_head': ('True', 'False'),
}


def sets_of_options(name: str) -> list[dict[str, str]]:
    """Eight sets in which each pair of values of two options occurs: an orthogonal array of strength two."""
    known = Config.fromfile(ROOT / name, import_custom_modules=False)
    return [
        {
            option: values[bin(row & column).count('1') % 2]
            for column, (option, values) in enumerate(VALUES.items(), 1)
            if option in known
        }
        for row in range(8)
    ]


@pytest.mark.parametrize('name', CONFIGS)
def test_pairs_of_options_are_coherent(data: Path, name: str) -> None:
    """Whatever two of them are given: channels, weights, sizes, schedule fit together, in a plain config."""
    for given in sets_of_options(name):
        cfg = complete(name, data, *(f'{key}={value}' for key, value in given.items()))
        assert not set(options.Options._fields) & set(cfg), given
        arch, backbone = given['arch'], cfg.model.backbone
        assert (backbone.arch, backbone.drop_path_rate) == (arch, options.DROP_PATH_RATES[arch])
        text = str(channels(cfg))
        assert str(EMOv2.arch_settings[arch]['channels'][3]) in text, given
        assert str(EMOv2.arch_settings['1m' if arch == '50m' else '50m']['channels'][2]) not in text, given
        start = None if given['pretrained'] == 'none' else given['pretrained']
        assert (backbone.init_cfg and backbone.init_cfg.checkpoint) == start, given
        batch, epochs = int(given['batch_size']), int(given['max_epochs'])
        assert (cfg.train_dataloader.batch_size, cfg.train_cfg.max_epochs) == (batch, epochs)
        warm_up, decay = cfg.param_scheduler
        assert decay.end == epochs
        assert 1 <= warm_up.end <= max(1, epochs * 6 // batch // 2)
        base = Config.fromfile(ROOT / name, import_custom_modules=False)
        scaled = base.optim_wrapper.optimizer.lr * (batch / base.auto_scale_lr.base_batch_size) ** 0.5
        lr = 3e-3 if given['lr'] == '3e-3' else scaled
        assert cfg.optim_wrapper.optimizer.lr == pytest.approx(lr, rel=0.01)
        height, width = (int(x) for x in f'{given["image_size"]},{given["image_size"]}'.split(',')[:2])
        check_size(cfg, height, width)
        if 'light_head' in given:
            assert cfg.model.neck.out_channels == (96 if given['light_head'] == 'True' else 256)


def check_size(cfg: Config, height: int, width: int) -> None:
    steps = {}
    for stage in ('train', 'test'):
        pipeline = innermost_dataset(cfg[f'{stage}_dataloader'].dataset).pipeline
        steps[stage] = {step['type']: step for _, step in iter_nodes(pipeline, '') if 'type' in step}
    if cfg.default_scope == 'mmdet':
        assert steps['train']['Resize'].scale == steps['test']['Resize'].scale == (width, height)
    elif cfg.default_scope == 'mmseg':
        assert steps['train']['RandomCrop'].crop_size == cfg.model.data_preprocessor.size == (height, width)
        assert (
            steps['train']['RandomResize'].scale[1] == steps['test']['Resize'].scale[1] == min(height, width)
        )
    else:
        square = height == width
        assert steps['train']['RandomResizedCrop'].scale == (height if square else (height, width))
        assert steps['test']['CenterCrop'].crop_size == (height if square else (width, height))
    assert cfg.model.backbone.window_size == max(height, width) // 32


@pytest.mark.parametrize('arch', options.ARCHS)
@pytest.mark.parametrize('name', CONFIGS)
def test_model_of_each_arch_gives_a_loss(data: Path, name: str, arch: str) -> None:
    """Neck and heads take what the backbone gives."""
    if arch not in ('1m', '2m') and name not in (RETINANET, SEGFORMER):
        pytest.skip('as the smaller ones')
    cfg = complete(name, data, f'arch={arch}', 'pretrained=none', f'image_size={SIZES[name.split("/")[1]]}')
    for _, part in iter_nodes(cfg.model, 'model'):
        if part.get('type') == 'SyncBN':
            part['type'] = 'BN'
    with DefaultScope.overwrite_default_scope(cfg.default_scope):
        if cfg.get('data_preprocessor'):
            cfg.model.data_preprocessor = dict(type='ClsDataPreprocessor', **cfg.data_preprocessor)
        model = MODELS.build(cfg.model)
        dataset = innermost_dataset(cfg.train_dataloader.dataset)
        from mmengine.dataset import pseudo_collate
        from mmengine.registry import DATASETS

        built = DATASETS.build(dataset)
        torch.manual_seed(0)
        batch = model.data_preprocessor(pseudo_collate([built[0], built[1]]), training=True)
        losses = model(**batch, mode='loss')
    values = [x for value in losses.values() for x in (value if isinstance(value, list) else [value])]
    assert all(torch.isfinite(value).all() for value in values)
    assert sum(value.sum() for value in values) > 0


def test_mmengine_names_have_the_last_word(data: Path) -> None:
    """Values that equal the defaults of the file, too."""
    given = {
        'train_dataloader.dataset.pipeline.2.scale': (1333, 800),
        'model.backbone.window_size': 10,
        'model.backbone.drop_path_rate': 0.3,
        'model.neck.out_channels': 256,
        'train_cfg.val_interval': 3,
        'default_hooks.checkpoint.save_best': 'coco/bbox_mAP_50',
        'param_scheduler.0.end': 7,
        'train_dataloader.num_workers': 9,
        'model.bbox_head.anchor_generator.octave_base_scale': 3,
    }
    texts = [f'{key}={value}'.replace(' ', '') for key, value in given.items()]
    cfg = complete(RETINANET, data, 'image_size=64', 'arch=2m', 'train_cfg.max_epochs=3', *texts)
    found = {}
    for key in given:
        node = cfg
        for part in key.split('.'):
            node = node[int(part) if part.isdigit() else part]
        found[key] = node
    assert found == given
    assert innermost_dataset(cfg.val_dataloader.dataset).pipeline[1].scale == (64, 64)
    assert (cfg.train_cfg.max_epochs, cfg.param_scheduler[1].end) == (3, 3)


@pytest.mark.parametrize(
    ('given', 'message'),
    [
        (['max_epoch=3'], "has no setting 'max_epoch'; there is max_epochs"),
        (['arch=3m'], "arch is '3m'; give one of 1m, 2m, 5m, 20m, 50m"),
        (['image_size=16'], 'image_size is 16; both sides need 32'),
        (['image_size=1,2,3'], 'give one number of pixels, or height,width'),
        (['batch_size=0'], 'batch_size is 0; give 1 or more'),
        (['lr=-1'], 'lr is -1; give a rate above 0'),
        (['val_fraction=20'], 'val_fraction is 20; give a share between 0 and 1'),
        (['light_head=yes'], "light_head is 'yes'; give True or False"),
        (['arch=2m', 'model.backbone.arch=5m'], 'arch=2m and model.backbone.arch=5m contradict each other'),
        (['lr=1e-3', 'optim_wrapper.optimizer.lr=1e-4'], 'contradict each other'),
        (['train_cfg.max_iters=9'], 'a custom config counts epochs; give max_epochs=N'),
    ],
)
def test_unusable_options_are_refused_by_name(data: Path, given: list[str], message: str) -> None:
    with pytest.raises(UserError) as caught:
        complete(RETINANET, data, *given)
    assert message in str(caught.value)


def test_names_of_mmengine_count_as_options(data: Path) -> None:
    cfg = complete(
        RETINANET,
        data,
        'model.backbone.arch=5m',
        'train_dataloader.batch_size=2',
        'optim_wrapper.optimizer.lr=1e-3',
        'model.backbone.init_cfg.checkpoint=mine.pth',
    )
    assert cfg.model.neck.in_channels == [48, 72, 160, 288]
    assert (cfg.train_dataloader.batch_size, cfg.optim_wrapper.optimizer.lr) == (2, 1e-3)
    assert cfg.model.backbone.init_cfg == dict(type='Pretrained', checkpoint='mine.pth')


def test_learning_rate_follows_the_root_of_the_batch_size(
    data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = complete(RETINANET, data, 'batch_size=6').optim_wrapper.optimizer.lr
    quarter = complete(RETINANET, data, 'batch_size=2')
    assert quarter.optim_wrapper.optimizer.lr == pytest.approx(base * (2 / 6) ** 0.5, rel=2e-3)
    assert quarter.auto_scale_lr.base_batch_size == 2  # --auto-scale-lr must not scale it again
    monkeypatch.setenv('WORLD_SIZE', '3')
    three = complete(RETINANET, data, 'batch_size=2')
    assert three.optim_wrapper.optimizer.lr == pytest.approx(base, rel=2e-3)
    assert three.auto_scale_lr.base_batch_size == 6


@pytest.mark.parametrize(('images', 'epochs'), [(2, 100), (292, 51), (1000, 15), (50000, 12)])
def test_epochs_follow_from_the_number_of_images(data: Path, images: int, epochs: int) -> None:
    cfg = Config.fromfile(ROOT / RETINANET)
    assert options.set_schedule(cfg, None, images) == epochs
    assert options.set_schedule(cfg, 7, images) == 7


def test_random_weights_freeze_nothing_and_show_branches(data: Path) -> None:
    backbone = complete(RETINANET, data, 'pretrained=none').model.backbone
    assert (backbone.init_cfg, backbone.frozen_stages, backbone.norm_eval) == (None, -1, False)
    assert backbone.layer_scale_init_value == 0.1
    assert complete(RETINANET, data, 'arch=20m').model.backbone.init_cfg is None  # no weights are released


def test_a_config_made_from_a_custom_one_keeps_its_settings(data: Path, tmp_path: Path) -> None:
    file = tmp_path / 'mine.py'
    file.write_text(
        f'_base_ = {str(ROOT / RETINANET)!r}\n'
        "model = dict(backbone=dict(init_cfg=dict(checkpoint='mine.pth')))\n"
        'train_cfg = dict(max_epochs=5)\n'
    )
    cfg = complete(file, data)
    assert cfg.model.backbone.init_cfg.checkpoint == 'mine.pth'
    assert (cfg.train_cfg.max_epochs, cfg.param_scheduler[1].end) == (5, 5)


def test_load_from_needs_no_other_weights(data: Path, tmp_path: Path) -> None:
    """And the head is the one that it has."""
    for width, light in ((96, True), (256, False)):
        weights = {'neck.lateral_convs.0.conv.weight': torch.zeros(width, 48, 1, 1)}
        torch.save({'state_dict': weights}, tmp_path / 'old.pth')
        for more in ([], ['model.backbone.init_cfg=None']):
            cfg = complete(RETINANET, data, f'load_from={tmp_path}/old.pth', *more)
            assert cfg.model.backbone.init_cfg is None
            assert 'layer_scale_init_value' not in cfg.model.backbone
            assert cfg.model.neck.out_channels == (96 if light else 256)


@pytest.mark.parametrize('side', [320, 512])
def test_ssdlite_anchors_lie_where_its_maps_are(side: int) -> None:
    """Those of 320 are the published ones; at other sizes the centres cover the image as well."""
    found = options.ssd_anchors(side, side)
    if side == 320:
        assert [x for x, _ in found['strides']] == [16, 32, 64, 107, 160, 320]
        assert found['min_sizes'] == [48, 100, 150, 202, 253, 304]
        assert found['max_sizes'] == [100, 150, 202, 253, 304, 320]
    sides = [side // 16, side // 32, side // 64]
    assert [x * n for n, (x, _) in zip(sides, found['strides'])] == [side] * 3
    assert options.ssd_anchors(160, 320)['strides'][-1] == (320, 160)


@pytest.mark.parametrize(('size', 'scale'), [('800,1333', 4), ('640', 3), ('320', 2), ('64', 1)])
def test_anchors_of_small_images_are_smaller(data: Path, size: str, scale: int) -> None:
    """Else objects that fill as much of the image have no anchor; given by name, they stay."""
    generator = complete(RETINANET, data, f'image_size={size}').model.bbox_head.anchor_generator
    assert generator.octave_base_scale == scale
    generator = complete(MASK_RCNN, data, f'image_size={size}').model.rpn_head.anchor_generator
    assert generator.scales == [{4: 8, 3: 6, 2: 4, 1: 2}[scale]]


@pytest.mark.parametrize(
    ('side', 'classifies', 'window'),
    [
        (224, True, 7),
        (256, True, 8),
        (512, True, 8),
        (384, True, 6),
        (48, True, 2),
        (800, False, 10),
        (192, False, 6),
    ],
)
def test_windows_pad_little(side: int, classifies: bool, window: int) -> None:
    assert options.window_size(side, side, classifies) == window


def test_no_gpu_means_small_images_and_says_so(data: Path, capsys: pytest.CaptureFixture) -> None:
    cfg = complete(SEGFORMER, data)
    if torch.cuda.is_available():
        pytest.skip('there is a GPU')
    assert cfg.model.data_preprocessor.size == (256, 256)
    assert 'no GPU, hence images of 256 pixels (image_size=N)' in capsys.readouterr().out


def test_tensorboard_is_one_option(data: Path) -> None:
    pytest.importorskip('torch.utils.tensorboard')
    backends = complete(RETINANET, data, 'tensorboard=True').visualizer.vis_backends
    assert [backend['type'] for backend in backends] == ['LocalVisBackend', 'TensorboardVisBackend']
