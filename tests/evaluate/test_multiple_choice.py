"""Multiple choice against log-probabilities from whole softmaxes, one forward pass for each choice."""

from __future__ import annotations

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE
from transformers import PreTrainedTokenizerFast

from posttrain_jax.core.errors import InputError
from posttrain_jax.core.sharding import make_mesh, tree_shardings
from posttrain_jax.evaluate.multiple_choice import (
    Question,
    load_questions,
    multiple_choice,
)
from posttrain_jax.evaluate.tasks import Items
from posttrain_jax.sampling.choices import choice_logps, encode_choices


def encode(loaded, question, *, chat):
    return encode_choices(loaded, question.prompt, question.choices, chat=chat, name=question.where)


QUESTIONS = [
    Question("a", "q:1", "The sky is", ("blue", "a deep and lasting green", "é"), 0),
    Question("b", "q:2", "Two and two make ", ("four", "five"), 1),
    Question(
        "c", "q:3", "A question that is longer than the others, to be sure, is", ("rare", "no", "so", "x"), 2
    ),
]


def by_hand(loaded, ids, shared):
    """Sum of log softmax over the whole vocabulary, at the places of the tokens after the first `shared`."""
    logits = np.asarray(loaded.apply(loaded.params, jnp.asarray([ids])).logits_BTV[0], np.float64)
    logps = logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))
    return sum(logps[t - 1, ids[t]] for t in range(shared, len(ids)))


@pytest.mark.parametrize("batch_rows", [1, 8])
def test_log_probabilities_are_those_of_the_whole_softmax(loaded, batch_rows):
    encoded = [encode(loaded, question, chat=False) for question in QUESTIONS]
    found = choice_logps(loaded, encoded, batch_rows=batch_rows)
    assert [len(logps) for logps in found] == [3, 2, 4]
    for question, item, logps in zip(QUESTIONS, encoded, found, strict=True):
        space = "" if question.prompt.endswith(" ") else " "
        for text, logp in zip(question.choices, logps, strict=True):
            prompt = loaded.tokenizer(question.prompt.rstrip())["input_ids"]
            whole = loaded.tokenizer(question.prompt + space + text)["input_ids"]
            assert logp == pytest.approx(by_hand(loaded, whole, len(prompt)), rel=1e-5)
        assert item.shared == len(
            question.prompt.rstrip()
        )  # one token a byte; the space belongs to the choice


@pytest.mark.parametrize("prompt", ["Q: 2+2=\n", "Q: 2+2= \n\t", "Two and two make ", "Q: 2+2="])
def test_question_and_choice_are_divided_as_lm_eval_divides_them(loaded, prompt):
    """One token a byte: "Q: 2+2=" has 7, and its newline is the first token of every choice."""
    model = pytest.importorskip("lm_eval.api.model", reason="lm_eval is not installed (the extra harness)")

    class LmEval(model.TemplateLM):
        backend = "causal"
        eot_token_id = loglikelihood_rolling = generate_until = _loglikelihood_tokens = None

        def tok_encode(self, text):
            return list(loaded.tokenizer(text)["input_ids"])

    choices = ("4", "5", "22")
    encoded = encode(loaded, Question("q", "q:1", prompt, choices, 0), chat=False)
    assert encoded.shared == len(prompt.rstrip())
    between = "" if prompt[-1].isspace() else " "
    for ids, text in zip(encoded.tokens, choices, strict=True):
        question, choice = LmEval()._encode_pair(prompt, between + text)
        assert (ids[: encoded.shared].tolist(), ids[encoded.shared :].tolist()) == (question, choice)


def test_a_mesh_changes_nothing(loaded):
    mesh = make_mesh(data=2, fsdp=2, tensor=2)
    params = jax.device_put(loaded.params, tree_shardings(loaded.params, mesh))
    encoded = [encode(loaded, question, chat=False) for question in QUESTIONS]
    whole = choice_logps(loaded, encoded)
    sharded = choice_logps(dataclasses.replace(loaded, params=params), encoded, batch_rows=3, mesh=mesh)
    np.testing.assert_allclose(np.concatenate(whole), np.concatenate(sharded), rtol=1e-5)


