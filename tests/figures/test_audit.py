import runpy
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from lethescope import figures

made = SimpleNamespace(**runpy.run_path(str(Path(__file__).with_name("made.py"))))


def patch(leads, null=None):
    """A patch measurement of four forget facts: true answers' leads over the layers, and the channel's own null."""
    leads = np.tile(np.asarray(leads, dtype=float), (4, 1))
    ds = made.scores(leads, ["forget"] * 4, layer=range(leads.shape[1]))
    if null is not None:
        own = made.scores(np.tile(np.asarray(null, dtype=float), (4, 1)), ["forget"] * 4, layer=range(leads.shape[1]))
        ds = ds.assign(null_score=own["score"])
    return ds.assign_attrs(probe="patch")


def measured(**more):
    lens, relearn = made.lens([0, 1, 3, 5, 6]), made.relearned(3)
    return {
        ("say", "original"): made.scores(np.ones((4, 1)), ["forget"] * 4),
        ("say", "unlearned"): made.scores(np.ones((4, 1)), ["forget"] * 4),
        ("lens", "original"): lens,
        ("lens", "unlearned"): lens,
        ("patch", "original"): patch([6, 6, 6], null=[6, 3, 0]),
        ("patch", "unlearned"): patch([6, 5, 1]),
        ("relearn", "original"): relearn,
        ("relearn", "unlearned"): relearn,
        **more,
    }


def test_every_channel_with_layers_or_steps_has_its_figure():
    assert set(figures.of_audit(made.verdict(), measured())) == {"residue", "lens", "patch", "erasure", "relearn"}


def lines(figure):
    return {x.get_label(): x.get_ydata() for x in figure.axes[0].lines if not x.get_label().startswith("_")}


def test_patch_is_held_against_its_own_null_or_a_reference():
    alone = figures.of_audit(made.verdict(), measured())["patch"]
    assert lines(alone)["null: control subjects"][-1] == pytest.approx(0, abs=0.1)
    with_reference = measured() | {("patch", "reference-0"): patch([6, 2, 2])}
    found = lines(figures.of_audit(made.verdict(), with_reference)["patch"])
    assert found["null: reference"][-1] > 0.5
    assert "null: control subjects" not in found


def test_the_map_is_the_share_of_what_the_null_destroys():
    share = figures.of_audit(made.verdict(), measured())["erasure"].axes[0].images[0].get_array()
    assert share[:, 0].mask.all() or np.all(share[:, 0] < 1.01)
    assert np.asarray(share[:, 1]) == pytest.approx(1 / 3, abs=0.15)
    assert np.asarray(share[:, 2]) == pytest.approx(5 / 6, abs=0.1)


def test_a_channel_that_saw_nothing_or_lacks_a_model_is_left_out():
    lens = made.lens([0, 1, 3, 5, 6])
    nothing = measured() | {("lens", "original"): lens.assign(score=lens["score"] * np.nan)}
    assert "lens" not in figures.of_audit(made.verdict(), nothing)
    assert set(figures.of_audit(made.verdict(), {("lens", "original"): lens})) == {"residue"}


def test_the_margin_of_the_verdict_is_drawn_even_where_it_does_not_tell_it():
    bare = {key: entry for key, entry in made.verdict().items() if key != "margin"}
    assert len(figures.of_audit(bare, {})["residue"].axes[0].patches) == 1
