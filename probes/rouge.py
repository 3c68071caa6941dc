"""ROUGE-L recall of what a model goes on to say: the words of the answer that come, in order, in its continuation."""

import re
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
import xarray as xr

from lethescope.facts import Fact
from lethescope.measurement import fact_coords
from lethescope.models import Model
from lethescope.scoring import candidates
from lethescope.tokens import Encoded, collate, pad_id


def measure(model: Model, facts: Sequence[Fact], *, extra: int = 4, rows: int = 32) -> xr.Dataset:
    """Let the model continue every fact's prompt greedily and hold the continuation against the answer.

    What it does not prove: a model that says something else may know the answer; and short answers of common words are
    often said in part by chance. It is no channel: it has no residue of its own.

    Args:
        model: any language model with `generate`.
        facts: all splits.
        extra: how many tokens more than the answer has the model may say.
        rows: prompts a batch.

    Returns:
        `rouge_l_recall(fact)` in [0, 1], lower is more forgotten, NaN for an answer without words; and
        `continuation(fact)`, the text.

    Raises:
        InputError: an answer cannot be tokenised.
    """
    said = continuations(model, candidates(model.tokenizer, facts, most=0).encoded, extra=extra, rows=rows)
    scores = [rouge_l_recall(text, fact.answer) for text, fact in zip(said, facts, strict=True)]
    return xr.Dataset(
        {"rouge_l_recall": ("fact", np.array(scores, dtype=float)), "continuation": ("fact", said)},
        fact_coords(facts),
        {"direction": "higher = more of the answer is said", "citation": "Lin 2004 (ROUGE, ACL W04-1013)"},
    )


def rouge_l_recall(said: str, answer: str) -> float:
    """Return the length of the longest common subsequence of words over the answer's number of words.

    Our choice: words are runs of letters and digits, case folded and not stemmed (TOFU stems, so "works" and "work" are
    one word there and two here).

    >>> rouge_l_recall("First a tax expert, then a lawyer.", "tax lawyer"), rouge_l_recall("lawyer tax", "tax lawyer")
    (1.0, 0.5)
    """
    wanted = words(answer)
    return longest_common(words(said), wanted) / len(wanted) if wanted else float("nan")


def rouge_1_recall(said: str, answer: str) -> float:
    """Share of the answer's words that are in a text, each counted as often as it is there (not stemmed).

    >>> rouge_1_recall("Nemo sat down, sat", "sat sat sat up")
    0.5
    """
    wanted, there = words(answer), words(said)
    return sum(min(wanted.count(w), there.count(w)) for w in set(wanted)) / len(wanted) if wanted else float("nan")


def longest_common(a: Sequence[str], b: Sequence[str]) -> int:
    """Return the length of the longest sequence that can be got from both by leaving elements out.

    One row of the usual table is kept: after each element of `a`, the length for every beginning of `b`.
    """
    row = [0] * (len(b) + 1)
    for x in a:
        before = row[:]
        for j, y in enumerate(b, start=1):
            row[j] = before[j - 1] + 1 if x == y else max(before[j], row[j - 1])
    return row[-1]


def words(text: str) -> list[str]:
    """Return the runs of letters and digits of a text, case folded.

    >>> words("O'Neill's 2nd book")
    ['o', 'neill', 's', '2nd', 'book']
    """
    return re.findall(r"[^\W_]+", text.casefold())


def continuations(model: Model, encoded: Sequence[Encoded], *, extra: int = 4, rows: int = 32) -> list[str]:
    """Return what the model says greedily after each prompt: at most the answer's length and `extra` tokens.

    Prompts are padded on the left, so that every one ends where its continuation begins.
    """
    found: dict[int, str] = {}
    order = sorted(range(len(encoded)), key=lambda i: len(encoded[i].ids))
    for start in range(0, len(order), rows):
        chosen = order[start : start + rows]
        limits = [len(encoded[i].answer) + extra for i in chosen]
        new = greedy(model, [encoded[i] for i in chosen], max(limits))
        for i, ids, limit in zip(chosen, new, limits, strict=True):
            found[i] = model.tokenizer.decode(_until_end(model, ids[:limit]), skip_special_tokens=True).strip()
    return [found[i] for i in range(len(encoded))]


@torch.no_grad()
def greedy(model: Model, encoded: Sequence[Encoded], most: int, **options: Any) -> list[list[int]]:
    """Return at most so many tokens that the model says greedily after each prompt; options are those of `generate`."""
    pad = pad_id(model.tokenizer)
    prompts = [Encoded(e.ids[: e.start], e.start) for e in encoded]
    batch = collate(prompts, pad, side="left", device=model.device)
    out = model.module.generate(
        input_ids=batch.input_ids,
        attention_mask=batch.attention_mask,
        do_sample=False,
        num_beams=1,
        max_new_tokens=most,
        pad_token_id=pad,
        **options,
    )
    return out[:, batch.input_ids.shape[1] :].tolist()


def _until_end(model: Model, ids: list[int]) -> list[int]:
    ends = set(_ends(model))
    return ids[: next((i for i, token in enumerate(ids) if token in ends), len(ids))]


def _ends(model: Model) -> Iterator[int]:
    told = getattr(getattr(model.module, "generation_config", None), "eos_token_id", None)
    yield from told if isinstance(told, list | tuple) else [] if told is None else [told]
