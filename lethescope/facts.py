"""Facts: what a model should have forgotten, what it must keep, and what no model was ever taught.

A facts file holds one JSON object a line; `docs/facts.md` describes it. Everything a user can get wrong in it
is told in one line that names the file, the line and the field.
"""

from __future__ import annotations

import difflib
import hashlib
import json
import os
import unicodedata
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

import numpy as np
from pydantic import BaseModel, ConfigDict, ValidationError, field_validator, model_validator

from lethescope.errors import InputError

Split = Literal["forget", "retain", "control"]
SPLITS: tuple[Split, ...] = get_args(Split)


class Fact(BaseModel):
    """One thing a model may know: a prompt and the answer that continues it.

    Attributes:
        id: unique name of the fact in its file.
        split: `forget` (must be gone), `retain` (must stay) or `control` (no model was ever taught it).
        subject: the entity the fact is about; statistics are clustered by it.
        prompt: the text before the answer, exactly as the model sees it.
        answer: the true answer.
        alternatives: wrong answers of the same kind.
        paraphrases: further prompts for the same answer.
        relation: the kind of fact (`capital of`); empty when it has none.

    Example:
        >>> fact = Fact(id="1", split="forget", subject="France", prompt="The capital of France is", answer="Paris")
        >>> fact.alternatives
        ()
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    id: str
    split: Split
    subject: str
    prompt: str
    answer: str
    alternatives: tuple[str, ...] = ()
    paraphrases: tuple[str, ...] = ()
    relation: str = ""

    @field_validator("id", "subject", "prompt", "answer")
    @classmethod
    def _not_empty(cls, text: str) -> str:
        _check_text(text)
        return text

    @field_validator("alternatives", "paraphrases")
    @classmethod
    def _none_empty(cls, texts: tuple[str, ...]) -> tuple[str, ...]:
        if not all(text.strip() for text in texts):
            raise ValueError("has an empty entry")
        _check_unicode("".join(texts))
        return texts

    @field_validator("relation")
    @classmethod
    def _encodable(cls, text: str) -> str:
        _check_unicode(text)
        return text

    @model_validator(mode="after")
    def _alternatives_are_wrong_and_differ(self) -> Fact:
        seen = {same_text(self.answer): "the answer itself"}
        for text in self.alternatives:
            if same_text(text) in seen:
                raise ValueError(f'field "alternatives" has {quote(text)}, which is {seen[same_text(text)]}')
            seen[same_text(text)] = "there twice"
        return self


Facts = tuple[Fact, ...]


class Row(NamedTuple):
    """One JSON object of a file: where it stands (`facts.jsonl, line 7`), its number from 1, and its fields."""

    where: str
    number: int
    fields: dict[str, Any]


def read_facts(
    path: str | Path,
    *,
    format: str = "auto",
    template: str = "auto",
    tokenizer: Any = None,
    forget: str | None = None,
    alternatives: int = 4,
) -> Facts:
    """Read facts from a file or a folder, check them, and draw the alternatives that are missing.

    Args:
        path: a facts file of ours (one JSON object a line), or a file or folder of a format in `readers.READERS`.
        format: a name in `readers.READERS`, or `auto` to look at the file or the folder.
        template: how a bare question becomes a prompt: `auto`, `chat`, `qa` or `plain` (`readers.as_prompt`). It is for
            question formats; the prompts of our own format are used as written.
        tokenizer: the tokenizer of the models; only needed for the chat template.
        forget: which forget set to take where a folder holds several (`forget10`, `bio`, `1_Stephen_King`).
        alternatives: how many wrong answers to draw for a fact that has none (`with_alternatives`).

    Raises:
        InputError: the path, a row or a field cannot be used; one line that says which.
    """
    from lethescope import readers  # here, because readers build facts and import this module

    path = Path(path)
    if forget is not None and path.is_file():
        raise InputError(f"{path}: forget={quote(forget)} chooses a set of a folder, and this is a file")
    reader = readers.READERS[readers.find_format(path, format)]
    facts = reader(path, template=template, tokenizer=tokenizer, forget=forget)
    return with_alternatives(check_facts(facts, path), alternatives)


def read_rows(path: Path) -> list[Row]:
    """The JSON objects of a file, one a line or in one JSON array; blank lines and a byte order mark are skipped.

    Raises:
        InputError: the file is missing, not UTF-8, not JSON, holds something else than objects, or nothing.
    """
    text = read_text(path)
    rows = _array_rows(path, text) if text.lstrip().startswith("[") else _line_rows(path, text)
    if not rows:
        raise InputError(f"{path}: the file holds no rows; give one JSON object a line")
    return rows


def make_fact(row: Row, fields: Mapping[str, Any]) -> Fact:
    """A checked `Fact` from the fields of a row; without an `id` it is named after its line.

    Raises:
        InputError: a field is missing, unknown, empty or of the wrong type; one line that names the row and the field.
    """
    given = {name: value for name, value in fields.items() if value is not None}
    if isinstance(given.get("id"), int) and not isinstance(given["id"], bool):
        given["id"] = str(given["id"])
    try:
        return Fact.model_validate({"id": f"line-{row.number}", **given})
    except ValidationError as error:
        raise InputError(f"{row.where}: {_first_problem(error)}") from None


def check_facts(facts: Iterable[Fact], where: str | Path = "facts") -> Facts:
    """The facts as a tuple, after a check that ids are unique and that there is something to forget.

    Raises:
        InputError: two facts share an id, or the forget split is empty.
    """
    facts = tuple(facts)
    first: dict[str, int] = {}
    for number, fact in enumerate(facts, start=1):
        if first.setdefault(fact.id, number) != number:
            raise InputError(f"{where}: id {quote(fact.id)} is on facts {first[fact.id]} and {number}; ids must differ")
    if not of_split(facts, "forget"):
        raise InputError(f'{where}: the forget split is empty; mark at least one fact with "split": "forget"')
    return facts


def of_split(facts: Iterable[Fact], split: Split) -> Facts:
    """The facts of one split, in their order."""
    return tuple(fact for fact in facts if fact.split == split)


def split_counts(facts: Iterable[Fact]) -> dict[Split, int]:
    """How many facts each split has; a split without facts counts 0.

    Example:
        >>> split_counts([Fact(id="1", split="forget", subject="s", prompt="p", answer="a")])
        {'forget': 1, 'retain': 0, 'control': 0}
    """
    facts = tuple(facts)
    return {split: len(of_split(facts, split)) for split in SPLITS}


def with_alternatives(facts: Iterable[Fact], k: int = 4) -> Facts:
    """Give each fact without alternatives up to `k`, drawn from the other answers of its relation.

    The draw is seeded by the fact's id and taken from the sorted answers of all splits, so it does not depend on the
    order of the file. It never gives an answer that a fact of the same subject and relation has. A fact without a
    relation, or whose relation has too few other answers, stays with what there is. What it does not
    prove: that a drawn answer is wrong; another fact's answer may happen to be true as well.

    Example:
        >>> rows = [("France", "Paris"), ("Spain", "Madrid"), ("Italy", "Rome")]
        >>> facts = [
        ...     Fact(id=s, split="forget", subject=s, prompt=f"The capital of {s} is", answer=a, relation="capital of")
        ...     for s, a in rows
        ... ]
        >>> sorted(with_alternatives(facts)[0].alternatives)
        ['Madrid', 'Rome']
    """
    facts = tuple(facts)
    pools: dict[str, dict[str, str]] = {}
    true_of: dict[tuple[str, str], set[str]] = {}
    for fact in sorted(facts, key=lambda fact: fact.answer):
        pools.setdefault(fact.relation, {}).setdefault(same_text(fact.answer), fact.answer)
        true_of.setdefault((fact.relation, same_text(fact.subject)), set()).add(same_text(fact.answer))
    ordered = {relation: sorted(pool.items()) for relation, pool in pools.items()}
    return tuple(
        fact
        if fact.alternatives or not fact.relation
        else fact.model_copy(
            update={
                "alternatives": _draw(
                    fact.id, ordered[fact.relation], true_of[fact.relation, same_text(fact.subject)], k
                )
            }
        )
        for fact in facts
    )


def facts_hash(facts: Iterable[Fact]) -> str:
    """The first 16 hex digits of the SHA-256 of all facts in their order: equal hashes mean equal facts.

    Example:
        >>> len(facts_hash([]))
        16
    """
    digest = hashlib.sha256()
    for fact in facts:
        digest.update(_line(fact).encode())
    return digest.hexdigest()[:16]


def write_facts(facts: Iterable[Fact], path: str | Path) -> Path:
    """Write facts as a facts file, one JSON object a line; the file appears whole or not at all.

    Raises:
        InputError: the file cannot be written (missing folder, disk full); nothing is left behind.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("w", encoding="utf-8", newline="\n") as file:
            file.writelines(_line(fact) for fact in facts)
        temporary.replace(path)
    except OSError as error:
        raise InputError(f"{path}: cannot be written: {error.strerror or error}") from error
    finally:
        temporary.unlink(missing_ok=True)
    return path


