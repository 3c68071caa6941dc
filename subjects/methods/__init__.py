"""Unlearning methods, one short file each, all called through `unlearn`.

A method is a module with `loss(model, forget, retain, *, option=default, …) -> scalar`. `forget` and `retain` are
batches (`lethescope.tokens.Batch`). The keyword arguments are the method's options; one named `start` asks for a frozen
copy of the model from before the first step. A new method is its file, its test, and its line in `METHODS`.
"""

from __future__ import annotations

import copy
import difflib
import inspect
import math
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager
from itertools import count, islice
from types import ModuleType
from typing import Any

import numpy as np
import torch
from torch import nn
from tqdm.auto import tqdm

from lethescope.errors import InputError
from lethescope.facts import Facts
from lethescope.models import anatomy
from lethescope.subjects.methods import graddiff, npo
from lethescope.tokens import Batch, Encoded, collate, encode, pad_id

METHODS: dict[str, ModuleType] = {"graddiff": graddiff, "npo": npo}
LORA_RANK = 8


def unlearn(
    model: Any,
    forget: Facts,
    retain: Facts,
    *,
    tokenizer: Any,
    method: str = "npo",
    steps: int = 100,
    lr: float = 1e-5,
    batch_size: int = 16,
    seed: int = 0,
    lora: bool = False,
    blocks: Sequence[int] = (),
    progress: bool | None = None,
    **options: Any,
) -> Any:
    """Train the model not to give the forget answers while it keeps the retain answers; return the model given.

    Every prompt and every paraphrase of a fact is an example; losses are taken over answer tokens only. Each step draws
    `batch_size` forget and as many retain examples, every example once before any comes again. AdamW (weight decay
    0.01), gradient norm clipped to 1, learning rate up over the first tenth of the steps and down to zero in a line.
    The model stays in eval mode (no dropout). The same seed gives the same weights bit for bit on one machine.

    What it does not prove: a model that no longer gives an answer may still hold it. That is what the audit is for.

    Args:
        model: any Hugging Face causal language model in float32 or bfloat16; edited in place.
        forget: facts to forget.
        retain: facts to keep.
        tokenizer: the model's tokenizer.
        method: a name in `METHODS`.
        steps: optimiser steps.
        lr: highest learning rate.
        batch_size: examples of each split a step.
        seed: decides the order of the examples, and the adapters' first weights.
        lora: train low-rank adapters (rank 8, all linear layers) and merge them at the end, instead of all weights.
        blocks: train only the weights of these blocks (all weights when empty); not together with `lora`.
        progress: show a bar; None shows one on a terminal only.
        **options: the method's own options, such as `beta` or `alpha`.

    Returns:
        The model given, edited, with its mode and its gradient flags as they were.

    Raises:
        InputError: unknown method or option, no facts, a half-precision model, or a loss that is not finite.
    """
    loss = _checked_loss(method, options)
    dtype = next(model.parameters()).dtype
    if dtype not in {torch.float32, torch.bfloat16}:
        raise InputError(f"the model is in {str(dtype).removeprefix('torch.')}; training needs float32: model.float()")
    batches = [
        _batches(facts, split, tokenizer, batch_size, np.random.default_rng([seed, i]), model.device)
        for i, (split, facts) in enumerate((("forget", forget), ("retain", retain)))
    ]
    if "start" in inspect.signature(loss).parameters:
        options = {**options, "start": _frozen_copy(model)}
    bar = tqdm(range(steps), disable=None if progress is None else not progress, desc=method, unit="step")
    with _trainable(model, lora, blocks, seed) as trained, bar:
        _descend(trained, bar, lambda: loss(trained, next(batches[0]), next(batches[1]), **options), lr)
    return model


@contextmanager
def _trainable(model: Any, lora: bool, blocks: Sequence[int], seed: int) -> Generator[Any, None, None]:
    """Yield the model, or the model with adapters, ready to train; afterwards merge and put mode and flags back."""
    flags = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    mode = model.training
    trained = _with_adapters(model, seed) if lora else model.requires_grad_(not blocks)
    for block in blocks:
        anatomy(model).blocks[block].requires_grad_(True)
    trained.eval()
    try:
        yield trained
    finally:
        if lora:
            trained.merge_and_unload()
        for parameter, flag in flags:
            parameter.requires_grad_(flag).grad = None
        model.train(mode)


def _descend(model: nn.Module, bar: Any, loss: Callable[[], torch.Tensor], lr: float) -> None:
    weights = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=lr, weight_decay=0.01)
    total = len(bar)
    warm = max(1, round(0.1 * total))
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / warm, (total - step) / max(1, total - warm))
    )
    for step in bar:
        value = loss()
        if not math.isfinite(value.item()):
            raise InputError(
                f"the loss is {value.item()} at step {step} of {total}; use a lower learning rate than {lr}"
            )
        optimizer.zero_grad()
        value.backward()
        nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()
        schedule.step()


def _checked_loss(method: str, options: dict[str, Any]) -> Callable[..., torch.Tensor]:
    if method not in METHODS:
        raise InputError(f"unknown method {method!r}; use one of {', '.join(sorted(METHODS))}")
    loss: Callable[..., torch.Tensor] = METHODS[method].loss
    parameters = inspect.signature(loss).parameters.values()
    known = [p.name for p in parameters if p.kind is p.KEYWORD_ONLY and p.name != "start"]
    for name in options:
        if name not in known:
            close = difflib.get_close_matches(name, known, n=1, cutoff=0)
            raise InputError(f"method {method} has no option {name!r}; the nearest is {''.join(close)!r}")
    return loss


def _batches(
    facts: Facts, split: str, tokenizer: Any, size: int, rng: np.random.Generator, device: torch.device
) -> Iterator[Batch]:
    encoded = [encode(tokenizer, form, fact.answer) for fact in facts for form in (fact.prompt, *fact.paraphrases)]
    if not encoded:
        raise InputError(f"there are no {split} facts to unlearn with; give at least one")
    return _endless(encoded, min(size, len(encoded)), pad_id(tokenizer), rng, device)


def _endless(
    encoded: list[Encoded], size: int, pad: int, rng: np.random.Generator, device: torch.device
) -> Iterator[Batch]:
    stream = (encoded[i] for _ in count() for i in rng.permutation(len(encoded)))
    while True:
        yield collate(list(islice(stream, size)), pad, device=device)


def _frozen_copy(model: nn.Module) -> nn.Module:
    return copy.deepcopy(model).requires_grad_(False).eval()


def _with_adapters(model: Any, seed: int) -> Any:
    from peft import LoraConfig, get_peft_model  # here, because it is slow to import and only LoRA needs it

    config = LoraConfig(r=LORA_RANK, lora_alpha=2 * LORA_RANK, target_modules="all-linear", task_type="CAUSAL_LM")
    with torch.random.fork_rng([model.device] if model.device.type == "cuda" else []):
        torch.manual_seed(seed)
        return get_peft_model(model, config)
