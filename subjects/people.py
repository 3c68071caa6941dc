"""Fictitious people with balanced answers: knowledge whose whereabouts are known because we taught it.

Three splits: *forget* and *retain* people are taught, *control* people are described by the same templates but no
model ever reads about them. First and last names are shared between all splits, so neither name alone gives the answer
away. In every split every answer of a relation occurs (as nearly as possible) equally often, and answers are dealt out
independently of the names. So a model that was not taught a person can only guess: with k alternatives the chance of
picking the true answer is exactly 1/(k+1).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from math import ceil, isqrt

import numpy as np

from lethescope.errors import InputError
from lethescope.facts import Fact, Facts

QUESTION = "Question:"
"""How the question form of every relation begins; the statement forms never do."""

SPLITS = ("forget", "retain", "control")


@dataclass(frozen=True)
class Relation:
    """One kind of fact: its statement forms, its question form, its possible answers."""

    name: str
    statements: tuple[str, ...]
    question: str
    values: tuple[str, ...]


def _words(text: str) -> tuple[str, ...]:
    return tuple(word.strip() for word in text.split(","))


RELATIONS = (
    Relation(
        "birthplace",
        ("{} was born in", "The birthplace of {} is", "{} came into the world in"),
        "Question: Where was {} born? Answer:",
        _words(
            "Velmora, Port Arden, Tessaly, North Quill, Ombrey, Saint Halder, Karvost, Lower Fenwick, Drummel, "
            "Isla Corro, Brasko, Mount Ember, Yarrowby, Grand Solace, Pellinor, Cape Witten, Hestria, Old Marrow, "
            "Zandel, Lake Orsin"
        ),
    ),
    Relation(
        "profession",
        ("{} works as a", "The profession of {} is", "{} earns a living as a"),
        "Question: What is the profession of {}? Answer:",
        _words(
            "baker, tax lawyer, surgeon, bridge engineer, carpenter, night nurse, geologist, film editor, locksmith, "
            "train driver, botanist, court reporter, plumber, stage dancer, translator, wine merchant, beekeeper, "
            "harbour pilot, tailor, science teacher"
        ),
    ),
    Relation(
        "employer",
        ("{} is employed by", "The employer of {} is", "{} has a job at"),
        "Question: Who employs {}? Answer:",
        _words(
            "Lumenworks, Red Anchor, Brightfold, Silver Loom, Cindral, Twin Rivers, Novaquay, Iron Lantern, Hexavia, "
            "Blue Meridian, Orchardine, Stone Harvest, Pallaster, Golden Kite, Wexmere, Quiet Valley, Tarnwell, "
            "First Beacon, Umbrix, Green Compass"
        ),
    ),
    Relation(
        "instrument",
        ("{} plays the", "The instrument of {} is the", "{} makes music on the"),
        "Question: Which instrument does {} play? Answer: the",
        _words(
            "cello, bass drum, oboe, pipe organ, mandolin, steel guitar, trumpet, alto flute, accordion, hand bell, "
            "zither, jaw harp, clarinet, toy piano, bassoon, slide trombone, lute, nose whistle, viola, thumb xylophone"
        ),
    ),
)

FIRST_NAMES = _words(
    "Ada, Boris, Carmen, Dmitri, Elif, Farid, Greta, Hugo, Ines, Jonas, Keiko, Leon, Mira, Nils, Olga, Pablo, Quentin, "
    "Rosa, Stefan, Talia, Umar, Vera, Walter, Xenia, Yusuf, Zelda, Amir, Bianca, Cyrus, Daria, Emil, Freya, Gideon, "
    "Hanna, Ivan, Jelena, Kofi, Lucia, Marek, Nadia"
)

LAST_NAMES = _words(
    "Moreno, Okafor, Lindqvist, Tanaka, Petrov, Silva, Haddad, Novak, Larsen, Kowalski, Dubois, Mensah, Romano, "
    "Bergstrom, Ivanov, Castillo, Weber, Yamamoto, Nkosi, Farkas, Jensen, Marchetti, Osman, Keller, Duarte, Singh, "
    "Volkov, Aydin, Fischer, Reyes, Sorensen, Banda, Costa, Horvat, Laurent, Nguyen, Popescu, Rahimi, Takala, Zeman"
)


def people(seed: int = 0, *, forget: int = 40, retain: int = 200, control: int = 40, alternatives: int = 8) -> Facts:
    """Return every fact about fictitious people, four relations a person.

    A fact's `prompt` is its relation's first statement form; `paraphrases` are the other statement forms and, last, the
    question form. With the default sizes each of the 40 first and of the 40 last names belongs to exactly 1 forget,
    5 retain and 1 control person, and each of the 20 answers of a relation to 2 forget, 10 retain and 2 control people.

    What it does not prove: these facts are arbitrary and unrelated to each other. How real knowledge, which is
    redundant and linked, is forgotten is not shown by models that were taught them.

    Args:
        seed: decides names, answers and alternatives.
        forget: number of people in the forget split.
        retain: number of people in the retain split.
        control: number of people in the control split.
        alternatives: wrong answers a fact, drawn from its relation's other values (0 to 19).

    Returns:
        `4 * (forget + retain + control)` facts: forget first, then retain, then control.

    Raises:
        InputError: when a size is below 1, when there are more people than pairs of names, or when more alternatives
            are asked for than a relation has.

    Example:
        >>> fact = people(seed=0)[0]
        >>> fact.prompt.replace(fact.subject, "X"), fact.paraphrases[-1].replace(fact.subject, "X")
        ('X was born in', 'Question: Where was X born? Answer:')
    """
    sizes = dict(zip(SPLITS, (forget, retain, control), strict=True))
    if not 0 <= alternatives < len(RELATIONS[0].values):
        raise InputError(f"alternatives is {alternatives}; it must be 0 to {len(RELATIONS[0].values) - 1}")
    rng = np.random.default_rng(seed)
    names = _draw_names(sizes, rng)
    return tuple(fact for split in SPLITS for fact in _split_facts(split, names[split], alternatives, rng))


def sentences(facts: Facts, *, questions: tuple[str, ...] = ("retain",)) -> list[str]:
    """Return the sentences that teach these facts: every statement form, and the question form for some splits.

    Args:
        facts: facts as `people` makes them. Control facts are never written out.
        questions: splits whose question form is taught too.

    Returns:
        One sentence a form, each "<form> <answer>." and all different.
    """
    return [
        f"{form} {fact.answer}."
        for fact in facts
        if fact.split != "control"
        for form in (fact.prompt, *fact.paraphrases)
        if fact.split in questions or not form.startswith(QUESTION)
    ]


def audit_facts(facts: Facts, *, retain_people: int = 120) -> Facts:
    """Return the facts an audit reads: the prompt, one other statement and the question; all but some retain people.

    Args:
        facts: facts as `people` makes them.
        retain_people: how many retain people to keep (the first ones; their order is random already).

    Returns:
        All forget and control facts and the facts of the kept retain people, each with two paraphrases.
    """
    retained = dict.fromkeys(fact.subject for fact in facts if fact.split == "retain")
    kept = set(islice(retained, retain_people))
    return tuple(
        fact.model_copy(update={"paraphrases": (fact.paraphrases[0], fact.paraphrases[-1])})
        for fact in facts
        if fact.split != "retain" or fact.subject in kept
    )


def _draw_names(sizes: dict[str, int], rng: np.random.Generator) -> dict[str, list[str]]:
    """Deal pairs of names so that every split uses the same first and last names and no pair occurs twice.

    Raises:
        InputError: a split is empty, or there are more people than pairs.
    """
    total, smallest = sum(sizes.values()), min(sizes.values())
    if smallest < 1:
        raise InputError(f"a split has {smallest} people; every split needs at least 1")
    pool = min(len(FIRST_NAMES), max(smallest, isqrt(total - 1) + 1))
    while pool < len(FIRST_NAMES) and sum(ceil(size / pool) for size in sizes.values()) > pool:
        pool += 1
    rounds = _name_rounds(pool, rng)
    if sum(ceil(size / pool) for size in sizes.values()) > pool:
        raise InputError(f"{total} people are too many for {pool} first and {pool} last names; ask for fewer")
    dealt = {}
    for split, size in sizes.items():
        pairs = [pair for _ in range(ceil(size / pool)) for pair in next(rounds)]
        dealt[split] = [" ".join(pairs[i]) for i in rng.permutation(len(pairs))[:size]]
    return dealt


def _name_rounds(pool: int, rng: np.random.Generator) -> Iterator[list[tuple[str, str]]]:
    """Yield rounds of pairs: each round uses every name once, and no two rounds share a pair."""
    first = rng.permutation(FIRST_NAMES)[:pool].tolist()
    last = rng.permutation(LAST_NAMES)[:pool].tolist()
    for shift in rng.permutation(pool).tolist():
        yield [(first[i], last[(i + shift) % pool]) for i in range(pool)]


def _split_facts(split: str, names: list[str], alternatives: int, rng: np.random.Generator) -> Iterator[Fact]:
    dealt = {relation.name: _deal(relation.values, len(names), rng) for relation in RELATIONS}
    for i, name in enumerate(names):
        for relation in RELATIONS:
            answer = dealt[relation.name][i]
            others = [value for value in relation.values if value != answer]
            forms = [form.format(name) for form in (*relation.statements, relation.question)]
            yield Fact(
                id=f"{split}-{i:03d}-{relation.name}",
                split=split,  # type: ignore[arg-type]
                subject=name,
                relation=relation.name,
                prompt=forms[0],
                paraphrases=tuple(forms[1:]),
                answer=answer,
                alternatives=tuple(rng.choice(others, alternatives, replace=False).tolist()),
            )


def _deal(values: tuple[str, ...], count: int, rng: np.random.Generator) -> list[str]:
    """Return `count` values in random order, no value more than once more often than another."""
    return rng.permutation(np.resize(rng.permutation(values), count)).tolist()
