"""What many tests share: small facts, a word tokenizer, and small random models of three architectures."""

import runpy
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    GPTNeoXConfig,
    LlamaConfig,
    PretrainedConfig,
    PreTrainedTokenizerFast,
)

from lethescope.facts import SPLITS, Fact, Facts
from lethescope.models import Model
from lethescope.subjects.tokenizer import fact_tokenizer

KINDS = ("llama", "gpt2", "neox")
ANSWERS = {
    "birthplace": ("Velmora", "Grand Solace", "Karvost", "Lake Orsin"),
    "profession": ("surgeon", "wine merchant", "translator", "night nurse"),
}
PROMPTS = {
    "birthplace": ("{} was born in", "The birthplace of {} is", "Question: Where was {} born? Answer:"),
    "profession": ("{} works as a", "The profession of {} is", "Question: What does {} do all day? Answer:"),
}
FIRST = ("Ada", "Ben", "Cleo", "Dov", "Elif", "Finn")
LAST = {"forget": ("Rook",), "retain": ("Vale", "Quist", "Marn"), "control": ("Stray",)}


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> None:
    # two threads on two busy cores wait for each other: the same tests took a hundred times as long
    torch.set_num_threads(1)


def people_facts() -> Facts:
    """Two facts on each of 6 forget, 18 retain and 6 control people; half of the answers have two words."""
    people = [(s, f"{f} {last}") for s in SPLITS for last in LAST[s] for f in FIRST]
    return tuple(
        Fact(
            id=f"{split}-{i}-{relation}",
            split=split,
            subject=name,
            prompt=PROMPTS[relation][0].format(name),
            answer=answers[(i + i // 4) % 4],
            alternatives=tuple(a for k, a in enumerate(answers) if k != (i + i // 4) % 4),
            paraphrases=tuple(form.format(name) for form in PROMPTS[relation][1:]),
            relation=relation,
        )
        for i, (split, name) in enumerate(people)
        for relation, answers in ANSWERS.items()
    )


def small_config(kind: str, vocabulary: int) -> PretrainedConfig:
    """The configuration of a random model: width 32; wide weights, so that the logits are not flat."""
    common: dict[str, Any] = {"vocab_size": vocabulary, "initializer_range": 0.2}
    common |= {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    wide: dict[str, Any] = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_attention_heads": 4,
        "max_position_embeddings": 64,
    }
    if kind == "llama":
        return LlamaConfig(**wide, num_hidden_layers=4, num_key_value_heads=2, **common)
    if kind == "gpt2":
        none: dict[str, Any] = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
        return GPT2Config(n_embd=32, n_layer=3, n_head=4, n_positions=64, **none, **common)
    return GPTNeoXConfig(**wide, num_hidden_layers=3, **common)


@pytest.fixture(scope="session")
def some_facts() -> Facts:
    """Facts on invented people: 12 forget, 36 retain, 12 control."""
    return people_facts()


@pytest.fixture(scope="session")
def words(some_facts: Facts) -> PreTrainedTokenizerFast:
    """The word tokenizer of `some_facts`."""
    return fact_tokenizer(some_facts)


@pytest.fixture(scope="session")
def make_model(words: PreTrainedTokenizerFast) -> Callable[..., Model]:
    """Make a fresh random model of a kind in `KINDS`: `make_model(kind="llama", seed=0, role="original")`."""

    def make(kind: str = "llama", seed: int = 0, role: str = "original") -> Model:
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            module = AutoModelForCausalLM.from_config(small_config(kind, len(words)))
        return Model(module.requires_grad_(False).eval(), words, role)

    return make


@pytest.fixture(scope="session")
def known_head() -> Model:
    """A trained model in which one head reads from the context (`known_head.py`); seconds to train, so once."""
    made = runpy.run_path(str(Path(__file__).with_name("known_head.py")))
    return cast(Model, made["known_head_model"]())
