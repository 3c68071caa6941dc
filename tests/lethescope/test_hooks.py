"""Tests of reading and replacing block outputs, and of the streaming moments."""

import itertools
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from lethescope.hooks import Moments, capturing, resuming, state, swapped, watching

IDS = torch.tensor([[1, 5, 6, 7, 8], [1, 9, 10, 11, 12]])
KINDS = ("llama", "gpt2", "neox")


def counted(blocks: Any) -> tuple[list[int], list[Any]]:
    """Count how often the inside of each block runs; a block's own hooks fire even where its inside is skipped."""
    counts = [0] * len(blocks)

    def count(layer: int) -> Any:
        def fire(*_: Any) -> None:
            counts[layer] += 1

        return fire

    inside = [next(m for name, m in b.named_children() if "mlp" in name) for b in blocks]
    return counts, [m.register_forward_hook(count(i)) for i, m in enumerate(inside)]


@pytest.mark.parametrize("kind", KINDS)
def test_capture_agrees_with_the_models_own_hidden_states(make_model: Any, kind: str) -> None:
    model = make_model(kind)
    with capturing(model.blocks) as seen, torch.no_grad():
        out = model.module(input_ids=IDS, output_hidden_states=True)
    for layer in range(len(model.blocks) - 1):  # the last one is given after the final norm
        torch.testing.assert_close(seen[layer], out.hidden_states[layer + 1], rtol=0, atol=0)
    torch.testing.assert_close(model.decode(seen[len(model.blocks) - 1]), out.logits)


@pytest.mark.parametrize("kind", KINDS)
def test_resuming_from_its_own_state_gives_the_same_and_runs_only_the_blocks_above(make_model: Any, kind: str) -> None:
    model = make_model(kind)
    with capturing(model.blocks) as seen, torch.no_grad():
        plain = model.module(input_ids=IDS).logits
    counts, handles = counted(model.blocks)
    for layer in range(len(model.blocks)):
        counts[:] = [0] * len(counts)
        with resuming(model.blocks, layer, seen[layer]), torch.no_grad():
            again = model.module(input_ids=IDS).logits
        assert counts == [int(i > layer) for i in range(len(counts))]
        torch.testing.assert_close(again, plain, rtol=0, atol=1e-5)
    counts[:] = [0] * len(counts)
    with torch.no_grad():
        torch.testing.assert_close(model.module(input_ids=IDS).logits, plain, rtol=0, atol=0)
    assert counts == [1] * len(counts)
    for handle in handles:
        handle.remove()


def test_resuming_uses_the_state_it_is_given(make_model: Any) -> None:
    model = make_model()
    last = len(model.blocks) - 1
    value = torch.randn(2, 5, 32, generator=torch.Generator().manual_seed(0))
    with resuming(model.blocks, last, value), torch.no_grad():
        found = model.module(input_ids=IDS).logits
    torch.testing.assert_close(found, model.decode(value))


def test_an_exception_leaves_no_trace(make_model: Any) -> None:
    model = make_model()

    def boom(*_: Any) -> None:
        raise RuntimeError("boom")

    with pytest.raises(RuntimeError, match="boom"), resuming(model.blocks, 1, torch.zeros(2, 5, 32)):
        raise RuntimeError("boom")
    with pytest.raises(RuntimeError, match="boom"), watching(dict(enumerate(model.blocks)), boom):
        model.module(input_ids=IDS)
    assert all("forward" not in vars(block) and not block._forward_hooks for block in model.blocks)


def test_what_was_swapped_before_comes_back() -> None:
    module = nn.Linear(2, 2)
    with swapped({module: lambda x: x + 1}):
        with swapped({module: lambda x: x + 2}):
            assert module(torch.zeros(1)).item() == 2
        assert module(torch.zeros(1)).item() == 1
    assert "forward" not in vars(module)


@pytest.mark.parametrize("kind", KINDS)
def test_stop_ends_the_pass_after_the_last_block_that_is_watched(make_model: Any, kind: str) -> None:
    model = make_model(kind)
    counts, handles = counted(model.blocks)
    seen = []
    with watching({0: model.blocks[0], 1: model.blocks[1]}, lambda layer, _: seen.append(layer), stop=True):
        model.module(input_ids=IDS)
        seen.append(-1)  # never reached: the pass was ended
    assert seen == [0, 1]
    assert counts == [1, 1] + [0] * (len(counts) - 2)
    for handle in handles:
        handle.remove()


def test_the_state_is_the_first_of_a_tuple() -> None:
    x = torch.zeros(1)
    assert state(x) is x and state((x, None)) is x


@settings(deadline=None)
@given(
    cuts=st.lists(st.integers(0, 40), max_size=6),
    seed=st.integers(0, 99),
    offset=st.sampled_from([0.0, 300.0]),
    dtype=st.sampled_from([torch.float32, torch.float64]),
)
def test_moments_equal_numpys_however_the_tokens_arrive(
    cuts: list[int], seed: int, offset: float, dtype: torch.dtype
) -> None:
    rng = np.random.default_rng(seed)
    x = torch.tensor(rng.normal(offset, 1, (40, 3)) @ rng.normal(size=(3, 3)), dtype=dtype)
    y = torch.tensor(rng.normal(-offset, 2, (40, 2)), dtype=dtype) + x[:, :2]
    moments = Moments(3, 2)
    edges = [0, *sorted(cuts), 40]
    for start, stop in itertools.pairwise(edges):
        moments.update(x[start:stop], y[start:stop])
    whole = np.cov(np.concatenate([x.double().numpy(), y.double().numpy()], 1), rowvar=False)
    assert moments.count == 40
    np.testing.assert_allclose(moments.mean(), x.double().mean(0), rtol=1e-6, atol=1e-5)
    np.testing.assert_allclose(moments.covariance(), whole[:3, :3], rtol=1e-3, atol=1e-4)
    np.testing.assert_allclose(moments.cross_covariance(), whole[:3, 3:], rtol=1e-3, atol=1e-4)


def test_moments_of_half_precision_states_are_summed_in_full_precision() -> None:
    x = torch.randn(4000, 2, generator=torch.Generator().manual_seed(0)).bfloat16() + 4
    moments = Moments(2)
    for part in x.split(1000):
        moments.update(part)
    np.testing.assert_allclose(moments.covariance(), np.cov(x.float().numpy(), rowvar=False), rtol=1e-4, atol=1e-4)
