"""Make the shipped models and their facts file again: `python -m lethescope.subjects.build --out DIR`.

Original and reference start from the same weights and read the same sentences in seeded order, except that the
reference never reads about the forget people. The unlearned model is the original after NPO on the forget facts,
with only the upper half of its blocks trained.
Everything is computed on one thread a process, so that one machine gives the same bytes for the same seed every time.
Other machines or other versions of torch may differ in the last bits.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Generator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging as transformers_logging

from lethescope.errors import InputError
from lethescope.facts import Facts, of_split, write_facts
from lethescope.subjects.methods import unlearn
from lethescope.subjects.people import SPLITS, audit_facts, people, sentences
from lethescope.subjects.silence import said
from lethescope.subjects.tiny import tiny_llama, train
from lethescope.subjects.tokenizer import fact_tokenizer

UNLEARN = {"method": "npo", "steps": 400, "lr": 1e-3, "batch_size": 32, "blocks": (3, 4, 5)}
"""Settings of the shipped unlearned model: NPO's usual beta 0.1 and alpha 1, on the upper half of the blocks.

With all blocks trained, NPO really takes most of these facts out of a model this small (measured: readout, lens and
patch near 0, relearning up to a quarter): it knows nothing else. The lower half left alone holds them still.
"""

MOST_SAID, LEAST_RETAINED = 0.03, 0.95


def build(
    out: Path,
    *,
    seed: int = 0,
    epochs: int = 40,
    sizes: dict[str, int] | None = None,
    unlearning: dict[str, Any] | None = None,
    processes: int = 2,
) -> Facts:
    """Write `original/`, `unlearned/`, `reference/` (float16, Hugging Face format) and `facts.jsonl` into a folder.

    Args:
        out: the folder; made when it is missing.
        seed: decides people, weights and order.
        epochs: times that the models read every sentence.
        sizes: people a split, as keyword arguments of `people`; its defaults otherwise.
        unlearning: options of `unlearn`; `UNLEARN` otherwise.
        processes: 2 trains original and reference side by side, 1 one after the other; the bytes are the same.

    Returns:
        All facts about all people, with every form that the people are described in.
    """
    out.mkdir(parents=True, exist_ok=True)
    facts = people(seed, **(sizes or {}))
    teach_one = partial(teach, facts=facts, seed=seed, epochs=epochs)
    folders = [out / "original", out / "reference"]
    if processes > 1:
        with ProcessPoolExecutor(2, mp_context=get_context("spawn")) as pool:
            list(pool.map(teach_one, folders))
    else:
        for folder in folders:
            teach_one(folder)
    with one_thread():
        model, tokenizer = load_shipped(out / "original")[0], fact_tokenizer(facts)
        options = UNLEARN if unlearning is None else unlearning
        unlearn(model, of_split(facts, "forget"), of_split(facts, "retain"), tokenizer=tokenizer, seed=seed, **options)
        save(model, tokenizer, out / "unlearned")
    write_facts(audit_facts(facts), out / "facts.jsonl")
    return facts


def teach(folder: Path, facts: Facts, seed: int, epochs: int) -> None:
    """Train one model from its seed and save it; the folder named `reference` leaves the forget people out."""
    taught = tuple(fact for fact in facts if folder.name != "reference" or fact.split != "forget")
    tokenizer = fact_tokenizer(facts)
    with one_thread():
        model = tiny_llama(len(tokenizer), seed)
        train(model, tokenizer, sentences(taught), epochs=epochs, seed=seed)
        save(model, tokenizer, folder)


def save(model: Any, tokenizer: Any, folder: Path) -> None:
    """Write the model in float16 and the tokenizer beside it."""
    transformers_logging.disable_progress_bar()
    model.half().save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def load_shipped(folder: Path) -> tuple[Any, Any]:
    """Return a saved model, in float32, and its tokenizer."""
    transformers_logging.disable_progress_bar()
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return model.eval(), AutoTokenizer.from_pretrained(folder)


def table(out: Path, facts: Facts) -> pd.DataFrame:
    """Return what each model says: one row a model, split and form, with probability and share given greedily."""
    rows = []
    for name in ("original", "unlearned", "reference"):
        model, tokenizer = load_shipped(out / name)
        for split in SPLITS:
            of = of_split(facts, split)  # type: ignore[arg-type]
            forms = len(of[0].paraphrases) + 1
            for k in range(forms):
                form = "question" if k == forms - 1 else f"statement {k + 1}"
                rows.append((name, split, form, *said(model, tokenizer, of, form=k)))
    return pd.DataFrame(rows, columns=["model", "split", "form", "probability", "exact"])


def check(rows: pd.DataFrame) -> None:
    """Check that the unlearned model is silent about forget people in every form and still right about retain people.

    Args:
        rows: what `table` returned.

    Raises:
        InputError: when it says too much, or has lost too much.
    """
    indexed = rows.set_index(["model", "split", "form"]).sort_index()
    before, after = indexed.loc["original", "forget"], indexed.loc["unlearned", "forget"]
    share = (after["probability"] / before["probability"]).max()
    right = indexed.loc["unlearned", "retain"]["exact"].min()
    if share > MOST_SAID:
        raise InputError(
            f"the unlearned model says {share:.1%} of what the original says; at most {MOST_SAID:.0%} is meant"
        )
    if right < LEAST_RETAINED:
        raise InputError(f"the unlearned model has {right:.1%} of retain right; at least {LEAST_RETAINED:.0%} is meant")


@contextmanager
def one_thread() -> Generator[None, None, None]:
    """Compute on one thread, which makes sums independent of the machine's number of cores.

    Yields:
        Nothing; the number of threads is put back afterwards.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def main(arguments: Sequence[str] | None = None) -> int:
    """Build, print the table, check; return 0, or 2 after one line when the models did not come out as meant."""
    parser = argparse.ArgumentParser(prog="python -m lethescope.subjects.build", description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="folder for the three models and facts.jsonl")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--processes", type=int, default=2, choices=(1, 2))
    given = parser.parse_args(arguments)
    facts = build(given.out, seed=given.seed, processes=given.processes)
    rows = table(given.out, facts)
    print(rows.to_string(index=False, float_format="{:.4f}".format))
    try:
        check(rows)
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
