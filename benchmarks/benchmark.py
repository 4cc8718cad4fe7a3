"""Compare EMOv2 with the baseline of plain_emov2.py: check that outputs agree, then time both interleaved."""

from __future__ import annotations

import argparse
import importlib
import json
import os
import platform
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from contextlib import nullcontext
from copy import deepcopy
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from statistics import median, quantiles
from typing import Any, Callable, NamedTuple, Sequence

import torch
from measuring import operators, peak_bytes, saved_bytes
from plain_emov2 import PlainEMOv2, copy_weights
from report import draw, one_line, tables
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

import emo2_mm
from emo2_mm import EMOv2
from emo2_mm.analysis.complexity import analyzer, count_params
from emo2_mm.analysis.timing import interleaved
from emo2_mm.export.onnx_network import import_onnx, replace, session, trace

DTYPES = {'fp32': torch.float32, 'bf16': torch.bfloat16, 'fp16': torch.float16}
# Largest relative errors allowed. In training, batch statistics amplify rounding; bf16 (8 bits) and fp16
# (11 bits) round after every operation, and the two networks do so in different places.
LIMITS = {
    'maps': {'fp32': 1e-5, 'bf16': 0.1, 'fp16': 0.02},
    'maps in training': {'fp32': 1e-4, 'bf16': 0.1, 'fp16': 0.02},
    'gradients': {'fp32': 1e-3, 'bf16': 0.15, 'fp16': 0.05},
}
LOSS_SCALE = 1024.0  # keeps gradients within fp16

# batch, height, width, window size
INFERENCE = [(1, 224, 224, 7), (8, 224, 224, 7), (1, 512, 512, 10), (1, 800, 1216, 10)]
TRAINING = [(8, 224, 224, 7), (2, 512, 512, 10)]
LARGE = (64, 224, 224, 7)  # fills a GPU
SIDES = [224, 448, 672, 896, 1120, 1344, 1600]  # of --scale
SHOWN_OPERATORS = 12  # of --profile
# The heap layout, and with it the number of page faults per forward pass, differs per process
PROCESSES = 3  # on a CPU, for a case of inference


class Case(NamedTuple):
    """A measurement: ``eager``, ``deployed`` or ``onnx`` inference, a ``train`` step or its ``memory``."""

    kind: str
    batch: int
    height: int
    width: int
    window: int
    dtype: str = 'fp32'
    variant: str = ''  # or 'channels-last' (weights and images), 'compile'

    @property
    def name(self) -> str:
        size = f'{self.height}' if self.height == self.width else f'{self.height}x{self.width}'
        dtype = self.dtype if self.dtype != 'fp32' else ''
        return '-'.join(filter(None, (self.kind, f'{self.batch}x{size}', dtype, self.variant)))

    @property
    def trains(self) -> bool:
        return self.kind in ('train', 'memory')


def common_cases() -> list[Case]:
    cases = [Case(kind, *shape) for kind in ('eager', 'deployed') for shape in INFERENCE]
    for kind in ('train', 'memory'):
        cases += [Case(kind, *shape, dtype) for dtype in ('fp32', 'bf16') for shape in TRAINING]
    return cases


def gpu_cases() -> list[Case]:
    """Cases for a GPU; on a CPU they run only if they are named."""
    cases = [Case(kind, *LARGE) for kind in ('eager', 'deployed', 'train')]
    for kind in ('eager', 'deployed'):
        cases += [Case(kind, *shape, 'bf16') for shape in [*INFERENCE, LARGE]]
        for variant in ('channels-last', 'compile'):
            cases += [Case(kind, *shape, 'bf16', variant) for shape in (INFERENCE[-1], LARGE)]
    cases += [Case('train', *shape, 'fp16') for shape in [*TRAINING, LARGE]]
    cases += [Case('train', *LARGE, 'bf16', variant) for variant in ('', 'channels-last', 'compile')]
    return cases + [Case('memory', *LARGE, dtype) for dtype in ('fp32', 'bf16')]


