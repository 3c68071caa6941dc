"""The audit: every channel on every model, the nulls and the planted controls, and the verdict."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import pandas as pd
import xarray as xr

from lethescope import analyses, fidelity, figures, probes, report, runs
from lethescope.cells import Bench, measure_all
from lethescope.channel import BUDGETS, Channel
from lethescope.errors import InputError
from lethescope.facts import Fact, Facts, check_facts, facts_hash, read_facts
from lethescope.models import Model, load
from lethescope.scoring import candidates
from lethescope.sections import SECTIONS, in_numbers
from lethescope.summary import VERSION, as_json, evidence, findings, summarise

CHANNELS: dict[str, Channel] = {**probes.CHANNELS, **analyses.CHANNELS}


@dataclass(frozen=True)
class Audit:
    """The result of an audit: the verdict, the evidence it rests on, and every measurement.

    Attributes:
        summary: what `verdict.json` holds.
        evidence: tidy rows (fact, subject, split, channel, role, value, null, residue).
        facts: the facts that were asked.
        measurements: (channel, role) -> Measurement.
    """

    summary: dict[str, Any]
    evidence: pd.DataFrame = field(repr=False)
    facts: Facts = field(repr=False)
    measurements: dict[tuple[str, str], xr.Dataset] = field(repr=False)

    @property
    def verdict(self) -> str:
        """`known`, `suppressed`, `partly_erased`, `no_residue_found`, `damaged` or `inconclusive`."""
        return str(self.summary["verdict"])

    def measurement(self, channel: str, role: str = "unlearned") -> xr.Dataset:
        """Return the Measurement of a channel on a role.

        Raises:
            InputError: there is none; the names that exist are listed.
        """
        if (channel, role) not in self.measurements:
            there = ", ".join(sorted(f"{c}.{r}" for c, r in self.measurements))
            raise InputError(f"no measurement {channel}.{role}; there are {there}")
        return self.measurements[channel, role]

    def figure(self, name: str = "residue") -> Any:
        """Return a matplotlib Figure: `residue`, or a name in `figures()`.

        Raises:
            InputError: there is no such figure; the names that exist are listed.
        """
        drawn = self.figures()
        if name not in drawn:
            raise InputError(f"no figure {name!r}; there are {', '.join(drawn)}")
        return drawn[name]

    def figures(self) -> dict[str, Any]:
        """Draw every figure that this audit's channels allow."""
        shown = {name: _of(self.measurements, name) for name in self.summary["sections"]}
        drawn = {name: SECTIONS[name].draw(measured) for name, measured in shown.items()}
        return figures.of_audit(self.summary, self.measurements) | drawn

    def without_references(self) -> "Audit":
        """Return the same measurements weighed as if no reference had been given: how much hangs on them?"""
        told = self.summary
        return _conclude(
            {role: model for role, model in told["models"].items() if not role.startswith("reference")},
            self.facts,
            {cell: ds for cell, ds in self.measurements.items() if not cell[1].startswith("reference")},
            [CHANNELS[channel["name"]] for channel in told["channels"]],
            told["budget"],
            told["seed"],
        )

    def save(self, folder: str | Path) -> Path:
        """Write verdict.json, evidence.csv, report.html and the measurements into a folder, and return it.

        Raises:
            InputError: the folder cannot be written.
        """
        folder = Path(folder)
        store = runs.Store(folder / "measurements")
        for (channel, role), ds in self.measurements.items():
            store.put(channel, role, ds)
        runs.write_text(folder / "evidence.csv", self.evidence.to_csv(index=False))
        page = report.render(self.summary, self.evidence, self.figures(), self.facts)
        runs.write_text(folder / "report.html", page)
        runs.write_text(folder / "verdict.json", as_json(self.summary))
        return folder

    def __str__(self) -> str:
        return report.as_text(self.summary)

    def _repr_html_(self) -> str:
        return report.as_html_card(self.summary)


def audit(
    original: Any,
    unlearned: Any,
    facts: str | Path | Sequence[Fact],
    *,
    references: Sequence[Any] = (),
    channels: Sequence[str] | None = None,
    sections: Sequence[str] | None = None,
    budget: str = "standard",
    seed: int = 0,
    out: str | Path | None = None,
    cache: str | Path | None = None,
    tokenizer: Any = None,
    device: str = "auto",
    dtype: str = "auto",
    template: str = "auto",
    forget: str | None = None,
    engine: Literal["local", "ray"] = "local",
    progress: bool | None = None,
) -> Audit:
    """Ask of two models whether the second forgot the facts or only stopped saying them.

    Every channel runs on the original, the unlearned model, every reference and two planted suppressed copies of the
    original, with the same options and seed. The verdict says what these channels found at this budget; it never says
    that knowledge is deleted.

    Args:
        original: the model before: a reference that `load` takes, a live Hugging Face module (with `tokenizer`), or a
            `Model`.
        unlearned: the model that claims to have forgotten, likewise.
        facts: a facts file or folder, or facts.
        references: models that never learned the forget facts, if there are any.
        channels: which channels to run; all by default. *say* always runs.
        sections: what else to show in the report (`lethescope.sections`): all by default, none at the budget `quick`.
        budget: `quick`, `standard` or `thorough`.
        seed: of everything random.
        out: a folder for results; a stopped audit goes on from there.
        cache: a folder of finished cells that several audits share.
        tokenizer: for live modules.
        device: `auto`, `cpu`, `cuda` …
        dtype: `auto`, `float32`, `bfloat16` …
        template: how bare questions become prompts (`read_facts`).
        forget: which forget set to take from a facts folder that holds several.
        engine: `local` or `ray`.
        progress: show a progress bar; by default on a terminal.

    Returns:
        The audit; `str(audit)` is its summary, and it shows itself in Jupyter.

    Raises:
        InputError: something given cannot be used.

    Example:
        >>> from lethescope.subjects import shipped
        >>> result = audit(
        ...     shipped("original"), shipped("unlearned"), shipped("facts"), channels=["say", "lens"], progress=False
        ... )
        >>> sorted(result.evidence["channel"].unique())
        ['lens', 'say']
    """
    chosen, shown = _choose(channels, budget), _choose_sections(sections, budget)
    models = _load_all(original, unlearned, references, tokenizer, device, dtype)
    if not isinstance(facts, str | Path):
        asked = check_facts(facts)
    else:
        tokens = models["original"].tokenizer
        asked = read_facts(facts, template=template, tokenizer=tokens, forget=forget)
    _check_shapes(chosen, models)
    _check_words(models, asked)
    for model in models.values():
        fidelity.check_model(model, asked)
    fidelity.check_pair(models["original"], models["unlearned"])
    identity = _identity(models, asked, [*chosen, *shown], budget, seed)
    if out is not None:
        runs.claim(Path(out), identity)
    store = runs.Store(Path(out) / "measurements" if out else None, Path(cache) if cache else None)
    bench = Bench(models, asked, budget, seed, store)
    measurements = measure_all(bench, chosen, shown, engine=engine, progress=progress)
    described = {role: {**m.described(), "approximate": m.approximate} for role, m in models.items()}
    result = _conclude(described, asked, measurements, chosen, budget, seed)
    result.summary["facts"]["path"] = str(facts) if isinstance(facts, str | Path) else ""
    if out is not None:
        result.save(out)
    return result


