import doctest
import re
import runpy
import shlex
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest

from lethescope import report, wording
from lethescope.audit import CHANNELS
from lethescope.facts import Fact
from lethescope.figures import of_audit

made = SimpleNamespace(**runpy.run_path(str(Path(__file__).parents[1] / "figures" / "made.py")))
WORDS = ["known", "suppressed", "partly_erased", "no_residue_found", "damaged", "inconclusive"]
EVIL = '<script>alert("x")</script><img src=https://evil.example/x onerror=alert(1)>'


class Page(HTMLParser):
    """What a reader's browser makes of a page: its elements with their attributes, and its text."""

    def __init__(self, page):
        super().__init__()
        self.elements, self.text, self._inside = [], "", []
        self.feed(page)

    def handle_starttag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))
        self.text += " "
        if tag not in {"meta", "img", "br", "link", "input"}:
            self._inside.append(tag)

    def handle_endtag(self, tag):
        assert self._inside.pop() == tag  # every element is closed where it was opened

    def handle_data(self, data):
        if "style" not in self._inside:
            self.text += data

    def all(self, *tags):
        return [attributes for tag, attributes in self.elements if tag in tags]


def rendered(word="suppressed", facts=(), evidence=None, **changes):
    verdict = made.verdict(word) | changes
    lens = made.lens([0, 1, 3, 5, 6])
    figures = of_audit(verdict, {("lens", "original"): lens, ("lens", "unlearned"): lens})
    return report.render(verdict, evidence, figures, facts)


def squeezed(text):
    return " ".join(text.split())


@pytest.fixture(scope="module")
def page():
    facts = made.facts(6)
    return Page(rendered(facts=facts, evidence=made.evidence(facts, made.verdict())))


@pytest.mark.parametrize("module", [report, wording])
def test_examples(module):
    assert doctest.testmod(module).failed == 0


@pytest.mark.parametrize("word", WORDS)
def test_every_verdict_is_told_with_its_grounds(word):
    told, verdict = wording.VERDICTS[word], made.verdict(word)
    for text in (Page(rendered(word)).text, report.as_text(verdict), Page(report.as_html_card(verdict)).text):
        found = squeezed(text)
        assert told.sentence in found
        assert told.caution in found
        assert verdict["reason"] in found
        assert "160 control facts that no model was taught" in found
        assert all(way in found for way in verdict["not_tried"])
        assert "budget standard" in found
        assert "deleted" not in found.lower()


def test_there_are_six_verdicts_and_the_command_line_knows_the_same():
    assert list(wording.VERDICTS) == WORDS


def test_every_channel_has_its_words():
    assert set(CHANNELS) <= set(wording.CHANNEL_NOTES)


def test_the_page_is_one_file_that_asks_for_nothing(page):
    assert not page.all("script", "link", "iframe", "object", "form", "base")
    assert all(image["src"].startswith("data:image/svg+xml;base64,") for image in page.all("img"))
    for _, attributes in page.elements:
        assert not any(name.startswith("on") for name in attributes)
        assert not any(name in attributes and name != "src" for name in ("href", "srcset", "data", "action"))
    policy = next(meta["content"] for meta in page.all("meta") if "http-equiv" in meta)
    assert "default-src 'none'" in policy
    whole = rendered()
    assert not re.search(r"https?:|url\(|@import", whole)


def test_headings_follow_each_other_and_everything_has_a_name(page):
    levels = [int(tag[1]) for tag, _ in page.elements if re.fullmatch(r"h[1-6]", tag)]
    assert levels[0] == 1
    assert levels.count(1) == 1
    assert all(after <= before + 1 for before, after in pairwise(levels))
    assert page.all("html")[0]["lang"] == "en"
    assert all(len(image["alt"]) > 20 for image in page.all("img"))
    assert all(cell["scope"] in {"col", "row"} for cell in page.all("th"))
    names = {attributes["id"] for _, attributes in page.elements if "id" in attributes}
    assert all(a["aria-labelledby"] in names for _, a in page.elements if "aria-labelledby" in a)
    assert all("aria-label" in a or "aria-labelledby" in a for _, a in page.elements if a.get("role") == "region")


