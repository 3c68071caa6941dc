"""Tests of landscape features and their classifier: definitions in plain Python, no leaks, and shuffled labels."""

import math
import statistics

import numpy as np
import pytest
import xarray as xr
from hypothesis import given
from hypothesis import strategies as st

from lethescope.auc import auc_interval
from lethescope.errors import InputError
from lethescope.probes import landscape
from lethescope.probes import landscape_features as lf
from lethescope.statistics import Interval

LOSS = st.floats(0.01, 20)


def slow_features(own, near, changed):
    gaps = [x - own for x in near]
    slopes = [abs(g) / e for g, e in zip(gaps, changed, strict=True)]
    mean = statistics.fmean(near)
    return {
        "original_loss": own,
        "mean_loss": mean,
        "max_loss": max(near),
        "min_loss": min(near),
        "loss_variance": statistics.pvariance(near),
        "loss_std": statistics.pstdev(near),
        "mean_difference": statistics.fmean(gaps),
        "max_difference": max(gaps),
        "min_difference": min(gaps),
        "mean_gradient": statistics.fmean(slopes),
        "max_gradient": max(slopes),
        "gradient_variance": statistics.pvariance(slopes),
        "loss_volatility": statistics.pstdev(near) / mean,
    }


@given(LOSS, st.lists(st.tuples(LOSS, st.floats(0.05, 1)), min_size=1, max_size=6))
def test_every_feature_follows_its_definition(own, pairs):
    near, changed = ([p[i] for p in pairs] for i in range(2))
    found = lf.describe(np.array([own]), np.array([near]), np.array([changed]))[0]
    want = slow_features(own, near, changed)
    assert tuple(want) == lf.FEATURES
    np.testing.assert_allclose(found, list(want.values()), rtol=1e-6, atol=1e-8)
    shuffled = lf.describe(np.array([own]), np.array([near[::-1]]), np.array([changed[::-1]]))[0]
    np.testing.assert_allclose(shuffled, found, rtol=1e-9, atol=1e-12)  # the order of the draws says nothing


def test_no_feature_is_dead_or_the_double_of_another():
    rng = np.random.default_rng(0)
    found = lf.describe(rng.gamma(2, 2, 200), rng.gamma(2, 2, (200, 8)), rng.uniform(0.1, 1, (200, 8)))
    assert found.shape == (200, len(lf.FEATURES)) == (200, 13)
    assert (found.std(0) > 0.01).all()
    alike = abs(np.corrcoef(found.T)) - np.eye(13)
    assert alike.max() < 1 - 1e-3, np.argwhere(alike > 1 - 1e-3)


def test_features_are_those_of_the_true_answer_at_one_size(make_model, some_facts):
    asked = some_facts[:4]
    ds = landscape.measure(make_model(), asked, k=4, sizes=(0.2, 0.6))
    found = lf.features(ds, size=0.6)
    for i in range(len(asked)):
        near, changed = ds["neighbour_loss"][i, 0, 1].values.tolist(), ds["changed"][i, 1].values
        want = slow_features(ds["loss"][i, 0].item(), near, changed)
        np.testing.assert_allclose(found[i], list(want.values()), rtol=1e-6)
    with pytest.raises(InputError, match=r"use one of 0.2, 0.6"):
        lf.features(ds, size=0.3)


def people(n=60, each=2):
    return np.repeat([f"person {i}" for i in range(n)], each)


def table(x, subjects):
    width = x.shape[1]
    assert width == len(lf.FEATURES)
    return xr.DataArray(x, {"feature": list(lf.FEATURES), "subject": ("fact", subjects)}, ("fact", "feature"))


def planted_in(column, strength, seed=0):
    """Features that are noise but for one column, which tells the first half of the people from the others."""
    rng = np.random.default_rng(seed)
    subjects = people()
    trained_on = np.arange(len(subjects)) < len(subjects) // 2
    x = rng.normal(size=(len(subjects), len(lf.FEATURES)))
    x[:, column] += strength * trained_on
    return x, trained_on, subjects


def test_the_gain_is_what_the_landscape_adds_to_the_loss():
    x, trained_on, subjects = planted_in(lf.FEATURES.index("mean_gradient"), 3.0)
    told = lf.tell_apart(table(x, subjects), trained_on)
    assert told.landscape.low > 0.85 and told.loss_alone.low < 0.5 < told.loss_alone.high
    assert told.gain.estimate == pytest.approx(told.landscape.estimate - told.loss_alone.estimate)
    assert told.gain.low > 0.2


def test_a_forest_learns_what_no_line_can(monkeypatch):
    """Trained on where a feature is extreme, high or low: the sign of an effect need not be known."""
    forest = lf.RandomForestClassifier
    monkeypatch.setattr(lf, "RandomForestClassifier", lambda _trees, **options: forest(10, **options))
    x, _, subjects = planted_in(0, 0.0)
    trained_on = abs(x[:, 4]) > np.median(abs(x[:, 4]))
    found = {kind: lf.out_of_fold(x, trained_on, subjects, kind=kind) for kind in ("logistic", "forest")}
    aucs = {kind: auc_interval(score[trained_on], score[~trained_on]) for kind, score in found.items()}
    assert aucs["forest"].low > 0.8 and aucs["logistic"].high < 0.7


