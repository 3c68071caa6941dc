"""Channel *relearn*: does retraining on some forget facts bring back others, which were not retrained?"""

from collections.abc import Iterator, Sequence

import numpy as np
import torch
import xarray as xr
from torch import nn
from torch.nn import functional

from lethescope import measurement
from lethescope.channel import Channel
from lethescope.facts import Fact
from lethescope.models import Model, merged_copy
from lethescope.scoring import candidates, score_tokens
from lethescope.subjects.methods.training import with_adapters
from lethescope.tokens import Batch, Encoded, collate, encode, pad_id


def measure(
    model: Model,
    facts: Sequence[Fact],
    *,
    original: Model | None = None,
    seed: int = 0,
    rates: Sequence[float] = (1e-4, 1e-3),
    methods: Sequence[str] = ("full",),
    steps: Sequence[int] = (4, 16),
    batch_size: int = 32,
    rank: int = 8,
    alternatives: int | None = None,
) -> xr.Dataset:
    """Fine-tune a copy on half of the subjects, test on the other half, swap; the same for control facts.

    Retraining on *other* facts (RTT, Deeb & Roger 2024, arXiv 2410.08827) cannot teach the held-out ones, so what it
    brings back was there. Forget and control facts are each split by subject into two halves. The whole curve (method,
    learning rate, step) is recorded; the audit takes the best place, and the same from the nulls. The user's model is
    never edited. Nothing brought back means: not at this budget.

    Args:
        model: any language model.
        facts: forget and control facts.
        original: not used.
        seed: of the halves and of the batches.
        rates: learning rates of Adam (LoRA takes ten times as much).
        methods: `full` (all weights) and `lora` (through PEFT).
        steps: after how many steps the held-out half is tested.
        batch_size: facts a step.
        rank: of LoRA.
        alternatives: at most so many alternatives are tested.

    Returns:
        `score(fact, candidate, place)` of held-out facts in nats; places are `method rate step`, with coordinates
        `method`, `rate`, `step`; `before(fact, candidate)` is the same without training.
    """
    curve = [(method, rate, step) for method in methods for rate in rates for step in steps]
    asked = candidates(model.tokenizer, facts, most=alternatives)
    score = np.full((*asked.shape, len(curve)), np.nan)
    for train, test in halves(facts, seed):
        lessons = [encode(model.tokenizer, facts[i].prompt, facts[i].answer) for i in train]
        held = np.isin(asked.fact, test)
        exam = [e for e, take in zip(asked.encoded, held, strict=True) if take]
        for column, scores in _curve(model, lessons, exam, curve, steps, batch_size, rank, seed):
            score[asked.fact[held], asked.candidate[held], column] = scores
    return measurement.from_scores(
        score,
        facts,
        [f"{method} {rate:g} step {step}" for method, rate, step in curve],
        place_coords={name: [c[i] for c in curve] for i, name in enumerate(("method", "rate", "step"))},
        variables={"before": (("fact", "candidate"), asked.table(_answers(model, asked.encoded)))},
    )


def halves(facts: Sequence[Fact], seed: int) -> Iterator[tuple[list[int], list[int]]]:
    """Split the subjects in two halves, forget and control facts each by themselves.

    Yields:
        (rows to train on, rows to test on), both ways round.
    """
    for split in ("forget", "control"):
        subjects = sorted({f.subject for f in facts if f.split == split})
        if len(subjects) < 2:
            continue
        shuffled = np.random.default_rng(seed).permutation(subjects).tolist()
        first = set(shuffled[: len(shuffled) // 2])
        rows = [i for i, f in enumerate(facts) if f.split == split]
        one = [i for i in rows if facts[i].subject in first]
        two = [i for i in rows if facts[i].subject not in first]
        yield one, two
        yield two, one


def _curve(
    model: Model,
    lessons: list[Encoded],
    exam: list[Encoded],
    curve: list[tuple[str, float, int]],
    steps: Sequence[int],
    batch_size: int,
    rank: int,
    seed: int,
) -> Iterator[tuple[int, np.ndarray]]:
    """Train once for each method and rate.

    Yields:
        (place on the curve, scores of the exam) at each step asked for.
    """
    for method, rate in dict.fromkeys((m, r) for m, r, _ in curve):
        learner = Model(_trainable(model.module, method, rank, seed), model.tokenizer, "copy")
        for step in train(learner, lessons, rate * (10 if method == "lora" else 1), max(steps), batch_size, seed):
            if step in steps:
                yield curve.index((method, rate, step)), _answers(learner, exam)


def train(
    learner: Model, lessons: Sequence[Encoded], rate: float, steps: int, batch_size: int, seed: int
) -> Iterator[int]:
    """Take Adam steps on the answers' mean negative log-likelihood, in seeded order.

    Yields:
        The number of each step when it is done.
    """
    optimiser = torch.optim.Adam([p for p in learner.module.parameters() if p.requires_grad], lr=rate, fused=True)
    rng = np.random.default_rng(seed)
    queue: list[int] = []
    pad = pad_id(learner.tokenizer)
    for step in range(1, steps + 1):
        while len(queue) < min(batch_size, len(lessons)):
            queue += rng.permutation(len(lessons)).tolist()
        chosen, queue = queue[:batch_size], queue[batch_size:]
        batch = collate([lessons[i] for i in chosen], pad, side="left", device=learner.device)
        loss = answer_loss(learner.module, batch)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        yield step


def answer_loss(module: nn.Module, batch: Batch) -> torch.Tensor:
    """Mean negative log-likelihood of the answer tokens of a batch that is padded on the left.

    Answers stand at the end there, so only the last positions are decoded: a vocabulary is wide.
    """
    longest = int(batch.answer_mask.sum(-1).max())
    logits = module(**batch.inputs(), logits_to_keep=longest + 1).logits[:, :-1]
    wanted = batch.answer_mask[:, -longest:]
    return functional.cross_entropy(logits[wanted].float(), batch.input_ids[:, -longest:][wanted])


def _trainable(module: nn.Module, method: str, rank: int, seed: int) -> nn.Module:
    """Copy a model and make all of it, or a fresh LoRA on it, trainable; dropout stays off."""
    own = merged_copy(module)
    if method == "full":
        return own.requires_grad_(True).eval()
    return with_adapters(own, seed, r=rank, lora_alpha=2 * rank).eval()


def _answers(model: Model, encoded: Sequence[Encoded]) -> np.ndarray:
    """Mean token log-probability of each answer."""
    return np.nanmean(score_tokens(model, encoded)[0], -1)


CHANNEL = Channel(
    name="relearn",
    measure=measure,
    version=2,
    scale="preference",
    citation="Deeb & Roger 2024 (arXiv 2410.08827)",
    budgets={
        "quick": {"rates": (1e-4, 1e-3), "steps": (4, 8)},
        "standard": {"rates": (3e-5, 1e-4, 1e-3), "steps": (2, 4, 8, 16), "methods": ("full", "lora")},
        "thorough": {
            "rates": (1e-5, 3e-5, 1e-4, 3e-4, 1e-3),
            "steps": (2, 4, 8, 16, 32, 64),
            "methods": ("full", "lora"),
        },
    },
)
