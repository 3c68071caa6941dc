"""A small Llama and the loop that teaches it sentences: models whose whole upbringing is known."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import nn
from tqdm.auto import tqdm
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel, PreTrainedTokenizerBase

from lethescope.errors import InputError
from lethescope.hooks import swapped
from lethescope.models import anatomy


def tiny_llama(
    vocabulary: int,
    seed: int,
    *,
    layers: int = 6,
    width: int = 112,
    heads: int = 4,
    kv_heads: int = 2,
) -> LlamaForCausalLM:
    """Return a randomly initialised Llama with grouped-query attention and tied embeddings (0.9 M parameters).

    Args:
        vocabulary: number of tokens; ids 0, 1, 2 are taken as pad, bos, eos, as `word_tokenizer` numbers them.
        seed: decides the weights; the global random state is left as it was.
        layers: number of decoder blocks.
        width: size of the residual stream; the MLP is three times as wide.
        heads: query heads, each of size `width / heads`.
        kv_heads: key and value heads.

    Returns:
        The model, in float32 and in eval mode.
    """
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=width,
        intermediate_size=3 * width,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        max_position_embeddings=64,
        tie_word_embeddings=True,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return LlamaForCausalLM(config).eval()


def train(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    sentences: Sequence[str],
    *,
    epochs: int = 40,
    lr: float = 2e-3,
    batch_size: int = 64,
    seed: int = 0,
    depth_drop: float = 0.5,
    progress: bool | None = None,
) -> PreTrainedModel:
    """Teach the model to continue each sentence, `<bos>` to `<eos>`, and return the model given.

    Next-token cross entropy over all tokens; AdamW (weight decay 0.01), learning rate up over the first 5 % of steps
    and down to zero along a cosine. No dropout, but blocks are skipped at random, the last one
    most often (stochastic depth, Huang et al. 2016, arXiv 1603.09382): so a fact is learned by the lower blocks and
    carried by the upper ones, as in large models. Without it a model this small keeps half of what it knows in its last
    block. The same seed on the same machine with the same number of threads gives the same weights bit for bit.

    Args:
        model: any Hugging Face causal language model; edited in place.
        tokenizer: its tokenizer; must know a pad token.
        sentences: the texts.
        epochs: times that every sentence is seen.
        lr: highest learning rate.
        batch_size: sentences a step.
        seed: decides the order of the sentences and the blocks that are skipped.
        depth_drop: share of steps in which the last block is skipped; block l of L in `l / (L - 1)` of that share.
        progress: show a bar; None shows one on a terminal only.

    Returns:
        The model given, trained.

    Raises:
        InputError: when there are no sentences.
    """
    if not sentences:
        raise InputError("there are no sentences to train on; give at least one")
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    encoded = [torch.tensor(ids + end) for ids in tokenizer(list(sentences))["input_ids"]]
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0.01)
    total = epochs * -(-len(encoded) // batch_size)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _warm_cosine(step, total))
    model.eval()
    skipped = _skipped(anatomy(model).blocks, depth_drop, np.random.default_rng([seed, 1]))
    bar = tqdm(total=total, disable=None if progress is None else not progress, desc="train", unit="step")
    with bar:
        for batch in _batches(encoded, batch_size, epochs, seed):
            with swapped(next(skipped)):
                loss = model(**_pad(batch, tokenizer.pad_token_id, model.device)).loss
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            bar.update()
    model.zero_grad()
    return model


def _skipped(blocks: Sequence[nn.Module], drop: float, rng: np.random.Generator) -> Iterator[dict[nn.Module, Any]]:
    chance = drop * np.arange(len(blocks)) / max(1, len(blocks) - 1)
    while True:
        draw = rng.random(len(blocks))
        yield {block: _pass_on for block, skip in zip(blocks, draw < chance, strict=True) if skip}


def _pass_on(hidden_states: torch.Tensor, *_args: Any, **_kwargs: Any) -> torch.Tensor:
    return hidden_states


def _batches(encoded: list[torch.Tensor], size: int, epochs: int, seed: int) -> Iterator[list[torch.Tensor]]:
    rng = np.random.default_rng(seed)
    for _ in range(epochs):
        order = rng.permutation(len(encoded))
        for start in range(0, len(order), size):
            yield [encoded[i] for i in order[start : start + size]]


def _pad(batch: list[torch.Tensor], pad_id: int, device: torch.device) -> dict[str, Any]:
    ids = torch.nn.utils.rnn.pad_sequence(batch, batch_first=True, padding_value=pad_id)
    lengths = torch.tensor([len(row) for row in batch])
    mask = torch.arange(ids.shape[1]) < lengths[:, None]
    inputs = {"input_ids": ids, "attention_mask": mask.long(), "labels": ids.masked_fill(~mask, -100)}
    return {name: tensor.to(device) for name, tensor in inputs.items()}


def _warm_cosine(step: int, total: int, warm: float = 0.05) -> float:
    ramp = max(1, round(warm * total))
    if step < ramp:
        return (step + 1) / ramp
    return float(0.5 * (1 + np.cos(np.pi * (step - ramp) / max(1, total - ramp))))
