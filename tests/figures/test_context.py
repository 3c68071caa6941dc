import doctest
import runpy
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import xarray as xr

from lethescope.auc import share
from lethescope.errors import InputError
from lethescope.figures import context, style
from lethescope.probes.context import COORDS

clipped = SimpleNamespace(**runpy.run_path(str(Path(__file__).with_name("clipped.py"))))
ticks = SimpleNamespace(**runpy.run_path(str(Path(__file__).with_name("ticks.py"))))
DIRECTIONS = ("document", "code", "database")
SPLITS = ("forget", "retain")


def made(read, *, units=16, n=2, splits=SPLITS, directions=DIRECTIONS, rivals=3):
    """Contexts whose odd positions below 4 x splits hold facts; `read(direction, split, position)` says what is read.

    Every fact has one wrong answer, every neutral unit `rivals` of them.
    """
    of = {2 * k + 1: split for k, split in enumerate(splits * 2)}
    place = [(d, c, i, of.get(i, "neutral")) for d in directions for c in range(n) for i in range(units)]
    best = np.array([float(read(d, split, i)) for d, _, i, split in place])
    score = np.full((len(place), rivals + 1), -2.0)
    score[:, 0] = np.where(best == 1, -1, -3)
    score[[split != "neutral" for *_, split in place], 2:] = np.nan
    score[np.isnan(best)] = np.nan
    coords = dict(zip(COORDS, zip(*((*p, "", "given", "gold", "") for p in place), strict=True), strict=True))
    data = dict.fromkeys(("best", "correct", "best_without"), ("query", best))
    return xr.Dataset(
        {"score": (("query", "candidate"), score), **data}, {name: ("query", list(v)) for name, v in coords.items()}
    )


def everything(*_):
    return 1


def no_forget(_direction, split, _position):
    return split != "forget"


def drawn(axes, role):
    """The lines of a role, by what it reads of neutral units and of facts: heights."""
    colour = style.role_look(role).color
    own = [line for line in axes.lines if line.get_color() == colour]
    return [line.get_ydata().tolist() for line in own]


def test_examples():
    assert doctest.testmod(context).failed == 0


def test_a_panel_has_the_bins_of_neutral_units_and_the_splits_of_facts():
    figure = context.paper({"original": made(lambda d, s, i: s != "forget" and i >= 4)})
    assert [axes.get_title() for axes in figure.axes] == ["document, both ways", "code, backward", "database, forward"]
    for axes in figure.axes:
        bins, facts = drawn(axes, "original")
        assert bins == [0, 1, 1, 1]
        assert facts == [0, 0.5]  # retain facts stand at 3 and 7
        assert [t.get_text() for t in axes.get_xticklabels()] == ["0", "4", "8", "12", "16", *SPLITS]


def test_directions_stand_in_their_own_panels():
    figure = context.paper({"a": made(lambda d, *_: d == "code")})
    assert [axes.lines[0].get_ydata().tolist() for axes in figure.axes] == [[0] * 4, [1] * 4, [0] * 4]
    assert len(context.paper({"a": made(everything, directions=("code",))}).axes) == 1


def test_upright_lines_are_exact_intervals():
    axes = context.paper({"original": made(everything)}).axes[0]
    bins, facts = (lines.get_segments() for lines in axes.collections[:2])
    low = [share(n, n).low for n in (4, 4, 8, 8)]  # two of the first bins' four places hold facts, in two contexts
    assert [segment[0, 1] for segment in bins] == pytest.approx(low)
    assert [segment[0, 1] for segment in facts] == pytest.approx([share(4, 4).low] * 2)
    assert all(segment[1, 1] == 1 for segment in (*bins, *facts))
    assert [segment[0, 0] for segment in bins] == axes.lines[0].get_xdata().tolist()


