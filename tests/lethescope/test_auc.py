"""Tests of AUC and its intervals: slow twins, coverage, and honesty where few models are separated perfectly."""

import numpy as np
import pytest
from scipy import stats
from sklearn.metrics import roc_auc_score

from lethescope.auc import auc, auc_difference, auc_interval, share
from lethescope.errors import InputError


def test_auc_is_the_share_of_ordered_pairs():
    rng = np.random.default_rng(0)
    a, b = rng.integers(0, 6, 9).astype(float), rng.integers(0, 6, 7).astype(float)
    pairs = [1.0 if x > y else 0.5 if x == y else 0.0 for x in a for y in b]
    assert auc(a, b) == pytest.approx(np.mean(pairs))
    assert auc(a, b) == pytest.approx(roc_auc_score([1] * 9 + [0] * 7, [*a, *b]))
    assert auc(b, a) == pytest.approx(1 - auc(a, b))
    for bad in ([], [float("nan")]):
        with pytest.raises(InputError, match="both need some"):
            auc(bad, [1.0])


def test_the_interval_covers_what_it_should():
    rng = np.random.default_rng(1)
    truth = stats.norm.cdf(1.5 / np.sqrt(2))
    found = [auc_interval(rng.normal(1.5, 1, 12), rng.normal(0, 1, 10)) for _ in range(400)]
    inside = sum(i.low <= truth <= i.high for i in found)
    assert 0.92 <= inside / 400 <= 0.99


@pytest.mark.parametrize(("n", "lowest", "highest"), [(3, 0.0, 0.7), (12, 0.7, 0.95), (60, 0.94, 0.995)])
def test_perfect_separation_is_not_certainty(n, lowest, highest):
    found = auc_interval(np.arange(n) + n, np.arange(n))
    assert found.estimate == found.high == 1
    assert lowest < found.low < highest
    other = auc_interval(np.arange(n), np.arange(n) + n)
    assert other.estimate == other.low == 0 and other.high == pytest.approx(1 - found.low, abs=1e-6)


def test_shuffled_labels_give_an_auc_of_one_half():
    rng = np.random.default_rng(2)
    values = np.concatenate([rng.normal(2, 1, 15), rng.normal(0, 1, 15)])
    shuffled = [auc_interval(v[:15], v[15:]) for v in (rng.permutation(values) for _ in range(300))]
    assert np.mean([i.estimate for i in shuffled]) == pytest.approx(0.5, abs=0.02)
    assert np.mean([i.low <= 0.5 <= i.high for i in shuffled]) > 0.9


def test_a_paired_difference_sees_what_two_intervals_cannot():
    rng = np.random.default_rng(3)
    holding, empty = rng.normal(1, 1, 20), rng.normal(0, 1, 20)
    better = holding + 0.6, empty
    difference = auc_difference(better, (holding, empty), seed=0)
    assert difference.low > 0
    assert auc_interval(*better).low < auc_interval(holding, empty).high
    same = auc_difference((holding, empty), (holding, empty), seed=0)
    assert (same.low, same.estimate, same.high) == (0, 0, 0)
    assert auc_difference(better, (holding, empty), seed=0) == difference


def test_shares_have_exact_intervals():
    assert share(0, 12).low == 0 and share(0, 12).high == pytest.approx(1 - 0.025 ** (1 / 12))
    assert np.isnan(share(0, 0).estimate)
