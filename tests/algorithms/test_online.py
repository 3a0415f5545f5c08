"""PPO and RLOO: every run here is `launch.train`'s, with the real engine and real worker processes."""

from __future__ import annotations

import itertools
import json
import math
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import ConfigDict
from tasks import experiment_of, spec_of, task_of
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import PreTrainedTokenizerFast

from configs.dpo.smollm2_135m import get_config as pairs_config
from configs.ppo.instructgpt import get_config as instructgpt
from configs.ppo.letters import get_config
from launch.config import with_algorithm
from launch.train import run
from posttrain_jax.core.errors import InputError
from posttrain_jax.core.sharding import make_mesh
from posttrain_jax.core.trees import combine
from posttrain_jax.core.types import CollectorState
from posttrain_jax.models.config import ModelConfig
from posttrain_jax.models.io.byte_tokenizer import byte_tokenizer
from posttrain_jax.models.io.export import export_hf
from posttrain_jax.models.io.load import load_model
from posttrain_jax.models.io.tokenizer import stop_token_ids
from posttrain_jax.models.reward_head import score_head_params
from posttrain_jax.models.transformer import make_model
from posttrain_jax.rollouts.experience import policy_params
from posttrain_jax.sampling.generate import GenerateOptions, generate
from posttrain_jax.sampling.prompts import encode_text
from posttrain_jax.wiring.networks import ValueNetwork

WORDS = ("<end>", "a", "b", "c", "d")
LONGEST = 3
BETA = 0.5
# Written out, so that the reward function, which runs in another process, and the test cannot share a mistake.
REWARDS = "tests.algorithms.letter_rewards:a_good_d_bad"


@pytest.fixture(scope="module")
def five_words(tmp_path_factory) -> Path:
    """A model of two small layers that knows five tokens, the first of them its end."""
    folder = tmp_path_factory.mktemp("five") / "model"
    config = ModelConfig(
        "llama", len(WORDS), 16, 2, 2, 2, 8, 32, query_scale=8**-0.5, max_length=16, eos_token_ids=(0,)
    )
    inner = Tokenizer(WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<end>"))
    inner.pre_tokenizer = WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="<end>")
    params = make_model(config).init(jax.random.key(3))
    export_hf(folder, config=config, params=params, tokenizer=tokenizer)
    return folder


@pytest.fixture
def one_device(monkeypatch) -> None:
    """The learning of so small a model: on 8 virtual devices it would mostly wait for their all-reduces."""
    first = jax.devices()[:1]
    monkeypatch.setattr(jax, "devices", lambda: first)
    monkeypatch.setattr(jax, "device_count", lambda: 1)


def answers() -> list[tuple[int, ...]]:
    """All that can be written: ended by token 0, or cut at LONGEST tokens."""
    every = []
    for length in range(1, LONGEST + 1):
        for tokens in itertools.product(range(len(WORDS)), repeat=length):
            inside, last = tokens[:-1], tokens[-1]
            if 0 not in inside and (last == 0 or length == LONGEST):
                every.append(tokens)
    return every


def probabilities(model: Path | str, prompt: tuple[int, ...]) -> np.ndarray:
    """Of every answer, by the model's own log-probabilities of each token."""
    loaded = load_model(str(model))
    every = answers()
    rows = np.zeros((len(every), len(prompt) + LONGEST), np.int32)
    for n, tokens in enumerate(every):
        rows[n, : len(prompt) + len(tokens)] = (*prompt, *tokens)
    logits = jax.jit(lambda tokens: loaded.model.apply(loaded.params, tokens).logits_BTV)(jnp.asarray(rows))
    logps = np.asarray(jax.nn.log_softmax(logits))
    first = len(prompt) - 1
    return np.exp(
        [sum(logps[n, first + i, token] for i, token in enumerate(tokens)) for n, tokens in enumerate(every)]
    )


def reward(tokens: tuple[int, ...]) -> float:
    """What `letter_rewards.a_good_d_bad` gives: an a is worth 1, a d costs 1/2, to have ended is worth 1/2."""
    return tokens.count(1) - 0.5 * tokens.count(4) + 0.5 * (tokens[-1] == 0)


def optimum(reference: np.ndarray) -> np.ndarray:
    """pi*(y) = pi_ref(y) exp(r(y) / beta) / Z, which maximizes E[r] - beta KL(pi || pi_ref)."""
    weighted = reference * np.exp([reward(tokens) / BETA for tokens in answers()])
    return weighted / weighted.sum()


