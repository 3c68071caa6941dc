"""Channel *context*: is a memory jogged by hints, examples, other words, or the beginning of the answer?"""

from collections.abc import Iterator, Sequence
from itertools import islice
from typing import Any, Literal, NamedTuple

import numpy as np
import xarray as xr
from jaxtyping import Float
from numpy.typing import NDArray

from lethescope import measurement
from lethescope.analyses.emphasis import leaks
from lethescope.analyses.patch import null_facts
from lethescope.channel import Channel
from lethescope.errors import InputError
from lethescope.facts import Fact, of_split, same_text
from lethescope.models import Model
from lethescope.probes.prompt_words import words
from lethescope.scoring import candidates, score_tokens
from lethescope.statistics import seeded
from lethescope.tokens import join

Counts = Sequence[int | Literal["all"]]
Scores = Float[NDArray[np.float64], "fact candidate"]
Table = Float[NDArray[np.float64], "fact candidate place"]
Tokens = Float[NDArray[np.float64], "fact prompt candidate token"]


class Asked(NamedTuple):
    """A fact, and the facts that may be told before it, in the order in which they are."""

    fact: Fact
    hints: list[Fact]
    examples: list[Fact]


class Plan(NamedTuple):
    """Which places there are: how many hints, examples, paraphrases, and given tokens of the answer."""

    hints: Counts
    examples: Sequence[int]
    paraphrases: int
    prefixes: int

    def places(self) -> dict[str, str]:
        """Return name -> family; the prefixes come last, because they need no prompt of their own."""
        names = {
            "hints": [_plural(n, "hint") for n in self.hints],
            "examples": [_plural(n, "example") for n in self.examples],
            "paraphrase": [f"paraphrase {1 + n}" for n in range(self.paraphrases)],
            "prefix": [f"prefix {1 + n}" for n in range(self.prefixes)],
        }
        return {name: family for family, some in names.items() for name in some}


def measure(
    model: Model,
    facts: Sequence[Fact],
    *,
    original: Model,
    seed: int = 0,
    hints: Counts = (1, 2, "all"),
    examples: Sequence[int] = (1, 4),
    paraphrases: int | None = None,
    prefixes: int = 2,
) -> xr.Dataset:
    """Ask again with a text before the prompt, in other words, or with the beginning of the answer given.

    Four families of places; the score of a candidate is its mean token log-probability, as in channel *say*:

    - `hints`: other facts of the same subject stand before the prompt, each as its own prompt with its answer
      (`hints_of`). A hint that holds a word of the answer is left out.
    - `examples`: facts of other subjects and the same relation, from the retain split, stand there (`examples_of`).
    - `paraphrase`: each paraphrase in place of the prompt; as many places as any forget fact has.
    - `prefix`: the first n tokens of each candidate, its own, are given, and its rest is scored. This reads completion,
      not recall: whoever knows the words "Buenos Aires" goes on after "Buenos". A fact is NaN where no wrong answer has
      a rest that the true one's could be held against.

    The value is on the scale of *say*, because what was brought back is what is said again: preference is there in
    suppressed models before any jogging, and would count as brought back what no text did.

    What it does not prove: nothing brought back means not by these texts. What a hint brings back may have been
    concluded from the hint by a model that never knew the fact; references, asked with the same hints, show that, and
    control facts with their own hints.

    The null (`null_score`) is the candidates of the same fact when the prompt and the hints are about a control
    subject, whom nobody was taught about; the examples are the same.

    Args:
        model: any language model.
        facts: forget and control facts are asked; retain facts are the examples, and hints where they are of the
            subject.
        original: the model that has the null.
        seed: of the order of hints, of the examples and of the null subjects; a fact's draw depends on its id alone.
        hints: how many other facts to tell, a place each; a fact that has fewer is NaN; `all` needs at least one.
        examples: how many examples to give, a place each; NaN where there are fewer.
        paraphrases: at most so many; all by default.
        prefixes: places `prefix 1` to this many.

    Returns:
        `score(fact, candidate, place)` in nats per answer token, <= 0, higher = less forgotten, with the coordinate
        `family`; NaN also where the text is longer than the model reads. A place at which no forget fact can be asked
        is left out. `null_score`, for the original and its forget
        facts, is alike; `plain_score(fact, candidate)` is that of the bare prompt. `greedy(fact)` and
        `greedy_jogged(fact, place)` are 1 where greedy decoding gives the answer, or its rest, word for word.

    Raises:
        InputError: an option is out of range, there is nothing to ask or no place, or a prompt or an answer cannot be
            tokenised.
    """
    asked = [f for f in facts if f.split != "retain"]
    forms = max((len(f.paraphrases) for f in asked if f.split == "forget"), default=0)
    most = forms if paraphrases is None else min(forms, paraphrases)
    plan = Plan(tuple(hints), tuple(examples), most, prefixes)
    _check(plan, asked)
    ordered = sorted(facts, key=lambda f: f.id)
    rows = [_asked(f, ordered, plan, seed) for f in asked]
    plain, score, right = _ask(model, rows, plan)
    dims = ("fact", "candidate", "place")
    variables: dict[str, tuple[Sequence[str], Any]] = {
        "plain_score": (dims[:2], plain),
        "greedy": (dims[:1], right[:, 0]),
        "greedy_jogged": (("fact", "place"), right[:, 1:]),
    }
    if model.fingerprint == original.fingerprint:
        variables["null_score"] = (dims, _null(original, rows, ordered, plan, seed))
    places = plan.places()
    family = {"family": list(places.values())}
    found = measurement.from_scores(score, asked, list(places), place_coords=family, variables=variables)
    deciding = [i for i, f in enumerate(asked) if f.split == "forget"] or range(len(asked))
    return found.isel(place=np.flatnonzero(np.isfinite(score[deciding, 0]).any(0)))


