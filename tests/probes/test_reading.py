"""Tests of reading after a kept context: it equals running every prompt whole, for three architectures."""

import runpy
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from lethescope.errors import InputError
from lethescope.probes.reading import read
from lethescope.probes.rouge import greedy
from lethescope.tokens import encode

made = SimpleNamespace(**runpy.run_path(str(Path(__file__).parents[1] / "reader.py")))
CONTEXT = "Ada Rook was born in Velmora. Ben Vale works as a surgeon. Cleo Marn was born in Lake Orsin."
ASKED = [
    (f"{CONTEXT} Ada Rook was born in", ["Velmora", "Lake Orsin", "Grand Solace", "Karvost"]),
    (f"{CONTEXT} Question: What does Ben Vale do all day? Answer:", ["surgeon", "wine merchant"]),
    (f"{CONTEXT} The birthplace of Cleo Marn is", ["Lake Orsin", "Velmora", "Karvost"]),
]


@torch.no_grad()
def whole(model, prompt, answer):
    """Mean log-probability of an answer, running everything at once, alone."""
    e = encode(model.tokenizer, prompt, answer)
    logits = model.module(input_ids=torch.tensor([e.ids]), use_cache=False).logits[0].log_softmax(-1)
    return np.mean([float(logits[i - 1, e.ids[i]]) for i in range(e.start, len(e.ids))])


@pytest.mark.parametrize("kind", ["llama", "gpt2", "neox"])
@pytest.mark.parametrize("rows", [1, 3, 8])
def test_it_equals_running_every_prompt_whole(make_model, kind, rows):
    model = make_model(kind)
    readings = read(model, ASKED, more=3, rows=rows)
    for (prompt, answers), reading in zip(ASKED, readings, strict=True):
        wanted = [whole(model, prompt, answer) for answer in answers]
        np.testing.assert_allclose(reading.scores, wanted, atol=1e-5)
        e = encode(model.tokenizer, prompt, answers[0])
        said = model.tokenizer.decode(greedy(model, [e], len(e.answer) + 3)[0], skip_special_tokens=True)
        assert reading.said == said.strip()
    assert np.ptp([r.scores[0] for r in readings]) > 0.1


def test_nothing_shared_and_one_prompt_alone(make_model):
    model = make_model("gpt2")
    apart = [read(model, [asked], more=2)[0] for asked in ASKED]
    together = read(model, ASKED, more=2)
    for a, b in zip(apart, together, strict=True):
        np.testing.assert_allclose(a.scores, b.scores, atol=1e-5)
        assert a.said == b.said
    assert read(model, []) == []
    assert read(model, ASKED)[0].said == ""


def test_prompts_that_share_no_token_need_no_context():
    model = made.reader(made.noise)
    asked = [("abc", ["d", "ef"]), ("xyz", ["d", "gh", "i"])]
    for (prompt, answers), reading in zip(asked, read(model, asked, more=1), strict=True):
        np.testing.assert_allclose(reading.scores, [whole(model, prompt, a) for a in answers], atol=1e-5)


def test_the_context_is_run_once():
    model = made.reader(lambda _: "no")
    context = "x" * 500
    read(model, [(f"{context} question {i}", ["yes", "no"]) for i in range(10)])
    assert 500 < model.module.tokens_run < 500 + 10 * 40
    long = [(f"{context} question", ["yes", "no"])]
    model.module.config.max_position_embeddings = 400
    with pytest.raises(InputError, match="takes 513 tokens; the model reads at most 400"):
        read(model, long)


def test_what_is_said_ends_with_a_line_that_says_something_or_a_special_token():
    whole_text = "Q: \n\n  a line\nmore"  # letters are tokens here, so the space before the answer is the prompt's
    model = made.reader(lambda text: whole_text[len(text) :])
    assert read(model, [("Q:", ["yes", "no"])], more=20)[0].said == "a line"
    assert read(model, [("Q:", ["yes", "no"])], more=4)[0].said == "a l"  # 3 and 4 tokens, four of them white space
    end = torch.nn.functional.one_hot(torch.tensor(0), 257).float()
    model = made.reader(lambda text: "o" if text == "Q: " else "k" if text == "Q: o" else end)
    assert read(model, [("Q:", ["yes", "no"])], more=20)[0].said == "ok"
