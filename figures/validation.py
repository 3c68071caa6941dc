"""What a validation found, in three pictures: how well metrics separate, which verdicts fell, and every residue."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.colorbar import Colorbar
from matplotlib.figure import Figure
from matplotlib.image import AxesImage
from matplotlib.lines import Line2D
from matplotlib.patches import Patch, Rectangle

from lethescope.analyses.validation import PEER, QUESTIONS, RIGHT, calibration
from lethescope.figures import style
from lethescope.figures.residue import brief, interval
from lethescope.wording import VERDICTS

POOLS = {
    "P": "taught",
    "suppressor": "suppressors",
    "deleter": "deleters",
    "N": "never taught",
    "method": "methods",
}
"""The pools that are drawn, in this order, and their short names; stressed models are no models of their own."""

CLIP = (-0.2, 1.2)
"""Ends of the residues' colour scale."""

_VERDICT = "verdict"
_LONGEST = 26  # characters of a metric's name, fewer in a narrow figure
_TICK = 0.1  # inches that the name of a model needs

Record = Mapping[str, Any]
Matrix = np.ndarray


@style.styled
def separation(
    summary: Mapping[str, Any],
    *,
    question: Literal["a", "b"] = "b",
    reference: bool = True,
    width: str | float = "report",
) -> Figure:
    """Draw how well each metric tells two groups of models apart: AUC with its 95 % interval, the best on top.

    AUC is the probability that a model that holds the facts has the higher value: 0.5 = chance, 1 = always. Beside a
    row stands the paired difference to 1 - UDS. A high AUC on question "a" (taught against never taught) does not prove
    that a metric sees through suppression; question "b" (suppressors against deleters) asks for that.

    Args:
        summary: what `lethescope.analyses.validation.summarise` returns.
        question: a key of `lethescope.analyses.validation.QUESTIONS`.
        reference: whether the audits had a reference.
        width: preset name of `style.WIDTHS`, or inches.

    Returns:
        The figure; its label is its description in words.

    >>> row = {"metric": "lens", "question": "b", "reference": True, "n_holding": 5, "n_empty": 4}
    >>> figure = separation({"separation": [{**row, "estimate": 0.9, "low": 0.6, "high": 0.98}]}, width="icml")
    >>> figure.get_label().split(": ")[-1]
    'lens 0.90 [0.60, 0.98].'
    """
    rows = compared(summary, question, reference)
    residues = {entry["metric"] for entry in summary.get("calibration", ())}
    figure = style.blank(width, 1.15 + 0.19 * max(len(rows), 1))
    narrow = figure.get_figwidth() < style.NARROW
    axes = figure.add_subplot()
    groups = _groups_in_words(rows, question)
    _frame(axes, rows, f"AUC (0.5 = chance), {_audited(reference)}\n{groups}", narrow=narrow)
    for place, row in enumerate(rows):
        _forest_row(axes, place, row, residues)
        if not narrow:
            text = signed(row.get("over_uds"))
            axes.text(1.03, place, text, transform=axes.get_yaxis_transform(), va="center", color=style.FAINT)
    if not narrow and any(row.get("over_uds") for row in rows):
        axes.text(1.03, 1, f"against {PEER}", transform=axes.transAxes, va="bottom", color=style.FAINT)
    if rows:
        handles = _metric_legend(rows, residues)
        figure.legend(handles=handles, loc="outside lower center", ncols=2 if narrow else 4, columnspacing=1.2)
    told = "; ".join(f"{row['metric']} {brief(row)}" for row in rows) or "no metric has a value in both groups"
    figure.set_label(f"AUC of each metric, {groups}, {_audited(reference)}, 0.5 = chance, 1 = always apart: {told}.")
    return figure


