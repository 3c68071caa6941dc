"""The verdict: what all channels together allow to be said, and no more."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np
import xarray as xr

from lethescope.analyses.residue import Residue
from lethescope.measurement import value
from lethescope.statistics import Interval, cluster_weights, holm, interval

Word = Literal["known", "suppressed", "partly_erased", "no_residue_found", "damaged", "inconclusive"]

MARGIN = 0.2
"""Equivalence margin: a residue whose interval ends below it counts as none."""
HALF = 0.5
"""From here on a residue is most of what the original has: *said* makes *known*, *found* makes *suppressed*."""
LEVEL = 0.05
LEAST_FACTS, LEAST_SUBJECTS, LEAST_VOTERS = 10, 5, 2
DRAWS = 4000


@dataclass(frozen=True)
class Finding:
    """A channel's residue, its planted controls, and whether it may vote."""

    name: str
    residue: Residue
    planted: Mapping[str, Interval]
    p_adjusted: float
    seconds: float
    grounded: bool = True
    """False where the channel needs a reference for its null and none was given: it may neither decide nor vote."""
    floor: float = 0.0
    """What a residue must surely exceed to be found: 0 held against references, which were asked the same facts; the
    margin without any, when the forget facts may be easier to guess than the control facts that stand in for them."""

    @property
    def blind(self) -> bool:
        """True when a planted suppressed copy would have passed for one without residue."""
        return not self.planted or any(not seen.low > MARGIN for seen in self.planted.values())

    @property
    def votes(self) -> bool:
        """True when the channel's silence means something."""
        return self.grounded and self.residue.testable and not self.blind and self.name != "say"

    @property
    def found(self) -> bool:
        """True when the residue is above the floor after correction for the number of channels."""
        return self.positive and bool(self.residue.simultaneous.low > self.floor)

    @property
    def positive(self) -> bool:
        """True when the residue is above zero after correction for the number of channels."""
        sure = self.p_adjusted < LEVEL and bool(self.residue.simultaneous.low > 0)
        return self.grounded and self.residue.testable and sure

    @property
    def silent(self) -> bool:
        """True when the residue is surely below the margin."""
        return bool(self.residue.residue.high < MARGIN)


def adjust(p_values: Mapping[str, float]) -> dict[str, float]:
    """Holm's correction over the channels that have a p-value; NaN stays NaN."""
    known = {name: p for name, p in p_values.items() if not np.isnan(p)}
    return {**p_values, **dict(zip(known, holm(list(known.values())), strict=True))}


@dataclass(frozen=True)
class Damage:
    """What is left of the retain facts: the mean said value before and after, and their ratio."""

    before: float
    after: float
    kept: Interval

    @property
    def damaged(self) -> bool:
        """True when surely less than half of what the retain facts had is left."""
        return bool(self.kept.high < HALF)


def damage(say: Mapping[str, xr.Dataset], seed: int) -> Damage:
    """Compare how readily retain facts are said before and after, on the scale of *say*; NaN without retain facts."""
    values = {role: value(say[role]).isel(place=0) for role in ("original", "unlearned")}
    retain = {role: v.where(v["split"] == "retain", drop=True) for role, v in values.items()}
    before, after = (np.asarray(retain[role].values, dtype=float) for role in ("original", "unlearned"))
    nothing = Interval(float("nan"), float("nan"), float("nan"))
    if not len(before) or not before.mean() > 0:
        return Damage(float("nan"), float("nan"), nothing)
    weights = cluster_weights([str(s) for s in retain["original"]["subject"].values], seed, DRAWS)
    ratios = (weights @ after) / (weights @ before)
    kept = interval(float(after.mean() / before.mean()), ratios)
    return Damage(float(before.mean()), float(after.mean()), kept)


class Decision(NamedTuple):
    """The verdict, the channel that decided it, the reason, and the channel whose residue stands beside the word."""

    word: Word
    by: str
    reason: str
    residue_of: str


