"""BLUR, two-level unlearning with forgetting first (2025, arXiv:2506.08164)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lethescope.subjects.methods import npo
from lethescope.subjects.methods.answers import nll
from lethescope.subjects.methods.gradients import combine, dot, gradient, hand_over
from lethescope.subjects.methods.training import Lessons, descend, frozen_copy, trainable


def edit(model: Any, lessons: Lessons, *, gamma: float = 1.0, beta: float = 0.1) -> None:
    """Descend along g_r + (gamma - <g_r, g_f> / |g_f|^2) g_f: forgetting is the lower level, which retaining must obey.

    g_f is the gradient of NPO's forget term, g_r that of the retain facts' NLL; products and norms are over all weights
    at once. The retain step so loses its part along g_f, and g_f is added with weight gamma: the step's product with
    g_f is gamma |g_f|^2 whatever g_r wants (the opposite of `gu`). AdamW then bends the direction, so this holds for
    plain steps only; and a step down NPO's loss lowers the answers' probability, no more.

    Args:
        model: the model, edited in place.
        lessons: facts, steps and learning rate.
        gamma: weight of the forget gradient.
        beta: NPO's: how soon the push on a forget answer fades.
    """
    weights, start = trainable(model), frozen_copy(model)
    forget, retain = lessons.batches("forget"), lessons.batches("retain")

    def step(_done: float) -> Tensor:
        keep = next(retain)
        loss = npo.loss(model, next(forget), keep, start=start, beta=beta, alpha=0.0)
        hand_over(weights, direction(gradient(loss, weights), gradient(nll(model, keep), weights), gamma))
        return loss.detach()

    descend(weights, lessons, step)


def direction(forget: Sequence[Tensor], retain: Sequence[Tensor], gamma: float) -> list[Tensor]:
    """Return g_r + (gamma - <g_r, g_f> / |g_f|^2) g_f.

    >>> direction([torch.tensor([2.0, 0.0])], [torch.tensor([3.0, 5.0])], 1.0)
    [tensor([2., 5.])]

    Args:
        forget: g_f; where it is 0, g_r is returned.
        retain: g_r.
        gamma: as in `edit`.
    """
    along = dot(retain, forget) / dot(forget, forget).clamp(min=torch.finfo(torch.float32).tiny)
    return combine(1.0, retain, gamma - along, forget)
