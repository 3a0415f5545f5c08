"""Groups as rows: a hand-made row, what every group needs, the real demo pairs, truncation, and the store."""

from __future__ import annotations

import numpy as np
import pytest

from posttrain_jax.core.errors import InputError
from posttrain_jax.data.loader import Loader
from posttrain_jax.data.preference_rows import PreferenceRows, pack_groups, row_shape
from posttrain_jax.data.rows import ColumnNames
from posttrain_jax.data.split import hold_out
from posttrain_jax.data.tokenized import TokenizeOptions
from posttrain_jax.data.tokenized_preferences import build_preferences
from posttrain_jax.models.io.byte_tokenizer import byte_tokenizer

PAIR = {"prompt": "abcd", "chosen": "xy", "rejected": "z"}


@pytest.fixture(scope="module")
def tokenizer():
    return byte_tokenizer()


def built(write_jsonl, tokenizer, tmp_path, *rows, **options):
    return build_preferences(
        write_jsonl(*rows), tokenizer, TokenizeOptions(**options), cache_dir=tmp_path / "cache"
    )


def test_a_row_with_a_shared_prompt(write_jsonl, tokenizer, tmp_path):
    """abcd: the prompt without its last token is shared; d, which predicts x and z, opens both branches."""
    data = built(write_jsonl, tokenizer, tmp_path, PAIR)
    shape = row_shape([data], groups=2, length=16)
    rows = PreferenceRows(data.sources[0], shape)
    arrays = rows.collate([None, rows[0]])
    prompt = tokenizer("abcd")["input_ids"]
    bos = len(prompt) - 4  # tokens before the text
    shared = bos + 3
    x, y, z = tokenizer("xyz", add_special_tokens=False)["input_ids"]
    eos = tokenizer.eos_token_id
    want = [*prompt[:-1], prompt[-1], x, y, eos, prompt[-1], z, eos]
    n = len(want)
    np.testing.assert_array_equal(arrays["tokens"][0, :n], want)
    np.testing.assert_array_equal(arrays["branches"][0, :n], [0] * shared + [1] * 4 + [2] * 3)
    np.testing.assert_array_equal(
        arrays["positions"][0, :n], [*range(shared), *range(shared, shared + 4), *range(shared, shared + 3)]
    )
    np.testing.assert_array_equal(arrays["loss_mask"][0, :n], [0] * shared + [0, 1, 1, 1] + [0, 1, 1])
    np.testing.assert_array_equal(arrays["segment_ids"][0], [1] * n + [0] * (16 - n))
    np.testing.assert_array_equal(arrays["last_token_index"][0, :2], [shared + 3, shared + 6])
    np.testing.assert_array_equal(arrays["lengths"][0, :2], [3, 2])
    assert (arrays["better"][0, 0], arrays["worse"][0, 0], arrays["weights"][0, 0]) == (0, 1, 1)
    assert not arrays["segment_ids"][1].any() and not arrays["weights"][1].any()


def test_a_completion_ends_with_its_end_of_turn(write_jsonl, tokenizer, tmp_path):
    """ChatML writes a newline after <|im_end|>, which nobody is trained on: a reward is read where it is read of an
    answer that a policy wrote, at the end of the turn."""
    chats = {
        side: [{"role": "assistant", "content": text}] for side, text in (("chosen", "xy"), ("rejected", "z"))
    }
    row = {"prompt": [{"role": "user", "content": "abcd"}], **chats}
    rendered = tokenizer.apply_chat_template([*row["prompt"], *row["chosen"]], tokenize=False)
    assert not rendered.endswith(tokenizer.eos_token), (
        "nothing follows the end of turn, so this shows nothing"
    )
    data = built(write_jsonl, tokenizer, tmp_path, row)
    rows = PreferenceRows(data.sources[0], row_shape([data], groups=1))
    arrays = rows.collate([rows[0]])
    ends = arrays["last_token_index"][0, :2]
    assert arrays["loss_mask"][0, ends].tolist() == [1, 1]
    assert arrays["tokens"][0, ends].tolist() == [tokenizer.eos_token_id] * 2
    assert arrays["lengths"][0, :2].tolist() == [3, 2]


