"""Context probes: does a model still read what stands in front of it, in each direction and at each place?

Every unit of a context is asked for (`lethescope.probes.context_units`; FILM, VaL probing, arXiv 2404.16811). With
facts among the units: a model that refuses to speak of them fails on these units only, while one that lost them can
still read them.
"""

from collections.abc import Sequence
from dataclasses import asdict
from hashlib import sha256
from itertools import product
from typing import Any

import numpy as np
import xarray as xr
from jaxtyping import Float

from lethescope.auc import share
from lethescope.errors import InputError
from lethescope.facts import quote, same_text
from lethescope.measurement import preference, to_json
from lethescope.models import Model
from lethescope.probes.context_units import DIRECTIONS, Context, Unit, occurs
from lethescope.probes.reading import read
from lethescope.probes.rouge import words
from lethescope.statistics import seeded

CITATION = "An et al. 2024 (arXiv 2404.16811)"
COORDS = ("direction", "context", "position", "split", "fact", "given", "gold", "skipped")
DECODED = ("correct", "recall", "recall_beyond", "said")


def measure(
    model: Model,
    asked: Sequence[Context],
    *,
    decode: bool = True,
    more: int = 8,
    rivals: int = 15,
    seed: int = 0,
) -> xr.Dataset:
    """Ask for every unit of every context, after the context and without it.

    Teacher-forced: the true answer against answers of other units of the same split in the same context (in *document*,
    with the given words in them, as the question would otherwise tell the answer). Decoded: what the model says
    greedily, on one line. A tiny model that cannot say a sentence can still prefer the right one.

    What it does not prove: reading well says nothing about what the weights hold; reading forget facts badly, when
    retain facts in the same places are read well, shows that something in the model still recognises them. A model that
    knows a fact needs no context: compare with `score_without`, or use `swapped` facts. A base model that fails at
    *document* or *code* may not have understood the question.

    Args:
        model: any language model.
        asked: contexts with equally many units, see `contexts`.
        decode: also let the model answer by itself.
        more: tokens that it may say beyond the length of the true answer.
        rivals: wrong answers at most; with n of them chance is 1 / (1 + n).
        seed: of the draw of rivals.

    Returns:
        Over `query`, with its direction, context, position, split, fact, what is given, gold, and why it was skipped
        (NaN then): `score(query, candidate)` mean log-probability in nats, the true answer first, NaN where there are
        fewer; `score_without`, the same without the context; `preference` and `preference_without` in [-1, 1], 0 =
        chance; `best` and `best_without`, 1 where the true answer scores highest. With `decode`: `said`; `recall` of
        the answer's words; `recall_beyond` of those that the question did not give away; `correct`, 1 where all words
        are said (document), or label, description or name are said as whole words. Higher is better read.

    Raises:
        InputError: there are no contexts, they differ in length, one is too long for the model or cannot be tokenised,
            or rivals is below 1.
    """
    if not asked or len({len(context.units) for context in asked}) > 1:
        raise InputError("give at least one context, all with equally many units, so that places can be compared")
    if rivals < 1:
        raise InputError(f"rivals is {rivals}; the true answer needs at least one wrong one beside it")
    rows = [row for context in asked for row in _rows(model, context, more if decode else None, rivals, seed)]
    score, without = (_table([row[name] for row in rows], rivals + 1) for name in ("score", "score_without"))
    dims = ("query", "candidate")
    ds = xr.Dataset(
        {"score": (dims, score), "score_without": (dims, without)},
        {name: ("query", [row[name] for row in rows]) for name in COORDS},
    )
    for after in ("", "_without"):
        table = ds[f"score{after}"]
        wrong = table.isel(candidate=slice(1, None)).max("candidate")
        ds[f"preference{after}"] = preference(ds, f"score{after}")
        ds[f"best{after}"] = (table.isel(candidate=0) > wrong).where(wrong.notnull()).astype(float)
    for name in DECODED if decode else ():
        ds[name] = ("query", [row[name] for row in rows])
    return ds.assign_attrs(
        probe="context",
        version=1,
        parameters=to_json({"decode": decode, "more": more, "rivals": rivals}),
        model=model.fingerprint,
        facts=sha256(to_json([asdict(context) for context in asked]).encode()).hexdigest()[:16],
        dtype=str(model.dtype),
        device=str(model.device),
        seed=seed,
        citation=CITATION,
        units="nats",
        scale="preference",
        direction="higher = better read; says nothing about forgetting by itself",
        skipped=to_json({d: sum(bool(r["skipped"]) for r in rows if r["direction"] == d) for d in DIRECTIONS}),
    )


def _rows(model: Model, context: Context, more: int | None, rivals: int, seed: int) -> list[dict[str, Any]]:
    """One row for each unit of a context."""
    units = context.units
    why = [context.skipped(i) for i in range(len(units))]
    chosen = {i: (units[i].asked, *_rivals(context, i, rivals, seed)) for i in range(len(units)) if not why[i]}
    near = read(model, [(context.text + context.question(i), c) for i, c in chosen.items()], more=more)
    far = read(model, [(context.question(i).lstrip(), c) for i, c in chosen.items()])
    found = dict(zip(chosen, zip(near, far, strict=True), strict=True))
    rows = []
    for i, unit in enumerate(units):
        place = (context.direction, context.number, i, unit.split, unit.fact, unit.given, unit.asked, why[i])
        row: dict[str, Any] = {**dict(zip(COORDS, place, strict=True)), "score": [], "score_without": []}
        row |= dict.fromkeys(DECODED, float("nan")) | {"said": ""}
        if i in found:
            here, there = found[i]
            row |= {"score": here.scores, "score_without": there.scores, **_graded(context.direction, unit, here.said)}
        rows.append(row)
    return rows


