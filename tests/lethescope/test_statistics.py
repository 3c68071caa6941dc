"""Tests of the statistics, on data whose truth is known because it was drawn here."""

import numpy as np
import pytest
from numpy.typing import NDArray

from lethescope.statistics import Interval, cluster_weights, crossfit_place, folds, holm, interval, p_above_zero


def slow_holm(p: list[float]) -> list[float]:
    """Holm's adjusted p-values by their definition: the smallest level at which the step-down procedure rejects."""

    def rejected(level: float) -> set[int]:
        left, out = set(range(len(p))), set()
        while left:
            best = min(left, key=lambda i: p[i])
            if p[best] * len(left) > level:
                break
            left.remove(best)
            out.add(best)
        return out

    levels = sorted({1.0, *(min(1.0, n * x) for x in p for n in range(1, len(p) + 1))})
    return [min((level for level in levels if i in rejected(level)), default=1.0) for i in range(len(p))]


@pytest.mark.parametrize("n", [1, 2, 5, 9])
def test_holm_equals_its_definition(n: int) -> None:
    draw = np.random.default_rng(n)
    for _ in range(20):
        p = draw.uniform(0, 0.4, n).round(2).tolist()  # rounded, so that there are ties
        np.testing.assert_allclose(holm(p), slow_holm(p), rtol=0, atol=1e-12)
    assert holm([]) == []


def subjects(people: int, each: int) -> list[str]:
    return [f"s{i:02d}" for i in range(people) for _ in range(each)]


def test_folds_keep_subjects_together_and_are_even() -> None:
    who = subjects(22, 3)
    fold = folds(who, seed=4)
    assert all(len(set(fold[np.array(who) == s])) == 1 for s in set(who))
    sizes = np.bincount(fold, minlength=5) / 3
    assert sizes.max() - sizes.min() <= 1
    assert np.array_equal(fold, folds(who, seed=4)) and not np.array_equal(fold, folds(who, seed=5))
    shuffled = np.random.default_rng(0).permutation(len(who))
    assert np.array_equal(folds([who[i] for i in shuffled], seed=4), fold[shuffled])


def test_a_place_is_chosen_without_the_facts_own_fold() -> None:
    """Every fold has a place that is wonderful there and nowhere else; place 5 is the best one elsewhere."""
    fold = np.repeat(np.arange(5), 4)
    gain = np.zeros((20, 6))
    gain[np.arange(20), fold] = 1.0
    gain[:, 5] = 0.3
    everywhere = np.ones(6, dtype=bool)
    assert crossfit_place(gain, fold, everywhere).tolist() == [5] * 20
    assert gain[fold == 2].mean(0).argmax() == 2  # what a choice on its own fold would have taken
    rest = crossfit_place(gain, fold, np.array([True] * 5 + [False]))
    assert not (rest == fold).any() and (rest != 5).all()


def test_choosing_a_place_in_noise_gains_nothing() -> None:
    draw, fold, place = np.random.default_rng(0), np.arange(60) % 5, np.ones(40, dtype=bool)
    honest, greedy = [], []
    for _ in range(60):
        gain = draw.normal(size=(60, 40))
        honest.append(gain[np.arange(60), crossfit_place(gain, fold, place)].mean())
        greedy.append(gain.mean(0).max())
    assert abs(np.mean(honest)) < 3 * np.std(honest) / np.sqrt(60) + 0.01
    assert np.mean(greedy) > 0.2


def test_a_place_that_is_not_allowed_or_not_measured_is_not_chosen() -> None:
    gain = np.array([[9.0, 1.0, np.nan], [9.0, 1.0, np.nan]])
    assert crossfit_place(gain, np.array([0, 1]), np.array([False, True, True])).tolist() == [1, 1]


def test_bootstrap_weights_draw_subjects_not_facts() -> None:
    who = subjects(7, 3)
    weights = cluster_weights(who, seed=0, draws=500)
    assert weights.shape == (500, 21) and (weights.sum(1) == 21).all()
    by_subject = weights.reshape(500, 7, 3)
    assert (by_subject == by_subject[:, :, :1]).all()
    assert weights.max() >= 3 and weights.min() == 0
    assert np.array_equal(weights, cluster_weights(who, seed=0, draws=500))


def clustered(draw: np.random.Generator, people: int = 30, each: int = 4) -> NDArray[np.float64]:
    """Facts around 0 that share most of their noise with the other facts of their subject."""
    return np.repeat(draw.normal(size=people), each) + 0.5 * draw.normal(size=people * each)


def bootstrap(x: NDArray[np.float64], who: list[str], seed: int) -> NDArray[np.float64]:
    weights = cluster_weights(who, seed, 400)
    return weights @ x / weights.sum(1)


def test_the_interval_covers_the_truth_when_facts_share_a_subject() -> None:
    draw, who = np.random.default_rng(1), subjects(30, 4)
    right = alone = 0
    for seed in range(200):
        x = clustered(draw)
        found = interval(x.mean(), bootstrap(x, who, seed))
        right += found.low <= 0 <= found.high
        loose = interval(x.mean(), bootstrap(x, [str(i) for i in range(len(x))], seed))
        alone += loose.low <= 0 <= loose.high
    assert 0.90 <= right / 200 <= 0.99
    assert alone / 200 < 0.85  # facts taken as independent: far too sure


def test_p_values_are_uniform_where_there_is_nothing_and_small_where_there_is() -> None:
    draw, who = np.random.default_rng(2), subjects(30, 4)
    p = np.array([p_above_zero(bootstrap(clustered(draw), who, seed)) for seed in range(200)])
    assert abs(p.mean() - 0.5) < 0.07
    for level in (0.1, 0.5, 0.9):
        assert abs((p <= level).mean() - level) < 0.11
    assert p_above_zero(bootstrap(clustered(draw) + 2, who, 0)) == pytest.approx(1 / 401)
    assert p_above_zero(bootstrap(clustered(draw) - 2, who, 0)) == pytest.approx(1)


def test_an_interval_holds_its_estimate_and_nan_stays_nan() -> None:
    draws = np.linspace(0, 1, 1001)
    assert interval(0.5, draws) == Interval(0.5, pytest.approx(0.025), pytest.approx(0.975))
    assert interval(2.0, draws).high >= 2.0 and interval(-1.0, draws).low <= -1.0
    assert interval(0.5, np.append(draws, np.nan)) == interval(0.5, draws)
    for nothing in (interval(float("nan"), draws), interval(0.5, np.array([np.nan]))):
        assert nothing.as_dict() == {"estimate": None, "low": None, "high": None}
    assert np.isnan(p_above_zero(np.array([])))
