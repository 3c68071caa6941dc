"""RMU, representation misdirection (Li et al. 2024, arXiv:2403.03218)."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.functional import mse_loss

from lethescope.errors import InputError
from lethescope.hooks import capturing
from lethescope.models import anatomy
from lethescope.subjects.methods.answers import predicting
from lethescope.subjects.methods.training import Lessons, descend, frozen_copy
from lethescope.tokens import Batch


def edit(
    model: Any,
    lessons: Lessons,
    *,
    layer: int | None = None,
    coefficient: float = 2.0,
    gamma: float = 1.0,
    alpha: float = 1.0,
) -> None:
    """Send the forget facts' states at a layer to a random vector, and hold the retain facts' states in place.

    The loss is gamma MSE(h(x_f), c u) + alpha MSE(h(x_r), h_start(x_r)), where h is the residual stream after block
    `layer`, u a random vector of length 1 that the seed fixes, and c the coefficient. Only the MLPs' output weights of
    blocks `layer - 2` to `layer` are trained. What is garbled is the road from one layer to the next ones: blocks below
    are untouched and may still hold the fact, which the loss cannot tell.

    Our choices: the layer at two fifths of the depth (the paper's is 7 of 32); states are taken where they predict an
    answer token, because the state at an answer's last token predicts nothing of it; MSE is the mean over all these
    states and over dimensions (the paper sums over dimensions, and OpenUnlearning, arXiv:2506.12618, averages within
    each example first). The coefficient must suit the length of the model's own states: too small a one moves little.

    Args:
        model: the model, ready to train; edited in place.
        lessons: the facts, their batches, the seed and the number of steps.
        layer: block whose output is steered, counted from 0.
        coefficient: length c of the vector that forget states are sent to.
        gamma: weight of the forget term.
        alpha: weight of the retain term.

    Raises:
        InputError: there is no such layer, or nothing that may be trained.
    """
    blocks = anatomy(model).blocks
    at = chosen_layer(layer, len(blocks))
    start = frozen_copy(model)
    held, target = anatomy(start).blocks[at], coefficient * control_vector(model, lessons.seed)
    weights = only(model, [output_weight(block, model.config.hidden_size) for block in blocks[max(0, at - 2) : at + 1]])
    forget, retain = lessons.batches("forget"), lessons.batches("retain")

    def step(_done: float) -> Float[Tensor, ""]:
        states, batch = states_after(model, blocks[at], next(forget)), next(retain)
        with torch.no_grad():
            before = states_after(start, held, batch)
        kept = mse_loss(states_after(model, blocks[at], batch), before)
        return gamma * mse_loss(states, target.expand_as(states)) + alpha * kept

    descend(weights, lessons, step)


def chosen_layer(layer: int | None, depth: int) -> int:
    """Return the layer, or the one at two fifths of the depth when none is given.

    Raises:
        InputError: the model has no such layer.
    """
    at = round(0.4 * depth) if layer is None else layer
    if not 0 <= at < depth:
        raise InputError(f"there is no layer {layer}; this model's layers are 0 to {depth - 1}")
    return at


def control_vector(model: Any, seed: int) -> Float[Tensor, " d_model"]:
    """Return u: uniform draws from [0, 1), scaled to length 1; the same for the same seed on every device."""
    draws = np.random.default_rng([seed, 4]).random(model.config.hidden_size)
    return torch.tensor(draws / np.linalg.norm(draws), dtype=torch.float32, device=model.device)


def states_after(model: Any, block: nn.Module, batch: Batch) -> Float[Tensor, "token d_model"]:
    """Return the residual stream after a block where it predicts answer tokens; later blocks are not computed."""
    with capturing([block], stop=True) as seen:
        model(**batch.inputs())
    return predicting(seen[0], batch)


def output_weight(block: nn.Module, width: int) -> nn.Parameter:
    """Find the weight of the block's last linear map to d_model that is no part of its attention.

    It is called `down_proj`, `c_proj`, `dense_4h_to_h` or `fc2`, by family; so it is told by its shape.

    Args:
        block: a decoder block.
        width: d_model.

    Returns:
        The MLP's output weight.

    Raises:
        InputError: there is none, as where experts are stacked into one tensor.
    """
    maps = [
        part
        for name, part in block.named_modules()
        if getattr(part, "out_features", getattr(part, "nf", None)) == width and "att" not in name.lower()
    ]
    if not maps:
        raise InputError(f"{type(block).__name__} has no linear map to {width} dimensions in its MLP; RMU trains that")
    return maps[-1].weight


def only(model: nn.Module, weights: list[nn.Parameter]) -> list[nn.Parameter]:
    """Of some weights, let those be trained that could be already, and no other weight of the model.

    Raises:
        InputError: none of them could be trained.
    """
    mine = [weight for weight in weights if weight.requires_grad]
    if not mine:
        raise InputError("RMU trains the MLPs of its layer and of the two before it; name one of these in blocks")
    model.requires_grad_(False)
    for weight in mine:
        weight.requires_grad_(True)
    return mine
