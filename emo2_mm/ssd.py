"""The head of SSD, which MMDetection 3.3 trains but cannot evaluate; needs MMDetection.

A config brings it in by itself with ``type='emo2_mm.ssd.SSDHead'``.
"""

from __future__ import annotations

try:
    from mmdet.models.dense_heads import SSDHead as _SSDHead
except ModuleNotFoundError as error:
    if error.name != 'mmdet':
        raise
    raise ModuleNotFoundError(
        'emo2_mm.ssd needs mmdet, which is not installed; install emo2_mm[det]', name='mmdet'
    ) from None


class SSDHead(_SSDHead):
    """MMDetection's head of the same name, with the same arguments.

    Where a head predicts, MMDetection 3.3 looks into its ``loss_cls`` for custom channels. That of SSD
    has none: its classification loss is no module.
    """

    loss_cls = None
