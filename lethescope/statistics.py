"""Statistics of an audit: bootstrap over subjects, cross-fitted choice of a place, Holm's correction."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Int
from numpy.typing import NDArray

FOLDS = 5


@dataclass(frozen=True)
class Interval:
    """An estimate with a two-sided interval."""

    estimate: float
    low: float
    high: float

    def as_dict(self) -> dict[str, float | None]:
        """Return the three numbers, None where there is none."""
        return {k: None if np.isnan(v) else round(float(v), 6) for k, v in vars(self).items()}


def seeded(*parts: object) -> np.random.Generator:
    """Return a generator that depends on these parts, say a seed and a fact's id, and on nothing else.

    >>> seeded(0, "fact-1").integers(100) == seeded(0, "fact-1").integers(100)
    np.True_
    """
    digest = hashlib.sha256(" ".join(map(str, parts)).encode()).digest()
    return np.random.default_rng(int.from_bytes(digest[:8], "big"))


def folds(subjects: Sequence[str], seed: int, n: int = FOLDS) -> Int[NDArray[np.intp], " fact"]:
    """Deal the subjects into n folds; facts of one subject share a fold.

    >>> folds(["a", "a", "b"], seed=0, n=2).tolist() in ([0, 0, 1], [1, 1, 0])
    True
    """
    names = sorted(set(subjects))
    dealt = dict(zip(np.random.default_rng(seed).permutation(names).tolist(), np.arange(len(names)) % n, strict=True))
    return np.array([dealt[s] for s in subjects], dtype=np.intp)


def crossfit_place(
    gain: Float[NDArray[np.float64], "fact place"], fold: Int[NDArray[np.intp], " fact"], allowed: NDArray[np.bool_]
) -> Int[NDArray[np.intp], " fact"]:
    """For each fact, choose the allowed place with the highest mean gain over the facts of the *other* folds.

    Looking in many places and keeping the best flatters what is not there; choosing on other facts does not.
    """
    chosen = np.zeros(len(gain), dtype=np.intp)
    for f in np.unique(fold):
        others = gain[fold != f] if (fold != f).any() else gain
        mean = np.nanmean(others, axis=0) if len(others) else np.zeros(gain.shape[1])
        chosen[fold == f] = int(np.nanargmax(np.where(allowed, np.nan_to_num(mean, nan=-np.inf), -np.inf)))
    return chosen


def cluster_weights(subjects: Sequence[str], seed: int, draws: int) -> Float[NDArray[np.float64], "draw fact"]:
    """Bootstrap weights: subjects are drawn with replacement, and a fact counts as often as its subject came up."""
    names, owner = np.unique(np.asarray(subjects), return_inverse=True)
    rng = np.random.default_rng(seed)
    counts = rng.multinomial(len(names), np.full(len(names), 1 / len(names)), size=draws)
    return counts[:, owner].astype(np.float64)


def interval(estimate: float, draws: NDArray[np.float64], level: float = 0.95) -> Interval:
    """Percentile interval of bootstrap draws around an estimate."""
    draws = draws[np.isfinite(draws)]
    if not len(draws) or not np.isfinite(estimate):
        return Interval(float("nan"), float("nan"), float("nan"))
    low, high = np.quantile(draws, [(1 - level) / 2, (1 + level) / 2])
    return Interval(float(estimate), float(min(low, estimate)), float(max(high, estimate)))


def p_above_zero(draws: NDArray[np.float64]) -> float:
    """One-sided bootstrap p-value of `the mean is above 0`: share of draws at or below 0, never quite 0."""
    draws = draws[np.isfinite(draws)]
    return float((1 + (draws <= 0).sum()) / (1 + len(draws))) if len(draws) else float("nan")


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's step-down adjustment: p-values that may be compared with the level one by one.

    >>> holm([0.01, 0.04, 0.03])
    [0.03, 0.06, 0.06]
    """
    order = np.argsort(p_values)
    adjusted, worst = [0.0] * len(p_values), 0.0
    for rank, i in enumerate(order):
        worst = max(worst, min(1.0, (len(p_values) - rank) * p_values[i]))
        adjusted[i] = worst
    return adjusted
