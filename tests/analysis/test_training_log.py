"""tools/plot_logs.py: joining the pieces of a run, finding its epochs, and what is drawn."""

from __future__ import annotations

import json

import pytest
from helpers.tiny import call_tool
from PIL import Image

from emo2_mm.analysis import training_log

NEEDED = 'give a work folder with */vis_data/scalars.json in it'


def training(*steps, epoch_length=None, **values):
    """Lines of training steps, with epochs if they have a length."""
    lines = [{'lr': 0.1 / step, 'time': 0.2, 'iter': step, 'step': step, 'loss': 1 / step} for step in steps]
    for line in lines:
        line.update(values)
        if epoch_length:
            line['epoch'] = (line['step'] - 1) // epoch_length + 1
    return lines


def validation(step, **values):
    return {'data_time': 0.1, 'time': 0.2, **values, 'step': step}


def write(folder, lines, time='20260101_000000'):
    """Write a piece of a run as MMEngine does; returns its work folder."""
    file = folder / time / 'vis_data/scalars.json'
    file.parent.mkdir(parents=True)
    file.write_text(''.join(json.dumps(line) + '\n' for line in lines))
    return folder


@pytest.fixture
def main(monkeypatch, capsys, tmp_path):
    """Run the tool in this process; returns its exit status and its errors."""
    monkeypatch.chdir(tmp_path)

    def run(*args):
        return call_tool('plot_logs.py', *args), capsys.readouterr().err

    return run


def panels(figure):
    return {ax.get_title(): ax for ax in figure().axes if ax.get_visible()}


def test_pieces_of_a_resumed_run_are_joined(tmp_path):
    """The second goes on from epoch 2 (of 10 steps), after the first was broken off in epoch 3."""
    first = training(5, 10, 15, 20, 25, epoch_length=10, loss=1.0)
    first[2:2] = [validation(1, mIoU=1.0)]
    first += [validation(2, mIoU=2.0)]
    write(tmp_path, first)
    second = [*training(25, 30, epoch_length=10, loss=2.0), validation(3, mIoU=3.0)]
    write(tmp_path, second, '20260102_000000')
    run = training_log.read_run(tmp_path, 'run')
    assert run.curve('loss', in_epochs=False) == ([5, 10, 15, 20, 25, 30], [1, 1, 1, 1, 2, 2])
    assert run.curve('mIoU', in_epochs=True) == ([1, 2, 3], [1, 2, 3])


@pytest.mark.parametrize('epoch_length', [10, None])
def test_a_restarted_run_replaces_the_older_one(tmp_path, epoch_length):
    """Nothing of an older and longer run is left."""
    val = 3 if epoch_length else 30
    write(tmp_path, [*training(10, 20, 30, epoch_length=epoch_length, loss=1.0), validation(val, mIoU=1.0)])
    write(tmp_path, training(10, 20, epoch_length=epoch_length, loss=2.0), '20260102_000000')
    run = training_log.read_run(tmp_path, 'run')
    assert run.curve('loss', in_epochs=False) == ([10, 20], [2, 2])
    assert 'mIoU' not in run.logged()


def test_validation_after_the_last_line_of_a_piece_is_kept(tmp_path):
    """A run by iterations is resumed where it validated."""
    write(tmp_path, [*training(50, 100), validation(100, mIoU=1.0)])
    write(tmp_path, [*training(150, 200), validation(200, mIoU=2.0)], '20260102_000000')
    assert training_log.read_run(tmp_path, 'run').curve('mIoU', in_epochs=False) == ([100, 200], [1, 2])


def test_a_truncated_last_line_is_ignored(tmp_path):
    file = write(tmp_path, training(10, 20)) / '20260101_000000/vis_data/scalars.json'
    file.write_text(file.read_text() + '{"lr": 0.1, "lo')
    assert training_log.read_run(tmp_path, 'run').curve('loss', in_epochs=False)[0] == [10, 20]
    file.write_text(file.read_text() + '\n{"lr": 0.1, "step": 30}\n')
    with pytest.raises(ValueError, match='line 3 is not JSON'):
        training_log.read_run(tmp_path, 'run')


@pytest.mark.parametrize('given', ['', '20260101_000000', '20260101_000000/vis_data/scalars.json'])
def test_a_run_is_a_work_dir_or_a_file(tmp_path, given):
    write(tmp_path, training(10))
    assert list(training_log.read_run(tmp_path / given, 'run').train) == [10]


def test_only_numbers_are_read(tmp_path):
    write(tmp_path, training(10, note='text', parts=[1, 2], grad_norm=float('nan')))
    assert training_log.read_run(tmp_path, 'run').logged() == ['lr', 'loss', 'grad_norm']


