"""Configs for own data take classes, data sets and schedule from a folder, and say what is wrong with it."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any, Callable

import pytest
from mmengine.config import Config
from PIL import Image
from helpers.tiny import ROOT, run, write_data

import own_data
import runtime

CONFIGS = sorted(path.relative_to(ROOT).as_posix() for path in ROOT.glob('configs/*/*_custom.py'))
RETINANET = 'configs/det/retinanet_emo2_1m_custom.py'
SEGFORMER = 'configs/seg/segformer_emo2_1m_custom.py'
CLASSIFIER = 'configs/cls/emo2_1m_custom.py'


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """A folder that holds what the three formats ask for: four images, the last two for validation."""
    write_data(tmp_path / 'raw')
    root = tmp_path / 'own'
    coco = json.loads((tmp_path / 'raw/coco/boxes.json').read_text())
    for split, numbers in (('train', (0, 1)), ('val', (2, 3))):
        for name in ('annotations', f'images/{split}', f'masks/{split}'):
            (root / name).mkdir(parents=True, exist_ok=True)
        for i in numbers:
            shutil.copy(tmp_path / f'raw/coco/images/{i}.png', root / f'images/{split}')
            shutil.copy(tmp_path / f'raw/labels/{i}.png', root / f'masks/{split}')
            kind = ('dark', 'light')[i % 2]
            (root / split / kind).mkdir(parents=True)
            shutil.copy(tmp_path / f'raw/coco/images/{i}.png', root / split / kind)
        own = {
            'images': [x for x in coco['images'] if x['id'] in numbers],
            'annotations': [x for x in coco['annotations'] if x['image_id'] in numbers],
            'categories': coco['categories'],
        }
        (root / f'annotations/{split}.json').write_text(json.dumps(own))
    (root / 'classes.txt').write_text('ground\nbox\n')
    return root


def load(name: str, **options: Any) -> Config:
    cfg = Config.fromfile(ROOT / name)
    pytest.importorskip(cfg.default_scope)
    cfg.merge_from_dict(options)
    return cfg


def complete(name: str, root: Path, **options: Any) -> Config:
    cfg = load(name, data_root=str(root), **options)
    own_data.complete(cfg)
    return cfg


@pytest.fixture
def refused(capsys: pytest.CaptureFixture) -> Callable[..., str]:
    """What is said of a folder that a config cannot take."""

    def message(name: str, root: Path | str) -> str:
        cfg = load(name, data_root=str(root))
        with pytest.raises(SystemExit) as caught:
            own_data.complete(cfg)
        return str(caught.value)

    return message


def change(file: Path, edit: Callable[[dict[str, Any]], Any]) -> None:
    content = json.loads(file.read_text())
    edit(content)
    file.write_text(json.dumps(content))


def test_each_method_has_a_config() -> None:
    methods = {Path(name).stem.replace('_emo2_1m', '').replace('_custom', '') for name in CONFIGS}
    assert methods == {
        *('retinanet', 'ssdlite_320', 'mask-rcnn'),
        *('deeplabv3', 'fpn', 'pspnet', 'segformer', 'emo2_1m'),
    }


@pytest.mark.parametrize('name', CONFIGS)
def test_config_becomes_a_plain_one(data: Path, name: str) -> None:
    """Classes in heads and data sets, files that are there, an evaluation each epoch; the best stays."""
    cfg = complete(name, data)
    assert not {'data_root', 'data_format', 'max_epochs'} & set(cfg)
    check_data(cfg, 'train', 'val', 'test')
    names = ('ground', 'box') if '/seg/' in name else ('dark', 'light')
    counts = [part.num_classes for _, part in iter_nodes(cfg.model, 'model') if 'num_classes' in part]
    assert counts == [2] * len(counts) != []
    for stage in ('train', 'val', 'test'):
        assert cfg[f'{stage}_dataloader'].dataset.metainfo.classes == names
    assert (cfg.train_cfg.type, cfg.train_cfg.max_epochs, cfg.train_cfg.val_interval) == (
        *('EpochBasedTrainLoop', 100, 1),
    )
    hook = cfg.default_hooks.checkpoint
    best = {'cls': 'accuracy/top1', 'det': 'coco/bbox_mAP', 'seg': 'mIoU'}
    assert hook.save_best == best[name.split('/')[1]]
    assert (hook.get('by_epoch', True), hook.get('interval', 1)) == (True, 1)
    assert cfg.train_dataloader.batch_size == 2  # there are no more images
    assert not [x for _, x in iter_nodes(cfg._to_lazy_dict(), '') if x.get('reduce_zero_label')]


def test_other_configs_stay_as_they_are() -> None:
    cfg = load('configs/det/retinanet_emo2_1m.py')
    before = cfg.pretty_text
    own_data.complete(cfg)
    assert cfg.pretty_text == before


@pytest.mark.parametrize(('images', 'epochs'), [(2, 100), (292, 51), (1000, 15), (50000, 12)])
def test_epochs_follow_from_the_number_of_images(data: Path, images: int, epochs: int) -> None:
    def repeat(content: dict[str, Any]) -> None:
        content['images'] = [dict(content['images'][0], id=i) for i in range(images)]
        content['annotations'] = [dict(content['annotations'][0], id=i, image_id=i) for i in range(images)]

    change(data / 'annotations/train.json', repeat)
    assert complete(RETINANET, data).train_cfg.max_epochs == epochs
    assert complete(RETINANET, data, max_epochs=7).train_cfg.max_epochs == 7


def test_images_without_boxes_do_not_count(data: Path, capsys: pytest.CaptureFixture) -> None:
    change(data / 'annotations/train.json', lambda content: content['annotations'].pop())
    complete(RETINANET, data)
    assert ': 1 images to train on, 100 epochs; 2 classes: dark, light' in capsys.readouterr().out


def test_random_backbone_is_not_frozen(data: Path) -> None:
    assert complete(RETINANET, data).model.backbone.frozen_stages == 1
    backbone = complete(RETINANET, data, **{'model.backbone.init_cfg': None}).model.backbone
    assert (backbone.frozen_stages, backbone.norm_eval) == (-1, False)


@pytest.mark.parametrize(
    ('annotations', 'images'),
    [
        ('annotations/instances_{}.json', 'images/{}'),
        ('annotations/instances_{}2017.json', '{}2017'),
        ('{}/_annotations.coco.json', '{}'),
        ('annotations/{}.json', 'images'),
        ('annotations/{}.json', ''),
    ],
)
def test_layouts_of_boxes(data: Path, tmp_path: Path, annotations: str, images: str) -> None:
    new = tmp_path / 'new'
    for split, place in (('train', 'train'), ('val', 'valid' if '_annotations' in annotations else 'val')):
        for target in (
            tmp_path / 'new' / annotations.format(place),
            tmp_path / 'new' / images.format(place) / 'x',
        ):
            target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(data / f'annotations/{split}.json', tmp_path / 'new' / annotations.format(place))
        for file in (data / 'images' / split).iterdir():
            shutil.copy(file, tmp_path / 'new' / images.format(place))
    check_data(complete(RETINANET, new), 'train', 'val', 'test')


def test_maps_of_numbers_up_to_the_last_class(data: Path) -> None:
    for stage in ('train', 'val', 'test'):
        dataset = complete(SEGFORMER, data)[f'{stage}_dataloader'].dataset
        split = 'train' if stage == 'train' else 'val'
        assert dataset.data_prefix == dict(img_path=f'images/{split}', seg_map_path=f'masks/{split}')
        assert (dataset.type, dataset.img_suffix) == ('BaseSegDataset', '.png')


def test_top_5_needs_five_classes(data: Path) -> None:
    assert complete(CLASSIFIER, data).val_evaluator.topk == (1,)
    for split in ('train', 'val'):
        for name in 'abc':
            shutil.copytree(data / split / 'dark', data / split / name)
    cfg = complete(CLASSIFIER, data)
    assert (cfg.val_evaluator.topk, cfg.model.head.topk) == ((1, 5), (1, 5))
    assert cfg.data_preprocessor.num_classes == 5


def test_no_folder_given(refused: Callable[..., str]) -> None:
    assert '--cfg-options data_root=PATH' in refused(RETINANET, '')


@pytest.mark.parametrize('name', [RETINANET, SEGFORMER, CLASSIFIER])
def test_folder_that_is_not_there(refused: Callable[..., str], name: str) -> None:
    assert 'data_root is nowhere, but there is no folder /' in refused(name, Path('nowhere'))


@pytest.mark.parametrize('key', ['images', 'annotations', 'categories'])
def test_annotation_file_without(data: Path, refused: Callable[..., str], key: str) -> None:
    what = dict(images='images', annotations='boxes', categories='classes')[key]
    change(data / 'annotations/val.json', lambda content: content.update({key: []}))
    assert f'{data}/annotations/val.json has no {what}' in refused(RETINANET, data)
    change(data / 'annotations/train.json', lambda content: content.pop(key))
    assert f'{data}/annotations/train.json has no {what}' in refused(RETINANET, data)


def test_annotation_file_that_is_no_json(data: Path, refused: Callable[..., str]) -> None:
    (data / 'annotations/train.json').write_text('{')
    assert f'{data}/annotations/train.json is not JSON' in refused(RETINANET, data)


def test_no_annotation_file(data: Path, refused: Callable[..., str]) -> None:
    (data / 'annotations/val.json').unlink()
    assert f'{data} has none of annotations/val.json, annotations/instances_val.json' in refused(
        RETINANET, data
    )


@pytest.mark.parametrize(
    'edit',
    [
        lambda categories: categories.append(dict(id=9, name='cat')),
        lambda categories: categories.reverse(),
        lambda categories: categories.pop(),
    ],
    ids=['more', 'another order', 'fewer'],
)
def test_other_categories_for_validation(data: Path, refused: Callable[..., str], edit: Any) -> None:
    change(data / 'annotations/val.json', lambda content: edit(content['categories']))
    assert 'have to list the same categories' in refused(RETINANET, data)


def test_category_twice(data: Path, refused: Callable[..., str]) -> None:
    for split in ('train', 'val'):
        file = data / f'annotations/{split}.json'
        change(file, lambda content: content['categories'].append(dict(id=9, name='dark')))
    assert 'each once; they have dark, light, dark and' in refused(RETINANET, data)


@pytest.mark.parametrize(
    ('key', 'entry'), [('images', 'file_name'), ('categories', 'name'), ('annotations', 'image_id')]
)
def test_entry_without(data: Path, refused: Callable[..., str], key: str, entry: str) -> None:
    change(data / 'annotations/train.json', lambda content: content[key][0].pop(entry))
    assert f"train.json: an entry of '{key}' has no '{entry}'" in refused(RETINANET, data)


def test_images_that_are_not_there(data: Path, refused: Callable[..., str]) -> None:
    (data / 'images/val/3.png').unlink()
    assert 'lacks 1 images that' in refused(RETINANET, data)
    (data / 'images/val/2.png').unlink()
    assert 'names 2.png, which is in none of' in refused(RETINANET, data)


def test_maps_that_are_not_there(data: Path, refused: Callable[..., str]) -> None:
    (data / 'masks/val/3.png').unlink()
    assert f'{data}/masks/val lacks 1 maps of images in {data}/images/val, such as 3.png' in refused(
        SEGFORMER, data
    )


def test_images_of_several_kinds(data: Path, refused: Callable[..., str]) -> None:
    Image.new('RGB', (9, 9)).save(data / 'images/train/9.jpg')
    assert 'has to hold images of one kind' in refused(SEGFORMER, data)


def test_no_names_of_classes(data: Path, refused: Callable[..., str]) -> None:
    (data / 'classes.txt').write_text('one\n\n')
    assert f'{data}/classes.txt has to name two classes or more' in refused(SEGFORMER, data)


def test_class_of_one_split_only(data: Path, refused: Callable[..., str]) -> None:
    (data / 'val/cat').mkdir()
    assert 'have other classes: cat is in one only' in refused(CLASSIFIER, data)


def test_class_without_images(data: Path, refused: Callable[..., str]) -> None:
    (data / 'val/dark/2.png').unlink()
    assert f'{data}/val/dark holds no image' in refused(CLASSIFIER, data)


@pytest.mark.slow
@pytest.mark.parametrize('name', [RETINANET, SEGFORMER, CLASSIFIER], ids=['det', 'seg', 'cls'])
def test_trains_evaluates_and_infers(data: Path, tmp_path: Path, name: str) -> None:
    """Then the saved config needs no data_root."""
    cfg = load(name)
    cfg.model.backbone.init_cfg = None
    if name == RETINANET:
        cfg.model.test_cfg.score_thr = 0.0  # nothing is learned in two steps
    loaders = [cfg[f'{stage}_dataloader'] for stage in ('train', 'val', 'test')]
    for loader in loaders:
        loader.update(num_workers=0, persistent_workers=False)
    for _, part in iter_nodes([*loaders, cfg.model.get('data_preprocessor') or {}], 'config'):
        for key in {'scale', 'crop_size', 'size'} & set(part):
            part[key] = 64 if isinstance(part[key], int) else (64, 64)
    small = tmp_path / 'small.py'
    cfg.dump(small)
    trained = run(tmp_path, 'train.py', small, '--cfg-options', f'data_root={data}', 'max_epochs=2')
    assert trained.returncode == 0, trained.stderr
    work = tmp_path / 'work_dirs/small'
    (best,) = work.glob('best_*_epoch_*.pth')
    tested = run(tmp_path, 'test.py', work / 'small.py', best)
    assert tested.returncode == 0, tested.stderr
    image = next((data / 'images/val').iterdir())
    inferred = run(tmp_path, 'infer.py', work / 'small.py', best, image, '--score-thr', 0)
    assert inferred.returncode == 0, inferred.stderr
    classes = ('ground', 'box') if name == SEGFORMER else ('dark', 'light')
    assert any(word in inferred.stdout for word in classes)


@pytest.mark.slow
def test_check_takes_the_configs(data: Path, tmp_path: Path) -> None:
    done = run(tmp_path, 'check_dataset.py', ROOT / RETINANET, '--cfg-options', f'data_root={data}')
    assert done.returncode == 0, done.stdout + done.stderr
