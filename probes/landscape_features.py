"""The landscape of a fact's loss as features, and whether a classifier tells trained-on facts from others by them.

`lethescope.probes.landscape` measures the losses at a prompt and at its neighbours; this is what the paper makes of
them (REMIND, arXiv 2511.04228), with everything that is fitted, scaling and choices included, fitted inside the folds,
and beside a classifier that is given the loss at the prompt alone.
"""

import warnings
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import numpy as np
import xarray as xr
from jaxtyping import Bool, Float
from scipy import stats
from sklearn.ensemble import RandomForestClassifier
from sklearn.feature_selection import SelectKBest, f_classif
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import GridSearchCV, StratifiedGroupKFold
from sklearn.pipeline import Pipeline
from sklearn.preprocessing import StandardScaler
from threadpoolctl import threadpool_limits

from lethescope.auc import auc_difference, auc_interval
from lethescope.errors import InputError
from lethescope.statistics import FOLDS, Interval

FEATURES = (
    "original_loss",
    "mean_loss",
    "max_loss",
    "min_loss",
    "loss_variance",
    "loss_std",
    "mean_difference",
    "max_difference",
    "min_difference",
    "mean_gradient",
    "max_gradient",
    "gradient_variance",
    "loss_volatility",
)
"""The documented features. Two of the earlier code's fifteen are left out: the variance of the differences, which is
that of the losses, and its local curvature, which never varied."""


def features(ds: xr.Dataset, *, size: float = 0.3) -> xr.DataArray:
    """Describe the landscape around the true answer of every fact: (fact feature), names in `FEATURES`.

    With l_0 and l_k as in `measure`, `d_k = l_k - l_0`, e_k the share of tokens that were replaced and
    `g_k = |d_k| / e_k`: l_0; mean, maximum, minimum, variance and standard deviation of l_k; mean, maximum and minimum
    of d_k; mean, maximum and variance of g_k; volatility. Variances divide by K. Our choice where the paper's code is
    not public: e_k needs no sentence encoder, and the volatility is `std(l_k) / mean(l_k)`. The differences are sums of
    other features: they are news to a forest only. No feature has a direction that means forgotten: that is learned.

    Args:
        ds: what `measure` returns.
        size: which neighbourhood.

    Returns:
        The features, in nats (losses, differences, gradients), their squares (variances), or no unit (volatility).

    Raises:
        InputError: that size was not measured.
    """
    if size not in ds["size"].values:
        raise InputError(f"size {size:g} was not measured; use one of {', '.join(map(str, ds['size'].values))}")
    true = ds.sel(size=size).isel(candidate=0, drop=True)
    values = (true[name].transpose("fact", ...).values for name in ("loss", "neighbour_loss", "changed"))
    coords = {"fact": ds["fact"], "feature": list(FEATURES), "subject": ds["subject"], "split": ds["split"]}
    return xr.DataArray(describe(*values), coords, ("fact", "feature"))


def describe(
    own: Float[np.ndarray, " fact"], near: Float[np.ndarray, "fact k"], changed: Float[np.ndarray, "fact k"]
) -> Float[np.ndarray, "fact feature"]:
    """Return the features of losses, in the order of `FEATURES`.

    >>> found = describe(np.array([1.0]), np.array([[2.0, 4.0]]), np.array([[0.5, 1.0]]))
    >>> dict(zip(FEATURES, found[0].round(2).tolist()))["max_gradient"]
    3.0
    """
    difference = near - own[:, None]
    gradient = abs(difference) / changed
    mean, std = near.mean(-1), near.std(-1)
    columns = [own, mean, near.max(-1), near.min(-1), near.var(-1), std]
    columns += [difference.mean(-1), difference.max(-1), difference.min(-1)]
    columns += [gradient.mean(-1), gradient.max(-1), gradient.var(-1), std / (mean + 1e-12)]
    return np.stack(columns, -1)


Kind = Literal["logistic", "forest"]

WIDER = (1 + FOLDS / (FOLDS - 1)) ** 0.5
"""How much wider an interval is because the folds train on each other's facts: 1.5 for five folds.

The variance of a mean over K folds is `1/K + n_test/n_train` in place of `1/K` times that of one fold (Nadeau and
Bengio 2003, Machine Learning 52:239)."""


class Gain(NamedTuple):
    """How well taught subjects are told from others: AUC by the landscape, by the loss alone, and their difference."""

    landscape: Interval
    loss_alone: Interval
    gain: Interval


