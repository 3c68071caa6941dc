"""Prompt attribution: how much each word of a prompt supports the answer that a model is asked to give.

A prompt is cut into words, words are taken away, and the same answer tokens are scored after what is left. The change
of their mean log-probability is what the words contributed. The two gradient methods are cheap companions.
"""

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from math import comb
from typing import Any

import numpy as np
import torch
import xarray as xr
from einops import einsum, repeat
from jaxtyping import Float, Int
from numpy.typing import NDArray
from torch import Tensor

from lethescope.errors import InputError
from lethescope.facts import Fact
from lethescope.measurement import fact_coords
from lethescope.models import Model
from lethescope.prefix import common, every_key, selected
from lethescope.probes.prompt_words import Words, bare, words
from lethescope.scoring import candidates, mean_over_answer, target_log_probs
from lethescope.statistics import seeded
from lethescope.tokens import Encoded, collate, encode, join, pad_id

METHODS = ("leave_one_out", "shapley", "gradient_x_input", "integrated_gradients")
EXACT = 8
"""Shapley values are exact up to so many units (2^8 prompts); beyond, orders are sampled."""
LEAST = 1e-4
"""A contribution up to so many nats is none: batches round differently."""
LAUNCH = {"cpu": 16}
"""What a forward pass costs beside its tokens (weights are read, kernels started), in tokens; 2048 on other devices."""
Labels = Callable[[Fact, Sequence[str]], Sequence[Hashable]]
Gone = frozenset[int]
Found = tuple[Sequence[float], float, float]  # contributions, log-probability of the whole prompt, of the baseline


def measure(
    model: Model,
    facts: Sequence[Fact],
    *,
    units: str | Labels = "word",
    method: str = "leave_one_out",
    permutations: int = 64,
    steps: int = 32,
    seed: int = 0,
    rows: int = 128,
) -> xr.Dataset:
    """Measure what each unit of a fact's prompt contributes to its answer, in nats per answer token.

    `LP(x) = mean_t log p(y_t | x, y_<t)`, where y are the tokens of the fact's answer and stay the same. Methods:

    - `leave_one_out`: `C_i = LP(x) - LP(x without unit i)` (unPact, arXiv 2509.24675); m + 1 rows for m units, of
      which only what follows the first missing unit is run, in batches of like length;
    - `shapley`: unit i's gain, averaged over the orders in which units can be added; sums to LP(x) - LP(nothing).
      Exact up to 8 units, else over `permutations` seeded orders, half of them the other half reversed;
    - `gradient_x_input`: `sum_d e_d dLP/de_d` over the token embeddings e of the unit;
    - `integrated_gradients`: the same along the straight way from a baseline (Sundararajan et al. 2017, arXiv
      1703.01365), which is the end-of-text token's embedding; sums to LP(x) - LP(baseline).

    Positive: the unit supports the answer. What it does not prove: that the model holds the fact (a wrong answer has
    contributions too), nor that a unit of 0 is not read: a second mention can stand in for it (see `units`).
    Contributions that shrink after unlearning say that the prompt has less hold on this answer, not that it is gone.

    Our choice, where the paper was not to be had: y is the fact's own answer; a unit is deleted in the text with the
    white space before it (of a first word, after it) and the rest is tokenised again; an empty prompt is the
    beginning-of-text token. Integrals are Gauss-Legendre sums; from the zero vector RMSNorm would make the way steep.

    Args:
        model: any language model; the gradient methods need a fast tokenizer.
        facts: all splits.
        units: `word` (white space parts words; a chat template's tokens and roles are none), `distinct` (all mentions
            of a word), `subject` (its name in one), or `(fact, words) -> labels`: words with equal labels are one unit.
        method: one of the four.
        permutations: orders that Shapley values are sampled from.
        steps: points of the integral.
        seed: of the orders, beside the fact's id.
        rows: prompts at a time.

    Returns:
        `contribution(fact, unit)`, NaN where a fact has fewer units, and `unit_text(fact, unit)`; of the whole prompt
        `log_probability(fact)`; and `baseline(fact)`: LP(nothing), LP(baseline), or NaN where the method has none.

    Raises:
        InputError: a method or units are unknown, a number is below 1, or a prompt or an answer has no word.

    Example:
        >>> from lethescope.subjects.handmade import handmade
        >>> made = handmade()  # the answer hangs on the prompt's last word alone
        >>> ds = measure(made.original, made.facts[:1])
        >>> [f"{t} {c:.2f}" for t, c in zip(ds["unit_text"].values[0], ds["contribution"].values[0])]
        ['home 0.00', 'of 0.00', 'Abel 8.91']
    """
    if method not in METHODS:
        raise InputError(f"unknown method {method!r}; use {', '.join(METHODS)}")
    if min(permutations, steps, rows) < 1:
        raise InputError(f"permutations ({permutations}), steps ({steps}) and rows ({rows}) must be at least 1")
    prompts = [_prompt(model.tokenizer, fact, units) for fact in facts]
    if method in {"leave_one_out", "shapley"}:
        found = _ablated(model, prompts, permutations if method == "shapley" else 0, seed, rows)
    else:
        found = [_by_gradient(model, p, steps if method == "integrated_gradients" else 0, rows) for p in prompts]
    return _as_dataset(prompts, found, method)


