"""From measurements to what an audit says: the findings, `verdict.json` and the tidy evidence."""

import json
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from typing import Any

import pandas as pd
import xarray as xr

from lethescope.analyses.patch import erased_share
from lethescope.analyses.residue import residue
from lethescope.analyses.verdict import MARGIN, Damage, Finding, adjust, damage, decide
from lethescope.channel import Channel
from lethescope.facts import Facts, facts_hash, of_split, split_counts
from lethescope.measurement import value
from lethescope.statistics import Interval
from lethescope.subjects.planted import PLANTED

VERSION = version("lethescope")
NEVER_TRIED = (
    "optimised prompts (soft tokens, adversarial suffixes)",
    "sampling many answers",
    "retraining on the forget facts themselves",
    "steering and sparse features",
    "other languages and answer styles",
)
"""Ways to bring knowledge back that this version has no channel for; every verdict names them."""

UNKNOWN = Interval(float("nan"), float("nan"), float("nan"))
"""The residue of a copy that could not be planted."""

Measured = Mapping[tuple[str, str], xr.Dataset]


def findings(chosen: Sequence[Channel], seed: int, measured: Measured) -> dict[str, Finding]:
    """Take every channel's residue, of the unlearned model and of the planted copies, and correct the p-values."""
    roles = {role for _, role in measured}
    referenced = any(role.startswith("reference") for role in roles)
    grounded = {channel.name: referenced or not channel.needs_reference for channel in chosen}
    found, copies, seconds = {}, {}, {}
    for name in (channel.name for channel in chosen):
        mine = {role: measured[name, role] for role in sorted(roles)}
        found[name] = residue(mine, seed=seed, channels=sum(grounded.values()))
        copies[name] = {
            kind: residue(mine, role=f"planted-{kind}", seed=seed).residue if f"planted-{kind}" in mine else UNKNOWN
            for kind in PLANTED
        }
        seconds[name] = round(sum(float(ds.attrs["seconds"]) for ds in mine.values()), 3)
    tested = {name: r.testable and grounded[name] for name, r in found.items()}
    adjusted = adjust({name: r.p_value if tested[name] else float("nan") for name, r in found.items()})
    floor = 0.0 if referenced else MARGIN
    return {n: Finding(n, found[n], copies[n], adjusted[n], seconds[n], grounded[n], floor) for n in found}


def summarise(
    models: Mapping[str, Mapping[str, Any]],
    facts: Facts,
    found: Mapping[str, Finding],
    measured: Measured,
    *,
    not_run: Sequence[str],
    budget: str,
    seed: int,
) -> dict[str, Any]:
    """Return what `verdict.json` holds: the verdict with everything it rests on."""
    hurt = damage({role: measured["say", role] for role in ("original", "unlearned")}, seed)
    forget = of_split(facts, "forget")
    decision = decide(found, hurt, len(forget), len({f.subject for f in forget}))
    return {
        "schema": 1,
        "verdict": decision.word,
        "residue": found[decision.residue_of].residue.residue.as_dict(),
        "residue_of": decision.residue_of,
        "decided_by": decision.by,
        "margin": MARGIN,
        "reason": decision.reason,
        "channels": [_channel(f, measured) for f in found.values()],
        "damage": _damage(hurt),
        "facts": {**split_counts(facts), "hash": facts_hash(facts)},
        "models": {role: dict(described) for role, described in models.items()},
        "not_tried": [*not_run, *NEVER_TRIED],
        "budget": budget,
        "seed": seed,
        "version": VERSION,
    }


def as_json(summary: Mapping[str, Any]) -> str:
    """Return the text of `verdict.json`."""
    return json.dumps(summary, indent=2, ensure_ascii=False, allow_nan=False) + "\n"


def evidence(found: Mapping[str, Finding], facts: Facts, measured: Measured) -> pd.DataFrame:
    """Return tidy rows (fact, subject, split, channel, role, value, null, residue), each at the place it was read.

    Retain and control facts have rows from *say* only: there they show the damage and the null, fact by fact.
    """
    by_id = {f.id: f for f in facts}
    parts = [f.residue.rows.assign(channel=name) for name, f in found.items()]
    for role in ("original", "unlearned"):
        said = value(measured["say", role]).isel(place=0)
        rest = said.where(said["split"] != "forget", drop=True)
        parts.append(pd.DataFrame({"fact": rest["fact"].values, "value": rest.values, "role": role, "channel": "say"}))
    table = pd.concat([part for part in parts if len(part)], ignore_index=True)
    table["subject"] = [by_id[i].subject for i in table["fact"]]
    table["split"] = [by_id[i].split for i in table["fact"]]
    columns = ["fact", "subject", "split", "channel", "role", "value", "null", "residue"]
    return table.reindex(columns=columns).round(6)  # where no channel is testable, nothing has a null or a residue


def _channel(finding: Finding, measured: Measured) -> dict[str, Any]:
    found = finding.residue
    entry = {
        "name": finding.name,
        "residue": found.residue.as_dict(),
        "simultaneous": found.simultaneous.as_dict(),
        "null": found.null,
        "planted": {kind: seen.as_dict()["estimate"] for kind, seen in finding.planted.items()},
        "planted_low": {kind: seen.as_dict()["low"] for kind, seen in finding.planted.items()},
        "blind": finding.blind,
        "testable": found.testable,
        "grounded": finding.grounded,
        "votes": finding.votes,
        "p_value": _number(finding.p_adjusted),
        "n_facts": found.n_facts,
        "original": found.original.as_dict(),
        "places": list(found.places),
        "seconds": finding.seconds,
        "note": _note(finding),
    }
    return entry | (_depth_score(measured) if finding.name == "patch" else {})


def _note(finding: Finding) -> str:
    if not finding.residue.testable:
        return "the original itself shows too little above the null here"
    return "" if finding.grounded else "without a reference its null is too low; it neither decides nor votes"


def _depth_score(measured: Measured) -> dict[str, Any]:
    """Unlearning Depth Score of the unlearned model: against the reference if there is one, else against our null."""
    original, unlearned = measured["patch", "original"], measured["patch", "unlearned"]
    reference = measured.get(("patch", "reference-0"))
    null = original["null_score"] if reference is None else reference["score"]
    score = erased_share(original, unlearned, null)["depth_score"].mean().item()
    against = "control subjects" if reference is None else "reference-0"
    return {"unlearning_depth_score": _number(score), "unlearning_depth_null": against}


def _damage(hurt: Damage) -> dict[str, Any]:
    kept = hurt.kept.as_dict()
    return {
        "retain_before": _number(hurt.before),
        "retain_after": _number(hurt.after),
        "ratio": kept["estimate"],
        "low": kept["low"],
        "high": kept["high"],
        "damaged": hurt.damaged,
    }


def _number(x: float) -> float | None:
    return None if x != x else round(float(x), 6)