def compared(summary: Mapping[str, Any], question: str, reference: bool) -> list[Record]:
    """Return the records of one question and kind of audit, the best separator first.

    >>> row = {"metric": "say", "question": "a", "reference": True, "estimate": 0.6}
    >>> compared({"separation": [row]}, "b", True)
    []
    """
    mine = [r for r in summary.get("separation", ()) if r["question"] == question and r["reference"] == reference]
    return sorted((r for r in mine if np.isfinite(interval(r)[0])), key=lambda r: (-r["estimate"], r["metric"]))


def signed(entry: Mapping[str, Any] | None, missing: str = "") -> str:
    """Return a difference as text, a plus sign before a gain.

    >>> signed({"estimate": 0.05, "low": 0.01, "high": 0.1})
    '+0.05 [0.01, 0.10]'
    """
    text = brief(entry, missing)
    return f"+{text}" if round(interval(entry)[0], 2) > 0 else text


def _audited(reference: bool) -> str:
    return "with a reference" if reference else "without a reference"


def _groups_in_words(rows: Sequence[Record], question: str) -> str:
    """Return whom the AUC compares, with the number of models; metrics may differ in it."""
    sides = [" and ".join(POOLS[pool] for pool in pools) for pools in QUESTIONS[question]]
    counts = [_span([int(row[key]) for row in rows]) for key in ("n_holding", "n_empty")]
    return " against ".join(f"{n} {side}" for n, side in zip(counts, sides, strict=True))


def _span(counts: Sequence[int]) -> str:
    low, high = min(counts, default=0), max(counts, default=0)
    return str(low) if low == high else f"{low}–{high}"


def _frame(axes: Axes, rows: Sequence[Record], label: str, *, narrow: bool) -> None:
    """Draw the axes: names at the left, the line of chance, room for the longest interval."""
    lowest = min([0.45, *(x for row in rows for x in interval(row)[:2] if np.isfinite(x))])
    axes.set_xlim(max(lowest - 0.03, -0.02), 1.02)
    axes.set_xticks([x for x in (0, 0.25, 0.5, 0.75, 1) if x >= axes.get_xlim()[0]])
    axes.set_ylim(max(len(rows), 1) - 0.4, -0.6)
    axes.set_yticks(range(len(rows)), [style.shorten(r["metric"], 20 if narrow else _LONGEST) for r in rows])
    axes.tick_params(axis="y", length=0)
    axes.spines["left"].set_visible(False)
    axes.axvline(0.5, color=style.INK, linewidth=0.7, linestyle=(0, (3, 2)), zorder=0.5)
    axes.axvline(1, color=style.PALE, linewidth=0.6, zorder=0.4)
    axes.set_xlabel(label)
    for row in range(0, len(rows), 2):  # stripes lead the eye from name to difference
        axes.axhspan(row - 0.5, row + 0.5, color=style.PALE, alpha=0.3, linewidth=0, zorder=0)


def _forest_row(axes: Axes, place: int, row: Record, residues: set[str]) -> None:
    look = _look(row["metric"], residues)
    estimate, low, high = interval(row)
    line = 1.8 if row["metric"] in residues else 1.0
    axes.plot([low, high], [place, place], color=look["mec"], linewidth=line, solid_capstyle="butt")
    axes.plot(estimate, place, clip_on=False, **look)


def _look(metric: str, residues: set[str]) -> dict[str, Any]:
    """Return marker and colours of a metric: its channel's, a mark of its own, or neutral for what reads outputs."""
    if metric in {PEER, _VERDICT}:
        marker = "D" if metric == PEER else "s"
        return {"marker": marker, "linestyle": "", "markersize": 4.5, "mfc": style.INK, "mec": style.INK}
    if metric in residues:
        colour = style.channel_colour(metric)
        return {"marker": "o", "linestyle": "", "markersize": 5, "mfc": colour, "mec": colour}
    return {"marker": "o", "linestyle": "", "markersize": 4, "mfc": "white", "mec": style.FAINT}


