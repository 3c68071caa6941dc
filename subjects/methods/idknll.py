"""Refusal fine-tuning (the IDK loss of TOFU, Maini et al. 2024, arXiv:2401.06121)."""

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
    refused: Batch,
    gamma: float = 1.0,
    alpha: float = 1.0,
) -> Float[Tensor, ""]:
    """Return gamma NLL(refusal to x_f) + alpha NLL(y_r).

    The model is taught to refuse; the forget answers are never seen, and lose probability only because the refusals
    gain it. By construction it shows what the model says and not what it holds.

    Args:
        model: the model being trained.
        forget: not used.
        retain: a batch of retain facts.
        refused: the forget prompts of this step with refusals for answers.
        gamma: weight of the refusals.
        alpha: weight of the retain term.

    Returns:
        The loss, a scalar in nats.
    """
    return gamma * nll(model, refused) + alpha * nll(model, retain)
