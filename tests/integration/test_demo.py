"""The demo: honest data, steps that are not redone, a report that reads what really happened."""

from __future__ import annotations

import fnmatch
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from mmengine.config import Config
from mmengine.registry import MODELS, DefaultScope
from PIL import Image
from helpers.tiny import ROOT

cv2 = pytest.importorskip('cv2')
pytest.importorskip('sklearn')
pytest.importorskip('skimage')
rich_console = pytest.importorskip('rich.console')
COCO = pytest.importorskip('pycocotools.coco').COCO

plt = pytest.importorskip('matplotlib.pyplot')
import make_digits
import report
import report_all
import run
from shrink import METHODS, shrink

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

    def test_each_scene_has_an_image_and_a_map(self, folder: Path, coco: COCO) -> None:
        files = [image['file_name'] for image in coco.loadImgs(coco.getImgIds())]
        assert files == sorted(p.name for p in (folder / 'val').iterdir())
        maps = sorted(p.name for p in (folder / 'maps/val').iterdir())
        assert maps == [file.replace('.jpg', '.png') for file in files]

    def test_masks_make_up_the_maps(self, folder: Path, coco: COCO) -> None:
        for image in coco.loadImgs(coco.getImgIds()):
            semantic = cv2.imread(str(folder / f'maps/val/{image["id"]:05d}.png'), cv2.IMREAD_UNCHANGED)
            union = np.zeros((make_digits.SCENE, make_digits.SCENE), np.uint8)
            for annotation in coco.loadAnns(coco.getAnnIds(image['id'])):
                mask = coco.annToMask(annotation)
                assert mask.sum() == annotation['area']
                cv2.fillConvexPoly(union, cv2.convexHull(cv2.findNonZero(mask)), annotation['category_id'])
                assert (semantic[mask > 0] == annotation['category_id']).all()
            assert (semantic == union).all()

    def test_a_mask_is_where_the_digit_is_bright(self, folder: Path, coco: COCO) -> None:
        """Digits have full brightness in one channel, their background has a third of it."""
        for annotation in coco.anns.values():
            pixels = cv2.imread(str(folder / f'val/{annotation["image_id"]:05d}.jpg')).max(axis=2)
            x, y, w, h = annotation['bbox']
            mask = coco.annToMask(annotation)[y : y + h, x : x + w] > 0
            bright = pixels[y : y + h, x : x + w] > 165
            assert (bright == mask).mean() > 0.93, annotation

    def test_masks_of_zeros_have_a_hole(self, coco: COCO) -> None:
        zeros = coco.loadAnns(coco.getAnnIds(catIds=[1]))
        parts = [cv2.connectedComponents(1 - coco.annToMask(zero), connectivity=4)[0] for zero in zeros]
        assert parts
        assert all(n >= 3 for n in parts)  # mask, outside, hole

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

    def test_other_files_of_the_folder_stay(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
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

    def run(self, again: bool = False) -> None:
        steps = [
            run.Step(name, name, 1, [name], [name], [Path(f'made_{name}')], needs)
            for name, needs in (('first.py', ()), ('second.py', ('first.py',)), ('other.py', ()))
        ]
        console = rich_console.Console(quiet=True)
        run.run_steps(steps, console, again)

    def times(self, name: str) -> int:
        path = Path(f'{name}.log')
        return len(path.read_text()) if path.exists() else 0

    def test_finished_steps_are_not_done_again(self) -> None:
        self.run()
        self.run()
        assert (self.times('first.py'), self.times('second.py')) == (1, 1)

    def test_again_does_its_own_steps_only(self) -> None:
        self.run()
        record = Path('out/steps.json')
        record.write_text(json.dumps(dict(json.loads(record.read_text()), another='demo')))
        self.run(again=True)
        assert [self.times(name) for name in ('first.py', 'second.py', 'other.py')] == [2, 2, 2]
        assert json.loads(record.read_text())['another'] == 'demo'

    def test_a_changed_step_and_all_that_need_it_are_begun_anew(self) -> None:
        self.run()
        Path('made_second.py/old').touch()
        self.write('first.py', '# changed')
        self.run()
        assert [self.times(name) for name in ('first.py', 'second.py', 'other.py')] == [2, 2, 1]
        assert not Path('made_second.py/old').exists()

    def test_a_lost_result_is_made_again_and_timed_anew(self) -> None:
        self.run()
        record = Path('out/steps.json')
        steps = json.loads(record.read_text())
        steps['first.py']['seconds'] = 1000.0
        record.write_text(json.dumps(steps))
        Path('made_first.py').rmdir()
        self.run()
        assert (self.times('first.py'), self.times('second.py')) == (2, 1)
        assert json.loads(record.read_text())['first.py']['seconds'] < 100

    def test_only_one_demo_is_at_work(self) -> None:
        console = rich_console.Console(quiet=True)
        lock = run.hold_lock(console)
        code = "import fcntl; fcntl.flock(open('out/lock'), fcntl.LOCK_EX | fcntl.LOCK_NB)"
        busy = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True)
        assert 'BlockingIOError' in busy.stderr
        lock.close()
        assert subprocess.run([sys.executable, '-c', code]).returncode == 0

    def test_a_step_holds_the_lock_by_itself(self) -> None:
        self.write(
            'first.py',
            "import os; Path('lock_of_step').write_text(str(os.path.sameopenfile("
            "int(max(f for f in os.listdir('/proc/self/fd') if Path('/proc/self/fd/' + f)"
            ".resolve().name == 'lock')), os.open('out/lock', os.O_RDONLY))))",
        )
        self.run()
        assert Path('lock_of_step').read_text() == 'True'

    def test_a_failed_step_says_why_and_goes_on_with_what_it_had(self, tmp_path: Path) -> None:
        self.write('second.py', "Path('made_second.py/part').touch()\nif Path('broken').exists(): 1 / 0")
        Path('broken').touch()
        with pytest.raises(SystemExit, match=r"(?s)ZeroDivisionError.*step 'second.py' failed with code 1"):
            self.run()
        Path('broken').unlink()
        self.run()
        assert (self.times('first.py'), self.times('second.py')) == (1, 2)
        assert Path('made_second.py/part').exists()

    def test_progress_is_read_from_the_log(self) -> None:
        line = (
            '11/22 16:25:02 - mmengine - INFO - Epoch(train) [1][30/90]  base_lr: 3.8893e-03 '
            'lr: 3.8893e-03  eta: 0:03:37  time: 0.2040  grad_norm: 1.7891  loss: 2.3428'
        )
        assert run.progress_of(line) == 'epoch 1, step 30 of 90, loss 2.343, time left 0:03:37'
        assert run.progress_of('Epoch(val) [2][ 5/25]    eta: 0:00:01') == 'evaluation, step 5 of 25'
        line = (
            'Iter(train) [ 30/300]  base_lr: 1e-03 lr: 1e-03  eta: 0:02:01  time: 0.4  loss: 1.2346  decode'
        )
        assert run.progress_of(line) == 'step 30 of 300, loss 1.235, time left 0:02:01'
        assert run.progress_of('something else') == ''