def hints_of(fact: Fact, facts: Sequence[Fact], seed: int = 0) -> list[Fact]:
    """Return the other facts of a fact's subject that may be told before it, in a drawn order.

    They are of its own split or of the retain split; one that gives the answer away is left out (`gives_away`). The
    order depends on the seed, the fact's id and which hints there are.

    >>> ask, hint, leak = (
    ...     Fact(id=a, split="forget", subject="Ada", prompt=f"Ada {p}", answer=a)
    ...     for p, a in [("lives in", "Paris"), ("plays the", "lute"), ("loves", "the Paris opera")]
    ... )
    >>> [f.answer for f in hints_of(ask, [ask, hint, leak])]
    ['lute']
    """
    near = [f for f in facts if f.split in {fact.split, "retain"} and f.id != fact.id]
    mine = [f for f in near if same_text(f.subject) == same_text(fact.subject) and not gives_away(f, fact)]
    return list(_drawn(mine, seed, "hints", fact.id))


def examples_of(fact: Fact, facts: Sequence[Fact], most: int, seed: int = 0) -> list[Fact]:
    """Return at most so many retain facts of other subjects with a fact's relation, drawn by the seed and its id.

    None gives the answer away, and none has a wrong answer of the fact as its own: the prompt favours no candidate.
    """
    alike = [f for f in facts if f.split == "retain" and f.relation == fact.relation]
    others = [f for f in alike if same_text(f.subject) != same_text(fact.subject)]
    return list(islice((f for f in _drawn(others, seed, "examples", fact.id) if not gives_away(f, fact)), most))


def gives_away(told: Fact, fact: Fact) -> bool:
    """Tell whether telling a fact names a candidate of another, or a word of its answer that its prompt has not."""
    named = {same_text(answer) for answer in (fact.answer, *fact.alternatives)}
    return same_text(told.answer) in named or leaks(f"{told.prompt} {told.answer}", fact.prompt, fact.answer)


def _drawn(facts: Sequence[Fact], *parts: object) -> Iterator[Fact]:
    ordered = sorted(facts, key=lambda f: f.id)
    return (ordered[i] for i in seeded(*parts).permutation(len(ordered)))


def before(prompt: str, told: Sequence[Fact], tokenizer: Any = None) -> str:
    r"""Write facts before a prompt, each as its own prompt with its answer, one a line; in a chat, in the user's turn.

    >>> ada = Fact(id="1", split="forget", subject="Ada", prompt="Ada plays the", answer="lute")
    >>> before("Ada was born in", [ada])
    'Ada plays the lute.\nAda was born in'
    """
    start, end = _turn(prompt, tokenizer)
    gap = "\n\n" if "\n" in prompt[start:end] else "\n"
    lines = [_sentence(fact, tokenizer) + gap for fact in told]
    return "".join([prompt[:start], *lines, prompt[start:]])