def onnx_cases() -> list[Case]:
    """EMOv2 in ONNX Runtime on the CPU; run only if named, for it is an extra."""
    return [Case('onnx', *shape) for shape in INFERENCE]


def select(names: Sequence[str] | None, device: str) -> list[Case]:
    """Select cases by name or a part of the name (``train``, ``8x224``, ``bf16``); None: the default ones.

    Raises:
        ValueError: If a name fits no case.
    """
    usual = common_cases() + (gpu_cases() if device == 'cuda' else [])
    if names is None:
        return usual
    known = {case.name: case for case in common_cases() + gpu_cases() + onnx_cases()}
    chosen: dict[str, Case] = {}
    for name in names:
        several = onnx_cases() if name == 'onnx' else usual
        fits = [known[name]] if name in known else [c for c in several if name in c.name.split('-')]
        if not fits:
            raise ValueError(f'{name} fits no case; the cases are: {" ".join(known)}')
        chosen.update({case.name: case for case in fits})
    return list(chosen.values())


@torch.no_grad()
def randomized_emov2(arch: str | dict, window: int, **kwargs: Any) -> EMOv2:
    """Build an EMOv2 with random weights in which every branch and statistic affects the output."""
    torch.manual_seed(0)
    model = EMOv2(arch, window_size=window, layer_scale_init_value=0.5, **kwargs)
    for module in model.modules():
        if isinstance(module, (_BatchNorm, nn.LayerNorm)):
            nn.init.normal_(module.weight, 1.0, 0.1)
            nn.init.normal_(module.bias, 0.0, 0.1)
        if isinstance(module, _BatchNorm):
            nn.init.normal_(module.running_mean, 0.0, 0.1)
            nn.init.uniform_(module.running_var, 0.8, 1.2)
    return model


def check_onnx() -> None:
    try:
        for name in ('onnx', 'onnxruntime'):
            import_onnx(name)
    except ImportError as error:
        raise SystemExit(f'error: {error}') from None


class InOnnxRuntime(nn.Module):
    """A network in eval mode that runs in ONNX Runtime on the CPU.

    Args:
        network: A deployed EMOv2, or a network that contains one.
        x: Images of the size of the inputs.
    """

    def __init__(self, network: nn.Module, x: Tensor) -> None:
        super().__init__()
        network = replace(deepcopy(network), None, dynamic=False)
        with torch.no_grad():
            outputs = network(x)
        names = ['output'] if isinstance(outputs, Tensor) else [f'output_{i}' for i in range(len(outputs))]
        self.session = session(trace(network, x, names, {}))

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        return tuple(map(torch.from_numpy, self.session.run(None, {'image': x.numpy()})))


def build(case: Case, arch: str | dict, device: str) -> tuple[nn.Module, nn.Module, Tensor]:
    """Build the baseline, an EMOv2 with the same weights, and images."""
    emo2 = randomized_emov2(arch, case.window)
    plain = PlainEMOv2(arch, window_size=case.window)
    copy_weights(emo2, plain)
    x = torch.randn(case.batch, 3, case.height, case.width).to(device)
    for model in (plain, emo2):
        model.train(case.trains).to(device)
    if case.kind in ('deployed', 'onnx'):
        emo2.switch_to_deploy()
    if case.kind == 'onnx':
        emo2 = InOnnxRuntime(emo2, x)
    if not case.trains:  # training keeps fp32 weights and uses autocast
        x, plain, emo2 = (part.to(DTYPES[case.dtype]) for part in (x, plain, emo2))
    if case.variant == 'channels-last':
        x, plain, emo2 = (part.to(memory_format=torch.channels_last) for part in (x, plain, emo2))
    if case.variant == 'compile':
        plain, emo2 = torch.compile(plain), torch.compile(emo2)
    return plain, emo2, x


