"""Prompts and answers as tokens: where an answer starts, and how sequences are batched."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch

from lethescope.errors import InputError


@dataclass(frozen=True)
class Encoded:
    """A prompt and an answer as token ids; `start` is the index of the first answer token."""

    ids: tuple[int, ...]
    start: int

    @property
    def prefix(self) -> tuple[int, ...]:
        """Every token before the one that predicts the answer's first token."""
        return self.ids[: self.start - 1]

    @property
    def tail(self) -> tuple[int, ...]:
        """The tokens that predict the answer: the prompt's last one and the answer's all but last."""
        return self.ids[self.start - 1 : -1]

    @property
    def answer(self) -> tuple[int, ...]:
        """The answer's own tokens."""
        return self.ids[self.start :]


@dataclass(frozen=True)
class Batch:
    """Padded sequences: everything a forward pass needs, and where the answers are."""

    input_ids: torch.Tensor
    attention_mask: torch.Tensor
    position_ids: torch.Tensor
    answer_mask: torch.Tensor

    def inputs(self) -> dict[str, torch.Tensor]:
        """Return the keyword arguments of a Hugging Face causal model."""
        return {
            "input_ids": self.input_ids,
            "attention_mask": self.attention_mask,
            "position_ids": self.position_ids,
        }


def join(prompt: str, answer: str) -> str:
    """Put one space between prompt and answer unless either side already has white space there.

    >>> join("The capital of France is", "Paris"), join("A: ", "Paris")
    ('The capital of France is Paris', 'A: Paris')
    """
    glue = "" if prompt[-1:].isspace() or answer[:1].isspace() else " "
    return prompt + glue + answer


def encode(tokenizer: Any, prompt: str, answer: str) -> Encoded:
    """Tokenise prompt and answer together and find the answer by character offsets.

    The span is checked by decoding it back: an answer that the tokenizer cannot write is refused.

    Raises:
        InputError: the prompt or the answer has no token, or the answer decodes to something else.
    """
    text = join(prompt, answer)
    ids, start = _split(tokenizer, text, len(text) - len(answer.lstrip()))
    said = tokenizer.decode(ids[start:])
    if start == len(ids) or not answer.strip():
        raise InputError(f"the answer {answer!r} (prompt {prompt!r}) tokenises to nothing; give an answer of letters")
    if start == 0:
        raise InputError(f"the prompt {prompt!r} tokenises to nothing; give at least one word before the answer")
    if not _squeeze(said).endswith(_squeeze(answer)):
        raise InputError(f"the answer {answer!r} reads {said!r} after tokenising; use words that the tokenizer knows")
    return Encoded(tuple(ids), start)


def _split(tokenizer: Any, text: str, at: int) -> tuple[list[int], int]:
    """Return the ids of a text and the index of the first token that reaches beyond character `at`."""
    if getattr(tokenizer, "is_fast", False):
        coded = tokenizer(text, return_offsets_mapping=True)
        ends = [end for _, end in coded["offset_mapping"]]
        return list(coded["input_ids"]), next((i for i, end in enumerate(ends) if end > at), len(ends))
    ids, prompt = tokenizer(text)["input_ids"], tokenizer(text[:at].rstrip())["input_ids"]
    shared = next((i for i, (a, b) in enumerate(zip(ids, prompt, strict=False)) if a != b), min(len(ids), len(prompt)))
    return list(ids), shared


def _squeeze(text: str) -> str:
    return "".join(text.split())


def pad_id(tokenizer: Any) -> int:
    """Return a token id to pad with; it is masked everywhere, so any id will do."""
    for name in ("pad_token_id", "eos_token_id", "bos_token_id"):
        if getattr(tokenizer, name, None) is not None:
            return int(getattr(tokenizer, name))
    return 0


def collate(
    encoded: Sequence[Encoded],
    pad_id: int,
    *,
    side: Literal["left", "right"] = "right",
    device: torch.device | str = "cpu",
) -> Batch:
    """Pad sequences into one batch; positions count real tokens only, so both sides give equal results."""
    width = max(len(e.ids) for e in encoded)
    ids = torch.full((len(encoded), width), pad_id)
    mask = torch.zeros((len(encoded), width), dtype=torch.long)
    answer = torch.zeros((len(encoded), width), dtype=torch.bool)
    for row, e in enumerate(encoded):
        first = width - len(e.ids) if side == "left" else 0
        ids[row, first : first + len(e.ids)] = torch.tensor(e.ids)
        mask[row, first : first + len(e.ids)] = 1
        answer[row, first + e.start : first + len(e.ids)] = True
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    return Batch(*(t.to(device) for t in (ids, mask, positions, answer)))
