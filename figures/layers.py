"""Where in the model the answer is still preferred: trajectories over layers, and the map of what was erased."""

import numpy as np
import xarray as xr
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from lethescope.errors import InputError
from lethescope.figures import style
from lethescope.figures.bands import band, draw_band, of_split, scale_of, values_of

_LABELLED = 60  # facts; more are drawn without their names


@style.styled
def paper(
    original: xr.Dataset,
    unlearned: xr.Dataset,
    null: xr.Dataset | None = None,
    *,
    null_name: str = "reference",
    width: str | float = "neurips",
    split: str = "forget",
    seed: int = 0,
) -> Figure:
    """Draw the preference for the true answer over the layers, original against unlearned against null.

    Each line is the mean over the facts of the split, its band the 95 % bootstrap interval with subjects drawn whole.
    The value of a fact is the share of the true answer among its candidates, corrected for chance, or the probability
    of the true answer above a wrong one's, as the channel declares (``attrs["scale"]``): 0 = chance, 1 = certain.
    An unlearned line that rises below and falls again near the end is what suppression looks like; a line that stays
    flat does not prove that the fact is gone, only that this channel does not read it here.

    Args:
        original: measurement of a layered channel (lens, patch …): ``score(fact, candidate, place)`` with the
            coordinate ``layer`` on ``place`` and, for one panel a decoder, ``decoder``; ``split`` and ``subject`` on
            ``fact``. Places without a layer (NaN) are left out; several places of one layer are averaged.
        unlearned: the same of the unlearned model.
        null: the same of a reference; where None, the control facts of the unlearned model are the null, if it has any.
        null_name: what the null is, for the legend.
        width: preset name of `style.WIDTHS`, or inches.
        split: the facts drawn.
        seed: of the bootstrap.

    Returns:
        The figure; its label is its description in words.

    Raises:
        InputError: a measurement has no ``layer`` on ``place``, or none of its facts is of the split.
    """
    lines = {"original": _chosen(original, split), "unlearned": _chosen(unlearned, split)}
    name = f"null: {null_name}"
    if null is not None:
        lines[name] = _chosen(null, split)
    elif "control" in np.asarray(unlearned["split"].values):
        name = "null: control facts"
        lines[name] = _chosen(unlearned, "control")
    decoders = list(dict.fromkeys(_decoders(original)))
    figure = style.blank(width, 2.3)
    panels = figure.subplots(1, len(decoders), sharey=True, squeeze=False)[0]
    words = []
    for axes, decoder in zip(panels, decoders, strict=True):
        axes.set_title(f"decoder: {style.shorten(decoder, 24)}" if decoder else "")
        words += [_line(axes, role, values, decoder, seed) for role, values in lines.items()]
        axes.set_xlabel("layer")
    panels[0].set_ylabel(scale_of(original))
    _finish(figure, panels)
    start = f"{original.attrs['probe']}: {scale_of(original)} over the layers (0 = chance, 1 = certain)."
    figure.set_label(" ".join([start, *filter(None, words)]).replace("\n", " "))
    return figure


