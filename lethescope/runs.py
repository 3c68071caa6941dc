"""The store of a run: finished cells on disk, found again by what they were computed from."""

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import xarray as xr

from lethescope import measurement
from lethescope.errors import InputError


def key(**parts: Any) -> str:
    """Return 16 hex digits that are equal when everything a cell is computed from is equal."""
    return hashlib.sha256(measurement.to_json(parts).encode()).hexdigest()[:16]


class Store:
    """Measurements under names, kept in a folder (and, by key, in a cache that several audits may share).

    A cell is found again only if its key is the same, so a changed option never meets an old number. Files are written
    under a temporary name and renamed: after a kill, a cell is there whole or not at all.
    """

    def __init__(self, folder: Path | None = None, cache: Path | None = None) -> None:
        self.folder, self.cache = folder, cache
        for place in (folder, cache):
            if place is not None and place.is_dir():
                for left in place.glob(".*.tmp"):
                    if not measurement.is_being_written(left):
                        left.unlink(missing_ok=True)

    def cell(self, channel: str, role: str, key: str, compute: Callable[[], xr.Dataset]) -> xr.Dataset:
        """Return the Measurement of a channel on a role with this key, computed now if it is not there yet."""
        found = self._find(channel, role, key)
        if found is None:
            found = compute().assign_attrs(key=key)
        found.attrs["role"] = role
        self.put(channel, role, found)
        return found

    def put(self, channel: str, role: str, ds: xr.Dataset) -> None:
        """Keep a Measurement, unless it is there already."""
        for path in self._paths(channel, role, ds.attrs["key"]):
            named = path.is_file() and path.stem == ds.attrs["key"]  # as in the cache: whole, by its name
            if not named and self._read(path, ds.attrs["key"]) is None:
                measurement.save(ds, path)

    def _paths(self, channel: str, role: str, key: str) -> list[Path]:
        here = [self.folder / f"{channel}.{role}.nc"] if self.folder else []
        return here + ([self.cache / f"{key}.nc"] if self.cache else [])

    def _find(self, channel: str, role: str, key: str) -> xr.Dataset | None:
        found = (self._read(path, key) for path in self._paths(channel, role, key))
        return next((ds for ds in found if ds is not None), None)

    @staticmethod
    def _read(path: Path, key: str) -> xr.Dataset | None:
        if not path.is_file():
            return None
        ds = measurement.open_(path)
        return ds if ds.attrs.get("key") == key else None


def claim(folder: Path, manifest: dict[str, Any], what: str = "audit") -> None:
    """Make a folder the home of one audit (or zoo), or find that it already is.

    Raises:
        InputError: the folder holds another one, cannot be written, or is a file.
    """
    path = folder / "manifest.json"
    if folder.exists() and not folder.is_dir():
        raise InputError(f"{folder} is a file; --out needs a folder")
    if path.is_file():
        there = _read_manifest(path)
        differ = [k for k in manifest if there.get(k) != json.loads(json.dumps(manifest[k], default=str))]
        if differ:
            raise InputError(f"{folder} holds another {what} (other {', '.join(differ)}); give a new --out folder")
        return
    if (folder / "verdict.json").exists() or list(folder.glob("measurements/*.nc")):
        raise InputError(f"{folder} holds results of unknown origin (no manifest.json); give a new --out folder")
    write_text(path, json.dumps(manifest, indent=2, ensure_ascii=False, default=str) + "\n")


def _read_manifest(path: Path) -> dict[str, Any]:
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError) as error:
        raise InputError(f"{path} is not readable ({error}); give a new --out folder") from error


def write_text(path: Path, text: str) -> None:
    """Write a text file under a temporary name, then rename.

    Raises:
        InputError: the folder cannot be written.
    """
    with measurement.replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")
