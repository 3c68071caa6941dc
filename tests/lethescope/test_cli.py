"""Tests of the command line: every bad input ends in one clear line and leaves nothing behind."""

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from lethescope.audit import Audit
from lethescope.cli import _method_option, main
from lethescope.facts import Facts
from lethescope.subjects import shipped
from lethescope.subjects.tokenizer import fact_tokenizer

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture(autouse=True)
def _signals() -> Iterator[None]:
    """Give back the SIGTERM handler that `main` sets."""
    before = signal.getsignal(signal.SIGTERM)
    yield
    signal.signal(signal.SIGTERM, before)


@pytest.fixture
def arguments(few_file: Path, tmp_path: Path) -> dict[str, Any]:
    """Arguments of a good command, to be spoiled one by one."""
    models = {name: shipped(name) for name in ("original", "unlearned")}
    return {**models, "facts": few_file, "out": tmp_path / "out", "channels": "say,lens", "budget": "quick"}


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Run:
    """Run `lethescope audit` with arguments; return its exit code, stdout and stderr."""

    def go(arguments: dict[str, Any]) -> tuple[int, str, str]:
        line = [part for name, given in arguments.items() for part in (f"--{name}", str(given))]
        capsys.readouterr()
        code = main(["audit", *line])
        return code, *capsys.readouterr()

    return go


def refused(run: Run, arguments: dict[str, Any], *words: str, out_stays: bool = False) -> None:
    """Check that the command ends with 2 and one line that says `words`, and that no out folder is left."""
    code, said, complaint = run(arguments)
    assert (code, said) == (2, "")
    assert complaint.startswith("lethescope: ") and complaint.count("\n") == 1 and complaint.endswith("\n"), complaint
    assert "Traceback" not in complaint
    for word in words:
        assert word in complaint, complaint
    assert Path(arguments["out"]).exists() is out_stays


def spoiled(folder: Path, change: Callable[[Path], None], name: str = "unlearned") -> Path:
    """Copy a shipped model and change the copy."""
    shutil.copytree(shipped(name), folder)
    change(folder)
    return folder


def drop(pattern: str) -> Callable[[Path], None]:
    return lambda folder: [path.unlink() for path in folder.glob(pattern)] and None


