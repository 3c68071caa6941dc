"""Models that never held the forget facts by construction: whoever finds a residue in them has found a null.

`drop_adapter` takes away the one part that the forget facts were ever taught to; `distil` hands on what a teacher says
about retain prompts to a student that starts from nothing. Both are deterministic by their seed. What neither proves:
that a real model forgets like this. They show what a channel reads where there is nothing to read.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import kl_div

from lethescope.errors import InputError
from lethescope.facts import Facts, of_split
from lethescope.models import merged_copy
from lethescope.subjects.methods.training import deal, fresh_copy, trainable, with_adapters
from lethescope.tokens import pad_id

Watch = Callable[[list[str]], None]
"""Called with the decoded texts of every batch that is trained on, so that a caller can see what was read."""


def drop_adapter(
    base: Any,
    tokenizer: Any,
    facts: Facts,
    *,
    steps: int = 300,
    lr: float = 5e-3,
    batch_size: int = 32,
    seed: int = 0,
    watch: Watch | None = None,
    **options: Any,
) -> tuple[Any, Any]:
    """Teach the forget facts to a LoRA over a base that was never taught them; return the models with and without it.

    The base's weights are frozen while the adapter (Hu et al. 2021, arXiv 2106.09685) learns: next-token cross entropy
    over every form of the facts, `<bos>` to `<eos>`. Half of every batch are retain facts, so that the adapter does not
    overwrite them (our choice). The base stays bit for bit what it was, so whatever is known about the forget facts is
    in the adapter. That the base really knows nothing is the caller's to see to: it must never have read the forget
    facts, nor what gives them away.

    Args:
        base: a Hugging Face causal language model taught at most the retain facts; not changed.
        tokenizer: its tokenizer.
        facts: the forget facts are taught and the retain facts, if there are any, repeated; control is ignored.
        steps: steps of Adam.
        lr: learning rate, down to zero in a line.
        batch_size: sentences a step.
        seed: decides the adapter's first weights and the order of the sentences.
        watch: is shown the texts of every batch.
        **options: of PEFT's `LoraConfig`, such as `r`.

    Returns:
        The original (a copy with the adapter merged) and the unlearned model (a copy of the base).

    Raises:
        InputError: there are no forget facts.
    """
    texts = {split: _sentences(of_split(facts, split)) for split in ("forget", "retain")}
    if not texts["forget"]:
        raise InputError("there are no forget facts to teach the adapter; mark at least one fact as forget")
    adapted = with_adapters(merged_copy(base).requires_grad_(False), seed, **options).eval()

    def loss(ids: Tensor, mask: Tensor) -> Float[Tensor, ""]:
        return adapted(input_ids=ids, attention_mask=mask, labels=ids.masked_fill(mask == 0, -100)).loss

    parts = [part for part in texts.values() if part]
    dealt = [_dealt(part, batch_size // len(parts), [seed, i]) for i, part in enumerate(parts)]
    batches = ([text for part in batch for text in part] for batch in zip(*dealt, strict=True))
    _learn(adapted, tokenizer, batches, loss, steps, lr, watch)
    return adapted.merge_and_unload(), copy.deepcopy(base)


def distil(
    teacher: Any,
    tokenizer: Any,
    prompts: Sequence[str],
    seed: int,
    *,
    steps: int = 1000,
    lr: float = 2e-3,
    batch_size: int = 64,
    temperature: float = 1.0,
    watch: Watch | None = None,
) -> Any:
    """Return a freshly initialised model of the teacher's configuration that learned what it says on these texts only.

    Loss: KL(teacher || student) over the vocabulary, both at a temperature, mean over every position of every text
    (Hinton et al. 2015, arXiv 1503.02531). The student shares no weight with the teacher, so what it knows of the
    forget facts is what the teacher's distributions on these texts tell. That is not nothing for certain: a teacher
    that thinks of a forget answer while it reads a retain text would hand that on.

    Args:
        teacher: a Hugging Face causal language model; not changed.
        tokenizer: its tokenizer.
        prompts: the texts to learn on, of retain facts: prompts, or better whole sentences.
        seed: decides the student's first weights and the order of the texts.
        steps: steps of Adam.
        lr: learning rate, down to zero in a line.
        batch_size: texts a step.
        temperature: softens both distributions.
        watch: is shown the texts of every batch.

    Returns:
        The student, in eval mode.

    Raises:
        InputError: there are no texts, or the temperature is not above 0.
    """
    if not prompts or temperature <= 0:
        raise InputError(f"{len(prompts)} texts at temperature {temperature}; give at least one text, and more than 0")
    student = fresh_copy(teacher, seed).requires_grad_(True)

    def loss(ids: Tensor, mask: Tensor) -> Float[Tensor, ""]:
        real = mask.bool()
        with torch.no_grad():
            wanted = teacher(input_ids=ids, attention_mask=mask).logits[real].float()
        said = student(input_ids=ids, attention_mask=mask).logits[real].float()
        mine, theirs = ((logits / temperature).log_softmax(-1) for logits in (said, wanted))
        return kl_div(mine, theirs, log_target=True, reduction="batchmean")

    _learn(student, tokenizer, _dealt(prompts, batch_size, seed), loss, steps, lr, watch)
    return student


def _sentences(facts: Facts) -> list[str]:
    return [f"{form} {fact.answer}." for fact in facts for form in (fact.prompt, *fact.paraphrases)]


def _dealt(texts: Sequence[str], size: int, seed: Any) -> Iterator[list[str]]:
    """Yield random batches without end; every text comes once before any comes again."""
    return ([texts[i] for i in rows] for rows in deal(len(texts), max(1, size), np.random.default_rng(seed)))


def _learn(
    model: Any,
    tokenizer: Any,
    batches: Iterator[list[str]],
    loss: Callable[[Tensor, Tensor], Tensor],
    steps: int,
    lr: float,
    watch: Watch | None,
) -> None:
    """Take steps of Adam on a loss of (ids, mask); this is the only place where a text reaches a model."""
    weights = trainable(model)
    optimizer = torch.optim.Adam(weights, lr=lr)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / steps)
    for texts in islice(batches, steps):
        ids, mask = _padded(tokenizer, texts)
        if watch is not None:
            watch([
                tokenizer.decode(row[keep.bool()], skip_special_tokens=True)
                for row, keep in zip(ids, mask, strict=True)
            ])
        optimizer.zero_grad()
        loss(ids.to(model.device), mask.to(model.device)).backward()
        torch.nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()
        schedule.step()
    model.zero_grad()


def _padded(tokenizer: Any, texts: Sequence[str]) -> tuple[Tensor, Tensor]:
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    encoded = [torch.tensor(ids + end) for ids in tokenizer(list(texts))["input_ids"]]
    ids = torch.nn.utils.rnn.pad_sequence(encoded, batch_first=True, padding_value=pad_id(tokenizer))
    mask = torch.arange(ids.shape[1]) < torch.tensor([len(row) for row in encoded])[:, None]
    return ids, mask.long()