def enumerable(model: Path, algorithm: str, seed: int, folder: Path) -> ConfigDict:
    config = get_config("rloo" if algorithm == "rloo" else "")
    config.seed = seed
    config.model.init, config.model.tokenizer, config.model.config = str(model), "", {}
    prompts = folder / "prompts.jsonl"
    prompts.write_text('{"prompt": "b c"}\n')
    config.data.train, config.data.eval, config.data.max_length = str(prompts), "", 8
    config.rollout.max_new_tokens = LONGEST
    config.rollout.samples = 32
    config.score.functions = (REWARDS,)
    config.train.rows_per_step, config.train.steps = 8, 60
    config[algorithm].kl_coefficient = BETA
    config[algorithm].epochs, config[algorithm].minibatches = 2, 2
    if algorithm == "ppo":
        config.ppo.lam, config.ppo.value, config.ppo.whiten_advantages = 1.0, "policy", False
    config.optim.lr, config.optim.schedule = 2e-2, "linear"
    config.log.tensorboard = False
    config.log.every = 20
    return config


@pytest.mark.usefixtures("one_device")
@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, *(pytest.param(seed, marks=pytest.mark.heavy) for seed in range(1, 5))])
@pytest.mark.parametrize("algorithm", ["ppo", "rloo"])
def test_the_regularized_optimum_is_reached(algorithm, seed, five_words, tmp_path):
    """Total variation to pi* below 0.1 for every seed, from more than 0.4 (0.02 to 0.08 was seen)."""
    prompt = (2, 3)  # "b c"
    start = probabilities(five_words, prompt)
    assert start.sum() == pytest.approx(1, abs=1e-5)
    best = optimum(start)
    assert 0.5 * np.abs(start - best).sum() > 0.4
    run(enumerable(five_words, algorithm, seed, tmp_path), tmp_path / "run")
    found = 0.5 * np.abs(probabilities(tmp_path / "run", prompt) - best).sum()
    assert found < 0.1, found


def short_answers() -> list[tuple[int, ...]]:
    """One or two words and the end: what the pairs for DPO are made of."""
    words = range(1, len(WORDS))
    return [(word, 0) for word in words] + [(*pair, 0) for pair in itertools.product(words, repeat=2)]


@pytest.mark.usefixtures("one_device")
@pytest.mark.slow
def test_dpo_reaches_the_same_optimum(five_words, tmp_path):
    """Pairs of all 20 short answers, each both ways round, weighted by how often Bradley-Terry with the same reward
    prefers that side: sigmoid(r - r'). Every step sees all pairs, so there is no noise to average over. Of these
    answers DPO's policy is then pi_ref exp(r / beta) / Z (arXiv:2305.18290, eq. 4): total variation below 0.05, from
    more than 0.5."""
    prompt = (2, 3)
    every = answers()
    places = [every.index(tokens) for tokens in short_answers()]
    rows = []
    for chosen, rejected in itertools.permutations(short_answers(), 2):
        texts = [" ".join(WORDS[token] for token in tokens[:-1]) for tokens in (chosen, rejected)]
        weight = 1 / (1 + math.exp(reward(rejected) - reward(chosen)))
        rows.append({"prompt": "b c", "chosen": texts[0], "rejected": texts[1], "weight": weight})
    pairs = tmp_path / "pairs.jsonl"
    pairs.write_text("".join(json.dumps(row) + "\n" for row in rows))

    def among_short(model: Path) -> np.ndarray:
        found = probabilities(model, prompt)[places]
        return found / found.sum()

    start = among_short(five_words)
    best = start * np.exp([reward(tokens) / BETA for tokens in short_answers()])
    best /= best.sum()
    assert 0.5 * np.abs(start - best).sum() > 0.5
    config = pairs_config("tiny")
    config.model.init, config.model.tokenizer, config.model.config = str(five_words), "", {}
    config.data.train, config.data.eval, config.data.max_length = str(pairs), "", 8
    config.data.chat_template = ""
    config.train.rows_per_step, config.train.micro_rows, config.train.steps = len(rows), 38, 60
    config.dpo.beta, config.dpo.reference = BETA, "memory"
    config.optim.name, config.optim.lr, config.optim.schedule = "adamw", 2e-2, "linear"
    config.log.tensorboard, config.log.every = False, 50
    config.eval.prompts, config.eval.every, config.checkpoint.every = (), 0, 0
    run(config, tmp_path / "run")
    found = 0.5 * np.abs(among_short(tmp_path / "run") - best).sum()
    assert found < 0.05, found