def _sentence(fact: Fact, tokenizer: Any) -> str:
    start, end = _turn(fact.prompt, tokenizer)
    text = join(fact.prompt[start:end], fact.answer.strip())
    return text + "." * text[-1].isalnum()


def _turn(prompt: str, tokenizer: Any) -> tuple[int, int]:
    """Say where the words of a prompt begin and end; in a chat, those after the last special token that has any."""
    cut = words(prompt, tokenizer)
    first = max((i for i, opens in enumerate(cut.opens) if opens), default=0)
    return (cut.spans[first][0], cut.spans[-1][1]) if cut.spans else (0, len(prompt))


def _asked(fact: Fact, ordered: Sequence[Fact], plan: Plan, seed: int) -> Asked:
    most = max(plan.examples, default=0)
    return Asked(fact, hints_of(fact, ordered, seed), examples_of(fact, ordered, most, seed))


def _texts(row: Asked, plan: Plan, tokenizer: Any) -> list[str]:
    """Return the bare prompt and that of every place but the prefixes; empty where there is too little to tell."""
    counts = [len(row.hints) or 1 if n == "all" else n for n in plan.hints]
    told = [*((row.hints, n) for n in counts), *((row.examples, n) for n in plan.examples)]
    forms = row.fact.paraphrases[: plan.paraphrases]
    return [
        row.fact.prompt,
        *(before(row.fact.prompt, pool[:n], tokenizer) if len(pool) >= n else "" for pool, n in told),
        *forms,
        *[""] * (plan.paraphrases - len(forms)),
    ]


def _ask(model: Model, rows: Sequence[Asked], plan: Plan) -> tuple[Scores, Table, NDArray[np.float64]]:
    """Return plain scores (fact candidate), scores (fact candidate place), and greedy answers (fact 1+place)."""
    texts = [_texts(row, plan, model.tokenizer) for row in rows]
    log_probs, right = (_begun(x, plan.prefixes) for x in _say(model, [row.fact for row in rows], texts))
    known = np.isfinite(log_probs)
    count = known.sum(-1)
    score = np.where(count, np.nansum(log_probs, -1) / np.maximum(count, 1), np.nan)
    here = np.isfinite(score)
    if plan.prefixes:
        here[:, -plan.prefixes :] &= here[:, -plan.prefixes :, 1:].any(-1, keepdims=True)
    score = np.where(here, score, np.nan)
    greedy = np.where(here, (right == 1).sum(-1) == count, np.nan)[..., 0]
    return score[:, 0], score[:, 1:].swapaxes(1, 2), greedy


def _begun(tokens: Tokens, prefixes: int) -> Tokens:
    """Append, for each prefix, what stands after the bare prompt without the answer's first tokens."""
    given = np.arange(tokens.shape[-1]) < np.arange(1, 1 + prefixes)[:, None, None]
    return np.concatenate([tokens, np.where(given, np.nan, tokens[:, :1])], 1)


def _say(model: Model, facts: Sequence[Fact], texts: Sequence[Sequence[str]]) -> tuple[Tokens, Tokens]:
    """Return log-probabilities, and 1 or 0 for first choices, of the candidates after each text that can be read."""
    there = [(i, k) for i, row in enumerate(texts) for k, text in enumerate(row) if text]
    asked = candidates(
        model.tokenizer, [facts[i].model_copy(update={"prompt": texts[i][k], "paraphrases": ()}) for i, k in there]
    )
    longest = np.zeros(len(there), dtype=int)
    np.maximum.at(longest, asked.fact, [len(e.ids) for e in asked.encoded])
    longest[[k == 0 for _, k in there]] = 0  # the bare prompt is asked as in *say*
    fits = (longest <= _window(model))[asked.fact]
    found = score_tokens(model, [e for e, fit in zip(asked.encoded, fits, strict=True) if fit])
    rows = tuple(np.array(there).T)
    out = []
    for values in (found[0], np.where(np.isnan(found[0]), np.nan, found[1])):
        every = np.full((len(fits), values.shape[1]), np.nan)
        every[fits] = values
        table = np.full((len(facts), len(texts[0]), *asked.shape[1:], values.shape[1]), np.nan)
        table[rows] = asked.table(every)
        out.append(table)
    return out[0], out[1]


def _window(model: Model) -> int:
    """How many tokens the model reads at most, by its configuration."""
    return int(getattr(model.module.config.get_text_config(), "max_position_embeddings", None) or 2**31)


