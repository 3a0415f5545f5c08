"""Serves a model over HTTP as OpenAI's API does: models, completions and chat completions, streamed or whole.

Any client of that API can use it, with http://HOST:PORT/v1 as its base URL. Completions of many clients are decoded
side by side in --slots slots. After SIGINT or SIGTERM running completions may still end, for --shutdown_seconds at
most.
"""

from __future__ import annotations

import asyncio
import contextlib
import copy
import dataclasses
import importlib.util
import ipaddress
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from types import FrameType
from typing import TYPE_CHECKING, Any

from absl import flags

from launch import entry
from posttrain_jax.core.errors import InputError

if TYPE_CHECKING:
    from posttrain_jax.models.io.load import LoadedModel
    from posttrain_jax.sampling.engine import Engine
    from posttrain_jax.serving.parsed_request import Limits

EXAMPLE = "python -m launch.serve --model=runs/smollm2 --port=8000"
KEY_VARIABLE = "POSTTRAIN_JAX_API_KEY"
NEEDED = ("fastapi", "uvicorn", "pydantic")
DEFAULT_LENGTH = 2048
LAST_SECONDS = 5  # after --shutdown_seconds, for errors to reach the clients
START_SECONDS = 3  # how long the program may take to end by itself after a signal during its start


@dataclasses.dataclass(frozen=True)
class Options:
    """What the flags say; see `define_flags`."""

    model: str
    host: str = "127.0.0.1"
    port: int = 8000
    api_key: str = ""
    served_model_name: str = ""
    slots: int = 8
    max_model_len: int = 0
    max_waiting: int = 256
    max_logprobs: int = 20
    max_body_mb: int = 16
    shutdown_seconds: int = 30
    idle_seconds: int = (
        75  # longer than clients keep an idle connection, so that none is closed under a request
    )
    control_tokens: bool = False
    dtype: str = "float32"
    fsdp: int = 1
    tensor: int = 1


def define_flags() -> None:
    """The command line; not at import, so that modules with like-named flags can be imported together."""
    flags.DEFINE_string("model", None, "A Hugging Face folder or name, a .gguf file, or a workdir.")
    flags.DEFINE_string("host", Options.host, "Address to listen on; 0.0.0.0 = on every network.")
    flags.DEFINE_integer("port", Options.port, "0 = any free one; the URL is printed.")
    flags.DEFINE_string(
        "api_key",
        "",
        f"Bearer token that clients must send; default: ${KEY_VARIABLE}, which other users' ps does not show.",
    )
    flags.DEFINE_string(
        "served_model_name", "", "What clients call the model; default: the value of --model."
    )
    flags.DEFINE_integer("slots", Options.slots, "Completions decoded side by side.")
    flags.DEFINE_integer(
        "max_model_len",
        Options.max_model_len,
        f"Most tokens of prompt and completion together; 0 = the model's context, at most {DEFAULT_LENGTH}.",
    )
    flags.DEFINE_integer(
        "max_waiting", Options.max_waiting, "Most completions that wait for a slot; then 429."
    )
    flags.DEFINE_integer("max_logprobs", Options.max_logprobs, "Most log-probabilities beside each token.")
    flags.DEFINE_integer("max_body_mb", Options.max_body_mb, "Largest request, in MB; then 413.")
    flags.DEFINE_integer(
        "shutdown_seconds", Options.shutdown_seconds, "How long completions may take to end."
    )
    flags.DEFINE_integer(
        "idle_seconds",
        Options.idle_seconds,
        "How long a connection may be idle, and the head and the body of a request may take.",
    )
    flags.DEFINE_bool(
        "control_tokens",
        Options.control_tokens,
        "Whether the text of a control token (<|im_end|>) in a chat's message is that token, not its letters.",
    )
    flags.DEFINE_string("dtype", Options.dtype, "float32 or bfloat16, for weights and arithmetic.")
    flags.DEFINE_integer("fsdp", Options.fsdp, "Devices that share the weights; the rest share the work.")
    flags.DEFINE_integer("tensor", Options.tensor, "Devices that share each layer.")


