"""A model from the image to the answer, as one network that can be traced.

:class:`EndToEnd` adds to a model of the three libraries what their pipelines do in Python: normalization,
and of detectors the decoding of boxes and non-maximum suppression. Built on the model as it was loaded it is
the reference in torch; built on a folded copy it is what is exported.
"""

from __future__ import annotations

import math
from typing import Any, Iterable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..emov2 import EMOv2
from ..errors import UserError
from .onnx_network import OnnxEMOv2

HEAD_OUTPUTS = ('cls_score', 'bbox_pred', 'centerness')  # the last only of some
SINGLE_STAGE = ('RetinaHead', 'SSDHead')
PRIORS = ('AnchorGenerator', 'SSDAnchorGenerator')
MEANINGS = {
    'dets': 'boxes x1, y1, x2, y2 in pixels of the input, and scores; best first, unused rows are 0',
    'labels': 'class numbers of the boxes; -1 in unused rows',
    'masks': 'probabilities of a pixel to belong to the object, a grid over its box',
    'boxes': 'a box for each anchor: x1, y1, x2, y2 in pixels of the input',
    'scores': 'probability of each class for each anchor',
    'probabilities': 'probability of each class',
    'map': 'class number of each pixel of the input',
    'logits': 'before softmax or argmax',
}


class Unsupported(UserError):
    """A format cannot hold a model that others can."""


class Suppress(torch.autograd.Function):
    """Non-maximum suppression of a batch, in ONNX as its operator.

    Maps boxes (N, P, 4) and scores (N, P) to scores (N, P) that are -1 where a box was suppressed, does not
    exceed ``score_thr`` or is not among the best ``most`` of its image.
    """

    @staticmethod
    def forward(
        ctx: Any, boxes: Tensor, scores: Tensor, iou_thr: float, score_thr: float, most: int
    ) -> Tensor:
        from torchvision.ops import nms

        kept = torch.full_like(scores, -1.0)
        for i in range(len(scores)):
            candidates = (scores[i] > score_thr).nonzero()[:, 0]
            index = candidates[nms(boxes[i, candidates], scores[i, candidates], iou_thr)[:most]]
            kept[i, index] = scores[i, index]
        return kept

    @staticmethod
    def symbolic(g: Any, boxes: Any, scores: Any, iou_thr: float, score_thr: float, most: int) -> Any:
        def constant(value: Any, dtype: torch.dtype) -> Any:
            return g.op('Constant', value_t=torch.tensor(value, dtype=dtype))

        one_class = g.op('Unsqueeze', scores, constant([1], torch.int64))
        found = g.op(
            'NonMaxSuppression',
            boxes,
            one_class,
            constant([most], torch.int64),
            constant([iou_thr], torch.float32),
            constant([score_thr], torch.float32),
        )
        places = g.op('Gather', found, constant([0, 2], torch.int64), axis_i=1)
        values = g.op('GatherND', scores, places)
        nothing = g.op('Expand', constant([[-1.0]], torch.float32), g.op('Shape', scores))
        return g.op('ScatterND', nothing, places, values).setType(scores.type())


