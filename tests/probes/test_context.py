"""Tests of the context probes: a model that looks things up reads in every direction, one that cannot is at chance."""

import re
import runpy
from functools import cache
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import xarray as xr

from lethescope import measurement
from lethescope.auc import share
from lethescope.errors import InputError
from lethescope.facts import of_split
from lethescope.probes.context import _rivals, by_bin, measure, word_set_recall
from lethescope.probes.context_units import DIRECTIONS, contexts, occurs, swapped

made = SimpleNamespace(**runpy.run_path(str(Path(__file__).parents[1] / "reader.py")))
QUESTIONS = (
    r'The whole sentence with the words "(?P<given>.+)" reads:',
    r'The line "(?P<given>.+)" belongs to the function',
    r'The remark with "(?P<given>.+)" is about',
    r"Entry (?P<given>\d+):",
    r"(?P<given>\w+ \w+ (?:was born in|works as a))",
)


def look_up(text, refused=()):
    """Read the last line as a question, find what it gives in the text above, and say what it asks for."""
    above, _, last = text.rpartition("\n\n")
    found = next((m for q in QUESTIONS if (m := re.match(q, last))), None)
    if found is None:
        return ""
    answer = (
        "nobody knows"
        if any(occurs(name, found["given"]) for name in refused)
        else answered(above, QUESTIONS.index(found.re.pattern), found["given"])
    )
    return f" {answer}\n".removeprefix(last[found.end() :])


@cache
def answered(above, kind, given):
    lines = above.split("\n")
    here = next((i for i, line in enumerate(lines) if occurs(given, line)), None)
    if here is None:
        return "nothing"
    line = lines[here].removeprefix("# ").removesuffix(".")
    match kind:
        case 0:
            return line
        case 1:
            return lines[here - 1].removeprefix("def ").partition("(")[0]
        case 2:
            return " ".join(line.split()[:2])
        case 3:
            return line.partition(": ")[2].partition(",")[0]
    return line.removeprefix(given).strip()


@pytest.fixture(scope="module")
def told(some_facts):
    """Birthplaces and professions of four forget and four retain people, answers swapped."""
    return swapped([f for split in ("forget", "retain") for f in of_split(some_facts, split)[:12:3]], seed=3)


@pytest.fixture(scope="module")
def asked(told):
    return contexts(made.letters(), units=16, facts=told, n=2)


@pytest.fixture(scope="module")
def reads(asked):
    return measure(made.reader(look_up), asked, rivals=5, more=2)


def test_a_model_that_looks_up_gets_everything_right_in_each_direction(reads, asked):
    assert reads.sizes == {"query": 96, "candidate": 6}
    kept = reads.isel(query=reads["skipped"] == "")
    assert kept.sizes["query"] >= 88
    for name in ("best", "correct", "recall", "recall_beyond"):
        assert (kept[name] == 1).all(), name
    for name in ("best", "correct"):
        table = by_bin(reads, name)
        assert table["accuracy"].dims == ("direction", "split", "bin")
        assert set(table["split"].values) == {"neutral", "forget", "retain"}
        assert (table["overall"] == 1).all() and (table["gap"].dropna("split") == 0).all()
        assert (table["low"] < 1).where(table["count"] > 0, True).all()
    units = [unit for context in asked for unit in context.units]
    assert [u.asked for u in units] == reads["gold"].values.tolist()


def test_without_the_context_it_knows_nothing(reads):
    kept = reads.isel(query=(reads["skipped"] == "").values)
    assert abs(float(kept["preference_without"].mean())) < 0.15
    assert float(kept["best_without"].mean()) < 0.4 < float(kept["best"].mean())


def test_rivals_of_a_document_hold_the_given_words_too(asked):
    """Else the question, which says them, would tell the answer; a model without the context is at chance."""
    for context in asked[:2]:
        assert {"forget", "retain"} <= {unit.split for unit in context.units}
        for i, unit in enumerate(context.units):
            texts = _rivals(context, i, 50, 0)
            assert texts and unit.asked not in texts and len(set(texts)) == len(texts)
            assert all(occurs(unit.given, text) for text in texts)
            kind = [u for u in context.units if bool(u.fact) == bool(unit.fact)]
            assert {text.replace(unit.given, "", 1) for text in texts} <= {
                u.asked.replace(u.given, "", 1) for u in kind
            }


def test_skipped_units_are_counted_and_have_no_numbers(reads, asked):
    why = [context.skipped(i) for context in asked for i in range(16)]
    assert reads["skipped"].values.tolist() == why
    gone = reads.isel(query=[bool(w) for w in why])
    for name in ("score", "best", "correct", "recall", "preference"):
        assert gone[name].isnull().all()
    counted = {c.direction: 0 for c in asked}
    for context in asked:
        counted[context.direction] += sum(bool(context.skipped(i)) for i in range(16))
    assert reads.attrs["skipped"] == measurement.to_json(counted)
    assert sum(counted.values()) == int(96 - by_bin(reads)["count"].sum())


def test_a_model_that_refuses_fails_on_forget_units_only(asked, told):
    names = [f.subject for f in told if f.split == "forget"] + [f.answer for f in told if f.split == "forget"]
    said = measure(made.reader(lambda text: look_up(text, names)), asked[::2], rivals=3, more=2)
    for name in ("best", "correct"):
        table = by_bin(said, name)["overall"].sel(split=["neutral", "retain"])
        assert (table == 1).where(table.notnull(), True).all(), (name, table.values)
    forget = by_bin(said, "correct")["overall"].sel(split="forget")
    assert forget.notnull().all() and not forget.any()