@pytest.mark.usefixtures("one_device")
@pytest.mark.slow
def test_a_dearer_kl_is_a_smaller_kl(five_words, tmp_path):
    """With beta as the only change, KL(pi || pi_ref) over all answers falls in order."""
    prompt = (2, 3)
    start = probabilities(five_words, prompt)
    found = []
    for beta in (0.1, 0.5, 2.0):
        folder = tmp_path / str(beta)
        folder.mkdir()
        config = enumerable(five_words, "ppo", 0, folder)
        config.ppo.kl_coefficient = beta
        run(config, folder / "run")
        policy = probabilities(folder / "run", prompt)
        found.append(float(np.sum(policy * np.log(policy / start))))
    assert found[0] > 1.2 * found[1] and found[1] > 1.2 * found[2] > 0, found


# ---- networks, meshes, rewards


def save_reward_model(folder: Path) -> str:
    """A random one, of other sizes than the policy."""
    config = ModelConfig("llama", 260, 16, 1, 2, 1, 8, 32, query_scale=8**-0.5, max_length=64)
    params = make_model(config).init(jax.random.key(5))
    params.pop("head", None)
    head = score_head_params(jax.random.key(6), config.d_model, init="normal")
    export_hf(folder, config=config, params={**params, "score_head": head}, tokenizer=byte_tokenizer())
    return str(folder)


def short(**changes) -> ConfigDict:
    config = get_config("tiny")
    config.train.steps, config.data.eval, config.log.tensorboard = 2, "", False
    config.checkpoint.every = 0
    config.rollout.reference = "frozen"  # the KL is not charged, but looked at
    for name, value in changes.items():
        section, _, key = name.rpartition("__")
        target = config
        for part in section.split("__"):
            target = target[part]
        target[key] = value
    return config


def logged(workdir: Path) -> list[dict]:
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["shared", "MODEL", "adapter"])
def test_other_networks(kind, tmp_path):
    """A value head on the policy's trunk; a reward model as the value network and as the reward; LoRA off as the
    reference, with which the first answers have a KL of 0. What is saved is a policy that can be read."""
    if kind == "MODEL":
        model = save_reward_model(tmp_path / "reward")
        config = short(ppo__value=model, score__functions=(), score__models=(model,))
    elif kind == "adapter":
        config = short(model__lora__rank=2, rollout__reference="adapter", train__micro_rows=8)
    else:
        config = short(ppo__value="shared", optim__ema=0.5)
    run(config, tmp_path / "run")
    first, last = logged(tmp_path / "run")
    assert abs(first["train/kl_per_sequence"]) < 1e-4
    assert abs(last["train/kl_per_sequence"]) > abs(first["train/kl_per_sequence"])
    assert first["train/sampler_logp_gap_max"] < 1e-3 and last["train/skipped"] == 0
    assert last["train/value_loss"] > 0
    loaded = load_model(str(tmp_path / "run"), ema=kind == "shared")
    assert "value" not in loaded.params and loaded.lora.rank == (2 if kind == "adapter" else 0)


def test_a_reward_model_becomes_a_linear_value_head(tmp_path):
    """Gain 3 and bias -0.5: the kernel is 3 times the reward model's, so that its values are its scores."""
    model = save_reward_model(tmp_path / "reward")
    before = load_model(model).params["score_head"]
    config = short(ppo__value=model)
    network = ValueNetwork(model, experiment_of(config), spec_of(config), make_mesh())
    scaled = {**before, "gain": jnp.float32(3), "bias": jnp.float32(-0.5)}
    head = network._with_value({}, {"score_head": scaled})["value"]["score_head"]
    np.testing.assert_array_equal(head["kernel"], 3 * np.asarray(before["kernel"]))
    assert (float(head["gain"]), float(head["bias"])) == (1.0, -0.5)


