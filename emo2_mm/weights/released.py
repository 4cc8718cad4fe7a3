"""Where the ImageNet weights that the authors released are, and how to fetch them."""

from __future__ import annotations

from pathlib import Path

ADDRESS = 'https://github.com/zhangzjn/data/raw/main/emov2_pretrained_weights'
# arch -> file; none are released of 20m and 50m
FILES = {arch: f'EMOv2_{arch.upper()}_224.pth' for arch in ('1m', '2m', '5m')}
FILES.update({f'{arch}_kd': name.replace('.pth', '_KD.pth') for arch, name in list(FILES.items())})


def imagenet_weights(arch: str) -> str | None:
    """Path of the weights that the configs start from, relative to the folder the command runs in.

    Args:
        arch: Name of an arch, such as '5m'.

    Returns:
        ``checkpoints/EMOv2_5M_224.pth`` or the like, or None where no weights are released.
    """
    return f'checkpoints/{FILES[arch]}' if arch in FILES else None


def how_to_fetch(path: str) -> str | None:
    """Say where a file of released weights comes from, and the command that puts it at a path.

    Args:
        path: Where the file should be.

    Returns:
        Lines for an error message; None if no file of that name is released.
    """
    name = Path(path).name
    if name not in FILES.values():
        return None
    return (
        f'The authors offer it at {ADDRESS}/{name}; this fetches it:\n'
        f'  curl -L --create-dirs -o {path} {ADDRESS}/{name}'
    )
