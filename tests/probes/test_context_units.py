"""Tests of contexts: what is given stands once, what is asked stands where its direction says, places are kept."""

import pytest

from lethescope.errors import InputError
from lethescope.facts import Fact
from lethescope.probes.context_units import DIRECTIONS, contexts, occurs, swapped


class Any:
    """A tokenizer that can write everything."""

    unk_token_id = None

    def __call__(self, text, **_):
        return {"input_ids": [len(text)]}


def at(piece, text):
    return text.index(piece)


@pytest.mark.parametrize("seed", range(5))
def test_units_are_asked_in_the_direction_that_they_say(seed):
    made = {c.direction: c for c in contexts(Any(), units=64, seed=seed)}
    assert list(made) == [*DIRECTIONS]
    for direction, context in made.items():
        assert len(context.units) == 64 and all(unit.text in context.text for unit in context.units)
        assert sum(map(bool, map(context.skipped, range(64)))) <= 2
        for i, unit in enumerate(context.units):
            assert occurs(unit.given, unit.text) and occurs(unit.asked, unit.text)
            assert unit.given in context.question(i) and not occurs(unit.asked, context.question(i))
            given, asked = at(unit.given, unit.text), at(unit.asked, unit.text)
            if direction == "document":
                assert asked == 0 and 0 < given < len(unit.asked) - len(unit.given)  # words on both sides
            else:
                assert asked < given if direction == "code" else given < asked
    assert len({u.asked for c in made.values() for u in c.units}) == 3 * 64


def test_facts_stand_at_the_same_places_in_every_direction(some_facts):
    told = some_facts[::6]
    made = contexts(Any(), units=16, n=2, facts=told)
    assert [(c.direction, c.number) for c in made] == [(d, i) for d in DIRECTIONS for i in range(2)]
    where = {(c.direction, c.number): [u.fact for u in c.units] for c in made}
    for number in range(2):
        assert where["document", number] == where["code", number] == where["database", number]
        assert sorted(filter(None, where["code", number])) == sorted(f.id for f in told[number::2])
    assert [bool(f) for f in where["code", 0]] != [bool(f) for f in where["code", 1]]
    by_id = {f.id: f for f in told}
    for context in made:
        for i, unit in enumerate(context.units):
            if unit.fact:
                fact = by_id[unit.fact]
                given, asked = {
                    "document": (fact.subject, f"{fact.prompt} {fact.answer}"),
                    "code": (fact.answer, fact.subject),
                    "database": (fact.prompt, fact.answer),
                }[context.direction]
                assert (unit.given, unit.asked, unit.split) == (given, asked, fact.split)
                assert f"{fact.prompt} {fact.answer}." in context.text and given in context.question(i)


def test_what_stands_twice_is_skipped_and_so_is_a_fact_without_its_subject():
    facts = [
        Fact(id="a", split="forget", subject="Ada", prompt="Ada was born in", answer="Velmora"),
        Fact(id="b", split="retain", subject="Ben", prompt="Ben was born in", answer="Velmora"),
        Fact(id="c", split="forget", subject="Cleo", prompt="She was born in", answer="Karvost"),
        Fact(id="d", split="forget", subject="Dov", prompt="Dov was born in", answer="Karvost Hill"),
    ]
    made = {c.direction: c for c in contexts(Any(), units=8, facts=facts)}
    why = {d: {u.fact: c.skipped(i) for i, u in enumerate(c.units) if u.fact} for d, c in made.items()}
    assert why["document"] == why["database"] == dict.fromkeys("abcd", "")
    unnamed = "the prompt does not name its subject"
    assert why["code"] == {"a": "ambiguous", "b": "ambiguous", "c": unnamed, "d": ""}


def test_swapped_facts_tell_a_wrong_answer_and_keep_the_right_one_as_alternative(some_facts):
    for before, after in zip(some_facts, swapped(some_facts), strict=True):
        assert after.answer in before.alternatives and before.answer in after.alternatives
        assert {after.answer, *after.alternatives} == {before.answer, *before.alternatives}
        assert (after.prompt, after.id) == (before.prompt, before.id)
    assert swapped(some_facts) == swapped(some_facts) != swapped(some_facts, seed=1)


def test_a_word_tokenizer_gets_its_own_words(words):
    for context in contexts(words, units=8):
        assert words.unk_token_id not in words(context.text)["input_ids"]
        assert not any(context.skipped(i) for i in range(8)) or context.direction == "document"
        for unit in context.units:
            assert occurs(unit.given, unit.text) and occurs(unit.asked, unit.text)


def test_the_seed_decides(words):
    assert contexts(Any(), seed=3) == contexts(Any(), seed=3) != contexts(Any(), seed=4)
    assert contexts(words, units=8) == contexts(words, units=8)
    assert contexts(Any(), directions=["code"], n=2)[1] == contexts(Any(), n=3)[4]


def test_bad_input_is_told_in_one_line(some_facts, words):
    cases = {
        "unknown direction ['sideways']": lambda: contexts(Any(), directions=["sideways"]),
        "unknown direction none": lambda: contexts(Any(), directions=[]),
        "9 facts in 1 contexts of 16 units": lambda: contexts(Any(), units=16, facts=some_facts[:9]),
        "at least 2 units": lambda: contexts(Any(), units=1),
        "500 units are too many": lambda: contexts(Any(), units=500),
        "40 units need 80 words": lambda: contexts(words, units=40),
        "fact 'x' has no alternatives": lambda: swapped([
            Fact(id="x", split="forget", subject="X", prompt="X", answer="Y")
        ]),
    }
    for told, call in cases.items():
        with pytest.raises(InputError) as error:
            call()
        assert told in str(error.value) and "\n" not in str(error.value)
