import doctest
import runpy
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import xarray as xr

from lethescope.errors import InputError
from lethescope.figures import style, weights

clipped = SimpleNamespace(**runpy.run_path(str(Path(__file__).with_name("clipped.py"))))
ticks = SimpleNamespace(**runpy.run_path(str(Path(__file__).with_name("ticks.py"))))

MAPS = ("self_attn.q_proj", "self_attn.o_proj", "mlp.gate_proj", "mlp.down_proj", "norms", "all")


def changed(blocks, *, tied=False, level=0.5):
    rows = ["embedding", *(f"block {i}" for i in range(blocks)), "final norm", *([] if tied else ["unembedding"])]
    table = np.full((len(rows), len(MAPS)), np.nan)
    table[:, -1] = level * np.linspace(0, 1, len(rows))
    table[1 : 1 + blocks] = table[1 : 1 + blocks, -1:]
    return xr.DataArray(table, {"row": rows, "kind": list(MAPS)}, ("row", "kind"))


def swapped(level, blocks, *, testify=(), original=False):
    """A measurement whose forget facts all have the value `level(place)` (1 - 1e-6 at most)."""
    places = {"embedding": "outer"}
    for i in range(blocks):
        places |= {f"attention {i}": "attention", f"mlp {i}": "mlp", f"block {i}": "block"}
    places |= {"final norm": "outer", "unembedding": "outer", f"from block {blocks - 1}": "upper"}
    if blocks > 1:
        places |= {f"blocks {blocks - 2}-{blocks - 1}": "upper"}
    value = np.array([level(place) for place in places])
    true = np.log(np.clip(value, 1e-6, None) + 0.001)
    score = np.tile(np.stack([true, np.full(len(true), np.log(0.001))]), (4, 1, 1))
    data = {"score": (("fact", "candidate", "place"), score), "kept": ("place", np.ones(len(places)))}
    if original:
        barred = np.array([place not in testify for place in places])
        data["null_score"] = (("fact", "candidate", "place"), np.where(barred, score, -9.0))
    coords = {
        "fact": [f"f{i}" for i in range(4)],
        "split": ("fact", ["forget"] * 3 + ["control"]),
        "place": list(places),
        "kind": ("place", list(places.values())),
    }
    return xr.Dataset(data, coords, {"scale": "probability"})


def three(blocks=4):
    last = f"block {blocks - 1}"
    return {
        "original": swapped(lambda _p: 0.9, blocks, testify=(last, "unembedding", f"from {last}"), original=True),
        "unlearned": swapped(lambda p: 0.8 if p.endswith(last) else 0.1, blocks),
        "reference-0": swapped(lambda p: 0.7 if p == "block 0" else 0.0, blocks),
        "reference-1": swapped(lambda p: 0.2 if p == last else 0.0, blocks),
    }


def drawn(axes, label):
    return [line for line in axes.lines if line.get_label() == label]


def test_examples():
    assert doctest.testmod(weights).failed == 0


def test_the_map_is_the_change_and_alone_where_nothing_was_swapped():
    change = changed(3)
    figure = weights.paper(change)
    axes = figure.axes[0]
    np.testing.assert_array_equal(axes.images[0].get_array().filled(np.nan), change.values)
    assert [t.get_text() for t in axes.get_xticklabels()] == ["q", "o", "gate", "down", "norms", "all"]
    assert [t.get_text() for t in axes.get_yticklabels()] == list(change["row"].values)
    assert len(figure.axes) == 2  # and the colours
    assert figure.get_label() == "Relative change of the weights: largest in unembedding, 0.5."


def test_marks_stand_in_their_rows_at_what_comes_back():
    figure = weights.paper(changed(4), three())
    axes = figure.axes[1]
    # at the top and opaque: the places that may testify
    [sure] = drawn(axes, "row put back")
    np.testing.assert_allclose(sure.get_xdata(), [0.8, 0.1], atol=1e-3)
    assert sure.get_ydata().tolist() == [4, 6] and sure.get_alpha() == pytest.approx(1)
    pale = next(x for x in axes.lines if x.get_marker() == "s" and x is not sure)
    assert pale.get_ydata().tolist() == [0, 1, 2, 3, 5] and pale.get_alpha() < 0.5
    [null] = drawn(axes, "null: reference")  # the highest of both
    assert dict(zip(null.get_ydata(), null.get_xdata().round(3), strict=True)) == {
        0: 0,
        1: 0.7,
        2: 0,
        3: 0,
        4: 0.2,
        5: 0,
        6: 0,
    }
    sets = [line for line in axes.lines if line.get_marker() == "_"]
    assert [(list(s.get_ydata()), round(s.get_xdata()[0], 2)) for s in sets] == [([4, 6], 0.8), ([3, 4], 0.1)]
    assert [round(line.get_alpha(), 2) for line in sets] == [1, 0.35]
    assert drawn(axes, "original")[0].get_xdata()[0] == pytest.approx(0.9, abs=1e-3)
    assert "most comes back at block 3, 0.80 (reference 0.20); the original has 0.90." in figure.get_label()


def test_a_tied_unembedding_is_a_place_without_a_change():
    figure = weights.paper(changed(4, tied=True), three())
    assert [t.get_text() for t in figure.axes[0].get_yticklabels()][-2:] == ["final norm", "unembedding"]
    assert np.ma.getmaskarray(figure.axes[0].images[0].get_array())[-1].all()


@pytest.mark.parametrize("width", ["neurips", "icml"])
@pytest.mark.parametrize("blocks", [1, 17, 80])
def test_nothing_is_clipped_or_overlaps(width, blocks):
    figure = weights.paper(changed(blocks), three(blocks), width=width)
    assert clipped.outside(figure) == []
    texts = [text for axes in figure.axes for text in (axes.title, axes.xaxis.label, axes.yaxis.label)]
    texts += [*figure.legends[0].get_texts(), *ticks.shown(figure)]
    assert clipped.overlapping(texts, figure) == []


@pytest.mark.parametrize("kind", ["pdf", "png", "svg"])
def test_the_same_numbers_give_the_same_bytes(kind):
    one, two = (style.drawn_as(weights.paper(changed(2), three(2)), kind) for _ in range(2))
    assert one == two


def test_models_that_did_not_move_and_places_without_a_score():
    assert "largest in embedding, 0." in weights.paper(changed(2, level=0.0)).get_label()
    assert weights.paper(changed(2) * np.nan).get_label() == "Relative change of the weights: not known."
    tables = three()
    tables["unlearned"] = tables["unlearned"].assign(score=tables["unlearned"]["score"] * np.nan)
    assert "comes back" not in weights.paper(changed(4), tables).get_label()


def test_bad_input_is_named():
    with pytest.raises(InputError, match=r"a map needs \(row, kind\)"):
        weights.paper(changed(2).rename(kind="layer"))
    with pytest.raises(InputError, match="no measurement of unlearned; there are original"):
        weights.paper(changed(4), {"original": three()["original"]})
    with pytest.raises(InputError, match="reference-0: this is no measurement of channel swap"):
        weights.paper(changed(4), three() | {"reference-0": three()["reference-0"].drop_vars("kept")})
    with pytest.raises(InputError, match="place 'attention 3' is not among the rows"):
        weights.paper(changed(3), three())
