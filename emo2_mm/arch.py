"""Sizes of EMOv2, and what its arguments may be."""

from __future__ import annotations

from typing import Any, Mapping, Sequence

# The four stages: strides 4 and 8 are convolutional, strides 16 and 32 attend.
STAGE_ATTENDS = (False, False, True, True)

ARCH_SETTINGS: dict[str, dict[str, Any]] = {
    name: dict(depths=depths, channels=channels, expand_ratios=expand_ratios, head_dim=head_dim)
    for name, depths, channels, expand_ratios, head_dim in (
        ('1m', (2, 2, 8, 3), (32, 48, 80, 180), (2, 2.5, 3, 3.5), 20),
        ('2m', (3, 3, 9, 3), (32, 48, 120, 200), (2, 2.5, 3, 3.5), 20),
        ('5m', (3, 3, 9, 3), (48, 72, 160, 288), (2, 3, 4, 4), 32),
        ('20m', (3, 3, 13, 3), (64, 128, 320, 448), (2, 3, 4, 4), 32),
        ('50m', (5, 8, 20, 7), (64, 128, 384, 512), (2, 3, 4, 4), 32),
    )
}


def check_arch(arch: str | dict[str, Any], known: Mapping[str, dict[str, Any]]) -> dict[str, Any]:
    """Give the settings of an arch, a name out of ``known`` or a dict.

    Raises:
        ValueError: If the name is unknown or the dict is not complete and consistent.
    """
    if isinstance(arch, str):
        if arch not in known:
            raise ValueError(f'arch is {arch!r}; give one of {list(known)} or a dict')
        return known[arch]
    keys = {'depths', 'channels', 'expand_ratios', 'head_dim'}
    if not isinstance(arch, dict) or set(arch) != keys:
        raise ValueError(f'arch is {arch}; a dict has exactly the keys {sorted(keys)}')
    for key in ('depths', 'channels', 'expand_ratios'):
        if len(arch[key]) != 4 or min(arch[key]) <= 0:
            raise ValueError(f'arch[{key!r}] is {arch[key]}; give four positive values, one a stage')
    for channels, ratio, attends in zip(arch['channels'], arch['expand_ratios'], STAGE_ATTENDS):
        heads, rest = divmod(channels, max(arch['head_dim'], 1))
        if attends and (arch['head_dim'] < 1 or rest or int(channels * ratio) % heads):
            raise ValueError(
                f'a stage of {channels} channels and expand ratio {ratio} does not divide into '
                f"heads of {arch['head_dim']}; change arch['channels'], ['expand_ratios'] or ['head_dim']"
            )
    return arch


def check_out_indices(out_indices: int | Sequence[int]) -> tuple[int, ...]:
    """Give the indices of the returned stages as a tuple.

    Raises:
        ValueError: If they are not rising numbers out of 0, 1, 2, 3.
    """
    if isinstance(out_indices, int):
        out_indices = (out_indices,)
    stages = [i for i in range(4) if isinstance(out_indices, (list, tuple)) and i in out_indices]
    if not stages or list(out_indices) != stages:
        raise ValueError(f'out_indices is {out_indices}; give rising numbers out of 0, 1, 2, 3')
    return tuple(out_indices)


def check_options(
    in_channels: int,
    window_size: int,
    drop_path_rate: float,
    frozen_stages: int,
    out_indices: tuple[int, ...],
) -> None:
    """Check arguments of :class:`emo2_mm.EMOv2`.

    Raises:
        ValueError: If one is out of range; the message says what is allowed.
    """
    num_stages = out_indices[-1] + 1
    if not isinstance(in_channels, int) or in_channels < 1:
        raise ValueError(f'in_channels is {in_channels}; give a positive number of channels')
    if frozen_stages not in range(-1, num_stages + 1):
        raise ValueError(
            f'frozen_stages is {frozen_stages}; out_indices={out_indices} builds '
            f'{num_stages} stages: give -1 (none), 0 (stem) to {num_stages}'
        )
    if not isinstance(window_size, int) or window_size < 1:
        raise ValueError(f'window_size is {window_size}; give a positive number of tokens')
    if not isinstance(drop_path_rate, (int, float)) or not 0 <= drop_path_rate < 1:
        raise ValueError(f'drop_path_rate is {drop_path_rate!r}; give a rate from 0 to below 1')
