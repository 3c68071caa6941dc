"""Attention as the model itself computes it: read a few of its rows, or take heads out of it.

Hugging Face decoders hand query, key and value to one function, which their configuration names (`sdpa`, `eager`,
`flash_attention_2` …). Inside a `with` block another function answers to that name. It calls the one that was there
for the model's output, so that nothing else changes, and is told what the model attends with. The model, its
configuration and its masks are not touched; blocks may be nested, and the inner one sees a layer's attention first.
"""

import sys
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, Literal, get_args

import torch
from einops import einsum, rearrange
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from lethescope.errors import InputError
from lethescope.models import Model

Output = tuple[Tensor, Tensor | None]
Head = tuple[int, int]
Kind = Literal["uniform", "zero", "mean"]


@dataclass(frozen=True)
class Attention:
    """One call of one layer's attention: what the model attends with, and how it would go on.

    Attributes:
        layer: the block it belongs to.
        module: the attention module that calls.
        query: after rotary embedding (batch head pos d_head).
        key: (batch kv_head key d_head); query heads share it in groups of head / kv_head.
        value: (batch kv_head key d_value).
        mask: None (causal), True where a key is visible, or what is added to the scores (batch any pos key).
        options: the rest of the call: scaling, softcap, sinks …
        base: the function that the model would have called.
    """

    layer: int
    module: nn.Module
    query: Float[Tensor, "batch head pos d_head"]
    key: Float[Tensor, "batch kv_head key d_head"]
    value: Float[Tensor, "batch kv_head key d_value"]
    mask: Any
    options: Mapping[str, Any]
    base: Callable[..., Output]

    def run(self) -> Output:
        """Return the layer's output (batch pos head d_value) and its attention, None where the kernel keeps none."""
        return self.base(self.module, self.query, self.key, self.value, self.mask, **self.options)

    def rows(self, places: Int[Tensor, " row"]) -> Float[Tensor, "batch head row key"]:
        """Attention of a few query places: softmax over the visible keys, in float32 whatever the model's dtype.

        Memory grows with heads x rows x keys, never with keys squared. Rows sum to 1, or to less where the model also
        attends to a learned sink, which is no key.
        """
        query = rearrange(self.query[:, :, places].float(), "b (k g) r d -> b k g r d", k=self.key.shape[1])
        scores = einsum(query, self.key.float(), "b k g r d, b k n d -> b k g r n")
        scale = self.options.get("scaling")
        scores = rearrange(scores, "b k g r n -> b (k g) r n") * (query.shape[-1] ** -0.5 if scale is None else scale)
        cap, bias, sinks = (self.options.get(name) for name in ("softcap", "position_bias", "s_aux"))
        if cap is not None:
            scores = cap * torch.tanh(scores / cap)
        if bias is not None:
            scores = scores + bias[..., places, :].float()
        scores = self._masked(scores, places)
        if sinks is None:
            return scores.softmax(-1)
        sink = sinks.float()[None, :, None, None].expand(*scores.shape[:-1], 1)
        return torch.cat([scores, sink], -1).softmax(-1)[..., :-1]

    def _masked(
        self, scores: Float[Tensor, "batch head row key"], places: Int[Tensor, " row"]
    ) -> Float[Tensor, "batch head row key"]:
        mask, keys, least = self.mask, scores.shape[-1], torch.finfo(scores.dtype).min
        if mask is not None and not isinstance(mask, Tensor):
            raise InputError(
                f"layer {self.layer} keeps its mask as {type(mask).__name__}, which shows no rows; load the model with "
                "attn_implementation='sdpa' or 'eager'"
            )
        if mask is not None and mask.ndim == 4:
            mask = mask[..., places, :keys] if mask.shape[2] > 1 else mask[..., :keys]
            return scores.masked_fill(~mask, least) if mask.dtype == torch.bool else scores + mask.float()
        visible = self._causal(places)
        if mask is not None:  # flash attention: which keys are no padding (batch key)
            visible = visible & mask[:, None, None, :keys].bool()
        return scores.masked_fill(~visible, least)

    def _causal(self, places: Int[Tensor, " row"]) -> Bool[Tensor, "row key"]:
        keys, queries = self.key.shape[2], self.query.shape[2]
        at = torch.arange(keys, device=places.device)
        here = places[:, None] + keys - queries
        told = self.options.get("is_causal")
        causal = getattr(self.module, "is_causal", True) if told is None else told
        visible = at <= here if causal else torch.ones(len(places), keys, dtype=torch.bool, device=places.device)
        window = self.options.get("sliding_window")
        return visible if window is None else visible & (at > here - window)


