"""launch.generate: rows in, rows out, bad rows by file and line, and a killed run that goes on."""

from __future__ import annotations

import dataclasses
import datetime
import json
import shutil
import signal
import time

import numpy as np
import pytest
from entry_points import EntryPoint
from tiny_model import launch, save_tiny_model

from launch.generate import Options, generate, sampling_id
from posttrain_jax.core.errors import InputError
from posttrain_jax.models.io.byte_tokenizer import CHATML
from posttrain_jax.models.io.load import load_model
from posttrain_jax.models.io.tokenizer import stop_token_ids
from posttrain_jax.sampling import generate as engine
from posttrain_jax.sampling.choose import Sampling
from posttrain_jax.sampling.prompts import encode_chat, encode_text

ROWS = [
    {"id": "a", "prompt": "Once"},
    {"messages": [{"role": "system", "content": "S"}, {"role": "user", "content": "line\u2028break"}]},
    {"id": 7, "prompt_ids": [5, 6, 7]},
    {"prompt": "Twice upon a time"},
]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_tiny_model(tmp_path_factory.mktemp("tiny") / "model")


def write(path, rows):
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), "utf-8")
    return str(path)


def read(path):
    with open(path, encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def test_rows_come_out_in_input_order_as_the_contract_says(model, tmp_path):
    options = Options(
        model=str(model),
        prompts=write(tmp_path / "p.jsonl", ROWS),
        out=str(tmp_path / "new" / "g.jsonl"),
        max_new_tokens=6,
        temperature=1.0,
        num_samples=2,
        seed=3,
        batch_size=8,
    )
    generate(options)
    rows = read(options.out)
    assert [(row["id"], row["sample"]) for row in rows] == [
        ("a", 0), ("a", 1), (1, 0), (1, 1), (7, 0), (7, 1), (3, 0), (3, 1),
    ]  # fmt: skip
    loaded = load_model(str(model))
    prompts = [
        encode_text(loaded.tokenizer, "Once"),
        encode_chat(loaded.tokenizer, ROWS[1]["messages"]),
        np.asarray([5, 6, 7]),
        encode_text(loaded.tokenizer, "Twice upon a time"),
    ]
    samples = engine.generate(
        loaded.model,
        loaded.params,
        prompts,
        engine.GenerateOptions(
            6,
            sampling=Sampling(1.0),
            num_samples=2,
            seed=3,
            stop_token_ids=stop_token_ids(loaded.config, loaded.tokenizer),
        ),
        ids=[sampling_id("a"), 1, 7, 3],
    )
    for row, sample in zip(rows, samples, strict=True):
        assert list(row) == ["id", "sample", "text", "token_ids", "logprobs", "finish_reason"]
        assert row["token_ids"] == sample.tokens.tolist()
        assert row["finish_reason"] == sample.finish_reason
        np.testing.assert_allclose(row["logprobs"], sample.logprobs, atol=1e-4)
        assert row["text"] == loaded.tokenizer.decode(sample.tokens, skip_special_tokens=True)


def test_what_is_drawn_follows_a_prompts_id_not_its_place(model, tmp_path):
    rows = [{"id": f"row {i}", "prompt": "Once"} for i in range(3)]
    asked = Options(model=str(model), prompts="", out="", max_new_tokens=8, temperature=1.0, seed=3)
    found = []
    for name, these in (("all", rows), ("turned", rows[::-1]), ("one", rows[1:2])):
        prompts, out = write(tmp_path / f"{name}.jsonl", these), str(tmp_path / f"{name}-out.jsonl")
        generate(dataclasses.replace(asked, prompts=prompts, out=out))
        found.append({row["id"]: row["token_ids"] for row in read(out)})
    assert found[0] == found[1]
    assert found[2] == {"row 1": found[0]["row 1"]}
    assert found[0]["row 0"] != found[0]["row 1"], "one prompt under two ids is drawn twice"


def test_a_run_goes_on_where_it_was_cut_off(model, tmp_path, capsys):
    options = Options(
        model=str(model),
        prompts=write(tmp_path / "p.jsonl", [{"prompt": "x" * n} for n in range(1, 12)]),
        out=str(tmp_path / "g.jsonl"),
        max_new_tokens=5,
        ignore_eos=True,
        batch_size=4,
    )
    generate(options)
    whole = (tmp_path / "g.jsonl").read_bytes()
    lines = whole.splitlines(keepends=True)
    assert len(lines) == 11 and len(read(options.out)[0]["token_ids"]) == 5
    for cut in (
        b"".join(lines[:6]),
        b"".join(lines[:6]) + lines[6][:9],  # a torn last line
        b"".join(lines[:4]) + lines[4].rstrip(b"\n"),  # whole but for its newline
        lines[0][:3],
        b"",
    ):
        (tmp_path / "g.jsonl").write_bytes(cut)
        generate(options)
        assert (tmp_path / "g.jsonl").read_bytes() == whole
    capsys.readouterr()
    generate(options)
    assert (tmp_path / "g.jsonl").read_bytes() == whole
    assert "all 11 completions were in" in capsys.readouterr().err

    with pytest.raises(InputError, match=r"made with other options: temperature \(0.0 then, 0.5 now\)"):
        generate(dataclasses.replace(options, temperature=0.5))
    other = write(tmp_path / "q.jsonl", [{"prompt": "other"}])
    with pytest.raises(InputError, match="prompts_sha256"):
        generate(dataclasses.replace(options, prompts=other))
    (tmp_path / "g.jsonl.options.json").unlink()
    (tmp_path / "g.jsonl").write_bytes(b"".join(lines[1:]))
    generate(options)  # the first answer is missing: it alone is made, and the file put in order
    assert (tmp_path / "g.jsonl").read_bytes() == whole
    for wrong in (lines[0], b'{"id": 99, "sample": 0}\n'):
        (tmp_path / "g.jsonl").write_bytes(lines[0] + wrong)
        with pytest.raises(InputError, match=r"g\.jsonl:2 does not complete a prompt of --prompts"):
            generate(options)
    (tmp_path / "g.jsonl").write_bytes(b"nonsense\n" + whole)
    with pytest.raises(InputError, match=r"g\.jsonl:1 is not a row of completions"):
        generate(options)
    assert (tmp_path / "g.jsonl").read_bytes() == b"nonsense\n" + whole


@pytest.mark.parametrize(
    ("line", "words"),
    [
        (b'{"prompt": "a"', "broken"),
        (b'{"text": "a"}', "needs exactly one of prompt, messages, prompt_ids"),
        (b'{"prompt": "a", "prompt_ids": [1]}', "prompt and prompt_ids"),
        (b'{"prompt": 3}', "prompt is a number, not a list"),
        (b'{"prompt": ""}', "has no tokens"),
        (b'{"prompt_ids": []}', "prompt_ids is an empty list"),
        (b'{"prompt_ids": [1, 2.5]}', "prompt_ids holds 2.5"),
        (b'{"prompt_ids": [1, 99999]}', "token id 99999; the model knows 0 to 259"),
        (b'{"messages": "hi"}', "messages is text, not a list"),
        (b'{"messages": [{"role": "king", "content": "a"}]}', r"messages\[0\].role is 'king'"),
        (b'{"messages": [{"role": "user", "content": null}]}', r"messages\[0\].content is null"),
        (b'{"id": [1], "prompt": "a"}', "id must be text or a whole number"),
        (b'{"prompt": "\xff"}', "not UTF-8"),
        (b'{"prompt": "' + b"a" * 128 + b'"}', "128 tokens, which leaves no room"),
    ],
)
def test_a_bad_row_is_named_by_file_and_line(model, tmp_path, line, words):
    path = tmp_path / "p.jsonl"
    path.write_bytes(b'{"prompt": "good"}\n\n' + line + b"\n")
    options = Options(model=str(model), prompts=str(path), out=str(tmp_path / "g.jsonl"), max_new_tokens=2)
    with pytest.raises(InputError, match=rf"p\.jsonl:3.*{words}"):
        generate(options)
    assert not (tmp_path / "g.jsonl").exists()


def test_a_model_without_chat_template_takes_text_alone(tmp_path):
    model = save_tiny_model(tmp_path / "base", chat=False)
    prompts = write(tmp_path / "p.jsonl", ROWS[1:2])
    options = Options(model=str(model), prompts=prompts, out=str(tmp_path / "g.jsonl"), max_new_tokens=2)
    with pytest.raises(InputError, match=r"p\.jsonl:1: the model's tokenizer has no chat template"):
        generate(options)
    generate(dataclasses.replace(options, prompts=write(tmp_path / "q.jsonl", ROWS[:1])))
    assert read(options.out)[0]["id"] == "a"


def test_nothing_asked_for(model, tmp_path):
    options = Options(
        model=str(model),
        prompts=write(tmp_path / "p.jsonl", ROWS),
        out=str(tmp_path / "g.jsonl"),
        max_new_tokens=0,
    )
    generate(options)
    assert read(options.out)[1] == {
        "id": 1, "sample": 0, "text": "", "token_ids": [], "logprobs": [], "finish_reason": "length",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"prompts": "nowhere.jsonl"}, "nowhere.jsonl: there is no such file"),
        ({"model": "nowhere/at/all"}, "no such file or folder"),
        ({"temperature": -1.0}, "temperature is -1"),
        ({"min_new_tokens": 9}, "min_new_tokens is 9"),
        ({"dtype": "float16"}, "float16"),
    ],
)
def test_bad_options_are_refused(model, tmp_path, options, words):
    good = {"model": str(model), "prompts": write(tmp_path / "p.jsonl", ROWS), "max_new_tokens": 2}
    with pytest.raises(InputError, match=words):
        generate(Options(**{**good, **options}, out=str(tmp_path / "g.jsonl")))


