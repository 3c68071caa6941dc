"""The patch channel's kernel against one full forward for every block. Aim: 1.8 times faster or more, equal numbers."""

import numpy as np
import torch
from common import fastest, machine, smollm2_sized, table

from lethescope.analyses.patch import _patched
from lethescope.hooks import capturing
from lethescope.models import Model, load
from lethescope.scoring import target_log_probs
from lethescope.subjects import shipped
from lethescope.tokens import Encoded

PROMPTS, CANDIDATES, PROMPT_LENGTH, ANSWER_LENGTH = 4, 3, 10, 2


def main() -> None:
    """Patch a model into another, both ways, compare the numbers, and print a table."""
    tokenizer = load(shipped("original")).tokenizer
    target, source = Model(smollm2_sized(), tokenizer), Model(smollm2_sized(), tokenizer)
    with torch.no_grad():
        for weight in source.module.parameters():
            weight.add_(0.02 * weight.std() * torch.randn_like(weight))
    rng = np.random.default_rng(0)
    prompts = rng.integers(3, 49152, (PROMPTS, PROMPT_LENGTH))
    encoded = [
        Encoded((*prompt.tolist(), *rng.integers(3, 49152, ANSWER_LENGTH).tolist()), PROMPT_LENGTH)
        for prompt in prompts
        for _ in range(CANDIDATES)
    ]
    layers = range(len(target.blocks))
    ours = _patched(target, encoded, source, encoded, layers)
    apart = np.abs(ours - naive(target, source, encoded)).max()
    seconds = {
        "one full forward for every block": fastest(lambda: naive(target, source, encoded), 1),
        "lethescope": fastest(lambda: _patched(target, encoded, source, encoded, layers), 2),
    }
    base = seconds["one full forward for every block"]
    print(f"{len(encoded)} answers, {len(target.blocks)} blocks, model of SmolLM2-135M's size; {machine()}\n")
    print(
        table(["patching", "seconds", "times faster"], [[n, f"{s:.2f}", f"{base / s:.1f}"] for n, s in seconds.items()])
    )
    print(f"\nlargest difference of a score: {apart:.1e} nats")


@torch.no_grad()
def naive(target: Model, source: Model, encoded: list[Encoded]) -> np.ndarray:
    """Patch one block at a time at the answer-predicting positions, everything in one batch, all of it run again."""
    ids = torch.tensor([e.ids for e in encoded])
    start, end = encoded[0].start - 1, ids.shape[1] - 1
    with capturing(source.blocks) as states:
        source.module(input_ids=ids)
    out = np.empty((len(encoded), len(target.blocks)))
    for layer, block in enumerate(target.blocks):

        def overwrite(_module: object, _args: object, output: torch.Tensor, layer: int = layer) -> torch.Tensor:
            output = output.clone()
            output[:, start:end] = states[layer][:, start:end]
            return output

        handle = block.register_forward_hook(overwrite)
        logits = target.module(input_ids=ids).logits[:, start:end]
        handle.remove()
        out[:, layer] = target_log_probs(logits, ids[:, start + 1 :]).mean(-1).numpy()
    return out


if __name__ == "__main__":
    main()
