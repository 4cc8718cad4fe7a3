"""Knowledge distillation: train a classifier with labels and with a larger classifier as teacher.

Needs MMPretrain (extra ``cls``). Use it in a config as ``type='emo2_mm.distill.DistilledImageClassifier'``.
"""

from __future__ import annotations

from copy import deepcopy
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .attention import SEWMHSA
from .weights.read import read_checkpoint

try:
    from mmpretrain.models import ImageClassifier
    from mmpretrain.registry import MODELS
    from mmpretrain.structures import DataSample
except ModuleNotFoundError as error:
    if error.name != 'mmpretrain':
        raise
    raise ModuleNotFoundError(
        'emo2_mm.distill needs mmpretrain, which is not installed; install emo2_mm[cls]', name='mmpretrain'
    ) from None


class Teacher:
    """A frozen classifier used for inference only.

    It is not an ``nn.Module``, so not a part of the model that uses it: it is not trained, averaged (EMA),
    synchronized between processes, saved or switched to training mode, and copies of the model share it. It
    is built when training starts, and moves to the device of the images.

    Args:
        cfg: Config of a classifier of MMPretrain with the source of its weights: ``pretrained``, a file or
            URL (for ``TimmClassifier`` True, or ``checkpoint_path``, a file). Its ``data_preprocessor``
            normalizes images of 0..255, as in any classifier.
        size: Height and width in pixels of its input images.

    Raises:
        ValueError: If ``cfg`` names no weights or ``size`` is not positive.
    """

    def __init__(self, cfg: dict[str, Any], size: int) -> None:
        self.cfg = deepcopy(cfg)
        self.size = size
        self.network: nn.Module | None = None
        self.name = cfg.get('model_name') or cfg.get('type')
        if not (cfg.get('pretrained') or cfg.get('checkpoint_path')):
            raise ValueError(f'the teacher {self.name} has no trained weights; set model.teacher.pretrained')
        if size < 1:
            raise ValueError(f'teacher_size is {size}; give a positive number of pixels')

    def __deepcopy__(self, memo: dict[int, Any]) -> Teacher:
        return self

    def build(self) -> None:
        """Build the network and load its weights; does nothing the second time.

        Raises:
            RuntimeError: If a package or the weights are missing, or the weights do not match.
        """
        if self.network is not None:
            return
        cfg = deepcopy(self.cfg)
        file = cfg.pop('checkpoint_path', None)  # timm would unpickle it
        try:
            network = MODELS.build(cfg)
            if isinstance(network, ImageClassifier):  # others load theirs when they are built
                file = file or cfg['pretrained']
            if file:
                content = read_checkpoint(file)
                network.load_state_dict(content.get('state_dict', content))
        except Exception as error:
            remedy = 'Give the file of its weights with --cfg-options model.teacher.pretrained=FILE'
            if 'TimmClassifier' in str(self.cfg['type']):
                remedy = (
                    'It needs timm (install emo2_mm[kd]) and downloads its weights once. Without internet, '
                    'give a file of them with --cfg-options model.teacher.pretrained=False '
                    'model.teacher.checkpoint_path=FILE'
                )
            raise RuntimeError(f'could not load teacher {self.name}: {error}\n{remedy}') from error
        self.network = network.requires_grad_(False).eval()

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Tensor:
        """Logits (N, classes) of images (N, 3, H, W) as they were loaded: BGR in 0..255."""
        self.build()
        if images.shape[-2:] != (self.size, self.size):
            images = F.interpolate(images, (self.size, self.size), mode='bilinear', antialias=True)
        network: Any = self.network
        network = network.to(images.device)
        return network(network.data_preprocessor(dict(inputs=images))['inputs'])


@MODELS.register_module()
class DistilledImageClassifier(ImageClassifier):
    """Image classifier trained with labels and soft distillation from a teacher.

    The loss is the sum of the head's own loss (``loss_cls``) and ``distill_weight`` times the
    Kullback-Leibler divergence between the softmax outputs of teacher and student at temperature 1, summed
    over classes, averaged over the batch (``loss_kd``). Parameters, checkpoints and predictions are those of
    ``ImageClassifier``.

    Args:
        teacher: Config of the teacher, see :class:`Teacher`. It must have the classes of the student.
        teacher_size: Height and width in pixels of the teacher's input; the images are resized to it.
            Defaults to 224.
        distill_weight: Factor of the divergence. Defaults to 5.
        train_window_size: Side of the attention windows of EMOv2 in training mode, for images that are
            larger than in evaluation. Defaults to the backbone's ``window_size`` in both modes.
        **kwargs: See ``ImageClassifier``.

    Raises:
        ValueError: If the teacher has no trained weights, or a size is not positive.
    """

    def __init__(
        self,
        teacher: dict[str, Any],
        teacher_size: int = 224,
        distill_weight: float = 5.0,
        train_window_size: int | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.teacher = Teacher(teacher, teacher_size)
        self.distill_weight = distill_weight
        attentions = [m for m in self.backbone.modules() if isinstance(m, SEWMHSA)]
        if train_window_size is not None and (train_window_size < 1 or not attentions):
            raise ValueError(
                f'train_window_size is {train_window_size}; give a positive number of tokens, and an EMOv2'
            )
        # (attention, window in training, in evaluation)
        self.windows = [(m, train_window_size or m.window_size, m.window_size) for m in attentions]
        self.train()

    def init_weights(self) -> None:
        """Initialize the student, and build the teacher, so that a missing teacher fails before training."""
        super().init_weights()
        self.teacher.build()

    def train(self, mode: bool = True) -> DistilledImageClassifier:
        """Set the mode of the student, and its window size for that mode."""
        super().train(mode)
        for attention, training, evaluation in self.windows:
            attention.window_size = training if mode else evaluation
        return self

    def loss(self, inputs: Tensor, data_samples: list[DataSample]) -> dict[str, Tensor]:
        """Compute the losses of a batch.

        Args:
            inputs: Normalised images of shape (N, 3, H, W).
            data_samples: Their labels.

        Returns:
            ``loss_cls``, ``loss_kd`` and other values of the head, such as accuracies.

        Raises:
            ValueError: If teacher and student have different numbers of classes.
        """
        feats = self.extract_feat(inputs)
        losses = self.head.loss(feats, data_samples)
        losses['loss_cls'] = losses.pop('loss')  # in the logs, `loss` is the sum
        student, teacher = self.head(feats), self.teacher(self.restore(inputs))
        if student.shape != teacher.shape:
            raise ValueError(
                f'the teacher {self.teacher.name} has {teacher.shape[-1]} classes, the student '
                f'{student.shape[-1]}; use a teacher with the same classes'
            )
        divergence = F.kl_div(
            student.float().log_softmax(1),
            teacher.float().log_softmax(1),
            reduction='batchmean',
            log_target=True,
        )
        losses['loss_kd'] = self.distill_weight * divergence
        return losses

    def restore(self, inputs: Tensor) -> Tensor:
        """Undo the normalization: images (N, 3, H, W) as they were loaded, BGR in 0..255."""
        images, preprocessor = inputs.float(), self.data_preprocessor
        if hasattr(preprocessor, 'mean'):
            images = images * preprocessor.std + preprocessor.mean
        return images.flip(1) if preprocessor.to_rgb else images
