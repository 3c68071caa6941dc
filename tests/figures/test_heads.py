import doctest
import runpy
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import xarray as xr

from lethescope.analyses.heads import correlation
from lethescope.errors import InputError
from lethescope.figures import heads, style

clipped = SimpleNamespace(**runpy.run_path(str(Path(__file__).with_name("clipped.py"))))
ticks = SimpleNamespace(**runpy.run_path(str(Path(__file__).with_name("ticks.py"))))


def table(values):
    return xr.DataArray(values, dims=("layer", "head"))


def made(layers, width, seed=0):
    """Scores as models have them: a twentieth of the heads is high, the others are near 0."""
    rng = np.random.default_rng(seed)
    low, high = rng.exponential(0.01, (layers, width)), rng.beta(2, 2, (layers, width))
    return table(np.where(rng.random((layers, width)) < 0.05, high, low))


def ablated(log_prob, draws=4, k=2):
    """An ablation whose arms have these mean log-probabilities, the exact match their opposite plus 1."""
    mean = np.asarray(log_prob, dtype=float)
    each = mean[:, None] + np.array([-0.1, 0.0, 0.1])
    bounds = [[0.5, 0.2, 0.9], [-0.25, -0.5, 0.0]]
    arms = ["none", "top", *(f"control {i}" for i in range(draws))]
    coords = {"arm": arms, "quantity": ["log_prob", "exact_match"], "bound": ["estimate", "low", "high"]}
    data = {
        "log_prob": (("arm", "instance"), each),
        "exact_match": (("arm", "instance"), 1 - each),
        "effect": (("quantity", "bound"), bounds),
    }
    return xr.Dataset(data, coords, {"k": k})


def points(axes, marker):
    return [line for line in axes.lines if line.get_marker() == marker]


def test_examples():
    assert doctest.testmod(heads).failed == 0


def test_a_cell_is_a_heads_score_layers_go_right_and_heads_up():
    scores = made(5, 3)
    scores[2, 1], scores[0, 2] = np.nan, 0.7
    axes = heads.paper({"original": scores.transpose("head", "layer")}).axes[0]
    (image,) = axes.images
    np.testing.assert_array_equal(image.get_array().filled(np.nan), scores.values.T)
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("layer", "head")
    assert axes.get_ylim()[0] < axes.get_ylim()[1]
    assert image.get_clim() == (0, float(scores.max()))


def test_maps_share_their_colours_and_two_models_of_one_shape_get_a_scatter():
    a, b = 10 * made(4, 4), 5 * made(4, 4)
    first, second, scatter, bar = heads.paper({"original": a, "unlearned": b}).axes
    assert first.images[0].get_clim() == second.images[0].get_clim() == (0, float(a.max()))
    assert [axes.get_title() for axes in (first, second)] == ["original", "unlearned"]
    assert scatter.get_xlabel() == "retrieval score,\noriginal"
    assert bar.get_ylabel() == "retrieval score"
    assert len(heads.paper({"original": a, "unlearned": made(4, 8)}).axes) == 3
    assert len(heads.paper(dict.fromkeys(("original", "unlearned", "reference"), a)).axes) == 4


def test_the_scatter_has_every_head_once_and_names_the_correlation():
    a, b = made(6, 8, seed=1), made(6, 8, seed=2)
    (axes,) = heads.before_after(a, b).axes
    low, high = points(axes, "o")
    drawn = {(x, y) for line in (low, high) for x, y in zip(line.get_xdata(), line.get_ydata(), strict=True)}
    assert drawn == set(zip(a.values.ravel(), b.values.ravel(), strict=True))
    assert np.maximum(low.get_xdata(), low.get_ydata()).max() < 0.1
    assert np.maximum(high.get_xdata(), high.get_ydata()).min() >= 0.1
    assert axes.get_xlim() == axes.get_ylim()
    assert axes.get_title().split("\n")[0] == f"Pearson {correlation(a, b)['pearson']:.2f}".replace("-", "−")