def put_nan(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    weights["model.norm.weight"][3] = float("nan")
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def pickled(folder: Path) -> None:
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()


MODELS: dict[str, tuple[Callable[[Path], None], Sequence[str]]] = {
    "no tokenizer": (drop("tokenizer*"), ("has no tokenizer", "save one beside the weights")),
    "no config": (drop("config.json"), ("has no config.json",)),
    "no weights": (drop("*.safetensors"), ("holds no weights",)),
    "nan": (put_nan, ("model.norm.weight", "NaN")),
    "pickle": (pickled, ("pickle pytorch_model.bin", "save_pretrained(…) writes safetensors")),
}


@pytest.mark.parametrize("case", MODELS)
def test_bad_models(run: Run, arguments: dict[str, Any], tmp_path: Path, case: str) -> None:
    change, words = MODELS[case]
    bad = spoiled(tmp_path / "model", change)
    refused(run, {**arguments, "unlearned": bad}, *words)


def test_missing_folder(run: Run, arguments: dict[str, Any], tmp_path: Path) -> None:
    gone = tmp_path / "gone"
    refused(run, {**arguments, "original": gone}, "original model", f"there is no folder {gone}")
    refused(run, {**arguments, "facts": gone}, f"{gone}: no such file")


def one_line(number: int, change: Callable[[dict[str, Any]], Any]) -> Callable[[list[str]], list[str]]:
    """Change one line of a facts file; lines are counted from 1."""

    def spoil(lines: list[str]) -> list[str]:
        changed = change(json.loads(lines[number - 1]))
        return [*lines[: number - 1], changed if isinstance(changed, str) else json.dumps(changed), *lines[number:]]

    return spoil


FACTS: dict[str, tuple[Callable[[list[str]], list[str]], Sequence[str]]] = {
    "json": (one_line(7, lambda fact: '{"id": "x", '), ("line 7", "not valid JSON")),
    "split": (one_line(3, lambda fact: fact | {"split": "remember"}), ("line 3", "split", "remember")),
    "answer": (one_line(2, lambda fact: fact | {"answer": "Velmora unheardof"}), ("the answer", "tokenizer knows")),
    "forget": (lambda lines: [x for x in lines if json.loads(x)["split"] != "forget"], ("forget split is empty",)),
    "empty": (lambda lines: [], ("no rows",)),
}


@pytest.mark.parametrize("case", FACTS)
def test_bad_facts(run: Run, arguments: dict[str, Any], few_file: Path, tmp_path: Path, case: str) -> None:
    change, words = FACTS[case]
    bad = tmp_path / "bad.jsonl"
    bad.write_text("\n".join(change(few_file.read_text(encoding="utf-8").splitlines())), encoding="utf-8")
    refused(run, {**arguments, "facts": bad}, *words)


def test_an_answer_that_tokenises_to_nothing(
    run: Run, arguments: dict[str, Any], few_file: Path, tmp_path: Path
) -> None:
    """A tokenizer that drops every z makes nothing of the answer "zz"."""

    def drop_z(folder: Path) -> None:
        path = folder / "tokenizer.json"
        inside = json.loads(path.read_text(encoding="utf-8"))
        drops = {"type": "Replace", "pattern": {"String": "z"}, "content": ""}
        steps = [step for step in (inside["normalizer"],) if step]
        inside["normalizer"] = {"type": "Sequence", "normalizers": [*steps, drops]}
        path.write_text(json.dumps(inside), encoding="utf-8")

    models = {name: spoiled(tmp_path / name, drop_z, name) for name in ("original", "unlearned")}
    lines = few_file.read_text(encoding="utf-8").splitlines()
    bad = tmp_path / "bad.jsonl"
    bad.write_text("\n".join(one_line(1, lambda fact: fact | {"answer": "zz"})(lines)), encoding="utf-8")
    refused(run, {**arguments, **models, "facts": bad}, "the answer 'zz'", "fact 'forget-000-", "tokenises to nothing")


def test_other_vocabularies(run: Run, arguments: dict[str, Any], few: Facts, tmp_path: Path) -> None:
    other = spoiled(tmp_path / "model", lambda folder: fact_tokenizer(few).save_pretrained(folder) and None)
    every = "say,lens,patch"
    refused(run, {**arguments, "unlearned": other, "channels": every}, "different vocabularies", "--channels say,lens")


def test_identical_models(run: Run, arguments: dict[str, Any]) -> None:
    refused(
        run, {**arguments, "unlearned": arguments["original"]}, "same weights as the original", "nothing to compare"
    )


def test_unknown_names(run: Run, arguments: dict[str, Any]) -> None:
    refused(run, {**arguments, "channels": "say,smell"}, "unknown channel 'smell'", "say", "lens")
    refused(run, {**arguments, "fail-on": "known,forgotten"}, "unknown 'forgotten'", "suppressed")
    refused(run, {**arguments, "dtype": "float3"}, "unknown dtype 'float3'", "float32")
    refused(run, {**arguments, "budget": "endless"}, "invalid choice: 'endless'", "thorough", "lethescope audit --help")


def test_out_is_a_file_or_holds_something_else(
    run: Run, arguments: dict[str, Any], few_audit: tuple[Audit, Path], tmp_path: Path
) -> None:
    there = tmp_path / "there"
    shutil.copytree(few_audit[1], there)
    before = {path: path.read_bytes() for path in there.rglob("*") if path.is_file()}
    refused(run, {**arguments, "out": there, "seed": 1}, f"{there} holds another audit", "seed", out_stays=True)
    assert {path: path.read_bytes() for path in there.rglob("*") if path.is_file()} == before
    (there / "manifest.json").unlink()
    refused(run, {**arguments, "out": there}, "results of unknown origin", out_stays=True)
    refused(run, {**arguments, "out": there / "report.html"}, "is a file; --out needs a folder", out_stays=True)


def test_a_full_disk_leaves_nothing_half_written(
    run: Run, arguments: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(path: Path, data: bytes) -> int:
        with path.open("wb") as file:
            file.write(data[: len(data) // 2])
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    refused(run, arguments, "cannot write", "No space left on device", out_stays=True)
    left = [path.name for path in arguments["out"].rglob("*") if path.is_file()]
    assert left == ["manifest.json"]
    monkeypatch.undo()
    assert run(arguments)[0] == 0


def test_a_good_audit_and_fail_on(
    run: Run, arguments: dict[str, Any], few_audit: tuple[Audit, Path], tmp_path: Path
) -> None:
    shutil.copytree(few_audit[1], arguments["out"])
    verdict = few_audit[0].verdict
    before = (few_audit[1] / "verdict.json").read_bytes()
    code, said, complaint = run(arguments)
    assert code == 0 and str(arguments["out"] / "report.html") in said and verdict.upper() in said.replace(" ", "_")
    assert "Traceback" not in complaint
    assert (arguments["out"] / "verdict.json").read_bytes() == before
    assert run({**arguments, "fail-on": verdict})[0] == 1
    others = {"known", "suppressed", "partly_erased"} - {verdict}
    assert run({**arguments, "fail-on": ",".join(sorted(others))})[0] == 0


def test_ctrl_c_says_how_to_go_on(run: Run, arguments: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: Any, **__: Any) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setattr("lethescope.audit", interrupted)
    code, _, complaint = run(arguments)
    assert code == 130 and complaint == "lethescope: stopped; the same command goes on from here\n"


@pytest.mark.parametrize(
    ("line", "words"),
    [
        (["zoo", "build", "--size", "huge", "--out", "zoo"], "unknown size 'huge'; use one of quick, standard, full"),
        (["validate", "--zoo", "gone", "--out", "out"], "gone holds no zoo"),
        (["unlearn", "--model", "m", "--facts", "f", "--out", "o", "--option", "beta"], "write it as NAME=VALUE"),
        (["tofu-score", "gone.json"], "gone.json"),
        (["heads-compare", "gone.json", "gone.json"], "gone.json"),
        (["fly"], "invalid choice: 'fly'"),
    ],
)
def test_other_commands_tell_mistakes_in_one_line(
    line: list[str], words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(line) == 2
    complaint = capsys.readouterr().err
    assert complaint.startswith("lethescope: ") and words in complaint and complaint.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_method_options_are_json_where_they_can_be() -> None:
    given = ["beta=0.5", "layer=null", "importance=fisher", "name=a=b"]
    expected = {"beta": 0.5, "layer": None, "importance": "fisher", "name": "a=b"}
    assert dict(map(_method_option, given)) == expected


def test_python_m_lethescope() -> None:
    done = subprocess.run([sys.executable, "-m", "lethescope", "--help"], capture_output=True, text=True, check=False)
    assert done.returncode == 0 and "audit" in done.stdout and done.stderr == ""


KILLED = """
import os, signal, sys
from dataclasses import replace
from pathlib import Path
from lethescope.cli import main

channel, where, *line = sys.argv[1:]
known = sys.modules["lethescope.audit"].CHANNELS
calls = 0

def die(*_):
    os.kill(os.getpid(), signal.SIGKILL)

def half(path, data):
    with path.open("wb") as file:
        file.write(data[: len(data) // 2])
    die()

def dying(model, facts, **options):
    global calls
    calls += 1
    if calls == 2 and where == "measuring":
        model.blocks[0].register_forward_hook(die)
    if calls == 2 and where == "writing":
        Path.write_bytes = half
    return inside(model, facts, **options)

inside = known[channel].measure
known[channel] = replace(known[channel], measure=dying)
main(line)
"""


def _plain(folder: Path) -> dict[str, Any]:
    """Return verdict.json without what depends on the clock or the place."""
    told = json.loads((folder / "verdict.json").read_text(encoding="utf-8"))
    for channel in told["channels"]:
        channel.pop("seconds")
    return told


def _kill_and_go_on(line: dict[str, Any], channel: str, where: str, out: Path) -> None:
    parts = [part for name, given in {**line, "out": out}.items() for part in (f"--{name}", str(given))]
    quiet = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", KILLED, channel, where, "audit", *parts]
    killed = subprocess.run(command, capture_output=True, text=True, check=False, env=quiet)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert not (out / "verdict.json").exists()
    assert main(["audit", *parts]) == 0
    assert not list(out.rglob(".*.tmp"))


@pytest.mark.parametrize("where", ["measuring", pytest.param("writing", marks=pytest.mark.slow)])
def test_kill_9_and_the_same_command_again(
    arguments: dict[str, Any], few_audit: tuple[Audit, Path], where: str
) -> None:
    _kill_and_go_on(arguments, "lens", where, arguments["out"])
    assert _plain(arguments["out"]) == _plain(few_audit[1])


@pytest.mark.slow
def test_kill_9_in_every_channel(arguments: dict[str, Any], tmp_path: Path) -> None:
    from lethescope.audit import CHANNELS, audit

    del arguments["channels"]
    whole = tmp_path / "whole"
    audit(**{**arguments, "out": whole}, progress=False)
    for channel in CHANNELS:
        _kill_and_go_on(arguments, channel, "measuring", tmp_path / channel)
        assert _plain(tmp_path / channel) == _plain(whole), channel
