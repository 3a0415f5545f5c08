"""launch.win_rate: pairs of answers judged by our own server over HTTP, and by a model of ours."""

from __future__ import annotations

import base64
import dataclasses
import http.server
import json
import os
import re
import signal
import socket
import threading
import time
from typing import ClassVar

import jax
import jax.numpy as jnp
import pytest
from entry_points import EntryPoint
from generated import answers, options, read, two_files, write
from server import serving
from tiny_model import CONFIG, launch, save_tiny_model

from launch import generate
from launch.win_rate import KEY_VARIABLE, compare, read_pairs
from posttrain_jax.core.errors import InputError
from posttrain_jax.models.io.byte_tokenizer import byte_tokenizer
from posttrain_jax.models.io.export import export_hf
from posttrain_jax.models.reward_head import score_head_params
from posttrain_jax.models.transformer import make_model
from posttrain_jax.rewards.judge import Cache, judge_pairs
from posttrain_jax.rewards.judge_endpoint import Endpoint, EndpointJudge
from posttrain_jax.rewards.judge_model import second_preferred

KEY = "judges-only"
PLACES = 2048  # a question has about 700 bytes


def save_judge(folder):
    """A model that answers every chat with "A".

    Its layers do nothing and its head is its embedding, so the next token is the one whose embedding has the largest
    product with the last token's. A chat's prompt ends with a newline: e(newline) = x, e(A) = 2x + 3y, e(end) = 9y, all
    others 0. After x: newline 1, A 2, end 0, so A. After 2x + 3y: newline 2, A 13, end 27, so the end of the turn.
    """
    config = dataclasses.replace(CONFIG, max_length=PLACES)
    tokenizer = byte_tokenizer()
    newline, letter = (tokenizer(text)["input_ids"][0] for text in ("\n", "A"))
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    embedding = jnp.zeros((config.vocab_size, config.d_model))
    embedding = embedding.at[newline, 0].set(1.0)
    embedding = embedding.at[letter, :2].set(jnp.array([2.0, 3.0]))
    embedding = embedding.at[end, 1].set(9.0)
    model = make_model(config)
    params = model.abstract_params()
    params = {name: _zeros(leaf) for name, leaf in params.items()}
    params["embed"]["embedding"] = embedding
    params["final_norm"]["scale"] = jnp.ones(config.d_model)
    export_hf(folder, config=config, params=params, tokenizer=tokenizer)
    return folder


def _zeros(tree):
    return jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), tree)


@pytest.fixture(scope="module")
def judge_folder(tmp_path_factory):
    return save_judge(tmp_path_factory.mktemp("judge") / "model")


@pytest.fixture(scope="module")
def flags(judge_folder):
    return (f"--model={judge_folder}", "--served_model_name=judge", "--slots=2")


@pytest.fixture(scope="module")
def judge_url(flags):
    with serving(*flags, POSTTRAIN_JAX_API_KEY=KEY) as (_, url):
        yield url


@pytest.fixture
def files(tmp_path):
    return two_files(tmp_path)


