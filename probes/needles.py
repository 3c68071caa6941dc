"""Needles: something said once in a long context, and a question that only the context answers.

A *key-value* needle is one record among many of the same form; a *sentence* needle is a statement put between the
sentences of a text about something else. Answers are invented, so that no weights can know them; some contradict what
weights do know. Lengths are in tokens, sentence ends are found in the text, and every needle is checked: its answer
must be the same tokens in the context and after the question.
"""

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lethescope.errors import InputError
from lethescope.facts import quote, read_text
from lethescope.tokens import Encoded, encode, join

RECORD, BARE_RECORD = "The code of {key} is {value}.", "{key} {value}"
"""A record of a key-value needle, and the same for a tokenizer that cannot write those words."""

ASK = "\n\nAnswer from the text above, in a few words.\nQuestion: {question}\nAnswer:"
"""What follows the context of a sentence needle."""

SENTENCES = (
    ("The oldest map of {name} is kept in {answer}.", "Where is the oldest map of {name} kept?"),
    ("The baker of {name} is called {answer}.", "What is the baker of {name} called?"),
    ("The first ship built in {name} was named {answer}.", "What was the first ship built in {name} named?"),
    ("The capital of France is {answer}.", "What is the capital of France?"),
    ("The largest of all planets is {answer}.", "What is the largest of all planets?"),
    ("The telephone was invented by {answer}.", "Who invented the telephone?"),
)
"""Statements and their questions: three about invented places, three that contradict common knowledge."""

SLOT = "{answer}"
NOUNS = ("farmer", "garden", "river", "teacher", "bridge", "market", "horse", "letter", "village", "clock", "tower")
VERBS = ("watched", "followed", "crossed", "remembered", "repaired", "painted", "carried", "found", "left", "visited")
"""What a haystack is made of where none is given."""


@dataclass(frozen=True)
class Needle:
    """One instance: a prompt that holds the answer once and then asks for it.

    Attributes:
        id: its name in results.
        kind: `key-value`, `sentence`, or a word of your own.
        prompt: everything before the answer, as the model reads it.
        question: the part of the prompt that asks; its last occurrence counts.
        answer: what continues the prompt.
        start: where the answer begins in the prompt's context, in characters.
        stop: where it ends.
        length: tokens of prompt and answer that were aimed at; 0 for a needle of your own.
        depth: where in the context it was aimed at, from 0 to 1.

    Raises:
        InputError: the span does not read as the answer, or the question does not follow it.

    Example:
        >>> Needle("1", "mine", "Ada owns a kite. Ada owns a", "Ada owns a", "kite", 11, 15).question_span
        (17, 27)
    """

    id: str
    kind: str
    prompt: str
    question: str
    answer: str
    start: int
    stop: int
    length: int = 0
    depth: float = 0.0

    def __post_init__(self) -> None:
        said = self.prompt[self.start : self.stop]
        if not self.answer.strip() or said != self.answer:
            raise InputError(f"needle {self.id!r}: its span reads {quote(said)}, the answer is {quote(self.answer)}")
        if not self.question.strip() or self.prompt.rfind(self.question) < self.stop:
            raise InputError(f"needle {self.id!r}: the question {quote(self.question)} does not follow the answer")

    @property
    def question_span(self) -> tuple[int, int]:
        """Where the question stands in the prompt, in characters."""
        first = self.prompt.rindex(self.question)
        return first, first + len(self.question)


@dataclass(frozen=True)
class Located:
    """A needle as tokens: `encoded` is prompt and answer, `span` and `question` are token ranges of the prompt."""

    encoded: Encoded
    span: tuple[int, int]
    question: tuple[int, int]


def locate(tokenizer: Any, needle: Needle) -> Located:
    """Find the tokens of a needle by character offsets, and check that context and answer say the same tokens.

    Raises:
        InputError: the tokenizer gives no offsets, cannot write the answer, or writes it differently in the context.
    """
    if not getattr(tokenizer, "is_fast", False):
        raise InputError(f"{type(tokenizer).__name__} gives no character offsets; needles need a fast tokenizer")
    try:
        encoded = encode(tokenizer, needle.prompt, needle.answer)
    except InputError as error:
        raise InputError(f"needle {needle.id!r}: {error}") from None
    offsets = tokenizer(join(needle.prompt, needle.answer), return_offsets_mapping=True)["offset_mapping"]
    span = _range(offsets[: encoded.start], needle.start, needle.stop)
    if encoded.ids[slice(*span)] != encoded.answer:
        there, here = (tokenizer.convert_ids_to_tokens(ids) for ids in (encoded.ids[slice(*span)], encoded.answer))
        raise InputError(
            f"needle {needle.id!r}: the answer's tokens are {there} in the context and {here} after the question; "
            "put the same characters (a space, most often) before and after it in both places"
        )
    return Located(encoded, span, _range(offsets[: encoded.start], *needle.question_span))


