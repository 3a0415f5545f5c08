"""Held-out loss and perplexity, per token and per sequence, with 95 % bootstrap intervals over sequences.

Command: python -m launch.evaluate --model=MODEL --config=configs/eval/held_out.py --out=DIR
Where data.train and data.eval are "", a workdir is evaluated on the rows that its run held out, tokenized as it did;
any other MODEL on the 99 rows that configs/sft/smollm2_135m.py holds out of alpaca_en_demo (about a minute for
SmolLM2-135M on 2 CPU cores). What is read is printed first. Variants: `:tiny` (seconds, no download).
"""

from __future__ import annotations

from ml_collections import ConfigDict

from configs.eval.base import eval_config


def get_config(variant: str = "") -> ConfigDict:
    """The evaluation; see the module's docstring for the variants."""
    config = eval_config("held_out")  # its seed is also that of a "split:" given here
    config.eval.batch_rows = 4
    config.data.train = ""  # what "split:" is taken from
    config.data.eval = ""  # path, folder, hf:NAME, tfds:NAME, or "split:0.05" / "split:200" of data.train
    config.data.first = 0  # only so many sequences; 0 = all
    config.data.pack = True
    # "" and -1: as in the run of a workdir, else 1,024 tokens, right, stop, all_turns.
    config.data.max_length = -1  # tokens per row
    config.data.truncate = ""  # right, drop, error
    config.data.on_bad_row = ""  # stop, skip
    config.data.columns = ""  # our name -> the file's, as JSON: {"prompt": "question", "completion": "best"}
    config.data.ignore_columns = ""  # columns of the rows that are not read, "a,b"
    config.data.train_on = ""  # all_turns, last_turn
    config.data.text_as = ""  # text prompts and completions: plain (as they are), chat (turns of a chat)
    config.data.chat_template_kwargs = ""  # variables of the template, as JSON: {"enable_thinking": false}
    config.data.chat_template = ""  # "" = the model's own; a path, the text, or the name of one of several

    if variant == "tiny":
        config.data.train = "configs/tiny/chats.jsonl"
        config.data.eval = "split:0.2"
        config.data.max_length = 256
        config.eval.batch_rows, config.eval.bootstrap = 2, 100
    elif variant:
        raise ValueError(f"unknown variant {variant!r}; use tiny")
    return config