def _rivals(context: Context, i: int, most: int, seed: int) -> list[str]:
    """Answers of other units that differ from unit i's: of its own split, or else of its own kind, or else of all.

    A document's question gives words of its answer away, so its rivals say these too: what was given is put in the
    place of what would have been given of them.

    Raises:
        InputError: there are none.
    """
    unit, texts = context.units[i], dict[str, str]()
    kin = [u for u in context.units if u.split == unit.split]
    kind = [u for u in context.units if bool(u.fact) == bool(unit.fact)]
    for others in (kin, kind, context.units):
        for other in () if texts else others:
            text = other.asked.replace(other.given, unit.given) if context.direction == "document" else other.asked
            texts.setdefault(same_text(text), text)
        texts.pop(same_text(unit.asked), None)
    if not texts:
        raise InputError(f"all units of a {context.direction} context answer {quote(unit.asked)}; nothing can be asked")
    every = list(texts.values())
    return [every[k] for k in seeded(seed, context.direction, context.number, i).permutation(len(every))[:most]]


def _graded(direction: str, unit: Unit, said: str) -> dict[str, Any]:
    recall = word_set_recall(said, unit.asked)
    beyond = " ".join(w for w in words(unit.asked) if w not in words(unit.given))
    correct = recall == 1 if direction == "document" else any(occurs(text, said) for text in unit.accepted)
    return {
        "correct": float(correct),
        "recall": recall,
        "recall_beyond": word_set_recall(said, beyond),
        "said": said,
    }


def _table(rows: Sequence[Sequence[float]], width: int) -> Float[np.ndarray, "query candidate"]:
    out = np.full((len(rows), width), np.nan)
    for i, row in enumerate(rows):
        out[i, : len(row)] = row
    return out


def word_set_recall(said: str, wanted: str) -> float:
    """Share of the different words of a text that are said, in any order (the published score of *document*).

    >>> word_set_recall("the red door", "The door the river")
    0.6666666666666666
    """
    asked = set(words(wanted))
    return len(asked & set(words(said))) / len(asked) if asked else float("nan")


def by_bin(ds: xr.Dataset, name: str = "best", *, bins: int = 4, level: float = 0.95) -> xr.Dataset:
    """Accuracy along the context: shares of queries by direction, split and bin of positions, and how far they differ.

    Every position is in one bin (the published code leaves the last of each bin out); queries that were skipped count
    nowhere. What it does not prove: bins of few queries differ by chance; look at the intervals before the gap.

    Args:
        ds: what `measure` returns.
        name: a variable of 0 and 1: `best`, `correct` or `best_without`.
        bins: of nearly equally many positions.
        level: of the exact (Clopper-Pearson) intervals.

    Returns:
        `accuracy`, `low`, `high`, `count` `(direction, split, bin)`, bins named by their first and last position;
        `overall`, `overall_low`, `overall_high` and `gap` `(direction, split)`; gap = highest bin - lowest bin, in
        [0, 1], NaN with fewer than two bins that have queries.

    Raises:
        InputError: the variable is not there or not of 0 and 1, or there are more bins than positions.
    """
    if name not in ds or not np.isin(ds[name].values[ds[name].notnull().values], (0.0, 1.0)).all():
        raise InputError(f"{name!r} is no variable of 0 and 1; use best, correct or best_without")
    places = int(ds["position"].max()) + 1
    if not 1 <= bins <= places:
        raise InputError(f"{bins} bins of {places} positions; use 1 to {places}")
    edges = np.array_split(np.arange(places), bins)
    axes = [list(dict.fromkeys(ds[axis].values.tolist())) for axis in ("direction", "split")]
    shape = (len(axes[0]), len(axes[1]), bins + 1)
    out, count = np.full((*shape, 3), np.nan), np.zeros(shape, dtype=int)
    for (i, direction), (j, split), k in product(enumerate(axes[0]), enumerate(axes[1]), range(bins + 1)):
        inside = np.isin(ds["position"], edges[k] if k < bins else np.arange(places))  # the last is all of them
        values = ds[name].values[inside & (ds["direction"] == direction).values & (ds["split"] == split).values]
        values = values[~np.isnan(values)]
        found = share(int(values.sum()), len(values), level)
        out[i, j, k], count[i, j, k] = (found.estimate, found.low, found.high), len(values)
    dims, data = ("direction", "split", "bin"), dict[str, Any]()
    for v, (each, whole) in enumerate((("accuracy", "overall"), ("low", "overall_low"), ("high", "overall_high"))):
        data |= {each: (dims, out[:, :, :-1, v]), whole: (dims[:2], out[:, :, -1, v])}
    data["count"] = (dims, count[:, :, :-1])
    names = [f"{edge[0]}-{edge[-1]}" for edge in edges]
    table = xr.Dataset(data, {"direction": axes[0], "split": axes[1], "bin": names}, {"of": name, "level": level})
    most, least = table["accuracy"].max("bin"), table["accuracy"].min("bin")
    table["gap"] = (most - least).where(table["accuracy"].notnull().sum("bin") > 1)
    return table
