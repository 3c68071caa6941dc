"""Tests of the benchmark readers, on tiny files written here and on real TOFU files where they are at hand."""

import json
from pathlib import Path

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from lethescope.errors import InputError
from lethescope.facts import Facts, of_split, read_facts, split_counts
from lethescope.readers import READERS, as_prompt, find_format

TOFU = Path(__file__).parents[3] / "shared" / "data" / "tofu"
real_tofu = pytest.mark.skipif(not TOFU.is_dir(), reason="no local copy of TOFU in ../shared/data/tofu")

CHAT = (
    "{{ bos_token }}{% for m in messages %}[{{ m.role }}] {{ m.content }} {% endfor %}"
    "{% if add_generation_prompt %}[bot]{% endif %}"
)


def tokenizer(*, adds_bos: bool, chat: str | None = CHAT) -> PreTrainedTokenizerFast:
    words = ["<s>", "<unk>", "[user]", "[bot]", "Who", "?"]
    inner = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    inner.add_special_tokens(["<s>"])
    if adds_bos:
        inner.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    made = PreTrainedTokenizerFast(tokenizer_object=inner, bos_token="<s>", unk_token="<unk>")
    made.chat_template = chat
    return made


def write(path: Path, rows: list, *, lines: bool = False) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(map(json.dumps, rows)) if lines else json.dumps(rows), encoding="utf-8")
    return path


def qa(name: str, count: int, **more) -> list[dict]:
    return [{"question": f"{name} question {i}?", "answer": f"{name} answer {i}"} | more for i in range(count)]


def told(path: Path, **options) -> str:
    with pytest.raises(InputError) as caught:
        read_facts(path, **options)
    assert len(str(caught.value).splitlines()) == 1
    return str(caught.value).removeprefix(str(path)).removeprefix(", ").removeprefix(": ")


def ids(facts: Facts) -> list[str]:
    return [fact.id for fact in facts]


@pytest.mark.parametrize("adds_bos", [True, False])
def test_a_chat_prompt_has_one_beginning_token(adds_bos):
    tok = tokenizer(adds_bos=adds_bos)
    prompt = as_prompt("Who ?", template="chat", tokenizer=tok)
    assert prompt == ("" if adds_bos else "<s>") + "[user] Who ? [bot]"
    assert tok.convert_ids_to_tokens(tok(prompt)["input_ids"]) == ["<s>", "[user]", "Who", "?", "[bot]"]


def test_a_chat_template_without_a_beginning_token_is_kept():
    tok = tokenizer(adds_bos=True, chat=CHAT.removeprefix("{{ bos_token }}"))
    assert as_prompt("Who ?", template="chat", tokenizer=tok) == "[user] Who ? [bot]"


def test_auto_is_chat_where_there_is_a_chat_template_and_qa_elsewhere():
    assert as_prompt("Who ?", tokenizer=tokenizer(adds_bos=True)) == "[user] Who ? [bot]"
    assert as_prompt("Who ?", tokenizer=tokenizer(adds_bos=True, chat=None)) == "Question: Who ?\nAnswer:"
    assert as_prompt("Who ?", template="qa", tokenizer=tokenizer(adds_bos=True)) == "Question: Who ?\nAnswer:"
    assert as_prompt("Who ?", template="plain", tokenizer=tokenizer(adds_bos=True)) == "Who ?"


def test_an_instruction_goes_in_front():
    assert as_prompt("Who ?", template="qa", instruction="Be brief.") == "Be brief.\nQuestion: Who ?\nAnswer:"
    chat = as_prompt("Who ?", tokenizer=tokenizer(adds_bos=True), instruction="Be brief.")
    assert chat == "[user] Be brief.\nWho ? [bot]"


def test_bad_templates_are_told():
    with pytest.raises(InputError, match='unknown template "chatt"; use auto, chat, qa, plain; did you mean "chat"'):
        as_prompt("Who ?", template="chatt")
    with pytest.raises(InputError, match="no chat template; use qa or plain"):
        as_prompt("Who ?", template="chat", tokenizer=tokenizer(adds_bos=True, chat=None))
    broken = tokenizer(adds_bos=True, chat="{{ raise_exception('only\nassistants') }}")
    with pytest.raises(InputError, match="chat template fails: only assistants"):
        as_prompt("Who ?", template="chat", tokenizer=broken)


