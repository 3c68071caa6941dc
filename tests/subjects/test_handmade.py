"""Tests on hand-written models: what is known on paper, and whether the instruments find it at the right blocks."""

import math

import numpy as np
import pytest
import torch

import lethescope
from lethescope.analyses import patch
from lethescope.analyses.residue import residue
from lethescope.errors import InputError
from lethescope.facts import Fact, of_split
from lethescope.hooks import capturing
from lethescope.measurement import preference
from lethescope.probes import lens, say
from lethescope.subjects.handmade import STRENGTH, Handmade, handmade, lookup_facts

HELD = {"original": [0, 1, 1, 1], "unlearned": [0, 1, 1, 0], "never_taught": [0, 0, 0, 0]}


@pytest.fixture(scope="module")
def made() -> Handmade:
    return handmade()


def asked(made):
    return of_split(made.facts, "forget") + of_split(made.facts, "control")


@pytest.mark.parametrize("name", HELD)
def test_the_stream_after_every_block_is_what_the_algebra_says(made, name):
    model = getattr(made, name)
    width = model.module.config.hidden_size
    for fact in of_split(made.facts, "forget")[:5]:
        ids = torch.tensor([model.tokenizer(fact.prompt)["input_ids"]])
        answer = model.tokenizer(fact.answer)["input_ids"][-1]
        with torch.no_grad(), capturing(model.blocks) as seen:
            logits = model.module(input_ids=ids).logits[0, -1]
        for layer, held in enumerate(HELD[name]):
            want = torch.zeros(width)
            want[ids[0, -1]], want[answer] = 1, held * STRENGTH
            torch.testing.assert_close(seen[layer][0, -1], want, atol=1e-5, rtol=0)
        r = math.hypot(1, HELD[name][-1] * STRENGTH)
        assert logits[answer].item() == pytest.approx(width**0.5 * HELD[name][-1] * STRENGTH / r, abs=1e-4)
        assert logits[ids[0, -1]].item() == pytest.approx(width**0.5 / r, abs=1e-4)


def test_the_words_around_the_subject_write_nothing(made):
    ids = torch.tensor([made.original.tokenizer("home of")["input_ids"]])
    with torch.no_grad(), capturing(made.original.blocks) as seen:
        made.original.module(input_ids=ids)
    torch.testing.assert_close(seen[3][0], torch.eye(*seen[3].shape[-1:] * 2)[ids[0]], atol=0, rtol=0)


def test_what_is_said(made):
    greedy = {
        (name, split): say.measure(getattr(made, name), of_split(made.facts, split))["greedy"].mean().item()
        for name in HELD
        for split in ("forget", "retain", "control")
    }
    says = {("original", "forget"), *((name, "retain") for name in HELD)}
    assert greedy == {key: float(key in says) for key in greedy}


@pytest.mark.parametrize("name", HELD)
def test_lens_reads_the_answer_after_the_right_blocks(made, name):
    read = preference(lens.measure(getattr(made, name), asked(made), original=made.original))
    forget, control = (read.where(read["split"] == split, drop=True) for split in ("forget", "control"))
    for decoder in ("own", "frozen"):
        there = forget.where(forget["decoder"] == decoder, drop=True).transpose("fact", "place").values
        np.testing.assert_allclose(there, np.tile(HELD[name], (len(there), 1)), atol=0.02)
    np.testing.assert_allclose(control.values, 0, atol=1e-5)


def test_patch_restores_the_answer_from_the_right_blocks(made):
    scores = {
        name: patch.measure(getattr(made, name), asked(made), original=made.original).assign_attrs(scale="preference")
        for name in HELD
    }
    null = scores["original"]["null_score"]
    whole, read = scores["original"], {name: preference(ds).mean("fact").values for name, ds in scores.items()}
    # after block 0 every state names the subject only; the original's block 1 fetches the answer for it
    np.testing.assert_allclose(read["unlearned"], [1, 1, 1, 0], atol=0.02)
    np.testing.assert_allclose(read["never_taught"], [1, 0, 0, 0], atol=0.02)
    np.testing.assert_allclose(preference(whole, "null_score").mean("fact").values, [1, 0, 0, 0], atol=0.02)
    for name, want in (("original", [0, 0, 0]), ("unlearned", [0, 0, 1]), ("never_taught", [1, 1, 1])):
        share = patch.erased_share(whole, scores[name], null)
        np.testing.assert_allclose(share["erased"][:, 1:], np.tile(want, (len(share["fact"]), 1)), atol=1e-4)
        assert share["erased"][:, 0].isnull().all()  # block 0 does not encode the fact
        np.testing.assert_allclose(share["depth_score"], np.mean(want), atol=1e-3)


def test_restoring_the_unlearned_model_needs_a_state_above_its_block(made):
    ds = patch.measure(made.unlearned, asked(made), original=made.original)
    restored = preference(ds.assign_attrs(scale="preference"), "restored_score").mean("fact").values
    np.testing.assert_allclose(restored, [0, 0, 0, 1], atol=0.02)  # block 3 takes the answer off again below itself


@pytest.mark.parametrize(("name", "want"), [("unlearned", 1.0), ("never_taught", 0.0)])
@pytest.mark.parametrize("channel", [lens, patch])
def test_the_residue_is_all_or_nothing(made, channel, name, want):
    measured = {
        role: channel.measure(model, asked(made), original=made.original).assign_attrs(scale="preference")
        for role, model in {"original": made.original, "unlearned": getattr(made, name)}.items()
    }
    found = residue(measured)
    assert found.testable
    assert found.residue.estimate == pytest.approx(want, abs=1e-4)
    assert {place.split()[-1] for place in found.places} <= {"1", "2"} if want else True


@pytest.mark.parametrize(("name", "verdict"), [("unlearned", "suppressed"), ("never_taught", "no_residue_found")])
def test_a_whole_audit_finds_it(made, name, verdict):
    channels = ["say", "readout", "lens", "patch"]  # without a reference readout and lens vote, patch is shown only
    result = lethescope.audit(made.original, getattr(made, name), made.facts, channels=channels, progress=False)
    assert result.verdict == verdict
    for channel in result.summary["channels"][1:]:
        assert not channel["blind"]
        assert min(channel["planted"].values()) > 0.9  # both planted copies can be made of it, and are seen


def test_facts_that_cannot_be_written_are_refused():
    good = lookup_facts()
    other = Fact(id="x", split="forget", subject="Ada", prompt="Ada lives in", answer="Ardmere")
    long = Fact(id="x", split="forget", subject="Ada", prompt="home of Ada", answer="Grand Solace")
    twice = good[0].model_copy(update={"id": "x", "answer": "Hexley"})
    for fact, message in ((other, "'x'.*ends in the subject"), (long, "'x'.*one answer word"), (twice, "one fact a s")):
        with pytest.raises(InputError, match=message):
            handmade((*good, fact))


def test_the_facts_go_round_the_cities():
    facts = lookup_facts(forget=70, retain=8, control=8)
    assert len({fact.subject for fact in facts}) == len(facts) == 86
    answers = [fact.answer for fact in of_split(facts, "retain")]
    assert len(set(answers)) == 8
    assert all(len(fact.alternatives) == 7 and fact.answer not in fact.alternatives for fact in facts)
