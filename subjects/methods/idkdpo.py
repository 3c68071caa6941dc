"""Direct preference for refusals: DPO (Rafailov et al. 2023, arXiv:2305.18290) as an unlearning loss."""

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
    refused: Batch,
    beta: float = 0.1,
    gamma: float = 1.0,
    alpha: float = 1.0,
) -> Float[Tensor, ""]:
    """Return -(2 gamma / beta) mean log sigmoid(beta (R(y_idk) - R(y_f))) + alpha NLL(y_r), with R = S - S_start.

    S is an answer's summed log-probability, y_idk a refusal to the same prompt. The factor 2 / beta is that of
    OpenUnlearning (arXiv:2506.12618), so that the scale is NPO's; NPO is this loss without R(y_idk). The loss only asks
    that refusals be preferred to answers more than before: both may become less likely, and neither need be forgotten.

    Args:
        model: the model being trained.
        forget: a batch of forget facts.
        retain: a batch of retain facts.
        start: a frozen copy of the model from before the first step.
        refused: the forget prompts of this step, row for row, with refusals for answers.
        beta: how soon the push fades once refusals are preferred.
        gamma: weight of the forget term.
        alpha: weight of the retain term.

    Returns:
        The loss, a scalar in nats.
    """
    with torch.no_grad():
        before = summed_log_prob(start, refused) - summed_log_prob(start, forget)
    preference = summed_log_prob(model, refused) - summed_log_prob(model, forget) - before
    return -2 * gamma / beta * logsigmoid(beta * preference).mean() + alpha * nll(model, retain)
