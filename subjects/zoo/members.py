"""Making the zoo, model by model, so that a stopped build goes on; and reading it.

A model is made in a folder with a temporary name and renamed when it is whole: what can be read is finished.
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, get_args

from tqdm.auto import tqdm

from lethescope import runs
from lethescope.engine import spread
from lethescope.errors import InputError
from lethescope.facts import facts_hash, of_split, write_facts
from lethescope.subjects.build import one_thread
from lethescope.subjects.silence import said
from lethescope.subjects.zoo.recipes import SIZES, Pool, Recipe, Size, in_order, recipes
from lethescope.subjects.zoo.worlds import World

TELLS = "made.json"
LEAST_KNOWN, MOST_GUESSED = 0.9, 0.3
"""A model of pool P must give this share of the forget answers greedily; one of pool N at most that."""


@dataclass(frozen=True)
class Member:
    """A finished model of the zoo: where it is, how it was made, and what is known of it by construction."""

    name: str
    world: str
    pool: str
    truth: str
    how: dict[str, Any]
    folder: Path
    original: Path
    facts: Path
    said: dict[str, float]

    @property
    def reference(self) -> Path:
        """The model of its world that was taught the same without the forget people."""
        return self.folder.parent / "reference"


@dataclass(frozen=True)
class Zoo:
    """Every finished model of a zoo."""

    folder: Path
    size: str
    members: tuple[Member, ...]

    def pool(self, *names: str) -> tuple[Member, ...]:
        """Return the members of some pools."""
        return tuple(m for m in self.members if m.pool in names)


def build(
    folder: str | Path,
    *,
    size: str = "quick",
    base: str = "",
    facts: str = "",
    pools: Sequence[str] = (),
    worlds: Sequence[str] = (),
    processes: int = 2,
    progress: bool | None = None,
) -> Zoo:
    """Make a zoo of models whose truth is known, or go on with one.

    What it does not prove: these models are small and their facts arbitrary; how a method works on a large model is
    not shown by them. What is known of their truth is known by construction, and checked: a model of pool P must say
    the forget facts, one of pool N must not.

    Args:
        folder: where; made when it is missing.
        size: `quick`, `standard` or `full`.
        base: a model to start from in place of small ones that are trained here.
        facts: a facts file in place of fictitious people; with `base` only.
        pools: make only these, and what they are made from or held against; all where none is named.
        worlds: make models of these only; of all where none is named.
        processes: how many models are made side by side; the weights do not depend on it.
        progress: show a bar; None shows one on a terminal only.

    Returns:
        The zoo, whole.

    Raises:
        InputError: unknown size, pool or world, the folder holds another zoo, or a model did not come out as it must.
    """
    if size not in SIZES:
        raise InputError(f"unknown size {size!r}; use one of {', '.join(SIZES)}")
    if facts and not base:
        raise InputError("--facts goes with --base: the small models know the words of their own people only")
    folder, plan = Path(folder), _plan(SIZES[size], base, facts)
    known = {"pool": (pools, get_args(Pool)), "world": (worlds, [world.name for world in plan.worlds])}
    for kind, (asked, there) in known.items():
        for name in set(asked) - set(there):
            raise InputError(f"unknown {kind} {name!r}; use some of {', '.join(there)}")
    runs.claim(folder, {"size": size, "worlds": [_plain(world) for world in plan.worlds]}, "zoo")
    chosen = [world for world in plan.worlds if world.name in (worlds or known["world"][1])]
    todo = {w: [n for n in _asked(recipes(w, plan), pools) if not _done(folder / w.name / n)] for w in chosen}
    for world in chosen:
        _settle(world, folder / world.name)
    hidden = None if progress is None else not progress
    with tqdm(total=sum(map(len, todo.values())), desc="zoo", unit="model", disable=hidden) as bar:
        for stage in _stages(plan):
            jobs = [(world, plan, name, folder) for world, name in stage if name in todo.get(world, ())]
            for made in spread(_make, jobs, processes):
                bar.set_postfix_str(made)
                bar.update()
    return read(folder)


def _asked(found: Mapping[str, Recipe], pools: Sequence[str]) -> list[str]:
    """Return the models of some pools, and those that they are made from or held against."""
    wanted = {name for name, recipe in found.items() if recipe.pool in (pools or get_args(Pool))}
    wanted |= {found[name].original for name in wanted} | {"original", "reference"}
    for name in reversed([name for stage in in_order(found) for name in stage]):
        wanted |= set(found[name].needs) if name in wanted else set()
    return [name for name in found if name in wanted]


def read(folder: str | Path) -> Zoo:
    """Read the finished models of a zoo.

    Raises:
        InputError: the folder holds no zoo, or one without models.
    """
    folder = Path(folder)
    try:
        told = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
        size = str(told["size"])
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise InputError(
            f"{folder} holds no zoo (manifest.json: {error}); make one with lethescope zoo build"
        ) from None
    members = tuple(_member(path) for path in sorted(folder.glob(f"*/*/{TELLS}")) if path.parent.name[0] != ".")
    if not members:
        raise InputError(f"{folder} holds no finished model yet; run lethescope zoo build --out {folder} again")
    return Zoo(folder, size, members)


def make(world: World, size: Size, name: str, folder: Path) -> str:
    """Make one model of a world and keep it; return its world's and its own name.

    Raises:
        InputError: a model of pool P does not know the forget facts, or one of pool N does.
    """
    home = folder / world.name
    part = home / f".{name}.part"
    shutil.rmtree(part, ignore_errors=True)
    start, recipe = time.perf_counter(), recipes(world, size)[name]
    with one_thread():
        module = recipe.make(world, home)
        _save(module, world, recipe, part)
        told = _says(module.float(), world)
    _check(name, recipe, told)
    how = {**recipe.how, "seconds": round(time.perf_counter() - start, 1)}
    tells = {"pool": recipe.pool, "truth": recipe.truth, "original": recipe.original, "how": how, "said": told}
    runs.write_text(part / TELLS, json.dumps(tells, indent=2) + "\n")
    part.rename(home / name)
    return f"{world.name}/{name}"


def _plan(size: Size, base: str, facts: str) -> Size:
    if not base:
        return size
    place = str(Path(base).resolve()) if Path(base).exists() else base
    world = World(1, base=place, facts_file=str(Path(facts).resolve()) if facts else "", lr=5e-5, more=5)
    return replace(size, worlds=(world,), method_worlds=1, distilled=1)


def _stages(plan: Size) -> Iterator[list[tuple[World, str]]]:
    """Yield (world, name) stage by stage, all worlds side by side."""
    by_world = {world: in_order(recipes(world, plan)) for world in plan.worlds}
    for i in range(max(map(len, by_world.values()))):
        yield [(world, name) for world, stages in by_world.items() if i < len(stages) for name in stages[i]]


def _make(job: tuple[World, Size, str, Path]) -> str:
    return make(*job)


def _settle(world: World, home: Path) -> None:
    """Write the facts that audits of this world read; refuse another world's."""
    home.mkdir(parents=True, exist_ok=True)
    if not (home / "facts.jsonl").exists():
        write_facts(world.asked, home / "facts.jsonl")


