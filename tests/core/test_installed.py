"""Files that come with the package are found from any folder, and files of the working directory come first."""

from __future__ import annotations

from pathlib import Path

import pytest
from transformers import PreTrainedTokenizerBase

from launch.config import load_file
from posttrain_jax.core.errors import InputError
from posttrain_jax.core.installed import ROOT, find_config, find_file
from posttrain_jax.data.chat_template import resolve_template
from posttrain_jax.data.sources import read_rows
from posttrain_jax.models.io.byte_tokenizer import byte_tokenizer


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_an_installed_file_is_found(elsewhere: Path):
    assert find_file("configs/tiny/chats.jsonl") == ROOT / "configs/tiny/chats.jsonl"
    assert len(list(read_rows("configs/tiny/chats.jsonl"))) == 32
    tokenizer: PreTrainedTokenizerBase = byte_tokenizer()
    template = (ROOT / "configs/templates/tulu.jinja").read_text("utf-8")
    assert resolve_template(tokenizer, "configs/templates/tulu.jinja") == template


def test_a_file_of_the_working_directory_comes_first(elsewhere: Path):
    (elsewhere / "configs/tiny").mkdir(parents=True)
    (elsewhere / "configs/tiny/chats.jsonl").write_text('{"text": "mine"}\n')
    assert find_file("configs/tiny/chats.jsonl") == Path("configs/tiny/chats.jsonl")
    assert find_file("configs/tiny/pairs.jsonl") == ROOT / "configs/tiny/pairs.jsonl"


@pytest.mark.parametrize(
    "name", ["tiny/chats.jsonl", "configs/none.jsonl", "/configs/tiny/chats.jsonl", "~/x", ""]
)
def test_other_names_stay_what_they_are(name: str):
    assert find_file(name) == Path(name).expanduser()


@pytest.mark.parametrize("name", ["sft/smollm2_135m.py", "configs/sft/smollm2_135m.py"])
def test_a_config_is_found_by_its_long_and_its_short_name(name: str):
    assert find_config(name) == ROOT / "configs/sft/smollm2_135m.py"
    assert load_file(f"{name}:tiny").model.init == "random"


def test_the_nearest_config_is_named_from_any_folder():
    with pytest.raises(
        InputError, match=r"no config file sft/smollm\.py; the nearest is .*sft/smollm2_135m\.py"
    ):
        load_file("sft/smollm.py")
    for name in ("x" * 5000, "a\0b"):
        with pytest.raises(InputError, match="config file"):
            load_file(name)


def test_a_config_of_the_working_directory_comes_first(elsewhere: Path):
    (elsewhere / "sft").mkdir()
    (elsewhere / "sft/smollm2_135m.py").write_text("")
    assert find_config("sft/smollm2_135m.py") == Path("sft/smollm2_135m.py")
