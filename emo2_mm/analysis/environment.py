"""Find what is wrong with an installation, and how to fix it.

MMEngine's ``collect_env`` describes an environment that works, and ``pip check`` compares versions. This uses
each package in another process, which may crash, and so also works where torch, mmcv or another package is
missing or broken. It imports the standard library only.
"""

from __future__ import annotations

import json
import os
import platform
import re
import subprocess
import sys
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from importlib import import_module, metadata
from importlib.util import find_spec
from multiprocessing import get_context
from typing import Any, Iterator, NamedTuple

# Modules in the order in which they are tried, and what they need: without these they are not tried.
NEEDS: dict[str, list[str]] = {
    'numpy': [],
    'torch': [],
    'torchvision': ['torch'],
    'cv2': ['numpy'],
    'mmengine': ['cv2', 'torch'],
    'mmcv': ['mmengine'],
    'mmcv.ops': ['mmcv'],
    'mmpretrain': ['mmcv', 'torchvision'],
    'mmdet': ['mmcv.ops', 'torchvision'],
    'mmseg': ['mmcv.ops', 'torchvision'],
    'emo2_mm': ['mmengine'],
}
LIBRARIES = ['mmpretrain', 'mmdet', 'mmseg']
DISTRIBUTIONS = {  # of a module: its usual name, and that of the maintained fork
    'cv2': ['opencv-python'],
    'PIL': ['pillow'],
    'mmengine': ['mmengine', 'onedl-mmengine'],
    'mmcv': ['mmcv', 'onedl-mmcv'],
    'mmpretrain': ['mmpretrain', 'onedl-mmpretrain'],
    'mmdet': ['mmdet', 'onedl-mmdetection'],
    'mmseg': ['mmsegmentation', 'onedl-mmsegmentation'],
}
INSTALL_SELF = 'pip install . in the checkout of emo2_mm'
LEVELS = ['error', 'warning', 'note']
OLD_NUMPY = re.compile(
    r'Numpy is not available|numpy\S* failed to import|_ARRAY_API|numpy\.dtype size changed|using NumPy 1'
)
NO_LIBRARY = re.compile(r'(lib(?:GL|gthread|glib)[\w.-]*): cannot open')
NO_MODULE = re.compile(r"No module named '([\w.]+)'")


class Environment(NamedTuple):
    """What was found out about an environment.

    Attributes:
        python: Version of Python.
        installed: Distribution -> version.
        present: Modules of :data:`NEEDS` that exist, working or not.
        modules: Those that work -> version.
        errors: Those that fail -> error. A module in neither was not tried.
        conflicts: What ``pip check`` reports.
        gpus: GPU name -> compute capability, from nvidia-smi.
        torch_cuda: CUDA (or ROCm) version that torch is built for.
        torch_gpu: Whether torch can use a GPU.
        torch_archs: Architectures that torch has kernels for, such as ``sm_90``.
        collect_env: MMEngine's description of the environment.
    """

    python: str
    installed: dict[str, str]
    present: list[str]
    modules: dict[str, str]
    errors: dict[str, str] = {}
    conflicts: list[str] = []
    gpus: dict[str, str] = {}
    torch_cuda: str | None = None
    torch_gpu: bool = False
    torch_archs: list[str] = []
    collect_env: dict[str, str] = {}

    def named(self, module: str) -> str:
        """A module with its version, as far as it is known."""
        names = DISTRIBUTIONS.get(module, [module])
        version = self.modules.get(module) or next(filter(None, map(self.installed.get, names)), '')
        return f'{module} {version}'.strip()

    def stack(self) -> str:
        forks = any(name.startswith('onedl-') for name in self.installed)
        return 'onedl' if forks or release(self.python) >= (3, 12) else 'classic'

    def pip(self, *modules: str) -> str:
        """The command that installs modules in versions of the stack."""
        index = -1 if self.stack() == 'onedl' else 0
        names = [DISTRIBUTIONS.get(module, [module])[index] for module in modules]
        return f'pip install -c requirements/{self.stack()}.txt {" ".join(names)}'

    def build_mmcv(self) -> str:
        """How to get operators; with build isolation mmcv does not see torch and silently omits them."""
        options = '--force-reinstall --no-deps --no-build-isolation --no-cache-dir'
        return f'make env, or compile mmcv for this torch: MMCV_WITH_OPS=1 {self.pip("mmcv")} {options}'


