"""What is said of a config's data before training."""

from __future__ import annotations

import datetime
import json

import pytest
from tasks import experiment_of, spec_of

from configs.dpo.smollm2_135m import get_config as dpo
from configs.ppo.letters import get_config as ppo
from configs.sft.smollm2_135m import get_config as sft
from posttrain_jax.core.errors import InputError
from posttrain_jax.data.options import as_source
from posttrain_jax.data.packing import pack
from posttrain_jax.data.preference_rows import PreferenceRows, row_shape
from posttrain_jax.data.sources import source_files, weighted_sources
from posttrain_jax.data.tokenized import build
from posttrain_jax.data.tokenized_preferences import build_preferences
from posttrain_jax.models.io.byte_tokenizer import byte_tokenizer
from posttrain_jax.wiring.data import read_texts
from posttrain_jax.wiring.offline import preferences_of, warn_longer_than_context
from posttrain_jax.wiring.rollouts import prompts_from_config

ROWS = {
    sft: lambda n: {"prompt": "Q", "completion": f" {n}"},
    dpo: lambda n: {"prompt": f"Q {n}", "chosen": f" {n}", "rejected": " no"},
    ppo: lambda n: {"prompt": f"Q {n}"},
}


def read_rows_of(get_config, config, workdir):
    if get_config is sft:
        read_texts(experiment_of(config).data, byte_tokenizer(), workdir, seed=0)
    elif get_config is dpo:
        preferences_of(experiment_of(config), spec_of(config), workdir)
    else:
        prompts_from_config(experiment_of(config), spec_of(config), workdir)


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
        read_rows_of(get_config, config, tmp_path)
        said.append(capsys.readouterr().out)
    assert "2 of the 3 rows of data.eval are training rows too" in said[0]
    assert "training rows too" not in said[1]


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ('[["", 1]]', "a data source is empty"),
        ('[["a.jsonl", 1e999]]', "data.train holds inf; it must be a finite number"),
        ('[["a.jsonl", null]]', r"must be a text or a list of \[text, number\]"),
        ("[[null, 1]]", r"\[\[None, 1\]\]; it must be"),
        ('["a.jsonl"]', r"\['a.jsonl'\]; it must be"),
        ("[" * 5000, "is no JSON; give a"),
        ("[]", "is empty"),
        ("[7, 8]", r"\[7, 8\]; it must be"),
        (f'[["a", {"9" * 5000}]]', "is no JSON"),
    ],
)
def test_mixtures_that_are_none_are_refused_in_one_line(value, message):
    with pytest.raises(InputError, match=message) as error:
        [source_files(source) for source, _ in weighted_sources(as_source(value, "data.train"))]
    assert len(str(error.value)) < 700


def test_sequences_beyond_the_context_of_the_model_are_said(capsys, tmp_path):
    """Of the sequences of 3, 5 and 9 tokens (with EOS) two are longer than 4, the longest has 9."""
    texts = tmp_path / "rows.jsonl"
    texts.write_text("".join(json.dumps({"text": "x" * n}) + "\n" for n in (2, 4, 8)))
    rows = pack(build(str(texts), byte_tokenizer(), cache_dir=tmp_path), 16)
    warn_longer_than_context(rows, 9)
    assert not capsys.readouterr().out
    warn_longer_than_context(rows, 4)
    assert "2 of 3 sequences are longer (up to 9 tokens) than the 4 tokens" in capsys.readouterr().out
    pairs = tmp_path / "pairs.jsonl"
    pairs.write_text(json.dumps({"prompt": "abcd", "chosen": "e", "rejected": "efg"}))
    data = build_preferences(str(pairs), byte_tokenizer(), cache_dir=tmp_path)
    warn_longer_than_context([PreferenceRows(data.sources[0], row_shape([data], groups=1))], 6)
    assert "1 of 2 sequences are longer (up to 8 tokens)" in capsys.readouterr().out


