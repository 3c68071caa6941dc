"""The loss of answers at their prompts and around them: the true answer against its alternatives."""

from collections.abc import Mapping

import numpy as np
import xarray as xr
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from lethescope.errors import InputError
from lethescope.figures import style
from lethescope.figures.bands import band, draw_band, of_split

WRONG = "null: wrong answers"


@style.styled
def paper(
    measurements: Mapping[str, xr.Dataset], *, split: str = "forget", width: str | float = "neurips", seed: int = 0
) -> Figure:
    """Draw the loss against how much of the prompt was replaced, one panel a model; 0 is the prompt itself.

    Lines are means over facts (over neighbours and, for wrong answers, over the alternatives first), bands 95 %
    bootstrap intervals with subjects drawn whole. A true answer that rises more steeply from 0 than wrong ones is a
    sharp minimum, one that falls a sharp maximum, as after being pushed down. Lines that are parallel do not prove that
    the fact is gone: it may be tied to all words alike. Look at the distance, too: a high line was made unlikely.

    Args:
        measurements: role to measurement, as `lethescope.probes.landscape.measure` returns it.
        split: the facts drawn.
        width: preset name of `style.WIDTHS`, or inches.
        seed: of the bootstrap.

    Returns:
        The figure; its label is its description in words.

    Raises:
        InputError: there is no measurement, one is no landscape, or it has no fact of the split.
    """
    if not measurements:
        raise InputError("there is no measurement to draw; give at least one")
    losses = {role: _losses(role, ds, split) for role, ds in measurements.items()}
    columns = min(len(losses), 2 if style.width_of(width) < style.NARROW else 3)
    lines = -(-len(losses) // columns)
    figure = style.blank(width, 0.8 + 1.5 * lines)
    grid = figure.subplots(lines, columns, sharex=True, sharey=True, squeeze=False)
    words = ["Loss of answers (nats per answer token) at the prompt and around it."]
    for place, axes in enumerate(grid.flat):
        if place >= len(losses):
            axes.set_axis_off()
            continue
        role = list(losses)[place]
        axes.set_title(style.shorten(role, 24) if len(losses) > 1 else "")
        words.append(f"{role}: {_draw(axes, role, losses[role], seed)}.")
        axes.set_ylabel("loss (nats per\nanswer token)" if place % columns == 0 else "")
        if place + columns >= len(losses):  # nothing below
            axes.set_xlabel("probability that a\ntoken is replaced")
            axes.tick_params(labelbottom=True)
    grid[0, 0].set_ylim(bottom=min(0, grid[0, 0].get_ylim()[0]))
    handles = {label: h for axes in figure.axes for h, label in zip(*axes.get_legend_handles_labels(), strict=True)}
    handles = {label: handles[label] for label in sorted(handles, key=lambda label: label == WRONG)}
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=style.legend_columns(figure))
    figure.set_label(" ".join(words))
    return figure


def _losses(role: str, ds: xr.Dataset, split: str) -> dict[str, xr.DataArray]:
    """Return the losses of the true answers and of wrong ones, (fact size), size 0 first.

    Raises:
        InputError: there are none.
    """
    if not {"loss", "neighbour_loss"} <= {*ds.data_vars}:
        raise InputError(f"{role}: this is no landscape; it needs loss and neighbour_loss")
    around = of_split(ds["neighbour_loss"], split).mean("neighbour")
    if not around.sizes["fact"]:
        raise InputError(f"{role}: this measurement has no fact of the split {split!r}")
    at = of_split(ds["loss"], split).expand_dims(size=[0.0])
    every = xr.concat([at, around], "size", coords="minimal", compat="override").transpose("fact", "size", "candidate")
    found = {
        f"{role}: true answer": every.isel(candidate=0),
        WRONG: every.isel(candidate=slice(1, None)).mean("candidate"),
    }
    return {label: values for label, values in found.items() if label != WRONG or values.notnull().any()}


def _draw(axes: Axes, role: str, losses: Mapping[str, xr.DataArray], seed: int) -> str:
    """Draw a panel and return it in words."""
    said = []
    for label, values in losses.items():
        drawn = band(values, seed=seed)
        draw_band(axes, values["size"].values, drawn, label)
        said.append(
            f"{label.removeprefix(f'{role}: ').removeprefix('null: ')} {drawn.mean[0]:.2f} at it, "
            f"{drawn.mean[-1]:.2f} around"
        )
    axes.set_xticks(np.unique([0.0, *next(iter(losses.values()))["size"].values]))
    return "; ".join(said)
