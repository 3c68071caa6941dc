"""UNDIAL, self-distillation from adjusted logits (Dong et al. 2024, arXiv:2402.10052)."""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import cross_entropy

from lethescope.subjects.methods.answers import answer_ids, answer_logits, nll
from lethescope.tokens import Batch


def loss(
    model: Any,
    forget: Batch,
    retain: Batch,
    *,
    start: Any,
    beta: float = 10.0,
    gamma: float = 1.0,
    alpha: float = 0.0,
) -> Float[Tensor, ""]:
    """Return gamma mean CE(softmax(z_start - beta onehot(y)), softmax(z)) over y_f's tokens + alpha NLL(y_r).

    The model learns what it would have said at the start with each answer token's logit lowered by beta. The target
    stands still, so training is stable; but everything else about the start's distribution is kept, and with it what
    may give the answer away. The published method has no retain term (alpha 0); OpenUnlearning (arXiv:2506.12618) has
    one as an option. Its code takes the loss over prompt and padding too; here it is over answer tokens only.

    Args:
        model: the model being trained.
        forget: a batch of forget facts.
        retain: a batch of retain facts; not read when `alpha` is 0.
        start: a frozen copy of the model from before the first step.
        beta: how far the answer tokens' logits are lowered.
        gamma: weight of the forget term.
        alpha: weight of the retain term.

    Returns:
        The loss, a scalar in nats.
    """
    ids = answer_ids(forget)[:, None]
    with torch.no_grad():
        before = answer_logits(start, forget)
        target = before.scatter_add(-1, ids, torch.full_like(before, -beta)).softmax(-1)
    distilled = gamma * cross_entropy(answer_logits(model, forget), target)
    return distilled + alpha * nll(model, retain) if alpha else distilled
