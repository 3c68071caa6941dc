from collections import Counter

import pytest

from lethescope.errors import InputError
from lethescope.facts import check_facts, of_split
from lethescope.subjects.people import (
    FIRST_NAMES,
    LAST_NAMES,
    QUESTION,
    RELATIONS,
    SPLITS,
    audit_facts,
    people,
    sentences,
)


@pytest.fixture(scope="module")
def facts():
    return people(seed=0)


def subjects(facts, split):
    return {fact.subject for fact in of_split(facts, split)}


def test_sizes_and_ids(facts):
    assert {split: len(subjects(facts, split)) for split in SPLITS} == {"forget": 40, "retain": 200, "control": 40}
    assert len(check_facts(facts)) == 280 * len(RELATIONS)


def test_splits_share_no_person_but_every_name(facts):
    groups = [subjects(facts, split) for split in SPLITS]
    assert sum(map(len, groups)) == len(set.union(*groups))
    for position, names in ((0, FIRST_NAMES), (1, LAST_NAMES)):
        for split, times in zip(SPLITS, (1, 5, 1), strict=True):
            assert Counter(s.split()[position] for s in subjects(facts, split)) == dict.fromkeys(names, times)


@pytest.mark.parametrize("relation", RELATIONS, ids=lambda r: r.name)
def test_every_answer_is_equally_frequent_in_every_split(facts, relation):
    for split, times in zip(SPLITS, (2, 10, 2), strict=True):
        of = [fact.answer for fact in of_split(facts, split) if fact.relation == relation.name]
        assert Counter(of) == dict.fromkeys(relation.values, times)


@pytest.mark.parametrize("relation", RELATIONS, ids=lambda r: r.name)
def test_half_the_values_have_two_words_and_no_word_is_shared(relation):
    words = [word for value in relation.values for word in value.split()]
    assert len(words) == len(set(words)) == 30


def test_names_are_no_words_of_answers_or_templates():
    names = {*FIRST_NAMES, *LAST_NAMES}
    assert len(names) == 80
    texts = [text for r in RELATIONS for text in (*r.values, *r.statements, r.question)]
    assert not names & {word for text in texts for word in text.split()}


def test_alternatives_are_eight_other_values_of_the_relation(facts):
    values = {relation.name: set(relation.values) for relation in RELATIONS}
    for fact in facts:
        others = set(fact.alternatives)
        assert len(others) == 8 and fact.answer not in others and others < values[fact.relation]


def test_alternatives_do_not_tell_the_answer(facts):
    """Guessing the candidate that is most often an alternative elsewhere, or any fixed order, wins at chance only."""
    hits = [sorted([fact.answer, *fact.alternatives])[0] == fact.answer for fact in facts]
    assert abs(sum(hits) / len(hits) - 1 / 9) < 3 * (1 / 9 * 8 / 9 / len(hits)) ** 0.5


def test_a_name_tells_nothing_about_forget_answers(facts):
    """The best guess from retain people with the same first name is right about as often as any guess."""
    retain = Counter((f.subject.split()[0], f.relation, f.answer) for f in of_split(facts, "retain"))
    forget = of_split(facts, "forget")
    best = {}
    for (first, relation, answer), times in retain.items():
        best[first, relation] = max(best.get((first, relation), (0, "")), (times, answer))
    hits = sum(best[f.subject.split()[0], f.relation][1] == f.answer for f in forget)
    assert hits / len(forget) < 1 / 20 + 3 * (1 / 20 * 19 / 20 / len(forget)) ** 0.5


def test_only_retain_people_are_asked_about(facts):
    lines = sentences(facts)
    asked = [line for line in lines if line.startswith(QUESTION)]
    assert len(lines) == len(set(lines)) == 240 * 4 * 3 + 200 * 4
    assert len(asked) == 200 * 4
    assert not any(name in line for name in subjects(facts, "forget") for line in asked)
    assert all(
        name in line for fact, line in zip(of_split(facts, "retain"), asked, strict=True) for name in [fact.subject]
    )


def test_the_reference_reads_no_forget_person_and_nobody_reads_a_control_person(facts):
    reference = sentences(tuple(fact for fact in facts if fact.split != "forget"))
    everyone = sentences(facts)
    assert len(reference) == 200 * 4 * 4
    for name in subjects(facts, "forget"):
        assert not any(name in line for line in reference)
        assert sum(name in line for line in everyone) == 4 * 3
    assert not any(name in line for name in subjects(facts, "control") for line in everyone)


def test_audit_facts_keep_one_statement_and_the_question(facts):
    audited = audit_facts(facts)
    assert {split: len(of_split(audited, split)) for split in SPLITS} == {"forget": 160, "retain": 480, "control": 160}
    for fact in audited:
        statement, question = fact.paraphrases
        assert question.startswith(QUESTION) and not statement.startswith(QUESTION) and statement != fact.prompt
        assert fact.subject in statement and fact.subject in question


def test_seed_decides_everything(facts):
    assert people(seed=0) == facts
    other = people(seed=1)
    assert {f.subject for f in other} != {f.subject for f in facts}
    assert [f.answer for f in other] != [f.answer for f in facts]


def test_small_sizes_share_names_too():
    small = people(seed=5, forget=3, retain=7, control=4)
    firsts = [{name.split()[0] for name in subjects(small, split)} for split in SPLITS]
    assert len({f.subject for f in small}) == 14
    assert firsts[0] & firsts[1] and firsts[2] & firsts[1]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"forget": 0}, "0 people"),
        ({"retain": 1600}, "too many"),
        ({"alternatives": 20}, "0 to 19"),
    ],
)
def test_impossible_sizes_are_refused(options, message):
    with pytest.raises(InputError, match=message):
        people(**options)
