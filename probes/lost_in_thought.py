"""Lost in thought: is a value found in the context as surely when its key had to be worked out as when it was stated?

After (RecaLLM, arXiv 2604.09494): reading fails more often after reasoning, even where the reasoning is right. Items
are paired: one dictionary, one key, one depth, one final question; only how the key comes up differs.
"""

import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from hashlib import sha256
from typing import Any

import numpy as np
import xarray as xr
from numpy.typing import NDArray

from lethescope.errors import InputError
from lethescope.facts import Fact, quote, same_text
from lethescope.measurement import to_json
from lethescope.models import Model
from lethescope.probes.context_units import ADJECTIVES, NEUTRAL, NOUNS, occurs, pick
from lethescope.probes.reading import Reading, read
from lethescope.statistics import cluster_weights, interval, seeded
from lethescope.tokens import join

ARMS = ("stated", "derived", "no thinking", "filler")
"""How the key comes up. `filler`: stated, then as many neutral tokens as `derived` spends on working it out."""
CITATION = "arXiv 2604.09494 (RecaLLM)"
DRAWS = 4000

RECORD, KEY, WORKING = "{key} is called {value}.", "\n\nThe one that we look for is {key}.", "\nWorking:"
VALUE = "\nIt is called"
FILLER = ("and", "so", "on", "and", "then", "on", "again")
BLANK = "____"
WHO = "who or what stands in place of " + BLANK + ' in "{sentence}"'


@dataclass(frozen=True)
class Item:
    """A dictionary, the key that is asked, and a problem whose solution is the key.

    Attributes:
        id: its name in results.
        pairs: keys and values, in the order of the context.
        key: one of the keys.
        problem: what stands for the key where it is not stated.
        reasoning: a right way from the problem to the key, which it names.
        subject: what statistics are clustered by.
        split: `neutral`, or that of the fact.

    Raises:
        InputError: the key is not in the dictionary, the reasoning does not name it, a key is part of another, two
            values are equal, or the problem gives the key away.
    """

    id: str
    pairs: tuple[tuple[str, str], ...]
    key: str
    problem: str
    reasoning: str
    subject: str
    split: str = NEUTRAL

    def __post_init__(self) -> None:
        keys, values = zip(*self.pairs, strict=True)
        if self.key not in keys or not occurs(self.key, self.reasoning):
            raise InputError(f"item {self.id!r}: its key {quote(self.key)} must be in dictionary and reasoning")
        if occurs(self.key, self.problem):
            raise InputError(f"item {self.id!r}: the problem {quote(self.problem)} names the key {quote(self.key)}")
        if no_substrings(keys) != list(keys) or len({same_text(v) for v in values}) < max(2, len(values)):
            raise InputError(f"item {self.id!r}: keys may not be part of each other, and at least two values differ")

    @property
    def place(self) -> int:
        """Where the key stands in the dictionary."""
        return [key for key, _ in self.pairs].index(self.key)

    @property
    def answers(self) -> list[str]:
        """The key's value, then the others."""
        values = [value for _, value in self.pairs]
        return [values[self.place], *values[: self.place], *values[self.place + 1 :]]

    def prompt(self, arm: str, thought: str = "") -> str:
        """The prompt of an arm, with what is said between question and answer."""
        context = "\n".join(RECORD.format(key=key, value=value) for key, value in self.pairs)
        said = self.key if arm in {"stated", "filler"} else self.problem
        return context + KEY.replace("{key}", said) + (f"{WORKING} {thought}" if thought else "") + VALUE


def no_substrings(keys: Sequence[str]) -> list[str]:
    """Leave out keys that are part of another, and repetitions, so that finding one cannot be finding another.

    >>> no_substrings(["17", "7", "70", "17", "8"])
    ['17', '70', '8']
    """
    unique = list(dict.fromkeys(keys))
    return [key for key in unique if not any(key != other and key in other for other in unique)]


