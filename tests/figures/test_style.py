import contextlib
import doctest
import io
import os
import re
import runpy
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import matplotlib
import pytest

from lethescope.audit import CHANNELS
from lethescope.errors import InputError
from lethescope.figures import audit, bands, curves, layers, residue, style

made = SimpleNamespace(**runpy.run_path(str(Path(__file__).with_name("made.py"))))


@pytest.mark.parametrize("module", [audit, bands, curves, layers, residue, style])
def test_examples(module):
    assert doctest.testmod(module).failed == 0


@pytest.mark.parametrize(("preset", "inches"), [("neurips", 5.5), ("icml", 3.25), ("icml-wide", 6.75), (4.2, 4.2)])
def test_saved_width_is_the_columns(preset, inches, tmp_path):
    figure = residue.paper(made.verdict(), width=preset)
    pdf = style.save(figure, tmp_path / "f.pdf").read_bytes()
    png = style.save(figure, tmp_path / "f.png").read_bytes()
    (points,) = re.findall(rb"/MediaBox \[ 0 0 ([\d.]+) ", pdf)
    assert float(points) / 72 == pytest.approx(inches, abs=0.01)
    assert int.from_bytes(png[16:20], "big") / 200 == pytest.approx(inches, abs=0.01)


def test_pdf_holds_truetype_fonts_and_no_date(tmp_path):
    pdf = style.save(residue.paper(made.verdict()), tmp_path / "f.pdf").read_bytes()
    assert b"/CIDFontType2" in pdf
    assert b"/Type3" not in pdf
    assert b"Date" not in pdf


def test_another_process_with_another_hash_seed_and_date_draws_the_same_bytes_and_loads_no_pyplot():
    program = f"""
import hashlib, runpy, sys
from types import SimpleNamespace
from lethescope.figures import layers, residue, style
made = SimpleNamespace(**runpy.run_path({str(Path(__file__).with_name("made.py"))!r}))
for figure in (residue.paper(made.verdict()), layers.paper(made.lens([0, 1, 2, 3, 4]), made.lens([0, 1, 2, 2, 0]))):
    for kind in ("pdf", "svg", "png"):
        print(hashlib.sha256(style.drawn_as(figure, kind)).hexdigest())
"""
    here = io.StringIO()
    with contextlib.redirect_stdout(here):
        exec(program, {})
    environment = os.environ | {"PYTHONHASHSEED": "7", "SOURCE_DATE_EPOCH": "1000"}
    program += "print('matplotlib.pyplot' in sys.modules)"
    there = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True)
    assert there.stdout == here.getvalue() + "False\n"
    assert len(set(here.getvalue().split())) == 6


def test_a_users_settings_change_nothing_and_stay_as_they_are():
    plain = style.drawn_as(residue.paper(made.verdict()), "svg")
    with matplotlib.rc_context({"font.size": 20, "savefig.bbox": "tight", "svg.fonttype": "none", "axes.grid": True}):
        before = dict(matplotlib.rcParams)
        assert style.drawn_as(residue.paper(made.verdict()), "svg") == plain
        assert dict(matplotlib.rcParams) == before


def test_a_notebook_shows_the_figure_in_its_own_width():
    formatter = pytest.importorskip("IPython.core.formatters").DisplayFormatter()
    data, metadata = formatter.format(residue.paper(made.verdict(), width="icml"))
    assert data["image/png"].startswith(b"\x89PNG")
    assert metadata["image/png"] == {"width": 390}


@pytest.mark.parametrize("width", ["neurps", 0, -1.0, float("nan")])
def test_a_width_that_is_none_is_refused(width):
    with pytest.raises(InputError, match="width"):
        style.width_of(width)


def test_a_near_preset_is_named():
    with pytest.raises(InputError, match="use 'neurips'"):
        style.width_of("neurps")


@pytest.mark.parametrize("name", ["f.jpeg", "f", "f.eps"])
def test_another_kind_of_file_is_refused_and_not_written(name, tmp_path):
    with pytest.raises(InputError, match=r"\.pdf"):
        style.save(residue.paper({}), tmp_path / name)
    assert not list(tmp_path.iterdir())


def test_channels_and_roles_are_told_apart():
    assert len({style.channel_colour(name) for name in CHANNELS}) == len(CHANNELS) == 9
    looks = [style.role_look(role) for role in ("original", "unlearned", "reference-0", "planted-unembedding")]
    assert len({look.color for look in looks}) == len({look.marker for look in looks}) == 4
    assert style.channel_colour("a channel of tomorrow") == style.channel_colour("a channel of tomorrow")


def test_shorten_keeps_the_limit_and_both_ends():
    assert style.shorten("x" * 30 + "end", 10) == "xxxxx…xend"
    assert style.shorten("two\n lines", 20) == "two lines"
    assert all(len(style.shorten("abcdefghijkl", n)) == n for n in range(3, 12))