def test_mistakes_on_the_command_line_end_with_code_2_and_one_line(tmp_path):
    prompts = write(tmp_path / "p.jsonl", ROWS)
    for arguments, words in (
        ((), "--model, --prompts and --out are needed"),
        (("--modle=x",), "modle"),
        (("--max_new_tokens=many",), "max_new_tokens"),
        (("--model=x", f"--prompts={tmp_path}/none.jsonl", "--out=y"), "there is no such file"),
        (("--model=x", f"--prompts={prompts}", "--out=y", "--top_k=3000000000"), "top_k is 3000000000"),
        (("--model=x", f"--prompts={prompts}", "--out=y", "--tensor=2"), "does not equal the 1 device(s)"),
    ):
        done = launch("generate", *arguments)
        assert done.returncode == 2, done.stderr
        assert words in done.stderr and "Traceback" not in done.stderr
        assert done.stdout == ""


@pytest.mark.slow
@pytest.mark.alone
def test_a_killed_run_ends_with_the_same_bytes_as_one_never_killed(model, tmp_path):
    prompts = write(tmp_path / "p.jsonl", [{"prompt": "y" * (1 + n % 12)} for n in range(150)])
    flags = [
        f"--model={model}",
        f"--prompts={prompts}",
        "--max_new_tokens=100",
        "--ignore_eos",
        "--temperature=0.9",
        "--batch_size=2",
    ]
    assert launch("generate", *flags, f"--out={tmp_path}/whole.jsonl").returncode == 0
    killed = tmp_path / "killed.jsonl"
    for kill_at in (3, 40):
        process = EntryPoint("launch.generate", *flags, f"--out={killed}")
        while process.code() is None and (not killed.exists() or killed.read_bytes().count(b"\n") < kill_at):
            time.sleep(0.005)
        process.send_signal(signal.SIGKILL)
        assert process.wait().code == -signal.SIGKILL
        assert 0 < killed.read_bytes().count(b"\n") < 150
    done = launch("generate", *flags, f"--out={killed}")
    assert done.returncode == 0 and "continuing" in done.stderr
    assert killed.read_bytes() == (tmp_path / "whole.jsonl").read_bytes()


