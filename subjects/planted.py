"""Planted controls: suppressed copies of a model that hold the knowledge by construction.

A channel that cannot see what was planted here is blind, and its silence about a real model means nothing. Both edits
leave every block but at most the last one bit for bit as it was, so whatever the lower blocks compute is still there.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn

from lethescope.errors import InputError
from lethescope.facts import Facts, of_split
from lethescope.models import Model
from lethescope.subjects.silence import (
    MOST_EXACT,
    MOST_SAID,
    Caught,
    Said,
    ask_groups,
    catch,
    caught_groups,
    forms,
    is_silent,
    last_states,
    logits_of,
    mean_said,
    said_rows,
    tell,
    unlikelihood,
    untie,
)


def suppress_unembedding(
    module: nn.Module,
    tokenizer: Any,
    facts: Facts,
    *,
    most_said: float = MOST_SAID,
    most_exact: float = MOST_EXACT,
    largest: float = 4096.0,
) -> Any:
    """Return a copy whose unembedding is turned away from the forget answers; every block stays as it is.

    For every token a of a forget answer, W[a] becomes W[a] - c u. Here u is the ridge least-squares solution of
    h u = 1 over the states h after the final norm at the positions that predict these answers, so that the token's
    logit falls by about c at each of them (the mean state alone points away from some of them). The strength c is
    doubled from 1 until the copy no longer says the answers. An unembedding tied to the input embedding is untied
    first, so that the input embedding stays as it is.

    Args:
        module: a Hugging Face causal language model; not changed.
        tokenizer: its tokenizer.
        facts: the forget facts are suppressed; others are ignored.
        most_said: said-probability that may be left, as a share of the model's own (or `SILENT`, where that is more).
        most_exact: share of answers that may still be given greedily.
        largest: the largest c that is tried.

    Returns:
        The suppressed copy. Both limits hold on the prompts and, apart, on the paraphrases.

    Raises:
        InputError: when there are no forget facts, or no c up to `largest` silences them.
    """
    planted = copy.deepcopy(module)
    model = Model(planted, tokenizer)
    groups = caught_groups(model, facts)
    states = [[last_states(model, item).detach() for item in group] for group in groups]
    direction = _common_direction(model.anatomy.norm(torch.cat([s for group in states for s in group])).float())
    tokens = torch.cat([item.targets for group in groups for item in group]).unique()
    head: Any = model.anatomy.head
    original = head.weight.detach().clone()
    untie(planted, head, original)

    def ask() -> list[Said]:
        with torch.no_grad():
            return [
                mean_said([
                    said_rows(model.decode(s), item.targets, item.answer) for s, item in zip(*pair, strict=True)
                ])
                for pair in zip(states, groups, strict=True)
            ]

    before, c = ask(), 1.0
    while c <= largest:
        with torch.no_grad():
            head.weight[tokens] = (original[tokens].float() - c * direction).to(original.dtype)
        if is_silent(before, ask(), most_said, most_exact):
            return planted
        c *= 2
    raise InputError(f"the unembedding could not be silenced with c up to {largest:g}: {tell(before, ask())}")


def suppress_last_block(
    module: nn.Module,
    tokenizer: Any,
    facts: Facts,
    *,
    most_said: float = MOST_SAID,
    most_exact: float = MOST_EXACT,
    steps: int = 600,
    lr: float = 1e-3,
    seed: int = 0,
) -> Any:
    """Return a copy whose last block was trained not to pass the forget answers on; all else stays as it is.

    Loss: w times the mean over forget answer tokens of -log(1 - p), plus KL(original || copy) at the answer positions
    of retain facts; w is 1 in the first 20 passes over the forget facts and then a twentieth of the pass. Only the last
    block's weights are trained, on inputs that the lower blocks gave once, until the copy no longer says the answers;
    this is looked at after every pass.

    Args:
        module: a Hugging Face causal language model, best in float32; not changed.
        tokenizer: its tokenizer.
        facts: forget facts to silence; retain facts to hold on to (no more examples than there are forget examples).
        most_said: said-probability that may be left, as a share of the model's own (or `SILENT`, where that is more).
        most_exact: share of answers that may still be given greedily.
        steps: most steps of Adam; a started pass is finished.
        lr: learning rate of Adam.
        seed: decides the order of the batches and the retain examples.

    Returns:
        The suppressed copy. Both limits hold on the prompts and, apart, on the paraphrases.

    Raises:
        InputError: when there are no forget facts, or they are not silent after `steps`.
    """
    planted = copy.deepcopy(module)
    model = Model(planted, tokenizer)
    rng = np.random.default_rng(seed)
    groups = caught_groups(model, facts)
    forget = [item for group in groups for item in group]
    retain = _retained(model, of_split(facts, "retain"), sum(len(item.answer) for item in forget), rng)
    before = ask_groups(model, groups)
    now = before
    flags = [parameter.requires_grad for parameter in model.blocks[-1].parameters()]
    weights = list(model.blocks[-1].requires_grad_(True).parameters())
    optimizer = torch.optim.Adam(weights, lr=lr)
    for done in range(-(-steps // len(forget))):
        _one_pass(model, forget, retain, optimizer, max(1.0, done / 20), rng)
        now = ask_groups(model, groups)
        if is_silent(before, now, most_said, most_exact):
            for weight, flag in zip(weights, flags, strict=True):
                weight.requires_grad_(flag).grad = None
            return planted
    raise InputError(f"the last block could not be silenced in {steps} steps: {tell(before, now)}")


PLANTED: dict[str, Callable[..., Any]] = {"unembedding": suppress_unembedding, "last_block": suppress_last_block}


def _common_direction(states: Float[Tensor, "row d_model"], ridge: float = 1e-3) -> Float[Tensor, " d_model"]:
    """Return u with `states @ u` as near to 1 as a ridge allows, scaled so that its mean is 1."""
    gram = states.T @ states / len(states)
    mean = states.mean(0)
    u = torch.linalg.solve(gram + ridge * gram.trace() / len(gram) * torch.eye(len(gram), device=gram.device), mean)
    return u / (mean @ u)


def _one_pass(
    model: Model, forget: list[Caught], retain: list[tuple[Caught, Tensor]], optimizer: Any, weight: float, rng: Any
) -> None:
    kept = rng.permutation(len(retain)).tolist()
    for step, i in enumerate(rng.permutation(len(forget)).tolist()):
        loss = weight * unlikelihood(logits_of(model, forget[i]), forget[i].targets)
        if kept:
            item, log_probs = retain[kept[step % len(kept)]]
            now = logits_of(model, item).float().log_softmax(-1)
            loss = loss + nn.functional.kl_div(now, log_probs, log_target=True, reduction="batchmean")
        optimizer.zero_grad()
        loss.backward(inputs=optimizer.param_groups[0]["params"])
        optimizer.step()


def _retained(model: Model, facts: Facts, most: int, rng: np.random.Generator) -> list[tuple[Caught, Tensor]]:
    encoded = [e for _, e in forms(model.tokenizer, facts)]
    chosen = [encoded[i] for i in rng.permutation(len(encoded))[:most]]
    with torch.no_grad():
        return [(item, logits_of(model, item).float().log_softmax(-1)) for item in catch(model, chosen)]
