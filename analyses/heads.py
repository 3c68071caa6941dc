"""Retrieval heads before and after: did they move, and does reading from the context still depend on them?

Two models are compared by their scores, which `lethescope.probes.retrieval_heads` measures or a published file holds.
One model is tested by taking its best heads out, against taking out as many others.
"""

import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import torch
import xarray as xr
from jaxtyping import Float
from scipy import stats
from torch import Tensor

from lethescope.attention import Head, Kind, ablating, mean_outputs
from lethescope.errors import InputError
from lethescope.facts import Fact, parse_json, read_text
from lethescope.models import Model
from lethescope.probes.context_units import occurs
from lethescope.probes.needles import Needle
from lethescope.scoring import Tails, tails
from lethescope.statistics import cluster_weights, interval, p_above_zero, seeded
from lethescope.tokens import Encoded, encode, join

Phase = Literal["decode", "all"]
QUANTITIES = ("log_prob", "exact_match")
RETRIEVAL, STRONG = 0.1, 0.5
"""A head with at least this mean score is a retrieval head, a strong one (arXiv 2404.15574)."""


def mean_scores(ds: xr.Dataset) -> xr.DataArray:
    """Mean retrieval score of every head over the kept instances: (layer head), NaN where none was kept.

    Raises:
        InputError: the Dataset holds no `score(instance, layer, head)`.
    """
    if "score" not in ds or set(ds["score"].dims) != {"instance", "layer", "head"}:
        raise InputError("these are no retrieval scores; give a Dataset with score(instance, layer, head)")
    return ds["score"].mean("instance").transpose("layer", "head")


def correlation(a: xr.DataArray, b: xr.DataArray) -> dict[str, float]:
    """Pearson's and Spearman's correlation of two models' scores over all heads, in [-1, 1].

    Models of one lineage correlate at .9 and above, unrelated ones not at all: that is what a model before and after
    unlearning is to be held against. Lower means that the heads moved, not that anything was forgotten. NaN where one
    model's scores are all equal.

    Raises:
        InputError: the models differ in layers or heads, or no head has a score in both.
    """
    x, y = _aligned(a, b)
    if np.ptp(x) == 0 or np.ptp(y) == 0:
        return {"pearson": float("nan"), "spearman": float("nan")}
    return {"pearson": float(stats.pearsonr(x, y).statistic), "spearman": float(stats.spearmanr(x, y).statistic)}


def top_heads(scores: xr.DataArray, k: int) -> list[Head]:
    """Return the k heads (layer, head) with the highest scores above 0, best first; the lower place wins a tie.

    Raises:
        InputError: k is below 1.
    """
    if k < 1:
        raise InputError(f"the top {k} heads are none; give k of 1 or more")
    table = scores.transpose("layer", "head").values
    order = np.argsort(-np.nan_to_num(table), axis=None, kind="stable")[:k]
    places = np.argwhere(np.ones_like(table, dtype=bool))[order]
    return [(int(layer), int(head)) for layer, head in places if table[layer, head] > 0]


def jaccard_top(a: xr.DataArray, b: xr.DataArray, k: int = 30) -> float:
    """Share of heads among the top k of either model that are among the top k of both, in [0, 1]; NaN without any.

    Raises:
        InputError: the models differ in layers or heads, or k is below 1.
    """
    _aligned(a, b)
    first, second = set(top_heads(a, k)), set(top_heads(b, k))
    return len(first & second) / len(first | second) if first | second else float("nan")


def share_at_least(scores: xr.DataArray, threshold: float = RETRIEVAL) -> float:
    """Share of heads with at least this mean score, of those that have one; .02 to .06 is usual for `RETRIEVAL`."""
    return float((scores >= threshold).sum() / scores.count()) if scores.count() else float("nan")


def compare(a: xr.Dataset, b: xr.Dataset, *, k: int = 30) -> dict[str, Any]:
    """Hold two models' retrieval scores side by side.

    What it does not prove: heads that kept their scores may be used differently, and heads that lost them may have
    lost them to damage; the kept share of each (`kept_share`) says how much was left to score.

    Args:
        a: scores of a model, `score(instance, layer, head)`.
        b: scores of another model of the same shape.
        k: how many heads count as the best.

    Returns:
        `pearson`, `spearman`, `jaccard_top<k>`; and for each of the two, in a list: `share_ge_0.1`, `share_ge_0.5`,
        `count_ge_0.1`, `count_ge_0.5`, `instances`, `kept_share`.

    Raises:
        InputError: the models differ in layers or heads, or one has no scores.
    """
    first, second = both = mean_scores(a), mean_scores(b)
    found: dict[str, Any] = {**correlation(first, second), f"jaccard_top{k}": jaccard_top(first, second, k)}
    for cut in (RETRIEVAL, STRONG):
        found[f"share_ge_{cut}"] = [share_at_least(scores, cut) for scores in both]
        found[f"count_ge_{cut}"] = [int((scores >= cut).sum()) for scores in both]
    kept = [ds["score"].notnull().any(("layer", "head")) for ds in (a, b)]
    return {**found, "instances": [k.size for k in kept], "kept_share": [float(k.mean()) for k in kept]}


