"""Contexts of units that look alike, with a question for every unit (after FILM's VaL probing, arXiv 2404.16811).

*Document*: words from inside a sentence are given, the whole sentence is asked (both ways). *Code*: a line is given,
and the name of its function asked, which stands before it (backward). *Database*: the key of an entry is given, and its
label asked, which follows (forward). All wording is ours. Facts can stand among the neutral units.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any, Literal, NamedTuple, get_args

import numpy as np

from lethescope.errors import InputError
from lethescope.facts import Fact
from lethescope.probes.needles import unknown_words, vocabulary_words
from lethescope.statistics import seeded
from lethescope.tokens import join

Direction = Literal["document", "code", "database"]
DIRECTIONS: tuple[Direction, ...] = get_args(Direction)
NEUTRAL = "neutral"
"""The split of units that are no facts."""

ADJECTIVES = (
    *("amber", "broken", "cold", "distant", "empty", "faded", "green", "hidden"),
    *("iron", "little", "narrow", "old", "quiet", "red", "silver"),
)
NOUNS = (
    *(
        "anchor",
        "barrel",
        "bridge",
        "candle",
        "clock",
        "door",
        "drum",
        "engine",
        "garden",
        "hammer",
        "island",
        "kettle",
    ),
    *("ladder", "lantern", "letter", "market", "mirror", "orchard", "painter", "river", "sailor", "tower", "wagon"),
)
VERBS = ("carried", "counted", "covered", "crossed", "followed", "found", "lifted", "moved", "opened", "painted")
ACTIONS = ("add", "call", "draw", "fill", "find", "keep", "load", "mark", "move", "pick", "read", "send")
"""What neutral units are made of."""


class Form(NamedTuple):
    """How a direction is written.

    `before` opens the text, `between` parts units, `ask` and `ask_fact` hold `{given}`, `fact` holds `{said}`.
    """

    between: str
    ask: str
    ask_fact: str
    fact: str = "{said}."
    before: str = ""


_WHOLE = '\n\nThe whole sentence with the words "{given}" reads:'
PLAIN: Mapping[str, Form] = {
    "document": Form("\n", _WHOLE, _WHOLE),
    "code": Form(
        "\n\n",
        '\n\nThe line "{given}" belongs to the function',
        '\n\nThe remark with "{given}" is about',
        fact="# {said}.",
    ),
    "database": Form("\n", "\n\nEntry {given}:", "\n\n{given}"),
}
"""Forms for tokenizers that can write English."""
BARE: Mapping[str, Form] = dict.fromkeys(DIRECTIONS, Form("\n", "\n{given}", "\n{given}", fact="{said}"))
"""Forms for word tokenizers: nothing but the units' own words, so only a model that was taught the task can answer."""


class Unit(NamedTuple):
    """One unit of a context: its text, what of it is given, what is asked, and what counts as an answer."""

    text: str
    given: str
    asked: str
    accepted: tuple[str, ...]
    split: str = NEUTRAL
    fact: str = ""


@dataclass(frozen=True)
class Context:
    """Units of one direction, one after another, and how they are asked for."""

    direction: Direction
    number: int
    units: tuple[Unit, ...]
    form: Form

    @property
    def text(self) -> str:
        """Everything before the question."""
        return self.form.before + self.form.between.join(unit.text for unit in self.units)

    def question(self, i: int) -> str:
        """What asks for unit i."""
        unit = self.units[i]
        return (self.form.ask_fact if unit.fact else self.form.ask).replace("{given}", unit.given)

    def skipped(self, i: int) -> str:
        """Why unit i is not asked for, or nothing: what is given must stand in one unit only."""
        unit = self.units[i]
        if not unit.given:
            return "the prompt does not name its subject"
        return "ambiguous" if sum(occurs(unit.given, other.text) for other in self.units) > 1 else ""


