"""The linear maps of a model and the texts that run through them: what curvature is measured of, and on."""

import hashlib
from collections.abc import Callable, Collection, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from lethescope.errors import InputError
from lethescope.facts import Fact
from lethescope.hooks import Stop
from lethescope.models import Model
from lethescope.tokens import Batch, Encoded, collate, encode, pad_id

Part = Literal["attention", "mlp", "unembedding"]
Text = str | Sequence[int] | Encoded | Fact
Positions = Callable[[Encoded], Sequence[int]]
WRAPPED = "_original_component"
"""A TransformerLens bridge puts this name between a module and what it wraps."""


@dataclass(frozen=True)
class LinearMap:
    """A map `y = W x (+ b)` of a model, W (p, q), and the modules in which its weight hangs: more than one if tied."""

    name: str
    layer: int
    part: Part
    kind: str
    modules: tuple[Any, ...]

    @property
    def weight(self) -> Float[Tensor, "p q"]:
        """W, outputs first."""
        weight: Tensor = self.modules[0].weight.detach()
        return weight.mT if isinstance(self.modules[0], Conv1D) else weight

    @property
    def shape(self) -> tuple[int, int]:
        """Number of outputs p and of inputs q."""
        p, q = self.weight.shape
        return p, q


def linear_maps(
    model: Model, *, parts: Collection[str] = ("mlp",), layers: Collection[int] | None = None
) -> tuple[LinearMap, ...]:
    """Find the linear maps of a model: `nn.Linear` and GPT-2's Conv1D, also where TransformerLens has wrapped them.

    A weight that hangs in two modules is one map, named after the first; that it also embeds tokens (tied embeddings)
    makes no map, since nothing is multiplied there.

    Args:
        model: any language model, adapters merged.
        parts: `attention`, `mlp`, and `unembedding`, whose layer is -1.
        layers: blocks, from 0; all by default.

    Returns:
        The maps, in the order of the model.

    Raises:
        InputError: the model has an unmerged adapter, a block does not exist, or no map is left.

    Example:
        >>> from lethescope.subjects.handmade import handmade
        >>> [m.name for m in linear_maps(handmade().original, layers=[1])]
        ['model.layers.1.mlp.gate_proj', 'model.layers.1.mlp.up_proj', 'model.layers.1.mlp.down_proj']
    """
    if hasattr(model.module, "merge_and_unload"):
        raise InputError(
            f"the {model.role} model has an unmerged adapter; merge it first (lethescope.models.merged_copy)"
        )
    asked = range(len(model.blocks)) if layers is None else layers
    if set(asked) - set(range(len(model.blocks))):
        raise InputError(f"layers {sorted(asked)} are asked for; the model has blocks 0 to {len(model.blocks) - 1}")
    found: dict[int, LinearMap] = {}
    for at in _linears(model):
        if at.part in parts and (at.layer in asked or at.part == "unembedding"):
            first = found.setdefault(id(at.modules[0].weight), at)
            if first is not at:
                found[id(at.modules[0].weight)] = LinearMap(
                    first.name, first.layer, first.part, first.kind, first.modules + at.modules
                )
    if not found:
        raise InputError(f"the {model.role} model has no linear map in {', '.join(parts)} of layers {sorted(asked)}")
    return tuple(found.values())


def _linears(model: Model) -> Iterator[LinearMap]:
    names = {id(module): path for path, module in model.module.named_modules()}
    blocks = {names[id(block)]: layer for layer, block in enumerate(model.blocks)}
    heads = {id(module) for module in model.anatomy.head.modules()}
    for path, module in model.module.named_modules():
        block = next((b for b in blocks if path.startswith(f"{b}.")), None)
        if isinstance(module, nn.Linear | Conv1D) and (block or id(module) in heads):
            name, kind = (_bare(x) for x in (path, path[len(block) + 1 :] if block else "unembedding"))
            part: Part = "unembedding" if not block else "attention" if _attends(kind) else "mlp"
            yield LinearMap(name, blocks[block] if block else -1, part, kind, (module,))


def _bare(path: str) -> str:
    return ".".join(name for name in path.split(".") if name != WRAPPED)


def _attends(kind: str) -> bool:
    return "attn" in kind.lower() or "attention" in kind.lower()


@dataclass(frozen=True)
class Passage:
    """A text as tokens, and the positions of it that are read."""

    encoded: Encoded
    positions: tuple[int, ...]


def tail(text: Encoded) -> range:
    """Return the positions that predict the answer; of a plain text, all but the last, which predicts nothing."""
    return range(text.start - 1, len(text.ids) - 1)


def passages(tokenizer: Any, texts: Sequence[Text], positions: Positions | None = None) -> list[Passage]:
    """Tokenise texts. Of a plain text every token after the first counts as answer; of a fact, its answer's tokens.

    >>> passages(None, [[5, 6, 7]])
    [Passage(encoded=Encoded(ids=(5, 6, 7), start=1), positions=(0, 1))]

    Raises:
        InputError: there are no texts, one has fewer than two tokens, or a position is not in it; its number is told.
    """
    if not texts:
        raise InputError("there are no texts; give at least one")
    out = []
    for i, text in enumerate(texts):
        e = _encoded(tokenizer, text)
        at = tuple((positions or tail)(e))
        if not 1 <= e.start < len(e.ids):
            raise InputError(f"text {i} has {len(e.ids)} tokens and nothing to predict; at least 2 are needed")
        if not all(0 <= place < len(e.ids) for place in at):
            raise InputError(f"text {i} has {len(e.ids)} tokens; positions {list(at)} are not all in it")
        out.append(Passage(e, at))
    return out


