"""Measurements: labelled arrays with their provenance, and the value of a fact that residues are made of."""

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import xarray as xr

from lethescope.errors import InputError
from lethescope.facts import Fact

REQUIRED = ("probe", "version", "parameters", "model", "facts", "dtype", "device", "seed", "citation", "units", "scale")
"""The attributes without which an array is not a Measurement."""


def from_scores(
    score: np.ndarray,
    facts: Sequence[Fact],
    places: Sequence[str],
    *,
    place_coords: Mapping[str, Sequence[Any]] | None = None,
    variables: Mapping[str, tuple[Sequence[str], np.ndarray]] | None = None,
) -> xr.Dataset:
    """Label scores (fact candidate place): mean log-probability per answer token; candidate 0 is the true answer.

    `variables` are further arrays with their dims; `place_coords` are further coordinates of the places (a layer, a
    decoder). The engine adds the provenance.
    """
    data = {"score": (("fact", "candidate", "place"), np.asarray(score, dtype=np.float64)), **(variables or {})}
    coords = {
        **fact_coords(facts),
        "candidate": np.arange(score.shape[1]),
        "place": list(places),
        **{name: ("place", list(values)) for name, values in (place_coords or {}).items()},
    }
    return xr.Dataset(data, coords)


def fact_coords(facts: Sequence[Fact]) -> dict[str, Any]:
    """Return the coordinates that every array over facts has: id, subject, split and relation."""
    told = {name: ("fact", [getattr(f, name) for f in facts]) for name in ("subject", "split", "relation")}
    return {"fact": [f.id for f in facts], **told}


def preference(ds: xr.Dataset, name: str = "score") -> xr.DataArray:
    """How much the true answer is preferred to the alternatives: (fact place), chance-corrected.

    `(p - 1/n) / (1 - 1/n)` where p is the true answer's share in a softmax over the n candidates' scores: 1 = surely
    the true one, 0 = no preference, `-1/(n-1)` = surely a wrong one. NaN for a fact without alternatives. It does not
    say that the model would *output* the answer: all candidates may be improbable.
    """
    score = ds[name]
    n = score.count("candidate")
    share = xr.ufuncs.exp(score - score.max("candidate"))
    share = (share / share.sum("candidate")).isel(candidate=0, drop=True)
    chance = 1 / n.where(n > 1)
    return (share - chance) / (1 - chance)


def probability(ds: xr.Dataset, name: str = "score") -> xr.DataArray:
    """How much likelier the true answer is than a wrong one, in absolute terms: (fact place), in [-1, 1].

    `exp(score_true) - mean_k exp(score_k)` over the alternatives k (nothing is taken off where there are none). The
    score is a mean over tokens, so this is a geometric mean of token probabilities.
    """
    likely = xr.ufuncs.exp(ds[name])
    wrong = likely.isel(candidate=slice(1, None)).mean("candidate").fillna(0)
    return likely.isel(candidate=0, drop=True) - wrong


def value(ds: xr.Dataset, name: str = "score") -> xr.DataArray:
    """Return the value of each fact at each place, on the scale that the Measurement's channel declares."""
    return {"preference": preference, "probability": probability}[ds.attrs["scale"]](ds, name)


def check(ds: xr.Dataset) -> xr.Dataset:
    """Return the Measurement, or say which of its attributes are missing.

    Raises:
        InputError: an attribute of `REQUIRED` is missing.
    """
    missing = [name for name in REQUIRED if name not in ds.attrs]
    if missing:
        raise InputError(f"this is not a Measurement: attributes {', '.join(missing)} are missing")
    return ds


def to_json(value: Any) -> str:
    """Write a value as JSON with sorted keys, the form in which attributes and keys are kept."""
    return json.dumps(value, sort_keys=True, ensure_ascii=False, default=str)


def save(ds: xr.Dataset, path: Path) -> None:
    """Write a Measurement as netCDF under a temporary name, then rename: a killed run leaves no half file."""
    with replacing(path) as temporary:
        temporary.write_bytes(bytes(check(ds).to_netcdf(engine="h5netcdf")))


def open_(path: Path) -> xr.Dataset:
    """Read a Measurement into memory.

    Raises:
        InputError: the file is not one.
    """
    try:
        return check(xr.load_dataset(path, engine="h5netcdf"))
    except OSError as error:
        raise InputError(f"{path} is not a readable Measurement ({error}); delete it and run again") from error


def is_being_written(temporary: Path) -> bool:
    """Whether the process whose number is in a temporary file's name is still there: another audit's, most likely."""
    number = temporary.name.removesuffix(".tmp").rpartition(".")[2]
    try:
        os.kill(int(number), 0)
    except (ValueError, OverflowError, ProcessLookupError):
        return False
    except OSError:
        pass  # it is there, and somebody else's
    return True


class replacing:
    """Give a temporary path beside `path`; on success it takes the place of `path`, on failure it is removed.

    Raises:
        InputError: the disk is full or the folder cannot be written.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")

    def __enter__(self) -> Path:
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise InputError(f"cannot make the folder {self.path.parent}: {error.strerror or error}") from error
        return self.temporary

    def __exit__(self, kind: Any, error: BaseException | None, _trace: Any) -> None:
        if error is None:
            self.temporary.replace(self.path)
            return
        self.temporary.unlink(missing_ok=True)
        if isinstance(error, OSError):
            raise InputError(
                f"cannot write {self.path}: {error.strerror or error}; nothing half-written is left"
            ) from error
