"""Published preference data as rows: small files of the same form by hand, and the real ones counted."""

from __future__ import annotations

import io
import json
import tarfile

import pytest

from posttrain_jax.asset_rows import HHH_SUBSETS, factual_summary_pairs, hhh_alignment, vader_movie_reviews


def rows_of(content: bytes) -> list[dict]:
    assert content.endswith(b"\n")
    return [json.loads(line) for line in content[:-1].split(b"\n")]


def task(*examples: dict) -> bytes:
    return json.dumps({"canary": "x", "examples": list(examples)}).encode()


def test_hhh_alignment():
    """One turn, and a dialogue; the better answer has the score 1, wherever it stands."""
    dialogue = "Hi\u2028there.\n\nAssistant:  Hello!\n\nMore? \n\nHuman:  What is a Human: tag?"
    parts = [
        task({"input": "A question?", "target_scores": {"bad": 0, " good": 1}}),
        task({"input": dialogue, "target_scores": {"yes": 1, "no": 0}}),
        task(),
        task({"input": "Q", "target_scores": {"1": 1, "0": 0}}),
    ]
    rows = rows_of(hhh_alignment(parts))
    assert rows == [
        {
            "prompt": [{"role": "user", "content": "A question?"}],
            "chosen": " good",
            "rejected": "bad",
            "subset": "harmless",
        },
        {
            "prompt": [
                {"role": "user", "content": "Hi\u2028there."},
                {"role": "assistant", "content": "Hello!\n\nMore?"},
                {"role": "user", "content": "What is a Human: tag?"},
            ],
            "chosen": "yes",
            "rejected": "no",
            "subset": "helpful",
        },
        {"prompt": [{"role": "user", "content": "Q"}], "chosen": "1", "rejected": "0", "subset": "other"},
    ]
    assert [row["subset"] for row in rows] == [HHH_SUBSETS[0], HHH_SUBSETS[1], HHH_SUBSETS[3]]


def test_factual_summary_pairs():
    lines = [
        {"article_sent": "a b c", "correct_sent": "a c", "incorrect_sent": "c a"},
        {"article_sent": "d", "correct_sent": "same", "incorrect_sent": "same"},
    ]
    rows = rows_of(factual_summary_pairs(["\n".join(map(json.dumps, lines)).encode() + b"\n\n"]))
    (row,) = rows
    assert row["prompt"].endswith("\n\na b c")
    assert (row["chosen"], row["rejected"]) == ("a c", "c a")


def vader_archive(texts: str, ratings: str) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as tar:
        for name, text in (("GroundTruth", texts), ("anonDataRatings", ratings)):
            info = tarfile.TarInfo(f"hutto_ICWSM_2014/movieReviewSnippets_{name}.txt")
            info.size = len(text.encode())
            tar.addfile(info, io.BytesIO(text.encode()))
    return buffer.getvalue()


def test_vader_movie_reviews():
    """The mean is that of the ratings: (3 + 2 - 1) / 3 = 4/3 and -4."""
    texts = "1\t1.3333\tFine\u00e9, \u2028really. \r\n2\t-4.0\tBad.\r\n"
    rows = rows_of(vader_movie_reviews([vader_archive(texts, "1\t1.3\t0.9\t[3, 2, -1]\n2\t-4\t0\t[-4]\n")]))
    assert rows == [
        {"id": "1", "completion": "Fine\u00e9, \u2028really.", "rating": 4 / 3, "given_ratings": [3, 2, -1]},
        {"id": "2", "completion": "Bad.", "rating": -4.0, "given_ratings": [-4]},
    ]
    with pytest.raises(ValueError, match="snippet 2 stands beside the ratings of snippet 3"):
        vader_movie_reviews([vader_archive(texts, "1\t1\t0\t[1]\n3\t1\t0\t[1]\n")])


def test_the_real_files(demo_path):
    pairs = rows_of(demo_path("factual_summary_pairs").read_bytes())
    assert len(pairs) == 368
    assert all(
        row["chosen"].strip() and row["rejected"].strip() and row["chosen"] != row["rejected"]
        for row in pairs
    )
    reviews = rows_of(demo_path("vader_movie_reviews").read_bytes())
    assert len(reviews) == 10_605
    assert {len(row["given_ratings"]) for row in reviews} <= set(range(15, 30))
    assert all(-4 <= rating <= 4 for row in reviews for rating in row["given_ratings"])
    labels = json.loads(demo_path("kto_en_demo").read_bytes())
    assert len(labels) == 300 and sum(row["label"] for row in labels) == 150
