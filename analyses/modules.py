"""Where each weight of a model stands, by structure; two models' weights side by side, and others in their place."""

from collections.abc import Generator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

from torch import Tensor, nn

from lethescope.errors import InputError
from lethescope.models import Model, anatomy, merged_copy

OUTER = ("embedding", "final norm", "unembedding")
Owner = tuple[str, str]
"""The path of a module and the name of one of its own parameters: where a weight hangs, tied or not."""


class Weight(NamedTuple):
    """A weight's place in the model, named from structure.

    Attributes:
        row: `embedding`, `block 0` …, `final norm` or `unembedding`.
        part: of a block `attention`, `mlp` or `norms`; of the rest the row.
        kind: path within the block (`self_attn.q_proj`); of the rest the row.
        layer: number of the block, -1 outside of the blocks.
        outputs_first: False for GPT-2's Conv1D, whose matrices have inputs first.
    """

    row: str
    part: str
    kind: str
    layer: int
    outputs_first: bool = True


def weights(module: Any) -> dict[Owner, Weight]:
    """Name every weight of a model by its place; a tied weight stands at both of its places.

    Whatever is neither in a block nor in the final norm or the unembedding counts as embedding.

    Raises:
        InputError: blocks, final norm or unembedding cannot be found.
    """
    found = anatomy(module)
    names = {id(m): path for path, m in module.named_modules()}
    blocks = {names[id(block)]: layer for layer, block in enumerate(found.blocks)}
    outer = {names[id(found.norm)]: "final norm", names[id(found.head)]: "unembedding"}
    return {
        (path, name): _placed(path, owner, module, blocks, outer)
        for path, owner in module.named_modules()
        for name, parameter in owner._parameters.items()
        if parameter is not None
    }


def _placed(path: str, owner: nn.Module, module: Any, blocks: Mapping[str, int], outer: Mapping[str, str]) -> Weight:
    first = type(owner).__name__ != "Conv1D"
    above = [path[:i] for i in [*(i for i, c in enumerate(path) if c == "."), len(path)]]
    block = next((p for p in above if p in blocks), None)
    if block is None:
        row = next((outer[p] for p in above if p in outer), "embedding")
        return Weight(row, row, row, -1, first)
    kind = path[len(block) + 1 :] or "block"
    child = kind.split(".")[0]
    return Weight(
        f"block {blocks[block]}", _part(child, module.get_submodule(f"{block}.{child}")), kind, blocks[block], first
    )


def _part(name: str, child: nn.Module) -> str:
    told = type(child).__name__.lower()
    if "norm" in told:
        return "norms"
    return "attention" if "attn" in name.lower() or "attention" in told + name.lower() else "mlp"


def whole(model: Model) -> Any:
    """Return the model's own module, or a merged copy where there is an adapter: what its weights are in effect."""
    return merged_copy(model.module) if hasattr(model.module, "merge_and_unload") else model.module


def parameter(module: Any, owner: Owner) -> Tensor:
    """Return the weight that hangs at a place."""
    found: Tensor = module.get_submodule(owner[0])._parameters[owner[1]]
    return found


def aligned(original: Any, model: Any) -> dict[Owner, Weight]:
    """Name the weights of two models of one architecture.

    Raises:
        InputError: they are not of one: the first weight that only one has, or that has another shape, is named.
    """
    placed = weights(original)
    apart = sorted(set(placed) ^ set(weights(model)))
    if apart:
        where = "original" if apart[0] in placed else "other model"
        raise InputError(
            f"weight {'.'.join(apart[0])} is in the {where} only; two models of one architecture are needed"
        )
    for owner in placed:
        one, two = (tuple(parameter(m, owner).shape) for m in (original, model))
        if one != two:
            raise InputError(f"weight {'.'.join(owner)} is {one} in the original and {two} in the other model")
    return placed


@contextmanager
def holding(module: Any, values: Mapping[Owner, Tensor]) -> Generator[None]:
    """Hang other tensors where a model's weights are, for a while; nothing is copied, and an error changes nothing.

    A tied weight is replaced at the places named only, so that the other place keeps its own.
    """
    kept = {owner: parameter(module, owner) for owner in values}
    try:
        for owner, value in values.items():
            _hang(module, owner, value.to(device=kept[owner].device, dtype=kept[owner].dtype))
        yield
    finally:
        for owner, value in kept.items():
            _hang(module, owner, value)


def _hang(module: Any, owner: Owner, value: Tensor) -> None:
    module.get_submodule(owner[0])._parameters[owner[1]] = value  # type: ignore[assignment]  # a plain tensor will do
