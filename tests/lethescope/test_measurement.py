"""Tests of labelled scores, of what becomes of them, and of writing them whole or not at all."""

import errno
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import xarray as xr

from lethescope import measurement
from lethescope.errors import InputError


def scores(facts: Any, *, scale: str = "preference") -> xr.Dataset:
    """A whole Measurement of 3 facts, 4 candidates, 2 places; the last fact has one alternative only."""
    score = -np.random.default_rng(0).gamma(2, size=(3, 4, 2))
    score[2, 2:] = np.nan
    ds = measurement.from_scores(score, facts[:3], ["block 0", "block 1"], place_coords={"layer": [0, 1]})
    return ds.assign_attrs({**dict.fromkeys(measurement.REQUIRED, "x"), "scale": scale})


def test_scores_are_labelled(some_facts: Any) -> None:
    ds = scores(some_facts)
    assert ds["score"].dims == ("fact", "candidate", "place")
    assert ds["fact"].values.tolist() == [f.id for f in some_facts[:3]]
    assert ds["subject"].sel(fact=some_facts[2].id).item() == some_facts[2].subject
    assert ds["layer"].sel(place="block 1").item() == 1


def test_preference_equals_its_formula_fact_by_fact(some_facts: Any) -> None:
    ds = scores(some_facts)
    found = measurement.value(ds)
    for i in range(3):
        for place in range(2):
            one = ds["score"].values[i, :, place]
            one = one[~np.isnan(one)]
            share = np.exp(one[0]) / np.exp(one).sum()
            wanted = (share - 1 / len(one)) / (1 - 1 / len(one))
            assert found.values[i, place] == pytest.approx(wanted)


def test_preference_has_its_limits(some_facts: Any) -> None:
    score = np.array([[[0.0], [-900.0], [-900.0]], [[-900.0], [0.0], [-900.0]], [[-3.0], [-3.0], [-3.0]]])
    ds = measurement.from_scores(score, some_facts[:3], ["only"])
    assert measurement.preference(ds).values[:, 0].tolist() == pytest.approx([1, -0.5, 0])
    alone = measurement.from_scores(score[:, :1], some_facts[:3], ["only"])
    assert np.isnan(measurement.preference(alone)).all()


def test_probability_equals_its_formula(some_facts: Any) -> None:
    ds = scores(some_facts, scale="probability")
    wrong = np.nanmean(np.exp(ds["score"].values[:, 1:]), 1)
    np.testing.assert_allclose(measurement.value(ds), np.exp(ds["score"].values[:, 0]) - wrong)
    alone = ds.isel(candidate=slice(0, 1))
    np.testing.assert_allclose(measurement.value(alone), np.exp(ds["score"].values[:, 0]))


def test_what_is_saved_is_read_back_equal(some_facts: Any, tmp_path: Path) -> None:
    ds = scores(some_facts)
    measurement.save(ds, tmp_path / "new" / "say.original.nc")
    again = measurement.open_(tmp_path / "new" / "say.original.nc")
    xr.testing.assert_identical(again, ds)
    assert [p.name for p in (tmp_path / "new").iterdir()] == ["say.original.nc"]


def test_arrays_without_provenance_are_no_measurements(some_facts: Any, tmp_path: Path) -> None:
    ds = scores(some_facts)
    del ds.attrs["citation"], ds.attrs["seed"]
    with pytest.raises(InputError, match="attributes seed, citation are missing"):
        measurement.save(ds, tmp_path / "a.nc")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("content", [b"", b"not netCDF at all"])
def test_a_broken_file_is_told_in_one_line(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "a.nc"
    path.write_bytes(content)
    with pytest.raises(InputError, match="delete it and run again") as told:
        measurement.open_(path)
    assert "\n" not in str(told.value)


def test_a_full_disk_leaves_what_was_there(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("before", encoding="utf-8")
    with pytest.raises(InputError, match="No space left on device; nothing half-written"):  # ruff: ignore[multiple-with-statements]
        with measurement.replacing(path) as temporary:
            temporary.write_text("half", encoding="utf-8")
            raise OSError(errno.ENOSPC, "No space left on device")
    assert path.read_text(encoding="utf-8") == "before"
    assert [p.name for p in tmp_path.iterdir()] == ["a.txt"]


def test_a_stopped_write_leaves_what_was_there(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    with pytest.raises(KeyboardInterrupt), measurement.replacing(path) as temporary:
        temporary.write_text("half", encoding="utf-8")
        raise KeyboardInterrupt
    assert not list(tmp_path.iterdir())


def test_json_does_not_depend_on_the_order_of_keys() -> None:
    assert measurement.to_json({"b": 1, "a": (2, "é")}) == measurement.to_json({"a": [2, "é"], "b": 1})
