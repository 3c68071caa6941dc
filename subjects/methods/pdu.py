"""Primal-dual unlearning under a retain constraint (Entesari et al. 2025, arXiv:2506.05314)."""

from __future__ import annotations

from typing import Any

from jaxtyping import Float
from torch import Tensor

from lethescope.subjects.methods.answers import answer_logits, nll
from lethescope.subjects.methods.training import Lessons, descend, trainable
from lethescope.tokens import Batch


def edit(
    model: Any,
    lessons: Lessons,
    *,
    gamma: float = 1.0,
    alpha: float = 100.0,
    eta: float = 5.0,
    eps: float = 0.3,
    warmup: float = 0.5,
) -> None:
    """Flatten the forget logits while NLL(y_r) is held below eps by a multiplier that follows it.

    Each step descends on gamma flatness(y_f) + lam (NLL(y_r) - eps) and then, once the warm-up is over, sets
    lam = max(0, lam + eta (NLL(y_r) - eps)) from the same batch. Where retain is worse than eps its weight grows; where
    it is better its weight falls, and forgetting gets the room. `eps` should be above the retain loss at the start: a
    bound that cannot be met makes the weight grow without end. Flat logits hide every answer alike; they do not show
    that it was forgotten.

    Defaults are the authors' TOFU setting, whose warm-up is 5 of 10 epochs or more. Our choice: the warm-up is a share
    of the steps.

    Args:
        model: the model, ready to train; edited in place.
        lessons: the facts, their batches and the number of steps.
        gamma: weight of the forget term.
        alpha: the multiplier lam at the start, the weight of the retain term.
        eta: step size of the multiplier.
        eps: retain loss, in nats a token, that is allowed.
        warmup: share of the steps before the multiplier moves.
    """
    forget, retain, multiplier = lessons.batches("forget"), lessons.batches("retain"), alpha

    def step(done: float) -> Float[Tensor, ""]:
        nonlocal multiplier
        excess = nll(model, next(retain)) - eps
        loss = gamma * flatness(model, next(forget)) + multiplier * excess
        if done >= warmup:
            multiplier = max(0.0, multiplier + eta * excess.item())
        return loss

    descend(trainable(model), lessons, step)


def flatness(model: Any, batch: Batch) -> Float[Tensor, ""]:
    """Return mean (max_v z_v - mean_v z_v)^2 over the positions that predict answer tokens; 0 when all are uniform.

    Our choice: the authors' code reads the logits at the answer tokens themselves, so one position later.

    Args:
        model: the model being trained.
        batch: padded prompts and answers.

    Returns:
        The forget term, a scalar in squared logits.
    """
    logits = answer_logits(model, batch)
    return (logits.amax(-1) - logits.mean(-1)).square().mean()
