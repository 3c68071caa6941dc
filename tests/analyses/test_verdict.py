"""Tests of the verdict: every word, every rule and their order, on findings whose numbers are put in."""

from dataclasses import replace

import numpy as np
import pandas as pd
import pytest

from lethescope import measurement
from lethescope.analyses.residue import Residue
from lethescope.analyses.verdict import Damage, Finding, adjust, damage, decide
from lethescope.facts import Fact
from lethescope.statistics import Interval

NAN = Interval(float("nan"), float("nan"), float("nan"))
WHOLE = Damage(0.9, 0.9, Interval(1.0, 0.9, 1.1))
BROKEN = Damage(0.9, 0.1, Interval(0.1, 0.05, 0.2))


def finding(name, estimate=0.0, half=0.05, *, p=None, testable=True, planted=(0.8, 0.9), wide=2.0):
    """A channel's finding: estimate ± half, `wide` times that for the simultaneous interval."""
    seen = Interval(estimate, estimate - half, estimate + half) if testable else NAN
    wider = Interval(estimate, estimate - wide * half, estimate + wide * half) if testable else NAN
    p = (0.001 if estimate > wide * half else 0.9) if p is None else p
    found = Residue(seen, wider, p, Interval(0.9, 0.8, 1.0), {}, testable, 40, ("block 1",), pd.DataFrame())
    copies = dict(zip(("unembedding", "last_block"), (Interval(x, x - 0.1, x + 0.1) for x in planted), strict=False))
    return Finding(name, found, copies, p, 1.0)


SILENT = {"say": finding("say", planted=(0.0, 0.0)), "lens": finding("lens"), "patch": finding("patch")}


def decision(*changed, hurt=WHOLE, n_facts=40, n_subjects=20):
    found = {**SILENT, **{f.name: f for f in changed}}
    return decide(found, hurt, n_facts, n_subjects)


def verdict(*changed, **given):
    """Word, deciding channel and reason; the residue is the deciding channel's, unless the model is damaged."""
    word, by, reason, residue_of = decision(*changed, **given)
    assert residue_of == by or word == "damaged"
    return word, by, reason


def test_no_residue_found_needs_every_voter_and_say_below_the_margin():
    word, by, reason = verdict(finding("patch", 0.1))
    assert (word, by) == ("no_residue_found", "patch")
    assert reason == "none of 2 channels that see planted residues finds more than 15%"
    for channel in ("say", "lens"):
        word, by, reason = verdict(finding(channel, 0.05, 0.2))
        assert (word, by) == ("inconclusive", channel)
        assert "cannot rule out a residue of up to 25%" in reason
    assert verdict(finding("patch", 0.1, 0.1, p=0.9))[0] == "inconclusive"  # ends at the margin, not below it


def test_a_residue_found_decides_and_its_size_gives_the_word():
    assert verdict(finding("lens", 0.8))[:2] == ("suppressed", "lens")
    assert verdict(finding("lens", 0.5))[:2] == ("suppressed", "lens")
    assert verdict(finding("lens", 0.49))[:2] == ("partly_erased", "lens")
    assert "lens still finds 80% of what it finds in the original" in verdict(finding("lens", 0.8))[2]


def test_the_surest_channel_decides_not_the_highest():
    assert verdict(finding("lens", 0.8, 0.3), finding("patch", 0.6, 0.05))[:2] == ("suppressed", "patch")
    assert verdict(finding("lens", 0.8, 0.3), finding("patch", 0.4, 0.05))[:2] == ("partly_erased", "patch")


def test_a_residue_within_the_margin_is_none_however_sure():
    assert verdict(finding("lens", 0.1, 0.02))[0] == "no_residue_found"
    assert verdict(finding("lens", 0.19, 0.02))[0] == "partly_erased"


