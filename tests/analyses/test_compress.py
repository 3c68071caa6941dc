"""Tests of channel *compress*: against loops over single weights, and that nothing stays changed."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lethescope.analyses import compress
from lethescope.facts import of_split
from lethescope.models import fingerprint
from lethescope.probes import say

KINDS = ("llama", "gpt2", "neox")


def weights(seed, rows=3, columns=8):
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def asked(some_facts):
    return of_split(some_facts, "forget")[:3] + of_split(some_facts, "control")[:1]


@given(seed=st.integers(0, 10**6), bits=st.integers(2, 8), group=st.sampled_from([2, 4, 8, 3]))
@settings(max_examples=30, deadline=None)
def test_rounding_equals_a_loop_over_weights(seed, bits, group):
    weight = weights(seed)
    found = compress.round_to_nearest(weight, bits, group)
    size = group if 8 % group == 0 else 8  # a group that does not divide the inputs: one for all of them
    for row in range(3):
        for start in range(0, 8, size):
            members = weight[row, start : start + size].tolist()
            step = max(abs(w) for w in members) / (2 ** (bits - 1) - 1)
            for w, got in zip(members, found[row, start : start + size].tolist(), strict=True):
                level = round(got / step)
                assert got == pytest.approx(level * step, abs=1e-5)  # on the grid
                assert abs(level) <= 2 ** (bits - 1) - 1
                assert abs(w - got) <= step / 2 + 1e-6  # and the nearest point of it
            assert len(set(found[row, start : start + size].tolist())) <= 2**bits - 1


def test_rounding_by_hand():
    weight = torch.tensor([[3.0, 1.4, -0.4, -3.0], [30.0, 14.0, -4.0, 0.0]])
    want = torch.tensor([[3.0, 1.0, 0.0, -3.0], [30.0, 10.0, 0.0, 0.0]])
    torch.testing.assert_close(compress.round_to_nearest(weight, 3, 4), want)
    torch.testing.assert_close(compress.round_to_nearest(torch.zeros(2, 4), 3, 4), torch.zeros(2, 4))


@given(seed=st.integers(0, 10**6), percent=st.integers(0, 100))
@settings(max_examples=30, deadline=None)
def test_pruning_takes_exactly_the_smallest_share(seed, percent):
    weight = weights(seed)
    found = compress.prune(weight, percent / 100)
    gone = found == 0
    assert gone.sum() == math.floor(percent / 100 * weight.numel())
    assert (found == weight)[~gone].all()
    if gone.any() and not gone.all():
        assert weight[gone].abs().max() <= weight[~gone].abs().min()


def test_pruning_takes_the_share_even_where_weights_are_equal():
    assert (compress.prune(torch.ones(4, 5), 0.3) == 0).sum() == 6


@pytest.mark.parametrize("kind", KINDS)
def test_every_matrix_of_the_blocks_is_changed_and_nothing_else(make_model, kind):
    model = make_model(kind)
    before = {name: p.clone() for name, p in model.module.named_parameters()}
    with compress.compressed(model, torch.zeros_like):
        for name, p in model.module.named_parameters():
            inside = any(part in name for part in ("layers.", ".h.")) and p.ndim == 2
            assert torch.equal(p, torch.zeros_like(p) if inside else before[name]), name
    assert all(torch.equal(p, before[name]) for name, p in model.module.named_parameters())


def test_groups_are_inputs_of_one_output_in_conv1d_too(make_model):
    model, before = make_model("gpt2"), make_model("gpt2")
    with compress.compressed(model, compress.compressor("int3", 8)):
        for block, old in zip(model.blocks, before.blocks, strict=True):
            for name in ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"):
                kept, found = (b.get_submodule(name).weight for b in (old, block))  # (in, out)
                assert torch.equal(found.T, compress.round_to_nearest(kept.T, 3, 8))


def test_the_weights_come_back_after_an_error(make_model):
    model = make_model()
    before = fingerprint(model.module)
    with pytest.raises(RuntimeError, match="full"), compress.compressed(model, lambda w: compress.prune(w, 0.5)):
        assert fingerprint(model.module) != before
        raise RuntimeError("full")
    assert fingerprint(model.module) == before
    calls = []

    def fails_later(weight):
        calls.append(weight)
        if len(calls) == 3:
            raise RuntimeError("full")
        return weight * 0

    with pytest.raises(RuntimeError, match="full"), compress.compressed(model, fails_later):
        pass
    assert fingerprint(model.module) == before


@pytest.mark.parametrize("kind", KINDS)
def test_a_measurement_is_say_on_the_compressed_model(make_model, asked, kind):
    model = make_model(kind)
    before = fingerprint(model.module)
    ds = compress.measure(model, asked, settings=("int3", "prune 50%"), group=16)
    assert fingerprint(model.module) == before
    assert ds["place"].values.tolist() == ["int3", "prune 50%"]
    changes = (lambda w: compress.round_to_nearest(w, 3, 16)), (lambda w: compress.prune(w, 0.5))
    for column, change in enumerate(changes):
        with compress.compressed(model, change):
            said = say.measure(model, asked)["log_probability"].isel(prompt=0)
        np.testing.assert_allclose(ds["score"][:, :, column], said, atol=1e-4)


def test_16_bits_change_nothing_visible_and_3_bits_do(make_model, asked):
    model = make_model()
    plain = say.measure(model, asked)["log_probability"].isel(prompt=0)
    ds = compress.measure(model, asked, settings=("int16", "int3"))
    np.testing.assert_allclose(ds["score"].sel(place="int16"), plain, atol=5e-3)
    assert abs(ds["score"].sel(place="int3") - plain).max() > 0.1


def test_the_best_prompt_counts(make_model, asked):
    model = make_model()
    uneven = [f.model_copy(update={"paraphrases": f.paraphrases[:i]}) for i, f in enumerate(asked[:3])]
    best = compress.measure(model, uneven, settings=("int4",), prompts=3)["score"][:, :, 0]
    for i, fact in enumerate(uneven):
        asks = [fact.model_copy(update={"prompt": p}) for p in (fact.prompt, *fact.paraphrases)]
        each = compress.measure(model, asks, settings=("int4",))["score"][:, :, 0]
        np.testing.assert_allclose(best[i], each.max("fact"), atol=1e-5)


def test_nf4_is_near_and_on_few_levels():
    pytest.importorskip("bitsandbytes")
    weight = weights(0, 4, 64)
    found = compress.nf4(weight)
    assert all(len(row.unique()) <= 16 for row in found)
    assert (found - weight).abs().max() < 0.2 * weight.abs().max()
