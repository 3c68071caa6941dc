"""Channel *compress*: does rounding or pruning the weights bring back what the model says?"""

from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from importlib.util import find_spec

import numpy as np
import torch
import xarray as xr
from einops import rearrange
from jaxtyping import Float
from torch import Tensor

from lethescope import measurement
from lethescope.channel import Channel
from lethescope.errors import InputError
from lethescope.facts import Fact
from lethescope.models import Model, merged_copy
from lethescope.scoring import candidates, score_tokens

SETTINGS = ("int8", "int4", "int3", "prune 10%", "prune 30%", "prune 50%")
NF4 = ("nf4",) if find_spec("bitsandbytes") else ()
"""Tried by the thorough budget where its library is there; a Measurement's parameters say whether it was."""


def measure(
    model: Model,
    facts: Sequence[Fact],
    *,
    original: Model | None = None,
    seed: int = 0,
    settings: Sequence[str] = SETTINGS,
    group: int = 64,
    prompts: int = 1,
) -> xr.Dataset:
    """Compress the weights of every linear map in the blocks, each setting by itself, and ask again.

    Unlearning that moved the weights by less than a quantisation bucket is undone by rounding (Zhang et al. 2024,
    arXiv 2410.16454). Pruning removes the smallest weights of each map. The scores are those of *say*: what comes back
    is said. What does not come back may still be there.

    Args:
        model: any language model; it is left as it was.
        facts: forget and control facts.
        original: not used.
        seed: not used.
        settings: `int8`, `int4`, `int3` (round to nearest, symmetric, per group of inputs), `nf4` (needs bitsandbytes)
            or `prune N%` (magnitude, per map).
        group: weights that share a scale.
        prompts: how many prompts to ask; the best counts, as in *say*.

    Returns:
        `score(fact, candidate, place)` in nats; places are the settings.
    """
    asked = [candidates(model.tokenizer, facts, prompt=n) for n in range(prompts)]
    width = max(a.shape[1] for a in asked)
    score = np.full((len(facts), width, len(settings)), np.nan)
    copied = Model(merged_copy(model.module), model.tokenizer, model.role)
    for column, setting in enumerate(settings):
        with compressed(copied, compressor(setting, group)):
            for one in (a for a in asked if a.encoded):
                table = one.table(np.nanmean(score_tokens(copied, one.encoded)[0], -1))
                score[:, : table.shape[1], column] = np.fmax(score[:, : table.shape[1], column], table)
    return measurement.from_scores(score, facts, list(settings))


@contextmanager
def compressed(model: Model, change: Callable[[Tensor], Tensor]) -> Generator[None]:
    """Change the weight of every linear map in the blocks for a while, then put back what was there."""
    kept = [(weight, weight.detach().clone()) for weight in linear_weights(model)]
    try:
        with torch.no_grad():
            for weight, before in kept:
                weight.copy_(change(before))
        yield
    finally:
        with torch.no_grad():
            for weight, before in kept:
                weight.copy_(before)


def linear_weights(model: Model) -> list[Float[Tensor, "out in"]]:
    """Return the matrices of the blocks, outputs first (of GPT-2's Conv1D, which has inputs first, the transpose)."""
    modules = [module for block in model.blocks for module in block.modules()]
    return [
        p.detach().mT if type(module).__name__ == "Conv1D" else p.detach()
        for module in modules
        for p in module.parameters(recurse=False)
        if p.ndim == 2
    ]


def compressor(setting: str, group: int) -> Callable[[Tensor], Tensor]:
    """Return the function from a weight to its compressed self that a setting's name stands for."""
    if setting == "nf4":
        return nf4
    if setting.startswith("prune "):
        return lambda weight: prune(weight, int(setting.removeprefix("prune ").removesuffix("%")) / 100)
    return lambda weight: round_to_nearest(weight, int(setting.removeprefix("int")), group)


def round_to_nearest(weight: Float[Tensor, "out in"], bits: int, group: int) -> Float[Tensor, "out in"]:
    """Round to the nearest of 2^bits - 1 levels, symmetric, one scale for each group of inputs of an output.

    >>> round_to_nearest(torch.tensor([[1.0, 0.4, -1.0, 0.1]]), 2, 4)
    tensor([[ 1.,  0., -1.,  0.]])
    """
    group = group if weight.shape[1] % group == 0 else weight.shape[1]
    grouped = rearrange(weight, "out (n group) -> out n group", group=group)
    top = 2 ** (bits - 1) - 1
    scale = (grouped.abs().amax(-1, keepdim=True) / top).clamp_min(torch.finfo(weight.dtype).tiny)
    return rearrange((grouped / scale).round() * scale, "out n group -> out (n group)")


def prune(weight: Float[Tensor, "out in"], share: float) -> Float[Tensor, "out in"]:
    """Set the smallest `share` of the weights (by magnitude) to zero.

    >>> prune(torch.tensor([[3.0, -1.0, 2.0, 0.5]]), 0.5)
    tensor([[3., 0., 2., 0.]])
    """
    out = int(share * weight.numel())
    smallest = weight.abs().flatten().topk(out, largest=False).indices
    flat = weight.flatten().clone()
    flat[smallest] = 0
    return flat.view_as(weight)


def nf4(weight: Float[Tensor, "out in"]) -> Float[Tensor, "out in"]:
    """Round to 4-bit NormalFloat by bitsandbytes, and back (Dettmers et al. 2023, arXiv 2305.14314).

    Raises:
        InputError: bitsandbytes is not installed.
    """
    try:
        from bitsandbytes.functional import dequantize_4bit, quantize_4bit
    except ImportError as error:
        raise InputError("the setting nf4 needs bitsandbytes: pip install 'lethescope[nf4]'") from error

    packed, how = quantize_4bit(weight.float().contiguous(), quant_type="nf4")
    return dequantize_4bit(packed, how).to(weight.dtype)


CHANNEL = Channel(
    name="compress",
    measure=measure,
    version=2,
    scale="probability",
    citation="Zhang et al. 2024 (arXiv 2410.16454)",
    budgets={
        "quick": {"settings": ("int8", "int4", "int3", "prune 30%")},
        "standard": {"settings": SETTINGS},
        "thorough": {"settings": (*SETTINGS, *NF4), "prompts": 3},
    },
)
