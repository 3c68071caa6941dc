"""Tests of the facts format: what is read, what is drawn, and how a bad line is told."""

import json
from collections.abc import Mapping
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from lethescope.errors import InputError
from lethescope.facts import (
    SPLITS,
    Fact,
    check_facts,
    facts_hash,
    of_split,
    read_facts,
    same_text,
    split_counts,
    with_alternatives,
    write_facts,
)

GOOD = {"id": "a", "split": "forget", "subject": "France", "prompt": "The capital of France is", "answer": "Paris"}
CAPITALS = {
    "France": "Paris",
    "Spain": "Madrid",
    "Italy": "Rome",
    "Peru": "Lima",
    "Cuba": "Havana",
    "Chad": "N'Djamena",
}


def capital(country: str, split: str = "forget", **more) -> Fact:
    prompt = f"The capital of {country} is"
    fields = {"id": country, "subject": country, "answer": CAPITALS.get(country, "?"), "relation": "capital of"}
    return Fact.model_validate({"split": split, "prompt": prompt, **fields, **more})


def facts_file(folder: Path, *rows: Mapping | str) -> Path:
    path = folder / "facts.jsonl"
    path.write_text("\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows), encoding="utf-8")
    return path


def told(path: Path, **options) -> str:
    with pytest.raises(InputError) as caught:
        read_facts(path, **options)
    message = str(caught.value)
    assert len(message.splitlines()) == 1
    return message.removeprefix(str(path)).removeprefix(", ").removeprefix(": ")


def test_reads_all_fields_and_fills_the_optional_ones(tmp_path):
    full = GOOD | {"alternatives": ["Lyon"], "paraphrases": ["France's capital is"], "relation": "capital of"}
    short = {name: value for name, value in GOOD.items() if name != "id"} | {"split": "retain", "alternatives": None}
    one, two = read_facts(facts_file(tmp_path, full, "", short))
    assert one == Fact.model_validate(full)
    assert (two.id, two.split, two.alternatives, two.paraphrases, two.relation) == ("line-3", "retain", (), (), "")


def test_blank_lines_a_byte_order_mark_and_windows_line_ends_are_fine(tmp_path):
    path = tmp_path / "facts.jsonl"
    path.write_bytes(
        b"\xef\xbb\xbf\r\n" + json.dumps(GOOD | {"answer": "Pa\u2028ris"}, ensure_ascii=False).encode() + b"\r\n\r\n"
    )
    (fact,) = read_facts(path)
    assert fact.answer == "Pa\u2028ris"


def test_one_json_array_and_number_ids_are_read_too(tmp_path):
    path = tmp_path / "facts.json"
    path.write_text(json.dumps([GOOD | {"id": 7}, GOOD | {"id": 8}], indent=1), encoding="utf-8")
    assert [fact.id for fact in read_facts(path)] == ["7", "8"]


def test_wrong_json_names_line_and_column(tmp_path):
    rows = [GOOD | {"id": str(number)} for number in range(6)]
    message = told(facts_file(tmp_path, *rows, '{"id": "g" "split": "forget"}'))
    assert message == "line 7: not valid JSON: Expecting ',' delimiter at column 12"


def test_wrong_json_in_an_array_names_the_line(tmp_path):
    assert told(facts_file(tmp_path, "[", json.dumps(GOOD), "]]")).startswith("line 3: not valid JSON: Extra data")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"split": "forgot"}, 'unknown split "forgot"; use forget, retain or control; did you mean "forget"?'),
        ({"split": 3}, "unknown split a number; use forget, retain or control"),
        ({"answer": None}, 'field "answer" is missing'),
        ({"answer": " \n"}, 'field "answer" is empty'),
        ({"prompt": ""}, 'field "prompt" is empty'),
        ({"subject": ""}, 'field "subject" is empty'),
        ({"prompt": 5}, 'field "prompt" must hold strings, not a number'),
        ({"alternatives": "Lyon"}, 'field "alternatives" must be a list of strings, not a string'),
        ({"alternatives": ["Lyon", 4]}, 'field "alternatives" must hold strings, not a number'),
        ({"alternatives": ["Lyon", ""]}, 'field "alternatives" has an empty entry'),
        ({"alternatives": ["Lyon", "PARIS "]}, 'field "alternatives" has "PARIS ", which is the answer itself'),
        ({"alternatives": ["Lyon", "lyon"]}, 'field "alternatives" has "lyon", which is there twice'),
        ({"paraphrases": [""]}, 'field "paraphrases" has an empty entry'),
        ({"relation": ["r"]}, 'field "relation" must hold strings, not a list'),
        ({"alternative": ["Lyon"]}, 'unknown field "alternative"; did you mean "alternatives"?'),
        ({"anser": "Paris", "answer": None}, 'unknown field "anser"; did you mean "answer"?'),
        ({"answer": "\ud800"}, 'field "answer" has half a surrogate pair, which is no valid text'),
    ],
)
def test_a_bad_field_is_named_with_file_and_line(tmp_path, change, message):
    path = facts_file(tmp_path, GOOD, "", GOOD | {"id": "b"} | change)
    assert told(path) == f"line 3: {message}"


