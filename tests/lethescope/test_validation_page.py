import doctest
import re
import runpy
from pathlib import Path
from types import SimpleNamespace

import pytest

from lethescope import validation_page
from lethescope.figures.validation import compared

folder = Path(__file__).parents[1] / "figures"
made = SimpleNamespace(**runpy.run_path(str(folder / "made_validation.py")))

COMMAND = "lethescope validate --zoo ZOO --out DIR"
FIGURES = {name: f"figures/validation/{name}.png" for name in ("separation", "verdicts", "residues")}
ABOUT = {"schema": 1, "version": "0.1.0", "zoo": "quick", "worlds": [1, 2], "budget": "quick"}
ODD = "p_true | <b>$x$</b> `y` * [z](w)"


def rendered(summary, **changes):
    return validation_page.render(summary, **{"command": COMMAND, "figures": FIGURES, **changes})


@pytest.fixture(scope="module")
def summary():
    return made.summary(*made.tables(missing=("lens",))) | ABOUT


@pytest.fixture(scope="module")
def page(summary):
    return rendered(summary)


def tables(page):
    """Every table as rows of cells, read as a Markdown reader would: escaped bars do not end a cell."""
    blocks = re.findall(r"(?:^\|.*\|\n)+", page, flags=re.MULTILINE)
    return [[[shown(cell) for cell in cells_of(line)] for line in block.splitlines()] for block in blocks]


def cells_of(line):
    return re.split(r"(?<!\\) \| ", line.removeprefix("| ").removesuffix(" |"))


def shown(cell):
    return re.sub(r"\\([^a-zA-Z0-9\s])", r"\1", cell)


def section(page, heading):
    return next(part for part in re.split(r"^## ", page, flags=re.MULTILINE) if part.startswith(heading))


def test_examples():
    assert doctest.testmod(validation_page).failed == 0


def test_it_says_what_was_asked_of_how_many_models(page):
    asked = section(page, "What was asked")
    assert "20 models, the zoo *quick*, audited by lethescope 0.1.0 at the budget *quick*." in " ".join(asked.split())
    assert "They come from 2 worlds" in asked
    for line in ("- 4 taught:", "- 5 suppressors:", "- 3 deleters:", "- 4 never taught:", "- 4 methods:"):
        assert line in asked
    assert "8 more models are rounded or retrained copies" in asked


def test_every_table_has_as_many_cells_in_every_row(page):
    found = tables(page)
    assert len(found) == 12  # verdicts, errors: 2 each; worlds; separation: 4; calibration, robustness, costs
    for table in found:
        assert len({len(row) for row in table}) == 1
        assert len(table) > 2


def test_verdicts_are_counted_with_the_share_right(page):
    with_reference, _, _ = tables(section(page, "Verdicts"))
    rows = {row[0]: row[1:] for row in with_reference}
    assert rows["suppressors"] == ["0", "3", "1", "1", "0", "0", "3 of 5", "0.60 [0.15, 0.95]"]
    assert rows["methods"][-2:] == ["–", "–"]
    assert rows["all of known truth"] == ["4", "3", "2", "6", "0", "1", "12 of 16", "0.75 [0.48, 0.93]"]


def test_the_share_right_is_told_world_by_world(page):
    _, _, (head, _, *rows) = tables(section(page, "Verdicts"))
    assert head == ["world", "with a reference", "share right", "without", "share right"]
    assert [row[0] for row in rows] == ["1", "2", "all"]
    counts = [[int(n) for n in row[1].split(" of ")] for row in rows]
    assert counts[0][0] + counts[1][0] == counts[2][0] == 12 and counts[2][1] == 16


@pytest.mark.parametrize(
    ("world", "held_out"), [("llama-1", [False, True, True]), ("llama-3", [True, False, True]), ("llama-8", [True] * 3)]
)
def test_it_says_from_which_rules_its_worlds_are_held_out(summary, world, held_out):
    limits = section(rendered({**summary, "worlds": [world]}), "What this page does not prove")
    told = [line for line in limits.splitlines() if ": made on llama-" in line]
    assert ["is held out from it." in line for line in told] == held_out
    assert ["is *not held out* from it." in line for line in told] == [not held for held in held_out]


def test_the_two_errors_are_told_with_their_intervals(page):
    with_reference, _ = tables(section(page, "The two errors"))
    assert with_reference[2:] == [
        ["false all-clear", "1 of 5", "0.20 [0.01, 0.72]"],
        ["false alarm", "1 of 7", "0.14 [0.00, 0.58]"],
    ]


