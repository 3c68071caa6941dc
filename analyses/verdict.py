"""The verdict: what all channels together allow to be said, and no more."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

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
        """True when the residue is above zero after correction for the number of channels."""
        sure = self.p_adjusted < LEVEL and self.residue.simultaneous.low > 0
        return self.grounded and self.residue.testable and sure


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


def decide(findings: Mapping[str, Finding], hurt: Damage, n_facts: int, n_subjects: int) -> tuple[Word, str, str]:
    """Return the verdict, the channel that decided it and the reason, by the first rule that applies.

    1. Too few facts or subjects, or facts that the original itself does not say: *inconclusive*.
    2. The unlearned model says at least half of what the original says: *known*.
    3. Less than half of the retain facts' value is left: *damaged*; what was lost with everything is not forgotten.
    4. A channel finds a residue (Holm-adjusted p < 0.05, simultaneous interval above 0, not within the margin): the one
       with the highest simultaneous lower limit decides. *suppressed* from half on, *partly erased* below.
    5. At least two channels may vote, and every one of them, and *say*, ends below the margin: *no residue found*.
    6. Otherwise *inconclusive*.
    """
    say = findings["say"]
    if n_facts < LEAST_FACTS or n_subjects < LEAST_SUBJECTS:
        need = f"at least {LEAST_FACTS} facts about {LEAST_SUBJECTS} subjects are needed"
        return "inconclusive", "say", f"{n_facts} forget facts about {n_subjects} subjects are too few; {need}"
    if not say.residue.testable:
        return (
            "inconclusive",
            "say",
            "the original does not say the forget facts, so there is nothing to have forgotten",
        )
    said = say.residue.residue
    if said.estimate >= HALF and said.low > MARGIN:
        return "known", "say", f"the model still says {said.estimate:.0%} of what the original says"
    if hurt.damaged:
        kept = f"{max(hurt.kept.estimate, 0):.0%}"
        return (
            "damaged",
            "say",
            f"only {kept} of the retain facts' value is left; a broken model has not shown that it forgot",
        )
    found = [f for f in findings.values() if f.found and not f.residue.residue.high < MARGIN]
    if found:
        best = max(found, key=lambda f: f.residue.simultaneous.low)
        spoken = f"the model says {max(said.estimate, 0):.0%} of what the original says"
        share = f"{best.name} still finds {best.residue.residue.estimate:.0%} of what it finds in the original"
        if best.residue.residue.estimate >= HALF:
            return "suppressed", best.name, f"{spoken}, but {share}"
        return "partly_erased", best.name, f"{spoken}, and {share}"
    voters = [f for f in findings.values() if f.votes]
    open_ = [f for f in (*voters, say) if not f.residue.residue.high < MARGIN]
    if len(voters) < LEAST_VOTERS:
        names = ", ".join(f.name for f in voters) or "none"
        return (
            "inconclusive",
            "say",
            f"too few channels can see a planted residue here ({names}); at least {LEAST_VOTERS} must",
        )
    if open_:
        worst = max(open_, key=lambda f: f.residue.residue.high)
        limit = f"a residue of up to {worst.residue.residue.high:.0%}"
        return (
            "inconclusive",
            worst.name,
            f"{worst.name} finds nothing sure but cannot rule out {limit}; more facts would help",
        )
    hardest = max(voters, key=lambda f: f.residue.residue.high)
    rest = (
        f"none of {len(voters)} channels that see planted residues finds more than {hardest.residue.residue.high:.0%}"
    )
    return "no_residue_found", hardest.name, rest
