"""What a measurement costs: seconds, and how often a language model was run forwards and backwards."""

import time
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel


@dataclass
class Cost:
    """Seconds, and calls of a model's forward: for reading only, and in training, where a backward pass follows.

    A call counts as one however many rows its batch has, and also when only some of the blocks are run.
    """

    seconds: float = 0.0
    forward_passes: int = 0
    backward_passes: int = 0


@contextmanager
def counting() -> Generator[Cost]:
    """Count what is spent while this is open, on any Hugging Face language model.

    Yields:
        The cost, complete once the block is left.

    >>> with counting() as cost:
    ...     pass
    >>> cost.forward_passes
    0
    """
    cost, start = Cost(), time.perf_counter()

    def see(module: nn.Module, _args: Any) -> None:
        if isinstance(module, PreTrainedModel) and module.get_output_embeddings() is not None:
            cost.forward_passes += 1
            cost.backward_passes += torch.is_grad_enabled()

    handle = nn.modules.module.register_module_forward_pre_hook(see)
    try:
        yield cost
    finally:
        handle.remove()
        cost.seconds = round(time.perf_counter() - start, 3)