def key_units(contributions: xr.DataArray, alpha: float = 0.3, beta: int = 3) -> xr.DataArray:
    """Tell which units a model's answer hangs on: the key tokens of unPact (arXiv 2509.24675).

    The units with C > 0 where there are fewer than `beta` of them, else those with `C / max C > alpha`. The paper's
    alpha, beta and normaliser were not to be had: all three are our choice; try alpha in 0.1, 0.3, 0.5. So is `LEAST`.

    Args:
        contributions: (fact unit), `measure(...)["contribution"]`.
        alpha: share of the largest contribution, at least 0 and below 1.
        beta: from so many supporting units on only the strong ones count.

    Returns:
        Booleans (fact unit), False where there is no unit.

    Raises:
        InputError: alpha or beta is out of range.

    Example:
        >>> key_units(xr.DataArray([[0.9, 0.3, 0.1], [0.9, 0.1, -2]], dims=("fact", "unit"))).values.tolist()
        [[True, True, False], [True, True, False]]
    """
    if not 0 <= alpha < 1 or beta < 0:
        raise InputError(f"alpha is {alpha} and beta is {beta}; alpha must be in [0, 1) and beta at least 0")
    supports = contributions > LEAST
    strong = contributions > alpha * contributions.max("unit")
    return supports & (strong | (supports.sum("unit") < beta))


def _subject(fact: Fact, texts: Sequence[str]) -> list[Hashable]:
    name = {bare(word) for word in fact.subject.split()}
    return ["subject" if bare(text) in name else i for i, text in enumerate(texts)]


UNITS: Mapping[str, Labels] = {
    "word": lambda _fact, texts: range(len(texts)),
    "distinct": lambda _fact, texts: [bare(text) for text in texts],
    "subject": _subject,
}


@dataclass(frozen=True)
class _Prompt:
    """A fact's prompt as words and units (each the numbers of its words), with the tokens of prompt and answer."""

    fact: Fact
    words: Words
    units: tuple[tuple[int, ...], ...]
    encoded: Encoded

    def without(self, tokenizer: Any, gone: Gone) -> Encoded:
        """Tokenise what is left without these units; the answer's tokens stay as they are."""
        text = self.words.without({word for unit in gone for word in self.units[unit]})
        shorter = encode(tokenizer, text, self.fact.answer) if text.strip() else None
        ids = shorter.ids[: shorter.start] if shorter else (_special(tokenizer, "bos"),)
        return Encoded((*ids, *self.encoded.answer), len(ids))


