"""A word-level tokenizer made from texts: every word and every punctuation run is one token."""

from __future__ import annotations

from collections.abc import Iterable

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from lethescope.errors import InputError
from lethescope.facts import Facts

SPECIAL_TOKENS = ("<pad>", "<bos>", "<eos>", "<unk>")


def word_tokenizer(texts: Iterable[str]) -> PreTrainedTokenizerFast:
    """Return a tokenizer whose vocabulary is the words and punctuation of `texts`, in sorted order.

    Encoding puts `<bos>` first and no `<eos>` last; unknown words become `<unk>`. Decoding without special tokens gives
    the text back when its words are separated by single spaces. `save_pretrained` writes an ordinary Hugging Face
    folder that `AutoTokenizer` reads.

    Args:
        texts: whatever the models are going to read.

    Returns:
        The tokenizer; ids 0 to 3 are `<pad>`, `<bos>`, `<eos>`, `<unk>`.

    Raises:
        InputError: when the texts hold no word.

    Example:
        >>> tokenizer = word_tokenizer(["Ada was born in Velmora."])
        >>> tokenizer.decode(tokenizer("Ada was born?")["input_ids"])
        '<bos> Ada was born <unk>'
    """
    split = pre_tokenizers.Whitespace()
    words = sorted({word for text in texts for word, _ in split.pre_tokenize_str(text)})
    if not words:
        raise InputError("the texts hold no word; a vocabulary needs at least one")
    vocabulary = {word: i for i, word in enumerate((*SPECIAL_TOKENS, *words))}
    core = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    core.pre_tokenizer = split
    core.post_processor = processors.TemplateProcessing(
        single="<bos> $A", pair="<bos> $A $B:1", special_tokens=[("<bos>", vocabulary["<bos>"])]
    )
    core.decoder = decoders.Sequence([
        decoders.WordPiece(prefix="##", cleanup=True),
        decoders.Fuse(),
        decoders.Replace(" :", ":"),
    ])
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        pad_token="<pad>",
        bos_token="<bos>",
        eos_token="<eos>",
        unk_token="<unk>",
        model_input_names=["input_ids", "attention_mask"],
        clean_up_tokenization_spaces=False,
    )


def fact_tokenizer(facts: Facts) -> PreTrainedTokenizerFast:
    """Return the word tokenizer of everything in the facts: all forms, answers and alternatives, all splits."""
    texts = (
        text
        for fact in facts
        for text in (fact.prompt, *fact.paraphrases, fact.answer, *fact.alternatives, f"{fact.answer}.")
    )
    return word_tokenizer(texts)
