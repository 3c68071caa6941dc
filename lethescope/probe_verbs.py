"""The verbs of `lethescope probe`: what each asks, measures, draws and tells.

A new verb is one function `(model, options) -> Measurement` and one row in `probes`.
"""

import argparse
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, get_args

import numpy as np
import xarray as xr
from matplotlib.figure import Figure

from lethescope import fidelity, measurement
from lethescope.analyses.heads import RETRIEVAL, STRONG, mean_scores, share_at_least, top_heads
from lethescope.errors import InputError
from lethescope.facts import SPLITS, Facts, facts_hash, of_split, read_facts
from lethescope.figures import attribution as attribution_figure
from lethescope.figures import context as context_figure
from lethescope.figures import heads as heads_figure
from lethescope.figures import horizon as horizon_figure
from lethescope.figures import landscape as landscape_figure
from lethescope.measurement import to_json
from lethescope.models import Model, load
from lethescope.probes import attribution, context, horizon, landscape, needles, retrieval_heads
from lethescope.probes.context_units import NEUTRAL, contexts, swapped
from lethescope.probes.prompt_words import bare

Arguments = dict[str, dict[str, Any]]


class Probe(NamedTuple):
    """A verb: what it asks, its own arguments, the function that measures, the figure, and the summary."""

    help: str
    arguments: Arguments
    measure: Callable[[Model, argparse.Namespace], xr.Dataset]
    draw: Callable[..., Figure]
    tell: Callable[[xr.Dataset], list[str]]


def probes() -> dict[str, Probe]:
    """Return the verbs by name; results are `NAME.nc` and `NAME.png`."""
    return {
        "retrieval-heads": Probe(
            "which attention heads copy what stands in the context",
            NEEDLES | SEED,
            _retrieval_heads,
            _draw_heads,
            _tell_heads,
        ),
        "attribution": Probe(
            "what each word of a prompt contributes to the answer",
            FACTS | ATTRIBUTION | SEED,
            _attribution,
            attribution_figure.paper,
            _tell_attribution,
        ),
        "landscape": Probe(
            "the loss of answers at their prompts and around them",
            FACTS | LANDSCAPE | SEED,
            _landscape,
            landscape_figure.paper,
            _tell_landscape,
        ),
        "horizon": Probe(
            "up to which layer the answer needs the subject's states",
            FACTS | HORIZON,
            _horizon,
            horizon_figure.paper,
            _tell_horizon,
        ),
        "context": Probe(
            "whether the model reads what stands in its context, and reads facts as well",
            CONTEXT | SEED,
            _context,
            context_figure.paper,
            _tell_context,
        ),
    }


def _numbers(kind: Callable[[str], Any]) -> Callable[[str], list[Any]]:
    """Return a reader of numbers with commas between them."""

    def read(given: str) -> list[Any]:
        try:
            return [kind(part) for part in given.split(",")]
        except ValueError:
            raise argparse.ArgumentTypeError(f"{given!r} is not numbers with commas between them") from None

    return read


def _count(given: str) -> int:
    if not given.isdecimal() or int(given) < 1:
        raise argparse.ArgumentTypeError(f"{given!r} is not a whole number of 1 or more")
    return int(given)


MODEL: Arguments = {
    "model": {
        "required": True,
        "metavar": "REF",
        "help": "a Hugging Face folder, hub id, adapter or .gguf file",
    },
    "out": {"required": True, "metavar": "DIR", "help": "folder for the results"},
    "device": {"default": "auto", "help": "auto, cpu, cuda …"},
    "dtype": {"default": "auto", "help": "auto, float32, bfloat16, float16"},
}
SEED: Arguments = {"seed": {"type": int, "default": 0}}
FACTS: Arguments = {
    "facts": {"required": True, "metavar": "FILE", "help": "facts file (.jsonl) or a TOFU folder"},
    "template": {"default": "auto", "choices": ("auto", "chat", "qa", "plain"), "help": "for bare questions"},
    "forget": {"metavar": "NAME", "help": "which forget set of a facts folder (forget01, forget10 …)"},
    "limit": {"type": _count, "metavar": "N", "help": "only the first N facts of every split"},
}
ROWS = {"type": _count, "default": 128, "help": "prompts at a time"}

