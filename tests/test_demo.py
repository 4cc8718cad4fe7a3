"""The demo: honest data, steps that are not redone, a report that reads what really happened."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from tiny import ROOT

pytest.importorskip('sklearn')
pytest.importorskip('skimage')
rich_console = pytest.importorskip('rich.console')
COCO = pytest.importorskip('pycocotools.coco').COCO

sys.path.insert(0, str(ROOT / 'tools' / 'demo'))
import make_digits  # noqa: E402
import report  # noqa: E402
import run  # noqa: E402


class TestData:
    def test_training_and_validation_share_neither_digits_nor_photographs(self) -> None:
        splits = make_digits.load_splits(seed=0)
        digits = [{d.tobytes() for d in splits[name]['digits']} for name in ('train', 'val')]
        assert sum(len(splits[name]['labels']) for name in splits) == 1797
        assert len(splits['val']['labels']) == 359
        assert not digits[0] & digits[1]
        assert not set(make_digits.TRAIN_PHOTOS) & set(make_digits.VAL_PHOTOS)
        assert {len(set(splits[name]['labels'])) for name in splits} == {10}

    @pytest.fixture(scope='class')
    def coco(self, tmp_path_factory: pytest.TempPathFactory) -> COCO:
        out = tmp_path_factory.mktemp('digits')
        split = make_digits.load_splits(seed=0)['val']
        make_digits.make_detection(out, 'val', split, count=12, seed=0)
        coco = COCO(str(out / 'annotations/val.json'))
        assert sorted(p.name for p in (out / 'val').iterdir()) == [
            image['file_name'] for image in coco.loadImgs(coco.getImgIds())
        ]
        return coco

    def test_boxes_are_as_tight_as_the_masks(self, coco: COCO) -> None:
        for annotation in coco.anns.values():
            mask = coco.annToMask(annotation)
            ys, xs = np.where(mask)
            x, y, w, h = annotation['bbox']
            assert min(x, y) >= 0
            assert max(x + w, y + h) <= make_digits.SCENE
            # a polygon runs through the centres of the outermost pixels, and glyphs have soft edges
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
        for name in ('first.py', 'second.py'):
            self.write(name, '')

    def write(self, name: str, code: str) -> None:
        Path(name).write_text(
            f"from pathlib import Path\nPath('{name}.log').open('a').write('x')\n"
            f"Path('made_{name}').mkdir(exist_ok=True)\n{code}\n"
        )

    def run(self) -> None:
        steps = [
            run.Step(name, name, 1, [name], [name], [Path(f'made_{name}')])
            for name in ('first.py', 'second.py')
        ]
        console = rich_console.Console(quiet=True)
        run.run_steps(steps, console)

    def times(self, name: str) -> int:
        path = Path(f'{name}.log')
        return len(path.read_text()) if path.exists() else 0

    def test_finished_steps_are_not_done_again(self) -> None:
        self.run()
        self.run()
        assert (self.times('first.py'), self.times('second.py')) == (1, 1)

    def test_a_changed_step_and_all_after_it_are_begun_anew(self) -> None:
        self.run()
        Path('made_second.py/old').touch()
        self.write('first.py', '# changed')
        self.run()
        assert (self.times('first.py'), self.times('second.py')) == (2, 2)
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
