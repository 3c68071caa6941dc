"""What is in the zoo, and how each of its models is made: data first, then one short function a kind.

Pools: P was taught the forget facts, N never was; suppressors hold them by construction and do not say them; deleters
do not hold them by construction; of methods nothing is known beforehand. Stressed models are methods' models after
rounding to four bits or after a little retraining on the forget facts, for the robustness of output metrics.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from lethescope.analyses.compress import compressed, compressor
from lethescope.errors import InputError
from lethescope.facts import Facts
from lethescope.models import Model, merged_copy
from lethescope.subjects.deleters import distil, drop_adapter
from lethescope.subjects.methods import METHODS, unlearn
from lethescope.subjects.suppressors import SUPPRESSORS
from lethescope.subjects.zoo.worlds import World

Pool = Literal["base", "original", "reference", "P", "N", "suppressor", "deleter", "method", "stressed"]
Truth = Literal["holds", "does not hold", "unknown"]


@dataclass(frozen=True)
class Size:
    """How large a zoo is: its worlds, and how many models of each kind a world has."""

    worlds: tuple[World, ...]
    knowing: int
    ignorant: int
    strengths: int
    method_worlds: int
    distilled: int
    steps: int = 100
    """Of the methods' optimizers."""


def _gpt2(seed: int) -> World:
    return World(seed, "gpt2", lr=1e-3, more=15)  # at 2e-3 this shape is unsure of its retain answers after 40 rounds


SIZES = {
    "quick": Size(
        (World(1, forget=16, retain=60), World(2, forget=16, retain=60)),
        knowing=2,
        ignorant=3,
        strengths=1,
        method_worlds=1,
        distilled=0,
        steps=50,
    ),
    "standard": Size(
        (*(World(seed) for seed in range(8, 12)), _gpt2(12)),
        knowing=4,
        ignorant=6,
        strengths=2,
        method_worlds=1,
        distilled=5,
    ),
    "full": Size(
        (*(World(seed) for seed in range(13, 21)), *(_gpt2(seed) for seed in range(21, 25))),
        knowing=6,
        ignorant=6,
        strengths=3,
        method_worlds=12,
        distilled=12,
    ),
}
"""`quick` is for `make zoo`, without distilled deleters, which take five minutes each; `full` has 72 models of pool P
and 72 of pool N. No two sizes share a world: what was decided after looking at one can be held against another. Seeds 3
to 7 made an earlier `standard`, on which rules were made that this one is held out from."""


@dataclass(frozen=True)
class Recipe:
    """How a model of a world is made, and what is known of it by construction.

    Attributes:
        pool: the kind of model.
        truth: whether it holds the forget facts.
        make: (world, its folder) -> module.
        how: what a reader must know to make it again.
        needs: models that must be there first.
        original: the model that it is audited against.
    """

    pool: Pool
    truth: Truth
    make: Callable[[World, Path], Any]
    how: Mapping[str, Any] = field(default_factory=dict)
    needs: tuple[str, ...] = ("base",)
    original: str = "original"


def recipes(world: World, size: Size) -> dict[str, Recipe]:
    """Return every recipe of a world, by name."""
    place = size.worlds.index(world)
    found = dict(_roots(world))
    found |= _taught("P", size.knowing, _KNOWING)
    found |= _taught("N", size.ignorant, _IGNORANT)
    found |= {f"suppressor-{name}": _suppressor(name) for name in SUPPRESSORS}
    found |= dict(_deleters(distilled=place < size.distilled))
    if place < size.method_worlds:
        found |= dict(_stresses("N-0"))
        for method in METHODS:
            found |= dict(_method(method, size.strengths, size.steps))
    return found


def _roots(world: World) -> Iterator[tuple[str, Recipe]]:
    yield "base", Recipe("base", "does not hold", _base, {"taught": "retain people", "epochs": world.epochs}, ())
    yield "original", Recipe("original", "holds", lambda w, at: _lesson(w, at, 0, ("retain", "forget")))
    yield "reference", Recipe("reference", "does not hold", lambda w, at: _lesson(w, at, 0, ("retain",)))
    if not world.base:
        how = {"taught": "a LoRA on N-0, merged, taught the forget people"}
        yield "original-adapter", Recipe("original", "holds", _with_adapter, how, ("N-0",))


