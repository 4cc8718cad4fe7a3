"""EMOv2: a backbone of improved inverted residual mobile blocks (arXiv 2412.06674)."""

from __future__ import annotations

from collections import OrderedDict
from typing import Any, Mapping, Sequence

import torch
from mmengine.model import BaseModule
from mmengine.registry import MODELS
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from . import cpu
from .arch import ARCH_SETTINGS, STAGE_ATTENDS, check_arch, check_options, check_out_indices
from .attention import SEWMHSA
from .fold import FoldingError, check_folding, fold_network
from .layers import EPS, DropPath, build_batch_norm, recomputed
from .weights.load import load_backbone_weights


class Stem(nn.Module):
    """Map an image (B, in_channels, H, W) to (B, channels, H / 2, W / 2).

    Args:
        in_channels: Channels of the image.
        channels: Channels of the feature map.
        norm_cfg: The batch norms.
    """

    def __init__(self, in_channels: int, channels: int, norm_cfg: dict[str, Any]) -> None:
        super().__init__()
        self.conv = nn.Conv2d(in_channels, channels, 3, stride=2, padding=1)
        self.norm = build_batch_norm(norm_cfg, channels)
        self.act = nn.SiLU()
        self.depthwise = nn.Conv2d(channels, channels, 3, padding=1, groups=channels, bias=False)
        self.depthwise_norm = build_batch_norm(norm_cfg, channels)
        self.depthwise_act = nn.SiLU()
        self.project = nn.Conv2d(channels, channels, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Compute the feature map; in memory it is channels last."""
        if cpu.why_not(self, x) is None:
            return cpu.stem(self, x)
        x = self.act(self.norm(self.conv(x)))
        x = self.depthwise_act(self.depthwise_norm(self.depthwise(x)))
        return self.project(x)


class I2RMB(nn.Module):
    """Improved inverted residual mobile block (paper section 3.3).

    ::

        x ─ norm ─ expand ─┬─ depthwise ─ BN ─ SiLU ─(+)─ project ─ layer scale ─ drop path ─(+)─
        │                  └──────── unless stride 2 ─┘                                       │
        └──────────────────────────────────────────────────────────────── unless stride 2 ────┘

    The norm is a batch norm and the activation of a linear ``expand`` SiLU; in a stage that attends they are
    layer norm and GELU, and ``expand`` is :class:`SEWMHSA` in all blocks but the first.

    Args:
        in_channels: Channels of the input.
        out_channels: Channels of the output; equal to ``in_channels`` when ``stride`` is 1.
        expand_ratio: Channels between ``expand`` and ``project``, relative to the input.
        stride: 2 for the first block of a stage, which has no residual, else 1.
        attends: Whether the block belongs to a stage that attends.
        drop_path_rate: Probability to drop the residual branch.
        head_dim: Channels of one attention head of q and k.
        window_size: Side of an attention window, in tokens.
        layer_scale_init_value: Initial factor on the branch.
        norm_cfg: The batch norms.
        with_cp: Recompute the block in the backward pass.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        expand_ratio: float,
        stride: int,
        attends: bool,
        drop_path_rate: float,
        head_dim: int,
        window_size: int,
        layer_scale_init_value: float,
        norm_cfg: dict[str, Any],
        with_cp: bool = False,
    ) -> None:
        super().__init__()
        mid_channels = int(in_channels * expand_ratio)
        self.residual = stride == 1
        self.with_cp = with_cp
        self.norm = nn.LayerNorm(in_channels, EPS) if attends else build_batch_norm(norm_cfg, in_channels)
        if attends and self.residual:
            self.expand: nn.Module = SEWMHSA(in_channels, mid_channels, head_dim, window_size)
        else:
            linear = nn.Linear(in_channels, mid_channels)
            self.expand = nn.Sequential(OrderedDict(linear=linear, act=nn.GELU() if attends else nn.SiLU()))
        self.depthwise = nn.Conv2d(
            mid_channels, mid_channels, 5, stride, padding=2, groups=mid_channels, bias=False
        )
        self.depthwise_norm = build_batch_norm(norm_cfg, mid_channels)
        self.depthwise_act = nn.SiLU()
        self.project = nn.Linear(mid_channels, out_channels, bias=False)
        self.layer_scale = nn.Parameter(torch.full((out_channels,), layer_scale_init_value))
        self.drop_path = DropPath(drop_path_rate)

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, H, W, in_channels) to (B, H / stride, W / stride, out_channels)."""
        if self.with_cp and self.training and torch.is_grad_enabled():
            return recomputed(self._forward, self, x)
        return self._forward(x)

    def _forward(self, x: Tensor) -> Tensor:
        if cpu.why_not(self, x) is None:
            return cpu.block(self, x)
        if isinstance(self.norm, nn.LayerNorm):
            y = self.norm(x)
        else:
            y = self.norm(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        y = self.expand(y)
        local = self.depthwise(y.permute(0, 3, 1, 2))
        local = self.depthwise_act(self.depthwise_norm(local)).permute(0, 2, 3, 1)
        y = self.project(local + y if self.residual else local)
        if not self.residual:
            return y if self.layer_scale is None else y * self.layer_scale
        y = self.drop_path(y)
        return x + y if self.layer_scale is None else torch.addcmul(x, y, self.layer_scale)


cpu.register(stem=Stem, block=I2RMB, attention=SEWMHSA, drop_path=DropPath)


@MODELS.register_module()
class EMOv2(BaseModule):
    """EMOv2 backbone, by Zhang et al., `Pushing 5M Vision Model Frontier
    <https://arxiv.org/abs/2412.06674>`_.

    A convolutional stem at stride 2, then four stages of :class:`I2RMB` at strides 4, 8, 16 and 32. The
    first two stages are convolutional, the last two attend in neighbour and distant windows. The
    first block of a stage halves the resolution and expands twice as wide. Feature maps are kept channels
    last inside: (B, H, W, C).

    Fast path:
        On a CPU, :mod:`emo2_mm.cpu` computes the stem and each block instead of their modules, with the same
        outputs and gradients within rounding, if all of this holds for it; else its modules are called:

        - Input and weights are plain tensors of one floating-point type, or autocast is on in training.
        - Layers, norms and activations have the classes and settings they were built with, or strides of 1
        and 2.
        - No part has hooks, parametrizations or a ``forward`` of its own; there are no global hooks.
        - Without gradients, batch norms are in eval mode, nothing is dropped, and autocast is off.
        - With gradients, it is not deployed, and batch norms do not synchronize.
        - Nothing traces, compiles, exports, transforms (:mod:`torch.func`) or intercepts operations.

        ``emo2_mm.cpu.why_not(block, x)`` names the reason. ``emo2_mm.cpu.enable(False)`` or the environment
        variable ``EMO2_MM_CPU_FASTPATH=0`` switches it off.

    Args:
        arch: '1m', '2m', '5m', '20m' or '50m', or a dict with the keys ``depths`` (blocks), ``channels``
            and ``expand_ratios`` of the four stages, and ``head_dim``.
        in_channels: Channels of the input image. Defaults to 3.
        window_size: Side of an attention window in tokens; weights do not depend on it. The published
            models use 7 at 224 x 224, 8 at 256 and 512, 10 in detection and segmentation. Defaults to 7.
        drop_path_rate: Rate of the last block; it grows linearly from 0. Defaults to 0.
        layer_scale_init_value: Initial value of the layer scale. Defaults to 1e-6.
        out_indices: Stages (0-3, strides 4-32) whose maps are returned, in rising order. Later stages are
            not built. Defaults to all four.
        frozen_stages: -1 freezes nothing, 0 the stem, n the stem and the first n stages: no gradient,
            and always in eval mode. Defaults to -1.
        norm_eval: Keep batch norms in eval mode while training. Defaults to False.
        with_cp: Recompute blocks in the backward pass to save memory. Defaults to False.
        final_norm: Apply a layer norm to the map of the last stage, as classification does. Defaults to
            False.
        norm_cfg: Batch norm, ``dict(type='BN')`` or ``dict(type='SyncBN')``, with ``requires_grad`` and
            the arguments of torch's classes; eps is 1e-6 unless given. Defaults to ``dict(type='BN')``.
        init_cfg: MMEngine's initialisation config. ``dict(type='Pretrained', checkpoint=FILE)`` takes
            published files and those of MMPretrain, MMDetection and MMSegmentation.
        deploy: Build the folded network, which loads what was saved after :meth:`switch_to_deploy` and does
            not train. Defaults to False.

    Raises:
        ValueError: If an argument is unknown or out of range; the message lists what is allowed.

    Examples:
        >>> import torch
        >>> from emo2_mm import EMOv2
        >>> for map in EMOv2('1m').eval()(torch.rand(1, 3, 224, 224)):
        ...     print(tuple(map.shape))
        (1, 32, 56, 56)
        (1, 48, 28, 28)
        (1, 80, 14, 14)
        (1, 180, 7, 7)
    """

    arch_settings = ARCH_SETTINGS

    def __init__(
        self,
        arch: str | dict[str, Any] = '5m',
        in_channels: int = 3,
        window_size: int = 7,
        drop_path_rate: float = 0.0,
        layer_scale_init_value: float = 1e-6,
        out_indices: int | Sequence[int] = (0, 1, 2, 3),
        frozen_stages: int = -1,
        norm_eval: bool = False,
        with_cp: bool = False,
        final_norm: bool = False,
        norm_cfg: dict[str, Any] = dict(type='BN'),  # noqa: B006, it is never changed
        init_cfg: dict[str, Any] | list[dict[str, Any]] | None = None,
        deploy: bool = False,
    ) -> None:
        super().__init__(init_cfg)
        arch = check_arch(arch, self.arch_settings)
        out_indices = check_out_indices(out_indices)
        check_options(in_channels, window_size, drop_path_rate, frozen_stages, out_indices)
        self.out_indices = out_indices
        self.frozen_stages = frozen_stages
        self.norm_eval = norm_eval
        self.deployed = False

        width = arch['channels'][0] // 2
        self.stem = Stem(in_channels, width, norm_cfg)
        drop_path_rates = iter(torch.linspace(0, drop_path_rate, sum(arch['depths'])).tolist())
        shared = arch['head_dim'], window_size, layer_scale_init_value, norm_cfg, with_cp
        self.stages: Any = nn.ModuleList()  # torch has no type for lists of sequences of I2RMB
        for i, channels in enumerate(arch['channels'][: out_indices[-1] + 1]):
            ratio, attends = arch['expand_ratios'][i], STAGE_ATTENDS[i]
            # the first block halves the resolution and expands twice as wide
            blocks = [I2RMB(width, channels, 2 * ratio, 2, attends, next(drop_path_rates), *shared)]
            for _ in range(1, arch['depths'][i]):
                blocks.append(I2RMB(channels, channels, ratio, 1, attends, next(drop_path_rates), *shared))
            self.stages.append(nn.Sequential(*blocks))
            width = channels
        self.norm = nn.LayerNorm(width, EPS) if final_norm else None
        self._freeze()
        if deploy:
            self.eval().switch_to_deploy()

    @property
    def feature_info(self) -> list[dict[str, Any]]:
        """For each of ``out_indices``, as in timm: channels, stride in pixels, and name of the stage."""
        return [
            dict(num_chs=self.stages[i][-1].project.out_features, reduction=4 << i, module=f'stages.{i}')
            for i in self.out_indices
        ]

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        """Compute the feature maps of images (B, in_channels, H, W), of any size.

        Returns:
            For each of ``out_indices`` (B, channels, ceil(H / stride), ceil(W / stride)), contiguous.

        Raises:
            ValueError: If ``x`` is not a batch of images.
        """
        if x.ndim != 4:
            raise ValueError(f'images have the shape {tuple(x.shape)}; give (B, C, H, W)')
        x = x.permute(0, 2, 3, 1).contiguous()  # (B, H, W, C)
        x = self.stem(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        outs = []
        for i, stage in enumerate(self.stages):
            x = stage(x)
            if i in self.out_indices:
                out = self.norm(x) if self.norm is not None and i == len(self.stages) - 1 else x
                outs.append(out.permute(0, 3, 1, 2).contiguous())  # mmcv's RoIAlign ignores strides
        return tuple(outs)

    def init_weights(self) -> None:
        """Initialise as ``init_cfg`` says; a ``Pretrained`` one must provide every weight.

        Raises:
            ValueError: If weights are missing or have other shapes.
        """
        cfgs = [self.init_cfg] if isinstance(self.init_cfg, dict) else self.init_cfg or []
        pretrained = [cfg for cfg in cfgs if cfg['type'] == 'Pretrained']
        for cfg in pretrained:
            if not cfg.get('checkpoint'):
                raise ValueError(f'init_cfg is {cfg}; name the file with checkpoint=FILE')
            load_backbone_weights(self, cfg['checkpoint'])
        if pretrained:
            self._is_init = True
        else:
            super().init_weights()

    def get_layer_depth(self, param_name: str, prefix: str = '') -> tuple[int, int]:
        """Layer index of a parameter, and their number, for MMPretrain's layer-wise learning-rate decay.

        0 is the stem, each block is one more, and the last is the final norm and all outside the backbone.

        Args:
            param_name: Name of the parameter in the whole model.
            prefix: What names of the backbone's parameters begin with there. Defaults to ''.
        """
        depth = last = sum(len(stage) for stage in self.stages) + 1
        if param_name.startswith(f'{prefix}stem.'):
            depth = 0
        elif param_name.startswith(f'{prefix}stages.'):
            i, j = map(int, param_name[len(prefix) :].split('.')[1:3])
            depth = sum(len(stage) for stage in self.stages[:i]) + j + 1
        return depth, last + 1

    def switch_to_deploy(self) -> None:
        """Fold batch norms, layer scale and the stem's last layer into weights next to them, in place.

        The outputs stay the same within rounding. There is no way back: the backbone no longer trains, and
        its state dict is another one, which a backbone built with ``deploy=True`` loads. A second call does
        nothing. Linear layers become :class:`emo2_mm.cpu.PackedLinear`, which take their memory twice on a
        CPU.

        Raises:
            FoldingError: In training mode, or if a part cannot be folded; the message names it.
        """
        if self.deployed:
            return
        if self.training:
            raise FoldingError('switch_to_deploy() folds what inference computes; call eval() first')
        fold_network(self.stem, self.stages)
        cpu.pack_linear_layers(self.stages)
        self.requires_grad_(False).eval()
        self.deployed = True

    def _load_from_state_dict(self, state_dict: Mapping[str, Any], prefix: str, *args: Any) -> None:
        check_folding(state_dict, prefix, self.deployed)  # with strict=False it would be a warning
        super()._load_from_state_dict(state_dict, prefix, *args)

    def _freeze(self) -> None:
        if self.frozen_stages >= 0:
            for module in (self.stem, *self.stages[: self.frozen_stages]):
                module.eval().requires_grad_(False)

    def train(self, mode: bool = True) -> EMOv2:
        """Set training mode; frozen stages, and batch norms if ``norm_eval``, stay in eval mode.

        Raises:
            FoldingError: If ``mode`` is True after :meth:`switch_to_deploy`.
        """
        if mode and self.deployed:
            raise FoldingError('this EMOv2 was switched to deploy: it has no batch norms left to train')
        super().train(mode)
        self._freeze()
        if self.norm_eval:
            for module in self.modules():
                if isinstance(module, _BatchNorm):
                    module.eval()
        return self
