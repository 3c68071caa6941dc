"""Tests of TOFU's scores: against numbers worked out by hand, and against TOFU's own on its own logs."""

import copy
import json
import math
from pathlib import Path

import pytest

from lethescope.cli import main
from lethescope.errors import InputError
from lethescope.tofu_score import TOFU_SECTIONS, forget_quality, read_sections, tofu_score

LOGS = Path(__file__).parents[3] / "shared" / "data" / "tofu" / "eval_logs"


def losses(*probabilities):
    return [-math.log(p) for p in probabilities]


def tofu_section(true, paraphrased, wrong, rouge):
    """A section from probabilities, item by item."""
    by_item = {
        "avg_gt_loss": losses(*true),
        "avg_paraphrased_loss": losses(*paraphrased),
        "average_perturb_loss": [losses(*row) for row in wrong],
        "rougeL_recall": rouge,
    }
    return {key: {str(i): value for i, value in enumerate(values)} for key, values in by_item.items()}


def hand_log():
    """Arithmetic parts: retain .6, .5, .25; real authors .625, .8, .375; world facts .5, 1, .25."""
    return {
        "eval_log.json": tofu_section([0.8, 0.4], [0.4, 0.2], [[0.1, 0.3], [0.2, 0.4]], [1.0, 0.0]),
        "eval_real_author_wo_options.json": tofu_section([0.4, 0.2], [0.4, 0.2], [[0.1, 0.1], [0.1, 0.1]], [0.6, 1.0]),
        "eval_real_world_wo_options.json": tofu_section([0.4, 0.3], [0.4, 0.3], [[0.1, 0.3], [0.1, 0.2]], [1.0, 1.0]),
        "eval_log_forget.json": tofu_section([0.5] * 2, [0.5, 0.5], [[0.25, 0.25], [0.1, 0.1]], [0.1, 0.2]),
    }


def parts_by_hand():
    return {
        "retain": {"probability": 0.6, "rouge": 0.5, "truth_ratio": ((1 - 0.2 / 0.4) + 0) / 2},
        "real_authors": {
            "probability": (0.4 / 0.6 + 0.2 / 0.4) / 2,
            "rouge": 0.8,
            "truth_ratio": ((1 - 0.1 / 0.4) + (1 - 0.1 / 0.2)) / 2,
        },
        "world_facts": {
            "probability": (0.4 / 0.8 + 0.3 / 0.6) / 2,
            "rouge": 1.0,
            "truth_ratio": ((1 - 0.2 / 0.4) + (1 - 0.15 / 0.3)) / 2,
        },
    }


def write(path, log):
    path.write_text(json.dumps(log), encoding="utf-8")
    return path


def as_open_unlearning(log):
    """The same numbers, laid out as OpenUnlearning does."""
    out = {}
    for short, name in zip(("retain", "ra", "wf", "forget"), TOFU_SECTIONS.values(), strict=True):
        section = log[name]
        columns = {"Prob": "avg_gt_loss", "PARA_Prob": "avg_paraphrased_loss", "PERT_Prob": "average_perturb_loss"}
        for metric, key in columns.items():
            if metric != "PARA_Prob" or short in {"retain", "forget"}:
                items = {i: {"prob": 0.0, "avg_loss": value} for i, value in section[key].items()}
                out[f"{short}_Q_A_{metric}"] = {"agg_value": 0.0, "value_by_index": items}
        items = {i: {"rougeL_recall": value, "generation": "x"} for i, value in section["rougeL_recall"].items()}
        out[f"{short}_Q_A_ROUGE"] = {"agg_value": 0.0, "value_by_index": items}
    return out


def test_a_small_log_gives_the_numbers_worked_out_by_hand(tmp_path):
    score = tofu_score(write(tmp_path / "log.json", hand_log()))
    want = parts_by_hand()
    for name, part in want.items():
        assert score["parts"][name] == pytest.approx(part, abs=1e-12), name
    inverse = [1 / value for part in want.values() for value in part.values()]
    assert score["model_utility"] == pytest.approx(9 / sum(inverse), abs=1e-12)
    assert score["forget_quality"] is None and score["average"] == "arithmetic"


