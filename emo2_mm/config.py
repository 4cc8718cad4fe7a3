"""Read a config with the options of a command line, and iterate over its nodes."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, Iterator, Sequence

from mmengine.config import Config, ConfigDict, DictAction
from mmengine.device import get_device

from .errors import UserError

# launcher -> its names of torch's RANK, WORLD_SIZE and LOCAL_RANK
LAUNCHERS: dict[str, tuple[str, ...]] = {
    'none': (),
    'pytorch': ('RANK', 'WORLD_SIZE'),  # old versions pass the third as an argument
    'slurm': ('SLURM_PROCID', 'SLURM_NTASKS', 'SLURM_LOCALID'),
    'mpi': ('OMPI_COMM_WORLD_RANK', 'OMPI_COMM_WORLD_SIZE', 'OMPI_COMM_WORLD_LOCAL_RANK'),
}


def parse_options(options: Sequence[str] | None) -> dict[str, Any]:
    """Parse the values of ``--cfg-options``: ``KEY=VALUE`` texts as MMEngine's ``DictAction`` reads them.

    Raises:
        UserError: If a text has no ``=``.
    """
    parsed = {}
    for option in options or ():
        key, equals, value = option.partition('=')
        if not (key and equals):
            raise UserError(f'--cfg-options takes KEY=VALUE, not {option!r}')
        parsed[key] = DictAction._parse_iterable(value)
    return parsed


def set_ranks(launcher: str, local_rank: int = 0) -> None:
    """Set torch's environment variables RANK, WORLD_SIZE and LOCAL_RANK from those of a launcher.

    Args:
        launcher: A key of :data:`LAUNCHERS`.
        local_rank: Rank on this machine as given by argument; a LOCAL_RANK that is set takes precedence.

    Raises:
        UserError: If the launcher did not start this process.
    """
    for name, given in zip(('RANK', 'WORLD_SIZE', 'LOCAL_RANK'), LAUNCHERS[launcher]):
        if given in os.environ:
            os.environ[name] = os.environ[given]
        elif name != 'LOCAL_RANK':
            raise UserError(
                f'--launcher {launcher} goes with {given}, which is not set: start the processes '
                'with tools/dist_*.sh, tools/slurm_*.sh or mpirun, or leave --launcher out for one process'
            )
    os.environ.setdefault('LOCAL_RANK', str(local_rank))


def load_config(
    path: str | os.PathLike,
    cfg_options: Sequence[str] | None = None,
    work_dir: str | None = None,
    launcher: str = 'none',
) -> Config:
    """Read a config file and apply the options of the command line to it.

    Args:
        path: Config file of MMPretrain, MMDetection or MMSegmentation.
        cfg_options: ``KEY=VALUE`` texts, see :func:`parse_options`.
        work_dir: Folder for logs and checkpoints. Defaults to the config's ``work_dir``, else
            ``work_dirs/NAME_OF_CONFIG``.
        launcher: What started the processes, a key of :data:`LAUNCHERS`.

    Raises:
        UserError: If there is no such file, or an option is malformed.
    """
    file = Path(path).expanduser()
    if not file.is_file():
        raise UserError(f'no config file {path}; looked at {file.absolute()}')
    cfg = Config.fromfile(file)
    cfg.launcher = launcher
    cfg.merge_from_dict(parse_options(cfg_options))
    if work_dir is not None:
        cfg.work_dir = work_dir
    elif cfg.get('work_dir') is None:
        cfg.work_dir = os.path.join('work_dirs', file.stem)
    if cfg.get('default_scope') == 'mmpretrain':
        _set_loader_defaults(cfg)
    return cfg


def _set_loader_defaults(cfg: Config) -> None:
    """Add the loader settings that MMPretrain's own tools add; its configs rely on them."""
    for name in ('train_dataloader', 'val_dataloader', 'test_dataloader'):
        loader = cfg.get(name)
        if loader is not None:
            loader.setdefault('collate_fn', dict(type='default_collate'))
            loader.setdefault('pin_memory', get_device() != 'cpu')
            loader.setdefault('persistent_workers', loader.get('num_workers', 0) > 0)


def innermost_dataset(dataset: ConfigDict) -> ConfigDict:
    """The dataset config inside wrappers such as RepeatDataset."""
    while 'dataset' in dataset:
        dataset = dataset['dataset']
    return dataset


def iter_nodes(node: Any, key: str) -> Iterator[tuple[str, ConfigDict]]:
    """Iterate over all dicts in a part of a config, with their keys, such as ``model.backbone``."""
    if isinstance(node, dict):
        yield key, node
    items = node.items() if isinstance(node, dict) else enumerate(node)
    for name, child in items:
        if isinstance(child, (dict, list, tuple)):
            yield from iter_nodes(child, f'{key}.{name}')
