"""Train a digit detector from nothing on this machine: the whole way from data to pictures.

Each step calls the project's own tools with shipped configs. Finished steps are not done again; an
interrupted one goes on from its last checkpoint.

With --all every method trains briefly from its real config, which shrink.py makes smaller: SSDLite,
RetinaNet, Mask R-CNN, DeepLabv3, Semantic FPN, SegFormer, PSPNet and a distilled classifier.
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
from functools import partial
from pathlib import Path
from typing import Any, Callable, NamedTuple, TextIO

from mmengine.config import Config
from rich.console import Console
from rich.table import Table
from shrink import CLASSIFIER as CLASSIFY
from shrink import METHODS, Method, shrink

ROOT = Path(__file__).resolve().parents[2]
OUT = Path('work_dirs/demo')
ALL = OUT / 'all'  # what only --all makes
DATA = Path('data/digits')
DETECT = 'configs/demo/retinanet_emo2_1m_digits.py'
PROGRESS = re.compile(
    r'(?:Epoch|Iter)\((train|val|test)\)\s+(?:\[(\d+)\])?\[\s*(\d+)/(\d+)\]'
    r'(?:.*?eta: (\S+))?(?:.*?\bloss: (\S+))?'
)


class Step(NamedTuple):
    """One command, what it does, how long it takes on two cores, and what makes it outdated."""

    name: str
    title: str
    minutes: float
    command: list[str]
    inputs: list[str]
    made: list[Path]  # removed before the step is begun anew
    needs: tuple[str, ...]  # names of the steps whose results it takes


def last_checkpoint(config: str, work_dir: Path) -> str:
    loop = Config.fromfile(config).train_cfg
    name = f'epoch_{loop.max_epochs}' if 'max_epochs' in loop else f'iter_{loop.max_iters}'
    return str(work_dir / f'{name}.pth')


def make_steps() -> list[Step]:
    classify, detect = OUT / 'classify', OUT / 'detect'
    return [
        Step(
            'data',
            'draw real handwritten digits over real photographs',
            0.2,
            ['tools/demo/make_digits.py', str(DATA)],
            ['tools/demo/make_digits.py'],
            [DATA / 'coco', DATA / 'folders'],
            (),
        ),
        Step(
            'classify',
            'EMOv2-1M learns to classify them (MMPretrain)',
            1.5,
            ['tools/train.py', CLASSIFY, '--work-dir', str(classify), '--resume'],
            [CLASSIFY],
            [classify],
            ('data',),
        ),
        Step(
            'detect',
            'from its weights, RetinaNet-EMOv2-1M learns to find them (MMDetection)',
            7,
            ['tools/train.py', DETECT, '--work-dir', str(detect), '--resume'],
            [DETECT],
            [detect],
            ('classify',),
        ),
        Step(
            'test-classify',
            'evaluate the classifier on held-out digits',
            0.2,
            ['tools/test.py', CLASSIFY, last_checkpoint(CLASSIFY, classify)]
            + ['--work-dir', str(OUT / 'test-classify')],
            [],
            [OUT / 'test-classify'],
            ('classify',),
        ),
        Step(
            'test-detect',
            'evaluate the detector on held-out digits (CocoMetric of pycocotools)',
            0.3,
            ['tools/test.py', DETECT, last_checkpoint(DETECT, detect)]
            + ['--work-dir', str(OUT / 'test-detect')]
            + ['--cfg-options', f'test_evaluator.outfile_prefix={OUT}/test-detect/predictions'],
            [],
            [OUT / 'test-detect'],
            ('detect',),
        ),
        Step(
            'report',
            'draw predictions and curves',
            0.2,
            ['tools/demo/report.py', str(OUT), '--data', str(DATA)],
            ['tools/demo/report.py'],
            [OUT / 'predictions.png', OUT / 'curves.png', OUT / 'results.json'],
            ('test-classify', 'test-detect'),
        ),
    ]


def make_method_steps(name: str, method: Method) -> list[Step]:
    """Training and test of a method, of which it writes the config that they read."""
    config, train, test = ALL / f'configs/{name}.py', ALL / name, ALL / f'test-{name}'
    config.parent.mkdir(parents=True, exist_ok=True)
    if method.start == 'classify':
        start = last_checkpoint(CLASSIFY, OUT / 'classify')
    else:
        start = last_checkpoint(str(ALL / f'configs/{method.start}.py'), ALL / method.start)
    shrink(method, DATA, start).dump(config)
    if '/det/' in method.config:
        keep = ['--cfg-options', f'test_evaluator.outfile_prefix={test}/predictions']
    else:
        keep = ['--out', str(test / ('predictions.pkl' if '/cls/' in method.config else 'maps'))]
    return [
        Step(
            name,
            f'{method.title} learns {method.steps} steps of {method.batch} images from {method.config}',
            method.minutes,
            ['tools/train.py', str(config), '--work-dir', str(train), '--resume'],
            [str(config)],
            [train],
            (method.start,),
        ),
        Step(
            f'test-{name}',
            f'evaluate {method.title} on held-out digits',
            0.3,
            ['tools/test.py', str(config), last_checkpoint(str(config), train)]
            + ['--work-dir', str(test), *keep],
            [],
            [test],
            (name,),
        ),
    ]


def make_all_steps() -> list[Step]:
    """Data and classifier of the demo, each method, and their report."""
    steps = make_steps()[:2]
    for name, method in METHODS.items():
        steps += make_method_steps(name, method)
    report = Step(
        'report-all',
        'draw predictions of all',
        0.3,
        ['tools/demo/report_all.py', str(OUT), '--data', str(DATA)],
        ['tools/demo/report_all.py', 'tools/demo/report.py'],
        [ALL / 'results.json'],
        tuple(f'test-{name}' for name in METHODS),
    )
    return [*steps, report]


def fingerprint(step: Step, before: list[str]) -> str:
    """A hash of all that a step's result depends on: its command, its files and the steps ``before``."""
    parts = [*before, *step.command]
    for name in step.inputs:
        parts.append(Config.fromfile(name).dump() if 'configs' in name else Path(name).read_text())
    return hashlib.sha256('\n'.join(parts).encode()).hexdigest()[:16]


