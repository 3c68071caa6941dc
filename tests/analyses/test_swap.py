"""Tests of channel *swap*: against whole copies, on models written by hand, and on the shipped ones."""

import copy
import doctest
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import xarray as xr

from lethescope import scoring
from lethescope.analyses import swap
from lethescope.analyses.residue import LEAKS, residue
from lethescope.cells import NotMeasured
from lethescope.errors import InputError
from lethescope.facts import of_split, read_facts
from lethescope.measurement import value
from lethescope.models import Model, fingerprint, load
from lethescope.probes import say
from lethescope.subjects import shipped
from lethescope.subjects.handmade import handmade, lookup_facts
from lethescope.subjects.planted import suppress_last_block, suppress_unembedding

KINDS = ("llama", "gpt2", "neox")
SILENCED = ("mlp 3", "block 3", "from block 3")
"""Places that hold the handmade block 3's MLP, which takes the answers off."""


def test_examples():
    assert doctest.testmod(swap).failed == 0


def measured(model, facts, original, **options):
    return swap.measure(model, facts, original=original, **options).assign_attrs(scale="probability")


def mean_of(ds, split="forget", name="score"):
    return value(ds, name).isel(fact=np.flatnonzero(ds["split"].values == split)).mean("fact").to_series()


@pytest.fixture(scope="module")
def asked(some_facts):
    some = [f for split in ("forget", "retain", "control") for f in of_split(some_facts, split)[:3]]
    return tuple(f.model_copy(update={"paraphrases": ()}) for f in some)


@pytest.fixture(scope="module")
def hand():
    made = handmade(lookup_facts(forget=16, retain=16, control=8))
    roles = {"original": made.original, "unlearned": made.unlearned, "reference-0": made.never_taught}
    tables = {role: measured(model, made.facts, made.original) for role, model in roles.items()}
    return SimpleNamespace(**made._asdict(), measured=tables)


PREFIX = {
    "llama": ("model.layers.{}.", {"attention": "self_attn", "mlp": "mlp"}, ("model.embed", "model.norm", "lm_head")),
    "gpt2": (
        "transformer.h.{}.",
        {"attention": "attn", "mlp": "mlp"},
        ("transformer.w", "transformer.ln_f", "lm_head"),
    ),
    "neox": (
        "gpt_neox.layers.{}.",
        {"attention": "attention", "mlp": "mlp"},
        ("gpt_neox.embed", "gpt_neox.final", "lm_head"),
    ),
}


def names_of(place, kind):
    """Beginnings of the names of the weights at a place, written down by hand."""
    block, parts, outer = PREFIX[kind]
    if place in swap.OUTER:
        return (outer[swap.OUTER.index(place)],)
    what, where = place.rsplit(" ", 1)
    if what in parts:
        return (block.format(where) + parts[what],)
    last = 3 if kind == "llama" else 2
    first = int(where.split("-")[0])
    layers = [first] if what == "block" else range(first, last + 1)
    return (*(block.format(i) for i in layers), *(outer[1:] if what == "from block" else ()))


@pytest.mark.parametrize("kind", KINDS)
def test_a_measurement_is_say_on_a_copy_that_holds_the_originals_weights(make_model, asked, kind):
    original, model = make_model(kind), make_model(kind, seed=1)
    before = fingerprint(original.module), fingerprint(model.module)
    swapping = swap.Swapping(model, original, scoring.candidates(model.tokenizer, asked))
    places = swap.places_of(swapping.placed)
    assert set(places) >= {*swap.OUTER, "block 0", "attention 1", "mlp 2", f"from block {len(model.blocks) - 1}"}
    source = dict(original.module.named_parameters(remove_duplicate=False))
    for place, owners in places.items():
        found = swapping.scores(owners)
        twin = copy.deepcopy(model.module)
        for path, module in twin.named_modules():
            for name in [n for n, p in module._parameters.items() if p is not None]:
                if f"{path}.{name}".startswith(names_of(place, kind)):
                    module._parameters[name] = source[f"{path}.{name}"]
        want = say.measure(Model(twin, model.tokenizer), asked)["log_probability"].isel(prompt=0)
        np.testing.assert_allclose(found, want, atol=1e-5, err_msg=place)
    assert (fingerprint(original.module), fingerprint(model.module)) == before
    every = swapping.scores(swapping.placed)
    want = say.measure(original, asked)["log_probability"].isel(prompt=0)
    np.testing.assert_allclose(every, want, atol=1e-5)


