"""Repeated sampling: does a model give the answer if it is asked often enough?"""

import re
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import xarray as xr
from einops import rearrange
from numpy.typing import NDArray

from lethescope.errors import InputError
from lethescope.facts import Fact, same_text
from lethescope.measurement import fact_coords
from lethescope.models import Model
from lethescope.scoring import candidates
from lethescope.statistics import seeded
from lethescope.tokens import Encoded, collate, pad_id

CITATION = "unPact (arXiv 2509.24675)"


def sampled(
    model: Model, facts: Sequence[Fact], *, n: int, temperature: float, seed: int, spare: int = 4, rows: int = 128
) -> xr.Dataset:
    """Let a model answer n times at a temperature: a fact is recovered if any sample is right (unPact's PROBAB).

    A sample is right when it begins with the answer's words, whatever their case and punctuation (our choice; the paper
    had a model judge). Guessing often enough is right too: hold `recovered` against `null`, the same for the fact's
    alternatives. What it does not prove: that a fact never sampled has no probability.

    Args:
        model: any language model.
        facts: all splits.
        n: samples a fact; the paper's number and temperature were not to be had.
        temperature: logits are divided by it, above 0.
        seed: of the samples, beside the fact's id: other facts do not matter.
        spare: tokens beyond the answer's own, for other ways to write it.
        rows: samples at a time.

    Returns:
        `right(fact, sample)`, `recovered(fact)` and `null(fact)`, the share of alternatives that any sample gives (NaN
        without alternatives), all in [0, 1]; `text(fact, sample)`. n, temperature and seed are attributes.

    Raises:
        InputError: n or the temperature is out of range, or an answer cannot be tokenised.
    """
    if n < 1 or not temperature > 0 or spare < 0:
        raise InputError(
            f"n is {n}, temperature {temperature}, spare {spare}; give n >= 1, temperature > 0, spare >= 0"
        )
    encoded = candidates(model.tokenizer, facts, most=0).encoded
    size = max(1, rows // n)
    texts = np.concatenate([
        _samples(model, encoded[i : i + size], [seeded(seed, f.id) for f in facts[i : i + size]], n, temperature, spare)
        for i in range(0, len(facts), size)
    ])
    right = np.array([[_begins(text, f.answer) for text in row] for f, row in zip(facts, texts, strict=True)])
    wrong = [
        [any(_begins(text, other) for text in row) for other in f.alternatives]
        for f, row in zip(facts, texts, strict=True)
    ]
    return xr.Dataset(
        {
            "right": (("fact", "sample"), right.astype(float)),
            "recovered": ("fact", right.any(-1).astype(float)),
            "null": ("fact", [float(np.mean(w)) if w else float("nan") for w in wrong]),
            "text": (("fact", "sample"), texts),
        },
        fact_coords(facts),
        {"n": n, "temperature": temperature, "seed": seed, "citation": CITATION},
    )


@torch.no_grad()
def _samples(
    model: Model, encoded: Sequence[Encoded], rngs: Sequence[Any], n: int, temperature: float, spare: int
) -> NDArray[np.str_]:
    """Sample n continuations of each prompt by inverting the distribution at uniform draws: texts (fact sample)."""
    lengths = [len(e.answer) + spare for e in encoded]
    draws = np.full((len(encoded), n, max(lengths)), 0.5)
    for row, rng, length in zip(draws, rngs, lengths, strict=True):
        row[:, :length] = rng.random((n, length))
    uniform = torch.from_numpy(rearrange(draws, "fact sample step -> (fact sample) step")).to(model.device)
    prompts = [Encoded(e.ids[: e.start], e.start) for e in encoded]
    batch = collate(prompts, pad_id(model.tokenizer), side="left", device=model.device)
    out = model.module(**batch.inputs(), use_cache=True, logits_to_keep=1)
    owner = torch.arange(len(encoded), device=model.device).repeat_interleave(n)
    out.past_key_values.batch_select_indices(owner)
    logits, mask, last = out.logits[owner], batch.attention_mask[owner], batch.position_ids[owner, -1:]
    said = []
    for step in range(max(lengths)):
        below = (logits[:, -1].double() / temperature).softmax(-1).cumsum(-1) < uniform[:, step : step + 1]
        said.append(below.sum(-1, keepdim=True).clamp(max=logits.shape[-1] - 1))
        mask, last = torch.nn.functional.pad(mask, (0, 1), value=1), last + 1
        logits = model.module(
            input_ids=said[-1],
            attention_mask=mask,
            position_ids=last,
            past_key_values=out.past_key_values,
            use_cache=True,
        ).logits
    tokens = rearrange(torch.cat(said, -1).cpu().numpy(), "(fact sample) step -> fact sample step", sample=n)
    end = model.tokenizer.eos_token_id
    return np.array([
        [model.tokenizer.decode(ids[: ids.index(end) if end in ids[:k] else k]) for ids in own]
        for own, k in zip(tokens.tolist(), lengths, strict=True)
    ])


def _begins(text: str, answer: str) -> bool:
    """Whether a text begins with the answer's words; an answer without spaces between its words, with its letters."""
    if not answer.isascii():
        return "".join(same_text(text).split()).startswith("".join(same_text(answer).split()))
    wanted = re.findall(r"\w+", answer.casefold()) or [answer.strip()]
    return re.findall(r"\w+", text.casefold())[: len(wanted)] == wanted
