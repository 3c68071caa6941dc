"""What every unlearning loss is made of: the log-probabilities that a model gives to the tokens of answers."""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from lethescope.tokens import Batch


def predicting(rows: Float[Tensor, "batch pos width"], batch: Batch) -> Float[Tensor, "token width"]:
    """Pick, in float32, what stands at the positions that predict an answer token: each is one before its token.

    The rows come row after row of the batch, token after token. Nothing is taken at a prompt's other positions, which
    so get no gradient, and memory after it grows with answer tokens and not with prompt length.

    Args:
        rows: logits, or any block's residual stream.
        batch: padded prompts and answers.

    Returns:
        As many rows as the batch has answer tokens.
    """
    return rows[:, :-1][batch.answer_mask[:, 1:]].float()


def answer_logits(model: Any, batch: Batch) -> Float[Tensor, "token vocab"]:
    """Return the logits that predict the answers' tokens, in float32, in the order of `predicting`.

    Args:
        model: a Hugging Face causal language model, or any callable whose result has `.logits` (batch, pos, vocab).
        batch: padded prompts and answers.

    Returns:
        As many rows as the batch has answer tokens.
    """
    return predicting(model(**batch.inputs()).logits, batch)


def answer_ids(batch: Batch) -> Int[Tensor, " token"]:
    """Return the answers' tokens, in the order of `predicting`."""
    return batch.input_ids[batch.answer_mask]


def answer_log_probs(model: Any, batch: Batch) -> Float[Tensor, " token"]:
    """Return log p(token | tokens before it) in nats at the answers' tokens, in the order of `predicting`."""
    return answer_logits(model, batch).log_softmax(-1).gather(-1, answer_ids(batch)[:, None])[:, 0]


def token_log_probs(model: Any, batch: Batch) -> Float[Tensor, "batch pos"]:
    """Return log p(token | tokens before it) in nats at the answer's tokens, and 0 everywhere else.

    Column t belongs to token t + 1 of the batch, since no token predicts the first.

    Args:
        model: a Hugging Face causal language model, or any callable whose result has `.logits` (batch, pos, vocab).
        batch: padded prompts and answers.

    Returns:
        The log-probabilities, one column fewer than the batch.
    """
    chosen, answer = answer_log_probs(model, batch), batch.answer_mask[:, 1:]
    return torch.zeros(answer.shape, device=chosen.device).masked_scatter(answer, chosen)


def summed_log_prob(model: Any, batch: Batch) -> Float[Tensor, " batch"]:
    """Return S(y): the log-probability of each whole answer, summed over its tokens."""
    return token_log_probs(model, batch).sum(-1)


def nll(model: Any, batch: Batch) -> Float[Tensor, ""]:
    """Return the negative log-likelihood, the mean over all answer tokens of the batch."""
    return -token_log_probs(model, batch).sum() / batch.answer_mask.sum()


def kl(teacher: Any, model: Any, batch: Batch, *, temperature: float = 1.0) -> Float[Tensor, ""]:
    """Return KL(teacher || model) in nats, the mean over the positions that predict an answer token.

    Args:
        teacher: the model to be like; it gets no gradient.
        model: the model being trained.
        batch: padded prompts and answers.
        temperature: both models' logits are divided by it.

    Returns:
        The divergence, 0 when both predict the same.
    """
    with torch.no_grad():
        aim = (answer_logits(teacher, batch) / temperature).log_softmax(-1)
    now = (answer_logits(model, batch) / temperature).log_softmax(-1)
    return (aim.exp() * (aim - now)).sum(-1).mean()
