"""Tests of where cells are computed."""

import sys
from collections.abc import Iterator
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from lethescope.engine import run
from lethescope.errors import InputError


def test_local_cells_come_one_by_one_in_order() -> None:
    done: list[int] = []

    def square(cell: int) -> int:
        done.append(cell)
        return cell**2

    results: Iterator[int] = run(square, [3, 1, 2])
    assert not done
    assert next(results) == 9 and done == [3]  # a run that is stopped now has one whole cell behind it
    assert list(results) == [1, 4] and done == [3, 1, 2]


def test_an_unknown_engine_is_named() -> None:
    with pytest.raises(InputError, match="unknown engine 'steam'; use local or ray"):
        list(run(str, [1], engine="steam"))  # type: ignore[arg-type]


def test_ray_that_is_not_installed_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(InputError, match=r"needs Ray: pip install 'lethescope\[ray\]'"):
        list(run(str, [1], engine="ray"))


def test_ray_is_handed_the_function_once_and_gives_back_in_order(monkeypatch: pytest.MonkeyPatch) -> None:
    """A stand-in for Ray that only keeps its books; the real one is used where it is installed, below."""
    ray: Any = ModuleType("ray")
    kept: list[Any] = []

    def put(thing: Any) -> int:
        kept.append(thing)
        return len(kept) - 1

    ray.is_initialized = lambda: True
    ray.put, ray.get = put, lambda ticket: ticket()
    ray.remote = lambda f: SimpleNamespace(remote=lambda shared, cell: lambda: f(kept[shared], cell))
    monkeypatch.setitem(sys.modules, "ray", ray)
    assert list(run(lambda x: x**2, [3, 1, 2], engine="ray")) == [9, 1, 4]
    assert len(kept) == 1


@pytest.mark.slow
def test_ray_gives_what_local_gives() -> None:
    ray = pytest.importorskip("ray")
    try:
        assert list(run(abs, [-3, 1, -2], engine="ray")) == list(run(abs, [-3, 1, -2]))
    finally:
        ray.shutdown()
