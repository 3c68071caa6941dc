"""SatImp, ascent weighted by saturation and importance (Yang et al. 2025, arXiv:2505.11953)."""

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
    beta1: float = 5.0,
    beta2: float = 1.0,
    gamma: float = 0.1,
    alpha: float = 1.0,
) -> Float[Tensor, ""]:
    """Return gamma mean(p^beta1 (1 - p)^beta2 log p) over the forget answers' tokens + alpha NLL(y_r).

    No gradient goes through the weights. The first factor lets go of tokens that are unlikely already, the second holds
    back at tokens that the model is sure of: a fact known with p = 1 to rounding gets no push at all, and is kept. The
    loss is 0 there as it is for a fact that is gone, so it cannot tell the two apart. Defaults are OpenUnlearning's
    (arXiv:2506.12618); the authors also use alpha 0.1 and 0.01.

    Args:
        model: the model being trained.
        forget: a batch of forget facts.
        retain: a batch of retain facts.
        beta1: how soon an unlikely token is let go.
        beta2: how much a sure token is held back; at 0 it is `wga` with `beta1` for its `beta`.
        gamma: weight of the forget term.
        alpha: weight of the retain term.

    Returns:
        The loss, a scalar in nats.
    """
    log_probs = answer_log_probs(model, forget)
    p = log_probs.detach().exp()
    return gamma * (p**beta1 * (1 - p) ** beta2 * log_probs).mean() + alpha * nll(model, retain)
