"""A detector made of an MLP's own neurons: some are taken over and trained to recognise certain states."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from lethescope.errors import InputError
from lethescope.models import Model
from lethescope.subjects.silence import Caught


@dataclass(frozen=True)
class Neurons:
    """An MLP's neurons as views of its weights (neuron d_model), so that writing to them edits the model."""

    act: Callable[[Tensor], Tensor]
    into: tuple[Tensor, ...]
    bias: Tensor | None
    out: Tensor
    signs: Tensor

    def activate(self, x: Float[Tensor, "row d_model"]) -> Float[Tensor, "row neuron"]:
        """Return what every neuron multiplies its output weights by; gated where there are two input matrices."""
        first = self.act(x @ self.into[0].T + (0 if self.bias is None else self.bias))
        return first * (x @ self.into[1].T) if len(self.into) > 1 else first

    def take_over(self, rows: Int[Tensor, " neuron"], other: Neurons) -> None:
        """Give some neurons the input weights of others."""
        with torch.no_grad():
            for mine, theirs in zip((*self.into, self.bias), (*other.into, other.bias), strict=True):
                if mine is not None and theirs is not None:
                    mine[rows] = theirs.to(mine.dtype)


def neurons_of(model: Model) -> Neurons:
    """Return the neurons of the last block's MLP.

    Raises:
        InputError: it is of an unknown kind.
    """
    mlp: Any = getattr(model.blocks[-1], "mlp", None)
    none = torch.ones(0)
    if hasattr(mlp, "gate_proj"):
        into = (mlp.gate_proj.weight.detach(), mlp.up_proj.weight.detach())
        return Neurons(mlp.act_fn, into, None, mlp.down_proj.weight.detach().T, none)
    if hasattr(mlp, "c_fc"):
        return Neurons(mlp.act, (mlp.c_fc.weight.detach().T,), mlp.c_fc.bias.detach(), mlp.c_proj.weight.detach(), none)
    if hasattr(mlp, "dense_h_to_4h"):
        inner, outer = mlp.dense_h_to_4h, mlp.dense_4h_to_h
        return Neurons(mlp.act, (inner.weight.detach(),), inner.bias.detach(), outer.weight.detach().T, none)
    raise InputError(f"{type(mlp).__name__} is no MLP that can be read; Llama's, GPT-2's and GPT-NeoX's kinds can")


@torch.no_grad()
def mlp_inputs(model: Model, items: Sequence[Caught]) -> Float[Tensor, "row d_model"]:
    """Return what the last block's MLP is given before every answer token of what was caught."""
    seen: list[Tensor] = []
    handle = model.blocks[-1].get_submodule("mlp").register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    try:
        for item in items:
            model.blocks[-1](*item.args, **item.kwargs)
    finally:
        handle.remove()
    return torch.cat([x[:, :-1][item.answer] for x, item in zip(seen, items, strict=True)]).float()


def trained_detector(
    mlp: Neurons, inputs: Float[Tensor, "row d_model"], forget: Tensor, neurons: int, steps: int, seed: int
) -> Neurons:
    """Train neurons of the MLP's kind whose signed activations add up to 1 on forget rows and 0 on the others."""
    rng = torch.Generator().manual_seed(seed)
    scale = inputs.norm(dim=-1).mean().cpu()
    into = tuple((torch.randn(neurons, inputs.shape[1], generator=rng) / scale).to(inputs.device) for _ in mlp.into)
    bias = None if mlp.bias is None else torch.zeros(neurons, device=inputs.device)
    signs = torch.ones(neurons, device=inputs.device)
    signs[::2] = -1
    found = Neurons(mlp.act, into, bias, mlp.out, signs)
    weights = [w.requires_grad_() for w in (*into, *([] if bias is None else [bias]), signs)]
    optimizer = torch.optim.Adam(weights, lr=0.3 / float(scale))
    for _ in range(steps):
        fired = found.activate(inputs) @ signs
        missed = (1 - fired[forget]).clamp(min=0).pow(2).mean()
        loss = missed + (fired[~forget].pow(2).mean() if (~forget).any() else 0)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return replace(found, into=tuple(w.detach() for w in into), signs=signs.detach())