class AlignRegions(torch.autograd.Function):
    """RoIAlign as MMCV computes it with ``aligned=True`` and ``sampling_ratio=0``; an operator of ONNX."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, regions: Tensor, batch: Tensor, size: int, scale: float) -> Tensor:
        from mmcv.ops import roi_align

        regions = torch.cat((batch[:, None].to(regions.dtype), regions), 1)
        return roi_align(x, regions, (size, size), scale, 0, 'avg', True)

    @staticmethod
    def symbolic(g: Any, x: Any, regions: Any, batch: Any, size: int, scale: float) -> Any:
        return g.op(
            'RoiAlign',
            x,
            regions,
            batch,
            output_height_i=size,
            output_width_i=size,
            sampling_ratio_i=0,
            spatial_scale_f=scale,
            mode_s='avg',
            coordinate_transformation_mode_s='half_pixel',
        )


class Normalize(nn.Module):
    """Images (N, H, W, 3) uint8, in the order of colors that ``mean`` has, to (N, 3, H, W), padded.

    Args:
        mean: Of each color, of values 0 to 255.
        std: The same.
        divisor: Height and width are padded with zeros at right and bottom to a multiple of it.
    """

    def __init__(self, mean: list[float], std: list[float], divisor: int) -> None:
        super().__init__()
        self.mean: Tensor
        self.std: Tensor
        self.register_buffer('mean', torch.tensor(mean).view(1, 3, 1, 1))
        self.register_buffer('std', torch.tensor(std).view(1, 3, 1, 1))
        self.divisor = divisor

    def forward(self, image: Tensor) -> Tensor:
        x = (image.permute(0, 3, 1, 2).float() - self.mean) / self.std
        if self.divisor > 1:
            h, w = x.shape[2:]
            d = self.divisor
            h, w = (h + d - 1) // d * d - h, (w + d - 1) // d * d - w
            x = F.pad(x, (0, w, 0, h))
        return x


def decode(anchors: Tensor, deltas: Tensor, coder: Any, limit: Tensor) -> Tensor:
    """Boxes (..., 4) of deltas (..., 4) to anchors, as MMDetection's ``DeltaXYWHBBoxCoder`` decodes them.

    Args:
        anchors: x1, y1, x2, y2, of the shape of ``deltas`` or one that expands to it.
        deltas: The head's output.
        coder: The head's ``bbox_coder``.
        limit: Largest x1, y1, x2, y2: (4,).
    """
    deltas = deltas * deltas.new_tensor(coder.stds) + deltas.new_tensor(coder.means)
    center, side = (anchors[..., :2] + anchors[..., 2:]) * 0.5, anchors[..., 2:] - anchors[..., :2]
    most = abs(math.log(16 / 1000))
    center = center + side * deltas[..., :2]
    half = side * deltas[..., 2:].clamp(-most, most).exp() * 0.5
    boxes = torch.cat((center - half, center + half), -1)
    return torch.minimum(boxes.clamp(min=0), limit) if coder.clip_border else boxes


def suppress(
    boxes: Tensor, scores: Tensor, labels: Tensor, bound: Tensor, rules: dict[str, Any]
) -> tuple[Tensor, Tensor, Tensor]:
    """Non-maximum suppression within each class.

    Args:
        boxes: (N, P, 4).
        scores: (N, P).
        labels: (N, P), or (P,) of all images.
        bound: More than the largest coordinate: the boxes of a class are moved by a multiple of it, so that
            those of two classes never overlap.
        rules: ``iou_thr``, ``score_thr`` and ``max``, the number K of boxes kept.

    Returns:
        Boxes (N, K, 4), scores (N, K) and labels (N, K), best first; of unused rows 0, 0 and -1.
    """
    moved = boxes + (labels.to(boxes.dtype) * bound)[..., None]
    kept = Suppress.apply(moved, scores, rules['iou_thr'], rules['score_thr'], rules['max'])
    best, index = kept.topk(min(rules['max'], int(boxes.shape[1])))
    used = (best >= 0).to(boxes.dtype)
    labels = labels.expand(scores.shape) if labels.ndim == 1 else labels
    boxes = boxes.gather(1, index[..., None].expand(-1, -1, 4)) * used[..., None]
    found = labels.gather(1, index)
    return boxes, best * used, (found + 1) * used.to(found.dtype) - 1


def nonzero_area(boxes: Tensor, scores: Tensor, smallest: float) -> Tensor:
    """Scores (N, P), but 0 of boxes (N, P, 4) that are not larger than ``smallest`` (-1: of none)."""
    if smallest < 0:
        return scores
    sides = boxes[..., 2:] - boxes[..., :2]
    return scores * (sides > smallest).all(-1).to(scores.dtype)


def nms_rules(cfg: Any, score_thr: float) -> dict[str, Any]:
    """What ``test_cfg`` says of non-maximum suppression.

    Raises:
        UserError: If it is not the plain kind.
    """
    nms = dict(cfg.nms)
    unknown = set(nms) - {'type', 'iou_threshold', 'split_thr'}
    if nms.get('type', 'nms') != 'nms' or unknown:
        raise UserError(
            f'test_cfg has nms={nms}: only type nms with iou_threshold can be exported; give --raw'
        )
    return dict(
        score_thr=float(score_thr),
        iou_thr=float(nms['iou_threshold']),
        pre=int(cfg.get('nms_pre', -1)),
        max=int(cfg.max_per_img),
        min_size=float(cfg.get('min_bbox_size', -1)),
    )


class Dense(nn.Module):
    """The boxes of a dense head with anchors: RetinaNet's, SSD's, or a region proposal network.

    Args:
        head: MMDetection's.
        dynamic: Whether feature maps may have any size when traced.

    Raises:
        UserError: If the head is of another kind.
    """

    def __init__(self, head: Any, dynamic: bool) -> None:
        super().__init__()
        priors: Any = getattr(head, 'prior_generator', None)
        coder: Any = getattr(head, 'bbox_coder', None)
        kinds = [type(priors).__name__, type(coder).__name__]
        plain = kinds[0] in PRIORS and kinds[1] == 'DeltaXYWHBBoxCoder' and not coder.add_ctr_clamp
        if not plain:
            raise UserError(
                f'{type(head).__name__} with {" and ".join(kinds)} has no export of boxes; give --raw'
            )
        self.head, self.dynamic = head, dynamic
        self.base = [anchors.clone() for anchors in priors.base_anchors]
        self.strides = [tuple(pair) for pair in priors.strides]
        self._known: dict[tuple[int, int, int], Tensor] = {}  # so that a trace has them as constants

    def anchors(self, level: int, h: int, w: int) -> Tensor:
        """(h * w * A, 4), in the order of the head's output."""
        if self.dynamic:
            return self._anchors(level, h, w)
        if (level, h, w) not in self._known:
            self._known[level, h, w] = self._anchors(level, h, w)
        return self._known[level, h, w]

    def _anchors(self, level: int, h: int, w: int) -> Tensor:
        stride, base = self.strides[level], self.base[level]
        x, y = torch.arange(w).float() * stride[0], torch.arange(h).float() * stride[1]
        shape = (h, w, 1)
        x, y = x[None, :, None].expand(shape), y[:, None, None].expand(shape)
        places = torch.cat((x, y, x, y), -1).reshape(-1, 1, 4)
        return (places + base).reshape(-1, 4)

    def forward(self, maps: tuple[Tensor, ...]) -> list[tuple[Tensor, Tensor, Tensor]]:
        """For each level scores (N, P, classes), deltas (N, P, 4) and anchors (P, 4)."""
        head, found = self.head, []
        for level, (score, delta) in enumerate(zip(*head(maps)[:2])):
            h, w = score.shape[2:] if self.dynamic else map(int, score.shape[2:])
            count = h * w * len(self.base[level])
            score = score.permute(0, 2, 3, 1).reshape(-1, count, head.cls_out_channels)
            delta = delta.permute(0, 2, 3, 1).reshape(-1, count, 4)
            score = score.sigmoid() if head.use_sigmoid_cls else score.softmax(-1)[..., :-1]
            found.append((score, delta, self.anchors(level, h, w)))
        return found

    def candidates(self, maps: tuple[Tensor, ...], limit: Tensor, pre: int) -> tuple[Tensor, Tensor, Tensor]:
        """The best ``pre`` pairs of anchor and class of each level: boxes (N, P, 4), scores, labels (N, P).

        MMDetection first drops low scores; here suppression does so afterwards, which is the same.
        """
        boxes, scores, labels = [], [], []
        for score, delta, anchors in self(maps):
            classes = self.head.cls_out_channels - (not self.head.use_sigmoid_cls)
            if self.dynamic:
                count = score.shape[1] * classes
                flat = F.pad(score.reshape(-1, count), (0, pre))  # a level may have fewer than `pre`
            else:
                count = int(anchors.shape[0]) * classes
                flat = score.reshape(-1, count)
            best, index = flat.topk(pre if self.dynamic else min(pre, count))
            anchor = torch.div(index, classes, rounding_mode='trunc')
            labels.append(index - anchor * classes)
            if self.dynamic:  # what was added has a score of 0 and is never chosen
                anchor = torch.minimum(anchor, torch._shape_as_tensor(anchors)[0] - 1)
            delta = delta.gather(1, anchor[..., None].expand(-1, -1, 4))
            boxes.append(decode(anchors[anchor], delta, self.head.bbox_coder, limit))
            scores.append(best)
        return torch.cat(boxes, 1), torch.cat(scores, 1), torch.cat(labels, 1)