def arithmetic_items(n: int = 32, *, pairs: int = 16, terms: int = 2, seed: int = 0) -> list[Item]:
    """Items whose key is a number: stated, or the result of adding and taking off small numbers.

    Keys are numbers of three digits around the result, so that none is part of another. Depths go evenly through the
    dictionary. Numbers of the problem and results on the way are no keys of it. Our choice: sums of `terms` numbers,
    where the published items have equations too.

    Args:
        n: items.
        pairs: of a dictionary.
        terms: numbers in the problem; more are harder.
        seed: decides everything.

    Raises:
        InputError: there are no items, or pairs or terms are not among 2 to 40 and 2 to 6.

    Example:
        >>> item = arithmetic_items(1, seed=1)[0]
        >>> item.reasoning.endswith(f"= {item.key}"), len(item.pairs)
        (True, 16)
    """
    if n < 1 or not 2 <= pairs <= 40 or not 2 <= terms <= 6:
        raise InputError(f"{n} items of {pairs} pairs and {terms} terms; use at least 1, 2 to 40, and 2 to 6")
    made = []
    for i in range(n):
        rng = seeded(seed, "item", i)
        key = int(rng.integers(200, 900))
        around = [k for k in range(key - pairs, key + pairs + 1) if k != key]
        others = sorted(rng.choice(around, pairs - 1, replace=False).tolist())
        keys = [str(k) for k in rng.permutation(others).tolist()]
        keys.insert(round(i / max(1, n - 1) * len(keys)), str(key))
        problem, reasoning = _sum(rng, key, terms, pairs)
        values = [" ".join(words) for words in pick(rng, len(keys), ADJECTIVES, NOUNS)]
        made.append(Item(f"sum {i}", tuple(zip(keys, values, strict=True)), str(key), problem, reasoning, f"sum {i}"))
    return made


def _sum(rng: np.random.Generator, key: int, terms: int, away: int) -> tuple[str, str]:
    """A sum and its steps. The last step is longer than the dictionary and the others reach: no key is on the way."""
    least = away + 1 + 9 * (terms - 2)
    steps = [int(rng.integers(2, 10)) for _ in range(terms - 2)] + [int(rng.integers(least, least + 30))]
    signs = [int(sign) for sign in rng.choice([-1, 1], terms - 1)]
    left = key - sum(sign * step for sign, step in zip(signs, steps, strict=True))
    problem, so_far, lines = str(left), left, []
    for sign, step in zip(signs, steps, strict=True):
        said, was, so_far = f" {'+' if sign > 0 else '-'} {step}", so_far, so_far + sign * step
        problem += said
        lines.append(f"{was}{said} = {so_far}")
    return problem, ", ".join(lines)


def fact_items(facts: Sequence[Fact], *, pairs: int = 8, seed: int = 0) -> tuple[list[Item], dict[str, str]]:
    """Items whose key is a fact's subject: stated, or described by the fact with the subject left out.

    The description can be resolved from the weights only; values are drawn. So `no thinking` above chance says that the
    model goes from the description to the subject by itself, although nothing asks it to say either. What it does not
    prove: at chance, that the fact is gone; facts run from subject to answer, and many models cannot turn them round.

    Args:
        facts: of any splits; the other keys of a dictionary are subjects of the same relation and split, then others.
        pairs: of a dictionary, at most.
        seed: decides order and values.

    Returns:
        Items, and for each fact that was left out, by id, why: its prompt does not name its subject, its answer does,
        another subject fits the description, or no other subject remains beside it.
    """
    made, dropped = list[Item](), dict[str, str]()
    told = {(f.relation, same_text(_blanked(f)), same_text(f.subject)) for f in facts}
    fitting = Counter((relation, sentence) for relation, sentence, _ in told)
    for fact in facts:
        sentence, rng = _blanked(fact), seeded(seed, fact.id)
        kin = sorted({f.subject for f in facts if f.relation == fact.relation and f.split == fact.split})
        rest = sorted({f.subject for f in facts} - {*kin})
        order = [kin[i] for i in rng.permutation(len(kin))] + [rest[i] for i in rng.permutation(len(rest))]
        apart = [s for s in order if not _part(s, fact.subject)]
        keys = no_substrings(apart)[: pairs - 1]
        if BLANK not in sentence or occurs(fact.subject, sentence):
            dropped[fact.id] = "the prompt does not name the subject, or the answer does"
        elif fitting[fact.relation, same_text(sentence)] > 1:
            dropped[fact.id] = "another subject fits the description"
        elif not keys:
            dropped[fact.id] = "no other subject remains beside it"
        else:
            keys.insert(int(rng.integers(len(keys) + 1)), fact.subject)
            values = [" ".join(words) for words in pick(rng, len(keys), ADJECTIVES, NOUNS)]
            problem, listed = WHO.replace("{sentence}", sentence), tuple(zip(keys, values, strict=True))
            made.append(Item(fact.id, listed, fact.subject, problem, fact.subject, fact.subject, fact.split))
    return made, dropped