def compare_files(a: str | Path, b: str | Path, *, k: int = 30) -> dict[str, Any]:
    """Compare two published score files, see `compare` and `read_scores`.

    Raises:
        InputError: a file cannot be used (the file and the key are named), or the models differ in layers or heads.
    """
    return compare(read_scores(a), read_scores(b), k=k)


def read_scores(path: str | Path) -> xr.Dataset:
    """Read a score file, JSON `{"layer-head": [score of each instance, …], …}`, as `score(instance, layer, head)`.

    Scores are finite and not negative; they may exceed 1, as the published code counts repetitions.

    Raises:
        InputError: not such a file: the file and the key are named.
    """
    path = Path(path)
    data = parse_json(read_text(path), path)
    if not isinstance(data, dict) or not data:
        raise InputError(f'{path}: not a score file; it must hold one JSON object {{"layer-head": [scores …], …}}')
    heads = {_head(path, key): _list(path, key, values) for key, values in data.items()}
    first = next(iter(data))
    short = [key for key in data if len(data[key]) != len(data[first])]
    if short:
        raise InputError(f'{path}: key "{short[0]}" has {len(data[short[0]])} scores, "{first}" {len(data[first])}')
    layers, width = (1 + max(head[i] for head in heads) for i in (0, 1))
    missing = next((f"{x}-{y}" for x in range(layers) for y in range(width) if (x, y) not in heads), None)
    if missing:
        raise InputError(f'{path}: key "{missing}" is missing; there must be all of {layers} layers x {width} heads')
    score = np.array([[heads[x, y] for y in range(width)] for x in range(layers)], dtype=float)
    coords = {"layer": np.arange(layers), "head": np.arange(width)}
    return xr.Dataset({"score": (("layer", "head", "instance"), score)}, coords).transpose("instance", "layer", "head")


def _head(path: Path, key: str) -> Head:
    if not re.fullmatch(r"(0|[1-9]\d*)-(0|[1-9]\d*)", key, re.ASCII):
        raise InputError(f'{path}: key "{key}" is not "layer-head"; write it like "17-22"')
    layer, _, head = key.partition("-")
    return int(layer), int(head)


def _list(path: Path, key: str, values: Any) -> list[float]:
    if not isinstance(values, list) or not values:
        raise InputError(f'{path}: key "{key}" must have a list of scores, one an instance')
    bad = [v for v in values if isinstance(v, bool) or not isinstance(v, int | float) or not 0 <= v < float("inf")]
    if bad:
        raise InputError(f'{path}: key "{key}" has {bad[0]!r} for a score; scores are finite numbers from 0')
    return values


def _aligned(a: xr.DataArray, b: xr.DataArray) -> tuple[np.ndarray, np.ndarray]:
    """Return the scores of the heads that have one in both models.

    Raises:
        InputError: the shapes differ, or there is no such head.
    """
    shapes = [tuple(scores.sizes[dim] for dim in ("layer", "head")) for scores in (a, b)]
    if shapes[0] != shapes[1]:
        told = " and ".join(f"{layers} x {heads}" for layers, heads in shapes)
        raise InputError(f"the models have {told} layers x heads; only models of one shape can be compared")
    x, y = (scores.transpose("layer", "head").values.ravel() for scores in (a, b))
    there = np.isfinite(x) & np.isfinite(y)
    if not there.any():
        raise InputError("no head has a score in both models; no instance was kept, so compare with decode=False")
    return x[there], y[there]


