"""What training and testing share: arguments, a look at the files a config names, the processes."""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, Iterator, NamedTuple, NoReturn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # works in a bare clone too

import torch  # noqa: E402
from mmengine.config import Config, ConfigDict, DictAction  # noqa: E402
from mmengine.device import get_device  # noqa: E402
from mmengine.registry import RUNNERS  # noqa: E402
from mmengine.runner import CheckpointLoader, Runner  # noqa: E402

from emo2_mm.reading import read_checkpoint  # noqa: E402  # a config may say type='EMOv2' then

# Folder name in a path -> where the data set comes from and how it lies; the first name found counts.
LAYOUTS = {
    'digits': '`make demo` makes these digits.',
    'coco': 'COCO 2017 is at https://cocodataset.org/#download, to be unpacked as '
    '(PATH is data/coco in the configs)\n'
    '  PATH/annotations/instances_train2017.json, instances_val2017.json\n'
    '  PATH/train2017/*.jpg, PATH/val2017/*.jpg',
    'imagenet': 'ImageNet-1k (ILSVRC 2012) is at https://image-net.org/download.php, to be '
    'unpacked as (PATH is data/imagenet in the configs)\n'
    '  PATH/train/n01440764/*.JPEG ..., PATH/val/n01440764/*.JPEG ... (a folder for each class)',
    'ade': 'ADE20K (SceneParsing) is at http://sceneparsing.csail.mit.edu, to be unpacked as '
    '(PATH is data/ade/ADEChallengeData2016 in the configs)\n'
    '  PATH/images/training/*.jpg, PATH/images/validation/*.jpg\n'
    '  PATH/annotations/training/*.png, PATH/annotations/validation/*.png',
}
DOWNLOADED = ('CIFAR10', 'CIFAR100', 'MNIST', 'FashionMNIST')  # MMPretrain fetches these itself
NO_BFLOAT16_NMS = 'the NMS of mmcv takes no bfloat16, which is meant without a GPU; leave --amp out'
SYNC_BN = ('SyncBN', 'MMSyncBN', 'NaiveSyncBN')
# launcher -> its names of what torch calls RANK, WORLD_SIZE and LOCAL_RANK
LAUNCHERS = {
    'none': (),
    'pytorch': ('RANK', 'WORLD_SIZE'),  # old versions give the third as an argument
    'slurm': ('SLURM_PROCID', 'SLURM_NTASKS', 'SLURM_LOCALID'),
    'mpi': ('OMPI_COMM_WORLD_RANK', 'OMPI_COMM_WORLD_SIZE', 'OMPI_COMM_WORLD_LOCAL_RANK'),
}


class Missing(NamedTuple):
    """A config entry, its value, and the path it stands for, where nothing is."""

    entry: str
    value: str
    path: str


def local_rank() -> int:
    """The number of this process on its machine."""
    return int(os.environ.get('LOCAL_RANK', 0))


def fail(message: str) -> NoReturn:
    """End the program with a message instead of a traceback, from one process of a machine."""
    if local_rank() != 0:
        # A launcher ends all processes once one has failed: let that be the one that explains.
        time.sleep(10)
        raise SystemExit(1)
    raise SystemExit(f'error: {message}')


def note(message: str) -> None:
    """Print a line from one process of a machine."""
    if local_rank() == 0:
        print(message, flush=True)


