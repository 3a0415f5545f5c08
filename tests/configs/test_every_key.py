"""Every key of every algorithm's config with every kind of nonsense: accepted, or refused in one sentence, at once."""

from __future__ import annotations

import json
import math
import time
from pathlib import Path
from typing import Any

import pytest
from ml_collections import ConfigDict

from launch.config import describe, flatten, known_leaves, load_file, override, take_overrides
from launch.resume import CHANGEABLE, FREE_KEYS, JUDGED_BY
from posttrain_jax.core.errors import InputError
from posttrain_jax.core.schema import all_defaults, all_leaves, from_text, read_all
from posttrain_jax.evaluate.options import TASKS, sections_of_task
from posttrain_jax.wiring.algorithms import ALGORITHMS, SYNONYMS, read_experiment, sections_of

CONFIGS = {
    "sft": "configs/sft/smollm2_135m.py:tiny",
    "dpo": "configs/dpo/smollm2_135m.py:tiny",
    "kto": "configs/dpo/smollm2_135m_kto.py:tiny",
    "reward_model": "configs/reward_model/smollm2_135m.py:tiny",
    "ppo": "configs/ppo/letters.py:tiny",
    "rloo": "configs/ppo/letters.py:rloo",
}
DEEP: Any = []
for _ in range(3000):
    DEEP = [DEEP]
VALUES: list[Any] = [
    math.nan, math.inf, -math.inf, -1, -1.5, 0, 0.0, 1, 0.5, 2**31, -(2**40), 10**30, 10**5000, 1e300, -1e300, 1e-320,
    True, None, "", "nonsense", "x" * 3000, "\0", "a\nb", [], [1], ["a", 2.0], [math.nan], ["x" * 3000], [[["a"]]],
    {}, {"a": math.inf}, {"a.b:c": {"d": 1}}, {1: 2}, DEEP, object(), b"bytes", 1j,
]  # fmt: skip
TEXTS = [
    "nan", "inf", "-1", "0", "1e999", "-", "9" * 5000, "true", "", "nonsense", "x" * 3000, "[", "[1", "[1]", "('a',",
    "{", '{"a": NaN}', "[" * 100_000, "(" * 5000, "[['a', 1]]", "null", "\0",
]  # fmt: skip


def keys_of() -> dict[str, list[str]]:
    """The keys of each algorithm that none before it has."""
    seen: set[tuple[str, str]] = set()
    keys: dict[str, list[str]] = {}
    for algorithm in CONFIGS:
        new = {key: (key, repr(leaf)) for key, leaf in all_leaves(sections_of(algorithm)).items()}
        keys[algorithm] = [key for key, leaf in new.items() if leaf not in seen]
        seen |= set(new.values())
    return keys


KEYS = keys_of()


def nested_with(nested: dict[str, Any], key: str, value: Any) -> dict[str, Any]:
    """The config with another value of a key; what was there stays."""
    *sections, name = key.split(".")
    changed = dict(nested)
    place = changed
    for section in sections:
        place[section] = dict(place[section])
        place = place[section]
    place[name] = value
    return changed


def refused_or_not(function: Any, *arguments: Any) -> None:
    started = time.perf_counter()
    try:
        function(*arguments)
    except InputError as error:
        text = str(error)
        assert len(text) <= 300, text
        assert "\n" not in text, text
    assert time.perf_counter() - started < 2.0


def test_every_algorithm_is_here():
    assert CONFIGS.keys() == ALGORITHMS.keys()


@pytest.mark.parametrize("algorithm", CONFIGS)
def test_every_key_with_every_kind_of_value(algorithm: str):
    nested = load_file(CONFIGS[algorithm]).to_dict()
    for key in KEYS[algorithm]:
        for value in VALUES:
            refused_or_not(read_experiment, nested_with(nested, key, value))


@pytest.mark.parametrize("algorithm", CONFIGS)
def test_every_key_with_every_kind_of_text(algorithm: str):
    """As the command line gives them; what is not refused there is read."""
    nested, known = load_file(CONFIGS[algorithm]).to_dict(), all_leaves(sections_of(algorithm))
    for key in KEYS[algorithm]:
        for text in TEXTS:

            def start(key: str = key, text: str = text) -> None:
                read_experiment(nested_with(nested, key, from_text(known[key], text)))

            refused_or_not(start)


@pytest.mark.parametrize("algorithm", CONFIGS)
def test_numbers_that_are_not_finite_are_always_refused(algorithm: str):
    for key, leaf in all_leaves(sections_of(algorithm)).items():
        if leaf.type in (int, float):
            for text in ("nan", "inf", "-inf"):
                with pytest.raises(InputError, match=key):
                    from_text(leaf, text)