class TestReport:
    def test_curves_of_a_resumed_run(self, tmp_path: Path) -> None:
        """Steps after the last checkpoint are trained twice: the second time counts."""
        for run_name, lines in (
            ('1', [dict(loss=3.0, step=10, epoch=1), dict(loss=2.0, step=20, epoch=1), dict(ap=0.1, step=1)]),
            ('2', [dict(loss=1.5, step=20, epoch=1), dict(loss=1.0, step=40, epoch=2), dict(ap=0.3, step=2)]),
        ):
            path = tmp_path / run_name / 'vis_data/scalars.json'
            path.parent.mkdir(parents=True)
            path.write_text('\n'.join(map(json.dumps, lines)))
        curves = report.read_log(tmp_path, 'loss', ['ap'])
        assert curves == dict(loss=[(10, 3.0), (20, 1.5), (40, 1.0)], ap=[(20, 0.1), (40, 0.3)])


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


class TestAllReported:
    """The report of all methods, from what training and testing leave behind."""

    @pytest.fixture(autouse=True)
    def methods(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        monkeypatch.setattr(report_all, 'METHODS', {n: METHODS[n] for n in ('mask-rcnn', 'pspnet')})
        (tmp_path / 'configs').mkdir()
        for name, scope, metric, half, midway, end in (
            ('mask-rcnn', 'mmdet', ['bbox', 'segm'], 1, {BOX: 0.2, MASK: 0.1}, {BOX: 0.4, MASK: 0.3}),
            ('pspnet', 'mmseg', None, 150, {'mIoU': 20.0}, {'mIoU': 31.0}),
        ):
            (tmp_path / f'configs/{name}.py').write_text(
                f"default_scope = '{scope}'\ntest_evaluator = dict(metric={metric})\n"
                f'train_cfg = dict(val_interval={half})\n'
            )
            self.write(tmp_path / name / '1/vis_data/scalars.json', dict(midway, step=half))
            self.write(tmp_path / name / '2/vis_data/scalars.json', dict(end, step=2 * half))
            self.write(tmp_path / f'test-{name}/1/1.json', end)

    def write(self, path: Path, values: dict[str, float]) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(values))

    def scores(self, folder: Path) -> list[report_all.Score]:
        seconds = {'mask-rcnn': 120.0, 'pspnet': 60.0}
        return report_all.read_scores(folder, seconds, {BOX: 0.0, MASK: 0.0, 'mIoU': 8.5})

    def test_scores_in_percent(self, tmp_path: Path) -> None:
        assert [tuple(score) for score in self.scores(tmp_path)] == [
            ('Mask R-CNN', BOX, 0.0, 20.0, 40.0, 120.0),
            ('Mask R-CNN', MASK, 0.0, 10.0, 30.0, 120.0),
            ('PSPNet', 'mIoU', 8.5, 20.0, 31.0, 60.0),
        ]
        report_all.check(self.scores(tmp_path))

    def test_a_test_that_disagrees_with_the_training_is_an_error(self, tmp_path: Path) -> None:
        self.write(tmp_path / 'test-pspnet/1/1.json', {'mIoU': 30.0})
        with pytest.raises(SystemExit, match=r'pspnet had mIoU 31\.00 when .* has 30\.00'):
            self.scores(tmp_path)

    def test_a_detector_that_finds_nothing_is_an_error(self, tmp_path: Path) -> None:
        """MMDetection has no AP then."""
        self.write(tmp_path / 'test-mask-rcnn/1/1.json', {})
        for log in (tmp_path / 'mask-rcnn').rglob('scalars.json'):
            log.write_text('')
        with pytest.raises(SystemExit, match=r'Mask R-CNN: box AP 0\.0 midway, 0\.0 at the end, by chance'):
            report_all.check(self.scores(tmp_path))

    def test_an_interrupted_evaluation_is_left_open(self, tmp_path: Path) -> None:
        (tmp_path / 'pspnet/1/vis_data/scalars.json').write_text('')
        scores = self.scores(tmp_path)
        assert (scores[-1].midway, scores[-1].end) == (None, 31.0)
        report_all.check(scores)
        report_all.write_results(tmp_path, scores, [])
        text = (tmp_path / 'results.md').read_text()
        assert '| PSPNet | mIoU | 8.5 | - | 31.0 | 1.0 |' in text
        assert '-: found nothing yet, or the evaluation was interrupted' in text

    @pytest.mark.parametrize('change', [dict(midway=31.0), dict(midway=10.0, end=16.0)])
    def test_what_has_not_learned_is_named(self, tmp_path: Path, change: dict[str, float]) -> None:
        """It must rise, and be well above chance."""
        *others, pspnet = self.scores(tmp_path)
        with pytest.raises(SystemExit, match=r'PSPNet: mIoU .* midway, .* at the end, by chance 8\.5') as end:
            report_all.check([*others, pspnet._replace(**change)])
        assert 'Mask' not in str(end.value)

    def test_tables(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        report_all.write_results(tmp_path, self.scores(tmp_path), [Path('maps.png')])
        text = (tmp_path / 'results.md').read_text()
        assert '| PSPNet | mIoU | 8.5 | 20.0 | 31.0 | 1.0 |' in text
        assert 'chance of mIoU: background everywhere' in text
        monkeypatch.setattr(run, 'ALL', tmp_path)
        with open(os.devnull, 'w') as nowhere:
            console = rich_console.Console(record=True, width=100, file=nowhere)
            run.print_all(console)
        text = console.export_text()
        assert re.search(r'Mask R-CNN . mask AP . +0\.0 . +10\.0 . +30\.0 . +2\.0', text)
        assert 'took 3.0 minutes' in text
        assert 'maps.png' in text

    def test_chances(self, tmp_path: Path) -> None:
        (tmp_path / 'coco/maps/val').mkdir(parents=True)
        semantic = np.zeros((4, 4), np.uint8)
        semantic[0] = 3
        cv2.imwrite(str(tmp_path / 'coco/maps/val/0.png'), semantic)
        for digit in range(10):
            (tmp_path / f'folders/val/{digit}').mkdir(parents=True)
            for number in range(3 if digit == 7 else 2):
                (tmp_path / f'folders/val/{digit}/{number}.jpg').touch()
        chances = report_all.measure_chances(tmp_path)
        assert chances['mIoU'] == pytest.approx(75 / 11)
        assert chances['accuracy/top1'] == pytest.approx(100 * 3 / 21)
        assert set(chances) == set(report_all.NAMES) == set(report_all.CHANCES)


class TestLabels:
    def place(self, boxes: list[tuple[list[int], int, str]]) -> list[Any]:
        fig, ax = plt.subplots(figsize=(2, 2))
        report.draw_boxes(ax, Image.new('RGB', (192, 192)), boxes)
        fig.canvas.draw()
        extents = [text.get_bbox_patch().get_window_extent() for text in ax.texts]
        frame = ax.get_window_extent()
        plt.close(fig)
        for extent in extents:
            assert frame.x0 - 1 <= extent.x0 < extent.x1 <= frame.x1 + 1
            assert frame.y0 - 1 <= extent.y0 < extent.y1 <= frame.y1 + 1
        return extents

    @pytest.mark.parametrize('x', [0, 170])
    @pytest.mark.parametrize('y', [0, 165])
    def test_labels_stay_in_the_picture(self, x: int, y: int) -> None:
        self.place([([x, y, 20, 26], 1, '1  0.99')])

    def test_labels_do_not_overlap(self) -> None:
        boxes = [([80, 60, 30, 40], i, f'{i}  0.9{i}') for i in range(4)]
        boxes.append(([112, 60, 20, 30], 5, '5  0.80'))
        extents = self.place(boxes)
        for i, a in enumerate(extents):
            for b in extents[:i]:
                assert min(a.x1, b.x1) - max(a.x0, b.x0) < 1 or min(a.y1, b.y1) - max(a.y0, b.y0) < 1


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_methods_train_and_are_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One method of each code base, all the way from data to pictures; no time to learn anything."""
    for scope in ('mmdet', 'mmseg', 'mmpretrain'):
        pytest.importorskip(scope)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv('OMP_NUM_THREADS', '1')
    for name in ('tools', 'configs'):
        Path(name).symlink_to(ROOT / name)
    short = dict(steps=20, batch=2, epochs=2)
    methods = {name: METHODS[name]._replace(**short) for name in ('mask-rcnn', 'fpn', 'kd')}
    methods['mask-rcnn'] = methods['mask-rcnn']._replace(start='classify', lr=1e-3)
    methods['fpn'] = methods['fpn']._replace(start='mask-rcnn')
    monkeypatch.setattr(run, 'METHODS', methods)
    monkeypatch.setattr(report_all, 'METHODS', methods)
    *steps, _ = run.make_all_steps()
    steps[0].command.extend(['--scenes', '20', '--val-scenes', '8', '--copies', '1'])
    steps[1].command.extend(['--cfg-options', 'train_dataloader.dataset.indices=8'])
    run.run_steps(steps, rich_console.Console(quiet=True))

    words = ['work_dirs/demo', '--data', 'data/digits']
    monkeypatch.setattr(sys, 'argv', ['report_all.py', *words])
    with pytest.raises(SystemExit, match='not clearly above chance'):
        report_all.main()
    out = Path('work_dirs/demo/all')
    scores = json.loads((out / 'results.json').read_text())['scores']
    assert [s['metric'] for s in scores] == [BOX, MASK, 'mIoU', 'accuracy/top1']
    assert all(np.isfinite(s['end']) for s in scores)
    for name in ('classification', 'boxes', 'masks', 'maps'):
        assert cv2.imread(str(out / f'{name}.png')).std() > 10
