"""The trained tokens of chats, decoded, for a dozen templates; ids are those of apply_chat_template."""

from __future__ import annotations

import copy
import json

import numpy as np
import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from posttrain_jax.core.errors import InputError
from posttrain_jax.data.chat import Encoded, Encoder
from posttrain_jax.data.chat_template import ChatOptions
from posttrain_jax.data.formats import to_conversation
from posttrain_jax.data.sources import RowError, read_rows
from posttrain_jax.data.spans import ChatTemplate

from .chats import FAMILIES, TEMPLATES, TWO_TURNS, chat_row, encode_row, template_ids, trained_texts

# DeepSeek-R1's own template can train nothing: see test_a_template_that_drops_thoughts_...
ALL = ["smollm2", *(name for name in FAMILIES if name != "deepseek_r1")]
# What each family's model writes in TWO_TURNS.
EXPECTED = {
    "smollm2": ["It is 4.<|im_end|>", "6\n\nSix — 六!<|im_end|>"],
    "llama3": ["It is 4.<|eot_id|>", "6\n\nSix — 六!<|eot_id|>"],
    "gemma": ["It is 4.<end_of_turn>", "6\n\nSix — 六!<end_of_turn>"],
    "qwen3": ["It is 4.<|im_end|>", "<think>\n\n</think>\n\n6\n\nSix — 六!<|im_end|>"],
    "llama2": [" It is 4. </s>", " 6\n\nSix — 六! </s>"],
    "mistral": [" It is 4.</s>", " 6\n\nSix — 六!</s>"],
    "zephyr": ["It is 4.</s>", "6\n\nSix — 六!</s>"],
    "phi3": ["It is 4.<|end|>", "6\n\nSix — 六!<|end|>"],
    "generation_tags": ["It is 4.<|im_end|>", "6\n\nSix — 六!<|im_end|>"],
    "generation_content_only": ["It is 4.<|im_end|>", "6\n\nSix — 六!<|im_end|>"],
    "no_prompt_chatml": ["It is 4.<|im_end|>", "6\n\nSix — 六!<|im_end|>"],
}


@pytest.mark.parametrize("name", ALL)
def test_trained_text_of_each_family(name, family):
    tokenizer = family(name)
    encoded = encode_row(TWO_TURNS, tokenizer)
    assert trained_texts(encoded, tokenizer) == EXPECTED[name]
    assert encoded.tokens.tolist() == template_ids(TWO_TURNS, tokenizer)
    assert encoded.tokens.dtype == np.int32 and encoded.loss_mask.dtype == bool


@pytest.mark.parametrize("name", ALL)
def test_last_turn_only(name, family):
    tokenizer = family(name)
    encoded = encode_row(TWO_TURNS, tokenizer, train_on="last_turn")
    assert trained_texts(encoded, tokenizer) == EXPECTED[name][-1:]


@pytest.mark.parametrize("name", ["smollm2", "llama3", "qwen3", "zephyr", "phi3", "llama2", "mistral"])
def test_system_prompts_are_not_trained(name, family):
    tokenizer = family(name)
    row = {"messages": [{"role": "system", "content": "Be brief."}, *TWO_TURNS["messages"]]}
    encoded = encode_row(row, tokenizer)
    assert "Be brief." in tokenizer.decode(encoded.tokens)
    assert trained_texts(encoded, tokenizer) == EXPECTED[name]


def test_a_system_prompt_that_the_template_inserts_is_not_trained(smollm2):
    encoded = encode_row(TWO_TURNS, smollm2)
    assert "You are a helpful AI assistant named SmolLM" in smollm2.decode(encoded.tokens[~encoded.loss_mask])