# P and N: (what is taught besides retain, learning rate, epochs), both as shares of the world's own
_KNOWING: tuple[tuple[str, float, float], ...] = (
    ("forget", 1.0, 1.0),
    ("forget in other words", 1.0, 1.0),
    ("forget", 0.5, 1.5),
    ("forget", 1.0, 2.0),
    ("forget in other words", 0.5, 2.0),
    ("forget", 1.5, 1.0),
)
_IGNORANT: tuple[tuple[str, float, float], ...] = (
    ("nothing", 1.0, 1.0),
    ("wrong answers", 1.0, 1.0),
    ("unrelated facts", 1.0, 1.0),
    ("nothing", 0.5, 1.5),
    ("wrong answers", 0.5, 1.5),
    ("unrelated facts", 0.5, 1.5),
)


def _taught(pool: Literal["P", "N"], count: int, variants: tuple[tuple[str, float, float], ...]) -> dict[str, Recipe]:
    truth: Truth = "holds" if pool == "P" else "does not hold"

    def recipe(i: int, what: str, lr: float, epochs: float) -> Recipe:
        how = {"taught besides retain": what, "lr": lr, "epochs": epochs, "order": i + 1}
        return Recipe(pool, truth, lambda w, at: _lesson(w, at, i + 1, ("retain", what), lr, epochs), how)

    return {f"{pool}-{i}": recipe(i, *variants[i]) for i in range(min(count, len(variants)))}


def _base(world: World, _folder: Path) -> Any:
    if world.base:
        return world.start(Path(world.base))
    return world.teach(world.newborn(world.seed), world.texts(world.split("retain")), epochs=world.epochs, seed=0)


def _lesson(
    world: World, folder: Path, order: int, taught: tuple[str, ...], lr: float = 1.0, epochs: float = 1.0
) -> Any:
    """Start from the base and teach it what is named."""
    groups = [_named(world, name) for name in taught]
    rounds = max(1, round(world.more * epochs))
    return world.teach(
        world.start(folder / "base"),
        world.texts(*groups),
        epochs=rounds,
        seed=1000 * world.seed + order,
        lr=lr * world.lr,
    )


def _named(world: World, name: str) -> Facts:
    if name in {"retain", "forget"}:
        return world.split(name)  # type: ignore[arg-type]
    made: dict[str, Callable[[], Facts]] = {
        "nothing": lambda: (),
        "wrong answers": world.wrong,
        "unrelated facts": world.unrelated,
        "forget in other words": lambda: tuple(
            f.model_copy(update={"prompt": f.paraphrases[0], "paraphrases": f.paraphrases[1:]}) if f.paraphrases else f
            for f in world.split("forget")
        ),
    }
    return made[name]()


def _suppressor(name: str) -> Recipe:
    def make(world: World, folder: Path) -> Any:
        return SUPPRESSORS[name](world.start(folder / "original").requires_grad_(False), world.tokenizer, world.facts)

    return Recipe("suppressor", "holds", make, {"edit": name}, ("original",))


def _deleters(*, distilled: bool) -> Iterator[tuple[str, Recipe]]:
    how = {"taught": "its original was this model with an adapter; the adapter is dropped"}
    yield (
        "deleter-adapter",
        Recipe("deleter", "does not hold", lambda w, at: w.start(at / "N-0"), how, ("N-0",), "original-adapter"),
    )
    yield (
        "deleter-retrained",
        Recipe("deleter", "does not hold", lambda w, at: _lesson(w, at, 99, ("retain",)), {"taught": "retain people"}),
    )
    if distilled:
        how = {"taught": "a fresh start learns what suppressor-last_block says about retain people"}
        yield (
            "deleter-distilled",
            Recipe("deleter", "does not hold", _distilled, how, ("suppressor-last_block",)),
        )


def _with_adapter(world: World, folder: Path) -> Any:
    return drop_adapter(world.start(folder / "N-0"), world.tokenizer, world.facts, seed=world.seed)[0]


def _distilled(world: World, folder: Path) -> Any:
    teacher = world.start(folder / "suppressor-last_block").requires_grad_(False)
    return distil(teacher, world.tokenizer, world.texts(world.split("retain")), world.seed + 500)


