"""README, docs and the other documents promise only what is there; and the check notices what is not."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

from docs.document import ROOT, command_problems, problems

DOCUMENTS = sorted(
    path.relative_to(ROOT).as_posix()
    for pattern in ("*.md", "docs/**/*.md", "experiments/**/README.md")
    for path in ROOT.glob(pattern)
)


@pytest.mark.parametrize("name", DOCUMENTS)
def test_a_document_promises_only_what_is_there(name: str):
    path = ROOT / name
    found = problems(path, path.read_text("utf-8"))
    assert not found, "\n".join(found)


def test_the_readme_is_short():
    assert len((ROOT / "README.md").read_text("utf-8").splitlines()) <= 110


def test_every_document_is_in_the_index():
    index = (ROOT / "docs/README.md").read_text("utf-8")
    missing = [path.name for path in (ROOT / "docs").glob("*.md") if f"({path.name})" not in index]
    assert missing == ["README.md"]


@pytest.mark.parametrize("path", sorted((ROOT / "launch").glob("*.py")), ids=lambda path: path.stem)
def test_the_example_of_an_entry_point(path: Path):
    """The line that `--help` and a mistake show."""
    for node in ast.parse(path.read_text("utf-8")).body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "EXAMPLE":
            found = command_problems(ast.literal_eval(node.value))
            assert not found, "\n".join(found)


@pytest.mark.parametrize("path", sorted((ROOT / "configs").glob("*/*.py")), ids=lambda path: path.stem)
def test_the_commands_in_the_docstring_of_a_config(path: Path):
    """The paper's command, and the assets to fetch."""
    text = " ".join((ast.get_docstring(ast.parse(path.read_text("utf-8"))) or "").split())
    lines = r"python -m launch\.(?:fetch(?: [\w-]+)+(?=`)|\w+(?: --[\w.]+=[^\s`]+)+)"
    for command in re.findall(lines, text):
        found = command_problems(command)
        assert not found, "\n".join(found)


SFT = "python -m launch.train --config=configs/sft/smollm2_135m.py"
BROKEN = {
    "a module that is not there": ("```\npython -m launch.trian\n```", "no module launch.trian"),
    "a command that is not there": ("```\nposttrain-jax trian\n```", "no module launch.trian"),
    "a flag that is not there": (f"```\n{SFT} --workdirr=x\n```", "no flag --workdirr"),
    "a flag on a continued line": (f"```bash\n{SFT} \\\n  --workdirr=x\n```", "no flag --workdirr"),
    "a flag after a variable": (f"```bash\nA=b .venv/bin/{SFT} --workdirr=x\n```", "no flag --workdirr"),
    "a flag's value": ("```\npython -m launch.chat --model=x --seed=one\n```", "takes integer"),
    "a choice": ("```\npython -m launch.generate --long_prompts=drop\n```", "takes enum: error cut"),
    "a config that is not there": (
        "```\npython -m launch.train --config=configs/sft/no.py\n```",
        "no config file",
    ),
    "a variant": (f"```\n{SFT}:big --workdir=x\n```", "unknown variant"),
    "a config key": (f"```\n{SFT} --config.optim.lrr=1\n```", "optim.lrr"),
    "a config value": (f"```\n{SFT} --config.train.steps=many\n```", "train.steps"),
    "a make target": ("```\nmake quick\n```", "no target quick"),
    "a make variable": ("Use `make test JOB=2`.", "no variable JOB"),
    "an extra": ("```\npip install -e '.[evaluation]'\n```", "no extra 'evaluation'"),
    "a program": ("```\nmake test\nmaek test\n```", "does not know the program 'maek'"),
    "a quote": ("```\nmake 'test\n```", "No closing quotation"),
    "Python": ("```python\nx = = 1\n```", "does not compile"),
    "an import": ("```python\nfrom posttrain_jax import trainer\n```", "is not there"),
    "a name of ours": ("```python\nimport posttrain_jax\n\nposttrain_jax.laod('x')\n```", "is not there"),
    "JSON": ('```json\n{"a": 1,}\n```', "no JSON"),
    "a key between backticks": ("Set `optim.learning_rate`.", "no config key optim.learning_rate"),
    "an override between backticks": ("Set `--config.optim.learning_rate=1`.", "no config key"),
    "a metric": ("Watch `train/klx`.", "'klx'"),
    "a file": ("See `losses/dpoo.py`.", "no losses/dpoo.py"),
    "one file of two": ("See `losses/{dpo,dpoo}.py`.", "no losses/dpoo.py"),
    "a name in a file": ("See `losses/dpo.py::dpoo_loss`.", "no dpoo_loss"),
    "an asset": ("Use `asset:alpaca`.", "no asset alpaca"),
    "an asset to fetch": ("```\npython -m launch.fetch alpaca\n```", "no asset alpaca"),
    "a link": ("See [here](no/such.md).", "leads nowhere"),
    "a picture": ('<img src="no.svg">', "leads nowhere"),
    "an anchor": ("See [here](#no-such-part).\n\n## Another part", "no such heading"),
}


@pytest.mark.parametrize("text, problem", BROKEN.values(), ids=BROKEN)
def test_what_does_not_hold_is_found(text: str, problem: str):
    found = problems(ROOT / "X.md", text)
    assert len(found) == 1 and problem in found[0], found


def test_what_holds_is_no_problem():
    text = f"""
# A `b`, c

```
$ GLIBC_TUNABLES=x {SFT}:lora --workdir=runs/a \\
    --config.optim.lr=1e-6 --allow_change=optim.lr   # why
make test JOBS=0
```

```
printed, not typed: python -m launch.nothing
```

[a](#a-b-c) [b](README.md#posttrain_jax)
`losses/{{dpo,kto}}.py` `train/loss` `optim.lr` `and/or` `losses/dpo.py::dpo_loss`
"""
    assert problems(ROOT / "X.md", text) == []