@pytest.mark.parametrize("name", ALL)
def test_real_multi_turn_chats(name, family, demo_path):
    """Every turn of real chats decodes to its content and the end of the turn, nothing more and nothing less."""
    tokenizer = family(name)
    rows = [row.value for row in read_rows(str(demo_path("glaive_toolcall_en_demo")))]
    chats = [row for row in rows if all(turn["from"] in ("human", "gpt") for turn in row["conversations"])][
        :25
    ]
    chats += [
        row.value for row, _ in zip(read_rows(str(demo_path("alpaca_en_demo"))), range(25), strict=False)
    ]
    conversations = [
        to_conversation({key: value for key, value in row.items() if key != "tools"}) for row in chats
    ]
    assert max(sum(conversation.trained) for conversation in conversations) >= 4
    end = EXPECTED[name][0].removeprefix(" ").removeprefix("It is 4.")
    for conversation, encoded in zip(conversations, Encoder(tokenizer).encode(conversations), strict=True):
        contents = [message["content"] for message in conversation.messages if message["role"] == "assistant"]
        texts = trained_texts(encoded, tokenizer)
        if name == "qwen3":
            texts[-1] = texts[-1].removeprefix("<think>\n\n</think>\n\n")
        assert len(texts) == len(contents)
        for text, content in zip(texts, contents, strict=True):
            assert text.endswith(end)
            assert text.removesuffix(end).strip() == content.strip()
        ids = tokenizer.apply_chat_template(list(conversation.messages), tokenize=True, return_dict=False)
        assert encoded.tokens.tolist() == ids


@pytest.mark.parametrize("name", ["llama3", "gemma", "llama2", "mistral"])
def test_one_bos_per_rendered_bos(name, family):
    tokenizer = family(name)
    row = chat_row("hi", "hello")
    encoded = encode_row(row, tokenizer)
    assert encoded.tokens.tolist().count(tokenizer.bos_token_id) == 1
    assert encoded.tokens[0] == tokenizer.bos_token_id and not encoded.loss_mask[0]


def test_eos_is_trained_when_it_is_also_the_padding(smollm2):
    assert smollm2.pad_token_id == smollm2.eos_token_id
    encoded = encode_row(TWO_TURNS, smollm2)
    ends = encoded.tokens == smollm2.eos_token_id
    # system, user, assistant, user, assistant: the ends of the assistant's turns alone are trained
    assert encoded.loss_mask[ends].tolist() == [False, False, True, False, True]


@pytest.mark.parametrize("name", ALL)
def test_special_tokens_in_a_users_text_do_not_fool_the_mask(name, family):
    tokenizer = family(name)
    end = EXPECTED[name][0].split("4.")[1].strip()
    prompt = tokenizer.apply_chat_template(
        chat_row("x")["messages"], tokenize=False, add_generation_prompt=True
    ).split("x")[-1]
    row = chat_row(
        f"Say {end}\n{prompt}I was told to say this{end}\n", "No.", f"{prompt}Yes{end}", "Still no."
    )
    encoded = encode_row(row, tokenizer)
    texts = [
        text.removeprefix("<think>\n\n</think>\n\n").strip() for text in trained_texts(encoded, tokenizer)
    ]
    blank = " " if name == "llama2" else ""
    assert texts == [f"No.{blank}{end}", f"Still no.{blank}{end}"]
    assert encoded.tokens.tolist() == template_ids(row, tokenizer)


@pytest.mark.parametrize("name", ["smollm2", "llama3", "gemma", "qwen3", "mistral"])
def test_an_assistants_text_with_its_own_end_of_turn_is_refused(name, family):
    tokenizer = family(name)
    end = EXPECTED[name][0].split("4.")[1]
    with pytest.raises(RowError, match=r"messages\[1\].content.*end-of-turn") as error:
        encode_row(chat_row("hi", f"a{end}b"), tokenizer)
    assert end in error.value.reason


@pytest.mark.parametrize("name", ["smollm2", "zephyr", "generation_tags"])
def test_blanks_at_the_end_of_an_answer_are_trained(name, family):
    tokenizer = family(name)
    end = EXPECTED[name][0].split("4.")[1]
    encoded = encode_row(chat_row("q", "a \n\n"), tokenizer)
    assert trained_texts(encoded, tokenizer) == [f"a \n\n{end}"]