def _encoded(tokenizer: Any, text: Text) -> Encoded:
    if isinstance(text, Fact):
        return encode(tokenizer, text.prompt, text.answer)
    if isinstance(text, Encoded):
        return text
    return Encoded(tuple(map(int, tokenizer(text)["input_ids"] if isinstance(text, str) else text)), 1)


def digest(read: Sequence[Passage]) -> str:
    """Return 16 hex digits that are equal for equal tokens, answers and positions."""
    return hashlib.sha256(repr(list(read)).encode()).hexdigest()[:16]


def digest_of(tensors: Iterable[Tensor]) -> str:
    """Return 16 hex digits that are equal for equal tensors."""
    found = hashlib.sha256()
    for t in tensors:
        found.update(t.detach().contiguous().cpu().numpy().tobytes())
    return found.hexdigest()[:16]


@dataclass(frozen=True)
class Rows:
    """A batch of texts: `chosen` is True at the positions that are read, `texts` are their numbers in the list."""

    texts: list[int]
    batch: Batch
    chosen: Bool[Tensor, "text pos"]

    @property
    def owner(self) -> Int[Tensor, " row"]:
        """The number of the text that each chosen position belongs to."""
        return torch.tensor(self.texts)[self.chosen.cpu().nonzero()[:, 0]]


def batches(model: Model, read: Mapping[int, Passage], rows: int) -> Iterator[Rows]:
    """Pad texts of like length into batches of so many rows.

    Yields:
        The batches, short texts first.

    Raises:
        InputError: `rows` is below 1.
    """
    if rows < 1:
        raise InputError(f"rows is {rows}; a batch needs at least 1")
    order = sorted(read, key=lambda i: (len(read[i].encoded.ids), i))
    for start in range(0, len(order), rows):
        some = order[start : start + rows]
        batch = collate([read[i].encoded for i in some], pad_id(model.tokenizer), device=model.device)
        chosen = torch.zeros_like(batch.answer_mask)
        for row, i in enumerate(some):
            chosen[row, list(read[i].positions)] = True
        yield Rows(some, batch, chosen)


def rows_of(name: str, state: Float[Tensor, "text pos width"], chosen: Bool[Tensor, "text pos"]) -> Tensor:
    """Take the chosen positions' vectors (row width), in float32 at least.

    Raises:
        InputError: the map does not see texts by positions, as in a mixture of experts; it is named.
    """
    if state.shape[:2] != chosen.shape:
        raise InputError(
            f"map {name} sees {tuple(state.shape)} where texts by positions are {tuple(chosen.shape)}; leave it out"
        )
    return state[chosen.to(state.device)].to(torch.promote_types(state.dtype, torch.float32))


@contextmanager
def watching(maps: Sequence[LinearMap], some: Rows, see: Callable[[LinearMap, Tensor, Tensor], Any]) -> Generator[None]:
    """Call `see(map, inputs, output)` at every map: inputs (row q) at the chosen positions, output as the module's.

    What `see` returns, if anything, takes the output's place. Maps that read the same tensor, one after another (gate
    and up; query, key and value), get the same inputs, so that `is` tells them.
    """
    last: list[tuple[Tensor, Tensor]] = []

    def hook(at: LinearMap) -> Callable[..., Any]:
        def fire(_module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Any:
            if not last or last[0][0] is not args[0]:
                last[:] = [(args[0], rows_of(at.name, args[0].detach(), some.chosen))]
            return see(at, last[0][1], output)

        return fire

    handles = [module.register_forward_hook(hook(m)) for m in maps for module in m.modules]
    try:
        yield
    except Stop:
        pass
    finally:
        for handle in handles:
            handle.remove()


@torch.no_grad()
def forward(
    model: Model,
    read: Mapping[int, Passage],
    maps: Sequence[LinearMap],
    see: Callable[[LinearMap, Rows, Tensor], None],
    rows: int,
) -> None:
    """Run texts, as far as the last of the maps, and call `see(map, batch, inputs)` with the rows that are read."""
    modules = sum(len(m.modules) for m in maps)
    with still(model.module):
        for some in batches(model, read, rows):
            with watching(maps, some, _until(modules, some, see)):
                model.module(**some.batch.inputs(), use_cache=False, logits_to_keep=1)


def _until(modules: int, some: Rows, see: Callable[[LinearMap, Rows, Tensor], None]) -> Callable[..., None]:
    """Call `see`, and stop the pass when so many modules have been seen."""
    left = iter(range(modules - 1, -1, -1))

    def once(at: LinearMap, x: Tensor, _output: Tensor) -> None:
        see(at, some, x)
        if next(left) == 0:
            raise Stop

    return once


@contextmanager
def still(module: nn.Module) -> Generator[None]:
    """Put a model in eval mode, without gradients of weights, for a while."""
    training = {m: m.training for m in module.modules()}
    learning = [p for p in module.parameters() if p.requires_grad]
    module.eval().requires_grad_(False)
    try:
        yield
    finally:
        for m, was in training.items():
            m.training = was
        for p in learning:
            p.requires_grad_(True)