@pytest.mark.parametrize("get_config", ROWS, ids=["sft", "dpo", "ppo"])
def test_the_first_row_is_shown_and_plain_text_is_said(get_config, tmp_path, capsys, monkeypatch):
    """The byte tokenizer has ChatML; with data.text_as=chat the same rows become turns of it, without a warning."""
    monkeypatch.setenv("POSTTRAIN_CACHE", str(tmp_path))
    text = "".join(json.dumps(ROWS[get_config](n)) + "\n" for n in range(9))
    (tmp_path / "train.jsonl").write_text(text)
    shown = {
        sft: ("Q[[ 0<|im_end|>]]", r"user\nQ<|im_end|>\n<|im_start|>assistant\n[[ 0<|im_end|>]]"),
        dpo: ("Q 0[[ 0<|im_end|>]]", r"user\nQ 0<|im_end|>\n<|im_start|>assistant\n[[ 0<|im_end|>]]"),
        ppo: ("train.jsonl:1): Q 0\n", "user\\nQ 0<|im_end|>\\n<|im_start|>assistant\\n\n"),
    }[get_config]
    for text_as, words in zip(("plain", "chat"), shown, strict=True):
        config = get_config("tiny")
        config.data.train, config.data.eval = str(tmp_path / "train.jsonl"), ""
        config.data.text_as = text_as
        read_rows_of(get_config, config, tmp_path)
        said = capsys.readouterr().out
        assert words in said
        assert ("9 of 9 rows are plain text" in said) == (text_as == "plain")
        assert not (tmp_path / "template_date.txt").exists()


def test_a_run_keeps_the_date_that_its_template_shows(tmp_path, monkeypatch, capsys):
    """Begun on one day and resumed on another with an empty cache: the same tokens."""
    row = {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]}
    (tmp_path / "train.jsonl").write_text(json.dumps(row) + "\n")
    policy = byte_tokenizer()
    policy.chat_template = "{{ strftime_now('%d %b %Y %H:%M:%S') }}" + policy.chat_template
    config = sft("tiny")
    config.data.train, config.data.eval = str(tmp_path / "train.jsonl"), ""
    workdir = tmp_path / "run"
    workdir.mkdir()
    (workdir / "template_date.txt").write_text(
        "2024-07-26T13:05:09\n"
    )  # as a first start on that day leaves it
    tokens = []
    for start in ("first", "resumed", "fresh"):
        monkeypatch.setenv("POSTTRAIN_CACHE", str(tmp_path / start))
        if start == "fresh":
            (workdir / "template_date.txt").unlink()
        (part,) = read_texts(experiment_of(config).data, policy, workdir, seed=0).train
        tokens.append(part.source.sequence(0).tokens.tolist())
    assert tokens[0] == tokens[1] != tokens[2]
    assert "26 Jul 2024 13:05:09<|im_start|>user" in capsys.readouterr().out
    kept = datetime.datetime.fromisoformat((workdir / "template_date.txt").read_text().strip())
    assert policy.decode(tokens[2]).startswith(kept.strftime("%d %b %Y %H:%M:%S"))
    (workdir / "template_date.txt").write_text("yesterday\n")
    with pytest.raises(InputError, match=r"template_date\.txt holds no date .*write one such as"):
        read_texts(experiment_of(config).data, policy, workdir, seed=0)


def test_variables_of_the_template_come_from_the_config(tmp_path, monkeypatch):
    monkeypatch.setenv("POSTTRAIN_CACHE", str(tmp_path))
    policy = byte_tokenizer()
    policy.chat_template = "{{ greeting | default('') }}" + policy.chat_template
    config = sft("tiny")
    config.data.eval = ""
    tokens = []
    for text in ("", '{"greeting": "Hello. "}'):
        config.data.chat_template_kwargs = text
        (part,) = read_texts(experiment_of(config).data, policy, tmp_path, seed=0).train
        tokens.append(policy.decode(part.source.sequence(0).tokens))
    assert tokens[1] == "Hello. " + tokens[0]
    config.data.chat_template_kwargs = '{"greetings": "x"}'
    with pytest.raises(InputError, match="no variable 'greetings'; it has greeting"):
        read_texts(experiment_of(config).data, policy, tmp_path, seed=0)
