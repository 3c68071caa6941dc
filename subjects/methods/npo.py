"""Negative Preference Optimization (Zhang et al. 2024, arXiv:2404.05868)."""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import logsigmoid

from lethescope.subjects.methods.answers import nll, summed_log_prob
from lethescope.tokens import Batch


def loss(
    model: Any,
    forget: Batch,
    retain: Batch,
    *,
    start: Any,
    beta: float = 0.1,
    alpha: float = 1.0,
) -> Float[Tensor, ""]:
    """Return -(2 / beta) mean log sigmoid(-beta (S(y_f) - S_start(y_f))) + alpha NLL(y_r).

    S is an answer's summed log-probability. The push on a forget answer fades once it is much less likely than at the
    start, so that the model falls apart more slowly than under gradient ascent. A low loss does not show that anything
    was forgotten: only the answers' probability is pushed down.

    Args:
        model: the model being trained.
        forget: a batch of forget facts.
        retain: a batch of retain facts.
        start: a frozen copy of the model from before the first step.
        beta: how soon the push fades; towards 0 it becomes gradient ascent.
        alpha: weight of the retain term; at 0 the retain batch is not read.

    Returns:
        The loss, a scalar in nats.
    """
    with torch.no_grad():
        before = summed_log_prob(start, forget)
    ratio = summed_log_prob(model, forget) - before
    pushed = -2 / beta * logsigmoid(-beta * ratio).mean()
    return pushed + alpha * nll(model, retain) if alpha else pushed
