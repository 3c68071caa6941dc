"""The words of a prompt: where they stand, and what is left without some of them."""

import re
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

ROLES = ("system", "user", "assistant", "model")
"""What a chat template writes straight after a special token; it is no word of the prompt."""


@dataclass(frozen=True)
class Words:
    """A prompt and where its words are; `opens` is True where what stands before a word is not to be taken away."""

    prompt: str
    spans: tuple[tuple[int, int], ...]
    opens: tuple[bool, ...]

    @property
    def texts(self) -> tuple[str, ...]:
        """The words."""
        return tuple(self.prompt[start:end] for start, end in self.spans)

    def without(self, gone: Collection[int]) -> str:
        """Return the prompt without these words and their white space.

        >>> words("Where was Ada  born?").without([1]), words("Where was Ada  born?").without([0, 2])
        ('Where Ada  born?', 'was  born?')
        """
        parts, last, first = [], 0, True
        for i, (start, end) in enumerate(self.spans):
            first = first or self.opens[i]
            if self.opens[i] or (i not in gone and not first):
                parts.append(self.prompt[last:start])
            if i not in gone:
                parts.append(self.prompt[start:end])
                first = False
            last = end
        return "".join([*parts, self.prompt[last:]])


def words(prompt: str, tokenizer: Any = None) -> Words:
    """Cut a prompt at its white space; a tokenizer's special tokens, and a role straight after one, are no words."""
    added = [t.content for t in getattr(tokenizer, "added_tokens_decoder", {}).values() if t.special]
    special = "|".join(map(re.escape, sorted(added, key=len, reverse=True))) or "(?!)"
    role = rf"(?:{'|'.join(ROLES)})(?=\s|{special})"
    spans, opens, opening = [], [], True
    for found in re.finditer(rf"(?P<mark>(?:{special})(?:{role})?)|(?:(?!{special})\S)+", prompt):
        if found["mark"] is None:
            spans.append(found.span())
            opens.append(opening)
        opening = found["mark"] is not None
    return Words(prompt, tuple(spans), tuple(opens))


def bare(word: str) -> str:
    """Return a word without case, a possessive s and the punctuation around it; itself where nothing else is there."""
    return re.sub(r"^\W+|['’]s\W*$|\W+$", "", word.casefold()) or word