def test_separation_has_a_table_for_each_question_and_kind_of_audit(page, summary):
    found = tables(section(page, "Separation"))
    kinds = [("a", True), ("a", False), ("b", True), ("b", False)]
    for table, (question, reference) in zip(found, kinds, strict=True):
        assert [row[0] for row in table[2:]] == [r["metric"] for r in compared(summary, question, reference)]
    rows = {row[0]: row[1:] for row in found[2]}
    assert rows["patch"][:2] == ["1.00 [0.57, 1.00]", "5 / 3"]
    assert rows["lens"][1] == "3 / 1"
    assert rows["1 - UDS"][2] == "–"
    assert re.fullmatch(r"−0\.\d\d \[−\d\.\d\d, −?\d\.\d\d\]", rows["say"][2])


def test_calibration_robustness_and_costs(page, summary):
    (calibration,) = tables(section(page, "Calibration"))
    assert calibration[0] == [
        "metric",
        "reference",
        "mean over pools",
        "taught",
        "suppressors",
        "deleters",
        "never taught",
    ]
    entry = next(r for r in summary["calibration"] if r["metric"] == "patch" and r["reference"])
    assert ["patch", "yes", f"{entry['error']:.2f}"] in [row[:3] for row in calibration]
    (robustness,) = tables(section(page, "Robustness"))
    entry = next(r for r in summary["robustness"] if r["metric"] == "ROUGE-L")
    (row,) = [row for row in robustness if row[0] == "ROUGE-L"]
    assert row[1:] == ["2", *(f"{entry[key]:.2f}" for key in ("Q", "R", "Q one-sided", "R one-sided"))]
    (cost,) = tables(section(page, "Costs"))
    assert ["say", "1.50", "40", "0"] in cost


def test_limits_command_and_figures_are_there(page):
    limits = section(page, "What this page does not prove")
    assert "small" in limits and "arbitrary" in limits and "few" in limits
    assert f"```\n{COMMAND}\n```" in page
    for name, path in FIGURES.items():
        assert f"![{validation_page.CAPTIONS[name]}]({path})" in page


def test_the_page_is_plain_markdown(page):
    assert "**" not in page
    assert re.search(r"\b(nan|None)\b", page) is None
    assert "\n\n\n" not in page
    assert [line for line in page.splitlines() if line != line.rstrip()] == []


@pytest.mark.parametrize("place", ["channels", "outputs"])
def test_an_odd_name_stays_in_its_cell(place):
    page = rendered(made.summary(*made.tables(**{place: (ODD, "say")})))
    for table in tables(page):
        assert len({len(row) for row in table}) == 1
    rows = [row for table in tables(section(page, "Separation")) for row in table]
    assert ODD in [row[0] for row in rows]
    assert re.search(r"(?<!\\)<b>", page) is None
    assert re.search(r"(?<!\\)\$", page) is None


def test_one_world_and_no_reference():
    page = rendered(made.summary(*made.tables(worlds=1, references=(False,))) | {**ABOUT, "worlds": [1]})
    assert "They come from 1 world;" in page
    assert "Without a reference" in page and "With a reference" not in page
    assert "20 models" in page
    assert len(tables(page)) == 1 + 1 + 1 + 2 + 1 + 1
    assert "| say | – | – | – |" in section(page, "Costs")


def test_a_summary_with_nothing_in_it_is_still_a_page():
    page = rendered({"models": {}}, figures={})
    assert "0 models." in page
    assert "![" not in page
    assert tables(page) == []


@pytest.mark.parametrize("missing", [None, float("nan")])
def test_what_could_not_be_measured_is_a_dash(summary, missing):
    nothing = dict.fromkeys(("estimate", "low", "high"), missing)
    bare = {
        **summary,
        "right": [{**r, **nothing} for r in summary["right"]],
        "errors": [{**r, **nothing} for r in summary["errors"]],
        "calibration": [{**r, "error": missing} for r in summary["calibration"]],
        "robustness": [{**r, "Q": missing} for r in summary["robustness"]],
        "separation": [{**r, "over_uds": nothing} for r in summary["separation"]],
    }
    page = rendered(bare)
    assert "nan" not in page and "None" not in page
    assert ["false all-clear", "1 of 5", "–"] in tables(section(page, "The two errors"))[0]
    assert {row[3] for row in tables(section(page, "Separation"))[0][2:]} == {"–"}


def test_a_command_with_backticks_does_not_end_its_block():
    page = rendered({"models": {}}, command="echo ```x```")
    assert "````\necho ```x```\n````" in page


def test_a_path_with_a_space_is_a_link():
    assert "(my%20figures/s.png)" in rendered({"models": {}}, figures={"separation": "my figures/s.png"})
