import runpy
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from lethescope.figures import residue, style

made = SimpleNamespace(**runpy.run_path(str(Path(__file__).with_name("made.py"))))
clipped = SimpleNamespace(**runpy.run_path(str(Path(__file__).with_name("clipped.py"))))


def texts(figure):
    return [t.get_text() for t in figure.axes[0].texts]


@pytest.mark.parametrize("width", ["neurips", "icml", "report"])
@pytest.mark.parametrize("word", ["known", "suppressed", "no_residue_found"])
def test_nothing_is_clipped(width, word):
    figure = residue.paper(made.verdict(word), width=width)
    assert clipped.outside(figure) == []
    axes = figure.axes[0]
    assert clipped.overlapping(axes.get_xticklabels(), figure) == []
    assert clipped.overlapping([*axes.texts, *axes.get_yticklabels()], figure) == []


def test_the_check_for_clipping_sees_a_clipped_text():
    figure = residue.paper(made.verdict())
    figure.text(0.98, 0.5, "a text that leaves the figure")
    assert "a text that leaves the figure" in clipped.outside(figure)


def test_every_channel_is_told_as_it_is():
    figure = residue.paper(made.verdict())
    assert texts(figure) == [
        "0.01 [−0.05, 0.07], blind here",
        "not testable",
        "0.67 [0.61, 0.73]",
        "0.84 [0.78, 0.90], decides",
        "0.59 [0.53, 0.65]",
        "0.05 [−0.01, 0.11], blind here",
    ]
    assert "patch 0.84 [0.78, 0.90] (decides)" in figure.get_label()
    assert "readout not known (not testable)" in figure.get_label()


def drawn_at(figure, marker):
    return [line.get_xdata().item() for line in figure.axes[0].lines if line.get_marker() == marker]


def bars_of(figure):
    return [line for line in figure.axes[0].lines if line.get_linewidth() > 1.9]


def test_estimates_intervals_and_planted_controls_lie_where_they_are():
    verdict = made.verdict()
    figure = residue.paper(verdict)
    known = [c for c in verdict["channels"] if c["testable"]]
    assert drawn_at(figure, "o") == pytest.approx([c["residue"]["estimate"] for c in known])
    assert drawn_at(figure, "D") == pytest.approx([x for c in known for x in c["planted"].values()])
    bars = [line.get_xdata() for line in bars_of(figure)]
    assert np.array(bars) == pytest.approx(np.array([(c["residue"]["low"], c["residue"]["high"]) for c in known]))


def test_the_margin_is_shaded_where_there_is_one():
    shaded = residue.paper(made.verdict()).axes[0].patches
    assert shaded[0].get_x() + shaded[0].get_width() == pytest.approx(0.2)
    assert not residue.paper({**made.verdict(), "margin": None}).axes[0].patches
    assert len(residue.paper({"channels": []}, margin=0.1).axes[0].patches) == 1


def test_a_blind_channel_is_faint_only_where_it_found_nothing():
    found = made.channel("lens", 0.7, p=0.01, seconds=1, blind=True)
    nothing = made.channel("say", 0.02, p=0.4, seconds=1, blind=True)
    figure = residue.paper({"channels": [found, nothing], "decided_by": "lens"})
    assert [bar.get_color() for bar in bars_of(figure)] == [style.channel_colour("lens"), style.DIM]


def test_what_lies_far_outside_becomes_an_arrow():
    far = made.channel("relearn", 0.5, p=0.01, seconds=1, residue={"estimate": 0.5, "low": -40.0, "high": 60.0})
    figure = residue.paper({"channels": [far]})
    assert figure.axes[0].get_xlim() == (-0.5, 1.5)
    assert {"<", ">"} <= {line.get_marker() for line in figure.axes[0].lines}
    assert clipped.outside(figure) == []


@pytest.mark.parametrize("missing", [None, float("nan")])
def test_missing_numbers_draw_nothing(missing):
    entry = dict.fromkeys(("estimate", "low", "high"), missing)
    bare = {"name": "say", "residue": entry, "planted": {"unembedding": missing}, "planted_low": {}}
    figure = residue.paper({"channels": [bare]})
    assert not drawn_at(figure, "o")
    assert np.isfinite(figure.axes[0].get_xlim()).all()
    assert style.drawn_as(figure, "pdf")


@pytest.mark.parametrize("n", [0, 1, 40])
@pytest.mark.parametrize("width", ["icml", "neurips"])
def test_any_number_of_channels_and_names_of_any_length(n, width):
    name = "a channel with an $unusual$ and very long name that goes on & on"
    channels = [made.channel(f"{i} {name}", 0.4, p=0.01, seconds=1, blind=i % 2 == 1) for i in range(n)]
    figure = residue.paper({"channels": channels, "decided_by": f"0 {name}", "margin": 0.2}, width=width)
    assert clipped.outside(figure) == []
    assert len(texts(figure)) == n