def _prompt(tokenizer: Any, fact: Fact, units: str | Labels) -> _Prompt:
    """Cut a fact's prompt into units.

    Raises:
        InputError: the units are unknown, there are not as many labels as words, or no word; the fact is named.
    """
    if isinstance(units, str) and units not in UNITS:
        raise InputError(f"unknown units {units!r}; use {', '.join(UNITS)} or a function (fact, words) -> labels")
    cut = words(fact.prompt, tokenizer)
    labels = list((UNITS[units] if isinstance(units, str) else units)(fact, cut.texts))
    if not labels or len(labels) != len(cut.spans):
        raise InputError(f"fact {fact.id!r}: {len(labels)} labels for {len(cut.spans)} words; each word needs one")
    members = {label: tuple(i for i, other in enumerate(labels) if other == label) for label in labels}
    return _Prompt(fact, cut, tuple(members.values()), candidates(tokenizer, [fact], most=0).encoded[0])


def _ablated(model: Model, prompts: Sequence[_Prompt], permutations: int, seed: int, rows: int) -> list[Found]:
    """Score every prompt without the sets of units that the method asks for; no permutations mean leave-one-out."""
    orders = [_orders(len(p.units), permutations, (seed, p.fact.id)) for p in prompts]
    asked = [_coalitions(len(p.units), o, permutations) for p, o in zip(prompts, orders, strict=True)]
    encoded = [p.without(model.tokenizer, gone) for p, sets in zip(prompts, asked, strict=True) for gone in sets]
    starts = np.cumsum([0, *map(len, asked)])
    scores = _scored(model, encoded, np.repeat(starts[:-1], np.diff(starts)).tolist(), rows)
    found = []
    for sets, order, start in zip(asked, orders, starts, strict=False):
        value = dict(zip(sets, scores[start : start + len(sets)].tolist(), strict=True))
        found.append(_shapley(value, order) if permutations else _left_out(value))
    return found


