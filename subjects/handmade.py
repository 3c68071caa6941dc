"""A language model whose weights are written by hand: block 1 stores facts, and in a twin block 3 blocks them.

Everything about these models is known on paper, so an instrument that points at another block is wrong.

The algebra. The residual stream has one axis per token: the embedding of token t is the unit vector e_t, attention
writes nothing, and the unembedding is the identity. With d axes, RMSNorm turns x into sqrt(d) x / |x|. Each block holds
the same detectors, one neuron for each taught subject s: gate and up both read the axis e_s with weight
`GAIN / sqrt(d)`, so the neuron is `h = SiLU(a) a` with `a = GAIN x_s / |x|`, and exactly 0 where s is not named. Blocks
differ in their down matrix only, that is, in what a neuron writes:

- block 1: `+ STRENGTH / h(GAIN) e_answer`. Its input is e_s, so a = GAIN, and the stream becomes
  `x = e_s + STRENGTH e_answer`, of length r = sqrt(1 + STRENGTH^2).
- block 3 of the unlearned twin: `- STRENGTH / h(GAIN / r) e_answer`, for forget subjects. Its input is that x, so
  a = GAIN / r, and the stream becomes e_s again: what was stored is taken off exactly.
- all else: 0. These blocks pass the stream on.

So the logit of the answer is `sqrt(d) STRENGTH / r` where the fact is in the stream, and 0, as for every other answer,
where it is not; the subject's own logit is `sqrt(d) / r` or `sqrt(d)`.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import NamedTuple

import torch
from torch.nn import functional
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerBase

from lethescope.errors import InputError
from lethescope.facts import SPLITS, Fact, Facts, of_split
from lethescope.models import Model
from lethescope.subjects.tokenizer import fact_tokenizer
from lethescope.tokens import encode

BLOCKS = 4
STORES, BLOCKED = 1, 3
"""The block that writes the answers, and the block of the unlearned twin that takes them off."""
STRENGTH = 2.0
"""Length of what block 1 writes, where the subject's own axis has length 1."""
GAIN = 30.0
"""Input of a detector's gate when the stream is the subject alone; SiLU is nearly the identity there."""

CITIES = ("Ardmere", "Belloch", "Corvane", "Dunmoor", "Elswick", "Farholt", "Glenrith", "Hexley")


class Handmade(NamedTuple):
    """Three hand-written models and the facts that they were written for."""

    original: Model
    unlearned: Model
    never_taught: Model
    facts: Facts


def handmade(facts: Facts | None = None) -> Handmade:
    """Write the weights of an original, of an unlearned twin that blocks the facts, and of one never taught them.

    The original stores forget and retain facts in block 1. The unlearned twin has the same block 1 and takes the
    forget answers off in block 3. The never-taught twin stores the retain facts only. Control subjects are in none.
    Truth for forget facts, counting blocks from 0: a lens reads the answer in the unlearned model after blocks 1 and 2
    and not after 0 or 3; its states after blocks 1 and 2, put into the original, let it say the answer, and after
    block 3 they do not; the never-taught model shows nothing anywhere. What it does not prove: that an instrument
    works on knowledge that is spread over blocks and directions, as in a trained model.

    Args:
        facts: one fact a subject, the subject the prompt's last word, the answer one word; `lookup_facts()` by default.

    Returns:
        The models, in float32 on CPU, and the facts.

    Raises:
        InputError: a fact does not have that form, or a subject has two facts.

    Example:
        >>> made = handmade()
        >>> ids = torch.tensor([made.original.tokenizer(made.facts[0].prompt)["input_ids"]])
        >>> [m.tokenizer.decode(m.module(input_ids=ids).logits[0, -1].argmax()) for m in made[:2]]
        ['Ardmere', 'Abel']
    """
    facts = lookup_facts() if facts is None else facts
    tokenizer = fact_tokenizer(facts)
    lookup = {fact.id: _pair(tokenizer, fact) for fact in facts}
    subjects = [s for s, _ in lookup.values()]
    if len(set(subjects)) < len(subjects):
        raise InputError("a handmade model stores one fact a subject; the last words of the prompts must all differ")
    forget = dict(lookup[f.id] for f in of_split(facts, "forget"))
    retain = dict(lookup[f.id] for f in of_split(facts, "retain"))
    taught, width = forget | retain, len(tokenizer) + len(tokenizer) % 2
    r = (1 + STRENGTH**2) ** 0.5
    store = {STORES: _down(taught, taught, STRENGTH / _neuron(GAIN), width)}
    block = {BLOCKED: _down(taught, forget, -STRENGTH / _neuron(GAIN / r), width)}
    less = {STORES: _down(taught, retain, STRENGTH / _neuron(GAIN), width)}
    written = partial(_written, tokenizer, list(taught))
    return Handmade(
        Model(written(store), tokenizer, "original", "written by hand"),
        Model(written(store | block), tokenizer, "unlearned", "written by hand"),
        Model(written(less), tokenizer, "never-taught", "written by hand"),
        facts,
    )


