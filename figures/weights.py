"""Where the weights moved, beside what comes back when the original's modules are put back there."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import xarray as xr
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.image import AxesImage
from matplotlib.ticker import MaxNLocator

from lethescope.analyses.modules import OUTER
from lethescope.errors import InputError
from lethescope.figures import style
from lethescope.figures.bands import values_of

MOST_LABELS = 18
"""Rows that are named, at most; with more blocks than that, some names are left out."""
SHORT = {"self_attn.": "", "attention.": "", "attn.": "", "mlp.": "", "_proj": "", ".weight": ""}
"""What is left out of the names of maps."""
MARKS = {
    "attention": ("<", 0.24, 3.0, "attention put back"),
    "mlp": (">", -0.24, 3.0, "MLP put back"),
    "block": ("s", 0.0, 4.5, "row put back"),
}
"""Marker, shift, size and name of single modules, by kind."""


@style.styled
def paper(
    change: xr.DataArray,
    measurements: Mapping[str, xr.Dataset] | None = None,
    *,
    role: str = "unlearned",
    width: str | float = "neurips",
) -> Figure:
    """Draw the relative change of every module of a model, and beside it what swapping the same modules brings back.

    Left, `||D|| / ||W||` by row and kind of module, NaN pale. Right, the mean value of forget facts on the scale of
    *say*, with the original's block, its attention or its MLP put back, for the model in question (filled) and, as the
    null, the highest of the references (open triangles); sets of rows are lines over them; the dotted line is the
    original. Places that do not testify are drawn paler. Where a map changed much and nothing comes back, the change
    alone is not what silences the facts; where much comes back, a reference tells whether the module carries them.

    Args:
        change: `(row, kind)`, as `lethescope.analyses.weights.change_map` returns it.
        measurements: role -> Measurement of channel *swap* with `original`, the role drawn and any `reference-…`; only
            the map is drawn without.
        role: the model in question.
        width: preset name of `style.WIDTHS`, or inches.

    Returns:
        The figure; its label is its description in words.

    Raises:
        InputError: the map is not `(row, kind)` or empty, or a measurement is missing, of another channel, or of other
            blocks.
    """
    if {*change.dims} != {"row", "kind"} or not change.size:
        raise InputError(
            f"the change is ({', '.join(map(str, change.dims))}); a map needs (row, kind) and at least one"
        )
    change = change.transpose("row", "kind")
    rows = [str(row) for row in change["row"].values]
    tables = _tables(measurements, role, rows) if measurements is not None else {}
    if tables:  # a tied unembedding is a place to swap and no row of the delta
        there = {*rows, *map(str, tables[role]["place"].values)}
        rows = [row for row in (OUTER[0], *(r for r in rows if r not in OUTER), *OUTER[1:]) if row in there]
        change = change.reindex(row=rows)
    figure, panels = _panels(width, len(rows), swapped=bool(tables))
    image = _map(panels[0], change, rows)
    if tables:
        _recovery(panels[1], tables, rows, role)
    bar = figure.colorbar(image, ax=panels[0], pad=0.02, aspect=22, fraction=0.08)
    bar.set_label("relative change")
    bar.locator = MaxNLocator(nbins=4)
    bar.update_ticks()
    bar.outline.set_visible(False)  # type: ignore[operator]
    if tables:
        handles, labels = panels[1].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=style.legend_columns(figure))
    figure.set_label(" ".join([_change_in_words(change), *_swap_in_words(tables, role)]))
    return figure


def _panels(width: str | float, rows: int, *, swapped: bool) -> tuple[Figure, list[Axes]]:
    """Return the figure, a panel for the map and one for what comes back beside it, or below where it is narrow."""
    tall = float(np.clip(0.17 * rows, 1.2, 3.4))
    narrow = style.width_of(width) < style.NARROW
    if not swapped:
        figure = style.blank(width, tall + 0.8)
        return figure, [figure.subplots()]
    figure = style.blank(width, 2 * tall + 1.9 if narrow else tall + 1.15)
    shape: dict[str, Any] = {"nrows": 2} if narrow else {"ncols": 2, "width_ratios": [1.35, 1.0]}
    return figure, list(figure.subplots(**shape, sharey=True))


def _tables(measurements: Mapping[str, xr.Dataset], role: str, rows: list[str]) -> dict[str, xr.DataArray]:
    """Return the mean value of forget facts at each place: of the original, the role, and the highest reference.

    Raises:
        InputError: see `paper`.
    """
    missing = [name for name in ("original", role) if name not in measurements]
    if missing:
        raise InputError(f"there is no measurement of {missing[0]}; there are {', '.join(measurements) or 'none'}")
    for name, ds in measurements.items():
        if not {"score", "kept"} <= {*ds.data_vars} or "kind" not in ds.coords:
            raise InputError(f"{name}: this is no measurement of channel swap; it needs score, kept and kind")
    found = {name: values_of(measurements[name], "forget").mean("fact") for name in ("original", role)}
    single = zip(found[role]["place"].values, found[role]["kind"].values, strict=True)
    apart = [p for p, kind in single if kind in {"attention", "mlp", "block"} and f"block {p.split()[1]}" not in rows]
    if apart:
        raise InputError(f"{role}: place {str(apart[0])!r} is not among the rows of the map, {rows[0]} to {rows[-1]}")
    null = [values_of(ds, "forget").mean("fact") for name, ds in measurements.items() if name.startswith("reference")]
    if null:
        found["reference"] = xr.concat(null, "role").max("role")
    base = measurements["original"]
    barred = (base["null_score"] == base["score"]).isel(candidate=0).all("fact") if "null_score" in base else None
    found["may testify"] = xr.full_like(found[role], True, bool) if barred is None else ~barred
    return found


def _map(axes: Axes, change: xr.DataArray, rows: list[str]) -> AxesImage:
    axes.set_facecolor(style.PALE)
    finite = change.values[np.isfinite(change.values)]
    top = float(finite.max()) if len(finite) and finite.max() > 0 else 1.0
    image = axes.imshow(change.values, vmin=0, vmax=top, aspect="auto", interpolation="nearest", origin="lower")
    kinds = [_short(str(kind)) for kind in change["kind"].values]
    axes.set_xticks(range(len(kinds)), kinds, rotation=90)
    axes.set_yticks(*_named(rows))
    axes.tick_params(length=0)
    axes.set_title("where the weights moved")
    return image


def _named(rows: list[str]) -> tuple[list[int], list[str]]:
    """Return which rows are named on the axis, and how: not every block where there are many."""
    step = -(-len(rows) // MOST_LABELS)
    named = [i for i, row in enumerate(rows) if step == 1 or row in OUTER or int(row.split()[1]) % step == 0]
    if step > 1:  # the last block's name would run into the final norm's, and the two of the outer rows into another
        named = [i for i in named if rows[i] not in OUTER[1:] or rows[i] == rows[-1]]
        named = [i for i in named if i in {0, len(rows) - 1} or step <= i < len(rows) - 1 - step]
    return named, [rows[i] for i in named]


def _short(kind: str) -> str:
    for long, short in SHORT.items():
        kind = kind.replace(long, short)
    return style.shorten(kind, 16)


def _recovery(axes: Axes, tables: Mapping[str, xr.DataArray], rows: list[str], role: str) -> None:
    """Draw a mark for every module in its row of the map, and a line over the rows of every set."""
    original, null = style.role_look("original"), style.role_look("null")
    axes.axvline(0, color=style.FAINT, linewidth=0.6, zorder=0.5)
    axes.axvline(float(tables["original"].max()), color=original.color, linestyle=":", linewidth=1, label="original")
    colour = style.role_look(role).color
    for kind, (marker, shift, size, label) in MARKS.items():
        at, y = _at(tables[role], kind, rows)
        x, may = tables[role].values[at], tables["may testify"].values[at]
        for some, alpha in ((may, 1.0), (~may, 0.35)):
            if some.any():
                options: dict[str, Any] = {"markersize": size, "mew": 0, "alpha": alpha, "clip_on": False}
                axes.plot(x[some], y[some] + shift, marker, color=colour, label=label, **options)
                label = ""
        if kind == "block" and "reference" in tables:
            x = tables["reference"].reindex(place=tables[role]["place"].values[at]).values
            axes.plot(
                x, y, null.marker, color=null.color, mfc="white", mew=0.7, markersize=3.5, label="null: reference"
            )
    _sets(axes, tables, rows, colour)
    axes.set_yticks(*_named(rows))
    axes.set_ylim(-0.5, len(rows) - 0.5)
    axes.set_xlabel("probability above\na wrong answer")
    axes.set_title("what swapping brings back")
    axes.xaxis.set_major_locator(MaxNLocator(nbins=4))
    axes.tick_params(axis="y", length=0)


def _at(table: xr.DataArray, kind: str, rows: list[str]) -> tuple[list[int], np.ndarray]:
    """Return which places are single modules of a kind, and the rows in which they stand."""
    kinds = {kind, "outer"} if kind == "block" else {kind}
    at = [i for i, k in enumerate(table["kind"].values) if k in kinds]
    places = [str(table["place"].values[i]) for i in at]
    return at, np.array([rows.index(p if p in rows else f"block {p.split()[1]}") for p in places], dtype=float)


def _sets(axes: Axes, tables: Mapping[str, xr.DataArray], rows: list[str], colour: str) -> None:
    """Draw a line at what each set brings back, from its lowest row to its highest."""
    table = next(t for name, t in tables.items() if name not in {"original", "reference", "may testify"})
    label = "set of rows put back"
    for i in np.flatnonzero(table["kind"].values == "upper"):
        name = str(table["place"].values[i])
        first, _, last = name.removeprefix("blocks ").removeprefix("from block ").partition("-")
        ends = rows.index(f"block {first}"), rows.index(f"block {last}") if last else len(rows) - 1
        alpha = 1.0 if tables["may testify"].values[i] else 0.35
        axes.plot([table.values[i]] * 2, ends, "-_", color=colour, linewidth=1, alpha=alpha, label=label, clip_on=False)
        label = ""


def _change_in_words(change: xr.DataArray) -> str:
    if not np.isfinite(change).any():
        return "Relative change of the weights: not known."
    whole = change.isel(kind=-1).where(np.isfinite(change.isel(kind=-1)))
    best = str(whole["row"].values[int(np.nanargmax(whole.values))])
    return f"Relative change of the weights: largest in {best}, {float(whole.max()):.2g}."


def _swap_in_words(tables: Mapping[str, xr.DataArray], role: str) -> list[str]:
    if not tables or not np.isfinite(tables[role]).any():
        return []
    best = int(np.nanargmax(tables[role].values))
    told = f"{role}: most comes back at {tables[role]['place'].values[best]}, {float(tables[role][best]):z.2f}"
    if "reference" in tables and np.isfinite(null := float(tables["reference"].values[best])):
        told += f" (reference {null:z.2f})"
    return [f"{told}; the original has {float(tables['original'].max()):z.2f}."]
