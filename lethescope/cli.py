"""The command line: a thin shell over the Python functions."""

import argparse
import signal
import sys
from collections.abc import Sequence
from pathlib import Path

from lethescope.errors import InputError

VERDICTS = ("known", "suppressed", "partly_erased", "no_residue_found", "damaged", "inconclusive")


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command and return its exit code: 0 done, 1 a verdict named in --fail-on, 2 bad input, 130 stopped."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    options = _parser().parse_args(argv)
    try:
        return options.run(options)
    except InputError as error:
        print(f"lethescope: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("lethescope: stopped; the same command goes on from here", file=sys.stderr)
        return 130


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="lethescope", description="Did the model forget, or did it only stop saying it?"
    )
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")
    _add_audit(commands.add_parser("audit", help="compare a model before and after unlearning"))
    _add_unlearn(commands.add_parser("unlearn", help="make an unlearned model, to audit"))
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
    parser.add_argument("--method", default="npo", help="npo, graddiff")
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
    from lethescope.subjects.methods import unlearn

    out = Path(options.out)
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
    )
    module.save_pretrained(out)
    model.tokenizer.save_pretrained(out)
    print(f"unlearned by {options.method}: {out}")
    return 0


def _names(given: str, known: Sequence[str], option: str) -> list[str]:
    names = [name for name in given.split(",") if name]
    unknown = [name for name in names if name not in known]
    if unknown:
        raise InputError(f"{option}: unknown {unknown[0]!r}; use {', '.join(known)}")
    return names


if __name__ == "__main__":
    sys.exit(main())
