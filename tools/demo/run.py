"""Run the demo: make data, train on this machine, evaluate, draw pictures.

By default a classifier and a detector of handwritten digits. With --all, every method briefly from its real
config, which shrink.py makes smaller.

Each step runs one of the project's tools. Finished steps are skipped, and an interrupted training resumes
from its last checkpoint. A step whose command, config or script has changed is run again, and so are the
steps that use its results.
"""

from __future__ import annotations

import argparse
import fcntl
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple, TextIO

from mmengine.config import Config
from shrink import CLASSIFIER, METHODS, Method, shrink

ROOT = Path(__file__).resolve().parents[2]
OUT = Path('work_dirs/demo')
ALL = OUT / 'all'  # what only --all makes
PAGE = OUT / 'page'
DATA = Path('data/digits')
DETECTOR = 'configs/demo/retinanet_emo2_1m_digits.py'
NOT_SHOWN = re.compile(r'\b(base_lr|lr|time|data_time|memory|grad_norm|\w+\.?loss\w*|loss_\w+): \S+ *')


class Step(NamedTuple):
    """A command, what it is for, how many minutes it takes on two cores, and what it depends on."""

    name: str
    title: str
    minutes: float
    command: list[str]
    made: list[Path]  # removed before the step starts again
    inputs: list[str] = []  # configs and scripts
    needs: list[str] = []  # names of the steps whose results it uses


def last_checkpoint(config: str, work_dir: Path) -> str:
    loop = Config.fromfile(config).train_cfg
    name = f'epoch_{loop.max_epochs}' if 'max_epochs' in loop else f'iter_{loop.max_iters}'
    return str(work_dir / f'{name}.pth')


def train_and_test(
    name: str, title: str, minutes: float, config: str, folder: Path, need: str, *test_args: str
) -> list[Step]:
    """Training of a config in ``folder / name`` and test of its last checkpoint in ``folder / test-name``."""
    train, test = folder / name, folder / f'test-{name}'
    train_it = ['tools/train.py', config, '--work-dir', str(train), '--resume']
    test_it = ['tools/test.py', config, last_checkpoint(config, train), '--work-dir', str(test), *test_args]
    return [
        Step(name, title, minutes, train_it, [train], [config], [need]),
        Step(f'test-{name}', 'evaluate on held-out digits', 0.3, test_it, [test], needs=[name]),
    ]


def make_report(name: str, folder: Path, needs: list[str], *args: str) -> Step:
    script = 'tools/demo/report_demo.py'
    command = [script, str(OUT), '--data', str(DATA), *args]
    return Step(name, 'draw pictures', 0.2, command, [folder / 'results.json'], [script], needs)


def data_and_classifier() -> list[Step]:
    script = 'tools/demo/make_digits.py'
    made = [DATA / 'coco', DATA / 'folders']
    return [
        Step('data', 'real handwritten digits over photographs', 0.2, [script, str(DATA)], made, [script]),
        *train_and_test('classify', 'EMOv2-1M classifies them (MMPretrain)', 1.5, CLASSIFIER, OUT, 'data'),
    ]


def make_steps() -> list[Step]:
    title = 'RetinaNet on EMOv2-1M, from these weights, detects them (MMDetection)'
    keep = f'test_evaluator.outfile_prefix={OUT}/test-detect/predictions'
    detect = train_and_test('detect', title, 7, DETECTOR, OUT, 'classify', '--cfg-options', keep)
    report = make_report('report', OUT, ['test-classify', 'test-detect'])
    return [*data_and_classifier(), *detect, report, *([] if missing_for_page() else [make_page()])]


def missing_for_page() -> list[str]:
    """What has to be installed for the page, in words."""
    from emo2_mm.export.formats import FORMATS  # it imports torch

    return FORMATS['web'].missing()


def make_page() -> Step:
    checkpoint = last_checkpoint(DETECTOR, OUT / 'detect')
    command = ['tools/export.py', DETECTOR, checkpoint, '--format', 'web', '--out', str(PAGE)]
    return Step(
        'page', 'put the detector on a page for a browser', 0.5, command, [PAGE], [DETECTOR], ['detect']
    )


def how_to_open() -> str:
    """The command that opens the page, or those that are needed for it."""
    if not missing_for_page():
        return f'in a browser: python -m http.server 8000 --directory {PAGE}, then open http://localhost:8000'
    from emo2_mm.export.formats import FORMATS

    commands = '\n'.join(f'  {command}' for command in FORMATS['web'].environment[:2])
    return f'to try the detector in a browser, run these and `make demo` again:\n{commands}'


def make_all_steps() -> list[Step]:
    return [
        *data_and_classifier()[:2],
        *(step for name, method in METHODS.items() for step in method_steps(name, method)),
        make_report('report-all', ALL, [f'test-{name}' for name in METHODS], '--all'),
    ]


