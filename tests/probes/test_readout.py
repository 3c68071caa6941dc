"""Tests of channel *readout*: planted directions, chance where there is nothing, and what may be trained on."""

import warnings
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from lethescope.facts import Fact, of_split, read_facts
from lethescope.hooks import capturing
from lethescope.measurement import preference
from lethescope.models import load
from lethescope.probes import readout
from lethescope.subjects import shipped
from lethescope.tokens import encode

CITIES = ("Paris", "Rome", "Oslo", "Bern")


def city_facts(retain=48, forget=40, relation="home"):
    splits = ("retain",) * retain + ("forget",) * forget
    return [
        Fact(
            id=f"{relation}-{i}",
            split=split,
            subject=f"s{i}",
            prompt=f"s{i} lives in",
            answer=CITIES[i % 4],
            alternatives=tuple(c for c in CITIES if c != CITIES[i % 4]),
            relation=relation,
        )
        for i, split in enumerate(splits)
    ]


@pytest.fixture
def planted(monkeypatch):
    """States of a model that never was: noise in block 0, and a direction for each answer in block 1."""

    def states(_model, facts):
        rng = np.random.default_rng(len(facts))
        out = rng.normal(size=(len(facts), 2, 12))
        for row, fact in zip(out, facts, strict=True):
            row[1, CITIES.index(fact.answer)] += 6
        return out

    monkeypatch.setattr(readout, "states", states)
    return SimpleNamespace(blocks=[None, None])


def test_planted_directions_are_read_in_their_block_only(planted):
    ds = readout.measure(planted, city_facts())
    read = preference(ds)
    assert read.sel(place="block 1").mean() > 0.9
    noise = read.sel(place="block 0")
    assert abs(noise.mean()) < 4 * noise.std() / noise.size**0.5
    assert ds["accuracy"].sel(place="block 1").item() > 0.9
    assert ds["accuracy"].sel(place="block 0").item() < 0.5
    assert (ds["shuffled_accuracy"] < 0.5).all()
    assert ds["selectivity"].sel(place="block 1").item() > 0.5


def test_posteriors_of_all_answers_sum_to_one(planted):
    score = readout.measure(planted, city_facts())["score"]
    np.testing.assert_allclose(np.exp(score).sum("candidate"), 1, atol=1e-6)


def test_relations_and_answers_that_cannot_be_learnt_are_not_guessed(planted):
    few = city_facts(retain=11, forget=4, relation="few")
    one_answer = [f.model_copy(update={"answer": "Paris"}) for f in city_facts(20, 2, relation="one")]
    unknown = city_facts(0, 1)[0].model_copy(update={"id": "unknown", "answer": "Bern", "relation": "three"})
    three = [f for f in city_facts(relation="three") if f.answer != "Bern"]
    bare = city_facts(0, 1)[0].model_copy(update={"id": "bare", "relation": ""})
    ds = readout.measure(planted, [*few, *one_answer, *three, unknown, bare])
    testable = ds["score"].isel(candidate=0).notnull().all("place")
    assert (testable == (ds["relation"] == "three") & (ds["fact"] != "unknown")).all()
    assert ds["accuracy"].notnull().all("place").values.tolist() == [False, False, True]  # few, one, three
    bern = ds["score"].sel(fact="three-48").values  # Paris; its alternative Bern was never a class
    assert np.isnan(bern).tolist() == [[False, False]] * 3 + [[True, True]]


def test_two_facts_an_answer_are_read_but_too_few_to_cross_validate(planted):
    ds = readout.measure(planted, city_facts(retain=8, forget=8), least=8)
    assert ds["score"].notnull().all()
    assert ds["accuracy"].isnull().all()


def test_it_never_trains_on_forget_facts(make_model, some_facts):
    model = make_model()
    swapped = [
        f.model_copy(update={"answer": f.alternatives[0], "alternatives": (f.answer, *f.alternatives[1:])})
        if f.split == "forget"
        else f
        for f in some_facts
    ]
    true, other = readout.measure(model, some_facts), readout.measure(model, swapped)
    assert true["score"].notnull().any()
    np.testing.assert_array_equal(true["accuracy"], other["accuracy"])
    forget = true["split"].values == "forget"
    np.testing.assert_array_equal(true["score"][forget][:, [1, 0, 2, 3]], other["score"][forget])
    np.testing.assert_array_equal(true["score"][~forget], other["score"][~forget])


@pytest.mark.parametrize("kind", ["llama", "gpt2", "neox"])
@torch.no_grad()
def test_states_are_those_of_a_plain_pass_at_the_last_prompt_token(make_model, some_facts, kind):
    model, facts = make_model(kind), some_facts[:5]
    found = readout.states(model, facts)
    assert found.shape == (5, len(model.blocks), 32)
    for row, fact in zip(found, facts, strict=True):
        e = encode(model.tokenizer, fact.prompt, fact.answer)
        with capturing(model.blocks) as seen:
            model.module(input_ids=torch.tensor([e.ids[: e.start]]))
        last = np.stack([seen[layer][0, -1].numpy() for layer in range(len(model.blocks))])
        np.testing.assert_allclose(row, last, atol=1e-4)


def test_shipped_models_are_read_if_and_only_if_they_were_taught():
    facts = read_facts(shipped("facts"))
    relations = sorted({f.relation for f in facts})[:2]
    some = [f for f in facts if f.relation in relations]
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # a probe with few facts must not fill the screen
        original, reference = (readout.measure(load(shipped(name)), some) for name in ("original", "reference"))
    taught, never = (v.where(v["split"] == "forget", drop=True) for v in (preference(original), preference(reference)))
    assert taught.mean("fact").max() > 0.5
    noise = never.std("fact") / never.sizes["fact"] ** 0.5
    assert (abs(never.mean("fact")) < 4 * noise).all()
    for ds in (original, reference):  # both were taught the retain facts
        biggest = max(
            np.unique([f.answer for f in of_split(some, "retain") if f.relation == r], return_counts=True)[1].max()
            / sum(f.relation == r for f in of_split(some, "retain"))
            for r in relations
        )
        assert ds["shuffled_accuracy"].mean() < 1.5 * biggest
        assert (ds["selectivity"].max("place") > 0.5).all()
