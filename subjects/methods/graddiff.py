"""Gradient difference (Liu et al. 2022, arXiv:2203.12817): up the loss on forget, down the loss on retain."""

from __future__ import annotations

from typing import Any

from jaxtyping import Float
from torch import Tensor

from lethescope.subjects.methods.answers import nll
from lethescope.tokens import Batch


def loss(
    model: Any,
    forget: Batch,
    retain: Batch,
    *,
    gamma: float = 1.0,
    alpha: float = 1.0,
) -> Float[Tensor, ""]:
    """Return -gamma NLL(y_f) + alpha NLL(y_r).

    The forget term has no lower bound: with many steps or a high learning rate the model is destroyed, which is damage
    and not forgetting.

    Args:
        model: the model being trained.
        forget: a batch of forget facts.
        retain: a batch of retain facts.
        gamma: weight of the forget term.
        alpha: weight of the retain term.

    Returns:
        The loss, a scalar in nats.
    """
    return alpha * nll(model, retain) - gamma * nll(model, forget)