def new_parser(description: str) -> argparse.ArgumentParser:
    """The arguments that training and testing have in common."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument('config', help='config file')
    parser.add_argument(
        '--work-dir',
        help='folder for logs, checkpoints and metrics '
        "(default: the config's work_dir, else ./work_dirs/NAME_OF_CONFIG)",
    )
    parser.add_argument(
        '--amp', action='store_true', help='automatic mixed precision; without a GPU, in bfloat16'
    )
    parser.add_argument(
        '--cfg-options',
        nargs='+',
        action=DictAction,
        metavar='KEY=VALUE',
        help='change entries of the config: a.b=1 a.0.c="[1,2]" ...; no white space in a value',
    )
    parser.add_argument(
        '--launcher',
        choices=list(LAUNCHERS),
        default='none',
        help='what started the processes',
    )
    # torch.distributed.launch gives the one or the other spelling, depending on its version
    parser.add_argument('--local_rank', '--local-rank', type=int, default=0, help='set by the launcher')
    return parser


def load_config(args: argparse.Namespace) -> Config:
    """Read the config file and merge into it what :func:`new_parser` defines."""
    for name, given in zip(('RANK', 'WORLD_SIZE', 'LOCAL_RANK'), LAUNCHERS[args.launcher]):
        if given not in os.environ and name != 'LOCAL_RANK':
            fail(
                f'--launcher {args.launcher} goes with {given}, which is not set: start the processes '
                'with tools/dist_*.sh, tools/slurm_*.sh or mpirun, or leave --launcher out for one process'
            )
        if given in os.environ:
            os.environ[name] = os.environ[given]
    os.environ.setdefault('LOCAL_RANK', str(args.local_rank))
    path = Path(args.config).expanduser()
    if not path.is_file():
        fail(f'no config file {args.config}; looked at {path.absolute()}')
    cfg = Config.fromfile(path)
    cfg.launcher = args.launcher
    if args.cfg_options is not None:
        cfg.merge_from_dict(args.cfg_options)
    if args.work_dir is not None:
        cfg.work_dir = args.work_dir
    elif cfg.get('work_dir') is None:
        cfg.work_dir = os.path.join('work_dirs', path.stem)
    if cfg.get('default_scope') == 'mmpretrain':
        _set_loader_defaults(cfg)
    return cfg


def _set_loader_defaults(cfg: Config) -> None:
    """MMPretrain's own tools add these; its configs rely on them."""
    for name in ('train_dataloader', 'val_dataloader', 'test_dataloader'):
        loader = cfg.get(name)
        if loader is not None:
            loader.setdefault('collate_fn', dict(type='default_collate'))
            loader.setdefault('pin_memory', get_device() != 'cpu')
            loader.setdefault('persistent_workers', loader.get('num_workers', 0) > 0)


def innermost(dataset: ConfigDict) -> ConfigDict:
    """The data set inside wrappers such as RepeatDataset."""
    while 'dataset' in dataset:
        dataset = dataset['dataset']
    return dataset


def dicts(node: Any, key: str) -> Iterator[tuple[str, ConfigDict]]:
    """All dicts in a part of a config, with their places."""
    if isinstance(node, dict):
        yield key, node
    items = node.items() if isinstance(node, dict) else enumerate(node)
    for name, child in items:
        if isinstance(child, (dict, list, tuple)):
            yield from dicts(child, f'{key}.{name}')


def is_missing(path: Any) -> bool:
    """Whether this is a path on this machine, not an address, and nothing is there."""
    return isinstance(path, str) and '://' not in path and not os.path.exists(path)


def check_data(cfg: Config, *stages: str) -> None:
    """End the program unless all data that the stages ('train', 'val', 'test') read is there."""
    missing: list[Missing] = []
    for stage in stages:
        loader = cfg.get(f'{stage}_dataloader')
        if loader is not None and 'dataset' in loader:
            missing += _missing_data(loader.dataset, f'{stage}_dataloader.dataset')
            missing += _missing_truth(cfg.get(f'{stage}_evaluator'), f'{stage}_evaluator')
    if not missing:
        return
    lines = [f'{cfg.filename} reads data that is not there:']
    for entry, value, path in missing:
        lines += [f'  {entry} = {value!r}', f'      no {os.path.abspath(path)}']
    lines.append(f'Relative paths start at the folder the command runs in, {os.getcwd()}.')
    lines += dict.fromkeys(layout for _, _, path in missing for layout in _layout(path))
    lines += ['Put the data there, or say where it is (PATH):', '  --cfg-options \\']
    roots = [value for entry, value, _ in missing if entry.endswith('.data_root')]
    options = [f'    {entry}={_moved(value, roots)}' for entry, value, _ in missing]
    fail('\n'.join(lines + [' \\\n'.join(options)]))


def _layout(path: str) -> list[str]:
    folders = [part.lower() for part in Path(path).parts]
    return [layout for name, layout in LAYOUTS.items() if name in folders][:1]


