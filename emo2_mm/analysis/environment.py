"""Say in plain words what is wrong with the Python environment this runs in, and what cures it.

MMEngine's ``collect_env`` describes an environment that works. This judges one, and does so where torch, mmcv
or anything else is missing or fails, too: packages are tried in another process, which may crash.
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
from importlib import import_module
from importlib.util import find_spec
from multiprocessing import get_context
from pathlib import Path
from typing import Any, Iterator, NamedTuple

try:
    from importlib import metadata
except ImportError:  # before Python 3.8, which is then among the findings
    metadata = None

# What is tried, in this order, and what it needs; it is not tried where one of these fails.
NEEDS = {
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
    'pkg_resources': [],
}
CODE_BASES = ['mmpretrain', 'mmdet', 'mmseg']
OWNERS = {  # the distributions that bring a module, the usual one first
    'cv2': [f'opencv{more}-python{less}' for more in ('', '-contrib') for less in ('', '-headless')],
    'emo2_mm': ['emo2-mm'],
    'PIL': ['pillow'],
    'yaml': ['pyyaml'],
    'pkg_resources': ['"setuptools<82"'],
    'mmengine': ['mmengine', 'mmengine-lite', 'onedl-mmengine'],
    'mmcv': ['mmcv', 'mmcv-lite', 'mmcv-full', 'onedl-mmcv'],
    'mmpretrain': ['mmpretrain', 'onedl-mmpretrain'],
    'mmdet': ['mmdet', 'onedl-mmdetection'],
    'mmseg': ['mmsegmentation', 'onedl-mmsegmentation'],
}
INSTALL_SELF = 'pip install . in the folder of emo2_mm'
LEVELS = ['error', 'warning', 'note']
LIMITS = re.compile(r"^(mmcv|mmengine)_min.* = '(.+)'\n.*_max.* = '(.+)'", re.I | re.M)
OLD_NUMPY = re.compile(r'numpy\S* failed to import|_ARRAY_API|numpy\.dtype size changed|using NumPy 1')
NO_LIBRARY = re.compile(r'(lib(?:GL|gthread|glib)[\w.-]*): cannot open')
NO_MODULE = re.compile(r"No module named '([\w.]+)'")


class Environment(NamedTuple):
    """What was found out about an environment."""

    python: str
    installed: dict[str, str]  # distribution: version
    present: list[str]  # modules of NEEDS that are there, working or not
    modules: dict[str, str]  # those that could be used: version
    errors: dict[str, str] = {}  # those that could not: why; what is in neither was not tried
    limits: dict[str, list[tuple[str, str, str]]] = {}  # code base: (module, lowest, first too new), ...
    torchvision_wants: str = ''  # the torch that it says it is made for
    torch_cuda: str | None = None  # the CUDA, or ROCm, that torch is built for
    torch_gpu: bool = False  # torch can use a GPU
    torch_numpy: bool = True  # torch can use numpy
    gpus: list[str] = []  # what nvidia-smi lists
    engine_resumes: bool = True  # mmengine tells torch.load what its own checkpoints may hold
    use_pkg_resources: list[str] = []  # packages that import it, where it is missing

    def owners(self, module: str) -> list[str]:
        return [name for name in OWNERS.get(module, [module]) if name in self.installed]

    def version(self, module: str) -> str:
        """Version of a module, be it working or not; empty where it is not known."""
        return self.modules.get(module) or ''.join(self.installed[name] for name in self.owners(module)[:1])

    def named(self, module: str) -> str:
        return f'{module} {self.version(module)}'.strip()

    def forks(self) -> bool:
        """Whether the forks are begun, or what fits Python."""
        return any(name.startswith('onedl-') for name in self.installed) or release(self.python) >= (3, 12)

    def pip(self, *modules: str) -> str:
        """The command that installs modules, in versions of the stack that is begun, or fits Python."""
        forks = self.forks()
        known = [OWNERS.get(module, [module]) for module in modules]
        names = [owners[-1] if forks and owners[-1].startswith('onedl-') else owners[0] for owners in known]
        return f'pip install -c requirements/{"onedl" if forks else "classic"}.txt {" ".join(names)}'

    def build_mmcv(self) -> str:
        """The cure for operators; build isolation would hide torch, and they would be left out silently."""
        old = f'pip uninstall -y {" ".join(self.owners("mmcv"))}; ' if self.owners('mmcv') else ''
        build = f'{old}MMCV_WITH_OPS=1 {self.pip("mmcv")} --no-build-isolation --no-cache-dir'
        if 'onedl-mmcv' in build:
            return build
        return f'a wheel for this torch of https://download.openmmlab.com/mmcv/dist, or compile it: {build}'


class Finding(NamedTuple):
    level: str  # one of LEVELS
    what: str
    cure: str


def release(version: str) -> tuple[int, ...]:
    """Turn ``'2.1.2+cu121'`` into ``(2, 1, 2)``, to compare by."""
    numbers = [int(number) for number in re.findall(r'\d+', version)]
    return tuple([*numbers, 0, 0, 0][:3])


# --- What can be wrong ----------------------------------------------------------------------------


def other_python(env: Environment) -> Iterator[Finding]:
    if not (3, 8) <= release(env.python) < (3, 13):
        level = 'error' if release(env.python) < (3, 8) else 'warning'
        cure = 'take Python 3.8 - 3.11 for the classic packages, 3.10 - 3.12 for the onedl-* forks'
        yield Finding(level, f'Python {env.python} is not one of 3.8 - 3.12', cure)


def missing(env: Environment) -> Iterator[Finding]:
    wanted = ['numpy', 'torch', 'torchvision', 'cv2', 'mmengine', 'emo2_mm']
    if set(CODE_BASES).intersection(env.present):
        wanted += ['mmcv']
    else:
        cure = 'pip install ".[cls]", ".[det]" or ".[seg]" in the folder of emo2_mm'
        if env.forks():  # which the extras are not for
            cure = env.pip(*CODE_BASES)
        yield Finding('note', 'without mmpretrain, mmdet and mmseg only the backbone can be used', cure)
    cures = {'mmcv': env.build_mmcv(), 'emo2_mm': INSTALL_SELF}
    for name in wanted:
        if name not in env.present:
            yield Finding('error', f'{name} is not installed', cures.get(name, env.pip(name)))


def failures(env: Environment) -> Iterator[Finding]:
    """What is there but cannot be imported or used; torchvision and pkg_resources have own checks."""
    for name, error in env.errors.items():
        if name == 'pkg_resources':
            continue
        what = f'{env.named(name)} fails: {error}'
        gone, library = NO_MODULE.search(error), NO_LIBRARY.search(error)
        if OLD_NUMPY.search(error) and release(env.version('numpy')) >= (2,):
            what = f'{name} was built for numpy 1, not {env.version("numpy")}: {error}'
            yield Finding('error', what, f'pip install "numpy<2", or a {name} built for numpy 2')
        elif library:
            cure = 'apt-get install libgl1 libglib2.0-0, or opencv-python-headless in place of opencv-python'
            yield Finding('error', f'{name} needs {library[1]}, which this machine lacks', cure)
        elif gone and not gone[1].startswith('mmcv'):
            yield Finding('error', what, env.pip(gone[1].split('.')[0]))
        elif name == 'mmcv.ops':
            what = f'the operators of {env.named("mmcv")} do not work with this torch: {error}'
            if gone:
                what = f'{env.named("mmcv")} has no compiled operators, as mmcv-lite has none: {error}'
            needed = {'mmdet', 'mmseg'}.intersection(env.present)
            yield Finding('error' if needed else 'warning', what, env.build_mmcv())
        elif name != 'torchvision' and not (env.limits.get(name) and 'incompatible' in error):
            again = [f'{owner}=={env.version(name)}' for owner in env.owners(name)] or [name]
            cure = f'pip install --force-reinstall --no-deps {again[0]}'
            yield Finding('error', what, INSTALL_SELF if name == 'emo2_mm' else cure)


def other_torchvision(env: Environment) -> Iterator[Finding]:
    torch, wanted = env.version('torch').split('+')[0], env.torchvision_wants
    error = env.errors.get('torchvision', '')
    other = wanted and release(wanted) != release(torch)
    if torch and (other or error) and not NO_MODULE.search(error):
        what = f'{env.named("torchvision")} does not fit torch {torch}'
        what += (f', it is built for {wanted}' if other else '') + (f': {error}' if error else '')
        cure = f'pip uninstall -y torchvision; pip install torch=={torch} torchvision, both from one index'
        yield Finding('error' if error else 'warning', what, cure)


def refused_versions(env: Environment) -> Iterator[Finding]:
    for base in set(env.limits).difference(env.modules):  # one that works was changed to accept others
        for name, low, high in env.limits[base]:
            name, found = name.lower(), env.version(name.lower())
            if found and not release(low) <= release(found) < release(high):
                what = f'{env.named(base)} takes {name} >= {low}, < {high}, not {found}'
                yield Finding('error', what, env.build_mmcv() if name == 'mmcv' else env.pip(name))


def other_torch(env: Environment) -> Iterator[Finding]:
    torch, numpy = env.version('torch'), env.version('numpy')
    if torch and release(torch) < (2, 1):
        yield Finding('error', f'torch {torch} is older than 2.1', env.pip('torch', 'torchvision'))
    if release(torch) >= (2, 6) and not env.engine_resumes:
        what = f'{env.named("mmengine")} cannot resume its own checkpoints with torch {torch}'
        yield Finding('error', what, 'take torch 2.1, or for all OpenMMLab packages their onedl-* forks')
    if 'numpy' in env.modules and not env.torch_numpy:
        what = f'torch {torch} was built for numpy 1 and cannot use numpy {numpy}'
        yield Finding('error', what, 'pip install "numpy<2" "opencv-python<4.11", or take torch 2.3 or newer')


def one_over_another(env: Environment) -> Iterator[Finding]:
    openmmlab = [name for module in ('mmengine', 'mmcv', *CODE_BASES) for name in env.owners(module)]
    forks = [name for name in openmmlab if name.startswith('onedl-')]
    if 0 < len(forks) < len(openmmlab):
        what = f'classic packages and forks are mixed, which own the same modules: {", ".join(openmmlab)}'
        yield Finding('error', what, f'pip uninstall -y {" ".join(openmmlab)}; then install all of one kind')
    for module in OWNERS:
        names = [name for name in env.owners(module) if name not in forks]
        if module == 'cv2' and len({env.installed[name] for name in names}) == 1:
            continue  # as onedl-mmdetection brings them: either's files serve
        if len(names) > 1:
            what = f'{" and ".join(names)} overwrite files of each other: both are {module}'
            yield Finding('warning', what, f'pip uninstall -y {" ".join(names)}; then install one of them')


def no_pkg_resources(env: Environment) -> Iterator[Finding]:
    if env.use_pkg_resources:
        what = f'pkg_resources is missing, which {", ".join(env.use_pkg_resources)} imports'
        if 'mmengine' in env.use_pkg_resources:
            what += ", for _base_ = 'mmdet::...' among others"
        yield Finding('error', what, env.pip('pkg_resources'))


def loading_holes(env: Environment) -> Iterator[Finding]:
    torch = env.version('torch')
    holes = {'CVE-2025-32434': '2.6', 'CVE-2026-24747': '2.10'}
    found = [f'{name}, closed in {fixed}' for name, fixed in holes.items() if release(torch) < release(fixed)]
    if torch and found:
        what = f'a checkpoint may run code in torch {torch}, even with torch.load(weights_only=True)'
        cure = 'take torch 2.10 or newer, or open only .safetensors and checkpoints of people you trust'
        yield Finding('warning', f'{what} ({"; ".join(found)})', cure)


def unused_gpu(env: Environment) -> Iterator[Finding]:
    torch, cuda, gpus = env.named('torch'), env.torch_cuda, ', '.join(env.gpus)
    if 'torch' not in env.modules or env.torch_gpu:
        return
    if gpus and not cuda:
        cure = 'install torch and torchvision built for CUDA, then an mmcv built for them'
        yield Finding('warning', f'{torch} is built without CUDA and leaves this GPU unused: {gpus}', cure)
    elif gpus:
        cure = f'install a driver for CUDA {cuda} or an older torch, and see CUDA_VISIBLE_DEVICES'
        yield Finding('warning', f'{torch} is built for CUDA {cuda} but cannot use this GPU: {gpus}', cure)
    elif cuda:
        what = f'{torch} is built for CUDA {cuda}, and there is no GPU: all runs on the CPU'
        yield Finding(
            'note', what, 'none needed; if there is a GPU, install its driver (nvidia-smi shows it)'
        )


CHECKS = [other_python, missing, failures, other_torchvision, refused_versions, other_torch]
CHECKS += [one_over_another, no_pkg_resources, loading_holes, unused_gpu]


def judge(env: Environment) -> list[Finding]:
    """All findings, the worst first."""
    findings = [finding for check in CHECKS for finding in check(env)]
    return sorted(findings, key=lambda finding: LEVELS.index(finding.level))


# --- Finding it out -------------------------------------------------------------------------------


def silence() -> None:
    for stream in (1, 2):
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream)


def use(name: str) -> dict[str, Any] | str:
    """Import a module and do a little with it; return fields of :class:`Environment`, or what failed."""
    try:
        module = import_module(name)
        facts = {'version': str(getattr(module, '__version__', ''))}
        if name == 'torch':
            facts.update(torch_cuda=module.version.cuda or module.version.hip)
            facts.update(torch_gpu=module.cuda.is_available())
            try:
                module.zeros(1).numpy()
            except RuntimeError:
                facts.update(torch_numpy=False)
        elif name in ('torchvision', 'mmcv.ops'):
            torch = import_module('torch')
            nms = import_module('torchvision.ops').nms if name == 'torchvision' else module.nms
            for device in ['cpu'] + ['cuda'] * torch.cuda.is_available():
                boxes = torch.tensor([[0.0, 0, 10, 10], [20, 20, 30, 30]], device=device)
                nms(boxes, torch.tensor([0.9, 0.8], device=device), 0.5)
        elif name == 'mmengine':
            import_module('mmengine.runner')
        elif name in ('mmdet', 'mmseg'):  # which import next to nothing by themselves
            import_module(f'{name}.models')
            import_module(f'{name}.datasets')
        return facts
    except BaseException as error:  # a module may even exit
        return ' '.join(f'{type(error).__name__}: {error}'.split())[:300]


def use_all(names: list[str]) -> tuple[dict[str, dict], dict[str, str]]:
    """Use modules in another process; after a failure the next begin in a new one."""
    facts, errors, pool = {}, {}, None
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


def code(path: Path) -> str:
    return path.read_text(encoding='utf-8', errors='replace') if path.is_file() else ''


def imports_pkg_resources(folder: Path) -> bool:
    files = (path for path in folder.rglob('*.py') if '.mim' not in path.parts)
    return any(re.search(r'^ *(import|from) pkg_resources', code(path), re.M) for path in files)


def look_around() -> Environment:
    """Find out about the environment of this Python."""
    specs = {name: find_spec(name) for name in [*NEEDS, 'mim'] if '.' not in name}
    sources = {name: Path(spec.origin) for name, spec in specs.items() if spec and spec.origin}
    present = [name for name in NEEDS if name.split('.')[0] in sources]
    facts, errors = use_all(present)
    modules = {name: fact.pop('version') for name, fact in facts.items()}
    more = {key: value for fact in facts.values() for key, value in fact.items()}
    installed: dict[str, str] = {}
    for package in metadata.distributions() if metadata else []:
        name = str(package.metadata['Name']).lower().replace('_', '-')
        installed.setdefault(name, package.version)  # the first on the path is what Python takes
        if name == 'torchvision':
            wants = re.search(r'torch *\(?== *([\d.]+)', '\n'.join(package.requires or []))
            more.setdefault('torchvision_wants', wants[1] if wants else '')
    limits = {base: LIMITS.findall(code(sources[base])) for base in CODE_BASES if base in sources}
    if 'mmengine' in sources:
        more['engine_resumes'] = 'weights_only' in code(sources['mmengine'].parent / 'runner/checkpoint.py')
    if 'pkg_resources' not in modules:
        users = [name for name in ('mmengine', 'mmcv', *CODE_BASES, 'mim') if name in sources]
        more['use_pkg_resources'] = [name for name in users if imports_pkg_resources(sources[name].parent)]
    try:
        listed = subprocess.run(['nvidia-smi', '-L'], stdout=subprocess.PIPE, text=True, timeout=60).stdout
        more['gpus'] = re.findall(r'^GPU \d+: (.*?)(?: \(UUID|$)', listed, re.M)
    except (OSError, subprocess.TimeoutExpired):
        pass  # no driver, or one that hangs
    return Environment(platform.python_version(), installed, present, modules, errors, limits, **more)


def report(as_json: bool = False) -> int:
    """Print what is installed and what is wrong with it.

    Args:
        as_json: Print everything that was found as JSON.

    Returns:
        The exit code: 1 if there is an error among the findings, else 0.
    """
    print('Trying what is installed, which takes some seconds.', file=sys.stderr, flush=True)
    env = look_around()
    findings = judge(env)
    if as_json:
        found = {'findings': [finding._asdict() for finding in findings]}
        print(json.dumps({**env._asdict(), **found}, indent=2))
    else:
        print(f'{"Python":15}{env.python}')
        for name in NEEDS:
            state = 'works' if name in env.modules else 'fails' if name in env.errors else 'not tried'
            print(f'{name:15}{env.version(name):15}{state if name in env.present else "missing"}')
        print()
        for level, what, cure in findings:
            print(f'{level}: {what}. Cure: {cure}.')
        print(f'{len(findings) or "No"} finding{"s" * (len(findings) != 1)}.')
    return any(finding.level == 'error' for finding in findings)


if __name__ == '__main__':  # run from its file where the package cannot be imported
    sys.exit(report('--json' in sys.argv))
