import runpy
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from lethescope.errors import InputError
from lethescope.figures import curves, style

made = SimpleNamespace(**runpy.run_path(str(Path(__file__).with_name("made.py"))))
clipped = SimpleNamespace(**runpy.run_path(str(Path(__file__).with_name("clipped.py"))))
ROLES = ("original", "unlearned", "reference-0", "planted-unembedding", "planted-last_block")


def exact(leads, before, **places):
    """Forget facts with one alternative each, which the true answer leads by leads[fact][place] nats."""
    leads = np.asarray(leads, dtype=float)
    ds = made.scores(leads, ["forget"] * len(leads), alternatives=1, **places)
    ds["score"][:] = 0
    ds["score"][:, 0] = leads
    start = np.stack([np.asarray(before, dtype=float), np.zeros(len(leads))], 1)
    return ds.assign(before=(("fact", "candidate"), start))


def lines(axes):
    return {x.get_label(): (x.get_xdata(), x.get_ydata()) for x in axes.lines if not x.get_label().startswith("_")}


def test_the_curve_starts_before_training_and_is_the_mean_of_the_held_out_facts():
    ds = exact([[1, 2], [3, 4]], before=[0, 1], step=[2, 4], rate=[1e-3, 1e-3], method=["full", "full"])
    (axes,) = curves.paper({"unlearned": ds}).axes
    steps, values = lines(axes)["unlearned"]
    assert steps.tolist() == [0, 2, 4]
    assert values == pytest.approx(np.tanh(np.array([[0, 1, 2], [1, 3, 4]]) / 2).mean(0))
    assert axes.get_title() == "full, rate 0.001"


def test_without_the_scores_before_it_starts_at_the_first_step():
    ds = exact([[1, 2]], before=[0], step=[2, 4]).drop_vars("before")
    (axes,) = curves.paper({"unlearned": ds}).axes
    assert lines(axes)["unlearned"][0].tolist() == [2, 4]
    assert axes.get_title() == ""


def test_one_panel_a_method_and_rate():
    places = {"step": [1, 1, 1], "rate": [1e-4, 1e-3, 1e-4], "method": ["full", "full", "lora"]}
    figure = curves.paper({"unlearned": exact([[1, 2, 3]], before=[0], **places)})
    ends = {axes.get_title(): lines(axes)["unlearned"][1][-1] for axes in figure.axes}
    tops = {"full, rate 0.0001": 1, "full, rate 0.001": 2, "lora, rate 0.0001": 3}
    assert ends == pytest.approx({title: np.tanh(top / 2) for title, top in tops.items()})


def test_every_role_and_the_null_are_drawn():
    figure = curves.paper({role: made.relearned(3) for role in ROLES})
    for axes in figure.axes:
        assert set(lines(axes)) == {*ROLES, "null: control facts"}
        assert np.abs(lines(axes)["null: control facts"][1]).max() < 0.1
        assert lines(axes)["unlearned"][1][-1] > 0.5
    assert "unlearned: starts at" in figure.get_label()


def test_a_role_without_control_facts_is_enough():
    ds = made.relearned(3)
    figure = curves.paper({"reference-0": ds.isel(fact=np.flatnonzero(ds["split"] == "forget"))})
    assert set(lines(figure.axes[0])) == {"reference-0"}


@pytest.mark.parametrize("width", ["neurips", "icml", "report"])
@pytest.mark.parametrize(("n", "rates"), [(1, (1e-4,)), (10, (1e-5, 1e-4, 3e-4, 1e-3)), (400, (1e-4, 1e-3))])
def test_nothing_is_clipped(width, n, rates):
    figure = curves.paper({role: made.relearned(3, n=n, rates=rates) for role in ROLES}, width=width)
    assert clipped.outside(figure) == []


def test_unknown_values_draw_nothing_and_break_nothing():
    ds = made.relearned(3)
    empty = ds.assign(score=ds["score"] * np.nan, before=ds["before"] * np.nan)
    figure = curves.paper({"original": ds, "unlearned": empty})
    assert "unlearned: not known." in figure.get_label()
    assert style.drawn_as(figure, "pdf")


def test_bad_input_is_named():
    with pytest.raises(InputError, match="no coordinate 'step'"):
        curves.paper({"unlearned": made.lens([0, 1, 3, 5, 6])})
    with pytest.raises(InputError, match="split 'forget'"):
        curves.paper({})
    with pytest.raises(InputError, match="split 'elsewhere'"):
        curves.paper({"unlearned": made.relearned(3)}, split="elsewhere", null_split="")
