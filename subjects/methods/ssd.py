"""Selective Synaptic Dampening (Foster et al. 2023, arXiv:2308.07707): shrink what matters to the forget facts most."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lethescope.errors import InputError
from lethescope.subjects.methods.gradients import mean_square
from lethescope.subjects.methods.training import Lessons, trainable


def edit(model: Any, lessons: Lessons, *, alpha: float = 10.0, dampening: float = 1.0, examples: int = 1) -> None:
    """Multiply each weight with I_f > alpha I by min(dampening I / I_f, 1); nothing is trained.

    I is the importance on all examples, forget and retain, and I_f that on the forget examples: the mean over batches
    of the squared gradient of the NLL. The paper takes batches of its training set; its numbers depend on their size,
    as `gradients.mean_square` says. Our choice: one example a batch, and the examples in the order of the facts.
    Steps, learning rate and seed play no part. With one example a batch, I is at least the forget examples' share of
    I_f, so no weight can be chosen once alpha is as large as the number of examples over that of forget examples.

    A dampened weight had a large gradient on the forget facts. It does not follow that they were held there.

    Args:
        model: the model, edited in place.
        lessons: the forget and the retain facts.
        alpha: how much more a weight must matter to the forget examples than to all of them to be chosen.
        dampening: the paper's lambda: the larger, the less the chosen weights shrink.
        examples: examples a batch.

    Raises:
        InputError: no weight is chosen, or a batch would be empty.
    """
    if examples < 1:
        raise InputError(f"examples is the number of examples a batch, at least 1, not {examples}")
    weights = trainable(model)
    both = [*lessons.examples("forget"), *lessons.examples("retain")]
    batches = (lessons.collate(both[i : i + examples]) for i in range(0, len(both), examples))
    overall = mean_square(model, batches, weights)
    forget = mean_square(model, lessons.once("forget", examples), weights)
    if not any((f > alpha * o).any() for f, o in zip(forget, overall, strict=True)):
        limit = min(alpha, len(both) / len(lessons.examples("forget")))
        raise InputError(f"no weight has I_f > {alpha:g} I, so nothing is dampened; use an alpha below {limit:.3g}")
    with torch.no_grad():
        for weight, f, o in zip(weights, forget, overall, strict=True):
            weight.mul_(factor(f, o, alpha, dampening).to(weight.dtype))


def factor(forget: Tensor, overall: Tensor, alpha: float, dampening: float) -> Tensor:
    """Return what each weight is multiplied by: 1 unless it is chosen.

    >>> factor(torch.tensor([1.0, 30.0, 30.0, 0.0]), torch.tensor([1.0, 1.0, 20.0, 0.0]), 10.0, 1.0)
    tensor([1.0000, 0.0333, 1.0000, 1.0000])

    Args:
        forget: importance on the forget examples.
        overall: importance on all examples, of the same shape.
        alpha: as in `edit`.
        dampening: as in `edit`.
    """
    return torch.where(forget > alpha * overall, (dampening * overall / forget).clamp(max=1), 1.0)
