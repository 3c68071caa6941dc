"""How well each model reads what stands in front of it: along the context, and facts beside units that are no facts."""

from collections.abc import Mapping

import numpy as np
import xarray as xr
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from lethescope.errors import InputError
from lethescope.facts import SPLITS
from lethescope.figures import style
from lethescope.probes.context import COORDS, by_bin
from lethescope.probes.context_units import NEUTRAL

NAMES = {
    "best": "share of units whose true\nanswer scores highest",
    "correct": "share of units whose\nanswer is said",
    "best_without": "share of units whose true answer\nscores highest, no context",
}
"""What is drawn, as the label of an axis."""
WAYS = {"document": "both ways", "code": "backward", "database": "forward"}
"""Where the answer stands, seen from what is given."""
BELOW = "position in the context (neutral units);\nall facts of each split"
_BINS = 4
_APART, _GAP = 1.5, 0.8  # widths of a bin: from a split of facts to the next, and from the bins to the first
_LOWER = 13.5  # points from the axis to a lower name
_CHANCE = {"color": style.FAINT, "linewidth": 0.8}


@style.styled
def paper(measurements: Mapping[str, xr.Dataset], *, name: str = "best", width: str | float = "neurips") -> Figure:
    """Draw how many units each model reads, one panel a direction, one line a model.

    Left in a panel, units that are no facts, in four bins along the context; right, all forget, retain and control
    facts, which stood among these units at drawn places. Upright lines are exact (Clopper-Pearson) 95 % intervals;
    units of one context count as independent. Forget facts below retain facts: the model still tells them apart. That
    says nothing about what the weights hold, and facts that are read alike do not show that anything was forgotten.
    Chance is drawn for each group by itself, as splits with fewer facts in a context have fewer wrong answers: compare
    splits only where their chances are equal.

    Args:
        measurements: role to measurement, as `lethescope.probes.context.measure` returns it, of the same contexts.
        name: `best`, `correct` or `best_without`.
        width: preset name of `style.WIDTHS`, or inches.

    Returns:
        The figure; its label is its description in words.

    Raises:
        InputError: there is no measurement, one is not of this probe or lacks the variable, or the contexts differ.
    """
    first = _alike(measurements)
    bins = min(_BINS, int(first["position"].max()) + 1)
    tables = {role: by_bin(ds, name, bins=bins) for role, ds in measurements.items()}
    splits: list[str] = [split for split in SPLITS if split in first["split"].values]
    by_luck = None if name == "correct" else chance(first)
    figure, panels = _panels(width, list(dict.fromkeys(first["direction"].values.tolist())))
    for direction, axes in panels.items():
        for place, (role, table) in enumerate(tables.items()):
            _line(axes, table.sel(direction=direction), splits, role, 0.62 * ((place + 0.5) / len(tables) - 0.5))
        if by_luck is not None:
            _draw_chance(axes, by_luck.sel(direction=direction), splits, bins)
        _dress(axes, table.sel(direction=direction), splits, low=not _stacked(figure))
    every, middle = list(panels.values()), len(panels) // 2
    every[middle if _stacked(figure) else 0].set_ylabel(NAMES[name])
    every[-1 if _stacked(figure) else middle].set_xlabel(BELOW if splits else BELOW.split(";")[0])
    handles, labels = axes.get_legend_handles_labels()
    if by_luck is not None:
        handles, labels = [*handles, Line2D([], [], **_CHANCE)], [*labels, "chance"]  # type: ignore[arg-type]
    figure.legend(handles, labels, loc="outside lower center", ncols=style.legend_columns(figure))
    start = f"Context probes: {' '.join(NAMES[name].split())}."
    told = [_in_words(role, table, [NEUTRAL, *splits], by_luck) for role, table in tables.items()]
    figure.set_label(" ".join([start, *told]))
    return figure


def chance(ds: xr.Dataset) -> xr.DataArray:
    """Return how often the true answer would score highest by luck: (direction, split), in (0, 1].

    It is the mean of 1 / (1 + n) over the units that were asked, where n is how many wrong answers a unit had: as many
    as `rivals`, or fewer where a context has fewer units of its split. NaN where nothing was asked.

    Args:
        ds: what `lethescope.probes.context.measure` returns.

    >>> score = [[-1.0, -2.0, np.nan], [-1.0, -2.0, -3.0]]
    >>> where = {"direction": ("query", ["code", "code"]), "split": ("query", ["forget", "retain"])}
    >>> chance(xr.Dataset({"score": (("query", "candidate"), score)}, where)).values.round(2).tolist()
    [[0.5, 0.33]]
    """
    n = ds["score"].count("candidate").values
    luck = np.divide(1.0, n, out=np.full(len(n), np.nan), where=n > 0)
    directions, splits = (list(dict.fromkeys(ds[axis].values.tolist())) for axis in ("direction", "split"))
    groups = [
        [luck[(ds["direction"] == d).values & (ds["split"] == s).values & (n > 0)] for s in splits] for d in directions
    ]
    means = [[float(group.mean()) if len(group) else np.nan for group in row] for row in groups]
    return xr.DataArray(means, {"direction": directions, "split": splits}, ("direction", "split"))