class Finding(NamedTuple):
    level: str  # one of LEVELS
    what: str
    fix: str


def release(version: str) -> tuple[int, ...]:
    """Turn ``'2.1.2+cu121'`` into ``(2, 1, 2)``, to compare by."""
    return tuple([*map(int, re.findall(r'\d+', version)), 0, 0, 0][:3])


# --- Checks ---------------------------------------------------------------------------------------


def check_python(env: Environment) -> Iterator[Finding]:
    if not (3, 8) <= release(env.python) < (3, 13):
        fix = 'use Python 3.8 - 3.11 for the classic packages, 3.10 - 3.12 for the onedl-* forks'
        yield Finding('warning', f'Python {env.python} is not one of 3.8 - 3.12', fix)


def check_missing(env: Environment) -> Iterator[Finding]:
    wanted = ['numpy', 'torch', 'torchvision', 'cv2', 'mmengine', 'emo2_mm']
    if set(LIBRARIES).intersection(env.present):
        wanted.append('mmcv')
    else:
        extras = 'pip install ".[cls]", ".[det]" or ".[seg]" in the checkout of emo2_mm'
        fix = extras if env.stack() == 'classic' else env.pip(*LIBRARIES)
        yield Finding('note', 'without mmpretrain, mmdet and mmseg only the backbone can be used', fix)
    fixes = {'mmcv': env.build_mmcv(), 'emo2_mm': INSTALL_SELF}
    for name in wanted:
        if name not in env.present:
            yield Finding('error', f'{name} is not installed', fixes.get(name, env.pip(name)))


def check_failures(env: Environment) -> Iterator[Finding]:
    for name, error in env.errors.items():
        what = f'{env.named(name)} fails: {error}'
        fix = INSTALL_SELF if name == 'emo2_mm' else f'{env.pip(name)} --force-reinstall --no-deps'
        level, missing, library = 'error', NO_MODULE.search(error), NO_LIBRARY.search(error)
        if OLD_NUMPY.search(error):
            fix = f'pip install "numpy<2" "opencv-python<4.11", or a {name} built for NumPy 2'
        elif library:
            fix = 'apt-get install libgl1 libglib2.0-0, or opencv-python-headless instead of opencv-python'
        elif name == 'mmcv.ops':
            what = f'the operators of {env.named("mmcv")} do not work with this torch: {error}'
            level = 'error' if {'mmdet', 'mmseg'}.intersection(env.present) else 'warning'
            fix = env.build_mmcv()
        elif missing:
            fix = env.pip(missing[1].split('.')[0])
        yield Finding(level, what, fix)


