"""Tests of the zoo: what is known by construction is so, a stopped build goes on, and half a model is never read."""

import json
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from lethescope.errors import InputError
from lethescope.facts import read_facts
from lethescope.models import load
from lethescope.subjects import suppressors
from lethescope.subjects.methods import METHODS, method_named
from lethescope.subjects.tiny import tiny_llama
from lethescope.subjects.zoo import Zoo, build, read, worlds
from lethescope.subjects.zoo import members as building
from lethescope.subjects.zoo import recipes as listing
from lethescope.subjects.zoo.recipes import SIZES, Recipe, Size, in_order, recipes
from lethescope.subjects.zoo.worlds import World

SMALL = World(1, forget=3, retain=8, epochs=30, more=80, lr=1e-2)
TINY = Size((SMALL,), knowing=1, ignorant=3, strengths=1, method_worlds=1, distilled=0)


@pytest.fixture
def _small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Models of two narrow blocks, one suppressor and one method, so that a zoo takes seconds."""
    monkeypatch.setitem(SIZES, "tiny", TINY)
    monkeypatch.setattr(
        worlds, "tiny_llama", lambda n, seed: tiny_llama(n, seed, layers=2, width=48, heads=2, kv_heads=1)
    )
    monkeypatch.setattr(listing, "SUPPRESSORS", {"last_block": suppressors.SUPPRESSORS["last_block"]})
    monkeypatch.setattr(listing, "METHODS", ("graddiff",))


def make(folder: Path) -> Zoo:
    return build(folder, size="tiny", processes=1, progress=False)


@pytest.mark.usefixtures("_small")
def test_a_zoo_is_built_read_and_built_no_further(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    zoo = make(tmp_path / "zoo")
    count = Counter(m.pool for m in zoo.members)
    assert count == {
        **{"base": 1, "original": 2, "reference": 1, "P": 1, "N": 3, "suppressor": 1, "deleter": 2},
        **{"method": 1, "stressed": 4},
    }
    for m in zoo.members:
        model = load(m.folder)
        assert model.shape[:2] == (2, 48) and m.original.is_dir() and m.reference.is_dir()
        if m.pool in {"original", "P"}:
            assert m.truth == "holds" and m.said["forget"] >= 0.9
        if m.truth == "does not hold":
            assert m.said["forget"] <= 0.3
    assert {m.truth for m in zoo.pool("suppressor")} == {"holds"} and zoo.pool("suppressor")[0].said["forget"] < 0.1
    assert read_facts(zoo.members[0].facts) == SMALL.asked
    by_name = {m.name: m for m in zoo.members}
    assert by_name["deleter-adapter"].original.name == "original-adapter"
    same = [load(by_name[name].folder).fingerprint for name in ("deleter-adapter", "N-0")]
    assert same[0] == same[1], "dropping the adapter gives back what was there before it"
    monkeypatch.setattr(building, "make", lambda *_: pytest.fail("a finished model was made again"))
    assert make(tmp_path / "zoo") == zoo


@pytest.mark.usefixtures("_small")
def test_pools_are_built_with_what_they_need_and_others_can_follow(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def tell_only(world: World, size: Size, name: str, folder: Path) -> str:
        recipe = recipes(world, size)[name]
        assert all((folder / world.name / other).is_dir() for other in recipe.needs), name
        (folder / world.name / name).mkdir()
        told = {"pool": recipe.pool, "truth": recipe.truth, "original": recipe.original, "how": {}, "said": {}}
        (folder / world.name / name / building.TELLS).write_text(json.dumps(told), encoding="utf-8")
        return name

    monkeypatch.setattr(building, "make", tell_only)
    SIZES["tiny"] = replace(TINY, worlds=(SMALL, replace(SMALL, seed=2)))
    asked: dict[str, Any] = {"size": "tiny", "processes": 1, "progress": False, "worlds": ("llama-1",)}
    few = build(tmp_path, **asked, pools=("deleter",))
    assert {m.name for m in few.members} == {
        *("deleter-adapter", "deleter-retrained", "base", "N-0", "original", "original-adapter", "reference")
    }
    assert {m.world for m in few.members} == {"llama-1"} and all(m.original.is_dir() for m in few.members)
    more = build(tmp_path, **asked, pools=("suppressor",))
    assert {m.name for m in more.members} - {m.name for m in few.members} == {"suppressor-last_block"}
    stressed = build(tmp_path / "other", **asked, pools=("stressed",))
    names = {m.name for m in stressed.members}
    assert names >= {"method-graddiff-0", "stressed-int4-graddiff", "N-0-relearned", "N-0", "original"}
    assert not any(name.startswith(("P-", "suppressor-", "N-1")) for name in names)
    whole = build(tmp_path, **{**asked, "worlds": ()})
    assert len(whole.members) == sum(len(recipes(w, SIZES["tiny"])) for w in SIZES["tiny"].worlds)


@pytest.mark.usefixtures("_small")
def test_a_stopped_build_goes_on_and_half_a_model_is_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, whole = tmp_path / "zoo", building._save
    few = {name: r for name, r in recipes(SMALL, TINY).items() if name in {"base", "original", "reference", "N-0"}}
    monkeypatch.setattr(building, "recipes", lambda *_: few)
    saved: list[str] = []

    def stop(module: Any, world: World, recipe: Recipe, part: Path) -> None:
        whole(module, world, recipe, part)
        saved.append(part.name)
        if len(saved) == 3:
            raise KeyboardInterrupt

    monkeypatch.setattr(building, "_save", stop)
    with pytest.raises(KeyboardInterrupt):
        make(folder)
    left = sorted(p.name for p in (folder / SMALL.name).iterdir() if p.is_dir())
    assert saved[-1] in left and saved[-1].startswith(".")
    assert [m.name for m in read(folder).members] == sorted(name[1:-5] for name in saved[:2])
    monkeypatch.setattr(building, "_save", whole)
    assert {m.name for m in make(folder).members} == set(few)
    assert not list(folder.rglob("*.part"))


@pytest.mark.usefixtures("_small")
def test_what_does_not_hold_was_never_taught(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every sentence that a model of pool N or the base reads is looked at, while it is read."""
    facts = SMALL.split("forget")
    read_of: dict[str, list[str]] = {}
    now: list[str] = []
    inside = worlds.train

    def watched(module: Any, tokenizer: Any, texts: list[str], **options: Any) -> Any:
        read_of.setdefault(now[-1], []).extend(texts)
        return inside(module, tokenizer, texts, **{**options, "epochs": 1})

    monkeypatch.setattr(worlds, "train", watched)
    home, found = tmp_path / SMALL.name, recipes(SMALL, TINY)
    for name in ("base", "reference", "N-0", "N-1", "N-2", "deleter-retrained"):
        now.append(name)
        building._save(found[name].make(SMALL, home), SMALL, found[name], home / name)
    assert set(read_of) == set(now)
    for name, texts in read_of.items():
        about = [t for t in texts if any(f.subject in t for f in facts)]
        assert bool(about) == (name in {"N-1", "N-2"}), name
        for fact in facts:
            forms = (fact.prompt, *fact.paraphrases)
            assert not any(t.startswith(form) and fact.answer in t[len(form) :] for form in forms for t in about)


