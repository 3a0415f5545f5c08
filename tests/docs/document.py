"""What a Markdown file promises that can be checked without running it: commands, code, links, files and names.

`problems(path, text)` returns one sentence for each promise that the repository does not keep.
"""

from __future__ import annotations

import ast
import functools
import importlib
import json
import re
import shlex
from collections.abc import Iterator
from pathlib import Path

from launch.config import load_file, override, take_overrides
from posttrain_jax.core.errors import InputError
from posttrain_jax.demo.assets import ASSETS

ROOT = Path(__file__).resolve().parents[2]
CONFIG_SECTIONS = (
    "configs/sft/smollm2_135m.py",
    "configs/dpo/smollm2_135m.py",
    "configs/dpo/smollm2_135m_kto.py",
    "configs/reward_model/smollm2_135m.py",
    "configs/ppo/letters.py",
    "configs/ppo/letters.py:rloo",
    "configs/eval/held_out.py",
    "configs/eval/ifeval.py",
    "configs/eval/math.py",
    "configs/eval/multiple_choice.py",
    "configs/eval/kl.py",
)
"""Between them they hold the keys of every algorithm and evaluation."""
SHELL = ("", "sh", "bash", "shell", "console")
CHECKED_COMMANDS = ("python", "make", "pip", "posttrain-jax")
OTHER_COMMANDS = ("lm_eval", "git", "cd", "tensorboard", "curl", "ls", "cat", "export")
"""Programs that are not ours; their arguments are not checked."""

_FENCE = re.compile(r"^( *)```(\S*)\s*$")
_SPAN = re.compile(r"(?<!`)`([^`\n]+)`(?!`)")
_LINK = re.compile(r"!?\[[^\]]*\]\(([^)\s]+)\)|(?:src|href)=\"([^\"]+)\"")
_HEADING = re.compile(r"^#{1,6} +(.+?) *#*$")
_PATH = re.compile(
    r"[\w.{},*-]+(?:/[\w.{},*-]+)*/?(?:\.(?:py|md|json|jsonl|jinja|toml|txt|png|svg|sh))?(?:::\w+)?"
)


def problems(path: Path, text: str) -> list[str]:
    """Everything in a document that does not hold; `path` is where the document stands, for relative links."""
    blocks, prose = split(text)
    found: list[str] = []
    for language, code in blocks:
        if language in SHELL:
            for command in commands(code):
                found += command_problems(command)
        elif language == "python":
            found += python_problems(code)
        elif language == "json":
            found += json_problems(code)
    for span in _SPAN.findall(prose):
        if span.split(" ")[0] in ("make", "python", "posttrain-jax") and " " in span:
            found += command_problems(span)
        else:
            found += span_problems(span, path)
    found += link_problems(path, prose)
    assets = set(re.findall(r"\basset:([\w-]+)", text)) - {"NAME"} - ASSETS.keys()
    return found + [f"there is no asset {name}" for name in sorted(assets)]


def split(text: str) -> tuple[list[tuple[str, str]], str]:
    """Fenced blocks as (language, code), and the text without them."""
    blocks, prose, code, language = [], [], None, ""
    for line in text.split("\n"):
        fence = _FENCE.match(line)
        if fence and code is None:
            code, language = [], fence[2]
        elif fence and not fence[2]:
            blocks.append((language, "\n".join(code or [])))
            code = None
        elif code is not None:
            code.append(line)
        else:
            prose.append(line)
    if code is not None:
        raise ValueError("a fenced block does not end")
    return blocks, "\n".join(prose)


def commands(code: str) -> Iterator[str]:
    """The command lines of a shell block: continued lines joined, prompts and comments dropped. A block whose first
    line is no command of ours or of OTHER_COMMANDS is output or data, and has none."""
    lines = [line.strip() for line in code.replace("\\\n", " ").split("\n")]
    lines = [line.removeprefix("$ ") for line in lines if line and not line.startswith("#")]
    if lines and program(lines[0]) in CHECKED_COMMANDS + OTHER_COMMANDS:
        yield from lines