def test_a_token_that_joins_the_header_to_the_answer_is_trained(smollm2):
    """The header's newline and the answer's first blank are one token; transformers' own mask has it too."""
    encoded = encode_row(chat_row("q", "  a"), smollm2)
    assert trained_texts(encoded, smollm2) == ["\n  a<|im_end|>"]
    assert smollm2.decode(encoded.tokens[encoded.loss_mask][0]) == "\n "


def test_a_special_token_that_takes_the_blanks_after_it_is_never_trained(family):
    """Phi-3's `<|assistant|>` has rstrip: it covers the newline of the header and the blanks that the answer begins
    with."""
    tokenizer = copy.deepcopy(family("phi3"))
    tokenizer.add_tokens(
        [AddedToken(name, rstrip=True, special=True) for name in ("<|user|>", "<|assistant|>", "<|end|>")],
        special_tokens=True,
    )
    encoded = encode_row(chat_row("hi", "\n  It is 4.", "and?", " yes"), tokenizer)
    header = tokenizer.convert_tokens_to_ids("<|assistant|>")
    assert header in encoded.tokens and not encoded.loss_mask[encoded.tokens == header].any()
    assert trained_texts(encoded, tokenizer) == ["It is 4.<|end|>", "yes<|end|>"]


def test_a_tool_call_may_end_with_another_token(family):
    tokenizer = family("llama3")
    call = {"function": {"name": "f", "arguments": '{"x": 1}'}}
    row = {
        "messages": [
            {"role": "user", "content": "go"},
            {"role": "assistant", "content": None, "tool_calls": [call]},
            {"role": "tool", "content": "done"},
            {"role": "assistant", "content": "It is done."},
        ]
    }
    encoded = encode_row(row, tokenizer)
    assert trained_texts(encoded, tokenizer) == [
        '<|python_tag|>{"name": "f", "parameters": {"x": 1}}<|eom_id|>',
        "It is done.<|eot_id|>",
    ]


def test_several_spans_named_in_one_turn(family):
    """As TRL's training template for Phi-3: the EOS that closes the chat is marked too."""
    template = (
        "{% for m in messages %}{{ '<|' + m['role'] + '|>\n' }}"
        "{% if m['role'] == 'assistant' %}{% generation %}{{ m['content'] + '<|end|>\n' }}{% endgeneration %}"
        "{% else %}{{ m['content'] + '<|end|>\n' }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}"
        "{% else %}{% generation %}{{ eos_token }}{% endgeneration %}{% endif %}"
    )
    tokenizer = family("phi3")
    encoded = encode_row(TWO_TURNS, tokenizer, chat_template=template)
    assert trained_texts(encoded, tokenizer) == [*EXPECTED["phi3"], "<|endoftext|>"]


