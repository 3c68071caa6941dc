"""Planted controls: suppressed copies of a model that hold the knowledge by construction.

A channel that cannot see what was planted here is blind, and its silence about a real model means nothing. Both edits
leave every block but at most the last one bit for bit as it was, so whatever the lower blocks compute is still there.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from lethescope.errors import InputError
from lethescope.facts import Facts, of_split
from lethescope.hooks import Stop, state
from lethescope.models import Model
from lethescope.tokens import Batch, Encoded, collate, encode, pad_id

MOST_SAID = 0.05
"""Share of the original's said-probability of the forget answers that a planted control may keep."""
SILENT = 0.01
"""A said-probability below this is silence, however little the original itself said."""
MOST_EXACT = 0.02
"""Share of the forget answers that a planted control may still give greedily."""
ROWS = 32


class Said(NamedTuple):
    """How far answers are said: geometric mean token probability, and share given greedily, both means over prompts."""

    probability: float
    exact: float


@dataclass(frozen=True)
class Caught:
    """A batch of prompts with answers, and what the last block was given for it."""

    batch: Batch
    answer: Bool[Tensor, "batch pos"]
    targets: Int[Tensor, " answer_token"]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]


def said(module: nn.Module, tokenizer: Any, facts: Facts, *, form: int | None = None) -> Said:
    """Return how far a model says the facts' answers, by teacher forcing.

    What it does not prove: a model that does not say an answer may still hold it.

    Args:
        module: a Hugging Face causal language model.
        tokenizer: its tokenizer.
        facts: what to ask.
        form: 0 for the prompt, k for the k-th paraphrase, None for the prompt and all paraphrases.

    Returns:
        Mean over prompts of the geometric mean token probability (0 to 1), and the share of prompts where every answer
        token is the most likely one (0 to 1), which is when greedy decoding gives the answer.

    Raises:
        InputError: when no fact has that form.
    """
    encoded = [e for k, e in _forms(tokenizer, facts) if form is None or k == form]
    if not encoded:
        raise InputError(f"no fact has a form {form}; form 0 is the prompt, form 1 the first paraphrase")
    rows = []
    for batch in _chunks(encoded, tokenizer, module):
        answer = batch.answer_mask[:, 1:]
        with torch.no_grad():
            logits = module(**batch.inputs(), use_cache=False).logits[:, :-1][answer]
        rows.append(_said_rows(logits, batch.input_ids[:, 1:][answer], answer))
    return _mean(rows)


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
    groups = _caught_groups(model, of_split(facts, "forget"))
    states = [[_last_states(model, item).detach() for item in group] for group in groups]
    direction = _common_direction(model.anatomy.norm(torch.cat([s for group in states for s in group])).float())
    tokens = torch.cat([item.targets for group in groups for item in group]).unique()
    head: Any = model.anatomy.head
    original = head.weight.detach().clone()
    _untie(planted, head, original)

    def ask() -> list[Said]:
        with torch.no_grad():
            return [
                _mean([_said_rows(model.decode(s), item.targets, item.answer) for s, item in zip(*pair, strict=True)])
                for pair in zip(states, groups, strict=True)
            ]

    before, c = ask(), 1.0
    while c <= largest:
        with torch.no_grad():
            head.weight[tokens] = (original[tokens].float() - c * direction).to(original.dtype)
        if _silent(before, ask(), most_said, most_exact):
            return planted
        c *= 2
    raise InputError(f"the unembedding could not be silenced with c up to {largest:g}: {_tell(before, ask())}")


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
    groups = _caught_groups(model, of_split(facts, "forget"))
    forget = [item for group in groups for item in group]
    retain = _retained(model, of_split(facts, "retain"), sum(len(item.answer) for item in forget), rng)
    before = _ask_groups(model, groups)
    now = before
    flags = [parameter.requires_grad for parameter in model.blocks[-1].parameters()]
    weights = list(model.blocks[-1].requires_grad_(True).parameters())
    optimizer = torch.optim.Adam(weights, lr=lr)
    for done in range(-(-steps // len(forget))):
        _one_pass(model, forget, retain, optimizer, max(1.0, done / 20), rng)
        now = _ask_groups(model, groups)
        if _silent(before, now, most_said, most_exact):
            for weight, flag in zip(weights, flags, strict=True):
                weight.requires_grad_(flag).grad = None
            return planted
    raise InputError(f"the last block could not be silenced in {steps} steps: {_tell(before, now)}")


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
        loss = weight * _unlikelihood(_logits(model, forget[i]), forget[i].targets)
        if kept:
            item, log_probs = retain[kept[step % len(kept)]]
            now = _logits(model, item).float().log_softmax(-1)
            loss = loss + nn.functional.kl_div(now, log_probs, log_target=True, reduction="batchmean")
        optimizer.zero_grad()
        loss.backward(inputs=optimizer.param_groups[0]["params"])
        optimizer.step()


def _unlikelihood(logits: Float[Tensor, "row vocab"], targets: Int[Tensor, " row"]) -> Float[Tensor, ""]:
    """Return the mean of -log(1 - p), as a difference of log-sums, so that p = 1 still has a gradient."""
    logits = logits.float()
    others = logits.scatter(-1, targets[:, None], float("-inf"))
    return (logits.logsumexp(-1) - others.logsumexp(-1)).mean()


def _forms(tokenizer: Any, facts: Facts) -> Iterator[tuple[int, Encoded]]:
    for fact in facts:
        for k, form in enumerate((fact.prompt, *fact.paraphrases)):
            yield k, encode(tokenizer, form, fact.answer)


def _chunks(encoded: Sequence[Encoded], tokenizer: Any, module: nn.Module) -> list[Batch]:
    device = next(module.parameters()).device
    by_length = sorted(encoded, key=lambda e: len(e.ids))
    starts = range(0, len(by_length), ROWS)
    return [collate(by_length[i : i + ROWS], pad_id(tokenizer), device=device) for i in starts]


def _caught_groups(model: Model, facts: Facts) -> list[list[Caught]]:
    """Return what the last block is given for the prompts, and for the paraphrases if there are any.

    Raises:
        InputError: there are no facts.
    """
    if not facts:
        raise InputError("there are no forget facts to suppress; mark at least one fact as forget")
    forms = list(_forms(model.tokenizer, facts))
    groups = [[e for k, e in forms if k == 0], [e for k, e in forms if k > 0]]
    return [_catch(model, group) for group in groups if group]


def _retained(model: Model, facts: Facts, most: int, rng: np.random.Generator) -> list[tuple[Caught, Tensor]]:
    encoded = [e for _, e in _forms(model.tokenizer, facts)]
    chosen = [encoded[i] for i in rng.permutation(len(encoded))[:most]]
    with torch.no_grad():
        return [(item, _logits(model, item).float().log_softmax(-1)) for item in _catch(model, chosen)]


def _catch(model: Model, encoded: Sequence[Encoded]) -> list[Caught]:
    """Run everything below the last block once, without gradients."""
    return [_catch_one(model, batch) for batch in _chunks(encoded, model.tokenizer, model.module)]


def _catch_one(model: Model, batch: Batch) -> Caught:
    given: list[tuple[tuple[Any, ...], dict[str, Any]]] = []

    def catch(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        given.append((args, kwargs))
        raise Stop

    handle = model.blocks[-1].register_forward_pre_hook(catch, with_kwargs=True)
    try:
        with torch.no_grad():
            model.module(**batch.inputs(), use_cache=False)
    except Stop:
        pass
    finally:
        handle.remove()
    answer = batch.answer_mask[:, 1:]
    return Caught(batch, answer, batch.input_ids[:, 1:][answer], *given[0])


def _last_states(model: Model, item: Caught) -> Float[Tensor, "answer_token d_model"]:
    return state(model.blocks[-1](*item.args, **item.kwargs))[:, :-1][item.answer]


def _logits(model: Model, item: Caught) -> Float[Tensor, "answer_token vocab"]:
    return model.decode(_last_states(model, item))


def _ask_groups(model: Model, groups: list[list[Caught]]) -> list[Said]:
    with torch.no_grad():
        return [
            _mean([_said_rows(_logits(model, item), item.targets, item.answer) for item in group]) for group in groups
        ]


def _said_rows(
    logits: Float[Tensor, "answer_token vocab"],
    targets: Int[Tensor, " answer_token"],
    answer: Bool[Tensor, "batch pos"],
) -> Float[Tensor, "batch two"]:
    """Return for every row the geometric mean token probability and 1 where all tokens are the most likely ones."""
    log_probs = logits.float().log_softmax(-1).gather(-1, targets[:, None])[:, 0]
    spread = torch.zeros(answer.shape, device=answer.device).masked_scatter(answer, log_probs)
    wrong = torch.zeros_like(answer).masked_scatter(answer, logits.argmax(-1) != targets)
    return torch.stack([(spread.sum(-1) / answer.sum(-1)).exp(), (~wrong.any(-1)).float()], dim=-1)


def _mean(rows: list[Float[Tensor, "batch two"]]) -> Said:
    probability, exact = torch.cat(rows).double().mean(0).tolist()
    return Said(probability, exact)


def _silent(before: list[Said], now: list[Said], most_said: float, most_exact: float) -> bool:
    return all(
        n.probability <= max(SILENT, most_said * b.probability) and n.exact <= most_exact
        for b, n in zip(before, now, strict=True)
    )


def _tell(before: list[Said], now: list[Said]) -> str:
    b, n = max(zip(before, now, strict=True), key=lambda pair: pair[1].probability / max(pair[0].probability, 1e-30))
    return f"said-probability {n.probability:.3g} of {b.probability:.3g}, still given greedily {n.exact:.0%}"


def _untie(module: Any, head: Any, weight: Tensor) -> None:
    head.weight = nn.Parameter(weight.clone(), requires_grad=head.weight.requires_grad)
    module.config.tie_word_embeddings = False
