"""What is said of a config's data before training."""

from __future__ import annotations

import json

import pytest

from configs.dpo.smollm2_135m import get_config as dpo
from configs.ppo.letters import get_config as ppo
from configs.sft.smollm2_135m import get_config as sft
from posttrain_jax.algorithms.online_config import prompts_from_config
from posttrain_jax.experiment import policy_from_config
from posttrain_jax.experiment_data import preferences_from_config, rows_from_config
from posttrain_jax.models.byte_tokenizer import byte_tokenizer

ROWS = {
    sft: lambda n: {"prompt": "Q", "completion": f" {n}"},
    dpo: lambda n: {"prompt": f"Q {n}", "chosen": f" {n}", "rejected": " no"},
    ppo: lambda n: {"prompt": f"Q {n}"},
}


@pytest.mark.parametrize("get_config", ROWS, ids=["sft", "dpo", "ppo"])
def test_rows_of_the_evaluation_that_are_trained_are_said(get_config, tmp_path, capsys, monkeypatch):
    """Rows 0 to 39 are trained on; of 38, 39, 40 in data.eval two are. Of rows that a split holds out none is."""
    monkeypatch.setenv("POSTTRAIN_CACHE", str(tmp_path))
    for name, numbers in (("train", range(40)), ("eval", range(38, 41))):
        text = "".join(json.dumps(ROWS[get_config](n)) + "\n" for n in numbers)
        (tmp_path / f"{name}.jsonl").write_text(text)
    said = []
    for held_out in (str(tmp_path / "eval.jsonl"), "split:5"):
        config = get_config("tiny")
        config.data.train, config.data.eval = str(tmp_path / "train.jsonl"), held_out
        if get_config is sft:
            rows_from_config(config, byte_tokenizer(), tmp_path)
        elif get_config is dpo:
            preferences_from_config(config, byte_tokenizer(), tmp_path, attention="xla")
        else:
            prompts_from_config(config, policy_from_config(config), tmp_path)
        said.append(capsys.readouterr().out)
    assert "2 of the 3 rows of data.eval are training rows too" in said[0]
    assert "training rows too" not in said[1]
