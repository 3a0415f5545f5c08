"""Rendering chat templates: as transformers does, and within limits."""

from __future__ import annotations

import datetime
import pathlib
import threading
import time

import pytest

from posttrain_jax.core.errors import InputError
from posttrain_jax.data.chat_template import (
    ChatOptions,
    Template,
    TemplateRefusalError,
    read_variables,
    resolve_template,
    shown_dates,
)
from posttrain_jax.models.io.byte_tokenizer import byte_tokenizer

TEMPLATES = pathlib.Path(__file__).parent / "templates"

MESSAGES = [
    {"role": "user", "content": "Hé <b>?"},
    {"role": "assistant", "content": "<think>\nhm\n</think>\n\nNo.", "name": None},
    {"role": "user", "content": "Why?"},
    {"role": "assistant", "content": "Because.", "reasoning_content": "well"},
]
TOOLS = [{"type": "function", "function": {"name": "f", "parameters": {"b": 1, "a": "é"}}}]
FEATURES = (
    "{% set ns = namespace(found=false) %}{% for m in messages %}{% if m.role == 'user' %}{% set ns.found = true %}"
    "{% continue %}{% endif %}{% if loop.last %}{% break %}{% endif %}\n  {{ m.content | trim }}{{ 1 ~ 'a' ~ none }}"
    "{% endfor %}{{ ns.found }}{{ tools | tojson(indent=2) }}{{ dict(a=1) }}{{ 'x' * 3 + 'y' }}{{ 2 ** 3 }}"
    "{{ messages[1].get('thinking') }}{{ messages[3]['thinking'] }}{{ documents is none }}{{ eos_token }}"
    "{% macro f(n) %}{{ n }}{% if n %}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(3) }}{{ dict.fromkeys('ab') }}"
    "{% generation %}{{ messages[1].content }}{% endgeneration %}{{ messages | map(attribute='role') | list }}"
)


@pytest.fixture(scope="module")
def tokenizer():
    made = byte_tokenizer()
    made.bos_token = "<|endoftext|>"
    return made


@pytest.mark.parametrize(
    "source", [FEATURES, *(path.read_text() for path in sorted(TEMPLATES.glob("*.jinja")))]
)
@pytest.mark.parametrize("prompt", [True, False])
def test_the_text_is_that_of_transformers(source, prompt, tokenizer):
    expected = tokenizer.apply_chat_template(
        MESSAGES, tools=TOOLS, chat_template=source, add_generation_prompt=prompt, tokenize=False
    )
    assert Template(source, tokenizer).render(MESSAGES, TOOLS, prompt=prompt).text == expected


def test_a_developer_is_the_system_unless_the_template_knows_the_role(tokenizer):
    """A comment, or a default prompt, with the word in it says nothing of roles."""
    said = [{"role": "developer", "content": "D"}, *MESSAGES[:1]]
    prose = "{# for the developer #}You help a developer. {% for m in messages %}{{ m.role }} {% endfor %}"
    assert Template(prose, tokenizer).render(said).text == "You help a developer. system user "
    for literal in ("'developer'", '"developer"'):
        knows = f"{{% for m in messages if m.role in [{literal}, 'user'] %}}{{{{ m.role }}}} {{% endfor %}}"
        assert Template(knows, tokenizer).render(said).text == "developer user "


def test_places_of_generation_blocks(tokenizer):
    template = Template(
        "a{% for m in messages %}b{% generation %}{{ m.role }}{% endgeneration %}{% endfor %}c", tokenizer
    )
    for _ in range(2):  # the second rendering remembers nothing of the first
        rendered = template.render(MESSAGES[:2])
        assert rendered.text == "abuserbassistantc"
        assert [rendered.text[start:stop] for start, stop in rendered.generated] == ["user", "assistant"]


