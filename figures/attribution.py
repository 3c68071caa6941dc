"""What each word of a prompt contributes to the answer, a few facts, before and after."""

from collections.abc import Mapping, Sequence

import numpy as np
import xarray as xr
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from lethescope.errors import InputError
from lethescope.figures import style
from lethescope.figures.bands import of_split

_LINE = 0.125  # inches a bar


@style.styled
def paper(
    measurements: Mapping[str, xr.Dataset],
    *,
    facts: Sequence[str] | None = None,
    split: str = "forget",
    most: int = 4,
    words: int = 12,
    width: str | float = "neurips",
) -> Figure:
    """Draw the contribution of every word of a few prompts as bars, one panel a fact, one bar a model.

    To the right: the word supports the answer; to the left: it speaks against it. Above each panel stands log p, the
    mean log-probability of the answer's tokens after the whole prompt, model by model: bars that shrink where it falls
    say that the prompt has less hold on the answer, not that the answer is gone; and a wrong answer has bars, too.

    Args:
        measurements: role to measurement, as `lethescope.probes.attribution.measure` returns it, of the same facts and
            units.
        facts: ids of the facts drawn; where None, the first fact of each of the split's first `most` subjects.
        split: of the facts drawn, where no ids are given.
        most: how many facts.
        words: of a longer prompt only so many are drawn, those with the largest contributions in any model.
        width: preset name of `style.WIDTHS`, or inches.

    Returns:
        The figure; its label is its description in words.

    Raises:
        InputError: there is no measurement, no such fact, or the models were asked different prompts or units.
    """
    chosen = {role: _chosen(ds, facts, split, most) for role, ds in measurements.items()}
    if not chosen:
        raise InputError("there is no measurement to draw; give at least one")
    texts = _same_texts(chosen)
    rows = [_rows(list(chosen.values()), fact, words) for fact in range(len(texts))]
    columns = min(len(rows), 1 if style.width_of(width) < style.NARROW else 2)
    figure, panels = _panels(width, [len(row) for row in rows], len(chosen), columns)
    longest = 12 if figure.get_figwidth() < style.WIDTHS["report"] else 16
    for fact, (axes, row) in enumerate(zip(panels, rows, strict=True)):
        for place, (role, ds) in enumerate(chosen.items()):
            _bars(axes, ds["contribution"].values[fact, row], role, place, len(chosen))
        left = int((texts[fact] != "").sum()) - len(row)
        _dress(axes, [style.shorten(text, longest) for text in texts[fact, row]], left)
        axes.set_title(_title(chosen, fact), loc="left")
        if fact + columns >= len(rows):  # nothing below
            axes.set_xlabel("contribution\n(nats per answer token)")
    if len(chosen) > 1:
        handles, labels = panels[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=style.legend_columns(figure))
    figure.set_label(_in_words(chosen, texts))
    return figure


def _chosen(ds: xr.Dataset, facts: Sequence[str] | None, split: str, most: int) -> xr.Dataset:
    """Return the facts to draw, (fact unit).

    Raises:
        InputError: an id is not there, or the split has no fact.
    """
    if facts is None:
        names = of_split(ds["contribution"], split)["fact"].to_series()
        told = ds["subject"].to_series()[names] if "subject" in ds.coords else names
        facts = names[~told.duplicated()].tolist()[:most]
    missing = [name for name in facts if name not in ds["fact"].values]
    if missing or not len(facts):
        told = f"no fact {missing[0]!r}" if missing else f"no fact of the split {split!r}"
        raise InputError(f"{told} in this measurement of prompt attribution")
    return ds.sel(fact=list(facts)).transpose("fact", "unit", ...)


def _same_texts(chosen: Mapping[str, xr.Dataset]) -> np.ndarray:
    """Return the units' texts (fact unit).

    Raises:
        InputError: they are not the same in all measurements.
    """
    texts = {role: ds["unit_text"].values for role, ds in chosen.items()}
    first = next(iter(texts))
    for role, found in texts.items():
        if found.shape != texts[first].shape or (found != texts[first]).any():
            raise InputError(
                f"{first} and {role} were not asked the same prompts in the same units; measure both alike"
            )
    return texts[first]


def _rows(every: Sequence[xr.Dataset], fact: int, most: int) -> np.ndarray:
    """Return which units of a fact are drawn, in the order of the prompt."""
    size = np.max([np.abs(ds["contribution"].values[fact]) for ds in every], axis=0)
    there = np.flatnonzero(every[0]["unit_text"].values[fact] != "")
    return np.sort(there[np.argsort(-np.nan_to_num(size[there]), kind="stable")[:most]])


def _panels(width: str | float, rows: Sequence[int], bars: int, columns: int) -> tuple[Figure, list[Axes]]:
    """Return a figure with one panel a fact, as high as its rows need, and equally high beside each other."""
    tallest = [max(rows[i : i + columns]) for i in range(0, len(rows), columns)]
    high = [0.5 + max(0.17, _LINE * bars) * most for most in tallest]
    figure = style.blank(width, 0.5 + sum(high))
    grid = figure.subplots(len(tallest), columns, sharex=True, squeeze=False, height_ratios=high)
    for line, most in zip(grid, tallest, strict=True):
        for axes in line:
            axes.set_ylim(most - 0.4, -0.6)
    for axes in grid.flat[len(rows) :]:
        axes.set_axis_off()
    return figure, list(grid.flat[: len(rows)])


def _bars(axes: Axes, values: np.ndarray, role: str, place: int, of: int) -> None:
    high = 0.8 / of
    look = style.role_look(role)
    axes.barh(np.arange(len(values)) - 0.4 + high * (place + 0.5), values, high, color=look.color, label=role)


def _dress(axes: Axes, texts: Sequence[str], left: int) -> None:
    axes.set_yticks(range(len(texts)), texts)
    axes.axvline(0, color=style.FAINT, linewidth=0.6)
    axes.tick_params(axis="y", length=0)
    axes.tick_params(axis="x", labelbottom=True)
    axes.spines["left"].set_visible(False)
    axes.xaxis.set_major_locator(MaxNLocator(nbins=5))
    if left:
        axes.set_ylabel(f"{left} smaller not drawn", fontsize=6.5, color=style.FAINT)


def _title(chosen: Mapping[str, xr.Dataset], fact: int) -> str:
    """Return the name of a fact and, on a second line, how likely its answer is in each model."""
    names = next(iter(chosen.values()))
    told = {name: str(names[name].values[fact]) for name in ("subject", "relation") if name in names.coords}
    digits = 2 if len(chosen) < 3 else 1
    likely = " → ".join(f"{ds['log_probability'].values[fact]:z.{digits}f}" for ds in chosen.values())
    head = ", ".join(filter(None, told.values())) or str(names["fact"].values[fact])
    return f"{style.shorten(head, 24)}\nlog p {likely.replace('-', '−')}"


def _in_words(chosen: Mapping[str, xr.Dataset], texts: np.ndarray) -> str:
    """Return, fact by fact, which word has the largest contribution in each model."""
    said = ["What each word of a prompt contributes to the answer."]
    for fact, name in enumerate(next(iter(chosen.values()))["fact"].values):
        strongest = []
        for role, ds in chosen.items():
            values = ds["contribution"].values[fact]
            if np.isfinite(values).any():
                unit = int(np.nanargmax(np.abs(values)))
                strongest.append(f"{role} {texts[fact, unit]} {values[unit]:z.2f}")
        said.append(f"{name}: largest {'; '.join(strongest) or 'not known'}.")
    return " ".join(said)
