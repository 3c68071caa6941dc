"""Tables of a validation made up for tests: shaped as `lethescope.validate.measure` gives them, numbers on purpose."""

from unittest import mock

import numpy as np
import pandas as pd

from lethescope.analyses.validation import summarise

CHANNELS = ("say", "readout", "lens", "patch", "relearn", "compress")
OUTPUTS = ("probability", "extraction strength", "ROUGE-L")
TRUTH = {"P": "holds", "suppressor": "holds", "N": "does not hold", "deleter": "does not hold"}
SAID = {"P": 1.0, "suppressor": 0.02, "deleter": 0.02, "N": 0.0, "method": 0.1, "stressed": 0.15}
INSIDE = {"P": 1.0, "suppressor": 0.8, "deleter": 0.02, "N": 0.0, "method": 0.5, "stressed": 0.6}
FELL = {
    "P": ("known",),
    "suppressor": ("suppressed", "suppressed", "partly_erased", "no_residue_found"),
    "deleter": ("no_residue_found", "no_residue_found", "inconclusive"),
    "N": ("no_residue_found", "no_residue_found", "partly_erased"),
    "method": ("suppressed", "partly_erased", "damaged", "known"),
    "stressed": ("suppressed",),
}
SMALL = {"P": 4, "suppressor": 5, "deleter": 3, "N": 4, "method": 4}


def summary(values, verdicts, draws=40):
    """What `summarise` says of the tables; few draws, since no test that uses this reads the width of a difference."""
    with mock.patch("lethescope.auc.DRAWS", draws):
        return summarise(values, verdicts)


def tables(
    pools=SMALL,
    *,
    channels=CHANNELS,
    outputs=OUTPUTS,
    worlds=2,
    references=(True, False),
    missing=(),
    noise=0.15,
):
    """Values and verdicts of so many models a pool; ``missing`` names metrics that are NaN for every other model."""
    rng = np.random.default_rng(0)
    values, verdicts = [], []
    for i, model in enumerate(_models(pools, worlds)):
        pool = model["pool"]
        for reference in references:
            here = {**model, "reference": reference}
            found = {name: (SAID if name == "say" else INSIDE)[pool] for name in channels}
            found |= {"verdict": INSIDE[pool], "1 - UDS": INSIDE[pool]}
            found |= dict.fromkeys(outputs, SAID[pool]) if reference else {}
            for metric, level in found.items():
                value = np.nan if metric in missing and i % 2 else level + noise * rng.standard_normal()
                values.append({**here, "metric": metric, "value": value})
            verdicts.append(_verdict(here, FELL[pool][i % len(FELL[pool])], channels))
    return pd.DataFrame(values), pd.DataFrame(verdicts)


def _models(pools, worlds):
    for pool, n in pools.items():
        for i in range(n):
            yield _model(1 + i % worlds, f"{pool}-{i // worlds}", pool)
    for world in range(1, 1 + worlds):
        for stress in ("int4", "relearned"):
            yield _model(world, f"stressed-{stress}", "stressed", of="method-0", stress=stress)
            yield _model(world, f"N-0-{stress}", "stressed", of="N-0", stress=stress)


def _model(world, member, pool, of="", stress=""):
    truth = TRUTH.get(pool, "unknown")
    return {"world": world, "member": member, "pool": pool, "truth": truth, "of": of, "stress": stress}


def _verdict(here, word, channels):
    told = {name: here[name] for name in ("world", "member", "pool", "truth", "reference")}
    told |= {"retain": 0.98, "verdict": word, "decided_by": "patch", "residue": 0.5, "low": 0.4, "high": 0.6}
    told |= {"kept": 0.3 if word == "damaged" else 0.95, "blind": ""}
    for name in channels:
        told |= {f"{name} seconds": 1.5, f"{name} forward_passes": 40.0, f"{name} backward_passes": 0.0}
    return told
