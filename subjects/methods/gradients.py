"""What methods that handle gradients share: gradients as lists of tensors, importance, and low-rank factors.

A gradient, like an importance, is a list of tensors, one for each weight and of its shape. Tied weights are one weight,
as `Module.parameters` counts them.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from lethescope.errors import InputError
from lethescope.models import anatomy
from lethescope.subjects.methods.answers import nll
from lethescope.subjects.methods.training import LORA_RANK, with_adapters
from lethescope.tokens import Batch


def gradient(loss: Float[Tensor, ""], weights: Sequence[Tensor], *, keep: bool = False) -> list[Tensor]:
    """Return the gradient of a loss; zeros for a weight that the loss does not depend on.

    Args:
        loss: a scalar.
        weights: what to differentiate by.
        keep: keep the graph, so that the gradient can be differentiated itself.
    """
    return list(torch.autograd.grad(loss, list(weights), create_graph=keep, materialize_grads=True))


def dot(a: Sequence[Tensor], b: Sequence[Tensor]) -> Float[Tensor, ""]:
    """Return the inner product of two gradients over all their tensors at once, in float32 or better.

    >>> dot([torch.tensor([1.0, 2.0]), torch.tensor([[3.0]])], [torch.tensor([1.0, 1.0]), torch.tensor([[2.0]])])
    tensor(9.)
    """
    wide = [torch.promote_types(x.dtype, torch.float32) for x in a]
    return torch.stack([(x.to(d) * y.to(d)).sum() for x, y, d in zip(a, b, wide, strict=True)]).sum()


def combine(p: float | Tensor, a: Sequence[Tensor], q: float | Tensor, b: Sequence[Tensor]) -> list[Tensor]:
    """Return p a + q b."""
    return [p * x + q * y for x, y in zip(a, b, strict=True)]


def hand_over(weights: Sequence[nn.Parameter], gradients: Sequence[Tensor]) -> None:
    """Write gradients where the optimiser looks for them."""
    for weight, found in zip(weights, gradients, strict=True):
        weight.grad = found.detach().to(weight.dtype)


def mean_square(
    model: Any, batches: Iterable[Batch], weights: Sequence[Tensor], *, by_tokens: bool = False
) -> list[Tensor]:
    """Return the mean over batches of the squared gradient of the NLL, weight by weight: the diagonal empirical Fisher.

    With one example a batch it is what its name says. With B examples a batch each square is of a mean gradient, which
    is about the Fisher over B plus the square of the overall gradient: such numbers depend on the batch size. Both use
    the true answers, not answers that the model draws, so neither is the Fisher information itself.

    Args:
        model: a Hugging Face causal language model.
        batches: what to take gradients on, each a square.
        weights: weights of the model.
        by_tokens: weigh each batch by its answer tokens; otherwise all weigh the same.

    Returns:
        Tensors of the weights' shapes, in float32.
    """
    return _mean(torch.square, model, batches, weights, by_tokens)


def variance(
    model: Any, batches: Iterable[Batch], weights: Sequence[Tensor], *, by_tokens: bool = False
) -> list[Tensor]:
    """Return E[g^2] - E[g]^2 over batches, at least 0: `mean_square` without the square of the overall gradient.

    Args:
        model: a Hugging Face causal language model.
        batches: what to take gradients on.
        weights: weights of the model.
        by_tokens: weigh each batch by its answer tokens; otherwise all weigh the same.

    Returns:
        Tensors of the weights' shapes, in float32.
    """
    both = _mean(lambda g: torch.stack([g, g.square()]), model, batches, weights, by_tokens)
    return [(square - mean.square()).clamp(min=0) for mean, square in both]


def _mean(
    of: Callable[[Tensor], Tensor], model: Any, batches: Iterable[Batch], weights: Sequence[Tensor], by_tokens: bool
) -> list[Tensor]:
    total, sums = 0, [of(torch.zeros_like(weight, dtype=torch.float32)) for weight in weights]
    for batch in batches:
        share = int(batch.answer_mask.sum()) if by_tokens else 1
        for tensor, found in zip(sums, gradient(nll(model, batch), weights), strict=True):
            tensor += share * of(found.float())
        total += share
    return [tensor / total for tensor in sums]


@dataclass(frozen=True)
class LinearMap:
    """A linear map in a block: `nn.Linear`, or GPT-2's `Conv1D`, which holds its weight the other way round."""

    name: str
    block: int
    module: Any

    @property
    def weight(self) -> Float[Tensor, "out in"]:
        """The weight as `nn.Linear` holds it; writing into it writes into the module."""
        return self.turned(self.module.weight)

    def turned(self, tensor: Tensor) -> Float[Tensor, "out in"]:
        """Turn a tensor of the module's shape, such as its gradient, the way that `nn.Linear` holds it."""
        return rearrange(tensor, "d_in d_out -> d_out d_in") if isinstance(self.module, Conv1D) else tensor


@dataclass(frozen=True)
class Factors:
    """A linear map with low-rank factors beside it: it now applies W + scale B A."""

    map: LinearMap
    a: nn.Parameter
    b: nn.Parameter
    scale: float

    def start_from(self, a: Float[Tensor, "rank in"], b: Float[Tensor, "out rank"]) -> None:
        """Set the factors, and take scale B A off W, so that the map as a whole is what it was with factors of 0."""
        with torch.no_grad():
            self.a.copy_(a)
            self.b.copy_(b)
            self.map.weight.sub_((self.scale * b @ a).to(self.map.weight.dtype))


def linear_maps(model: Any) -> list[LinearMap]:
    """Return every linear map inside the blocks whose weight is to be trained, first block to last."""
    names = {module: name for name, module in model.named_modules()}
    return [
        LinearMap(names[module], block, module)
        for block, inside in enumerate(anatomy(model).blocks)
        for module in inside.modules()
        if isinstance(module, nn.Linear | Conv1D) and module.weight.requires_grad
    ]


@contextmanager
def low_rank(
    model: Any, maps: Sequence[LinearMap], *, rank: int = LORA_RANK, scale: float = 2.0, seed: int = 0
) -> Generator[list[Factors]]:
    """Put factors (LoRA: A random, B zero) beside linear maps; afterwards merge them and put the flags back.

    Args:
        model: the model, which applies the factors as long as this lasts.
        maps: maps of the model.
        rank: width of the factors.
        scale: what B A is multiplied by.
        seed: decides A.

    Yields:
        The factors, in the order of the maps. Nothing else in the model can be trained meanwhile.

    Raises:
        InputError: there are no maps, or one is narrower than the rank.
    """
    if not maps:
        raise InputError("there is no linear map to put factors beside; train blocks that have one")
    narrow = min(maps, key=lambda m: min(m.weight.shape))
    if not 1 <= rank <= min(narrow.weight.shape):
        raise InputError(f"rank {rank} does not fit {narrow.name}; use 1 to {min(narrow.weight.shape)}")
    flags = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    settings = {"r": rank, "lora_alpha": scale * rank, "target_modules": [m.name for m in maps]}
    adapted = with_adapters(model, seed, **settings).eval()
    try:
        layers = [model.get_submodule(m.name) for m in maps]
        yield [
            Factors(m, layer.lora_A["default"].weight, layer.lora_B["default"].weight, layer.scaling["default"])
            for m, layer in zip(maps, layers, strict=True)
        ]
    finally:
        adapted.merge_and_unload()
        for parameter, flag in flags:
            parameter.requires_grad_(flag)


def trained(factors: Sequence[Factors]) -> list[nn.Parameter]:
    """Return what a descent on factors trains."""
    return [parameter for f in factors for parameter in (f.a, f.b)]
