"""Tests of a prompt's words: what is one, and what is left without some."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lethescope.facts import Fact
from lethescope.probes.prompt_words import words
from lethescope.subjects.tokenizer import fact_tokenizer

CHAT = "<|im_start|>user\nWhere was Ada born?<|im_end|>\n<|im_start|>assistant\n"


@pytest.fixture(scope="module")
def chat():
    prompt = "user Where was Ada born? assistant"
    tokenizer = fact_tokenizer((Fact(id="x", split="forget", subject="Ada", prompt=prompt, answer="Rome"),))
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    return tokenizer


def test_special_tokens_and_roles_are_no_words_and_stay(chat):
    cut = words(CHAT, chat)
    assert cut.texts == ("Where", "was", "Ada", "born?")
    assert cut.without([0]) == CHAT.replace("Where ", "")
    assert cut.without([3]) == CHAT.replace(" born?", "")
    assert cut.without([0, 1, 2, 3]) == CHAT.replace("Where was Ada born?", "")
    assert words("<|im_start|>users meet<|im_end|>", chat).texts == ("users", "meet")
    assert words(CHAT).texts == tuple(CHAT.split())


def test_a_word_is_deleted_with_the_white_space_before_it_and_a_first_one_with_that_after_it():
    cut = words("Question: Where  was Ada?\nAnswer: ")
    assert cut.without([1]) == "Question:  was Ada?\nAnswer: "
    assert cut.without([0]) == "Where  was Ada?\nAnswer: "
    assert cut.without([4]) == "Question: Where  was Ada? "
    assert cut.without([]) == cut.prompt


@given(text=st.text(alphabet="ab,. \n\t", max_size=20), gone=st.sets(st.integers(0, 9)))
def test_what_is_left_is_what_was_not_taken_away(text, gone):
    cut = words(text)
    assert cut.texts == tuple(text.split())
    left = cut.without(gone)
    assert left.split() == [w for i, w in enumerate(text.split()) if i not in gone]
    assert cut.without([]) == text
    assert len(left) <= len(text)