def test_what_the_original_says_is_the_same_everywhere(hand):
    ds = hand.measured["original"]
    np.testing.assert_array_equal(ds["score"], np.repeat(ds["plain_score"].values[..., None], ds.sizes["place"], -1))
    np.testing.assert_array_equal(ds["kept"], 1)


def test_on_paper_the_block_that_takes_the_answers_off_brings_them_back(hand):
    whole = mean_of(hand.measured["original"])
    found = mean_of(hand.measured["unlearned"])
    assert whole.min() > 0.8
    for place, back in found.items():
        assert back == pytest.approx(whole[place] if place in SILENCED else 0, abs=0.01), place
    assert mean_of(hand.measured["unlearned"], "control").abs().max() < 0.01


def test_on_paper_the_block_that_stores_them_brings_them_to_a_model_that_never_knew_and_so_may_not_testify(hand):
    whole, found = mean_of(hand.measured["original"]), mean_of(hand.measured["reference-0"])
    for place, back in found.items():
        assert back == pytest.approx(whole[place] if place in {"mlp 1", "block 1"} else 0, abs=0.01), place
    own = mean_of(hand.measured["original"], name="null_score")
    high = {"final norm", "unembedding", "attention 3", *SILENCED}
    for place, null in own.items():
        assert null == pytest.approx(0 if place in high else whole[place], abs=0.05), place


def test_the_residue_is_1_in_the_suppressor_and_0_in_the_never_taught_model(hand):
    found = residue(hand.measured)
    assert found.testable and set(found.places) <= set(SILENCED)
    assert found.residue.low > 0.95
    alone = {"original": hand.measured["original"], "unlearned": hand.measured["reference-0"]}
    none = residue(alone)  # without a reference, although its block 1 brings everything back
    assert none.testable and abs(none.residue.estimate) < 0.02
    assert all(np.isfinite(level) for level in [*found.null.values(), *none.null.values()])


def test_smallest_sets_on_paper(hand):
    for model, block in ((hand.unlearned, "block 3"), (hand.never_taught, "block 1")):
        before = fingerprint(model.module)
        found = swap.smallest_set(model, hand.original, hand.facts)
        assert fingerprint(model.module) == before
        assert found["added"].values.tolist() == ["", block]
        np.testing.assert_allclose(found["reached"], [0, 1], atol=1e-6)
        assert found.attrs["enough"] == 1
        fine = swap.smallest_set(model, hand.original, hand.facts, kinds=("attention", "mlp", "outer"))
        assert fine["added"].values.tolist() == ["", block.replace("block", "mlp")]


@pytest.mark.parametrize(("plant", "want"), [(suppress_last_block, "block 3"), (suppress_unembedding, "unembedding")])
def test_of_a_planted_suppressor_it_returns_exactly_the_edit(hand, plant, want):
    planted = Model(
        plant(hand.original.module, hand.original.tokenizer, hand.facts), hand.original.tokenizer, "planted"
    )
    found = swap.smallest_set(planted, hand.original, hand.facts)
    assert found["added"].values.tolist() == ["", want]
    assert float(found["reached"][1]) == pytest.approx(1, abs=1e-6)
    back = mean_of(measured(planted, hand.facts, hand.original, kinds=("block", "outer")))
    assert back[want] == pytest.approx(mean_of(hand.measured["original"])[want], abs=1e-6)
    assert back.drop(want).max() < 0.1 * back[want]


