"""Tests of where cells are computed."""

import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import psutil
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


def test_a_stop_does_not_wait_for_the_workers(tmp_path: Path) -> None:
    """Two workers sleep for ten minutes; the process that spread them is told to stop, and all three are gone."""
    code = "import signal, sys, time; from lethescope.engine import spread\n"
    code += "signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))\n"
    code += "if __name__ == '__main__':\n    print('on', flush=True); list(spread(time.sleep, [0, 600, 600], 2))\n"
    (tmp_path / "sleep.py").write_text(code, encoding="utf-8")
    process = subprocess.Popen([sys.executable, str(tmp_path / "sleep.py")], stdout=subprocess.PIPE)
    assert process.stdout is not None and process.stdout.readline() == b"on\n"
    workers = _children(process.pid)
    process.terminate()
    assert process.wait(timeout=60) == 143
    assert workers and not psutil.wait_procs(workers, timeout=30)[1]


def _children(pid: int, least: int = 2) -> list[psutil.Process]:
    """Wait until a process has workers beside multiprocessing's own tracker, and return them."""
    for _ in range(600):
        listed = psutil.Process(pid).children()
        if len(listed) > least:
            return listed
        time.sleep(0.1)
    return []
