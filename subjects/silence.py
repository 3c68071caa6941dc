"""What edits that silence a model share: how far it says the answers, when it is silent, and its last block apart.

Everything below the last block is run once, and what the last block is given is kept (`Caught`), so that an edit of the
last block or the unembedding can be tried many times.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

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
    encoded = [e for k, e in forms(tokenizer, facts) if form is None or k == form]
    if not encoded:
        raise InputError(f"no fact has a form {form}; form 0 is the prompt, form 1 the first paraphrase")
    rows = []
    for batch in chunks(encoded, tokenizer, module):
        answer = batch.answer_mask[:, 1:]
        with torch.no_grad():
            logits = module(**batch.inputs(), use_cache=False).logits[:, :-1][answer]
        rows.append(said_rows(logits, batch.input_ids[:, 1:][answer], answer))
    return mean_said(rows)


def unlikelihood(logits: Float[Tensor, "row vocab"], targets: Int[Tensor, " row"]) -> Float[Tensor, ""]:
    """Return the mean of -log(1 - p), as a difference of log-sums, so that p = 1 still has a gradient."""
    logits = logits.float()
    others = logits.scatter(-1, targets[:, None], float("-inf"))
    return (logits.logsumexp(-1) - others.logsumexp(-1)).mean()


def forms(tokenizer: Any, facts: Facts) -> Iterator[tuple[int, Encoded]]:
    """Yield every prompt (0) and paraphrase (1, 2, …) of every fact with its answer.

    Yields:
        (number of the form, the form and the answer as tokens).
    """
    for fact in facts:
        for k, form in enumerate((fact.prompt, *fact.paraphrases)):
            yield k, encode(tokenizer, form, fact.answer)


def form_groups(tokenizer: Any, facts: Facts) -> list[list[Encoded]]:
    """Return the prompts, and then the paraphrases if there are any: each group must fall silent by itself."""
    every = list(forms(tokenizer, facts))
    return [group for group in ([e for k, e in every if k == 0], [e for k, e in every if k > 0]) if group]


def forget_groups(tokenizer: Any, facts: Facts) -> list[list[Encoded]]:
    """Return the groups of the forget facts.

    Raises:
        InputError: there are no forget facts.
    """
    if not (forget := of_split(facts, "forget")):
        raise InputError("there are no forget facts to suppress; mark at least one fact as forget")
    return form_groups(tokenizer, forget)


def chunks(encoded: Sequence[Encoded], tokenizer: Any, module: nn.Module) -> list[Batch]:
    """Return batches of sequences of like length, on the model's device."""
    device = next(module.parameters()).device
    by_length = sorted(encoded, key=lambda e: len(e.ids))
    starts = range(0, len(by_length), ROWS)
    return [collate(by_length[i : i + ROWS], pad_id(tokenizer), device=device) for i in starts]


def caught_groups(model: Model, facts: Facts) -> list[list[Caught]]:
    """Return what the last block is given for each group of the forget facts."""
    return [catch(model, group) for group in forget_groups(model.tokenizer, facts)]


def catch(model: Model, encoded: Sequence[Encoded]) -> list[Caught]:
    """Run everything below the last block once, without gradients."""
    return [_catch_one(model, batch) for batch in chunks(encoded, model.tokenizer, model.module)]


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


def last_states(model: Model, item: Caught) -> Float[Tensor, "answer_token d_model"]:
    """Run the last block as it is now, and return its output where it predicts answer tokens."""
    return state(model.blocks[-1](*item.args, **item.kwargs))[:, :-1][item.answer]


def logits_of(model: Model, item: Caught) -> Float[Tensor, "answer_token vocab"]:
    """Run the last block and the decoder as they are now, and return the logits of the answer tokens."""
    return model.decode(last_states(model, item))


@torch.no_grad()
def ask_groups(model: Model, groups: list[list[Caught]]) -> list[Said]:
    """Return how far the model says each group's answers now."""
    return [
        mean_said([said_rows(logits_of(model, item), item.targets, item.answer) for item in group]) for group in groups
    ]


def said_rows(
    logits: Float[Tensor, "answer_token vocab"],
    targets: Int[Tensor, " answer_token"],
    answer: Bool[Tensor, "batch pos"],
) -> Float[Tensor, "batch two"]:
    """Return for every row the geometric mean token probability and 1 where all tokens are the most likely ones."""
    log_probs = logits.float().log_softmax(-1).gather(-1, targets[:, None])[:, 0]
    spread = torch.zeros(answer.shape, device=answer.device).masked_scatter(answer, log_probs)
    wrong = torch.zeros_like(answer).masked_scatter(answer, logits.argmax(-1) != targets)
    return torch.stack([(spread.sum(-1) / answer.sum(-1)).exp(), (~wrong.any(-1)).float()], dim=-1)


def mean_said(rows: list[Float[Tensor, "batch two"]]) -> Said:
    """Return the means over all rows of `said_rows`."""
    probability, exact = torch.cat(rows).double().mean(0).tolist()
    return Said(probability, exact)


def is_silent(before: list[Said], now: list[Said], most_said: float, most_exact: float) -> bool:
    """Whether every group is said so little, against before, that it counts as silent."""
    return all(
        n.probability <= max(SILENT, most_said * b.probability) and n.exact <= most_exact
        for b, n in zip(before, now, strict=True)
    )


def tell(before: list[Said], now: list[Said]) -> str:
    """Return in words how far the group that is said most is still said."""
    b, n = max(zip(before, now, strict=True), key=lambda pair: pair[1].probability / max(pair[0].probability, 1e-30))
    return f"said-probability {n.probability:.3g} of {b.probability:.3g}, still given greedily {n.exact:.0%}"


def untie(module: Any, head: Any, weight: Tensor) -> None:
    """Give the unembedding a weight of its own, so that the input embedding stays as it is when it is edited."""
    head.weight = nn.Parameter(weight.clone(), requires_grad=head.weight.requires_grad)
    module.config.tie_word_embeddings = False
