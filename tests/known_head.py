"""A small model that was trained to copy, and of which it is known which head does it."""

import numpy as np
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from lethescope.models import Model
from lethescope.subjects.tokenizer import word_tokenizer

WORDS = [f"w{i:02d}" for i in range(44)]
KNOWN = (1, 2)


def repeated(rng, n, length=40):
    """Random words said again and again, with periods of 6 to 21 tokens."""
    out = np.ones((n, length), dtype=np.int64)
    for row in out:
        row[1:] = np.resize(4 + rng.permutation(len(WORDS))[: rng.integers(6, 22)], length - 1)
    return torch.from_numpy(out)


def known_head_model(steps=270):
    """Two layers that learn to repeat what they read; in the second, one head is free to learn where to look.

    The other heads of that layer look at fixed distances, with constant queries and keys, so they cannot do it.
    """
    sizes = {"hidden_size": 64, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    special = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    torch.manual_seed(0)
    module = LlamaForCausalLM(
        LlamaConfig(vocab_size=len(WORDS) + 4, max_position_embeddings=64, attention_bias=True, **sizes, **special)
    )
    free = (torch.arange(64) // 16 == KNOWN[1]).float()
    for part in (module.model.layers[KNOWN[0]].self_attn.q_proj, module.model.layers[KNOWN[0]].self_attn.k_proj):
        part.bias.data.normal_(0, 2).mul_(1 - free)
        part.weight.data.mul_(free[:, None])
        part.bias.register_hook(lambda grad: grad * free)
        part.weight.register_hook(lambda grad: grad * free[:, None])
    rng, optimizer = np.random.default_rng(0), torch.optim.AdamW(module.parameters(), lr=3e-3, weight_decay=0)
    rate = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda s: min(1, s / 40) * (1 + np.cos(np.pi * s / steps)) / 2)
    for _ in range(steps):
        ids = repeated(rng, 32)
        seen = (ids[:, :, None] == ids[:, None, :]).tril(-1).any(-1)[:, 1:]
        logits = module(input_ids=ids).logits[:, :-1]
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(logits[seen], ids[:, 1:][seen]).backward()
        optimizer.step()
        rate.step()
    return Model(module.requires_grad_(False).eval(), word_tokenizer([" ".join(WORDS)]))