def tell_apart(
    found: xr.DataArray, trained_on: Bool[np.ndarray, " fact"], *, kind: Kind = "logistic", seed: int = 0
) -> Gain:
    """Tell what a model was trained on from what it was not by the landscape, and by the loss at the prompt alone.

    Both classifiers are trained in the same way (`out_of_fold`); only the difference says what the landscape adds. A
    high AUC is not yet memory: two groups of texts that differ in kind are told apart in any model. So the same must
    be asked of a reference on the same facts.

    Facts of one subject are not independent, so a subject's score is the mean over its facts (our choice), and the AUCs
    are over subjects. Folds share most of what they train on, so intervals are `WIDER` than those of scores that come
    from nowhere; without that, shuffled labels leave them too often.

    Args:
        found: what `features` returns.
        trained_on: True for facts that the model has been trained on, at some time.
        kind: `logistic` (regression) or `forest` (random).
        seed: of folds, forests and bootstrap.

    Returns:
        AUCs in [0, 1], 0.5 = told apart no better than by chance = more forgotten, with 95 % intervals (Newcombe's),
        and their difference with a paired bootstrap interval.

    Raises:
        InputError: there are too few subjects of a class, or a feature is not finite.
    """
    subjects, trained_on = found["subject"].values.tolist(), np.asarray(trained_on, dtype=bool)
    loss = found.sel(feature=["original_loss"])
    scores = (out_of_fold(x.values, trained_on, subjects, kind=kind, seed=seed) for x in (found, loss))
    landscape, alone = (by_subject(score, trained_on, subjects) for score in scores)
    one, other = (_widened(auc_interval(*groups), 0) for groups in (landscape, alone))
    return Gain(one, other, _widened(auc_difference(landscape, alone, seed), -1))


def by_subject(
    score: Float[np.ndarray, " fact"], trained_on: Bool[np.ndarray, " fact"], subjects: Sequence[str]
) -> tuple[list[float], list[float]]:
    """Return the mean score of every subject, those of facts that were trained on first, then those of others.

    >>> by_subject(np.array([1.0, 3.0, 0.5]), np.array([True, True, False]), ["Ada", "Ada", "Ben"])
    ([2.0], [0.5])
    """
    groups = np.asarray(subjects)
    yes, no = (
        [float(score[of & (groups == name)].mean()) for name in np.unique(groups[of])]
        for of in (trained_on, ~trained_on)
    )
    return yes, no


def _widened(found: Interval, least: float) -> Interval:
    low, high = (found.estimate + WIDER * (end - found.estimate) for end in (found.low, found.high))
    return Interval(found.estimate, max(least, low), min(1.0, high))


def out_of_fold(
    x: Float[np.ndarray, "fact feature"],
    trained_on: Bool[np.ndarray, " fact"],
    subjects: Sequence[str],
    *,
    kind: Kind = "logistic",
    seed: int = 0,
) -> Float[np.ndarray, " fact"]:
    """Score every fact by a classifier that saw neither it nor any other fact of its subject.

    Scaling, choice of features (the best by F-test; a forest takes all) and hyper-parameters are fitted on the other
    folds only, the latter two by an inner cross-validation. A fact's score is its rank within its fold (our choice), so
    that folds whose classifiers are on different scales can be pooled.

    Args:
        x: the features.
        trained_on: the labels.
        subjects: of the facts; a subject is never in two folds.
        kind: `logistic` or `forest`.
        seed: of folds and forest.

    Returns:
        Scores in (0, 1), higher = more like a fact that was trained on.

    Raises:
        InputError: there are fewer than `FOLDS` subjects of a class, or a feature is not finite.
    """
    groups = np.asarray(subjects)
    fewest = min(len(np.unique(groups[trained_on == label])) for label in (True, False))
    if fewest < FOLDS:
        raise InputError(f"a class has {fewest} subjects; each needs at least {FOLDS}, one for every fold")
    if not np.isfinite(x).all():
        raise InputError(f"{(~np.isfinite(x).all(-1)).sum()} of {len(x)} facts have a feature that is not finite")
    score = np.full(len(x), np.nan)
    with threadpool_limits(1), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a feature that is constant in a fold has no F; it is chosen last
        for train, test in StratifiedGroupKFold(FOLDS, shuffle=True, random_state=seed).split(x, trained_on, groups):
            fitted = _search(kind, x.shape[1], seed).fit(x[train], trained_on[train], groups=groups[train])
            score[test] = stats.rankdata(fitted.predict_proba(x[test])[:, 1]) / (len(test) + 1)
    return score


def _search(kind: Kind, columns: int, seed: int) -> GridSearchCV:
    few = sorted({min(4, columns), columns})
    models: dict[Kind, tuple[Any, dict[str, list[Any]]]] = {
        "logistic": (LogisticRegression(max_iter=1000), {"model__C": [0.01, 0.1, 1.0], "choose__k": few}),
        "forest": (RandomForestClassifier(100, random_state=seed), {"model__min_samples_leaf": [1, 5, 15]}),
    }
    model, grid = models[kind]
    steps = Pipeline([("scale", StandardScaler()), ("choose", SelectKBest(f_classif, k="all")), ("model", model)])
    inner = StratifiedGroupKFold(3, shuffle=True, random_state=seed)
    return GridSearchCV(steps, grid, scoring="roc_auc", cv=inner)
