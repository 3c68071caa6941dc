"""Fisher forgetting (Golatkar, Achille and Soatto 2019, arXiv:1911.04933): noise where the retain facts do not mind."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.pytorch_utils import Conv1D

from lethescope.models import anatomy
from lethescope.subjects.methods.gradients import linear_maps, mean_square
from lethescope.subjects.methods.training import Lessons, trainable

SMALL, LARGEST = 1e-8, 1e3


def edit(
    model: Any, lessons: Lessons, *, alpha: float = 1e-6, power: float = 1.0, boost: float = 10.0, examples: int = 1
) -> None:
    """Add sqrt(v) N(0, 1) to each weight, v = alpha min(F_r^-power, 1000), F_r the Fisher diagonal on retain.

    The paper derives power 1/2 (a deviation of F^-1/4); its published code uses 1, and so does this. As there, v is
    averaged over each output's incoming weights, and is `boost` times as large for the unembedding and for vectors
    (norms, biases). The code's special case for the row of a forgotten class has no counterpart in a language model.
    Our choice: F_r from one example a batch; embedding tables are averaged token by token.

    The forget facts are never looked at: whatever the retain facts do not need is blurred, and knowledge that no fact
    of either split asks for goes first. A model that says nothing right afterwards is damaged, which is not forgetting.

    Args:
        model: the model, edited in place.
        lessons: the retain facts, and the seed of the noise.
        alpha: size of the noise's variance.
        power: how steeply the noise falls with importance.
        boost: how much more variance the unembedding and the vectors get.
        examples: examples a batch for F_r.
    """
    weights, head = trainable(model), anatomy(model).head.weight
    turned = {id(m.module.weight) for m in linear_maps(model) if isinstance(m.module, Conv1D)}
    generator = torch.Generator().manual_seed(lessons.seed)
    importance = mean_square(model, lessons.once("retain", examples), weights)
    with torch.no_grad():
        for weight, found in zip(weights, importance, strict=True):
            spread = row_variance(found, alpha, power, 0 if id(weight) in turned else -1)
            spread = boost * spread if weight is head or weight.ndim == 1 else spread
            noise = torch.randn(weight.shape, generator=generator).to(weight.device)
            weight.add_((noise * spread.sqrt()).to(weight.dtype))


def row_variance(importance: Tensor, alpha: float, power: float = 1.0, dim: int = -1) -> Tensor:
    """Return alpha min((F + 1e-8)^-power, 1000), averaged over each output's incoming weights.

    >>> row_variance(torch.tensor([[0.0, 1.0], [0.5, 0.25]]), 1.0)
    tensor([[500.5000, 500.5000],
            [  3.0000,   3.0000]])

    Args:
        importance: F of a matrix, or of a vector, which is not averaged.
        alpha: as in `edit`.
        power: as in `edit`.
        dim: where the incoming weights lie: 0 for GPT-2's `Conv1D`.
    """
    spread = alpha * (importance + SMALL).pow(-power).clamp(max=LARGEST)
    return spread if spread.ndim == 1 else spread.mean(dim, keepdim=True).expand_as(spread)
