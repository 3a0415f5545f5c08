"""One row, one prompt: what is trained stands after the tokens that generation, rollouts and the server start from."""

from __future__ import annotations

import dataclasses
import json
import pathlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from launch.prompt_file import encode, read_prompts
from posttrain_jax.core.errors import InputError
from posttrain_jax.data.chat import Encoder
from posttrain_jax.data.chat_template import ChatOptions
from posttrain_jax.data.formats import to_conversation
from posttrain_jax.data.preferences import to_preference
from posttrain_jax.data.prompt_rows import encode_prompt_row, read_prompt_row
from posttrain_jax.data.rows import RowError
from posttrain_jax.models.io.byte_tokenizer import byte_tokenizer
from posttrain_jax.rollouts.sampling import encode_prompt
from posttrain_jax.serving.bodies import ChatBody
from posttrain_jax.serving.parsed_request import Limits, parse_request
from posttrain_jax.serving.token_text import Vocabulary

ROOT = pathlib.Path(__file__).parents[2]
# Template -> the special tokens that it needs beside those of the byte tokenizer.
TEMPLATES = {
    "alternating": (),
    "llama3": ("<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<|eom_id|>"),
    "gemma": ("<start_of_turn>", "<end_of_turn>"),
    "qwen3": (),
    "llama2": (),
    "mistral": ("[INST]", "[/INST]"),
    "zephyr": (),
    "phi3": ("<|user|>", "<|assistant|>", "<|system|>", "<|end|>"),
    "generation_tags": (),
    "no_prompt_chatml": (),
    "r1": ("<｜User｜>", "<｜Assistant｜>"),
    "tools": (),
}
WITH_TOOLS = (
    "{% if tools %}{{ tools | tojson }}{% endif %}{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}"
    "{% for c in m.tool_calls or [] %}{{ c.function.name }}{{ c.function.arguments | tojson }}{% endfor %}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
CALL = {
    "role": "assistant",
    "content": "",
    "tool_calls": [{"function": {"name": "f", "arguments": '{"x": 1}'}}],
}
LIMITS = Limits(
    max_length=10**6,
    vocab_size=10**6,
    alternatives=0,
    completions=1,
    stop_token_ids=(),
    characters=10**9,
    control_tokens=True,
)
TOOL = {"name": "f", "description": "adds", "parameters": {}}


def tokenizer_of(name):
    tokenizer = byte_tokenizer()
    tokenizer.bos_token = "<|endoftext|>"
    tokenizer.add_special_tokens({"extra_special_tokens": list(TEMPLATES[name])})
    paths = {"r1": ROOT / "configs" / "templates" / "deepseek_r1.jinja"}
    path = paths.get(name, ROOT / "tests" / "data" / "templates" / f"{name}.jinja")
    tokenizer.chat_template = WITH_TOOLS if name == "tools" else path.read_text()
    return tokenizer


TOKENIZERS = {name: tokenizer_of(name) for name in TEMPLATES}


def served(row, tokenizer):
    """The prompt of a request to the server, or None for what its fields do not take."""
    if "tools" in row or any(
        "tool_calls" in message or message["role"] == "tool" for message in row["messages"]
    ):
        return None
    system = [{"role": "system", "content": row["system"]}] if "system" in row else []
    body = ChatBody(model="m", messages=[*system, *row["messages"]], max_tokens=1)
    return parse_request(body, tokenizer, Vocabulary(tokenizer), LIMITS).prompts[0].tokens


def trained_on(row, answer, tokenizer):
    """The tokens before the last turn's first trained one."""
    whole = to_conversation({**row, "messages": [*row["messages"], {"role": "assistant", "content": answer}]})
    encoded = Encoder(tokenizer, train_on="last_turn").encode([whole])[0]
    if isinstance(encoded, RowError):
        raise encoded
    return encoded.tokens[: int(encoded.loss_mask.argmax())]


TEXT = st.text(st.characters(codec="utf-8", exclude_characters="\x00"), min_size=1, max_size=8).filter(
    str.strip
)


@st.composite
def rows(draw):
    turns = draw(st.integers(0, 2))
    messages = []
    for _ in range(turns):
        messages.append({"role": "user", "content": draw(TEXT)})
        messages.append({"role": "assistant", "content": draw(TEXT)})
    messages.append({"role": "user", "content": draw(TEXT)})
    if draw(st.booleans()):
        messages += [CALL, {"role": "tool", "content": draw(TEXT)}]
    row = {"messages": messages}
    if draw(st.booleans()):
        row["system"] = draw(TEXT)
    if draw(st.booleans()):
        row["tools"] = draw(
            st.sampled_from([[TOOL], [{"type": "function", "function": TOOL}], json.dumps([TOOL])])
        )
    return row


def tokens_or_refusal(read):
    """The ids as a list, or the column and the reason of a refusal."""
    try:
        return read().tolist()
    except RowError as error:
        return error.column, error.reason


@settings(max_examples=120, deadline=None)
@given(row=rows(), answer=TEXT, name=st.sampled_from(sorted(TEMPLATES)))
def test_training_generation_rollouts_and_the_server_have_one_prompt(row, answer, name):
    tokenizer = TOKENIZERS[name]
    generated = tokens_or_refusal(lambda: encode_prompt_row(read_prompt_row(row), tokenizer))
    rolled_out = tokens_or_refusal(lambda: encode_prompt(row, tokenizer, vocab_size=len(tokenizer)))
    assert rolled_out == generated
    trained = tokens_or_refusal(lambda: trained_on(row, answer, tokenizer))
    if isinstance(generated, tuple):  # no place for a system prompt, for tools, for two turns in a row
        assert isinstance(trained, tuple)
        return
    asked = served(row, tokenizer)
    assert asked is None or asked.tolist() == generated
    if isinstance(trained, tuple):  # a turn's text ends it too early
        assert "end-of-turn" in trained[1]
    else:
        assert trained == generated


CHAT = [{"role": "user", "content": "hi"}]
ALIKE = [
    (
        {"messages": CHAT, "system": "Be terse."},
        "<|im_start|>system\nBe terse.<|im_end|>\n<|im_start|>user\nhi",
    ),
    ({"messages": [*CHAT, CALL, {"role": "tool", "content": "1"}]}, 'f{"x": 1}<|im_end|>'),
    ({"messages": CHAT, "tools": [TOOL]}, '[{"type": "function", "function": {"name": "f"'),
    ({"prompt": CHAT}, "<|im_start|>user\nhi"),
    ({"conversations": [{"from": "human", "value": "hi"}]}, "<|im_start|>user\nhi"),
    ({"instruction": "Add.", "input": "1 2", "history": [["a", "b"]]}, "<|im_start|>user\nAdd.\n1 2"),
]


@pytest.mark.parametrize(("row", "words"), ALIKE)
def test_rows_as_people_have_them(row, words, tmp_path):
    """Read from a file by launch.generate, by the rollouts, and as rows of SFT and preferences."""
    tokenizer = TOKENIZERS["tools"]
    path = tmp_path / "p.jsonl"
    path.write_text(json.dumps({"id": "a", **row}) + "\n")
    (prompt,) = read_prompts(str(path))
    ids = encode(prompt, tokenizer, ChatOptions(), model="m")
    text = tokenizer.decode(ids)
    assert words in text and text.endswith("<|im_start|>assistant\n")
    assert encode_prompt(row, tokenizer, vocab_size=300).tolist() == ids.tolist()
    pair = to_preference({**row, "chosen": "yes", "rejected": "no"})
    for encoded in Encoder(tokenizer).encode(pair.completions):
        assert encoded.tokens[: int(encoded.loss_mask.argmax())].tolist() == ids.tolist()


def test_text_as_chat_is_one_prompt_too(tmp_path):
    tokenizer, chat = TOKENIZERS["tools"], ChatOptions(text_as="chat")
    row = {"prompt": "hi", "system": "Be terse."}
    path = tmp_path / "p.jsonl"
    path.write_text(json.dumps(row) + "\n")
    (prompt,) = read_prompts(str(path), text_as="chat")
    ids = encode(prompt, tokenizer, chat, model="m")
    assert ids.tolist() == encode_prompt(row, tokenizer, vocab_size=300, chat=chat).tolist()
    conversation = to_conversation({**row, "completion": "yes"}, text_as="chat")
    (encoded,) = Encoder(tokenizer, chat=chat).encode([conversation])
    assert encoded.tokens[: int(encoded.loss_mask.argmax())].tolist() == ids.tolist()
    assert tokenizer.decode(encoded.tokens[encoded.loss_mask]) == "yes<|im_end|>"


def test_what_plain_text_has_no_place_for_is_refused(tmp_path):
    for row in ({"prompt": "hi", "system": "Be terse."}, {"prompt": "hi", "tools": [TOOL]}):
        with pytest.raises(RowError, match=r"has no place before plain text .*data\.text_as=chat"):
            encode_prompt(row, TOKENIZERS["tools"], vocab_size=300)
    path = tmp_path / "p.jsonl"
    path.write_text('{"prompt": "hi", "context": "The sky is green."}\n')
    with pytest.raises(InputError, match=r"p\.jsonl:1: context could be part of the prompt"):
        read_prompts(str(path))
    (prompt,) = read_prompts(str(path), ignore_columns="context")
    assert prompt.read.text == "hi"
    # In rollouts it goes with the prompt to the reward function.
    assert encode_prompt(json.loads(path.read_text()), TOKENIZERS["tools"], vocab_size=300).size == 2


def test_named_templates_are_chosen_alike():
    tokenizer = byte_tokenizer()
    plain = tokenizer.chat_template
    tokenizer.chat_template = {"default": plain, "tool_use": WITH_TOOLS}
    for tools in ({}, {"tools": [TOOL]}):
        row = {"messages": CHAT, **tools}
        ids = encode_prompt(row, tokenizer, vocab_size=300)
        assert tokenizer.decode(ids).startswith("[{" if tools else "<|im_start|>user")
        assert trained_on(row, "yes", tokenizer).tolist() == ids.tolist()


def test_tools_that_no_template_shows_are_refused_everywhere():
    row = {"messages": CHAT, "tools": [TOOL]}
    for read in (
        lambda: encode_prompt(row, byte_tokenizer(), vocab_size=300),
        lambda: trained_on(row, "yes", byte_tokenizer()),
    ):
        with pytest.raises(
            RowError, match=r"tools: are not shown by this chat template; set data\.chat_template"
        ):
            read()


def test_calls_that_no_template_shows_are_refused_everywhere():
    """ChatML as the byte tokenizer has it would leave an empty turn where the call was."""
    row = {"messages": [*CHAT, CALL, {"role": "tool", "content": "1"}]}
    for read in (
        lambda: encode_prompt(row, byte_tokenizer(), vocab_size=300),
        lambda: trained_on(row, "yes", byte_tokenizer()),
    ):
        with pytest.raises(RowError, match=r"messages\[1\]\.tool_calls: are not shown by this chat template"):
            read()


def test_variables_of_the_template_are_honored_alike():
    tokenizer = byte_tokenizer()
    tokenizer.chat_template += (
        "{% if add_generation_prompt and not enable_thinking | default(true) %}<off>{% endif %}"
    )
    chat = ChatOptions(variables={"enable_thinking": False})
    ids = encode_prompt({"messages": CHAT}, tokenizer, vocab_size=300, chat=chat)
    assert tokenizer.decode(ids).endswith("assistant\n<off>")
    body = ChatBody(model="m", messages=CHAT, max_tokens=1, chat_template_kwargs={"enable_thinking": False})
    assert (
        parse_request(body, tokenizer, Vocabulary(tokenizer), LIMITS).prompts[0].tokens.tolist()
        == ids.tolist()
    )
    body = ChatBody(model="m", messages=CHAT, max_tokens=1, chat_template_kwargs={"enable_thinkin": False})
    with pytest.raises(InputError, match="no variable 'enable_thinkin'; it has enable_thinking"):
        parse_request(body, tokenizer, Vocabulary(tokenizer), LIMITS)


def test_an_empty_answer_may_stand_in_what_was_said():
    messages = [*CHAT, {"role": "assistant", "content": ""}, *CHAT]
    ids = encode_prompt({"messages": messages}, byte_tokenizer(), vocab_size=300)
    assert np.asarray(ids).size and "assistant\n<|im_end|>" in byte_tokenizer().decode(ids)


@pytest.mark.parametrize(
    ("template", "reason"),
    [
        ("{{ 1 / 0 }}", "ZeroDivisionError"),
        ("{{ range(10 ** 12) }}", "OverflowError"),
        ("{{ 'x' * 10 ** 12 }}", "takes more than 5 s or"),
        ("{% if %}", "cannot be read"),
    ],
)
def test_a_template_that_fails_is_the_requests_error_and_no_crash(template, reason):
    """The server answers InputError with 400."""
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = template
    with pytest.raises(InputError, match=reason) as error:
        parse_request(
            ChatBody(model="m", messages=CHAT, max_tokens=1), tokenizer, Vocabulary(tokenizer), LIMITS
        )
    assert "\n" not in str(error.value)


def test_variables_cannot_carry_control_tokens_past_the_server():
    """Without control_tokens the texts of clients are spelled out; a variable's text would not be."""
    tokenizer = byte_tokenizer()
    tokenizer.chat_template += "{{ note | default('') }}"
    spelled = dataclasses.replace(LIMITS, control_tokens=False)
    body = ChatBody(model="m", messages=CHAT, max_tokens=1, chat_template_kwargs={"note": "x<|im_end|>"})
    with pytest.raises(
        InputError, match=r"chat_template_kwargs holds the text of the control token '<\|im_end\|>'"
    ):
        parse_request(body, tokenizer, Vocabulary(tokenizer), spelled)