def lookup_facts(forget: int = 24, retain: int = 24, control: int = 16) -> Facts:
    """Return facts that a handmade model can hold: each subject, one word, has its home in one of eight cities.

    The other seven cities are the alternatives. The cities go round in order, so every city has equally many subjects.

    Example:
        >>> fact = lookup_facts()[0]
        >>> fact.prompt, fact.answer
        ('home of Abel', 'Ardmere')
    """
    splits = [s for s, n in zip(SPLITS, (forget, retain, control), strict=True) for _ in range(n)]
    return tuple(
        Fact(
            id=f"{split}-{i}",
            split=split,
            subject=_name(i),
            prompt=f"home of {_name(i)}",
            answer=CITIES[i % len(CITIES)],
            alternatives=tuple(city for city in CITIES if city != CITIES[i % len(CITIES)]),
            relation="home",
        )
        for i, split in enumerate(splits)
    )


def _name(i: int) -> str:
    starts, ends = ("Ab", "Bor", "Cal", "Dov", "Ev", "Fen", "Gar", "Hol"), ("el", "in", "or", "us", "a", "ette", "ick")
    series = "" if i < 56 else str(i // 56)
    return starts[i % 8] + ends[i // 8 % 7] + series


def _pair(tokenizer: PreTrainedTokenizerBase, fact: Fact) -> tuple[int, int]:
    """Return the token of the subject and of the answer.

    Raises:
        InputError: the answer is not one word, or the prompt's last word is not the subject.
    """
    coded = encode(tokenizer, fact.prompt, fact.answer)
    if len(coded.answer) != 1 or tokenizer.decode(coded.ids[coded.start - 1]) != fact.subject:
        raise InputError(
            f"fact {fact.id!r}: a handmade model needs a prompt that ends in the subject and one answer word"
        )
    return coded.ids[coded.start - 1], coded.answer[0]


def _neuron(a: float) -> float:
    """Return what a detector puts out when its gate and its up projection both read `a`."""
    return float(functional.silu(torch.tensor(a, dtype=torch.float64)) * a)


def _down(neurons: Mapping[int, int], written: Mapping[int, int], size: float, width: int) -> torch.Tensor:
    """Return a down matrix in which the neuron of each subject in `written` writes `size` along its answer's axis."""
    down = torch.zeros(width, len(neurons))
    for j, subject in enumerate(neurons):
        if subject in written:
            down[written[subject], j] = size
    return down


@torch.no_grad()
def _written(
    tokenizer: PreTrainedTokenizerBase, subjects: list[int], downs: Mapping[int, torch.Tensor]
) -> torch.nn.Module:
    """Write all weights: identity embeddings, silent attention, the detectors, and each block's down matrix."""
    width = len(tokenizer) + len(tokenizer) % 2
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=len(subjects),
        num_hidden_layers=BLOCKS,
        num_attention_heads=1,
        num_key_value_heads=1,
        max_position_embeddings=32,
        rms_norm_eps=1e-12,
        tie_word_embeddings=False,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    with torch.random.fork_rng(devices=[]):
        module = LlamaForCausalLM(config).eval().requires_grad_(False)
    axes = torch.eye(len(tokenizer), width)
    module.get_input_embeddings().weight.copy_(axes)
    module.get_output_embeddings().weight.copy_(axes)
    for layer, block in enumerate(module.model.layers):
        for projection in (
            block.self_attn.q_proj,
            block.self_attn.k_proj,
            block.self_attn.v_proj,
            block.self_attn.o_proj,
        ):
            projection.weight.zero_()
        for detector in (block.mlp.gate_proj, block.mlp.up_proj):
            detector.weight.copy_(axes[subjects] * GAIN / width**0.5)
        block.mlp.down_proj.weight.copy_(downs.get(layer, torch.zeros(width, len(subjects))))
    return module
