"""The forest plot of a verdict: one row a channel."""

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch

from lethescope.figures import style

_REACH = (-0.5, 1.5)  # intervals beyond are cut and end in an arrow
_LONGEST = 18  # characters of a channel's name


@style.styled
def paper(verdict: Mapping[str, Any], *, width: str | float = "neurips", margin: float | None = None) -> Figure:
    """Draw the residue of every channel with its interval and its planted controls; the null is the line at 0.

    The residue is what a channel still finds in the unlearned model as a share of what it finds in the original, the
    null taken off: 0 = as if never taught, 1 = as in the original; further left means more forgotten. A row at 0 says
    that this channel found nothing at this budget, not that nothing is there. A channel that missed a planted control
    and found nothing is drawn faint and marked "blind here": its 0 carries no weight.

    Args:
        verdict: the dictionary of ``verdict.json``. Its ``channels`` hold ``name``, ``residue`` (estimate, low, high),
            ``planted`` (kind to estimate), ``planted_low`` (kind to the low end of its interval), ``blind`` and
            ``testable``; a missing number (None or NaN) is not drawn.
        width: preset name of `style.WIDTHS`, or inches.
        margin: end of the equivalence margin, the shaded band: an interval that ends in it counts as no residue;
            ``verdict["margin"]`` where None, no band where that is missing, too.

    Returns:
        The figure; its label is its description in words.

    >>> row = {"name": "say", "residue": {"estimate": 0.1, "low": 0.0, "high": 0.2}}
    >>> figure = paper({"channels": [row], "decided_by": "say"}, width="icml")
    >>> figure.get_label()
    'Residue of each channel, from 0 (as if never taught) to 1 (as in the original). say 0.10 [0.00, 0.20] (decides).'
    """
    channels = list(verdict.get("channels", ()))
    margin = number(verdict.get("margin")) if margin is None else margin
    figure = style.blank(width, 1.15 + 0.3 * max(len(channels), 1))
    axes = figure.add_subplot()
    axes.set_xlim(_limits(channels))
    narrow = figure.get_figwidth() < style.NARROW
    _frame(axes, channels, narrow=narrow)
    if math.isfinite(margin):
        axes.axvspan(axes.get_xlim()[0], margin, color=style.PALE, alpha=0.7, linewidth=0)
    for row, channel in enumerate(channels):
        _row(axes, row, channel, deciding=channel["name"] == verdict.get("decided_by"), narrow=narrow)
    figure.legend(handles=_legend(channels, margin), loc="outside lower center", ncols=2, columnspacing=1.2)
    figure.set_label(_in_words(channels, verdict.get("decided_by")))
    return figure


def number(value: Any) -> float:
    """Return the value as a float, NaN where there is none.

    >>> number(None)
    nan
    """
    return float("nan") if value is None else float(value)


def interval(entry: Mapping[str, Any] | None) -> tuple[float, float, float]:
    """Return estimate, low and high of an entry of the verdict, NaN for what it lacks.

    >>> interval({"estimate": 0.5})
    (0.5, nan, nan)
    """
    entry = entry or {}
    return number(entry.get("estimate")), number(entry.get("low")), number(entry.get("high"))


def planted_of(channel: Mapping[str, Any]) -> dict[str, tuple[float, float, float]]:
    """Return estimate, low and high of what a channel finds in each planted control.

    >>> planted_of({"planted": {"unembedding": 0.9}, "planted_low": {"unembedding": 0.8}})
    {'unembedding': (0.9, 0.8, nan)}
    """
    lows = channel.get("planted_low") or {}
    return {
        kind: (number(seen), number(lows.get(kind)), float("nan"))
        for kind, seen in (channel.get("planted") or {}).items()
    }


def note_of(channel: Mapping[str, Any]) -> str:
    """Return why a channel has no say: "not testable", "needs a reference", "blind here", or nothing where it has one.

    A channel that missed a planted control is blind where it finds nothing; what it does find counts.

    >>> note_of({"blind": True, "residue": {"estimate": 0.1, "low": 0.0, "high": 0.2}})
    'blind here'
    >>> note_of({"blind": True, "residue": {"estimate": 0.7, "low": 0.6, "high": 0.8}})
    ''
    """
    if not channel.get("testable", True):
        return "not testable"
    if not channel.get("grounded", True):
        return "needs a reference"
    return "blind here" if channel.get("blind") and not interval(channel.get("residue"))[1] > 0 else ""


def brief(entry: Mapping[str, Any] | None, missing: str = "") -> str:
    """Return an entry as text: estimate and interval with two digits.

    >>> brief({"estimate": 0.5, "low": 0.41, "high": 0.6})
    '0.50 [0.41, 0.60]'
    """
    estimate, low, high = interval(entry)
    if not math.isfinite(estimate):
        return missing
    ends = f" [{low:z.2f}, {high:z.2f}]" if math.isfinite(low) and math.isfinite(high) else ""
    return f"{estimate:z.2f}{ends}".replace("-", "−")


