import doctest
import runpy
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import xarray as xr

from lethescope.errors import InputError
from lethescope.figures import horizon, style

clipped = SimpleNamespace(**runpy.run_path(str(Path(__file__).with_name("clipped.py"))))
ticks = SimpleNamespace(**runpy.run_path(str(Path(__file__).with_name("ticks.py"))))


def made(group, *, facts=6, null=0.0, score="prob", layers=None):
    """Forget facts with this group information at each layer, control facts with `null`; two units share the group's.

    The first unit has a quarter of it, with the other sign, the second the rest; the third is not there.
    """
    group = np.asarray(group, dtype=float)
    level = np.concatenate([np.tile(group, (facts, 1)), np.full((facts, len(group)), null)])
    level += np.tile(np.linspace(-0.01, 0.01, facts), 2)[:, None] * (level != 0)
    units = np.stack([-0.25 * level, 0.75 * level, np.full_like(level, np.nan)], -1)
    coords = {
        "fact": [f"f{i}" for i in range(2 * facts)],
        "split": ("fact", ["forget"] * facts + ["control"] * facts),
        "subject": ("fact", [f"Person {i}" for i in range(2 * facts)]),
        "layer": range(len(group)) if layers is None else layers,
    }
    data = {"information": (("fact", "layer", "unit"), units), "group": (("fact", "layer"), level)}
    return xr.Dataset(data, coords, {"score": score})


def lines(axes):
    return {x.get_label(): (x.get_xdata(), x.get_ydata()) for x in axes.lines if not x.get_label().startswith("_")}


def marks(axes):
    """Where short lines stand at the top: (layer, colour)."""
    tops = [x for x in axes.lines if list(x.get_xdata()) == [x.get_xdata()[0]] * 2 and min(x.get_ydata()) > 0.5]
    return [(x.get_xdata()[0], x.get_color()) for x in tops]


def test_examples():
    assert doctest.testmod(horizon).failed == 0


def test_lines_are_means_of_the_group_and_of_the_strongest_token_with_its_sign():
    figure = horizon.paper({"original": made([0.8, 0.4, 0.0], layers=[0, 4, 8])})
    group, token = figure.axes
    assert lines(group)["original"][0].tolist() == [0, 4, 8]
    assert lines(group)["original"][1] == pytest.approx([0.8, 0.4, 0])
    assert lines(token)["original"][1] == pytest.approx([0.6, 0.3, 0])
    assert "original: 0.80 after layer 0, 0.00 after layer 8, median horizon layer 8." in figure.get_label()


def test_one_line_a_model_and_the_unlearned_models_control_facts():
    before, after = made([0.8, 0.4, 0.0], null=0.1), made([-0.2, 0.0, 0.0], null=0.05)
    group = horizon.paper({"original": before, "unlearned": after, "reference": before}).axes[0]
    assert set(lines(group)) == {"original", "unlearned", "reference", "null: control facts"}
    assert lines(group)["unlearned"][1] == pytest.approx([-0.2, 0, 0])
    assert lines(group)["null: control facts"][1] == pytest.approx([0.05] * 3)
    assert "null: control facts" not in lines(horizon.paper({"original": before}, null_split="").axes[0])


def test_horizons_are_marked_where_there_is_something_to_find_and_not_in_noise():
    noise = made([0.5, 0.0, 0.0])
    noise["group"][:] = np.where(np.arange(12)[:, None] % 2, 0.3, -0.3) * np.array([1, 1, 0.001])
    figure = horizon.paper({"original": made([0.8, 0.4, 0.0]), "unlearned": made([-0.2, 0, 0]), "reference": noise})
    looks = {role: style.role_look(role).color for role in ("original", "unlearned")}
    assert marks(figure.axes[0]) == [(2, looks["original"]), (1, looks["unlearned"])]
    assert [t.get_text() for t in figure.axes[0].texts] == ["median horizon"]
    never = horizon.paper({"original": made([0.8, 0.4, 0.8])})
    assert not marks(never.axes[0]) and not never.axes[0].texts
    assert "horizon not known" in never.get_label()


def test_the_axis_names_the_score():
    assert horizon.paper({"a": made([1, 0])}).axes[0].get_ylabel() == "lost probability\nof the answer"
    nats = horizon.paper({"a": made([1, 0], score="logprob")}).axes[0].get_ylabel()
    assert nats == "lost log-probability (nats)\nof the answer"


@pytest.mark.parametrize("width", ["neurips", "icml"])
@pytest.mark.parametrize("group", [[1.0], [0.9, 0.01], [0.5] * 30 + [0.001] * 2, [-30.0, -20.0, 0.0]])
def test_nothing_is_clipped_or_overlaps(width, group):
    roles = ("original", "unlearned", "reference-0", "reference-1")
    figure = horizon.paper({role: made(group, score="logprob") for role in roles}, width=width)
    assert clipped.outside(figure) == []
    texts = [text for axes in figure.axes for text in (axes.title, axes.xaxis.label, *axes.texts)]
    texts += [*figure.legends[0].get_texts(), *ticks.shown(figure)]
    assert clipped.overlapping(texts, figure) == []


@pytest.mark.parametrize("kind", ["pdf", "png", "svg"])
def test_the_same_measurement_gives_the_same_bytes(kind):
    ds = made([0.8, 0.4, 0.0])
    assert style.drawn_as(horizon.paper({"a": ds}), kind) == style.drawn_as(horizon.paper({"a": ds}), kind)


def test_facts_whose_subject_is_not_named_are_left_out():
    ds = made([0.8, 0.4, 0.0])
    half = ds.assign({name: ds[name].where(ds["fact"] != "f0") for name in ("group", "information")})
    assert lines(horizon.paper({"original": half}).axes[0])["original"][1][-1] == 0
    nothing = ds.assign({name: ds[name] * np.nan for name in ("group", "information")})
    with pytest.raises(InputError, match="whose prompt names their subject"):
        horizon.paper({"original": nothing})


def test_bad_input_is_named():
    ds = made([0.8, 0.4, 0.0])
    with pytest.raises(InputError, match="split 'forget'"):
        horizon.paper({})
    with pytest.raises(InputError, match="split 'retain'"):
        horizon.paper({"original": ds}, split="retain")
    with pytest.raises(InputError, match="unlearned: this is no information horizon"):
        horizon.paper({"original": ds, "unlearned": ds.drop_vars("group")})
    with pytest.raises(InputError, match="different scores, logprob and prob"):
        horizon.paper({"original": ds, "unlearned": made([1, 0, 0], score="logprob")})