def program(command: str) -> str:
    """The name of the program that a line starts, past environment variables and folders."""
    for word in command.split():
        if not re.match(r"[A-Z_]+=", word):
            return re.sub(r"^python3[\d.]*$", "python", word.rsplit("/", 1)[-1])
    return ""


def command_problems(command: str) -> list[str]:
    """What is wrong with one command line."""
    try:
        words = shlex.split(command, comments=True)
    except ValueError as error:
        return [f"{command}: {error}"]
    while words and re.match(r"[A-Z_]+=", words[0]):
        words = words[1:]
    name = program(command)
    if name == "make":
        return make_problems(command, words[1:])
    if name == "pip":
        return pip_problems(command, words[1:])
    if name == "posttrain-jax":
        if len(words) == 1 or words[1].startswith("-"):
            return []
        return entry_problems(command, f"launch.{words[1]}", words[2:])
    if name == "python":
        if len(words) < 3 or words[1] != "-m":
            return [] if len(words) > 1 and (ROOT / words[1]).is_file() else [f"{command}: no such script"]
        return entry_problems(command, words[2], words[3:])
    return [] if name in OTHER_COMMANDS else [f"{command}: tests/docs does not know the program {name!r}"]


def make_problems(command: str, words: list[str]) -> list[str]:
    """Targets and variables of the Makefile."""
    text = (ROOT / "Makefile").read_text("utf-8")
    targets = set(re.findall(r"^([a-z][\w-]*):", text, re.MULTILINE))
    variables = set(re.findall(r"^([A-Z_]+) \?=", text, re.MULTILINE)) | set(
        re.findall(r"\$\(origin ([A-Z_]+)\)", text)
    )
    found = []
    for word in words:
        name, equals, _ = word.partition("=")
        if equals and name not in variables:
            found.append(f"{command}: the Makefile has no variable {name}")
        if not equals and not word.startswith("-") and word not in targets:
            found.append(f"{command}: the Makefile has no target {word}")
    return found


def pip_problems(command: str, words: list[str]) -> list[str]:
    """Extras of setup.py and files of constraints."""
    extras = set(
        re.findall(r'^        "(\w+)": (?:\[|[A-Z])', (ROOT / "setup.py").read_text("utf-8"), re.MULTILINE)
    )
    found = []
    for word in words:
        wanted = re.fullmatch(r"\.(?:/)?\[([\w,]+)\]", word)
        unknown = set(wanted[1].split(",")) - extras if wanted else set()
        found += [f"{command}: setup.py has no extra {extra!r}" for extra in sorted(unknown)]
        if word.startswith("constraints/") and not (ROOT / word).is_file():
            found.append(f"{command}: there is no {word}")
    return found


def entry_problems(command: str, module: str, arguments: list[str]) -> list[str]:
    """The module is there, it has the flags, and its config has the keys and takes their values."""
    if module.split(".")[0] not in ("launch", "experiments", "configs", "posttrain_jax", "tests"):
        return []  # pytest, venv
    if module.endswith(".NAME"):
        return []  # stands for any of them
    file = ROOT / (module.replace(".", "/") + ".py")
    if not file.is_file():
        return [f"{command}: there is no module {module}"]
    known = flags_of(file)
    found = []
    if module == "launch.fetch":
        found += [f"{command}: there is no asset {name}" for name in arguments if name not in ASSETS]
    for place, word in enumerate(arguments):
        if not word.startswith("--"):
            continue
        name, equals, value = word[2:].partition("=")
        if not equals and place + 1 < len(arguments) and not arguments[place + 1].startswith("-"):
            value = arguments[place + 1]
        if name == "help" or ("config" in known and name.startswith(("config.", "describe"))):
            continue
        kind = known.get(name) or (known.get(name[2:]) == "bool" and name.startswith("no") and "bool")
        if not kind:
            found.append(f"{command}: {module} has no flag --{name}")
        elif not fits(value, kind):
            found.append(f"{command}: --{name} takes {kind}, not {value!r}")
    if "config" in known:
        try:
            left, overrides = take_overrides([module, *arguments])
            specs = [word.partition("=")[2] for word in left if word.startswith("--config=")]
            if specs:
                override(load_file(specs[-1]), overrides)
        except InputError as error:
            found.append(f"{command}: {error}")
    return found


