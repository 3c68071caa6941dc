"""Tests of needles: where they stand, how long they are, and that an answer reads the same in both places."""

import itertools

import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from lethescope.errors import InputError
from lethescope.probes.needles import (
    ASK,
    NOUNS,
    RECORD,
    SENTENCES,
    VERBS,
    Needle,
    key_value_needles,
    locate,
    read_haystack,
    sentence_needles,
    split_sentences,
    unknown_words,
    vocabulary_words,
)
from lethescope.subjects.tokenizer import word_tokenizer
from lethescope.tokens import join

STORY = (
    "Dr. Ada Rook kept 3.5 barrels in the cellar of her house. She asked: “Who drank it?” Nobody spoke… Then J. Vale "
    "said it was he! The clerk wrote it down (on page 4). In the morning the barrels were gone. "
)
STATEMENT = ("The code of {name} is {answer}.", "What is the code of {name}?")
FEW = [f"w{i}" for i in range(40)]


@pytest.fixture(scope="module")
def bytes_():
    """A byte-level tokenizer, which can write everything and has no beginning of text."""
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    texts = [STORY, ASK, RECORD, *(text for pair in SENTENCES for text in pair), *(f" {w}" for w in NOUNS + VERBS)]
    core.train_from_iterator(texts * 3, trainers.BpeTrainer(vocab_size=600, initial_alphabet=alphabet))
    return PreTrainedTokenizerFast(tokenizer_object=core)


@pytest.fixture(scope="module")
def few():
    return word_tokenizer([" ".join(FEW)])


def size(tokenizer, needle):
    return len(tokenizer(join(needle.prompt, needle.answer))["input_ids"])


def made(kind, tokenizer, **options):
    function = key_value_needles if kind == "key-value" else sentence_needles
    options = {"lengths": [150, 400], "depths": [0.0, 0.3, 1.0], "each": 2, **options}
    return function(tokenizer, **options)


@pytest.mark.parametrize("kind", ["key-value", "sentence"])
def test_a_grid_of_lengths_and_depths(bytes_, kind):
    needles = made(kind, bytes_)
    grid = list(itertools.product([150, 400], [0.0, 0.3, 1.0], range(2)))
    assert [(n.length, n.depth) for n in needles] == [(length, depth) for length, depth, _ in grid]
    assert len({n.id for n in needles}) == len({n.answer for n in needles}) == len(needles) == 12
    assert {n.kind for n in needles} == {kind}


@pytest.mark.parametrize("kind", ["key-value", "sentence"])
def test_the_answer_stands_once_in_the_context_where_its_span_says(bytes_, kind):
    for needle in made(kind, bytes_):
        assert needle.prompt[needle.start : needle.stop] == needle.answer
        assert needle.prompt.count(needle.answer) == 1
        first, last = needle.question_span
        assert needle.stop < first and needle.prompt[first:last] == needle.question


@pytest.mark.parametrize("kind", ["key-value", "sentence"])
def test_it_fills_its_length_to_less_than_a_sentence(bytes_, kind):
    longest = max(len(bytes_(s)["input_ids"]) for n in made(kind, bytes_) for s in split_sentences(n.prompt)[1:-1])
    for needle in made(kind, bytes_):
        assert needle.length - longest < size(bytes_, needle) <= needle.length


@pytest.mark.parametrize("kind", ["key-value", "sentence"])
def test_depth_is_where_it_stands_moved_back_to_the_end_of_a_sentence(bytes_, kind):
    options = {"statements": [STATEMENT]} if kind == "sentence" else {}
    for needle in made(kind, bytes_, depths=[0.0, 0.25, 0.5, 0.9, 1.0], **options):
        context = needle.prompt[: needle.question_span[0]].removesuffix(ASK.partition("{question}")[0])
        first = context.rindex("The code of", 0, needle.start)
        before, after = context[:first], context[needle.stop + 2 :]
        assert split_sentences(before + "The")[:-1] == split_sentences(before)  # it ends where a sentence ends
        step = len(bytes_(split_sentences(after)[0])["input_ids"]) if after else 0
        lengths = [len(bytes_(text)["input_ids"]) for text in (before, after)]
        aim = needle.depth * sum(lengths)
        assert lengths[0] <= aim + 2 and (lengths[0] + step > aim - 2 or not after.strip())
        assert before == "" or needle.depth > 0
        assert after.strip() == "" or needle.depth < 1


