"""Membership-inference scores: how much an answer looks as if the model had been trained on it.

Every score is oriented so that *higher = more member-like = less forgotten*; published attacks often give the negative.
All are taken from one teacher-forced pass over answer tokens, so they see outputs only: a low score does not say that
the knowledge is gone, and a high one can also mean that the answer is easy to guess. Only the comparison of members
with non-members of the same kind (`lethescope.auc.auc`) means something.
"""

import zlib
from collections.abc import Sequence

import numpy as np
import torch
import xarray as xr
from jaxtyping import Float

from lethescope.errors import InputError
from lethescope.facts import Fact
from lethescope.measurement import fact_coords
from lethescope.models import Model
from lethescope.scoring import candidates, tails
from lethescope.tokens import Encoded

LEAST_DEVIATION = 1e-3
"""Standard deviations below this count as this, so that a model that is sure of a token does not divide by 0."""


def measure(model: Model, facts: Sequence[Fact], *, reference: Model | None = None, k: float = 0.4) -> xr.Dataset:
    """Score how member-like the answer of every fact is after its prompt.

    What it does not prove: see the module. It is no channel: it has no residue of its own.

    Args:
        model: any language model.
        facts: all splits; forget against control is the comparison that `auc` is for.
        reference: a model with the same vocabulary that never learned the facts; without one there is no `reference`.
        k: share of the answer's least likely tokens that Min-K and Min-K++ look at, above 0 and at most 1.

    Returns:
        `loss`, `zlib`, `min_k`, `min_k_plus_plus` and, with a reference, `reference`, each over (fact); higher is more
        member-like. `loss`, `min_k` and `reference` in nats a token, `zlib` in nats a token and byte.

    Raises:
        InputError: an answer cannot be tokenised, k is out of range, or the reference has another vocabulary.
    """
    if reference is not None and reference.vocabulary != model.vocabulary:
        raise InputError("the reference has another vocabulary than the model; give one with the same tokenizer")
    encoded = candidates(model.tokenizer, facts, most=0).encoded
    log_probs, mean, deviation = token_statistics(model, encoded)
    scores = {
        "loss": loss(log_probs),
        "zlib": zlib_ratio(log_probs, [fact.answer for fact in facts]),
        "min_k": min_k(log_probs, k),
        "min_k_plus_plus": min_k_plus_plus(log_probs, mean, deviation, k),
    }
    if reference is not None:
        scores["reference"] = calibrated(log_probs, token_statistics(reference, encoded)[0])
    return xr.Dataset(
        {name: ("fact", values) for name, values in scores.items()},
        fact_coords(facts),
        {"direction": "higher = more member-like", "k": k, "citation": CITATION},
    )


def loss(log_probs: Float[np.ndarray, "*rest token"]) -> Float[np.ndarray, "*rest"]:
    """Return the mean log-probability of the answer's tokens (LOSS; Yeom et al. 2018, arXiv 1709.01604).

    Tokens are last and NaN beyond an answer's end, here and in the functions below.

    >>> loss(np.array([-1.0, -3.0, np.nan])).item()
    -2.0
    """
    return np.nanmean(log_probs, -1)


def zlib_ratio(log_probs: Float[np.ndarray, "row token"], texts: Sequence[str]) -> Float[np.ndarray, " row"]:
    """Return `loss` over the answer's length in bytes after zlib (Carlini et al. 2021, arXiv 2012.07805).

    The division takes off what any compressor finds easy. It does so for short answers only roughly: zlib's own header
    is 8 bytes and more.
    """
    return loss(log_probs) / np.array([len(zlib.compress(text.encode())) for text in texts])


def min_k(log_probs: Float[np.ndarray, "*rest token"], k: float = 0.4) -> Float[np.ndarray, "*rest"]:
    """Return the mean of the lowest `max(1, floor(k T))` of T token log-probabilities (Min-K %, arXiv 2310.16789).

    Args:
        log_probs: of the answers' tokens.
        k: the share, above 0 and at most 1; at 1 this is `loss`.

    Returns:
        One score an answer, <= 0.

    Raises:
        InputError: k is out of range.

    Example:
        >>> min_k(np.array([-1.0, -4.0, -2.0, -3.0, np.nan]), 0.5).item()
        -3.5
    """
    if not 0 < k <= 1:
        raise InputError(f"k is {k}; it is a share of the answer's tokens, above 0 and at most 1")
    length = (~np.isnan(log_probs)).sum(-1)
    count = np.maximum(1, np.floor(k * length))[..., None]
    lowest = np.where(np.arange(log_probs.shape[-1]) < count, np.sort(log_probs, -1), 0)  # NaN is sorted last
    return lowest.sum(-1) / count[..., 0]


def min_k_plus_plus(
    log_probs: Float[np.ndarray, "*rest token"],
    mean: Float[np.ndarray, "*rest token"],
    deviation: Float[np.ndarray, "*rest token"],
    k: float = 0.4,
) -> Float[np.ndarray, "*rest"]:
    """Return Min-K of `(log p - mean) / deviation` (Min-K++, Zhang et al. 2024, arXiv 2404.02936).

    Args:
        log_probs: of the answers' tokens.
        mean: of log p over the vocabulary, weighted by p, at each position.
        deviation: standard deviation of the same; at least `LEAST_DEVIATION` is taken.
        k: as in `min_k`.

    Returns:
        One score an answer, without unit.
    """
    return min_k((log_probs - mean) / np.maximum(deviation, LEAST_DEVIATION), k)


def calibrated(
    log_probs: Float[np.ndarray, "*rest token"], reference: Float[np.ndarray, "*rest token"]
) -> Float[np.ndarray, "*rest"]:
    """Return `loss` less the reference model's `loss` on the same tokens (Reference; arXiv 2012.07805)."""
    return loss(log_probs) - loss(reference)


@torch.no_grad()
def token_statistics(model: Model, encoded: Sequence[Encoded]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return every answer token's log p, and the mean and the deviation of log p over the vocabulary there.

    Mean and deviation are weighted by p, so the mean is minus the entropy.

    Returns:
        Three arrays (answer token), in nats, NaN beyond an answer's end.
    """
    width = max((len(e.answer) for e in encoded), default=0)
    out = np.full((3, len(encoded), width), np.nan)
    for batch in tails(model, encoded):
        logits = batch.run(model)
        log_p = logits.float().log_softmax(-1)
        p = log_p.exp()
        seen = torch.where(p > 0, log_p, 0)  # a token of no probability weighs nothing, and -inf times 0 is NaN
        mean = (p * seen).sum(-1)
        variance = (p * (seen - mean[..., None]).square()).sum(-1)
        longest = batch.targets.shape[1]
        spread = [each[batch.owner, :longest] for each in (mean, variance.sqrt())]
        found = torch.stack([batch.log_probs(logits), *spread]).double()
        out[:, batch.rows, :longest] = found.masked_fill(~batch.mask, float("nan")).cpu().numpy()
    return out[0], out[1], out[2]


CITATION = (
    "Yeom et al. 2018 (arXiv 1709.01604); Carlini et al. 2021 (arXiv 2012.07805); Shi et al. 2023 (arXiv 2310.16789); "
    "Zhang et al. 2024 (arXiv 2404.02936)"
)
