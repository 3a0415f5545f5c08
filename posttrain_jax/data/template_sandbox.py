"""Where chat templates run: Jinja's sandbox as transformers sets it up, with an end to what does not end.

A template is somebody's program. In the sandbox it reaches no attribute that it should not; here it also looks at the
clock at every call, filter, test and round of a loop, and what it makes has a largest size.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import threading
import time
import types
from collections.abc import Iterable, Iterator
from typing import Any, NoReturn

import jinja2
from jinja2 import meta, nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment, SecurityError
from jinja2.utils import Namespace
from jinja2.visitor import NodeTransformer

from posttrain_jax.core.errors import InputError

MOST_CHARACTERS = 2**26
_MOST_BITS = 2**16
_MOST_ARGUMENT = 2**20


class LimitError(Exception):
    """A rendering is stopped."""


class Running(threading.local):
    """The rendering of this thread: when it has to end, and what it has written."""

    deadline = float("inf")
    characters = 0

    def __init__(self) -> None:
        self.generated: list[tuple[int, int]] = []

    def begin(self, deadline: float) -> None:
        """Starts a rendering."""
        self.deadline = deadline
        if deadline < float("inf"):
            self.characters, self.generated = 0, []

    def check(self) -> None:
        """Ends it at its deadline."""
        if time.thread_time() > self.deadline:
            raise LimitError

    def count(self, block: str) -> None:
        """Takes note of what was written."""
        self.characters += len(block)
        _check_length(self.characters)
        self.check()


running = Running()


class _Generation(Extension):
    """`{% generation %}`: what is inside is the assistant's own text, and its place is noted."""

    tags = {"generation"}  # noqa: RUF012 - jinja2's own declaration

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("_noted"), [], [], body).set_lineno(line)

    def _noted(self, caller: Any) -> str:
        text = str(caller())
        running.generated.append((running.characters, running.characters + len(text)))
        return text


class _Environment(ImmutableSandboxedEnvironment):
    """The sandbox, with a look at the clock at every call, filter, test, and round of a loop."""

    intercepted_binops = frozenset(("+", "*", "**"))

    def tick(self) -> str:
        """What `_Checked` puts into loops and macros."""
        running.check()
        return ""

    def joined(self, *parts: Any) -> str:
        """`a ~ b`, bounded."""
        return _bounded("".join(map(str, parts)))

    def call(__self, __context: Any, __obj: Any, *args: Any, **kwargs: Any) -> Any:  # noqa: N805 - as jinja2's
        running.check()
        if isinstance(__obj, types.BuiltinMethodType) and isinstance(__obj.__self__, str):
            _check_sizes(*args, *kwargs.values())
        return super().call(__context, __obj, *args, **kwargs)

    def call_filter(self, *args: Any, **kwargs: Any) -> Any:
        running.check()
        return super().call_filter(*args, **kwargs)

    def call_test(self, *args: Any, **kwargs: Any) -> Any:
        running.check()
        return super().call_test(*args, **kwargs)

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        running.check()
        if operator != "+" and isinstance(left, int) and isinstance(right, int):
            factor = right if operator == "**" else 1
            if abs(factor) * left.bit_length() + right.bit_length() > _MOST_BITS:
                raise LimitError
        elif operator == "*":
            many, count = (right, left) if isinstance(left, int) else (left, right)
            if isinstance(many, str | list | tuple) and isinstance(count, int):
                _check_length(len(many) * count)
        return _bounded(super().call_binop(context, operator, left, right))


def _checked_filter(apply: Any) -> Any:
    """A filter whose result is as large as its argument asks for."""

    @functools.wraps(apply)  # with jinja2's marks of what the filter wants to be given
    def checked(*args: Any, **kwargs: Any) -> Any:
        _check_sizes(*args, *kwargs.values())
        return apply(*args, **kwargs)

    return checked


def _check_sizes(*values: Any) -> None:
    if any(isinstance(value, int) and value > _MOST_ARGUMENT for value in values):
        raise LimitError


def _bounded(value: Any) -> Any:
    if isinstance(value, str | list | tuple):
        _check_length(len(value))
    return value


def _check_length(length: int) -> None:
    if length > MOST_CHARACTERS:
        raise LimitError