def test_an_ablation_shows_losses_and_the_interval_around_the_controls():
    figure = heads.ablation(ablated([-1, -3, -1.5, -1.25, -1.25, -1]))
    axes = figure.axes[0]
    (top,), (controls,) = points(axes, "s"), points(axes, "v")
    assert top.get_xdata() == pytest.approx([2])
    assert sorted(controls.get_xdata()) == pytest.approx([0, 0.25, 0.25, 0.5])
    (bar,) = [line for line in axes.lines if len(set(line.get_ydata())) == 1 and len(line.get_xdata()) == 2]
    assert bar.get_xdata() == pytest.approx([0.25 + 0.2, 0.25 + 0.9])
    assert axes.get_title() == "effect 0.50\n[0.20, 0.90]"
    assert points(figure.axes[1], "s")[0].get_xdata() == pytest.approx([-2])
    assert figure.axes[1].get_title() == "effect −0.25\n[−0.50, 0.00]"
    assert [t.get_text() for t in axes.get_yticklabels()] == ["top 2 heads", "other 2 heads,\ndrawn 4 times"]
    assert "log_prob: effect 0.50 [0.20, 0.90]." in figure.get_label()


@pytest.mark.parametrize("width", ["neurips", "icml"])
@pytest.mark.parametrize("shape", [(1, 1), (6, 4), (64, 128)])
def test_nothing_is_clipped_or_overlaps(width, shape):
    scores = made(*shape, seed=3)
    pair = {"original": scores, "unlearned": scores + 0.01}
    for figure in (heads.paper({"model": scores}, width=width), heads.paper(pair, width=width)):
        assert clipped.outside(figure) == []
        labels = [text for axes in figure.axes for text in (axes.title, axes.xaxis.label, axes.yaxis.label)]
        assert clipped.overlapping([*labels, *ticks.shown(figure)], figure) == []


@pytest.mark.parametrize("width", ["neurips", "icml", "report"])
def test_an_ablation_is_not_clipped(width):
    figure = heads.ablation(ablated([-1, -3, -1.5, -1.25, -1.25, -1], k=30), width=width)
    assert clipped.outside(figure) == []
    texts = [part for axes in figure.axes for part in (axes.title, axes.xaxis.label)]
    assert clipped.overlapping(texts, figure) == []


@pytest.mark.parametrize("kind", ["pdf", "png"])
def test_the_same_scores_give_the_same_bytes(kind):
    a, b = made(4, 4), made(4, 4, seed=1)
    for draw in (lambda: heads.paper({"original": a, "unlearned": b}), lambda: heads.ablation(ablated([0] * 6))):
        assert style.drawn_as(draw(), kind) == style.drawn_as(draw(), kind)


def test_scores_that_are_not_known_break_nothing():
    figure = heads.paper({"original": made(4, 4), "reference": table(np.full((2, 2), np.nan))})
    assert "reference: not known." in figure.get_label()
    assert style.drawn_as(figure, "png")
    alike = {"original": made(4, 4), "unlearned": table(np.full((4, 4), np.nan))}
    assert len(heads.paper(alike).axes) == 3  # no scatter of nothing
    assert heads.paper({"model": table(np.zeros((2, 2)))}).axes[0].images[0].get_clim() == (0, 0.1)


def test_bad_input_is_named():
    with pytest.raises(InputError, match=r"unlearned: scores are \(instance, head\); a map needs \(layer, head\)"):
        heads.paper({"original": made(2, 2), "unlearned": xr.DataArray([[0.0]], dims=("instance", "head"))})
    with pytest.raises(InputError, match="at least one table"):
        heads.paper({})
    with pytest.raises(InputError, match="2 x 2 and 3 x 2"):
        heads.before_after(made(2, 2), made(3, 2))
    with pytest.raises(InputError, match="no ablation"):
        heads.ablation(ablated([0] * 6).drop_vars("effect"))