def _orders(units: int, permutations: int, seed: tuple[int, str]) -> list[list[int]]:
    """Draw the orders that Shapley values are averaged over; none where they are exact."""
    if units <= EXACT:
        return []
    rng = seeded(*seed)
    drawn = [rng.permutation(units).tolist() for _ in range(-(-permutations // 2))]
    return [order for one in drawn for order in (one, one[::-1])][:permutations]


def _coalitions(units: int, orders: Sequence[Sequence[int]], permutations: int) -> list[Gone]:
    """Return the sets of units to take away, first none: each one, all there are, or those on the way of an order."""
    if orders and permutations:
        return list(dict.fromkeys(frozenset(order[:n]) for n in range(units + 1) for order in orders))
    sizes = range(units + 1 if permutations else 2)
    return [frozenset(gone) for size in sizes for gone in combinations(range(units), size)]


def _left_out(value: Mapping[Gone, float]) -> Found:
    whole = value[frozenset()]
    return [whole - value[frozenset([unit])] for unit in range(len(value) - 1)], whole, float("nan")


def _shapley(value: Mapping[Gone, float], orders: Sequence[Sequence[int]]) -> Found:
    every = max(value, key=len)
    total = np.zeros(len(every))
    for order in orders:
        for n, unit in enumerate(order):
            total[unit] += (value[frozenset(order[:n])] - value[frozenset(order[: n + 1])]) / len(orders)
    for gone in () if orders else value:
        for unit in every - gone:
            total[unit] += (value[gone] - value[gone | {unit}]) / (len(every) * comb(len(every) - 1, len(gone)))
    return total.tolist(), value[frozenset()], value[every]


@torch.no_grad()
def _scored(model: Model, encoded: Sequence[Encoded], base: Sequence[int], rows: int) -> Float[np.ndarray, " row"]:
    """Score answers after prompts; what a row has in common with the beginning of its base row is run once for all.

    Where a cache does not keep the keys of every token (a sliding window, a recurrent state), each row is run whole.
    """
    shared = np.array([min(common(e.ids, encoded[b].ids), e.start - 1) for e, b in zip(encoded, base, strict=True)])
    out = np.empty(len(encoded))
    for part in np.split(np.arange(len(encoded)), range(rows, len(encoded), rows)):
        longest: dict[int, int] = {}
        for row in part:
            longest[base[row]] = max(shared[row], longest.get(base[row], 0))
        cache = _cache(model, [encoded[b].ids[:length] for b, length in longest.items()])
        known = shared[part] * (cache is not None)
        owner = np.array([list(longest).index(base[row]) for row in part])
        width = [len(encoded[row].ids) - k for row, k in zip(part, known, strict=True)]
        for chosen in _batches(width, LAUNCH.get(model.device.type, 2048)):
            few = [encoded[row] for row in part[chosen]]
            out[part[chosen]] = _continued(model, few, known[chosen].tolist(), selected(cache, owner[chosen].tolist()))
    return out


def _batches(widths: Sequence[int], launch: int) -> list[list[int]]:
    """Cut rows into batches of like width, at the least cost: all places, padded ones too, and `launch` more a batch.

    >>> _batches([9, 2, 2, 8], 3), _batches([9, 2, 2, 8], 99)
    ([[1, 2], [3, 0]], [[1, 2, 3, 0]])
    """
    order = sorted(range(len(widths)), key=widths.__getitem__)
    last = {widths[row]: place + 1 for place, row in enumerate(order)}
    best: dict[int, tuple[int, list[list[int]]]] = {0: (0, [])}
    for width, stop in last.items():
        cost, start = min((cost + launch + (stop - start) * width, start) for start, (cost, _) in best.items())
        best[stop] = cost, [*best[start][1], order[start:stop]]
    return best[len(order)][1]


def _cache(model: Model, prefixes: Sequence[tuple[int, ...]]) -> Any:
    """Run the beginnings, padded on the right, and keep their keys and values; None where they cannot be shared."""
    width = max(map(len, prefixes))
    if not width:
        return None
    batch = collate([Encoded(p or (0,), 0) for p in prefixes], pad_id(model.tokenizer), device=model.device)
    run = model.module(**batch.inputs(), use_cache=True, logits_to_keep=_last(1))
    return every_key(getattr(run, "past_key_values", None), width)


def _last(n: int) -> Int[Tensor, " place"]:
    """Return the last n places as an index. Told the number, a model takes a view of them and multiplies row by row.

    On a processor that makes the output layer some ten times slower.
    """
    return torch.arange(-n, 0)


def _continued(model: Model, encoded: Sequence[Encoded], known: Sequence[int], cache: Any) -> Float[np.ndarray, " row"]:
    """Run what comes after the known beginnings, up to what predicts the answers' last tokens, and score the answers.

    Rows end at the right edge; each has its row in the cache.
    """
    rest = [Encoded(e.ids[k:-1], e.start - k) for e, k in zip(encoded, known, strict=True)]
    pad, device = pad_id(model.tokenizer), model.device
    batch = collate(rest, pad, side="left", device=device)
    answers = collate([Encoded(e.answer, 0) for e in encoded], pad, side="left", device=device)
    inputs: dict[str, Any] = batch.inputs()
    if cache is not None:
        read = torch.tensor(known, device=device)[:, None]
        seen = torch.arange(cache.get_seq_length(), device=device) < read
        inputs["attention_mask"] = torch.cat([seen.long(), batch.attention_mask], -1)
        inputs |= {"position_ids": batch.position_ids + read, "past_key_values": cache}
    longest = answers.input_ids.shape[1]
    logits = model.module(**inputs, use_cache=cache is not None, logits_to_keep=_last(longest)).logits[:, -longest:]
    log_p = target_log_probs(logits, answers.input_ids)
    return mean_over_answer(log_p, answers.answer_mask).double().cpu().numpy()


def _by_gradient(model: Model, prompt: _Prompt, steps: int, rows: int) -> Found:
    """Gradient times input at the embeddings of the units' tokens; with steps, along the way from the baseline."""
    owner = torch.from_numpy(_unit_of_tokens(model.tokenizer, prompt)).to(model.device)
    ids = torch.tensor(prompt.encoded.ids, device=model.device)
    embed = model.module.get_input_embeddings()
    points, weights = np.polynomial.legendre.leggauss(steps) if steps else (np.ones(1), np.full(1, 2.0))
    with torch.no_grad():
        whole = embed(ids)
        nothing = embed(torch.full_like(ids, _special(model.tokenizer, "eos"))) if steps else torch.zeros_like(whole)
        nothing = torch.where(owner[:, None] >= 0, nothing, whole)
        path = nothing + whole.new_tensor((points + 1) / 2)[:, None, None] * (whole - nothing)
        slopes = torch.cat([_slopes(model, part, prompt.encoded) for part in path.split(rows)]).double()
        weight = torch.tensor(weights / 2, device=model.device)
        per_token = einsum(weight, slopes, (whole - nothing).double(), "row, row pos d, pos d -> pos")
        contribution = [per_token[owner == unit].sum().item() for unit in range(len(prompt.units))]
        ends = _log_probs(model, torch.stack([whole, nothing]), prompt.encoded).tolist()
    return contribution, ends[0], ends[1] if steps else float("nan")


def _unit_of_tokens(tokenizer: Any, prompt: _Prompt) -> NDArray[np.int64]:
    """Return the unit that each token belongs to, by the token's last letter; -1 for the answer and what is no unit.

    Raises:
        InputError: the tokenizer does not tell where its tokens stand.
    """
    if not getattr(tokenizer, "is_fast", False):
        raise InputError("the gradient methods need a fast tokenizer (one with offsets); use leave_one_out or shapley")
    text = join(prompt.words.prompt, prompt.fact.answer)
    unit = np.full(len(text) + 1, -1)
    for number, members in enumerate(prompt.units):
        for start, end in (prompt.words.spans[word] for word in members):
            unit[start:end] = number
    ends = np.array([end for _, end in tokenizer(text, return_offsets_mapping=True)["offset_mapping"]])
    return np.where(np.arange(len(ends)) < prompt.encoded.start, unit[ends - 1], -1)


@torch.enable_grad()
def _slopes(model: Model, embedded: Float[Tensor, "row pos d"], encoded: Encoded) -> Float[Tensor, "row pos d"]:
    """Gradient of `_log_probs` with respect to the embeddings."""
    embedded = embedded.detach().requires_grad_(True)
    return torch.autograd.grad(_log_probs(model, embedded, encoded).sum(), embedded)[0]


def _log_probs(model: Model, embedded: Float[Tensor, "row pos d"], encoded: Encoded) -> Float[Tensor, " row"]:
    """Mean log-probability of the answer's tokens after embedded prompts."""
    answer = repeat(torch.tensor(encoded.answer, device=model.device), "token -> row token", row=len(embedded))
    kept = _last(len(encoded.answer) + 1)
    logits = model.module(inputs_embeds=embedded, use_cache=False, logits_to_keep=kept).logits
    return target_log_probs(logits[:, :-1], answer).mean(-1)


def _special(tokenizer: Any, first: str) -> int:
    """Return the id of a special token, `bos` or `eos`; of the other one where the tokenizer has none."""
    ids = (getattr(tokenizer, f"{name}_token_id", None) for name in (first, "bos", "eos"))
    return next((token for token in ids if token is not None), pad_id(tokenizer))


def _as_dataset(prompts: Sequence[_Prompt], found: Sequence[Found], method: str) -> xr.Dataset:
    """Label what was found, NaN (and no text) where a fact has fewer units than another."""
    shape = len(prompts), max(len(prompt.units) for prompt in prompts)
    contribution, texts = np.full(shape, np.nan), np.full(shape, "", dtype=object)
    for i, (prompt, (values, _, _)) in enumerate(zip(prompts, found, strict=True)):
        contribution[i, : len(prompt.units)] = values
        texts[i, : len(prompt.units)] = [" ".join(prompt.words.texts[w] for w in unit) for unit in prompt.units]
    return xr.Dataset(
        {
            "contribution": (("fact", "unit"), contribution),
            "unit_text": (("fact", "unit"), texts.astype(str)),
            "log_probability": ("fact", [whole for _, whole, _ in found]),
            "baseline": ("fact", [baseline for _, _, baseline in found]),
        },
        fact_coords([prompt.fact for prompt in prompts]),
        {"method": method, "units": "nats per answer token", "citation": CITATION},
    )


CITATION = "unPact (arXiv 2509.24675); Castro et al. 2009 (Shapley values); Sundararajan et al. 2017 (arXiv 1703.01365)"