def test_an_evaluation_may_draw_at_a_temperature_of_its_own(tmp_path):
    """At 0 its answers are the engine's greedy ones, while an iteration's are drawn at 1."""
    config = short(data__eval="split:3", eval__temperature=0.0, rollout__samples=2)
    policy = spec_of(config)
    task = task_of(config, tmp_path)
    state = task.init_state()
    rows = task.sample(state)
    task.collector.close()
    asked = GenerateOptions(
        config.rollout.max_new_tokens, stop_token_ids=stop_token_ids(policy.model.config, policy.tokenizer)
    )
    prompts = [encode_text(policy.tokenizer, row["prompt"]) for row in rows]
    whole = policy_params(combine(state.params, state.frozen))
    greedy = generate(policy.model, whole, prompts, asked)
    assert len(rows) == 3 * 2
    assert [row["completion"] for row in rows] == [policy.tokenizer.decode(one.tokens) for one in greedy]


@pytest.mark.slow
def test_all_that_instructgpt_adds(tmp_path):
    """Pretraining text, an average as the reference, a value network with a rate of its own that starts alone, scores
    normalized at the start, a gold score: in one run. While the values learn alone, the policy and the KL's price stay
    as they were."""
    config = instructgpt("tiny")
    config.ppo.value_warmup, config.rollout.reference, config.optim.ema = 2, "ema", 0.5
    config.ppo.kl_target = 6.0
    config.ppo.epochs = 2
    config.score.functions, config.score.normalize = ("tests.algorithms.letter_rewards:mean_token",), 64
    config.score.missing_eos = "keep"
    config.score.gold_function = "configs.tiny.rewards:share_of_e"
    config.train.steps, config.eval.every, config.checkpoint.every, config.log.tensorboard = 4, 2, 0, False
    config.optim.warmup, config.optim.lr = 0, 1e-2
    run(config, tmp_path / "run")
    rows = logged(tmp_path / "run")
    steps = [row for row in rows if "train/kl_per_sequence" in row]
    evaluations = [row for row in rows if "eval/gold" in row]
    assert [abs(row["train/kl_per_sequence"]) < 1e-4 for row in steps] == [True, True, True, False]
    price = [row["train/kl_coefficient"] for row in steps]
    assert price[0] == price[1] == price[2] == pytest.approx(0.02) and price[3] < 0.02
    assert steps[0]["train/pretraining_loss"] == pytest.approx(math.log(260), abs=0.3)
    assert steps[3]["train/pretraining_loss"] < steps[2]["train/pretraining_loss"]
    assert steps[1]["train/values"] != steps[0]["train/values"]
    assert steps[0]["train/ratio_max"] == pytest.approx(1, abs=1e-4) and steps[3]["train/ratio_max"] > 1.001
    # The first evaluation is of other prompts than the 8 answers whose mean score is 0, but of the same policy.
    assert [row["step"] for row in evaluations] == [0, 2, 4] and abs(evaluations[0]["eval/score"]) < 1.5
    assert "<h2>" in (tmp_path / "run" / "samples.html").read_text("utf-8")


def test_the_normalization_of_scores_is_part_of_what_is_saved(tmp_path, capsys):
    """Found by a new run's first state. Gain 0 and bias 7, set as from a checkpoint: every score is 7, and no
    completions are sampled to find others. The state of an earlier version is refused."""
    config = short(data__eval="split:3", score__normalize=16)
    config.score.functions = ("tests.algorithms.letter_rewards:mean_token",)
    task = task_of(config, tmp_path)
    assert task.collector.get_state().arrays["normalization"].tolist() == [1.0, 0.0]
    task.init_state()
    saved = task.collector.get_state()
    task.collector.close()
    assert saved.arrays["normalization"].tolist() != [1.0, 0.0]
    assert "Scores are" in capsys.readouterr().out
    resumed = task_of(config, tmp_path)
    with pytest.raises(InputError, match="in the middle of a run of an earlier version"):
        resumed.collector.set_state(CollectorState({"prompts": saved.values["prompts"]}))
    arrays = {"normalization": np.asarray([0.0, 7.0])}
    resumed.collector.set_state(CollectorState(json.loads(json.dumps(saved.values)), arrays))
    scores = resumed.evaluate(resumed.init_state())
    resumed.collector.close()
    assert resumed.collector.get_state().arrays["normalization"].tolist() == [0.0, 7.0]
    assert (scores["eval/score"], scores["eval/score_standard_error"]) == (7.0, 0.0)
    assert "Scores are" not in capsys.readouterr().out


