"""Any arch, image and option: the maps are those of the plain network."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers.networks import visible

from emo2_mm import EMOv2

hypothesis = pytest.importorskip('hypothesis')
import plain_emov2  # noqa: E402
from hypothesis import given, settings  # noqa: E402
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
    torch.manual_seed(seed)
    whole = visible(EMOv2(arch, **kwargs)).double().eval()
    plain = plain_emov2.PlainEMOv2(arch, **kwargs).double().eval()
    plain_emov2.copy_weights(whole, plain)
    indices = sorted(indices)
    kwargs['final_norm'] = final_norm and 3 in indices
    model = EMOv2(arch, out_indices=indices, **kwargs).double().eval()
    model.load_state_dict({name: whole.state_dict()[name] for name in model.state_dict()})
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
