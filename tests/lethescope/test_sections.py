"""Tests of report sections: measured beside the channels, told in numbers, and without any say in the verdict."""

import json

import numpy as np
import pytest
import xarray as xr

from lethescope import audit, read_facts
from lethescope.cells import NotMeasured
from lethescope.errors import InputError
from lethescope.facts import of_split
from lethescope.models import load
from lethescope.sections import SECTIONS, in_numbers
from lethescope.subjects import shipped


@pytest.fixture(scope="module")
def few():
    facts = read_facts(shipped("facts"))
    return tuple(f for split in ("forget", "control") for f in of_split(facts, split)[:24])


@pytest.fixture(scope="module")
def shown(few, tmp_path_factory):
    out = tmp_path_factory.mktemp("sections")
    given = {"channels": ["say", "lens"], "budget": "quick", "progress": False, "out": out}
    sections = ["attribution", "horizon", "retrieval-heads"]
    models = shipped("original"), shipped("unlearned")
    return audit(*models, few, references=[shipped("reference")], sections=sections, **given), out


def test_sections_are_measured_on_the_models_given_and_not_on_planted_copies(shown):
    roles = {role for name, role in shown[0].measurements if name == "attribution"}
    assert roles == {"original", "unlearned", "reference-0"}
    assert shown[0].measurement("horizon").attrs["units"] == "nats"
    assert shown[0].measurement("attribution").attrs["probe"] == "attribution"


def test_what_they_say_stands_in_the_verdict_and_the_report(shown):
    result, out = shown
    told = json.loads((out / "verdict.json").read_text(encoding="utf-8"))["sections"]
    assert told == result.summary["sections"]
    assert set(told["attribution"]) == {"unlearned", "reference-0"}
    assert all(-1 <= numbers["spearman"] <= 1 for numbers in told["attribution"].values())
    assert told["horizon"]["unlearned"]["information before"] > 1  # the original needs the subject
    assert told["horizon"]["reference-0"]["information after"] < 1  # and the reference has nothing from it
    page = (out / "report.html").read_text(encoding="utf-8")
    assert "How the model works otherwise" in page and "What the words of a prompt contribute" in page
    assert {"attribution", "horizon"} <= set(result.figures())


def test_they_have_no_say_in_the_verdict(shown, few):
    models = shipped("original"), shipped("unlearned")
    given = {"channels": ["say", "lens"], "budget": "quick", "progress": False}
    plain = audit(*models, few, references=[shipped("reference")], **given)
    assert plain.summary["sections"] == {}
    same = {k: v for k, v in plain.summary.items() if k not in {"sections", "channels"}}
    assert same == {k: shown[0].summary[k] for k in same}


def test_a_section_that_does_not_suit_the_models_is_left_out(shown):
    assert "retrieval-heads" not in shown[0].summary["sections"]  # these models read 64 tokens
    model = load(shipped("original"))
    with pytest.raises(NotMeasured, match="the text ends after 358 of 512 tokens"):
        SECTIONS["retrieval-heads"].probe.measure(model, (), original=model, seed=0)


def test_a_model_beside_itself_is_the_same():
    facts = of_split(read_facts(shipped("facts")), "forget")[:4]
    model = load(shipped("original"))
    measured = SECTIONS["attribution"].probe.measure(model, facts, original=model, seed=0)
    told = SECTIONS["attribution"].compare(measured, measured)
    assert np.allclose([told[name] for name in ("spearman", "jaccard", "top1_agreement")], 1)
    assert 0.9 < told["keyword_mass"] <= 1


def test_a_model_with_other_heads_is_left_out():
    def scores(layers):
        return xr.Dataset({"score": (("instance", "layer", "head"), np.ones((3, layers, 2)))})

    measured = {("retrieval-heads", "original"): scores(2), ("retrieval-heads", "unlearned"): scores(2)}
    told = in_numbers({**measured, ("retrieval-heads", "reference-0"): scores(3)})
    assert list(told["retrieval-heads"]) == ["unlearned"]
    assert told["retrieval-heads"]["unlearned"]["share_ge_0.1 after"] == 1


def test_an_unknown_section_is_refused(few):
    with pytest.raises(InputError, match="unknown section 'horizons'; there are attribution, horizon"):
        audit(shipped("original"), shipped("unlearned"), few, sections=["horizons"], progress=False)
