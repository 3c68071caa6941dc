"""Tests of channel *relearn*: nothing held out is ever trained on, and the user's model stays as it was."""

import copy

import numpy as np
import pytest
import torch

from lethescope.analyses import relearn
from lethescope.facts import of_split
from lethescope.models import fingerprint
from lethescope.tokens import encode

SHORT = {"rates": (1e-3,), "steps": (1, 3), "batch_size": 4}


@pytest.fixture(scope="module")
def asked(some_facts):
    """Four forget and three control people, two facts on each, and retain facts that nobody asked for."""
    return of_split(some_facts, "forget")[:8] + of_split(some_facts, "control")[:6] + of_split(some_facts, "retain")[:2]


@pytest.fixture
def spied(monkeypatch):
    """Everything that is trained on and examined, in order: ("train" or "exam", id of the copy, sequences)."""
    log, kept = [], []
    loss, answers = relearn.answer_loss, relearn._answers

    def train(module, batch):
        kept.append(module)  # alive, so that no id is given twice
        rows = [tuple(i[m.bool()].tolist()) for i, m in zip(batch.input_ids, batch.attention_mask, strict=True)]
        log.append(("train", id(module), rows))
        return loss(module, batch)

    def exam(model, encoded):
        log.append(("exam", id(model.module), [e.ids for e in encoded]))
        return answers(model, encoded)

    monkeypatch.setattr(relearn, "answer_loss", train)
    monkeypatch.setattr(relearn, "_answers", exam)
    return log


@pytest.mark.parametrize("methods", [("full",), ("full", "lora")])
def test_held_out_subjects_are_never_trained_on(make_model, asked, spied, methods):
    model = make_model()
    of = {}
    for fact in asked:
        for answer in (fact.answer, *fact.alternatives):
            of[encode(model.tokenizer, fact.prompt, answer).ids] = fact
    true = {encode(model.tokenizer, f.prompt, f.answer).ids for f in asked}
    ds = relearn.measure(model, asked, methods=methods, **SHORT)
    taught, examined = {}, []
    for kind, module, rows in spied:
        if kind == "train":
            assert set(rows) <= true  # no alternative is ever taught
            assert len(rows) <= 4
            taught.setdefault(module, set()).update(of[r].subject for r in rows)
        elif module != id(model.module):
            seen = {of[r].subject for r in rows}
            assert not seen & taught[module]
            assert {of[r].split for r in rows} == {
                f.split for f in asked if f.subject in taught[module]
            }  # forget facts are held against forget facts, control facts against control facts
            examined += [of[r].id for r in rows if r in true]
    places = 2 * len(methods)
    probed = [f.id for f in asked if f.split != "retain"]
    assert sorted(examined) == sorted(probed * places)
    assert len(taught) == 4 * len(methods)
    there = ds["score"].isel(candidate=0).notnull()
    assert (there == (ds["split"] != "retain")).all()
    assert ds["before"].isel(candidate=0).notnull().all()


@pytest.mark.parametrize("kind", ["llama", "gpt2", "neox"])
def test_the_users_model_is_unchanged(make_model, asked, kind):
    model = make_model(kind)
    before, names = fingerprint(model.module), list(model.module.state_dict())
    state = torch.get_rng_state()
    ds = relearn.measure(model, asked[:10], methods=("full", "lora"), **SHORT)
    assert fingerprint(model.module) == before
    assert list(model.module.state_dict()) == names
    assert not any(p.requires_grad or p.grad is not None for p in model.module.parameters())
    assert not model.module.training
    assert torch.equal(torch.get_rng_state(), state)
    places = [f"{method} 0.001 step {step}" for method in ("full", "lora") for step in (1, 3)]
    assert ds["place"].values.tolist() == places
    moved = abs(ds["score"] - ds["before"]).max(("fact", "candidate"))
    assert (moved > 1e-4).all()  # every copy did learn something


def test_lora_trains_the_adapter_only(make_model):
    own = relearn._trainable(make_model().module, "lora", 2, 0)
    trained = {name: tuple(p.shape) for name, p in own.named_parameters() if p.requires_grad}
    assert trained
    assert all("lora_" in name and 2 in shape for name, shape in trained.items())
    full = relearn._trainable(make_model().module, "full", 2, 0)
    assert all(p.requires_grad for p in full.parameters())


def test_the_same_seed_gives_the_same_numbers(make_model, asked):
    runs = [
        relearn.measure(make_model(), asked, methods=("full", "lora"), seed=seed, **SHORT)["score"]
        for seed in (0, 0, 1)
    ]
    np.testing.assert_array_equal(runs[0], runs[1])
    assert abs(runs[0] - runs[2]).max() > 1e-4


@torch.no_grad()
def said(module, tokenizer, fact):
    e = encode(tokenizer, fact.prompt, fact.answer)
    log_p = module(input_ids=torch.tensor([e.ids])).logits[0].log_softmax(-1)
    return np.mean([log_p[i - 1, e.ids[i]].item() for i in range(e.start, len(e.ids))])


def test_it_equals_adam_steps_written_out(make_model, asked):
    model, forget = make_model(), of_split(asked, "forget")
    ds = relearn.measure(model, forget, rates=(1e-3,), steps=(1, 2), batch_size=100)
    for train, test in relearn.halves(forget, 0):
        module = copy.deepcopy(model.module).requires_grad_(True)
        adam = torch.optim.Adam(module.parameters(), lr=1e-3)
        for column in range(2):
            losses = []
            for e in (encode(model.tokenizer, forget[i].prompt, forget[i].answer) for i in train):
                log_p = module(input_ids=torch.tensor([e.ids])).logits[0].log_softmax(-1)
                losses += [-log_p[i - 1, e.ids[i]] for i in range(e.start, len(e.ids))]
            adam.zero_grad()
            torch.stack(losses).mean().backward()
            adam.step()
            want = [said(module, model.tokenizer, forget[i]) for i in test]
            np.testing.assert_allclose(ds["score"][test, 0, column], want, atol=2e-3)


def test_training_teaches_what_is_taught(make_model, asked):
    model = make_model()
    learner = relearn.Model(relearn._trainable(model.module, "full", 8, 0), model.tokenizer)
    lessons = [encode(model.tokenizer, f.prompt, f.answer) for f in asked[:4]]
    assert list(relearn.train(learner, lessons, 1e-2, 20, 4, 0)) == list(range(1, 21))
    for fact in asked[:4]:
        assert said(learner.module, model.tokenizer, fact) > np.log(0.5) > said(model.module, model.tokenizer, fact)


def test_halves_part_subjects_not_facts(some_facts):
    found = list(relearn.halves(some_facts, seed=3))
    assert len(found) == 4
    for train, test in found:
        sides = [{some_facts[i].subject for i in rows} for rows in (train, test)]
        assert not sides[0] & sides[1]
        assert len(sides[0]) == len(sides[1]) == 3
        [split] = {some_facts[i].split for i in train + test}
        assert sorted(train + test) == [i for i, f in enumerate(some_facts) if f.split == split]
    assert found[0] == found[1][::-1]
    assert {some_facts[i].split for train, _ in found for i in train} == {"forget", "control"}
    assert found == list(relearn.halves(some_facts, seed=3)) != list(relearn.halves(some_facts, seed=4))
    assert not list(relearn.halves(some_facts[:2], seed=0))  # one subject cannot be parted
