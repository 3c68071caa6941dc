"""Tests of channel *patch*: against plain hooks and whole passes, and at both ends of the erased share."""

import numpy as np
import pytest
import torch
import xarray as xr

from lethescope.analyses import patch
from lethescope.facts import of_split
from lethescope.scoring import candidates
from lethescope.tokens import encode

KINDS = ("llama", "gpt2", "neox")


@pytest.fixture(scope="module")
def asked(some_facts):
    """Answers of one and of two words, in prompts of different lengths."""
    return of_split(some_facts, "forget")[:4] + of_split(some_facts, "control")[:4]


def hidden(output):
    return output if torch.is_tensor(output) else output[0]


@torch.no_grad()
def naive(target, source, fact, answer):
    """One whole pass of the target for every layer, with the source's state written over the tail by a plain hook."""
    e = encode(target.tokenizer, fact.prompt, answer)
    ids, at = torch.tensor([e.ids]), slice(e.start - 1, len(e.ids) - 1)
    states: list[torch.Tensor] = []
    hooks = [b.register_forward_hook(lambda _m, _a, out: states.append(hidden(out).clone())) for b in source.blocks]
    source.module(input_ids=ids)
    for hook in hooks:
        hook.remove()
    scores = []
    for block, given in zip(target.blocks, states, strict=True):

        def write(_module, _args, out, given=given):
            patched = hidden(out).clone()
            patched[:, at] = given[:, at]
            return patched if torch.is_tensor(out) else (patched, *out[1:])

        hook = block.register_forward_hook(write)
        log_p = target.module(input_ids=ids).logits[0, at].log_softmax(-1)
        hook.remove()
        scores.append(np.mean([row[t].item() for row, t in zip(log_p, e.answer, strict=True)]))
    return scores


@torch.no_grad()
def plain(model, fact, answer):
    e = encode(model.tokenizer, fact.prompt, answer)
    log_p = model.module(input_ids=torch.tensor([e.ids])).logits[0].log_softmax(-1)
    return np.mean([log_p[i - 1, e.ids[i]].item() for i in range(e.start, len(e.ids))])


@pytest.mark.parametrize("kind", KINDS)
def test_a_models_own_states_change_nothing(make_model, asked, kind):
    model = make_model(kind)
    encoded = candidates(model.tokenizer, asked).encoded
    layers = range(len(model.blocks))
    found = patch._patched(model, encoded, model, encoded, layers)
    want = [plain(model, f, a) for f in asked for a in (f.answer, *f.alternatives)]
    np.testing.assert_allclose(found, np.tile(want, (len(layers), 1)).T, atol=1e-5)
    assert not any("forward" in vars(block) for block in model.blocks)  # nothing is left swapped


@pytest.mark.parametrize("kind", KINDS)
def test_it_equals_one_whole_pass_for_every_layer(make_model, asked, kind):
    original, model = make_model(kind), make_model(kind, seed=1)
    ds = patch.measure(model, asked, original=original)
    forget = of_split(asked, "forget")
    assert ds["fact"].values.tolist() == [f.id for f in forget]
    for i, fact in enumerate(forget):
        for k, answer in enumerate((fact.answer, *fact.alternatives)):
            np.testing.assert_allclose(ds["score"][i, k], naive(original, model, fact, answer), atol=1e-5)
            np.testing.assert_allclose(ds["restored_score"][i, k], naive(model, original, fact, answer), atol=1e-5)


