import runpy
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import xarray as xr

from lethescope.errors import InputError
from lethescope.figures import layers, style

made = SimpleNamespace(**runpy.run_path(str(Path(__file__).with_name("made.py"))))
clipped = SimpleNamespace(**runpy.run_path(str(Path(__file__).with_name("clipped.py"))))


def exact(leads, split="forget", **places):
    """Facts with one alternative each, which the true answer leads by leads[fact][place] nats."""
    ds = made.scores(np.asarray(leads, dtype=float), [split] * len(leads), alternatives=1, **places)
    ds["score"][:] = 0
    ds["score"][:, 0] = np.asarray(leads, dtype=float)
    return ds


def lines(axes):
    return {line.get_label(): line.get_ydata() for line in axes.lines if not line.get_label().startswith("_")}


def preference(lead):
    """With one alternative, (share - 1/2) / (1/2) is the hyperbolic tangent of half the lead."""
    return np.tanh(np.asarray(lead) / 2)


def test_the_lines_are_mean_preferences():
    before, after = exact([[1, 2, 3], [3, 2, 1]], layer=[0, 1, 2]), exact([[1, 0, 0], [1, 2, 0]], layer=[0, 1, 2])
    found = lines(layers.paper(before, after).axes[0])
    assert found["original"] == pytest.approx(preference([[1, 2, 3], [3, 2, 1]]).mean(0))
    assert found["unlearned"] == pytest.approx(preference([[1, 0, 0], [1, 2, 0]]).mean(0))
    assert set(found) == {"original", "unlearned"}


def test_places_of_one_layer_are_averaged_sorted_and_those_without_a_layer_left_out():
    before = exact([[4, 1, 3, 9]], layer=[2.0, 0.0, 2.0, np.nan])
    axes = layers.paper(before, before).axes[0]
    assert axes.lines[0].get_xdata().tolist() == [0, 2]
    assert lines(axes)["original"] == pytest.approx([preference(1), preference([4, 3]).mean()])


def test_one_panel_a_decoder():
    leads = [[1, 2, 5, 6]]
    ds = exact(leads, layer=[0, 1, 0, 1], decoder=["own", "own", "frozen", "frozen"])
    own, frozen = layers.paper(ds, ds).axes
    assert lines(own)["original"] == pytest.approx(preference([1, 2]))
    assert lines(frozen)["original"] == pytest.approx(preference([5, 6]))
    assert [own.get_title(), frozen.get_title()] == ["decoder: own", "decoder: frozen"]


def test_the_null_is_the_one_given_else_the_control_facts():
    both = made.lens([0, 1, 3, 4, 0.1])
    assert "null: control facts" in lines(layers.paper(made.lens([0, 1, 3, 5, 6]), both).axes[0])
    reference = exact([[0.5]], layer=[0])
    found = lines(layers.paper(exact([[1]], layer=[0]), exact([[1]], layer=[0]), reference, null_name="mine").axes[0])
    assert found["null: mine"] == pytest.approx([preference(0.5)])


def test_the_scale_of_the_channel_names_the_axis():
    ds = made.lens([0, 1, 3, 5, 6])
    ds.attrs["scale"] = "probability"
    figure = layers.paper(ds, ds)
    assert figure.axes[0].get_ylabel() == "probability above\na wrong answer"
    found = np.exp(ds["score"])
    gap = (found.isel(candidate=0) - found.isel(candidate=slice(1, None)).mean("candidate")).isel(fact=slice(0, 12))
    assert lines(figure.axes[0])["original"] == pytest.approx(gap.mean("fact").values[:5])


def test_the_label_tells_the_figure_in_words():
    label = layers.paper(exact([[1, 4, 2]], layer=[0, 1, 2]), exact([[1, 0, 0]], layer=[0, 1, 2])).get_label()
    assert "original: highest 0.96 at layer 1, last layer 0.76." in label


@pytest.mark.parametrize("width", ["neurips", "icml", "report"])
@pytest.mark.parametrize("n", [1, 400])
def test_nothing_is_clipped_with_one_fact_or_many(width, n):
    figure = layers.paper(made.lens([0, 1, 3, 5, 6], n=n), made.lens([0, 1, 3, 4, 0.1], n=n, seed=1), width=width)
    assert clipped.outside(figure) == []


def test_unknown_values_draw_nothing_and_break_nothing():
    ds = made.lens([0, 1, 3, 5, 6])
    empty = ds.assign(score=ds["score"] * np.nan)
    figure = layers.paper(ds, empty)
    assert np.isnan(lines(figure.axes[0])["unlearned"]).all()
    assert "unlearned: not known." in figure.get_label()
    assert style.drawn_as(figure, "svg")


def test_bad_input_is_named():
    with pytest.raises(InputError, match="no coordinate 'layer'"):
        layers.paper(exact([[1]], step=[0]), exact([[1]], step=[0]))
    with pytest.raises(InputError, match="no fact of the split 'forget'"):
        layers.paper(exact([[1]], "retain", layer=[0]), exact([[1]], "retain", layer=[0]))
    with pytest.raises(InputError, match="no 'erased'"):
        layers.erasure_map(exact([[1]], layer=[0]))


def test_the_map_shows_the_least_erased_on_top_and_the_unknown_last():
    share = [[0.9, 1.0], [np.nan, np.nan], [0.1, 0.2], [0.4, np.nan]]
    coords = {
        "layer": ("place", [0, 1]),
        "split": ("fact", ["forget"] * 4),
        "subject": ("fact", ["Ann", "Bob", "Cy", "Di"]),
    }
    ds = xr.Dataset({"erased": (("fact", "place"), share)}, coords={"fact": list("abcd"), **coords})
    figure = layers.erasure_map(ds)
    axes = figure.axes[0]
    assert [t.get_text() for t in axes.get_yticklabels()] == ["Cy", "Di", "Ann", "Bob"]
    np.testing.assert_array_equal(axes.images[0].get_array().filled(np.nan), np.array(share)[[2, 3, 0, 1]])
    assert axes.images[0].get_clim() == (0, 1)
    assert "Mean 0.50" in figure.get_label()


@pytest.mark.parametrize("width", ["neurips", "icml"])
@pytest.mark.parametrize("n", [1, 2, 60, 61, 400])
@pytest.mark.parametrize("long", [False, True])
def test_the_map_holds_any_number_of_facts(width, n, long):
    name = "Person {} " + "of a very long and winding name" * long
    figure = layers.erasure_map(made.erased(n, layers=40, subject=name), width=width)
    assert clipped.outside(figure) == []
    names = figure.axes[0].get_yticklabels()
    assert len(names) == (n if n <= 60 else 0)
    assert clipped.overlapping(names, figure) == []
    assert clipped.overlapping(figure.axes[0].get_xticklabels(), figure) == []


def test_facts_of_one_subject_are_told_apart_on_the_map():
    ds = made.erased(4, subject="Ann").assign_coords(relation=("fact", ["born in", "", "works as", "owns"]))
    names = [t.get_text() for t in layers.erasure_map(ds).axes[0].get_yticklabels()]
    assert sorted(names) == ["Ann, born in", "Ann, f1", "Ann, owns", "Ann, works as"]