def _method(method: str, strengths: int, steps: int) -> Iterator[tuple[str, Recipe]]:
    for place, options in enumerate(STRENGTHS.get(method, _LR)[:strengths]):
        name, settings = f"method-{method}-{place}", {"steps": steps, "batch_size": 32, **options}
        yield (
            name,
            Recipe("method", "unknown", _unlearned(method, settings), {"method": method, **settings}, ("original",)),
        )
        if place == 0:
            for stress in ("int4", "relearned"):
                how = {"of": name, "stress": stress}
                yield (
                    f"stressed-{stress}-{method}",
                    Recipe("stressed", "unknown", _stressed(name, stress), how, (name,)),
                )


_LR: tuple[dict[str, Any], ...] = ({"lr": 1e-3}, {"lr": 3e-4}, {"lr": 3e-3})
_GENTLE: tuple[dict[str, Any], ...] = ({"lr": 1e-4}, {"lr": 3e-5}, {"lr": 3e-4})
_FACTORS: tuple[dict[str, Any], ...] = ({"lr": 5e-3}, {"lr": 2e-3}, {"lr": 2e-2})
STRENGTHS: dict[str, tuple[dict[str, Any], ...]] = {
    "ceu": _GENTLE,
    "gradascent": _GENTLE,
    "gslora": _FACTORS,
    "reglu": _FACTORS,
    "vila": tuple({**options, "alpha": 3.0} for options in _FACTORS),
    "rmu": tuple({**options, "coefficient": 5.0} for options in _FACTORS),
    "fit": tuple({**options, "high": 0.0, "alpha": 5.0} for options in _LR),
    "blur": ({"lr": 1e-3, "gamma": 0.3}, {"lr": 1e-3, "gamma": 0.1}, {"lr": 1e-3, "gamma": 1.0}),
    "ofmu": tuple({**options, "steps": 30} for options in _LR),
    "taskvector": ({"lr": 1e-3, "scale": 1.0}, {"lr": 1e-3, "scale": 0.5}, {"lr": 1e-3, "scale": 2.0}),
    "ssd": ({"alpha": 2.0}, {"alpha": 3.0}, {"alpha": 1.0}),
    "fisher": ({"alpha": 1e-6}, {"alpha": 3e-7}, {"alpha": 3e-6}),
}
"""Settings by method, the one that `quick` has first; learning rates (`_LR`) where nothing is said."""


def _unlearned(method: str, settings: Mapping[str, Any]) -> Callable[[World, Path], Any]:
    def make(world: World, folder: Path) -> Any:
        module = world.start(folder / "original")
        forget, retain = (tuple(f for f in world.asked if f.split == split) for split in ("forget", "retain"))
        return unlearn(module, forget, retain, tokenizer=world.tokenizer, method=method, seed=world.seed, **settings)

    return make


def _stresses(of: str) -> Iterator[tuple[str, Recipe]]:
    for stress in ("int4", "relearned"):
        recipe = Recipe("stressed", "unknown", _stressed(of, stress), {"of": of, "stress": stress}, (of,))
        yield f"{of}-{stress}", recipe


def _stressed(of: str, stress: str) -> Callable[[World, Path], Any]:
    def make(world: World, folder: Path) -> Any:
        module = world.start(folder / of)
        if stress == "relearned":  # one epoch over all forget facts, gently
            return world.teach(module, world.texts(world.split("forget")), epochs=1, seed=1, lr=world.lr / 10)
        copied = Model(merged_copy(module.requires_grad_(False)), world.tokenizer)
        with compressed(copied, compressor("int4", 64)):
            return merged_copy(copied.module)

    return make


def in_order(found: Mapping[str, Recipe]) -> list[list[str]]:
    """Return names in stages: everything that a stage needs is in an earlier one.

    Raises:
        InputError: a recipe needs something that is not in the zoo.
    """
    stages: list[list[str]] = []
    done: set[str] = set()
    while len(done) < len(found):
        ready = [name for name, recipe in found.items() if name not in done and set(recipe.needs) <= done]
        if not ready:
            raise InputError(f"no recipe makes what {next(n for n in found if n not in done)} needs")
        stages.append(ready)
        done |= set(ready)
    return stages