def _metric_legend(rows: Sequence[Record], residues: set[str]) -> list[Line2D]:
    """Return what the markers mean, only those that are drawn."""
    drawn = [row["metric"] for row in rows]
    channel = next((name for name in drawn if name in residues - {PEER, _VERDICT}), None)
    other = next((name for name in drawn if name not in residues | {PEER, _VERDICT}), None)
    labels = {channel: "channel", PEER: PEER, _VERDICT: "the verdict's residue", other: "output metric or MIA"}
    named = [(str(name), label) for name, label in labels.items() if name in drawn]
    return [Line2D([], [], label=label, **_look(name, residues)) for name, label in named]


@style.styled
def verdicts(summary: Mapping[str, Any], *, reference: bool = True, width: str | float = "report") -> Figure:
    """Draw how often each pool got each verdict; the verdict that is right for a pool is outlined.

    The shade is the share of the row. A model that lost its retain facts is rightly called damaged, so that the share
    beside a row may be above the outlined cell's. Of methods no truth is known, and no cell is right.

    Args:
        summary: what `lethescope.analyses.validation.summarise` returns.
        reference: whether the audits had a reference.
        width: preset name of `style.WIDTHS`, or inches.

    Returns:
        The figure; its label is its description in words.

    >>> row = {"reference": True, "pool": "P", "verdict": "known", "count": 3}
    >>> verdicts({"verdicts": [row]}, width="icml").get_label()
    'Verdicts by pool, with a reference. taught: 3 known.'
    """
    pools, counts = verdict_counts(summary, reference)
    figure = style.blank(width, 1.15 + 0.3 * max(len(pools), 1))
    narrow = figure.get_figwidth() < 5
    axes = figure.add_subplot()
    totals = counts.sum(1, keepdims=True)
    share = np.divide(counts, totals, out=np.zeros(counts.shape), where=totals > 0)
    if len(pools):
        axes.imshow(share, vmin=0, vmax=1.1, cmap="Blues", aspect="auto", interpolation="nearest")
    _verdict_axes(axes, pools, totals.ravel(), narrow=narrow)
    for (i, j), count in np.ndenumerate(counts):
        ink = "white" if share[i, j] > 0.6 else style.INK if count else style.DIM
        axes.text(j, i, str(count), ha="center", va="center", color=ink)
    for place, pool in enumerate(pools):
        if pool in RIGHT:
            _outline(axes, place, list(VERDICTS).index(RIGHT[pool]))
        if not narrow:
            text = _right_in_words(summary, pool, reference)
            axes.text(1.02, place, text, transform=axes.get_yaxis_transform(), va="center", color=style.FAINT)
    handles = [
        Patch(facecolor="none", edgecolor=style.INK, label="the right verdict"),
        Patch(facecolor="#6aaed6", label="darker: larger share of the row"),
    ]
    figure.legend(handles=handles, loc="outside lower center", ncols=2)
    figure.set_label(f"Verdicts by pool, {_audited(reference)}. {_counts_in_words(pools, counts)}.")
    return figure


def verdict_counts(summary: Mapping[str, Any], reference: bool) -> tuple[list[str], Matrix]:
    """Return the pools that were audited, and how often each (rows) got each of the six verdicts (columns)."""
    mine = [r for r in summary.get("verdicts", ()) if r["reference"] == reference]
    pools = [pool for pool in POOLS if any(r["pool"] == pool for r in mine)]
    found = {(r["pool"], r["verdict"]): int(r["count"]) for r in mine}
    counts = [[found.get((pool, word), 0) for word in VERDICTS] for pool in pools]
    return pools, np.array(counts, dtype=int).reshape(len(pools), len(VERDICTS))


