"""Attention heads by their score: the map of all heads, before against after, and what taking heads out costs."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import xarray as xr
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.image import AxesImage
from matplotlib.ticker import MaxNLocator

from lethescope.analyses.heads import RETRIEVAL, correlation
from lethescope.errors import InputError
from lethescope.figures import style

LOST = {"log_prob": "lost log-probability\n(nats per answer token)", "exact_match": "lost share of\nright answers"}
"""What an ablation costs, as the label of an axis."""


@style.styled
def paper(
    tables: Mapping[str, xr.DataArray], *, name: str = "retrieval score", width: str | float = "neurips"
) -> Figure:
    """Draw a score of every head as a map, layers from left to right, one map a model; of two models, also a scatter.

    Maps share their colours, from 0 to the highest score, at least 0.1. Grey cells are heads without a score (layers
    without attention, or no needle was kept). A map that stays the same says that these heads still look where they
    looked, not that nothing was forgotten: reading from the context and knowing by heart are different things.

    Args:
        tables: role to scores ``(layer, head)``, as `lethescope.analyses.heads.mean_scores` returns them.
        name: what the score is, for the labels.
        width: preset name of `style.WIDTHS`, or inches.

    Returns:
        The figure; its label is its description in words.

    Raises:
        InputError: there is no table, or one is not ``(layer, head)``.

    >>> scores = xr.DataArray([[0.0, 0.7], [0.2, 0.0]], dims=("layer", "head"))
    >>> paper({"original": scores}).get_label()
    'Heads by retrieval score. original: highest 0.70 at layer 0, head 1; 2 of 4 heads at 0.1 or more.'
    """
    tables = {role: _table(role, scores) for role, scores in tables.items()}
    if not tables:
        raise InputError("there are no scores to draw; give at least one table (layer, head)")
    pair = len(tables) == 2 and len({t.shape for t in tables.values()}) == 1
    pair = pair and bool(np.isfinite(sum(t.values for t in tables.values())).any())
    figure, panels, scatter = _panels(width, list(tables), max(t.sizes["head"] for t in tables.values()), pair)
    top = float(np.nanmax([RETRIEVAL, *(t.max() for t in tables.values())]))
    images = [_map(axes, table, top) for axes, table in zip(panels, tables.values(), strict=True)]
    for axes, role in zip(panels, tables, strict=True):
        axes.set_title(style.shorten(role, 24) if len(tables) > 1 else "")
    panels[0].set_ylabel("head")
    bar = figure.colorbar(images[0], ax=panels, pad=0.02, aspect=22, fraction=0.06)
    bar.set_label(name)
    bar.outline.set_visible(False)  # type: ignore[operator]
    if scatter is not None:
        _scatter(scatter, tables, name)
    figure.set_label(" ".join([f"Heads by {name}.", *(_in_words(role, t) for role, t in tables.items())]))
    return figure


@style.styled
def before_after(
    original: xr.DataArray, unlearned: xr.DataArray, *, name: str = "retrieval score", width: str | float = "icml"
) -> Figure:
    """Draw every head's score before against after; the diagonal is where nothing moved.

    Heads at or above the threshold of a retrieval head (dotted) in either model are dark, the others pale. Points far
    from the diagonal are heads that moved, which does not show that anything was forgotten; the correlations of two
    models without a common ancestor are near 0, those of a model and its fine-tuned copy above 0.9.

    Args:
        original: scores ``(layer, head)``.
        unlearned: the same of the other model.
        name: what the score is, for the labels.
        width: preset name of `style.WIDTHS`, or inches.

    Returns:
        The figure; its label is its description in words.

    Raises:
        InputError: a table is not ``(layer, head)``, the shapes differ, or no head has a score in both.
    """
    pair = {"original": _table("original", original), "unlearned": _table("unlearned", unlearned)}
    found = correlation(*pair.values())
    figure = style.blank(width, min(style.width_of(width), 3.4) * 0.95)
    _scatter(figure.add_subplot(), pair, name)
    told = ", ".join(f"{kind.title()} {r:.2f}" for kind, r in found.items())
    figure.set_label(f"{name.capitalize()} of {original.size} heads before and after: {told}.")
    return figure


@style.styled
def ablation(effects: xr.Dataset, *, width: str | float = "neurips") -> Figure:
    """Draw what answers lose without the top heads, against what they lose without as many other heads.

    The bar is the 95 % interval of the effect (what the top heads cost beyond the mean of the controls), drawn around
    that mean. A top point among the controls does not show that the heads are not used: others may step in.

    Args:
        effects: what `lethescope.analyses.heads.ablation` returns.
        width: preset name of `style.WIDTHS`, or inches.

    Returns:
        The figure; its label is its description in words.

    Raises:
        InputError: this is no ablation.
    """
    if not {*LOST, "effect"} <= {*effects.data_vars}:
        raise InputError(f"this is no ablation of heads; it needs {', '.join([*LOST, 'effect'])}")
    figure = style.blank(width, 1.6)
    words = []
    for axes, (quantity, label) in zip(figure.subplots(1, len(LOST), sharey=True), LOST.items(), strict=True):
        words.append(_lost(axes, effects, quantity))
        axes.set_xlabel(label)
    k = int(effects.attrs["k"])
    heads = f"{k} head" + "s" * (k != 1)
    figure.axes[0].set_yticks([0, 1], [f"top {heads}", f"other {heads},\ndrawn {effects.sizes['arm'] - 2} times"])
    figure.axes[0].set_ylim(1.5, -0.5)
    figure.set_label(f"What answers lose without the top {heads}, beyond as many other heads. {' '.join(words)}")
    return figure


def _table(role: str, scores: xr.DataArray) -> xr.DataArray:
    if {*scores.dims} != {"layer", "head"}:
        raise InputError(f"{role}: scores are ({', '.join(map(str, scores.dims))}); a map needs (layer, head)")
    return scores.transpose("layer", "head")


def _panels(width: str | float, roles: list[str], heads: int, scatter: bool) -> tuple[Figure, list[Axes], Axes | None]:
    """Return the figure, a panel for every map side by side, and, beside them or below, one for the scatter."""
    narrow = style.width_of(width) < style.NARROW
    tall = float(np.clip(0.09 * heads, 0.9, 2.6)) + 0.6
    if not scatter:
        figure = style.blank(width, tall)
        return figure, list(figure.subplots(1, len(roles), squeeze=False, sharey=True)[0]), None
    shape: Any = [[*roles], ["scatter of both"] * 2] if narrow else [[*roles, "scatter of both"]]
    figure = style.blank(width, tall + 2.5 if narrow else 2.6)
    ratios = {"height_ratios": [tall, 2.5]} if narrow else {"width_ratios": [1.0, 1.0, 1.35]}
    found = figure.subplot_mosaic(shape, gridspec_kw=ratios)
    found[roles[1]].tick_params(labelleft=False)
    return figure, [found[role] for role in roles], found["scatter of both"]


def _map(axes: Axes, table: xr.DataArray, top: float) -> AxesImage:
    axes.set_facecolor(style.PALE)
    image = axes.imshow(table.values.T, vmin=0, vmax=top, aspect="auto", interpolation="nearest", origin="lower")
    axes.set_xlabel("layer")
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_locator(MaxNLocator(nbins=7, integer=True, min_n_ticks=1))
    axes.tick_params(length=0)
    return image


def _scatter(axes: Axes, pair: Mapping[str, xr.DataArray], name: str) -> None:
    """Draw the heads of two models, and name the correlations above."""
    (first, a), (second, b) = pair.items()
    x, y = a.values.ravel(), b.values.ravel()
    end = 1.06 * float(np.nanmax([RETRIEVAL, *x, *y]))
    high = np.fmax(x, y) >= RETRIEVAL
    axes.axline((0, 0), slope=1, color=style.FAINT, linewidth=0.6, zorder=0.5)
    for line in (axes.axvline, axes.axhline):
        line(RETRIEVAL, color=style.DIM, linewidth=0.6, linestyle=":", zorder=0.5)
    for some, colour in ((~high, style.DIM), (high, style.role_look("original").color)):
        if some.any():  # the box of no points is the figure's corner, and spoils the layout
            axes.plot(x[some], y[some], "o", color=colour, markersize=3.5, alpha=0.7, mew=0, clip_on=False)
    axes.set(xlim=(0, end), ylim=(0, end), box_aspect=1)
    axes.set_xlabel(f"{name},\n{style.shorten(first, 20)}")
    axes.set_ylabel(f"{name},\n{style.shorten(second, 20)}")
    found = correlation(a, b)
    axes.set_title(f"Pearson {found['pearson']:z.2f}\nSpearman {found['spearman']:z.2f}".replace("-", "−"))
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_locator(MaxNLocator(nbins=4))


def _lost(axes: Axes, effects: xr.Dataset, quantity: str) -> str:
    """Draw the losses of the top heads and of the controls in one quantity, and return the effect in words."""
    mean = effects[quantity].mean("instance")
    none, top, *controls = (mean.sel(arm="none") - mean).sel(arm=effects["arm"]).values
    estimate, low, high = effects["effect"].sel(quantity=quantity, bound=["estimate", "low", "high"]).values
    middle = float(np.mean(controls))
    look, null = style.role_look("unlearned"), style.role_look("null")
    axes.axvline(none, color=style.FAINT, linewidth=0.6, zorder=0.5)
    axes.plot([middle, middle], [0.7, 1.3], color=null.color, linewidth=1)
    places = 1 + np.linspace(-0.2, 0.2, len(controls))
    axes.plot(controls, places, null.marker, color=null.color, mfc="white", mew=0.7, markersize=3.5)
    axes.plot([middle + low, middle + high], [0, 0], color=look.color, linewidth=2, solid_capstyle="butt")
    axes.plot(top, 0, look.marker, color=look.color, mec="white", mew=0.5, markersize=5)
    axes.xaxis.set_major_locator(MaxNLocator(nbins=4))
    axes.tick_params(axis="y", length=0)
    axes.margins(x=0.08)
    axes.set_title(f"effect {estimate:z.2f}\n[{low:z.2f}, {high:z.2f}]".replace("-", "−"))
    return f"{quantity}: effect {estimate:z.2f} [{low:z.2f}, {high:z.2f}]."


def _in_words(role: str, table: xr.DataArray) -> str:
    if not table.count():
        return f"{role}: not known."
    place = {name: int(i) for name, i in table.argmax(("layer", "head")).items()}  # type: ignore[union-attr]
    found = f"highest {float(table.max()):.2f} at layer {place['layer']}, head {place['head']}"
    return f"{role}: {found}; {int((table >= RETRIEVAL).sum())} of {int(table.count())} heads at {RETRIEVAL} or more."
