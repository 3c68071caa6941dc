"""Unlearning methods, one short file each, all called through `unlearn`.

A method is a module with one of two functions:

- `loss(model, forget, retain, *, option=default, …) -> scalar`, when it is one loss over random batches
  (`lethescope.tokens.Batch`) of forget and of retain examples; the common loop trains it.
- `edit(model, lessons, *, option=default, …) -> None`, when it needs more: gradients of its own, an importance taken
  first, no steps at all. It edits the model in place, with the pieces in `training`.

Keyword arguments are the method's options. A loss may also name what it wants to be given: `start`, a frozen copy of
the model from before the first step; `fresh`, a model of the same shape that knows nothing; `refused`, the batch of the
same forget prompts with refusals for answers; `done`, the share of the steps that is done. A new method is its file,
its test, and its name in `METHODS`.
"""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Callable, Iterator, Sequence
from importlib import import_module
from types import ModuleType
from typing import Any

import torch

from lethescope.errors import InputError
from lethescope.facts import Facts
from lethescope.subjects.methods.training import (
    REFUSALS,
    Lessons,
    descend,
    fresh_copy,
    frozen_copy,
    trainable,
    training,
)

METHODS = (
    "badteacher",
    "blur",
    "ceu",
    "fisher",
    "fit",
    "gradascent",
    "graddiff",
    "gslora",
    "gu",
    "idkdpo",
    "idknll",
    "npo",
    "ofmu",
    "pdu",
    "reglu",
    "retain",
    "rmu",
    "salun",
    "satimp",
    "scrub",
    "simnpo",
    "ssd",
    "taskvector",
    "undial",
    "vila",
    "wga",
)
"""Every method's name, which is its file's."""
GIVEN = ("start", "fresh", "refused", "done")
"""What a loss is given when it names it."""


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
    refusals: Sequence[str] = REFUSALS,
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
        refusals: what refusal methods teach in place of the answers.
        progress: show a bar; None shows one on a terminal only.
        **options: the method's own options, such as `beta` or `alpha`.

    Returns:
        The model given, edited, with its mode and its gradient flags as they were.

    Raises:
        InputError: unknown method or option, no facts, a half-precision model, a loss that is not finite, or LoRA with
            a method that edits the weights itself.
    """
    module = method_named(method, options)
    if lora and not hasattr(module, "loss"):
        raise InputError(f"method {method} edits the weights itself, so it cannot train adapters; leave lora out")
    dtype = next(model.parameters()).dtype
    if dtype not in {torch.float32, torch.bfloat16}:
        raise InputError(f"the model is in {str(dtype).removeprefix('torch.')}; training needs float32: model.float()")
    lessons = Lessons(
        forget, retain, tokenizer, model.device, steps, lr, batch_size, seed, tuple(refusals), method, progress
    )
    for split in ("forget", "retain"):
        lessons.examples(split)  # refuses an empty split and unwritable answers before anything is changed
    given = _given(module, model, lessons)
    with training(model, lora=lora, blocks=blocks, seed=seed) as trained:
        if hasattr(module, "edit"):
            module.edit(trained, lessons, **options)
        else:
            descend(trainable(trained), lessons, _step(module.loss, trained, lessons, given, options))
    return model


def method_named(name: str, options: dict[str, Any]) -> ModuleType:
    """Return a method's module, once its name and its options' names are known to be right.

    Raises:
        InputError: there is no such method or option; the nearest name is told.
    """
    if name not in METHODS:
        raise InputError(f"unknown method {name!r}; use one of {', '.join(METHODS)}")
    module = import_module(f"{__name__}.{name}")
    known = options_of(module)
    for option in options:
        if option not in known:
            close = difflib.get_close_matches(option, known, n=1, cutoff=0)
            nearest = f"the nearest is {close[0]!r}" if close else "it has none"
            raise InputError(f"method {name} has no option {option!r}; {nearest}")
    return module


def options_of(module: ModuleType) -> dict[str, Any]:
    """Return the options of a method with their defaults."""
    function = getattr(module, "loss", None) or module.edit
    parameters = inspect.signature(function).parameters.values()
    return {p.name: p.default for p in parameters if p.kind is p.KEYWORD_ONLY and p.name not in GIVEN}


def _given(module: ModuleType, model: Any, lessons: Lessons) -> dict[str, Iterator[Any] | Any]:
    """Make what the method's loss asks for by name; models are made before anything is changed."""
    asked = inspect.signature(module.loss).parameters if hasattr(module, "loss") else {}
    made = {
        "start": lambda: frozen_copy(model),
        "fresh": lambda: fresh_copy(model, lessons.seed),
        "refused": lessons.refusals_for_forget,
        "done": lambda: 0.0,
    }
    return {name: make() for name, make in made.items() if name in asked}


def _step(
    loss: Callable[..., torch.Tensor], model: Any, lessons: Lessons, given: dict[str, Any], options: dict[str, Any]
) -> Callable[[float], torch.Tensor]:
    forget, retain = lessons.batches("forget"), lessons.batches("retain")

    def step(done: float) -> torch.Tensor:
        now = {"refused": lambda: next(given["refused"]), "done": lambda: done}
        told = {name: now[name]() if name in now else thing for name, thing in given.items()}
        return loss(model, next(forget), next(retain), **told, **options)

    return step
