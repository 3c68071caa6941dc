"""Tests of reading other programs' evaluation logs."""

import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from lethescope.errors import InputError
from lethescope.eval_logs import read_open_unlearning_log

LOGS = Path(__file__).parents[3] / "shared" / "data" / "tofu" / "eval_logs"


def log_of(path: Path, log: object) -> pd.DataFrame:
    path.write_text(json.dumps(log), encoding="utf-8")
    return read_open_unlearning_log(path)


def rows(table: pd.DataFrame) -> list[tuple]:
    return [tuple(row) for row in table.astype({"item": object}).itertuples(index=False)]


def test_an_open_unlearning_log_becomes_tidy_rows(tmp_path):
    log = {
        "forget_truth_ratio": {"agg_value": 0.5, "value_by_index": {"0": {"score": 0.4}, "1": {"score": None}}},
        "forget_Q_A_PERT_Prob": {"agg_value": 0.2, "value_by_index": {"7": {"prob": [0.1, 0.3], "avg_loss": [2, 1]}}},
        "forget_Q_A_ROUGE": {"agg_value": 1, "value_by_index": {"0": {"rougeL_recall": 1.0, "generation": "Paris"}}},
        "mia_loss": {"forget": {"agg_value": None, "value_by_index": {"3": {"score": 4.0}}}, "auc": 0.9},
    }
    table = log_of(tmp_path / "TOFU_EVAL.json", log)
    assert list(table.columns) == ["metric", "item", "candidate", "quantity", "value"]
    assert rows(table) == [
        ("forget_truth_ratio", pd.NA, 0, "agg_value", 0.5),
        ("forget_truth_ratio", 0, 0, "score", 0.4),
        ("forget_Q_A_PERT_Prob", pd.NA, 0, "agg_value", 0.2),
        ("forget_Q_A_PERT_Prob", 7, 0, "prob", 0.1),
        ("forget_Q_A_PERT_Prob", 7, 1, "prob", 0.3),
        ("forget_Q_A_PERT_Prob", 7, 0, "avg_loss", 2.0),
        ("forget_Q_A_PERT_Prob", 7, 1, "avg_loss", 1.0),
        ("forget_Q_A_ROUGE", pd.NA, 0, "agg_value", 1.0),
        ("forget_Q_A_ROUGE", 0, 0, "rougeL_recall", 1.0),
        ("mia_loss/forget", 3, 0, "score", 4.0),
        ("mia_loss", pd.NA, 0, "auc", 0.9),
    ]


def test_a_summary_and_a_single_tofu_log_are_named_after_their_file(tmp_path):
    assert rows(log_of(tmp_path / "TOFU_SUMMARY.json", {"model_utility": 0.6})) == [
        ("TOFU_SUMMARY", pd.NA, 0, "model_utility", 0.6)
    ]
    assert rows(
        log_of(tmp_path / "eval_log.json", {"avg_gt_loss": {"0": 0.5}, "generated_text": {"0": ["a", "b"]}})
    ) == [("eval_log", 0, 0, "avg_gt_loss", 0.5)]


@pytest.mark.parametrize("log", [[], {}, {"a": "text"}, [1, 2], 3, {"m": {"value_by_index": {}}}])
def test_what_is_no_log_is_told(tmp_path, log):
    with pytest.raises(InputError, match=r"log\.json: no evaluation log; expected \{metric: "):
        log_of(tmp_path / "log.json", log)


def test_broken_and_missing_logs_are_told(tmp_path):
    path = tmp_path / "log.json"
    path.write_text('{\n"a": }', encoding="utf-8")
    with pytest.raises(InputError, match=r"log\.json, line 2: not valid JSON: Expecting value at column 6"):
        read_open_unlearning_log(path)
    with pytest.raises(InputError, match=r"none\.json: no such file"):
        read_open_unlearning_log(tmp_path / "none.json")


@pytest.mark.skipif(not LOGS.is_dir(), reason="no local copy of TOFU's logs in ../shared/data/tofu/eval_logs")
@pytest.mark.parametrize("name", ["phi_full", "phi_retain95"])
def test_real_tofu_logs_hold_truth_ratios_that_their_losses_give(name):
    table = read_open_unlearning_log(LOGS / f"{name}.json")
    mean = table.groupby(["metric", "quantity", "item"])["value"].mean().unstack("quantity")
    ratio = np.exp(mean["avg_paraphrased_loss"] - mean["average_perturb_loss"])
    assert len(ratio) > 700
    np.testing.assert_allclose(mean["truth_ratio"], ratio, rtol=1e-5)