def _verdict_axes(axes: Axes, pools: Sequence[str], totals: Matrix, *, narrow: bool) -> None:
    names = [VERDICTS[word].name.replace("residue ", "residue\n") for word in VERDICTS]
    axes.set_xlim(-0.5, len(names) - 0.5)
    axes.set_ylim(max(len(pools), 1) - 0.5, -0.5)
    turned: dict[str, Any] = {"rotation": 40, "ha": "left", "rotation_mode": "anchor"} if narrow else {}
    names = [name.replace("\n", " ") for name in names] if narrow else names
    axes.xaxis.tick_top()
    axes.set_xticks(range(len(names)), names, **turned)
    axes.set_yticks(range(len(pools)), [f"{n} {POOLS[pool]}" for pool, n in zip(pools, totals, strict=True)])
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    for x in np.arange(len(names) + 1) - 0.5:
        axes.axvline(x, color="white", linewidth=1)
    for y in np.arange(len(pools) + 1) - 0.5:
        axes.axhline(y, color="white", linewidth=1)


def _outline(axes: Axes, row: int, column: int) -> None:
    inside = (column - 0.48, row - 0.45)
    axes.add_patch(Rectangle(inside, 0.96, 0.9, fill=False, edgecolor=style.INK, linewidth=1.3, zorder=3))


def _right_in_words(summary: Mapping[str, Any], pool: str, reference: bool) -> str:
    for entry in summary.get("right", ()):
        if entry["pool"] == pool and entry["reference"] == reference:
            return f"{entry['count']} of {entry['of']} right"
    return ""


def _counts_in_words(pools: Sequence[str], counts: Matrix) -> str:
    rows = []
    for pool, row in zip(pools, counts, strict=True):
        cells = ", ".join(f"{n} {word.replace('_', ' ')}" for word, n in zip(VERDICTS, row, strict=True) if n)
        rows.append(f"{POOLS[pool]}: {cells}")
    return "; ".join(rows) or "No model was audited"


@style.styled
def residues(values: pd.DataFrame, *, reference: bool = True, width: str | float = "report") -> Figure:
    """Draw the residue that each channel finds in each model, models side by side within their pool.

    0 = as if never taught, 1 = as in the original; colours end at -0.2 and 1.2. Within a pool the models stand by the
    verdict's residue, the largest first. A hatched cell was not testable; it says neither that something is there nor
    that nothing is. A panel's width does not tell how many models it has: small pools are drawn wider.

    Args:
        values: one row a model and metric, as `lethescope.validate.measure` returns them; output metrics and stressed
            models are left out.
        reference: whether the audits had a reference.
        width: preset name of `style.WIDTHS`, or inches. Models are named as long as all names have room.

    Returns:
        The figure; its label is its description in words.
    """
    table, metrics = _residue_table(values, reference)
    groups = dict(_by_pool(table, metrics))
    shares = _shares({pool: group.shape[1] for pool, group in groups.items()}, least=0.14)
    room = style.width_of(width) - 2.3
    named = all(room * share / groups[pool].shape[1] >= _TICK for pool, share in shares.items())
    figure = style.blank(width, 1.3 + 0.2 * max(len(metrics), 2) + 0.9 * named)
    narrow = figure.get_figwidth() < style.NARROW
    if groups:
        panels = figure.subplots(1, len(groups), sharey=True, squeeze=False, width_ratios=list(shares.values()))[0]
        pairs = zip(panels, groups.items(), strict=True)
        images = [_panel(axes, *group, named=named, narrow=narrow) for axes, group in pairs]
        _finish(figure, panels, images[-1], metrics, narrow=narrow)
        if any(group.isna().any(axis=None) for group in groups.values()):
            hatched = Patch(facecolor=style.PALE, edgecolor=style.DIM, hatch="//////", linewidth=0)
            figure.legend([hatched], ["not testable"], loc="outside lower left")
    figure.set_label(f"Residue of each channel in each model, {_audited(reference)}. {_means_in_words(groups)}.")
    return figure


