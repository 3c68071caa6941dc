"""Tests of tokenising prompts with answers and of padding them."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import ByteLevelBPETokenizer, normalizers
from transformers import PreTrainedTokenizerFast

from lethescope.errors import InputError
from lethescope.subjects.tokenizer import word_tokenizer
from lethescope.tokens import Encoded, collate, encode, join, pad_id


@pytest.fixture(scope="module")
def bytes_() -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer with merges over spaces, and without any special token."""
    core = ByteLevelBPETokenizer()
    core.train_from_iterator(["The capital of France is Paris. Paris, Paris! New York (NY)"] * 4, vocab_size=330)
    return PreTrainedTokenizerFast(tokenizer_object=core._tokenizer)


class Slow:
    """The word tokenizer without offsets, as a tokenizer written in Python is."""

    is_fast = False

    def __init__(self, inner: Any) -> None:
        self.inner = inner
        self.decode = inner.decode

    def __call__(self, text: str) -> dict[str, Any]:
        return {"input_ids": self.inner(text)["input_ids"]}


@pytest.mark.parametrize(
    ("prompt", "answer", "text"),
    [("a", "b", "a b"), ("a ", "b", "a b"), ("a", " b", "a b"), ("a\n", "b", "a\nb"), ("", "b", " b")],
)
def test_one_space_is_put_between_unless_there_is_white_space(prompt: str, answer: str, text: str) -> None:
    assert join(prompt, answer) == text


def test_the_answer_starts_after_the_prompt(words: Any) -> None:
    e = encode(words, "Ada Rook was born in", "Grand Solace")
    assert words.convert_ids_to_tokens(list(e.ids)) == ["<bos>", "Ada", "Rook", "was", "born", "in", "Grand", "Solace"]
    assert e.start == 6 and words.decode(e.answer) == "Grand Solace"
    assert e.prefix + e.tail == e.ids[:-1]
    assert words.convert_ids_to_tokens(list(e.tail)) == ["in", "Grand"]


def test_a_tokenizer_without_offsets_gives_the_same(words: Any, some_facts: Any) -> None:
    for fact in some_facts[:8]:
        assert encode(Slow(words), fact.prompt, fact.answer) == encode(words, fact.prompt, fact.answer)


@given(prompt=st.text("abc Paris.\n(é日", min_size=1), answer=st.text("abNew York.)é日", min_size=1))
def test_bytes_the_answers_tokens_say_the_answer(bytes_: Any, prompt: str, answer: str) -> None:
    if not answer.strip():
        return
    text = join(prompt, answer)
    e = encode(bytes_, prompt, answer)
    assert list(e.ids) == bytes_(text)["input_ids"]
    spans = bytes_(text, return_offsets_mapping=True)["offset_mapping"]
    first = len(text) - len(answer.lstrip())
    assert spans[e.start][1] > first and all(end <= first for _, end in spans[: e.start])


def test_bad_answers_and_prompts_are_told_apart(words: Any, bytes_: Any) -> None:
    silent = word_tokenizer(["Ada was born in Velmora"])
    silent.backend_tokenizer.normalizer = normalizers.Replace("\u200b", "")
    with pytest.raises(InputError, match="tokenises to nothing; give an answer"):
        encode(silent, "Ada was born in", "\u200b")
    with pytest.raises(InputError, match="tokenises to nothing; give an answer"):
        encode(words, "Ada was born in", "  ")
    with pytest.raises(InputError, match="reads '<unk>' after tokenising"):
        encode(words, "Ada Rook was born in", "Atlantis")
    with pytest.raises(InputError, match="the prompt '' tokenises to nothing"):
        encode(bytes_, "", "Paris")


def test_answer_marks_and_positions_survive_padding_on_both_sides() -> None:
    encoded = [Encoded((1, 5, 6, 7), 2), Encoded((1, 8), 1), Encoded((9, 8, 7, 6, 5, 4), 5)]
    for side in ("left", "right"):
        batch = collate(encoded, 0, side=side)  # type: ignore[arg-type]
        assert batch.input_ids.shape == (3, 6)
        for row, e in enumerate(encoded):
            real = batch.attention_mask[row].bool()
            assert batch.input_ids[row][real].tolist() == list(e.ids)
            assert batch.input_ids[row][batch.answer_mask[row]].tolist() == list(e.answer)
            assert batch.position_ids[row][real].tolist() == list(range(len(e.ids)))
            assert (batch.input_ids[row][~real] == 0).all()
        edge = 0 if side == "left" else -1
        assert batch.attention_mask[:, edge].tolist() == [0, 0, 1]
        assert set(batch.inputs()) == {"input_ids", "attention_mask", "position_ids"}
        assert all(t.dtype == torch.long for t in batch.inputs().values())


def test_any_special_token_will_do_for_padding() -> None:
    assert pad_id(SimpleNamespace(pad_token_id=3, eos_token_id=4)) == 3
    assert pad_id(SimpleNamespace(pad_token_id=None, eos_token_id=4)) == 4
    assert pad_id(SimpleNamespace()) == 0
