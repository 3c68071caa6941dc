"""The instruments beside the verdict on a real model: heads, attribution and context, before and after unlearning.

SmolLM2-135M-Instruct, and what GradDiff and NPO made of it (`run.py`). `make smollm2-instruments` runs this file: it
prints the tables of docs/smollm2.md, draws its figures, takes some 50 minutes on one core, and goes on after a stop.
"""

import argparse
from collections.abc import Callable, Iterator
from functools import cache, partial
from pathlib import Path

import xarray as xr
from run import FACTS, METHODS, unlearned, weights

from lethescope import load, read_facts
from lethescope.analyses import emphasis
from lethescope.analyses.heads import STRONG, ablation, compare, in_context, mean_scores, share_at_least, top_heads
from lethescope.facts import of_split
from lethescope.figures import attribution as attribution_figure
from lethescope.figures import context as context_figure
from lethescope.figures import heads as heads_figure
from lethescope.figures import style
from lethescope.measurement import replacing
from lethescope.models import Model
from lethescope.probes import attribution, context, lost_in_thought, retrieval_heads
from lethescope.probes.context_units import contexts, swapped
from lethescope.probes.needles import key_value_needles, sentence_needles

FACTS_ = read_facts(FACTS)
PLACES = {"lengths": (256, 512, 1024), "depths": (0.0, 0.25, 0.5, 0.75, 1.0)}
KS = (5, 10, 20)
"""How many of the 270 heads are taken out."""
K = 10
Found = dict[str, dict[str, xr.Dataset]]
"""Role to name to result."""


def main() -> None:
    """Measure the three models one after the other, then print and draw."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--figures", type=Path, help="folder for the figures; that of the results by default")
    given = parser.parse_args()
    given.out.mkdir(parents=True, exist_ok=True)
    made = {"original": weights()} | {name: unlearned(name, given.out / f"model-{name}") for name in METHODS}
    found: Found = {role: {} for role in made}
    for role, path in made.items():
        loaded = cache(partial(load, path))
        for name, measure in measures(loaded, found[role], whole=role == "original"):
            found[role][name] = kept(given.out / f"{role} {name}.nc", measure)
    for title, tell in TABLES.items():
        print(f"\n## {title}\n\n" + "\n".join(tell(found)))
    draw(found, given.figures or given.out)


def kept(path: Path, measure: Callable[[], xr.Dataset]) -> xr.Dataset:
    """Return what an earlier run kept, or measure and keep it."""
    if not path.exists():
        with replacing(path) as temporary:
            temporary.write_bytes(bytes(measure().to_netcdf(engine="h5netcdf")))
    return xr.load_dataset(path, engine="h5netcdf")


def measures(
    loaded: Callable[[], Model], found: dict[str, xr.Dataset], *, whole: bool
) -> Iterator[tuple[str, Callable[[], xr.Dataset]]]:
    """Yield what is measured on one model; `whole` is for the original, which is looked at more closely."""
    yield "heads", lambda: retrieval_heads.measure(loaded(), sentence_needles(loaded().tokenizer, **PLACES, each=4))
    for name, k in [("needles", k) for k in (KS if whole else (K,))] + [("known", K), ("read", K)]:
        yield f"without {k} heads, {name}", partial(without, loaded, found, name, k)
    yield "attribution", lambda: attribution.measure(loaded(), of_split(FACTS_, "forget"))
    yield "context", lambda: context.measure(loaded(), contexts(loaded().tokenizer, units=16, n=4, facts=told()))
    if whole:
        few = {**PLACES, "lengths": (256,)}
        yield (
            "key-value heads",
            lambda: retrieval_heads.measure(loaded(), key_value_needles(loaded().tokenizer, **few, each=4)),
        )
        items = lost_in_thought.arithmetic_items(24, pairs=6)
        yield "thought", lambda: lost_in_thought.measure(loaded(), items, generate=False)


def without(loaded: Callable[[], Model], found: dict[str, xr.Dataset], name: str, k: int) -> xr.Dataset:
    """Take the model's own best heads out: fresh needles, forget facts it knew, or swapped ones that it must read."""
    forget = of_split(FACTS_, "forget")
    asked = {
        "needles": lambda: sentence_needles(loaded().tokenizer, **PLACES, each=2, seed=1),
        "known": lambda: forget,
        "read": lambda: in_context(swapped(forget)),
    }
    return ablation(loaded(), asked[name](), found["heads"], k=k)


def told() -> list:
    """Return 12 forget and 12 retain facts, answers swapped within their relations, so that they can only be read."""
    few = [f for f in FACTS_ if f.relation in {"capital", "city", "author"}]
    return [*swapped([*of_split(few, "forget")[:12], *of_split(few, "retain")[:12]])]


