"""benchmarks/benchmark.py and its baseline, which every form of EMOv2 has to equal."""

from __future__ import annotations

import json
import sys
from typing import Any

import benchmark
import measuring
import pytest
import torch
from benchmark import Case
from helpers.golden import normal, relative_error
from helpers.networks import CASES, TINY, golden_model, logits_of, name_of
from plain_emov2 import PlainEMOv2, copy_weights
from torch import nn

from emo2_mm import EMOv2

SMALL = (4, 96, 80, 3)  # batch, height, width, window


def pair(arch: Any = TINY, window: int = 3, dtype: torch.dtype = torch.float64, **kwargs: Any) -> Any:
    """The baseline and an EMOv2 with the same random weights."""
    emo2 = benchmark.randomized_emov2(arch, window, **kwargs)
    plain = PlainEMOv2(arch, window_size=window, **kwargs)
    copy_weights(emo2, plain)
    return plain.to(dtype), emo2.to(dtype)


def assert_close(ours: Any, theirs: Any, rtol: float = 1e-10) -> None:
    for a, b in zip(ours, theirs):
        assert a.shape == b.shape
        assert (a - b).norm() <= rtol * b.norm() + 1e-14


class TestPlainNetwork:
    @pytest.mark.parametrize('case', CASES, ids=name_of)
    def test_it_gives_the_recorded_outputs(self, case: dict[str, Any]) -> None:
        model, weights = golden_model(case)
        plain = PlainEMOv2(case['arch'], window_size=case['window_size'], final_norm=True).eval()
        copy_weights(model, plain)
        x = normal((case['batch'], 3, *case['size']), case['seed'] + 1)
        with torch.no_grad():
            logits = logits_of(plain, weights, x)
            plain.norm = None  # recorded without it
            maps = (plain.stem(x), *plain(x))
        assert relative_error(logits, case['logits']) < 1e-5
        for i, record in enumerate(case.get('features', {}).values()):
            assert relative_error(maps[i], record) < 1e-5

    def test_its_parameters_have_the_same_names_and_sizes(self) -> None:
        plain, emo2 = pair(final_norm=True)
        theirs, ours = plain.state_dict(), emo2.state_dict()
        assert theirs.keys() == ours.keys()
        assert all(theirs[name].numel() == ours[name].numel() for name in ours)

    def test_weights_of_another_arch_are_refused(self) -> None:
        with pytest.raises(RuntimeError, match='size mismatch'):
            copy_weights(benchmark.randomized_emov2('1m', 7), PlainEMOv2('2m'))


class TestParity:
    """In double precision, where nothing but another formula can differ; maps are in test_fuzz.py."""

    @pytest.mark.parametrize('training', [True, False])
    @pytest.mark.parametrize('window', [3, 4])
    @pytest.mark.parametrize('size', [(64, 96), (97, 75)])
    def test_gradients_and_statistics(self, size: tuple[int, int], window: int, training: bool) -> None:
        plain, emo2 = pair(window=window, final_norm=True)
        x = torch.randn(2, 3, *size, dtype=torch.float64)
        images = []
        for model in (plain, emo2):
            images.append(x.clone().requires_grad_())
            sum(m.square().mean() for m in model.train(training)(images[-1])).backward()
        own = dict(emo2.named_parameters())
        scale = max(p.grad.norm() for p in plain.parameters())
        assert_close([images[1].grad], [images[0].grad], 1e-9)
        for name, p in plain.named_parameters():
            difference = own[name].grad.reshape(p.shape) - p.grad
            # a bias before a batch norm has a gradient of zero, but for rounding
            assert difference.norm() <= 1e-9 * max(p.grad.norm(), 1e-3 * scale), name
        buffers = dict(emo2.named_buffers())
        for name, buffer in plain.named_buffers():
            torch.testing.assert_close(buffers[name], buffer, msg=name)

    def test_drop_path_draws_the_same_samples(self) -> None:
        plain, emo2 = pair(drop_path_rate=0.7)
        x, maps = torch.randn(8, 3, 32, 32, dtype=torch.float64), []
        for model in (plain.train(), emo2.train()):
            torch.manual_seed(3)
            maps.append(model(x))
        assert_close(*maps)

    @pytest.mark.parametrize('dtype', ['bf16', 'fp32'])
    @pytest.mark.parametrize('kind', ['eager', 'deployed', 'train'])
    def test_narrow_types_stay_within_the_limits_of_the_benchmark(self, kind: str, dtype: str) -> None:
        case = Case(kind, *SMALL, dtype)
        errors = benchmark.errors_of(*benchmark.build(case, TINY, 'cpu'), case)
        assert 0 < len(errors) == (2 if kind == 'train' else 1)
        assert all(0 < error < benchmark.LIMITS[name][dtype] for name, error in errors.items())


