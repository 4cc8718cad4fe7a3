"""Any arch, image and option: the plain network's maps, or the documented error."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from emo2_mm import EMOv2

hypothesis = pytest.importorskip('hypothesis')
import plain_emov2  # noqa: E402
from hypothesis import assume, given, settings  # noqa: E402
from hypothesis import strategies as st  # noqa: E402

settings.register_profile('fuzz', max_examples=30, deadline=None, derandomize=True)
settings.load_profile('fuzz')


@st.composite
def archs(draw: st.DrawFn) -> dict[str, Any]:
    """Small archs: the stages that attend divide into heads, of q and k and of v."""
    head_dim = draw(st.integers(1, 4))
    heads = [draw(st.integers(1, 3)) for _ in range(2)]
    return dict(
        depths=tuple(draw(st.integers(1, 3)) for _ in range(4)),
        channels=(*(2 * draw(st.integers(1, 4)) for _ in range(2)), *(n * head_dim for n in heads)),
        expand_ratios=tuple(draw(st.integers(1, 3)) for _ in range(4)),
        head_dim=head_dim,
    )


def visible(model: EMOv2, seed: int) -> EMOv2:
    """Weights that show in the maps: a fresh layer scale of 1e-6 hides the branches."""
    generator = torch.Generator().manual_seed(seed)
    for name, tensor in model.state_dict().items():
        if name.endswith('num_batches_tracked'):
            continue
        tensor.copy_(torch.randn(tensor.shape, generator=generator, dtype=tensor.dtype) / 3)
        if name.endswith(('running_var', 'layer_scale')) or ('norm' in name and name.endswith('weight')):
            tensor.abs_().add_(0.5)
    return model


@given(
    arch=archs(),
    size=st.tuples(st.integers(1, 90), st.integers(1, 90)),
    batch=st.integers(1, 3),
    window=st.integers(1, 9),
    indices=st.sets(st.integers(0, 3), min_size=1),
    final_norm=st.booleans(),
    seed=st.integers(0, 99),
)
def test_maps_are_those_of_the_plain_network(
    arch: dict[str, Any],
    size: tuple[int, int],
    batch: int,
    window: int,
    indices: set[int],
    final_norm: bool,
    seed: int,
) -> None:
    kwargs = dict(window_size=window, final_norm=final_norm)
    whole = visible(EMOv2(arch, **kwargs).double(), seed).eval()
    plain = plain_emov2.PlainEMOv2(arch, **kwargs).double().eval()
    plain_emov2.copy_weights(whole, plain)
    indices = sorted(indices)
    model = (
        EMOv2(arch, out_indices=indices, **dict(kwargs, final_norm=final_norm and 3 in indices))
        .double()
        .eval()
    )
    model.load_state_dict(
        {name: tensor for name, tensor in whole.state_dict().items() if name in model.state_dict()}
    )
    x = torch.randn(batch, 3, *size, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    with torch.no_grad():
        expected = plain(x)
        for _ in range(2):  # as it is, and deployed
            maps = model(x)
            assert len(maps) == len(indices)
            for i, found in zip(indices, maps):
                sides = (-(-side // (4 << i)) for side in size)
                assert found.shape == (batch, arch['channels'][i], *sides)
                torch.testing.assert_close(found, expected[i], rtol=1e-7, atol=1e-9)
                assert found.isfinite().all()
            model.switch_to_deploy()


@given(
    arch=archs(),
    indices=st.sets(st.integers(0, 3), min_size=1).map(sorted),
    frozen=st.integers(-1, 4),
    window=st.integers(1, 5),
    rate=st.floats(0, 0.9),
)
def test_trains_what_is_not_frozen(
    arch: dict[str, Any], indices: list[int], frozen: int, window: int, rate: float
) -> None:
    frozen = min(frozen, indices[-1] + 1)
    model = EMOv2(arch, out_indices=indices, frozen_stages=frozen, window_size=window, drop_path_rate=rate)
    model.train()
    assert len(model(torch.randn(2, 3, 40, 33))) == len(indices)
    for name, parameter in model.named_parameters():
        stage = int(name.split('.')[1]) + 1 if name.startswith('stages.') else 0
        assert parameter.requires_grad == (stage > frozen), name


@given(
    indices=st.lists(st.integers(-1, 5), max_size=4),
    frozen=st.integers(-2, 5),
    window=st.integers(-1, 3),
    rate=st.floats(-0.5, 1.5),
)
def test_options_out_of_range(indices: list[int], frozen: int, window: int, rate: float) -> None:
    rising = bool(indices) and indices == sorted(set(indices)) and indices[0] >= 0 and indices[-1] <= 3
    assume(not (rising and -1 <= frozen <= indices[-1] + 1 and window > 0 and 0 <= rate < 1))
    kwargs = dict(out_indices=indices, frozen_stages=frozen, window_size=window, drop_path_rate=rate)
    with pytest.raises(ValueError, match=rf'^({"|".join(kwargs)}) is '):
        EMOv2('1m', **kwargs)


@given(key=st.sampled_from(['depths', 'channels', 'expand_ratios', 'head_dim']), arch=archs(), data=st.data())
def test_arch_that_cannot_be(key: str, arch: dict[str, Any], data: st.DataObject) -> None:
    if key == 'head_dim':
        arch[key] = data.draw(st.integers(-3, 0))
    else:
        wrong = data.draw(st.sampled_from(['three', 'five', 'zero']))
        values = arch[key]
        arch[key] = {'three': values[:3], 'five': (*values, 1), 'zero': (0, *values[1:])}[wrong]
    with pytest.raises(ValueError, match='^(arch|a stage of)'):
        EMOv2(arch)
