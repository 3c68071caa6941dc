"""A zoo of models whose truth is known by construction, to validate channels and verdicts on.

`worlds` holds what the models of one seed share: people, tokenizer, how they are taught. `recipes` lists what is in the
zoo and how each model is made. `members` makes them, resumably, and reads them.
"""

from lethescope.subjects.zoo.members import Member, Zoo, build, read

__all__ = ["Member", "Zoo", "build", "read"]
