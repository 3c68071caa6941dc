"""Tests of what a validation shows, on tables small enough to work out by hand."""

import itertools
import json

import numpy as np
import pandas as pd
import pytest

from lethescope.analyses import validation
from lethescope.auc import auc, auc_interval, share
from lethescope.summary import as_json

TRUTH = {"P": "holds", "suppressor": "holds", "N": "does not hold", "deleter": "does not hold"}


@pytest.fixture(autouse=True)
def few_draws(monkeypatch):
    monkeypatch.setattr("lethescope.auc.DRAWS", 200)


def value(pool, member, metric, number, reference=True, world=1, of="", stress=""):
    return {
        "world": world,
        "member": member,
        "pool": pool,
        "truth": TRUTH.get(pool, "unknown"),
        "of": of,
        "stress": stress,
        "reference": reference,
        "metric": metric,
        "value": number,
    }


def verdict(pool, member, word, reference=True, world=1, retain=1.0, kept=1.0, **costs):
    told = {"world": world, "member": member, "pool": pool, "truth": TRUTH.get(pool, "unknown")}
    return {**told, "reference": reference, "retain": retain, "verdict": word, "kept": kept, **costs}


def column(metric, by_pool, **more):
    return [value(pool, f"{pool}-{i}", metric, x, **more) for pool, xs in by_pool.items() for i, x in enumerate(xs)]


def record(records, **wanted):
    (found,) = [r for r in records if all(r[key] == x for key, x in wanted.items())]
    return found


def test_separation_is_the_auc_of_the_pools_that_a_question_names():
    values = column("lens", {"P": [0.9, 0.8], "N": [0.1, 0.85], "suppressor": [0.7, 0.5, 0.3], "deleter": [0.3, 0.1]})
    values += column("lens", {"method": [9.0], "stressed": [-9.0]})
    found = list(validation.separation(pd.DataFrame(values), seed=0))
    a, b = record(found, question="a"), record(found, question="b")
    assert a["estimate"] == pytest.approx(3 / 4)  # of the pairs, only 0.8 against 0.85 is the wrong way round
    assert b["estimate"] == pytest.approx(5.5 / 6, abs=1e-6)  # 0.3 against 0.3 counts half
    assert (b["n_holding"], b["n_empty"]) == (3, 2)
    expected = auc_interval([0.7, 0.5, 0.3], [0.3, 0.1])
    assert (b["low"], b["high"]) == pytest.approx((expected.low, expected.high), abs=1e-6)
    assert {r["reference"] for r in found} == {True}


def test_the_difference_to_uds_is_taken_on_the_models_that_both_have():
    nan = float("nan")
    values = column("1 - UDS", {"suppressor": [0.9, 0.2, 0.1], "deleter": [0.5, 0.0]})
    values += column("lens", {"suppressor": [0.9, 0.8, nan], "deleter": [0.5, nan]})
    found = list(validation.separation(pd.DataFrame(values), seed=0))
    lens = record(found, metric="lens")
    assert (lens["estimate"], lens["n_holding"], lens["n_empty"]) == (1, 2, 1)
    assert lens["over_uds"]["estimate"] == pytest.approx(
        0.5
    )  # on suppressors 0 and 1 and deleter 0, UDS orders one pair of two
    assert "over_uds" not in record(found, metric="1 - UDS")


def test_two_worlds_have_models_of_the_same_name():
    values = column("1 - UDS", {"suppressor": [0.9], "deleter": [0.5]}, world=1)
    values += column("1 - UDS", {"suppressor": [0.1], "deleter": [0.2]}, world=2)
    values += column("lens", {"suppressor": [0.9], "deleter": [0.5]}, world=2)
    found = record(validation.separation(pd.DataFrame(values), seed=0), metric="lens")
    assert found["over_uds"]["estimate"] == 1  # world 2 only: 1 against 0


def test_a_metric_without_a_common_model_or_without_a_group_has_no_comparison():
    nan = float("nan")
    values = column("1 - UDS", {"suppressor": [0.9, nan], "deleter": [0.5]})
    values += column("lens", {"suppressor": [nan, 0.8], "deleter": [0.5]})
    values += column("readout", {"suppressor": [nan, nan], "deleter": [0.5]})
    found = list(validation.separation(pd.DataFrame(values), seed=0))
    assert record(found, metric="lens")["over_uds"] is None
    assert [r["metric"] for r in found] == ["1 - UDS", "lens"]