def test_a_judge_over_http_from_the_command_line(judge_url, files, tmp_path, monkeypatch):
    """The judge always says A, the answer shown first: 12 verdicts, all flip, and no model is preferred."""
    monkeypatch.setenv(KEY_VARIABLE, KEY)
    a, b = files
    out = tmp_path / "new" / "out"
    command = [f"--a={a}", f"--b={b}", f"--judge={judge_url}", "--judge_model=judge", f"--out={out}"]
    done = launch("win_rate", *command, "--resamples=100", "--price_prompt=1000", "--price_completion=1e6")
    assert done.returncode == 0, done.stderr
    record = json.loads((out / "result.json").read_text())
    found = record["b_over_a"]
    assert (found["win_rate"]["value"], found["pairs"], found["unparsed"]) == (0.5, 6, 0)
    assert (found["first_preferred"]["value"], found["flipped"]["value"]) == (1.0, 1.0)
    assert found["length_controlled"]["win_rate"]["value"] == pytest.approx(0.5)
    assert (found["mean_length_a"], found["mean_length_b"]) == (4.0, 4.5)
    usage = record["usage"]
    assert (usage["calls"], usage["cache_hits"]) == (12, 0)
    # "A" and the end of the turn, 12 times.
    assert usage["completion_tokens"] == 24 and usage["prompt_tokens"] > 12 * 600
    assert usage["cost"] == pytest.approx(usage["prompt_tokens"] / 1000 + 24)
    rows = read(out / "judgments.jsonl")
    assert [row["prompt"] for row in rows] == list(range(6))
    assert {(row["said_a_first"], row["a_first"], row["b_first"], row["preference"]) for row in rows} == {
        ("A", 0.0, 1.0, 0.5)
    }
    assert "verdicts that flip" in done.stdout and "12 questions asked, 0 answered before" in done.stdout
    assert len(read(out / "judge_cache.jsonl")) == 12
    # Again, without the key that the server asks for: everything is there already.
    monkeypatch.delenv(KEY_VARIABLE)
    again = launch("win_rate", *command, "--resamples=100")
    assert again.returncode == 0, again.stderr
    assert "0 questions asked, 12 answered before" in again.stdout
    assert json.loads((out / "result.json").read_text())["b_over_a"] == found


@pytest.mark.slow
@pytest.mark.alone
def test_a_random_model_says_nothing_that_can_be_read(tmp_path, files):
    folder = save_tiny_model(tmp_path / "random", max_length=PLACES)
    with serving(f"--model={folder}", "--served_model_name=random", "--slots=2") as (_, url):
        record = compare(options(tmp_path, url, a=files[0], b=files[1], judge_model="random", max_tokens=4))
    found = record["b_over_a"]
    assert (found["unparsed"], found["ties"], found["win_rate"]["value"]) == (12, 6, 0.5)
    assert (found["first_preferred"]["value"], found["flipped"]["value"]) == (0.5, 0.0)


@pytest.mark.slow
@pytest.mark.alone
def test_a_killed_run_goes_on_where_it_was(judge_url, tmp_path, monkeypatch):
    monkeypatch.setenv(KEY_VARIABLE, KEY)
    a = answers(tmp_path, "a.jsonl", [f"a{n}" for n in range(60)])
    b = answers(tmp_path, "b.jsonl", [f"b{n}" for n in range(60)])
    out = tmp_path / "out"
    command = [
        f"--a={a}",
        f"--b={b}",
        f"--judge={judge_url}",
        "--judge_model=judge",
        f"--out={out}",
        "--parallel=1",
    ]
    process = EntryPoint("launch.win_rate", *command)
    try:
        cache = out / "judge_cache.jsonl"
        end = time.monotonic() + 120
        while not (cache.exists() and cache.read_bytes().count(b"\n") >= 3):
            assert process.code() is None and time.monotonic() < end, process.wait(5)
            time.sleep(0.01)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    kept = cache.read_bytes().count(b"\n")
    assert 3 <= kept < 120 and not (out / "result.json").exists()
    done = launch("win_rate", *command, "--parallel=4", "--resamples=100")
    assert done.returncode == 0, done.stderr
    usage = json.loads((out / "result.json").read_text())["usage"]
    assert (usage["calls"], usage["cache_hits"]) == (120 - kept, kept)
    assert len({row["key"] for row in read(cache)}) == 120


def free_port():
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return listener.getsockname()[1]


@pytest.mark.slow
@pytest.mark.alone
def test_what_was_judged_before_the_server_went_away_is_kept(flags, files, tmp_path):
    port = free_port()
    asked = options(tmp_path, f"http://127.0.0.1:{port}/v1", a=files[0], b=files[1], judge_model="judge")
    pairs = read_pairs(asked)
    judge = EndpointJudge(Endpoint(asked.judge, "judge", retries=0, parallel=3))
    path = tmp_path / "out" / "judge_cache.jsonl"
    with serving(*flags, f"--port={port}"):
        judge_pairs(judge, pairs[:2], Cache(path))
    with pytest.raises(InputError, match=f"127.0.0.1:{port}/v1 cannot be reached"):
        compare(dataclasses.replace(asked, retries=0))
    assert len(Cache(path)) == 4
    assert not (tmp_path / "out" / "result.json").exists()
    with serving(*flags, f"--port={port}"):
        record = compare(asked)
    assert (record["usage"]["calls"], record["usage"]["cache_hits"]) == (8, 4)


