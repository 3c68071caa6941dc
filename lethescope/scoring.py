"""The one kernel under the language channels: run a model only where it predicts the answers.

A fact's candidates share their prompt, so the prompt is run once and its keys and values are kept; the *tail* (the
prompt's last token and the answer's tokens but the last) is what predicts the answer. Each channel reads, replaces or
decodes states at tail positions only.
"""

import copy
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from numpy.typing import NDArray
from torch import Tensor

from lethescope.errors import InputError
from lethescope.facts import Fact
from lethescope.models import Model
from lethescope.tokens import Encoded, encode, pad_id


@dataclass(frozen=True)
class Tails:
    """A batch of answers with the keys and values of their prompts.

    An answer whose tail is the beginning of another's (all answers of one token, after the same prompt) has no sequence
    of its own: causal attention gives both the same numbers. `owner` says which sequence an answer is read from, and
    `lead` which answer's tail a sequence is. `rows` and `lead` are positions in the list that was asked for; `mask` is
    True where an answer's token is real.
    """

    rows: list[int]
    owner: Int[Tensor, " row"]
    targets: Int[Tensor, "row pos"]
    mask: Bool[Tensor, "row pos"]
    lead: list[int]
    input_ids: Int[Tensor, "sequence pos"]
    attention_mask: Int[Tensor, "sequence all"]
    position_ids: Int[Tensor, "sequence pos"]
    cache: Any

    def run(self, model: Model) -> Float[Tensor, "sequence pos vocab"]:
        """Run the model over the tails and return its logits; the kept keys and values stay as they were."""
        return model.module(
            input_ids=self.input_ids,
            attention_mask=self.attention_mask,
            position_ids=self.position_ids,
            past_key_values=copy.deepcopy(self.cache),
            use_cache=self.cache is not None,
        ).logits

    def log_probs(self, logits: Float[Tensor, "sequence pos vocab"]) -> Float[Tensor, "row pos"]:
        """Log-probability of each answer's tokens, in float32 whatever the model's dtype."""
        sequence, place = self.owner[:, None], torch.arange(self.targets.shape[1], device=self.owner.device)
        chosen = logits[sequence, place, self.targets].float()
        return chosen - logits.float().logsumexp(-1)[sequence, place]

    def mean_log_prob(self, logits: Float[Tensor, "sequence pos vocab"]) -> Float[Tensor, " row"]:
        """Mean log-probability of each answer's tokens."""
        return mean_over_answer(self.log_probs(logits), self.mask)


def tails(
    model: Model, encoded: Sequence[Encoded], *, rows: int = 256, apart: Sequence[Any] | None = None
) -> Iterator[Tails]:
    """Yield batches of at most about `rows` answers (a prompt's candidates stay together).

    Answers for which `apart` differs never share a sequence: they will be given different states.
    """
    groups: dict[tuple[int, ...], list[int]] = {}
    for row, e in enumerate(encoded):
        groups.setdefault(e.prefix, []).append(row)
    chunk: list[tuple[int, ...]] = []
    for prefix in sorted(groups, key=lambda p: (len(p), p)):
        full = sum(len(groups[p]) for p in chunk) + len(groups[prefix]) > rows
        if chunk and (full or not chunk[-1]):  # prompts of one token have no cache, so they go alone
            yield _tails(model, encoded, {p: groups[p] for p in chunk}, apart)
            chunk = []
        chunk.append(prefix)
    if chunk:
        yield _tails(model, encoded, {p: groups[p] for p in chunk}, apart)


@torch.no_grad()
def _tails(
    model: Model, encoded: Sequence[Encoded], groups: dict[tuple[int, ...], list[int]], apart: Sequence[Any] | None
) -> Tails:
    rows = [row for members in groups.values() for row in members]
    leads = {row: _lead(row, members, encoded, apart) for members in groups.values() for row in members}
    lead = list(dict.fromkeys(leads.values()))
    sequence = {row: i for i, row in enumerate(lead)}
    prompt = {row: i for i, members in enumerate(groups.values()) for row in members}
    pad, to = pad_id(model.tokenizer), model.device
    prefix, prefix_mask = _pad(list(groups), pad, left=True)
    ids, tail_mask = _pad([encoded[row].tail for row in lead], pad, left=False)
    targets, mask = _pad([encoded[row].answer for row in rows], pad, left=False)
    owner = torch.tensor([prompt[row] for row in lead])
    cache = None
    if prefix.shape[1]:
        positions = (prefix_mask.cumsum(-1) - 1).clamp(min=0)
        cache = model.module(
            input_ids=prefix.to(to),
            attention_mask=prefix_mask.to(to),
            position_ids=positions.to(to),
            use_cache=True,
            logits_to_keep=1,
        ).past_key_values
        cache.batch_select_indices(owner.to(to))
    start = prefix_mask.sum(-1)[owner]
    return Tails(
        rows,
        torch.tensor([sequence[leads[row]] for row in rows], device=to),
        targets.to(to),
        mask.bool().to(to),
        lead,
        ids.to(to),
        torch.cat([prefix_mask[owner], tail_mask], -1).to(to),
        (start[:, None] + torch.arange(ids.shape[1])).to(to),
        cache,
    )