def _moved(value: str, roots: list[str]) -> str:
    """The value with PATH for the missing folder it lies in."""
    for root in roots:
        folder = root.rstrip('/')
        if value.rstrip('/') == folder or value.startswith(folder + '/'):
            return 'PATH' + value.rstrip('/')[len(folder) :]
    return 'PATH'


def _missing_data(dataset: ConfigDict, key: str) -> list[Missing]:
    """What a data set, or those in a wrapper, will not find; only the root if that is missing."""
    if 'datasets' in dataset:  # ConcatDataset
        parts = enumerate(dataset['datasets'])
        return [m for i, part in parts for m in _missing_data(part, f'{key}.datasets.{i}')]
    if 'dataset' in dataset:
        return _missing_data(dataset['dataset'], f'{key}.dataset')
    kind = dataset.get('type', '')
    kind = (kind if isinstance(kind, str) else kind.__name__).split('.')[-1]
    backend = (dataset.get('backend_args') or {}).get('backend', 'local')
    fetched = kind in DOWNLOADED and dataset.get('download', True)
    if fetched or backend not in ('local', 'LocalBackend'):
        return []

    root = dataset.get('data_root') or ''
    if root and is_missing(root):
        return [Missing(f'{key}.data_root', root, root)]
    return [
        Missing(f'{key}.{entry}', value, os.path.join(root, value))
        for entry, value in _parts(dataset, kind)
        if isinstance(value, str) and value and is_missing(os.path.join(root, value))
    ]


def _parts(dataset: ConfigDict, kind: str) -> Iterator[tuple[str, Any]]:
    """Annotation files and image folders, as config entries relative to the data root."""
    files = dataset.get('ann_file')
    for file in files if isinstance(files, (list, tuple)) else [files]:
        yield 'ann_file', file
    folders = dataset.get('data_prefix')
    if isinstance(folders, dict):
        for name, folder in folders.items():
            yield f'data_prefix.{name}', folder
    elif folders:
        yield 'data_prefix', folders
    elif kind in ('ImageNet', 'ImageNet21k'):
        yield 'data_prefix', dataset.get('split')  # the folder of images is called after it


def _missing_truth(evaluator: Any, key: str) -> list[Missing]:
    """Annotation files that a metric, or one of a list, reads and does not find."""
    if isinstance(evaluator, (list, tuple)):
        parts = enumerate(evaluator)
        return [m for i, part in parts for m in _missing_truth(part, f'{key}.{i}')]
    names = ('ann_file', 'seg_prefix') if isinstance(evaluator, dict) else ()
    values = [(f'{key}.{name}', evaluator.get(name)) for name in names]
    return [Missing(entry, value, value) for entry, value in values if value and is_missing(value)]


def check_checkpoint(path: str | None, entry: str) -> None:
    """End the program if the checkpoint is a path of this machine and no file."""
    if path is not None and '://' not in path and not Path(path).expanduser().is_file():
        fail(f'{entry} is {path}, but there is no file {os.path.abspath(os.path.expanduser(path))}')


@CheckpointLoader.register_scheme(
    prefixes=('', 'http://', 'https://', r'(\S+\:)?s3://', r'(\S+\:)?petrel://'), force=True
)
def load_from_file_as_data(filename: str, map_location: Any = None) -> Any:
    """What ``load_from``, ``resume`` and ``Pretrained`` read a file with here: no code of it runs.

    Left out are the log's running means, which a resumed run begins anew, and the config, which is code.
    """
    try:
        content = read_checkpoint(filename)
    except (ImportError, OSError, ValueError) as error:
        fail(str(error))
    if isinstance(content, dict):
        for name in ('config', 'cfg'):
            if isinstance(content.get('meta'), dict):
                content['meta'].pop(name, None)
        if isinstance(content.get('message_hub'), dict):
            content['message_hub']['log_scalars'] = {}
    return content


