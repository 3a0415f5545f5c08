"""What the tasks of all algorithms are made of."""

from __future__ import annotations

import numpy as np
import pytest

from posttrain_jax.core.sharding import make_mesh
from posttrain_jax.data.packing import pack
from posttrain_jax.data.tokenized import TokenizeOptions, build
from posttrain_jax.models.io.byte_tokenizer import byte_tokenizer
from posttrain_jax.run.options import TrainOptions
from posttrain_jax.wiring.task import make_loader


@pytest.mark.parametrize(("rows_per_step", "warned"), [(8, False), (16, True)])
def test_a_step_with_more_rows_than_there_are_is_logged(tmp_path, capsys, rows_per_step, warned):
    """8 rows that are not packed: 16 a step would take each of them twice."""
    path = tmp_path / "a.jsonl"
    path.write_text("".join(f'{{"text": "row {n}"}}\n' for n in range(8)))
    data = build(str(path), byte_tokenizer(), TokenizeOptions(max_length=16), cache_dir=tmp_path)
    rows = pack(data, 16, packed=False)
    loader = make_loader(TrainOptions(steps=1, rows_per_step=rows_per_step), rows, make_mesh(), seed=0)
    tokens = next(loader).arrays["tokens"]
    loader.close()
    assert (len(np.unique(tokens, axis=0)) < rows_per_step) == warned
    assert ("some rows more than once; lower train.rows_per_step" in capsys.readouterr().out) == warned