def test_the_number_of_rows_at_a_time_does_not_matter(make_model, asked):
    original, model = make_model(), make_model(seed=1)
    encoded = candidates(original.tokenizer, asked).encoded
    one, three = (patch._patched(original, encoded, model, encoded, [0, 2], rows=n) for n in (256, 3))
    np.testing.assert_allclose(one, three, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_the_erased_share_is_0_for_the_original_and_1_for_the_reference(make_model, asked, kind):
    original, unlearned, reference = (make_model(kind, seed=s) for s in range(3))
    whole, source, none = (patch.measure(m, asked, original=original) for m in (original, unlearned, reference))
    shares = [patch.erased_share(whole, ds, none["score"]) for ds in (whole, source, none)]
    encodes = shares[0]["erased"].notnull()
    assert encodes.any()
    for share in shares:
        assert (share["erased"].notnull() == encodes).all()
        assert ((share["erased"] >= 0) & (share["erased"] <= 1) | ~encodes).all()
        assert (share["depth_score"].notnull() == encodes.any("place")).all()
    for share, want in ((shares[0], 0), (shares[2], 1)):
        for name in ("erased", "depth_score"):
            known = share[name].values[share[name].notnull().values]
            np.testing.assert_allclose(known, want, atol=1e-6)
    assert 0 < shares[1]["depth_score"].mean() < 1


def test_the_depth_score_is_a_weighted_mean_over_encoding_layers():
    def scores(values):
        return xr.DataArray(np.array(values, dtype=float)[:, None], dims=("fact", "candidate", "place"))

    whole = xr.Dataset({"score": scores([[-1, -1, -1, -1], [-1, -1, -1, -1]])})
    null = scores([[-1.04, -2, -4, -9], [-1, -1, -1.04, -0.5]])  # fact 1 is encoded nowhere
    source = xr.Dataset({"score": scores([[-8, -1.5, -1, -12], [-8, -8, -8, -8]])})
    share = patch.erased_share(whole, source, null)
    np.testing.assert_allclose(share["erased"], [[np.nan, 0.5, 0, 1], [np.nan] * 4])
    np.testing.assert_allclose(share["depth_score"], [(1 * 0.5 + 3 * 0 + 8 * 1) / (1 + 3 + 8), np.nan])


def test_null_facts_say_the_same_of_a_control_subject(some_facts):
    forget, control = of_split(some_facts, "forget"), of_split(some_facts, "control")
    subjects = {f.subject for f in control}
    nulls = patch.null_facts(some_facts, seed=0)
    for fact, null in zip(forget, nulls, strict=True):
        assert null is not None
        assert (null.answer, null.alternatives, null.paraphrases) == (fact.answer, fact.alternatives, ())
        assert fact.subject not in null.prompt
        assert null.prompt in {fact.prompt.replace(fact.subject, s) for s in subjects}
    assert nulls == patch.null_facts(some_facts, seed=0)
    assert nulls != patch.null_facts(some_facts, seed=1)


def test_null_facts_where_the_prompt_does_not_name_its_subject(some_facts):
    mute = of_split(some_facts, "forget")[0].model_copy(update={"prompt": "She was born in"})
    control = of_split(some_facts, "control")
    [null] = patch.null_facts((mute, *control), seed=0)
    assert null is not None
    assert null.prompt in {c.prompt for c in control if c.relation == mute.relation}
    assert null.answer == mute.answer
    assert patch.null_facts((mute,), seed=0) == [None]


def test_without_control_facts_there_is_no_null(make_model, some_facts):
    model = make_model()
    ds = patch.measure(model, of_split(some_facts, "forget")[:2], original=model)
    carries = np.array(patch.carrying(model, of_split(some_facts, "forget")[:2]))
    assert ds["null_score"].isel(place=carries).isnull().all()


def test_blocks_below_those_that_carry_the_facts_cannot_testify(make_model, asked, monkeypatch):
    original = make_model()
    monkeypatch.setattr(patch, "carrying", lambda _original, _forget: [False, False, True, True])
    ds = patch.measure(original, asked, original=original)
    below, above = slice(0, 2), slice(2, 4)
    xr.testing.assert_equal(ds["null_score"][..., below], ds["score"][..., below].rename("null_score"))
    assert (abs(ds["null_score"] - ds["score"])[..., above] > 1e-3).all("place").any()
    forget, nulls = of_split(asked, "forget"), patch.null_facts(asked, seed=0)
    source = candidates(original.tokenizer, nulls).encoded  # the null states are the original's own about the others
    table = candidates(original.tokenizer, forget)
    want = table.table(patch._patched(original, table.encoded, original, source, [2, 3]))
    np.testing.assert_allclose(ds["null_score"][..., above], want, atol=1e-6)


def test_a_block_carries_the_facts_from_most_of_the_best_reading_on(make_model, asked, monkeypatch):
    p = np.array([0.25, 0.7, 0.79, 0.99, 0.85])  # of the true answer among four
    score = np.log(np.stack([p, *[(1 - p) / 3] * 3]))[None]
    read = xr.Dataset({"score": (("fact", "candidate", "place"), score)})
    monkeypatch.setattr(patch.lens, "measure", lambda _model, _facts: read)
    assert patch.carrying(make_model(), asked) == [False, False, False, True, True]
