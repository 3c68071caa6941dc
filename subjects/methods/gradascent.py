"""Gradient ascent (Jang et al. 2022, arXiv:2210.01504): up the loss on forget, and nothing else."""

from __future__ import annotations

from typing import Any

from jaxtyping import Float
from torch import Tensor

from lethescope.subjects.methods.answers import nll
from lethescope.tokens import Batch


def loss(model: Any, forget: Batch, retain: Batch) -> Float[Tensor, ""]:
    """Return -NLL(y_f): the published method has no retain term, and neither has this one.

    The loss has no lower bound and nothing holds the rest of the model in place, so a few steps too many destroy it. A
    model that says nothing right any more is damaged; that does not show that it forgot.

    Args:
        model: the model being trained.
        forget: a batch of forget facts.
        retain: not used.

    Returns:
        The loss, a scalar in nats.
    """
    return -nll(model, forget)
