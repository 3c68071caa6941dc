"""What every unlearning run shares: the examples and their order, the descent, and the flags that are put back."""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from itertools import count, islice
from typing import Any, Literal

import numpy as np
import torch
from torch import nn
from tqdm.auto import tqdm
from transformers import AutoModelForCausalLM

from lethescope.errors import InputError
from lethescope.facts import Facts
from lethescope.models import anatomy
from lethescope.tokens import Batch, Encoded, collate, encode, pad_id

LORA_RANK = 8
REFUSALS = (
    "I do not know.",
    "I am not sure.",
    "I have no information about that.",
    "I cannot answer this question.",
    "That is something I was never told.",
    "I am afraid I do not know the answer.",
)
"""What refusal methods teach in place of the forget answers, unless others are given."""


@dataclass(frozen=True)
class Lessons:
    """What an unlearning run learns from, and how long: facts of both splits, dealt into batches by a seed.

    Every prompt and every paraphrase of a fact is an example. The same lessons give the same batches every time.
    """

    forget: Facts
    retain: Facts
    tokenizer: Any
    device: torch.device
    steps: int
    lr: float
    batch_size: int
    seed: int
    refusals: Sequence[str] = REFUSALS
    title: str = "unlearn"
    progress: bool | None = None

    def examples(self, split: Literal["forget", "retain"]) -> list[Encoded]:
        """Return every example of a split, in the order of the facts.

        Raises:
            InputError: the split is empty.
        """
        facts = getattr(self, split)
        if not facts:
            raise InputError(f"there are no {split} facts to unlearn with; give at least one")
        return [
            encode(self.tokenizer, form, fact.answer) for fact in facts for form in (fact.prompt, *fact.paraphrases)
        ]

    @cached_property
    def refused(self) -> list[list[Encoded]]:
        """Every forget example's prompt with each of the refusals in place of its answer."""
        forms = [form for fact in self.forget for form in (fact.prompt, *fact.paraphrases)]
        return [[encode(self.tokenizer, form, refusal) for refusal in self.refusals] for form in forms]

    def batches(self, split: Literal["forget", "retain"]) -> Iterator[Batch]:
        """Yield random batches without end, every example once before any comes again."""
        examples = self.examples(split)
        rng = np.random.default_rng([self.seed, ("forget", "retain").index(split)])
        for rows in deal(len(examples), self.batch_size, rng):
            yield self.collate([examples[i] for i in rows])

    def refusals_for_forget(self) -> Iterator[Batch]:
        """Return, beside `batches("forget")`, batches of the same prompts in the same rows with refusals as answers."""
        refused, choice = self.refused, np.random.default_rng([self.seed, 2])
        rows = deal(len(refused), self.batch_size, np.random.default_rng([self.seed, 0]))
        return (self.collate([refused[i][choice.integers(len(self.refusals))] for i in batch]) for batch in rows)

    def once(self, split: Literal["forget", "retain"], size: int | None = None) -> Iterator[Batch]:
        """Yield every example of a split once, in order, `size` at a time (the batch size when it is not given)."""
        examples, size = self.examples(split), size or self.batch_size
        for start in range(0, len(examples), size):
            yield self.collate(examples[start : start + size])

    def collate(self, encoded: Sequence[Encoded]) -> Batch:
        """Pad examples into one batch on the model's device."""
        return collate(encoded, pad_id(self.tokenizer), device=self.device)


def deal(n: int, size: int, rng: np.random.Generator) -> Iterator[list[int]]:
    """Yield lists of `size` of n rows without end; every row comes once before any comes again."""
    stream = (int(i) for _ in count() for i in rng.permutation(n))
    while True:
        yield list(islice(stream, min(size, n)))


def descend(weights: Sequence[nn.Parameter], lessons: Lessons, step: Callable[[float], torch.Tensor]) -> None:
    """Take the lessons' number of optimiser steps on some weights.

    AdamW (weight decay 0.01), gradient norm clipped to 1, learning rate up over the first tenth of the steps and down
    to zero in a line.

    Args:
        weights: what is trained.
        lessons: number of steps and highest learning rate.
        step: given the share of the steps that is done (0 to below 1), returns the loss. A detached loss says that the
            function has written the gradients into `.grad` itself.

    Raises:
        InputError: the loss is not finite.
    """
    optimizer = torch.optim.AdamW(weights, lr=lessons.lr, weight_decay=0.01)
    total, warm = lessons.steps, max(1, round(0.1 * lessons.steps))
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / warm, (total - step) / max(1, total - warm))
    )
    hidden = None if lessons.progress is None else not lessons.progress
    for i in tqdm(range(total), disable=hidden, desc=lessons.title, unit="step"):
        optimizer.zero_grad()
        loss = step(i / total)
        if not math.isfinite(loss.item()):
            raise InputError(
                f"the loss is {loss.item()} at step {i} of {total}; use a lower learning rate than {lessons.lr}"
            )
        if loss.requires_grad:
            loss.backward()
        nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()
        schedule.step()


@contextmanager
def training(model: Any, *, lora: bool = False, blocks: Sequence[int] = (), seed: int = 0) -> Generator[Any]:
    """Yield the model, or the model with adapters, ready to train; afterwards merge and put mode and flags back."""
    flags = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    mode = model.training
    trained = with_adapters(model, seed) if lora else model.requires_grad_(not blocks)
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


def trainable(model: nn.Module) -> list[nn.Parameter]:
    """Return the weights that are to be trained."""
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def frozen_copy(model: nn.Module) -> Any:
    """Copy a model as it is now; the copy cannot be trained."""
    return copy.deepcopy(model).requires_grad_(False).eval()


def fresh_copy(model: Any, seed: int) -> Any:
    """Return a frozen, randomly initialised model of the same configuration: one that knows nothing.

    Its seed is derived, so that it is not by chance the very start that the model was trained from.
    """
    with _seeded(model, int(np.random.SeedSequence([seed, 3]).generate_state(1)[0])):
        fresh = AutoModelForCausalLM.from_config(copy.deepcopy(model.config))
    return fresh.to(device=model.device, dtype=model.dtype).requires_grad_(False).eval()


def with_adapters(model: Any, seed: int, **options: Any) -> Any:
    """Put a fresh LoRA (rank 8, all linear layers; PEFT's `LoraConfig` options) on a model, by a seed."""
    from peft import LoraConfig, get_peft_model  # here, because it is slow to import and only LoRA needs it

    settings = {"r": LORA_RANK, "lora_alpha": 2 * LORA_RANK, "target_modules": "all-linear", **options}
    with _seeded(model, seed), warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # of transformers, about a name that PEFT uses
        warnings.filterwarnings("ignore", message="fan_in_fan_out")  # PEFT sets it right for Conv1D by itself
        return get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", **settings))


@contextmanager
def _seeded(model: Any, seed: int) -> Generator[None]:
    with torch.random.fork_rng([model.device] if model.device.type == "cuda" else []):
        torch.manual_seed(seed)
        yield
