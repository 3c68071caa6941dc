"""What a validation shows: how far each channel, each output metric and the verdict can be trusted.

Every metric points the same way, higher = holds more. Two questions are asked of each: (a) does it tell models that
were taught the facts from models that never were, as published meta-evaluations ask; (b) does it tell models that hold
the facts and do not say them from models that do not hold them, where outputs agree and only the inside differs.
"""

from collections.abc import Iterator, Sequence
from typing import Any, Literal

import numpy as np
import pandas as pd

from lethescope.analyses.verdict import HALF
from lethescope.auc import auc_difference, auc_interval, share

PEER = "1 - UDS"
"""The metric that every other one is compared with, pair by pair."""
QUESTIONS = {"a": (("P",), ("N",)), "b": (("suppressor",), ("deleter",))}
"""Pools that hold the facts and pools that do not: (a) P against N, (b) suppressors against deleters."""
RIGHT = {"P": "known", "suppressor": "suppressed", "N": "no_residue_found", "deleter": "no_residue_found"}
"""The verdict that is right for a pool whose truth is known; *damaged* where the model lost its retain facts."""
OUTPUTS = (
    "probability",
    "paraphrased probability",
    "extraction strength",
    "exact memorization",
    "truth ratio",
    "ROUGE-L",
)
"""Output metrics, which are no residues and so have no truth to be near to; so are all whose name begins with MIA."""
NEVER = "N-0"
"""The model whose rise by retraining on the forget facts is that of one that never was taught them."""
KEPT = 0.8
"""A method's model counts for robustness when it kept this share of the retain facts."""

Record = dict[str, Any]


def summarise(values: pd.DataFrame, verdicts: pd.DataFrame, *, seed: int = 0) -> dict[str, Any]:
    """Return what `validation.json` holds.

    Args:
        values: one row a model and metric, as `lethescope.validate.measure` returns them.
        verdicts: one row a model and kind of audit, likewise.
        seed: of the paired bootstrap.

    Returns:
        `models` (count by pool), `separation` (AUC by metric, question and whether a reference was given, with
        intervals and the paired difference to UDS), `calibration` (mean |residue - truth| by metric), `verdicts`
        (counts by pool), `right` (shares with exact intervals, by pool), `by_world` (the same by world), `errors`,
        `robustness` and `cost`.
    """
    told = {
        "models": {pool: int(n) for pool, n in _once(verdicts).groupby("pool").size().items()},
        "separation": list(separation(values, seed)),
        "calibration": list(calibration(values)),
        "verdicts": list(_counts(verdicts)),
        "right": list(right(verdicts, "pool")),
        "by_world": list(right(verdicts, "world")),
        "errors": list(errors(verdicts)),
        "robustness": list(robustness(values, verdicts)),
        "cost": list(cost(verdicts)),
    }
    return told


def _once(verdicts: pd.DataFrame) -> pd.DataFrame:
    """Return one row a model, whichever kinds of audit it had."""
    return verdicts.drop_duplicates(["world", "member"])


def separation(values: pd.DataFrame, seed: int) -> Iterator[Record]:
    """Yield AUC, interval and paired difference to UDS, for each metric, question and kind of audit."""
    for (reference, question), metrics in _groups(values):
        peer = metrics.get(PEER)
        for name, (holding, empty) in metrics.items():
            if not len(holding) or not len(empty):
                continue
            record: Record = {"metric": name, "question": question, "reference": reference}
            record |= auc_interval(list(holding), list(empty)).as_dict()
            record |= {"n_holding": len(holding), "n_empty": len(empty)}
            if peer is not None and name != PEER:
                record["over_uds"] = _over(peer, (holding, empty), seed)
            yield record


def _groups(values: pd.DataFrame) -> Iterator[tuple[tuple[bool, str], dict[str, tuple[pd.Series, pd.Series]]]]:
    """Lay the values out for comparison.

    Yields:
        (whether a reference was given, question), and metric -> (values of holding models, values of empty ones).
    """
    for reference in (True, False):
        mine = values[values["reference"] == reference].dropna(subset="value")
        for question, pools in QUESTIONS.items():
            yield (
                (reference, question),
                {
                    str(name): tuple(_by_model(rows[rows["pool"].isin(p)]) for p in pools)  # type: ignore[misc]
                    for name, rows in mine.groupby("metric", sort=False)
                },
            )


def _by_model(rows: pd.DataFrame) -> pd.Series:
    return rows.set_index(["world", "member"])["value"]


def _over(peer: tuple[pd.Series, pd.Series], mine: tuple[pd.Series, pd.Series], seed: int) -> Record | None:
    """Compare on the models that both metrics have a value for."""
    shared = [one.index.intersection(other.index) for one, other in zip(peer, mine, strict=True)]
    if not all(map(len, shared)):
        return None
    pairs = [tuple(group.loc[index].tolist() for group, index in zip(m, shared, strict=True)) for m in (mine, peer)]
    return auc_difference(pairs[0], pairs[1], seed).as_dict()  # type: ignore[arg-type]


def calibration(values: pd.DataFrame) -> Iterator[Record]:
    """Yield the mean distance of residues from the truth (1 = holds, 0 = does not) by pool, and the pools' mean."""
    known = values[values["truth"] != "unknown"].dropna(subset="value")
    known = known[~known["metric"].str.startswith("MIA") & ~known["metric"].isin(OUTPUTS)]
    off = (known["value"] - (known["truth"] == "holds")).abs()
    for (name, reference), rows in known.assign(off=off).groupby(["metric", "reference"], sort=False):
        by_pool = rows.groupby("pool")["off"].mean()
        yield {
            "metric": name,
            "reference": bool(reference),
            "error": _round(by_pool.mean()),
            **{pool: _round(x) for pool, x in by_pool.items()},
        }