def main(argv: Sequence[str]) -> int:
    """Serves until a signal comes."""
    del argv
    given = flags.FLAGS
    if given.model is None:
        raise InputError(f"--model is needed; an example: {EXAMPLE}")
    values: dict[str, Any] = {field.name: given[field.name].value for field in dataclasses.fields(Options)}
    values["api_key"] = values["api_key"] or os.environ.get(KEY_VARIABLE, "")
    values["served_model_name"] = values["served_model_name"] or values["model"]
    options = Options(**values)
    check(options)
    # A signal while the model is being read ends the program in the same way as one after it.
    signal.signal(signal.SIGTERM, _interrupt)
    entry.set_up_jax()
    return serve(options)


@contextlib.contextmanager
def ends_at_a_signal(seconds: float = START_SECONDS) -> Iterator[None]:
    """A context in which SIGTERM and SIGINT end the process after `seconds`, even while it compiles: Python's own
    handlers run only when the compiler is done, which can take minutes."""
    reader, writer = os.pipe()
    os.set_blocking(writer, False)

    def watch() -> None:
        with open(reader, "rb", buffering=0) as signals:
            while number := signals.read(1):
                if number[0] in (signal.SIGTERM, signal.SIGINT):
                    time.sleep(seconds)
                    os._exit(0 if number[0] == signal.SIGTERM else 130)

    threading.Thread(target=watch, daemon=True).start()
    before = signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
    try:
        yield
    finally:
        signal.set_wakeup_fd(before)
        os.close(writer)


def check(options: Options) -> None:
    """Raises InputError for bad flags, before anything is loaded."""
    missing = [name for name in NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        raise InputError(f"launch.serve needs {' and '.join(missing)}; run: pip install -e '.[serve]'")
    least = {"slots": 1, "max_waiting": 0, "max_logprobs": 1, "max_body_mb": 1, "shutdown_seconds": 0}
    least["idle_seconds"] = 1
    for name, value in dataclasses.asdict(options).items():
        if name in least and value < least[name]:
            raise InputError(f"--{name}={value} must be at least {least[name]}.")
    if not 0 <= options.port < 2**16:
        raise InputError(f"--port={options.port} must lie between 0 and 65535.")
    if options.max_model_len < 0 or options.max_model_len == 1:
        raise InputError(f"--max_model_len={options.max_model_len} must be 0 or at least 2.")
    if not options.api_key.isascii():
        raise InputError("the API key must be plain ASCII: it travels in an HTTP header.")


def serve(options: Options) -> int:
    """Loads the model and serves it; 0 after a signal, 1 after a failure of the engine.

    Raises:
      InputError: the address is taken, or the model cannot be served.
    """
    with listen(options.host, options.port) as listener:
        if not options.api_key and not is_loopback(options.host):
            print(
                f"warning: {options.host} can be reached from other machines and there is no key; set --api_key or "
                f"${KEY_VARIABLE}.",
                file=sys.stderr,
                flush=True,
            )
        with ends_at_a_signal():
            loaded = load(options)
            limits = limits_of(loaded, options)
            engine = make_engine(loaded, options, max_length=limits.max_length)
        return run(loaded, options, listener, limits, engine)


def run(
    loaded: LoadedModel, options: Options, listener: socket.socket, limits: Limits, engine: Engine
) -> int:
    """Serves a loaded model; see `serve`."""
    import uvicorn

    from posttrain_jax.serving.app import Service, make_app
    from posttrain_jax.serving.connection import timed_connection
    from posttrain_jax.serving.worker import Worker

    def end() -> None:
        server.should_exit = True

    worker = Worker(loaded.model, loaded.params, engine, capacity=limits.completions, on_failure=end)
    service = Service(
        name=options.served_model_name,
        tokenizer=loaded.tokenizer,
        limits=limits,
        worker=worker,
        api_key=options.api_key,
        max_body_bytes=options.max_body_mb * 10**6,
        idle_seconds=options.idle_seconds,
        stopping=lambda: server.should_exit,
    )

    class Server(uvicorn.Server):
        """Completions that take longer than --shutdown_seconds end with an error that says so."""

        async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
            asyncio.get_running_loop().call_later(options.shutdown_seconds, worker.stop)
            await super().shutdown(sockets)

    server = Server(
        uvicorn.Config(
            make_app(service),
            log_config=None,
            access_log=False,
            http=timed_connection(options.idle_seconds),
            ws="none",
            timeout_keep_alive=options.idle_seconds,
            timeout_graceful_shutdown=options.shutdown_seconds + LAST_SECONDS,
        )
    )
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, _ignore)  # uvicorn has its own, and raises the signal again when it is done
    start(listener, options)
    print(f"serving {options.served_model_name} at {url(listener)}/v1", flush=True)
    server.run(sockets=[listener])
    code = 1 if worker.failed else 0
    if threading.active_count() > 1:  # one still compiles or tokenizes, and Python would wait for it
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    return code