ENDLESS = (
    "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
    "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(60) }}",
    "{% for i in range(99999) if range(99999) | sum %}{% endfor %}",
    "{{ range(99999) | map('center', 99999) | list }}",
    "{{ messages | slice(10 ** 12) | list }}",
    "{% set n = namespace(x='ab') %}{% for i in range(99) %}{% set n.x = n.x ~ n.x %}{% endfor %}",
    "{% set n = namespace(x='ab') %}{% for i in range(99) %}{% set n.x = n.x + n.x %}{% endfor %}",
    "{% set n = namespace(x=9) %}{% for i in range(99) %}{% set n.x = n.x * n.x %}{% endfor %}",
    "{{ 'a' * 10 ** 12 }}",
    "{{ 10 ** (10 ** 10) }}",
    "{{ 'a'.center(10 ** 12) }}",
    "{% for i in range(99999) %}{{ 'aaaaaaaaaaaaaaaaaaaa' * 999 }}{% endfor %}",
)


@pytest.mark.parametrize("source", ENDLESS)
def test_what_does_not_end_is_stopped(source, tokenizer):
    start = time.thread_time()
    with pytest.raises(TemplateRefusalError, match="takes more than 0.05 s or"):
        Template(source, tokenizer, seconds=0.05).render(MESSAGES)
    assert time.thread_time() - start < 2  # joining 64 million characters takes a part of a second


def test_a_thread_is_stopped_and_the_next_rendering_has_its_own_time(tokenizer):
    """As the server renders: in threads, side by side."""
    refused: list[str] = []

    def render() -> None:
        try:
            Template(ENDLESS[0], tokenizer, seconds=0.05).render(MESSAGES)
        except TemplateRefusalError as error:
            refused.append(str(error))

    threads = [threading.Thread(target=render) for _ in range(3)]
    for thread in threads:
        thread.start()
    assert Template("{{ messages[0].role }}", tokenizer, seconds=5).render(MESSAGES).text == "user"
    for thread in threads:
        thread.join(20)
    assert len(refused) == 3


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        ("{{ 1 / 0 }}", "ZeroDivisionError: division by zero"),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "RecursionError"),
        ("{% for x in [1] recursive %}{{ loop([1]) }}{% endfor %}", "RecursionError"),
        ("{{ range(10 ** 12) }}", "OverflowError: Range too big"),
        ("{{ none.strip() }}", "None' has no attribute 'strip'|None has no element"),
        ("{{ nothing.x }}", "'nothing' is undefined"),
        ("{{ messages[0].content + 1 }}", "TypeError: "),
        ("{{ raise_exception('only\nusers') }}", "^only$"),
        ("{{ messages.append(1) }}", "unsafe"),
        ("{% include 'x' %}", "no loader"),
        ("{% set n = namespace(__class__=1) %}", "cannot hold '__class__'"),
        ("{{ lipsum(n=10 ** 7) }}", "'lipsum' is undefined"),
    ],
)
def test_errors_are_one_sentence(source, reason, tokenizer):
    with pytest.raises(TemplateRefusalError, match=reason) as error:
        Template(source, tokenizer).render(MESSAGES)
    assert "\n" not in str(error.value)


def test_a_call_without_content_is_rendered_where_the_template_reads_content(tokenizer):
    """OpenAI's rows have `"content": null` beside tool_calls; R1's template asks for just that, others add it."""
    call = {"type": "function", "function": {"name": "f", "arguments": {}}}
    messages = [
        {"role": "user", "content": "hi"},
        {"role": "assistant", "content": None, "tool_calls": [call]},
    ]
    reads = (
        "{% for m in messages %}<{{ m.role }}>{{ m['content'] + (m.tool_calls[0].function.name if m.tool_calls else '')"
        " }}{% endfor %}"
    )
    assert Template(reads, tokenizer).render(messages).text == "<user>hi<assistant>f"
    asks = "{% for m in messages %}{{ 'no content' if m.content is not defined else m.content }} {% endfor %}"
    assert Template(asks, tokenizer).render(messages).text == "hi no content "


def test_an_error_never_echoes_a_long_text(tokenizer):
    with pytest.raises(TemplateRefusalError) as error:
        Template("{{ raise_exception(messages[0].content) }}", tokenizer).render(
            [{"role": "user", "content": "x" * 10**6}]
        )
    assert len(str(error.value)) < 400


