"""Command-line arguments that several tools share."""

from __future__ import annotations

import argparse

LAUNCHERS = ('none', 'pytorch', 'slurm', 'mpi')


def new_parser(description: str | None) -> argparse.ArgumentParser:
    """Make a parser that prints a description as it is written."""
    return argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )


def add_config_options(parser: argparse.ArgumentParser) -> None:
    """Add ``--cfg-options``; :func:`emo2_mm.engine.config.parse_options` reads its values."""
    parser.add_argument(
        '--cfg-options',
        nargs='+',
        metavar='KEY=VALUE',
        help='override settings of the config: a.b=1 a.0.c="[1,2]" ...',
    )


def runner_parser(description: str | None) -> argparse.ArgumentParser:
    """Make a parser with the arguments of everything that runs a config: train, test, data loaders."""
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
    add_config_options(parser)
    parser.add_argument('--launcher', choices=LAUNCHERS, default='none', help='what started the processes')
    # torch.distributed.launch passes one or the other spelling, depending on its version
    parser.add_argument('--local_rank', '--local-rank', type=int, default=0, help='set by the launcher')
    return parser