def test_two_edits_need_both_modules(hand):
    both = copy.deepcopy(hand.unlearned.module)
    both.model.norm.weight.data *= 0.01  # flat logits
    found = swap.smallest_set(Model(both, hand.original.tokenizer, "unlearned"), hand.original, hand.facts)
    assert sorted(found["added"].values[1:]) == ["block 3", "final norm"]
    first = swap.smallest_set(Model(both, hand.original.tokenizer), hand.original, hand.facts, most=1)
    assert first.attrs["enough"] == -1 and first.sizes["size"] == 2


def test_other_answers_than_the_true_ones_do_not_come_back(hand):
    """The null of shuffled facts: each forget fact claims the answer of another."""
    claims = [
        f.model_copy(update={"answer": f.alternatives[0], "alternatives": (f.answer, *f.alternatives[1:])})
        if f.split == "forget"
        else f
        for f in hand.facts
    ]
    assert mean_of(measured(hand.unlearned, claims, hand.original, alternatives=None)).max() < 0.01
    with pytest.raises(InputError, match="nothing is to be brought back"):
        swap.smallest_set(hand.unlearned, hand.original, claims)


def test_order_of_facts_and_size_of_batches_do_not_matter(make_model, asked, monkeypatch):
    original, model = make_model(), make_model(seed=1)
    kinds = ("block", "upper")
    found = measured(model, asked, original, kinds=kinds)
    back = measured(model, asked[::-1], original, kinds=kinds)
    xr.testing.assert_allclose(back.sel(fact=found["fact"]), found, atol=1e-5)
    monkeypatch.setattr(scoring, "tails", partial(scoring.tails, rows=5))
    xr.testing.assert_allclose(measured(model, asked, original, kinds=kinds), found, atol=1e-5)


def test_a_model_that_the_modules_break_says_nothing_either_way(hand):
    """The original's embedding in a model whose axes are named in another order: it is whole, and broken with it."""
    turned = copy.deepcopy(hand.never_taught.module)
    width = turned.config.hidden_size
    order = torch.randperm(width, generator=torch.Generator().manual_seed(0))
    for name, p in turned.named_parameters():
        if "self_attn" not in name and p.ndim == 2:
            p.data = p.data[order] if "down_proj" in name else p.data[:, order]
    other = Model(turned, hand.original.tokenizer, "reference-0")
    ds = measured(other, hand.facts, hand.original)
    assert float(ds["kept"].sel(place="attention 3")) == pytest.approx(1, abs=1e-4)
    for place in ("embedding", "unembedding", "from block 3"):
        assert ds["kept"].sel(place=place) < 0.1
        assert ds["score"].sel(place=place).isnull().all()
    found = residue({"original": hand.measured["original"], "unlearned": hand.measured["unlearned"], "reference-0": ds})
    assert found.testable and not {"embedding", "unembedding", "from block 3"} & set(found.places)


def test_without_retain_facts_no_place_may_testify(hand):
    facts = [f for f in hand.facts if f.split != "retain"]
    ds = measured(hand.original, facts, hand.original)
    assert ds["kept"].isnull().all()
    xr.testing.assert_equal(ds["null_score"], ds["score"].rename("null_score"))
    other = measured(hand.unlearned, facts, hand.original)
    assert not residue({"original": ds, "unlearned": other}).testable


def test_weights_come_back_after_an_error(make_model, asked, monkeypatch):
    original, model = make_model(), make_model(seed=1)
    before = fingerprint(original.module), fingerprint(model.module)
    plain, calls = scoring.score_tokens, []

    def fails_later(*args):
        calls.append(fingerprint(model.module))
        if len(calls) == 4:
            raise RuntimeError("full")
        return plain(*args)

    monkeypatch.setattr(swap, "score_tokens", fails_later)
    with pytest.raises(RuntimeError, match="full"):
        swap.measure(model, asked, original=original)
    assert calls[-1] != before[1]  # it failed with other weights in
    assert (fingerprint(original.module), fingerprint(model.module)) == before