def test_chance_is_drawn_for_each_split_by_itself():
    ds = made(everything)
    found = context.chance(ds)
    assert found.sel(direction="code", split=["neutral", "forget", "retain"]).values.tolist() == [0.25, 0.5, 0.5]
    figure = context.paper({"original": ds})
    heights = [lines.get_segments()[0][0, 1] for lines in figure.axes[0].collections[2:5]]
    assert heights == [0.25, 0.5, 0.5]
    assert "chance" in [text.get_text() for text in figure.legends[0].get_texts()]
    said = context.paper({"original": ds}, name="correct")
    assert "chance" not in [text.get_text() for text in said.legends[0].get_texts()]
    assert len(said.axes[0].collections) == 2 and "chance" not in said.get_label()


def test_models_stand_beside_each_other_in_their_own_looks():
    figure = context.paper({"original": made(everything), "unlearned": made(no_forget)})
    axes = figure.axes[1]
    assert drawn(axes, "original") == [[1] * 4, [1, 1]]
    assert drawn(axes, "unlearned") == [[1] * 4, [0, 1]]
    first, second = (line.get_xdata() for line in axes.lines[:4:2])
    assert (second > first).all() and (second - first < 0.5).all()
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["original", "unlearned", "chance"]
    words = figure.get_label()
    assert "original: document neutral 1.00 (of 24, chance 0.25), forget 1.00 (of 4, chance 0.50)" in words
    assert (
        "code neutral 1.00 (of 24, chance 0.25), forget 0.00 (of 4, chance 0.50), retain 1.00"
        in words.split("unlearned")[1]
    )


def test_what_was_not_asked_is_said():
    ds = made(lambda d, s, _: np.nan if (d, s) == ("code", "forget") else 1)
    figure = context.paper({"original": ds})
    assert [[t.get_text() for t in axes.texts] for axes in figure.axes] == [[], ["not asked"], []]
    assert "code neutral 1.00 (of 24, chance 0.25), forget not asked, retain" in figure.get_label()
    assert np.isnan(context.chance(ds).sel(direction="code", split="forget"))


def test_without_facts_there_are_bins_only_and_never_more_than_places():
    figure = context.paper({"original": made(everything, splits=(), units=3)})
    assert [drawn(axes, "original")[0] for axes in figure.axes] == [[1, 1, 1]] * 3
    assert [t.get_text() for t in figure.axes[0].get_xticklabels()] == ["0", "1", "2", "3"]
    assert "forget" not in figure.get_label()


@pytest.mark.parametrize(
    ("width", "splits"), [*((width, (*SPLITS, "control")) for width in style.WIDTHS), ("neurips", SPLITS), ("icml", ())]
)
def test_nothing_is_clipped_or_overlaps(width, splits):
    ds = made(lambda d, s, i: np.nan if (d, s) == ("code", "forget") else i % 3, units=64, splits=splits)
    ds["best"] = ds["best"].where(ds["best"] != 2, 1)
    figure = context.paper(dict.fromkeys(("original", "unlearned", "reference-0", "reference-1"), ds), width=width)
    assert clipped.outside(figure) == []
    texts = [t for axes in figure.axes for t in (axes.title, axes.xaxis.label, axes.yaxis.label)]
    texts += [*figure.legends[0].get_texts(), *ticks.shown(figure)]
    assert clipped.overlapping(texts, figure) == []


@pytest.mark.parametrize("kind", ["pdf", "png", "svg"])
def test_the_same_measurement_gives_the_same_bytes(kind):
    ds = made(no_forget, directions=("code",))
    assert style.drawn_as(context.paper({"a": ds}), kind) == style.drawn_as(context.paper({"a": ds}), kind)


def test_bad_input_is_named():
    ds = made(everything)
    with pytest.raises(InputError, match="there is no measurement"):
        context.paper({})
    with pytest.raises(InputError, match="unlearned: this is no measurement of the context probe"):
        context.paper({"original": ds, "unlearned": ds.drop_vars("position")})
    with pytest.raises(InputError, match="'preference' is no variable of 0 and 1; use best, correct or best_without"):
        context.paper({"original": ds}, name="preference")
    for other in (
        made(everything, units=18),
        made(everything, splits=("retain", "forget")),
        made(everything, rivals=2),
    ):
        with pytest.raises(InputError, match="original and unlearned were not asked the same contexts"):
            context.paper({"original": ds, "unlearned": other})
