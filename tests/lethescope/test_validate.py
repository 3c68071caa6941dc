"""Tests of validating on a zoo: output metrics, what is read from a verdict, and a whole validation of a tiny zoo."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lethescope.analyses.validation import OUTPUTS, PEER
from lethescope.audit import Audit
from lethescope.errors import InputError
from lethescope.facts import of_split
from lethescope.subjects import suppressors
from lethescope.subjects.tiny import tiny_llama
from lethescope.subjects.zoo import Member, Zoo, build, worlds
from lethescope.subjects.zoo import recipes as listing
from lethescope.subjects.zoo.recipes import SIZES, Size
from lethescope.subjects.zoo.worlds import World
from lethescope.validate import KNOWN, in_brief, measure, output_metrics, residues, validate


def test_output_metrics_are_means_over_forget_facts(few_audit: tuple[Audit, Path]) -> None:
    result = few_audit[0]
    said = result.measurement("say", "original")
    found = output_metrics(said)
    forget = of_split(result.facts, "forget")
    rows = said.sel(fact=[f.id for f in forget])
    likely = [np.exp(float(rows["log_probability"].sel(fact=f.id, prompt=0, candidate=0))) for f in forget]
    assert found["probability"] == pytest.approx(np.mean(likely))
    others = [
        np.exp(float(rows["log_probability"].sel(fact=f.id, candidate=0).isel(prompt=1 + k)))
        for f in forget
        for k in range(len(f.paraphrases))
    ]
    assert found["paraphrased probability"] == pytest.approx(np.mean(others))
    assert found["exact memorization"] > 0.9 > output_metrics(result.measurement("say"))["exact memorization"]
    assert set(found) == set(OUTPUTS) - {"ROUGE-L"}
    ratio = rows["truth_ratio"].isel(prompt=0).values
    assert found["truth ratio"] == pytest.approx(np.mean(1 / (1 + ratio)))


def test_residues_are_those_of_the_verdict() -> None:
    summary: dict[str, Any] = {
        "residue": {"estimate": 0.7},
        "channels": [
            {"name": "lens", "residue": {"estimate": 0.7}},
            {"name": "readout", "residue": {"estimate": None}},
            {"name": "patch", "residue": {"estimate": 0.4}, "unlearning_depth_score": 0.25},
        ],
    }
    found = residues(summary)
    assert {k: v for k, v in found.items() if k != "readout"} == {
        **{"lens": 0.7, "patch": 0.4, "verdict": 0.7},
        PEER: 0.75,
    }
    assert np.isnan(found["readout"])
    del summary["channels"][2]
    assert np.isnan(residues(summary)[PEER])


def test_a_zoo_without_a_pool_is_refused(tmp_path: Path) -> None:
    here = tmp_path / "x"
    member = Member("P-0", "llama-1", "P", "holds", {}, here, here, here, {"forget": 1.0, "retain": 1.0})
    with pytest.raises(InputError, match="has no finished model of pool N"):
        measure(Zoo(tmp_path, "quick", (member,)), cache=tmp_path)


@pytest.mark.parametrize(
    ("pools", "told"),
    [
        (("P", "Q"), "unknown pool 'Q'; use some of P, N, suppressor"),
        (("P", "N", "deleter"), "pool suppressor is left"),
    ],
)
def test_pools_are_named_rightly_and_the_known_ones_are_all_there(
    tmp_path: Path, pools: tuple[str, ...], told: str
) -> None:
    here = tmp_path / "x"
    members = tuple(Member(f"{p}-0", "llama-1", p, "", {}, here, here, here, {}) for p in KNOWN)
    with pytest.raises(InputError, match=told):
        measure(Zoo(tmp_path, "quick", members), cache=tmp_path, pools=pools)


@pytest.mark.slow
def test_a_tiny_zoo_is_validated_and_the_second_time_is_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    world = World(1, forget=6, retain=16, epochs=60, more=60, lr=5e-3)
    small = {"layers": 3, "width": 64, "heads": 2, "kv_heads": 1}
    size = Size((world,), knowing=1, ignorant=3, strengths=1, method_worlds=1, distilled=1)
    monkeypatch.setitem(SIZES, "tiny", size)
    monkeypatch.setattr(worlds, "tiny_llama", lambda n, seed: tiny_llama(n, seed, **small))
    monkeypatch.setattr(listing, "SUPPRESSORS", {"last_block": suppressors.SUPPRESSORS["last_block"]})
    monkeypatch.setattr(listing, "METHODS", ("graddiff",))
    build(tmp_path / "zoo", size="tiny", processes=1, progress=False)
    page = tmp_path / "docs" / "validation.md"
    told = validate(tmp_path / "zoo", tmp_path / "out", processes=1, page=page, progress=False)
    assert told["models"] == {"P": 1, "N": 3, "suppressor": 1, "deleter": 3, "method": 1, "stressed": 4}
    assert {r["metric"] for r in told["separation"]} >= {"say", "lens", "verdict", PEER, *OUTPUTS, "MIA loss"}
    assert json.loads((tmp_path / "out" / "validation.json").read_text(encoding="utf-8")) == told
    by_pool = {r["pool"]: r for r in told["right"] if r["reference"]}
    assert by_pool["P"]["count"] == 1
    assert not next(r for r in told["errors"] if r["error"] == "false all-clear" and r["reference"])["count"]
    links = [line for line in page.read_text(encoding="utf-8").splitlines() if line.startswith("![")]
    assert links and all((page.parent / line.split("](")[1].rstrip(")")).is_file() for line in links)
    assert "false all-clear" in in_brief(told)
    assert validate(tmp_path / "zoo", tmp_path / "out", processes=1, progress=False) == told