@torch.no_grad()
def ablation(
    model: Model,
    instances: Sequence[Needle | Fact],
    scores: xr.Dataset,
    *,
    k: int,
    kind: Kind = "uniform",
    phase: Phase = "decode",
    draws: int = 10,
    seed: int = 0,
    rows: int = 8,
    resamples: int = 1000,
) -> xr.Dataset:
    """Take the k best retrieval heads out and see what the answers lose, beyond what other heads' loss costs.

    `effect = (v_none - v_top) - mean over draws of (v_none - v_control)`, where v is the mean log-probability of the
    answer's tokens, or whether every first choice is right. Controls have as many heads in each layer, drawn among
    those that score below 0.1. With facts in the context the effect is large for a model that reads them there and
    small for one that knows them: forget facts put in the context (`in_context`) and asked with and without retrieval
    heads tell the two apart. What it does not prove: without an effect other heads may have stepped in, and an effect
    of all heads together names none of them. Choose heads on other needles than those they are tested on: the same ones
    flatter.

    Args:
        model: any language model whose attention goes through transformers' attention interface.
        instances: needles or facts; prompt and answer are used.
        scores: `score(instance, layer, head)` of the same model.
        k: how many heads.
        kind: `uniform`, `zero` or `mean` (over all tokens of the instances), see `lethescope.attention.ablating`.
        phase: `decode` takes the heads out where the answer is predicted and leaves the reading of the prompt alone, as
            published; `all` takes them out everywhere.
        draws: how many sets of control heads.
        seed: of the draws and of the bootstrap.
        rows: prompts a batch.
        resamples: of the bootstrap over instances (over subjects, for facts), with the controls averaged.

    Returns:
        `log_prob(arm, instance)`, `exact_match(arm, instance)`, arms are `none`, `top`, `control 0` …, with their
        `heads`; `effect(quantity, bound)`: estimate and 95 % interval, above 0 where the top heads matter more;
        `p(quantity)`, one-sided; `draws_below(quantity)`, share of controls that cost less. Our choice: where a layer
        has too few control heads the rest comes from other layers, `unmatched` says how many.

    Raises:
        InputError: nothing to ask, an unknown kind or phase, or too few heads that are no retrieval heads.
    """
    if phase not in get_args(Phase):
        raise InputError(f"unknown phase {phase!r}; use {' or '.join(get_args(Phase))}")
    if not instances or draws < 1:
        raise InputError("give at least one instance and one draw of control heads")
    mean = mean_scores(scores)
    if mean.sizes["layer"] != len(model.blocks):
        raise InputError(f"the scores are of {mean.sizes['layer']} layers and the model has {len(model.blocks)}")
    top = top_heads(mean, k)
    if not top:
        raise InputError("no head has a score above 0, so there is none to take out")
    controls = control_heads(mean, top, draws=draws, seed=seed)
    arms: dict[str, Sequence[Head]] = {"none": (), "top": top}
    arms |= {f"control {i}": heads for i, heads in enumerate(controls)}
    encoded = [_encoded(model, instance) for instance in instances]
    means = mean_outputs(model, [e.ids for e in encoded]) if kind == "mean" else None
    values = np.full((2, len(arms), len(encoded)), np.nan)
    for arm, batch, logits in _runs(model, encoded, list(arms.values()), kind, phase, means, rows):
        right = (logits.argmax(-1)[batch.owner, : batch.mask.shape[1]] == batch.targets) | ~batch.mask
        values[:, arm, batch.rows] = torch.stack([batch.mean_log_prob(logits), right.all(-1)]).double().cpu().numpy()
    unmatched = sum((Counter(x for x, _ in top) - Counter(x for x, _ in heads)).total() for heads in controls)
    attrs = {"k": len(top), "kind": kind, "phase": phase, "seed": seed, "unmatched": unmatched / draws}
    return _effects(values, arms, instances, seed, resamples).assign_attrs(attrs)


def in_context(facts: Sequence[Fact], *, among: int = 7, seed: int = 0) -> tuple[Fact, ...]:
    """Put every fact into the context of its own question, as one of several statements, for `ablation`.

    The new prompt is `among` + 1 statements (prompt and answer of the fact and of others, one a line, in drawn order)
    and the prompt itself. No other statement says the fact's answer, so that it stands in one place.

    A model that knows a fact needs no context. Ask for `lethescope.probes.context_units.swapped` facts as well: their
    answers are wrong, so they can only be read.

    Args:
        facts: facts of any splits; they lend each other their statements.
        among: statements of other facts at most; fewer where fewer leave the answer unsaid.
        seed: of the draw and of the order.

    Raises:
        InputError: a fact finds no other fact.

    >>> a, b = (Fact(id=s, split="forget", subject=s, prompt=f"{s} lives in", answer=c) for s, c in ["AX", "BY"])
    >>> print(in_context([a, b])[0].prompt)
    A lives in X.
    B lives in Y.
    A lives in
    """
    said, made = [f"{join(fact.prompt, fact.answer).rstrip('.')}." for fact in facts], []
    for fact, own in zip(facts, said, strict=True):
        others = [text for text in said if not occurs(fact.answer, text)]
        if not others:
            raise InputError(f"fact {fact.id!r}: every other fact says its answer {fact.answer!r}; give more facts")
        rng = seeded(seed, "in context", fact.id)
        told = [own, *(others[i] for i in rng.permutation(len(others))[:among])]
        lines = [told[i] for i in rng.permutation(len(told))]
        made.append(fact.model_copy(update={"prompt": "\n".join([*lines, fact.prompt]), "paraphrases": ()}))
    return tuple(made)


