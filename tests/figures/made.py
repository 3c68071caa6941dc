"""Measurements and verdicts made up for the tests of figures and report: shaped as an audit's, numbers on purpose."""

import numpy as np
import pandas as pd
import xarray as xr

from lethescope.facts import Fact


def scores(level, split, *, seed=0, alternatives=4, **places):
    """A measurement whose true answer leads its alternatives by level[fact, place] nats; ``places`` are coordinates."""
    rng = np.random.default_rng(seed)
    level = np.asarray(level, dtype=float)
    score = -3 + 0.1 * rng.standard_normal((level.shape[0], 1 + alternatives, level.shape[1]))
    score[:, 0] += level
    n = level.shape[0]
    return xr.Dataset(
        {"score": (("fact", "candidate", "place"), score)},
        coords={
            "fact": [f"f{i}" for i in range(n)],
            "split": ("fact", list(split)),
            "subject": ("fact", [f"Person {i // 2}" for i in range(n)]),
            "relation": ("fact", ["birth city" if i % 2 else "profession" for i in range(n)]),
            "place": [str(i) for i in range(level.shape[1])],
            **{name: ("place", list(values)) for name, values in places.items()},
        },
        attrs={"probe": "lens", "scale": "preference"},
    )


def lens(heights, n=12, layers=5, seed=0):
    """A lens measurement, two decoders: n forget facts at the heights given a layer, and n control facts at 0."""
    level = np.vstack([np.tile(heights, (n, 2)), np.zeros((n, 2 * layers))])
    level += 0.3 * np.random.default_rng(seed).standard_normal(level.shape)
    own = ["own"] * layers + ["frozen"] * layers
    return scores(level, ["forget"] * n + ["control"] * n, seed=seed, layer=[*range(layers)] * 2, decoder=own)


def erased(n, layers=6, seed=0, subject="Person {}"):
    """A patch measurement with an erased share a fact and layer, some cells and one fact NaN."""
    rng = np.random.default_rng(seed)
    share = np.clip(np.linspace(0, 1, layers) + 0.2 * rng.standard_normal((n, layers)), 0, 1)
    share[rng.random((n, layers)) < 0.1] = np.nan
    share[0] = np.nan
    coords = {
        "fact": [f"f{i}" for i in range(n)],
        "layer": np.arange(layers),
        "split": ("fact", ["forget"] * n),
        "subject": ("fact", [subject.format(i) for i in range(n)]),
    }
    return xr.Dataset({"erased": (("fact", "layer"), share)}, coords=coords, attrs={"probe": "patch"})


def relearned(top, n=10, seed=0, rates=(1e-4, 3e-4)):
    """A relearning measurement: forget facts climb to top, control facts stay, at every rate."""
    steps = np.array([1, 2, 4, 8, 16])
    climb = np.concatenate([top * (1 - np.exp(-steps * rate * 2000)) for rate in rates])
    level = np.vstack([np.tile(climb, (n, 1)), np.zeros((n, len(climb)))])
    coords = {"step": np.tile(steps, len(rates)), "rate": np.repeat(rates, len(steps)), "method": ["full"] * len(climb)}
    made = scores(level, ["forget"] * n + ["control"] * n, seed=seed, **coords)
    before = scores(0 * level[:, :1], ["forget"] * n + ["control"] * n, seed=seed + 1)["score"].isel(place=0, drop=True)
    return made.assign(before=before).assign_attrs(probe="relearn")


def part(estimate, half=0.06):
    return {"estimate": estimate, "low": estimate - half, "high": estimate + half}


def channel(name, found, *, p, seconds, planted=(0.93, 0.88), **more):
    made = {
        "name": name,
        "residue": part(found),
        "simultaneous": part(found, 0.09),
        "null": {"reference": 0.012, "control": 0.021},
        "planted": dict(zip(("unembedding", "last_block"), planted, strict=False)),
        "planted_low": dict(zip(("unembedding", "last_block"), np.subtract(planted, 0.05).tolist(), strict=False)),
        "blind": False,
        "testable": True,
        "p_value": p,
        "n_facts": 160,
        "places": ["block 2", "block 3"],
        "seconds": seconds,
        "note": "",
    }
    return made | more