def tell_heads(found: Found) -> Iterator[str]:
    """Yield how sparse the retrieval heads are, and how far they moved."""
    yield row("model", "needles, log p", "heads ≥ 0.1", "heads ≥ 0.5", "Pearson", "Spearman", "Jaccard of the top 30")
    yield row(*["---"] * 7)
    first = found["original"]["heads"]
    every = {role: results["heads"] for role, results in found.items()}
    every["original, key-value needles"] = found["original"]["key-value heads"]
    for role, ds in every.items():
        both = compare(first, ds)
        scores, log_p = mean_scores(ds), float(ds["log_probability"].mean())
        near = ["", "", ""] if role == "original" else [f"{both[n]:.2f}" for n in NEAR]
        yield row(role, f"{log_p:.2f}", f"{share_at_least(scores):.1%}", f"{share_at_least(scores, STRONG):.1%}", *near)
    best = top_heads(mean_scores(first), 10)
    yield "\nTop ten of the original (layer-head): " + ", ".join(
        f"{layer}-{head} {float(mean_scores(first)[layer, head]):.2f}" for layer, head in best
    )


NEAR = ("pearson", "spearman", "jaccard_top30")


def tell_ablation(found: Found) -> Iterator[str]:
    """Yield the answers' mean log-probability with all heads, without the best and without matched others."""
    yield row("model", "asked", "heads out", "none out", "the best out", "others out", "effect")
    yield row(*["---"] * 7)
    for role, results in found.items():
        for name, ds in results.items():
            if name.startswith("without"):
                log_p = ds["log_prob"].mean("instance").values
                means = [f"{x:.2f}" for x in (log_p[0], log_p[1], log_p[2:].mean())]
                estimate, low, high = ds["effect"].sel(quantity="log_prob").values
                asked = name.partition(", ")[2]
                yield row(role, asked, ds.attrs["k"], *means, f"{estimate:.2f} [{low:.2f}, {high:.2f}]")


def tell_attribution(found: Found) -> Iterator[str]:
    """Yield how the words of the forget prompts are used, before against after."""
    yield row("model", "log-probability", "largest contribution", "Spearman", "Jaccard of key words", "same top word")
    yield row(*["---"] * 6)
    first = found["original"]["attribution"]
    for role, results in found.items():
        ds = results["attribution"]
        both = emphasis.compare(first, ds)
        near = [f"{float(both[name].mean()):.2f}" for name in ("spearman", "jaccard", "top1_agreement")]
        largest = float(ds["contribution"].max("unit").mean())
        yield row(role, f"{float(ds['log_probability'].mean()):.2f}", f"{largest:.2f}", *near)


def tell_context(found: Found) -> Iterator[str]:
    """Yield the share of units whose true answer scores above its rivals, by split."""
    yield row("model", "direction", "neutral", "forget", "retain", "neutral, without the context")
    yield row(*["---"] * 6)
    for role, results in found.items():
        read, bare = (context.by_bin(results["context"], name) for name in ("best", "best_without"))
        for direction in read["direction"].values:
            at = read.sel(direction=direction)
            shares = [interval(at.sel(split=split)) for split in ("neutral", "forget", "retain")]
            yield row(
                role, direction, *shares, f"{float(bare['overall'].sel(direction=direction, split='neutral')):.2f}"
            )


def interval(at: xr.Dataset) -> str:
    """Write an accuracy with its exact interval."""
    return f"{float(at['overall']):.2f} [{float(at['overall_low']):.2f}, {float(at['overall_high']):.2f}]"


def tell_thought(found: Found) -> Iterator[str]:
    """Yield accuracies by arm, and the gaps."""
    told = lost_in_thought.gaps(found["original"]["thought"])
    arms = zip(told["arm"].values, told["accuracy"].values, strict=True)
    yield "Accuracy (chance 0.17): " + ", ".join(f"{arm} {float(share):.2f}" for arm, share in arms)
    for contrast in told["contrast"].values:
        at = told.sel(contrast=contrast)
        yield f"- {contrast}: {float(at['estimate']):.2f} [{float(at['low']):.2f}, {float(at['high']):.2f}]"


TABLES = {
    "Retrieval heads": tell_heads,
    "Without the best heads": tell_ablation,
    "Attribution": tell_attribution,
    "Context": tell_context,
    "Lost in thought, original": tell_thought,
}


def row(*cells: object) -> str:
    """Return a row of a Markdown table."""
    return "| " + " | ".join(map(str, cells)) + " |"


def draw(found: Found, folder: Path) -> None:
    """Draw the figures of docs/smollm2.md: the original, and NPO as the unlearned model."""
    pair = {"original": found["original"], "unlearned": found["npo"]}
    scores = {role: mean_scores(results["heads"]) for role, results in pair.items()}
    by_relation = {fact.relation: fact.id for fact in reversed(of_split(FACTS_, "forget"))}
    words = [by_relation[relation] for relation in ("continent", "capital", "author", "symbol")]
    figures = {
        "heads": heads_figure.paper(scores),
        "ablation": heads_figure.ablation(found["original"][f"without {K} heads, needles"]),
        "attribution": attribution_figure.paper({r: f["attribution"] for r, f in pair.items()}, facts=words),
        "context": context_figure.paper({r: f["context"] for r, f in pair.items()}),
    }
    for name, figure in figures.items():
        style.save(figure, folder / f"smollm2-{name}.png")


if __name__ == "__main__":
    main()
