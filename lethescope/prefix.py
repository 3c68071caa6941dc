"""What sequences have in common at their beginning is run once: its keys and values are kept, and many go on from them.

A cache is a Hugging Face `Cache`, or anything that has its methods.
"""

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import takewhile
from typing import Any

import torch
from torch import Tensor


def common(*sequences: Sequence[int]) -> int:
    """Return how many tokens all sequences have in common at their beginning.

    >>> common((1, 2, 3), (1, 2), (1, 2, 4)), common((1,), ())
    (2, 0)
    """
    columns = zip(*sequences, strict=False)
    return sum(1 for _ in takewhile(lambda column: len(set(column)) == 1, columns))


def every_key(cache: Any, width: int) -> Any:
    """Return the cache, or None where it does not keep the keys of all `width` tokens (a window, a recurrent state).

    Only a cache that keeps them all can be cut back to fewer tokens, or be read by rows that share different lengths.
    """
    kept = [
        None if getattr(layer, "is_sliding", False) else getattr(layer, "keys", None)
        for layer in getattr(cache, "layers", ())
    ]
    return cache if kept and all(keys is not None and keys.shape[-2] == width for keys in kept) else None


def selected(cache: Any, rows: Sequence[int]) -> Any:
    """Return a cache of these rows of another one, which stays as it was; `[0]` copies one of a single row.

    Rows may come again. Nothing is copied but what is selected. None gives None.
    """
    if cache is None:
        return None
    tensors = [t for layer in getattr(cache, "layers", ()) for t in vars(layer).values() if isinstance(t, Tensor)]
    own = copy.deepcopy(cache, {id(t): t for t in tensors})
    own.batch_select_indices(torch.tensor(rows))
    return own


@dataclass
class Read:
    """The tokens of one sequence that were run, with their keys and values, to go on from; at first nothing."""

    ids: Sequence[int] = ()
    cache: Any = None

    def back(self, ids: Sequence[int], most: int) -> int:
        """Cut it back to what it has in common with `ids`, at most so many tokens; return how many are left."""
        length = min(common(self.ids, ids), most)
        if length:
            self.cache.crop(length - len(self.ids))
        self.ids, self.cache = ids[:length], self.cache if length else None
        return length

    def keep(self, ids: Sequence[int], cache: Any) -> None:
        """Keep the tokens that have been run, if the cache has the keys of all; otherwise nothing is left."""
        self.cache = every_key(cache, len(ids))
        self.ids = () if self.cache is None else ids
