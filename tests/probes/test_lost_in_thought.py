"""Tests of lost in thought: items are paired, and models that lose keys, distance or nothing are told apart."""

import re
import runpy
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import xarray as xr

from lethescope import measurement
from lethescope.errors import InputError
from lethescope.facts import Fact
from lethescope.probes.context_units import occurs
from lethescope.probes.lost_in_thought import ARMS, Item, arithmetic_items, fact_items, gaps, measure, no_substrings

made = SimpleNamespace(**runpy.run_path(str(Path(__file__).parents[1] / "reader.py")))
KEY, VALUE, WORKING = "\n\nThe one that we look for is ", "\nIt is called", "\nWorking:"


def reads(text, *, reach=10_000, lost=False, works=lambda problem: str(eval(problem)), facts=None):
    """Find the key that was stated or worked out, within reach of the end, and its value in the dictionary."""
    if VALUE not in text and WORKING not in text:
        return ""
    if VALUE not in text:
        problem, _, said = text.rpartition(WORKING)
        answer = works(problem.rpartition(KEY)[2].removesuffix("."))
        return f" so {answer}\n".removeprefix(said)
    above, _, said = text.partition(VALUE)
    records, _, asked = above.partition(KEY)
    values = dict(line.removesuffix(".").split(" is called ") for line in records.split("\n"))
    named = [(m.end(), key) for key in values for m in re.finditer(rf"(?<!\w){re.escape(key)}(?!\w)", asked)]
    if facts and not named:
        named = [(len(asked), subject) for what, subject in facts.items() if what in asked]
    close = [key for end, key in named if len(asked) - end < reach]
    stated = bool(re.match(r"\d+\.", asked))
    answer = values[close[-1]] if close and not (lost and WORKING in asked and not stated) else "nothing"
    return f" {answer}\n".removeprefix(said)


ITEMS = arithmetic_items(10, pairs=6, terms=3)


def accuracy(ds, name="best"):
    return dict(zip(ARMS, ds[name].mean("item").values.tolist(), strict=True))


@pytest.mark.parametrize(("pairs", "terms"), [(2, 2), (16, 2), (40, 2), (12, 4), (40, 6)])
def test_sums_are_right_and_name_no_key_on_the_way(pairs, terms):
    items = arithmetic_items(12, pairs=pairs, terms=terms, seed=3)
    for item in items:
        keys = [key for key, _ in item.pairs]
        assert str(eval(item.problem)) == item.key and len(keys) == pairs == len(set(keys))
        assert all(abs(int(key) - int(item.key)) <= pairs for key in keys)
        on_the_way = re.findall(r"\d+", f"{item.problem}, {item.reasoning}")
        assert [number for number in on_the_way if number in keys] == [item.key]
        assert all(eval(step.replace("=", "==")) for step in item.reasoning.split(", "))
        assert len(re.findall(r"\d+", item.problem)) == terms
    depths = [item.place / (pairs - 1) for item in items]
    assert depths == sorted(depths) and depths[0] == 0 and depths[-1] == 1
    assert items == arithmetic_items(12, pairs=pairs, terms=terms, seed=3) != arithmetic_items(12, pairs=pairs, seed=4)


def test_arms_differ_in_how_the_key_comes_up_and_in_nothing_else():
    ds = measure(made.reader(reads), ITEMS)
    np.testing.assert_array_equal(ds["thought"], [len(item.reasoning) + 1 for item in ITEMS])
    assert ((ds["filler"] - ds["thought"] >= 0) & (ds["filler"] - ds["thought"] < 6)).all()  # a word more at most
    for item in ITEMS:
        stated, derived, none, filler = (item.prompt(arm, "…" if arm in ARMS[1::2] else "") for arm in ARMS)
        assert stated.replace(f"is {item.key}.", f"is {item.problem}.") == none
        assert filler.replace(f"{KEY}{item.key}.", f"{KEY}{item.problem}.") == derived
        assert derived.replace("\nWorking: …", "") == none
        assert all(prompt.endswith(VALUE) for prompt in (stated, derived, none, filler))
        assert sorted(item.answers) == sorted(value for _, value in item.pairs)
        assert item.answers[0] == dict(item.pairs)[item.key]


def test_a_model_that_reads_has_no_gap_and_needs_the_working():
    ds = measure(made.reader(reads), ITEMS)
    for name in ("best", "correct"):
        found = accuracy(ds, name)
        assert found["stated"] == found["derived"] == found["filler"] == 1 and found["no thinking"] < 0.5
        table = gaps(ds, name)
        assert not table["estimate"].sel(contrast=["lost in thought", "same items", "unconditioned", "distance"]).any()
        assert float(table["estimate"].sel(contrast="thinking")) == pytest.approx(1 - found["no thinking"])
    assert ds["found"].all() and gaps(ds).attrs["found_share"] == 1
    assert set(ds["working"].values) == {item.reasoning for item in ITEMS}


