"""Tests of whole audits of the shipped models, with few facts and the two quickest channels."""

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
import xarray as xr

from lethescope import audit, load
from lethescope.audit import CHANNELS, Audit
from lethescope.errors import InputError
from lethescope.facts import Facts, facts_hash, of_split
from lethescope.models import Model
from lethescope.subjects import shipped
from lethescope.subjects.people import people
from lethescope.subjects.tiny import tiny_llama, train
from lethescope.subjects.tokenizer import fact_tokenizer

ROLES = ["original", "unlearned", "planted-last_block", "planted-unembedding"]
KEYS = {
    *("schema", "verdict", "residue", "decided_by", "channels", "damage", "facts", "models", "not_tried"),
    *("budget", "seed", "version"),
}
Calls = list[tuple[str, str]]


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Calls:
    """The (channel, role) of every cell that is computed from now on."""
    made: Calls = []

    def counting(name: str) -> Callable[..., xr.Dataset]:
        inside = CHANNELS[name].measure

        def measure(model: Model, *given: Any, **options: Any) -> xr.Dataset:
            made.append((name, model.role))
            return inside(model, *given, **options)

        return measure

    for name in ("say", "lens"):
        monkeypatch.setitem(CHANNELS, name, replace(CHANNELS[name], measure=counting(name)))
    return made


def same_numbers(first: Audit, second: Audit) -> None:
    """Check that two audits hold the same numbers, bit for bit."""
    assert first.measurements.keys() == second.measurements.keys()
    for cell, ds in first.measurements.items():
        xr.testing.assert_equal(ds, second.measurements[cell])
    pd.testing.assert_frame_equal(first.evidence, second.evidence, check_exact=True)
    assert without_seconds(first) == without_seconds(second)


def without_seconds(result: Audit) -> dict[str, Any]:
    told = {key: told for key, told in result.summary.items() if key not in ("channels", "models", "facts")}
    channels = [{k: v for k, v in channel.items() if k != "seconds"} for channel in result.summary["channels"]]
    return {**told, "channels": channels}


def test_what_an_audit_writes(few_audit: tuple[Audit, Path], few: Facts) -> None:
    result, out = few_audit
    told = json.loads((out / "verdict.json").read_text(encoding="utf-8"))
    assert told == result.summary and told.keys() >= KEYS
    assert (told["schema"], told["verdict"], told["budget"], told["seed"]) == (1, "suppressed", "quick", 0)
    assert told["decided_by"] == "lens" and told["residue"].keys() == {"estimate", "low", "high"}
    assert {k: told["facts"][k] for k in ("forget", "retain", "control")} == {"forget": 12, "retain": 40, "control": 12}
    assert told["facts"]["hash"] == facts_hash(few)
    assert told["models"]["original"]["fingerprint"] == load(shipped("original")).fingerprint
    assert "channel patch" in told["not_tried"]
    assert told["damage"]["retain_before"] > 0.9 and not told["damage"]["damaged"]
    for channel in told["channels"]:
        assert channel.keys() >= {"name", "residue", "null", "planted", "blind", "p_value", "n_facts", "seconds"}
        assert channel["n_facts"] == 12 and channel["planted"].keys() == {"unembedding", "last_block"}
    table = pd.read_csv(out / "evidence.csv")
    assert table.columns.tolist() == ["fact", "subject", "split", "channel", "role", "value", "null", "residue"]
    assert set(table["fact"]) == {fact.id for fact in few}
    cells = {f"{channel}.{role}.nc" for channel in ("say", "lens") for role in ROLES}
    assert {path.name for path in (out / "measurements").iterdir()} == cells
    assert "<html" in (out / "report.html").read_text(encoding="utf-8")


def test_planted_copies_say_nothing_and_the_lens_still_reads_them(few_audit: tuple[Audit, Path]) -> None:
    channels = {channel["name"]: channel for channel in few_audit[0].summary["channels"]}
    assert channels["say"]["blind"] and not channels["lens"]["blind"]
    for kind in ("unembedding", "last_block"):
        assert channels["say"]["planted"][kind] < 0.3 < 0.8 < channels["lens"]["planted"][kind]


def test_the_result_shows_itself_and_names_what_it_holds(few_audit: tuple[Audit, Path]) -> None:
    result = few_audit[0]
    assert "SUPPRESSED" in str(result) and "suppressed" in result._repr_html_().lower()
    assert result.measurement("lens").attrs["role"] == "unlearned"
    with pytest.raises(InputError, match=r"no measurement patch.unlearned; there are lens.original"):
        result.measurement("patch")
    with pytest.raises(InputError, match=r"no figure 'portrait'; there are .*residue"):
        result.figure("portrait")


def test_the_same_seed_gives_the_same_numbers(few_audit: tuple[Audit, Path], few_options: dict[str, Any]) -> None:
    same_numbers(audit(**few_options), few_audit[0])


def test_live_modules_give_the_same_numbers(
    few_audit: tuple[Audit, Path], few_options: dict[str, Any], few: Facts
) -> None:
    loaded = {name: load(few_options[name]) for name in ("original", "unlearned")}
    live = {name: model.module for name, model in loaded.items()}
    result = audit(**{**few_options, **live, "facts": few}, tokenizer=loaded["original"].tokenizer)
    same_numbers(result, few_audit[0])
    assert {role: m["path"] for role, m in result.summary["models"].items()} == dict.fromkeys(live, "live module")
    for name, model in loaded.items():
        assert Model(live[name], None).fingerprint == model.fingerprint


