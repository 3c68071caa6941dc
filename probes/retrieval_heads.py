"""Retrieval heads: attention heads that look at the needle's tokens while the model copies them (arXiv 2404.15574).

What a model reads from its context goes through such heads; what it knows by heart hardly does. So they tell reading
from knowing, and a model that unlearned should have kept them. Every score is of a query head. Only the rows of
attention that are asked for are computed, one layer at a time, and what has been read is not run again.
"""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from functools import partial
from typing import Any, Literal, get_args

import numpy as np
import torch
import xarray as xr
from jaxtyping import Bool, Float, Int
from torch import Tensor
from transformers import DynamicCache, StoppingCriteriaList

from lethescope.attention import attention_rows
from lethescope.errors import InputError
from lethescope.measurement import to_json
from lethescope.models import Model
from lethescope.prefix import Read
from lethescope.probes.needles import Located, Needle, locate
from lethescope.probes.rouge import greedy, rouge_1_recall
from lethescope.scoring import target_log_probs
from lethescope.tokens import Encoded

Mode = Literal["set", "count"]
Scores = Float[np.ndarray, "layer head"]

GATE = 0.5
"""Decoding keeps an instance whose continuation has more than this share of the answer's words (ROUGE-1 recall)."""
NULL = "N/A"
"""The empty question whose attention is taken off the QR score."""
CITATION = (
    "Wu et al. 2024 (arXiv 2404.15574); Zhang et al. 2025 (arXiv 2506.09944); Olsson et al. 2022 (arXiv 2209.11895)"
)


def measure(
    model: Model, needles: Sequence[Needle], *, mode: Mode = "set", decode: bool = False, most: int = 50, seed: int = 0
) -> xr.Dataset:
    """Score every query head: does it look at the needle when the model copies it, and what else does it look at?

    What it does not prove: a head that scores high is where the copied token is attended to, not that the model needs
    it (`lethescope.analyses.heads.ablation` asks that); and heads that are in place say nothing of what the weights
    still know. A model damaged by unlearning scores lower without having forgotten anything in particular: look at
    `right` first, and with `decode` at the kept share.

    A needle costs one pass over it, and a short one for the empty question; with `decode` also a step a token.

    Args:
        model: any language model whose attention goes through transformers' attention interface.
        needles: instances; 20 give a stable top-10 of heads, 50 a top-30.
        mode: `set` or `count`, see `copy_score`.
        decode: score the model's own greedy continuation, as published, and drop instances that it gets wrong;
            otherwise the true answer is fed, once, and every instance counts.
        most: with `decode`, tokens of a continuation; it also ends with a line.
        seed: of the random tokens of the pattern scores.

    Returns:
        `score(instance, layer, head)`, NaN where an instance is dropped; `frequency(layer, head)`, the share of kept
        instances with a score above 0; `qr(instance, layer, head)`; `induction`, `duplicate`, `previous`
        `(layer, head)`; `kept(instance)`, and the kept share as an attribute; `right(instance)`, whether the model's
        first choices are the answer; `log_probability(instance)`, mean over the answer's tokens, or
        `continuation(instance)`. Higher is more copying, not more or less forgotten. NaN for layers without attention.

    Raises:
        InputError: there are no needles, the mode is unknown, a needle is too long or cannot be tokenised, or the
            model does not use the attention interface.
    """
    if mode not in get_args(Mode):
        raise InputError(f"unknown mode {mode!r}; use {' or '.join(get_args(Mode))}")
    if not needles:
        raise InputError("there are no needles to look for; give at least one, 20 for a top-10 of heads")
    found = [locate(model.tokenizer, needle) for needle in needles]
    _check_lengths(model, needles, found, most if decode else 0)
    look = partial(_decoded, most=most) if decode else _forced
    rows = [_row(model, needle, at, partial(look, mode=mode)) for needle, at in zip(needles, found, strict=True)]
    return _dataset(model, needles, rows, {"mode": mode, "decode": decode, "most": most if decode else 0}, seed)