def test_the_geometric_average_changes_the_truth_ratio_and_nothing_else(tmp_path):
    path = write(tmp_path / "log.json", hand_log())
    arithmetic, geometric = (tofu_score(path, average=a)["parts"] for a in ("arithmetic", "geometric"))
    want = parts_by_hand()
    want["retain"]["truth_ratio"] = (
        max(0, 1 - math.sqrt(0.1 * 0.3) / 0.4) + max(0, 1 - math.sqrt(0.2 * 0.4) / 0.2)
    ) / 2
    want["world_facts"]["truth_ratio"] = ((1 - math.sqrt(0.03) / 0.4) + (1 - math.sqrt(0.02) / 0.3)) / 2
    for name in want:
        assert geometric[name] == pytest.approx(want[name], abs=1e-12)
        assert geometric[name]["truth_ratio"] >= arithmetic[name]["truth_ratio"]


def test_forget_quality_of_two_small_samples_by_hand(tmp_path):
    """Truth ratios (.5, .2) against (2, 4): no overlap, and 2 of the 6 equally likely orders are that extreme."""
    other = hand_log()
    other["eval_log_forget.json"] = tofu_section([0.1] * 2, [0.1, 0.1], [[0.2, 0.2], [0.4, 0.4]], [0, 0])
    paths = [write(tmp_path / f"{i}.json", log) for i, log in enumerate((hand_log(), other))]
    assert tofu_score(*paths)["forget_quality"] == pytest.approx(2 / 6, abs=1e-12)
    assert tofu_score(paths[0], paths[0])["forget_quality"] == pytest.approx(1.0)


def test_forget_quality_takes_the_geometric_average(tmp_path):
    """Wrong answers of .48 and .02 are as likely as .25 twice in the arithmetic mean only; apart 3 to 3 is 2 in 20."""
    log, other = hand_log(), hand_log()
    log["eval_log_forget.json"] = tofu_section([0.5] * 3, [0.5] * 3, [[0.25, 0.25]] * 3, [0] * 3)
    other["eval_log_forget.json"] = tofu_section([0.5] * 3, [0.5] * 3, [[0.48, 0.02]] * 3, [0] * 3)
    sections = [read_sections(write(tmp_path / f"{i}.json", x))["forget"] for i, x in enumerate((log, other))]
    assert forget_quality(*sections) == pytest.approx(2 / 20, abs=1e-12)


def test_open_unlearnings_layout_gives_the_same(tmp_path):
    ours, theirs = write(tmp_path / "a.json", hand_log()), write(tmp_path / "b.json", as_open_unlearning(hand_log()))
    assert tofu_score(theirs, theirs) == tofu_score(ours, ours)


def test_a_null_item_is_left_out(tmp_path):
    log = as_open_unlearning(hand_log())
    for name in log:
        if name.startswith("retain"):
            log[name]["value_by_index"]["1"] = None
    parts = tofu_score(write(tmp_path / "log.json", log))["parts"]["retain"]
    assert parts == pytest.approx({"probability": 0.8, "rouge": 1.0, "truth_ratio": 0.5})


def test_items_are_matched_by_their_number_not_by_their_place(tmp_path):
    log = hand_log()
    for section in log.values():
        section["average_perturb_loss"] = dict(reversed(section["average_perturb_loss"].items()))
    assert tofu_score(write(tmp_path / "a.json", log)) == tofu_score(write(tmp_path / "b.json", hand_log()))


def spoil(change):
    log = copy.deepcopy(hand_log())
    change(log)
    return log