@pytest.mark.parametrize("task", TASKS)
def test_every_key_of_every_evaluation(task: str):
    """The same for what is evaluated: values and texts."""
    sections = sections_of_task(task)
    nested, known = all_defaults(sections), all_leaves(sections)
    for key, leaf in known.items():
        for value in VALUES:
            refused_or_not(read_all, sections, nested_with(nested, key, value))
        for text in TEXTS:
            refused_or_not(from_text, leaf, text)


@pytest.mark.parametrize("algorithm", CONFIGS)
def test_every_key_is_described(algorithm: str):
    config = load_file(CONFIGS[algorithm])
    text = describe(config)
    for key, leaf in known_leaves(config).items():
        assert f"\n{key} = " in f"\n{text}"
        assert leaf.rule.help and leaf.rule.help in text, key


def test_synonyms_name_keys_that_there_are():
    known = {key for name in ALGORITHMS for key in all_leaves(sections_of(name))}
    assert {meant for meant in SYNONYMS.values() if not meant.startswith("--")} <= known


def test_keys_that_may_change_are_keys():
    known = [key for name in ALGORITHMS for key in all_leaves(sections_of(name))]
    for key in (*FREE_KEYS, *CHANGEABLE, *JUDGED_BY):
        assert any(name == key or (key.endswith(".") and name.startswith(key)) for name in known), key


def overridden(*words: str, file: str = CONFIGS["dpo"]) -> ConfigDict:
    left, overrides = take_overrides(["train", f"--config={file}", *words])
    assert left == ["train", f"--config={file}"]
    return override(load_file(file), overrides)


def written(folder: Path, *lines: str) -> str:
    """A config file that does not start from `experiment_config`."""
    text = "\n    ".join(["def get_config():", "config = ConfigDict()", *lines, "return config"])
    (folder / "own.py").write_text(f"from ml_collections import ConfigDict\n\n{text}\n")
    return str(folder / "own.py")


@pytest.mark.parametrize(
    ("words", "key", "value"),
    [
        (["--config.optim.lr=1e-3"], "optim.lr", 1e-3),
        (["--config.optim.lr", "1e-3"], "optim.lr", 1e-3),
        (["-config.optim.lr=1e-3"], "optim.lr", 1e-3),
        (["--noconfig.log.tensorboard"], "log.tensorboard", False),
        (["--config.log.tensorboard"], "log.tensorboard", True),
        (["--config.log.tensorboard=false"], "log.tensorboard", False),
        (["--config.eval.prompts=a", "--config.eval.prompts=b"], "eval.prompts", ("a", "b")),
        (["--config.eval.prompts=('a', 'b')"], "eval.prompts", ("a", "b")),
        (['--config.eval.prompts=["a"]'], "eval.prompts", ("a",)),
        (["--config.eval.prompts="], "eval.prompts", ()),
        (['--config.data.train=[["a.jsonl", 3]]'], "data.train", (("a.jsonl", 3.0),)),
        (["--config.data.train=a.jsonl"], "data.train", "a.jsonl"),
        (['--config.data.chat_template_kwargs={"x": false}'], "data.chat_template_kwargs", {"x": False}),
        (["--config.mesh.data", "-1"], "mesh.data", -1),
        (["--config.train.epochs=2"], "train.steps", 0),
        (["--config.train.epochs=2"], "train.epochs", 2.0),
    ],
)
def test_overrides(words: list[str], key: str, value: Any):
    assert flatten(overridden(*words))[key] == value


def test_a_key_inside_a_json_object():
    config = overridden("--config.model.config.hidden_size=64", "--config.model.config.model_type=qwen3")
    assert (config.model.config["hidden_size"], config.model.config["model_type"]) == (64, "qwen3")


def test_objects_and_sections_that_are_not_there_are_made(tmp_path: Path):
    config = overridden("--config.model.config.rope_scaling.factor=8")
    assert config.model.config["rope_scaling"] == {"factor": 8}
    file = written(tmp_path, "config.algorithm = 'dpo'", "config.lock()")
    config = overridden("--config.optim.lr=0.5", "--config.train.steps=3", file=file)
    assert (config.optim.lr, config.train.steps, config.is_locked) == (0.5, 3, True)


def test_a_key_inside_a_value_that_is_no_object():
    message = r"model.config.a is 1, so --config.model.config.a.b cannot be set in it; give the whole object, as JSON"
    with pytest.raises(InputError, match=message):
        overridden("--config.model.config.a=1", "--config.model.config.a.b=2")