def decide(findings: Mapping[str, Finding], hurt: Damage, n_facts: int, n_subjects: int) -> Decision:
    """Return the verdict by the first rule that applies.

    1. Too few facts or subjects, or facts that the original itself does not say: *inconclusive*.
    2. The unlearned model says at least half of what the original says: *known*.
    3. Less than half of the retain facts' value is left: *damaged*; what was lost with everything is not forgotten.
       The residue beside it is that of rules 4 to 6: a broken model may still hold what it cannot say.
    4. A channel finds a residue (Holm-adjusted p < 0.05, simultaneous interval above 0, or above the margin without a
       reference, and not wholly within the margin): the one with the highest simultaneous lower limit decides.
       *suppressed* from half on, *partly erased* below.
    5. At least two channels may vote, and every one of them, and *say*, ends below the margin: *no residue found*.
    6. Otherwise *inconclusive*.
    """
    say = findings["say"].residue
    missing = _missing(say, n_facts, n_subjects)
    if missing:
        return Decision("inconclusive", "say", missing, "say")
    said = say.residue
    if said.estimate >= HALF and said.low > MARGIN:
        return Decision("known", "say", f"the model still says {said.estimate:.0%} of what the original says", "say")
    inside = _inside(findings, f"the model says {max(said.estimate, 0):.0%} of what the original says")
    if not hurt.damaged:
        return inside
    left = f"only {max(hurt.kept.estimate, 0):.0%} of the retain facts' value is left"
    more = f", and {_finds(findings[inside.by])}" if inside.word in {"suppressed", "partly_erased"} else ""
    return Decision("damaged", "say", f"{left}; a broken model has not shown that it forgot{more}", inside.by)


def _missing(say: Residue, n_facts: int, n_subjects: int) -> str:
    """Say why nothing can be decided on these facts at all; an empty text where something can."""
    if n_facts < LEAST_FACTS or n_subjects < LEAST_SUBJECTS:
        need = f"at least {LEAST_FACTS} facts about {LEAST_SUBJECTS} subjects are needed"
        return f"{n_facts} forget facts about {n_subjects} subjects are too few; {need}"
    return "" if say.testable else "the original does not say the forget facts, so there is nothing to have forgotten"


def _inside(findings: Mapping[str, Finding], spoken: str) -> Decision:
    """Weigh what the channels find in a model that does not say it: rules 4 to 6."""
    found = [f for f in findings.values() if f.found and not f.silent]
    if found:
        best = max(found, key=lambda f: f.residue.simultaneous.low)
        if best.residue.residue.estimate >= HALF:
            return Decision("suppressed", best.name, f"{spoken}, but {_finds(best)}", best.name)
        return Decision("partly_erased", best.name, f"{spoken}, and {_finds(best)}", best.name)
    voters = [f for f in findings.values() if f.votes]
    if len(voters) < LEAST_VOTERS:
        names = ", ".join(f.name for f in voters) or "none"
        reason = f"too few channels can see a planted residue here ({names}); at least {LEAST_VOTERS} must"
        return Decision("inconclusive", "say", reason, "say")
    worst = max((*voters, findings["say"]), key=lambda f: f.residue.residue.high)
    if not worst.silent:
        return Decision("inconclusive", worst.name, _unsure(worst), worst.name)
    hardest = max(voters, key=lambda f: f.residue.residue.high)
    most = f"{hardest.residue.residue.high:.0%}"
    reason = f"none of {len(voters)} channels that see planted residues finds more than {most}"
    return Decision("no_residue_found", hardest.name, reason, hardest.name)


def _unsure(finding: Finding) -> str:
    if finding.positive:
        guessed = "facts that are easier to guess than the control facts; a reference would tell"
        return f"{finding.name} finds {finding.residue.residue.estimate:.0%}, but so might it of {guessed}"
    high = f"{finding.residue.residue.high:.0%}"
    return f"{finding.name} finds nothing sure but cannot rule out a residue of up to {high}; more facts would help"


def _finds(finding: Finding) -> str:
    return f"{finding.name} still finds {finding.residue.residue.estimate:.0%} of what it finds in the original"
