"""The one error a user is meant to see: bad input, told in one line."""


class InputError(ValueError):
    """Something the user gave cannot be used; the message says what, where, and what would be right."""
