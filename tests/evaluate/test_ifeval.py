"""IFEval: every level on answers written by hand, the real prompts, and rows that are refused."""

from __future__ import annotations

import json
import sys

import pytest

from posttrain_jax.core.errors import InputError
from posttrain_jax.evaluate.completions import CompletionOptions
from posttrain_jax.evaluate.ifeval import (
    LEVELS,
    Checkers,
    IfevalPrompt,
    ifeval,
    levels,
    load_prompts,
    loose_variants,
    provide_sentence_model,
)
from posttrain_jax.rewards.thoughts import after_thought

NO_COMMA = ("punctuation:no_comma", {})
QUOTED = ("startend:quotation", {})
WING = ("keywords:existence", {"keywords": ["wing"]})
FIVE_WORDS = ("length_constraints:number_words", {"relation": "at least", "num_words": 5})


@pytest.fixture(scope="module")
def checkers():
    return Checkers()


def prompt_of(*instructions):
    names, arguments = zip(*instructions, strict=True)
    return IfevalPrompt("p", "here:1", "Say something.", names, arguments)


@pytest.mark.parametrize(
    ("instruction", "answer", "strict", "loose"),
    [
        (NO_COMMA, "a bird and a fish", True, True),
        (NO_COMMA, "a bird, a fish", False, False),
        (NO_COMMA, "Sure, here you go:\na bird and a fish", False, True),  # without its first line
        (NO_COMMA, "a bird and a fish\nI hope, it helps", False, True),  # without its last
        (NO_COMMA, "Well, then:\na bird\nSo, that is it", False, True),  # without both
        (NO_COMMA, "Well, then:\na bird, a fish\nSo, that is it", False, False),
        (QUOTED, '"to be"', True, True),
        (QUOTED, '*"to be"*', False, True),  # without asterisks
        (QUOTED, '**Of course**\n*"to be"*', False, True),  # without asterisks and first line
        (QUOTED, "to be", False, False),
        (WING, "a Wing and a beak", True, True),
        (WING, "a beak", False, False),
        (WING, "w*i*ng", False, True),
        (FIVE_WORDS, "one two three four five", True, True),
        (FIVE_WORDS, "one two three four", False, False),
        (NO_COMMA, "   ", False, False),  # an empty answer follows nothing
        (NO_COMMA, "<think>well, well</think>a bird", True, True),
        (NO_COMMA, "<think>well well", False, False),  # a thought that never ended is no answer
    ],
)
def test_one_instruction_strictly_and_loosely(checkers, instruction, answer, strict, loose):
    (check,) = checkers.check(prompt_of(instruction), after_thought(answer) or "")
    assert (check.strict, check.loose, check.error) == (strict, loose, None)


def test_the_four_levels_of_a_prompt(checkers):
    """The first line holds a comma, the rest does not; "wing" is there; there are no quotation marks. Strictly 1 of 3
    instructions are followed, loosely 2 of 3; without the third, loosely all."""
    answer = "Well, look:\na wing"
    found = levels(checkers.check(prompt_of(NO_COMMA, WING, QUOTED), answer))
    assert found == {
        "prompt_strict": (0.0, 1.0),
        "instruction_strict": (1.0, 3.0),
        "prompt_loose": (0.0, 1.0),
        "instruction_loose": (2.0, 3.0),
    }
    found = levels(checkers.check(prompt_of(NO_COMMA, WING), answer))
    assert [found[name] for name in LEVELS] == [(0.0, 1.0), (1.0, 2.0), (1.0, 1.0), (2.0, 2.0)]


def test_the_eight_variants_are_those_of_the_package(checkers):
    from if_verifiable.common import get_loose_transformations

    answer = "*first* line\nsecond\n\n**last** one "
    assert loose_variants(answer)[0] == answer
    assert sorted(loose_variants(answer)) == sorted(get_loose_transformations(answer))


def test_sentences_and_capitals_use_the_sentence_model(checkers, demo_path):
    demo_path("nltk_punkt_tab")
    provide_sentence_model()
    two = ("length_constraints:number_sentences", {"relation": "less than", "num_sentences": 3})
    shout = ("change_case:capital_word_frequency", {"capital_relation": "at least", "capital_frequency": 2})
    checks = checkers.check(prompt_of(two, shout), "Dr. Smith went home. He SAW IT.")
    assert [(check.strict, check.error) for check in checks] == [(True, None), (True, None)]
    checks = checkers.check(prompt_of(two, shout), "One. Two. Three. FOUR.")
    assert [(check.strict, check.error) for check in checks] == [(False, None), (False, None)]


def test_a_check_that_fails_to_run_is_counted_and_not_followed(checkers):
    (check,) = checkers.check(prompt_of(("keywords:existence", {"keywords": ["("]})), "a (b")
    assert not check.strict and not check.loose
    assert "error" in check.error


def test_the_language_is_the_same_every_time(checkers):
    german = ("language:response_language", {"language": "de"})
    answers = ["Das ist ein See in den Bergen, und er ist sehr tief.", "This is a lake in the mountains."]
    for _ in range(3):
        assert [checkers.check(prompt_of(german), answer)[0].strict for answer in answers] == [True, False]


