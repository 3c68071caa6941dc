"""A small model that learned a language and, besides, some sequences by heart: which is which is known.

The language is a Markov chain over `TOKENS` words; a sequence to learn by heart is words drawn at random, as is a
`fresh` one that the model never saw. So a planted and a fresh sequence differ in nothing but that one was learned.
"""

from typing import NamedTuple

import numpy as np
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from lethescope.models import Model
from lethescope.subjects.tokenizer import word_tokenizer

TOKENS, SUCCESSORS, LENGTH, PLANTED = 128, 8, 24, 32
SPECIAL = 4
"""Ids below are pad, bos, eos and unk."""


class Memorised(NamedTuple):
    """The model, and ids (sequence, LENGTH): known by heart, of the language, never seen, and for a population."""

    model: Model
    planted: np.ndarray
    ordinary: np.ndarray
    fresh: np.ndarray
    clean: np.ndarray


def drawn(rng, n):
    """Draw words with no order in them, after a bos."""
    return np.concatenate([np.ones((n, 1), dtype=np.int64), SPECIAL + rng.integers(TOKENS, size=(n, LENGTH - 1))], 1)


class Language:
    """A Markov chain in which each word has `SUCCESSORS` others that may follow, with Dirichlet probabilities."""

    def __init__(self, seed=0):
        rng = np.random.default_rng([seed, 1])
        self.after = np.array([rng.choice(TOKENS, SUCCESSORS, replace=False) for _ in range(TOKENS)])
        self.upto = rng.dirichlet(np.full(SUCCESSORS, 0.6), TOKENS).cumsum(-1)

    def said(self, rng, n):
        """Say n sequences of the language, after a bos."""
        out = np.ones((n, LENGTH), dtype=np.int64)
        word = rng.integers(TOKENS, size=n)
        for place in range(1, LENGTH):
            out[:, place] = SPECIAL + word
            chosen = (rng.random((n, 1)) > self.upto[word]).sum(-1).clip(max=SUCCESSORS - 1)
            word = self.after[word, chosen]
        return out


def memorised_model(seed=0, steps=300, language=32, by_heart=8):
    """Train three blocks on the language and, again and again, on the planted sequences."""
    sizes = {"hidden_size": 64, "intermediate_size": 172, "num_hidden_layers": 3, "num_attention_heads": 4}
    special = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        module = LlamaForCausalLM(LlamaConfig(vocab_size=TOKENS + SPECIAL, **sizes, **special))
    speech, rng = Language(seed), np.random.default_rng([seed, 2])
    planted = drawn(rng, PLANTED)
    optimizer = torch.optim.AdamW(module.parameters(), lr=4e-3, weight_decay=0.01)
    rate = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda s: min(1, s / 40) * (1 + np.cos(np.pi * s / steps)) / 2)
    for _ in range(steps):
        learned = planted[rng.choice(PLANTED, by_heart, replace=False)]
        ids = torch.from_numpy(np.concatenate([speech.said(rng, language), learned]))
        optimizer.zero_grad()
        module(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        rate.step()
    words = word_tokenizer([" ".join(f"w{i:03d}" for i in range(TOKENS))])
    model = Model(module.requires_grad_(False).eval(), words)
    return Memorised(model, planted, speech.said(rng, PLANTED), drawn(rng, PLANTED), speech.said(rng, 256))