def test_texts_as_turns_and_variables_of_the_template(model, tmp_path, capsys):
    """A text is said to be plain where the model has a template; with --text_as=chat it is the messages' prompt."""
    asked = Options(model=str(model), prompts="", out="", max_new_tokens=3)
    texts = write(tmp_path / "texts.jsonl", [{"prompt": "Hi", "answer": "a"}])
    chats = write(tmp_path / "chats.jsonl", [{"messages": [{"role": "user", "content": "Hi"}]}])
    found = {}
    for name, options in (
        ("plain", {"prompts": texts}),
        ("chat", {"prompts": texts, "text_as": "chat"}),
        ("messages", {"prompts": chats}),
    ):
        out = str(tmp_path / f"{name}.jsonl")
        generate(dataclasses.replace(asked, out=out, **options))
        said = capsys.readouterr().err
        assert ("1 of 1 rows are plain text" in said) == (name == "plain")
        assert ("columns not used: answer (1 row)" in said) == (name != "messages")
        start = "Hi" if name == "plain" else r"<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
        assert f"jsonl:1): {start}\n" in said
        found[name] = read(out)[0]["token_ids"]
    assert found["chat"] == found["messages"]
    with pytest.raises(InputError, match="no variable 'enable_thinking'; it has none"):
        generate(
            dataclasses.replace(
                asked, prompts=chats, out="x.jsonl", chat_template_kwargs='{"enable_thinking": false}'
            )
        )


def test_answers_are_gone_on_with_on_the_day_that_they_were_begun(model, tmp_path):
    """The chat template shows the second; a second start, at another one, has the prompts of the first."""
    dated = tmp_path / "dated"
    shutil.copytree(model, dated)
    (dated / "chat_template.jinja").write_text("{{ strftime_now('%H:%M:%S') }}" + CHATML)
    prompts = write(
        tmp_path / "p.jsonl", [{"messages": [{"role": "user", "content": str(n)}]} for n in range(3)]
    )
    options = Options(model=str(dated), prompts=prompts, out=str(tmp_path / "g.jsonl"), max_new_tokens=2)
    generate(options)
    whole = (tmp_path / "g.jsonl").read_bytes()
    description = json.loads((tmp_path / "g.jsonl.options.json").read_text())
    (tmp_path / "g.jsonl").write_bytes(b"".join(whole.splitlines(keepends=True)[:1]))
    began = datetime.datetime.fromisoformat(description["template_date"])
    while datetime.datetime.now().replace(microsecond=0) == began:
        time.sleep(0.05)
    generate(options)
    assert (tmp_path / "g.jsonl").read_bytes() == whole