def forward(model: nn.Module, x: Tensor, case: Case) -> tuple[Tensor, ...]:
    half = case.trains and case.dtype != 'fp32'
    with torch.autocast(x.device.type, DTYPES[case.dtype]) if half else nullcontext():
        return model(x)


def step(model: nn.Module, x: Tensor, case: Case) -> tuple[Tensor, ...]:
    """Run a forward pass and, in training, a backward pass."""
    if not case.trains:
        with torch.no_grad():
            return forward(model, x, case)
    model.zero_grad(set_to_none=True)
    maps = forward(model, x, case)
    (LOSS_SCALE * sum(m.float().square().mean() for m in maps)).backward()
    return maps


def relative_error(a: Sequence[Tensor], b: Sequence[Tensor]) -> float:
    """Norm of the difference of two lists of tensors, relative to the norm of the second."""
    a, b = (torch.cat([t.detach().double().flatten() for t in tensors]) for tensors in (a, b))
    return ((a - b).norm() / b.norm()).item()


def errors_of(plain: nn.Module, emo2: nn.Module, x: Tensor, case: Case) -> dict[str, float]:
    """Relative error of the worst feature map and, in training, of all gradients together."""
    maps = zip(step(emo2, x, case), step(plain, x, case))
    worst = max(relative_error([ours], [theirs]) for ours, theirs in maps)
    errors = {'maps in training' if case.trains else 'maps': worst}
    if case.trains:
        theirs = {name: p.grad for name, p in plain.named_parameters()}
        ours = {name: p.grad for name, p in emo2.named_parameters()}
        errors['gradients'] = relative_error(list(ours.values()), [theirs[name] for name in ours])
    return errors


def measure(case: Case, arch: str | dict, device: str, rounds: int | None) -> dict[str, Any]:
    """Check that both networks agree and, if so, measure them.

    The ratio is baseline / EMOv2 of time (the speed-up), but EMOv2 / baseline of memory.
    """
    plain, emo2, x = build(case, arch, device)
    errors = errors_of(plain, emo2, x, case)
    agrees = all(error <= LIMITS[kind][case.dtype] for kind, error in errors.items())  # False for nan
    result = dict(name=case.name, **case._asdict(), errors=errors, agrees=agrees)
    if not agrees:
        return result
    runs = [lambda m=model: step(m, x, case) for model in (plain, emo2)]
    if case.kind == 'memory':
        for model in (plain, emo2):
            model.zero_grad(set_to_none=True)
        result['saved'] = [saved_bytes(lambda m=m: forward(m, x, case), m) for m in (plain, emo2)]
        return dict(result, **summary([[peak_bytes(run, device) for run in runs]], 'bytes'))
    return dict(result, **summary(list(interleaved(runs, device, rounds)), 'seconds'))


def summary(pairs: list[list[float]], unit: str) -> dict[str, Any]:
    """Summarize pairs of measurements of baseline and EMOv2."""
    ratios = [emo2 / plain if unit == 'bytes' else plain / emo2 for plain, emo2 in pairs]
    quartiles = quantiles(ratios, n=4)[::2] if len(ratios) > 1 else ratios * 2
    medians = dict(zip(('plain', 'emo2'), map(median, zip(*pairs))))
    return dict(unit=unit, ratio=median(ratios), quartiles=quartiles, **medians, pairs=pairs)