@pytest.mark.parametrize("key", ["ppo__value", "score__models"])
def test_a_network_for_shorter_rows_is_refused(key, tmp_path):
    model = save_reward_model(tmp_path / "reward")
    config = short(**{key: model if key == "ppo__value" else (model,)}, data__max_length=80)
    with pytest.raises(InputError, match=f"{model} was made for 64 tokens, and rows have up to 80"):
        start(config, tmp_path / "run")


@pytest.mark.slow
def test_a_limit_ends_the_run_for_good(tmp_path):
    """Any KL is above the limit: the run ends after the iteration that shows one, is saved, and does not go on."""
    config = short(stop__kl=1e-4, train__steps=9)
    for _ in range(2):
        run(config, tmp_path / "run")
        summary = json.loads((tmp_path / "run" / "summary.json").read_text())
        assert (summary["status"], summary["final_step"]) == ("stopped", 2)
        assert summary["reason"].endswith("above stop.kl=0.0001")
    assert [row["step"] for row in logged(tmp_path / "run")] == [1, 2]
    run(short(stop__kl=1e-4, train__steps=2), tmp_path / "all")  # at the last step there is nothing to stop
    assert json.loads((tmp_path / "all" / "summary.json").read_text())["status"] == "complete"


@pytest.mark.slow
def test_a_sampler_that_is_off_stops_the_run(tmp_path):
    """Engine and trainer add in another order, so that they never agree to 1e-9 nats."""
    with pytest.raises(InputError, match="more than rollout.max_logp_difference=1e-09"):
        run(short(rollout__max_logp_difference=1e-9), tmp_path / "run")
    assert not (tmp_path / "run" / "summary.json").exists()


@pytest.mark.slow
def test_a_mesh_changes_nothing(tmp_path):
    """The first iteration draws the same answers and learns the same on 8 devices and on 2 x 2 x 2."""
    names = (
        "train/score",
        "train/loss",
        "train/grad_norm",
        "train/entropy_per_token",
        "train/completion_tokens",
    )
    found = []
    for number, (data, fsdp, tensor) in enumerate([(8, 1, 1), (2, 2, 2)]):
        config = short(mesh__data=data, mesh__fsdp=fsdp, mesh__tensor=tensor, train__steps=1)
        run(config, tmp_path / str(number))
        found.append([logged(tmp_path / str(number))[0][name] for name in names])
    np.testing.assert_allclose(*found, rtol=2e-3, atol=1e-5)


# ---- bad input


