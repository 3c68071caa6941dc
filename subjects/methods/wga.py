"""Weighted gradient ascent (Wang et al. 2025, arXiv:2502.19301)."""

from __future__ import annotations

from typing import Any

from jaxtyping import Float
from torch import Tensor

from lethescope.subjects.methods.answers import answer_log_probs, nll
from lethescope.tokens import Batch


def loss(
    model: Any,
    forget: Batch,
    retain: Batch,
    *,
    beta: float = 1.0,
    gamma: float = 1.0,
    alpha: float = 1.0,
) -> Float[Tensor, ""]:
    """Return gamma mean(p^beta log p) over the forget answers' tokens + alpha NLL(y_r); no gradient through p^beta.

    A token's own probability p weighs its ascent, so tokens that are already unlikely, whose gradients would grow
    without end, are let go. That stops the ascent early; it does not show that anything was forgotten.

    Args:
        model: the model being trained.
        forget: a batch of forget facts.
        retain: a batch of retain facts.
        beta: how soon a token is let go; at 0 it is gradient difference.
        gamma: weight of the forget term.
        alpha: weight of the retain term.

    Returns:
        The loss, a scalar in nats.
    """
    log_probs = answer_log_probs(model, forget)
    weights = (beta * log_probs.detach()).exp()
    return gamma * (weights * log_probs).mean() + alpha * nll(model, retain)