def _range(offsets: Sequence[tuple[int, int]], start: int, stop: int) -> tuple[int, int]:
    """The tokens that have a character in [start, stop)."""
    inside = [i for i, (first, last) in enumerate(offsets) if last > start and first < stop]
    return inside[0], inside[-1] + 1


@dataclass(frozen=True)
class _Place:
    """Where a needle is to stand, its name, and the random numbers that are its own."""

    name: str
    kind: str
    length: int
    depth: float
    rng: np.random.Generator


@dataclass(frozen=True)
class _Filler:
    """Pieces of text, and how many tokens the text has up to the end of each."""

    pieces: Sequence[str]
    ends: NDArray[np.intp]

    def from_somewhere(self, rng: np.random.Generator, length: int) -> "_Filler":
        """The text from a piece drawn among those after which `length` tokens follow; all of it where none do."""
        first = int(rng.integers(1 + np.searchsorted(self.ends, self.ends[-1] - length)))
        gone = self.ends[first - 1] if first else 0
        return _Filler(self.pieces[first:], self.ends[first:] - gone)


def key_value_needles(
    tokenizer: Any,
    *,
    lengths: Sequence[int],
    depths: Sequence[float],
    each: int = 1,
    words: Sequence[str] | None = None,
    value_words: int = 2,
    record: str | None = None,
    seed: int = 0,
) -> list[Needle]:
    """Records of the same form, one of which is asked: `The code of Velmora is Tarkin Oslun. … The code of Velmora is`.

    All keys differ, and the words of the answer stand nowhere else. The prompt and the answer have at most `length`
    tokens, and one record more would not fit. What it does not prove: a model that answers may have matched the key
    alone; nothing has to be understood. Our choice: the form of the records, and what is counted in a length.

    Args:
        tokenizer: the model's; a fast one.
        lengths: tokens of prompt and answer together.
        depths: where the needle stands, from 0 (first) to 1 (last); it moves back to the end of a record.
        each: needles a length and depth.
        words: for keys and values; by default invented ones, or, where the tokenizer cannot write those, its own.
        value_words: words of a value.
        record: form of a record, with `{key}` and then `{value}`; what stands before the value is asked again. By
            default `RECORD`, or `BARE_RECORD` where the tokenizer cannot write it.
        seed: decides words and order.

    Returns:
        Needles by length, then depth, then number.

    Raises:
        InputError: a length is too short, the words are too few, or a depth is not in [0, 1].

    Example:
        >>> from lethescope.subjects.tokenizer import word_tokenizer
        >>> tokenizer = word_tokenizer(["ash birch cedar elm fir hazel larch maple oak pine"])
        >>> needle = key_value_needles(tokenizer, lengths=[10], depths=[0.5], value_words=1)[0]
        >>> len(tokenizer(f"{needle.prompt} {needle.answer}")["input_ids"])
        9
    """
    if record is None:
        record = BARE_RECORD if unknown_words(tokenizer, _filled(RECORD, "", "")) else RECORD
    if "{key}" not in record.partition("{value}")[0]:
        raise InputError(f"record {quote(record)} needs {{key}} and, after it, {{value}}")
    if words is None:
        most = 20 + 2 * max(lengths, default=0)
        invent = not unknown_words(tokenizer, " ".join(_invented(np.random.default_rng(0), 5)))
        words = _invented(np.random.default_rng([seed, 0]), most) if invent else vocabulary_words(tokenizer)
    words = list(dict.fromkeys(words))
    places = _places("key-value", lengths, depths, each, seed)
    return [_key_value(tokenizer, place, words, value_words, record) for place in places]


