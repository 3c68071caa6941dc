"""Cells: one channel on one role, each computed once and kept under a key of everything it depends on."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

import xarray as xr
from tqdm.auto import tqdm

from lethescope import engine as engines
from lethescope import measurement, runs
from lethescope.channel import Channel
from lethescope.cost import counting
from lethescope.errors import InputError
from lethescope.facts import Facts, facts_hash
from lethescope.models import Model
from lethescope.subjects.planted import PLANTED


class NotMeasured(Exception):
    """A copy could not be planted, or a section does not suit these models: the audit goes on without this cell."""


class Cell(NamedTuple):
    """A channel and the role it is to be measured on."""

    channel: Channel
    role: str


@dataclass
class Bench:
    """What every cell of an audit shares: the models, the facts, the options, and the store."""

    models: dict[str, Model]
    facts: Facts
    budget: str
    seed: int
    store: runs.Store
    made: dict[str, Model] = field(default_factory=dict)

    def roles(self) -> list[str]:
        """The models given, then the planted copies that are made on the spot."""
        return [*self.models, *(f"planted-{kind}" for kind in PLANTED)]

    def model(self, role: str) -> Model:
        """Return the model of a role; a planted copy is made when it is first needed.

        Raises:
            NotMeasured: the copy could not be silenced.
        """
        if role in self.models:
            return self.models[role]
        if role not in self.made:
            original = self.models["original"]
            plant = PLANTED[role.removeprefix("planted-")]
            try:
                module = plant(original.module, original.tokenizer, self.facts)
            except InputError as error:
                raise NotMeasured(str(error)) from error
            self.made[role] = Model(module, original.tokenizer, role, f"made from {original.path}")
        return self.made[role]

    def measure(self, cell: Cell) -> xr.Dataset | None:
        """Return the Measurement of a cell, from the store or computed now; None where there can be none.

        Raises:
            InputError: the measurement itself cannot be made.
        """
        try:
            key = runs.key(**self._parts(cell))
            return self.store.cell(cell.channel.name, cell.role, key, lambda: self._compute(cell))
        except NotMeasured:
            return None

    def _given(self, cell: Cell) -> Facts:
        """The splits that the channel uses; only the original and the unlearned model need their own control split."""
        own_control = cell.role in {"original", "unlearned"}
        return tuple(f for f in self.facts if f.split in cell.channel.splits and (own_control or f.split != "control"))

    def _parts(self, cell: Cell) -> dict[str, Any]:
        original, channel = self.models["original"], cell.channel
        planted = cell.role not in self.models
        return {
            "model": f"{cell.role} of {original.fingerprint}" if planted else self.models[cell.role].fingerprint,
            "planted for": facts_hash(self.facts) if planted else "",
            "original": original.fingerprint if channel.sees_original else "",
            "vocabulary": original.vocabulary,
            "channel": channel.name,
            "version": channel.version,
            "options": dict(channel.budgets[self.budget]),
            "facts": facts_hash(self._given(cell)),
            "seed": self.seed,
            "device": str(original.device),
            "dtype": str(original.dtype),
        }

    def _compute(self, cell: Cell) -> xr.Dataset:
        model, facts, channel = self.model(cell.role), self._given(cell), cell.channel
        options = dict(channel.budgets[self.budget])
        with counting() as cost:
            found = channel.measure(model, facts, original=self.models["original"], seed=self.seed, **options)
        return found.assign_attrs(
            probe=channel.name,
            version=channel.version,
            parameters=measurement.to_json(options),
            model=model.fingerprint,
            facts=facts_hash(facts),
            dtype=str(model.dtype),
            device=str(model.device),
            seed=self.seed,
            citation=channel.citation,
            units=found.attrs.get("units", "nats per answer token"),
            scale=channel.scale,
            **vars(cost),
        )


def measure_all(
    bench: Bench,
    channels: Sequence[Channel],
    sections: Sequence[Channel] = (),
    *,
    engine: Literal["local", "ray"] = "local",
    progress: bool | None = None,
) -> dict[tuple[str, str], xr.Dataset]:
    """Measure every channel on every role, and the sections on the models given; (channel, role) -> Measurement."""
    cells = [Cell(channel, role) for role in bench.roles() for channel in channels]
    cells += [Cell(section, role) for section in sections for role in bench.models]
    hidden = None if progress is None else not progress  # None hides the bar where there is no terminal
    found: dict[tuple[str, str], xr.Dataset] = {}
    with tqdm(total=len(cells), desc="audit", unit="cell", disable=hidden, leave=False) as bar:
        bar.set_postfix_str(_name(cells[0]))
        for i, ds in enumerate(engines.run(bench.measure, cells, engine=engine)):
            if ds is not None:
                found[cells[i].channel.name, cells[i].role] = ds
            bar.set_postfix_str(_name(cells[min(i + 1, len(cells) - 1)]), refresh=False)
            bar.update()
    return found


def _name(cell: Cell) -> str:
    return f"{cell.channel.name} on {cell.role}"
