import numpy as np
import pytest
import xarray as xr

from lethescope.figures.bands import band, of_split


def array(values, subjects=None):
    coords = {} if subjects is None else {"subject": ("fact", subjects)}
    return xr.DataArray(np.asarray(values, dtype=float), dims=("fact", "x"), coords=coords)


def slow_band(values, subjects, seed, draws):
    """The textbook: draw subjects with replacement, put their facts into one list, take the mean."""
    names = sorted(set(subjects))
    rng = np.random.default_rng(seed)
    means = []
    for counts in rng.multinomial(len(names), np.full(len(names), 1 / len(names)), size=draws):
        rows = [v for name, n in zip(names, counts, strict=True) for _ in range(n)
                for v, s in zip(values, subjects, strict=True) if s == name]  # fmt: skip
        columns = [[v for v in column if not np.isnan(v)] for column in zip(*rows, strict=True)]
        means.append([np.mean(column) if column else np.nan for column in columns])
    return np.nanquantile(means, [0.025, 0.975], axis=0)


def test_the_band_is_the_textbooks():
    rng = np.random.default_rng(0)
    values = rng.standard_normal((11, 3))
    values[rng.random(values.shape) < 0.2] = np.nan
    subjects = ["c", "a", "a", "b", "b", "b", "d", "d", "e", "e", "f"]
    found = band(array(values, subjects), seed=5, draws=200)
    low, high = slow_band(values, subjects, 5, 200)
    assert found.mean == pytest.approx(np.nanmean(values, 0))
    assert found.low == pytest.approx(low)
    assert found.high == pytest.approx(high)


def test_facts_of_one_subject_are_not_independent():
    values = np.repeat(np.random.default_rng(0).standard_normal(10), 10)[:, None]
    apart, together = band(array(values)), band(array(values, [str(i // 10) for i in range(100)]))
    assert np.ptp([together.low, together.high]) > 2 * np.ptp([apart.low, apart.high])


def test_the_band_covers_the_truth_about_as_often_as_it_says():
    rng = np.random.default_rng(1)
    hits = 0
    for trial in range(200):
        found = band(array(rng.standard_normal((60, 1))), seed=trial, draws=300)
        hits += found.low[0] <= 0 <= found.high[0]
    assert 0.89 <= hits / 200 <= 0.99


def test_what_was_not_seen_stays_unknown():
    found = band(array([[1.0, np.nan], [2.0, np.nan]]))
    assert found.mean[0] == pytest.approx(1.5)
    assert np.isnan([found.mean[1], found.low[1], found.high[1]]).all()
    assert np.isnan(band(array(np.zeros((0, 2)))).mean).all()


def test_one_fact_has_a_band_without_width():
    assert band(array([[0.5]])) == (0.5, 0.5, 0.5)


def test_of_split_keeps_only_that_split():
    values = array(np.arange(4)[:, None]).assign_coords(split=("fact", ["forget", "control", "forget", "retain"]))
    assert of_split(values, "forget").values.ravel().tolist() == [0, 2]
    assert of_split(values, "other").sizes["fact"] == 0
