import runpy
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import xarray as xr

from lethescope.errors import InputError
from lethescope.figures import landscape, style

clipped = SimpleNamespace(**runpy.run_path(str(Path(__file__).with_name("clipped.py"))))
ticks = SimpleNamespace(**runpy.run_path(str(Path(__file__).with_name("ticks.py"))))


def made(true, wrong, *, sizes=(0.1, 0.5), facts=3, split="forget", alternatives=2):
    """A landscape with these mean losses at size 0 and at every size; facts, neighbours and wrong answers differ."""
    off = np.linspace(-0.5, 0.5, facts)
    losses = np.stack([true] + [np.add(wrong, d) for d in np.linspace(-1, 1, alternatives)])  # candidate size
    every = losses[None] + off[:, None, None]
    near = every[..., 1:, None] + np.array([-0.25, 0.25])
    coords = {
        "fact": [f"f{i}" for i in range(facts)],
        "split": ("fact", [split] * facts),
        "subject": ("fact", [f"Person {i}" for i in range(facts)]),
        "size": list(sizes),
    }
    data = {
        "loss": (("fact", "candidate"), every[..., 0]),
        "neighbour_loss": (("fact", "candidate", "size", "neighbour"), near),
    }
    return xr.Dataset(data, coords)


def lines(axes):
    return {x.get_label(): (x.get_xdata(), x.get_ydata()) for x in axes.lines if not x.get_label().startswith("_")}


def test_lines_are_mean_losses_the_prompt_itself_at_0():
    (axes,) = landscape.paper({"unlearned": made([9, 6, 5], [8, 8, 7.5])}).axes
    found = lines(axes)
    assert set(found) == {"unlearned: true answer", "null: wrong answers"}
    for label, wanted in (("unlearned: true answer", [9, 6, 5]), ("null: wrong answers", [8, 8, 7.5])):
        assert found[label][0].tolist() == [0, 0.1, 0.5]
        assert found[label][1] == pytest.approx(wanted)
    assert axes.get_ylim()[0] == 0


def test_one_panel_a_model_on_one_scale_with_one_legend():
    figure = landscape.paper({"original": made([0, 4, 6], [8, 8, 8]), "unlearned": made([17, 9, 8], [11, 8, 8])})
    assert [axes.get_title() for axes in figure.axes] == ["original", "unlearned"]
    assert len({axes.get_ylim() for axes in figure.axes}) == 1
    told = [t.get_text() for t in figure.legends[0].get_texts()]
    assert told == ["original: true answer", "unlearned: true answer", "null: wrong answers"]
    assert "original: true answer 0.00 at it, 6.00 around; wrong answers 8.00 at it" in figure.get_label()


def test_only_the_split_is_drawn():
    both = xr.concat([made([1, 2, 3], [8, 8, 8]), made([5, 5, 5], [8, 8, 8], split="control")], "fact")
    (axes,) = landscape.paper({"original": both}, split="control").axes
    assert lines(axes)["original: true answer"][1] == pytest.approx([5, 5, 5])


def test_facts_without_wrong_answers_have_no_null():
    (axes,) = landscape.paper({"original": made([1, 2, 3], [8, 8, 8], alternatives=0)}).axes
    assert set(lines(axes)) == {"original: true answer"}


@pytest.mark.parametrize("width", ["neurips", "icml"])
@pytest.mark.parametrize("roles", [("model",), ("original", "unlearned"), ("original", "unlearned", "r-0", "r-1")])
def test_nothing_is_clipped_or_overlaps(width, roles):
    sizes = (0.1, 0.3, 0.5)
    ds = made([0, 400, 6, 7], [1800, 8, 8, 8], sizes=sizes, facts=1)
    figure = landscape.paper(dict.fromkeys(roles, ds), width=width)
    assert clipped.outside(figure) == []
    shown = [axes for axes in figure.axes if axes.axison]
    texts = [text for axes in shown for text in (axes.title, axes.xaxis.label)]
    texts += [*figure.legends[0].get_texts(), *ticks.shown(figure)]
    assert clipped.overlapping(texts, figure) == []


@pytest.mark.parametrize("kind", ["pdf", "png", "svg"])
def test_the_same_measurement_gives_the_same_bytes(kind):
    ds = made([9, 6, 5], [8, 8, 7.5])
    assert style.drawn_as(landscape.paper({"a": ds}), kind) == style.drawn_as(landscape.paper({"a": ds}), kind)


def test_bad_input_is_named():
    ds = made([9, 6, 5], [8, 8, 7.5])
    with pytest.raises(InputError, match="at least one"):
        landscape.paper({})
    with pytest.raises(InputError, match="unlearned: this is no landscape"):
        landscape.paper({"original": ds, "unlearned": ds.drop_vars("loss")})
    with pytest.raises(InputError, match="original: this measurement has no fact of the split 'retain'"):
        landscape.paper({"original": ds}, split="retain")
