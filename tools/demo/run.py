"""Train a digit detector from nothing on this machine: the whole way from data to pictures.

Each step calls the project's own tools with shipped configs. Finished steps are not done again; an
interrupted one goes on from its last checkpoint.
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

ROOT = Path(__file__).resolve().parents[2]
OUT = Path('work_dirs/demo')
DATA = Path('data/digits')
CLASSIFY = 'configs/demo/emo2_1m_digits.py'
DETECT = 'configs/demo/retinanet_emo2_1m_digits.py'
PROGRESS = re.compile(
    r'Epoch\((train|val|test)\)\s+(?:\[(\d+)\])?\[\s*(\d+)/(\d+)\](?:.*?eta: (\S+))?(?:.*?\bloss: (\S+))?'
)


class Step(NamedTuple):
    """One command, what it does, how long it takes on two cores, and what makes it outdated."""

    name: str
    title: str
    minutes: float
    command: list[str]
    inputs: list[str]
    made: list[Path]  # removed before the step is begun anew


def last_checkpoint(config: str, work_dir: Path) -> str:
    return str(work_dir / f'epoch_{Config.fromfile(config).train_cfg.max_epochs}.pth')


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
        ),
        Step(
            'classify',
            'EMOv2-1M learns to classify them (MMPretrain)',
            1.5,
            ['tools/train.py', CLASSIFY, '--work-dir', str(classify), '--resume'],
            [CLASSIFY],
            [classify],
        ),
        Step(
            'detect',
            'from its weights, RetinaNet-EMOv2-1M learns to find them (MMDetection)',
            7,
            ['tools/train.py', DETECT, '--work-dir', str(detect), '--resume'],
            [DETECT],
            [detect],
        ),
        Step(
            'test-classify',
            'evaluate the classifier on held-out digits',
            0.2,
            ['tools/test.py', CLASSIFY, last_checkpoint(CLASSIFY, classify)]
            + ['--work-dir', str(OUT / 'test-classify')],
            [],
            [OUT / 'test-classify'],
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
        ),
        Step(
            'report',
            'draw predictions and curves',
            0.2,
            ['tools/demo/report.py', str(OUT), '--data', str(DATA)],
            ['tools/demo/report.py'],
            [OUT / 'predictions.png', OUT / 'curves.png', OUT / 'results.json'],
        ),
    ]


def fingerprint(step: Step, before: str) -> str:
    """A hash of all that a step's result depends on: its command, files and the step before it."""
    parts = [before, *step.command]
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
    parts = [f'epoch {epoch}' if mode == 'train' else 'evaluation', f'step {step} of {steps}']
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
    """Run the steps that are not done, or done with other inputs; all that follow one, too."""
    lock = hold_lock(console)
    if again:
        remove(OUT / 'steps.json')
    record = Record(OUT / 'steps.json')
    before = ''
    for number, step in enumerate(steps, 1):
        before = fingerprint(step, before)
        done = record.steps.get(step.name, {})
        mark = f'[{number}/{len(steps)}] {step.title}'
        if done.get('finished') and not all(path.exists() for path in step.made):
            done = {}
        if done.get('fingerprint') != before:  # new, lost, or its inputs have changed
            done = {}
            for path in step.made:
                remove(path)
        if done.get('finished'):
            console.print(f'{mark}: done before', markup=False)
            continue
        console.print(f'{mark} (about {step.minutes:g} min on 2 cores)', markup=False)
        begun = time.monotonic() - done.get('seconds', 0.0)
        save = partial(record.save, step.name, before, begun)
        save()
        try:
            execute(step, console, lock, tick=save)
        finally:
            save()
        save(finished=True)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument('--again', action='store_true', help='do all steps again')
    args = parser.parse_args()

    console = Console(highlight=False, soft_wrap=True)
    run_steps(make_steps(), console, args.again)
    results = json.loads((OUT / 'results.json').read_text())
    console.print(results['summary'], markup=False)


if __name__ == '__main__':
    os.chdir(ROOT)
    try:
        main()
    except KeyboardInterrupt:
        raise SystemExit('\ninterrupted; the same command goes on from here') from None