def check_versions(env: Environment) -> Iterator[Finding]:
    """What neither an import nor ``pip check`` shows."""
    for conflict in env.conflicts:
        yield Finding('warning', f'pip check: {conflict}', 'install the required version, or run make env')
    openmmlab = [name for names in DISTRIBUTIONS.values() for name in names if name in env.installed]
    openmmlab = [name for name in openmmlab if 'mm' in name]
    forks = [name for name in openmmlab if name.startswith('onedl-')]
    if 0 < len(forks) < len(openmmlab):
        what = f'classic packages and forks are mixed, which own the same modules: {", ".join(openmmlab)}'
        yield Finding('error', what, f'pip uninstall -y {" ".join(openmmlab)}; then install one kind')
    if 'mmengine' in env.installed and release(env.installed.get('torch', '')) >= (2, 6):
        what = f'{env.named("mmengine")} cannot resume its own checkpoints with {env.named("torch")}'
        yield Finding('error', what, 'use torch 2.1, or the onedl-* forks of all OpenMMLab packages')
    if 'mmengine' in env.installed and release(env.installed.get('setuptools', '82')) >= (82,):
        what = "pkg_resources is missing, which mmengine imports for _base_ = 'mmdet::...'"
        yield Finding('error', what, 'pip install "setuptools<82"')
    if release(env.installed.get('torch', '3')) < (2, 10):
        what = f'{env.named("torch")} may run code from a checkpoint, even with weights_only (CVE-2026-24747)'
        fix = 'load checkpoints with emo2_mm, as its tools do, or use torch 2.10 or newer'
        yield Finding('warning', what, fix)


def has_kernels(archs: list[str], capability: str) -> bool:
    """Whether kernels for some architectures run on a GPU: those of its generation that are not newer."""
    major, minor = map(int, capability.split('.'))
    built = [divmod(int(number), 10) for number in re.findall(r'sm_(\d+)', ' '.join(archs))]
    return any(generation == major and step <= minor for generation, step in built)


def check_gpu(env: Environment) -> Iterator[Finding]:
    torch, cuda = env.named('torch'), env.torch_cuda
    if 'torch' not in env.modules:
        return
    for name, capability in env.gpus.items():
        gpu = f'{name} (compute capability {capability})'
        if not cuda:
            fix = 'install torch and torchvision built for CUDA, then an mmcv built for them'
            yield Finding('warning', f'{torch} is built without CUDA and does not use {gpu}', fix)
        elif env.torch_archs and not has_kernels(env.torch_archs, capability):
            what = f'{torch} has no kernels for {gpu}, only for {" ".join(env.torch_archs)}'
            newest = max(release(arch) for arch in env.torch_archs)[0]
            stack = 'onedl' if release(capability)[0] * 10 > newest else 'classic'
            yield Finding('error' if env.torch_gpu else 'warning', what, f'make env STACK={stack}')
        elif not env.torch_gpu:
            fix = f'install a driver for CUDA {cuda} or use an older torch, and see CUDA_VISIBLE_DEVICES'
            yield Finding('warning', f'{torch} is built for CUDA {cuda} but cannot use {gpu}', fix)
    if cuda and not env.torch_gpu and not env.gpus:
        what = f'{torch} is built for CUDA {cuda}, and nvidia-smi shows no GPU: the CPU is used'
        yield Finding('note', what, 'none needed; if there is a GPU, install its driver')


def judge(env: Environment) -> list[Finding]:
    """All findings, the worst first."""
    checks = [check_python, check_missing, check_failures, check_versions, check_gpu]
    findings = [finding for check in checks for finding in check(env)]
    return sorted(findings, key=lambda finding: LEVELS.index(finding.level))


# --- Finding it out -------------------------------------------------------------------------------


def silence() -> None:
    for stream in (1, 2):
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream)


def use(name: str) -> dict[str, Any] | str:
    """Import a module and use it a little; return fields of :class:`Environment`, or the error."""
    try:
        module = import_module(name)
        facts: dict[str, Any] = dict(version=str(getattr(module, '__version__', '')))
        if name == 'torch':
            facts.update(torch_cuda=module.version.cuda or module.version.hip)
            facts.update(torch_gpu=module.cuda.is_available())
            if module.version.cuda:  # torch.cuda.get_arch_list() is empty without a usable GPU
                facts.update(torch_archs=module._C._cuda_getArchFlags().split())
            module.zeros(1).numpy()  # fails if torch was built for another NumPy
        elif name in ('torchvision', 'mmcv.ops'):
            torch = import_module('torch')
            nms = import_module('torchvision.ops').nms if name == 'torchvision' else module.nms
            for device in ['cpu'] + ['cuda'] * torch.cuda.is_available():
                boxes = torch.tensor([[0.0, 0, 10, 10], [20, 20, 30, 30]], device=device)
                nms(boxes, torch.tensor([0.9, 0.8], device=device), 0.5)
        elif name == 'mmengine':
            import_module('mmengine.runner')
            described = import_module('mmengine.utils.dl_utils').collect_env()
            facts.update(collect_env={key: str(value) for key, value in described.items()})
        elif name in ('mmdet', 'mmseg'):  # which import next to nothing by themselves
            import_module(f'{name}.models')
            import_module(f'{name}.datasets')
        return facts
    except BaseException as error:  # a module may even exit
        return ' '.join(f'{type(error).__name__}: {error}'.split())[:300]