class TestCases:
    def test_names_tell_them_apart(self) -> None:
        names = [case.name for case in benchmark.select(None, 'cuda')]
        assert len(set(names)) == len(names)
        assert names[3] == 'eager-1x800x1216'

    def test_a_cpu_measures_fewer_cases(self) -> None:
        assert not {'fp16', 'compile'} & {part for c in benchmark.select(None, 'cpu') for part in c}

    def test_they_are_selected_by_parts_and_by_name(self) -> None:
        names = [c.name for c in benchmark.select(['memory', 'eager-1x512', 'train-8x224-fp16'], 'cpu')]
        assert names == [
            *('memory-8x224', 'memory-2x512', 'memory-8x224-bf16', 'memory-2x512-bf16'),
            *('eager-1x512', 'train-8x224-fp16'),
        ]
        assert benchmark.select([], 'cpu') == []

    def test_onnx_runtime_is_measured_if_named(self) -> None:
        assert not any(case.kind == 'onnx' for case in benchmark.select(None, 'cpu'))
        assert [c.name for c in benchmark.select(['onnx'], 'cpu')][0] == 'onnx-1x224'
        assert [c.name for c in benchmark.select(['onnx-8x224'], 'cpu')] == ['onnx-8x224']

    def test_an_unknown_one_is_named(self, capsys: pytest.CaptureFixture) -> None:
        with pytest.raises(SystemExit):
            benchmark.main(['--only', 'eager-2x2'])
        assert '--only eager-2x2 fits no case; the cases are: eager-1x224' in capsys.readouterr().err


class TestMeasuring:
    def test_peak_is_what_is_held_at_once(self) -> None:
        def run() -> None:
            a = torch.ones(1000, 1000)
            b = a + 1  # 8 MB at once
            del a
            (b * 2).sum()

        held: list[torch.Tensor] = []
        assert measuring.peak_bytes(lambda: held.append(torch.ones(10**6)), 'cpu') == pytest.approx(
            4e6, rel=0.01
        )
        assert measuring.peak_bytes(run, 'cpu') == pytest.approx(
            8e6, rel=0.01
        )  # what is held before is not new

    def test_saved_counts_each_storage_once_and_no_parameter(self) -> None:
        model = nn.Linear(10, 10)
        x = torch.ones(100, 10, requires_grad=True)
        assert measuring.saved_bytes(lambda: model(x), model) == 4000  # x, not the weight
        assert measuring.saved_bytes(lambda: model(x).tanh() * x.view(100, 10), model) == 2 * 4000

    def test_operators_share_the_time(self) -> None:
        a = torch.ones(300, 300)
        found = measuring.operators(lambda: (a @ a) + a, 'cpu')
        assert sum(row['share'] for row in found) == pytest.approx(1)
        assert {row['name']: row['calls'] for row in found}['aten::mm'] == 1


