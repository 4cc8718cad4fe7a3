"""EMOv2: a backbone of improved inverted residual mobile blocks (arXiv 2412.06674)."""

from __future__ import annotations

from collections import OrderedDict
from contextlib import contextmanager, nullcontext
from itertools import chain
from typing import Any, Iterator, Sequence

import torch
from mmengine.model import BaseModule
from mmengine.registry import MODELS
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.checkpoint import checkpoint

from .attention import SEWMHSA
from .deploy import fold_following_norm, fold_preceding_norm
from .depthwise import DepthwiseConv2d, can_mix_and_project, mix_and_project
from .inference import infer, need_not_be_called, parts_of, structure
from .inplace import SiLU, add
from .modes import infers_on_cpu, is_hooked, trains_on_cpu
from .weights.load import load_backbone_weights

EPS = 1e-6  # of every norm in the network
BATCH_NORMS = {'BN': nn.BatchNorm2d, 'SyncBN': nn.SyncBatchNorm}

# The four stages: strides 4 and 8 are convolutional, strides 16 and 32 attend.
STAGE_ATTENDS = (False, False, True, True)


def build_batch_norm(norm_cfg: dict[str, Any], channels: int) -> nn.Module:
    """Build the batch norm that ``norm_cfg`` names, with this network's eps unless it sets one."""
    cfg = {'eps': EPS, **(norm_cfg or {})}
    kind, requires_grad = cfg.pop('type', None), cfg.pop('requires_grad', True)
    if kind not in BATCH_NORMS:
        raise ValueError(f'norm_cfg is {norm_cfg}; EMOv2 takes the types {list(BATCH_NORMS)}')
    norm = BATCH_NORMS[kind](channels, **cfg)
    return norm.requires_grad_(requires_grad)


def channels_first(module: nn.Module, x: Tensor) -> Tensor:
    """Apply a (B, C, H, W) module to a (B, H, W, C) map. Both permutations are views, not copies."""
    return module(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)


