"""Leave-one-out attribution against captum's FeatureAblation and inseq's occlusion, on SmolLM2-135M.

Aim: at least 5 times faster than captum with equal numbers. Times are seconds of the processor's, on one thread, so
that other load on the machine counts little. Peers that are not installed are left out: `pip install captum`; inseq
needs an older typeguard than other packages may, so it belongs in an environment of its own.
"""

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import numpy as np
import torch
from common import machine, seconds, smollm2, table

from lethescope.facts import Fact, read_facts
from lethescope.models import Model
from lethescope.probes.attribution import measure
from lethescope.tokens import encode, join

FACTS, EVERY = Path(__file__).parents[1] / "examples" / "smollm2" / "facts.jsonl", 6
REPEATS = 2
Way = Callable[[Model, Sequence[Fact]], list[np.ndarray]]


def main() -> None:
    """Attribute the same answers every way in one process, compare the numbers, and print a table."""
    model, facts = smollm2(), list(read_facts(FACTS))[::EVERY]
    ways: dict[str, Way] = {"lethescope": ours, "lethescope, one prompt at a time": one_by_one} | captums() | inseqs()
    for way in ways.values():
        way(model, facts[:1])
    tries = [{name: seconds(lambda way=way: way(model, facts)) for name, way in ways.items()} for _ in range(REPEATS)]
    found = {name: min((each[name] for each in tries), key=lambda pair: pair[1]) for name in ways}
    mine, fastest = found["lethescope"]
    rows = []
    for name, (values, spent) in found.items():
        apart = "another measure" if name.startswith("inseq") else f"{furthest(values, mine):.1e}"
        rows.append([name, f"{spent:.1f}", f"{spent / fastest:.1f}", apart])
    largest = max(np.abs(values).max() for values in mine)
    units = sum(map(len, mine))
    print(f"{len(facts)} prompts of {units / len(facts):.1f} words, SmolLM2-135M; {machine()}\n")
    print(table(["attribution", "seconds", "times ours", "largest difference"], rows))
    print(f"\nlargest contribution: {largest:.2f} nats a token")


def furthest(one: Sequence[np.ndarray], other: Sequence[np.ndarray]) -> float:
    """Return the largest difference of two contributions."""
    return float(max(np.abs(a - b).max() for a, b in zip(one, other, strict=True)))


def ours(model: Model, facts: Sequence[Fact]) -> list[np.ndarray]:
    """All prompts at once."""
    return [row[~np.isnan(row)] for row in measure(model, facts)["contribution"].values]


def one_by_one(model: Model, facts: Sequence[Fact]) -> list[np.ndarray]:
    """Each prompt alone, as the peers have to."""
    return [row for fact in facts for row in ours(model, [fact])]


def captums() -> dict[str, Way]:
    """FeatureAblation through LLMAttribution, a word's baseline being nothing, at its defaults and at two settings.

    By default each token of the answer has a pass of its own, which goes on from the keys of the one before.
    """
    try:
        from captum.attr import FeatureAblation, LLMAttribution, TextTemplateInput
    except ImportError:
        return {}

    def ablate(model: Model, facts: Sequence[Fact], **options: bool) -> list[np.ndarray]:
        explained, found = LLMAttribution(FeatureAblation(model.module), model.tokenizer), []
        for fact in facts:
            parts, answer = fact.prompt.split(), encode(model.tokenizer, fact.prompt, fact.answer).answer
            given = TextTemplateInput(lambda *kept: " ".join(filter(None, kept)), parts, [""] * len(parts))
            result = explained.attribute(given, target=torch.tensor(answer), **options)
            found.append(result.seq_attr.numpy() / len(answer))
        return found

    settings = {"": {}} | {f", {name}=False": {name: False} for name in ("use_cached_outputs", "forward_in_tokens")}
    return {f"captum, FeatureAblation{said}": partial(ablate, **options) for said, options in settings.items()}


def inseqs() -> dict[str, Way]:
    """Occlusion, a token of prompt or answer at a time: its embedding is replaced, and the change loses its sign."""
    try:
        import inseq
    except ImportError:
        return {}

    def occlude(model: Model, facts: Sequence[Fact]) -> list[np.ndarray]:
        explained, found = inseq.load_model(model.module, "occlusion", tokenizer=model.tokenizer), []
        options = {"attributed_fn": "probability", "logprob": True, "show_progress": False}
        for fact in facts:
            whole = join(fact.prompt, fact.answer)
            out = explained.attribute(fact.prompt, whole, **options)
            found.append(out.sequence_attributions[0].target_attributions.numpy())
        return found

    return {"inseq, occlusion": occlude}


if __name__ == "__main__":
    main()
