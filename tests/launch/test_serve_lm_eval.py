"""lm-eval as a client: its local-completions model on tasks from local files gets the log-likelihoods that the
model itself gives, and greedy answers that are the engine's."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys

import numpy as np
import pytest
from entry_points import ROOT, environment
from server import KEY, expected, serving, text_of
from tiny_model import save_tiny_model

from posttrain_jax.models.io.load import load_model
from posttrain_jax.serving.prompt_scores import score_prompts

pytestmark = [
    pytest.mark.slow,
    pytest.mark.alone,
    pytest.mark.skipif(
        importlib.util.find_spec("lm_eval") is None,
        reason="lm_eval is not installed (the extra harness: make test EXTRAS=dev,parity,harness)",
    ),
]

CHOICES = [
    {"question": "Q: 2 + 2 =", "choices": [" 3", " 4", " five"], "answer": 1},
    {"question": "Q: capital of Côte d'Ivoire?", "choices": [" Yamoussoukro", " Abidjan"], "answer": 0},
    {
        "question": "Q: a longer question, of more than one line\nand a bit?",
        "choices": [" yes", " no"],
        "answer": 1,
    },
    {"question": "Q:", "choices": [" 世界", " b"], "answer": 0},
]
WRITING = [{"question": "Once upon"}, {"question": "Grüße"}, {"question": "a\nb"}]

CHOICE_TASK = """\
task: local_choice
dataset_path: json
dataset_kwargs: {data_files: {test: FILE}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{question}}"
doc_to_choice: "{{choices}}"
doc_to_target: answer
target_delimiter: ""
metric_list: [{metric: acc}, {metric: acc_norm}]
"""
WRITING_TASK = """\
task: local_writing
dataset_path: json
dataset_kwargs: {data_files: {test: FILE}}
test_split: test
output_type: generate_until
doc_to_text: "{{question}}"
doc_to_target: "x"
generation_kwargs: {until: ["never comes", "!!"], max_gen_toks: 12, do_sample: false, temperature: 0}
metric_list: [{metric: exact_match}]
"""


def write_task(folder, name, yaml, rows):
    data = folder / f"{name}.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    (folder / f"{name}.yaml").write_text(yaml.replace("FILE", str(data)), "utf-8")


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_tiny_model(tmp_path_factory.mktemp("tiny") / "model")


@pytest.fixture(scope="module")
def base_url(model):
    with serving(f"--model={model}", "--served_model_name=tiny", f"--api_key={KEY}") as (_, url):
        yield url


@pytest.fixture(scope="module", params=["one at a time", "batches", "many at once"])
def samples(request, model, base_url, tmp_path_factory):
    """lm-eval's samples of both tasks, by task and document."""
    folder = tmp_path_factory.mktemp("tasks")
    write_task(folder, "choice", CHOICE_TASK, CHOICES)
    write_task(folder, "writing", WRITING_TASK, WRITING)
    batch, concurrent = {"one at a time": (1, 1), "batches": (4, 1), "many at once": (1, 4)}[request.param]
    arguments = {
        "model": "tiny",
        "base_url": f"{base_url}/completions",
        "tokenizer_backend": "huggingface",
        "tokenizer": model,
        "max_length": 128,
        "num_concurrent": concurrent,
        "max_retries": 1,
    }
    done = subprocess.run(
        [
            *(sys.executable, "-m", "lm_eval", "--model", "local-completions"),
            *("--model_args", ",".join(f"{name}={value}" for name, value in arguments.items())),
            *("--tasks", "local_choice,local_writing", "--include_path", str(folder)),
            *("--batch_size", str(batch), "--log_samples", "--output_path", str(folder / "out")),
        ],
        cwd=ROOT,
        env=environment(OPENAI_API_KEY=KEY, HF_HOME=str(folder / "hf")),
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    found = {}
    for name in ("local_choice", "local_writing"):
        (path,) = (folder / "out").rglob(f"samples_{name}_*.jsonl")
        rows = [json.loads(line) for line in path.read_text("utf-8").splitlines()]
        found[name] = [row["resps"] for row in sorted(rows, key=lambda row: row["doc_id"])]
    return found


def test_loglikelihoods_are_those_of_the_model(model, samples):
    loaded = load_model(str(model))

    def encode(text):
        return loaded.tokenizer(text, add_special_tokens=False)["input_ids"]

    for row, answers in zip(CHOICES, samples["local_choice"], strict=True):
        for choice, ((loglikelihood, is_greedy),) in zip(row["choices"], answers, strict=True):
            context, whole = encode(row["question"]), np.asarray(encode(row["question"] + choice), np.int32)
            (scores,) = score_prompts(loaded.model, loaded.params, [whole], alternatives=1)
            assert float(loglikelihood) == pytest.approx(scores.logprobs[len(context) - 1 :].sum(), abs=1e-4)
            greedy = (scores.alternatives[len(context) - 1 : -1, 0] == whole[len(context) :]).all()
            assert str(is_greedy) == str(bool(greedy))


def test_answers_are_the_engines(model, samples):
    loaded = load_model(str(model))
    for row, ((text,),) in zip(WRITING, samples["local_writing"], strict=True):
        ids = np.asarray(loaded.tokenizer(row["question"], add_special_tokens=False)["input_ids"], np.int32)
        assert text == text_of(loaded, expected(loaded, ids, 12))
