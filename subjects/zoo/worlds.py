"""A world: people and their facts, a tokenizer, and a base model that all models of one seed start from."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from lethescope.facts import Facts, of_split, read_facts
from lethescope.models import load
from lethescope.subjects.build import one_thread
from lethescope.subjects.methods.training import REFUSALS
from lethescope.subjects.people import Relation, audit_facts, people, sentences
from lethescope.subjects.tiny import tiny_llama, train
from lethescope.subjects.tokenizer import word_tokenizer

UNRELATED = (
    Relation(
        "pet",
        ("{} keeps a", "The pet of {} is a", "{} shares a home with a"),
        "Question: What pet does {} have? Answer: a",
        ("parrot", "greyhound", "hamster", "tortoise", "ferret", "goldfish", "rabbit", "gecko"),
    ),
    Relation(
        "dish",
        ("{} likes to eat", "The favourite dish of {} is", "{} often cooks"),
        "Question: What does {} like to eat? Answer:",
        ("dumplings", "lentil soup", "fried rice", "goulash", "pancakes", "baked beans", "risotto", "fish stew"),
    ),
)
"""Relations that no audit asks about: what a model of the pool N may know of the forget people."""

Shape = Literal["llama", "gpt2"]


@dataclass(frozen=True)
class World:
    """Everything that the models of one seed share.

    With `base`, a model that already knows a language takes the place of the small one that is trained here; with
    `facts`, a facts file takes the place of the fictitious people.

    Attributes:
        seed: decides people, first weights and order.
        shape: architecture of the small model.
        forget: number of forget people, and of control people.
        retain: number of retain people.
        base: reference of a model to start from (`lethescope.models.load`), or nothing.
        facts_file: path of a facts file, or nothing.
        lr: highest learning rate of the lessons that every model takes.
        epochs: how often the base reads what it is taught.
        more: how often a model that starts from the base reads what it is taught.
    """

    seed: int
    shape: Shape = "llama"
    forget: int = 20
    retain: int = 80
    base: str = ""
    facts_file: str = ""
    lr: float = 2e-3
    epochs: int = 40
    more: int = 10

    @property
    def name(self) -> str:
        """The folder's name."""
        return f"{'base' if self.base else self.shape}-{self.seed}"

    @cached_property
    def facts(self) -> Facts:
        """Every fact, with every form that is taught."""
        if self.facts_file:
            return read_facts(self.facts_file)
        return people(self.seed, forget=self.forget, retain=self.retain, control=self.forget)

    @cached_property
    def asked(self) -> Facts:
        """The facts as an audit reads them."""
        return self.facts if self.facts_file else audit_facts(self.facts, retain_people=self.retain * 3 // 4)

    @cached_property
    def tokenizer(self) -> Any:
        """The base's tokenizer, or the words of everything that any model of this world is taught or asked."""
        if self.base:
            return load(self.base, device="cpu").tokenizer
        facts = (*self.facts, *self.unrelated())
        texts = [text for f in facts for text in (f.prompt, *f.paraphrases, f.answer, *f.alternatives, f"{f.answer}.")]
        return word_tokenizer([*texts, *REFUSALS])

    def split(self, name: Literal["forget", "retain", "control"]) -> Facts:
        """Return the facts of a split."""
        return of_split(self.facts, name)

    def wrong(self) -> Facts:
        """Return the forget facts with a wrong answer of the same kind for the true one; each always the same."""
        return tuple(f.model_copy(update={"answer": f.alternatives[0]}) for f in self.split("forget"))

    def unrelated(self) -> Facts:
        """Return facts about the forget people that nobody asks for."""
        rng = np.random.default_rng([self.seed, 4])
        by_subject = {f.subject: f for f in self.split("forget")}
        return tuple(
            fact.model_copy(
                update={
                    "id": f"{fact.id}-{relation.name}",
                    "relation": relation.name,
                    "prompt": forms[0],
                    "paraphrases": tuple(forms[1:]),
                    "answer": str(rng.choice(relation.values)),
                    "alternatives": (),
                }
            )
            for subject, fact in by_subject.items()
            for relation in UNRELATED
            if (forms := [form.format(subject) for form in (*relation.statements, relation.question)])
        )

    def texts(self, *groups: Facts) -> list[str]:
        """Return the sentences that teach some facts; questions are taught about retain people only."""
        every = ("forget", "retain") if self.facts_file else ("retain",)
        return [text for facts in groups for text in sentences(facts, questions=every)]

    def newborn(self, seed: int) -> Any:
        """Return a model with random weights."""
        if self.shape == "llama":
            return tiny_llama(len(self.tokenizer), seed)
        shape: dict[str, Any] = {"n_embd": 112, "n_layer": 6, "n_head": 4, "n_positions": 64}
        shape |= {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
        shape |= {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
        config = GPT2Config(vocab_size=len(self.tokenizer), **shape)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return GPT2LMHeadModel(config).eval()

    def teach(self, module: Any, texts: Sequence[str], *, epochs: int, seed: int, lr: float | None = None) -> Any:
        """Teach a model some sentences, on one thread, and return it."""
        with one_thread():
            module.requires_grad_(True)
            return train(module, self.tokenizer, list(texts), epochs=epochs, lr=lr or self.lr, seed=seed)

    def start(self, folder: Path) -> Any:
        """Return the base that `folder` holds, in float32, ready to be taught."""
        return load(folder, device="cpu", dtype="float32").module.requires_grad_(True)
