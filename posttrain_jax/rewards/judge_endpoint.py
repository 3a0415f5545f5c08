"""A judge behind an OpenAI-compatible HTTP interface (`launch.serve`, vLLM, a hosted model), by the `openai` package.

It lies here and not in serving/, which is the other side of that interface; only `launch.win_rate` asks a judge.
"""

from __future__ import annotations

import concurrent.futures
import dataclasses
import hashlib
import json
from collections.abc import Iterator, Sequence
from urllib.parse import SplitResult, parse_qsl, unquote, urlsplit, urlunsplit

from posttrain_jax.core.errors import InputError, without_secrets
from posttrain_jax.rewards.judge import Question, Reply, parse_verdict

MOST_WORDS = 300
_SHORTEST_SECRET = 4  # a shorter one would be taken out of words that only look like it


@dataclasses.dataclass(frozen=True)
class Endpoint:
    """Where the judge is and how it is asked.

    Attributes:
      url: base URL, as in http://127.0.0.1:8000/v1. A name and password before the host, and what stands after a
        question mark, are sent with every question, and said nowhere.
      model: what the server calls the model.
      api_key: bearer token; "" for a server without one.
      max_tokens: most tokens of a reply.
      parallel: questions asked at a time.
      retries: how often a question is asked again after no connection, a timeout, 408, 409, 429 or 5xx; the `openai`
        package waits 0.5 s, 1 s, 2 s ... up to 8 s in between, or as long as the server says.
      timeout: seconds that a reply may take.
    """

    url: str
    model: str
    api_key: str = ""
    max_tokens: int = 16
    parallel: int = 8
    retries: int = 5
    timeout: float = 120.0

    def __post_init__(self) -> None:
        if not self.url.startswith(("http://", "https://")):
            raise InputError(
                f"The judge's URL is {without_secrets(self.url)!r}; it must start with http:// or https://."
            )
        try:
            is_place = bool(self._parts.hostname) and self._parts.port != 0
        except ValueError:  # no number where the port should be
            is_place = False
        if not is_place:
            raise InputError(
                "The judge's URL names no host and port; in its name and password write / as %2F, : as %3A, @ as %40."
            )
        if not self.model:
            raise InputError("A judge behind a URL needs the name that the server has for the model.")
        if self.max_tokens < 1 or self.parallel < 1 or self.retries < 0 or not self.timeout > 0:
            raise InputError(
                f"max_tokens ({self.max_tokens}) and parallel ({self.parallel}) must be at least 1, retries "
                f"({self.retries}) at least 0, and timeout ({self.timeout:g}) positive."
            )
        if not self.api_key.isascii():
            raise InputError("The API key must be plain ASCII: it travels in an HTTP header.")

    @property
    def _parts(self) -> SplitResult:
        return urlsplit(self.url)

    @property
    def base_url(self) -> str:
        """The URL without what stands after the question mark."""
        return urlunsplit(self._parts._replace(query="", fragment=""))

    @property
    def query(self) -> dict[str, str]:
        """What stands after the question mark."""
        return dict(parse_qsl(self._parts.query, keep_blank_values=True))

    def hide(self, text: str) -> str:
        """The text without the endpoint's secrets."""
        parts = self._parts
        secrets = [self.api_key, parts.password or "", *self.query.values()]
        for secret in sorted({*secrets, *map(unquote, secrets)}, key=len, reverse=True):
            if len(secret) >= _SHORTEST_SECRET:
                text = text.replace(secret, "***")
        return without_secrets(text)


