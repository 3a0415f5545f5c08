"""Published preference data as rows: small files of the same form by hand, and the real ones counted."""

from __future__ import annotations

import bz2
import csv
import io
import json
import tarfile
import zlib

import pytest

from posttrain_jax.demo.asset_rows import (
    HHH_SUBSETS,
    SENTIMENT_FILES,
    factual_summary_pairs,
    hhh_alignment,
    identity_en,
    imdb_sentiment,
    movie_openings,
    vader_movie_pairs,
    vader_movie_reviews,
)


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


def test_vader_movie_pairs():
    """Ratings 3, 1 beside 1, -1: of the four pairs of people 3 > 1, 3 > -1, 1 = 1, 1 > -1, so 3.5 / 4. By their
    checksums "Poor." and "Good." come before "Zzz.", which has no partner. Equal means make no pair."""
    ratings = "1\t2\t1\t[3, 1]\n2\t0\t1\t[1, -1]\n3\t0\t0\t[0]\n"
    assert zlib.crc32(b"Poor.") < zlib.crc32(b"Good.") < zlib.crc32(b"Zzz.")
    rows = rows_of(vader_movie_pairs([vader_archive("1\t2\tGood.\n2\t0\tPoor.\n3\t0\tZzz.\n", ratings)]))
    assert rows == [
        {
            "id": "1-2",
            "prompt": "Write sentence 1 of a page of favourable film reviews.",
            "chosen": "Good.",
            "rejected": "Poor.",
            "margin": 2.0,
            "probability": 3.5 / 4,
            "chosen_ratings": [3, 1],
            "rejected_ratings": [1, -1],
        }
    ]
    equal = "1\t2\t1\t[3, 1]\n2\t2\t1\t[2]\n"
    assert vader_movie_pairs([vader_archive("1\t2\tA.\n2\t2\tB.\n", equal)]) == b""


def test_movie_openings():
    """Plots, short reviews and repetitions are left out; numbers are the rows' places; white space and entities are
    made plain. A review of 5 words keeps 1 for the rest, whatever its checksum says."""
    long = "One two three four five six seven eight nine ten."
    texts = [
        ("plot", "A man walks into a bank and out again."),
        ("fresh", " One  two\nthree four five six seven eight nine ten.\n\n"),
        ("rotten", "Four words, no more."),
        ("rotten", long),
        ("rotten", "R&amp;B is for the \u201ctone-deaf\u201d."),
    ]
    table = io.StringIO(newline="")
    writer = csv.writer(table)
    writer.writerow(["category", "text", "movie_name", "has_plot_and_reviews"])
    writer.writerows([category, text, "x", "False"] for category, text in texts)
    first, second = rows_of(movie_openings([bz2.compress(table.getvalue().encode())]))
    assert (first["id"], first["label"], second["id"], second["label"]) == ("1", "fresh", "4", "rotten")
    assert first["prompt"] + first["rest"] == long and 4 <= len(first["prompt"].split()) <= 8
    assert (second["prompt"], second["rest"]) == ("R&B is for the", " \u201ctone-deaf\u201d.")


def test_imdb_sentiment():
    """Files come out as they went in, and nothing of the machine or the hour goes into the archive."""
    parts = [name.encode() for name in SENTIMENT_FILES]
    packed = imdb_sentiment(parts)
    with tarfile.open(fileobj=io.BytesIO(packed)) as archive:
        members = archive.getmembers()
        assert [archive.extractfile(member).read() for member in members] == parts
    assert [member.name for member in members] == list(SENTIMENT_FILES)
    assert {(member.mtime, member.uid, member.uname, member.mode) for member in members} == {
        (0, 0, "", 0o644)
    }


def test_identity_en():
    """Chinese rows are left out, and both blanks are filled wherever they stand."""
    rows = [
        {"instruction": "Who?", "input": "", "output": "{{name}} of {{author}}, {{name}}."},
        {"instruction": "\u4f60\u662f\u8c01", "input": "", "output": "{{name}}"},
    ]
    made = rows_of(identity_en([json.dumps(rows).encode()], name="Ada", author="Z\u00fcrich & co"))
    assert made == [{"instruction": "Who?", "input": "", "output": "Ada of Z\u00fcrich & co, Ada."}]


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
    pairs = rows_of(demo_path("vader_movie_pairs").read_bytes())
    assert len(pairs) == 5_287 and all(row["margin"] > 0 for row in pairs)
    labels = json.loads(demo_path("kto_en_demo").read_bytes())
    assert len(labels) == 300 and sum(row["label"] for row in labels) == 150
    identity = demo_path("identity_en").read_text()
    assert identity.count("\n") == 16 and identity.count("Ember") == 12 and "{{" not in identity
    openings = rows_of(demo_path("movie_openings").read_bytes())
    assert len(openings) == len({row["id"] for row in openings}) == 12_264
    assert {row["label"] for row in openings} == {"fresh", "rotten"}
    assert {len(row["prompt"].split()) for row in openings} == {4, 5, 6, 7, 8}
    assert all(row["rest"].startswith(" ") and row["rest"].strip() for row in openings)