class _Checked(NodeTransformer):
    """Puts the look at the clock into loops and macros, and bounds `~`."""

    def visit_For(self, node: nodes.For) -> nodes.Node:
        return self._with_tick(node)

    def visit_Macro(self, node: nodes.Macro) -> nodes.Node:
        return self._with_tick(node)

    def visit_CallBlock(self, node: nodes.CallBlock) -> nodes.Node:
        return self._with_tick(node)

    def visit_Concat(self, node: nodes.Concat) -> nodes.Node:
        self.generic_visit(node)
        return nodes.Call(nodes.EnvironmentAttribute("joined"), node.nodes, [], None, None).set_lineno(
            node.lineno
        )

    def _with_tick(self, node: Any) -> nodes.Node:
        self.generic_visit(node)
        tick = nodes.Call(nodes.EnvironmentAttribute("tick"), [], [], None, None)
        node.body.insert(0, nodes.ExprStmt(tick).set_lineno(node.lineno))
        return node


class _NewDict:
    """`dict(...)` and `dict.fromkeys(...)`, without the class's other attributes."""

    def __call__(self, *args: Any, **kwargs: Any) -> dict[Any, Any]:
        return dict(*args, **kwargs)

    def fromkeys(self, *args: Any) -> dict[Any, Any]:
        return dict.fromkeys(*args)


class _Namespace(Namespace):
    """`namespace(...)` without names that begin with an underscore, which could reach Python's own attributes."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        names = dict(*args, **kwargs)
        _refuse_underscores(names)
        super().__init__(names)

    def __setitem__(self, name: str, value: Any) -> None:
        _refuse_underscores([name])
        super().__setitem__(name, value)


def _refuse_underscores(names: Iterable[str]) -> None:
    for name in names:
        if str(name).startswith("_"):
            raise SecurityError(f"a namespace cannot hold {name!r}")


def _raise_exception(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """`tojson` without HTML's escapes."""
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


@dataclasses.dataclass(frozen=True)
class Compiled:
    """A template; `variables` are those that it does not set itself, `date_formats` what it asks `strftime_now` for
    (None: something that is not written out)."""

    template: jinja2.Template
    variables: frozenset[str]
    date_formats: tuple[str | None, ...]


@functools.lru_cache(maxsize=64)
def compile_template(source: str) -> Compiled:
    """A template's text, read and checked; the last ones are kept.

    Raises:
      InputError: it is no template; says where.
    """
    environment = _Environment(trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols])
    environment.filters["tojson"] = _to_json
    for name in ("batch", "center", "indent", "slice"):
        environment.filters[name] = _checked_filter(environment.filters[name])
    del environment.globals["lipsum"]
    environment.globals |= {"raise_exception": _raise_exception, "dict": _NewDict(), "namespace": _Namespace}
    try:
        tree = environment.parse(source)
        variables = frozenset(meta.find_undeclared_variables(tree))
        dates = tuple(_date_formats(tree))
        code = environment.compile(_Checked().visit(tree))
        template = environment.template_class.from_code(environment, code, environment.make_globals(None))
    except Exception as error:  # Python's own limits of nesting too, each with an error of its own
        line = f" (line {error.lineno})" if isinstance(error, jinja2.TemplateSyntaxError) else ""
        raise InputError(
            f"the chat template cannot be read: {one_sentence(str(error))}{line}; check data.chat_template"
        ) from None
    return Compiled(template, variables, dates)


def _date_formats(tree: nodes.Template) -> Iterator[str | None]:
    """One for each place where the template names `strftime_now`, but for a bare `strftime_now is defined`."""
    called = {id(call.node): call.args for call in tree.find_all(nodes.Call)}
    tested = {id(test.node) for test in tree.find_all(nodes.Test) if test.name == "defined"}
    for name in tree.find_all(nodes.Name):
        if name.name == "strftime_now" and id(name) not in tested:
            match called.get(id(name)):
                case [nodes.Const() as known]:
                    yield str(known.value)
                case _:
                    yield None


def one_sentence(text: str) -> str:
    """The first line, of a bounded length."""
    line = text.strip().partition("\n")[0].rstrip(".")
    return line if len(line) <= 300 else line[:300] + " ..."