def test_a_config_without_an_algorithm_is_of_the_default_one(tmp_path: Path):
    """And an evaluation is what has a task."""
    file = written(tmp_path, "config.eval = {'every': 3}")
    config = overridden("--config.optim.lr=0.5", file=file)
    assert known_leaves(config) == all_leaves(sections_of("sft"))
    assert "\noptim.lr = 0.5  (default 1e-05)\n" in describe(config)
    assert "\ntrain.steps = 0 " in describe(config)
    assert overridden("--config.algorithm=kto", file=file).eval.every == 3
    assert "\neval.task = 'math'" in describe(load_file(written(tmp_path, "config.eval = {'task': 'math'}")))


def test_another_algorithm_says_what_it_drops(capsys):
    config = overridden("--config.algorithm=kto", file="configs/dpo/tulu3_8b.py")
    assert config.algorithm == "kto"
    assert capsys.readouterr().out == (
        "algorithm=kto has no such keys, so these do not count: dpo.beta=5.0, dpo.loss='normalized'.\n"
    )


def test_another_algorithm_does_not_drop_a_typing_error(tmp_path: Path):
    file = written(tmp_path, "config.algorithm = 'dpo'", "config.optim = {'learning_rate': 1e-3}")
    with pytest.raises(InputError, match=r"'optim.learning_rate'; what other libraries call so is optim.lr"):
        overridden("--config.algorithm=kto", file=file)


@pytest.mark.parametrize(
    "algorithm", [["--config.algorithm=reward_model"], ["--config.algorithm", "reward_model"]]
)
def test_a_flag_of_another_algorithm(algorithm: list[str]):
    """The word after it is no value, for the key is true or false there."""
    config = overridden(*algorithm, "--config.reward.bootstrap", "--config.optim.lr=0.5")
    assert (config.reward.bootstrap, config.optim.lr) == (True, 0.5)


def test_another_algorithm_keeps_what_both_have():
    config = overridden("--config.kto.beta=0.5", "--config.algorithm=kto", "--config.optim.lr=0.5")
    assert (config.algorithm, config.kto.beta, config.optim.lr) == ("kto", 0.5, 0.5)
    assert config.data.train == "configs/tiny/pairs.jsonl"
    assert "dpo" not in config


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("--config.eval.prompts[0]=x", "names one item of a list; give the whole list, as JSON"),
        ("--config.eval.prompts[=x", "names one item of a list"),
        ("--config.model=x", "model is a section; give one of its keys, such as --config.model.init="),
        ("--config.optim.learning_rate=1", "what other libraries call so is optim.lr here"),
        ("--config.learning_rate=1", "what other libraries call so is optim.lr here"),
        ("--config.num_train_epochs=1", "train.epochs here"),
        ("--config.output_dir=x", "is --workdir here"),
        ("--config.optim.lrr=1", "'optim.lrr'; the nearest is 'optim.lr'"),
        ("--config.dpo.skip_end=1", "is called 'dpo.skip_eos' now; write --config.dpo.skip_eos="),
        ("--config.optim.lr", "--config.optim.lr needs a value"),
        ("--noconfig.optim.lr", "--config.optim.lr needs a value"),
        ("--config.algorithm=ppoo", "algorithm is 'ppoo'; use one of sft, dpo"),
        ("--config.algorithm", "--config.algorithm needs a value"),
        ("--config." + "x" * 3000 + "=1", "There is no config key"),
        ("--config.=1", "There is no config key ''"),
    ],
)
def test_overrides_that_are_wrong(word: str, message: str):
    with pytest.raises(InputError) as raised:
        overridden(word)
    assert message in str(raised.value)
    assert len(str(raised.value)) < 300


def test_overrides_without_a_config():
    with pytest.raises(InputError, match="there is no --config=FILE.py"):
        take_overrides(["train", "--config.optim.lr=1"])


def test_steps_and_epochs_both_given():
    config = overridden("--config.train.epochs=2", "--config.train.steps=3")
    with pytest.raises(
        InputError, match="set exactly one of train.steps and train.epochs, and the other to 0"
    ):
        read_experiment(config.to_dict())


def test_a_value_is_read_as_json_once(tmp_path):
    """A config of the last version has JSON in texts; what is written is nested."""
    config = overridden("--config.data.eval=split:2")
    config.data.train = json.dumps([["a.jsonl", 1]])
    assert read_experiment(config.to_dict()).data.train == (("a.jsonl", 1.0),)
