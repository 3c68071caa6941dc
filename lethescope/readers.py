"""Readers: local copies of benchmarks as facts.

Each reader in `READERS` takes a path and gives facts; nothing is downloaded. A benchmark's question becomes a prompt
by a template (`as_prompt`).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from jinja2 import TemplateError

from lethescope.errors import InputError
from lethescope.eval_logs import read_open_unlearning_log as read_open_unlearning_log
from lethescope.facts import (
    Fact,
    Facts,
    Row,
    Split,
    make_fact,
    nearest,
    quote,
    read_rows,
    same_text,
)

TEMPLATES = ("auto", "chat", "qa", "plain")
Ask = Callable[..., str]


def as_prompt(question: str, *, template: str = "auto", tokenizer: Any = None, instruction: str = "") -> str:
    r"""A question as the prompt of its answer.

    `chat` is the tokenizer's chat template with the generation prompt. A beginning-of-sequence token at its front is
    left out when the tokenizer adds one itself, so that the encoded prompt has one and not two. `qa` is
    `Question: …\nAnswer:` as in TOFU, `plain` is the question alone, and `auto` is `chat` when the tokenizer has a
    chat template and `qa` otherwise. An instruction goes in front of the question, except in `plain`.

    Raises:
        InputError: the template is unknown, or it is `chat` and there is no chat template, or that template fails.

    Example:
        >>> as_prompt("Who wrote Emma?", template="qa")
        'Question: Who wrote Emma?\nAnswer:'
    """
    if template not in TEMPLATES:
        raise InputError(
            f"unknown template {quote(template)}; use {', '.join(TEMPLATES)}{nearest(template, TEMPLATES)}"
        )
    has_chat = bool(getattr(tokenizer, "chat_template", None))
    if template == "chat" and not has_chat:
        raise InputError("template chat: the tokenizer has no chat template; use qa or plain")
    if template == "plain":
        return question
    front = f"{instruction}\n" if instruction else ""
    if template == "chat" or (has_chat and template == "auto"):
        return _chat(front + question, tokenizer)
    return f"{front}Question: {question}\nAnswer:"


def read_own(path: Path, *, template: str = "auto", tokenizer: Any = None, forget: str | None = None) -> Facts:
    """A facts file of our own, one JSON object a line with the fields of `Fact`.

    Raises:
        InputError: a row cannot be used, or a chat or question template is asked for: its prompts are used as written.
    """
    if template not in {"auto", "plain"}:
        raise InputError(
            f"{path}: template {template} is for question files; the prompts of a facts file are used as written"
        )
    first: dict[str, str] = {}
    facts = []
    for row in read_rows(path):
        fact = make_fact(row, row.fields)
        if fact.id in first:
            raise InputError(f"{row.where}: id {quote(fact.id)} is already used at {first[fact.id]}; ids must differ")
        first[fact.id] = f"line {row.number}"
        facts.append(fact)
    return tuple(facts)


def read_tofu(path: Path, *, template: str = "auto", tokenizer: Any = None, forget: str | None = None) -> Facts:
    """TOFU (Maini et al. 2024, arXiv 2401.06121): a file or folder of `question`, `answer` and `perturbed_answer`.

    In a folder `forgetNN` is the forget split, `retain*`, `real_authors` and `world_facts` are the retain split, and
    `holdout*` (OpenUnlearning) is the control split; without it there is no control. Of a file and its `_perturbed`
    form the perturbed one is read. A row that two files share counts once, as forget if it is a forget row, so a retain
    file that overlaps the chosen forget set does no harm. TOFU's files list 20 rows an author in order, authors 0 to
    199, `forgetNN` being the last; the subject is `author NNN` by that count, which is wrong for shuffled
    or cut files (give the rows a `subject` then). Real authors and world facts have the question as subject. The
    alternatives are the perturbed answers. A single file takes its split from its name or from a `split` in its rows.

    Bad rows and an unclear choice of forget set are an `InputError`.
    """
    ask = _asker(path, template, tokenizer)
    if path.is_file():
        return _read([path], ask, _tofu_fields)
    files = _tofu_files(path)
    chosen = _choose(path, [base for base in files if base.startswith("forget")], forget, "forget set")
    others = [files[base] for base in sorted(files) if not base.startswith("forget")]
    first: dict[tuple[str, str], Fact] = {}
    for fact in _read([files[chosen], *others], ask, _tofu_fields):
        first.setdefault((fact.prompt, fact.answer), fact)
    return tuple(first.values())


def read_muse(path: Path, *, template: str = "auto", tokenizer: Any = None, forget: str | None = None) -> Facts:
    """MUSE (Shi et al. 2024, arXiv 2407.06460): `knowmem/forget_qa` and `knowmem/retain_qa` of one corpus.

    A folder that holds several corpora (`news`, `books`) needs `forget` to name one. The subject is the question.
    The verbatim and membership parts of MUSE have no question and answer and are not read.
    Bad rows and an unclear choice of corpus are an `InputError`.
    """
    ask = _asker(path, template, tokenizer)
    if path.is_file():
        return _read([path], ask, _qa_fields)
    roots = _folders_with(path, ("knowmem/forget_qa", "forget_qa"))
    root = roots[_choose(path, roots, forget, "corpus")]
    root = root / "knowmem" if (root / "knowmem").is_dir() else root
    return _read([file for file in _json_files(root) if file.stem in {"forget_qa", "retain_qa"}], ask, _qa_fields)


def read_wmdp(path: Path, *, template: str = "auto", tokenizer: Any = None, forget: str | None = None) -> Facts:
    """WMDP (Li et al. 2024, arXiv 2403.03218) and other multiple choice: `question`, `choices`, `answer` as an index.

    The right choice is the answer, the others are the alternatives. In a folder the file `wmdp-bio`, `wmdp-chem` or
    `wmdp-cyber` is the forget split (`forget` names one when there are several) and `mmlu*` is the retain split. The
    model is not shown the choices: what is measured is whether it finds the right one likely. The subject is the
    question. Bad rows and an unclear choice of forget set are an `InputError`.
    """
    ask = _asker(path, template, tokenizer)
    if path.is_file():
        return _read([path], ask, _choice_fields)
    sets = {match[1]: file for file in _json_files(path) if (match := re.fullmatch(r"wmdp[-_](\w+)", file.stem))}
    chosen = sets[_choose(path, sets, forget.removeprefix("wmdp-") if forget else None, "forget set")]
    return _read([chosen, *(f for f in _json_files(path) if f.stem.startswith("mmlu"))], ask, _choice_fields)


def read_rwku(path: Path, *, template: str = "auto", tokenizer: Any = None, forget: str | None = None) -> Facts:
    """RWKU (Jin et al. 2024, arXiv 2406.10890): the forget and neighbour probes of one target person.

    Reads `forget_level1` to `3` (forget) and `neighbor_level1` to `2` (retain) of a target's folder; in a folder of
    targets `forget` names one (`1_Stephen_King`). Level 1 is a sentence with a blank, level 2 a question, level 3 an
    attack prompt. The subject is the row's `subject`, else the person of the folder's name; one target is one subject,
    which is too few to cluster statistics by. Bad rows and an unclear choice of target are an `InputError`.
    """
    ask = _asker(path, template, tokenizer)
    if path.is_file():
        return _read([path], ask, _rwku_fields)
    top = path / "Target" if (path / "Target").is_dir() else path
    roots = _folders_with(top, ("forget_level1", "forget_level2", "forget_level3"))
    root = roots[_choose(path, roots, forget, "target")]
    files = [file for file in _json_files(root) if re.fullmatch(r"(forget|neighbor)_level\d", file.stem)]
    return _read(files, ask, _rwku_fields)


Reader = Callable[..., Facts]
READERS: dict[str, Reader] = {
    "lethescope": read_own,
    "tofu": read_tofu,
    "muse": read_muse,
    "wmdp": read_wmdp,
    "rwku": read_rwku,
}
_NEEDS = {
    "lethescope": "split, subject, prompt and answer",
    "tofu": "question and answer",
    "muse": "question and answer",
    "wmdp": "question, choices and answer",
    "rwku": "query and answer",
}
_SIGNS = {
    "rwku": ("forget_level[123].json*", "*/forget_level[123].json*", "*/*/forget_level[123].json*"),
    "muse": ("forget_qa.json*", "*/forget_qa.json*", "*/*/forget_qa.json*"),
    "wmdp": ("wmdp[-_]*.json*",),
    "tofu": ("forget*.json*",),
}


def find_format(path: Path, format: str = "auto") -> str:
    """The name in `READERS` that fits a file (by the fields of its first row) or a folder (by its file names).

    Raises:
        InputError: the format is unknown, there is nothing at the path, or what is there fits no format.
    """
    if format != "auto" and format not in READERS:
        raise InputError(
            f"unknown facts format {quote(format)}; use auto, {', '.join(READERS)}{nearest(format, READERS)}"
        )
    if not path.exists():
        raise InputError(f"{path}: no such file or folder")
    if format != "auto":
        return format
    return _folder_format(path) if path.is_dir() else _file_format(path)


def _chat(content: str, tokenizer: Any) -> str:
    message = [{"role": "user", "content": content}]
    try:
        text = tokenizer.apply_chat_template(message, add_generation_prompt=True, tokenize=False)
    except (TemplateError, ValueError) as error:
        raise InputError(
            f"template chat: the tokenizer's chat template fails: {' '.join(str(error).split())}"
        ) from error
    bos = tokenizer.bos_token
    return text.removeprefix(bos) if bos and _adds_bos(tokenizer) else text


def _adds_bos(tokenizer: Any) -> bool:
    ids = tokenizer("a")["input_ids"]
    return bool(ids) and ids[0] == tokenizer.bos_token_id


def _asker(path: Path, template: str, tokenizer: Any) -> Ask:
    """`as_prompt` with the template fixed and tried once, so that a bad template is told before any row is.

    Raises:
        InputError: the template cannot be used; names the path.
    """

    def ask(question: str, instruction: str = "") -> str:
        return as_prompt(question, template=template, tokenizer=tokenizer, instruction=instruction)

    try:
        ask("?")
    except InputError as error:
        raise InputError(f"{path}: {error}") from error
    return ask


def _json_files(folder: Path) -> list[Path]:
    return sorted(file for file in folder.iterdir() if file.suffix in {".json", ".jsonl"} and file.is_file())


def _folders_with(path: Path, stems: Iterable[str]) -> dict[str, Path]:
    """The path itself if it holds one of the files, else its subfolders that do, by name."""

    def holds(folder: Path) -> bool:
        return any((folder / f"{stem}{suffix}").is_file() for stem in stems for suffix in (".json", ".jsonl"))

    stems = tuple(stems)
    folders = [path] if holds(path) else sorted(folder for folder in path.iterdir() if folder.is_dir())
    return {folder.name: folder for folder in folders if holds(folder)}


def _choose(path: Path, choices: Iterable[str], wanted: str | None, what: str) -> str:
    choices = sorted(choices)
    shown = ", ".join(choices[:8]) + (f", … ({len(choices)} in all)" if len(choices) > 8 else "")
    if not choices:
        raise InputError(f"{path}: no {what} in this folder; docs/facts.md lists the file names that are read")
    if wanted is None and len(choices) > 1:
        raise InputError(f'{path}: more than one {what}: {shown}; choose one with forget="{choices[0]}"')
    if wanted is not None and wanted not in choices:
        raise InputError(f"{path}: no {what} {quote(wanted)}; there is {shown}{nearest(wanted, choices)}")
    return wanted or choices[0]


def _split_by_name(path: Path) -> Split | None:
    starts: dict[str, Split] = {"forget": "forget", "wmdp": "forget", "holdout": "control"}
    starts |= dict.fromkeys(("retain", "neighbor", "mmlu", "real_authors", "world_facts"), "retain")
    return next((split for start, split in starts.items() if path.stem.startswith(start)), None)


def _read(files: Iterable[Path], ask: Ask, fields_of: Callable[[Row, Path, int], dict[str, Any]]) -> Facts:
    rows = ((row, path, index) for path in files for index, row in enumerate(read_rows(path)))
    return tuple(_question_fact(row, path, index, ask, fields_of(row, path, index)) for row, path, index in rows)


def _question_fact(row: Row, path: Path, index: int, ask: Ask, fields: dict[str, Any]) -> Fact:
    """A fact from a row's question; the row's own `id`, `split`, `subject` and `relation` go before what we derive.

    Raises:
        InputError: neither the file's name nor the row says the split.
    """
    known = ("id", "split", "subject", "relation")
    own = {name: row.fields[name] for name in known if row.fields.get(name) is not None}
    split = _split_by_name(path)
    if split is None and "split" not in own:
        hint = 'call the file forget*, retain* or holdout*, or give each row a "split"'
        raise InputError(f"{row.where}: no split; {hint}")
    instruction = fields.pop("instruction", "")
    prompts = [ask(question, instruction) for question in (fields.pop("question"), *fields.pop("more_questions", ()))]
    derived = {"id": f"{_base(path)}-{index}", "split": split, "prompt": prompts[0], "paraphrases": prompts[1:]}
    return make_fact(row, derived | fields | own)


def _base(path: Path) -> str:
    return path.stem.removesuffix("_perturbed")


def _tofu_files(folder: Path) -> dict[str, Path]:
    """The TOFU files of a folder by their name without `_perturbed`; the perturbed form goes before the plain one."""
    pattern = r"(forget\d*|retain\d*|holdout\d*|real_authors|world_facts)(_perturbed)?"
    found = [(_base(file), file) for file in _json_files(folder) if re.fullmatch(pattern, file.stem)]
    return dict(sorted(found, key=lambda pair: pair[1].stem.endswith("_perturbed")))


def _tofu_fields(row: Row, path: Path, index: int) -> dict[str, Any]:
    fields = _qa_fields(row, path, index)
    question, answer = fields["question"], fields["answer"]
    more = [text for text in _texts(row, "paraphrased_question") if text != question]
    wrong = _wrong(answer, _texts(row, "perturbed_answer"))
    subject = _author(_base(path), index) or question
    return fields | {"subject": subject, "alternatives": wrong, "more_questions": more}


def _author(base: str, index: int) -> str | None:
    """The author of a row of a TOFU file, counted as in the full set of 200 authors with 20 rows each."""
    if re.fullmatch(r"retain\d*", base):
        return f"author {index // 20:03d}"
    if size := re.fullmatch(r"forget(01|05|10)", base):
        return f"author {200 - 2 * int(size[1]) + index // 20:03d}"
    return f"{base} author {index // 20:03d}" if re.fullmatch(r"(forget|holdout)\d*", base) else None


def _qa_fields(row: Row, path: Path, index: int) -> dict[str, Any]:
    question = _text(row, "question")
    return {"question": question, "answer": _text(row, "answer"), "subject": question}


def _choice_fields(row: Row, path: Path, index: int) -> dict[str, Any]:
    question, choices, right = _text(row, "question"), _texts(row, "choices"), row.fields.get("answer")
    if isinstance(right, bool) or not isinstance(right, int) or not 0 <= right < len(choices):
        raise InputError(f'{row.where}: field "answer" must be the number of a choice, 0 to {len(choices) - 1}')
    wrong = _wrong(choices[right], choices)
    return {"question": question, "answer": choices[right], "subject": question, "alternatives": wrong}


def _rwku_fields(row: Row, path: Path, index: int) -> dict[str, Any]:
    instructions = {
        "level1": "Please complete the blank in the following question.",
        "level2": "Please briefly answer the following question.",
    }
    person = re.sub(r"^\d+_", "", path.parent.name).replace("_", " ")
    instruction = instructions.get(path.stem.rpartition("_")[2], "")
    question, answer = _text(row, "query"), _text(row, "answer")
    return {"question": question, "answer": answer, "subject": person, "instruction": instruction}


def _text(row: Row, name: str) -> str:
    text = row.fields.get(name)
    if not isinstance(text, str) or not text.strip():
        problem = "is missing" if text is None else "must be a string that is not empty"
        raise InputError(f'{row.where}: field "{name}" {problem}')
    return text


def _texts(row: Row, name: str) -> list[str]:
    value = row.fields.get(name)
    texts = [] if value is None else [value] if isinstance(value, str) else value  # some copies have one bare string
    if not isinstance(texts, list) or not all(isinstance(text, str) and text.strip() for text in texts):
        raise InputError(f'{row.where}: field "{name}" must be a list of strings that are not empty')
    return texts


def _wrong(answer: str, choices: Iterable[str]) -> list[str]:
    """The choices that differ from the answer and from each other; benchmarks do repeat some."""
    first = {same_text(answer): answer}
    for text in choices:
        first.setdefault(same_text(text), text)
    return list(first.values())[1:]


def _folder_format(path: Path) -> str:
    for name, signs in _SIGNS.items():
        if any(any(path.glob(sign)) for sign in signs):
            return name
    raise InputError(f"{path}: no benchmark in this folder; the formats are {', '.join(READERS)} (docs/facts.md)")


def _file_format(path: Path) -> str:
    row = read_rows(path)[0]
    names = set(row.fields)
    for name, needed in (("wmdp", {"choices"}), ("rwku", {"query", "answer"}), ("tofu", {"question", "answer"})):
        if needed <= names:
            return name
    if names & set(Fact.model_fields):
        return "lethescope"
    formats = "; ".join(f"{name}: {fields}" for name, fields in _NEEDS.items())
    raise InputError(f"{row.where}: the fields {quote(', '.join(sorted(names)))} fit no format ({formats})")
