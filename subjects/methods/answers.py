"""What every unlearning loss is made of: the log-probabilities that a model gives to the tokens of answers."""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from lethescope.tokens import Batch


def token_log_probs(model: Any, batch: Batch) -> Float[Tensor, "batch pos"]:
    """Return log p(token | tokens before it) in nats at the answer's tokens, and 0 everywhere else.

    Column t belongs to token t + 1 of the batch, since no token predicts the first. Only answer rows go through the
    softmax, in float32, so memory grows with answer tokens times vocabulary and not with prompt length.

    Args:
        model: a Hugging Face causal language model, or any callable whose result has `.logits` (batch, pos, vocab).
        batch: padded prompts and answers.

    Returns:
        The log-probabilities, one column fewer than the batch.
    """
    logits = model(**batch.inputs()).logits[:, :-1]
    answer = batch.answer_mask[:, 1:]
    chosen = logits[answer].float().log_softmax(-1).gather(-1, batch.input_ids[:, 1:][answer][:, None])[:, 0]
    return torch.zeros(answer.shape, device=chosen.device).masked_scatter(answer, chosen)


def summed_log_prob(model: Any, batch: Batch) -> Float[Tensor, " batch"]:
    """Return S(y): the log-probability of each whole answer, summed over its tokens."""
    return token_log_probs(model, batch).sum(-1)


def nll(model: Any, batch: Batch) -> Float[Tensor, ""]:
    """Return the negative log-likelihood, the mean over all answer tokens of the batch."""
    return -token_log_probs(model, batch).sum() / batch.answer_mask.sum()