def _blanked(fact: Fact) -> str:
    """The fact's sentence with the first mention of its subject left out."""
    pattern = rf"(?<!\w){re.escape(fact.subject)}(?!\w)"
    return join(re.sub(pattern, BLANK, fact.prompt, count=1, flags=re.IGNORECASE), fact.answer)


def _part(a: str, b: str) -> bool:
    return a in b or b in a


def measure(
    model: Model, items: Sequence[Item], *, generate: bool = False, most: int = 24, more: int = 8, seed: int = 0
) -> xr.Dataset:
    """Ask for the value of each item's key in every arm of `ARMS`.

    What it does not prove: with given reasoning (`generate=False`) that the model could have reasoned; and a model that
    does not follow the wording fails in all arms, which is no gap. Values are drawn, so no arm is answered by heart.

    Args:
        model: any language model.
        items: see `arithmetic_items` and `fact_items`.
        generate: in `derived`, let the model write the working, one line; otherwise the right one is given.
        most: tokens of a working that is generated.
        more: tokens that the model may say beyond the length of the value.
        seed: of the interval that `gaps` draws.

    Returns:
        `score(item, arm, candidate)` mean log-probability in nats of the dictionary's values, the right one first, NaN
        where there are fewer; `best(item, arm)`, 1 where it is highest (chance: 1 / number of values);
        `correct(item, arm)`, 1 where it is said greedily as whole words; `said(item, arm)`; `found(item)`, whether the
        working names the key; `working(item)`; and `thought(item)` and `filler(item)`, lengths in tokens. Depth is the
        key's place, 0 first and 1 last.

    Raises:
        InputError: there are no items, one is too long for the model, or it cannot be tokenised.
    """
    if not items:
        raise InputError("there are no items; make some with arithmetic_items or fact_items")
    rows = [_asked(model, item, most if generate else None, more) for item in items]
    width = max(len(item.pairs) for item in items)
    score = np.full((len(items), len(ARMS), width), np.nan)
    for i, (readings, *_) in enumerate(rows):
        score[i, :, : len(items[i].pairs)] = [reading.scores for reading in readings]
    said = [[reading.said for reading in readings] for readings, *_ in rows]
    right = [[occurs(it.answers[0], text) for text in texts] for it, texts in zip(items, said, strict=True)]
    data = {
        "score": (("item", "arm", "candidate"), score),
        "best": (("item", "arm"), (score[..., 0] > np.nanmax(score[..., 1:], -1)).astype(float)),
        "correct": (("item", "arm"), np.array(right, dtype=float)),
        "said": (("item", "arm"), said),
        "found": ("item", [occurs(item.key, row[1]) for item, row in zip(items, rows, strict=True)]),
        **{name: ("item", [row[k] for row in rows]) for k, name in enumerate(("working", "thought", "filler"), 1)},
    }
    coords = {name: ("item", [getattr(item, name) for item in items]) for name in ("subject", "split", "key")}
    coords["depth"] = ("item", [item.place / (len(item.pairs) - 1) for item in items])
    return xr.Dataset(data, {"item": [i.id for i in items], "arm": list(ARMS), **coords}).assign_attrs(
        probe="lost_in_thought",
        version=1,
        parameters=to_json({"generate": generate, "most": most if generate else 0, "more": more}),
        model=model.fingerprint,
        facts=sha256(to_json([asdict(item) for item in items]).encode()).hexdigest()[:16],
        dtype=str(model.dtype),
        device=str(model.device),
        seed=seed,
        citation=CITATION,
        units="nats",
        scale="preference",
        direction="higher = better read; a gap says that reading suffers from reasoning",
    )


