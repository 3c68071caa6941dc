"""Tests of the residue on synthetic Measurements, whose answers are known because they were put in."""

import numpy as np
import pytest
import xarray as xr

from lethescope import measurement
from lethescope.analyses import residue as module
from lethescope.analyses.residue import residue
from lethescope.facts import Fact

SUBJECTS, EACH, WRONG = 20, 2, 3


def facts(split, subjects=SUBJECTS, each=EACH):
    return [
        Fact(id=f"{split}-{s}-{i}", split=split, subject=f"{split}-{s}", prompt="p", answer="a")
        for s in range(subjects)
        for i in range(each)
    ]


def scores(values):
    """Scores (fact candidate place) whose preference is `values` (fact place)."""
    p = (1 + WRONG * np.asarray(values)) / (1 + WRONG)
    return np.log(np.stack([p, *[(1 - p) / WRONG] * WRONG], 1))


def made(forget, control=None, null=None):
    """A Measurement in which the forget facts have these values (fact place), and the control facts those."""
    forget = np.asarray(forget, dtype=float)
    who = facts("forget", len(forget) // EACH)
    values = forget
    if control is not None:
        who = who + facts("control", len(control) // EACH)
        values = np.concatenate([forget, control])
    variables = {}
    if null is not None:
        rest = np.zeros((len(values) - len(forget), forget.shape[1]))
        variables["null_score"] = (("fact", "candidate", "place"), scores(np.concatenate([null, rest])))
    ds = measurement.from_scores(
        scores(values), who, [f"block {i}" for i in range(forget.shape[1])], variables=variables
    )
    return ds.assign_attrs(scale="preference")


def level(mean, seed, places=3, spread=0.03, n=SUBJECTS * EACH):
    rng = np.random.default_rng(seed)
    per_subject = rng.normal(size=(n // EACH, places)).repeat(EACH, 0)
    return (mean + spread * (per_subject + rng.normal(size=(n, places))) / 2**0.5).clip(-0.3, 0.99)


def pair(unlearned, original=0.9, control=0.1):
    return {
        "original": made(level(original, 1), level(control, 2)),
        "unlearned": made(level(unlearned, 3), level(control, 4)),
    }


def test_the_values_put_in_come_out():
    values = level(0.4, 0)
    np.testing.assert_allclose(measurement.value(made(values)), values, atol=1e-12)


@pytest.mark.parametrize(("value", "want"), [(0.1, 0), (0.5, 0.5), (0.9, 1), (0.26, 0.2)])
def test_a_known_share_is_found_within_its_interval(value, want):
    found = residue(pair(value))
    assert found.testable
    assert found.residue.low <= want <= found.residue.high
    assert found.residue.estimate == pytest.approx(want, abs=0.03)
    assert found.residue.high - found.residue.low < 0.1
    assert (found.p_value < 0.001) == (want > 0)
    assert found.n_facts == SUBJECTS * EACH
    assert found.null == {"control": pytest.approx(0.1, abs=0.02)}
    assert found.simultaneous == found.residue
    wide = residue(pair(value), channels=6)
    assert wide.simultaneous.low < wide.residue.low <= wide.residue.high < wide.simultaneous.high


def test_a_mixture_of_kept_and_lost_facts_is_the_share_of_the_kept():
    measured = pair(0.1)
    half = level(0.1, 3)
    half[: len(half) // 2] = level(0.9, 5)[: len(half) // 2]
    found = residue({**measured, "unlearned": made(half, level(0.1, 4))})
    assert found.residue.estimate == pytest.approx(0.5, abs=0.03)
    assert 0.2 < found.residue.low < 0.4 < 0.6 < found.residue.high < 0.8  # which subjects are drawn matters here
    rows = found.rows[found.rows["role"] == "unlearned"]
    np.testing.assert_allclose(rows["residue"], [1] * 20 + [0] * 20, atol=0.2)
    np.testing.assert_allclose(rows["residue"].mean(), found.residue.estimate, atol=0.02)


def test_intervals_widen_when_facts_share_a_subject():
    kept = np.where(np.arange(40) < 20, 0.9, 0.1)[:, None]
    original = np.full((40, 1), 0.9)
    few = residue({"original": made(original, level(0.1, 2, 1)), "unlearned": made(kept, level(0.1, 4, 1))})
    alone = {name: made(values, level(0.1, 2, 1)) for name, values in (("original", original), ("unlearned", kept))}
    for ds in alone.values():
        ds["subject"] = ("fact", ds["fact"].values)
    many = residue(alone)
    assert many.residue.estimate == pytest.approx(few.residue.estimate, abs=0.02)
    width = [found.residue.high - found.residue.low for found in (few, many)]
    assert width[0] == pytest.approx(2**0.5 * width[1], rel=0.15)  # two equal facts a subject count as one


def test_the_order_of_the_facts_does_not_matter():
    measured, rng = pair(0.4), np.random.default_rng(0)
    shuffled = {name: ds.isel(fact=rng.permutation(ds.sizes["fact"])) for name, ds in measured.items()}
    one, two = residue(measured), residue(shuffled)
    for name in ("residue", "simultaneous", "original"):
        np.testing.assert_allclose(
            [*vars(getattr(one, name)).values()], [*vars(getattr(two, name)).values()], atol=1e-12
        )
    assert one.p_value == two.p_value
    assert sorted(one.places) == sorted(two.places)
    tables = [found.rows.sort_values(["role", "fact"]).reset_index(drop=True) for found in (one, two)]
    np.testing.assert_allclose(*(table[["value", "null", "residue"]] for table in tables), atol=1e-12)


def chance(seed, places):
    """An original that knows, and a model to which all candidates are alike, as a shuffle of the labels makes them."""
    rng, who = np.random.default_rng(seed), facts("forget") + facts("control")
    bias = rng.normal(size=(2 * SUBJECTS, 1 + WRONG, places)).repeat(EACH, 0)  # each subject has one of its own
    names = [f"block {i}" for i in range(places)]
    noise = measurement.from_scores(bias + rng.normal(size=bias.shape), who, names).assign_attrs(scale="preference")
    return {"original": made(level(0.9, 1, places), level(0.0, 2, places)), "unlearned": noise}


@pytest.mark.parametrize("places", [1, 12])
def test_where_nothing_is_left_p_values_are_rarely_small(monkeypatch, places):
    monkeypatch.setattr(module, "DRAWS", 500)
    p_values = [residue(chance(seed, places), seed=seed).p_value for seed in range(120)]
    assert np.mean(np.less(p_values, 0.05)) <= 0.1


def test_choosing_among_many_places_does_not_flatter_where_control_facts_are_the_null(monkeypatch):
    monkeypatch.setattr(module, "DRAWS", 100)
    estimates = [residue(chance(seed, 12), seed=seed).residue.estimate for seed in range(120)]
    assert np.mean(estimates) < 3 * np.std(estimates) / 120**0.5


def test_looking_in_many_places_does_not_flatter():
    rng, estimates = np.random.default_rng(0), []
    for seed in range(25):
        original = made(level(0.9, seed, 30), np.zeros((40, 30)))
        unlearned = made(rng.uniform(-0.3, 0.3, size=(40, 30)), np.zeros((40, 30)))
        estimates.append(residue({"original": original, "unlearned": unlearned}, seed=seed).residue.estimate)
    assert abs(np.mean(estimates)) < 3 * np.std(estimates) / 5  # the best of 30 means would be 0.06 / 0.9


def test_the_place_is_one_where_the_original_shows_the_facts():
    original, unlearned = level(0.9, 1), level(0.1, 3)
    original[:, 0], unlearned[:, 0] = 0.3, 0.8  # a place of no standing: the original shows less than half there
    unlearned[:, 2] = 0.5
    found = residue({"original": made(original, level(0.1, 2)), "unlearned": made(unlearned, level(0.1, 4))})
    assert found.places == ("block 2",)
    assert found.residue.estimate == pytest.approx(0.5, abs=0.02)


def test_the_null_is_the_highest_of_reference_control_and_own():
    forget, low, high = level(0.5, 3), level(0.06, 4), level(0.16, 5)  # below LEAKS of 0.9
    for null, control, own, name in (
        (high, low, low, "reference"),
        (low, high, low, "control"),
        (low, low, high, "own"),
    ):
        measured = {
            "original": made(level(0.9, 1), control, own),
            "unlearned": made(forget, control),
            "reference-0": made(null - 0.1),
            "reference-1": made(null + 0.1),  # their mean is the null
        }
        found = residue(measured)
        assert found.residue.estimate == pytest.approx((0.5 - 0.16) / (0.9 - 0.16), abs=0.03), name
        want = {"reference": 0.06, "control": 0.06, "own": 0.06, name: 0.16}
        assert found.null == pytest.approx(want, abs=0.02)
    rows = found.rows
    assert rows.groupby("role")["value"].mean().to_dict() == pytest.approx(
        {"original": 0.9, "unlearned": 0.5}, abs=0.02
    )
    np.testing.assert_allclose(rows["null"].mean(), 0.16, atol=0.02)


def test_without_any_null_the_values_themselves_count():
    found = residue({"original": made(level(0.8, 1)), "unlearned": made(level(0.2, 3))})
    assert found.residue.estimate == pytest.approx(0.25, abs=0.03)
    assert found.null == {}


def test_a_role_without_controls_is_held_against_the_originals():
    measured = {**pair(0.1, control=0.2), "planted-unembedding": made(level(0.9, 7))}
    found = residue(measured, role="planted-unembedding")
    assert found.residue.estimate == pytest.approx(1, abs=0.03)
    assert found.null == {"control": pytest.approx(0.2, abs=0.02)}


def test_facts_without_a_value_are_left_out():
    measured = pair(0.5)
    for name, gone in (("original", slice(0, 6)), ("unlearned", slice(4, 10))):
        measured[name]["score"][gone] = np.nan
    found = residue(measured)
    assert found.n_facts == 40 - 10
    assert found.residue.estimate == pytest.approx(0.5, abs=0.03)
    assert found.rows.notnull().all(axis=None)
    measured["unlearned"]["score"][10:14, :, 0] = np.nan  # one place only: the fact stays
    found = residue(measured)
    assert found.n_facts == 30
    assert found.residue.estimate == pytest.approx(0.5, abs=0.03)


def test_what_the_original_does_not_show_cannot_be_tested():
    for original in (0.1, 0.15):  # the null, and less than the least signal above it
        found = residue(pair(0.1, original=original))
        assert not found.testable
        assert np.isnan([found.residue.estimate, found.residue.low, found.simultaneous.high]).all()
    nothing = pair(0.5)
    nothing["unlearned"]["score"][:] = np.nan
    found = residue(nothing)
    assert (found.testable, found.n_facts, len(found.rows)) == (False, 0, 0)
    assert np.isnan(found.p_value)


def test_places_that_only_one_model_has_are_left_out():
    measured = pair(0.5)
    measured["unlearned"] = measured["unlearned"].isel(place=[2, 0])
    found = residue(measured)
    assert set(found.places) <= {"block 0", "block 2"}
    assert found.residue.estimate == pytest.approx(0.5, abs=0.03)
    measured["unlearned"] = measured["unlearned"].assign_coords(place=["x", "y"])
    assert not residue(measured).testable


def test_the_same_seed_gives_the_same_numbers():
    one, two, other = (residue(pair(0.4), seed=seed) for seed in (0, 0, 1))
    assert (one.residue, one.p_value, one.places) == (two.residue, two.p_value, two.places)
    assert one.residue != other.residue
    xr.testing.assert_identical(one.rows.to_xarray(), two.rows.to_xarray())


def test_a_place_where_references_show_much_is_not_looked_at():
    silent, shape = level(0.0, 3), (SUBJECTS * EACH, 3)
    measured = {
        "original": made(level(0.9, 1)),
        "unlearned": made(silent + np.array([0.7, 0.0, 0.0])),  # shows something at block 0 only
    }
    for at_block_0, places, seen in ((0.1, {"block 0"}, True), (0.45, {"block 1", "block 2"}, False)):
        reference = made(np.tile([at_block_0, 0.0, 0.0], (shape[0], 1)))
        found = residue({**measured, "reference-0": reference})
        assert set(found.places) <= places
        assert found.residue.low > 0.5 if seen else found.residue.high < 0.1
    everywhere = residue({**measured, "reference-0": made(np.full(shape, 0.5))})
    assert not everywhere.testable and np.isnan(everywhere.residue.estimate)
