"""Read a config with the options of a command line, and iterate over its nodes."""

from __future__ import annotations

import ast
import difflib
import inspect
import os
from pathlib import Path
from typing import Any, Iterator, Sequence

from mmengine.config import Config, ConfigDict
from mmengine.device import get_device

from .errors import UserError

# Last parts of keys whose values are paths
PATH_KEYS = (
    *('data_root', 'load_from', 'pretrained', 'checkpoint', 'work_dir', 'out_dir', 'outfile_prefix'),
    *('ann_file', 'data_prefix', 'img', 'seg', 'img_path', 'seg_map_path', 'seg_prefix'),
)
# Variables of config files, which are copied to where they are used as the file is read
VARIABLES = (
    *('train_pipeline', 'val_pipeline', 'test_pipeline', 'dataset', 'dataset_type', 'data_root', 'crop'),
    *('crop_size', 'img_scale', 'checkpoint', 'norm_cfg', 'vis_backends'),
)
# Settings beside the arguments of MMEngine's runner that it or the tools use
MORE_SETTINGS = (
    *('runner_type', 'tta_model', 'tta_pipeline', 'find_unused_parameters', 'model_wrapper_cfg', 'sync_bn'),
    *('compile', 'activation_checkpointing', 'efficient_conv_bn_eval', 'custom_imports'),
)
# launcher -> its names of torch's RANK, WORLD_SIZE and LOCAL_RANK
LAUNCHERS: dict[str, tuple[str, ...]] = {
    'none': (),
    'pytorch': ('RANK', 'WORLD_SIZE'),  # old versions pass the third as an argument
    'slurm': ('SLURM_PROCID', 'SLURM_NTASKS', 'SLURM_LOCALID'),
    'mpi': ('OMPI_COMM_WORLD_RANK', 'OMPI_COMM_WORLD_SIZE', 'OMPI_COMM_WORLD_LOCAL_RANK'),
}


def parse_options(options: Sequence[str] | None) -> dict[str, Any]:
    """Parse the values of ``--cfg-options``, which are ``KEY=VALUE`` texts.

    Values of keys that end in one of :data:`PATH_KEYS` are paths, taken as typed. For others, see
    :func:`parse_value`.

    Raises:
        UserError: If a text has no ``=``.
    """
    parsed = {}
    for option in options or ():
        key, equals, value = option.partition('=')
        if not (key and equals):
            raise UserError(f'--cfg-options takes KEY=VALUE, not {option!r}')
        is_path = key.rsplit('.', 1)[-1] in PATH_KEYS and value != 'None' and value[:1] not in ('[', '(', '{')
        parsed[key] = _unquote(value) if is_path else parse_value(value)
    return parsed


def parse_value(text: str) -> Any:
    """Parse the value of an option: a Python literal, or MMEngine's shorter form of one.

    As with MMEngine's ``DictAction``, texts need no quotes, ``1,2`` is a list and ``true`` a bool; unlike
    there, blanks in texts are kept.
    """
    text = text.strip()
    closing = {'(': ')', '[': ']'}.get(text[:1])
    try:
        value = ast.literal_eval(text)
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        value = ...
    if isinstance(value, (list, dict, str)) or (isinstance(value, tuple) and closing):
        return value
    if closing and text.endswith(closing) and len(text) > 1:
        items = [parse_value(item) for item in _split(text[1:-1])]
        return tuple(items) if closing == ')' else items
    items = _split(text)
    return [parse_value(item) for item in items] if len(items) > 1 else _parse_scalar(text)


def _parse_scalar(text: str) -> Any:
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            pass
    constants = {'true': True, 'false': False, 'None': None}
    return constants.get(text if text == 'None' else text.lower(), _unquote(text))


def _unquote(text: str) -> str:
    return text[1:-1] if len(text) > 1 and text[0] == text[-1] and text[0] in '\'"' else text


def _split(text: str) -> list[str]:
    """Split at commas outside of brackets and quotes; a last, empty part does not count."""
    parts, depth, quote = [''], 0, ''
    for char in text:
        if quote:
            quote = '' if char == quote else quote
        elif char in '\'"' and not parts[-1].strip():
            quote = char
        depth += (char in '([{') - (char in ')]}') if not quote else 0
        if char == ',' and not depth and not quote:
            parts.append('')
        else:
            parts[-1] += char
    return parts if parts[-1].strip() else parts[:-1]


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
    options = parse_options(cfg_options)
    for key in options:
        _check_key(cfg, key)
    try:
        cfg.merge_from_dict(options)
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f'--cfg-options {" ".join(cfg_options or ())}: {error}') from None
    if 'data_format' in cfg:  # a custom config: what is given by name has the last word there
        cfg.cfg_options = options
    if work_dir is not None:
        cfg.work_dir = work_dir
    elif cfg.get('work_dir') is None:
        cfg.work_dir = os.path.join('work_dirs', file.stem)
    if cfg.get('default_scope') == 'mmpretrain':
        _set_loader_defaults(cfg)
    for stage in ('train', 'val', 'test'):
        loader = cfg.get(f'{stage}_dataloader')
        if loader is not None and loader.get('num_workers') == 0:  # torch refuses these then
            if options.get(f'{stage}_dataloader.persistent_workers'):
                raise UserError(f'{stage}_dataloader: persistent_workers=True needs num_workers of 1 or more')
            loader.persistent_workers = False
            loader.pop('prefetch_factor', None)
    return cfg


def _check_key(cfg: Config, key: str) -> None:
    """Refuse an option that nothing would read, as far as that can be told; settings may be new.

    Raises:
        UserError: If no setting has this name but one has almost, or it would have no effect.
    """
    from mmengine.runner import Runner

    node: Any = cfg
    parts = key.split('.')
    for depth, part in enumerate(parts):
        parent = '.'.join(parts[:depth])
        if isinstance(node, (list, tuple)):
            if not part.isdecimal() or int(part) >= len(node):
                raise UserError(f'--cfg-options {key}: {parent} is a list of {len(node)}, counted from 0')
            node = node[int(part)]
        elif isinstance(node, (Config, dict)):
            custom = depth == 0 and part == 'data_root' and 'data_format' in cfg
            if depth == 0 and part in VARIABLES and part in node and not custom:
                raise UserError(
                    f'--cfg-options {key}: {part} is a variable of {cfg.filename}, which is copied to where '
                    f'it is used: set it there, such as {_example(cfg, part)}'
                )
            if part in node:
                node = node[part]
                continue
            known = [*inspect.signature(Runner.__init__).parameters, *MORE_SETTINGS] if depth == 0 else []
            if part in known:
                return
            near = difflib.get_close_matches(part, [*node.keys(), *known], 1, 0.85)
            if near or depth == 0:
                hint = f'; there is {".".join([*parts[:depth], near[0]])}' if near else ''
                raise UserError(f'--cfg-options {key}: {cfg.filename} has no setting {part!r}{hint}')
            return
        elif node is not None:
            raise UserError(f'--cfg-options {key}: {parent} is {node!r}, which has no settings')


def _example(cfg: Config, name: str) -> str:
    """Where the value of a variable of a config file is used."""
    parts = {key: cfg[key] for key in ('model', 'train_dataloader', 'val_dataloader') if cfg.get(key)}
    for top, part in parts.items():
        for key, node in iter_nodes(part, top):
            for child, value in node.items():
                if value == cfg[name] or child == name:
                    return f'{key}.{child}'
    return 'train_dataloader.dataset'


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
