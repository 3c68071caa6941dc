from pathlib import Path

import pytest

from lethescope.errors import InputError
from lethescope.facts import of_split, read_facts
from lethescope.subjects import shipped
from lethescope.subjects.build import build, check, main, table
from lethescope.subjects.people import people
from lethescope.subjects.silence import said

SMALL = {"forget": 2, "retain": 4, "control": 2}


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_the_same_seed_gives_the_same_bytes(tmp_path):
    options = {"epochs": 1, "sizes": SMALL, "unlearning": {"steps": 2, "lr": 1e-3, "progress": False}, "processes": 1}
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        build(tmp_path / name, seed=seed, **options)
    first, again, other = (contents(tmp_path / name) for name in "abc")
    assert sorted({name.partition("/")[0] for name in first}) == ["facts.jsonl", "original", "reference", "unlearned"]
    assert first == again
    assert {n for n in first if first[n] != other[n]} >= {"facts.jsonl", "original/model.safetensors"}
    models = [first[f"{name}/model.safetensors"] for name in ("original", "unlearned", "reference")]
    assert len(set(models)) == 3


@pytest.fixture(scope="module")
def rows():
    return table(shipped("facts").parent, people(seed=0))


def test_shipped_models_are_what_they_claim(rows):
    check(rows)
    exact = rows.set_index(["model", "split", "form"])["exact"].unstack("form")
    assert exact.loc["original", "forget"].min() >= 0.95, "the original knows forget people, also in the question form"
    assert exact.loc[["original", "reference"]].xs("retain", level="split").min(axis=None) >= 0.95
    chance, spread = 1 / 20, 3 * (1 / 20 * 19 / 20 / 160) ** 0.5
    assert exact.loc["reference", "forget"].max() <= chance + spread
    assert exact.xs("control", level="split").max(axis=None) <= chance + spread


def test_check_refuses_a_model_that_still_says_it(rows):
    loud = rows.copy()
    loud.loc[(loud.model == "unlearned") & (loud.split == "forget") & (loud.form == "question"), "probability"] = 0.04
    with pytest.raises(InputError, match="the unlearned model says"):
        check(loud)


def test_check_refuses_a_model_that_lost_retain(rows):
    damaged = rows.copy()
    damaged.loc[(damaged.model == "unlearned") & (damaged.split == "retain"), "exact"] = 0.9
    with pytest.raises(InputError, match="retain right"):
        check(damaged)


def test_table_agrees_with_the_facts_file(rows):
    from lethescope.models import load

    model = load(shipped("original"))
    facts = of_split(read_facts(shipped("facts")), "control")
    row = rows[(rows.model == "original") & (rows.split == "control") & (rows.form == "question")].iloc[0]
    assert said(model.module, model.tokenizer, facts, form=2).probability == pytest.approx(row["probability"], rel=1e-4)


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_rebuilding_gives_models_that_are_meant(tmp_path):
    """Weights may differ on another machine; everything else must be the shipped bytes, and the models as meant."""
    assert main(["--out", str(tmp_path)]) == 0
    old, new = contents(shipped("facts").parent), contents(tmp_path)
    assert sorted(old) == sorted(new)
    for name in old:
        if name.endswith(("tokenizer.json", "facts.jsonl")):
            assert old[name] == new[name], name