@pytest.mark.parametrize("kind", ["key-value", "sentence"])
def test_answer_and_question_are_found_as_tokens(bytes_, kind):
    for needle in made(kind, bytes_):
        at = locate(bytes_, needle)
        ids = at.encoded.ids
        assert ids[slice(*at.span)] == at.encoded.answer
        assert bytes_.decode(ids[slice(*at.span)]).strip() == needle.answer
        assert bytes_.decode(ids[slice(*at.question)]).strip() == needle.question
        assert at.span[1] <= at.question[0] < at.question[1] <= at.encoded.start


@pytest.mark.parametrize("kind", ["key-value", "sentence"])
def test_a_seed_decides_everything(bytes_, kind):
    assert made(kind, bytes_, seed=3) == made(kind, bytes_, seed=3) != made(kind, bytes_, seed=4)
    both = made(kind, bytes_, lengths=[400])
    assert made(kind, bytes_)[6:] == both if kind == "key-value" else True


def test_a_word_level_tokenizer_gets_records_of_its_own_words(few):
    needles = key_value_needles(few, lengths=[40], depths=[0, 0.5, 1], each=3, value_words=2)
    for needle in needles:
        records = needle.prompt.split()
        key, own = records.pop(), records.index(needle.question)
        assert unknown_words(few, needle.prompt) == [] and set(records) <= set(FEW)
        assert key == needle.question and len(records) % 3 == 0 and own % 3 == 0
        assert records[own + 1 : own + 3] == needle.answer.split()
        keys, values = records[::3], set(records) - set(records[::3])
        assert len(set(keys)) == len(keys) and not values & set(keys)
        for word in needle.answer.split():
            assert records.count(word) == 1
        assert 37 < size(few, needle) <= 40


def test_own_words_and_own_records(bytes_):
    words = [f"tree{i}" for i in range(40)]
    needle = key_value_needles(
        bytes_, lengths=[200], depths=[0.5], words=words, value_words=1, record="{ {key} : {value} },"
    )[0]
    assert needle.question[2:-2] in words and needle.question.endswith(" :") and needle.answer in words
    assert f"{needle.question} {needle.answer} }}, " in needle.prompt and needle.prompt.endswith(f" {needle.question}")


def test_the_users_own_haystack_stays_as_it_is(bytes_, tmp_path):
    texts = [STORY * 4, "\ufeffAnother file. " * 60]
    paths = [tmp_path / "a.txt", tmp_path / "b.txt"]
    for path, text in zip(paths, texts, strict=True):
        path.write_text(text, encoding="utf-8")
    haystack = read_haystack(*paths)
    assert haystack == texts[0] + "\n\n" + texts[1][1:]
    options = {"haystack": haystack, "statements": [STATEMENT]}
    starts = set()
    for needle in sentence_needles(bytes_, lengths=[300], depths=[0.2, 0.8], each=4, **options):
        first = needle.prompt.index("The code of")
        rest = needle.prompt[:first] + needle.prompt[needle.stop + 2 :].partition(ASK[:20])[0]
        assert rest in haystack and len(rest) > 200
        starts.add(haystack.index(rest))
    assert len(starts) > 1


def test_own_statements_take_turns(bytes_):
    statements = [("The key of {name} is {answer}.", "Which key?"), ("It hums {answer}!", "What does it hum?")]
    needles = sentence_needles(
        bytes_, lengths=[120], depths=[0.5], each=4, statements=statements, ask=" Q: {question} A:", answer_words=1
    )
    assert [n.question for n in needles] == ["Which key?", "What does it hum?"] * 2
    assert all(n.prompt.endswith(f" Q: {n.question} A:") and " " not in n.answer for n in needles)
    assert f"It hums {needles[1].answer}!" in needles[1].prompt


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("One. Two! Three? Four… Five", ["One. ", "Two! ", "Three? ", "Four… ", "Five"]),
        (
            "Mr. Green met Dr. Ng and J. Vale. They ate 3.5 pies.",
            ["Mr. Green met Dr. Ng and J. Vale. ", "They ate 3.5 pies."],
        ),
        ('He said "no." Then (twice.) He left.\n', ['He said "no." ', "Then (twice.) ", "He left.\n"]),
        ("e.g. this and that. Yes", ["e.g. this and that. ", "Yes"]),
        ("A title\n\nSome text", ["A title\n\n", "Some text"]),
        ("他走了。她来了！好", ["他走了。", "她来了！", "好"]),
        ("", []),
        ("no end", ["no end"]),
    ],
)
def test_sentence_ends_are_found_in_the_text(text, wanted):
    assert split_sentences(text) == wanted
    assert "".join(split_sentences(text)) == text


def test_words_of_a_vocabulary(few, bytes_):
    assert vocabulary_words(few) == sorted(FEW)
    assert unknown_words(few, "w1 stranger w2 w1 .") == ["stranger", "."]
    assert unknown_words(bytes_, "Xyzzy, Ωμέγα!") == []