def fits(value: str, kind: str) -> bool:
    """Whether a flag of a kind ("string", "integer", "enum: a b" ...) takes a value."""
    if kind in ("integer", "float"):
        return bool(re.fullmatch(r"-?[\d.]+(e-?\d+)?", value)) and (kind == "float" or "." not in value)
    return value in kind.split()[1:] if kind.startswith("enum:") else True


@functools.cache
def flags_of(file: Path) -> dict[str, str]:
    """The flags that a module defines, read from its source: name to kind. A module that calls `config_flag.define` has
    --config; of argparse only the names are known."""
    kinds: dict[str, str] = {}
    tree = ast.parse(file.read_text("utf-8"))
    for call in [node for node in ast.walk(tree) if isinstance(node, ast.Call)]:
        name = call.func.attr if isinstance(call.func, ast.Attribute) else ""
        if name == "define" and isinstance(call.func, ast.Attribute):
            kinds["config"] = "string"
        if name == "add_argument" and isinstance(call.args[0], ast.Constant):
            kinds[str(call.args[0].value).lstrip("-")] = "argument"
        if not name.startswith("DEFINE_") or not call.args or not isinstance(call.args[0], ast.Constant):
            continue
        kind = {"DEFINE_boolean": "bool"}.get(name, name.removeprefix("DEFINE_"))
        if kind == "enum" and isinstance(call.args[2], ast.List | ast.Tuple):
            kind = "enum: " + " ".join(str(ast.literal_eval(value)) for value in call.args[2].elts)
        kinds[str(call.args[0].value)] = kind
    for node in ast.walk(tree):  # `from experiments.training import ...` brings that module's flags
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith(("experiments", "launch")):
            names = [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
            for other in (ROOT / (name.replace(".", "/") + ".py") for name in names if name):
                if other.is_file() and other != file and file.parts[-2] != "launch":
                    kinds = flags_of(other) | kinds
    return kinds


def python_problems(code: str) -> list[str]:
    """Whether a snippet compiles, and what it imports from us is there."""
    try:
        tree = ast.parse(code)
    except SyntaxError as error:
        return [f"a Python snippet does not compile: {error}"]
    found = []
    for node in ast.walk(tree):
        names: list[tuple[str, str]] = []
        if isinstance(node, ast.Import):
            names = [(alias.name, "") for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [(node.module or "", alias.name) for alias in node.names]
        elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            names = [("posttrain_jax", node.attr)] if node.value.id == "posttrain_jax" else []
        for module, name in names:
            if module.split(".")[0] in ("posttrain_jax", "launch", "configs", "experiments"):
                found += import_problems(module, name)
    return found


def import_problems(module: str, name: str) -> list[str]:
    """Whether `from module import name` works."""
    try:
        loaded = importlib.import_module(module)
        if name and name not in dir(loaded):
            importlib.import_module(f"{module}.{name}")
    except ImportError as error:
        return [f"a Python snippet imports what is not there: {error}"]
    return []


def json_problems(code: str) -> list[str]:
    """Whether a block is a JSON value, or one a line."""
    try:
        json.loads(code)
    except ValueError:
        try:
            for line in code.split("\n"):
                json.loads(line) if line.strip() else None
        except ValueError as error:
            return [f"a JSON block is no JSON: {error}"]
    return []


@functools.cache
def config_keys() -> frozenset[str]:
    """Every key of every algorithm, and every section."""
    keys: set[str] = set()
    for spec in CONFIG_SECTIONS:
        pending = [("", load_file(str(ROOT / spec)))]
        while pending:
            prefix, section = pending.pop()
            for key, value in section.items():
                keys.add(prefix + key)
                if type(value) is type(section):
                    pending.append((f"{prefix}{key}.", value))
    return frozenset(keys)


@functools.cache
def logged_names() -> frozenset[str]:
    """Every string, keyword and field in our source that may be a metric's name or a part of it."""
    names: set[str] = set()
    for folder in ("posttrain_jax", "launch"):
        for file in (ROOT / folder).rglob("*.py"):
            text = file.read_text("utf-8")
            for string in re.findall(r"\"([\w/{}]+)\"", text):
                names.update(re.split(r"[/{}]", string))
            names.update(
                name for pair in re.findall(r"\b(\w+)=|^ +(\w+): ", text, re.MULTILINE) for name in pair
            )
    return frozenset(names)


def span_problems(span: str, path: Path) -> list[str]:
    """Whether a word between backticks is there, where it is a config key, an override, a metric or a file."""
    key = re.sub(r"=.*", "", span.removeprefix("--config."))
    if re.fullmatch(r"[a-z_]+(\.[a-z0-9_]+)+", key) and key.split(".")[0] in config_keys():
        if not key.startswith("model.config.") and key not in config_keys():
            return [f"`{span}`: there is no config key {key}"]
        return []
    if re.fullmatch(r"(train|eval)(/[a-zA-Z0-9_]+)+", span):
        missing = [name for name in span.split("/")[1:] if name not in logged_names() and not name.isupper()]
        return [f"`{span}`: nothing in the source is called {missing[0]!r}"] if missing else []
    if "/" in span and " " not in span and _PATH.fullmatch(span):
        return file_problems(span, path)
    return []


def file_problems(span: str, path: Path) -> list[str]:
    """Whether a file or folder is there: from the root, in the package, or beside the document. Braces are choices."""
    name, _, inside = span.partition("::")
    if name.split("/")[0] in ("runs", "checkpoints", "v1", "DIR", "NAME") or not re.search(r"[a-z]{2}", name):
        return []
    found = []
    for choice in expand(name):
        places = [base / choice for base in (ROOT, ROOT / "posttrain_jax", ROOT / "docs", path.parent)]
        there = [place for place in places if place.exists()] or [
            match for base in (ROOT, ROOT / "posttrain_jax") for match in base.glob(choice) if "*" in choice
        ]
        if not there and looks_like_a_file(choice):
            found.append(f"`{span}`: there is no {choice}")
        elif inside and there and not re.search(rf"\b{inside}\b", there[0].read_text("utf-8")):
            found.append(f"`{span}`: there is no {inside} in {choice}")
    return found


def looks_like_a_file(name: str) -> bool:
    """Whether a word with slashes means a file of the repository, and not `and/or`, a MODEL or a path of HTTP."""
    rooms = {place.name for base in (ROOT, ROOT / "posttrain_jax") for place in base.iterdir()}
    return name.split("/")[0] in rooms or bool(re.search(r"\.(py|md|jinja|toml)$", name))


def expand(name: str) -> list[str]:
    """`a/{b,c}.py` as `a/b.py` and `a/c.py`."""
    braces = re.search(r"\{([^}]*)\}", name)
    if not braces:
        return [name]
    return [
        more
        for part in braces[1].split(",")
        for more in expand(name[: braces.start()] + part + name[braces.end() :])
    ]


def link_problems(path: Path, prose: str) -> list[str]:
    """Relative links and anchors of a document."""
    found = []
    for match in _LINK.finditer(_SPAN.sub("", prose)):
        target = match[1] or match[2]
        if re.match(r"[a-z]+:", target):
            continue
        name, _, anchor = target.partition("#")
        file = (path.parent / name).resolve() if name else path
        if name and not file.exists():
            found.append(f"the link {target} leads nowhere")
        elif anchor and anchor not in anchors(file.read_text("utf-8") if name else prose):
            found.append(f"the link {target}: {file.name} has no such heading")
    return found


def anchors(text: str) -> set[str]:
    """The anchors that GitHub gives to a document's headings."""
    headings = [match[1] for line in split(text)[1].split("\n") if (match := _HEADING.match(line))]
    return {
        re.sub(r"[^\w -]", "", heading.replace("`", "").lower()).replace(" ", "-") for heading in headings
    }
