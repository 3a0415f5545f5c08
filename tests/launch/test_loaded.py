"""`posttrain_jax.load`: chat, generate and score, with real (tiny, random) models; and the code of docs/models.md."""

from __future__ import annotations

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from entry_points import ROOT
from tiny_model import save_tiny_model, save_tiny_reward_model

import posttrain_jax
from posttrain_jax.core.errors import InputError
from posttrain_jax.models.io.byte_tokenizer import CHATML, byte_tokenizer
from posttrain_jax.models.io.load import load_model
from posttrain_jax.models.reward_head import scores
from posttrain_jax.sampling.generate import GenerateOptions, generate
from posttrain_jax.sampling.prompts import encode_chat, encode_text

HELLO = [{"role": "user", "content": "Hi"}]


def answered(text: str) -> list[dict]:
    return [*HELLO, {"role": "assistant", "content": text}]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Named as in docs/models.md."""
    root = tmp_path_factory.mktemp("readme")
    save_tiny_model(root / "runs" / "smollm2")
    save_tiny_reward_model(root / "runs" / "reward")
    return root


@pytest.fixture(scope="module")
def loaded(folders):
    return posttrain_jax.load(str(folders / "runs" / "smollm2"))


@pytest.fixture(scope="module")
def reward(folders):
    return posttrain_jax.load(str(folders / "runs" / "reward"))


def test_the_code_of_the_docs_runs(folders, monkeypatch):
    monkeypatch.chdir(folders)
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "models.md").read_text("utf-8"), re.DOTALL)
    assert len(blocks) == 2
    names: dict = {}
    for block in blocks:
        exec(block, names)
    assert isinstance(names["reply"].text, str) and len(names["texts"]) == 8
    assert names["logits"].shape == (1, len(names["texts"][0].token_ids), 260)
    assert len(names["scores"]) == 2 and np.ptp(names["scores"]) > 0


def test_a_completion_ends_with_the_models_own_stop_token(loaded):
    """After "Hi" the likeliest token is <|im_end|>: its embedding (the head too) is made the hidden state there, times
    100. Nobody named it as a stop token."""
    prompt = encode_text(loaded.tokenizer, "Hi")
    hidden = loaded.model.apply(loaded.params, jnp.asarray([prompt]), logits=False).hidden_BTD[0, -1]
    end = loaded.tokenizer.convert_tokens_to_ids("<|im_end|>")
    table = loaded.params["embed"]["embedding"].at[end].set(100 * hidden)
    stops = dataclasses.replace(loaded, params={**loaded.params, "embed": {"embedding": table}})
    (answer,) = stops.generate(["Hi"], max_new_tokens=5)
    assert (answer.text, answer.token_ids, answer.finish_reason) == ("", [end], "stop")
    (goes_on,) = stops.generate(["Hi"], max_new_tokens=5, ignore_eos=True)
    assert len(goes_on.token_ids) == 5 and goes_on.finish_reason == "length"


def test_texts_ids_and_conversations_are_prompts(loaded):
    """Each as the engine answers its tokens; a text without the chat template."""
    ids = [5, 6, 7]
    found = loaded.generate(["Once", ids, np.asarray(ids), HELLO], max_new_tokens=6)
    tokens = [encode_text(loaded.tokenizer, "Once"), np.asarray(ids), np.asarray(ids)]
    want = generate(
        loaded.model,
        loaded.params,
        [*tokens, encode_chat(loaded.tokenizer, HELLO)],
        GenerateOptions(6, stop_token_ids=(257, 259)),
    )
    assert [one.token_ids for one in found] == [sample.tokens.tolist() for sample in want]
    assert found[0].text == loaded.tokenizer.decode(want[0].tokens, skip_special_tokens=True)
    assert found[3].token_ids == loaded.chat(HELLO, max_new_tokens=6).token_ids
    np.testing.assert_allclose(found[0].logprobs, want[0].logprobs)
    assert loaded.generate([]) == [] and loaded.generate(["a"], max_new_tokens=0)[0].text == ""


def test_drawn_completions_follow_the_seed_and_stop_at_a_text(loaded):
    drawn = loaded.generate(["Once"], max_new_tokens=6, num_samples=2, temperature=1.0, seed=1)
    assert [(one.prompt, one.sample) for one in drawn] == [(0, 0), (0, 1)]
    assert drawn[0].token_ids != drawn[1].token_ids
    again = loaded.generate(["Once"], max_new_tokens=6, num_samples=2, temperature=1.0, seed=1)
    assert again == drawn
    text = next(one.text for one in drawn if len(one.text) > 3)
    place = [one.text for one in drawn].index(text)
    cut = loaded.generate(["Once"], max_new_tokens=6, num_samples=2, temperature=1.0, seed=1, stop=text[2])
    assert cut[place].text == text[: text.index(text[2])] and cut[place].finish_reason == "stop"


def test_a_score_is_read_at_the_end_of_the_turn(reward):
    """Of the conversation up to and with <|im_end|>, alone and without padding; the template's newline is not read. In
    batches of 2 and as one: the same."""
    texts = ["Hello there", "no", "a longer answer than the others"]
    found = reward.score([answered(text) for text in texts], batch_size=2)
    assert isinstance(found, list) and isinstance(found[0], float)
    for text, score in zip(texts, found, strict=True):
        whole = byte_tokenizer().apply_chat_template(answered(text), tokenize=False)
        tokens = jnp.asarray([byte_tokenizer()(whole.removesuffix("\n"))["input_ids"]])
        hidden = reward.model.apply(reward.params, tokens, logits=False).hidden_BTD
        want = scores(reward.params["score_head"], hidden, jnp.asarray([[tokens.shape[1] - 1]]))
        assert score == pytest.approx(float(want[0, 0]), abs=1e-5)
    assert reward.score(answered("no")) == pytest.approx(found[1], abs=1e-6)
    assert reward.score([]) == []


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        (lambda loaded: loaded.generate("Once"), "prompts must be a list of prompts, each a text"),
        (lambda loaded: loaded.generate([5, 6]), "prompts must be a list of prompts"),
        (lambda loaded: loaded.generate([[]]), "prompt 0 has no tokens"),
        (lambda loaded: loaded.generate(["a", [1.5]]), "prompt 1 holds float64 values; token ids are whole"),
        (lambda loaded: loaded.generate([[1, [2, 3]]]), "prompt 0 holds lists of unlike lengths"),
        (lambda loaded: loaded.generate([[1, 2**70]]), "prompt 0 holds object values"),
        (
            lambda loaded: loaded.generate([[260]]),
            "prompt 0 holds the token id 260; the model knows 0 to 259",
        ),
        (
            lambda loaded: loaded.generate([[{"role": "user"}]]),
            r"prompt 0: messages\[0\].content: is missing",
        ),
        (lambda loaded: loaded.generate(["a"], temperature=-1), "temperature is -1; it must be 0"),
        (lambda loaded: loaded.chat("Hi"), "messages must be a list of messages; write"),
        (lambda loaded: loaded.chat([]), "messages must be a list of messages"),
        (lambda loaded: loaded.score(answered("a")), "has no score head, so it is a language model"),
    ],
)
def test_what_a_language_model_cannot_do_is_one_sentence(wrong, words, loaded):
    with pytest.raises(InputError, match=words):
        wrong(loaded)


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        (lambda reward: reward.chat(HELLO), "is a reward model: it gives scores and cannot write"),
        (lambda reward: reward.score(HELLO), "the conversation: messages has no assistant turn"),
        (lambda reward: reward.score([answered("a"), 5]), "conversation 1: messages is no list of messages"),
        (lambda reward: reward.score("Hi"), "conversations must be a list of messages"),
        (
            lambda reward: reward.score([answered("a") + HELLO]),
            "conversation 0: the last message is not the assistant's",
        ),
        (lambda reward: reward.score(answered("a" * 200)), "the conversation has .* more than the 128 that"),
        (lambda reward: reward.score([answered("a")], batch_size=0), "batch_size is 0"),
    ],
)
def test_what_a_reward_model_cannot_do_is_one_sentence(wrong, words, reward):
    with pytest.raises(InputError, match=words):
        wrong(reward)


def test_without_a_template_or_a_tokenizer(loaded, reward):
    plain = byte_tokenizer()
    plain.chat_template = None
    with pytest.raises(InputError, match="has no chat template .it is a base model., so it takes no conv"):
        dataclasses.replace(loaded, tokenizer=plain).chat(HELLO)
    with pytest.raises(InputError, match="has no chat template"):
        dataclasses.replace(reward, tokenizer=plain).score(answered("a"))
    bare = dataclasses.replace(loaded, tokenizer=None)
    with pytest.raises(InputError, match="prompt 0: .* has no tokenizer; give token ids"):
        bare.generate(["a"])
    (completion,) = bare.generate([[5, 6]], max_new_tokens=2)
    assert completion.text is None and len(completion.token_ids) == 2


def test_tools_and_variables_reach_the_template(loaded, reward):
    """A template that writes the tools' names first, and "?" where `loud` is set."""
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = (
        "{% for tool in tools or [] %}{{ tool.function.name }}{% endfor %}{% if loud %}?{% endif %}" + CHATML
    )
    tools = [{"type": "function", "function": {"name": "f", "description": "d", "parameters": {}}}]
    asked = {"tools": tools, "chat_template_kwargs": {"loud": True}}
    model = dataclasses.replace(loaded, tokenizer=tokenizer)
    plain = "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    want = loaded.generate(["f?" + plain], max_new_tokens=6)[0].token_ids
    assert model.chat(HELLO, max_new_tokens=6, **asked).token_ids == want
    judge = dataclasses.replace(reward, tokenizer=tokenizer)
    found = [judge.score(answered("a")), judge.score(answered("a"), **asked)]
    assert (
        found[0] == pytest.approx(reward.score(answered("a")), abs=1e-6) and abs(found[1] - found[0]) > 1e-5
    )


def test_it_is_the_loaded_model(folders, loaded):
    """All that `load_model` gives is there too."""
    same = load_model(str(folders / "runs" / "smollm2"))
    assert loaded.config == same.config and loaded.source == same.source
    jax.tree.map(np.testing.assert_array_equal, loaded.params, same.params)
