"""Tests of `lethescope probe`: files that say where they come from, numbers of the library, mistakes in one line."""

import json
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import xarray as xr

from lethescope import measurement
from lethescope.cli import main
from lethescope.cli_probe import _probes
from lethescope.facts import SPLITS, facts_hash, of_split, read_facts
from lethescope.models import Model, load
from lethescope.probes import attribution, context, horizon, landscape, needles, retrieval_heads
from lethescope.probes.context_units import contexts, swapped
from lethescope.subjects import shipped

OPTIONS = {
    "retrieval-heads": ["--lengths", "40,48", "--depths", "0,1", "--needles", "6", "--seed", "3"],
    "attribution": ["--limit", "3", "--units", "subject"],
    "landscape": ["--limit", "2", "--sizes", "0.3,0.5", "--k", "2", "--m", "5", "--original", str(shipped("original"))],
    "context": ["--limit", "2", "--units", "6", "--contexts", "2", "--swap", "--no-decode", "--seed", "1"],
    "horizon": ["--limit", "3", "--layers", "0,4", "--baseline", "mean", "--score", "logprob"],
}


@pytest.fixture(scope="module", autouse=True)
def _signals() -> Iterator[None]:
    """Give back the SIGTERM handler that `main` sets."""
    before = signal.getsignal(signal.SIGTERM)
    yield
    signal.signal(signal.SIGTERM, before)


def line(name: str, out: Path, facts: Path, model: str = "unlearned") -> list[str]:
    """Return the arguments of a good command."""
    asked = [] if name == "retrieval-heads" else ["--facts", str(facts)]
    return ["probe", name, "--model", str(shipped(model)), "--out", str(out), *asked, *OPTIONS[name]]