class EndpointJudge:
    """Asks at temperature 0, one chat of one user's message for each question.

    Raises:
      InputError: the `openai` package is not installed.
    """

    def __init__(self, endpoint: Endpoint) -> None:
        try:
            import httpx
            import openai
        except ImportError as error:
            raise InputError(
                "A judge behind a URL needs the package openai; run: pip install -e '.[judge]'"
            ) from error
        self._endpoint = endpoint
        try:
            self._client = openai.OpenAI(
                base_url=endpoint.base_url,
                default_query=endpoint.query,
                api_key=endpoint.api_key or "none",
                max_retries=endpoint.retries,
                timeout=endpoint.timeout,
            )
        except (httpx.InvalidURL, ValueError) as error:
            raise InputError(endpoint.hide(f"The judge's URL cannot be used: {error}.")) from None

    @property
    def name(self) -> str:
        """URL (of its query a hash), model, and the limit of its reply."""
        end = self._endpoint
        query = hashlib.sha256(json.dumps(end.query).encode()).hexdigest()[:16] if end.query else ""
        return (
            f"{without_secrets(end.base_url)}{query and '?'}{query} {end.model} max_tokens={end.max_tokens}"
        )

    def ask(self, questions: Sequence[Question]) -> Iterator[tuple[int, Reply]]:
        """See `Judge.ask`.

        Raises:
          InputError: the endpoint cannot be reached or refuses a question. No new question is asked after the first
            failure, but those on their way are waited for and yielded.
        """
        failure: BaseException | None = None
        with concurrent.futures.ThreadPoolExecutor(self._endpoint.parallel) as pool:
            numbers = {pool.submit(self._reply, question): place for place, question in enumerate(questions)}
            try:
                for future in concurrent.futures.as_completed(numbers):
                    if future.cancelled():
                        continue
                    error = future.exception()
                    if error is None:
                        yield numbers[future], future.result()
                    elif failure is None:
                        failure = error
                        for other in numbers:
                            other.cancel()
            finally:
                for future in numbers:
                    future.cancel()
        if failure is not None:
            raise failure

    def _reply(self, question: Question) -> Reply:
        try:
            return self._asked(question)
        except InputError as error:
            raise InputError(self._endpoint.hide(str(error))) from None

    def _asked(self, question: Question) -> Reply:
        import openai
        from openai.types.chat import ChatCompletion

        judge = f"The judge {self._endpoint.model!r} at {self._endpoint.url}"
        try:
            answer = self._client.chat.completions.create(
                model=self._endpoint.model,
                messages=[{"role": "user", "content": question.text}],
                temperature=0,
                max_tokens=self._endpoint.max_tokens,
            )
        except (openai.AuthenticationError, openai.PermissionDeniedError) as error:
            raise InputError(f"{judge} refuses the API key ({_words(error)}); give the right one.") from error
        except openai.NotFoundError as error:
            raise InputError(
                f"{judge} is not there ({_words(error)}); check the name and the URL, which usually ends in /v1."
            ) from error
        except openai.APITimeoutError as error:
            raise InputError(
                f"{judge} did not answer within {self._endpoint.timeout:g} s; start again when it is faster, with a "
                "longer timeout or fewer questions at a time."
            ) from error
        except openai.APIConnectionError as error:
            raise InputError(
                f"{judge} cannot be reached ({_words(error.__cause__ or error)}); check the URL, and that the server "
                "runs."
            ) from error
        except openai.APIStatusError as error:
            raise InputError(
                f"{judge} answers {error.status_code} to {question.where}: {_words(error)}"
            ) from error
        except (
            openai.OpenAIError,
            ValueError,
        ) as error:  # a body that is no JSON, or a text that is no UTF-8
            raise InputError(f"{judge} could not be asked about {question.where}: {_words(error)}") from error
        if not isinstance(answer, ChatCompletion) or not answer.choices:
            raise InputError(f"{judge} gave no chat completion to {question.where}; is this its base URL?")
        text = answer.choices[0].message.content or ""
        read, written = (
            (answer.usage.prompt_tokens, answer.usage.completion_tokens)
            if answer.usage is not None
            else (0, 0)
        )
        return Reply(parse_verdict(text), text, read, written)


def _words(error: BaseException) -> str:
    """What the error says, in one line."""
    import openai

    text = str(error)
    if isinstance(error, openai.APIError) and isinstance(error.body, dict):
        text = str(error.body.get("message", text))
    return " ".join(text.split())[:MOST_WORDS] or type(error).__name__
