"""Tests of the store: a cell is found again when its key is the same, and is on disk whole or not at all."""

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import xarray as xr

from lethescope import measurement
from lethescope.errors import InputError
from lethescope.runs import Store, claim, key, write_text


class Lab:
    """A computation that counts how often it was run, and gives something else each time."""

    def __init__(self) -> None:
        self.runs = 0

    def __call__(self) -> xr.Dataset:
        self.runs += 1
        score = np.random.default_rng(self.runs).normal(size=(2, 3, 2))
        attrs = {**dict.fromkeys(measurement.REQUIRED, "x"), "scale": "preference"}
        return xr.Dataset({"score": (("fact", "candidate", "place"), score)}, {"fact": ["a", "b"]}, attrs)


def test_a_key_depends_on_every_part_and_on_no_order() -> None:
    assert key(model="m", seed=0) == key(seed=0, model="m")
    options: list[dict[str, Any]] = [{"model": "m", "seed": 0}, {"model": "m", "seed": 1}, {"model": "n", "seed": 0}]
    assert len({key(**parts) for parts in options}) == 3
    assert key(options={"steps": (4, 16)}) != key(options={"steps": (4, 17)})


def test_a_cell_is_computed_once_per_key(tmp_path: Path) -> None:
    lab = Lab()
    first = Store(tmp_path).cell("lens", "original", "k1", lab)
    again = Store(tmp_path).cell("lens", "original", "k1", lab)
    assert lab.runs == 1 and [path.name for path in tmp_path.iterdir()] == ["lens.original.nc"]
    xr.testing.assert_identical(first, again)
    assert again.attrs["role"] == "original" and again.attrs["key"] == "k1"
    other = Store(tmp_path).cell("lens", "original", "k2", lab)
    assert lab.runs == 2 and not other["score"].equals(first["score"])
    assert Store(tmp_path).cell("lens", "original", "k2", lab)["score"].equals(other["score"])
    assert lab.runs == 2


def test_without_a_folder_everything_is_computed() -> None:
    lab = Lab()
    for _ in range(2):
        Store().cell("lens", "original", "k", lab)
    assert lab.runs == 2


def test_a_cache_is_shared_and_the_role_is_the_askers(tmp_path: Path) -> None:
    lab = Lab()
    first = Store(tmp_path / "one", tmp_path / "cache").cell("lens", "reference-0", "k", lab)
    found = Store(tmp_path / "two", tmp_path / "cache").cell("lens", "unlearned", "k", lab)
    assert lab.runs == 1 and found["score"].equals(first["score"]) and found.attrs["role"] == "unlearned"
    here = measurement.open_(tmp_path / "two" / "lens.unlearned.nc")
    assert here["score"].equals(first["score"]) and here.attrs["role"] == "unlearned"


def test_what_a_killed_run_left_is_cleaned_away(tmp_path: Path) -> None:
    Store(tmp_path).cell("lens", "original", "k", Lab())
    (tmp_path / ".lens.unlearned.nc.4999999.tmp").write_bytes(b"half")  # above the highest process number
    (tmp_path / ".say.unlearned.nc.x.tmp").write_bytes(b"half")
    Store(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["lens.original.nc"]


def test_what_another_audit_is_writing_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / f".lens.unlearned.nc.{os.getppid()}.tmp").write_bytes(b"half")
    Store(tmp_path)
    assert len(list(tmp_path.iterdir())) == 1


def test_a_broken_cell_is_named(tmp_path: Path) -> None:
    (tmp_path / "lens.original.nc").write_bytes(b"not netCDF")
    with pytest.raises(InputError, match=r"lens\.original\.nc is not a readable Measurement.*delete it") as failed:
        Store(tmp_path).cell("lens", "original", "k", Lab())
    assert "\n" not in str(failed.value)


def full(path: Path, data: Any, **_: Any) -> int:
    """Write half, then find the disk full."""
    with path.open("wb") as file:
        file.write((data if isinstance(data, bytes) else data.encode())[: len(data) // 2])
    raise OSError(28, "No space left on device")


def test_a_full_disk_leaves_the_old_cell(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lab = Lab()
    old = Store(tmp_path).cell("lens", "original", "k1", lab)
    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(InputError, match=r"cannot write .*lens\.original\.nc: No space left on device") as failed:
        Store(tmp_path).cell("lens", "original", "k2", lab)
    assert "\n" not in str(failed.value)
    monkeypatch.undo()
    assert [path.name for path in tmp_path.iterdir()] == ["lens.original.nc"]
    xr.testing.assert_identical(Store(tmp_path).cell("lens", "original", "k1", lab), old)
    assert lab.runs == 2


def test_a_full_disk_leaves_the_old_text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_text(tmp_path / "verdict.json", "old")
    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(InputError, match=r"cannot write .*verdict\.json: No space left on device"):
        write_text(tmp_path / "verdict.json", "new and longer")
    assert [path.name for path in tmp_path.iterdir()] == ["verdict.json"]
    assert (tmp_path / "verdict.json").read_text(encoding="utf-8") == "old"


MANIFEST = {"facts": "f1", "seed": 0, "channels": {"lens": {"options": {"steps": (4, 16)}}}}


def test_the_same_audit_goes_on_and_another_is_refused(tmp_path: Path) -> None:
    claim(tmp_path / "out", MANIFEST)
    written = (tmp_path / "out" / "manifest.json").read_bytes()
    claim(tmp_path / "out", MANIFEST)
    for other in ({"seed": 1}, {"channels": {"lens": {"options": {"steps": (4, 17)}}}}):
        with pytest.raises(InputError, match=rf"holds another audit \(other {next(iter(other))}\)") as failed:
            claim(tmp_path / "out", {**MANIFEST, **other})
        assert "\n" not in str(failed.value)
    assert (tmp_path / "out" / "manifest.json").read_bytes() == written
    assert json.loads(written)["facts"] == "f1"


@pytest.mark.parametrize("name", ["verdict.json", "measurements/lens.original.nc"])
def test_results_of_unknown_origin_are_refused(tmp_path: Path, name: str) -> None:
    write_text(tmp_path / name, "{}")
    with pytest.raises(InputError, match="holds results of unknown origin"):
        claim(tmp_path, MANIFEST)
    assert not (tmp_path / "manifest.json").exists()


@pytest.mark.parametrize("text", ["half a {", "[1, 2]", ""])
def test_a_strange_manifest_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "manifest.json").write_text(text, encoding="utf-8")
    with pytest.raises(InputError, match=r"manifest\.json is not readable .*new --out folder"):
        claim(tmp_path, MANIFEST)


def test_a_folder_with_other_things_may_be_used_and_a_file_may_not(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine", encoding="utf-8")
    with pytest.raises(InputError, match=r"notes\.txt is a file; --out needs a folder"):
        claim(tmp_path / "notes.txt", MANIFEST)
    with pytest.raises(InputError, match="cannot make the folder"):
        claim(tmp_path / "notes.txt" / "inside", MANIFEST)
    claim(tmp_path, MANIFEST)
    assert (tmp_path / "notes.txt").read_text(encoding="utf-8") == "mine"
