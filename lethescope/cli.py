"""The command line: a thin shell over the Python functions."""

import argparse
import json
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

from lethescope import cli_probe
from lethescope.errors import InputError

VERDICTS = ("known", "suppressed", "partly_erased", "no_residue_found", "damaged", "inconclusive")


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command and return its exit code: 0 done, 1 a verdict named in --fail-on, 2 bad input, 130 stopped."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    try:
        options = _parser().parse_args(argv)
        return options.run(options)
    except InputError as error:
        print(f"lethescope: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("lethescope: stopped; the same command goes on from here", file=sys.stderr)
        return 130


class _Parser(argparse.ArgumentParser):
    """A parser that tells a mistake in one line, like every other mistake."""

    def error(self, message: str) -> NoReturn:
        raise InputError(f"{message}; see {self.prog} --help")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="lethescope", description="Did the model forget, or did it only stop saying it?")
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")
    _add_audit(commands.add_parser("audit", help="compare a model before and after unlearning"))
    _add_unlearn(commands.add_parser("unlearn", help="make an unlearned model, to audit"))
    _add_zoo(commands.add_parser("zoo", help="make models whose truth is known, to validate on"))
    _add_validate(commands.add_parser("validate", help="how far each channel can be trusted, on a zoo"))
    _add_tofu_score(commands.add_parser("tofu-score", help="forget quality and model utility from a TOFU log"))
    _add_heads_compare(commands.add_parser("heads-compare", help="two files of retrieval-head scores, side by side"))
    cli_probe.add(commands.add_parser("probe", help="one instrument on one model: a measurement and a figure"))
    return parser


def _add_audit(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Ask of two models whether the second forgot the facts or only stopped saying them. A model is a Hugging Face "
        "folder, a hub id, a PEFT adapter folder or a .gguf file. Run the same command again to go on after a stop."
    )
    need = parser.add_argument_group("what to compare")
    need.add_argument("--original", required=True, metavar="REF", help="the model before")
    need.add_argument("--unlearned", required=True, metavar="REF", help="the model that claims to have forgotten")
    need.add_argument(
        "--reference",
        action="append",
        default=[],
        metavar="REF",
        help="a model never taught the facts; may be repeated",
    )
    need.add_argument("--facts", required=True, metavar="FILE", help="facts file (.jsonl) or a TOFU folder")
    need.add_argument("--out", required=True, metavar="DIR", help="folder for the results")
    how = parser.add_argument_group("how")
    how.add_argument("--channels", metavar="A,B", help="only these channels (say always runs)")
    how.add_argument("--sections", metavar="A,B", help="what else to show: attribution, horizon, retrieval-heads")
    how.add_argument("--budget", default="standard", choices=("quick", "standard", "thorough"))
    how.add_argument("--device", default="auto", help="auto, cpu, cuda …")
    how.add_argument("--dtype", default="auto", help="auto, float32, bfloat16, float16")
    how.add_argument("--seed", type=int, default=0)
    how.add_argument("--template", default="auto", choices=("auto", "chat", "qa", "plain"), help="for bare questions")
    how.add_argument("--forget", metavar="NAME", help="which forget set of a facts folder (forget01, forget10 …)")
    how.add_argument("--cache", metavar="DIR", help="finished cells, shared by several audits")
    how.add_argument("--engine", default="local", choices=("local", "ray"))
    how.add_argument("--fail-on", default="", metavar="A,B", help=f"exit 1 on these verdicts: {', '.join(VERDICTS)}")
    parser.set_defaults(run=_audit)


def _audit(options: argparse.Namespace) -> int:
    fail_on = _names(options.fail_on, VERDICTS, "--fail-on")
    from lethescope import audit  # here, so that --help and typing errors do not wait for torch

    result = audit(
        options.original,
        options.unlearned,
        options.facts,
        references=options.reference,
        channels=options.channels.split(",") if options.channels else None,
        sections=options.sections.split(",") if options.sections else None,
        budget=options.budget,
        seed=options.seed,
        out=options.out,
        cache=options.cache,
        device=options.device,
        dtype=options.dtype,
        template=options.template,
        forget=options.forget,
        engine=options.engine,
    )
    print(result)
    print(f"\nreport: {Path(options.out) / 'report.html'}")
    return int(result.verdict in fail_on)


