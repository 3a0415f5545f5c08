"""What a process of `workers.RewardWorkers` does: it calls reward functions until its parent is gone.

Started by name, not as a child of multiprocessing, which would import the parent's main module, and JAX with it.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import importlib
import inspect
import itertools
import operator
import os
import pathlib
import socket
import threading
import time
import traceback
from collections.abc import Callable, Iterable, Mapping
from typing import Any, SupportsFloat

from posttrain_jax.core.errors import InputError
from posttrain_jax.rewards.completion import Completion
from posttrain_jax.rewards.messages import TOKEN_BYTES, Messages, as_json

RAISED, TIMED_OUT, DIED = "raised", "timed_out", "died"
NOT_FINITE, NOT_A_NUMBER, WRONG_COUNT = "not_finite", "not_a_number", "wrong_count"

_FLOAT32_MAX = 3.4028234663852886e38
_LONGEST = 300  # characters of an error that are kept
_PARENT_POLL_SECONDS = 1.0


@dataclasses.dataclass(frozen=True)
class Reply:
    """What became of one call.

    Attributes:
      values: the numbers; 0 where there is none.
      failures: for each completion why it has no number, or None.
      error: in words, the first of the failures, or "".
      whole: the call failed, not one of its completions.
    """

    values: list[float]
    failures: list[str | None]
    error: str = ""
    whole: bool = False


def main(descriptor: int, parent: int) -> None:
    """Loads the functions that the first message names, says "" (or what is wrong), then replies to calls by a `Reply`,
    until the other end is gone."""
    threading.Thread(target=_end_with, args=(parent,), daemon=True).start()
    # Where memory runs out, the kernel is to end this process and not the one that trains.
    with contextlib.suppress(OSError):
        pathlib.Path("/proc/self/oom_score_adj").write_text("1000")
    # The other end may be gone at any time, and a function may have closed this one.
    with contextlib.suppress(EOFError, OSError), socket.socket(fileno=descriptor) as connection:
        connection.set_inheritable(False)  # it is not for what a function starts
        _serve(Messages(connection, connection.recv(TOKEN_BYTES, socket.MSG_WAITALL)))


def _serve(messages: Messages) -> None:
    functions = {}
    to_load: dict[str, list[Any]] = messages.next()
    try:
        for name, (path, arguments) in to_load.items():
            functions[name] = load_function(path, arguments)
    except InputError as error:
        messages.send(as_json(str(error), "The error"))
        return
    messages.send(as_json("", "No error"))
    while True:
        name, completions = messages.next()
        reply = call(functions[name], [_completion(fields) for fields in completions])
        messages.send(as_json(dataclasses.asdict(reply), "The reply"))


def _completion(fields: dict[str, Any]) -> Completion:
    tuples = {name: tuple(fields[name]) for name in ("prompt_ids", "token_ids")}
    return Completion(**{**fields, **tuples})


def load_function(path: str, arguments: Mapping[str, Any]) -> Callable[[list[Completion]], object]:
    """The function "module:function" with its keyword arguments, called once with no completions.

    Raises:
      InputError: the module or function does not exist, cannot be imported or called so, or raises InputError.
    """
    module_name, _, attribute = path.partition(":")
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name == "posttrain_jax.rewards.answer":
            raise InputError(
                f"The reward function {path} imports posttrain_jax.rewards.answer, which is gone: Answer is called "
                "Completion now; write `from posttrain_jax.rewards.completion import Completion`."
            ) from error
        if error.name is None or not f"{module_name}.".startswith(f"{error.name}."):
            raise InputError(f"The reward function {path} cannot be imported ({_say(error)}).") from error
        raise InputError(
            f"The reward function {path} is in no module that Python finds (there is no {error.name}); write "
            "module:function, and start where the module lies or put its folder into PYTHONPATH."
        ) from error
    except BaseException as error:  # the module's own code, which may even exit
        raise InputError(f"The reward function {path} cannot be imported ({_say(error)}).") from error
    try:
        function = operator.attrgetter(attribute)(module)
    except AttributeError as error:
        raise InputError(
            f"The module {module_name} has no {attribute}; the reward function {path} does not exist."
        ) from error
    if not callable(function):
        raise InputError(f"{path} is a {type(function).__name__}, not a reward function.")
    try:
        inspect.signature(function).bind([], **arguments)
    except TypeError as error:
        given = "".join(f", {name}=..." for name in arguments)
        raise InputError(
            f"The reward function {path} cannot be called with (completions{given}): {_say(error)}."
        ) from error
    except ValueError:  # a function in C that does not tell its arguments
        pass
    bound = functools.partial(function, **arguments)
    try:
        bound([])
    except InputError as error:
        raise InputError(f"The reward function {path} cannot be used: {error}") from error
    except BaseException:  # a function that wants at least one completion will get one
        pass
    return bound


def call(function: Callable[[list[Completion]], object], completions: list[Completion]) -> Reply:
    """Calls a reward function and reads what it returns; whatever it does short of dying becomes a `Reply`."""
    count = len(completions)
    try:
        returned = function(completions)
        if returned is None or isinstance(returned, str | bytes):
            return _failed(
                count, NOT_A_NUMBER, f"it returned {_show(returned)}, not a list of {count} numbers"
            )
        if isinstance(returned, Mapping) or not isinstance(returned, Iterable):
            return _failed(
                count, WRONG_COUNT, f"it returned {_show(returned)}, not a list of {count} numbers"
            )
        numbers = list(itertools.islice(returned, count + 1))
        if len(numbers) != count:
            many = "more" if len(numbers) > count else f"{len(numbers)}"
            return _failed(count, WRONG_COUNT, f"it returned {many} numbers for {count} completions")
        reply = Reply([], [])
        errors = []
        for value in numbers:
            number, failure = _number(value)
            reply.values.append(number)
            reply.failures.append(failure)
            if failure is not None:
                errors.append(f"it returned {_show(value)} for a completion")
        return dataclasses.replace(reply, error=errors[0] if errors else "")
    except BaseException as error:  # sys.exit() too: the next completion needs this process
        return _failed(count, RAISED, f"{_say(error)}{_place(error, function)}")


def _number(value: object) -> tuple[float, str | None]:
    if isinstance(value, str | bytes) or not isinstance(value, SupportsFloat):
        return 0.0, NOT_A_NUMBER
    try:
        number = float(value)
    except OverflowError:
        return 0.0, NOT_FINITE
    except Exception:  # an array of several numbers: every library has its own error for that
        return 0.0, NOT_A_NUMBER
    return (number, None) if abs(number) <= _FLOAT32_MAX else (0.0, NOT_FINITE)


def _failed(count: int, failure: str, error: str) -> Reply:
    return Reply([0.0] * count, [failure] * count, error, whole=True)


def _show(value: object) -> str:
    try:
        return f"{value!r} (a {type(value).__name__})"[:_LONGEST]
    except Exception:
        return f"a {type(value).__name__}"


def _say(error: BaseException) -> str:
    try:
        message = " ".join(f"{type(error).__name__}: {error}".split())
    except Exception:
        message = type(error).__name__
    return message[:_LONGEST].removesuffix(".")


def _place(error: BaseException, function: Callable[[list[Completion]], object]) -> str:
    """Where it was raised: the last line in the function's own file, else the last line that Python has."""
    function = function.func if isinstance(function, functools.partial) else function
    try:
        home = inspect.getfile(inspect.unwrap(function) if inspect.isroutine(function) else type(function))
    except TypeError:  # a function in C
        home = ""
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if frame.filename != __file__]
    last = ([None, *frames] + [frame for frame in frames if frame.filename == home])[-1]
    return "" if last is None else f" ({last.filename}:{last.lineno})"


def _end_with(parent: int) -> None:
    """Ends this process when its parent is gone, even while a function that does not return is running."""
    while os.getppid() == parent:
        time.sleep(_PARENT_POLL_SECONDS)
    os._exit(1)