def use_all(names: list[str]) -> tuple[dict[str, dict[str, Any]], dict[str, str]]:
    """Use modules in another process; after a failure the next ones in a new one."""
    facts: dict[str, dict[str, Any]] = {}
    errors: dict[str, str] = {}
    pool = None
    for name in names:
        if not all(need in facts for need in NEEDS[name]):
            continue
        pool = pool or ProcessPoolExecutor(1, get_context('spawn'), silence)
        try:
            result = pool.submit(use, name).result()
        except BrokenProcessPool:
            result = 'it crashes Python'
        if isinstance(result, str):
            errors[name] = result
            pool.shutdown()
            pool = None
        else:
            facts[name] = result
    return facts, errors


def output_of(*command: str) -> list[str]:
    """The lines that a command prints; none if it cannot run or hangs."""
    try:
        done = subprocess.run(
            command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, timeout=60
        )
    except (OSError, subprocess.TimeoutExpired):
        return []
    return done.stdout.splitlines()


def look_around() -> Environment:
    """Find out about the environment of this Python."""
    present = [name for name in NEEDS if find_spec(name.split('.')[0])]
    facts, errors = use_all(present)
    modules = {name: fact.pop('version') for name, fact in facts.items()}
    more = {key: value for fact in facts.values() for key, value in fact.items()}
    installed: dict[str, str] = {}
    for package in metadata.distributions():
        name = str(package.metadata['Name']).lower().replace('_', '-')
        installed.setdefault(name, package.version)  # Python uses the first on the path
    flags = ['-S'] if sys.flags.no_site else []
    conflicts = [
        line
        for line in output_of(sys.executable, *flags, '-m', 'pip', 'check')
        if ' has requirement ' in line or ' requires ' in line
    ]
    listed = output_of('nvidia-smi', '--query-gpu=name,compute_cap', '--format=csv,noheader')
    gpus = dict(re.findall(r'^(.+), (\d+\.\d+)$', '\n'.join(listed), re.M))
    return Environment(
        platform.python_version(), installed, present, modules, errors, conflicts, gpus, **more
    )


def report(as_json: bool = False) -> int:
    """Print what is wrong with this environment, or as JSON all that is known; 1 if there is an error."""
    print('Trying the installed packages, which takes some seconds.', file=sys.stderr, flush=True)
    env = look_around()
    findings = judge(env)
    if as_json:
        found = {'findings': [finding._asdict() for finding in findings]}
        print(json.dumps({**env._asdict(), **found}, indent=2))
    else:
        print(f'{"Python":15}{env.python}')
        for name in NEEDS:
            state = 'works' if name in env.modules else 'fails' if name in env.errors else 'not tried'
            version = env.named(name).partition(' ')[2]
            print(f'{name:15}{version:15}{state if name in env.present else "missing"}')
        print()
        for level, what, fix in findings:
            print(f'{level}: {what}. Fix: {fix}.')
        print(f'{len(findings) or "No"} finding{"s" * (len(findings) != 1)}.')
    return int(any(finding.level == 'error' for finding in findings))


if __name__ == '__main__':  # run from its file where the package cannot be imported
    sys.exit(report('--json' in sys.argv))