def _interrupt(signum: int, frame: FrameType | None) -> None:
    del signum, frame
    raise SystemExit(0)


def _ignore(signum: int, frame: FrameType | None) -> None:
    del signum, frame


def load(options: Options) -> LoadedModel:
    """The model, on all devices.

    Raises:
      InputError: there is none, or it has no tokenizer.
    """
    from posttrain_jax.models.io.load import load_language_model

    loaded = load_language_model(options.model, dtype=options.dtype, fsdp=options.fsdp, tensor=options.tensor)
    if loaded.tokenizer is None:
        raise InputError(f"{loaded.source.name} has no tokenizer, so it cannot be served; add its files.")
    return loaded


def limits_of(loaded: LoadedModel, options: Options) -> Limits:
    """What requests may ask for, with this model and these flags.

    Raises:
      InputError: --max_model_len is more than the model's context, or --max_logprobs more than its vocabulary.
    """
    from posttrain_jax.serving.parsed_request import Limits

    context, vocabulary = loaded.config.max_length, loaded.config.vocab_size
    if options.max_model_len > context:
        raise InputError(
            f"--max_model_len={options.max_model_len} is more than the model's context, {context}."
        )
    if options.max_logprobs > vocabulary:
        raise InputError(f"--max_logprobs={options.max_logprobs} is more than the vocabulary, {vocabulary}.")
    assert loaded.tokenizer is not None  # `load` checked it
    max_length = options.max_model_len or min(context, DEFAULT_LENGTH)
    return Limits(
        max_length=max_length,
        vocab_size=vocabulary,
        alternatives=options.max_logprobs,
        characters=max_length * max(map(len, loaded.tokenizer.get_vocab())),
        control_tokens=options.control_tokens,
        completions=options.slots + options.max_waiting,
        stop_token_ids=loaded.stop_token_ids,
    )


def make_engine(loaded: LoadedModel, options: Options, *, max_length: int) -> Engine:
    """An engine for every sampling option, with its programs compiled, so that no request waits for one."""
    from posttrain_jax.sampling.choose import StaticSamplingOptions
    from posttrain_jax.sampling.engine import Engine
    from posttrain_jax.serving.bodies import MOST_STOPS

    engine = Engine(
        loaded.model,
        loaded.params,
        slots=options.slots,
        max_length=max_length,
        max_new_tokens=max_length - 1,
        static_options=StaticSamplingOptions(
            draw=True,
            nucleus=True,
            min_p=True,
            penalties=True,
            min_tokens=True,
            alternatives=options.max_logprobs,
        ),
        max_stop_tokens=len(loaded.stop_token_ids) + MOST_STOPS,
        tokenizer=copy.deepcopy(loaded.tokenizer),  # tokenizers are not safe to share between threads
    )
    started = time.monotonic()
    print(f"compiling the programs for up to {max_length} tokens ...", end=" ", file=sys.stderr, flush=True)
    programs = engine.warm_up()
    print(f"{programs} programs, done in {time.monotonic() - started:.1f} s", file=sys.stderr, flush=True)
    return engine


def listen(host: str, port: int) -> socket.socket:
    """A socket bound to the address, not listening yet.

    Raises:
      InputError: there is no such address here, or it is taken.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        listener = socket.socket(family, kind, protocol)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
    except OSError as error:
        raise cannot_listen(host, port, error) from error
    return listener


def start(listener: socket.socket, options: Options) -> None:
    """Lets clients in.

    Raises:
      InputError: another server took the address while the model was read.
    """
    try:
        listener.listen()
    except OSError as error:
        raise cannot_listen(options.host, options.port, error) from error


def cannot_listen(host: str, port: int, error: OSError) -> InputError:
    """The error for an address that cannot be used."""
    return InputError(
        f"cannot listen on --host={host} --port={port} ({error.strerror or error}); use another one "
        "(--port=0 takes any that is free)."
    )


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches the address."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def url(listener: socket.socket) -> str:
    """Where the socket can be reached."""
    host, port = listener.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


if __name__ == "__main__":
    define_flags()
    entry.run(main, example=EXAMPLE)
