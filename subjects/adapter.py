"""The suppressor that is an adapter: a LoRA trained to silence the forget answers over an untouched original."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import cycle
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.functional import kl_div

from lethescope.errors import InputError
from lethescope.facts import Facts, of_split
from lethescope.hooks import capturing, resuming
from lethescope.models import Model, merged_copy
from lethescope.subjects.methods.training import trainable, with_adapters
from lethescope.subjects.silence import (
    MOST_EXACT,
    MOST_SAID,
    Said,
    chunks,
    forget_groups,
    form_groups,
    is_silent,
    mean_said,
    said_rows,
    tell,
    unlikelihood,
)
from lethescope.tokens import Batch


def lora(
    module: nn.Module,
    tokenizer: Any,
    facts: Facts,
    *,
    blocks: int | None = None,
    most_said: float = MOST_SAID,
    most_exact: float = MOST_EXACT,
    steps: int = 900,
    lr: float = 3e-3,
    seed: int = 0,
    **options: Any,
) -> Any:
    """Return the original under a LoRA that was trained to silence the forget answers; unmerged.

    Loss: w times the mean over forget answer tokens of -log(1 - p), plus KL(original || adapted) at the retain answer
    tokens; w is 1 in the first 20 passes over the forget facts and then a twentieth of the pass. The adapter
    (Hu et al. 2021, arXiv 2106.09685) sits in the upper blocks only, and is trained until the answers are silent; this
    is looked at after every pass. Switched off (`disable_adapter`), it leaves the original bit for bit. Saved by
    `save_pretrained`, it is an adapter folder that names the folder its original was loaded from.

    Args:
        module: a Hugging Face causal language model, best in float32; not changed (an adapter of its own is merged).
        tokenizer: its tokenizer.
        facts: forget facts to silence, retain facts to hold on to.
        blocks: how many of the last blocks get adapters; None for the upper third.
        most_said: said-probability that may be left, as a share of the model's own (or `silence.SILENT`, if more).
        most_exact: share of answers that may still be given greedily.
        steps: most steps of Adam; a started pass is finished.
        lr: learning rate of Adam.
        seed: decides the adapter's first weights and the order of the batches.
        **options: of PEFT's `LoraConfig`, such as `r`.

    Returns:
        A `PeftModel`. Both limits hold on the prompts and, apart, on the paraphrases.

    Raises:
        InputError: there are no forget facts, all blocks are to be adapted, or `steps` do not silence the answers.
    """
    base = Model(merged_copy(module).requires_grad_(False), tokenizer)
    first = len(base.blocks) - (blocks or max(1, len(base.blocks) // 3))
    if not 0 < first < len(base.blocks):
        raise InputError(f"{blocks} adapted blocks of {len(base.blocks)}; at least one block must stay as it is")
    groups = [_taught(base, group, first) for group in forget_groups(tokenizer, facts)]
    kept = [item for group in form_groups(tokenizer, of_split(facts, "retain")) for item in _taught(base, group, first)]
    adapted = with_adapters(base.module, seed, **{"target_modules": _layers_of(base, first), **options}).eval()
    optimizer, rng = torch.optim.Adam(trainable(adapted), lr=lr), np.random.default_rng(seed)
    forget, before = [item for group in groups for item in group], _ask_taught(base, groups)
    now, stream = before, cycle([kept[i] for i in rng.permutation(len(kept))])
    for done in range(-(-steps // len(forget))):
        for i in rng.permutation(len(forget)):
            loss = max(1.0, done / 20) * unlikelihood(forget[i].logits(base), forget[i].targets)
            loss = loss + (next(stream).drift(base) if kept else 0)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        now = _ask_taught(base, groups)
        if is_silent(before, now, most_said, most_exact):
            adapted.zero_grad()
            return adapted
    raise InputError(f"the adapter could not be silenced in {steps} steps: {tell(before, now)}")


@dataclass(frozen=True)
class _Taught:
    """A batch of prompts with answers, the stream below the adapter, and what the original made of it."""

    batch: Batch
    layer: int
    below: Tensor
    log_probs: Tensor

    @property
    def answer(self) -> Tensor:
        return self.batch.answer_mask[:, 1:]

    @property
    def targets(self) -> Tensor:
        return self.batch.input_ids[:, 1:][self.answer]

    def logits(self, model: Model) -> Float[Tensor, "answer_token vocab"]:
        """Run the blocks above `layer` as they are now."""
        with resuming(model.blocks, self.layer, self.below):
            return model.module(**self.batch.inputs(), use_cache=False).logits[:, :-1][self.answer]

    def drift(self, model: Model) -> Float[Tensor, ""]:
        now = self.logits(model).float().log_softmax(-1)
        return kl_div(now, self.log_probs, log_target=True, reduction="batchmean")


def _layers_of(model: Model, first: int) -> list[str]:
    """Return the names of all linear layers in the blocks from `first` on."""
    inside = {part for block in model.blocks[first:] for part in block.modules()}
    return [
        name
        for name, part in model.module.named_modules()
        if part in inside and getattr(getattr(part, "weight", None), "ndim", 0) == 2
    ]


@torch.no_grad()
def _taught(model: Model, encoded: list[Any], first: int) -> list[_Taught]:
    out = []
    for batch in chunks(encoded, model.tokenizer, model.module):
        with capturing(model.blocks[:first]) as seen:
            logits = model.module(**batch.inputs(), use_cache=False).logits[:, :-1]
        out.append(_Taught(batch, first - 1, seen[first - 1], logits[batch.answer_mask[:, 1:]].float().log_softmax(-1)))
    return out


@torch.no_grad()
def _ask_taught(model: Model, groups: list[list[_Taught]]) -> list[Said]:
    return [mean_said([said_rows(item.logits(model), item.targets, item.answer) for item in group]) for group in groups]