class Stem(nn.Module):
    """Map an image (B, in_channels, H, W) to (B, channels, H / 2, W / 2).

    Args:
        in_channels: Channels of the image.
        channels: Channels of the map.
        norm_cfg: The batch norms.
    """

    def __init__(self, in_channels: int, channels: int, norm_cfg: dict[str, Any]) -> None:
        super().__init__()
        self.conv = nn.Conv2d(in_channels, channels, 3, stride=2, padding=1)
        self.norm = build_batch_norm(norm_cfg, channels)
        self.act = SiLU()
        self.depthwise = DepthwiseConv2d(channels, 3)
        self.depthwise_norm = build_batch_norm(norm_cfg, channels)
        self.depthwise_act = SiLU()
        self.project = nn.Conv2d(channels, channels, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Compute the map."""
        x = self.act(self.norm(self.conv(x)))
        x = self.depthwise_act(self.depthwise_norm(self.depthwise(x)))
        return self.project(x)


class DropPath(nn.Module):
    """Drop a residual branch for whole samples at random (stochastic depth, arXiv 1603.09382)."""

    def __init__(self, rate: float) -> None:
        super().__init__()
        self.rate = rate

    def forward(self, x: Tensor) -> Tensor:
        if self.rate == 0.0 or not self.training:
            return x
        keep = 1.0 - self.rate
        mask = x.new_empty(x.shape[0], 1, 1, 1).bernoulli_(keep)
        return x * mask.div_(keep)


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
        head_dim: Channels of one attention head of q and k.
        window_size: Side of an attention window, in tokens.
        drop_path_rate: Probability to drop the residual branch.
        layer_scale_init_value: Initial factor on the branch.
        norm_cfg: The batch norms.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        expand_ratio: float,
        stride: int,
        attends: bool,
        head_dim: int,
        window_size: int,
        drop_path_rate: float,
        layer_scale_init_value: float,
        norm_cfg: dict[str, Any],
    ) -> None:
        super().__init__()
        mid_channels = int(in_channels * expand_ratio)
        self.stride = stride
        self.residual = stride == 1
        self.norm = nn.LayerNorm(in_channels, EPS) if attends else build_batch_norm(norm_cfg, in_channels)
        if attends and self.residual:
            self.expand = SEWMHSA(in_channels, mid_channels, head_dim, window_size)
        else:
            linear = nn.Linear(in_channels, mid_channels)
            self.expand = nn.Sequential(OrderedDict(linear=linear, act=nn.GELU() if attends else SiLU()))
        self.depthwise = DepthwiseConv2d(mid_channels, 5, stride)
        self.depthwise_norm = build_batch_norm(norm_cfg, mid_channels)
        self.depthwise_act = SiLU()
        self.project = nn.Linear(mid_channels, out_channels, bias=False)
        self.layer_scale = nn.Parameter(torch.full((out_channels,), layer_scale_init_value))
        self.drop_path = DropPath(drop_path_rate)

    def spatial(self, x: Tensor) -> Tensor:
        """Depth-wise convolution, batch norm and SiLU on a (B, C, H, W) map."""
        return self.depthwise_act(self.depthwise_norm(self.depthwise(x)))

    def mixes_at_once(self) -> bool:
        """Whether all that follows ``expand`` may be computed together: nothing is exchanged or hooked."""
        act = nn.Identity() if isinstance(self.expand, SEWMHSA) else self.expand.act
        parts = act, self.depthwise, self.depthwise_norm, self.depthwise_act, self.project
        return can_mix_and_project(*parts) and not is_hooked(*self._modules.values())

    def branch(self, x: Tensor) -> Tensor:
        """Compute what is scaled and added: (B, H, W, in_channels) to (B, H', W', out_channels)."""
        y = self.norm(x) if isinstance(self.norm, nn.LayerNorm) else channels_first(self.norm, x)
        if trains_on_cpu(y) and self.mixes_at_once():
            attends = isinstance(self.expand, SEWMHSA)
            y, act = (self.expand(y), nn.Identity()) if attends else (self.expand.linear(y), self.expand.act)
            y = mix_and_project(y, act, self.depthwise, self.depthwise_norm, self.project)
        else:
            y = self.expand(y)
            local = channels_first(self.spatial, y)
            y = self.project(add(local, y) if self.residual else local)
        return y

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, H, W, in_channels) to (B, H / stride, W / stride, out_channels)."""
        y = self.branch(x)
        if not self.residual:
            return y if self.layer_scale is None else y * self.layer_scale
        y = self.drop_path(y)
        return add(y, x) if self.layer_scale is None else torch.addcmul(x, y, self.layer_scale)

    def fold(self) -> None:
        """Fold batch norms and layer scale; see :meth:`EMOv2.switch_to_deploy`."""
        fold_following_norm(self.depthwise, self.depthwise_norm)
        self.depthwise_norm = nn.Identity()
        if not isinstance(self.norm, nn.LayerNorm):
            fold_preceding_norm(self.norm, self.expand.linear)
            self.norm = nn.Identity()
        self.project.weight.data.mul_(self.layer_scale.data[:, None])
        self.layer_scale = None


@contextmanager
def _frozen_statistics(module: nn.Module) -> Iterator[None]:
    """Keep running statistics as they are, so that recomputing a block does not count its batch twice."""
    norms = [
        m for m in module.modules() if isinstance(m, _BatchNorm) and m.training and m.track_running_stats
    ]
    before = [(m.momentum, m.num_batches_tracked.clone()) for m in norms]
    for m in norms:
        m.momentum = 0.0
    try:
        yield
    finally:
        for m, (momentum, batches) in zip(norms, before):
            m.momentum = momentum
            m.num_batches_tracked.copy_(batches)


@MODELS.register_module()
class EMOv2(BaseModule):
    """EMOv2 backbone, by Zhang et al., `Pushing 5M Vision Model Frontier
    <https://arxiv.org/abs/2412.06674>`_.

    A convolutional stem at stride 2, then four stages of :class:`I2RMB` at strides 4, 8, 16 and 32. The
    first two stages are convolutional, the last two attend in neighbour and distant windows. The
    first block of a stage halves the resolution and expands twice as wide. Maps are kept channels
    last inside: (B, H, W, C).

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

    arch_settings: dict[str, dict[str, Any]] = {
        name: dict(depths=depths, channels=channels, expand_ratios=expand_ratios, head_dim=head_dim)
        for name, depths, channels, expand_ratios, head_dim in (
            ('1m', (2, 2, 8, 3), (32, 48, 80, 180), (2, 2.5, 3, 3.5), 20),
            ('2m', (3, 3, 9, 3), (32, 48, 120, 200), (2, 2.5, 3, 3.5), 20),
            ('5m', (3, 3, 9, 3), (48, 72, 160, 288), (2, 3, 4, 4), 32),
            ('20m', (3, 3, 13, 3), (64, 128, 320, 448), (2, 3, 4, 4), 32),
            ('50m', (5, 8, 20, 7), (64, 128, 384, 512), (2, 3, 4, 4), 32),
        )
    }

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
    ) -> None:
        super().__init__(init_cfg)
        arch = self._check_arch(arch)
        if isinstance(out_indices, int):
            out_indices = (out_indices,)
        stages = [i for i in range(4) if isinstance(out_indices, (list, tuple)) and i in out_indices]
        if not stages or list(out_indices) != stages:
            raise ValueError(f'out_indices is {out_indices}; give rising numbers out of 0, 1, 2, 3')
        out_indices = tuple(out_indices)
        if not isinstance(in_channels, int) or in_channels < 1:
            raise ValueError(f'in_channels is {in_channels}; give a positive number of channels')
        num_stages = out_indices[-1] + 1
        if frozen_stages not in range(-1, num_stages + 1):
            raise ValueError(
                f'frozen_stages is {frozen_stages}; out_indices={out_indices} builds '
                f'{num_stages} stages: give -1 (none), 0 (stem) to {num_stages}'
            )
        if not isinstance(window_size, int) or window_size < 1:
            raise ValueError(f'window_size is {window_size}; give a positive number of tokens')
        if not isinstance(drop_path_rate, (int, float)) or not 0 <= drop_path_rate < 1:
            raise ValueError(f'drop_path_rate is {drop_path_rate!r}; give a rate from 0 to below 1')
        self.out_indices = out_indices
        self.frozen_stages = frozen_stages
        self.norm_eval = norm_eval
        self.with_cp = with_cp
        self.deployed = False

        width = arch['channels'][0] // 2
        self.stem = Stem(in_channels, width, norm_cfg)
        drop_path_rates = iter(torch.linspace(0, drop_path_rate, sum(arch['depths'])).tolist())
        self.stages = nn.ModuleList()
        for i in range(num_stages):
            stage = nn.Sequential()
            for j in range(arch['depths'][i]):
                first = j == 0  # halves the resolution and expands twice as wide
                stage.append(
                    I2RMB(
                        in_channels=width if first else arch['channels'][i],
                        out_channels=arch['channels'][i],
                        expand_ratio=arch['expand_ratios'][i] * (2 if first else 1),
                        stride=2 if first else 1,
                        attends=STAGE_ATTENDS[i],
                        head_dim=arch['head_dim'],
                        window_size=window_size,
                        drop_path_rate=next(drop_path_rates),
                        layer_scale_init_value=layer_scale_init_value,
                        norm_cfg=norm_cfg,
                    )
                )
            self.stages.append(stage)
            width = arch['channels'][i]
        self.norm = nn.LayerNorm(width, EPS) if final_norm else None
        self._freeze()
        self._structure = structure(parts_of(self.stem, self.stages))

    @classmethod
    def _check_arch(cls, arch: str | dict[str, Any]) -> dict[str, Any]:
        if isinstance(arch, str):
            if arch not in cls.arch_settings:
                raise ValueError(f'arch is {arch!r}; give one of {list(cls.arch_settings)} or a dict')
            return cls.arch_settings[arch]
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

    @property
    def feature_info(self) -> list[dict[str, Any]]:
        """The maps that :meth:`forward` returns, as timm describes them.

        A dict for each of ``out_indices``: ``num_chs`` channels, ``reduction`` (stride in pixels), and
        ``module``, the name of the stage.
        """
        return [
            dict(num_chs=self.stages[i][-1].project.out_features, reduction=4 << i, module=f'stages.{i}')
            for i in self.out_indices
        ]

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        """Compute the maps of an image.

        Args:
            x: Images of shape (B, in_channels, H, W), of any size.

        Returns:
            For each of ``out_indices`` a map of shape (B, channels, ceil(H / stride), ceil(W / stride)),
            contiguous.

        Raises:
            ValueError: If ``x`` is not a batch of images.
        """
        if x.ndim != 4:
            raise ValueError(f'images have the shape {tuple(x.shape)}; give (B, C, H, W)')
        x = x.contiguous(memory_format=torch.channels_last).permute(0, 2, 3, 1)
        infers = infers_on_cpu(x) and need_not_be_called(parts_of(self.stem, self.stages), self._structure)
        stages = infer(self, x) if infers else self._stages(x)
        outs = []
        for i, x in enumerate(stages):
            if i in self.out_indices:
                last = self.norm is not None and i == len(self.stages) - 1
                out = (self.norm(x) if last else x).permute(0, 3, 1, 2)
                out = out.contiguous()  # or mmcv's RoIAlign silently reads other numbers
                if infers and out.is_inference() and not torch.is_inference_mode_enabled():
                    out = out.clone()  # or what follows could not train
                outs.append(out)
        return tuple(outs)

    def _stages(self, x: Tensor) -> Iterator[Tensor]:
        x = channels_first(self.stem, x)
        for stage in self.stages:
            for block in stage:
                x = self._recomputed(block, x) if self.with_cp and self.training else block(x)
            yield x

    @staticmethod
    def _recomputed(block: I2RMB, x: Tensor) -> Tensor:
        return checkpoint(
            block,
            x,
            use_reentrant=False,
            context_fn=lambda: (nullcontext(), _frozen_statistics(block)),
        )

    def init_weights(self) -> None:
        """Initialise as ``init_cfg`` says; a ``Pretrained`` one must provide every weight.

        Raises:
            ValueError: If weights are missing or have other shapes.
        """
        cfgs = [self.init_cfg] if isinstance(self.init_cfg, dict) else self.init_cfg or []
        pretrained = [cfg for cfg in cfgs if cfg['type'] == 'Pretrained']
        if not pretrained:
            super().init_weights()
            return
        for cfg in pretrained:
            if not cfg.get('checkpoint'):
                raise ValueError(f'init_cfg is {cfg}; name the file with checkpoint=FILE')
            load_backbone_weights(self, cfg['checkpoint'])
        self._is_init = True

    def get_layer_depth(self, param_name: str, prefix: str = '') -> tuple[int, int]:
        """Say how deep a parameter lies, which MMPretrain asks to decay the learning rate by layer.

        Args:
            param_name: Name of the parameter in the whole model.
            prefix: What names of the backbone's parameters begin with there. Defaults to ''.

        Returns:
            The depth and the number of depths: 0 for the stem, one more for each block, and the last for the
            final norm and everything outside the backbone.
        """
        last = sum(len(stage) for stage in self.stages) + 1
        depth = last
        if param_name.startswith(f'{prefix}stem.'):
            depth = 0
        elif param_name.startswith(f'{prefix}stages.'):
            i, j = map(int, param_name[len(prefix) :].split('.')[1:3])
            depth = sum(len(stage) for stage in self.stages[:i]) + j + 1
        return depth, last + 1

    def switch_to_deploy(self) -> None:
        """Fold batch norms, layer scale and the stem's last layer into weights next to them, in place.

        The outputs stay the same within rounding. There is no way back: the state dict changes, and the
        backbone no longer trains. A second call does nothing. On a CPU a copy of the linear layers' weights,
        in oneDNN's order, is then kept: it follows any change but one in place through ``.data``.

        Raises:
            RuntimeError: If the backbone is in training mode, or a batch norm has no running statistics.
        """
        if self.deployed:
            return
        if self.training:
            raise RuntimeError('switch_to_deploy() folds what inference computes; call eval() first')
        fold_following_norm(self.stem.conv, self.stem.norm)
        fold_following_norm(self.stem.depthwise, self.stem.depthwise_norm)
        self.stem.norm = self.stem.depthwise_norm = nn.Identity()
        for block in chain(*self.stages):
            block.fold()
        # the first block has no residual: nothing but its linear layer follows the stem's
        expand, project = self.stages[0][0].expand.linear, self.stem.project
        expand.weight.data = expand.weight.data @ project.weight.data[:, :, 0, 0]
        self.stem.project = nn.Identity()
        self.requires_grad_(False).eval()
        self.deployed = True
        self._structure = structure(parts_of(self.stem, self.stages))

    def _freeze(self) -> None:
        if self.frozen_stages >= 0:
            for module in (self.stem, *self.stages[: self.frozen_stages]):
                module.eval().requires_grad_(False)

    def train(self, mode: bool = True) -> EMOv2:
        """Set the training mode, but for frozen stages and, with ``norm_eval``, batch norms.

        Raises:
            RuntimeError: If ``mode`` is True after :meth:`switch_to_deploy`.
        """
        if mode and self.deployed:
            raise RuntimeError('this EMOv2 was switched to deploy: it has no batch norms left to train')
        super().train(mode)
        self._freeze()
        if self.norm_eval:
            for module in self.modules():
                if isinstance(module, _BatchNorm):
                    module.eval()
        return self