@contextmanager
def intercepting(model: Model, attend: Callable[[Attention], Output], *, needed: Iterable[int] = ()) -> Generator[None]:
    """Let `attend` answer in place of every layer's attention; `call.run()` is what the model would have done.

    Args:
        model: any language model whose attention goes through transformers' attention interface.
        attend: gets the call and returns its output.
        needed: layers that must have called when the block ends, if the model was run at all.

    Raises:
        InputError: the model was run and no layer, or not every needed one, used the interface.
    """
    layers = {module: layer for layer, block in enumerate(model.blocks) for module in block.modules()}
    seen: set[int] = set()
    ran: list[bool] = []

    def answer(before: Callable[..., Output] | None) -> Callable[..., Output]:
        def forward(module: nn.Module, query: Any, key: Any, value: Any, mask: Any, **options: Any) -> Output:
            base = before or _eager(module)
            if module not in layers:
                return base(module, query, key, value, mask, **options)
            seen.add(layers[module])
            return attend(Attention(layers[module], module, query, key, value, mask, options, base))

        return forward

    handle = model.blocks[0].register_forward_hook(lambda *_: ran.append(True))
    names = {getattr(m.config, "_attn_implementation", None) or "eager" for m in layers if hasattr(m, "config")}
    befores = {name: ALL_ATTENTION_FUNCTIONS.get(name) for name in names}
    for name, before in befores.items():
        ALL_ATTENTION_FUNCTIONS[name] = answer(before)
    try:
        yield
    finally:
        handle.remove()
        for name, before in befores.items():
            ALL_ATTENTION_FUNCTIONS.pop(name)
            if ALL_ATTENTION_FUNCTIONS.get(name) is not before:  # it was ours too: the block around this one's
                ALL_ATTENTION_FUNCTIONS[name] = before
    if ran:
        _check_seen(model, seen, set(needed))


def _eager(module: nn.Module) -> Callable[..., Output]:
    """The plain attention of a model's family; transformers keeps it beside the module and under no name.

    Raises:
        InputError: the family has none.
    """
    found: Callable[..., Output] | None = getattr(sys.modules[type(module).__module__], "eager_attention_forward", None)
    if found is None:
        raise InputError(
            f"{type(module).__name__} has no eager attention; load the model with attn_implementation='sdpa'"
        )
    return found


def _check_seen(model: Model, seen: set[int], needed: set[int]) -> None:
    name = type(model.module).__name__
    if not seen:
        raise InputError(
            f"{name} does not use transformers' attention interface, so its heads cannot be seen; "
            "Llama, GPT-2, GPT-NeoX, Qwen, Mistral, Gemma and most later families do"
        )
    if needed - seen:
        raise InputError(f"layer {min(needed - seen)} of {name} has no attention heads; layers {sorted(seen)} have")


@contextmanager
def attention_rows(
    model: Model, positions: Sequence[int], see: Callable[[int, Float[Tensor, "batch head row key"]], None]
) -> Generator[None]:
    """Call `see(layer, rows)` with the attention of a few query positions, layer by layer, as the model runs.

    One layer's rows are alive at a time: memory is heads x rows x keys, where `output_attentions=True` keeps
    layers x heads x keys x keys. The model's own output is computed by its own kernel and does not change. Attention
    says where a head looks, not what the model makes of it.

    Args:
        model: any language model whose attention goes through transformers' attention interface; heads are query heads.
        positions: places in the pass that is run, negative ones from its end; the same for every sequence of a batch.
        see: gets the layer and its rows (batch head row key), float32.

    Raises:
        InputError: the model does not use the interface, or a position is not in the pass.
    """

    def attend(call: Attention) -> Output:
        see(call.layer, call.rows(_places(positions, call.query)))
        return call.run()

    with intercepting(model, attend):
        yield


