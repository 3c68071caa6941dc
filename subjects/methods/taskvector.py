"""Task-vector negation (Ilharco et al. 2022, arXiv:2212.04089): subtract what fine-tuning on forget adds."""

from __future__ import annotations

import copy
from typing import Any

import torch

from lethescope.subjects.methods.answers import nll
from lethescope.subjects.methods.training import Lessons, descend, trainable


def edit(model: Any, lessons: Lessons, *, scale: float = 5.0) -> None:
    """Set theta to theta - scale (theta_overfit - theta), where theta_overfit is a copy fine-tuned on forget.

    The copy takes the lessons' steps on NLL(y_f); the model itself is not trained, and the retain facts are never seen.
    One step along one straight line can leave the fact in place or destroy the model, as `scale` and the number of
    steps have it; neither shows that the fact is gone. The default scale is that of MUSE (Shi et al. 2024,
    arXiv:2407.06460), for fine-tuning at a learning rate of 1e-5.

    Args:
        model: the model, ready to train; edited in place.
        lessons: the forget facts, their batches, the learning rate and the number of steps.
        scale: how far to go the other way.
    """
    overfit, forget = copy.deepcopy(model), lessons.batches("forget")
    descend(trainable(overfit), lessons, lambda _done: nll(overfit, next(forget)))
    with torch.no_grad():
        for weight, learned in zip(trainable(model), trainable(overfit), strict=True):
            weight.sub_(scale * (learned - weight))