def method_steps(name: str, method: Method) -> list[Step]:
    """Training and test of a method; writes the shrunk config that they read."""
    config, test = ALL / f'configs/{name}.py', ALL / f'test-{name}'
    config.parent.mkdir(parents=True, exist_ok=True)
    if method.start == 'classify':
        start = last_checkpoint(CLASSIFIER, OUT / 'classify')
    else:
        start = last_checkpoint(str(ALL / f'configs/{method.start}.py'), ALL / method.start)
    shrink(method, DATA, start).dump(config)
    if '/det/' in method.config:
        keep = ['--cfg-options', f'test_evaluator.outfile_prefix={test}/predictions']
    else:
        keep = ['--out', str(test / ('predictions.pkl' if '/cls/' in method.config else 'maps'))]
    title = f'{method.title}: {method.steps} steps of {method.batch} images from {method.config}'
    return train_and_test(name, title, method.minutes, str(config), ALL, method.start, *keep)


def fingerprint(step: Step, before: list[str]) -> str:
    """A hash of what a step's result depends on: its command, its files and the steps ``before``."""
    parts = [*before, *step.command]
    for name in step.inputs:
        parts.append(Config.fromfile(name).dump() if 'configs' in name else Path(name).read_text())
    return hashlib.sha256('\n'.join(parts).encode()).hexdigest()[:16]


def execute(step: Step, lock: TextIO) -> None:
    """Run a step with its output in a log file, and show the progress that it reports."""
    log = OUT / 'logs' / f'{step.name}.log'
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open('a') as file, subprocess.Popen(
        [sys.executable, *step.command],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors='replace',
        pass_fds=[lock.fileno()],  # if this process is killed, its child still holds the lock
    ) as process:
        assert process.stdout is not None
        try:
            for line in process.stdout:
                file.write(line)
                file.flush()
                if ' Epoch(' in line or ' Iter(' in line:
                    print('     ', NOT_SHOWN.sub('', line.partition('INFO - ')[2].strip()), flush=True)
        except BaseException:
            process.terminate()
            raise
    if process.returncode:
        tail = '\n'.join(log.read_text(errors='replace').splitlines()[-15:])
        code = process.returncode
        raise SystemExit(f'{tail}\nerror: step {step.name!r} failed with code {code}; its log: {log}')


def lock_demo() -> TextIO:
    """Wait until no other demo, nor a step of a killed one, is running here."""
    OUT.mkdir(parents=True, exist_ok=True)
    lock = (OUT / 'lock').open('w')
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        print('another demo, or a step of a killed one, is running here: waiting for it', flush=True)
        fcntl.flock(lock, fcntl.LOCK_EX)
    return lock


def run_steps(steps: list[Step], again: bool = False) -> None:
    """Run the steps that are unfinished or outdated. ``steps.json`` records what was done."""
    lock = lock_demo()
    file = OUT / 'steps.json'
    record = json.loads(file.read_text()) if file.exists() else {}
    prints: dict[str, str] = {}

    def save() -> None:
        file.with_suffix('.part').write_text(json.dumps(record, indent=2))
        file.with_suffix('.part').replace(file)

    for number, step in enumerate(steps, 1):
        current = prints[step.name] = fingerprint(step, [prints[name] for name in step.needs])
        done = record.get(step.name, {})
        lost = done.get('finished') and not all(path.exists() for path in step.made)
        if again or lost or done.get('fingerprint') != current:
            for path in step.made:
                shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
            done = record[step.name] = dict(fingerprint=current, finished=False, seconds=0.0)
        time_needed = 'done before' if done['finished'] else f'about {step.minutes:g} min on 2 cores'
        print(f'[{number}/{len(steps)}] {step.title} ({time_needed})', flush=True)
        if done['finished']:
            continue
        save()  # before it, too: what a killed step leaves can be resumed
        begun = time.monotonic()
        try:
            execute(step, lock)
            done['finished'] = True
        finally:
            done['seconds'] = round(done['seconds'] + time.monotonic() - begun, 1)
            save()


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument('--all', action='store_true', help='train every method instead of one detector')
    parser.add_argument('--again', action='store_true', help='run all steps again')
    args = parser.parse_args()
    run_steps(make_all_steps() if args.all else make_steps(), args.again)
    print(json.loads(((ALL if args.all else OUT) / 'results.json').read_text())['summary'])
    if not args.all:
        print(how_to_open())


if __name__ == '__main__':
    os.chdir(ROOT)
    try:
        main()
    except KeyboardInterrupt:
        raise SystemExit('\ninterrupted; the same command continues') from None
