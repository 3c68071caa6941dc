"""The mean over facts with its bootstrap band, for every figure that draws one."""

from typing import NamedTuple

import numpy as np
import xarray as xr
from matplotlib.axes import Axes

from lethescope.figures import style
from lethescope.measurement import value

SCALES = {"preference": "preference for\nthe true answer", "probability": "probability above\na wrong answer"}
"""What the value of a fact is called on an axis, by the scale its channel declares."""


class Band(NamedTuple):
    """Mean over facts and the ends of its 95 % bootstrap interval, one value per column, NaN where nothing was seen."""

    mean: np.ndarray
    low: np.ndarray
    high: np.ndarray


def band(values: xr.DataArray, *, seed: int = 0, draws: int = 1000) -> Band:
    """Return the mean over facts and its 95 % percentile bootstrap band, whole subjects drawn together.

    Facts of one subject are learned and lost together, so subjects are what is resampled (Field & Welsh 2007).
    NaN values are left out. With one subject the band has no width: that is no sign of certainty.

    Args:
        values: ``fact x``, any second dimension; the coordinate ``subject`` on ``fact`` names the clusters (each
            fact is its own where it is missing).
        seed: of the generator that draws.
        draws: how many times the subjects are drawn.

    Returns:
        Three arrays along ``x``.
    """
    numbers = np.asarray(values.transpose("fact", ...).values, dtype=float)
    sums, counts = _per_cluster(numbers, _clusters(values))
    n = len(sums)
    if n == 0:
        nothing = np.full(numbers.shape[1], np.nan)
        return Band(nothing, nothing, nothing)
    times = np.random.default_rng(seed).multinomial(n, np.full(n, 1 / n), size=draws).astype(float)
    means = _share(times @ sums, times @ counts)
    seen = counts.sum(0) > 0
    ends = np.full((2, numbers.shape[1]), np.nan)
    ends[:, seen] = np.nanquantile(means[:, seen], [0.025, 0.975], axis=0)
    return Band(_share(sums.sum(0), counts.sum(0)), ends[0], ends[1])


def _clusters(values: xr.DataArray) -> np.ndarray:
    """Return a whole number per fact, the same for facts of one subject."""
    names = values["subject"].values if "subject" in values.coords else np.arange(values.sizes["fact"])
    return np.unique(np.asarray(names).astype(str), return_inverse=True)[1]


def _per_cluster(numbers: np.ndarray, codes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return sum and count of the numbers that are not NaN, ``cluster x`` each."""
    sums = np.zeros((codes.max(initial=-1) + 1, numbers.shape[1]))
    counts = np.zeros_like(sums)
    np.add.at(sums, codes, np.nan_to_num(numbers))
    np.add.at(counts, codes, np.isfinite(numbers).astype(float))
    return sums, counts


def _share(total: np.ndarray, count: np.ndarray) -> np.ndarray:
    """Return total / count, NaN where the count is 0."""
    return np.divide(total, count, out=np.full(total.shape, np.nan), where=count > 0)


def of_split(values: xr.DataArray, split: str) -> xr.DataArray:
    """Return the facts of the split, none where there is none."""
    return values.isel(fact=np.flatnonzero(np.asarray(values["split"].values) == split))


def values_of(measurement: xr.Dataset, split: str) -> xr.DataArray:
    """Return the value of each fact of the split at each place, ``fact place``, on the scale of the channel."""
    return of_split(value(measurement), split)


def scale_of(measurement: xr.Dataset) -> str:
    """Return the scale of the channel as the label of an axis."""
    return SCALES.get(measurement.attrs["scale"], measurement.attrs["scale"])


def draw_band(axes: Axes, x: np.ndarray, drawn: Band, role: str) -> None:
    """Draw a mean line and its band in the role's look; "null: …" has the look of the null."""
    look = style.role_look(role.split(":")[0])
    axes.fill_between(x, drawn.low, drawn.high, color=look.color, alpha=0.18, linewidth=0)
    axes.plot(x, drawn.mean, color=look.color, linestyle=look.linestyle, marker=look.marker, label=role)