def test_an_unshared_row_repeats_the_prompt(write_jsonl, tokenizer, tmp_path):
    data = built(write_jsonl, tokenizer, tmp_path, PAIR)
    shape = row_shape([data], groups=1, share_prompt=False)
    rows = PreferenceRows(data.sources[0], shape)
    arrays = rows.collate([rows[0]])
    first, second = data.sources[0].group(0).sequences
    n = len(first.tokens)
    np.testing.assert_array_equal(arrays["tokens"][0, :n], first.tokens)
    np.testing.assert_array_equal(arrays["tokens"][0, n : n + len(second.tokens)], second.tokens)
    assert set(arrays["segment_ids"][0]) == {0, 1, 2}


def test_rows_of_many_groups_lose_nothing(write_jsonl, tokenizer, tmp_path):
    """Every completion of 20 prompts is found once, token for token, in at most as many rows as groups."""
    rng = np.random.default_rng(0)
    rows = [
        {
            "prompt": "p" * int(rng.integers(1, 30)) + str(i),
            "completions": ["c" * int(rng.integers(1, 20)) + str(k) for k in range(int(rng.integers(2, 5)))],
            "scores": None,
        }
        for i in range(20)
    ]
    for row in rows:
        row["scores"] = [float(k) for k in range(len(row["completions"]))]
    data = built(write_jsonl, tokenizer, tmp_path, *rows)
    shape = row_shape([data], groups=20)
    source = PreferenceRows(data.sources[0], shape)
    arrays = pack_groups([source[i] for i in range(20)], shape)
    used = arrays["segment_ids"].any(axis=1)
    assert (arrays["segment_ids"][used] != 0).mean() > 0.8
    ids = arrays["sequence_ids"]
    assert sorted(ids[ids != 0]) == list(range(1, sum(len(row["completions"]) for row in rows) + 1))
    offsets, tokens = data.sources[0].store.offsets, data.sources[0].store.tokens
    for r, slot in zip(*np.nonzero(ids), strict=True):
        here = arrays["branches"][r] == slot + 1
        segment = arrays["segment_ids"][r, arrays["last_token_index"][r, slot]]
        prompt = (arrays["branches"][r] == 0) & (arrays["segment_ids"][r] == segment)
        i = ids[r, slot] - 1
        np.testing.assert_array_equal(arrays["tokens"][r, prompt | here], tokens[offsets[i] : offsets[i + 1]])
    compared = arrays["weights"] != 0
    assert compared.sum() == sum(n * (n - 1) // 2 for n in (len(row["completions"]) for row in rows))
    np.testing.assert_allclose(arrays["shares"].sum(), 20, rtol=1e-6)
    better = np.take_along_axis(arrays["ratings"], arrays["better"], 1)[compared]
    worse = np.take_along_axis(arrays["ratings"], arrays["worse"], 1)[compared]
    assert (better > worse).all()


def test_dpo_en_demo(smollm2, dpo_en_demo):
    """300 real pairs: nothing bad; of those that fit 512 tokens data.md's count is 105."""
    whole = build_preferences(str(dpo_en_demo), smollm2)
    report = whole.sources[0].report
    assert (report.rows, report.groups, report.bad, report.comparisons) == (300, 300, 0, 300)
    assert report.shared_tokens > 0.2 * report.tokens
    short = build_preferences(str(dpo_en_demo), smollm2, TokenizeOptions(max_length=512, truncate="drop"))
    assert 95 <= len(short) <= 115
    train, held_out = hold_out(short, 20, seed=0)
    assert len(held_out) == 20 and len(train) == len(short) - 20


def test_truncation_that_removes_the_difference_is_counted(write_jsonl, tokenizer, tmp_path):
    rows = ({"prompt": "abcd", "chosen": "xxxxxxA", "rejected": "xxxxxxB"}, PAIR)
    data = built(write_jsonl, tokenizer, tmp_path, *rows, max_length=9)
    report = data.sources[0].report
    assert (report.groups, report.difference_cut, report.dropped) == (1, 1, 0)
    assert "the same once cut to max_length" in data.text()


def test_all_that_is_said_of_a_prompt_is_on_one_side(write_jsonl, tokenizer, tmp_path):
    rows = [{"prompt": f"p{i // 3}", "chosen": f"good {i}", "rejected": f"bad {i}"} for i in range(12)]
    train, held_out = hold_out(built(write_jsonl, tokenizer, tmp_path, *rows), 3, seed=1)
    prompts = [{part.sources[0].identity(i) for i in range(len(part))} for part in (train, held_out)]
    assert len(held_out) == 3 and not prompts[0] & prompts[1]


def test_columns_that_are_not_used_are_said(write_jsonl, tokenizer, tmp_path):
    rows = ({**PAIR, "id": 1}, {**PAIR, "id": 2, "context": "c"})
    data = built(write_jsonl, tokenizer, tmp_path, *rows, columns=ColumnNames(ignored="context"))
    assert "columns not used: id (2 rows)" in data.text()
    row = {"prompt": "The sky is", "chosen": "The sky is up", "rejected": "The sky is on"}
    assert "1 repeated the prompt" in built(write_jsonl, tokenizer, tmp_path, row).text()


def test_a_bad_row_stops_with_its_file_and_line(write_jsonl, tokenizer, tmp_path):
    with pytest.raises(InputError, match=r"rows\.jsonl, line 2, rejected: is the same as chosen"):
        built(write_jsonl, tokenizer, tmp_path, PAIR, {**PAIR, "rejected": "xy"})


def test_a_group_that_does_not_fit_names_its_row(write_jsonl, tokenizer, tmp_path):
    """3 shared tokens, then d, 50 x and EOS, then d, z and EOS: 3 + 52 + 3."""
    data = built(write_jsonl, tokenizer, tmp_path, PAIR, {**PAIR, "chosen": "x" * 50})
    with pytest.raises(InputError, match=r"rows\.jsonl:2 needs 58 tokens.*data\.row_length=16"):
        row_shape([data], groups=1, length=16)


@pytest.mark.parametrize(
    "damage", [lambda data: data[:100], lambda data: b"", lambda data: b"PK" + data[2:60]]
)
def test_a_torn_entry_is_built_again(write_jsonl, tokenizer, tmp_path, damage):
    expected = built(write_jsonl, tokenizer, tmp_path, PAIR).sources[0].group(0)
    (path,) = (tmp_path / "cache" / "preferences").glob("*/groups.npz")
    path.write_bytes(damage(path.read_bytes()))
    found = built(write_jsonl, tokenizer, tmp_path, PAIR).sources[0].group(0)
    assert found.comparisons == expected.comparisons
    assert found.sequences[1].tokens.tolist() == expected.sequences[1].tokens.tolist()


def test_the_loader_does_not_resume_with_another_reference(write_jsonl, tokenizer, tmp_path):
    data = built(write_jsonl, tokenizer, tmp_path, PAIR)
    shape = row_shape([data], groups=1)
    first, second = (
        Loader([PreferenceRows(data.sources[0], shape, reference=name)], rows_per_step=1, seed=0)
        for name in ("a", "b")
    )
    with pytest.raises(InputError, match="reference model.* is not what the checkpoint was trained on"):
        second.set_state(first.get_state())
    first.close()
    second.close()


def test_the_loader_deals_groups_and_resumes(write_jsonl, tokenizer, tmp_path):
    rows = [{"prompt": f"p{i}", "chosen": f"good {i}", "rejected": f"bad {i}"} for i in range(7)]
    data = built(write_jsonl, tokenizer, tmp_path, *rows)
    shape = row_shape([data], groups=2)
    source = [PreferenceRows(data.sources[0], shape)]
    loader = Loader(source, rows_per_step=2, seed=3)
    seen = [next(loader) for _ in range(5)]
    state = loader.get_state()
    after = next(loader)
    loader.close()
    again = Loader(source, rows_per_step=2, seed=3)
    again.set_state(state)
    resumed = next(again)
    again.close()
    assert resumed.row_ids == after.row_ids
    for name, array in after.arrays.items():
        np.testing.assert_array_equal(resumed.arrays[name], array)
    ids = [row for batch in seen for row in batch.row_ids]
    assert len(set(ids[:7])) == 7 and all(len(batch.row_ids) == 2 for batch in seen)