def test_shuffled_labels_separate_nothing():
    rng = np.random.default_rng(0)
    level = np.concatenate([rng.normal(1, 0.2, 20), rng.normal(0, 0.2, 20)])
    inside = []
    for _ in range(60):
        mixed = rng.permutation(level)
        values = pd.DataFrame(column("lens", {"suppressor": mixed[:20], "deleter": mixed[20:]}))
        (found,) = validation.separation(values, seed=0)
        assert found["estimate"] == pytest.approx(auc(mixed[:20], mixed[20:]), abs=1e-6)
        inside.append(found["low"] <= 0.5 <= found["high"])
    assert np.mean(inside) > 0.88
    (kept,) = validation.separation(pd.DataFrame(column("lens", {"suppressor": level[:20], "deleter": level[20:]})), 0)
    assert kept["low"] > 0.5


def test_calibration_is_the_distance_from_the_truth_every_pool_weighing_the_same():
    values = column("lens", {"P": [0.8, 1.2, 1.0], "suppressor": [0.5], "N": [-0.1, 0.3], "method": [7.0]})
    values += column("MIA loss", {"P": [0.5]}) + column("ROUGE-L", {"P": [0.5]})
    values += column("lens", {"N": [0.4]}, reference=False)
    found = list(validation.calibration(pd.DataFrame(values)))
    with_reference = record(found, reference=True)
    assert (with_reference["P"], with_reference["suppressor"], with_reference["N"]) == (0.1333, 0.5, 0.2)
    assert with_reference["error"] == round((0.4 / 3 + 0.5 + 0.2) / 3, 4)
    assert record(found, reference=False) == {"metric": "lens", "reference": False, "error": 0.4, "N": 0.4}
    assert {r["metric"] for r in found} == {"lens"}


def test_the_right_verdict_is_damaged_where_the_retain_facts_are_lost():
    rows = [
        verdict("P", "P-0", "known"),
        verdict("suppressor", "s-0", "suppressed"),
        verdict("suppressor", "s-1", "no_residue_found"),
        verdict("suppressor", "s-2", "damaged", retain=0.2),
        verdict("suppressor", "s-3", "suppressed", retain=0.2),
        verdict("deleter", "d-0", "no_residue_found", retain=0.5),
        verdict("N", "N-0", "damaged", retain=0.5),
        verdict("method", "m-0", "suppressed"),
        verdict("stressed", "x-0", "suppressed"),
        verdict("P", "P-0", "inconclusive", reference=False),
    ]
    found = list(validation.right(pd.DataFrame(rows), "pool"))
    counts = {r["pool"]: (r["count"], r["of"]) for r in found if r["reference"]}
    assert counts == {"P": (1, 1), "suppressor": (2, 4), "deleter": (1, 1), "N": (0, 1), "all": (4, 7)}
    assert record(found, reference=False, pool="all")["count"] == 0
    assert record(found, reference=True, pool="all")["high"] == pytest.approx(share(4, 7).high, abs=1e-6)


def test_the_two_errors_count_only_their_pools_and_words():
    words = ["no_residue_found", "suppressed", "inconclusive"]
    rows = [verdict("suppressor", f"s-{i}", word) for i, word in enumerate(words)]
    words = ["no_residue_found", "suppressed", "partly_erased", "known", "damaged", "inconclusive"]
    rows += [verdict(pool, f"{pool}-{i}", word) for pool in ("deleter", "N", "method") for i, word in enumerate(words)]
    found = list(validation.errors(pd.DataFrame(rows)))
    clear, alarm = record(found, error="false all-clear"), record(found, error="false alarm")
    assert (clear["count"], clear["of"]) == (1, 3)
    assert (alarm["count"], alarm["of"], alarm["estimate"]) == (6, 12, 0.5)
    assert alarm["low"] < 0.5 < alarm["high"]


def test_an_error_that_nobody_could_make_has_no_share():
    clear = record(validation.errors(pd.DataFrame([verdict("N", "N-0", "known")])), error="false all-clear")
    assert (clear["count"], clear["of"], clear["estimate"]) == (0, 0, None)


def stressed(metric, of, int4=None, relearned=None, world=1):
    made = {"int4": int4, "relearned": relearned}
    return [
        value("stressed", f"stressed-{stress}-{of}", metric, x, world=world, of=of, stress=stress)
        for stress, x in made.items()
        if x is not None
    ]


def two_methods(metric="lens"):
    """Method 0 goes from 0.2 to 0.3 and 0.8, method 1 from 0.4 to 0.2 and 0.3, the never taught from 0 to 0.2."""
    values = [value("method", "method-0", metric, 0.2), value("method", "method-1", metric, 0.4)]
    values += [value("N", "N-0", metric, 0.0), *stressed(metric, "N-0", int4=5.0, relearned=0.2)]
    values += stressed(metric, "method-0", int4=0.3, relearned=0.8)
    values += stressed(metric, "method-1", int4=0.2, relearned=0.3)
    return values


KEPT = [verdict("method", "method-0", "suppressed"), verdict("method", "method-1", "suppressed", kept=0.8)]