def copied(
    rows: Float[Tensor, "head row key"], ids: Int[Tensor, " key"], span: tuple[int, int], targets: Int[Tensor, " row"]
) -> Bool[Tensor, "head row"]:
    """Whether a row's largest attention is on a token of the span that is the row's target.

    Our choice: a row whose largest value is also reached outside the span points nowhere, so that uniform attention
    never counts.
    """
    inside = torch.zeros(rows.shape[-1], dtype=torch.bool, device=rows.device)
    inside[span[0] : span[1]] = True
    best, at = rows[..., span[0] : span[1]].max(-1)
    return (best > rows.masked_fill(inside, -1).amax(-1)) & (ids[span[0] + at] == targets)


def copy_score(
    copies: Bool[Tensor, "head row"], targets: Int[Tensor, " row"], answer: Int[Tensor, " token"], mode: Mode
) -> Float[Tensor, " head"]:
    """Retrieval score of each head for one instance (arXiv 2404.15574).

    `set`: |copied tokens ∩ answer tokens| / |answer tokens|, of different tokens, in [0, 1], as the paper defines it.
    `count`: number of copying rows / number of answer tokens, as the published code computes it; a continuation that
    repeats itself exceeds 1. The two agree where the true answer is fed and has no token twice.

    >>> copies = torch.tensor([[True, False, True, True], [False] * 4])
    >>> said, answer = torch.tensor([5, 6, 5, 6]), torch.tensor([5, 6])
    >>> copy_score(copies, said, answer, "set").tolist(), copy_score(copies, said, answer, "count").tolist()
    ([1.0, 0.0], [1.5, 0.0])
    """
    if mode == "count":
        return copies.sum(-1) / len(answer)
    said: Bool[Tensor, "row kind"] = targets[:, None] == torch.unique(answer)
    hit: Bool[Tensor, "head kind"] = (copies[:, :, None] & said).any(1)
    return hit.float().mean(-1)


def qr_score(model: Model, needle: Needle, *, null: str = NULL) -> Scores:
    """Attention of the question's tokens on the answer's, less that of an empty question (QR score, arXiv 2506.09944).

    `(1/q) sum_{question tokens} sum_{answer tokens} A`, in [0, 1], minus the same with `null` in place of the question:
    so a head that always looks there scores 0. Needs no answer from the model. Our choice: the gold span is the answer,
    and no outlying tokens are dropped, as answers have few.

    Raises:
        InputError: the needle cannot be tokenised, or the model does not use the attention interface.
    """
    read = Read()
    more: Scores = _question_mass(model, needle, read) - _question_mass(model, _emptied(needle, null), read)
    return more


def _emptied(needle: Needle, null: str) -> Needle:
    first, last = needle.question_span
    return replace(needle, prompt=needle.prompt[:first] + null + needle.prompt[last:], question=null)


def _question_mass(model: Model, needle: Needle, read: Read) -> Scores:
    """Attention of a question on the answer; what has been read is not run again."""
    at = locate(model.tokenizer, needle)
    prompt = at.encoded.ids[: at.encoded.start]
    found: Scores = _look(model, [prompt], range(*at.question), lambda rows: _mass(rows, at), read=read)[0]
    return found


def _mass(rows: Float[Tensor, "batch head row key"], at: Located) -> Float[Tensor, " head"]:
    return rows[0, :, :, slice(*at.span)].sum(-1).mean(-1)