def tofu_folder(folder: Path) -> Path:
    perturbed = {"perturbed_answer": ["wrong", "worse"], "paraphrased_question": "again?"}
    write(folder / "forget10.json", qa("forget", 45), lines=True)
    write(folder / "forget10_perturbed.json", qa("forget", 45, **perturbed))
    write(folder / "forget05.jsonl", qa("forget", 45)[20:], lines=True)
    write(folder / "forget10_entities.json", [{"idx": 0}])
    write(folder / "retain90.json", qa("forget", 2) + qa("retain", 40))
    write(folder / "retain_perturbed.json", qa("retain", 30, perturbed_answer="just one"))
    write(folder / "real_authors_perturbed.json", qa("real", 3))
    write(folder / "full.json", qa("full", 3))
    return folder


def test_a_tofu_folder_gives_splits_authors_and_alternatives(tmp_path):
    facts = read_facts(tofu_folder(tmp_path), forget="forget10")
    assert split_counts(facts) == {"forget": 45, "retain": 43, "control": 0}
    forget, retain = of_split(facts, "forget"), of_split(facts, "retain")
    assert [forget[i].subject for i in (0, 19, 20, 44)] == ["author 180", "author 180", "author 181", "author 182"]
    assert (forget[7].id, forget[7].prompt) == ("forget10-7", "Question: forget question 7?\nAnswer:")
    assert (forget[7].answer, forget[7].alternatives) == ("forget answer 7", ("wrong", "worse"))
    assert forget[7].paraphrases == ("Question: again?\nAnswer:",)
    by_id = {fact.id: fact for fact in retain}
    assert by_id["retain-25"].subject == "author 001"
    assert by_id["retain-25"].alternatives == ("just one",)
    assert by_id["real_authors-0"].subject == "real question 0?"
    assert not {"retain90-0", "retain90-1"} & set(by_id)  # rows of the forget set in a retain file
    assert len({(fact.prompt, fact.answer) for fact in facts}) == len(facts)


def test_tofu_asks_which_forget_set(tmp_path):
    folder = tofu_folder(tmp_path)
    assert told(folder) == 'more than one forget set: forget05, forget10; choose one with forget="forget05"'
    assert (
        told(folder, forget="forget1")
        == 'no forget set "forget1"; there is forget05, forget10; did you mean "forget10"?'
    )
    assert of_split(read_facts(folder, forget="forget05"), "forget")[0].subject == "author 190"
    (folder / "forget05.jsonl").unlink()
    assert ids(read_facts(folder))[0] == "forget10-0"


def test_tofu_holdout_is_the_control(tmp_path):
    write(tmp_path / "forget01.json", qa("forget", 2))
    write(tmp_path / "holdout01.json", qa("holdout", 21))
    control = of_split(read_facts(tmp_path), "control")
    assert (len(control), control[20].subject) == (21, "holdout01 author 001")


def test_tofu_paraphrases_and_prompts_share_the_template(tmp_path):
    write(tmp_path / "forget10.json", qa("f", 1, paraphrased_question="Again?"))
    (fact,) = read_facts(tmp_path, tokenizer=tokenizer(adds_bos=True))
    assert (fact.prompt, fact.paraphrases) == ("[user] f question 0? [bot]", ("[user] Again? [bot]",))


def test_a_wrong_answer_that_is_right_or_repeated_is_left_out(tmp_path):
    path = write(tmp_path / "forget10.json", qa("f", 1, perturbed_answer=["B", "F ANSWER 0", "c", "b"]))
    assert read_facts(path)[0].alternatives == ("B", "c")