@pytest.fixture(scope="module")
def done(few_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every probe of the unlearned model, and the horizon of the original too."""
    folder = tmp_path_factory.mktemp("probes")
    for name in OPTIONS:
        assert main(line(name, folder / "unlearned", few_file)) == 0
    assert main(line("horizon", folder / "original", few_file, "original")) == 0
    return folder


@pytest.fixture(scope="module")
def unlearned() -> Model:
    return load(shipped("unlearned"))


def opened(done: Path, name: str) -> xr.Dataset:
    return measurement.open_(done / "unlearned" / f"{name}.nc")


@pytest.mark.parametrize("name", OPTIONS)
def test_a_file_says_where_it_comes_from_and_a_figure_stands_beside_it(done: Path, unlearned: Model, name: str) -> None:
    ds = opened(done, name)  # refuses what lacks an attribute
    assert all(str(ds.attrs[given]) for given in measurement.REQUIRED)
    assert ds.attrs["probe"] == name.replace("-", "_")
    assert ds.attrs["model"] == unlearned.fingerprint
    assert (ds.attrs["dtype"], ds.attrs["device"]) == ("torch.float32", "cpu")
    assert ds.attrs["forward_passes"] > 0
    assert (done / "unlearned" / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    assert len(list((done / "unlearned").iterdir())) == 2 * len(OPTIONS)


def wanted(name: str, model: Model, few_file: Path) -> xr.Dataset:
    every = read_facts(few_file)
    facts = [f for split in SPLITS for f in of_split(every, split)[: 2 if name in ("landscape", "context") else 3]]
    if name == "attribution":
        return attribution.measure(model, facts, units="subject")
    if name == "landscape":
        return landscape.measure(model, facts, original=load(shipped("original")), k=2, m=5, sizes=[0.3, 0.5])
    if name == "horizon":
        return horizon.measure(model, facts, layers=[0, 4], baseline="mean", score="logprob")
    if name == "context":
        asked = contexts(model.tokenizer, units=6, n=2, facts=swapped(facts, seed=1), seed=1)
        return context.measure(model, asked, decode=False, seed=1)
    made = needles.key_value_needles(model.tokenizer, lengths=[40, 48], depths=[0, 1], each=2, seed=3)
    return retrieval_heads.measure(model, made, seed=3)


@pytest.mark.parametrize("name", OPTIONS)
def test_numbers_are_those_of_the_library(done: Path, unlearned: Model, few_file: Path, name: str) -> None:
    xr.testing.assert_equal(opened(done, name), wanted(name, unlearned, few_file))


def test_parameters_and_facts_are_told(done: Path, few_file: Path) -> None:
    told = {name: json.loads(opened(done, name).attrs["parameters"]) for name in OPTIONS}
    assert told["horizon"] == {"layers": [0, 4], "mode": "keep_one", "baseline": "mean", "score": "logprob"}
    assert told["landscape"] == {"sizes": [0.3, 0.5], "k": 2, "m": 5, "original": load(shipped("original")).fingerprint}
    assert told["retrieval-heads"]["lengths"] == [40, 48] and told["retrieval-heads"]["each"] == 2
    how = {"decode": False, "more": 8, "rivals": 15}
    assert told["context"] == {"units": 6, "contexts": 2, "swap": True, **how}
    every = read_facts(few_file)
    asked = [f for split in SPLITS for f in of_split(every, split)[:3]]
    assert opened(done, "attribution").attrs["facts"] == facts_hash(asked)


def summary(done: Path, name: str) -> str:
    return "\n".join(_probes()[name].tell(opened(done, name)))


def test_a_summary_tells_what_is_in_the_file(done: Path) -> None:
    heads = opened(done, "retrieval-heads")
    mean = heads["score"].mean("instance").values
    told = summary(done, "retrieval-heads")
    assert f"8 needles, kept 100%, answered right {float(heads['right'].mean()):.0%}" in told
    assert f"of 24 heads {(mean >= 0.1).mean():.1%} score at least 0.1, {(mean >= 0.5).mean():.1%}" in told
    layer, head = np.unravel_index(mean.argmax(), mean.shape)
    assert f"score): {layer}-{head} {mean.max():.2f}" in told
    words = opened(done, "attribution")
    likely = float(words["log_probability"].values[:3].mean())
    assert f"forget, 3 facts: log-probability {likely:.2f}; " in summary(done, "attribution")
    best, own = np.nanmax(words["contribution"].values[:3], 1).mean(), words["contribution"].values[:3, 0].mean()
    assert words["unit_text"].values[0, 0] == words["subject"].values[0]  # the name is one unit, and comes first
    assert f"the strongest word brings {best:z.2f} nats, of the subject's name {own:z.2f}" in summary(
        done, "attribution"
    )
    around = opened(done, "landscape")
    true, wrong = around["loss"].values[:2, 0].mean(), np.nanmean(around["loss"].values[:2, 1:])
    assert f"forget, 2 facts: loss at the prompt {true:.2f}, of wrong answers {wrong:.2f}" in summary(done, "landscape")
    group = opened(done, "horizon")["group"].values[:3].mean(0)
    assert f"{group[0]:z.2f} after layer 0, {group[1]:z.2f} after layer 4" in summary(done, "horizon")
    assert "forget, 3 of 3 facts name their subject" in summary(done, "horizon")


def test_a_summary_of_contexts_counts_each_split_and_its_chance(done: Path) -> None:
    ds = opened(done, "context")
    lines = summary(done, "context").splitlines()
    for direction in ("document", "code", "database"):
        here = ds.isel(query=np.flatnonzero(ds["direction"] == direction))
        at = lines.index(f"{direction}, {int((here['skipped'] != '').sum())} of 12 skipped")
        for place, split in enumerate(("neutral", *SPLITS), at + 1):
            part = here.isel(query=np.flatnonzero((here["split"] == split) & (here["skipped"] == "")))
            n, luck = part.sizes["query"], float((1 / part["score"].count("candidate")).mean())
            assert lines[place].startswith(f"  {split}: {float(part['best'].mean()):.0%} of {n}, ")
            assert lines[place].endswith(f", chance {luck:.0%}")
    unasked = ds.assign(best=ds["best"].where(ds["split"] != "forget"))
    assert _probes()["context"].tell(unasked).count("  forget: not asked") == 3


def test_contexts_need_no_facts_and_let_the_model_answer(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bare = ["probe", "context", "--model", str(shipped("unlearned")), "--units", "3", "--contexts", "1"]
    assert main([*bare, "--out", str(tmp_path / "out")]) == 0
    said = capsys.readouterr().out
    assert "neutral: " in said and ", said " in said and "forget" not in said
    ds = measurement.open_(tmp_path / "out" / "context.nc")
    assert set(ds["split"].values) == {"neutral"} and ds["correct"].notnull().all()
    for needless in (["--swap"], ["--limit", "3"], ["--forget", "forget01"]):
        assert main([*bare, "--out", str(tmp_path / "no"), *needless]) == 2
        assert f"{needless[0]} is for facts among the units; give --facts" in capsys.readouterr().err


def test_a_summary_and_the_files_are_printed(
    done: Path, few_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(line("horizon", tmp_path, few_file)) == 0
    said = capsys.readouterr().out
    assert all(f"  {told}" in said for told in summary(done, "horizon").splitlines())
    assert said.endswith(f"\n{tmp_path / 'horizon.nc'}\n{tmp_path / 'horizon.png'}\n")
    there, before = tmp_path / "horizon.png", done / "unlearned" / "horizon.png"
    assert there.read_bytes() == before.read_bytes()


def test_models_asked_alike_stand_in_one_figure(done: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pair = [f"{role}={done / role / 'horizon.nc'}" for role in ("original", "unlearned")]
    out = tmp_path / "both.pdf"
    assert main(["probe", "figure", *pair, "--out", str(out), "--width", "icml"]) == 0
    assert out.read_bytes().startswith(b"%PDF") and capsys.readouterr().out == f"{out}\n"
    for name in OPTIONS:
        assert (
            main(["probe", "figure", f"model={done / 'unlearned' / name}.nc", "--out", f"{tmp_path / name}.svg"]) == 0
        )


def test_a_haystack_is_read_from_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: dict[str, Any] = {}

    def caught(_tokenizer: Any, **given: Any) -> Any:
        seen.update(given)
        raise KeyboardInterrupt

    monkeypatch.setattr(needles, "sentence_needles", caught)
    (tmp_path / "b.txt").write_text("Second.", encoding="utf-8")
    (tmp_path / "a.txt").write_text("First.", encoding="utf-8")
    common = ["probe", "retrieval-heads", "--model", str(shipped("original")), "--out", str(tmp_path / "out")]
    assert main([*common, "--kind", "sentence", "--haystack", str(tmp_path), "--needles", "11"]) == 130
    assert seen == {
        "haystack": "First.\n\nSecond.",
        "lengths": [512],
        "depths": [0, 0.25, 0.5, 0.75, 1],
        "each": 3,
        "seed": 0,
    }


BAD: dict[str, tuple[str, list[str], str]] = {
    "length": ("retrieval-heads", ["--lengths", "100"], "takes 100 tokens; the model reads at most 64"),
    "numbers": ("retrieval-heads", ["--lengths", "12,x"], "'12,x' is not numbers with commas between them"),
    "count": ("attribution", ["--limit", "0"], "'0' is not a whole number of 1 or more"),
    "haystack": ("retrieval-heads", ["--haystack", "gone"], "--haystack is for --kind sentence"),
    "no text": ("retrieval-heads", ["--kind", "sentence", "--haystack", "."], "the folder holds no .txt file"),
    "choice": ("horizon", ["--baseline", "nothing"], "invalid choice: 'nothing'"),
    "room": ("context", ["--contexts", "1"], "6 facts are too many: 1 contexts of 6 units have room for 3"),
    "long": ("context", ["--units", "40"], "the model reads at most 64; use fewer units"),
    "markup": ("context", ["--template", "chat"], "invalid choice: 'chat'"),
    "layer": ("horizon", ["--layers", "0,9"], "layers are [0, 9]; give some of 0 to 5"),
    "size": ("landscape", ["--sizes", "0"], "sizes are [0.0]"),
    "original": ("landscape", ["--original", "./gone"], "original model: there is no folder ./gone"),
    "facts": ("horizon", ["--facts", "gone.jsonl"], "gone.jsonl: no such file"),
    "model": ("horizon", ["--model", "./gone"], "probed model: there is no folder ./gone"),
    "dtype": ("attribution", ["--dtype", "float3"], "unknown dtype 'float3'"),
    "device": ("attribution", ["--device", "moon"], "device 'moon' cannot be used here"),
}


@pytest.mark.parametrize("case", BAD)
def test_a_mistake_is_told_in_one_line_and_leaves_nothing(
    case: str, few_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    name, spoiled, words = BAD[case]
    assert main([*line(name, tmp_path / "out", few_file), *spoiled]) == 2
    said, complaint = capsys.readouterr()
    assert said == "" and complaint.startswith("lethescope: ") and complaint.count("\n") == 1
    assert words in complaint
    assert not list(tmp_path.iterdir())


def test_results_are_not_written_over(done: Path, few_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = done / "unlearned" / "horizon.nc"
    before = path.read_bytes()
    assert main(line("horizon", done / "unlearned", few_file)) == 2
    assert f"{path} is there already; give another --out folder" in capsys.readouterr().err
    assert main(line("horizon", path, few_file)) == 2
    assert f"{path} is there already" in capsys.readouterr().err
    assert path.read_bytes() == before


Refuse = Callable[..., None]


@pytest.fixture
def refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Refuse:
    """Check that `lethescope probe figure` with these arguments ends in one line that says `words`."""

    def check(*given: str, words: str, out: str = "f.png") -> None:
        assert main(["probe", "figure", *given, "--out", str(tmp_path / out)]) == 2
        complaint = capsys.readouterr().err
        assert words in complaint and complaint.count("\n") == 1, complaint
        assert not (tmp_path / out).exists()

    return check


def test_bad_figures(done: Path, tmp_path: Path, refused: Refuse) -> None:
    one, other = f"original={done / 'original' / 'horizon.nc'}", f"b={done / 'unlearned' / 'attribution.nc'}"
    refused(one, other, words="b and original differ in probe; measure both with the same options")
    refused(one, one, words="every role once")
    refused("horizon.nc", words="write each measurement as ROLE=FILE.nc")
    refused(f"a={tmp_path / 'gone.nc'}", words="is not a readable Measurement")
    refused(one, out="f.jpeg", words="use one of .pdf, .png, .svg")
    refused(one, "--width", "huge", words="figure width 'huge' is not known")
    strange = measurement.open_(done / "original" / "horizon.nc").assign_attrs(probe="lens")
    measurement.save(strange, tmp_path / "lens.nc")
    refused(f"a={tmp_path / 'lens.nc'}", words="a is a measurement of 'lens'; use one of")
    measurement.save(strange.assign_attrs(probe="horizon", facts="0"), tmp_path / "other.nc")
    refused(one, f"b={tmp_path / 'other.nc'}", words="b and original differ in facts")


def test_help_names_every_probe(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="0"):
        main(["probe", "--help"])
    said = capsys.readouterr().out
    assert all(name in said for name in (*OPTIONS, "figure"))
    assert set(OPTIONS) <= set(_probes())