def _add_unlearn(parser: argparse.ArgumentParser) -> None:
    parser.description = "Unlearn the forget facts and keep the retain facts; writes a Hugging Face folder."
    parser.add_argument("--model", required=True, metavar="REF", help="the model to start from; it is not changed")
    parser.add_argument("--facts", required=True, metavar="FILE")
    parser.add_argument("--method", default="npo", help="npo, graddiff, rmu, ssd … (a wrong name lists them all)")
    parser.add_argument(
        "--option", action="append", default=[], metavar="NAME=VALUE", help="of the method (beta=0.5); may be repeated"
    )
    parser.add_argument(
        "--refusal", action="append", default=[], metavar="TEXT", help="what refusal methods teach; may be repeated"
    )
    parser.add_argument("--out", required=True, metavar="DIR", help="new folder for the unlearned model")
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--lr", type=float, default=1e-4)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--lora", action="store_true", help="train a LoRA adapter instead of all weights")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--seed", type=int, default=0)
    parser.set_defaults(run=_unlearn)


def _unlearn(options: argparse.Namespace) -> int:
    from lethescope import load, read_facts
    from lethescope.facts import of_split
    from lethescope.subjects.methods import method_named, unlearn

    out, chosen = Path(options.out), dict(map(_method_option, options.option))
    method_named(options.method, chosen)  # a mistyped name need not wait for the model
    if out.is_file() or (out.exists() and any(out.iterdir())):
        raise InputError(f"{out} is not an empty folder; give a new --out folder")
    model = load(options.model, device=options.device, dtype=options.dtype)
    facts = read_facts(options.facts, tokenizer=model.tokenizer)
    module = unlearn(
        model.module,
        of_split(facts, "forget"),
        of_split(facts, "retain"),
        tokenizer=model.tokenizer,
        method=options.method,
        steps=options.steps,
        lr=options.lr,
        batch_size=options.batch_size,
        lora=options.lora,
        seed=options.seed,
        **({"refusals": options.refusal} if options.refusal else {}),
        **chosen,
    )
    module.save_pretrained(out)
    model.tokenizer.save_pretrained(out)
    print(f"unlearned by {options.method}: {out}")
    return 0


def _method_option(given: str) -> tuple[str, Any]:
    """Read NAME=VALUE; a value that is JSON (a number, true, a list) is taken as that, any other as text.

    Raises:
        InputError: there is no `=`.
    """
    name, equals, value = given.partition("=")
    if not equals:
        raise InputError(f"--option {given}: write it as NAME=VALUE")
    try:
        return name, json.loads(value)
    except ValueError:
        return name, value


def _add_zoo(parser: argparse.ArgumentParser) -> None:
    build = parser.add_subparsers(title="commands", required=True, metavar="COMMAND").add_parser(
        "build", help="train a zoo, or go on with one"
    )
    build.description = (
        "Make models that hold or do not hold their forget facts by construction, and one for every unlearning method. "
        "Run the same command again to go on after a stop."
    )
    build.add_argument("--size", default="quick", help="quick, standard or full")
    build.add_argument("--out", required=True, metavar="DIR", help="folder for the zoo")
    build.add_argument("--base", default="", metavar="REF", help="start from this model instead of small ones")
    build.add_argument("--facts", default="", metavar="FILE", help="with --base: these facts, not fictitious people")
    build.add_argument(
        "--pools", metavar="NAMES", help="make only these and what they need, say P,N,suppressor,deleter"
    )
    build.add_argument("--worlds", metavar="NAMES", help="make models of these worlds only, say llama-1")
    build.add_argument("--processes", type=int, default=2, help="models made side by side")
    build.set_defaults(run=_build_zoo)


