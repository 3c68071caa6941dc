import doctest
import runpy
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from lethescope.analyses.validation import RIGHT
from lethescope.errors import InputError
from lethescope.figures import style, validation
from lethescope.wording import VERDICTS

here = Path(__file__)
made = SimpleNamespace(**runpy.run_path(str(here.with_name("made_validation.py"))))
clipped = SimpleNamespace(**runpy.run_path(str(here.with_name("clipped.py"))))

ODD = "an $odd$ | <b>metric_name</b> that goes on & on & on"
CASES = {
    "small": {"channels": ("say", "lens", "patch"), "outputs": ("ROUGE-L",), "missing": ("lens",)},
    "large": {
        "pools": {"P": 12, "suppressor": 48, "deleter": 24, "N": 6, "method": 60},
        "outputs": (*made.OUTPUTS, *(f"MIA number {i}" for i in range(13))),
        "worlds": 6,
        "noise": 0.4,
    },
    "one model a pool": {"pools": dict.fromkeys(made.SMALL, 1), "worlds": 1},
    "odd names": {"channels": ("say", "lens", ODD), "outputs": (f"MIA {ODD}",)},
    "no reference": {"references": (False,)},
}


@pytest.fixture(scope="module")
def told():
    """Case -> (values, verdicts, summary)."""
    return {name: (*tables, made.summary(*tables)) for name, tables in _tables()}


def _tables():
    for name, options in CASES.items():
        yield name, made.tables(**options)


def drawn(told, case, **options):
    values, _, summary = told[case]
    options = {"reference": case != "no reference", **options}
    return {
        "separation": validation.separation(summary, **options),
        "verdicts": validation.verdicts(summary, **options),
        "residues": validation.residues(values, **options),
    }


def texts(axes):
    return [t.get_text() for t in axes.texts]


def ticks(axis):
    return [t.get_text() for t in axis.get_ticklabels()]


def test_examples():
    assert doctest.testmod(validation).failed == 0


@pytest.mark.parametrize(
    ("case", "width"), [*((case, width) for case in CASES for width in ("icml", "report")), ("large", "neurips")]
)
def test_nothing_is_clipped_or_overlaps(told, case, width):
    for name, figure in drawn(told, case, width=width).items():
        assert figure.get_figwidth() == style.WIDTHS[width]
        assert clipped.outside(figure) == []
        written = [*figure.axes[0].get_yticklabels(), *(t for axes in panels(figure, name) for t in axes.texts)]
        if (name, width) != ("verdicts", "icml"):  # names at a slant have boxes that overlap where the names do not
            written += [t for axes in panels(figure, name) for t in axes.get_xticklabels()]
        assert clipped.overlapping(written, figure) == []


def panels(figure, name="residues"):
    return [axes for axes in figure.axes if axes.images] if name == "residues" else figure.axes


@pytest.mark.parametrize("kind", ["pdf", "png", "svg"])
def test_the_same_tables_give_the_same_bytes(told, kind):
    for name, figure in drawn(told, "small").items():
        assert style.drawn_as(figure, kind) == style.drawn_as(drawn(told, "small")[name], kind)


def test_a_width_that_is_none_is_refused(told):
    values, _, summary = told["small"]
    for draw, data in ((validation.separation, summary), (validation.verdicts, summary), (validation.residues, values)):
        with pytest.raises(InputError, match="width"):
            draw(data, width="neurps")


def row(metric, estimate, low, high, *, question="b", n=(5, 4), **more):
    counts = dict(zip(("n_holding", "n_empty"), n, strict=True))
    told = {"metric": metric, "question": question, "reference": True, "estimate": estimate, "low": low, "high": high}
    return told | counts | more


def by_hand():
    gain = {"estimate": 0.05, "low": 0.01, "high": 0.1}
    rows = [
        row("ROUGE-L", 0.55, 0.3, 0.78, over_uds={"estimate": -0.3, "low": -0.6, "high": 0.0}),
        row("patch", 0.9, 0.6, 0.98, over_uds=gain, n=(4, 4)),
        row("1 - UDS", 0.85, 0.55, 0.97),
        row("verdict", 0.95, 0.7, 0.99, over_uds=None),
        row("lens", 0.4, 0.2, 0.6, question="a"),
    ]
    return {"separation": rows, "calibration": [{"metric": name} for name in ("patch", "lens", "1 - UDS", "verdict")]}


def points(figure):
    return {
        line.get_ydata()[0]: line
        for line in figure.axes[0].lines
        if line.get_marker() not in {"None", None, ""} and len(line.get_xdata()) == 1
    }


def test_separation_shows_auc_interval_and_difference_the_best_on_top():
    figure = validation.separation(by_hand())
    axes = figure.axes[0]
    assert ticks(axes.yaxis) == ["verdict", "patch", "1 - UDS", "ROUGE-L"]
    assert [points(figure)[i].get_xdata()[0] for i in range(4)] == [0.95, 0.9, 0.85, 0.55]
    bars = [line.get_xdata() for line in axes.lines if line.get_linestyle() == "-" and len(set(line.get_ydata())) == 1]
    assert [list(bar) for bar in bars if list(bar) != [0, 1]] == [[0.7, 0.99], [0.6, 0.98], [0.55, 0.97], [0.3, 0.78]]
    assert texts(axes)[:4] == ["", "+0.05 [0.01, 0.10]", "", "−0.30 [−0.60, 0.00]"]
    assert [0.5, 0.5] in [list(line.get_xdata()) for line in axes.lines]
    assert "4–5 suppressors against 4 deleters" in axes.get_xlabel()
    assert "patch 0.90 [0.60, 0.98]" in figure.get_label()