def merging_tokenizer():
    """One token a byte, and one for a space with "a" after it."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {character: index for index, character in enumerate([*alphabet, "Ġa"])}
    tokenizer = Tokenizer(BPE(vocab=vocabulary, merges=[("Ġ", "a")]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, clean_up_tokenization_spaces=False)


def test_a_token_over_the_boundary_moves_it_for_every_choice(loaded):
    """Between prompt x and choice ab stands a space, and x, Ġa, b are the tokens; with choice cd they are x, Ġ, c, d.
    Both are scored as what follows x, also where the prompt ends with the space, and so is encoded as x, Ġ."""
    merging = dataclasses.replace(loaded, tokenizer=merging_tokenizer())
    for prompt in ("x", "x "):
        question = Question("q", "q:1", prompt, ("ab", "cd"), 0)
        encoded = encode(merging, question, chat=False)
        assert [len(ids) for ids in encoded.tokens] == [3, 4]
        assert encoded.shared == 1
        (logps,) = choice_logps(merging, [encoded])
        for ids, logp in zip(encoded.tokens, logps, strict=True):
            assert logp == pytest.approx(by_hand(merging, ids.tolist(), 1), rel=1e-5)


def test_after_a_chat_template_the_choice_is_what_the_assistant_writes(loaded):
    question = Question("q", "q:1", "Hi?", ("yes", "no"), 0)
    encoded = encode(loaded, question, chat=True)
    header = "<|im_start|>user\nHi?<|im_end|>\n<|im_start|>assistant\n"
    assert [loaded.tokenizer.decode(ids) for ids in encoded.tokens] == [f"{header}yes", f"{header}no"]
    assert loaded.tokenizer.decode(encoded.tokens[0][: encoded.shared]) == header


def test_the_metrics_follow_from_the_log_probabilities(loaded):
    """acc takes the largest log-probability, acc_norm divides by characters, acc_bytes by bytes ("é" has two)."""
    result = multiple_choice(loaded, Items(QUESTIONS, 5))
    for name, length in (
        ("acc", lambda text: 1),
        ("acc_norm", len),
        ("acc_bytes", lambda text: len(text.encode())),
    ):
        right = [
            max(range(len(row["choices"])), key=lambda n: row["logps"][n] / length(row["choices"][n]))
            == row["right"]
            for row in result.rows
        ]
        assert result.metrics[name].value == pytest.approx(sum(right) / 3)
        assert [row["metrics"][name] for row in result.rows] == [(float(one), 1.0) for one in right]
    assert result.counts == {"rows": 3, "skipped_rows": 5, "choices": 9}
    assert len({row["best"]["acc"] != row["best"]["acc_norm"] for row in result.rows}) == 2  # they do differ


def test_a_right_choice_that_stands_there_twice_is_right_in_either_place(loaded):
    """Equal choices have equal log-probabilities, and the first of equals counts as the best."""
    twice = Question("q", "q:1", "The sky is", ("blue", "blue"), 1)
    (row,) = multiple_choice(loaded, Items([twice], 0)).rows
    assert row["logps"][0] == pytest.approx(row["logps"][1], rel=1e-6)
    assert row["metrics"] == {"acc": (1.0, 1.0), "acc_norm": (1.0, 1.0), "acc_bytes": (1.0, 1.0)}


def write(path, *rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def load(source, **options):
    return load_questions(source, prompt="{question}", choices="choices", answer="answer", **options)


@pytest.mark.parametrize(
    ("choices", "answer", "texts", "right"),
    [
        (["a cat", "a dog"], "B", ("a cat", "a dog"), 1),
        (["a cat", "a dog"], "a dog", ("a cat", "a dog"), 1),
        (["1", "0"], "0", ("1", "0"), 1),  # the text comes before the place
        (["B", "A"], "A", ("B", "A"), 1),  # and before the letter
        ({"text": ["a cat", "a dog"], "label": ["1", "2"]}, "2", ("a cat", "a dog"), 1),  # ARC
        ({"text": ["a cat", "a dog"], "label": [1, 2]}, 1, ("a cat", "a dog"), 0),
        ("A. a cat\nB. a dog", "B. a dog", ("a cat", "a dog"), 1),
        ("\nA. a cat \nB. a dog\nwith spots", "B. a dog\nwith spots", ("a cat", "a dog\nwith spots"), 1),
    ],
)
def test_how_choices_and_answers_are_written(tmp_path, choices, answer, texts, right):
    source = write(tmp_path / "q.jsonl", {"question": "Which?", "choices": choices, "answer": answer})
    (question,) = load(source).items
    assert (question.choices, question.right, question.key) == (texts, right, 0)


@pytest.mark.parametrize(
    ("answers", "right"),
    [
        ([1, 0, 3, 2], [1, 0, 3, 2]),
        ([1, 2, 4, 3], [0, 1, 3, 2]),
        (["1", "2", "4", "D"], [0, 1, 3, 3]),
        ([1, "d", 0], [1, 3, 0]),
    ],
)
def test_numbers_count_from_0_or_1_as_all_rows_together_say(tmp_path, answers, right):
    """Also where the rows that tell are not among those that are asked."""
    choices = ["a", "b", "c", "d"]
    rows = [{"question": "Which?", "choices": choices, "answer": answer} for answer in answers]
    source = write(tmp_path / "q.jsonl", *rows)
    assert [question.right for question in load(source).items] == right
    assert [question.right for question in load(source, first=1).items] == right[:1]


def test_numbers_that_could_count_from_0_and_from_1_are_refused(tmp_path):
    rows = [{"question": "Which?", "choices": ["a", "b", "c", "d"], "answer": n} for n in (1, 3)]
    source = write(tmp_path / "q.jsonl", *rows)
    with pytest.raises(InputError, match="count the choices from 0 or from 1.*set data.count_from to 0 or 1"):
        load(source)
    assert [question.right for question in load(source, count_from="0").items] == [1, 3]
    assert [question.right for question in load(source, count_from="1").items] == [0, 2]
    with pytest.raises(InputError, match="data.count_from is '2'; use one of auto, 0, 1"):
        load(source, count_from="2")
    with pytest.raises(InputError, match=r"is 4, which is no choice: .*place \(from 0\)"):
        load(write(tmp_path / "more.jsonl", *rows, {**rows[0], "answer": 4}), count_from="0")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"choices": None}, "line 2, choices: is missing"),
        ({"answer": None}, "line 2, answer: is missing"),
        ({"question": None}, "line 2, question: is missing"),
        ({"choices": ["one"]}, "has 1 choices; there must be at least 2"),
        ({"choices": "no letters"}, "has 0 choices"),
        ({"choices": ["a", ""]}, "none of them empty"),
        ({"choices": {"text": ["a", "b"], "label": ["x", "x"]}}, "one label for each choice"),
        ({"choices": {"text": ["a", "b"], "label": 7}}, "one label for each choice"),
        ({"answer": 2}, "is 2, which is no choice"),
        ({"answer": -1}, "is -1, which is no choice"),
        ({"answer": "C"}, "is 'C', which is no choice"),
        ({"answer": True}, "is True, which is no choice"),
    ],
)
def test_a_row_that_is_no_question_is_refused_by_line(tmp_path, change, words):
    good = {"question": "Which?", "choices": ["a", "b"], "answer": 0}
    source = write(tmp_path / "q.jsonl", good, {**good, **change})
    with pytest.raises(InputError, match=words):
        load(source)
    assert load(source, on_bad_row="skip").skipped == 1


def test_real_questions(demo_path):
    demo_path("openbookqa"), demo_path("commonsenseqa")
    books = load_questions("asset:openbookqa", prompt="{question}", choices="options", answer="answer").items
    assert len(books) == 500 and {len(question.choices) for question in books} == {4}
    assert books[2].prompt == "Predators eat " and books[2].choices[books[2].right] == "bunnies"
    sense = load_questions("asset:commonsenseqa", prompt="{question}", choices="options", answer="answer")
    assert len(sense.items) == 1221
    assert sense.items[0].choices == ("bank", "library", "department store", "mall", "new york")


def test_what_the_model_cannot_take_is_refused(loaded):
    def asked(prompt, *choices, **options):
        return multiple_choice(loaded, Items([Question("q", "f.jsonl:3", prompt, choices, 0)], 0), **options)

    with pytest.raises(InputError, match=r"f\.jsonl:3 has 206 tokens with the choice .*context of 128"):
        asked("Which?", "a", "w" * 199)
    with pytest.raises(InputError, match="eval.batch_rows is 0"):
        asked("Which?", "a", "b", batch_rows=0)
    with pytest.raises(InputError, match="data.render is 'html'"):
        asked("Which?", "a", "b", render="html")
    broken = dataclasses.replace(loaded, params=jax.tree.map(lambda leaf: leaf * jnp.nan, loaded.params))
    with pytest.raises(InputError, match="not finite"):
        choice_logps(broken, [encode(loaded, QUESTIONS[0], chat=False)])
