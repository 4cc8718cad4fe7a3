"""Train a digit detector from nothing on this machine: the whole way from data to pictures.

Each step calls the project's own tools with shipped configs. Finished steps are not done again; an
interrupted one goes on from its last checkpoint.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

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


def make_steps() -> list[Step]:
    classify, detect = OUT / 'classify', OUT / 'detect'
    epochs = Config.fromfile(DETECT).train_cfg.max_epochs
    return [
        Step(
            'data',
            'draw real handwritten digits over real photographs',
            0.2,
            ['tools/demo/make_digits.py', str(DATA)],
            ['tools/demo/make_digits.py'],
            [DATA],
        ),
        Step(
            'classify',
            'EMOv2-1M learns to classify them (MMPretrain)',
            2,
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
            'test',
            'evaluate it on held-out digits (CocoMetric of pycocotools)',
            0.5,
            ['tools/test.py', DETECT, str(detect / f'epoch_{epochs}.pth')]
            + ['--work-dir', str(OUT / 'test')]
            + ['--cfg-options', f'test_evaluator.outfile_prefix={OUT}/test/predictions'],
            [],
            [OUT / 'test'],
        ),
        Step(
            'report',
            'draw predictions and curves',
            0.2,
            ['tools/demo/report.py', str(OUT), '--data', str(DATA)],
            ['tools/demo/report.py'],
            [],
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

    def save(self, name: str, **values: Any) -> None:
        self.steps[name] = values
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


def execute(step: Step, console: Console) -> None:
    """Run a step with its output in a log file, showing how far it is."""
    log = OUT / 'logs' / f'{step.name}.log'
    log.parent.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, *step.command]
    shown = time.monotonic()
    with log.open('a') as file, console.status('starting') as status:
        process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors='replace'
        )
        assert process.stdout is not None
        for line in process.stdout:
            file.write(line)
            file.flush()
            text = progress_of(line)
            if text:
                status.update(text)
                if not console.is_terminal and time.monotonic() - shown > 20:
                    console.print(f'      {text}')
                    shown = time.monotonic()
        code = process.wait()
    if code:
        tail = ''.join(log.read_text(errors='replace').splitlines(keepends=True)[-15:])
        raise SystemExit(f'{tail}\nerror: step {step.name!r} failed with code {code}; whole log: {log}')


def run_steps(steps: list[Step], record: Record, console: Console) -> None:
    """Run the steps that are not done, or done with other inputs; all that follow one, too."""
    before = ''
    for number, step in enumerate(steps, 1):
        before = fingerprint(step, before)
        done = record.steps.get(step.name, {})
        mark = f'[{number}/{len(steps)}] {step.title}'
        if done.get('fingerprint') != before:  # new, or its inputs have changed
            done = {}
            for path in step.made:
                shutil.rmtree(path, ignore_errors=True)
        if done.get('finished') and all(path.exists() for path in step.made):
            console.print(f'{mark}: done before', markup=False)
            continue
        console.print(f'{mark} (about {step.minutes:g} min on 2 cores)', markup=False)
        spent = done.get('seconds', 0.0)
        start = time.monotonic()
        record.save(step.name, fingerprint=before, finished=False, seconds=spent)
        try:
            execute(step, console)
        finally:
            seconds = round(spent + time.monotonic() - start, 1)
            record.save(step.name, fingerprint=before, finished=False, seconds=seconds)
        record.save(step.name, fingerprint=before, finished=True, seconds=seconds)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument('--again', action='store_true', help='do all steps again')
    args = parser.parse_args()

    record = Record(OUT / 'steps.json')
    if args.again:
        record.steps.clear()
    console = Console(highlight=False, soft_wrap=True)
    run_steps(make_steps(), record, console)
    results = json.loads((OUT / 'results.json').read_text())
    console.print(results['summary'], markup=False)


if __name__ == '__main__':
    os.chdir(ROOT)
    try:
        main()
    except KeyboardInterrupt:
        raise SystemExit('\ninterrupted; the same command goes on from here') from None