def _build_zoo(options: argparse.Namespace) -> int:
    from lethescope.subjects import zoo

    given = {name: vars(options)[name] for name in ("size", "base", "facts", "processes")}
    few = {name: vars(options)[name].split(",") for name in ("pools", "worlds") if vars(options)[name]}
    made = zoo.build(options.out, **given, **few)
    pools = sorted({m.pool for m in made.members})
    print(f"zoo of {len(made.members)} models: {', '.join(f'{len(made.pool(p))} {p}' for p in pools)}; {made.folder}")
    return 0


def _add_validate(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Audit every model of a zoo and say how well each channel, each output metric and the verdict tell models that "
        "hold the facts from models that do not. Run the same command again to go on after a stop. "
        "Exit code 1: a model that holds the facts was called clean."
    )
    parser.add_argument("--zoo", required=True, metavar="DIR", help="a zoo that lethescope zoo build made")
    parser.add_argument("--out", required=True, metavar="DIR", help="folder for validation.json, tables and figures")
    parser.add_argument("--pools", metavar="NAMES", help="audit only these, say P,N,suppressor,deleter (known truth)")
    parser.add_argument("--page", metavar="FILE.md", help="also write the page (docs/validation.md)")
    parser.add_argument("--budget", default="quick", choices=("quick", "standard", "thorough"))
    parser.add_argument("--processes", type=int, default=2, help="audits run side by side")
    parser.set_defaults(run=_validate)


def _validate(options: argparse.Namespace) -> int:
    from lethescope.validate import POOLS, in_brief, validate

    given = {name: vars(options)[name] for name in ("zoo", "out", "budget", "processes", "page")}
    summary = validate(**given, pools=options.pools.split(",") if options.pools else POOLS)
    print(f"{in_brief(summary)}\n\nresults: {options.out}")
    return int(any(e["count"] for e in summary["errors"] if e["error"] == "false all-clear"))


def _add_tofu_score(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Print forget quality and model utility, as TOFU computes them, from its aggregated log or OpenUnlearning's "
        "TOFU_EVAL.json. Both are about outputs: they do not show that anything was forgotten."
    )
    parser.add_argument("log", metavar="LOG.json", help="the unlearned model's log")
    parser.add_argument("--reference", metavar="LOG.json", help="log of a model never taught the forget set")
    parser.add_argument(
        "--average",
        default="arithmetic",
        choices=("arithmetic", "geometric"),
        help="of the wrong answers' probabilities in the utility's truth ratios: arithmetic as in the paper, geometric "
        "as in TOFU's script for finished logs and in OpenUnlearning",
    )
    parser.set_defaults(run=_tofu_score)


def _tofu_score(options: argparse.Namespace) -> int:
    from lethescope.tofu_score import tofu_score

    print(json.dumps(tofu_score(options.log, options.reference, average=options.average), indent=2))
    return 0


def _add_heads_compare(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        'Print how alike two models\' retrieval heads are, from published score files ({"layer-head": [scores]}): '
        "correlations, overlap of the best 30, and counts. Heads that moved do not show that anything was forgotten."
    )
    parser.add_argument("a", metavar="A.json")
    parser.add_argument("b", metavar="B.json")
    parser.set_defaults(run=_heads_compare)


def _heads_compare(options: argparse.Namespace) -> int:
    from lethescope.analyses.heads import compare_files

    found = compare_files(options.a, options.b)
    print(json.dumps({name: None if value != value else value for name, value in found.items()}, indent=2))
    return 0


def _names(given: str, known: Sequence[str], option: str) -> list[str]:
    names = [name for name in given.split(",") if name]
    unknown = [name for name in names if name not in known]
    if unknown:
        raise InputError(f"{option}: unknown {unknown[0]!r}; use {', '.join(known)}")
    return names


if __name__ == "__main__":
    sys.exit(main())
