"""Reading and replacing block outputs during a forward pass, and reductions that stream over it.

Everything here is a context manager that registers on entry and always removes on exit.
"""

from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn


class Stop(Exception):
    """Raised inside a forward pass to end it after the last block that is needed."""


def state(output: Any) -> Tensor:
    """Return the residual stream from a block's output, which is a tensor or a tuple that starts with it."""
    return output[0] if isinstance(output, tuple) else output


@contextmanager
def watching(
    blocks: Mapping[int, nn.Module], see: Callable[[int, Tensor], None], *, stop: bool = False
) -> Generator[None]:
    """Call `see(layer, state)` with the output of every named block; with `stop`, end the pass after the last one.

    Shapes: `state` is (batch pos d_model), the residual stream after the block.
    """
    last = max(blocks)

    def hook(layer: int) -> Callable[..., None]:
        def fire(_module: nn.Module, _args: Any, output: Any) -> None:
            see(layer, state(output))
            if stop and layer == last:
                raise Stop

        return fire

    handles = [block.register_forward_hook(hook(layer)) for layer, block in blocks.items()]
    try:
        yield
    except Stop:
        pass
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def capturing(blocks: Sequence[nn.Module], *, stop: bool = False) -> Generator[dict[int, Tensor]]:
    """Collect the output of every block of one forward pass.

    Yields:
        layer -> (batch pos d_model), filled when the pass has run.
    """
    seen: dict[int, Tensor] = {}
    with watching(dict(enumerate(blocks)), seen.__setitem__, stop=stop):
        yield seen


@contextmanager
def resuming(blocks: Sequence[nn.Module], layer: int, value: Float[Tensor, "batch pos d_model"]) -> Generator[None]:
    """Run only the blocks above `layer`, as if block `layer` had put out `value`.

    The blocks up to `layer` are not computed at all, which is what makes patching every layer cheap.
    """

    def skip(*_args: Any, **_kwargs: Any) -> Tensor:
        return value

    with swapped(dict.fromkeys(blocks[: layer + 1], skip)):
        yield


@contextmanager
def swapped(forwards: Mapping[nn.Module, Callable[..., Any]]) -> Generator[None]:
    """Give modules another forward function for a while; what they had before is put back."""
    kept = {module: module.__dict__.get("forward") for module in forwards}
    for module, forward in forwards.items():
        module.forward = forward  # type: ignore[method-assign]
    try:
        yield
    finally:
        for module, before in kept.items():
            if before is None:
                module.__dict__.pop("forward", None)
            else:
                module.forward = before  # type: ignore[method-assign]


@dataclass
class Moments:
    """Mean and covariance of vectors that arrive in batches; memory grows with the width, not with their number.

    With `other`, the cross-covariance of two streams of the same tokens is kept too. Sums are held in float64, about
    the first batch's mean, so that a stream far from zero loses no digits.

    >>> x = torch.randn(100, 3, generator=torch.Generator().manual_seed(0)).double()
    >>> m = Moments(3)
    >>> for part in x.split(7): m.update(part)
    >>> bool(torch.allclose(m.covariance(), x.T.cov()))
    True
    """

    width: int
    other: int = 0
    count: int = 0

    def __post_init__(self) -> None:
        self._sum = torch.zeros(self.width + self.other, dtype=torch.float64)
        self._outer = torch.zeros(self.width, self.width + self.other, dtype=torch.float64)
        self._shift: Tensor | None = None

    def update(self, x: Float[Tensor, "token width"], y: Float[Tensor, "token other"] | None = None) -> None:
        """Add vectors (token width), and the other stream's (token other) where one is kept."""
        both = x if y is None else torch.cat([x, y], -1)
        both = both.to(torch.promote_types(both.dtype, torch.float32))
        if self._shift is None and len(x):
            self._shift = both.mean(0)
        both = both if self._shift is None else both - self._shift
        self.count += len(x)
        self._sum += both.sum(0, dtype=torch.float64).cpu()
        self._outer += (both[:, : self.width].mT @ both).double().cpu()

    def mean(self) -> Float[Tensor, " width"]:
        """Mean of the first stream."""
        shift = 0 if self._shift is None else self._shift[: self.width].double().cpu()
        return self._sum[: self.width] / self.count + shift

    def covariance(self) -> Float[Tensor, "width width"]:
        """Sample covariance (divided by n - 1) of the first stream."""
        return self._central()[:, : self.width]

    def cross_covariance(self) -> Float[Tensor, "width other"]:
        """Sample cross-covariance of the two streams."""
        return self._central()[:, self.width :]

    def _central(self) -> Tensor:
        mean = self._sum / self.count
        return (self._outer - self.count * torch.outer(mean[: self.width], mean)) / (self.count - 1)
