"""CE-U, cross-entropy unlearning (Yang 2025, arXiv:2503.01224)."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import cross_entropy

from lethescope.subjects.methods.answers import answer_ids, answer_logits
from lethescope.tokens import Batch


def loss(model: Any, forget: Batch, retain: Batch, *, ignore_first: int = 1) -> Float[Tensor, ""]:
    """Return mean CE(softmax(z with z_y = -inf), softmax(z)) over y_f's tokens; no gradient through the target.

    Each answer token's probability is dealt out to all the others as the model itself weighs them, so the gradient
    neither vanishes where the model is sure nor grows where it is not. The published method has no retain term, and
    neither has this one; it leaves the order of all other tokens as it was, which may still give the answer away.

    Our choice: an answer of no more than `ignore_first` tokens is taken whole, since nothing of it would be left.

    Args:
        model: the model being trained.
        forget: a batch of forget facts.
        retain: not used.
        ignore_first: tokens at the start of every answer that are left alone, 1 as in the paper.

    Returns:
        The loss, a scalar in nats.
    """
    later = without_first(forget, ignore_first)
    logits = answer_logits(model, later)
    target = logits.detach().scatter(-1, answer_ids(later)[:, None], -float("inf")).softmax(-1)
    return cross_entropy(logits, target)


def without_first(batch: Batch, n: int) -> Batch:
    """Take the first n tokens out of the mask of every answer that has more than n."""
    mask = batch.answer_mask
    kept = mask & ((mask.cumsum(-1) > n) | (mask.sum(-1, keepdim=True) <= n))
    return replace(batch, answer_mask=kept)