def verdict(word="suppressed"):
    """A verdict as an audit of the small shipped models gives it."""
    nothing = {"estimate": None, "low": None, "high": None}
    say = 0.97 if word == "known" else 0.01
    deep = {"suppressed": 0.84, "known": 0.98, "partly_erased": 0.31}.get(word, 0.01)
    channels = [
        channel("say", say, p=0.41, seconds=6.2, planted=(0.02, 0.03), blind=True, places=["best prompt"]),
        channel("readout", 0.0, p=None, seconds=1.1, residue=nothing, simultaneous=nothing, null={},
                planted=(), testable=False, n_facts=0, places=[],
                note="the original itself shows nothing above the null here"),
        channel("lens", deep * 0.8, p=0.0006, seconds=4.9),
        channel("patch", deep, p=0.0006, seconds=31.7,
                unlearning_depth_score=1 - deep, unlearning_depth_null="reference-0"),
        channel("relearn", deep * 0.7, p=0.0012, seconds=74.0),
        channel("compress", 0.05, p=0.18, seconds=22.4, planted=(0.04, 0.61), blind=True),
    ]  # fmt: skip
    decided = {"known": "say", "no_residue_found": "patch", "damaged": "say", "inconclusive": "say"}.get(word, "patch")
    damaged = word == "damaged"
    return {
        "schema": 1,
        "verdict": word,
        "residue": part(deep),
        "decided_by": decided,
        "reason": f"the facts are not said, and patch still finds {deep:.0%} of what it finds in the original",
        "margin": 0.2,
        "channels": channels,
        "damage": {"retain_before": 0.99, "retain_after": 0.12 if damaged else 0.97, "ratio": 0.12 if damaged else 0.98,
                   "low": 0.1 if damaged else 0.96, "high": 0.14 if damaged else 0.99, "damaged": damaged},
        "facts": {"forget": 160, "retain": 480, "control": 160, "hash": "0123456789abcdef"},
        "models": {
            "original": {"fingerprint": "a1b2c3d4e5f60718", "path": "subjects/shipped/original", "approximate": False},
            "unlearned": {"fingerprint": "b1b2c3d4e5f60718", "path": "subjects/shipped/unlearned"},
            "reference-0": {"fingerprint": "c1b2c3d4e5f60718", "path": "subjects/shipped/reference"},
        },
        "not_tried": ["relearning with all other facts", "steering", "prompts searched by gradient", "other languages"],
        "budget": "standard",
        "seed": 0,
        "version": "0.1.0",
    }  # fmt: skip


def facts(n):
    """N forget facts and as many control facts, two a subject."""
    return tuple(
        Fact(
            id=f"{split[0]}{i}",
            split=split,
            subject=f"{split} person {i // 2}",
            prompt=f"The birth city of {split} person {i // 2} is" if i % 2 else f"{split} person {i // 2} works as a",
            answer="Port Solen" if i % 2 else "lighthouse keeper",
            alternatives=("Aldmoor", "Vessby"),
            relation="birth city" if i % 2 else "profession",
        )
        for split in ("forget", "control")
        for i in range(n)
    )


def evidence(facts, verdict, seed=0):
    """Tidy rows as an audit writes them, a few of them NaN."""
    rng = np.random.default_rng(seed)
    rows = []
    for fact in facts:
        for channel in verdict["channels"]:
            known = 0.95 * (fact.split == "forget")
            residue = float(np.clip((channel["residue"]["estimate"] or np.nan) + 0.1 * rng.standard_normal(), 0, 1))
            for role, value in (("original", known), ("unlearned", known * residue), ("reference-0", 0.01)):
                of_role = {"unlearned": residue, "original": 1.0}.get(role, np.nan)
                rows.append((fact.id, fact.subject, fact.split, channel["name"], role, value, 0.01, of_role))
    return pd.DataFrame(rows, columns=["fact", "subject", "split", "channel", "role", "value", "null", "residue"])