NEEDLES: Arguments = {
    "needles": {"type": _count, "default": 20, "metavar": "N", "help": "how many, spread over lengths and depths"},
    "lengths": {"type": _numbers(int), "default": [512], "metavar": "A,B", "help": "tokens of prompt and answer (512)"},
    "depths": {"type": _numbers(float), "default": [0, 0.25, 0.5, 0.75, 1], "metavar": "A,B", "help": "from 0 to 1"},
    "kind": {
        "default": "key-value",
        "choices": ("key-value", "sentence"),
        "help": "sentence: one in another text",
    },
    "haystack": {"metavar": "DIR", "help": "with --kind sentence: a folder of .txt files, or one file"},
    "mode": {"default": "set", "choices": ("set", "count"), "help": "set: as in the paper; count: as its code counts"},
    "decode": {"action": "store_true", "help": "score the model's own answers and drop the needles it gets wrong"},
}


def _retrieval_heads(model: Model, options: argparse.Namespace) -> xr.Dataset:
    places = len(options.lengths) * len(options.depths)
    where = {"lengths": options.lengths, "depths": options.depths, "each": -(-options.needles // places)}
    asked = {"kind": options.kind, "haystack": options.haystack or "", **where}
    if options.kind == "sentence":
        text = needles.read_haystack(*_texts(Path(options.haystack))) if options.haystack else None
        made = needles.sentence_needles(model.tokenizer, **where, haystack=text, seed=options.seed)
    elif options.haystack:
        raise InputError("--haystack is for --kind sentence; key-value needles need no text")
    else:
        made = needles.key_value_needles(model.tokenizer, **where, seed=options.seed)
    ds = retrieval_heads.measure(model, made, mode=options.mode, decode=options.decode, seed=options.seed)
    how = {"mode": options.mode, "decode": options.decode}
    return ds.assign_attrs(parameters=to_json(asked | how))


def _texts(folder: Path) -> Sequence[Path]:
    """Return the text files of a folder.

    Raises:
        InputError: there are none.
    """
    found = sorted(folder.glob("*.txt")) if folder.is_dir() else [folder]
    if not found:
        raise InputError(f"--haystack {folder}: the folder holds no .txt file")
    return found


def _draw_heads(measurements: Mapping[str, xr.Dataset], *, width: str | float = "report") -> Figure:
    return heads_figure.paper({role: mean_scores(ds) for role, ds in measurements.items()}, width=width)


def _tell_heads(ds: xr.Dataset) -> list[str]:
    mean = mean_scores(ds)
    kept, right = (f"{float(ds[name].mean()):.0%}" for name in ("kept", "right"))
    shares = [f"{share_at_least(mean, cut):.1%} score at least {cut}" for cut in (RETRIEVAL, STRONG)]
    best = [f"{layer}-{head} {float(mean[layer, head]):.2f}" for layer, head in top_heads(mean, 10)]
    return [
        f"{ds.sizes['instance']} needles, kept {kept}, answered right {right}",
        f"of {mean.size} heads {', '.join(shares)}",
        f"top ten (layer-head score): {', '.join(best) or 'none above 0'}",
    ]


ATTRIBUTION: Arguments = {
    "units": {"default": "word", "choices": tuple(attribution.UNITS), "help": "what is taken away at once"},
    "method": {"default": "leave_one_out", "choices": attribution.METHODS},
    "permutations": {"type": _count, "default": 64, "help": "orders that Shapley values are sampled from"},
    "steps": {"type": _count, "default": 32, "help": "points of an integrated gradient"},
    "rows": ROWS,
}


def _attribution(model: Model, options: argparse.Namespace) -> xr.Dataset:
    facts, asked = _facts(model, options), _given(options, "units", "method", "permutations", "steps")
    ds = attribution.measure(model, facts, **asked, seed=options.seed, rows=options.rows)
    return _labelled(ds, model, facts, asked, probe="attribution", seed=options.seed, scale="difference")


def _tell_attribution(ds: xr.Dataset) -> list[str]:
    lines = []
    for split, part in _by_split(ds):
        units, names = part["unit_text"].values.tolist(), part["subject"].values.tolist()
        named = [[bool(_words(unit) & _words(name)) for unit in row] for row, name in zip(units, names, strict=True)]
        found = part["contribution"]
        of_name = found.where(xr.DataArray(named, dims=("fact", "unit")))
        best, own = (f"{float(each.max('unit').mean()):z.2f}" for each in (found, of_name))
        keys = float(attribution.key_units(found).sum("unit").mean())
        lines.append(
            f"{split}, {part.sizes['fact']} facts: log-probability {float(part['log_probability'].mean()):z.2f}; "
            f"{keys:.1f} key words a fact; the strongest word brings {best} nats, of the subject's name {own}"
        )
    return lines


def _words(text: str) -> set[str]:
    return {bare(word) for word in text.split()}


LANDSCAPE: Arguments = {
    "original": {
        "metavar": "REF",
        "help": "its embeddings say which tokens are near, for all models alike",
    },
    "sizes": {
        "type": _numbers(float),
        "default": list(landscape.SIZES),
        "metavar": "A,B",
        "help": "probabilities with which a token is replaced (0.1,0.3,0.5)",
    },
    "k": {"type": _count, "default": 15, "help": "neighbours of a prompt for each size"},
    "m": {"type": _count, "default": 20, "help": "nearest tokens that a replacement is drawn from"},
}


def _landscape(model: Model, options: argparse.Namespace) -> xr.Dataset:
    space = model
    if options.original:
        space = load(options.original, role="original", device=options.device, dtype=options.dtype)
    if space.vocabulary != model.vocabulary:
        raise InputError(f"{options.original} has another vocabulary than {options.model}; leave --original out")
    facts, asked = _facts(model, options), _given(options, "sizes", "k", "m")
    ds = landscape.measure(model, facts, original=space, **asked, seed=options.seed)
    channel = landscape.CHANNEL
    told = {"version": channel.version, "citation": channel.citation, "scale": channel.scale}
    asked |= {"original": space.fingerprint}
    units = "nats per answer token"
    return _labelled(ds, model, facts, asked, probe="landscape", seed=options.seed, units=units, **told)


def _tell_landscape(ds: xr.Dataset) -> list[str]:
    lines = []
    for split, part in _by_split(ds):
        at, prefers = _true_and_wrong(part["loss"]), measurement.value(part).mean("fact")
        lines.append(f"{split}, {part.sizes['fact']} facts: loss at the prompt {at}")
        for size in part["size"].values:
            found = [f"{float(prefers.sel(place=f'{name} {size:g}')):z.2f}" for name in ("sharpness", "relief")]
            around = _true_and_wrong(part["neighbour_loss"].sel(size=size))
            lines.append(
                f"  replaced {size:g}: loss {around}; stands out by sharpness {found[0]}, by relief {found[1]}"
            )
    return [*lines, "standing out: 0 = no more than a wrong answer, 1 = surely the true one"]


def _true_and_wrong(loss: xr.DataArray) -> str:
    true, wrong = loss.isel(candidate=0), loss.isel(candidate=slice(1, None))
    return f"{float(true.mean()):.2f}, of wrong answers {float(wrong.mean()):.2f}"


HORIZON: Arguments = {
    "layers": {"type": _numbers(int), "metavar": "A,B", "help": "blocks after which states are overwritten (all)"},
    "mode": {"default": "keep_one", "choices": get_args(horizon.Mode)},
    "baseline": {"default": "zero", "choices": get_args(horizon.Baseline), "help": "what is written"},
    "score": {"default": "prob", "choices": get_args(horizon.Score), "help": "logprob where the model is sure"},
    "rows": ROWS,
}


def _horizon(model: Model, options: argparse.Namespace) -> xr.Dataset:
    facts, asked = _facts(model, options), _given(options, "layers", "mode", "baseline", "score")
    ds = horizon.measure(model, facts, **asked, rows=options.rows)
    return _labelled(ds, model, facts, asked, probe="horizon", seed=0, scale="difference")  # nothing is drawn


def _tell_horizon(ds: xr.Dataset) -> list[str]:
    lines, layers = [], ds["layer"].values
    for split, part in _by_split(ds):
        group, found = part["group"].mean("fact"), horizon.horizon(part, "group")
        told = f"layer {float(found.median()):g}" if found.count() else "not known"
        ends = dict.fromkeys((int(layers[0]), int(abs(group).fillna(0).idxmax("layer")), int(layers[-1])))
        lost = ", ".join(f"{float(group.sel(layer=layer)):z.2f} after layer {layer}" for layer in ends)
        lines.append(
            f"{split}, {int(part['whole'].count())} of {part.sizes['fact']} facts name their subject: "
            f"{part.attrs['score']} {float(part['whole'].mean()):z.2f}, lost {lost}; median horizon {told}"
        )
    return lines


CONTEXT: Arguments = FACTS | {
    "facts": {"metavar": "FILE", "help": "facts that stand among the neutral units: a facts file or a TOFU folder"},
    "template": {"default": "plain", "choices": ("plain", "qa"), "help": "for bare questions; plain: as they are"},
    "swap": {
        "action": "store_true",
        "help": "write a wrong answer of the same kind into every fact, so that the model must read and cannot know",
    },
    "units": {"type": _count, "default": 16, "help": "units of a context; facts may be half of them (16)"},
    "contexts": {"type": _count, "default": 4, "metavar": "N", "help": "contexts of each direction (4)"},
    "rivals": {"type": _count, "default": 15, "help": "wrong answers beside the true one, at most (15)"},
    "no-decode": {"action": "store_false", "dest": "decode", "help": "do not let the model answer by itself"},
}


def _context(model: Model, options: argparse.Namespace) -> xr.Dataset:
    asked = {"units": options.units, "n": options.contexts, "seed": options.seed}
    made = contexts(model.tokenizer, **asked, facts=_told(model, options))
    ds = context.measure(model, made, decode=options.decode, rivals=options.rivals, seed=options.seed)
    told = json.loads(ds.attrs["parameters"]) | _given(options, "units", "contexts", "swap")
    return ds.assign_attrs(parameters=to_json(told))


def _told(model: Model, options: argparse.Namespace) -> Facts:
    """Return the facts that stand in the contexts, if there are any.

    Raises:
        InputError: there are too many, or options are given for facts that are not.
    """
    if not options.facts:
        for name in ("swap", "limit", "forget"):
            if vars(options)[name]:
                raise InputError(f"--{name} is for facts among the units; give --facts, or leave it out")
        return ()
    facts, room = _facts(model, options), options.contexts * (options.units // 2)
    if len(facts) > room:
        raise InputError(
            f"{len(facts)} facts are too many: {options.contexts} contexts of {options.units} units have room for "
            f"{room} (half of the units); give a lower --limit, more --contexts or more --units"
        )
    return swapped(facts, seed=options.seed) if options.swap else facts


def _tell_context(ds: xr.Dataset) -> list[str]:
    tables = {name: context.by_bin(ds, name, bins=1) for name in ("best", "correct") if name in ds}
    luck, lines = context_figure.chance(ds), []
    for direction in tables["best"]["direction"].values.tolist():
        here = ds["direction"] == direction
        lines.append(f"{direction}, {int((here & (ds['skipped'] != '')).sum())} of {int(here.sum())} skipped")
        for split in (name for name in (NEUTRAL, *SPLITS) if name in ds["split"].values):
            best, *said = (table.sel(direction=direction, split=split) for table in tables.values())
            by_luck = float(luck.sel(direction=direction, split=split))
            told = [f"{float(best['overall']):.0%} of {int(best['count'].sum())}"]
            told += [f"{float(best['overall_low']):.0%} to {float(best['overall_high']):.0%}", f"chance {by_luck:.0%}"]
            told += [f"said {float(each['overall']):.0%}" for each in said]
            lines.append(f"  {split}: {', '.join(told) if best['count'].any() else 'not asked'}")
    return [
        *lines,
        "share of units whose true answer scores highest, 95 % intervals; compare splits of equal chance only",
    ]


def _facts(model: Model, options: argparse.Namespace) -> Facts:
    every = read_facts(options.facts, template=options.template, tokenizer=model.tokenizer, forget=options.forget)
    facts = tuple(fact for split in SPLITS for fact in of_split(every, split)[: options.limit])
    fidelity.check_model(model, facts)
    return facts


def _given(options: argparse.Namespace, *names: str) -> dict[str, Any]:
    return {name: vars(options)[name] for name in names}


def _labelled(ds: xr.Dataset, model: Model, facts: Facts, parameters: Mapping[str, Any], **told: Any) -> xr.Dataset:
    """Add what a Measurement must say of itself to what the probe already says."""
    return ds.assign_attrs(
        {"version": 1, **told},
        parameters=to_json(parameters),
        model=model.fingerprint,
        facts=facts_hash(facts),
        dtype=str(model.dtype),
        device=str(model.device),
    )


def _by_split(ds: xr.Dataset) -> list[tuple[str, xr.Dataset]]:
    parts = ((split, ds.isel(fact=np.flatnonzero(ds["split"].values == split))) for split in SPLITS)
    return [(split, part) for split, part in parts if part.sizes["fact"]]
