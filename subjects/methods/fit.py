"""FIT, unlearning request after request (2026, arXiv:2601.21682): what to train and how is chosen for each request."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from lethescope.errors import InputError
from lethescope.facts import Facts
from lethescope.models import anatomy
from lethescope.subjects.methods import npo, unlearn
from lethescope.subjects.methods.answers import answer_logits, kl, nll
from lethescope.subjects.methods.gradients import gradient
from lethescope.subjects.methods.training import Lessons, descend, frozen_copy
from lethescope.tokens import Batch

Way = Literal["npo+kl", "npo", "random"]


def edit(
    model: Any,
    lessons: Lessons,
    *,
    high: float = 12.0,
    low: float = 6.0,
    top: int = 8,
    beta: float = 0.1,
    alpha: float = 1.0,
) -> None:
    """Unlearn one request, all forget facts of the lessons, in the blocks and by the loss that it asks for.

    The `top` blocks without which the request's loss changes most (`attributed`) are trained. Its `importance` s
    chooses the loss: from `high` on NPO + alpha KL(start || model) on retain; from `low` on NPO alone; below that the
    NLL of random tokens in the answers' places. The last two never see a retain fact and may damage the model.

    Our choices: a request is several examples, whose losses are taken over answer tokens; whole blocks are trained,
    their norms too; the KL is a divergence over answer positions, where the authors' code takes a cross entropy over
    whole texts; their filter of near-duplicate requests needs a sentence encoder and is left out. The thresholds are
    absolute and were set for models of billions of weights: look at `importance` first.

    Args:
        model: the model, edited in place.
        lessons: facts, steps and learning rate.
        high: importance from which on NPO + KL is used.
        low: importance from which on NPO is used.
        top: how many blocks to train; all when there are fewer.
        beta: NPO's: how soon the push on a forget answer fades.
        alpha: weight of the KL.

    Raises:
        InputError: no block would be trained.
    """
    if top < 1:
        raise InputError(f"top is the number of blocks to train, at least 1, not {top}")
    way, blocks = way_for(importance(model, lessons), low, high), anatomy(model).blocks
    open_to_training = [b for b in attributed(model, lessons) if any(p.requires_grad for p in blocks[b].parameters())]
    weights = [p for b in open_to_training[:top] for p in blocks[b].parameters() if p.requires_grad]
    model.requires_grad_(False)
    for weight in weights:
        weight.requires_grad_(True)
    descend(weights, lessons, _step(model, lessons, way, beta, alpha))


def requests(
    model: Any, forget_sets: Sequence[Facts], retain: Facts, *, tokenizer: Any, seed: int = 0, **settings: Any
) -> Iterator[Any]:
    """Unlearn one request after another, each from where the one before has left the model.

    Nothing is done before the first is asked for: `for model in requests(…): measure(model)`. What an earlier request
    took away may come back with a later one, so measure all forget sets after each.

    Args:
        model: the model, edited in place.
        forget_sets: the requests, in order.
        retain: facts to keep.
        tokenizer: the model's tokenizer.
        seed: of the first request; each has the next.
        **settings: of `unlearn` and of `edit`.

    Yields:
        The model given, after each request.
    """
    for i, forget in enumerate(forget_sets):
        yield unlearn(model, forget, retain, tokenizer=tokenizer, method="fit", seed=seed + i, **settings)


def way_for(score: float, low: float, high: float) -> Way:
    """Return the loss for a request of some importance.

    >>> [way_for(s, 6, 12) for s in (5.9, 6, 12)]
    ['random', 'npo', 'npo+kl']
    """
    return "npo+kl" if score >= high else "npo" if score >= low else "random"


def importance(model: Any, lessons: Lessons) -> float:
    """Return the norm of the gradient of the request's NLL by its input embeddings, over all of its tokens.

    The NLL is the mean over the answer tokens of the whole request. A fact known by heart has a small gradient whatever
    it means to anyone, so this is no measure of how far the model holds it.
    """
    total = sum(int(batch.answer_mask.sum()) for batch in lessons.once("forget"))
    squares = 0.0
    for batch in lessons.once("forget"):
        embedded = model.get_input_embeddings()(batch.input_ids).detach().requires_grad_(True)
        inputs = batch.inputs() | {"input_ids": None, "inputs_embeds": embedded}
        loss = nll(lambda inputs=inputs, **_: model(**inputs), batch) * int(batch.answer_mask.sum()) / total
        squares += gradient(loss, [embedded])[0].float().square().sum().item()
    return squares**0.5


def attributed(model: Any, lessons: Lessons) -> list[int]:
    """Return all blocks, first the one whose weights, all set to 0, change the request's NLL most.

    A block without weights adds nothing to the residual stream, which is far from anything the blocks above have seen:
    a large change need not mean that the request is held there.
    """
    before = _request_loss(model, lessons)
    changes = []
    for block in anatomy(model).blocks:
        with zeroed(block):
            changes.append(abs(_request_loss(model, lessons) - before))
    return sorted(range(len(changes)), key=lambda i: -changes[i])


def forget_degree(q: float, q_star: float) -> float:
    """Return F.D. = max(0, 1 - |Q / Q* - 1|), Q on forget facts: 1 when as in a model that never saw the requests.

    Forgetting too little and too much count the same. A score of what is said, it cannot see what is still held; and
    where Q* is itself a guess between two models, as in the paper, so is this.

    >>> forget_degree(20.0, 20.0), forget_degree(30.0, 20.0), forget_degree(15.0, 20.0), forget_degree(90.0, 20.0)
    (1.0, 0.5, 0.75, 0.0)

    Args:
        q: quality of the unlearned model's answers, such as 100 (probability x ROUGE-L x accuracy)^(1/3).
        q_star: the same of the reference.

    Returns:
        0 to 1; more is nearer to the reference.
    """
    return _nearness(q, q_star)


def retain_utility(q: float, q_star: float) -> float:
    """Return R.U. = max(0, 1 - |Q / Q* - 1|), Q on retain facts: 1 when as in the reference.

    >>> retain_utility(72.0, 80.0), retain_utility(0.0, 80.0)
    (0.9, 0.0)

    Args:
        q: quality of the unlearned model's answers.
        q_star: the same of the reference.

    Returns:
        0 to 1; more is nearer to the reference.
    """
    return _nearness(q, q_star)


def _nearness(q: float, q_star: float) -> float:
    if not q_star > 0:
        raise InputError(f"the reference's quality Q* is {q_star}, so nothing can be a share of it; it must be above 0")
    return max(0.0, 1 - abs(q / q_star - 1))


def _step(model: Any, lessons: Lessons, way: Way, beta: float, alpha: float) -> Callable[[float], Tensor]:
    forget, retain = lessons.batches("forget"), lessons.batches("retain")
    start = frozen_copy(model)
    generator = torch.Generator().manual_seed(lessons.seed)

    def step(_done: float) -> Tensor:
        batch = next(forget)
        if way == "random":
            return random_nll(model, batch, generator)
        loss = npo.loss(model, batch, batch, start=start, beta=beta, alpha=0.0)
        return loss + alpha * kl(start, model, next(retain)) if way == "npo+kl" else loss

    return step


def random_nll(model: Any, batch: Batch, generator: torch.Generator) -> Tensor:
    """Return the NLL of tokens drawn evenly from the vocabulary in the answers' places; the answers are still read."""
    logits = answer_logits(model, batch)
    drawn = torch.randint(logits.shape[-1], (len(logits),), generator=generator)
    return cross_entropy(logits, drawn.to(logits.device))


@torch.no_grad()
def _request_loss(model: Any, lessons: Lessons) -> float:
    sums = [(nll(model, b).item() * int(b.answer_mask.sum()), int(b.answer_mask.sum())) for b in lessons.once("forget")]
    return sum(s for s, _ in sums) / sum(n for _, n in sums)


@contextmanager
def zeroed(module: nn.Module) -> Generator[None]:
    """Set all weights of a module to 0 for a while."""
    kept = [(parameter, parameter.detach().clone()) for parameter in module.parameters()]
    with torch.no_grad():
        try:
            for parameter, _ in kept:
                parameter.zero_()
            yield
        finally:
            for parameter, before in kept:
                parameter.copy_(before)