def test_text_that_is_no_template(tokenizer):
    nested = ["{{ " + "(" * n + "1" + ")" * n + " }}" for n in (5000,)]
    nested += ["{% for i in x %}" * n + "{% endfor %}" * n for n in (40, 3000)]
    for source in ("{% for %}", "{{ (", "{% generation %}", *nested):
        with pytest.raises(InputError, match=r"cannot be read: .*check data\.chat_template"):
            Template(source, tokenizer)


def test_variables_reach_the_template_and_unknown_ones_are_refused(tokenizer):
    source = (
        "{% if not date is defined %}{% set date = 'none' %}{% endif %}{{ date }}"
        "{% if enable_thinking is defined and not enable_thinking %}off{% endif %}{{ raise_exception is defined }}"
    )
    variables = {"enable_thinking": False, "date": "now"}
    assert Template(source, tokenizer, variables=variables).render(MESSAGES).text == "nowoffTrue"
    assert Template(source, tokenizer).render(MESSAGES).text == "noneTrue"
    for name in ("enable_thinkin", "messages", "raise_exception", "eos_token", "range"):
        with pytest.raises(InputError, match=f"no variable '{name}'; it has date, enable_thinking"):
            Template(source, tokenizer, variables={name: 1})
    with pytest.raises(InputError, match="no variable 'x'; it has none"):
        Template("{{ messages }}", tokenizer, variables={"x": 1})


def test_the_date_is_the_one_that_is_given(tokenizer):
    now = datetime.datetime(2024, 7, 26, 13, 5)
    source = "{% if strftime_now is defined %}{{ strftime_now('%d %b %Y') }}{% endif %}"
    assert Template(source, tokenizer, now=now).render(MESSAGES).text == "26 Jul 2024"
    today = datetime.datetime.now().strftime("%d %b %Y")
    assert Template(source, tokenizer).render(MESSAGES).text in (
        today,
        datetime.datetime.now().strftime("%d %b %Y"),
    )
    assert shown_dates(source, now) == ["26 Jul 2024"]
    assert shown_dates("{% set f = '%Y' %}{{ strftime_now(f) }}", now) == [now.isoformat()]
    assert shown_dates("{{ 'the date' }}", now) == []


def test_named_templates(tokenizer):
    several = byte_tokenizer()
    several.chat_template = {
        "default": "D{{ messages }}",
        "tool_use": "T{{ tools }}",
        "rag": "R{{ documents }}",
    }
    assert resolve_template(several)[0] == "D" and resolve_template(several, tools=True)[0] == "T"
    assert resolve_template(several, "rag", tools=True)[0] == "R"
    del several.chat_template["default"]
    assert resolve_template(several, tools=True)[0] == "T"
    with pytest.raises(InputError, match="templates rag, tool_use and none named default"):
        resolve_template(several)


def test_variables_as_text():
    assert read_variables('{"enable_thinking": false}', "x") == {"enable_thinking": False}
    assert read_variables(" ", "x") == {}
    for text in ("{", "[1]", "no"):
        with pytest.raises(InputError, match="data.x is .*must be a JSON object"):
            read_variables(text, "data.x")


def test_text_as_is_one_of_two():
    with pytest.raises(InputError, match=r"data\.text_as is 'chats'; it must be one of plain, chat"):
        ChatOptions(text_as="chats")


@pytest.mark.parametrize(
    ("template", "reason"),
    [
        ("no/such/file", "neither a file nor"),
        ("x" * 5000, "neither a file nor"),
        ("/", "neither a file nor"),
        ("a\0b", "neither a file nor"),
        ("~nobody-at-all/x", "neither a file nor"),
    ],
)
def test_what_is_no_template_is_one_short_sentence(template, reason, tokenizer):
    with pytest.raises(InputError, match=reason) as error:
        resolve_template(tokenizer, template)
    assert len(str(error.value)) < 300


def test_a_file_that_is_not_text(tokenizer, tmp_path):
    (tmp_path / "t.jinja").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(InputError, match="is not UTF-8 text"):
        resolve_template(tokenizer, str(tmp_path / "t.jinja"))


def test_a_date_format_that_is_none_shows_nothing_and_breaks_nothing(tokenizer):
    source = "{{ strftime_now('\ud800') }}"
    assert shown_dates(source, datetime.datetime(2024, 1, 1)) in (["2024-01-01T00:00:00"], ["\ud800"])