class TestTool:
    @pytest.fixture(autouse=True)
    def small(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Keep the tool to images and models that take no time."""
        monkeypatch.setattr(benchmark, 'INFERENCE', [(1, 32, 32, 2), (2, 32, 48, 2)])
        monkeypatch.setattr(benchmark, 'TRAINING', [SMALL])
        monkeypatch.setattr(benchmark, 'SIDES', [32, 64])
        monkeypatch.setitem(EMOv2.arch_settings, '1m', TINY)

    def test_cases_are_measured_and_reported(self, tmp_path: Any, capsys: pytest.CaptureFixture) -> None:
        names = ['eager-1x32', 'deployed-2x32x48', 'train-4x96x80-bf16', 'memory-4x96x80']
        args = ['--arch', '1m', '--device', 'cpu', '--rounds', '3', '--only', *names, '--out', str(tmp_path)]
        assert benchmark.main(args) == 0
        found = json.loads((tmp_path / 'benchmark.json').read_text())
        assert (found['arch'], found['device'], found['limits']) == ('1m', 'cpu', benchmark.LIMITS)
        assert found['machine']['torch'] == torch.__version__
        assert found['machine']['threads'] == torch.get_num_threads()
        assert [case['name'] for case in found['cases']] == names
        for case in found['cases']:
            low, high = case['quartiles']
            assert case['agrees']
            assert low <= case['ratio'] <= high
            if case['kind'] == 'memory':
                assert case['ratio'] == case['emo2'] / case['plain']
                assert 0 < case['saved'][1] < case['emo2']
            else:
                processes = 1 if case['kind'] == 'train' else benchmark.PROCESSES
                ratios = sorted(plain / emo2 for plain, emo2 in case['pairs'])
                assert len(ratios) == 3 * processes
                assert case['ratio'] == ratios[len(ratios) // 2]
                assert len(case.get('processes', [1])) == processes
        assert {f.name for f in tmp_path.iterdir()} == {'benchmark.json', 'benchmark.png'}
        assert capsys.readouterr().out.count('eager-1x32') == 2  # as it is measured, and in the table

    @pytest.mark.slow
    def test_scale_and_profile_are_reported(self, tmp_path: Any, capsys: pytest.CaptureFixture) -> None:
        args = ['--arch', '1m', '--device', 'cpu', '--only', '--rounds', '1', '--scale', '--profile']
        assert benchmark.main([*args, '--out', str(tmp_path)]) == 0
        found = json.loads((tmp_path / 'benchmark.json').read_text())
        assert 'cases' not in found
        assert [row['side'] for row in found['scale']] == [32, 64]
        for network in ('plain', 'eager', 'deployed'):
            assert all(row[network]['bytes'] > 0 < row[network]['seconds'] for row in found['scale'])
        assert [(row['case'], row['network']) for row in found['profile']] == [
            ('eager-2x32x48', 'plain'),
            ('eager-2x32x48', 'emo2'),
            ('deployed-2x32x48', 'emo2'),
            ('train-4x96x80', 'plain'),
            ('train-4x96x80', 'emo2'),
        ]
        assert {f.name for f in tmp_path.iterdir()} == {'benchmark.json', 'benchmark_scale.png'}
        assert 'aten::' in capsys.readouterr().out

    def test_plots_leave_the_settings_of_matplotlib_alone(self, tmp_path: Any) -> None:
        matplotlib = pytest.importorskip('matplotlib')
        matplotlib.use('Agg')
        settings = dict(matplotlib.rcParams)
        row = {name: dict(bytes=1, seconds=1.0) for name in ('plain', 'eager', 'deployed')}
        machine = dict(gpu=None, cpu='any', threads=1, torch='2', emo2_mm='1', date='today')
        results = dict(arch='1m', machine=machine, scale=[dict(side=224, megapixels=0.05, **row)])
        benchmark.draw(results, tmp_path)
        assert (tmp_path / 'benchmark_scale.png').is_file()
        assert dict(matplotlib.rcParams) == settings

    def test_a_fast_wrong_result_fails_and_is_not_timed(
        self, tmp_path: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
    ) -> None:
        def nearly(source: nn.Module, target: nn.Module) -> None:
            copy_weights(source, target)
            target.stages[3][0].depthwise_norm.bias.data[0] += 0.01

        monkeypatch.setattr(benchmark, 'copy_weights', nearly)
        args = ['--arch', '1m', '--device', 'cpu', '--only', 'eager-1x32', 'memory-4x96x80', '--rounds', '1']
        assert benchmark.main([*args, '--out', str(tmp_path)]) == 1
        found = json.loads((tmp_path / 'benchmark.json').read_text())['cases']
        assert [case['agrees'] for case in found] == [False, False]
        assert not any('pairs' in case for case in found)
        assert 'baseline differ: eager-1x32 memory-4x96x80' in ' '.join(capsys.readouterr().out.split())

    def test_not_a_number_is_no_agreement(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(benchmark, 'relative_error', lambda a, b: float('nan'))
        assert not benchmark.measure(Case('eager', *SMALL), TINY, 'cpu', 1)['agrees']

    def test_peers_without_timm_name_it_at_once(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setitem(sys.modules, 'timm', None)
        monkeypatch.setattr(benchmark, 'measure', lambda *args: pytest.fail('measured before'))
        with pytest.raises(SystemExit, match='Run `pip install timm`'):
            benchmark.main(['--peers'])

    def test_peers_are_measured_and_drawn(self, tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        pytest.importorskip('timm')
        pytest.importorskip('onnxruntime')
        monkeypatch.setattr(benchmark, 'PEERS', [benchmark.PEERS[0]._replace(side=64)])
        monkeypatch.setattr(benchmark, 'EMOV2_SIDE', 64)
        monkeypatch.setattr(benchmark, 'EMOV2_TOP1', {'1m': 72.3})
        args = ['--device', 'cpu', '--only', '--rounds', '1', '--peers']
        assert benchmark.main([*args, '--out', str(tmp_path)]) == 0
        found = json.loads((tmp_path / 'benchmark.json').read_text())['peers']
        assert [row['name'] for row in found] == ['EMOv2-1m', 'EMOv2-1m deployed', 'edgenext_small']
        assert all(min(row['images_per_second'].values()) > 0 for row in found)
        assert found[0]['onnx_seconds'] is None
        assert all(0 < row['onnx_seconds'] < 10 for row in found[1:])
        backbone = EMOv2(TINY, final_norm=True)
        head = 25 * 1000  # 24 channels and a bias
        assert found[0]['params'] == head + sum(p.numel() for p in backbone.parameters())
        assert 0 < found[1]['params'] < found[0]['params']
        assert 0 < found[1]['flops'] < found[0]['flops']  # folded
        assert (tmp_path / 'benchmark_peers.png').is_file()

    def test_onnx_runtime_is_measured(self, tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        pytest.importorskip('onnxruntime')
        args = ['--arch', '1m', '--device', 'cpu', '--only', 'onnx', '--rounds', '1']
        assert benchmark.main([*args, '--out', str(tmp_path)]) == 0
        cases = json.loads((tmp_path / 'benchmark.json').read_text())['cases']
        assert [case['name'] for case in cases] == ['onnx-1x32', 'onnx-2x32x48']
        assert all(case['agrees'] and case['errors']['maps'] > 0 for case in cases)
        monkeypatch.setitem(sys.modules, 'onnxruntime', None)
        with pytest.raises(SystemExit, match='run `pip install onnx onnxruntime`'):
            benchmark.main(args)

    def test_onnx_runtime_is_refused_on_a_gpu(
        self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
    ) -> None:
        monkeypatch.setattr(torch.cuda, 'is_available', lambda: True)
        with pytest.raises(SystemExit):
            benchmark.main(['--only', 'onnx'])
        assert 'give --device cpu' in capsys.readouterr().err

    def test_a_peer_that_differs_in_onnx_runtime_is_named(self, monkeypatch: pytest.MonkeyPatch) -> None:
        pytest.importorskip('onnxruntime')
        peer = benchmark.Peer('odd', 32, 80.0, 'nobody')
        model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten()).eval()
        assert isinstance(benchmark.in_onnx_runtime(peer, model), nn.Module)
        own = benchmark.InOnnxRuntime.forward
        monkeypatch.setattr(benchmark.InOnnxRuntime, 'forward', lambda self, x: [1.01 * own(self, x)[0]])
        with pytest.raises(RuntimeError, match='odd differs in ONNX Runtime: a relative error of 1e-02'):
            benchmark.in_onnx_runtime(peer, model)

    def test_every_peer_is_a_model_of_timm(self) -> None:
        timm = pytest.importorskip('timm')
        assert all(timm.is_model(peer.name) for peer in benchmark.PEERS)

    @pytest.mark.parametrize(
        ('args', 'message'),
        [
            (['--threads', '0'], '--threads is 0; give 1 or more'),
            (['--rounds', '-1'], '--rounds is -1; give 1 or more'),
            (['--device', 'cuda'], 'torch finds no GPU'),
        ],
    )
    def test_a_wrong_option_is_named(
        self, args: list[str], message: str, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(torch.cuda, 'is_available', lambda: False)
        with pytest.raises(SystemExit):
            benchmark.main(args)
        assert message in capsys.readouterr().err