def test_nothing_is_fitted_on_the_facts_that_are_judged(monkeypatch):
    """Scaling and the choice of features see only the other folds, in the search as in the last fit."""
    x, trained_on, subjects = planted_in(5, 1.0)
    x[:, 0] = np.arange(len(x))  # every fact can be told by its first feature
    fitted: list[set[float]] = []
    judged: list[set[float]] = []
    scale, judge = lf.StandardScaler.fit, lf.GridSearchCV.predict_proba

    def fit(self, rows, *args, **kwargs):
        fitted.append(set(rows[:, 0].tolist()))
        return scale(self, rows, *args, **kwargs)

    def predict_proba(self, rows):
        judged.append(set(rows[:, 0].tolist()))
        assert len(fitted) == 19  # 6 settings in 3 inner folds, and the best one on all
        who = [{subjects[int(i)] for i in facts} for facts in (set().union(*fitted), judged[-1])]
        assert not who[0] & who[1]
        fitted.clear()
        return judge(self, rows)

    monkeypatch.setattr(lf.StandardScaler, "fit", fit)
    monkeypatch.setattr(lf.GridSearchCV, "predict_proba", predict_proba)
    lf.out_of_fold(x, trained_on, subjects)
    assert len(judged) == 5 and set().union(*judged) == set(range(len(x)))


def test_the_units_of_features_do_not_matter_and_constant_ones_are_borne():
    x, trained_on, subjects = planted_in(3, 3.0)
    x[:, 5:] = 1.0
    score = lf.out_of_fold(x, trained_on, subjects)
    assert score.min() > 0 and score.max() < 1
    np.testing.assert_allclose(lf.out_of_fold(x * 64 - 8, trained_on, subjects), score, atol=1e-9)
    assert auc_interval(score[trained_on], score[~trained_on]).low > 0.9


def test_a_subject_counts_once_however_many_facts_it_has():
    score, trained_on = np.array([3.0, 1.0, 0.0, 5.0, 7.0]), np.array([True, True, False, False, True])
    names = ["Ada", "Ada", "Ben", "Ada", "Cleo"]  # one of Ada's facts was not trained on
    assert lf.by_subject(score, trained_on, names) == ([2.0, 7.0], [5.0, 0.0])
    copies = lf.by_subject(np.repeat(score, 4), np.repeat(trained_on, 4), np.repeat(names, 4))
    assert copies == lf.by_subject(score, trained_on, names)


def test_an_interval_is_widened_about_its_estimate_and_stays_in_bounds():
    assert pytest.approx(1.5) == lf.WIDER
    for found, least, low, high in (
        (Interval(0.5, 0.4, 0.7), 0, 0.35, 0.8),
        (Interval(0.1, 0.02, 0.8), 0, 0, 1),
        (Interval(-0.5, -0.9, 0.0), -1, -1, 0.25),
    ):
        wide = lf._widened(found, least)
        assert (wide.estimate, wide.low, wide.high) == (found.estimate, pytest.approx(low), pytest.approx(high))


def test_too_few_people_and_odd_numbers_are_told():
    x, trained_on, subjects = planted_in(0, 1.0)
    with pytest.raises(InputError, match="4 subjects; each needs at least 5"):
        lf.out_of_fold(x, np.arange(len(x)) < 8, subjects)
    x[3, 4] = math.nan
    with pytest.raises(InputError, match="1 of 120 facts"):
        lf.out_of_fold(x, trained_on, subjects)


def test_taught_facts_are_told_from_never_taught_ones_on_the_shipped_models(landscapes):
    trained_on = (landscapes["original"]["split"] == "forget").values
    told = lf.tell_apart(lf.features(landscapes["original"]), trained_on)
    assert told.landscape.low > 0.8 and told.loss_alone.estimate > 0.99  # so the landscape has nothing to add
    assert told.gain.low <= 0 <= told.gain.high
    aucs = {}
    for name in ("unlearned", "reference"):
        found = lf.features(landscapes[name])
        score = lf.out_of_fold(found.values, trained_on, found["subject"].values)
        aucs[name] = auc_interval(score[trained_on], score[~trained_on])
    assert aucs["unlearned"].low > 0.8
    assert aucs["reference"].low < 0.5


@pytest.mark.parametrize("seed", range(2))
def test_shuffled_labels_are_told_apart_by_chance_only(landscapes, seed):
    """The landscape of the original's own losses, membership dealt anew to people: 0.5 lies within the interval."""
    found = lf.features(landscapes["original"])
    subjects = found["subject"].values
    taught = dict(zip(np.unique(subjects), np.random.default_rng(seed).permutation(64) < 32, strict=True))
    trained_on = np.array([taught[name] for name in subjects])
    score = lf.out_of_fold(found.values, trained_on, subjects, seed=seed)
    auc = lf._widened(auc_interval(*lf.by_subject(score, trained_on, subjects)), 0)
    assert auc.low <= 0.5 <= auc.high
    assert auc.high - auc.low < 0.5