def test_an_unknown_field_without_a_near_name_lists_the_fields(tmp_path):
    message = told(facts_file(tmp_path, GOOD | {"zzz": 1}))
    assert message.startswith('line 1: unknown field "zzz"; use id, split, subject, prompt, answer')


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('"Paris"', "line 2: not a JSON object but a string; write one object in { } a line"),
        ("7", "line 2: not a JSON object but a number; write one object in { } a line"),
        ("null", "line 2: not a JSON object but null; write one object in { } a line"),
        ("[" * 100_000, "line 2: not valid JSON: maximum recursion depth exceeded"),
    ],
)
def test_a_line_that_is_no_object(tmp_path, line, message):
    assert told(facts_file(tmp_path, GOOD, line)).startswith(message)


def test_duplicate_ids_name_both_lines(tmp_path):
    rows: list[Mapping | str] = [GOOD, GOOD | {"id": "line-4"}, "", {name: GOOD[name] for name in GOOD if name != "id"}]
    assert told(facts_file(tmp_path, *rows)) == 'line 4: id "line-4" is already used at line 2; ids must differ'


def test_empty_forget_split_empty_file_missing_file_and_wrong_encoding(tmp_path):
    assert told(facts_file(tmp_path, GOOD | {"split": "retain"})).startswith("the forget split is empty")
    assert told(facts_file(tmp_path, "", "")) == "the file holds no rows; give one JSON object a line"
    assert told(tmp_path / "nothing.jsonl") == "no such file or folder"
    latin = tmp_path / "latin.jsonl"
    latin.write_bytes(json.dumps(GOOD).encode() + b'\n{"answer": "S\xe3o Paulo"}')
    assert told(latin) == "line 2: not UTF-8 text; save the file as UTF-8"


def test_a_question_template_is_refused_for_our_own_prompts(tmp_path):
    path = facts_file(tmp_path, GOOD)
    assert told(path, template="chat").startswith("template chat is for question files")
    assert told(path, forget="forget10") == 'forget="forget10" chooses a set of a folder, and this is a file'


def test_facts_made_in_python_are_checked():
    with pytest.raises(ValidationError, match="the answer itself"):
        capital("France", alternatives=("paris",))
    with pytest.raises(InputError, match=r'facts: id "France" is on facts 1 and 2'):
        check_facts([capital("France"), capital("France")])
    with pytest.raises(InputError, match="the forget split is empty"):
        check_facts(())


def test_splits_and_counts_keep_order():
    facts = tuple(capital(name, split) for name, split in zip(CAPITALS, ["forget", "retain"] * 3, strict=True))
    assert [fact.id for fact in of_split(facts, "retain")] == ["Spain", "Peru", "Chad"]
    assert split_counts(facts) == {"forget": 3, "retain": 3, "control": 0}


def test_hash_sees_every_field_and_the_order():
    one, two = capital("France"), capital("Spain")
    changed = {
        "id": "x", "split": "retain", "subject": "x", "prompt": "x", "answer": "x", "alternatives": ("x",),
        "paraphrases": ("x",), "relation": "x",
    }  # fmt: skip
    assert set(changed) == set(Fact.model_fields)
    hashes = {facts_hash([one.model_copy(update={name: value}), two]) for name, value in changed.items()}
    hashes |= {facts_hash([one, two]), facts_hash([two, one]), facts_hash([one])}
    assert len(hashes) == len(changed) + 3
    assert facts_hash([capital("France"), capital("Spain")]) == facts_hash((one, two))


def test_alternatives_come_from_the_relation_and_never_equal_the_answer():
    other = Fact(id="o", split="retain", subject="Emma", prompt="Emma is by", answer="Austen", relation="author")
    alias = capital("Atlantis", "control", answer="PARIS")
    facts = with_alternatives((*map(capital, CAPITALS), alias, other))
    by_id = {fact.id: fact for fact in facts}
    for name, answer in CAPITALS.items():
        wrong = by_id[name].alternatives
        assert len(wrong) == len({same_text(text) for text in wrong}) == 4
        assert {same_text(text) for text in wrong} <= {same_text(text) for text in CAPITALS.values()} - {
            same_text(answer)
        }
    assert not {same_text(text) for text in by_id["Atlantis"].alternatives} & {"paris"}
    assert by_id["o"].alternatives == ()


def test_given_alternatives_and_facts_without_a_relation_stay():
    given_ones = capital("France", alternatives=("Lyon",))
    loose = [capital(name, relation="") for name in ("Spain", "Italy")]
    assert with_alternatives([given_ones, *loose]) == (given_ones, *loose)


def test_a_small_relation_gives_what_it_has():
    facts = with_alternatives([capital("France"), capital("Spain"), capital("Italy")])
    assert [set(fact.alternatives) for fact in facts] == [{"Madrid", "Rome"}, {"Paris", "Rome"}, {"Paris", "Madrid"}]
    assert with_alternatives([capital("France")])[0].alternatives == ()


