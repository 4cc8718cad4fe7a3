"""Training of a classifier that also learns from a larger one; needs MMPretrain.

A config brings it in by itself with ``type='emo2_mm.distill.DistilledImageClassifier'``.
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
    """A trained classifier that is only asked.

    It is no module, and so none of the parts of a model that holds it: nothing of it is trained, averaged,
    synchronised between processes, saved or put into another mode; a copy of the model asks the same
    teacher. It is built when training begins, and works where the images are.

    Args:
        cfg: Config of a classifier of MMPretrain, and where its weights come from: ``pretrained``, a file
            or an address (for ``TimmClassifier`` True, or else ``checkpoint_path``, a file). Its
            ``data_preprocessor`` says what becomes of an image of 0..255, as for any classifier.
        size: Height and width in pixels of the images it is shown.

    Raises:
        ValueError: If ``cfg`` names no weights or ``size`` is not positive.
    """

    def __init__(self, cfg: dict[str, Any], size: int) -> None:
        self.cfg = deepcopy(cfg)
        self.size = size
        self.network: nn.Module | None = None
        self.name = cfg.get('model_name') or cfg.get('type')
        if not (cfg.get('pretrained') or cfg.get('checkpoint_path')):
            raise ValueError(
                f'the teacher {self.name} has no trained weights; name them with model.teacher.pretrained'
            )
        if size < 1:
            raise ValueError(f'teacher_size is {size}; give a positive number of pixels')

    def __deepcopy__(self, memo: dict[int, Any]) -> Teacher:
        return self

    def build(self) -> None:
        """Build the network and load its weights, unless that is done.

        Raises:
            RuntimeError: If a package or the weights are missing, or the weights do not fit.
        """
        if self.network is not None:
            return
        cfg = deepcopy(self.cfg)
        file = cfg.pop('checkpoint_path', None)  # timm would run code that it may hold
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
            raise RuntimeError(f'the teacher {self.name} cannot be had: {error}\n{remedy}') from error
        self.network = network.requires_grad_(False).eval()

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Tensor:
        """Score images (N, 3, H, W) as they were loaded, BGR in 0..255; gives (N, classes)."""
        self.build()
        if images.shape[-2:] != (self.size, self.size):
            images = F.interpolate(images, (self.size, self.size), mode='bilinear', antialias=True)
        network = self.network.to(images.device)
        return network(network.data_preprocessor(dict(inputs=images))['inputs'])


@MODELS.register_module()
class DistilledImageClassifier(ImageClassifier):
    """An image classifier that learns from labels and from what a teacher makes of the same images.

    The loss is the head's own (``loss_cls``) and ``distill_weight`` times the Kullback-Leibler divergence
    of the teacher's softmax from the student's, at temperature 1, summed over classes, mean over the batch
    (``loss_kd``). Without its teacher this is an ``ImageClassifier``: parameters, checkpoints and
    predictions are the same.

    Args:
        teacher: Config of the teacher, see :class:`Teacher`. It must know the student's classes.
        teacher_size: Height and width in pixels of the images that the teacher is shown; those of the
            student are resized to it.
        distill_weight: Factor of the divergence.
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
        """Initialise the student, and build the teacher, before anything is spent on training."""
        super().init_weights()
        self.teacher.build()

    def train(self, mode: bool = True) -> DistilledImageClassifier:
        """Set the mode of the student, and its windows."""
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
            ``loss_cls``, ``loss_kd`` and what else the head computes, such as accuracies.

        Raises:
            ValueError: If teacher and student do not score the same number of classes.
        """
        feats = self.extract_feat(inputs)
        losses = self.head.loss(feats, data_samples)
        losses['loss_cls'] = losses.pop('loss')  # `loss` is the name of the sum in the logs
        student, teacher = self.head(feats), self.teacher(self.restore(inputs))
        if student.shape != teacher.shape:
            raise ValueError(
                f'the teacher {self.teacher.name} scores {teacher.shape[-1]} classes, the student '
                f'{student.shape[-1]}; take a teacher of the same classes'
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
        """Undo the normalisation: images (N, 3, H, W) as they were loaded, BGR in 0..255."""
        images, preprocessor = inputs.float(), self.data_preprocessor
        if hasattr(preprocessor, 'mean'):
            images = images * preprocessor.std + preprocessor.mean
        return images.flip(1) if preprocessor.to_rgb else images