@pytest.mark.slow
@pytest.mark.alone
def test_a_server_that_is_full_is_asked_again(flags, tmp_path):
    """One slot, and room for one question to wait: of six at a time, four are told to come back in a second."""
    a, b = (answers(tmp_path, f"{name}.jsonl", [name] * 3) for name in ("a", "b"))
    with serving(*flags, "--slots=1", "--max_waiting=1") as (_, url):
        asked = options(tmp_path, url, a=a, b=b, judge_model="judge", parallel=6)
        with pytest.raises(InputError, match="answers 429 to "):
            compare(dataclasses.replace(asked, retries=0))
        kept = len(Cache(tmp_path / "out" / "judge_cache.jsonl"))
        assert kept < 6
        usage = compare(dataclasses.replace(asked, retries=10))["usage"]
    assert (usage["calls"], usage["cache_hits"]) == (6 - kept, kept)


def test_an_endpoint_that_cannot_be_reached_exits_with_2(files, tmp_path):
    a, b = files
    place = f"127.0.0.1:{free_port()}/v1"
    url = f"http://anna:hunter22@{place}?api_key=swordfish"
    done = launch(
        "win_rate",
        f"--a={a}",
        f"--b={b}",
        f"--judge={url}",
        "--judge_model=j",
        f"--out={tmp_path}",
        "--retries=1",
    )
    assert (done.returncode, done.stdout) == (2, "")
    shown = f"http://***@{place}?api_key=***"
    assert done.stderr.startswith(f"error: The judge 'j' at {shown} cannot be reached (")
    assert done.stderr.count("\n") == 1 and not re.search("hunter22|swordfish", done.stderr)


class TellTale(http.server.BaseHTTPRequestHandler):
    """A judge that says A, or with a wrong key says which: it keeps the paths and the keys that it was sent."""

    asked: ClassVar[list[tuple[str, str]]] = []

    def do_POST(self):
        self.rfile.read(int(self.headers["Content-Length"]))
        self.asked.append((self.path, self.headers["Authorization"]))
        right = "swordfish" in self.path
        message = {"role": "assistant", "content": "A"}
        choice = {"index": 0, "finish_reason": "stop", "message": message}
        body = {"id": "1", "object": "chat.completion", "created": 1, "model": "j", "choices": [choice]}
        if not right:
            body = {
                "error": {"message": f"no such key: {self.path} {self.headers['Authorization']} hunter22"}
            }
        self.send_response(200 if right else 401)
        self.send_header("Content-Type", "application/json")
        self.end_headers()
        self.wfile.write(json.dumps(body).encode())

    def log_message(self, *_):
        pass


def test_what_a_judges_url_keeps_secret_is_sent_and_said_nowhere(files, tmp_path, monkeypatch, capfd):
    monkeypatch.setenv(KEY_VARIABLE, "bearer-of-it")
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), TellTale) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        host = f"127.0.0.1:{server.server_port}/v1"
        url = f"http://anna:hunter22@{host}?api_key=swordfish&api-version=7"
        asked = options(tmp_path, url, a=files[0], b=files[1], judge_model="j")
        record = compare(asked)
        with pytest.raises(InputError, match="refuses the API key") as raised:
            compare(dataclasses.replace(asked, judge=url.replace("swordfish", "sword-fish-2"), retries=0))
        server.shutdown()
    assert record["judge"] == f"http://***@{host}?api_key=***&api-version=***"
    path, key = TellTale.asked[0]
    assert path == "/v1/chat/completions?api_key=swordfish&api-version=7"
    assert base64.b64decode(key.removeprefix("Basic ")) == b"anna:hunter22"
    texts = [file.read_text() for file in (tmp_path / "out").iterdir()]
    said = "\n".join([*texts, str(raised.value), *capfd.readouterr()])
    assert not re.search("hunter22|swordfish|sword-fish-2|bearer-of-it", said)
    for odd in ("http://anna:hunter22/7@h/v1", "http://:x@/v1", "http://h:port/v1"):
        with pytest.raises(InputError, match="names no host and port") as raised:
            Endpoint(odd, "j")
        assert "hunter" not in str(raised.value)