def _asked(model: Model, item: Item, most: int | None, more: int) -> tuple[list[Reading], str, int, int]:
    """Readings of the arms, the working, its length in tokens, and that of the filler."""
    working = item.reasoning
    if most is not None:
        question = item.prompt("derived").removesuffix(VALUE) + WORKING
        length = len(model.tokenizer(f" {working}", add_special_tokens=False)["input_ids"])
        working = read(model, [(question, [working])], more=max(0, most - length))[0].said
    thought = _tokens(model, working)
    filler = _filler(lambda text: _tokens(model, text), thought)
    between = {"derived": working, "filler": filler}
    readings = read(model, [(item.prompt(arm, between.get(arm, "")), item.answers) for arm in ARMS], more=more)
    return readings, working, thought, _tokens(model, filler)


def _tokens(model: Model, text: str) -> int:
    """Tokens of a text that follows a space; none of no text."""
    return len(model.tokenizer(f" {text}", add_special_tokens=False)["input_ids"]) if text else 0


def _filler(count: Callable[[str], int], length: int) -> str:
    """Neutral words, as many as reach a length in tokens."""
    said: list[str] = []
    while count(" ".join(said)) < length:
        said.append(FILLER[len(said) % len(FILLER)])
    return " ".join(said)


def gaps(ds: xr.Dataset, name: str = "best", *, draws: int = DRAWS, level: float = 0.95) -> xr.Dataset:
    """How much worse the value is found after reasoning, with paired bootstrap intervals over items (by subject).

    `lost in thought` = acc(stated) - acc(derived | the working names the key), the published conditioning. It chooses
    easy items for one arm only, so `same items` takes both arms from them, and `unconditioned` takes all. `distance` =
    stated - filler, what the same number of tokens costs that say nothing; `beyond distance` = filler - derived, on the
    items whose working names the key; `thinking` = derived - no thinking. All in [-1, 1]; 0 = no difference.

    Args:
        ds: what `measure` returns.
        name: `best` or `correct`.
        draws: of the bootstrap.
        level: of the intervals.

    Returns:
        `estimate`, `low`, `high` `(contrast)` and `accuracy(arm)`; `found_share` is an attribute. NaN where no working
        names the key.

    Raises:
        InputError: the variable does not exist.
    """
    if name not in {"best", "correct"}:
        raise InputError(f"{name!r} is no accuracy of the arms; use best or correct")
    n = ds.sizes["item"]
    arms = {arm: ds[name].sel(arm=arm).values for arm in ARMS}
    found, every = ds["found"].values.astype(float), np.ones(n)
    sides = {
        "lost in thought": (("stated", every), ("derived", found)),
        "same items": (("stated", found), ("derived", found)),
        "unconditioned": (("stated", every), ("derived", every)),
        "distance": (("stated", every), ("filler", every)),
        "beyond distance": (("filler", found), ("derived", found)),
        "thinking": (("derived", every), ("no thinking", every)),
    }
    weights = cluster_weights(ds["subject"].values.tolist(), int(ds.attrs["seed"]), draws)
    rows = []
    for (a, on_a), (b, on_b) in sides.values():
        whole, drawn = (_mean(arms[a], w * on_a) - _mean(arms[b], w * on_b) for w in (every[None], weights))
        rows.append(interval(float(whole[0]), drawn, level))
    data: dict[str, Any] = {k: ("contrast", [getattr(r, k) for r in rows]) for k in ("estimate", "low", "high")}
    data["accuracy"] = ("arm", [arms[arm].mean() for arm in ARMS])
    attrs = {"of": name, "level": level, "found_share": float(found.mean())}
    return xr.Dataset(data, {"contrast": list(sides), "arm": list(ARMS)}, attrs)


def _mean(values: NDArray[np.float64], weights: NDArray[np.float64]) -> NDArray[np.float64]:
    """Weighted means, one for each row of weights; NaN where nothing has weight."""
    total = weights.sum(-1)
    return np.divide(weights @ values, total, out=np.full(len(weights), np.nan), where=total > 0)
