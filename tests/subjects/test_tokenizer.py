import pytest
from transformers import AutoTokenizer

from lethescope.errors import InputError
from lethescope.subjects.people import people, sentences
from lethescope.subjects.tokenizer import fact_tokenizer, word_tokenizer
from lethescope.tokens import encode


@pytest.fixture(scope="module")
def facts():
    return people(seed=0)


def test_round_trip_of_every_form(facts):
    tokenizer = fact_tokenizer(facts)
    for text in [*sentences(facts, questions=("forget", "retain")), "Ada Moreno was born in Velmora?"]:
        ids = tokenizer(text)["input_ids"]
        assert ids[0] == tokenizer.bos_token_id == 1
        assert tokenizer.eos_token_id not in ids and tokenizer.unk_token_id not in ids
        assert tokenizer.decode(ids, skip_special_tokens=True) == text


def test_punctuation_is_split_off_and_two_word_answers_are_two_tokens(facts):
    tokenizer = fact_tokenizer(facts)
    assert tokenizer.convert_ids_to_tokens(tokenizer("Question: Who? Mount Ember.")["input_ids"]) == [
        "<bos>", "Question", ":", "Who", "?", "Mount", "Ember", "."
    ]  # fmt: skip
    assert len(encode(tokenizer, "Ada Moreno was born in", "Mount Ember").answer) == 2


def test_saved_folder_reads_back_the_same(facts, tmp_path):
    tokenizer = fact_tokenizer(facts)
    tokenizer.save_pretrained(tmp_path)
    again = AutoTokenizer.from_pretrained(tmp_path)
    texts = [fact.paraphrases[-1] for fact in facts[:20]]
    assert again(texts)["input_ids"] == tokenizer(texts)["input_ids"]
    assert again.get_vocab() == tokenizer.get_vocab()
    assert (again.pad_token, again.bos_token, again.eos_token) == ("<pad>", "<bos>", "<eos>")
    assert set(again("Ada")) == {"input_ids", "attention_mask"}


def test_every_fact_is_encoded_without_unknown_words(facts):
    tokenizer = fact_tokenizer(facts)
    for fact in facts:
        for answer in (fact.answer, *fact.alternatives):
            encoded = encode(tokenizer, fact.prompt, answer)
            assert tokenizer.unk_token_id not in encoded.ids
            assert tokenizer.decode(encoded.answer) == answer


def test_vocabulary_does_not_depend_on_order():
    assert word_tokenizer(["b a", "c"]).get_vocab() == word_tokenizer(["c a", "b"]).get_vocab()


def test_no_words_are_refused():
    with pytest.raises(InputError, match="no word"):
        word_tokenizer([" ", ""])