def luminance(colour):
    parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.03928 else ((c + 0.055) / 1.055) ** 2.4 for c in parts]
    return np.dot([0.2126, 0.7152, 0.0722], linear)


def contrast(one, two):
    light, dark = sorted((luminance(one), luminance(two)), reverse=True)
    return (light + 0.05) / (dark + 0.05)


def test_colours_can_be_read():
    assert all(contrast(told.colour, "#ffffff") >= 4.5 for told in wording.VERDICTS.values())
    for block in re.findall(r":root \{([^}]*)\}", rendered()):
        colours = dict(re.findall(r"--(\w+): (#\w{6})", block))
        if "ink" in colours:
            pairs = [(text, back) for text in ("ink", "faint") for back in ("paper", "panel")]
            assert all(contrast(colours[text], colours[back]) >= 4.5 for text, back in pairs)


def test_what_others_wrote_is_shown_and_never_run():
    fact = Fact(id=EVIL, split="forget", subject=EVIL, prompt=EVIL, answer=EVIL, alternatives=("b",))
    channel = made.channel(EVIL, 0.3, p=0.01, seconds=1, note=EVIL, places=[EVIL], null={EVIL: 0.1})
    changes = {
        "reason": EVIL, "decided_by": EVIL, "not_tried": [EVIL], "channels": [channel], "budget": EVIL,
        "models": {"original": {"path": EVIL, "fingerprint": EVIL}},
    }  # fmt: skip
    verdict = made.verdict() | changes
    whole = rendered(facts=(fact,), evidence=made.evidence((fact,), verdict), **changes)
    for found in (Page(whole), Page(report.as_html_card(verdict))):
        assert not found.all("script")
        assert all(image["src"].startswith("data:") for image in found.all("img"))
        assert EVIL in found.text
    assert Page(whole).text.count(EVIL) >= 10


def rows_of(whole, split):
    table = whole.split(f'aria-label="{split} facts"')[1].split("</table>")[0]
    return [re.sub(r"<[^>]+>", "|", row) for row in table.split("<tr>")[2:]]


def test_facts_are_told_one_by_one_with_the_largest_residue_of_the_unlearned_model_first():
    facts = made.facts(2)[:2]
    rows = [
        (fact.id, fact.subject, "forget", "lens", role, value, 0.0, residue)
        for fact, after in zip(facts, (0.2, 0.7), strict=True)
        for role, value, residue in (("original", 0.9, 1.0), ("unlearned", after, after / 0.9))
    ]
    columns = ["fact", "subject", "split", "channel", "role", "value", "null", "residue"]
    first, second = rows_of(rendered(facts=facts, evidence=pd.DataFrame(rows, columns=columns)), "forget")
    assert "0.90 → 0.70" in first
    assert facts[1].prompt in first
    assert facts[1].answer in first
    assert "0.90 → 0.20" in second
    shades = re.findall(r"--residue:([\d.]+)", rendered(facts=facts, evidence=pd.DataFrame(rows, columns=columns)))
    assert shades == ["0.78", "0.22"]


def test_hundreds_of_facts_unknown_values_and_splits_without_a_residue():
    facts = made.facts(400)
    evidence = made.evidence(facts, made.verdict())
    evidence.loc[evidence["channel"] == "lens", ["value", "residue"]] = np.nan
    evidence.loc[evidence["split"] == "control", "residue"] = np.nan
    whole = rendered(facts=facts, evidence=evidence)
    assert len(rows_of(whole, "forget")) == len(rows_of(whole, "control")) == 400
    assert "– → –" in whole
    assert "nan" not in Page(whole).text.lower()
    assert not Page(whole).all("details")[0].get("open")


def test_evidence_without_facts_and_a_report_without_evidence():
    facts = made.facts(3)
    assert len(rows_of(rendered(evidence=made.evidence(facts, made.verdict())), "forget")) == 3
    assert "no evidence fact by fact" in rendered()