class Record:
    """What has been done, in a file that survives interruption."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.steps: dict[str, dict[str, Any]] = json.loads(path.read_text()) if path.exists() else {}

    def save(self, name: str, fingerprint: str, begun: float, finished: bool = False) -> None:
        seconds = round(time.monotonic() - begun, 1)
        self.steps[name] = dict(fingerprint=fingerprint, finished=finished, seconds=seconds)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        part = self.path.with_suffix('.part')
        part.write_text(json.dumps(self.steps, indent=2))
        part.replace(self.path)


def progress_of(line: str) -> str:
    """A short form of a line of mmengine's log, or nothing."""
    found = PROGRESS.search(line)
    if not found:
        return ''
    mode, epoch, step, steps, left, loss = found.groups()
    parts = ['evaluation'] if mode != 'train' else [f'epoch {epoch}'] if epoch else []
    parts.append(f'step {step} of {steps}')
    if loss:
        parts.append(f'loss {float(loss):.3f}')
    if left and mode == 'train':
        parts.append(f'time left {left}')
    return ', '.join(parts)


def execute(step: Step, console: Console, lock: TextIO, tick: Callable[[], None]) -> None:
    """Run a step with its output in a log file, showing how far it is; ``tick`` at each sign of life."""
    log = OUT / 'logs' / f'{step.name}.log'
    log.parent.mkdir(parents=True, exist_ok=True)
    shown = time.monotonic()
    with log.open('a') as file, console.status('starting') as status:
        process = subprocess.Popen(
            [sys.executable, *step.command],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors='replace',
            pass_fds=[lock.fileno()],  # should this process be killed, the child still holds the lock
        )
        assert process.stdout is not None
        try:
            for line in process.stdout:
                file.write(line)
                file.flush()
                text = progress_of(line)
                if text:
                    tick()
                    status.update(text)
                    if not console.is_terminal and time.monotonic() - shown > 20:
                        console.print(f'      {text}')
                        shown = time.monotonic()
            code = process.wait()
        finally:
            process.terminate()
            process.wait()
    if code:
        tail = ''.join(log.read_text(errors='replace').splitlines(keepends=True)[-15:])
        raise SystemExit(f'{tail}\nerror: step {step.name!r} failed with code {code}; whole log: {log}')


def remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    elif path.exists():
        path.unlink()


def hold_lock(console: Console) -> TextIO:
    """Wait until no other demo, nor what a killed one left running, is at work here."""
    OUT.mkdir(parents=True, exist_ok=True)
    lock = (OUT / 'lock').open('w')
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        console.print('another demo, or a step that a killed one left, is at work here: waiting for it')
        fcntl.flock(lock, fcntl.LOCK_EX)
    return lock


def run_steps(steps: list[Step], console: Console, again: bool = False) -> None:
    """Run the steps that are not done, or done with other inputs; all that need one, too."""
    lock = hold_lock(console)
    record = Record(OUT / 'steps.json')
    if again:
        for step in steps:
            record.steps.pop(step.name, None)
    prints: dict[str, str] = {}
    for number, step in enumerate(steps, 1):
        current = prints[step.name] = fingerprint(step, [prints[name] for name in step.needs])
        done = record.steps.get(step.name, {})
        mark = f'[{number}/{len(steps)}] {step.title}'
        if done.get('finished') and not all(path.exists() for path in step.made):
            done = {}
        if done.get('fingerprint') != current:  # new, lost, or its inputs have changed
            done = {}
            for path in step.made:
                remove(path)
        if done.get('finished'):
            console.print(f'{mark}: done before', markup=False)
            continue
        console.print(f'{mark} (about {step.minutes:g} min on 2 cores)', markup=False)
        begun = time.monotonic() - done.get('seconds', 0.0)
        save = partial(record.save, step.name, current, begun)
        save()
        try:
            execute(step, console, lock, tick=save)
        finally:
            save()
        save(finished=True)


def print_all(console: Console) -> None:
    """The results of all methods as a table."""
    results = json.loads((ALL / 'results.json').read_text())
    header, *rows = results['table']
    table = Table(title=results['title'])
    for number, name in enumerate(header):
        table.add_column(name, justify='right' if number >= results['text_columns'] else 'left')
    for row in rows:
        table.add_row(*row)
    console.print(table, markup=False)
    console.print(results['summary'], markup=False)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument('--all', action='store_true', help='train every method instead of the one detector')
    parser.add_argument('--again', action='store_true', help='do all steps again')
    args = parser.parse_args()

    console = Console(highlight=False, soft_wrap=True)
    run_steps(make_all_steps() if args.all else make_steps(), console, args.again)
    if args.all:
        print_all(console)
    else:
        results = json.loads((OUT / 'results.json').read_text())
        console.print(results['summary'], markup=False)


if __name__ == '__main__':
    os.chdir(ROOT)
    try:
        main()
    except KeyboardInterrupt:
        raise SystemExit('\ninterrupted; the same command goes on from here') from None
