"""The relearning curve: how fast the held-out answers come back when other facts are trained."""

from collections.abc import Mapping

import numpy as np
import xarray as xr
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from lethescope.errors import InputError
from lethescope.figures import style
from lethescope.figures.bands import band, draw_band, of_split, scale_of
from lethescope.measurement import value


@style.styled
def paper(
    measurements: Mapping[str, xr.Dataset],
    *,
    width: str | float = "neurips",
    split: str = "forget",
    null_split: str = "control",
    seed: int = 0,
) -> Figure:
    """Draw the held-out value of the true answer against the training steps, every role, one panel a rate.

    Training on other facts may bring back held-out ones. What counts is the distance to the null lines (references,
    and the control facts of the unlearned model), which guess better after training, too, because they learn the form
    of an answer. A curve that stays at the null does not prove that a larger budget would leave it there.

    Args:
        measurements: role to measurement of the relearn channel: ``score(fact, candidate, place)`` of facts that were
            held out, with the coordinates ``step`` and, for one panel each, ``rate`` and ``method`` ("full", "lora")
            on ``place``; ``split`` and ``subject`` on ``fact``. ``before(fact, candidate)``, the scores without
            training, is drawn as step 0.
        width: preset name of `style.WIDTHS`, or inches.
        split: the held-out facts drawn for every role.
        null_split: drawn for the unlearned model as the null, where it has such facts; "" for none.
        seed: of the bootstrap.

    Returns:
        The figure; its label is its description in words.

    Raises:
        InputError: there is no measurement, one lacks ``step``, or none has facts of the split.
    """
    lines = _lines(measurements, split, null_split)
    scale = scale_of(next(iter(measurements.values())))
    panels = list(dict.fromkeys(panel for values in lines.values() for panel in _panels(values)))
    columns = min(len(panels), 3 if style.width_of(width) > style.NARROW else 2)
    figure = style.blank(width, 0.9 + 1.5 * -(-len(panels) // columns))
    grid = figure.subplots(-(-len(panels) // columns), columns, sharex=True, sharey=True, squeeze=False)
    words = []
    for axes, panel in zip(grid.flat, panels, strict=False):
        axes.set_title(panel)
        words += [_line(axes, role, values, panel, seed) for role, values in lines.items()]
    _dress(figure, grid, len(panels), f"held-out {scale}")
    start = f"Relearning: held-out {scale} over the training steps (0 = chance, 1 = certain)."
    figure.set_label(" ".join([start, *filter(None, words)]).replace("\n", " "))
    return figure


def _dress(figure: Figure, grid: np.ndarray, used: int, label: str) -> None:
    """Give the panels in use their axes, empty the others, and put one legend below."""
    columns = grid.shape[1]
    for place, axes in enumerate(grid.flat):
        if place >= used:
            axes.set_axis_off()
            continue
        axes.axhline(0, color=style.FAINT, linewidth=0.6, zorder=0.5)
        axes.set_ylim(min(axes.get_ylim()[0], -0.05), 1.05)
        axes.xaxis.get_major_locator().set_params(integer=True, nbins=5)
        axes.set_ylabel(label if place % columns == 0 else "")
        if place + columns >= used:  # nothing below
            axes.set_xlabel("training step")
            axes.tick_params(labelbottom=True)
    handles, labels = grid.flat[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=style.legend_columns(figure))


def _lines(measurements: Mapping[str, xr.Dataset], split: str, null_split: str) -> dict[str, xr.DataArray]:
    """Return the values of each role's facts of the split, and of the null's, ``fact place``.

    Raises:
        InputError: there is nothing to draw.
    """
    lines = {}
    for role, measurement in measurements.items():
        if "step" not in measurement.coords:
            raise InputError(f"{role}: the measurement has no coordinate 'step' on 'place': not a relearning curve")
        lines[role] = of_split(_with_start(measurement), split)
        if role == "unlearned" and null_split:
            lines["null: control facts"] = of_split(_with_start(measurement), null_split)
    lines = {role: values for role, values in lines.items() if values.sizes["fact"]}
    if not lines:
        raise InputError(f"no measurement of a relearning curve with facts of the split {split!r}")
    return lines


def _with_start(measurement: xr.Dataset) -> xr.DataArray:
    """Return the value of each fact at each place, with the value before training as the coordinate ``start``."""
    values = value(measurement).transpose("fact", "place")
    if "before" not in measurement:
        return values
    return values.assign_coords(start=("fact", value(measurement, "before").values))


def _panels(values: xr.DataArray) -> list[str]:
    """Return the title of the panel of every place: what was trained and its learning rate, where that is told."""
    titles = [""] * values.sizes["place"]
    for name, form in (("method", "{}"), ("rate", "rate {:g}")):
        if name in values.coords:
            parts = [form.format(found) for found in values[name].values.tolist()]
            titles = [", ".join(filter(None, both)) for both in zip(titles, parts, strict=True)]
    return titles


def _line(axes: Axes, role: str, values: xr.DataArray, panel: str, seed: int) -> str:
    """Draw one role in one panel and return it in words."""
    here = values.isel(place=[i for i, title in enumerate(_panels(values)) if title == panel])
    if not here.sizes["place"]:
        return ""
    by_step = here.groupby("step").mean().transpose("fact", "step")
    steps, numbers = by_step["step"].values.astype(float), by_step.values
    if "start" in by_step.coords:
        steps, numbers = np.append(0, steps), np.column_stack([by_step["start"].values, numbers])
    subject = {"subject": by_step["subject"]} if "subject" in by_step.coords else {}
    drawn = band(xr.DataArray(numbers, dims=("fact", "step"), coords=subject), seed=seed)
    draw_band(axes, steps, drawn, role)
    if not np.isfinite(drawn.mean).any():
        return f"{role}: not known."
    return f"{panel}, {role}: starts at {drawn.mean[0]:z.2f}, best {np.nanmax(drawn.mean):z.2f}.".removeprefix(", ")