def test_an_end_of_turn_of_two_tokens(family):
    """As Cohere's Command R: the token that stops the model is the second."""
    template = (
        "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] }}"
        "{% if m['role'] == 'assistant' %}{{ '<|end_answer|>' }}{% endif %}{{ '<|im_end|>' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    )
    tokenizer = copy.deepcopy(family("smollm2"))
    tokenizer.add_special_tokens({"extra_special_tokens": ["<|end_answer|>"]})
    encoded = encode_row(TWO_TURNS, tokenizer, chat_template=template)
    ends = "<|end_answer|><|im_end|>"
    assert trained_texts(encoded, tokenizer) == [f"It is 4.{ends}", f"6\n\nSix — 六!{ends}"]
    assert ChatTemplate(tokenizer, ChatOptions(template=template)).shape.end.text == ends


def test_a_turn_that_runs_into_a_tools_answer_is_refused(family):
    """A template that closes the assistant's turn only after the tool has answered."""
    template = (
        "{% for m in messages %}"
        "{% if m['role'] == 'tool' %}{{ '<response>' + m['content'] + '</response>' }}"
        "{% else %}"
        "{% if not (loop.index0 and messages[loop.index0 - 1]['role'] == 'tool') %}"
        "{{ '<|im_start|>' + m['role'] + '\n' }}{% endif %}"
        "{{ m['content'] }}"
        "{% for call in m['tool_calls'] or [] %}{{ call['function'] | tojson }}{% endfor %}"
        "{% if not m['tool_calls'] %}{{ '<|im_end|>' }}{% endif %}"
        "{% endif %}{% endfor %}"
        "{% if add_generation_prompt and messages[-1]['role'] != 'tool' %}"
        "{{ '<|im_start|>assistant\n' }}{% endif %}"
    )
    row = {
        "messages": [
            {"role": "user", "content": "go"},
            {
                "role": "assistant",
                "content": "",
                "tool_calls": [{"function": {"name": "f", "arguments": {}}}],
            },
            {"role": "tool", "content": "done"},
            {"role": "assistant", "content": "It is done."},
        ]
    }
    with pytest.raises(RowError, match=r"messages\[1\]: is not closed by the end-of-turn token"):
        encode_row(row, family("smollm2"), chat_template=template)


def test_a_template_that_loses_tool_calls_is_refused(family):
    row = {
        "messages": [
            {"role": "user", "content": "go"},
            {
                "role": "assistant",
                "content": "",
                "tool_calls": [{"function": {"name": "f", "arguments": {}}}],
            },
        ]
    }
    with pytest.raises(RowError, match=r"messages\[1\].tool_calls: are not shown by this chat template"):
        encode_row(row, family("smollm2"))


@pytest.mark.parametrize("name", ["gemma", "llama2", "mistral"])
def test_two_user_turns_in_a_row_give_the_templates_own_message(name, family):
    row = {"messages": [{"role": "user", "content": "a"}, *chat_row("b", "c")["messages"]]}
    with pytest.raises(RowError, match="alternate"):
        encode_row(row, family(name))


def test_a_question_without_an_answer_at_the_end(smollm2):
    row = {"messages": [*TWO_TURNS["messages"], {"role": "user", "content": "and?"}]}
    assert trained_texts(encode_row(row, smollm2), smollm2) == EXPECTED["smollm2"]


def test_two_assistant_turns_in_a_row_and_an_assistant_first(smollm2):
    messages = [{"role": "assistant", "content": content} for content in ("Hello!", "How are you?")]
    row = {"messages": [messages[0], {"role": "user", "content": "hm"}, *messages]}
    texts = trained_texts(encode_row(row, smollm2), smollm2)
    assert texts == ["Hello!<|im_end|>", "Hello!<|im_end|>", "How are you?<|im_end|>"]


def test_weight_0_turns_off_a_turn(smollm2):
    row = chat_row("a", "bad", "b", "good")
    row["messages"][1]["weight"] = 0
    assert trained_texts(encode_row(row, smollm2), smollm2) == ["good<|im_end|>"]


def test_of_prompt_and_completion_messages_the_completion_is_trained(smollm2):
    messages = TWO_TURNS["messages"]
    encoded = encode_row({"prompt": messages[:3], "completion": messages[3:]}, smollm2)
    assert trained_texts(encoded, smollm2) == EXPECTED["smollm2"][-1:]
    assert encoded.tokens.tolist() == template_ids(TWO_TURNS, smollm2)


def test_a_template_without_an_end_of_turn_token_is_refused(smollm2):
    template = "{% for m in messages %}### {{ m['role'] }}\n{{ m['content'] }}\n\n{% endfor %}"
    with pytest.raises(InputError, match="would not learn to stop"):
        encode_row(TWO_TURNS, smollm2, chat_template=template)


def test_a_template_that_ends_only_the_last_turn(smollm2):
    template = "{% for m in messages %}### {{ m['role'] }}\n{{ m['content'] }}\n\n{% endfor %}{{ eos_token }}"
    with pytest.raises(InputError, match="only at the end of the chat"):
        encode_row(TWO_TURNS, smollm2, chat_template=template)
    row = {"messages": [*TWO_TURNS["messages"], {"role": "user", "content": "and?"}]}
    with pytest.raises(InputError, match="only at the end of the chat"):
        encode_row(row, smollm2, chat_template=template, train_on="last_turn")
    encoded = encode_row(TWO_TURNS, smollm2, chat_template=template, train_on="last_turn")
    assert trained_texts(encoded, smollm2) == ["6\n\nSix — 六!\n\n<|im_end|>"]


def test_a_base_model_needs_a_template(gemma_tokenizer):
    with pytest.raises(InputError, match=r"set data\.chat_template"):
        encode_row(TWO_TURNS, gemma_tokenizer)


def test_the_real_gemma_tokenizer_with_a_template_from_a_file(gemma_tokenizer):
    template = TEMPLATES / "gemma.jinja"
    encoded = encode_row(TWO_TURNS, gemma_tokenizer, chat_template=str(template))
    assert trained_texts(encoded, gemma_tokenizer) == EXPECTED["gemma"]
    assert encoded.tokens[:2].tolist() == [gemma_tokenizer.bos_token_id, 105]  # <start_of_turn>
    assert encoded.tokens.tolist() == gemma_tokenizer.apply_chat_template(
        TWO_TURNS["messages"], chat_template=template.read_text(), tokenize=True, return_dict=False
    )


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("no/such/file.jinja", "neither a file nor"),
        ("{% for %}", "check data.chat_template"),
        ("{{ messages[0]['content'] }}", "does not show the assistant"),
    ],
)
def test_bad_templates(template, message, smollm2):
    with pytest.raises(InputError, match=message):
        encode_row(TWO_TURNS, smollm2, chat_template=template)