def _residue_table(values: pd.DataFrame, reference: bool) -> tuple[pd.DataFrame, list[str]]:
    """Return the rows of residues, and their metrics in the order of the rows, 1 - UDS and the verdict last."""
    mine = values[(values["reference"] == reference) & values["pool"].isin(POOLS)]
    asked = mine.assign(value=0.0, truth="holds")  # what counts as a residue there, whether it could be tested or not
    found = list(dict.fromkeys(entry["metric"] for entry in calibration(asked)))
    last = [name for name in (PEER, _VERDICT) if name in found]
    metrics = [name for name in found if name not in last] + last
    return mine[mine["metric"].isin(metrics)], metrics


def _by_pool(table: pd.DataFrame, metrics: Sequence[str]) -> Iterator[tuple[str, pd.DataFrame]]:
    """Yield each pool with its residues, ``metric x model``, the models by the verdict's residue."""
    worlds = table["world"].nunique()
    names = table["member"].astype(str) + (", world " + table["world"].astype(str) if worlds > 1 else "")
    for pool in (pool for pool in POOLS if (table["pool"] == pool).any()):
        mine = table.assign(model=names)[table["pool"] == pool]
        group = mine.pivot(index="metric", columns="model", values="value").reindex(metrics).astype(float)
        decisive = group.loc[_VERDICT] if _VERDICT in group.index else group.mean()
        yield pool, group[decisive.sort_values(ascending=False, kind="stable", na_position="last").index]


def _shares(counts: Mapping[str, int], least: float) -> dict[str, float]:
    """Return every pool's share of the width: as its models, but never so little that its name has no room."""
    total = sum(counts.values())
    wide = {pool: max(n / total, min(least, 1 / len(counts))) for pool, n in counts.items()}
    return {pool: share / sum(wide.values()) for pool, share in wide.items()}


def _panel(axes: Axes, pool: str, group: pd.DataFrame, *, named: bool, narrow: bool) -> AxesImage:
    """Draw one pool; a cell without a value lets the hatched ground through."""
    axes.patch.set(facecolor=style.PALE, edgecolor=style.DIM, hatch="//////", linewidth=0)
    shown = np.ma.masked_invalid(group.to_numpy().clip(*CLIP))
    image = axes.imshow(shown, vmin=CLIP[0], vmax=CLIP[1], cmap="cividis", aspect="auto", interpolation="nearest")
    n = group.shape[1]
    title = f"{n} {POOLS[pool]}" if narrow else f"{POOLS[pool]}\n{n}"
    turn = 90 if narrow else 0
    axes.text(0.5, 1.02, title, transform=axes.transAxes, ha="center", va="bottom", fontsize=7, rotation=turn)
    names = [style.shorten(str(name), 22) for name in group.columns] if named else []
    axes.set_xticks(range(n) if named else [], names, rotation=90, fontsize=5.5)
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    for y in np.arange(1, len(group)) - 0.5:
        axes.axhline(y, color="white", linewidth=0.6)
    return image


def _finish(figure: Figure, panels: Matrix, image: AxesImage, metrics: Sequence[str], *, narrow: bool) -> None:
    """Name the channels, set the panels close, and add one colour bar."""
    names = [style.shorten(name, 14 if narrow else _LONGEST) for name in metrics]
    panels[0].set_yticks(range(len(metrics)), names)
    layout: Any = figure.get_layout_engine()
    layout.set(w_pad=0.02, wspace=0.01)
    bar: Colorbar = figure.colorbar(image, ax=list(panels), fraction=0.03, pad=0.02, ticks=[0, 0.5, 1], aspect=15)
    bar.set_label("residue")
    bar.outline.set_visible(False)  # type: ignore[operator]


def _means_in_words(groups: Mapping[str, pd.DataFrame]) -> str:
    """Return the mean residue that decides, pool by pool."""
    told = []
    for pool, group in groups.items():
        row = group.loc[_VERDICT] if _VERDICT in group.index else group.mean()
        mean = brief({"estimate": row.mean()}, "not known")
        told.append(f"{group.shape[1]} {POOLS[pool]}: {mean}")
    return f"Mean residue of the verdict: {'; '.join(told)}" if told else "No model was audited"