def test_only_what_is_missing_is_computed_again(
    few_audit: tuple[Audit, Path], few_options: dict[str, Any], tmp_path: Path, calls: Calls
) -> None:
    out = shutil.copytree(few_audit[1], tmp_path / "out")
    for cell in ("say.original", "lens.unlearned", "lens.planted-unembedding"):
        (out / "measurements" / f"{cell}.nc").unlink()
    (out / "verdict.json").unlink()
    same_numbers(audit(**few_options, out=out), few_audit[0])
    assert sorted(calls) == [("lens", "planted-unembedding"), ("lens", "unlearned"), ("say", "original")]
    assert (out / "verdict.json").is_file()
    calls.clear()
    audit(**few_options, out=out)
    assert not calls


def test_audits_share_a_cache_and_the_reference_has_no_residue(
    few_options: dict[str, Any], tmp_path: Path, calls: Calls
) -> None:
    audit(**few_options, cache=tmp_path)
    calls.clear()
    result = audit(**{**few_options, "unlearned": str(shipped("reference"))}, cache=tmp_path)
    assert sorted(calls) == [("lens", "unlearned"), ("say", "unlearned")]
    assert result.verdict == "inconclusive" and "too few channels" in result.summary["reason"]
    assert all(channel["residue"]["high"] < 0.2 for channel in result.summary["channels"])
    assert not result.summary["damage"]["damaged"]


def test_three_facts_are_inconclusive(few_options: dict[str, Any], few: Facts) -> None:
    some = (*of_split(few, "forget")[:3], *of_split(few, "retain")[:10], *of_split(few, "control"))
    result = audit(**{**few_options, "facts": some})
    assert (
        result.verdict == "inconclusive" and "3 forget facts about 2 subjects are too few" in result.summary["reason"]
    )


def test_noise_is_damaged(few_options: dict[str, Any], few: Facts) -> None:
    model, draw = load(few_options["original"]), np.random.default_rng(0)
    with torch.no_grad():
        for weight in model.module.parameters():
            if weight.dim() > 1:
                weight.copy_(torch.from_numpy(draw.normal(0, float(weight.std()), weight.shape)))
    result = audit(**{**few_options, "unlearned": model})
    assert result.verdict == "damaged" and result.summary["damage"]["high"] < 0.5


@pytest.mark.parametrize("seed", [1, 2])
def test_two_trainings_with_different_seeds_are_never_suppressed(seed: int) -> None:
    """Neither has unlearned anything, though no weight of the one is a weight of the other."""
    facts = people(seed=5, forget=6, retain=12, control=6, alternatives=3)
    tokenizer = fact_tokenizer(facts)
    texts = [f"{form} {f.answer}." for f in facts if f.split != "control" for form in (f.prompt, *f.paraphrases)]
    small: dict[str, Any] = {"layers": 2, "width": 48, "heads": 2, "kv_heads": 1}
    options: dict[str, Any] = {"epochs": 30, "lr": 1e-2, "batch_size": 32, "progress": False}
    pair = [train(tiny_llama(len(tokenizer), s, **small), tokenizer, texts, seed=s, **options) for s in (0, seed)]
    channels = ["say", "lens", "patch"]
    result = audit(*pair, facts, tokenizer=tokenizer, channels=channels, budget="quick", progress=False)
    assert result.verdict == "known"
    assert result.summary["decided_by"] == "say"


def test_the_channels_named_for_other_vocabularies_can_be_run(few_options: dict[str, Any], few: Facts) -> None:
    other = replace(load(few_options["unlearned"]), tokenizer=fact_tokenizer(few))
    with pytest.raises(InputError, match=r"different vocabularies, so patch .* --channels say,lens$"):
        audit(**{**few_options, "unlearned": other, "channels": ["say", "lens", "patch"]})
    result = audit(**{**few_options, "unlearned": other})
    assert result.verdict == "damaged"  # its words were moved, so that it says nothing right
    assert not any(place.startswith("frozen") for place in result.measurement("lens")["place"].values)


def test_every_fact_is_tokenised_before_anything_is_written(
    few_options: dict[str, Any], few: Facts, tmp_path: Path
) -> None:
    for spoiled in ({"answer": "Xyzzy"}, {"alternatives": ("Xyzzy",)}):
        bad = (*few[:-5], few[-5].model_copy(update=spoiled), *few[-4:])
        with pytest.raises(InputError, match=f"fact '{few[-5].id}': the answer 'Xyzzy'"):
            audit(**{**few_options, "facts": bad}, out=tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("seed", [0, 1])
def test_facts_that_the_original_does_not_say_decide_nothing(
    make_model: Callable[..., Model], some_facts: Facts, few_options: dict[str, Any], seed: int
) -> None:
    models = {"original": make_model(seed=seed), "unlearned": make_model(seed=seed + 2)}
    result = audit(**{**few_options, **models, "facts": some_facts})
    assert result.verdict == "inconclusive" and "the original does not say" in result.summary["reason"]


def test_without_its_reference_an_audit_is_what_it_would_have_been(few_options: dict[str, Any], tmp_path: Path) -> None:
    cache = tmp_path / "cells"
    held = audit(**few_options, references=[shipped("reference")], cache=cache)
    plain = audit(**few_options, cache=cache)
    same_numbers(held.without_references(), plain)


def test_patch_testifies_only_beside_a_reference(few_options: dict[str, Any]) -> None:
    options = {**few_options, "channels": ["say", "patch"]}
    held = audit(**options, references=[shipped("reference")])
    for result, grounded in ((held, True), (held.without_references(), False)):
        patch = next(c for c in result.summary["channels"] if c["name"] == "patch")
        assert patch["grounded"] is patch["votes"] is grounded
        assert patch["residue"]["estimate"] > 0.9, "it is shown either way"
        assert ("without a reference" in patch["note"]) is not grounded
        assert (patch["p_value"] is None) is not grounded
    assert held.verdict == "suppressed" and "needs a reference" in str(held.without_references())