def _limits(channels: list[Any]) -> tuple[float, float]:
    """Return the ends of the axis: 0 and 1 with room, more where an interval needs it, never beyond reach."""
    drawn = [x for c in channels for entry in (interval(c.get("residue")), *planted_of(c).values()) for x in entry]
    drawn = [x for x in drawn if math.isfinite(x)]
    return max(min([-0.12, *(x - 0.05 for x in drawn)]), _REACH[0]), min(
        max([1.12, *(x + 0.05 for x in drawn)]), _REACH[1]
    )


def _frame(axes: Axes, channels: list[Any], *, narrow: bool) -> None:
    """Draw the axes: names of the channels at the left, the residue's meaning below, a line at 0 and at 1."""
    axes.set_ylim(max(len(channels), 1) - 0.4, -0.6)
    axes.set_yticks(range(len(channels)), [style.shorten(c["name"], _LONGEST) for c in channels])
    between = [0.5] if narrow else [0.25, 0.5, 0.75]
    ends = "0\nas if never\ntaught", "1\nas in the\noriginal"
    axes.set_xticks([0, *between, 1], [ends[0], *map(str, between), ends[1]])
    axes.set_xlabel("residue")
    axes.tick_params(axis="y", length=0)
    axes.spines["left"].set_visible(False)
    for x in (0, 1):
        axes.axvline(x, color=style.FAINT, linewidth=0.6, zorder=0.5)


def _row(axes: Axes, row: int, channel: Mapping[str, Any], *, deciding: bool, narrow: bool) -> None:
    """Draw one channel."""
    note = note_of(channel)
    faint = bool(note) and not deciding
    grey = style.DIM if faint else style.FAINT
    planted = planted_of(channel).values()
    for lower, entry in zip(np.linspace(0.2, 0.34, len(planted)), planted, strict=True):
        _bar(axes, row + lower, entry, grey, shape="D", size=3, line=0.7)
    if note != "not testable":
        colour = style.DIM if faint else style.channel_colour(channel["name"])
        _bar(axes, row - 0.05, interval(channel.get("residue")), colour, shape="o", size=5, line=2)
    weight = "bold" if deciding else "normal"
    ink = style.FAINT if faint else style.INK
    text = _beside(channel, note, deciding=deciding, narrow=narrow)
    axes.text(1.02, row, text, transform=axes.get_yaxis_transform(), va="center", color=ink, weight=weight)
    axes.get_yticklabels()[row].set(color=ink, weight=weight)


def _beside(channel: Mapping[str, Any], note: str, *, deciding: bool, narrow: bool) -> str:
    """Return the text at the right of a row: the residue, without its interval in a narrow figure, and the marks."""
    found = brief(channel.get("residue"))
    parts = ["" if note == "not testable" else found.split(" ")[0] if narrow else found, note]
    return ", ".join(filter(None, [*parts, "decides" if deciding else ""]))


def _bar(
    axes: Axes, y: float, entry: tuple[float, float, float], colour: str, *, shape: str, size: float, line: float
) -> None:
    """Draw an estimate and its interval; an end that lies beyond the axis becomes an arrow."""
    low, high = axes.get_xlim()
    estimate, left, right = entry
    ends = [x for x in (left, estimate, right) if math.isfinite(x)]
    if len(ends) > 1:
        axes.plot(
            np.clip([min(ends), max(ends)], low, high), [y, y], color=colour, linewidth=line, solid_capstyle="butt"
        )
    for end, arrow, beyond in ((low, "<", [x for x in ends if x < low]), (high, ">", [x for x in ends if x > high])):
        if beyond:
            axes.plot(end, y, arrow, color=colour, markersize=size, clip_on=False)
    if low <= estimate <= high:
        face, edge, rim = ("white", colour, 0.7) if shape == "D" else (colour, "white", 0.5)
        axes.plot(estimate, y, shape, mfc=face, mec=edge, mew=rim, markersize=size)


def _legend(channels: list[Any], margin: float) -> list[Line2D | Patch]:
    """Return what the markers mean, only those that are drawn."""
    ink: dict[str, Any] = {"color": style.INK}
    handles: list[Line2D | Patch] = [
        Line2D([], [], marker="o", markersize=4, linewidth=2, label="unlearned, 95 % interval", **ink)
    ]
    if any(c.get("planted") for c in channels):
        hollow: dict[str, Any] = {"marker": "D", "markersize": 3, "mfc": "white", "linewidth": 0.7}
        handles.append(Line2D([], [], color=style.FAINT, label="planted control", **hollow))
    if math.isfinite(margin):
        handles.append(Patch(color=style.PALE, alpha=0.7, linewidth=0, label=f"equivalence margin {margin:g}"))
    return handles


def _in_words(channels: list[Any], decided_by: Any) -> str:
    """Return the figure's description."""
    start = "Residue of each channel, from 0 (as if never taught) to 1 (as in the original)."
    rows = []
    for channel in channels:
        marks = ", ".join(filter(None, (note_of(channel), "decides" if channel["name"] == decided_by else "")))
        rows.append(
            f"{channel['name']} {brief(channel.get('residue'), 'not known')}" + (f" ({marks})" if marks else "")
        )
    return f"{start} {'; '.join(rows) or 'No channel was run'}."