@contextmanager
def ablating(
    model: Model,
    heads: Iterable[Head],
    kind: Kind = "uniform",
    *,
    positions: Sequence[int] | None = None,
    means: Mapping[int, Float[Tensor, "head d_value"]] | None = None,
) -> Generator[None]:
    """Take heads out of the model while the block lasts.

    `uniform` sets the head's scores to 0: it attends equally to every visible key and puts out their mean value
    (what the published code of arXiv 2404.15574 calls masking). `zero` puts out 0. `mean` puts out a given vector.
    An effect says that the head is used under this ablation, not that it is the only one that could do the work;
    without an effect another head may have stepped in. Where a model adds something to its scores after the query
    (a learned sink, a position bias), `uniform` leaves that as it is.

    Args:
        model: any language model whose attention goes through transformers' attention interface.
        heads: (layer, query head).
        kind: uniform, zero or mean.
        positions: places in each pass that is run, negative ones from its end; None is all of them. [-1] is the
            published decode phase: the prompt's last token and every single token after it, with a cache.
        means: for `mean`: layer -> output of each head (head d_value), as `mean_outputs` gives it.

    Raises:
        InputError: the kind is unknown, means are missing, a head does not exist, or the interface is not used.
    """
    if kind not in get_args(Kind):
        raise InputError(f"unknown ablation {kind!r}; use {', '.join(get_args(Kind))}")
    chosen = _by_layer(model, heads)
    if kind == "mean" and not chosen.keys() <= (means or {}).keys():
        raise InputError("ablation 'mean' needs means=… for every layer of the heads; mean_outputs gives them")

    def attend(call: Attention) -> Output:
        if call.layer not in chosen:
            return call.run()
        own = _check_heads(chosen[call.layer], call)
        places = _places(range(call.query.shape[2]) if positions is None else positions, call.query)
        if kind == "uniform":
            query = call.query.clone()
            query[:, own[:, None], places] = 0
            return replace(call, query=query).run()
        output, weights = call.run()
        output = output.clone()
        output[:, places[:, None], own] = 0 if means is None or kind == "zero" else means[call.layer].to(output)[own]
        return output, weights

    with intercepting(model, attend, needed=chosen):
        yield


@torch.no_grad()
def mean_outputs(model: Model, sequences: Iterable[Sequence[int]]) -> dict[int, Float[Tensor, "head d_value"]]:
    """Mean output of every head over all tokens of some sequences: layer -> (head d_value), before the output matrix.

    Raises:
        InputError: the model does not use the attention interface, or there are no tokens.
    """
    sums: dict[int, Tensor] = {}
    count = 0

    def attend(call: Attention) -> Output:
        output, weights = call.run()
        sums[call.layer] = sums.get(call.layer, 0) + output.double().sum((0, 1))
        return output, weights

    with intercepting(model, attend):
        for ids in sequences:
            count += len(ids)
            model.module(input_ids=torch.tensor([list(ids)], device=model.device), use_cache=False, logits_to_keep=1)
    if not count:
        raise InputError("there are no tokens to take mean head outputs over; give at least one sequence")
    return {layer: total / count for layer, total in sums.items()}


def _by_layer(model: Model, heads: Iterable[Head]) -> dict[int, list[int]]:
    chosen: dict[int, list[int]] = {}
    for layer, head in sorted(set(heads)):
        if not 0 <= layer < len(model.blocks):
            raise InputError(f"there is no layer {layer}; the model has layers 0 to {len(model.blocks) - 1}")
        chosen.setdefault(int(layer), []).append(int(head))
    return chosen


def _check_heads(heads: Sequence[int], call: Attention) -> Int[Tensor, " chosen"]:
    count = call.query.shape[1]
    wrong = [head for head in heads if not 0 <= head < count]
    if wrong:
        raise InputError(f"there is no head {wrong[0]} in layer {call.layer}; it has heads 0 to {count - 1}")
    return torch.tensor(heads, device=call.query.device)


def _places(positions: Sequence[int], query: Float[Tensor, "batch head pos d_head"]) -> Int[Tensor, " row"]:
    length = query.shape[2]
    wrong = [p for p in positions if not -length <= p < length]
    if wrong:
        raise InputError(f"position {wrong[0]} is not in a pass of {length} tokens; use {-length} to {length - 1}")
    return torch.tensor([p % length for p in positions], dtype=torch.long, device=query.device)