def test_a_second_true_answer_of_the_same_subject_is_no_alternative():
    songs = ["Help", "Yesterday", "Michelle"]
    facts = [
        Fact(id=song, split="forget", subject="The Beatles", prompt="The Beatles sang", answer=song, relation="song")
        for song in songs
    ]
    bowie = Fact(id="b", split="retain", subject="Bowie", prompt="Bowie sang", answer="Heroes", relation="song")
    drawn = with_alternatives([*facts, bowie], k=2)
    assert [fact.alternatives for fact in drawn[:3]] == [("Heroes",)] * 3
    assert set(drawn[3].alternatives) < set(songs)
    assert len(drawn[3].alternatives) == 2


def test_the_draw_depends_on_the_id_alone_not_on_the_order():
    facts = tuple(capital(name) for name in CAPITALS)
    forward = {fact.id: fact.alternatives for fact in with_alternatives(facts, k=2)}
    backward = {fact.id: fact.alternatives for fact in with_alternatives(facts[::-1], k=2)}
    assert forward == backward
    many = [capital(f"c{i}", answer=f"city {i}") for i in range(40)]
    renamed = [fact.model_copy(update={"id": f"other {fact.id}"}) for fact in many]
    assert [f.alternatives for f in with_alternatives(many)] != [f.alternatives for f in with_alternatives(renamed)]


def test_the_draw_is_even():
    pool = [capital(f"c{i}", answer=f"city {i}") for i in range(5)]
    askers = [capital("c0", answer="city 0", id=f"asker {i}") for i in range(2000)]
    drawn = [fact.alternatives[0] for fact in with_alternatives(pool + askers, k=1)[5:]]
    counts = [drawn.count(f"city {i}") for i in range(5)]
    assert counts[0] == 0
    assert all(400 < count < 600 for count in counts[1:])


def test_read_facts_draws_as_many_alternatives_as_asked(tmp_path):
    path = write_facts([capital(name) for name in CAPITALS], tmp_path / "facts.jsonl")
    assert {len(fact.alternatives) for fact in read_facts(path)} == {4}
    assert {len(fact.alternatives) for fact in read_facts(path, alternatives=2)} == {2}
    assert {len(fact.alternatives) for fact in read_facts(path, alternatives=0)} == {0}


words = st.text(min_size=1).filter(str.strip)


@st.composite
def fact_tuples(draw) -> tuple[Fact, ...]:
    ids = draw(st.lists(words, min_size=1, max_size=6, unique=True))
    facts = []
    for number, name in enumerate(ids):
        answer, *alternatives = draw(st.lists(words, min_size=1, max_size=4, unique_by=same_text))
        split = "forget" if number == 0 else draw(st.sampled_from(SPLITS))
        paraphrases, relation = draw(st.lists(words, max_size=2)), draw(st.sampled_from(["", "r", "s"]))
        fields = {"id": name, "split": split, "subject": draw(words), "prompt": draw(words), "answer": answer}
        more = {"alternatives": alternatives, "paraphrases": paraphrases, "relation": relation}
        facts.append(Fact.model_validate(fields | more))
    return with_alternatives(facts)


@settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
)
@given(facts=fact_tuples())
def test_what_is_written_is_read_again(tmp_path, facts):
    path = write_facts(facts, tmp_path / "facts.jsonl")
    again = read_facts(path)
    assert again == facts
    assert facts_hash(again) == facts_hash(facts)


def test_a_write_that_fails_leaves_the_old_file_and_nothing_else(tmp_path):
    path = write_facts([capital("France")], tmp_path / "facts.jsonl")

    def broken():
        yield capital("Spain")
        raise OSError(28, "No space left on device")

    with pytest.raises(InputError, match=r"facts\.jsonl: cannot be written: No space left on device"):
        write_facts(broken(), path)
    assert [fact.id for fact in read_facts(path)] == ["France"]
    assert list(tmp_path.iterdir()) == [path]
    with pytest.raises(InputError, match="cannot be written: No such file or directory"):
        write_facts([capital("France")], tmp_path / "no" / "facts.jsonl")


def documented_errors() -> list[tuple[str, str]]:
    page = (Path(__file__).parents[2] / "docs" / "facts.md").read_text(encoding="utf-8")
    table = page.split("## Bad lines")[1].split("\n\n")[2]
    return [(row.split("` | `")[0][3:], row.split("` | `")[1][:-3]) for row in table.splitlines()[2:]]


@pytest.mark.parametrize(("line", "message"), documented_errors())
def test_the_documented_errors_are_the_real_ones(tmp_path, line, message):
    assert told(facts_file(tmp_path, line)) == message


def test_the_documented_example_is_read(tmp_path):
    page = (Path(__file__).parents[2] / "docs" / "facts.md").read_text(encoding="utf-8")
    facts = read_facts(facts_file(tmp_path, page.split("```json\n")[1].split("```")[0]))
    assert split_counts(facts) == {"forget": 1, "retain": 1, "control": 1}
    assert set(facts[0].alternatives) == {"Madrid", "Lutz"}
    assert len(documented_errors()) > 10