class Regions(nn.Module):
    """Features of regions, as MMDetection's ``SingleRoIExtractor`` takes them out of a feature pyramid."""

    def __init__(self, extractor: Any) -> None:
        super().__init__()
        layers = extractor.roi_layers
        kinds = {(layer.sampling_ratio, layer.pool_mode, layer.aligned) for layer in layers}
        if type(extractor).__name__ != 'SingleRoIExtractor' or kinds != {(0, 'avg', True)}:
            raise UserError(f'{type(extractor).__name__} with {kinds} has no export; give --raw')
        self.size = int(layers[0].output_size[0])
        self.scales = [float(layer.spatial_scale) for layer in layers]
        self.finest = float(extractor.finest_scale)

    def forward(self, maps: tuple[Tensor, ...], boxes: Tensor) -> Tensor:
        """Boxes (N, R, 4) to features (N * R, C, size, size)."""
        batch = torch.arange(boxes.shape[0])[:, None].expand(boxes.shape[:2]).reshape(-1)
        boxes = boxes.reshape(-1, 4)
        sides = boxes[:, 2:] - boxes[:, :2]
        scale = (sides[:, 0] * sides[:, 1]).clamp(min=0).sqrt()
        level = (scale / self.finest + 1e-6).log2().floor().clamp(0, len(self.scales) - 1)
        found = maps[0].new_zeros(1)
        for i, factor in enumerate(self.scales):
            here = level == i
            # A region of another level shrinks to a point, which costs next to nothing.
            points = boxes * here.to(boxes.dtype)[:, None]
            features = AlignRegions.apply(maps[i], points, batch, self.size, factor)
            found = torch.where(here[:, None, None, None], features, found)
        return found