def occurs(piece: str, text: str) -> bool:
    """Whether a text has a piece as whole words, in any case of letters.

    >>> occurs("call_door", "Call_door it is"), occurs("call_door", "call_doors")
    (True, False)
    """
    return re.search(rf"(?<!\w){re.escape(piece.strip())}(?!\w)", text, re.IGNORECASE) is not None


def contexts(
    tokenizer: Any,
    *,
    units: int = 32,
    n: int = 1,
    facts: Sequence[Fact] = (),
    directions: Sequence[Direction] = DIRECTIONS,
    forms: Mapping[str, Form] | None = None,
    seed: int = 0,
) -> list[Context]:
    """Make contexts of neutral units, with facts among them at places drawn for each context.

    What is asked of a fact's unit, whose text is prompt and answer: *document*, the subject is given (the prompt where
    it does not name it) and the whole sentence asked; *code*, the answer is given and the subject asked, which stands
    before it; *database*, the prompt is given and the answer asked. Facts stand at the same places in every direction.
    Give facts of several splits: retain facts of the same form are what forget facts are to be held against. A model
    that knows a fact answers without reading; `swapped` facts can only be read.

    Args:
        tokenizer: the model's; where it cannot write the words of `PLAIN`, units are made of its own words.
        units: in a context; 16 to 64.
        n: contexts a direction; context i gets every n-th fact from the i-th on.
        facts: at most half of the units of a context.
        directions: any of `DIRECTIONS`.
        forms: how contexts are written and asked, by direction; `PLAIN` or `BARE` by default.
        seed: decides words and places.

    Returns:
        Contexts by direction, then number.

    Raises:
        InputError: too few units or words, too many facts, or an unknown direction.

    Example:
        >>> from lethescope.subjects.tokenizer import word_tokenizer
        >>> made = contexts(word_tokenizer(["ash elm fir oak"]), units=2, directions=["database"])[0]
        >>> sorted(made.text.split()), made.units[0].asked == made.units[0].text.split()[1]
        (['ash', 'elm', 'fir', 'oak'], True)
    """
    unknown = [d for d in directions if d not in DIRECTIONS]
    if unknown or not directions:
        raise InputError(f"unknown direction {unknown[:1] or 'none'}; use {', '.join(DIRECTIONS)}")
    if units < 2 or n < 1 or -(-len(facts) // n) > units // 2:
        raise InputError(
            f"{len(facts)} facts in {n} contexts of {units} units; at least 2 units are needed, and facts may be half "
            "of them: give more contexts (n=) or units"
        )
    bare = bool(unknown_words(tokenizer, _PROBE))
    forms = forms or (BARE if bare else PLAIN)
    pool = vocabulary_words(tokenizer) if bare else ()
    made = []
    for direction, number in product(directions, range(n)):
        told = facts[number::n]
        rng = seeded(seed, direction, number)
        neutral = _bare(direction, units, pool, rng) if bare else MAKERS[direction](units, rng)
        places = seeded(seed, "places", number).choice(units, len(told), replace=False).tolist()
        for place, fact in zip(places, told, strict=True):
            neutral[place] = _fact_unit(fact, direction, forms[direction])
        made.append(Context(direction, number, tuple(neutral), forms[direction]))
    return made


def swapped(facts: Sequence[Fact], *, seed: int = 0) -> tuple[Fact, ...]:
    """Exchange each fact's answer for one of its alternatives, so that the right answer can only be read.

    Raises:
        InputError: a fact has no alternatives.
    """
    out = []
    for fact in facts:
        if not fact.alternatives:
            raise InputError(f"fact {fact.id!r} has no alternatives; a swapped fact needs a wrong answer")
        told = fact.alternatives[int(seeded(seed, fact.id).integers(len(fact.alternatives)))]
        others = tuple(fact.answer if a == told else a for a in fact.alternatives)
        out.append(fact.model_copy(update={"answer": told, "alternatives": others}))
    return tuple(out)


_PROBE = "The Entry line whole sentence words belongs function def return kept in near the lantern 4821 = * + : , . ( )"
"""Where a tokenizer can write this, it can write `PLAIN`."""


def pick(rng: np.random.Generator, n: int, *pools: Sequence[str]) -> list[tuple[str, ...]]:
    """Draw n different combinations, one element of each pool.

    Raises:
        InputError: there are not so many.
    """
    every = list(product(*pools))
    if len(every) < n:
        raise InputError(f"{n} units are too many: there are words for {len(every)} that differ")
    return [every[i] for i in rng.choice(len(every), n, replace=False)]


def _document(n: int, rng: np.random.Generator) -> list[Unit]:
    made = []
    for (adjective, noun), verb in zip(pick(rng, n, ADJECTIVES, NOUNS), rng.choice(VERBS, n), strict=True):
        (a, b), (near, of) = rng.choice(ADJECTIVES, 2), rng.choice(NOUNS, 2)
        said = f"The {a} {rng.choice(NOUNS)} {verb} the {adjective} {noun} near the {b} {near} of the {of}"
        first = int(rng.integers(1, 4))  # the piece holds adjective and noun, by which sentences differ
        piece = " ".join(said.split()[first : first + 6])
        made.append(Unit(f"{said}.", piece, said, (said,)))
    return made


def _code(n: int, rng: np.random.Generator) -> list[Unit]:
    made = []
    for action, noun in pick(rng, n, ACTIONS, NOUNS):
        given, result = rng.choice(NOUNS, 2, replace=False)
        name, line = f"{action}_{noun}", f"{result} = {given} * {rng.integers(2, 10)} + {rng.integers(10, 100)}"
        made.append(Unit(f"def {name}({given}):\n    {line}\n    return {result}", line, name, (name,)))
    return made


def _database(n: int, rng: np.random.Generator) -> list[Unit]:
    keys = rng.choice(np.arange(1000, 10000), n, replace=False)
    made = []
    for key, (adjective, noun) in zip(keys.tolist(), pick(rng, n, ADJECTIVES, NOUNS), strict=True):
        label, place = f"{adjective} {noun}", f"kept in the {rng.choice(ADJECTIVES)} {rng.choice(NOUNS)}"
        made.append(Unit(f"Entry {key}: {label}, {place}.", str(key), label, (label, place)))
    return made


MAKERS: Mapping[str, Callable[[int, np.random.Generator], list[Unit]]] = {
    "document": _document,
    "code": _code,
    "database": _database,
}
"""What makes the neutral units of each direction."""


def _bare(direction: str, n: int, pool: Sequence[str], rng: np.random.Generator) -> list[Unit]:
    """Two words a unit, given and asked; a document's unit has a word more on either side of two given ones.

    Raises:
        InputError: there are too few words.
    """
    if len(pool) < 2 * n:
        raise InputError(f"{n} units need {2 * n} words that differ; the tokenizer writes {len(pool)} with one token")
    mixed = [pool[i] for i in rng.permutation(len(pool))[: 2 * n]]
    pairs = list(zip(mixed[:n], mixed[n:], strict=True))
    if direction == "database":
        return [Unit(f"{a} {b}", a, b, (b,)) for a, b in pairs]
    if direction == "code":
        return [Unit(f"{a} {b}", b, a, (a,)) for a, b in pairs]
    outer = rng.choice(pool, (n, 2)).tolist()
    texts = [(f"{a} {b}", f"{left} {a} {b} {right}") for (a, b), (left, right) in zip(pairs, outer, strict=True)]
    return [Unit(text, piece, text, (text,)) for piece, text in texts]


def _fact_unit(fact: Fact, direction: str, form: Form) -> Unit:
    said = join(fact.prompt, fact.answer)
    named = occurs(fact.subject, fact.prompt)
    given, asked = {
        "document": (fact.subject if named else fact.prompt, said),
        "code": (fact.answer if named else "", fact.subject),
        "database": (fact.prompt, fact.answer),
    }[direction]
    return Unit(form.fact.replace("{said}", said), given.strip(), asked, (asked,), fact.split, fact.id)