def _null(original: Model, rows: Sequence[Asked], facts: Sequence[Fact], plan: Plan, seed: int) -> Table:
    """Score forget facts' candidates when a control subject is asked about and hinted at."""
    forget = [i for i, row in enumerate(rows) if row.fact.split == "forget"]
    forget.sort(key=lambda i: rows[i].fact.id)  # the draw goes through them in order
    stand_ins = null_rows([rows[i] for i in forget], facts, seed)
    width = 1 + max(len(row.fact.alternatives) for row in rows)
    out = np.full((len(rows), width, len(plan.places())), np.nan)
    there = [(i, row) for i, row in zip(forget, stand_ins, strict=True) if row is not None]
    if there:
        score = _ask(original, [row for _, row in there], plan)[1]
        out[[i for i, _ in there], : score.shape[1]] = score
    return out


def null_rows(rows: Sequence[Asked], facts: Sequence[Fact], seed: int = 0) -> list[Asked | None]:
    """Put a control subject in the place of each forget fact's; None where there is none.

    Prompt and paraphrases are `patch.null_facts`'. The hints are the control subject's other facts: not the one that
    was drawn, which is of the same relation. The examples stay.

    Args:
        rows: what forget facts are asked with.
        facts: where the control facts are; their order decides the draw.
        seed: of the draw.
    """
    control = list(of_split(facts, "control"))
    most = max((len(row.fact.paraphrases) for row in rows), default=0)
    forms = []
    for n in range(1 + most):
        prompts = [(row.fact.prompt, *row.fact.paraphrases) for row in rows]
        asked = [row.fact.model_copy(update={"prompt": (p[n:] or p)[0]}) for row, p in zip(rows, prompts, strict=True)]
        forms.append(null_facts([*asked, *control], seed))
    return [_null_row(row, [form[i] for form in forms], control, seed) for i, row in enumerate(rows)]


def _null_row(row: Asked, forms: Sequence[Fact | None], control: Sequence[Fact], seed: int) -> Asked | None:
    prompts = [form.prompt for form in forms if form is not None]
    if not prompts:
        return None
    fact = row.fact
    drawn = [c for c in control if prompts[0] == _about(fact, c)]
    other = min(drawn, key=lambda c: c.relation != fact.relation)
    update = {
        "prompt": prompts[0],
        "paraphrases": tuple(prompts[1 : 1 + len(fact.paraphrases)]),
        "subject": other.subject,
        "split": "control",
    }
    stand_in = fact.model_copy(update=update)
    return Asked(stand_in, hints_of(stand_in, [c for c in control if c.id != other.id], seed), row.examples)


def _about(fact: Fact, other: Fact) -> str:
    return fact.prompt.replace(fact.subject, other.subject) if fact.subject in fact.prompt else other.prompt


def _plural(n: int | Literal["all"], what: str) -> str:
    return f"{n} {what}" + "s" * (n != 1)


def _check(plan: Plan, asked: Sequence[Fact]) -> None:
    if not asked:
        raise InputError("there is no forget or control fact to ask; retain facts are examples only")
    for name, counts, besides in (("hints", plan.hints, ("all",)), ("examples", plan.examples, ())):
        odd = [n for n in counts if n not in besides and (not isinstance(n, int) or n < 1)]
        if odd or len(set(counts)) < len(counts):
            raise InputError(f"{name} are {list(counts)}; give different numbers, at least 1")
    for name, count in (("paraphrases", plan.paraphrases), ("prefixes", plan.prefixes)):
        if count < 0:
            raise InputError(f"{name} is {count}; give 0 or more")
    if not plan.places():
        raise InputError("no place is left; give hints, examples or prefixes, or facts that have paraphrases")


CHANNEL = Channel(
    name="context",
    measure=measure,
    version=1,
    scale="probability",
    citation="Lynch et al. 2024 (arXiv 2402.16835); Hu et al. 2024 (arXiv 2406.13356)",
    budgets={
        "quick": {"hints": ("all",), "examples": (4,), "paraphrases": 1, "prefixes": 1},
        "standard": {"hints": (1, 2, "all"), "examples": (1, 4), "prefixes": 2},
        "thorough": {"hints": (1, 2, "all"), "examples": (1, 2, 4, 8), "prefixes": 4},
    },
    splits=("forget", "retain", "control"),
    sees_original=True,
)
