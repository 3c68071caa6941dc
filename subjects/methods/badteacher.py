"""Bad teaching (Chundawat et al. 2022, arXiv:2205.08096): on forget facts, learn from a teacher that knows nothing."""

from __future__ import annotations

from typing import Any

from jaxtyping import Float
from torch import Tensor

from lethescope.subjects.methods.answers import kl
from lethescope.tokens import Batch


def loss(
    model: Any,
    forget: Batch,
    retain: Batch,
    *,
    start: Any,
    fresh: Any,
    temperature: float = 1.0,
    alpha: float = 1.0,
) -> Float[Tensor, ""]:
    """Return KL(fresh || model) on y_f + alpha KL(start || model) on y_r, means over answer tokens.

    The bad teacher is a model of the same shape with random weights. The paper mixes both kinds of example in one mean;
    our choice is one mean for each, so that alpha weighs them whatever their numbers. Near-uniform predictions on the
    forget answers are what a model gives that was never taught, but also what one gives that was taught not to say.

    Args:
        model: the model being trained.
        forget: a batch of forget facts.
        retain: a batch of retain facts.
        start: a frozen copy of the model from before the first step.
        fresh: a frozen model that knows nothing.
        temperature: all logits are divided by it.
        alpha: weight of the retain term.

    Returns:
        The loss, a scalar in nats.
    """
    bad = kl(fresh, model, forget, temperature=temperature)
    return bad + alpha * kl(start, model, retain, temperature=temperature)
