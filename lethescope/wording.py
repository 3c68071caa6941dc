"""What the report says in words: of each verdict, each channel and each figure.

A new channel adds a line to `CHANNEL_NOTES`; without one it is reported without words.
"""

from typing import NamedTuple


class Telling(NamedTuple):
    """A verdict in plain words: its name, one sentence, what it does not mean, and its badge's colour."""

    name: str
    sentence: str
    caution: str
    colour: str


VERDICTS = {
    "known": Telling(
        "Known",
        "The unlearned model still says what it was meant to forget.",
        "This speaks of the facts that were asked and of these prompts; other facts may have been forgotten.",
        "#a11d1d",
    ),
    "suppressed": Telling(
        "Suppressed",
        "The unlearned model says it no more, or less, but did not forget it.",
        "It shows that the knowledge can still be read or brought back, not that a given user would manage to.",
        "#a63f00",
    ),
    "partly_erased": Telling(
        "Partly erased",
        "Some of the knowledge is no longer found, some can still be read or brought back.",
        "The share is what these channels find; a channel that was not tried may find more.",
        "#7a5900",
    ),
    "no_residue_found": Telling(
        "No residue found",
        "No residue found by these channels at this budget.",
        "It is no proof that the knowledge is gone: a channel that was not tried or a larger budget may still find it.",
        "#0b5a9e",
    ),
    "damaged": Telling(
        "Damaged",
        "The unlearned model also lost what it had to keep, so it has not shown that it forgot.",
        "A model that answers nothing leaves no residue to find; a low residue here is no sign of forgetting.",
        "#6b2fa0",
    ),
    "inconclusive": Telling(
        "Inconclusive",
        "This evidence does not decide whether the model forgot.",
        "It speaks neither for nor against the model; more facts, a reference or a larger budget may decide.",
        "#50575f",
    ),
}
"""The six verdicts of ``verdict.json``."""


class Note(NamedTuple):
    """What a channel measures and what it does not prove, one line each."""

    measures: str
    not_proven: str


CHANNEL_NOTES = {
    "say": Note(
        "How much the model's output prefers the true answer, asked by the prompt and its paraphrases.",
        "Silence is not forgetting: the output can be blocked while the knowledge below stays whole.",
    ),
    "readout": Note(
        "Whether a linear probe on a layer, trained on retain facts of the relation, reads the forget facts' answers.",
        "A probe that reads an answer does not show that the model uses it; one that fails may look at the wrong form.",
    ),
    "lens": Note(
        "What each layer would say if decoded at once, by the model's own unembedding and by the original's.",
        "Lower layers are hard to decode in any model: a flat curve there is not erasure.",
    ),
    "patch": Note(
        "How much of the original's answer is lost when a layer's output is replaced by the unlearned model's.",
        "It reads the states by the original's upper layers: what those cannot use may still be there, and a state "
        "that is merely unusual to them counts as erased.",
    ),
    "relearn": Note(
        "Whether training on the facts of some forget subjects brings back the answers about the others.",
        "One small training budget: what does not come back here may come back with more steps or other data.",
    ),
    "compress": Note(
        "Whether answers come back when the weights are rounded to few bits or the smallest are pruned.",
        "Rounding undoes only small edits of weights; a suppression by large edits survives it.",
    ),
    "landscape": Note(
        "Whether the true answer's loss stands out at the prompt, above or below its loss at prompts nearby.",
        "It shows that the answer is tied to these words, not that it can be said; a flat loss is not erasure.",
    ),
    "emphasise": Note(
        "Whether the answer comes back when the words that it hung on in the original are stressed in the prompt.",
        "What does not come back with these wordings may come back with others.",
    ),
    "context": Note(
        "Whether other facts of the subject, examples of the relation, the answer's beginning or other words jog it.",
        "What follows from a beginning or a hint need not have been known without it; the nulls are jogged alike.",
    ),
}
"""What the report says of each channel; a channel without a note is reported without one."""


class Shown(NamedTuple):
    """The heading and the caption of a figure in the report."""

    heading: str
    caption: str


FIGURE_NOTES = {
    "readout": Shown("Read out", "How well a linear probe reads the answers, layer by layer."),
    "lens": Shown(
        "Lens",
        "What each block would say if decoded at once, by the model's own decoder and by the original's (frozen). "
        "A line of the unlearned model that rises and then falls near the end is what suppression looks like.",
    ),
    "patch": Shown(
        "Patch",
        "What is left of the original's answer when each block's output is replaced in turn. Where the null is as high "
        "as the original, the block does not carry the fact and cannot testify.",
    ),
    "erasure": Shown(
        "Erasure map",
        "Erased share of each fact at each layer: 0 = untouched, 1 = erased as in the null. Grey: the layer does not "
        "encode the fact.",
    ),
    "relearn": Shown(
        "Relearning",
        "Held-out answers while other forget facts are trained. What counts is the distance to the null lines.",
    ),
    "attribution": Shown(
        "What the words of a prompt contribute",
        "How much the answer's log-probability loses without each word. It shows how a prompt is used, not whether the "
        "answer is still there.",
    ),
    "horizon": Shown(
        "Up to which layer the subject is read",
        "What the answer loses when the subject's states are overwritten after a layer. Past the horizon what is known "
        "of the subject has moved to other words; that is not forgetting.",
    ),
    "retrieval-heads": Shown(
        "Heads that read the context",
        "Retrieval score of every head, on needles that have nothing to do with the facts. Heads that stay the same "
        "read the context as before; what the weights hold is another matter.",
    ),
}
"""What the report says of each figure; ``residue`` has its own place at the top."""
