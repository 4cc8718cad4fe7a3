"""The demo: its data, its shrunk configs, steps that are not repeated, and the report."""

from __future__ import annotations

import fnmatch
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import cv2
import make_digits
import numpy as np
import pytest
import report_demo
import run
import torch
from helpers.tiny import ROOT
from mmengine.config import Config
from mmengine.registry import MODELS, DefaultScope
from pycocotools.coco import COCO
from shrink import METHODS, shrink

from emo2_mm.export.formats import web

BOX, MASK = 'coco/bbox_mAP', 'coco/segm_mAP'


class TestData:
    def test_training_and_validation_share_neither_digits_nor_photographs(self) -> None:
        splits = make_digits.load_splits(seed=0)
        digits = [{d.tobytes() for d in splits[name]['digits']} for name in ('train', 'val')]
        assert sum(len(splits[name]['labels']) for name in splits) == 1797
        assert len(splits['val']['labels']) == 359
        assert not digits[0] & digits[1]
        assert not set(make_digits.TRAIN_PHOTOS) & set(make_digits.VAL_PHOTOS)
        assert {len(set(splits[name]['labels'])) for name in splits} == {10}

    def test_scenes_are_those_of_the_results_in_the_docs(self) -> None:
        rng = np.random.RandomState(1)
        split = make_digits.load_splits(seed=0)['train']
        scenes = [make_digits.make_scene(split, rng) for _ in range(3)]
        found = [[(a['category_id'] - 1, a['bbox'], a['area']) for a in scene[1]] for scene in scenes]
        assert found[1:] == [
            [(9, [15, 41, 45, 69], 1653)],
            [(8, [32, 136, 16, 26], 274), (4, [74, 92, 37, 51], 885)],
        ]
        assert found[0][0] == (0, [134, 71, 23, 34], 390)
        brightness = [scene[0].mean((0, 1)) for scene in scenes]
        recorded = [(53.6, 53.4, 47.83), (43.01, 48.58, 43.77), (42.52, 44.91, 39.41)]
        assert np.allclose(brightness, recorded, atol=0.02)
        assert rng.randint(2**31) == 1778356919

    @pytest.fixture(scope='class')
    def folder(self, tmp_path_factory: pytest.TempPathFactory) -> Path:
        out = tmp_path_factory.mktemp('digits')
        split = make_digits.load_splits(seed=0)['val']
        make_digits.make_detection(out, 'val', split, count=12, seed=0)
        return out

    @pytest.fixture(scope='class')
    def coco(self, folder: Path) -> COCO:
        return COCO(str(folder / 'annotations/val.json'))

    def test_label_maps_are_the_hulls_of_the_masks(self, folder: Path, coco: COCO) -> None:
        for image in coco.loadImgs(coco.getImgIds()):
            semantic = cv2.imread(str(folder / f'maps/val/{image["id"]:05d}.png'), cv2.IMREAD_UNCHANGED)
            union = np.zeros((make_digits.SCENE, make_digits.SCENE), np.uint8)
            for annotation in coco.loadAnns(coco.getAnnIds(image['id'])):
                mask = coco.annToMask(annotation)
                assert mask.sum() == annotation['area']
                cv2.fillConvexPoly(union, cv2.convexHull(cv2.findNonZero(mask)), annotation['category_id'])
                assert (semantic[mask > 0] == annotation['category_id']).all()
            assert (semantic == union).all()

    def test_mask_is_where_the_digit_is_bright(self, folder: Path, coco: COCO) -> None:
        """Digits have full brightness in one channel, their background has a third of it."""
        for annotation in coco.anns.values():
            pixels = cv2.imread(str(folder / f'val/{annotation["image_id"]:05d}.jpg')).max(axis=2)
            x, y, w, h = annotation['bbox']
            mask = coco.annToMask(annotation)[y : y + h, x : x + w] > 0
            bright = pixels[y : y + h, x : x + w] > 165
            assert (bright == mask).mean() > 0.93, annotation

    def test_boxes_are_as_tight_as_the_masks(self, coco: COCO) -> None:
        for annotation in coco.anns.values():
            mask = coco.annToMask(annotation)
            ys, xs = np.where(mask)
            x, y, w, h = annotation['bbox']
            assert min(x, y) >= 0
            assert max(x + w, y + h) <= make_digits.SCENE
            # glyphs have soft edges
            outer = np.array([xs.min() - x, ys.min() - y, x + w - xs.max() - 1, y + h - ys.max() - 1])
            assert (abs(outer) <= 1 + 0.03 * max(w, h)).all(), annotation

    def test_every_scene_has_digits_that_do_not_touch(self, coco: COCO) -> None:
        for image in coco.getImgIds():
            boxes = [a['bbox'] for a in coco.loadAnns(coco.getAnnIds(image))]
            assert boxes
            for i, (x, y, w, h) in enumerate(boxes):
                for x2, y2, w2, h2 in boxes[:i]:
                    assert x + w <= x2 or x2 + w2 <= x or y + h <= y2 or y2 + h2 <= y

    def test_other_files_of_the_directory_stay(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        (tmp_path / 'coco').mkdir()
        (tmp_path / 'coco/old.jpg').touch()
        (tmp_path / 'thesis.txt').touch()
        words = [str(tmp_path), '--scenes', '1', '--val-scenes', '1', '--copies', '0']
        monkeypatch.setattr(sys, 'argv', ['make_digits.py', *words])
        make_digits.main()
        assert sorted(p.name for p in tmp_path.iterdir()) == ['coco', 'folders', 'thesis.txt']
        assert not (tmp_path / 'coco/old.jpg').exists()
        assert (tmp_path / 'coco/annotations/train.json').exists()

    def test_folders_are_named_after_the_digit(self, tmp_path: Path) -> None:
        split = make_digits.load_splits(seed=0)['val']
        small = dict(split, labels=split['labels'][:6], digits=split['digits'][:6])
        make_digits.make_classification(tmp_path, 'val', small, copies=2, seed=0)
        found = sorted((p.parent.name, p.name) for p in tmp_path.glob('val/*/*.jpg'))
        expected = [
            (str(label), f'{i:04d}_{c}.jpg') for i, label in enumerate(small['labels']) for c in (0, 1)
        ]
        assert found == sorted(expected)


class TestSteps:
    """Three scripts: the second uses the first's result."""

    @pytest.fixture(autouse=True)
    def folder(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(run, 'OUT', tmp_path / 'out')
        for name in ('first.py', 'second.py', 'other.py'):
            self.write(name, '')

    def write(self, name: str, code: str) -> None:
        Path(name).write_text(
            f"from pathlib import Path\nPath('{name}.log').open('a').write('x')\n"
            f"Path('made_{name}').mkdir(exist_ok=True)\n{code}\n"
        )

    def run(self, again: bool = False) -> list[int]:
        """Run the steps, and return how often each was executed so far."""
        steps = [
            run.Step(name, name, 1, [name], [Path(f'made_{name}')], [name], needs)
            for name, needs in (('first.py', []), ('second.py', ['first.py']), ('other.py', []))
        ]
        try:
            run.run_steps(steps, again)
        finally:
            logs = [Path(f'{step.name}.log') for step in steps]
            times = [len(log.read_text()) if log.exists() else 0 for log in logs]
        return times

    def test_finished_steps_are_skipped(self) -> None:
        assert self.run() == [1, 1, 1]
        assert self.run() == [1, 1, 1]
        record = Path('out/steps.json')
        record.write_text(json.dumps(dict(json.loads(record.read_text()), another='demo')))
        assert self.run(again=True) == [2, 2, 2]
        assert json.loads(record.read_text())['another'] == 'demo'

    def test_changed_step_and_those_that_use_it_are_repeated(self) -> None:
        self.run()
        Path('made_second.py/old').touch()
        self.write('first.py', '# changed')
        assert self.run() == [2, 2, 1]
        assert not Path('made_second.py/old').exists()

    def test_lost_result_is_made_and_timed_again(self) -> None:
        self.run()
        record = Path('out/steps.json')
        steps = json.loads(record.read_text())
        steps['first.py']['seconds'] = 1000.0
        record.write_text(json.dumps(steps))
        Path('made_first.py').rmdir()
        assert self.run() == [2, 1, 1]
        assert json.loads(record.read_text())['first.py']['seconds'] < 100

    def test_failed_step_is_reported_and_resumed(self) -> None:
        self.write('second.py', "Path('made_second.py/part').touch()\nif Path('broken').exists(): 1 / 0")
        Path('broken').touch()
        with pytest.raises(SystemExit, match=r"(?s)ZeroDivisionError.*step 'second.py' failed with code 1"):
            self.run()
        Path('broken').unlink()
        assert self.run() == [1, 2, 1]
        assert Path('made_second.py/part').exists()

    def test_one_demo_at_a_time(self) -> None:
        """A step holds the lock itself: it may outlive a killed demo."""
        code = "import fcntl; fcntl.flock(open('out/lock'), fcntl.LOCK_EX | fcntl.LOCK_NB)"
        lock = run.lock_demo()
        assert subprocess.run([sys.executable, '-c', code], stderr=subprocess.DEVNULL).returncode != 0
        lock.close()
        assert subprocess.run([sys.executable, '-c', code]).returncode == 0
        files = "[os.path.realpath(f'/proc/self/fd/{n}') for n in os.listdir('/proc/self/fd')]"
        self.write('first.py', f"import os\nassert os.path.realpath('out/lock') in {files}")
        self.run()

    def test_progress_and_metrics_are_shown(self, capsys: pytest.CaptureFixture[str]) -> None:
        train = '11/22 16:25:02 - mmengine - INFO - Epoch(train) [1][30/90]  base_lr: 3.9e-03 lr: 3.9e-03  '
        train += (
            'eta: 0:03:37  time: 0.2  data_time: 0.1  memory: 9  grad_norm: 1.8  loss: 2.3428  loss_cls: 1.2'
        )
        val = 'x - INFO - Epoch(val) [1][6/6]    coco/bbox_mAP: 0.5  data_time: 0.1  time: 0.2'
        self.write('first.py', f"print({train!r})\nprint({val!r})\nprint('something else')")
        self.run()
        shown = [' '.join(line.split()) for line in capsys.readouterr().out.splitlines()]
        assert 'Epoch(train) [1][30/90] eta: 0:03:37 loss: 2.3428' in shown
        assert 'Epoch(val) [1][6/6] coco/bbox_mAP: 0.5' in shown
        assert len(shown) == 5


def entries(node: Any, key: str = '') -> dict[str, Any]:
    """All leaves of a config, by place."""
    if isinstance(node, (dict, list, tuple)) and len(node):
        items = node.items() if isinstance(node, dict) else enumerate(node)
        return {k: v for name, child in items for k, v in entries(child, f'{key}.{name}').items()}
    return {key[1:]: node}


# where a shrunk config may differ from the real one, but for its data
CHANGES = {
    'model': (
        '*num_classes',
        '*.window_size',
        'backbone.init_cfg.checkpoint',
        'backbone.frozen_stages',
        'backbone.norm_eval',
        'backbone.layer_scale_init_value',
        'data_preprocessor.size.*',
        'teacher*',
        'train_cfg.rcnn.sampler.num',
        'test_cfg.rpn.max_per_img',
    ),
    'optim_wrapper': ('optimizer.lr',),
    'param_scheduler': ('?.begin', '?.end', '?.T_max', '?.by_epoch', '?.convert_to_iter_based'),
    'train_cfg': ('max_epochs', 'max_iters', 'val_interval'),
    'val_evaluator': ('ann_file',),
    'test_evaluator': ('ann_file',),
    'default_hooks': ('logger.interval', 'checkpoint.interval'),
    'custom_hooks': ('0.momentum',),
    'env_cfg': (),
}


def test_the_demo_ends_with_what_opens_its_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip('onnxruntime')
    monkeypatch.setenv(web.VARIABLE, str(tmp_path))
    assert 'npm install --prefix' in run.how_to_open()
    assert 'page' not in [step.name for step in run.make_steps()]
    for name in web.NEEDED:
        (tmp_path / name).touch()
    assert 'python -m http.server 8000 --directory work_dirs/demo/page' in run.how_to_open()
    assert run.make_steps()[-1].command[-2:] == ['--out', 'work_dirs/demo/page']


class TestShrink:
    @pytest.fixture(autouse=True)
    def folder(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.chdir(ROOT)

    @pytest.fixture(params=list(METHODS))
    def configs(self, request: pytest.FixtureRequest) -> tuple[Config, Config]:
        method = METHODS[request.param]
        return Config.fromfile(method.config), shrink(method, Path('digits'), 'start.pth')

    def test_only_what_is_documented_changes(self, configs: tuple[Config, Config]) -> None:
        real, small = (c.to_dict() for c in configs)
        has_fpn = real['model'].get('neck', {}).get('type') == 'FPN'
        for part, allowed in CHANGES.items():
            before, after = entries(real.get(part, {})), entries(small.get(part, {}))
            for key in {*before, *after}:
                pair = (before.get(key), after.get(key))
                if pair[0] == pair[1] or any(fnmatch.fnmatch(key, pattern) for pattern in allowed):
                    continue
                assert has_fpn and pair == (256, 128) and 'channels' in key, (part, key, pair)

    def test_nothing_of_the_real_data_is_left(self, configs: tuple[Config, Config]) -> None:
        _, small = configs
        text = small.dump()
        for word in ('data/', 'checkpoints/', 'ADE20K', 'ImageNet', 'reduce_zero_label=True', 'tresnet'):
            assert word not in text
        classes = {v for k, v in entries(small.to_dict()).items() if k.endswith('num_classes')}
        assert classes == {11 if small.default_scope == 'mmseg' else 10}

    def test_schedule_keeps_its_shape(self, configs: tuple[Config, Config]) -> None:
        real, small = configs
        assert [s.type for s in small.param_scheduler] == ['LinearLR', 'CosineAnnealingLR']
        warm_up, decay = small.param_scheduler
        steps = decay.end
        assert warm_up.end == steps // 10
        loop = small.train_cfg
        total = 'max_epochs' if 'max_epochs' in real.train_cfg else 'max_iters'
        assert loop[total] == 2 * loop.val_interval
        share = real.param_scheduler[1].begin / real.train_cfg[total]
        assert decay.begin / steps == pytest.approx(max(share, 0.1), abs=0.01)

    def test_parts_fit_together(self, configs: tuple[Config, Config]) -> None:
        _, small = configs
        pytest.importorskip(small.default_scope)
        with DefaultScope.overwrite_default_scope(small.default_scope):
            model = MODELS.build(small.model).eval()
        features = model.extract_feat(torch.zeros(1, 3, 96, 96))
        for name, head in model.named_children():
            if name == 'roi_head':
                regions = torch.tensor([[0.0, 0, 0, 48, 48]])
                head._bbox_forward(features, regions)
                head._mask_forward(features, regions)
            elif 'head' in name:
                head(features)


class TestReport:
    """From what training and testing leave behind; the pictures are in the test below."""

    METHODS = {name: METHODS[name] for name in ('mask-rcnn', 'pspnet')}

    @pytest.fixture(autouse=True)
    def folder(self, tmp_path: Path) -> None:
        for name, half, midway, end in (
            ('mask-rcnn', 1, {BOX: 0.2, MASK: 0.1}, {BOX: 0.4, MASK: 0.3}),
            ('pspnet', 150, {'mIoU': 20.0}, {'mIoU': 31.0}),
        ):
            (tmp_path / 'configs').mkdir(exist_ok=True)
            (tmp_path / f'configs/{name}.py').write_text(f'train_cfg = dict(val_interval={half})\n')
            lines = [dict(step=1, lr=1.0), dict(midway, step=half), dict(end, step=2 * half)]
            self.write(tmp_path / name / '1/vis_data/scalars.json', *lines)
            self.write(tmp_path / f'test-{name}/1/1.json', end)

    def write(self, path: Path, *lines: dict[str, float]) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text('\n'.join(map(json.dumps, lines)))

    def scores(self, folder: Path) -> list[report_demo.Score]:
        seconds = {'mask-rcnn': 120.0, 'pspnet': 60.0}
        return report_demo.read_scores(folder, self.METHODS, seconds, {BOX: 0.0, MASK: 0.0, 'mIoU': 8.5})

    def test_scores_in_percent(self, tmp_path: Path) -> None:
        scores = self.scores(tmp_path)
        assert [tuple(score) for score in scores] == [
            ('Mask R-CNN', BOX, 0.0, 20.0, 40.0, 120.0),
            ('Mask R-CNN', MASK, 0.0, 10.0, 30.0, 120.0),
            ('PSPNet', 'mIoU', 8.5, 20.0, 31.0, 60.0),
        ]
        report_demo.check_scores(scores)
        last = report_demo.make_table(scores).splitlines()[-1]
        assert ' '.join(last.split()) == '| PSPNet | mIoU | 8.5 | 20.0 | 31.0 | 1.0 |'

    def test_detector_without_detections_is_an_error(self, tmp_path: Path) -> None:
        """MMDetection reports no AP then."""
        self.write(tmp_path / 'test-mask-rcnn/1/1.json', {})
        self.write(tmp_path / 'mask-rcnn/1/vis_data/scalars.json', dict(step=1, lr=1.0))
        scores = self.scores(tmp_path)
        assert (scores[0].midway, scores[0].end) == (None, 0.0)
        with pytest.raises(SystemExit, match=r'Mask R-CNN +\| box AP +\| 0\.0 +\| - '):
            report_demo.check_scores(scores)

    @pytest.mark.parametrize('change', [dict(midway=31.0), dict(midway=10.0, end=16.0)])
    def test_method_that_has_not_learned_is_an_error(self, tmp_path: Path, change: dict[str, float]) -> None:
        """The metric must rise, and be well above chance."""
        *others, pspnet = self.scores(tmp_path)
        with pytest.raises(SystemExit, match='PSPNet') as end:
            report_demo.check_scores([*others, pspnet._replace(**change)])
        assert 'Mask' not in str(end.value)

    def test_chances(self, tmp_path: Path) -> None:
        (tmp_path / 'coco/maps/val').mkdir(parents=True)
        semantic = np.zeros((4, 4), np.uint8)
        semantic[0] = 3
        cv2.imwrite(str(tmp_path / 'coco/maps/val/0.png'), semantic)
        for digit in range(10):
            (tmp_path / f'folders/val/{digit}').mkdir(parents=True)
            for number in range(3 if digit == 7 else 2):
                (tmp_path / f'folders/val/{digit}/{number}.jpg').touch()
        chances = report_demo.measure_chances(tmp_path)
        assert chances['mIoU'] == pytest.approx(75 / 11)
        assert chances['accuracy/top1'] == pytest.approx(100 * 3 / 21)
        assert set(chances) == set(report_demo.METRICS)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_demo_trains_and_reports(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both demos from data to pictures, with a method of each library; too short to learn anything."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv('OMP_NUM_THREADS', '1')
    for name in ('tools', 'configs'):
        Path(name).symlink_to(ROOT / name)
    short = dict(steps=20, batch=2, epochs=2)
    methods = {name: METHODS[name]._replace(**short) for name in ('mask-rcnn', 'fpn', 'kd')}
    methods['mask-rcnn'] = methods['mask-rcnn']._replace(start='classify', lr=1e-3)
    methods['fpn'] = methods['fpn']._replace(start='mask-rcnn')
    monkeypatch.setattr(run, 'METHODS', methods)
    limits = dict(
        data=['--scenes', '20', '--val-scenes', '8', '--copies', '1'],
        classify=['--cfg-options', 'train_dataloader.dataset.indices=8'],
        detect=['--cfg-options', 'train_dataloader.dataset.indices=8', 'model.test_cfg.score_thr=0.0'],
    )
    limits['test-detect'] = ['model.test_cfg.score_thr=0.0']  # after its own --cfg-options
    *steps, _ = run.make_all_steps()
    one = run.make_steps()
    for step in [*steps, *one]:
        step.command.extend(limits.get(step.name, []))
    run.run_steps(steps)
    run.run_steps(one)

    out = Path('work_dirs/demo')
    seconds = {name: step['seconds'] for name, step in json.loads((out / 'steps.json').read_text()).items()}
    with pytest.raises(SystemExit, match='not clearly above chance'):
        report_demo.report_all(out / 'all', Path('data/digits'), seconds, methods)
    assert '| Mask R-CNN ' in (out / 'all/results.md').read_text()
    results = json.loads((out / 'results.json').read_text())
    assert {'top1', 'bbox_mAP', 'bbox_mAP_50', 'seconds', 'versions', 'summary'} <= set(results)
    pictures = [*out.glob('*.png'), *out.glob('all/*.png')]
    assert sorted(p.stem for p in pictures) == [
        *('boxes', 'classification', 'curves', 'maps', 'masks', 'predictions')
    ]
    assert all(cv2.imread(str(picture)).std() > 10 for picture in pictures)
