"""Geometric-disentanglement unlearning, GU (2025, arXiv:2511.17100): forget at a right angle to retaining."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from lethescope.errors import InputError
from lethescope.subjects.methods import npo
from lethescope.subjects.methods.answers import nll
from lethescope.subjects.methods.gradients import combine, gradient, hand_over
from lethescope.subjects.methods.training import Lessons, descend, frozen_copy, trainable

SAME = 1e-7
"""Directions this much weaker than the strongest are not told from rounding."""


def edit(model: Any, lessons: Lessons, *, k: int = 8, beta: float = 0.1, alpha: float = 1.0) -> None:
    """Descend along g_f - P g_f + alpha g_r, where P projects onto the span of the last k retain gradients.

    g_f is the gradient of NPO's forget term, g_r that of the retain facts' NLL. To first order the retain loss does not
    change along a direction orthogonal to its gradient; P works tensor by tensor, as in the authors' first code, which
    is stricter than orthogonality of the whole. Our choices: the retain loss is the NLL, as a KL to the start has no
    gradient there; the span slides along, so that it always holds this step's g_r, where their basis is filled once;
    every trained weight takes part.

    The promise is that of an infinitely small plain gradient step on the batches that were seen. AdamW, clipping and
    weight decay bend the direction, and other retain facts may still be lost. Nor does it follow that facts whose
    gradients are at a right angle are kept apart in the model.

    Args:
        model: the model, edited in place.
        lessons: facts, steps and learning rate.
        k: retain gradients in the span; each is as large as the model.
        beta: NPO's: how soon the push on a forget answer fades.
        alpha: weight of the retain gradient.

    Raises:
        InputError: k is below 1.
    """
    if k < 1:
        raise InputError(f"k is the number of retain gradients to keep clear of, at least 1, not {k}")
    weights, start = trainable(model), frozen_copy(model)
    forget, retain, seen = lessons.batches("forget"), lessons.batches("retain"), deque[list[Tensor]](maxlen=k)

    def step(_done: float) -> Tensor:
        keep = next(retain)
        loss = npo.loss(model, next(forget), keep, start=start, beta=beta, alpha=0.0)
        found = gradient(loss, weights)
        seen.append(gradient(nll(model, keep), weights))
        free = [without_span(g, span) for g, span in zip(found, zip(*seen, strict=True), strict=True)]
        hand_over(weights, combine(1.0, free, alpha, seen[-1]))
        return loss.detach()

    descend(weights, lessons, step)


def without_span(tensor: Float[Tensor, "*shape"], span: Sequence[Float[Tensor, "*shape"]]) -> Float[Tensor, "*shape"]:
    """Take off a tensor its projection onto the span of others; what is left is orthogonal to each.

    >>> without_span(torch.tensor([1.0, 2.0, 3.0]), [torch.tensor([2.0, 0.0, 0.0]), torch.tensor([2.0, 2.0, 0.0])])
    tensor([0., 0., 3.])

    Args:
        tensor: what is projected.
        span: tensors of the same shape; dependent ones and zeros do no harm.
    """
    rows = torch.stack([s.flatten() for s in span]).double()
    rows = rows / rows.norm(dim=-1, keepdim=True).clamp(min=1e-300)
    _, strength, basis = torch.linalg.svd(rows, full_matrices=False)
    basis = basis[strength > SAME * strength.amax().clamp(min=1e-300)]
    flat = tensor.double().flatten()
    for _ in range(2):  # once more, to take off what rounding left
        flat = flat - basis.mT @ (basis @ flat)
    return flat.reshape(tensor.shape).to(tensor.dtype)
