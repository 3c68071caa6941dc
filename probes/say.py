"""Channel *say*: what the model outputs when it is asked, in its own words and over every given prompt."""

from collections.abc import Sequence

import numpy as np
import xarray as xr

from lethescope import measurement
from lethescope.channel import Channel, every_budget
from lethescope.facts import Fact
from lethescope.models import Model
from lethescope.probes.memorization import exact_memorization, extraction_strength, truth_ratio
from lethescope.scoring import candidates, score_tokens


def measure(model: Model, facts: Sequence[Fact], *, original: Model | None = None, seed: int = 0) -> xr.Dataset:
    """Measure how readily a model says each fact, over the prompt and its paraphrases.

    The score of a candidate is its mean token log-probability under the prompt that suits it best. A high value means
    that the fact is *said*; a low one does not mean that it is gone: that is what the other channels are for.

    Args:
        model: any language model.
        facts: all splits; retain facts show the damage.
        original: not used; every channel has the same call.
        seed: not used.

    Returns:
        `score(fact, candidate, place)` with the one place `best prompt`, in nats, <= 0. Beside it, per prompt (0 = the
        prompt, then the paraphrases; NaN where a fact has fewer): `log_probability(fact, prompt, candidate)`,
        `rank(fact, prompt)` of the true answer among the candidates (1 = likeliest), `greedy(fact, prompt)` (1 = greedy
        decoding gives the answer word for word), `exact_memorization`, `extraction_strength` and `truth_ratio`.

    Raises:
        InputError: an answer cannot be tokenised.
    """
    prompts = 1 + max(len(f.paraphrases) for f in facts)
    by_prompt = [_one_prompt(model, facts, n) for n in range(prompts)]
    width = max(p["log_probability"].shape[1] for p in by_prompt)
    tables = {
        name: np.stack([_widen(p[name], width) if name == "log_probability" else p[name] for p in by_prompt], 1)
        for name in by_prompt[0]
    }
    with np.errstate(invalid="ignore"):
        best = np.fmax.reduce(tables["log_probability"], axis=1)
    dims = ("fact", "prompt", "candidate")
    variables = {name: (dims[: array.ndim], array) for name, array in tables.items()}
    return measurement.from_scores(best[..., None], facts, ["best prompt"], variables=variables)


def _one_prompt(model: Model, facts: Sequence[Fact], prompt: int) -> dict[str, np.ndarray]:
    """Return every output metric under one prompt, facts first, NaN where a fact has no such prompt."""
    asked = candidates(model.tokenizer, facts, prompt=prompt)
    log_probs, right = score_tokens(model, asked.encoded)
    length = np.array([len(e.answer) for e in asked.encoded])
    table = asked.table(np.nansum(log_probs, -1) / length)

    def per_fact(values: np.ndarray) -> np.ndarray:
        return asked.table(values)[:, 0]

    here = ~np.isnan(table[:, 0])
    rank = np.where(here, 1 + (table[:, 1:] > table[:, :1]).sum(-1), np.nan)
    return {
        "log_probability": table,
        "rank": rank,
        "greedy": per_fact((right.sum(-1) == length).astype(float)),
        "exact_memorization": per_fact(exact_memorization(right, length)),
        "extraction_strength": per_fact(extraction_strength(right, length)),
        "truth_ratio": truth_ratio(table[:, 0], table[:, 1:]),
    }


def _widen(table: np.ndarray, width: int) -> np.ndarray:
    return np.pad(table, ((0, 0), (0, width - table.shape[1])), constant_values=np.nan)


CHANNEL = Channel(
    name="say",
    measure=measure,
    version=1,
    scale="probability",
    citation="Maini et al. 2024 (arXiv 2401.06121); Dorna et al. 2025 (arXiv 2506.12618)",
    budgets=every_budget(),
    splits=("forget", "retain", "control"),
)
