"""Capture of all residual streams with streaming mean and covariance, against a plain forward and TransformerLens.

Aim: at most 1.10 times the plain forward, and memory that does not grow with the number of prompts.
"""

from collections.abc import Iterator

import torch
from common import fastest, machine, peak_mib, smollm2_sized, table

from lethescope.hooks import Moments, capturing, watching
from lethescope.models import anatomy

PROMPTS, LENGTH = 16, 32


def main() -> None:
    """Time the three, side by side in one process, and print a table."""
    model = smollm2_sized()
    blocks = anatomy(model).blocks
    ids = torch.randint(0, 49152, (PROMPTS, LENGTH), generator=torch.Generator().manual_seed(0))
    moments = [Moments(576) for _ in blocks]

    def stream() -> None:
        with torch.no_grad(), watching(dict(enumerate(blocks)), lambda i, h: moments[i].update(h.flatten(0, 1))):
            model(ids)

    def keep() -> None:
        with torch.no_grad(), capturing(blocks):
            model(ids)

    def plain() -> None:
        with torch.no_grad():
            model(ids)

    runs = {
        "plain forward": plain,
        "all residual streams, mean and covariance": stream,
        "all residual streams, kept": keep,
    }
    seconds = {name: fastest(run) for name, run in runs.items()}
    seconds |= transformer_lens(model, ids)
    held = sum(m._outer.nbytes + m._sum.nbytes for m in moments) / 2**20
    kept = PROMPTS * LENGTH * 576 * 4 * len(blocks) / 2**20
    base = seconds["plain forward"]
    print(f"{PROMPTS} prompts of {LENGTH} tokens, model of SmolLM2-135M's size; {machine()}\n")
    print(table(["what", "seconds", "ratio"], [[n, f"{s:.2f}", f"{s / base:.2f}"] for n, s in seconds.items()]))
    print(f"\nheld for mean and covariance: {held:.0f} MiB for any number of prompts; states: {kept:.0f} MiB here\n")
    print(table(["prompts", "peak memory, streaming", "peak memory, kept"], list(memory(model))))


def memory(model: torch.nn.Module) -> Iterator[list[str]]:
    """Yield the highest memory of the whole process over more and more prompts, streamed and kept, 16 at a time."""
    blocks = anatomy(model).blocks
    for count in (16, 64, 256):
        ids = torch.randint(0, 49152, (count, LENGTH), generator=torch.Generator().manual_seed(0))

        def stream(ids: torch.Tensor = ids) -> None:
            moments = [Moments(576) for _ in blocks]
            with torch.no_grad(), watching(dict(enumerate(blocks)), lambda i, h: moments[i].update(h.flatten(0, 1))):
                for part in ids.split(PROMPTS):
                    model(part)

        def keep(ids: torch.Tensor = ids) -> None:
            kept = []
            for part in ids.split(PROMPTS):
                with torch.no_grad(), capturing(blocks) as seen:
                    model(part)
                kept.append(seen)

        yield [str(count), *(f"{peak_mib(run):.0f} MiB" for run in (stream, keep))]


def transformer_lens(model: torch.nn.Module, ids: torch.Tensor) -> dict[str, float]:
    """Time TransformerLens' run_with_cache, if it is installed: everything, and the residual streams only."""
    try:
        from transformer_lens.model_bridge import TransformerBridge
    except ImportError:
        return {}
    from lethescope.models import load
    from lethescope.subjects import shipped

    bridge = TransformerBridge.boot_transformers(
        str(shipped("original")), hf_model=model, tokenizer=load(shipped("original")).tokenizer
    )

    def everything() -> None:
        with torch.no_grad():
            bridge.run_with_cache(ids)

    def residual() -> None:
        with torch.no_grad():
            bridge.run_with_cache(ids, names_filter=lambda name: name.endswith("hook_out") and name.count(".") == 2)

    return {
        "TransformerLens run_with_cache, all": fastest(everything, 2),
        "TransformerLens run_with_cache, residual streams": fastest(residual, 2),
    }


if __name__ == "__main__":
    main()