def _alike(measurements: Mapping[str, xr.Dataset]) -> xr.Dataset:
    """Return the first measurement.

    Raises:
        InputError: see `paper`.
    """
    if not measurements:
        raise InputError("there is no measurement to draw; give at least one")
    first, *_ = measurements
    for role, ds in measurements.items():
        if not {"score", *COORDS} <= {*ds.variables}:
            raise InputError(f"{role}: this is no measurement of the context probe")
        one, other = measurements[first], ds
        same = one["score"].shape == other["score"].shape and all(one[c].equals(other[c]) for c in COORDS)
        if not same or (one["score"].isnull() != other["score"].isnull()).any():
            raise InputError(f"{first} and {role} were not asked the same contexts; measure both alike")
    return measurements[first]


def _stacked(figure: Figure) -> bool:
    return bool(figure.get_figwidth() < style.NARROW)


def _panels(width: str | float, directions: list[str]) -> tuple[Figure, dict[str, Axes]]:
    """Return a figure with a panel for each direction: side by side, or one above the other where it is narrow."""
    n = len(directions)
    if style.width_of(width) < style.NARROW:
        figure = style.blank(width, 0.75 + 1.15 * n)
        grid = figure.subplots(n, 1, sharex=True, sharey=True, squeeze=False)
    else:
        figure = style.blank(width, 2.6)
        grid = figure.subplots(1, n, sharex=True, sharey=True, squeeze=False)
    panels = dict(zip(directions, grid.flat, strict=True))
    for direction, axes in panels.items():
        axes.set_title(f"{direction}, {WAYS[direction]}")
    return figure, panels


def _places(bins: int, splits: list[str]) -> np.ndarray:
    """Where the splits of facts stand, right of the bins."""
    return bins + _GAP + _APART * (np.arange(len(splits)) + 0.5)


def _line(axes: Axes, table: xr.Dataset, splits: list[str], role: str, shift: float) -> None:
    """Draw a model: its line through the bins, and what it reads of the facts."""
    look = style.role_look(role)
    neutral = table.sel(split=NEUTRAL)
    facts = table.sel(split=splits)
    bins = table.sizes["bin"]
    both = (
        (np.arange(bins) + 0.5, neutral, ("accuracy", "low", "high"), 1.2, role),
        (_places(bins, splits), facts, ("overall", "overall_low", "overall_high"), 0.6, "_facts"),
    )
    for x, found, names, width, label in both:
        y, low, high = (found[each].values for each in names)
        axes.vlines(x + shift, low, high, color=look.color, linewidth=0.7, alpha=0.6)
        axes.plot(x + shift, y, look.marker, color=look.color, linestyle=look.linestyle, linewidth=width, label=label)


def _draw_chance(axes: Axes, by_luck: xr.DataArray, splits: list[str], bins: int) -> None:
    half = 0.45 * _APART
    axes.hlines(float(by_luck.sel(split=NEUTRAL)), 0, bins, zorder=0.5, **_CHANCE)  # type: ignore[arg-type]
    for x, split in zip(_places(bins, splits), splits, strict=True):
        axes.hlines(float(by_luck.sel(split=split)), x - half, x + half, zorder=0.5, **_CHANCE)  # type: ignore[arg-type]


def _dress(axes: Axes, table: xr.Dataset, splits: list[str], *, low: bool) -> None:
    """Give a panel the edges of its bins and the names of splits, every other one lower where they would touch."""
    bins = table["bin"].values.tolist()
    edges = [int(each.split("-")[0]) for each in bins] + [int(bins[-1].split("-")[1]) + 1]
    where = _places(len(bins), splits)
    axes.set_xticks([*range(len(edges)), *where], [*map(str, edges), *splits])
    for tick in axes.xaxis.get_major_ticks()[len(edges) :: 2] if low else ():
        tick.set_pad(_LOWER)
    axes.set_xlim(-0.15, where[-1] + _APART / 2 if len(where) else len(bins) + 0.15)
    axes.set_ylim(-0.03, 1.03)
    if splits:
        axes.axvline(len(bins) + _GAP / 2, color=style.PALE, linewidth=0.6, zorder=0.4)
    for x, split in zip(where, splits, strict=True):
        if not table["count"].sel(split=split).any():
            axes.text(x, 0.04, "not asked", color=style.FAINT, fontsize=6.5, rotation=90, ha="center", va="bottom")


def _in_words(role: str, table: xr.Dataset, splits: list[str], by_luck: xr.DataArray | None) -> str:
    said = []
    for direction in table["direction"].values.tolist():
        groups = []
        for split in splits:
            part, n = (
                table.sel(direction=direction, split=split),
                int(table["count"].sel(direction=direction, split=split).sum()),
            )
            luck = "" if by_luck is None else f", chance {float(by_luck.sel(direction=direction, split=split)):.2f}"
            groups.append(f"{split} {float(part['overall']):.2f} (of {n}{luck})" if n else f"{split} not asked")
        said.append(f"{direction} {', '.join(groups)}")
    return f"{role}: {'; '.join(said)}."