@style.styled
def erasure_map(measurement: xr.Dataset, *, width: str | float = "neurips", split: str = "forget") -> Figure:
    """Draw how much of each fact was erased at each layer, one row a fact, the least erased facts on top.

    Erased share is ``clip(D_unlearned / D_reference, 0, 1)`` (Unlearning Depth Score): 0 = the unlearned model's layer
    carries the fact as the original's does, 1 = it carries as little as the reference's. Grey cells are layers that do
    not encode the fact. A bright cell does not prove that the fact is gone from the model, only from this layer's
    output as the original's upper layers read it.

    Args:
        measurement: what `lethescope.analyses.patch.erased_share` returns: ``erased(fact, place)`` with the coordinate
            ``layer``, or ``erased(fact, layer)``, NaN where the layer does not encode the fact; ``split`` and
            ``subject`` on ``fact``.
        width: preset name of `style.WIDTHS`, or inches.
        split: the facts drawn. Above 60 facts the rows are not named.

    Returns:
        The figure; its label is its description in words.

    Raises:
        InputError: the measurement has no ``erased``, or none of its facts is of the split.
    """
    if "erased" not in measurement:
        raise InputError(f"erasure map: the measurement has no 'erased' but {sorted(map(str, measurement.data_vars))}")
    erased = _some(of_split(measurement["erased"], split), split)
    erased = (erased.swap_dims(place="layer") if "place" in erased.dims else erased).transpose("fact", "layer")
    mean = erased.mean("layer").values
    erased = erased.isel(fact=np.argsort(mean, kind="stable"))  # NaN last
    n, layers = erased.shape
    named = n <= _LABELLED
    figure = style.blank(width, 1.0 + (0.13 * n if named else 3.5))
    axes = figure.add_subplot()
    axes.set_facecolor(style.PALE)
    image = axes.imshow(erased.values, vmin=0, vmax=1, cmap="cividis", aspect="auto", interpolation="nearest")
    longest, ticks = (18, 8) if figure.get_figwidth() < style.NARROW else (30, 16)
    every = range(0, layers, max(1, -(-layers // ticks)))
    axes.set_xticks(every, [str(erased["layer"].values[i]) for i in every])
    axes.set_yticks(range(n) if named else [], _names(erased, longest) if named else [])
    axes.tick_params(length=0)
    axes.set_xlabel("layer")
    axes.set_ylabel("" if named else f"{n} {split} facts, least erased on top")
    bar = figure.colorbar(image, ax=axes, fraction=0.04, pad=0.02, ticks=[0, 0.5, 1], aspect=min(40, 4 + n))
    bar.set_label("erased share")
    bar.outline.set_visible(False)  # type: ignore[operator]
    overall = f"{np.nanmean(mean):.2f}" if np.isfinite(mean).any() else "not known"
    facts = f"{n} {split} fact{'s' * (n != 1)}"
    figure.set_label(f"Erased share of {facts} over {layers} layers (0 = untouched, 1 = erased). Mean {overall}.")
    return figure


def _chosen(measurement: xr.Dataset, split: str) -> xr.DataArray:
    """Return the values of the facts of the split at the places that have a layer, ``fact place``.

    Raises:
        InputError: there is no layer, or no such fact.
    """
    if "layer" not in measurement.coords:
        channel = measurement.attrs.get("probe", "?")
        raise InputError(f"channel {channel!r} is not layered: its measurement has no coordinate 'layer' on 'place'")
    layered = np.flatnonzero(np.isfinite(np.asarray(measurement["layer"].values, dtype=float)))
    return _some(values_of(measurement.isel(place=layered), split), split)


def _some(values: xr.DataArray, split: str) -> xr.DataArray:
    """Return the values if there is a fact among them.

    Raises:
        InputError: there is none.
    """
    if not values.sizes["fact"]:
        raise InputError(f"this measurement has no fact of the split {split!r}")
    return values


def _decoders(measurement: xr.Dataset | xr.DataArray) -> list[str]:
    """Return the decoder of every place, "" where there is one only."""
    if "decoder" not in measurement.coords:
        return [""] * measurement.sizes["place"]
    return [str(decoder) for decoder in measurement["decoder"].values]


def _line(axes: Axes, role: str, values: xr.DataArray, decoder: str, seed: int) -> str:
    """Draw one role in one panel and return it in words."""
    here = values.isel(place=[i for i, name in enumerate(_decoders(values)) if name == decoder])
    if not here.sizes["place"]:
        return ""
    by_layer = here.groupby("layer").mean()
    layers = by_layer["layer"].values.astype(float)
    drawn = band(by_layer, seed=seed)
    draw_band(axes, layers, drawn, role)
    if not np.isfinite(drawn.mean).any():
        return f"{role}: not known."
    top = int(np.nanargmax(drawn.mean))
    start = f"Decoder {decoder}, {role}" if decoder else role
    return f"{start}: highest {drawn.mean[top]:z.2f} at layer {layers[top]:g}, last layer {drawn.mean[-1]:z.2f}."


def _finish(figure: Figure, panels: np.ndarray) -> None:
    """Give the panels whole layers, a line at chance, room above, and one legend below."""
    for axes in panels:
        axes.axhline(0, color=style.FAINT, linewidth=0.6, zorder=0.5)
        axes.set_ylim(min(axes.get_ylim()[0], -0.05), 1.05)
        axes.xaxis.get_major_locator().set_params(integer=True)
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=style.legend_columns(figure))


def _names(erased: xr.DataArray, longest: int) -> list[str]:
    """Return a name a fact: its subject, with the relation (or the id) where a subject has several facts."""
    subjects = [str(s) for s in (erased["subject"] if "subject" in erased.coords else erased["fact"]).values]
    if len(set(subjects)) == len(subjects):
        return [style.shorten(subject, longest) for subject in subjects]
    more = erased["relation"].values if "relation" in erased.coords else erased["fact"].values
    return [
        style.shorten(f"{s}, {m or i}", longest) for s, m, i in zip(subjects, more, erased["fact"].values, strict=True)
    ]