def test_robustness_in_both_families_by_hand():
    (found,) = validation.robustness(pd.DataFrame(two_methods()), pd.DataFrame(KEPT))
    assert found["models"] == 2
    # rounding: |0.2 - 0.3| / 0.5 = 1/5 and |0.4 - 0.2| / 0.6 = 1/3
    assert found["Q"] == round((4 / 5 + 2 / 3) / 2, 4)
    # only the first rises by rounding: 0.2 / 0.3
    assert found["Q one-sided"] == round((2 / 3 + 1) / 2, 4)
    # rises by retraining: 0.6 and -0.1 against 0.2: |0.4| / 0.8 and |-0.3| / 0.3
    assert found["R"] == round((1 / 2 + 0) / 2, 4)
    # the first rises three times as much as the never taught, the second does not rise
    assert found["R one-sided"] == round((1 / 3 + 1) / 2, 4)


def test_a_metric_that_nothing_moves_is_robust_even_at_zero():
    values = [value("method", "method-0", "lens", 0.0), value("N", "N-0", "lens", 0.0)]
    values += stressed("lens", "N-0", relearned=0.0) + stressed("lens", "method-0", int4=0.0, relearned=0.0)
    (found,) = validation.robustness(pd.DataFrame(values), pd.DataFrame(KEPT[:1]))
    assert found == {"metric": "lens", "models": 1, "Q": 1, "R": 1, "Q one-sided": 1, "R one-sided": 1}


def test_a_method_that_lost_its_retain_facts_does_not_count_for_robustness():
    kept = [KEPT[0], verdict("method", "method-1", "damaged", kept=0.79)]
    (found,) = validation.robustness(pd.DataFrame(two_methods()), pd.DataFrame(kept))
    assert (found["models"], found["Q"], found["R one-sided"]) == (1, 0.8, 0.3333)
    assert list(validation.robustness(pd.DataFrame(two_methods()), pd.DataFrame(kept[1:]))) == []


@pytest.mark.parametrize("gone", ["method-1", "N-0"])
def test_a_model_that_a_metric_has_no_value_for_is_left_out_of_its_robustness(gone):
    values = pd.DataFrame(two_methods())
    values.loc[(values["member"] == gone), "value"] = np.nan
    found = list(validation.robustness(values, pd.DataFrame(KEPT)))
    if gone == "N-0":
        assert found == []
    else:
        assert (found[0]["models"], found[0]["Q"]) == (1, 0.8)


def test_every_world_is_held_against_its_own_never_taught():
    values = two_methods()
    values += [value("method", "method-0", "lens", 0.2, world=2), value("N", "N-0", "lens", 0.0, world=2)]
    values += stressed("lens", "N-0", relearned=0.6, world=2)
    values += stressed("lens", "method-0", int4=0.2, relearned=0.8, world=2)
    kept = [KEPT[0], verdict("method", "method-0", "suppressed", world=2)]
    (found,) = validation.robustness(pd.DataFrame(values), pd.DataFrame(kept))
    assert found["R one-sided"] == round((1 / 3 + 1) / 2, 4)


def test_cost_is_the_mean_over_models_that_are_no_copies():
    def costs(seconds):
        return {"lens seconds": seconds, "lens forward_passes": 10 * seconds, "lens backward_passes": 0.0}

    rows = [verdict("P", "P-0", "known", **costs(1.0)), verdict("N", "N-0", "known", **costs(2.0))]
    rows += [verdict("stressed", "x", "known", **costs(99.0)), verdict("P", "P-0", "known", False, **costs(99.0))]
    (found,) = validation.cost(pd.DataFrame(rows))
    assert found == {"channel": "lens", "seconds": 1.5, "forward_passes": 15.0, "backward_passes": 0.0}


@pytest.mark.parametrize("references", [(True, False), (True,), (False,)])
def test_the_summary_is_json_and_counts_every_model_once(references):
    costs = {"lens seconds": 1.0, "lens forward_passes": 2.0, "lens backward_passes": 0.0}
    pools = dict(zip(TRUTH, ([0.9, 1.0], [0.8, 0.7], [0.0], [0.1, float("nan")]), strict=True))
    values, verdicts = [], []
    for reference, metric in itertools.product(references, ("lens", "1 - UDS")):
        values += column(metric, pools, reference=reference)
    for reference, (pool, xs) in itertools.product(references, pools.items()):
        verdicts += [verdict(pool, f"{pool}-{i}", "known", reference, **costs) for i, _ in enumerate(xs)]
    told = validation.summarise(pd.DataFrame(values), pd.DataFrame(verdicts))
    assert json.loads(as_json(told)) == told
    assert told["models"] == {"P": 2, "suppressor": 2, "N": 1, "deleter": 2}
    assert {r["reference"] for r in told["separation"]} == set(references)
    assert sum(r["count"] for r in told["verdicts"]) == 7 * len(references)