def _of(measurements: Mapping[tuple[str, str], xr.Dataset], name: str) -> dict[str, xr.Dataset]:
    return {role: ds for (channel, role), ds in measurements.items() if channel == name}


def _conclude(
    models: Mapping[str, Mapping[str, Any]],
    facts: Facts,
    measurements: Mapping[tuple[str, str], xr.Dataset],
    chosen: Sequence[Channel],
    budget: str,
    seed: int,
) -> Audit:
    """Weigh what was measured."""
    found = findings(chosen, seed, measurements)
    not_run = [f"channel {name}" for name in CHANNELS if name not in found]
    told = summarise(models, facts, found, measurements, not_run=not_run, budget=budget, seed=seed)
    told["sections"] = in_numbers(measurements)
    return Audit(told, evidence(found, facts, measurements), facts, dict(measurements))


def _choose(channels: Sequence[str] | None, budget: str) -> list[Channel]:
    if budget not in BUDGETS:
        raise InputError(f"unknown budget {budget!r}; use {', '.join(BUDGETS)}")
    unknown = [name for name in channels or () if name not in CHANNELS]
    if unknown:
        raise InputError(f"unknown channel {unknown[0]!r}; there are {', '.join(CHANNELS)}")
    return [c for name, c in CHANNELS.items() if channels is None or name in channels or name == "say"]


def _choose_sections(sections: Sequence[str] | None, budget: str) -> list[Channel]:
    unknown = [name for name in sections or () if name not in SECTIONS]
    if unknown:
        raise InputError(f"unknown section {unknown[0]!r}; there are {', '.join(SECTIONS)}")
    names = sections if sections is not None else () if budget == "quick" else SECTIONS
    return [SECTIONS[name].probe for name in names]


def _load_all(
    original: Any, unlearned: Any, references: Sequence[Any], tokenizer: Any, device: str, dtype: str
) -> dict[str, Model]:
    refs = {"original": original, "unlearned": unlearned}
    refs |= {f"reference-{i}": ref for i, ref in enumerate(references)}
    return {role: load(ref, role=role, tokenizer=tokenizer, device=device, dtype=dtype) for role, ref in refs.items()}


def _check_shapes(chosen: list[Channel], models: dict[str, Model]) -> None:
    """Refuse channels that exchange states between models that have no common shape, and say what can be run.

    Raises:
        InputError: a chosen channel needs equal shapes and these differ.
    """
    shape = models["original"].shape
    other = next((role for role, model in models.items() if model.shape != shape), None)
    barred = [c.name for c in chosen if c.needs == "shape"]
    if other is None or not barred:
        return
    what = "vocabularies" if models[other].vocabulary != shape[2] else "numbers of blocks or widths"
    left = ",".join(c.name for c in chosen if c.needs != "shape")
    raise InputError(
        f"original and {other} have different {what}, so {', '.join(barred)} cannot exchange their states; "
        f"what still can be run: --channels {left}"
    )


def _check_words(models: dict[str, Model], facts: Facts) -> None:
    """Tokenise everything that will be asked, so that a fact without tokens is refused before anything is written.

    Raises:
        InputError: a prompt or an answer tokenises to nothing or to other words; the fact is named.
    """
    prompts = 1 + max(len(fact.paraphrases) for fact in facts)
    for tokenizer in {model.vocabulary: model.tokenizer for model in models.values()}.values():
        for n in range(prompts):
            candidates(tokenizer, facts, prompt=n, most=None if n == 0 else 0)


def _identity(models: dict[str, Model], facts: Facts, chosen: list[Channel], budget: str, seed: int) -> dict[str, Any]:
    """Everything that makes this audit this audit; the manifest holds it."""
    return {
        "lethescope": VERSION,
        "models": {role: m.described() for role, m in models.items()},
        "facts": facts_hash(facts),
        "channels": {c.name: {"version": c.version, "options": dict(c.budgets[budget])} for c in chosen},
        "budget": budget,
        "seed": seed,
        "dtype": str(models["original"].dtype),
        "device": models["original"].device.type,
    }