@pytest.mark.parametrize(
    ("change", "key", "words"),
    [
        ({}, "wrong", "refuses the API key"),
        ({"judge_model": "other"}, KEY, r"is not there \(.*no model 'other'"),
        ({"max_tokens": 4000}, KEY, r"answers 400 to .*a\.jsonl:\d: .*maximum context length"),
    ],
)
def test_what_the_server_refuses_is_one_sentence(judge_url, files, tmp_path, monkeypatch, change, key, words):
    monkeypatch.setenv(KEY_VARIABLE, key)
    values = {"judge_model": "judge", "retries": 0, **change}
    with pytest.raises(InputError, match=words) as raised:
        compare(options(tmp_path, judge_url, a=files[0], b=files[1], **values))
    assert "\n" not in str(raised.value)


def test_a_base_url_without_v1_is_refused(judge_url, files, tmp_path, monkeypatch):
    monkeypatch.setenv(KEY_VARIABLE, KEY)
    url = judge_url.removesuffix("/v1")
    with pytest.raises(InputError, match=r"is not there .* usually ends in /v1"):
        compare(options(tmp_path, url, a=files[0], b=files[1], judge_model="judge", retries=0))


def test_a_model_of_ours_as_the_judge_of_what_launch_generate_wrote(judge_folder, tmp_path, capsys):
    """Prompts come from the options beside the answers. After x the logits are A 2, B 0, times RMSNorm's factor
    f = (1 / 32 + 1e-5)^-0.5: P(B) / (P(A) + P(B)) = sigmoid(-2 f) for the answer shown second, whichever that is."""
    prompts = write(
        tmp_path / "prompts.jsonl",
        [
            {"id": "x", "prompt": "Why?"},
            {"messages": [{"role": "user", "content": "How?"}]},
            {"prompt": "Well? <think>"},
        ],
    )
    for name, seed in (("a", 1), ("b", 2)):
        model = save_tiny_model(tmp_path / f"model-{name}")
        generate.generate(
            generate.Options(
                model=str(model),
                prompts=str(prompts),
                out=str(tmp_path / f"{name}.jsonl"),
                max_new_tokens=5,
                temperature=1.0,
                num_samples=2,
                seed=seed,
            )
        )
    asked = options(tmp_path, str(judge_folder), a=tmp_path / "a.jsonl", b=tmp_path / "b.jsonl")
    pairs = read_pairs(asked)
    assert [(pair.prompt, pair.sample, pair.request) for pair in pairs] == [
        ("x", 0, "Why?"),
        ("x", 1, "Why?"),
        (1, 0, "How?"),
        (1, 1, "How?"),
        (2, 0, "Well? <think>"),
        (2, 1, "Well? <think>"),
    ]
    rows = read(tmp_path / "a.jsonl")
    assert [row.get("in_thought") for row in rows] == [None, None, None, None, True, True]
    assert [pair.a for pair in pairs] == [*(row["text"] for row in rows[:4]), "", ""]
    record = compare(asked)
    second = second_preferred(2 * (1 / 32 + 1e-5) ** -0.5, 0.0)
    for row in read(tmp_path / "out" / "judgments.jsonl"):
        assert row["a_first"] == pytest.approx(second, rel=1e-3)
        assert row["b_first"] == pytest.approx(1 - second, rel=1e-3)
    assert record["b_over_a"]["win_rate"]["value"] == pytest.approx(0.5)
    assert (record["b_over_a"]["prompts"], record["b_over_a"]["pairs"]) == (3, 6)
    assert "3 prompts, 6 pairs in both orders" in capsys.readouterr().out
    # The same files with other prompts, with the prompts given, and with the options gone.
    text = prompts.read_text()
    prompts.write_text(text.replace("Why?", "Who?"))
    with pytest.raises(InputError, match=r"prompts\.jsonl was changed since .*a\.jsonl answered it"):
        read_pairs(asked)
    prompts.write_text(text)
    (tmp_path / "a.jsonl.options.json").unlink()
    with pytest.raises(InputError, match=r"a\.jsonl\.options\.json beside it does not name"):
        read_pairs(asked)
    assert read_pairs(dataclasses.replace(asked, prompts=str(prompts))) == pairs
    os.rename(prompts, tmp_path / "gone.jsonl")
    with pytest.raises(InputError, match="which are not there; give --prompts"):
        read_pairs(dataclasses.replace(asked, a=asked.b))