BAD = {
    "section": (lambda log: log.pop("eval_log.json"), "section 'eval_log.json' is missing"),
    "forget": (lambda log: log.pop("eval_log_forget.json"), "section 'eval_log_forget.json' is missing"),
    "key": (
        lambda log: log["eval_real_world_wo_options.json"].pop("rougeL_recall"),
        "key 'rougeL_recall' of eval_real_world_wo_options.json is missing",
    ),
    "item": (
        lambda log: log["eval_log.json"]["avg_gt_loss"].pop("1"),
        "eval_log.json/avg_paraphrased_loss and eval_log.json/avg_gt_loss have different items; only one has item 1",
    ),
    "text": (
        lambda log: log["eval_log.json"]["avg_gt_loss"].update({"1": "low"}),
        "eval_log.json/avg_gt_loss, item 1 is 'low'; expected a finite number",
    ),
    "nan": (lambda log: log["eval_log.json"]["rougeL_recall"].update({"0": math.nan}), "item 0 is nan; expected"),
    "ragged": (lambda log: log["eval_log.json"]["average_perturb_loss"].update({"0": [1.0]}), "equally many numbers"),
    "empty": (lambda log: log["eval_log.json"].update(avg_gt_loss={}), "avg_gt_loss holds no items"),
    "other": (lambda log: (log.clear(), log.update(TOFU={})), "section 'retain_Q_A_Prob' is missing; there is TOFU"),
}


@pytest.mark.parametrize("case", BAD)
def test_what_is_missing_is_told_in_one_line_and_exit_code_2(tmp_path, capsys, case):
    change, words = BAD[case]
    path = write(tmp_path / "log.json", spoil(change))
    assert main(["tofu-score", str(path)]) == 2
    said, complaint = capsys.readouterr()
    assert said == "" and complaint.count("\n") == 1 and complaint.startswith(f"lethescope: {path}: ")
    assert words in complaint, complaint


def test_a_reference_needs_its_forget_section_only(tmp_path):
    log = write(tmp_path / "log.json", hand_log())
    only = write(tmp_path / "only.json", {name: hand_log()[name] for name in ("eval_log_forget.json",)})
    assert tofu_score(log, only)["forget_quality"] == pytest.approx(1.0)
    bare = as_open_unlearning(hand_log())
    del bare["forget_Q_A_PERT_Prob"]["value_by_index"]
    with pytest.raises(InputError, match=r"key 'value_by_index' of forget_Q_A_PERT_Prob is missing"):
        tofu_score(log, write(tmp_path / "bare.json", bare))
    with pytest.raises(InputError, match="no evaluation log"):
        tofu_score(log, write(tmp_path / "list.json", [1]))


def test_the_command_prints_json(tmp_path, capsys):
    path = write(tmp_path / "log.json", hand_log())
    assert main(["tofu-score", str(path), "--reference", str(path), "--average", "geometric"]) == 0
    assert json.loads(capsys.readouterr().out) == tofu_score(path, path, average="geometric")


# what TOFU's own two aggregations (commit bdc209e) gave on these logs: aggregate_eval_stat.py and utils.py
UTILITY = {
    ("phi_full", "geometric"): 0.522073713204,
    ("phi_full", "arithmetic"): 0.503353026806,
    ("phi_retain95", "geometric"): 0.524958712241,
    ("phi_retain95", "arithmetic"): 0.506978610238,
}


@pytest.mark.skipif(not LOGS.is_dir(), reason="no local copy of TOFU's logs in ../shared/data/tofu/eval_logs")
@pytest.mark.parametrize(("name", "average"), UTILITY)
def test_tofus_own_logs_give_tofus_own_numbers(name, average):
    score = tofu_score(LOGS / f"{name}.json", LOGS / "phi_retain95.json", average=average)
    assert score["model_utility"] == pytest.approx(UTILITY[name, average], abs=1e-9)
    quality = {"phi_full": 6.866558e-13, "phi_retain95": 1.0}[name]
    assert score["forget_quality"] == pytest.approx(quality, rel=1e-6)