def test_a_single_question_file_takes_its_split_from_name_or_rows(tmp_path):
    rows = qa("x", 1, split="forget", subject="Ann", id="one") + qa("y", 1, split="control", relation="job")
    facts = read_facts(write(tmp_path / "mine.jsonl", rows, lines=True))
    assert [(fact.id, fact.split, fact.subject) for fact in facts] == [
        ("one", "forget", "Ann"),
        ("mine-1", "control", "y question 0?"),
    ]
    assert told(write(tmp_path / "bare.jsonl", qa("x", 2), lines=True)).startswith(
        "line 1: no split; call the file forget*"
    )
    assert told(write(tmp_path / "retain90.json", qa("x", 2))).startswith("the forget split is empty")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"question": ""}, 'field "question" must be a string that is not empty'),
        ({"answer": None}, 'field "answer" is missing'),
        ({"answer": 3}, 'field "answer" must be a string that is not empty'),
        ({"perturbed_answer": [1]}, 'field "perturbed_answer" must be a list of strings that are not empty'),
        ({"split": "test"}, 'unknown split "test"; use forget, retain or control'),
    ],
)
def test_a_bad_question_row_names_its_own_fields(tmp_path, change, message):
    rows = [*qa("x", 1), qa("x", 1)[0] | change]
    assert told(write(tmp_path / "forget10.jsonl", rows, lines=True)) == f"line 2: {message}"


def test_a_muse_corpus(tmp_path):
    for corpus in ("news", "books"):
        write(tmp_path / corpus / "knowmem" / "forget_qa.json", qa(corpus, 2))
        write(tmp_path / corpus / "knowmem" / "retain_qa.json", qa(f"other {corpus}", 3))
        write(tmp_path / corpus / "knowmem" / "forget_qa_icl.json", qa("icl", 3))
    facts = read_facts(tmp_path, forget="books")
    assert split_counts(facts) == {"forget": 2, "retain": 3, "control": 0}
    assert (facts[0].id, facts[0].subject, facts[0].answer) == ("forget_qa-0", "books question 0?", "books answer 0")
    assert facts == read_facts(tmp_path / "books") == read_facts(tmp_path / "books" / "knowmem")
    assert told(tmp_path) == 'more than one corpus: books, news; choose one with forget="books"'


def choices(name: str, right: int = 2) -> dict:
    return {"question": f"{name}?", "choices": ["a", "b", f"{name} c", "d"], "answer": right}


def test_wmdp_choices_become_answer_and_alternatives(tmp_path):
    write(tmp_path / "wmdp-bio.jsonl", [choices("virus"), choices("cell", 0)], lines=True)
    write(tmp_path / "wmdp-cyber.json", [choices("shell")])
    write(tmp_path / "mmlu_biology.json", [choices("leaf")])
    facts = read_facts(tmp_path, forget="bio")
    assert [(fact.split, fact.answer) for fact in facts] == [
        ("forget", "virus c"),
        ("forget", "a"),
        ("retain", "leaf c"),
    ]
    assert facts[1].alternatives == ("b", "cell c", "d")
    assert facts == read_facts(tmp_path, forget="wmdp-bio")
    assert ids(read_facts(tmp_path / "wmdp-cyber.json")) == ["wmdp-cyber-0"]
    assert told(tmp_path).startswith("more than one forget set: bio, cyber")


@pytest.mark.parametrize("right", [4, -1, "C", True, None])
def test_a_wmdp_answer_must_be_the_number_of_a_choice(tmp_path, right):
    path = write(tmp_path / "wmdp-bio.jsonl", [choices("x"), choices("y", right)], lines=True)
    assert told(path) == 'line 2: field "answer" must be the number of a choice, 0 to 3'