def test_a_model_that_is_lost_after_working_has_the_gap_and_no_distance():
    ds = measure(made.reader(lambda text: reads(text, lost=True)), ITEMS)
    table = gaps(ds, "correct")["estimate"]
    np.testing.assert_array_equal(table.sel(contrast=["lost in thought", "beyond distance"]), 1)
    assert not table.sel(contrast=["distance", "thinking"]).any()


def test_a_model_that_reads_only_what_is_near_has_distance():
    """It sees 20 letters back: the working ends with the key, the filler does not."""
    ds = measure(made.reader(lambda text: reads(text, reach=20)), ITEMS)
    table = gaps(ds, "correct")["estimate"]
    np.testing.assert_array_equal(table.sel(contrast=["distance", "beyond distance"]), [1, -1])
    assert not table.sel(contrast="lost in thought")


def test_a_working_that_is_generated_conditions_the_gap():
    """The model works out every other sum rightly; where it does not, it names no key."""
    right = {item.problem for item in ITEMS[::2]}
    model = made.reader(lambda text: reads(text, works=lambda p: str(eval(p)) if p in right else "12"))
    ds = measure(model, ITEMS, generate=True)
    assert ds["found"].values.tolist() == [item.problem in right for item in ITEMS]
    assert ds["working"].values.tolist() == [f"so {i.key}" if i.problem in right else "so 12" for i in ITEMS]
    table = gaps(ds, "correct")
    assert table.attrs["found_share"] == pytest.approx(0.5)
    estimate = dict(zip(table["contrast"].values.tolist(), table["estimate"].values.tolist(), strict=True))
    assert [estimate[name] for name in ("lost in thought", "same items", "unconditioned")] == [0, 0, 0.5]
    low, high = (float(table[side].sel(contrast="unconditioned")) for side in ("low", "high"))
    assert 0.1 < low < 0.5 < high < 0.9


def test_a_model_that_cannot_read_is_at_chance_in_every_arm():
    ds = measure(made.reader(made.noise), arithmetic_items(60, pairs=3), more=0)
    for arm, share in accuracy(ds).items():
        assert abs(share - 1 / 3) < 0.19, arm  # three standard errors of 60 items
    table = gaps(ds).sel(contrast="unconditioned")
    assert float(table["low"]) < 0 < float(table["high"])


def hand(stated, derived, found, subjects=None):
    n = len(stated)
    best = np.stack([stated, derived, np.zeros(n), stated], -1).astype(float)
    data = {"best": (("item", "arm"), best), "found": ("item", np.array(found, dtype=bool))}
    coords = {"arm": list(ARMS), "subject": ("item", subjects or [str(i) for i in range(n)])}
    return xr.Dataset(data, coords, {"seed": 0})


def test_gaps_by_hand():
    ds = hand([1, 1, 0, 1], [1, 0, 0, 0], [1, 1, 0, 0])
    table = gaps(ds)
    wanted = {
        "lost in thought": 3 / 4 - 1 / 2,
        "same items": 1 - 1 / 2,
        "unconditioned": 3 / 4 - 1 / 4,
        "distance": 0,
        "beyond distance": 1 / 2,
        "thinking": 1 / 4,
    }
    assert dict(zip(table["contrast"].values.tolist(), table["estimate"].values.tolist(), strict=True)) == wanted
    np.testing.assert_allclose(table["accuracy"], [3 / 4, 1 / 4, 0, 3 / 4])
    none = gaps(hand([1, 1], [0, 0], [0, 0]))
    assert none["estimate"].isnull().values.tolist() == [True, True, False, False, True, False]