def same_text(text: str) -> str:
    """The form in which two answers are compared: case folded, composed Unicode, single spaces.

    Example:
        >>> same_text("New  YORK") == same_text("new york ")
        True
    """
    return " ".join(unicodedata.normalize("NFC", text.casefold()).split())


def nearest(word: str, choices: Iterable[str]) -> str:
    """`; did you mean "x"?` for the choice nearest to a misspelt word, or nothing when none is near."""
    found = difflib.get_close_matches(word, list(choices), n=1)
    return f'; did you mean "{found[0]}"?' if found else ""


def read_text(path: Path) -> str:
    """The text of a UTF-8 file, without a byte order mark.

    Raises:
        InputError: the file is missing, cannot be read, or is not UTF-8.
    """
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        raise InputError(f"{path}: no such file") from None
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror or error}") from None
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data[: error.start].count(b"\n") + 1
        raise InputError(f"{path}, line {line}: not UTF-8 text; save the file as UTF-8") from None


def parse_json(text: str, path: Path, line: int = 1) -> Any:
    """The JSON value of a text that starts on this line of the file.

    Raises:
        InputError: the text is not JSON; names the line and the column.
    """
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        where = f"{path}, line {line + error.lineno - 1}"
        raise InputError(f"{where}: not valid JSON: {error.msg} at column {error.colno}") from None
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path}, line {line}: not valid JSON: {error}") from None