def test_the_epoch_length_follows_from_logged_steps(tmp_path):
    """Every 20th step of 90 is logged, the last ones of an epoch not; broken off in the third."""
    steps = [90 * epoch + 20 * i for epoch in range(3) for i in range(1, 5)][:-1]
    lines = [*training(*steps, epoch_length=90), validation(1, mAP=0.1), validation(3, mAP=0.3)]
    run = training_log.read_run(write(tmp_path, lines), 'run')
    assert run.epoch_length == 90
    assert run.curve('mAP', in_epochs=True) == ([1, 3], [0.1, 0.3])
    assert run.curve('mAP', in_epochs=False) == ([90, 270], [0.1, 0.3])
    assert run.curve('loss', in_epochs=True)[0] == pytest.approx([step / 90 for step in steps])


def test_the_epoch_length_is_known_in_the_first_epoch(tmp_path):
    run = training_log.read_run(write(tmp_path, training(50, 100, epoch_length=100)), 'run')
    assert run.epoch_length == 100


def test_a_run_by_iterations_has_no_epochs(tmp_path):
    run = training_log.read_run(write(tmp_path, [*training(50, 100), validation(100, mIoU=1.0)]), 'run')
    assert run.epoch_length is None
    assert run.curve('mIoU', in_epochs=False) == ([100], [1])


def test_loss_learning_rate_and_metrics_are_drawn_by_default(tmp_path, main, figure):
    metrics = dict(mAP=0.5, mAP_l=-1.0)
    lines = [*training(10, 20, epoch_length=10, loss_cls=0.5, grad_norm=1.0), validation(1, **metrics)]
    assert main(write(tmp_path / 'run', lines)) == (0, '')
    assert list(panels(figure)) == ['loss', 'lr', 'mAP']
    assert Image.open(tmp_path / 'curves.png').format == 'PNG'


def test_chosen_keys_are_drawn(tmp_path, main, figure):
    write(tmp_path / 'run', training(10, 20, loss_cls=0.5))
    assert main('run', '--keys', 'loss_cls', '--out', 'new/picture.jpg') == (0, '')
    assert list(panels(figure)) == ['loss_cls']
    assert Image.open(tmp_path / 'new/picture.jpg').format == 'JPEG'


def test_runs_are_drawn_in_common_panels(tmp_path, main, figure):
    write(tmp_path / 'a', [*training(10, 20, epoch_length=10), validation(1, mAP=0.5)])
    write(tmp_path / 'b', training(20, 40, epoch_length=20, loss=9.0))
    assert main('a', 'b') == (0, '')
    loss, _, metric = panels(figure).values()
    assert [line.get_xdata().tolist() for line in loss.lines] == [[1, 2], [1, 2]]
    assert [line.get_ydata().tolist() for line in loss.lines] == [[0.1, 0.05], [9, 9]]
    assert [text.get_text() for text in loss.texts] == ['0.05', '9']
    assert len(metric.lines) == 1
    assert metric.get_xlabel() == 'epoch'
    assert [text.get_text() for text in figure().legends[0].texts] == ['a', 'b']


def test_runs_by_epoch_and_by_iteration_share_an_axis_of_iterations(tmp_path, main, figure):
    write(tmp_path / 'a', [*training(10, 20, epoch_length=10), validation(2, mAP=0.5)])
    write(tmp_path / 'b', training(10, 20))
    assert main('a', 'b') == (0, '')
    metric = panels(figure)['mAP']
    assert metric.lines[0].get_xdata().tolist() == [20]
    assert metric.get_xlabel() == 'iteration'


def test_runs_of_the_same_name_are_told_apart_by_path(tmp_path, main, figure):
    write(tmp_path / 'a/run', training(10))
    write(tmp_path / 'b/run', training(10))
    assert main('a/run', 'b/run') == (0, '')
    assert [text.get_text() for text in figure().legends[0].texts] == ['a/run', 'b/run']


def test_a_loss_of_nan_has_no_label(tmp_path, main, figure):
    write(tmp_path / 'run', training(10, 20, loss=float('nan')))
    assert main('run', '--keys', 'loss') == (0, '')
    assert not panels(figure)['loss'].texts


def test_a_missing_key_is_named(tmp_path, main):
    write(tmp_path / 'run', training(10))
    assert main('run', '--keys', 'loss', 'mAP') == (1, 'error: run has no mAP; it has lr, loss\n')


def test_a_missing_run_is_named(tmp_path, main):
    assert main('gone') == (1, f'error: gone: {NEEDED}; there is no such file or folder\n')
    assert main('.') == (1, f'error: .: {NEEDED}; it has none\n')
    write(tmp_path, [validation(1, mAP=1.0)])
    status, message = main('.')
    assert (status, message[:32]) == (1, 'error: .: no training was logged')