def test_every_model_knows_what_it_needs_and_the_sizes_are_as_promised() -> None:
    for size in SIZES.values():
        for world in size.worlds:
            found = recipes(world, size)
            stages = in_order(found)
            assert sorted(n for stage in stages for n in stage) == sorted(found)
            assert all(r.original in found for r in found.values())
    of_full = Counter(r.pool for w in SIZES["full"].worlds for r in recipes(w, SIZES["full"]).values())
    assert of_full["P"] >= 60 and of_full["N"] >= 60
    assert {w.shape for w in SIZES["standard"].worlds} == {"llama", "gpt2"}
    with pytest.raises(InputError, match="no recipe makes what b needs"):
        in_order({"b": Recipe("P", "holds", lambda *_: None, needs=("a",))})


def test_every_strength_is_a_setting_that_its_method_has() -> None:
    for method in METHODS:
        of_one = listing.STRENGTHS.get(method, listing._LR)
        assert len(of_one) == 3 and len({json.dumps(o, sort_keys=True) for o in of_one}) == 3
        for options in of_one:
            method_named(method, {k: v for k, v in options.items() if k not in {"lr", "steps", "batch_size"}})


@pytest.mark.usefixtures("_small")
def test_a_model_that_did_not_come_out_is_refused(tmp_path: Path) -> None:
    lazy = replace(TINY, worlds=(replace(SMALL, epochs=1, more=1),))
    SIZES["tiny"] = lazy
    with pytest.raises(InputError, match=r"gives only \d+% of the forget answers; one that knows must give 90%"):
        make(tmp_path / "zoo")


def test_bad_input_is_told_in_one_line(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="unknown size 'huge'; use one of quick, standard, full"):
        build(tmp_path, size="huge")
    with pytest.raises(InputError, match="unknown pool 'Q'; use some of base, original, reference, P, N, suppressor"):
        build(tmp_path, pools=("P", "Q"))
    with pytest.raises(InputError, match="unknown world 'llama-3'; use some of llama-1, llama-2"):
        build(tmp_path, worlds=("llama-3",))
    with pytest.raises(InputError, match="--facts goes with --base"):
        build(tmp_path, facts="some.jsonl")
    with pytest.raises(InputError, match="holds no zoo"):
        read(tmp_path)
    (tmp_path / "manifest.json").write_text(json.dumps({"size": "quick"}), encoding="utf-8")
    with pytest.raises(InputError, match="holds no finished model yet"):
        read(tmp_path)
    with pytest.raises(InputError, match="holds another zoo"):
        build(tmp_path, size="quick")