def start(config: ConfigDict, workdir: Path) -> None:
    """As far as `launch.train` comes before the first answer."""
    task_of(config, workdir)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"ppo.kl_coefficient": -0.1}, "ppo.kl_coefficient is -0.1; it must be 0 or more"),
        ({"ppo.kl_coefficient": 0.0, "ppo.kl_target": 6.0}, "ppo.kl_coefficient is 0; set where it starts"),
        (
            {"ppo.kl_coefficient": 0.1, "ppo.kl_target": 6.0, "ppo.kl_horizon": 6.0},
            "ppo.kl_horizon is 6 completions, and an iteration has 32: .* above 6.4",
        ),
        ({"score.arguments": "{"}, "score.arguments is '{', which is no JSON"),
        ({"score.arguments": '{"a:b": {}}'}, "score.arguments names a:b, which is neither among"),
        ({"score.completions_per_call": 0}, "score.completions_per_call is 0; it must be at least 1"),
        ({"ppo.clip": 0.0}, "ppo.clip is 0.0; it must be more than 0"),
        ({"ppo.lam": 1.5}, "ppo.lam is 1.5; it must be .*at most 1"),
        ({"ppo.dual_clip": 0.5}, "ppo.dual_clip is 0.5; it must be more than 1, or 0"),
        ({"ppo.value": "none"}, "ppo.value is none, but PPO's advantages need values"),
        (
            {"train.rows_per_step": 3},
            r"3 prompts x rollout.samples=4 = 12 completions do not divide into 2 minibatches",
        ),
        (
            {"train.micro_rows": 3},
            r"train.micro_rows=3 must divide a minibatch's 16 completions .* could be 8, 16",
        ),
        (
            {"rollout.max_new_tokens": 48},
            "rollout.max_new_tokens is 48; .* leave room for a prompt in data.max_length=48",
        ),
        ({"data.max_length": 20}, r"prompts.jsonl:\d+: the prompt has \d+ tokens, more than 8"),
        ({"data.max_length": 1000}, "data.max_length is 1000, and the model was made for 512 tokens"),
        ({"rollout.temperature": 0.0}, "rollout.temperature is 0.0; it must be more than 0"),
        (
            {"rollout.reference": "old"},
            "rollout.reference is 'old': use one of none, frozen, adapter, ema, or a MODEL",
        ),
        ({"rollout.reference": "ema"}, "rollout.reference=ema is the moving average .* but optim.ema is 0"),
        ({"ppo.ptx_data": "configs/tiny/chats.jsonl"}, "but ppo.ptx_coefficient is 0, so nothing is learned"),
        ({"score.free_tokens": 5}, "score.free_tokens is 5, but score.per_token is 0"),
        ({"rollout.truncate_after": 5}, "rollout.truncate_after is 5, but rollout.truncate_token names"),
        ({"ppo.ptx_coefficient": 1.0}, "mixes pretraining text in, but ppo.ptx_data names none"),
        (
            {"ppo.ptx_coefficient": 1.0, "ppo.ptx_data": "configs/tiny/chats.jsonl", "ppo.ptx_rows": 9},
            "ppo.ptx_rows is 9; .* make it a multiple of 16",
        ),
        ({"ppo.value_lr": -1.0}, "ppo.value_lr is -1.0; it must be 0 or more"),
        ({"optim.lr": 0.0, "ppo.value_warmup": 1}, "ppo.value_lr and ppo.value_warmup need optim.lr above 0"),
        ({"stop.kl": -1.0}, "stop.kl is -1.0; it must be 0 or more"),
        ({"stop.gold_errors": 1.0}, "stop.gold_errors watches the gold score; set score.gold_function"),
        ({"stop.gold_errors": 1.0, "score.gold_model": "x", "eval.every": 0}, "eval.every is 0"),
        ({"ppo.clip_high": -0.1}, "ppo.clip_high is -0.1; it must be 0 or more"),
        (
            {
                "ppo.ptx_coefficient": 1.0,
                "ppo.ptx_data": "configs/tiny/chats.jsonl",
                "ppo.ptx_rows": 16,
                "ppo.ptx_length": 1000,
            },
            "ppo.ptx_length is 1000, and the policy was made for 512 tokens",
        ),
        (
            {"rollout.reference": "none", "ppo.kl_coefficient": 0.1},
            "rollout.reference is none, but the KL coefficient is above 0",
        ),
        ({"score.gold_model": "x", "data.eval": ""}, "score held-out completions; set data.eval"),
        ({"score.gold_model": "x", "score.gold_function": "y"}, "the gold score is one of them"),
        ({"score.normalize": -1}, "score.normalize is -1; it must be 0 or more"),
        (
            {"score.aggregate": "piecewise", "score.weights": (1.0,)},
            "score.weights is set, but score.aggregate=piecewise chooses",
        ),
        ({"score.aggregate": "piecewise"}, "score.aggregate=piecewise chooses between .* there are 1"),
        ({"rollout.reference": "adapter"}, "rollout.reference=adapter .* but model.lora.rank is 0"),
        ({"score.functions": ()}, "Nothing scores the completions"),
        ({"score.weights": (1.0, 2.0)}, "score.weights has 2 numbers for 1 rewards"),
        ({"score.functions": ("configs.tiny.rewards:none",)}, "configs.tiny.rewards"),
        (
            {"score.ensemble": "max", "score.models": ("x",)},
            "score.ensemble is 'max'; use one of mean, min, uncertainty",
        ),
        ({"algorithm": "rloo", "rollout.samples": 1}, "rollout.samples is 1; RLOO compares"),
        ({"algorithm": "rloo", "rloo.kl_coefficient": -1.0}, "rloo.kl_coefficient is -1.0"),
    ],
)
def test_bad_values_are_one_sentence(changes, words, tmp_path):
    config = with_algorithm(get_config("tiny"), changes.get("algorithm", "ppo"))
    for name, value in changes.items():
        section, _, key = name.rpartition(".")
        (config[section] if section else config)[key] = value
    with pytest.raises(InputError, match=words):
        start(config, tmp_path)