def test_the_real_prompts(checkers, demo_path):
    demo_path("ifeval"), demo_path("nltk_punkt_tab")
    prompts = load_prompts("asset:ifeval", checkers).items
    names = [name for prompt in prompts for name in prompt.instructions]
    assert (len(prompts), len(names), len(set(names))) == (541, 834, 25)
    assert set(names) == set(checkers.types())
    checks = [check for prompt in prompts for check in checkers.check(prompt, "A short answer.\n\nIt ends.")]
    assert [check.error for check in checks if check.error] == []
    assert 0 < sum(check.strict for check in checks) < len(checks)
    assert len(load_prompts("asset:ifeval", checkers, first=3).items) == 3


def write(path, *rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


GOOD = {
    "key": 7,
    "prompt": "Say a word.",
    "instruction_id_list": ["punctuation:no_comma", "startend:quotation"],
    "kwargs": [{}, {"first_word": None}],
}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"prompt": None}, "line 2, prompt: is missing"),
        ({"prompt": " "}, "line 2, prompt: is empty"),
        ({"prompt": ["a"]}, "line 2, prompt: is a list, not text"),
        ({"instruction_id_list": [["a"]], "kwargs": [{}]}, r"holds \['a'\]; the known types"),
        ({"instruction_id_list": None}, "line 2, instruction_id_list: is missing"),
        ({"instruction_id_list": []}, "must be a list of instruction types"),
        ({"instruction_id_list": ["no:such", "x:y"]}, "holds 'no:such'; the known types are change_case:"),
        ({"kwargs": [{}]}, "line 2, kwargs: must be a list with one object for each instruction"),
        ({"kwargs": [{}, 3]}, "kwargs: must hold objects"),
        ({"kwargs": [{}, {"words": 3}]}, r"kwargs\[1\]: does not suit startend:quotation"),
        ({"key": 6}, "line 2, key: is 6, which an earlier row has"),
    ],
)
def test_a_row_that_is_none_of_ifeval_is_refused_by_line(checkers, tmp_path, change, words):
    source = write(tmp_path / "p.jsonl", {**GOOD, "key": 6}, {**GOOD, **change})
    with pytest.raises(InputError, match=words):
        load_prompts(source, checkers)
    found = load_prompts(source, checkers, on_bad_row="skip")
    assert ([prompt.key for prompt in found.items], found.skipped) == ([6], 1)


def test_sources_without_rows_are_refused(checkers, tmp_path):
    (tmp_path / "empty.jsonl").write_text("")
    with pytest.raises(InputError, match="empty"):
        load_prompts(str(tmp_path / "empty.jsonl"), checkers)
    with pytest.raises(InputError, match="none of the 1 rows can be used"):
        load_prompts(write(tmp_path / "bad.jsonl", {"a": 1}), checkers, on_bad_row="skip")
    with pytest.raises(InputError, match="no asset named 'nothing'"):
        load_prompts("asset:nothing", checkers)
    with pytest.raises(InputError, match=r"data.first is -1"):
        load_prompts(write(tmp_path / "good.jsonl", GOOD), checkers, first=-1)


def test_a_missing_package_is_said_in_one_sentence(monkeypatch):
    monkeypatch.setitem(sys.modules, "langdetect", None)
    with pytest.raises(InputError, match=r"if-verifiable .*install it with pip install -e '\.\[eval\]'"):
        Checkers()


def test_a_model_is_asked_and_judged(parrot, checkers, tmp_path):
    """The model repeats the prompt's last letter: "ggg" holds no comma and no quotation marks, ",,," is all commas."""
    rows = [
        {**GOOD, "key": "dog", "prompt": "dog"},
        {
            **GOOD,
            "key": "comma",
            "prompt": "a,",
            "instruction_id_list": ["punctuation:no_comma"],
            "kwargs": [{}],
        },
    ]
    prompts = load_prompts(write(tmp_path / "p.jsonl", *rows), checkers)
    seen = []
    result = ifeval(
        parrot,
        prompts,
        checkers,
        CompletionOptions(max_new_tokens=3, render="text"),
        progress=lambda *counts: seen.append(counts),
    )
    assert [row["answer"] for row in result.rows] == ["ggg", ",,,"]
    assert {name: found.value for name, found in result.metrics.items()} == {
        "prompt_strict": 0.0,
        "instruction_strict": pytest.approx(1 / 3),
        "prompt_loose": 0.0,
        "instruction_loose": pytest.approx(1 / 3),
    }
    assert result.by_type == {
        "punctuation:no_comma": {"count": 2, "strict": 1, "loose": 1},
        "startend:quotation": {"count": 1, "strict": 0, "loose": 0},
    }
    assert result.counts == {"rows": 2, "skipped_rows": 0, "instructions": 3, "errors": 0, "unfinished": 2}
    assert seen[-1] == (2, 2)
    assert json.loads(json.dumps(result.rows))[0]["metrics"]["instruction_strict"] == [1.0, 2.0]