def quote(text: str) -> str:
    """The text in double quotes on one line, cut after 60 characters: for messages."""
    cut = text if len(text) <= 60 else text[:59] + "…"
    return "".join(c if c.isprintable() else json.dumps(c)[1:-1] for c in json.dumps(cut, ensure_ascii=False))


def _draw(seed: str, pool: list[tuple[str, str]], taken: set[str], k: int) -> tuple[str, ...]:
    rng = np.random.default_rng(int.from_bytes(hashlib.sha256(seed.encode()).digest()[:8], "big"))
    picked = rng.choice(len(pool), size=min(len(pool), k + len(taken)), replace=False)
    return tuple(pool[i][1] for i in picked if pool[i][0] not in taken)[:k]


def _line(fact: Fact) -> str:
    return json.dumps(fact.model_dump(mode="json"), ensure_ascii=False) + "\n"


def _check_text(text: str) -> None:
    if not text.strip():
        raise ValueError("is empty")
    _check_unicode(text)


def _check_unicode(text: str) -> None:
    if any("\ud800" <= letter <= "\udfff" for letter in text):
        raise ValueError("has half a surrogate pair, which is no valid text")


def _line_rows(path: Path, text: str) -> list[Row]:
    lines = enumerate(text.split("\n"), start=1)
    return [
        _row(f"{path}, line {number}", number, parse_json(line, path, number)) for number, line in lines if line.strip()
    ]


def _array_rows(path: Path, text: str) -> list[Row]:
    items = parse_json(text, path)
    return [_row(f"{path}, item {number}", number, item) for number, item in enumerate(items, start=1)]


def _row(where: str, number: int, fields: Any) -> Row:
    if not isinstance(fields, dict):
        raise InputError(f"{where}: not a JSON object but {_kind(fields)}; write one object in {{ }} a line")
    return Row(where, number, fields)


def _kind(value: Any) -> str:
    names = {
        str: "a string",
        bool: "true or false",
        int: "a number",
        float: "a number",
        list: "a list",
        dict: "an object",
    }
    return names.get(type(value), "null" if value is None else type(value).__name__)


def _first_problem(error: ValidationError) -> str:
    """The most telling problem as one clause; an unknown field comes first, since it explains a missing one."""
    problems = sorted(error.errors(), key=lambda problem: problem["type"] != "extra_forbidden")
    return _tell(problems[0])


def _tell(problem: Any) -> str:
    name, value = ".".join(str(part) for part in problem["loc"][:1]), problem["input"]
    match problem["type"]:
        case "extra_forbidden":
            known = nearest(name, Fact.model_fields) or f"; use {', '.join(Fact.model_fields)}"
            return f"unknown field {quote(name)}{known}"
        case "missing":
            return f'field "{name}" is missing'
        case "literal_error":
            said = quote(value) if isinstance(value, str) else _kind(value)
            return f"unknown split {said}; use forget, retain or control{nearest(str(value), SPLITS)}"
        case "value_error" if name:
            return f'field "{name}" {problem["ctx"]["error"]}'
        case "value_error":
            return str(problem["ctx"]["error"])
        case "tuple_type":
            return f'field "{name}" must be a list of strings, not {_kind(value)}'
        case _:
            return f'field "{name}" must hold strings, not {_kind(value)}'
