"""SSDHead that MMDetection 3.3 can evaluate; needs MMDetection (extra ``det``).

Use it in a config as ``type='emo2_mm.ssd.SSDHead'``.
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
    """MMDetection's ``SSDHead``, with the same arguments, that also predicts.

    MMDetection 3.3 reads ``self.loss_cls`` in ``predict``; its own ``SSDHead`` never sets that attribute.
    """

    loss_cls = None
