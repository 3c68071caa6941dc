"""Many questions after one context: the context is run once, and each question continues its keys and values."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from lethescope.errors import InputError
from lethescope.models import Model
from lethescope.prefix import common, selected
from lethescope.scoring import target_log_probs
from lethescope.tokens import Encoded, encode, pad_id


class Reading(NamedTuple):
    """What a model makes of one question: mean log-probability of each answer (nats), and what it says itself."""

    scores: Float[np.ndarray, " candidate"]
    said: str


@torch.no_grad()
def read(
    model: Model, asked: Sequence[tuple[str, Sequence[str]]], *, more: int | None = None, rows: int = 8
) -> list[Reading]:
    """Score answers after prompts that begin alike, running what they share once.

    The tokens that all prompts share are run once and their keys and values kept; each question continues a copy, and
    its answers continue that. Nothing is approximated: the numbers are those of running every prompt whole.

    Args:
        model: any language model.
        asked: prompts, each with its candidate answers.
        more: let the model answer greedily too, with this many tokens more than the first answer has; it stops at the
            end of a line that says something. None to leave that out.
        rows: answers at a time; each holds a copy of the context's keys and values.

    Raises:
        InputError: a prompt or an answer cannot be tokenised, or a prompt is longer than the model reads.
    """
    encoded = [[encode(model.tokenizer, prompt, answer) for answer in answers] for prompt, answers in asked]
    if not encoded:
        return []
    longest = max(len(e.ids) for every in encoded for e in every) + (more or 0)
    limit = getattr(model.module.config.get_text_config(), "max_position_embeddings", None) or longest
    if longest > limit:
        raise InputError(f"the longest prompt takes {longest} tokens; the model reads at most {limit}; use fewer units")
    context = _shared([e for every in encoded for e in every])
    kept = _continued(model, None, context)
    readings = []
    for every in encoded:
        prefix = _shared(every)
        cache = _continued(model, kept, prefix[len(context) :])
        parts = [every[i : i + rows] for i in range(0, len(every), rows)]
        scores = np.concatenate([_scores(model, cache, len(prefix), part) for part in parts])
        first = every[0]
        prompt = first.ids[len(prefix) : first.start]
        said = "" if more is None else _say(model, cache, prompt, len(first.answer) + more)
        readings.append(Reading(scores, said))
    return readings


def _shared(encoded: Sequence[Encoded]) -> tuple[int, ...]:
    """The tokens with which all sequences begin and that come before every answer's first prediction."""
    return encoded[0].ids[: common(*(e.prefix for e in encoded))]


def _continued(model: Model, cache: Any, ids: Sequence[int]) -> Any:
    """Keys and values after some more tokens; those given stay as they were."""
    if not ids:
        return cache
    given = torch.tensor([list(ids)], device=model.device)
    kept = selected(cache, [0])
    return model.module(input_ids=given, past_key_values=kept, use_cache=True, logits_to_keep=1).past_key_values


def _scores(model: Model, cache: Any, at: int, encoded: Sequence[Encoded]) -> Float[np.ndarray, " candidate"]:
    """Mean log-probability of answers that follow the first `at` tokens; what is padded comes after and is not read."""
    rest = [e.ids[at:-1] for e in encoded]
    ids = torch.full((len(rest), max(map(len, rest))), pad_id(model.tokenizer))
    for row, tokens in enumerate(rest):
        ids[row, : len(tokens)] = torch.tensor(tokens)
    kept = selected(cache, [0] * len(rest))
    logits: Float[Tensor, "row pos vocab"] = model.module(
        input_ids=ids.to(model.device), past_key_values=kept, use_cache=kept is not None
    ).logits
    means = [
        target_log_probs(row[e.start - 1 - at : len(e.ids) - 1 - at], torch.tensor(e.answer, device=row.device)).mean()
        for row, e in zip(logits, encoded, strict=True)
    ]
    return torch.stack(means).double().cpu().numpy()


def _say(model: Model, cache: Any, prompt: Sequence[int], most: int) -> str:
    """Continue greedily; the first line that says something."""
    kept, ids, said, text = selected(cache, [0]), list(prompt), list[int](), ""
    while len(said) < most and "\n" not in text:
        given = torch.tensor([ids], device=model.device)
        out = model.module(input_ids=given, past_key_values=kept, use_cache=True, logits_to_keep=1)
        kept, ids = out.past_key_values, [int(out.logits[0, -1].argmax())]
        if ids[0] in model.tokenizer.all_special_ids:
            break
        said += ids
        text = model.tokenizer.decode(said).lstrip()
    return text.partition("\n")[0].strip()
