import runpy
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import xarray as xr

from lethescope.errors import InputError
from lethescope.figures import attribution, style

clipped = SimpleNamespace(**runpy.run_path(str(Path(__file__).with_name("clipped.py"))))
ticks = SimpleNamespace(**runpy.run_path(str(Path(__file__).with_name("ticks.py"))))


def made(contribution, texts=None, *, likely=-1.0, subjects=None, split="forget"):
    """A measurement of prompt attribution with these contributions; words are w0, w1 … where none are given."""
    contribution = np.asarray(contribution, dtype=float)
    n, units = contribution.shape
    texts = [[f"w{i}" for i in range(units)]] * n if texts is None else texts
    return xr.Dataset(
        {
            "contribution": (("fact", "unit"), contribution),
            "unit_text": (("fact", "unit"), np.where(np.isnan(contribution), "", np.asarray(texts))),
            "log_probability": ("fact", np.full(n, likely)),
        },
        {
            "fact": [f"f{i}" for i in range(n)],
            "split": ("fact", [split] * n),
            "subject": ("fact", subjects or [f"Person {i}" for i in range(n)]),
            "relation": ("fact", ["birthplace"] * n),
        },
    )


def bars(axes):
    return {box.get_label(): [bar.get_width() for bar in box] for box in axes.containers}


def words_of(axes):
    return [t.get_text() for t in axes.get_yticklabels()]


def test_a_bar_is_a_words_contribution_in_the_order_of_the_prompt():
    before, after = made([[1.0, -2.0, 3.0]], likely=-0.5), made([[0.5, 0.25, -1.0]], likely=-4)
    figure = attribution.paper({"original": before, "unlearned": after})
    (axes,) = figure.axes
    assert bars(axes) == {"original": [1, -2, 3], "unlearned": [0.5, 0.25, -1]}
    assert words_of(axes) == ["w0", "w1", "w2"]
    assert axes.get_ylim()[0] > axes.get_ylim()[1]
    assert axes.get_title(loc="left") == "Person 0, birthplace\nlog p −0.50 → −4.00"
    assert axes.get_xlabel() == "contribution\n(nats per answer token)"
    assert [t.get_text() for t in figure.legends[0].get_texts()] == ["original", "unlearned"]
    assert "f0: largest original w2 3.00; unlearned w2 -1.00." in figure.get_label()


def test_bars_of_one_word_stand_side_by_side_and_not_on_each_other():
    (axes,) = attribution.paper({role: made([[1.0, 2.0]]) for role in ("original", "unlearned", "reference")}).axes
    places = sorted((bar.get_y(), bar.get_y() + bar.get_height()) for box in axes.containers for bar in box)
    assert all(end <= start + 1e-9 for (_, end), (start, _) in pairwise(places))
    assert {round(sum(place) / 2) for place in places} == {0, 1}


def test_facts_of_different_subjects_come_first_or_those_that_are_named():
    ds = made(np.arange(8.0).reshape(4, 2), subjects=["Ada", "Ada", "Ben", "Cy"])
    figure = attribution.paper({"model": ds}, most=2)
    assert [axes.get_title(loc="left").split(",")[0] for axes in figure.axes] == ["Ada", "Ben"]
    assert not figure.legends
    named = attribution.paper({"model": ds}, facts=["f3", "f1"])
    assert [bars(axes)["model"] for axes in named.axes] == [[6, 7], [2, 3]]


def test_of_a_long_prompt_the_largest_contributions_of_any_model_are_kept_in_their_order():
    before, after = made([[0.1, 3.0, 0.2, 0.0, 1.0]]), made([[0.1, 0.0, 0.2, -2.0, 0.0]])
    (axes,) = attribution.paper({"original": before, "unlearned": after}, words=3).axes
    assert words_of(axes) == ["w1", "w3", "w4"]
    assert bars(axes)["unlearned"] == [0, -2, 0]
    assert axes.get_ylabel() == "2 smaller not drawn"


def test_a_fact_with_fewer_words_has_fewer_rows():
    figure = attribution.paper({"model": made([[1.0, 2.0, 3.0], [1.0, np.nan, np.nan]])})
    assert [words_of(axes) for axes in figure.axes] == [["w0", "w1", "w2"], ["w0"]]
    assert len({axes.get_ylim() for axes in figure.axes}) == 1


@pytest.mark.parametrize("width", ["neurips", "icml"])
@pytest.mark.parametrize(("facts", "words"), [(1, 1), (4, 5), (2, 40)])
@pytest.mark.parametrize("roles", [("model",), ("original", "unlearned", "reference")])
def test_nothing_is_clipped_or_overlaps(width, facts, words, roles):
    texts = [["an-exceedingly-long-word" if i % 3 else "a" for i in range(words)]] * facts
    names = [f"A person {i} with a very long and winding name" for i in range(facts)]
    rng = np.random.default_rng(0)
    data = {role: made(rng.normal(0, 9, (facts, words)), texts, subjects=names) for role in roles}
    figure = attribution.paper(data, width=width)
    assert clipped.outside(figure) == []
    legend = [text for found in figure.legends for text in found.get_texts()]
    labels = [text for axes in figure.axes for text in (axes.xaxis.label, axes.yaxis.label, axes.title)]
    assert clipped.overlapping([*labels, *legend, *ticks.shown(figure)], figure) == []


@pytest.mark.parametrize("kind", ["pdf", "png", "svg"])
def test_the_same_measurement_gives_the_same_bytes(kind):
    ds = made([[1.0, -2.0, 3.0]])
    assert style.drawn_as(attribution.paper({"a": ds}), kind) == style.drawn_as(attribution.paper({"a": ds}), kind)


def test_bad_input_is_named():
    ds = made([[1.0, 2.0]])
    with pytest.raises(InputError, match="at least one"):
        attribution.paper({})
    with pytest.raises(InputError, match="no fact 'f9'"):
        attribution.paper({"model": ds}, facts=["f0", "f9"])
    with pytest.raises(InputError, match="no fact of the split 'retain'"):
        attribution.paper({"model": ds}, split="retain")
    with pytest.raises(InputError, match="original and unlearned were not asked the same prompts"):
        attribution.paper({"original": ds, "unlearned": made([[1.0, 2.0]], [["w0", "other"]])})