def control_heads(mean: xr.DataArray, top: Sequence[Head], *, draws: int = 10, seed: int = 0) -> list[list[Head]]:
    """Draw sets of heads that score below `RETRIEVAL`, as many in each layer as `top` has there.

    Our choice: what a layer cannot give is drawn from the other layers.

    Raises:
        InputError: there are fewer such heads than top heads.
    """
    table = mean.transpose("layer", "head").values
    pool = [(int(x), int(y)) for x, y in np.argwhere(table < RETRIEVAL) if (x, y) not in set(top)]
    if len(pool) < len(top):
        raise InputError(f"only {len(pool)} heads score below {RETRIEVAL} for {len(top)} top heads; choose a smaller k")
    wanted = Counter(layer for layer, _ in top)
    rng = np.random.default_rng(seed)
    return [_matched([pool[i] for i in rng.permutation(len(pool))], wanted) for _ in range(draws)]


def _matched(mixed: Sequence[Head], wanted: Counter[int]) -> list[Head]:
    left, taken = Counter(wanted), []
    for head in mixed:
        if left[head[0]]:
            left[head[0]] -= 1
            taken.append(head)
    others = (head for head in mixed if head not in taken)
    return sorted([*taken, *islice(others, left.total())])


def _encoded(model: Model, instance: Needle | Fact) -> Encoded:
    try:
        return encode(model.tokenizer, instance.prompt, instance.answer)
    except InputError as error:
        raise InputError(f"instance {instance.id!r}: {error}") from None


def _runs(
    model: Model,
    encoded: Sequence[Encoded],
    arms: Sequence[Sequence[Head]],
    kind: Kind,
    phase: Phase,
    means: Mapping[int, Tensor] | None,
    rows: int,
) -> Iterator[tuple[int, Tails, Tensor]]:
    """Run the answers under every arm; in phase `decode` the arms share the prompts' keys and values.

    Yields:
        The arm's number, a batch of answers, and its logits.
    """
    if phase == "all":
        for arm, heads in enumerate(arms):
            with ablating(model, heads, kind, means=means):
                yield from ((arm, batch, batch.run(model)) for batch in tails(model, encoded, rows=rows))
        return
    for batch in tails(model, encoded, rows=rows):
        for arm, heads in enumerate(arms):
            with ablating(model, heads, kind, means=means):
                logits = batch.run(model)
            yield arm, batch, logits


def _effects(
    values: Float[np.ndarray, "quantity arm instance"],
    arms: Mapping[str, Sequence[Head]],
    instances: Sequence[Needle | Fact],
    seed: int,
    resamples: int,
) -> xr.Dataset:
    lost = values[:, :1] - values[:, 1:]
    extra = lost[:, 0] - lost[:, 1:].mean(1)
    weights = cluster_weights([getattr(i, "subject", i.id) for i in instances], seed, resamples)
    drawn = extra @ (weights / weights.sum(1, keepdims=True)).T
    bounds = [[*vars(interval(e.mean(), d)).values()] for e, d in zip(extra, drawn, strict=True)]
    below = (lost[:, 1:].mean(-1) < lost[:, :1].mean(-1)).mean(1)
    data: dict[str, Any] = {name: (("arm", "instance"), table) for name, table in zip(QUANTITIES, values, strict=True)}
    data |= {
        "heads": ("arm", [" ".join(f"{layer}-{head}" for layer, head in heads) for heads in arms.values()]),
        "effect": (("quantity", "bound"), np.array(bounds)),
        "p": ("quantity", [p_above_zero(d) for d in drawn]),
        "draws_below": ("quantity", below),
    }
    coords = {"arm": list(arms), "instance": [i.id for i in instances], "quantity": list(QUANTITIES)}
    return xr.Dataset(data, {**coords, "bound": ["estimate", "low", "high"]})
