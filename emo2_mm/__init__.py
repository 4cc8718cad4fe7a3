"""EMOv2, a lightweight vision backbone, for every OpenMMLab code base (arXiv 2412.06674)."""

try:
    import mmengine  # noqa: F401
except ModuleNotFoundError as error:
    if error.name != 'mmengine':
        raise
    raise ModuleNotFoundError(
        'emo2_mm needs mmengine, which is not installed. Run `pip install mmengine` '
        '(with torch 2.6 or newer, and without mmengine: `pip install onedl-mmengine`).',
        name='mmengine',
    ) from None

from .emov2 import EMOv2
from .version import __version__

__all__ = ['EMOv2', '__version__']