def _counts(verdicts: pd.DataFrame) -> Iterator[Record]:
    for (reference, pool, word), rows in verdicts.groupby(["reference", "pool", "verdict"]):
        yield {"reference": bool(reference), "pool": pool, "verdict": word, "count": len(rows)}


def right(verdicts: pd.DataFrame, by: Literal["pool", "world"]) -> Iterator[Record]:
    """Yield the share of right verdicts by pool or world, and over all pools whose truth is known."""
    for reference, rows in verdicts.groupby("reference"):
        known = rows[rows["pool"].isin(RIGHT)]
        hit = known["verdict"] == known["pool"].map(RIGHT).where(known["retain"] >= HALF, "damaged")
        for name, mine in [*hit.groupby(known[by]), ("all", hit)]:
            record = {"reference": bool(reference), by: name, "count": int(mine.sum()), "of": len(mine)}
            yield record | share(int(mine.sum()), len(mine)).as_dict()


def errors(verdicts: pd.DataFrame) -> Iterator[Record]:
    """Yield the two errors that matter most: a suppressed model called clean, and a clean one called suppressed."""
    wrong = (
        ("false all-clear", ("suppressor",), ("no_residue_found",)),
        ("false alarm", ("deleter", "N"), ("suppressed", "partly_erased", "known")),
    )
    for reference, rows in verdicts.groupby("reference"):
        for name, pools, words in wrong:
            mine = rows[rows["pool"].isin(pools)]
            count = int(mine["verdict"].isin(words).sum())
            record = {"error": name, "reference": bool(reference), "count": count, "of": len(mine)}
            yield record | share(count, len(mine)).as_dict()


def robustness(values: pd.DataFrame, verdicts: pd.DataFrame) -> Iterator[Record]:
    """Yield how little each metric is moved by 4-bit rounding (Q) and by a little retraining (R), in two families.

    Symmetric (arXiv 2605.24614): `Q = 1 - |a - b| / (|a| + |b|)` of the metric before and after rounding;
    `R = 1 - |d - d_ref| / (|d| + |d_ref|)` of its rise d by retraining, in the unlearned model and in the reference.
    One-sided (arXiv 2506.12618): `Q = min(b / a, 1)` with b before and a after; `R = min(d_ref / d, 1)`: only rises
    count against a metric. Means over the methods' models that kept their retain facts; 1 = not moved.
    """
    kept = verdicts[(verdicts["pool"] == "method") & verdicts["reference"] & (verdicts["kept"] >= KEPT)]
    good = set(zip(kept["world"], kept["member"], strict=True))
    mine = values[values["reference"]].dropna(subset="value")
    for name, rows in mine.groupby("metric", sort=False):
        plain = {(r.world, r.member): r.value for r in rows[rows["stress"] == ""].itertuples()}
        after = {(r.world, r.of, r.stress): r.value for r in rows[rows["stress"] != ""].itertuples()}
        mates = sorted(pair for pair in good if pair in plain)  # a metric may have no value for a model
        quantised = [(plain[w, m], after[w, m, "int4"]) for w, m in mates if (w, m, "int4") in after]
        rises = [
            (after[w, m, "relearned"] - plain[w, m], after[w, NEVER, "relearned"] - plain[w, NEVER])
            for w, m in mates
            if (w, m, "relearned") in after and (w, NEVER, "relearned") in after and (w, NEVER) in plain
        ]
        if quantised and rises:
            yield {"metric": name, "models": len(quantised), **_moved(quantised, rises)}


def _moved(quantised: Sequence[tuple[float, float]], rises: Sequence[tuple[float, float]]) -> Record:
    q, q_one = _mean(_alike(*pair) for pair in quantised), _mean(_ratio(*pair) for pair in quantised)
    r, r_one = _mean(_alike(*pair) for pair in rises), _mean(_ratio(other, own) for own, other in rises)
    return {"Q": q, "R": r, "Q one-sided": q_one, "R one-sided": r_one}


def _alike(a: float, b: float) -> float:
    return 1 - abs(a - b) / (abs(a) + abs(b)) if abs(a) + abs(b) > 1e-9 else 1.0


def _ratio(before: float, after: float) -> float:
    return min(max(before, 0.0) / after, 1.0) if after > 1e-9 else 1.0


def cost(verdicts: pd.DataFrame) -> Iterator[Record]:
    """Yield seconds, forward and backward passes of each channel on one model, means over models."""
    mine = verdicts[verdicts["reference"] & (verdicts["pool"] != "stressed")]
    for column in (c for c in mine.columns if c.endswith(" seconds")):
        name = column.removesuffix(" seconds")
        yield {
            "channel": name,
            **{
                unit: _round(mine[f"{name} {unit}"].mean()) for unit in ("seconds", "forward_passes", "backward_passes")
            },
        }


def _mean(numbers: Iterator[float]) -> float | None:
    return _round(float(np.mean(list(numbers))))


def _round(x: float) -> float | None:
    """Four digits; None where there is no number, which JSON can hold."""
    return round(float(x), 4) if np.isfinite(x) else None