def _lead(row: int, members: Sequence[int], encoded: Sequence[Encoded], apart: Sequence[Any] | None) -> int:
    """Return the first of the longest tails that begin with this row's tail."""
    tail = encoded[row].tail
    alike = [m for m in members if encoded[m].tail[: len(tail)] == tail and (apart is None or apart[m] == apart[row])]
    return max(alike, key=lambda m: len(encoded[m].tail))


def _pad(sequences: Sequence[tuple[int, ...]], pad: int, *, left: bool) -> tuple[Tensor, Tensor]:
    width = max(len(s) for s in sequences)
    ids, mask = torch.full((len(sequences), width), pad), torch.zeros((len(sequences), width), dtype=torch.long)
    for row, s in enumerate(sequences):
        where = slice(width - len(s), width) if left else slice(0, len(s))
        ids[row, where], mask[row, where] = torch.tensor(s, dtype=torch.long), 1
    return ids, mask


def target_log_probs(logits: Float[Tensor, "*rest vocab"], targets: Int[Tensor, "*rest"]) -> Float[Tensor, "*rest"]:
    """Log-probability of each target, in float32 whatever the model's dtype."""
    logits = logits.float()
    return logits.gather(-1, targets[..., None])[..., 0] - logits.logsumexp(-1)


def mean_over_answer(values: Float[Tensor, "row pos"], mask: Bool[Tensor, "row pos"]) -> Float[Tensor, " row"]:
    """Mean over the real positions of each row."""
    return (values * mask).sum(-1) / mask.sum(-1)


@torch.no_grad()
def score_tokens(model: Model, encoded: Sequence[Encoded]) -> tuple[NDArray[np.float64], NDArray[np.bool_]]:
    """Score every answer token, teacher-forced.

    Returns:
        Log-probabilities (answer, token), NaN beyond an answer's end, and whether the token was the model's first
        choice (answer, token), False beyond the end. First choices all along mean that greedy decoding says the answer.
    """
    width = max(len(e.answer) for e in encoded)
    log_probs = np.full((len(encoded), width), np.nan)
    right = np.zeros((len(encoded), width), dtype=bool)
    for batch in tails(model, encoded):
        logits = batch.run(model)
        found = batch.log_probs(logits).double().masked_fill(~batch.mask, float("nan"))
        top = (logits.argmax(-1)[batch.owner, : found.shape[1]] == batch.targets) & batch.mask
        log_probs[batch.rows, : found.shape[1]] = found.cpu().numpy()
        right[batch.rows, : top.shape[1]] = top.cpu().numpy()
    return log_probs, right


@dataclass(frozen=True)
class Candidates:
    """Every fact's true answer (candidate 0) and alternatives, tokenised after one of its prompts."""

    encoded: list[Encoded]
    fact: NDArray[np.intp]
    candidate: NDArray[np.intp]
    shape: tuple[int, int]

    def table(self, values: NDArray[Any]) -> NDArray[np.float64]:
        """Lay values (answer, …) out as (fact, candidate, …), NaN where a fact has fewer candidates."""
        out = np.full(self.shape + values.shape[1:], np.nan)
        out[self.fact, self.candidate] = values
        return out


def candidates(tokenizer: Any, facts: Sequence[Fact], *, prompt: int = 0, most: int | None = None) -> Candidates:
    """Tokenise the candidates of every fact after its prompt (`prompt=0`) or its n-th paraphrase.

    Facts that have no such paraphrase get no rows; `most` limits the alternatives of a fact.

    Raises:
        InputError: a prompt or an answer cannot be tokenised; the fact is named.
    """
    encoded, owner, place = [], [], []
    width = 1
    for i, fact in enumerate(facts):
        prompts = (fact.prompt, *fact.paraphrases)
        if prompt >= len(prompts):
            continue
        for k, answer in enumerate((fact.answer, *fact.alternatives[:most])):
            try:
                encoded.append(encode(tokenizer, prompts[prompt], answer))
            except InputError as error:
                raise InputError(f"fact {fact.id!r}: {error}") from None
            owner.append(i)
            place.append(k)
            width = max(width, k + 1)
    return Candidates(encoded, np.array(owner, dtype=np.intp), np.array(place, dtype=np.intp), (len(facts), width))