@pytest.mark.parametrize("verdict", [
    {"verdict": "inconclusive"},
    {"verdict": "a word of tomorrow", "decided_by": None, "residue": None, "damage": None, "models": {}, "facts": {}},
    {"verdict": "suppressed", "channels": [{"name": "new channel"}], "residue": {"estimate": float("nan")}},
])  # fmt: skip
def test_a_verdict_with_little_in_it_is_told(verdict):
    whole = report.render(verdict)
    assert verdict["verdict"].replace("_", " ") in Page(whole).text.lower()
    assert "nan" not in Page(whole).text.lower()
    assert report.as_text(verdict)
    assert Page(report.as_html_card(verdict)).text


@pytest.mark.parametrize("word", WORDS)
def test_the_terminal_form_fits_and_is_aligned(word):
    verdict = made.verdict(word)
    long = made.channel("a channel with a very long name" * 3, -12.345, p=0.5, seconds=123456.7, n_facts=123456,
                        null={"a null with a long name": -0.1}, planted=(0.123, -0.456))  # fmt: skip
    verdict["channels"].append(long)
    lines = report.as_text(verdict).splitlines()
    assert max(map(len, lines)) <= 100
    assert report.as_text(verdict).isascii()
    head = next(line for line in lines if line.startswith("channel "))
    for channel in verdict["channels"]:
        line = next(x for x in lines[lines.index(head) :] if x.startswith(channel["name"][:6]))
        assert len(line) == len(head)
        assert line[head.index("residue") - 1] == " "
        assert line[head.index("residue")] != " "
    assert sum(" * " in line for line in lines) == 1


def test_numbers_are_told_as_they_are():
    text = report.as_text(made.verdict())
    line = next(line for line in text.splitlines() if line.startswith("patch"))
    assert squeezed(line) == "patch * 0.84 [0.78, 0.90] 0.02 control 0.93, 0.88 < 0.001 160 31.7"
    found = squeezed(Page(rendered()).text)
    assert (
        "0.84 [0.78, 0.90] [0.75, 0.93] for all channels at once at block 2, block 3 Unlearning Depth Score 0.16"
        in found
    )
    assert "0.93 (≥ 0.88)" in found
    assert "say (blind here), readout (not testable)" in found


def test_a_channel_that_finds_something_is_not_called_blind():
    text = report.as_text(made.verdict("known"))
    assert "Blind:        readout (not testable), compress (blind here)" in text


def test_damage_is_told_apart():
    assert "Damaged: retain facts at 0.99 before and 0.12 after, a share of 0.12 [0.10, 0.14]." in rendered("damaged")
    assert "Not damaged: retain facts" in rendered("suppressed")
    assert "Damage was not measured" in rendered(damage={"retain_before": None, "retain_after": None})


@pytest.mark.parametrize(("models", "facts", "said"), [
    ({"reference-0": {}, "reference-1": {}}, {"control": 1}, "2 reference models that never"),
    ({}, {"control": 1}, "1 control fact that no model was taught, the wrong"),
    ({}, {"control": 0}, "the wrong alternatives of each fact"),
])  # fmt: skip
def test_the_nulls_are_the_ones_there_were(models, facts, said):
    assert report.held_against({"models": models, "facts": facts}).startswith(said)


def test_the_command_repeats_the_audit_with_any_path():
    models = {
        "original": {"path": "my models/the 'original'; rm -rf $HOME"},
        "unlearned": {"path": "live module"},
        "reference-0": {"path": "a"},
        "reference-1": {"path": "b"},
    }
    words = shlex.split(report.command(made.verdict() | {"models": models}).replace("\\\n", " "))
    assert words[:2] == ["lethescope", "audit"]
    options = list(zip(words[2::2], words[3::2], strict=True))
    assert options[:4] == [
        ("--original", "my models/the 'original'; rm -rf $HOME"),
        ("--unlearned", "UNLEARNED"),
        ("--reference", "a"),
        ("--reference", "b"),
    ]
    assert ("--channels", "say,readout,lens,patch,relearn,compress") in options
    assert {("--budget", "standard"), ("--seed", "0"), ("--facts", "FACTS.jsonl"), ("--out", "DIR")} <= set(options)


def test_an_approximate_model_is_marked():
    models = {"original": {"path": "m.gguf", "fingerprint": "0" * 16, "approximate": True}}
    assert "approximate: dequantised" in rendered(models=models)
    assert "approximate: dequantised" not in rendered()