def test_channels_have_their_colour_and_outputs_none():
    drawn = points(validation.separation(by_hand()))
    verdict, patch, uds, rouge = (drawn[i] for i in range(4))
    assert patch.get_markerfacecolor() == style.channel_colour("patch")
    assert rouge.get_markerfacecolor() == "white"
    assert rouge.get_markeredgecolor() == style.FAINT
    assert len({verdict.get_marker(), uds.get_marker(), patch.get_marker()}) == 3


def test_a_narrow_separation_has_no_column_of_differences():
    assert texts(validation.separation(by_hand(), width="icml").axes[0]) == []


def test_a_question_that_has_no_metric_is_an_empty_figure():
    figure = validation.separation(by_hand(), question="a", reference=False)
    assert "no metric has a value in both groups" in figure.get_label()
    assert clipped.outside(figure) == []


def test_an_auc_below_chance_stays_inside():
    summary = {"separation": [row("say", 0.0, 0.0, 0.3)]}
    low, high = validation.separation(summary).axes[0].get_xlim()
    assert low < 0 and high > 1


def test_verdicts_are_counted_in_the_usual_order_and_the_right_cell_is_outlined(told):
    _, _, summary = told["small"]
    figure = validation.verdicts(summary)
    axes = figure.axes[0]
    assert ticks(axes.yaxis) == ["4 taught", "5 suppressors", "3 deleters", "4 never taught", "4 methods"]
    assert [t.replace("\n", " ") for t in ticks(axes.xaxis)] == [told.name for told in VERDICTS.values()]
    cells = {(t.get_position()[1], t.get_position()[0]): t.get_text() for t in axes.texts if t.get_text().isdigit()}
    words = list(VERDICTS)
    assert len(cells) == 30
    for entry in (r for r in summary["verdicts"] if r["reference"] and r["pool"] != "stressed"):
        pool = list(validation.POOLS).index(entry["pool"])
        assert cells[pool, words.index(entry["verdict"])] == str(entry["count"])
    assert sum(int(count) for count in cells.values()) == 20
    outlined = {(round(p.get_y() + 0.45), round(p.get_x() + 0.48)) for p in axes.patches}
    assert outlined == {(list(validation.POOLS).index(p), words.index(w)) for p, w in RIGHT.items()}
    assert "3 of 5 right" in texts(axes)
    np.testing.assert_allclose(axes.images[0].get_array().sum(axis=1), 1)


@pytest.mark.parametrize("width", ["icml", "report"])
def test_no_verdict_at_all_is_an_empty_matrix(width):
    figure = validation.verdicts({"verdicts": []}, width=width)
    assert clipped.outside(figure) == []
    assert "No model was audited" in figure.get_label()


def test_residues_are_drawn_by_pool_clipped_and_what_could_not_be_tested_hatched(told):
    values, _, _ = told["small"]
    values = values.assign(value=np.where(values["member"] == "P-0", 9.0, values["value"]))
    figure = validation.residues(values)
    assert [axes.images[0].get_array().shape for axes in panels(figure)] == [(5, n) for n in (4, 5, 3, 4, 4)]
    assert [texts(axes)[0].split("\n") for axes in panels(figure)] == [
        [name, str(n)] for name, n in zip(validation.POOLS.values(), (4, 5, 3, 4, 4), strict=True)
    ]
    assert ticks(panels(figure)[0].yaxis) == ["say", "lens", "patch", "1 - UDS", "verdict"]
    cells = np.ma.concatenate([axes.images[0].get_array() for axes in panels(figure)], axis=1)
    assert (cells.max(), cells.min() >= -0.2) == (pytest.approx(1.2), True)
    assert cells.mask.sum(axis=1).tolist() == [0, 9, 0, 0, 0]  # P-0 of world 2 lost its NaN to the 9 above
    assert all(axes.patch.get_hatch() for axes in panels(figure))
    assert [t.get_text() for t in figure.legends[0].get_texts()] == ["not testable"]


def test_a_cell_holds_its_models_residue_and_models_stand_by_the_verdicts(told):
    values, _, _ = told["small"]
    axes = panels(validation.residues(values))[1]
    mine = values[(values["pool"] == "suppressor") & values["reference"]]
    table = mine.pivot(index=["member", "world"], columns="metric", values="value").sort_values("verdict")[::-1]
    assert ticks(axes.xaxis) == [f"{member}, world {world}" for member, world in table.index]
    for place, metric in enumerate(("say", "lens", "patch", "1 - UDS", "verdict")):
        shown = axes.images[0].get_array()[place].filled(np.nan)
        np.testing.assert_allclose(shown, table[metric].clip(-0.2, 1.2))


def test_names_of_models_are_dropped_where_there_are_many(told):
    few = validation.residues(told["one model a pool"][0])
    assert [ticks(axes.xaxis) for axes in panels(few)] == [[f"{pool}-0"] for pool in validation.POOLS]
    many = validation.residues(told["large"][0])
    assert not any(ticks(axes.xaxis) for axes in panels(many))
    assert [texts(axes)[0].split("\n")[0] for axes in panels(many)] == list(validation.POOLS.values())


def test_a_channel_that_could_never_be_tested_is_still_shown(told):
    values, _, _ = told["small"]
    values = values.assign(value=values["value"].where(values["metric"] != "patch"))
    figure = validation.residues(values)
    assert "patch" in ticks(panels(figure)[0].yaxis)
    assert panels(figure)[0].images[0].get_array().mask[2].all()
    assert style.drawn_as(figure, "pdf")


def test_no_residue_at_all_is_an_empty_figure(told):
    values, _, _ = told["small"]
    figure = validation.residues(values[:0])
    assert "No model was audited" in figure.get_label()
    assert style.drawn_as(figure, "png")