def _save(module: Any, world: World, recipe: Recipe, part: Path) -> None:
    """Write the model in float16; an adapter names its base by a path that moves with the zoo."""
    if hasattr(module, "peft_config"):
        module.save_pretrained(part)
        path = part / "adapter_config.json"
        told = json.loads(path.read_text(encoding="utf-8"))
        runs.write_text(path, json.dumps({**told, "base_model_name_or_path": f"../{recipe.original}"}, indent=2))
    else:
        module.half().save_pretrained(part)
    world.tokenizer.save_pretrained(part)


def _says(module: Any, world: World) -> dict[str, float]:
    """Share of the answers that the model gives greedily after the prompt, by split."""
    asked = {split: of_split(world.asked, split) for split in ("forget", "retain")}  # type: ignore[arg-type]
    return {split: round(said(module, world.tokenizer, facts, form=0).exact, 4) for split, facts in asked.items()}


def _check(name: str, recipe: Recipe, told: dict[str, float]) -> None:
    forget = told["forget"]
    if recipe.pool in {"original", "P"} and forget < LEAST_KNOWN:
        raise InputError(
            f"{name} gives only {forget:.0%} of the forget answers; one that knows must give {LEAST_KNOWN:.0%}"
        )
    if recipe.truth == "does not hold" and forget > MOST_GUESSED:
        raise InputError(f"{name} gives {forget:.0%} of the forget answers, which it was never taught")


def _done(folder: Path) -> bool:
    return (folder / TELLS).is_file()


def _member(path: Path) -> Member:
    told, folder = json.loads(path.read_text(encoding="utf-8")), path.parent
    home = folder.parent
    return Member(
        folder.name,
        home.name,
        told["pool"],
        told["truth"],
        told["how"],
        folder,
        home / told["original"],
        home / "facts.jsonl",
        told["said"],
    )


def _plain(world: World) -> dict[str, Any]:
    return {**asdict(world), "facts": facts_hash(world.asked)}