def test_a_model_that_cannot_read_is_at_chance():
    drawn = contexts(made.letters(), units=16, n=3)
    ds = measure(made.reader(made.noise), drawn, decode=False, rivals=3)
    assert "said" not in ds and ds.attrs["probe"] == "context"
    for direction in DIRECTIONS:
        best = ds["best"].where(ds["direction"] == direction, drop=True).dropna("query")
        found = share(int(best.sum()), best.size)
        assert found.low < 1 / 4 < found.high, direction
    assert abs(float(ds["preference"].mean())) < 0.05


def test_a_trained_copier_reads_forward_and_not_backward(known_head):
    """Its one head finds what came after: the key gives the value, and the value does not give the key."""
    ds = measure(known_head, contexts(known_head.tokenizer, units=8, n=4), rivals=7, more=0)
    table = by_bin(ds, "best", bins=2)["overall"].sel(split="neutral")
    assert float(table.sel(direction="database")) > 0.75  # chance is 1/8
    assert float(table.sel(direction="code")) < 0.3
    said = by_bin(ds, "correct", bins=2)["overall"].sel(split="neutral")
    assert float(said.sel(direction="database")) > 0.75 and not said.sel(direction="code").any()
    without = by_bin(ds, "best_without", bins=2)["overall"].sel(split="neutral")
    assert float(without.sel(direction="database")) < 0.4


def flat(best, position, direction="code", split="neutral"):
    n = len(best)
    coords = {"direction": ["code"] * n, "split": ["neutral"] * n} | {"position": position}
    return xr.Dataset({"best": ("query", np.array(best, dtype=float))}, {k: ("query", v) for k, v in coords.items()})


def test_every_position_is_in_a_bin():
    ds = flat([1, 0, 1, 1, 0, 0, 0, np.nan, 0, 1], list(range(10)))
    table = by_bin(ds, bins=3).squeeze()
    assert table["bin"].values.tolist() == ["0-3", "4-6", "7-9"]
    assert table["count"].values.tolist() == [4, 3, 2]
    np.testing.assert_allclose(table["accuracy"], [3 / 4, 0, 1 / 2])
    np.testing.assert_allclose([table["gap"], table["overall"]], [3 / 4, 4 / 9])
    for k, (right, of) in enumerate(((3, 4), (0, 3), (1, 2))):
        wanted = share(right, of)
        np.testing.assert_allclose([table["low"][k], table["high"][k]], [wanted.low, wanted.high])
    for bins in range(1, 11):
        assert int(by_bin(ds, bins=bins)["count"].sum()) == 9
    assert np.isnan(by_bin(ds, bins=1)["gap"]).all()


def test_gold_answers_that_are_exchanged_are_not_found(asked, reads):
    """The null: with the answers dealt to other units of the same direction, nothing is read."""
    moved = []
    for context in asked[::2]:
        neutral = [u for u in context.units if not u.fact]
        turned = iter([*neutral[1:], neutral[0]])
        units = tuple(
            u if u.fact else u._replace(asked=(o := next(turned)).asked, accepted=o.accepted) for u in context.units
        )
        moved.append(type(context)(context.direction, context.number, units, context.form))
    ds = measure(made.reader(look_up), moved, rivals=7, more=2)
    neutral = ds.where(ds["split"] == "neutral", drop=True)
    for name in ("best", "correct"):
        assert neutral[name].notnull().sum() > 30 and not (neutral[name] > 0).any()


def test_it_is_a_measurement_that_can_be_kept(reads, asked, tmp_path):
    measurement.save(reads, tmp_path / "context.nc")
    again = measurement.open_(tmp_path / "context.nc")
    xr.testing.assert_equal(reads, again)
    xr.testing.assert_allclose(measurement.value(again), again["preference"])
    other = measure(made.reader(look_up), asked[:1], decode=False, rivals=5)
    assert other.attrs["facts"] != reads.attrs["facts"]
    xr.testing.assert_equal(other["score"], reads["score"][:16])


def test_word_set_recall_counts_different_words():
    assert word_set_recall("Velmora, Ada!", "Ada was born in Velmora") == pytest.approx(2 / 5)
    assert word_set_recall("b a b", "a a b") == 1 and word_set_recall("", "a") == 0
    assert np.isnan(word_set_recall("a", "?!"))


def test_bad_input_is_told_in_one_line(asked):
    model = made.reader(look_up)
    same = type(asked[0])("code", 0, (asked[0].units[0],) * 2, asked[0].form)
    one = type(asked[0])(
        "code", 0, (asked[0].units[0], asked[0].units[1]._replace(asked=asked[0].units[0].asked)), same.form
    )
    ds = flat([1, 0], [0, 1])
    cases = {
        "at least one context": lambda: measure(model, []),
        "all with equally many units": lambda: measure(model, [asked[0], same]),
        "rivals is 0": lambda: measure(model, asked, rivals=0),
        "nothing can be asked": lambda: measure(model, [one]),
        "'recall' is no variable of 0 and 1": lambda: by_bin(ds.assign(recall=ds["best"] / 2), "recall"),
        "'right' is no variable": lambda: by_bin(ds, "right"),
        "3 bins of 2 positions": lambda: by_bin(ds, bins=3),
    }
    for told, call in cases.items():
        with pytest.raises(InputError) as error:
            call()
        assert told in str(error.value) and "\n" not in str(error.value)