def test_without_a_reference_a_residue_must_be_above_the_margin():
    for estimate, word in ((0.29, "inconclusive"), (0.31, "partly_erased"), (0.7, "suppressed")):
        held = replace(finding("lens", estimate), floor=0.2)  # the simultaneous interval is +- 0.1
        assert verdict(held)[:2] == (word, "lens")
        assert ("easier to guess than the control facts" in verdict(held)[2]) == (word == "inconclusive")
    assert verdict(replace(finding("lens", 0.25, 0.2), floor=0.2))[2].startswith("lens finds nothing sure")


def test_a_residue_must_pass_holm_and_the_simultaneous_interval():
    assert verdict(finding("lens", 0.6, 0.2, p=0.049))[0] == "suppressed"
    assert verdict(finding("lens", 0.6, 0.2, p=0.051))[0] == "inconclusive"
    assert verdict(finding("lens", 0.6, 0.2, p=0.001, wide=3.5))[0] == "inconclusive"


def test_what_is_still_said_is_known():
    word, by, reason = verdict(finding("say", 0.7), finding("lens", 0.99))
    assert (word, by, reason) == ("known", "say", "the model still says 70% of what the original says")
    assert verdict(finding("say", 0.7), hurt=BROKEN)[0] == "known"
    assert verdict(finding("say", 0.49, 0.02))[:2] == ("partly_erased", "say")
    assert verdict(finding("say", 0.7, 0.55))[0] == "inconclusive"  # its interval reaches below the margin


def test_a_broken_model_is_damaged_unless_it_still_says_the_facts():
    word, by, reason = verdict(finding("lens", 0.9), hurt=BROKEN)
    assert (word, by) == ("damaged", "say")
    assert "only 10% of the retain facts' value is left" in reason
    assert reason.endswith("and lens still finds 90% of what it finds in the original")
    assert verdict(hurt=BROKEN)[0] == "damaged"
    unsure = Damage(0.9, 0.3, Interval(0.33, 0.1, 0.5))
    assert verdict(hurt=unsure)[0] == "no_residue_found"
    assert verdict(hurt=Damage(float("nan"), float("nan"), NAN))[0] == "no_residue_found"  # no retain facts


def test_beside_damaged_stands_the_residue_that_would_have_decided():
    assert decision(finding("lens", 0.9), hurt=BROKEN).residue_of == "lens"
    assert decision(finding("lens", 0.3), finding("patch", 0.1), hurt=BROKEN).residue_of == "lens"
    assert decision(finding("patch", 0.1), hurt=BROKEN).residue_of == "patch"  # the hardest of those that find none
    assert decision(hurt=BROKEN).reason.endswith("a broken model has not shown that it forgot")


@pytest.mark.parametrize(("n_facts", "n_subjects"), [(3, 3), (9, 9), (40, 4)])
def test_too_few_facts_are_inconclusive_whatever_is_found(n_facts, n_subjects):
    for changed, hurt in ((finding("say", 0.9), WHOLE), (finding("lens", 0.9), WHOLE), (finding("lens"), BROKEN)):
        word, _, reason = verdict(changed, hurt=hurt, n_facts=n_facts, n_subjects=n_subjects)
        assert word == "inconclusive"
        assert f"{n_facts} forget facts about {n_subjects} subjects are too few" in reason
    assert verdict(n_facts=10, n_subjects=5)[0] == "no_residue_found"


def test_what_the_original_never_said_cannot_be_forgotten():
    word, by, reason = verdict(finding("say", testable=False, p=float("nan")), finding("lens", 0.9), hurt=BROKEN)
    assert (word, by) == ("inconclusive", "say")
    assert "the original does not say the forget facts" in reason