class TwoStage(nn.Module):
    """Faster R-CNN and Mask R-CNN: proposals, boxes, and masks if the model has them."""

    def __init__(self, model: Any, dynamic: bool) -> None:
        super().__init__()
        roi = model.roi_head
        kinds = [type(roi).__name__, type(roi.bbox_head.bbox_coder).__name__]
        if kinds != ['StandardRoIHead', 'DeltaXYWHBBoxCoder'] or roi.with_shared_head:
            raise UserError(f'{" with ".join(kinds)} has no export of boxes; give --raw')
        self.rpn, self.bbox_head = Dense(model.rpn_head, dynamic), roi.bbox_head
        self.regions = Regions(roi.bbox_roi_extractor)
        cfg = model.test_cfg
        self.proposals, self.rules = nms_rules(cfg.rpn, 0.0), nms_rules(cfg.rcnn, cfg.rcnn.score_thr)
        if self.bbox_head.custom_activation:
            raise UserError(f'{type(self.bbox_head).__name__} with an activation of its own; give --raw')
        self.mask_head = roi.mask_head if roi.with_mask else None
        if self.mask_head is not None:
            self.mask_regions = Regions(roi.mask_roi_extractor)

    def forward(self, maps: tuple[Tensor, ...], limit: Tensor) -> tuple[Tensor, ...]:
        bound, rules = limit.max() + 1, self.proposals
        boxes, scores, levels = self._proposals(maps, limit)
        scores = nonzero_area(boxes, scores, rules['min_size'])
        proposals, objectness, _ = suppress(boxes, scores, levels, bound, rules)

        score, delta = self.bbox_head(self.regions(maps, proposals))
        count, classes = int(proposals.shape[1]), self.bbox_head.num_classes
        score = score.softmax(-1)[:, :-1].reshape(-1, count, classes)
        score = score * (objectness > 0).to(score.dtype)[..., None]
        delta = delta.reshape(-1, count, delta.shape[1] // 4, 4)
        boxes = decode(proposals[:, :, None], delta, self.bbox_head.bbox_coder, limit)
        boxes = boxes.expand(-1, -1, classes, -1).reshape(-1, count * classes, 4)
        labels = torch.arange(classes).repeat(count)
        boxes, score, labels = suppress(boxes, score.reshape(-1, count * classes), labels, bound, self.rules)
        dets = torch.cat((boxes, score[..., None]), -1)
        if self.mask_head is None:
            return dets, labels
        masks = self.mask_head(self.mask_regions(maps, boxes))
        side = masks.shape[-1]
        if masks.shape[1] > 1:
            chosen = labels.clamp(min=0).reshape(-1, 1, 1, 1).expand(-1, 1, side, side)
            masks = masks.gather(1, chosen)
        return dets, labels, masks.sigmoid().reshape(-1, int(labels.shape[1]), side, side)

    def _proposals(self, maps: tuple[Tensor, ...], limit: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Candidates with the number of the level as their class: each level is suppressed on its own."""
        boxes, scores, levels = [], [], []
        pre = self.proposals['pre']
        for level, (score, delta, anchors) in enumerate(self.rpn(maps)):
            score = score[..., 0]
            if self.rpn.dynamic:
                score = F.pad(score, (0, pre))
            score, index = score.topk(pre if self.rpn.dynamic else min(pre, int(anchors.shape[0])))
            if self.rpn.dynamic:
                index = torch.minimum(index, torch._shape_as_tensor(anchors)[0] - 1)
            delta = delta.gather(1, index[..., None].expand(-1, -1, 4))
            boxes.append(decode(anchors[index], delta, self.rpn.head.bbox_coder, limit))
            scores.append(score)
            levels.append(torch.full_like(index, level))
        return torch.cat(boxes, 1), torch.cat(scores, 1), torch.cat(levels, 1)


class EndToEnd(nn.Module):
    """A model from images to a tuple of outputs, whose names are :attr:`names`.

    Args:
        model: Of MMPretrain, MMSegmentation or MMDetection, or an EMOv2 alone; in eval mode.
        scope: ``default_scope`` of its config.
        answers: 'raw' (maps of the heads, logits), 'detections' (boxes after NMS), 'boxes' (before it),
            'probabilities', 'map' (and logits of a segmentor), 'logits' (these alone) or 'features' (of a
            backbone).
        normalize: What precedes the model; None takes normalized images (N, 3, H, W).
        dynamic: Whether images may have any size when traced.

    Raises:
        UserError: If the model has no such answers.
    """

    def __init__(
        self, model: Any, scope: str | None, answers: str, normalize: Normalize | None, dynamic: bool
    ) -> None:
        super().__init__()
        self.model, self.scope, self.answers = model, scope, answers
        self.normalize, self.dynamic = normalize, dynamic
        self.names: list[str] = []
        self.rules: dict[str, Any] | None = None  # of non-maximum suppression, of one stage
        self.levels: list[int] = []  # anchors of each level, of the last images
        if answers in ('detections', 'boxes'):
            self._build_detector()
        if answers == 'probabilities' and 'MultiLabel' in type(model.head).__name__:
            raise UserError(f'{type(model.head).__name__} gives no probabilities of one class; give --raw')
        if answers in ('map', 'logits') and model.test_cfg.get('mode', 'whole') != 'whole':
            raise UserError(
                f'test_cfg of the segmentor has mode={model.test_cfg.mode}: crops are not exported; give '
                '--cfg-options model.test_cfg.mode=whole, or --raw'
            )
        self.eval()

    def _build_detector(self) -> None:
        model = self.model
        if getattr(model, 'with_rpn', False) and hasattr(model, 'roi_head'):
            if self.answers == 'boxes':
                raise Unsupported('it has no NMS, which a detector of two stages needs inside; give --raw')
            self.two_stage = TwoStage(model, self.dynamic)
            return
        head = model.bbox_head
        if not any(each.__name__ in SINGLE_STAGE for each in type(head).__mro__):
            raise UserError(f'{type(head).__name__} has no export of boxes; give --raw')
        self.dense = Dense(head, self.dynamic)
        self.rules = nms_rules(head.test_cfg, head.test_cfg.get('score_thr', 0))

    def forward(self, image: Tensor) -> tuple[Tensor, ...]:
        x = image if self.normalize is None else self.normalize(image)
        found = self.outputs(x, image)
        self.names = list(found)
        return tuple(found.values())

    def limit(self, image: Tensor) -> Tensor:
        """Largest x1, y1, x2, y2 of a box."""
        axes = [2, 1, 2, 1] if self.normalize is not None else [3, 2, 3, 2]
        if self.dynamic:
            return torch._shape_as_tensor(image)[axes].to(torch.float32)
        return torch.tensor([float(image.shape[axis]) for axis in axes])

    def outputs(self, x: Tensor, image: Tensor) -> dict[str, Tensor]:
        """Outputs by name, of normalized images ``x``."""
        model = self.model
        if self.answers == 'features':
            return {f'stride_{4 * 2**i}': y for i, y in zip(model.out_indices, model(x))}
        if self.scope == 'mmpretrain':
            logits = model(x, mode='tensor')
            return dict(logits=logits) if self.answers == 'raw' else dict(probabilities=logits.softmax(-1))
        if self.scope == 'mmseg':
            logits = model(x, mode='tensor')
            if self.answers == 'logits':
                return dict(logits=logits)
            corners = model.align_corners
            large = F.interpolate(logits, x.shape[2:], mode='bilinear', align_corners=corners)
            if self.answers == 'raw':
                return dict(logits=large)
            if large.shape[1] == 1:
                found = large[:, 0].sigmoid() > model.decode_head.threshold
            else:
                found = large.argmax(1)
            return dict(map=found.to(torch.uint8 if large.shape[1] <= 256 else torch.int32), logits=logits)
        maps = model.extract_feat(x)
        if self.answers == 'raw':
            if not getattr(model, 'with_rpn', False):
                return by_level(HEAD_OUTPUTS, model.bbox_head(maps))
            regions = by_level([f'rpn_{name}' for name in HEAD_OUTPUTS], model.rpn_head(maps))
            return {**regions, **by_level(['feature'], [maps])}
        return self._boxes(maps, self.limit(image))

    def _boxes(self, maps: tuple[Tensor, ...], limit: Tensor) -> dict[str, Tensor]:
        if self.rules is None:
            return dict(zip(('dets', 'labels', 'masks'), self.two_stage(maps, limit)))
        smallest = self.rules['min_size']
        if self.answers == 'boxes':
            levels = self.dense(maps)
            self.levels = [int(anchors.shape[0]) for _, _, anchors in levels]
            scores = torch.cat([level[0] for level in levels], 1)
            coder = self.dense.head.bbox_coder
            boxes = torch.cat([decode(anchors, deltas, coder, limit) for _, deltas, anchors in levels], 1)
            return dict(boxes=boxes, scores=scores)
        pre = self.rules['pre'] if self.rules['pre'] > 0 else 1 << 20
        boxes, scores, labels = self.dense.candidates(maps, limit, pre)
        scores = nonzero_area(boxes, scores, smallest)
        boxes, scores, labels = suppress(boxes, scores, labels, limit.max() + 1, self.rules)
        return dict(dets=torch.cat((boxes, scores[..., None]), -1), labels=labels)


def by_level(names: Iterable[str], outputs: Iterable[Iterable[Tensor]]) -> dict[str, Tensor]:
    """Outputs of each level of a feature pyramid by name: ``NAME_LEVEL``."""
    return {f'{name}_{i}': y for name, levels in zip(names, outputs) for i, y in enumerate(levels)}


def is_backbone(model: nn.Module) -> bool:
    return isinstance(model, (EMOv2, OnnxEMOv2))
