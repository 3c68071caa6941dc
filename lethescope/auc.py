"""How well a number tells two groups of models apart: AUC with intervals that stay honest for few models.

A metric that separates a handful of models perfectly has not shown an AUC of 1: the interval says how far it could
still be off. Two metrics measured on the same models are compared pair by pair, never by their two intervals.
"""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Float
from numpy.typing import NDArray
from scipy import optimize, stats

from lethescope.errors import InputError
from lethescope.statistics import Interval, interval

DRAWS = 4000


def auc(holding: Sequence[float], empty: Sequence[float]) -> float:
    """Probability that a model that holds the facts has the higher value; ties count half. 0.5 = chance, 1 = always.

    Raises:
        InputError: a group is empty or holds NaN.

    >>> auc([3.0, 2.0], [1.0, 2.0])
    0.875
    """
    if not len(holding) or not len(empty) or np.isnan([*holding, *empty]).any():
        raise InputError(f"an AUC of {len(holding)} values against {len(empty)}: both need some, none of them NaN")
    ranks = stats.rankdata([*holding, *empty])
    n, m = len(holding), len(empty)
    return float((ranks[:n].sum() - n * (n + 1) / 2) / (n * m))


def auc_interval(holding: Sequence[float], empty: Sequence[float], level: float = 0.95) -> Interval:
    """AUC with Newcombe's interval (2006, Statistics in Medicine 25:559, method 5).

    The interval holds every theta with `|auc - theta| <= z sqrt(V(theta))`, where V is Hanley and McNeil's variance at
    theta itself with `N* = (n + m) / 2 - 1` in place of both group sizes less one. So it does not shrink to a point
    when the groups are separated perfectly, as DeLong's and the bootstrap's intervals do.

    >>> auc_interval([2.0, 3.0, 4.0], [0.0, 1.0, 1.5]).low < 0.7
    True
    """
    found, n, m = auc(holding, empty), len(holding), len(empty)
    z = float(stats.norm.ppf((1 + level) / 2))
    half = (n + m) / 2 - 1

    def outside(theta: float) -> float:
        spread = 1 + half * (1 - theta) / (2 - theta) + half * theta / (1 + theta)
        return (found - theta) ** 2 - z**2 * theta * (1 - theta) * spread / (n * m)

    low, inside, high = 1e-12, float(np.clip(found, 1e-9, 1 - 1e-9)), 1 - 1e-12
    return Interval(
        found,
        float(optimize.brentq(outside, low, inside)) if outside(low) > 0 else 0.0,
        float(optimize.brentq(outside, inside, high)) if outside(high) > 0 else 1.0,
    )


def auc_difference(
    one: tuple[Sequence[float], Sequence[float]], other: tuple[Sequence[float], Sequence[float]], seed: int
) -> Interval:
    """Difference of two AUCs on the same models, with a paired bootstrap interval (models drawn within their group).

    Args:
        one: a metric's values on the models that hold the facts, and on those that do not.
        other: another metric's values on the same models, in the same order.
        seed: of the bootstrap.

    >>> auc_difference(([1.0, 2.0], [0.0, 0.5]), ([1.0, 2.0], [0.0, 0.5]), seed=0).estimate
    0.0
    """
    wins = _wins(*one) - _wins(*other)
    n, m = wins.shape
    rng = np.random.default_rng(seed)
    holding, empty = (rng.multinomial(size, np.full(size, 1 / size), size=DRAWS) for size in (n, m))
    return interval(float(wins.mean()), (holding @ wins * empty).sum(-1) / (n * m))


def share(count: int, of: int, level: float = 0.95) -> Interval:
    """A share with the exact (Clopper-Pearson) interval; NaN where there is nothing to count.

    >>> share(0, 12).high < 0.27
    True
    """
    if not of:
        return Interval(float("nan"), float("nan"), float("nan"))
    found = stats.binomtest(count, of).proportion_ci(level, method="exact")
    return Interval(count / of, float(found.low), float(found.high))


def _wins(holding: Sequence[float], empty: Sequence[float]) -> Float[NDArray[np.float64], "holding empty"]:
    """For each pair, 1 where the holding model has the higher value, one half for a tie: their mean is the AUC."""
    a, b = np.asarray(holding, dtype=float)[:, None], np.asarray(empty, dtype=float)
    return (a > b) + 0.5 * (a == b)
