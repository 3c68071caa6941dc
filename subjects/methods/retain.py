"""Fine-tuning on the retain facts only: the baseline that hopes for catastrophic forgetting."""

from __future__ import annotations

from typing import Any

from jaxtyping import Float
from torch import Tensor

from lethescope.subjects.methods.answers import nll
from lethescope.tokens import Batch


def loss(model: Any, forget: Batch, retain: Batch) -> Float[Tensor, ""]:
    """Return NLL(y_r): a baseline in Golatkar et al. 2019 (arXiv:1911.04933); the forget facts are never seen.

    Nothing pushes the forget answers down; if they fade at all, it is because the weights drift. What it leaves behind
    is what an audit must still find. It has no settings beyond those of every method.

    Args:
        model: the model being trained.
        forget: not used.
        retain: a batch of retain facts.

    Returns:
        The loss, a scalar in nats.
    """
    return nll(model, retain)
