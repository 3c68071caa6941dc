"""What the tests of whole audits share: a few facts of the shipped people, so that an audit takes seconds."""

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from lethescope import audit, read_facts
from lethescope.audit import Audit
from lethescope.facts import Facts
from lethescope.subjects import shipped

SUBJECTS = {"forget": 6, "control": 6, "retain": 20}


@pytest.fixture(scope="session")
def few() -> Facts:
    """Two facts on each of 6 forget, 6 control and 20 retain people of the shipped models."""
    asked: dict[str, Counter[str]] = {split: Counter() for split in SUBJECTS}
    kept = []
    for fact in read_facts(shipped("facts")):
        seen = asked[fact.split]
        if seen[fact.subject] < 2 and (fact.subject in seen or len(seen) < SUBJECTS[fact.split]):
            seen[fact.subject] += 1
            kept.append(fact)
    return tuple(kept)


@pytest.fixture(scope="session")
def few_file(few: Facts, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`few`, as a facts file."""
    path = tmp_path_factory.mktemp("few") / "facts.jsonl"
    path.write_text("".join(json.dumps(fact.model_dump()) + "\n" for fact in few), encoding="utf-8")
    return path


@pytest.fixture(scope="session")
def few_options(few_file: Path) -> dict[str, Any]:
    """Options of the audit that `few_audit` is."""
    names = ("original", "unlearned")
    chosen = {"channels": ["say", "lens"], "budget": "quick", "progress": False}
    return {**{name: str(shipped(name)) for name in names}, "facts": few_file, **chosen}


@pytest.fixture(scope="session")
def few_audit(few_options: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> tuple[Audit, Path]:
    """An audit of the shipped unlearned model with *say* and *lens* on a few facts, and its folder."""
    out = tmp_path_factory.mktemp("few") / "out"
    return audit(**few_options, out=out), out