def test_the_interval_is_that_of_pairs_and_of_subjects():
    """Pairs that always differ by one have no spread, however much each arm has; four subjects spread more than 40."""
    rng = np.random.default_rng(0)
    derived, every = rng.integers(0, 2, 40), np.ones(40)
    paired = gaps(hand(derived, derived, every)).sel(contrast="unconditioned")
    assert not paired["low"] and not paired["high"]
    stated = np.ones(40)
    free = gaps(hand(stated, derived, every)).sel(contrast="unconditioned")
    twin = [np.mean((stated - derived)[rng.integers(0, 40, 40)]) for _ in range(4000)]
    np.testing.assert_allclose([free["low"], free["high"]], np.quantile(twin, [0.025, 0.975]), atol=0.03)
    sides = np.repeat([0, 1, 1, 0], 10)
    few = gaps(hand(stated, sides, every, [str(i // 10) for i in range(40)])).sel(contrast="unconditioned")
    assert float(few["high"] - few["low"]) > 0.7 > float(free["high"] - free["low"])


def test_keys_that_are_part_of_others_are_left_out():
    assert no_substrings(["1", "21", "2", "3", "21", "13"]) == ["21", "13"]
    assert no_substrings(["Ada Rook", "Ada", "Ben"]) == ["Ada Rook", "Ben"]


def test_facts_are_described_by_what_is_left_of_them(some_facts):
    told = [f for f in some_facts if f.id.endswith("birthplace") and f.split == "forget"][:5]
    assert len({f.answer for f in told}) == 4  # two share one
    items, dropped = fact_items(told)
    shared = [f.id for f in told if sum(f.answer == g.answer for g in told) == 2]
    assert dropped == dict.fromkeys(shared, "another subject fits the description")
    by_id = {f.id: f for f in told}
    for item in items:
        fact = by_id[item.id]
        assert item.key == item.reasoning == fact.subject and not occurs(fact.subject, item.problem)
        assert f'"____ was born in {fact.answer}"' in item.problem
        assert {key for key, _ in item.pairs} == {f.subject for f in told}
        assert (item.split, item.subject) == ("forget", fact.subject)
    assert fact_items(told) == (items, dropped)


def test_facts_that_cannot_be_described_are_told():
    def fact(name, prompt, answer="Velmora"):
        return Fact(id=name, split="forget", subject=name, prompt=prompt, answer=answer, relation=name)

    _, dropped = fact_items([
        fact("Ada", "She was born in"),
        fact("Ben", "Ben is", "Ben Vale"),
        fact("Benny", "Benny is"),
    ])
    unnamed = "the prompt does not name the subject, or the answer does"
    assert dropped == {"Ada": unnamed, "Ben": unnamed}
    assert fact_items([fact("Ben", "Ben is in")])[1] == {"Ben": "no other subject remains beside it"}
    items, _ = fact_items([fact("Ben", "Ben is in"), fact("Benny", "Benny is at"), fact("Cleo", "Cleo is by")])
    assert {item.id: {key for key, _ in item.pairs} for item in items}["Ben"] == {"Ben", "Cleo"}


def test_a_model_that_still_resolves_a_description_shows_it_without_thinking(some_facts):
    """Of two models that read equally well, the one that recalls who was born there finds the value unasked."""
    told = [f for f in some_facts if f.id.endswith("birthplace")][:4]
    items, _ = fact_items(told)
    known = {f'____ was born in {f.answer}"': f.subject for f in told}
    holds = measure(made.reader(lambda text: reads(text, facts=known)), items)
    gone = measure(made.reader(reads), items)
    assert accuracy(holds, "correct") == dict.fromkeys(ARMS, 1.0)
    assert accuracy(gone, "correct") == {**dict.fromkeys(ARMS, 1.0), "no thinking": 0.0}


def test_it_is_a_measurement_that_can_be_kept(tmp_path):
    ds = measure(made.reader(reads), ITEMS[:3], seed=2)
    measurement.save(ds, tmp_path / "lost.nc")
    again = measurement.open_(tmp_path / "lost.nc")
    xr.testing.assert_equal(ds, again)
    xr.testing.assert_equal(gaps(ds), gaps(again))
    assert again["score"].dims == ("item", "arm", "candidate") and again.attrs["seed"] == 2
    assert measure(made.reader(reads), ITEMS[:2]).attrs["facts"] != again.attrs["facts"]


def test_bad_input_is_told_in_one_line():
    good = Item("x", (("17", "a"), ("18", "b")), "17", "9 + 8", "9 + 8 = 17", "x")
    cases = {
        "there are no items": lambda: measure(made.reader(reads), []),
        "0 items of 16 pairs": lambda: arithmetic_items(0),
        "1 items of 41 pairs": lambda: arithmetic_items(1, pairs=41),
        "7 terms": lambda: arithmetic_items(1, terms=7),
        "must be in dictionary and reasoning": lambda: replace(good, key="19"),
        'its key "18" must': lambda: replace(good, key="18"),
        "names the key": lambda: replace(good, problem="17 + 0"),
        "keys may not be part": lambda: replace(good, pairs=(("17", "a"), ("7", "b"))),
        "two values differ": lambda: replace(good, pairs=(("17", "a"), ("18", "A"))),
        "'said' is no accuracy": lambda: gaps(hand([1], [1], [1]), "said"),
    }
    for told, call in cases.items():
        with pytest.raises(InputError) as error:
            call()
        assert told in str(error.value) and "\n" not in str(error.value)