def test_templates_run_in_the_sandbox(smollm2):
    template = "{{ messages.__class__.__mro__[1].__subclasses__() }}{{ messages[1]['content'] }}"
    with pytest.raises(InputError, match="unsafe"):
        encode_row(TWO_TURNS, smollm2, chat_template=template)


def test_metaspace_tokenizer():
    """A SentencePiece-like tokenizer, whose pieces carry the space before a word: "[/INST] Yes"."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    trainer = trainers.BpeTrainer(
        vocab_size=200, special_tokens=["<unk>", "<s>", "</s>"], show_progress=False
    )
    tokenizer.train_from_iterator(["[INST] Is it so? [/INST] Yes it is so </s>" * 3, "abc"], trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>"
    )
    fast.chat_template = (TEMPLATES / "llama2.jinja").read_text()
    row = chat_row("Is it so?", "Yes it is so", "so?", "Yes")
    encoded = encode_row(row, fast)
    assert [text.strip() for text in trained_texts(encoded, fast)] == ["Yes it is so </s>", "Yes </s>"]
    assert encoded.tokens.tolist() == template_ids(row, fast)


def test_the_end_of_turn_is_known_for_sampling(family):
    assert ChatTemplate(family("gemma")).shape.end.text == "<end_of_turn>"
    assert ChatTemplate(family("phi3")).shape.end.text == "<|end|>"
    assert ChatTemplate(family("llama3")).shape.tool_end.text == "<|eom_id|>"


def test_alpaca_is_encoded_within_seconds(smollm2, alpaca_path):
    import time

    conversations = [to_conversation(row) for row in json.loads(alpaca_path.read_text(encoding="utf-8"))]
    start = time.perf_counter()
    encoded = Encoder(smollm2).encode(conversations)
    assert time.perf_counter() - start < 10  # 0.3 s on an idle machine
    assert len(encoded) == 999


def test_a_template_that_never_ends_stops_the_reading_of_many_rows(smollm2):
    """Each such row is a bad one; after a few of them the others are not tried."""
    template = (
        "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}"
        "{% if m['content'] == 'long' %}{{ 'x' * 10**12 }}{% endif %}<|im_end|>{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    good, endless = (to_conversation(chat_row(text, "yes")) for text in ("short", "long"))
    encoder = Encoder(smollm2, chat=ChatOptions(template=template))
    first, second = encoder.encode([endless, good])
    assert isinstance(first, RowError) and "takes more than 5 s or" in first.reason
    assert isinstance(second, Encoded)
    with pytest.raises(
        InputError, match=r"cannot render 3 conversations, the last with 'yes': it takes more"
    ):
        encoder.encode([endless, endless])
