"""`lethescope probe NAME`: one instrument on one model. A thin shell over the verbs of `probe_verbs`, top to bottom."""

import argparse
from pathlib import Path

from lethescope import measurement
from lethescope.cost import counting
from lethescope.errors import InputError
from lethescope.figures import style
from lethescope.models import load
from lethescope.probe_verbs import MODEL, Probe
from lethescope.probe_verbs import probes as _probes


def add(parser: argparse.ArgumentParser) -> None:
    """Add a verb for every probe, and `figure`, to the parser of `lethescope probe`."""
    parser.description = (
        "Measure one model with one instrument: a Measurement (NAME.nc), a figure (NAME.png) and a summary. What a "
        "probe finds in one model proves nothing by itself: hold it against the model before and one never taught."
    )
    verbs = parser.add_subparsers(title="probes", required=True, metavar="PROBE")
    for name, probe in _probes().items():
        verb = verbs.add_parser(name, help=probe.help, description=_first_lines(name, probe))
        for option, how in (MODEL | probe.arguments).items():
            verb.add_argument(f"--{option}", **how)
        verb.set_defaults(run=_run, probe=name)
    verb = verbs.add_parser("figure", help="draw measurements of several models in one figure")
    verb.description = "Draw what one probe measured on several models, all asked alike, in one figure."
    verb.add_argument("measurements", nargs="+", metavar="ROLE=FILE.nc", help="original=A.nc unlearned=B.nc …")
    verb.add_argument("--out", required=True, metavar="FILE", help="a .pdf, .png or .svg file")
    verb.add_argument("--width", default="neurips", help=f"{', '.join(style.WIDTHS)}, or inches")
    verb.set_defaults(run=_figure)


def _first_lines(name: str, probe: Probe) -> str:
    return f"Measure {probe.help}; writes {name}.nc and {name}.png. docs/probes.md says what that does not prove."


def _run(options: argparse.Namespace) -> int:
    """Measure, write, and tell.

    Raises:
        InputError: something given cannot be used, or the files are there already.
    """
    probe = _probes()[options.probe]
    stem = Path(options.out) / options.probe
    files = [stem.with_suffix(kind) for kind in (".nc", ".png")]
    there = next((path for path in files if path.exists()), None)
    if there or Path(options.out).is_file():
        raise InputError(f"{there or options.out} is there already; give another --out folder")
    model = load(options.model, role="probed", device=options.device, dtype=options.dtype)
    with counting() as cost:
        found = measurement.check(probe.measure(model, options))
    found = found.assign_attrs(**vars(cost))
    figure = probe.draw({"model": found}, width="report")
    measurement.save(found, files[0])
    with measurement.replacing(files[1]) as temporary:
        temporary.write_bytes(style.drawn_as(figure, "png"))
    print("\n".join([f"{options.probe} of {options.model}", *(f"  {line}" for line in probe.tell(found))]))
    print("\n".join(["", *map(str, files)]))
    return 0


def _figure(options: argparse.Namespace) -> int:
    """Draw measurements of one probe that were made alike.

    Raises:
        InputError: a file is no Measurement, or they were not made alike.
    """
    pairs = [given.partition("=")[::2] for given in options.measurements]
    if not all(role and path for role, path in pairs) or len({role for role, _ in pairs}) < len(pairs):
        raise InputError("write each measurement as ROLE=FILE.nc, and every role once: original=A.nc unlearned=B.nc")
    opened = {role: measurement.open_(Path(path)) for role, path in pairs}
    first, *others = opened
    for other, name in ((other, name) for other in others for name in ("probe", "version", "parameters", "facts")):
        if opened[other].attrs[name] != opened[first].attrs[name]:
            raise InputError(f"{other} and {first} differ in {name}; measure both with the same options")
    probe = _probes().get(opened[first].attrs["probe"].replace("_", "-"))
    if probe is None:
        raise InputError(f"{first} is a measurement of {opened[first].attrs['probe']!r}; use one of {[*_probes()]}")
    style.save(probe.draw(opened, width=_width(options.width)), options.out)
    print(options.out)
    return 0


def _width(given: str) -> str | float:
    try:
        return float(given)
    except ValueError:
        return given