def test_a_reward_model_as_the_judge(tmp_path, capsys):
    """The preference is for the higher score at the end of the turn; two equal answers are a tie. An answer that was
    cut off inside its thought loses, and ties with another one."""
    config = dataclasses.replace(CONFIG, max_length=64)
    tokenizer, model = byte_tokenizer(), make_model(config)
    params = model.init(jax.random.key(0))
    params.pop("head", None)
    head = score_head_params(jax.random.key(1), config.d_model, init="normal")
    folder = tmp_path / "reward"
    export_hf(folder, config=config, params={**params, "score_head": head}, tokenizer=tokenizer)
    chat = [{"role": "user", "content": "Hi"}]
    texts = {"a": ["no", "yes", "same", "?"], "b": ["maybe", "x", "same", "well"]}
    cut = "<think>so"
    a, b = (answers(tmp_path, f"{name}.jsonl", texts[name], messages=chat, prompt=None) for name in texts)
    record = compare(options(tmp_path, str(folder), a=a, b=b, batch_rows=3))
    empty_a = answers(tmp_path, "empty_a.jsonl", [cut, "yes", cut, "?"], messages=chat, prompt=None)
    empty_b = answers(tmp_path, "empty_b.jsonl", ["x", cut, cut, "well"], messages=chat, prompt=None)
    found = options(tmp_path, str(folder), a=empty_a, b=empty_b, batch_rows=3)
    compare(dataclasses.replace(found, out=str(tmp_path / "empty")))
    of_empty = read(tmp_path / "empty" / "judgments.jsonl")

    hidden_of = jax.jit(lambda tokens_BT: model.apply(params, tokens_BT, logits=False).hidden_BTD[0])

    def score(text: str) -> float:
        turns = [*chat, {"role": "assistant", "content": text}]
        ids = tokenizer.apply_chat_template(turns, return_dict=True)["input_ids"]
        padded = jnp.asarray([ids + [0] * (64 - len(ids))])  # no token sees those that follow
        end = max(place for place, token in enumerate(ids) if token == tokenizer.eos_token_id)
        return float(hidden_of(padded)[end] @ head["kernel"][:, 0])

    rows = read(tmp_path / "out" / "judgments.jsonl")
    for row, one, two in zip(rows, texts["a"], texts["b"], strict=True):
        scores = score(one), score(two)
        assert (float(row["said_a_first"]), float(row["said_b_first"])) == pytest.approx(scores, abs=1e-4)
        assert row["preference"] == (0.5 if one == two else float(scores[1] > scores[0]))
    assert [row["preference"] for row in of_empty] == [1.0, 0.0, 0.5, rows[3]["preference"]]
    assert of_empty[0]["said_a_first"] == "empty"
    assert (
        "2 completions of a and 2 of b are empty, or were cut off inside their thought"
        in capsys.readouterr().out
    )
    assert record["b_over_a"]["ties"] == 1 and record["usage"]["calls"] == 8
    with pytest.raises(InputError, match="--judge_model is for a judge behind a URL"):
        compare(options(tmp_path, str(folder), a=a, b=b, judge_model="m"))
    long = answers(tmp_path, "long.jsonl", ["x" * 80, *texts["b"][1:]], messages=chat, prompt=None)
    with pytest.raises(InputError, match=r"scored_answers\.jsonl, line 2, .*102 tokens"):
        compare(options(tmp_path, str(folder), a=a, b=long))