def pattern_scores(model: Model, *, half: int = 48, sequences: int = 8, seed: int = 0) -> dict[str, Scores]:
    """How much a head attends to three places, on random tokens said twice over (arXiv 2209.11895).

    For the token at place i of the second half: `duplicate` is its attention to the same token in the first half,
    `induction` to the token after that, `previous` to the token before it; means over places and sequences, in [0, 1].
    Random tokens mean nothing, so nothing that was learned or unlearned is asked. What it does not prove: that a head
    with such a pattern copies in real text. Our choice: no token twice within a half, and the second half's rows only.

    Args:
        model: any language model whose attention goes through transformers' attention interface.
        half: random tokens, each said twice; fewer where the vocabulary or the model's length is too small.
        sequences: how many are drawn.
        seed: of the draw.

    Returns:
        `induction`, `duplicate`, `previous`, each (layer head).

    Raises:
        InputError: the model does not use the attention interface.
    """
    tokens = model.tokenizer
    ordinary = sorted(set(tokens.get_vocab().values()) - set(tokens.all_special_ids))
    bos = [] if tokens.bos_token_id is None else [tokens.bos_token_id]
    half = min(half, len(ordinary), (_limit(model) - 1) // 2)
    rng = np.random.default_rng(seed)
    drawn = [rng.choice(ordinary, half, replace=False).tolist() for _ in range(sequences)]
    first = len(bos) + half
    targets = {"induction": 1 - half, "duplicate": -half, "previous": -1}

    def patterns(rows: Float[Tensor, "batch head row key"]) -> Float[Tensor, "head pattern"]:
        row = torch.arange(half, device=rows.device)
        on = [rows[..., row, first + row + shift].mean((0, -1)) for shift in targets.values()]
        return torch.stack(on, -1)

    found, _ = _look(model, [bos + half_ + half_ for half_ in drawn], range(first, first + half), patterns)
    return {name: found[..., i] for i, name in enumerate(targets)}


@torch.no_grad()
def _look(
    model: Model,
    ids: Sequence[Sequence[int]],
    places: Sequence[int],
    reduce: Callable[[Tensor], Tensor],
    keep: int = 1,
    read: Read | None = None,
) -> tuple[Float[np.ndarray, "layer head *rest"], Float[Tensor, "batch keep vocab"]]:
    """Run sequences of one length once; reduce each layer's rows (batch head row key) to numbers per head, (head …).

    A single sequence goes on from what has been `read`, as far as it begins alike, and is then what has been read.
    """
    found: dict[int, np.ndarray] = {}
    known, cache = (0, None) if read is None else (read.back(ids[0], min(places)), read.cache)

    def see(layer: int, rows: Float[Tensor, "batch head row key"]) -> None:
        found[layer] = reduce(rows).double().cpu().numpy()

    with attention_rows(model, [place - known for place in places], see):
        given = torch.tensor([list(row[known:]) for row in ids], device=model.device)
        run = model.module(input_ids=given, past_key_values=cache, use_cache=read is not None, logits_to_keep=keep)
    if read is not None:
        read.keep(ids[0], getattr(run, "past_key_values", None))
    shape = np.max([array.shape for array in found.values()], axis=0)
    out = np.full((len(model.blocks), *shape), np.nan)
    for layer, array in found.items():
        out[layer, : len(array)] = array
    return out, run.logits[:, -keep:]


def _copying(
    model: Model, at: Located, said: Sequence[int], mode: Mode, read: Read | None = None
) -> tuple[Scores, Scores, Float[Tensor, "token vocab"], Int[Tensor, " token"]]:
    """Look at the heads while `said` follows the prompt: row start - 1 + t predicts said[t].

    Returns:
        Copy score; attention of the question on the answer; logits of `said`; `said` itself.
    """
    prompt, answer = at.encoded.ids[: at.encoded.start], at.encoded.answer
    ids, targets, wanted = (torch.tensor(x, device=model.device) for x in ((*prompt, *said), said, answer))
    question = range(*at.question)

    def both(rows: Float[Tensor, "batch head row key"]) -> Float[Tensor, "head two"]:
        copies = copied(rows[0, :, len(question) :], ids[:-1], at.span, targets)
        return torch.stack([copy_score(copies, targets, wanted, mode), _mass(rows[:, :, : len(question)], at)], -1)

    places = [*question, *range(len(prompt) - 1, len(ids) - 1)]
    found, logits = _look(model, [ids[:-1].tolist()], places, both, keep=len(said), read=read)
    return found[..., 0], found[..., 1], logits[0], targets


def _row(model: Model, needle: Needle, at: Located, look: Callable[..., dict[str, Any]]) -> dict[str, Any]:
    """Look at the heads, then ask nothing in the question's place: the context before it is run once."""
    read = Read()
    row = look(model, needle, at, read=read)
    return row | {"qr": row["qr"] - _question_mass(model, _emptied(needle, NULL), read)}


def _forced(model: Model, _needle: Needle, at: Located, mode: Mode, read: Read) -> dict[str, Any]:
    """Feed the true answer."""
    scores, mass, logits, targets = _copying(model, at, at.encoded.answer, mode, read)
    right = bool((logits.argmax(-1) == targets).all())
    log_probability = float(target_log_probs(logits, targets).mean())
    return {"score": scores, "qr": mass, "kept": True, "right": right, "log_probability": log_probability}


def _decoded(model: Model, needle: Needle, at: Located, mode: Mode, read: Read, most: int) -> dict[str, Any]:
    """Let the model say what it says, then look at the rows that predicted it: in a causal model, the same rows."""
    said = _say(model, at.encoded.ids[: at.encoded.start], most, read)
    text = model.tokenizer.decode(said, skip_special_tokens=True)
    kept = rouge_1_recall(text, needle.answer) > GATE
    scores, mass, *_ = _copying(model, at, said, mode, read)
    right = tuple(said[: len(at.encoded.answer)]) == at.encoded.answer
    scores = scores if kept else np.full_like(scores, np.nan)
    return {"score": scores, "qr": mass, "kept": kept, "right": right, "continuation": text}


def _say(model: Model, prompt: Sequence[int], most: int, read: Read) -> list[int]:
    """Continue greedily, at most so many tokens, until a token with a line break or the end of the text; both stay.

    All but the last token has then been read.
    """

    def line_ends(ids: Tensor, _scores: Any, **_: Any) -> Bool[Tensor, " batch"]:
        return torch.tensor(["\n" in model.tokenizer.decode(row[-1:]) for row in ids], device=ids.device)

    stops, cache = StoppingCriteriaList([line_ends]), DynamicCache(config=model.module.config)
    asked = Encoded(tuple(prompt), len(prompt))
    said = greedy(model, [asked], most, stopping_criteria=stops, past_key_values=cache)[0]
    read.keep([*prompt, *said[:-1]], cache)
    return said


def _limit(model: Model) -> int:
    return int(getattr(model.module.config.get_text_config(), "max_position_embeddings", None) or 2**31)


def _check_lengths(model: Model, needles: Sequence[Needle], found: Sequence[Located], more: int) -> None:
    for needle, at in zip(needles, found, strict=True):
        length = at.encoded.start + max(more, len(at.encoded.answer))
        if length > _limit(model):
            raise InputError(f"needle {needle.id!r} takes {length} tokens; the model reads at most {_limit(model)}")


def _dataset(
    model: Model, needles: Sequence[Needle], rows: Sequence[dict[str, Any]], parameters: dict[str, Any], seed: int
) -> xr.Dataset:
    places = ("instance", "layer", "head")
    each = {name: np.array([row[name] for row in rows]) for name in rows[0]}
    data = {name: (places[: values.ndim], values) for name, values in each.items()}
    data |= {name: (places[1:], found) for name, found in pattern_scores(model, seed=seed).items()}
    coords = {name: ("instance", [getattr(n, name) for n in needles]) for name in ("kind", "length", "depth")}
    ds = xr.Dataset(data, {"instance": [n.id for n in needles], **coords})
    ds["frequency"] = (ds["score"] > 0).where(ds["score"].notnull()).mean("instance")
    return ds.assign_coords({name: np.arange(ds.sizes[name]) for name in places[1:]}).assign_attrs(
        probe="retrieval_heads",
        version=1,
        parameters=to_json(parameters),
        model=model.fingerprint,
        facts=hashlib.sha256(to_json([asdict(n) for n in needles]).encode()).hexdigest()[:16],
        dtype=str(model.dtype),
        device=str(model.device),
        seed=seed,
        citation=CITATION,
        units="share of the answer's tokens",
        scale="share",
        direction="higher = the head copies more; says nothing about forgetting by itself",
        kept_share=float(ds["kept"].mean()),
    )
