"""A model that answers by looking its text up: a function from text to continuation, behind a model's interface."""

import hashlib

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, PreTrainedTokenizerFast

from lethescope.models import Model


def letters():
    """A tokenizer in which every byte is a token, so that every text is written and read back as it is."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    core = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(["<eos>", *alphabet])}, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<eos>", clean_up_tokenization_spaces=False)


class Seen:
    """What stands for keys and values: the tokens themselves."""

    def __init__(self, ids):
        self.ids = ids

    def batch_select_indices(self, rows):
        self.ids = self.ids[rows]


class Reader(torch.nn.Module):
    """Gives the next letter of `continue_(text)`, which returns what follows the text (nothing = a line break)."""

    def __init__(self, tokenizer, continue_):
        super().__init__()
        self.config, self.continue_ = LlamaConfig(max_position_embeddings=8192), continue_
        self.weight = torch.nn.Parameter(torch.zeros(1))
        ids = range(len(tokenizer))
        self.letters = ["\0", *(tokenizer.decode([i]) for i in ids[1:])]  # every token is one letter
        self.sure = dict(zip(self.letters, 9.0 * torch.eye(len(ids)), strict=True))
        self.tokens_run = 0

    def forward(self, input_ids, past_key_values=None, logits_to_keep=0, **_):
        self.tokens_run += input_ids.numel()
        ids = input_ids if past_key_values is None else torch.cat([past_key_values.ids, input_ids], 1)
        n = logits_to_keep or input_ids.shape[1]
        texts = ["".join(self.letters[i] for i in row) for row in ids.tolist()]
        logits = [torch.stack([self.next(text[: len(text) - n + 1 + k]) for k in range(n)]) for text in texts]
        return type("Output", (), {"logits": torch.stack(logits), "past_key_values": Seen(ids)})()

    def next(self, text):
        said = self.continue_(text)
        return said if isinstance(said, torch.Tensor) else self.sure[said[:1] or "\n"]


def reader(continue_):
    tokenizer = letters()
    return Model(Reader(tokenizer, continue_), tokenizer)


def noise(text):
    """Logits drawn anew for every text: a model that knows nothing."""
    digest = hashlib.sha256(text.encode()).digest()
    return torch.randn(257, generator=torch.Generator().manual_seed(int.from_bytes(digest[:7], "big")))
