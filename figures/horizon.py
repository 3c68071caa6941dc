"""Up to which layer the answer needs the states of the subject's tokens."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import xarray as xr
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from lethescope.errors import InputError
from lethescope.figures import style
from lethescope.figures.bands import Band, band, draw_band
from lethescope.probes.horizon import horizon

PANELS = {"group": "whole subject", "information": "strongest token"}
"""What is overwritten in each panel."""
SCORES = {"prob": "probability", "logprob": "log-probability (nats)"}


@style.styled
def paper(
    measurements: Mapping[str, xr.Dataset],
    *,
    split: str = "forget",
    null_split: str = "control",
    width: str | float = "neurips",
    seed: int = 0,
) -> Figure:
    """Draw what overwriting the subject's states after each layer costs the answer, one line a model.

    Left, all tokens of the subject at once; right, of each fact the token with the largest information, its sign kept.
    Lines are means over facts, bands 95 % bootstrap intervals with subjects drawn whole. Short lines at the top of the
    left panel mark the median horizon of a model's facts, where the band of its largest mean leaves out 0. Past it the
    answer no longer depends on the subject's own states; that does not mean forgotten: what was there may have moved on
    to later tokens. Below 0 the subject speaks against its answer.

    Args:
        measurements: role to measurement, as `lethescope.probes.horizon.measure` returns it, all with one score.
        split: the facts drawn.
        null_split: facts that no model was taught, drawn for the unlearned model, or the last one; "" for none.
        width: preset name of `style.WIDTHS`, or inches.
        seed: of the bootstrap.

    Returns:
        The figure; its label is its description in words.

    Raises:
        InputError: there is no measurement, one is no horizon, scores differ, or there is no fact of the split.
    """
    lines = _lines(measurements, split, null_split)
    figure = style.blank(width, 2.2)
    space = "\n" if figure.get_figwidth() < style.NARROW else " "
    panels = dict(zip(PANELS, figure.subplots(1, len(PANELS), sharey=True), strict=True))
    for name, axes in panels.items():
        axes.set_title(PANELS[name])
        axes.set_xlabel(f"overwritten{space}after layer")
        axes.axhline(0, color=style.FAINT, linewidth=0.6, zorder=0.5)
    drawn = {name: _panel(axes, lines, name, seed) for name, axes in panels.items()}["group"]
    sure = [role for role, found in drawn.items() if _above_noise(found) and not role.startswith("null")]
    _mark(panels["group"], {role: lines[role] for role in sure})
    score = SCORES[str(next(iter(lines.values())).attrs["score"])]
    panels["group"].set_ylabel(f"lost {score}\nof the answer")
    handles, labels = panels["group"].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=style.legend_columns(figure))
    start = f"Lost {score} where the subject's states are overwritten (0 = the answer does not need them)."
    figure.set_label(" ".join([start, *(_in_words(role, lines[role], found.mean) for role, found in drawn.items())]))
    return figure


def _panel(axes: Axes, lines: Mapping[str, xr.Dataset], name: str, seed: int) -> dict[str, Band]:
    """Draw every line of a panel, and return them."""
    found = {}
    for role, ds in lines.items():
        values = ds[name] if name == "group" else _strongest(ds[name])
        found[role] = band(values.transpose("fact", "layer"), seed=seed)
        draw_band(axes, ds["layer"].values.astype(float), found[role], role)
    axes.xaxis.set_major_locator(MaxNLocator("auto", integer=True, min_n_ticks=1))
    return found


def _lines(measurements: Mapping[str, xr.Dataset], split: str, null_split: str) -> dict[str, xr.Dataset]:
    """Return the facts of each line.

    Raises:
        InputError: see `paper`.
    """
    lines = {}
    for role, ds in measurements.items():
        if not {*PANELS} <= {*ds.data_vars}:
            raise InputError(f"{role}: this is no information horizon; it needs {' and '.join(PANELS)}")
        lines[role] = _of_split(ds, split)
    scores = {str(ds.attrs.get("score")) for ds in lines.values()}
    if len(scores) > 1:
        raise InputError(f"these measurements have different scores, {' and '.join(sorted(scores))}; measure all alike")
    if lines and null_split:
        last = "unlearned" if "unlearned" in lines else list(lines)[-1]
        lines["null: control facts"] = _of_split(measurements[last], null_split)
    lines = {role: ds for role, ds in lines.items() if ds["group"].notnull().any()}
    if not {*lines} & {*measurements}:
        raise InputError(f"no measurement has facts of the split {split!r} whose prompt names their subject")
    return lines


def _of_split(ds: xr.Dataset, split: str) -> xr.Dataset:
    return ds.isel(fact=np.flatnonzero(ds["split"].values == split))


def _strongest(information: xr.DataArray) -> xr.DataArray:
    """Return the information of the unit in which it is largest, with its sign: (fact layer).

    >>> information = xr.DataArray([[[0.1, -0.5, np.nan]]], dims=("fact", "layer", "unit"))
    >>> _strongest(information).values.tolist()
    [[-0.5]]
    """
    unit = abs(information).fillna(-1).argmax("unit")
    return information.isel(unit=unit)


def _above_noise(drawn: Band) -> bool:
    """Whether the band of the largest mean leaves out 0: a horizon of noise means nothing."""
    if not np.isfinite(drawn.mean).any():
        return False
    top = int(np.nanargmax(np.abs(drawn.mean)))
    return bool(drawn.low[top] > 0 or drawn.high[top] < 0)


def _mark(axes: Axes, lines: Mapping[str, xr.Dataset]) -> None:
    """Mark the median horizons at the top, one below the other, and say what they are."""
    found = {role: horizon(ds, "group") for role, ds in lines.items()}
    medians = {role: float(each.median()) for role, each in found.items() if each.notnull().any()}
    low, high = axes.get_ylim()
    axes.set_ylim(low, high + (0.1 + 0.07 * len(medians)) * (high - low))
    for place, (role, median) in enumerate(medians.items()):
        top = 1 - 0.07 * place
        axes.axvline(median, top - 0.055, top, color=style.role_look(role).color, linewidth=2.5, solid_capstyle="butt")
    if medians:
        far = max(medians.values()) > np.mean(axes.get_xlim())
        x, side = (min(medians.values()), "right") if far else (max(medians.values()), "left")
        gap = (5 if side == "left" else -5, 0)
        options: dict[str, Any] = {
            "xytext": gap,
            "textcoords": "offset points",
            "ha": side,
            "va": "top",
            "fontsize": 6.5,
        }
        axes.annotate("median horizon", (x, 1), xycoords=axes.get_xaxis_transform(), color=style.FAINT, **options)


def _in_words(role: str, ds: xr.Dataset, mean: np.ndarray) -> str:
    layers, found = ds["layer"].values, horizon(ds, "group")
    known = f"median horizon layer {float(found.median()):g}" if found.notnull().any() else "horizon not known"
    return f"{role}: {mean[0]:z.2f} after layer {layers[0]}, {mean[-1]:z.2f} after layer {layers[-1]}, {known}."
