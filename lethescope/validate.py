"""Auditing every model of a zoo whose truth is known: what each channel, each output metric and the verdict say of it.

This file runs the audits and lays their numbers out as two tables; `lethescope.analyses.validation` says what the
tables show.
"""

from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import xarray as xr
from matplotlib.figure import Figure
from tqdm.auto import tqdm

from lethescope import audit, load, runs, validation_page
from lethescope.analyses import validation
from lethescope.auc import auc
from lethescope.audit import Audit
from lethescope.engine import spread
from lethescope.errors import InputError
from lethescope.facts import Facts, facts_hash, of_split
from lethescope.figures import style
from lethescope.figures import validation as figures
from lethescope.figures.residue import brief
from lethescope.models import Model
from lethescope.probes import membership, rouge
from lethescope.subjects.zoo import Member, Zoo, read
from lethescope.summary import VERSION, as_json

KNOWN = ("P", "N", "suppressor", "deleter")
POOLS = (*KNOWN, "method", "stressed")
"""Pools whose truth is known, and all that are audited."""

Row = dict[str, Any]


def validate(
    zoo: str | Path,
    out: str | Path,
    *,
    pools: Sequence[str] = POOLS,
    budget: str = "quick",
    processes: int = 2,
    page: str | Path | None = None,
    progress: bool | None = None,
) -> dict[str, Any]:
    """Audit a zoo and write validation.json, values.csv, verdicts.csv and figures into a folder, and a page if asked.

    What it does not prove: the zoo's models are small and their facts arbitrary; a channel that is right on them may be
    wrong on a large model. A channel that is wrong on them cannot be trusted anywhere.

    Args:
        zoo: folder of a zoo.
        out: folder for the results; a stopped validation goes on from there.
        pools: which models to audit; the four whose truth is known must be among them.
        budget: of the audits.
        processes: how many audits run side by side.
        page: also write the page, its figures beside it.
        progress: show a bar; None shows one on a terminal only.

    Returns:
        What `validation.json` holds (`lethescope.analyses.validation.summarise`).

    Raises:
        InputError: there is no zoo, or it lacks a pool, or the folder cannot be written.
    """
    home, out = read(zoo), Path(out)
    options: dict[str, Any] = {"budget": budget, "processes": processes, "progress": progress}
    values, verdicts = measure(home, cache=out / "cells", pools=pools, **options)
    told = {
        "schema": 1,
        "version": VERSION,
        "zoo": home.size,
        "worlds": sorted({m.world for m in home.members}),
        "budget": budget,
        **validation.summarise(values, verdicts),
    }
    for name, table in (("values", values), ("verdicts", verdicts)):
        runs.write_text(out / f"{name}.csv", table.to_csv(index=False))
    drawn = draw(told, values)
    _save_figures(drawn, out)
    runs.write_text(out / "validation.json", as_json(told))
    if page is not None:
        chosen = f" --pools {','.join(pools)}" if set(pools) < set(POOLS) else ""
        command = f"lethescope zoo build --size {home.size} --out ZOO && lethescope validate --zoo ZOO --out DIR"
        _write_page(Path(page), told, drawn, command + chosen)
    return told


def draw(summary: Mapping[str, Any], values: pd.DataFrame) -> dict[str, Figure]:
    """Return the figures of a validation: separation, verdicts and residues, by name."""
    return {
        "separation": figures.separation(summary),
        "verdicts": figures.verdicts(summary),
        "residues": figures.residues(values),
    }


def in_brief(summary: Mapping[str, Any]) -> str:
    """Return the outcome for a terminal: right verdicts, the two errors that matter, and the best separators."""
    lines = [f"{sum(summary['models'].values())} models of a {summary['zoo']} zoo, budget {summary['budget']}", ""]
    for record in (*summary["right"], *summary["errors"]):
        what = f"{record['pool']} right" if "pool" in record else record["error"]
        lines.append(f"{what:<18} {_with(record):<14} {record['count']:>3} of {record['of']:<4} {brief(record, '-')}")
    lines += ["", "AUC, suppressors against deleters:"]
    inside = [r for r in summary["separation"] if r["question"] == "b"]
    for record in sorted(inside, key=lambda r: -r["estimate"]):
        lines.append(f"{record['metric']:<24} {_with(record):<14} {brief(record, '-')}")
    return "\n".join(lines)


