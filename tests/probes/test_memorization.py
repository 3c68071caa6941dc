"""Tests of the output metrics: each against a slow twin that follows its definition token by token."""

import math
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from lethescope.eval_logs import read_open_unlearning_log
from lethescope.probes.memorization import exact_memorization, extraction_strength, truth_ratio

LOGS = Path(__file__).parents[3] / "shared" / "data" / "tofu" / "eval_logs"


@st.composite
def answers(draw):
    """First choices of some answers of different lengths, False beyond an answer's end."""
    rows = draw(st.lists(st.lists(st.booleans(), min_size=1, max_size=7), min_size=1, max_size=5))
    right = np.zeros((len(rows), max(map(len, rows))), dtype=bool)
    for row, said in zip(right, rows, strict=True):
        row[: len(said)] = said
    return right, np.array([len(row) for row in rows]), rows


def slow_extraction(said: list[bool]) -> float:
    for k in range(len(said) + 1):
        if all(said[k:]):  # given k tokens, the rest are first choices
            return 1 - k / len(said)
    raise AssertionError("k = T always fits")


@given(answers())
def test_exact_memorization_counts_tokens(case):
    right, length, rows = case
    slow = [sum(1 for t in said if t) / len(said) for said in rows]
    np.testing.assert_allclose(exact_memorization(right, length), slow)


@given(answers())
def test_extraction_strength_finds_the_shortest_prefix(case):
    right, length, rows = case
    np.testing.assert_allclose(extraction_strength(right, length), [slow_extraction(said) for said in rows], atol=1e-12)


@given(answers())
def test_extraction_never_exceeds_memorization_and_they_agree_at_the_ends(case):
    right, length, _ = case
    strength, memorized = extraction_strength(right, length), exact_memorization(right, length)
    assert (strength <= memorized + 1e-12).all()
    np.testing.assert_array_equal(strength == 1, memorized == 1)


@pytest.mark.parametrize("length", [1, 2, 5])
def test_extraction_strength_has_a_true_zero(length):
    right = np.ones((1, length + 3), dtype=bool)  # whatever lies beyond the end does not count
    right[0, length - 1] = False
    assert extraction_strength(right, np.array([length])).tolist() == [0.0]


@given(
    hnp.arrays(float, 4, elements=st.floats(-9, 0)),
    hnp.arrays(float, (4, 3), elements=st.one_of(st.floats(-9, 0), st.just(math.nan))),
)
def test_truth_ratio_is_a_ratio_of_probabilities(true, wrong):
    for row, found in enumerate(truth_ratio(true, wrong)):
        given_ = [math.exp(w) for w in wrong[row] if not math.isnan(w)]
        if not given_:
            assert math.isnan(found)
        else:
            geometric = math.prod(given_) ** (1 / len(given_))
            assert found == pytest.approx(geometric / math.exp(true[row]), rel=1e-9)


@pytest.mark.skipif(not LOGS.is_dir(), reason="no local copy of TOFU's logs in ../shared/data/tofu/eval_logs")
@pytest.mark.parametrize("name", ["phi_full", "phi_retain95"])
def test_truth_ratio_gives_the_values_that_tofu_logged(name):
    table = read_open_unlearning_log(LOGS / f"{name}.json")
    by = table.set_index(["quantity", "metric", "item", "candidate"])["value"]
    wrong = by["average_perturb_loss"].unstack("candidate")
    true = by["avg_paraphrased_loss"].droplevel("candidate").reindex(wrong.index)
    logged = by["truth_ratio"].droplevel("candidate").reindex(wrong.index)
    assert len(logged) > 700
    np.testing.assert_allclose(truth_ratio(-true.values, -wrong.values), logged, rtol=1e-5)
