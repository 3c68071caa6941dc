"""SimNPO, negative preference without a reference model (Fan et al. 2024, arXiv:2410.07163)."""

from __future__ import annotations

from typing import Any

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
    beta: float = 4.5,
    delta: float = 0.0,
    gamma: float = 0.125,
    alpha: float = 1.0,
) -> Float[Tensor, ""]:
    """Return -(2 gamma / beta) mean log sigmoid(beta (NLL(y_f) - delta)) + alpha NLL(y_r).

    NLL(y_f) is each answer's own mean over its tokens, so short answers are pushed as hard as long ones, and the push
    fades once an answer is unlikely in itself, wherever it started. The paper takes a margin off after the product with
    beta; here, as in OpenUnlearning (arXiv:2506.12618), delta is inside and so in nats a token; both are 0 by default.
    A low loss says that the answers are unlikely, not that they are forgotten.

    Args:
        model: the model being trained.
        forget: a batch of forget facts.
        retain: a batch of retain facts.
        beta: how soon the push fades; towards 0 it becomes gradient ascent, every answer weighing the same.
        delta: how unlikely answers must be, in nats a token, before the push is half gone.
        gamma: weight of the forget term.
        alpha: weight of the retain term.

    Returns:
        The loss, a scalar in nats.
    """
    each = -summed_log_prob(model, forget) / forget.answer_mask.sum(-1)
    return -2 * gamma / beta * logsigmoid(beta * (each - delta)).mean() + alpha * nll(model, retain)