def test_a_blind_channel_cannot_vote_for_silence_but_may_find():
    assert finding("lens", planted=(0.8, 0.25)).blind  # one planted copy would have passed: its interval reaches 0.15
    assert finding("lens", planted=()).blind
    assert not finding("lens", planted=(0.8, 0.35)).blind
    blind = Finding("lens", SILENT["lens"].residue, {"unembedding": NAN}, 0.9, 1.0)
    assert blind.blind
    word, _, reason = verdict(blind)
    assert word == "inconclusive"
    assert "too few channels can see a planted residue here (patch)" in reason
    assert verdict(blind, finding("relearn"))[0] == "no_residue_found"  # two others see
    wide = finding("compress", 0.0, 0.6, planted=(0.0, 0.0))
    assert verdict(wide)[0] == "no_residue_found"  # a blind channel's doubt does not count either
    assert verdict(finding("lens", 0.8, planted=(0.0, 0.0)))[:2] == ("suppressed", "lens")


def test_a_channel_that_needs_a_reference_neither_decides_nor_votes_without_one():
    bare = replace(finding("patch", 0.8), grounded=False)
    assert not bare.found and not bare.votes
    assert verdict(bare)[0] == "inconclusive"  # lens alone is left to vote
    assert verdict(bare, finding("relearn"))[:2] == ("no_residue_found", "lens")
    assert verdict(bare, finding("lens", 0.6))[:2] == ("suppressed", "lens")


def test_say_and_channels_that_are_not_testable_do_not_vote():
    assert not finding("say").votes
    gone = finding("lens", testable=False, p=float("nan"))
    assert not gone.votes
    assert not gone.found
    assert verdict(gone)[0] == "inconclusive"
    assert "(patch)" in verdict(gone)[2]
    neither = verdict(gone, finding("patch", testable=False, p=float("nan")))
    assert "(none)" in neither[2]


def test_p_values_are_adjusted_by_holm_and_nan_is_left_alone():
    p = {"say": 0.03, "lens": 0.01, "readout": float("nan"), "patch": 0.04}
    found = adjust(p)
    assert list(found) == list(p)
    assert np.isnan(found.pop("readout"))
    assert found == pytest.approx({"lens": 0.03, "say": 0.06, "patch": 0.06})
    assert adjust({"a": 0.6, "b": 0.9}) == {"a": 1.0, "b": 1.0}
    assert adjust({}) == {}


def said(retain, forget=0.9, subjects=12):
    """A *say* Measurement with these probabilities of the true answer, wrong answers at 0.05."""
    who = [
        Fact(id=f"{split}-{i}", split=split, subject=f"{split} {i % subjects}", prompt="p", answer="a")
        for split in ("forget", "retain")
        for i in range(24 if split == "forget" else len(retain))
    ]
    true = np.concatenate([np.full(24, forget), retain])
    score = np.log(np.stack([true, np.full_like(true, 0.05)], 1))[..., None]
    return measurement.from_scores(score, who, ["best prompt"]).assign_attrs(scale="probability")


def test_damage_is_the_share_of_the_retain_facts_value_that_is_left():
    before = np.full(24, 0.85)
    for share in (1.0, 0.5, 0.25):
        found = damage({"original": said(before), "unlearned": said(0.05 + share * 0.8 * np.ones(24), 0.05)}, seed=0)
        assert (found.before, found.after) == (pytest.approx(0.8), pytest.approx(0.8 * share))
        assert found.kept.estimate == pytest.approx(share)
        assert found.damaged == (share < 0.5)
    uneven = np.where(np.arange(24) % 12 < 6, 0.85, 0.05)  # half of the subjects are lost: 0.5, but not surely less
    found = damage({"original": said(before), "unlearned": said(uneven)}, seed=0)
    assert found.kept.estimate == pytest.approx(0.5)
    assert found.kept.low < 0.35 < 0.65 < found.kept.high
    assert not found.damaged


def test_without_retain_facts_there_is_no_damage_to_tell():
    for retain in (np.zeros(0), np.full(24, 0.05)):  # none, or none that the original says
        found = damage({"original": said(retain), "unlearned": said(retain)}, seed=0)
        assert np.isnan([found.before, found.after, found.kept.high]).all()
        assert not found.damaged