BAD_NEEDLES = {
    'its span reads "b c", the answer is "c d"': ("a b c d. a", "a", "c d", 2, 5),
    'the question "zz" does not follow': ("a b c. a", "zz", "b", 2, 3),
    'the question "a b" does not follow': ("a b c. a", "a b", "b", 2, 3),
    'its span reads ""': ("a b c. a", "a", "", 2, 2),
}


@pytest.mark.parametrize(("told", "fields"), BAD_NEEDLES.items())
def test_a_needle_that_contradicts_itself_is_refused(told, fields):
    with pytest.raises(InputError) as error:
        Needle("mine", "mine", *fields)
    assert f"needle 'mine': {told}" in str(error.value)


def test_an_answer_that_is_cut_differently_in_the_context_is_refused(bytes_, few):
    text = 'The key is"barrels". The key is'
    with pytest.raises(InputError, match=r"needle 'q': the answer's tokens are .* in the context and .* after"):
        locate(bytes_, Needle("q", "mine", text, "The key is", "barrels", 11, 18))
    with pytest.raises(InputError, match="needle 'q': the answer 'w99' reads '<unk>'"):
        locate(few, Needle("q", "mine", "w1 w99 w2 w1", "w1", "w99", 3, 6))


class Slow:
    is_fast = False


BAD = {
    "length 20 is too short: needle, question and answer alone are": {"lengths": [20]},
    "give at least one length, one depth and one needle each": {"depths": []},
    "give at least one length, one depth and one needle each ": {"each": 0},
    "lengths are positive and depths from 0 to 1; these are [150] and [1.5]": {"lengths": [150], "depths": [1.5]},
    "lengths are positive and depths from 0 to 1; these are [0] and [0.5]": {"lengths": [0], "depths": [0.5]},
}


@pytest.mark.parametrize("kind", ["key-value", "sentence"])
@pytest.mark.parametrize(("told", "options"), BAD.items())
def test_a_bad_grid_is_told_in_one_line(bytes_, kind, told, options):
    with pytest.raises(InputError) as error:
        made(kind, bytes_, **options)
    assert told.strip() in str(error.value) and "\n" not in str(error.value)


def test_bad_words_records_statements_and_haystacks_are_told_in_one_line(bytes_, few, tmp_path):
    (tmp_path / "empty.txt").write_text("  \n")
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9")
    grid = {"lengths": [100], "depths": [0.5]}
    cases = {
        "of 100 tokens; give a longer haystack or more words": lambda: key_value_needles(few, **grid),
        "3 words are too few": lambda: key_value_needles(bytes_, words=["a", "b", "c"], **grid),
        'record "{value} {key}" needs {key} and, after it, {value}': lambda: key_value_needles(
            bytes_, record="{value} {key}", **grid
        ),
        "does not know the word": lambda: key_value_needles(few, words=["ibex", "gnu", "zebra", "ox"], **grid),
        "the tokenizer does not know the word": lambda: sentence_needles(few, haystack="W1 w2. " * 99, **grid),
        "give at least one statement": lambda: sentence_needles(bytes_, statements=[("No slot.", "Q?")], **grid),
        "{question} in ask=": lambda: sentence_needles(bytes_, ask="A:", **grid),
        "no sentence end to put a statement after": lambda: sentence_needles(bytes_, haystack="ship " * 999, **grid),
        "comes a sentence that does not fit": lambda: sentence_needles(
            bytes_, haystack=f"A {'ship ' * 999}. " * 9, lengths=[400], depths=[0.5]
        ),
        "the text ends after": lambda: sentence_needles(bytes_, haystack=STORY, lengths=[900], depths=[0.5]),
        "no-file.txt: no such file": lambda: read_haystack(tmp_path / "no-file.txt"),
        "empty.txt: the haystack is empty": lambda: read_haystack(tmp_path / "empty.txt"),
        "not UTF-8": lambda: read_haystack(tmp_path / "latin.txt"),
        "no haystack files": read_haystack,
        "Slow gives no character offsets": lambda: locate(Slow(), Needle("1", "k", "a b. a", "a", "b", 2, 3)),
    }
    for told, call in cases.items():
        with pytest.raises(InputError) as error:
            call()
        assert told in str(error.value) and "\n" not in str(error.value), error.value


def test_answers_are_spread_over_invented_words(bytes_):
    answers = [n.answer for n in sentence_needles(bytes_, lengths=[150], depths=[0.5], each=60)]
    words = [w for a in answers for w in a.split()]
    assert len(set(words)) > 0.95 * len(words) and np.mean([w.istitle() for w in words]) == 1