def _with(record: Mapping[str, Any]) -> str:
    return "with reference" if record["reference"] else "without"


def _write_page(page: Path, told: dict[str, Any], drawn: Mapping[str, Figure], command: str) -> None:
    _save_figures(drawn, page.parent / "figures" / "validation")
    links = {name: f"figures/validation/{name}.png" for name in drawn}
    runs.write_text(page, validation_page.render(told, command=command, figures=links))


def _save_figures(drawn: Mapping[str, Figure], folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, figure in drawn.items():
        style.save(figure, folder / f"{name}.png")


def measure(
    zoo: Zoo,
    *,
    cache: str | Path,
    pools: Sequence[str] = POOLS,
    budget: str = "quick",
    processes: int = 2,
    progress: bool | None = None,
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Audit every model of the zoo, with and without its reference, and measure the field's output metrics beside it.

    Args:
        zoo: models whose truth is known.
        cache: folder of finished cells; a stopped validation goes on from there.
        pools: which models to audit.
        budget: of the audits.
        processes: how many audits run side by side.
        progress: show a bar; None shows one on a terminal only.

    Returns:
        `values`, one row a model and metric (world, member, pool, truth, of, stress, reference, metric, value): every
        metric points the same way, *higher = holds more*. `verdicts`, one row a model and kind of audit (world, member,
        pool, truth, reference, retain, verdict, decided_by, residue, kept, seconds and passes by channel); `retain` is
        the share of retain answers that the model gives, looked at when it was made.

    Raises:
        InputError: an unknown pool, or the zoo has no model of a pool that the validation needs.
    """
    members = _chosen(zoo, pools)
    examine = partial(_examine, cache=str(cache), budget=budget)
    first, rest = _one_of_each_original(members)
    hidden = None if progress is None else not progress
    values: list[Row] = []
    verdicts: list[Row] = []
    with tqdm(total=len(members), desc="validate", unit="model", disable=hidden) as bar:
        for group in (first, rest):  # the first fill the cache with what all models of an original share
            for found, told in spread(examine, group, processes):
                values += found
                verdicts += told
                bar.update()
    return pd.DataFrame(values), pd.DataFrame(verdicts)


def _chosen(zoo: Zoo, pools: Sequence[str]) -> tuple[Member, ...]:
    for pool in pools:
        if pool not in POOLS:
            raise InputError(f"unknown pool {pool!r}; use some of {', '.join(POOLS)}")
    for pool in KNOWN:
        if pool not in pools:
            raise InputError(f"pool {pool} is left out; a validation needs {', '.join(KNOWN)}")
        if not zoo.pool(pool):
            raise InputError(f"{zoo.folder} has no finished model of pool {pool}; run lethescope zoo build again")
    return zoo.pool(*pools)


def _one_of_each_original(members: tuple[Member, ...]) -> tuple[list[Member], list[Member]]:
    first = {m.original: m for m in reversed(members) if m.pool != "stressed"}
    chosen = {m.folder for m in first.values()}
    return list(first.values()), [m for m in members if m.folder not in chosen]


def _examine(member: Member, *, cache: str, budget: str) -> tuple[list[Row], list[Row]]:
    names = {
        "world": member.world,
        "member": member.name,
        "pool": member.pool,
        "truth": member.truth,
        "of": member.how.get("of", ""),
        "stress": member.how.get("stress", ""),
    }
    model, reference = load(member.folder, role=member.name), load(member.reference, role="reference")
    held = audit(
        member.original, model, member.facts, references=[reference], budget=budget, cache=cache, progress=False
    )
    values: list[Row] = []
    verdicts: list[Row] = []
    kinds = {True: held} if member.pool == "stressed" else {True: held, False: held.without_references()}
    for with_reference, result in kinds.items():
        here = {**names, "reference": with_reference}
        values += [{**here, "metric": name, "value": value} for name, value in residues(result.summary).items()]
        verdicts.append({**here, "retain": member.said["retain"], **_verdict(result)})
    more = _more_outputs(model, reference, held.facts, Path(cache))
    outputs = {**output_metrics(held.measurement("say")), **more}
    values += [{**names, "reference": True, "metric": name, "value": value} for name, value in outputs.items()]
    return values, verdicts


def residues(summary: Mapping[str, Any]) -> dict[str, float]:
    """Return every channel's residue, the verdict's own, and the Unlearning Depth Score turned round (1 - UDS)."""
    found = {c["name"]: _number(c["residue"]["estimate"]) for c in summary["channels"]}
    depth = next((c.get("unlearning_depth_score") for c in summary["channels"] if c["name"] == "patch"), None)
    return {**found, "verdict": _number(summary["residue"]["estimate"]), "1 - UDS": 1 - _number(depth)}


def output_metrics(said: xr.Dataset) -> dict[str, float]:
    """Return the field's output metrics on the forget facts from a Measurement of *say*, means over facts.

    Probability under the prompt and under the paraphrases, extraction strength, exact memorization, and the truth ratio
    in the form `p_true / (p_true + p_wrong)` of 1 / (1 + TR); higher = more is said.
    """
    forget = said.where(said["split"] == "forget", drop=True)
    prompt = forget.isel(prompt=0)
    likely = xr.ufuncs.exp(forget["log_probability"].isel(candidate=0))
    return {
        "probability": float(likely.isel(prompt=0).mean()),
        "paraphrased probability": float(likely.isel(prompt=slice(1, None)).mean()),
        "extraction strength": float(prompt["extraction_strength"].mean()),
        "exact memorization": float(prompt["exact_memorization"].mean()),
        "truth ratio": float((1 / (1 + prompt["truth_ratio"])).mean()),
    }


def _more_outputs(model: Model, reference: Model, facts: Facts, cache: Path) -> dict[str, float]:
    """ROUGE-L of greedy answers, and how well membership inference tells forget from control facts (AUC)."""
    asked = tuple(f for f in facts if f.split != "retain")
    key = runs.key(outputs=2, models=[m.fingerprint for m in (model, reference)], facts=facts_hash(asked))
    place = cache / f"{key}.json"
    if place.is_file():
        return {name: float(x) for name, x in pd.read_json(place, typ="series").items()}
    found = {**_rouge(model, of_split(facts, "forget")), **_membership(model, reference, asked)}
    runs.write_text(place, pd.Series(found).to_json())
    return found


def _rouge(model: Model, forget: Facts) -> dict[str, float]:
    return {"ROUGE-L": float(rouge.measure(model, forget)["rouge_l_recall"].mean())}


def _membership(model: Model, reference: Model, asked: Facts) -> dict[str, float]:
    ds = membership.measure(model, asked, reference=reference)
    is_forget = ds["split"].values == "forget"
    scores = {str(name): np.asarray(ds[name].values, dtype=float) for name in ds.data_vars}
    return {f"MIA {name}": auc(score[is_forget], score[~is_forget]) for name, score in scores.items()}


def _verdict(result: Audit) -> Row:
    summary = result.summary
    kept = summary["damage"]["ratio"]
    return {
        "verdict": summary["verdict"],
        "decided_by": summary["decided_by"],
        "residue": _number(summary["residue"]["estimate"]),
        "low": _number(summary["residue"]["low"]),
        "high": _number(summary["residue"]["high"]),
        "kept": _number(kept),
        "blind": ",".join(c["name"] for c in summary["channels"] if c["blind"] and c["testable"]),
        **dict(_costs(result)),
    }


def _costs(result: Audit) -> Iterator[tuple[str, float]]:
    for channel, role in result.measurements:
        if role == "unlearned":
            attrs = result.measurement(channel).attrs
            for name in ("seconds", "forward_passes", "backward_passes"):
                yield f"{channel} {name}", float(attrs[name])


def _number(x: float | None) -> float:
    return float("nan") if x is None else float(x)