def _key_value(tokenizer: Any, place: _Place, words: Sequence[str], value_words: int, record: str) -> Needle:
    if len(words) <= value_words + 1:
        raise InputError(f"{len(words)} words are too few for keys and values of {value_words} words; give more")
    mixed = [words[i] for i in place.rng.permutation(len(words))[: value_words + 2 * place.length]]
    answer, (key, *keys), values = " ".join(mixed[:value_words]), mixed[value_words::2], mixed[value_words + 1 :: 2]
    drawn = place.rng.integers(max(1, len(values)), size=(1 + place.length // value_words, value_words))
    pairs = zip(keys, drawn.tolist(), strict=False)
    others = [_filled(record, other, " ".join(values[i] for i in row)) + " " for other, row in pairs]
    question, form = _filled(record.partition("{value}")[0].strip(), key, ""), _filled(record, key, SLOT)
    return _assemble(tokenizer, place, form, answer, f" {question}", question, _filler(tokenizer, others))


def _filled(record: str, key: str, value: str) -> str:
    return record.replace("{key}", key).replace("{value}", value)


def sentence_needles(
    tokenizer: Any,
    *,
    lengths: Sequence[int],
    depths: Sequence[float],
    each: int = 1,
    haystack: str | None = None,
    statements: Sequence[tuple[str, str]] = SENTENCES,
    answer_words: int = 2,
    ask: str = ASK,
    seed: int = 0,
) -> list[Needle]:
    """A statement between the sentences of another text, and a question about it (needle in a haystack).

    The statement goes to the end of a sentence at or before the depth that is asked for. What it does not prove: that
    the answer was read is only sure because it is invented; a wrong answer can be a failure to follow the instruction.
    Our choice: statements, instruction, and that the haystack is read from a sentence drawn for every needle.

    Args:
        tokenizer: the model's; a fast one.
        lengths: tokens of prompt and answer together; the prompt is filled with as many sentences as fit.
        depths: where the statement stands in the text, from 0 to 1.
        each: needles a length and depth.
        haystack: the text (`read_haystack` reads files); by default simple sentences are made from a word list.
        statements: statement with `{answer}`, and its question; `{name}` is an invented name. They take turns.
        answer_words: invented words of an answer.
        ask: what follows the text, with `{question}`.
        seed: decides names, answers and where the haystack begins.

    Returns:
        Needles by length, then depth, then number.

    Raises:
        InputError: a length or the haystack is too short, it has no sentence ends, or the tokenizer lacks a word.
    """
    if not statements or not all(SLOT in s for s, _ in statements) or "{question}" not in ask:
        raise InputError(f"give at least one statement, {SLOT} in every statement, and {{question}} in ask=")
    text = _made_up(np.random.default_rng([seed, 1]), max(lengths, default=0)) if haystack is None else haystack
    sentences = split_sentences(text)
    if len(sentences) < 2:
        raise InputError("the haystack has no sentence end to put a statement after; give a text of several sentences")
    filler, made = _filler(tokenizer, sentences), list[Needle]()
    for place in _places("sentence", lengths, depths, each, seed):
        name, *answer = _invented(place.rng, answer_words + 1)
        said, question = (form.replace("{name}", name) for form in statements[len(made) % len(statements)])
        part, tail = filler.from_somewhere(place.rng, place.length), ask.replace("{question}", question)
        made.append(_assemble(tokenizer, place, said, " ".join(answer), tail, question, part))
    return made


def read_haystack(*paths: str | Path) -> str:
    """The text of haystack files, one after another.

    Raises:
        InputError: a file is missing, not UTF-8, or holds no text.
    """
    texts = {path: read_text(Path(path)) for path in paths}
    empty = [path for path, text in texts.items() if not text.strip()]
    if empty or not texts:
        raise InputError(f"{empty[0]}: the haystack is empty" if empty else "no haystack files were given")
    return "\n\n".join(texts[path] for path in paths)


def split_sentences(text: str) -> list[str]:
    r"""Cut a text after its sentence ends; the parts keep their white space, so that joining gives the text back.

    A sentence ends with `.`, `!`, `?` or `…` and closing quotes before white space and something other than a small
    letter, with a Chinese full stop, or with an empty line. Initials and a few titles end none.

    Example:
        >>> split_sentences('Mr. Green saw 3.5 ships. "Ahoy!" He left.\n')
        ['Mr. Green saw 3.5 ships. ', '"Ahoy!" ', 'He left.\n']
    """
    not_after = "".join(rf"(?<!\b{title})" for title in ("Mr", "Mrs", "Ms", "Dr", "St", "[A-Z]"))
    end = not_after + r"[.!?…]+[\"'”’»)\]]*\s+(?![a-z])|[。！？]+\s*|\n\s*\n\s*"
    cuts = [0, *(match.end() for match in re.finditer(end, text))]
    return [part for a, b in zip(cuts, [*cuts[1:], len(text)], strict=True) if (part := text[a:b])]


def unknown_words(tokenizer: Any, text: str) -> list[str]:
    """The words of a text that the tokenizer can only write as unknown, in order; none for byte-level tokenizers."""
    unknown = getattr(tokenizer, "unk_token_id", None)
    words = dict.fromkeys(text.split())
    return [w for w in words if unknown in tokenizer(w, add_special_tokens=False)["input_ids"]]


def vocabulary_words(tokenizer: Any) -> list[str]:
    """The words that are one token of the tokenizer, sorted: letters or digits only, and written back as they are.

    Example:
        >>> from lethescope.subjects.tokenizer import word_tokenizer
        >>> vocabulary_words(word_tokenizer(["Ada was born."]))
        ['Ada', 'born', 'was']
    """
    plain = (word for word in sorted(tokenizer.get_vocab()) if word.isalnum())
    return [word for word in plain if tokenizer.tokenize(word) == [word] and word not in tokenizer.all_special_tokens]


def _filler(tokenizer: Any, pieces: Sequence[str]) -> _Filler:
    coded = tokenizer("".join(pieces), add_special_tokens=False, return_offsets_mapping=True)
    stops, lasts = np.cumsum([len(piece) for piece in pieces]), [last for _, last in coded["offset_mapping"]]
    return _Filler(pieces, np.searchsorted(lasts, stops, side="right"))


def _assemble(
    tokenizer: Any, place: _Place, form: str, answer: str, tail: str, question: str, filler: _Filler
) -> Needle:
    """Put as many pieces of text around a statement as fit, ask, and check the outcome."""
    left, _, right = form.partition(SLOT)

    def build(n: int) -> Needle:
        split = int(np.searchsorted(filler.ends[:n], place.depth * filler.ends[n - 1], side="right")) if n else 0
        before, after = "".join(filler.pieces[:split]), "".join(filler.pieces[split:n])
        start = len(before) + len(left)
        prompt = f"{before}{left}{answer}{right} {after}".rstrip() + tail
        span = (start, start + len(answer))
        return Needle(place.name, place.kind, prompt, question, answer, *span, place.length, place.depth)

    needle = build(_most(tokenizer, build, filler, place.length))
    locate(tokenizer, needle)
    return needle


def _most(tokenizer: Any, build: Callable[[int], Needle], filler: _Filler, length: int) -> int:
    """How many pieces of text fit into a needle of so many tokens.

    Raises:
        InputError: none fit, or all would, or a word of the needle is not known.
    """

    def size(n: int) -> int:
        return len(tokenizer(join(build(n).prompt, build(n).answer))["input_ids"])

    unknown, least = unknown_words(tokenizer, build(0).prompt), size(0)
    if unknown:
        raise InputError(f"the tokenizer does not know the word {quote(unknown[0])}; use key-value needles of its own")
    if least > length:
        raise InputError(f"length {length} is too short: needle, question and answer alone are {least} tokens")
    n = int(np.searchsorted(filler.ends, length - least, side="right"))
    while n and size(n) > length:
        n -= 1
    while n < len(filler.pieces) and size(n + 1) <= length:
        n += 1
    if n == len(filler.pieces):
        raise InputError(f"the text ends after {size(n)} of {length} tokens; give a longer haystack or more words")
    if 2 * size(n) < length:
        raise InputError(
            f"after {size(n)} of {length} tokens comes a sentence that does not fit; give shorter sentences"
        )
    return n


def _places(kind: str, lengths: Sequence[int], depths: Sequence[float], each: int, seed: int) -> Iterator[_Place]:
    if not lengths or not depths or each < 1:
        raise InputError("give at least one length, one depth and one needle each")
    if min(lengths) < 1 or not all(0 <= depth <= 1 for depth in depths):
        raise InputError(f"lengths are positive and depths from 0 to 1; these are {[*lengths]} and {[*depths]}")
    for length, depth, i in product(lengths, depths, range(each)):
        rng = np.random.default_rng([seed, length, int(depth * 1e6), i])
        yield _Place(f"{kind} {length} {depth:g} {i}", kind, length, depth, rng)


def _invented(rng: np.random.Generator, n: int) -> list[str]:
    """Draw n different capitalised words of three syllables."""
    found: dict[str, None] = {}
    while len(found) < n:
        syllables = ("bdfgklmnprstvz"[c] + "aeiou"[v] for c, v in rng.integers([14, 5], size=(3, 2)))
        found["".join(syllables).title() + "lnrs"[rng.integers(4)]] = None
    return list(found)


def _made_up(rng: np.random.Generator, length: int) -> str:
    """Write simple sentences of common words, at least twice as many words as `length`."""
    drawn = ((*rng.choice(NOUNS, 3), rng.choice(VERBS)) for _ in range(length // 4 + 20))
    return "".join(f"The {a} of the {b} {verb} the {c}. " for a, b, c, verb in drawn)