def pool(results: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Pool the results of several processes; ``processes`` lists the ratio in each."""
    for result in results:
        if not result['agrees']:
            return result
    pairs = [pair for result in results for pair in result['pairs']]
    return dict(results[0], **summary(pairs, 'seconds'), processes=[result['ratio'] for result in results])


def measure_side(side: int, arch: str, device: str, rounds: int | None) -> dict[str, Any]:
    """Time and peak memory of inference on one square image."""
    plain, eager, x = build(Case('eager', 1, side, side, 7), arch, device)
    deployed = build(Case('deployed', 1, side, side, 7), arch, device)[1]
    networks = dict(plain=plain, eager=eager, deployed=deployed)
    runs = [lambda m=m: step(m, x, Case('eager', 1, side, side, 7)) for m in networks.values()]
    times = zip(*interleaved(runs, device, rounds))
    rows = {n: dict(seconds=median(t), bytes=peak_bytes(r, device)) for n, r, t in zip(networks, runs, times)}
    return dict(side=side, megapixels=side**2 / 1e6, **rows)


class Peer(NamedTuple):
    """Model of timm with its reported ImageNet-1K top-1 (%) for images of ``side`` pixels."""

    name: str
    side: int
    top1: float
    source: str


PEERS = [
    Peer('edgenext_small', 256, 79.4, 'arXiv 2206.10589'),
    Peer('efficientformerv2_s1', 224, 79.7, 'timm results, distilled'),
    Peer('tiny_vit_5m_224', 224, 79.0, 'MMPretrain, from scratch'),
    Peer('mobilevitv2_100', 256, 78.1, 'timm results'),
    Peer('repvit_m1_0', 224, 80.0, 'arXiv 2307.09283, distilled'),
    Peer('mobilenetv4_conv_medium', 256, 79.9, 'timm model card'),
]
PEER_LIMIT = 1e-4  # largest relative error of ONNX Runtime's logits
EMOV2_SIDE = 224
EMOV2_TOP1 = {'1m': 72.3, '2m': 75.8, '5m': 79.4}


class Classifier(nn.Module):
    """EMOv2 with its ImageNet-1K head."""

    def __init__(self, arch: str, deployed: bool) -> None:
        super().__init__()
        self.backbone = randomized_emov2(arch, 7, out_indices=(3,), final_norm=True).eval()
        self.fc = nn.Linear(EMOv2.arch_settings[arch]['channels'][-1], 1000)
        if deployed:
            self.backbone.switch_to_deploy()

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.backbone(x)[-1].mean((2, 3)))


def import_timm() -> Any:
    try:
        return importlib.import_module('timm')
    except ImportError as error:
        raise SystemExit(f'--peers needs timm ({error}). Run `pip install timm`.') from None


def in_onnx_runtime(peer: Peer, model: nn.Module) -> InOnnxRuntime:
    """A comparable model in ONNX Runtime.

    Raises:
        RuntimeError: If its outputs differ from torch's.
    """
    x = torch.randn(1, 3, peer.side, peer.side)
    other = InOnnxRuntime(model, x)
    error = relative_error(other(x), [model(x)])
    if not error <= PEER_LIMIT:
        raise RuntimeError(f'{peer.name} differs in ONNX Runtime: a relative error of {error:.0e}')
    return other


@torch.no_grad()
def measure_peers(device: str, rounds: int | None) -> list[dict[str, Any]]:
    """Sizes and speed of EMOv2 and comparable models in fp32, each at the size of its reported top-1.

    ``onnx_seconds`` is the time of ONNX Runtime for one image; None on a GPU and for an EMOv2 that is not
    deployed, because its graph is always folded.
    """
    timm = import_timm()
    reparameterize = importlib.import_module('timm.utils.model').reparameterize_model
    models = {}
    for arch, top1 in EMOV2_TOP1.items():
        own = Peer(f'EMOv2-{arch}', EMOV2_SIDE, top1, 'arXiv 2412.06674')
        models[own] = Classifier(arch, deployed=False).eval()
        models[own._replace(name=f'{own.name} deployed')] = Classifier(arch, deployed=True).eval()
    for peer in PEERS:  # fused where timm can
        models[peer] = reparameterize(timm.create_model(peer.name, num_classes=1000).eval())
    rows = {
        peer: dict(
            peer._asdict(),
            params=count_params(model),
            flops=analyzer(model, torch.zeros(1, 3, peer.side, peer.side)).total(),
            images_per_second={},
            onnx_seconds=None,
        )
        for peer, model in models.items()
    }
    folded = [peer for peer in models if peer in PEERS or 'deployed' in peer.name] if device == 'cpu' else []
    others = {peer: in_onnx_runtime(peer, models[peer]) for peer in folded}
    for model in models.values():
        model.to(device)
    for batch in (1, 8 if device == 'cpu' else 64):
        images = {p.side: torch.randn(batch, 3, p.side, p.side, device=device) for p in models}
        runs = {peer: lambda m=model, x=images[peer.side]: m(x) for peer, model in models.items()}
        if batch == 1:
            for peer, other in others.items():
                runs[peer, 'onnx'] = lambda m=other, x=images[peer.side]: m(x)
        for key, times in zip(runs, zip(*interleaved(list(runs.values()), device, rounds))):
            if key in rows:
                rows[key]['images_per_second'][str(batch)] = batch / median(times)
            else:
                rows[key[0]]['onnx_seconds'] = median(times)
    return list(rows.values())


def measure_profile(arch: str, device: str) -> list[dict[str, Any]]:
    """Operators that take most of the time, in inference and in training."""
    rows = []
    for case in (Case('eager', *INFERENCE[1]), Case('deployed', *INFERENCE[1]), Case('train', *TRAINING[0])):
        plain, emo2, x = build(case, arch, device)
        for network, model in (('plain', plain), ('emo2', emo2)):
            if case.kind != 'deployed' or network == 'emo2':  # the baseline cannot be deployed
                found = operators(lambda m=model, c=case, x=x: step(m, x, c), device)
                rows.append(dict(case=case.name, network=network, operators=found[:SHOWN_OPERATORS]))
    return rows


def machine(device: str) -> dict[str, Any]:
    """Describe the machine and the versions."""
    info = Path('/proc/cpuinfo')
    lines = info.read_text().split('\n') if info.exists() else []
    names = [line.split(': ')[1] for line in lines if line.startswith('model name')]
    return dict(
        date=time.strftime('%Y-%m-%d'),
        cpu=names[0] if names else platform.processor(),
        cores=os.cpu_count(),
        threads=torch.get_num_threads(),
        instructions=torch.backends.cpu.get_cpu_capability(),
        gpu=torch.cuda.get_device_name() if device == 'cuda' else None,
        system=platform.system(),
        python=platform.python_version(),
        torch=torch.__version__,
        cuda=torch.version.cuda if device == 'cuda' else None,
        emo2_mm=emo2_mm.__version__,
    )


def in_subprocess(job: Callable[[], Any]) -> Any:
    """Run a job in a process of its own.

    In a process that computed large images before, the C library keeps their memory, which spares the
    baseline page faults that it has in a process which runs the job only.
    """
    with ProcessPoolExecutor(1, get_context('fork')) as pool:
        return pool.submit(job).result()


def parse_args(args: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=f'{__doc__} Exits with 1 if any results differ.',
        epilog=f'Cases: {" ".join(case.name for case in common_cases())}; '
        f'on a GPU also {" ".join(case.name for case in gpu_cases())}; '
        f'on a CPU, if named, also {" ".join(case.name for case in onnx_cases())}',
    )
    parser.add_argument('--arch', default='5m', choices=list(EMOv2.arch_settings), help='defaults to 5m')
    parser.add_argument('--device', choices=('cpu', 'cuda'), help='defaults to cuda where there is one')
    parser.add_argument('--threads', type=int, help='of torch on the CPU; defaults to what torch takes')
    parser.add_argument(
        '--rounds', type=int, help='of every comparison in a process; by default as time allows'
    )
    parser.add_argument(
        '--only', nargs='*', metavar='CASE', help='these cases, or parts of their names; none if left empty'
    )
    parser.add_argument('--scale', action='store_true', help='also the cost per pixel, 224 to 1600')
    parser.add_argument(
        '--peers',
        action='store_true',
        help='also EMOv2 1m, 2m, 5m and comparable models of timm, on the CPU in ONNX Runtime, too',
    )
    parser.add_argument('--profile', action='store_true', help='also the operators that take the time')
    parser.add_argument('--out', type=Path, metavar='DIR', help='folder for benchmark.json and plots')
    parsed = parser.parse_args(args)
    parsed.device = parsed.device or ('cuda' if torch.cuda.is_available() else 'cpu')
    if parsed.device == 'cuda' and not torch.cuda.is_available():
        parser.error('--device cuda: torch finds no GPU; leave it out to measure on the CPU')
    for name in ('threads', 'rounds'):
        value = getattr(parsed, name)
        if value is not None and value < 1:
            parser.error(f'--{name} is {value}; give 1 or more')
    try:
        parsed.cases = select(parsed.only, parsed.device)
    except ValueError as error:
        parser.error(f'--only {error}')
    if parsed.device == 'cuda' and any(case.kind == 'onnx' for case in parsed.cases):
        parser.error('ONNX Runtime is measured on the CPU; give --device cpu')
    return parsed


def main(args: Sequence[str] | None = None) -> int:
    args = parse_args(args)
    if args.peers:
        import_timm()  # fail now rather than after minutes
    if args.device == 'cpu' and (args.peers or any(case.kind == 'onnx' for case in args.cases)):
        check_onnx()
    if args.threads:
        torch.set_num_threads(args.threads)
    torch.backends.cudnn.benchmark = True
    torch.backends.cudnn.allow_tf32 = False  # fp32 is fp32, for convolutions as for linear layers
    setting = (args.arch, args.device)
    jobs: list[tuple[str, str, Callable[[], Any]]] = [
        ('cases', case.name, partial(measure, case, *setting, args.rounds)) for case in args.cases
    ]
    pooled = {case.name for case in args.cases if not case.trains}
    if args.scale:
        for side in SIDES:
            jobs.append(('scale', f'scale-{side}', partial(measure_side, side, *setting, args.rounds)))
    if args.peers:
        jobs.append(('peers', 'peers', partial(measure_peers, args.device, args.rounds)))
    if args.profile:
        jobs.append(('profile', 'profile', partial(measure_profile, *setting)))

    console = Console(width=None if sys.stdout.isatty() else 120)
    results: dict[str, Any] = dict(
        arch=args.arch, device=args.device, machine=machine(args.device), limits=LIMITS
    )
    console.print(
        ', '.join(f'{name} {value}' for name, value in results['machine'].items() if value), soft_wrap=True
    )
    columns = (TextColumn('{task.description}'), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
        bar = progress.add_task('', total=len(jobs))
        for section, name, job in jobs:
            progress.update(bar, description=name)
            if args.device != 'cpu':
                found = job()
            elif name in pooled:
                found = pool([in_subprocess(job) for _ in range(PROCESSES)])
            else:
                found = in_subprocess(job)
            results.setdefault(section, []).extend(found if isinstance(found, list) else [found])
            progress.advance(bar)
            if section in ('cases', 'scale'):
                console.print(one_line(found), highlight=False, soft_wrap=True)
    for table in tables(results):
        console.print(table)
    if args.out:
        args.out.mkdir(parents=True, exist_ok=True)
        (args.out / 'benchmark.json').write_text(json.dumps(results, indent=1) + '\n')
        draw(results, args.out)
        console.print(
            f'written to {args.out}: {" ".join(sorted(f.name for f in args.out.glob("benchmark*")))}'
        )
    wrong = [case['name'] for case in results.get('cases', []) if not case['agrees']]
    if wrong:
        console.print(f'[bold red]EMOv2 and the baseline differ:[/] {" ".join(wrong)}')
    return 1 if wrong else 0


if __name__ == '__main__':
    sys.exit(main())