def find_resumable(cfg: Config) -> None:
    """Let a run that resumes without naming a file do so from the last checkpoint that is whole.

    The last one may have been cut off by what ended the run. Then it is named, and the one before is taken.
    """
    if not cfg.get('resume'):
        return
    if cfg.get('load_from'):
        content = load_from_file_as_data(cfg.load_from)
        if not isinstance(content, dict) or not {'meta', 'optimizer'} <= set(content):
            fail(
                f'--resume: {cfg.load_from} holds no state of a training, only weights; '
                f'to start from them: --cfg-options load_from={cfg.load_from}'
            )
        return
    pointer = Path(cfg.work_dir, 'last_checkpoint')
    last = Path(pointer.read_text().strip()) if pointer.is_file() else pointer
    folder = last.parent if last.is_file() else Path(cfg.work_dir)  # they may be saved elsewhere
    names = {file: re.fullmatch(r'(epoch|iter)_(\d+)\.pth', file.name) for file in folder.glob('*.pth')}
    saved = [file for file, name in names.items() if name]
    saved.sort(key=lambda file: int(names[file][2]), reverse=True)
    if last.is_file():  # what has a higher number is of an earlier run
        saved = saved[saved.index(last) :] if last in saved else [last]
    for file in saved:
        try:
            read_checkpoint(file)
        except (OSError, ValueError) as error:
            note(f'Not resumed from a damaged checkpoint: {error}')
        else:
            cfg.load_from = str(file)
            return
    if saved:
        fail(
            f'--resume: none of the {len(saved)} checkpoints in {folder} is whole; '
            'move them away to begin anew'
        )
    note(f'{folder} has no checkpoint to resume from: the training begins anew.')
    cfg.resume = False


def check_pretrained(cfg: Config) -> None:
    """End the program if a part of the model starts from a file that is not there.

    A run that resumes has all weights in its own checkpoint: it goes on without that file.
    """
    resumes = cfg.get('resume', False) and cfg.get('load_from')
    for key, node in list(dicts(cfg.model, 'model')):
        inits = node.get('init_cfg') or []
        for init in [inits] if isinstance(inits, dict) else inits:
            file = os.path.expanduser(init.get('checkpoint') or '')
            if init['type'] != 'Pretrained' or not file or not is_missing(file):
                continue
            if resumes:
                node['init_cfg'] = None
                continue
            fail(
                f'{key}.init_cfg starts from {init["checkpoint"]!r}, but there is no file '
                f'{os.path.abspath(file)}\n'
                f'Put the weights there, name others with --cfg-options '
                f'{key}.init_cfg.checkpoint=FILE, or start from random ones with '
                f'--cfg-options {key}.init_cfg=None'
            )


def build_runner(cfg: Config) -> Runner:
    """Build the runner; without a GPU, launchers get processes on the CPU (gloo)."""
    if cfg.launcher != 'none' and get_device() == 'cpu':
        _use_cpu_processes(cfg)
    return RUNNERS.build(cfg) if 'runner_type' in cfg else Runner.from_cfg(cfg)


def _use_cpu_processes(cfg: Config) -> None:
    """Do what the runner does for GPUs only: join the processes, wrap the model for no device."""
    if not torch.distributed.is_initialized():
        if cfg.launcher == 'slurm' and 'MASTER_ADDR' not in os.environ:
            command = ['scontrol', 'show', 'hostnames', os.environ['SLURM_NODELIST']]
            os.environ['MASTER_ADDR'] = subprocess.check_output(command, text=True).split()[0]
        elif 'MASTER_ADDR' not in os.environ:  # mpirun sets none
            if os.environ.get('OMPI_COMM_WORLD_LOCAL_SIZE') != os.environ['WORLD_SIZE']:
                fail('--launcher mpi on several machines needs the first of them: mpirun -x MASTER_ADDR=HOST')
            os.environ['MASTER_ADDR'] = '127.0.0.1'
        os.environ.setdefault('MASTER_PORT', '29500')
        torch.distributed.init_process_group('gloo')
    wrapper = cfg.get('model_wrapper_cfg') or ConfigDict(
        type='MMDistributedDataParallel',
        broadcast_buffers=False,
        find_unused_parameters=cfg.get('find_unused_parameters', False),
    )
    wrapper.setdefault('device_ids', None)
    cfg.model_wrapper_cfg = wrapper

    cfg.pop('sync_bn', None)
    norms = [node for _, node in dicts(cfg.model, 'model') if node.get('type') in SYNC_BN]
    for norm in norms:
        norm['type'] = 'BN'
    if norms:
        note(f'No GPU: {len(norms)} SyncBN of the config became BN, for each process by itself.')
