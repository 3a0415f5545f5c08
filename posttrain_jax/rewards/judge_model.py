"""A model of ours as a judge: how much likelier is it to say B than A?

The preference for the answer shown second is P(B) / (P(A) + P(B)), from the log-probabilities of the two letters
after the question, so nothing is sampled and nothing has to be read. There are no ties but exact ones.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Sequence

from jax.sharding import Mesh

from posttrain_jax.core.errors import InputError
from posttrain_jax.core.trees import fingerprint
from posttrain_jax.data.store import tokenizer_fingerprint
from posttrain_jax.models.io.load import LoadedModel
from posttrain_jax.rewards.judge import Question, Reply
from posttrain_jax.sampling.choices import choice_logps, encode_choices
from posttrain_jax.sampling.prompts import is_chat, need_tokenizer

CHOICES = ("A", "B")
AT_ONCE = 64


class ModelJudge:
    """Scores `AT_ONCE` questions at a time; what is done is yielded before the next ones begin.

    Args:
      loaded: the model.
      batch_rows: rows of a batch.
      mesh: where the parameters lie; None = one device.
      render: "chat" (the question is a user's turn), "text", or "auto".

    Raises:
      InputError: the model has no tokenizer, or `render` is none of the three.
    """

    def __init__(
        self, loaded: LoadedModel, *, batch_rows: int = 8, mesh: Mesh | None = None, render: str = "auto"
    ) -> None:
        if batch_rows < 1:
            raise InputError(f"batch_rows is {batch_rows}; it must be at least 1.")
        self._loaded = loaded
        self._batch_rows = batch_rows
        self._mesh = mesh
        self._chat = is_chat(loaded, render)
        parts = f"{fingerprint(loaded.params)} {tokenizer_fingerprint(need_tokenizer(loaded))}"
        self._identity = hashlib.sha256(parts.encode()).hexdigest()[:24]

    @property
    def name(self) -> str:
        """The model as it was given, its checkpoint, dtype, how the question is rendered, and a hash of its parameters,
        tokenizer and template."""
        source = self._loaded.source
        step = "" if source.step is None else f"@{source.step}"
        return f"{source.name}{step} {self._loaded.model.dtype} {'chat' if self._chat else 'text'} {self._identity}"

    def ask(self, questions: Sequence[Question]) -> Iterator[tuple[int, Reply]]:
        """See `Judge.ask`.

        Raises:
          InputError: a question is longer than the model's context (names the pair), or numbers that are not finite.
        """
        for first in range(0, len(questions), AT_ONCE):
            encoded = [
                encode_choices(self._loaded, question.text, CHOICES, chat=self._chat, name=question.where)
                for question in questions[first : first + AT_ONCE]
            ]
            scores = choice_logps(self._loaded, encoded, batch_rows=self._batch_rows, mesh=self._mesh)
            for number, (question, (a, b)) in enumerate(zip(encoded, scores, strict=True), first):
                words = f"log P(A) {a:.6g}, log P(B) {b:.6g}"
                yield number, Reply(second_preferred(a, b), words, max(len(ids) for ids in question.tokens))


def second_preferred(logp_a: float, logp_b: float) -> float:
    """P(B) / (P(A) + P(B)) from log-probabilities in nats."""
    return 0.5 * (1.0 + math.tanh(0.5 * (logp_b - logp_a)))