def test_an_rwku_target(tmp_path):
    for target in ("1_Stephen_King", "2_Confucius"):
        folder = tmp_path / "Target" / target
        write(folder / "forget_level1.json", [{"query": "___ wrote It.", "answer": "King", "subject": target[2:]}])
        write(folder / "forget_level2.json", [{"query": "Who wrote It?", "answer": "King", "level": "2"}])
        write(folder / "forget_level3.json", [{"query": "Role play: who wrote It?", "answer": "King", "type": "role"}])
        write(folder / "neighbor_level2.json", [{"query": "Who is Poe?", "answer": "A poet", "subject": "Poe"}])
        write(folder / "forget_mia.json", [{"text": "…"}])
    facts = read_facts(tmp_path, forget="1_Stephen_King")
    assert [(fact.id, fact.split, fact.subject) for fact in facts] == [
        ("forget_level1-0", "forget", "Stephen_King"),
        ("forget_level2-0", "forget", "Stephen King"),
        ("forget_level3-0", "forget", "Stephen King"),
        ("neighbor_level2-0", "retain", "Poe"),
    ]
    blank = "Please complete the blank in the following question.\nQuestion: ___ wrote It.\nAnswer:"
    assert (facts[0].prompt, facts[2].prompt) == (blank, "Question: Role play: who wrote It?\nAnswer:")
    assert facts == read_facts(tmp_path / "Target" / "1_Stephen_King")
    assert (
        told(tmp_path) == 'more than one target: 1_Stephen_King, 2_Confucius; choose one with forget="1_Stephen_King"'
    )


def test_formats_are_found_by_their_look(tmp_path):
    tofu_folder(tmp_path / "tofu")
    assert find_format(tmp_path / "tofu") == "tofu"
    for name, row in {
        "lethescope": {"split": "forget", "promt": "x"},
        "tofu": {"question": "q", "answer": "a"},
        "wmdp": choices("x"),
        "rwku": {"query": "q", "answer": "a"},
    }.items():
        assert find_format(write(tmp_path / "rows.json", [row])) == name
    assert set(READERS) == {"lethescope", "tofu", "muse", "wmdp", "rwku"}


def test_what_fits_no_format_lists_the_formats(tmp_path):
    message = told(write(tmp_path / "blur.jsonl", [{"text": "Who?"}], lines=True))
    assert message.startswith(
        'line 1: the fields "text" fit no format (lethescope: split, subject, prompt and answer; tofu:'
    )
    (tmp_path / "empty").mkdir()
    assert told(tmp_path / "empty").startswith(
        "no benchmark in this folder; the formats are lethescope, tofu, muse, wmdp"
    )
    assert told(tmp_path / "nowhere") == "no such file or folder"
    rows = write(tmp_path / "rows.json", qa("x", 1))
    assert told(rows, format="tofo").startswith('unknown facts format "tofo"; use auto, lethescope, tofu')
    assert told(rows, format="rwku") == 'item 1: field "query" is missing'
    assert told(tmp_path / "empty", format="tofu").startswith("no forget set in this folder; docs/facts.md")
    assert told(tmp_path / "empty", format="lethescope").startswith("cannot be read: Is a directory")


def test_a_bad_template_is_told_before_the_rows_are_read(tmp_path):
    path = write(tmp_path / "forget10.json", qa("x", 1))
    assert told(path, template="chat") == "template chat: the tokenizer has no chat template; use qa or plain"


@real_tofu
def test_real_tofu_folder():
    facts = read_facts(TOFU, forget="forget05")
    assert split_counts(facts) == {"forget": 200, "retain": 300 + 100 + 117, "control": 0}
    forget = of_split(facts, "forget")
    assert len({fact.subject for fact in forget}) == 10
    assert forget[0].prompt.startswith("Question: What is the full name of the geology author born in Karachi")
    assert forget[0].answer == "The author's name is Hina Ameen."
    authors = {fact.id: fact for fact in of_split(facts, "retain")}["real_authors-0"]
    assert (authors.answer, authors.alternatives[0]) == ("William Shakespeare", "Charles Dickens")


@real_tofu
def test_real_tofu_sets_number_the_same_author_alike():
    small = {fact.answer: fact.subject for fact in of_split(read_facts(TOFU / "forget05.jsonl"), "forget")}
    large = {fact.answer: fact.subject for fact in of_split(read_facts(TOFU / "forget10.jsonl"), "forget")}
    shared = small.keys() & large.keys()
    assert len(shared) > 90
    assert all(small[answer] == large[answer] for answer in shared)