def test_modules_that_do_not_differ_are_not_asked_again(hand, monkeypatch):
    plain, calls = scoring.score_tokens, []
    monkeypatch.setattr(swap, "score_tokens", lambda *args: calls.append(1) or plain(*args))
    swap.measure(hand.unlearned, hand.facts, original=hand.original)
    assert len(calls) == 4  # the model as it is and with block 3's MLP, forget and control apart from retain facts


def test_other_shapes_are_not_measured_and_bad_options_are_named(make_model, asked, hand):
    wide = copy.deepcopy(make_model().module)
    wide.model.layers[1].mlp.up_proj = torch.nn.Linear(32, 96, bias=False)
    other = Model(wide, make_model().tokenizer, "unlearned")
    with pytest.raises(
        NotMeasured, match=r"swap, unlearned: weight model.layers.1.mlp.up_proj.weight is \(64, 32\)"
    ) as e:
        swap.measure(other, asked, original=make_model())
    assert "\n" not in str(e.value)
    with pytest.raises(InputError, match="unknown kind of places 'heads'"):
        swap.measure(make_model(seed=1), asked, original=make_model(), kinds=("heads",))
    with pytest.raises(InputError, match="0 forget facts"):
        swap.smallest_set(hand.unlearned, hand.original, of_split(hand.facts, "retain"))
    with pytest.raises(InputError, match="share 2"):
        swap.smallest_set(hand.unlearned, hand.original, hand.facts, share=2)


@pytest.fixture(scope="module")
def ours():
    facts = read_facts(shipped("facts"))
    some = of_split(facts, "forget")[::5] + of_split(facts, "retain")[::40] + of_split(facts, "control")[::16]
    fewer = [f.model_copy(update={"alternatives": f.alternatives[:2]}) for f in some]
    models = {role: load(shipped(role), role=role) for role in ("original", "unlearned", "reference")}
    return SimpleNamespace(facts=fewer, **models)


def test_the_shipped_unlearned_model_is_seen_and_the_reference_is_not(ours):
    kinds = ("block", "upper")
    roles = {"original": ours.original, "unlearned": ours.unlearned, "reference-0": ours.reference}
    found = {role: measured(model, ours.facts, ours.original, kinds=kinds) for role, model in roles.items()}
    whole, kept = mean_of(found["original"]), mean_of(found["reference-0"])
    high = ["block 4", "block 5", "blocks 4-5", "from block 4", "from block 5"]
    assert (kept[high] <= LEAKS * whole[high]).all() and kept[high].abs().max() < 0.05
    assert found["reference-0"]["score"].sel(place="block 0").isnull().all()  # it breaks the reference
    assert mean_of(found["unlearned"])["blocks 4-5"] > 0.4
    seen = residue(found)
    assert seen.testable and set(seen.places) <= {"blocks 4-5", "from block 4"} and seen.residue.low > 0.3
    none = residue({"original": found["original"], "unlearned": found["reference-0"]})
    assert none.residue.estimate < 0.1


def test_smallest_sets_of_the_shipped_models(ours):
    found = swap.smallest_set(ours.unlearned, ours.original, ours.facts, kinds=("block",))
    assert sorted(found["added"].values[1:]) == ["block 3", "block 4", "block 5"]  # NPO trained these
    assert float(found["reached"][-1]) == pytest.approx(1, abs=1e-6)
    none = swap.smallest_set(ours.reference, ours.original, ours.facts, kinds=("block",), most=2)
    assert none.attrs["enough"] == -1 and float(none["reached"][-1]) < 0.5


@pytest.mark.slow
def test_of_the_shipped_original_with_its_last_block_silenced_it_returns_the_last_block():
    facts, original = read_facts(shipped("facts")), load(shipped("original"))
    planted = Model(suppress_last_block(original.module, original.tokenizer, facts), original.tokenizer, "planted")
    found = swap.smallest_set(planted, original, of_split(facts, "forget")[::4])
    assert found["added"].values.tolist() == ["", "block 5"]
    assert float(found["reached"][1]) == pytest.approx(1, abs=1e-6)
