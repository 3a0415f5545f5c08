"""The two real models: `transformers`' logits and greedy answers, with the tokenizer built from the GGUF."""

from __future__ import annotations

import dataclasses
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="torch is not installed (extra [parity])")

from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from posttrain_jax.models.io.export import export_hf
from posttrain_jax.models.io.load import LoadedModel, load_model
from posttrain_jax.models.io.tokenizer import stop_token_ids
from posttrain_jax.models.transformer import make_model
from posttrain_jax.sampling.choose import Sampling
from posttrain_jax.sampling.generate import GenerateOptions, generate
from posttrain_jax.sampling.score import (
    BFLOAT16_LARGEST,
    BFLOAT16_MEAN,
    FLOAT32_LARGEST,
    difference,
    score_samples,
)

NEW_TOKENS = 24


@dataclasses.dataclass(frozen=True)
class Real:
    """A real model here, and exported and loaded in transformers."""

    ours: LoadedModel
    theirs: torch.nn.Module
    their_tokenizer: PreTrainedTokenizerFast
    gguf: pathlib.Path

    def ours_greedy(self, ids: list[int]) -> list[int]:
        """Greedy continuation by the engine, until a stop token."""
        (sample,) = generate(
            self.ours.model,
            self.ours.params,
            [np.asarray(ids)],
            GenerateOptions(NEW_TOKENS, stop_token_ids=stop_token_ids(self.ours.config, self.ours.tokenizer)),
        )
        return sample.tokens.tolist()

    def their_greedy(self, ids: list[int]) -> list[int]:
        with torch.no_grad():
            prompt = torch.tensor([ids])
            out = self.theirs.generate(
                prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=NEW_TOKENS, do_sample=False
            )
        return out[0, len(ids) :].tolist()

    def logits(self, ids: list[int]) -> np.ndarray:
        return np.asarray(jax.jit(self.ours.model.apply)(self.ours.params, jnp.asarray([ids])).logits_BTV)


def load_real(path: pathlib.Path, folder: pathlib.Path) -> Real:
    ours = load_model(str(path))
    export_hf(folder, config=ours.config, params=ours.params, tokenizer=ours.tokenizer)
    theirs = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager").eval()
    return Real(ours, theirs, AutoTokenizer.from_pretrained(folder), path)


@pytest.fixture(scope="module")
def smollm2(smollm2_gguf: pathlib.Path, tmp_path_factory: pytest.TempPathFactory) -> Real:
    return load_real(smollm2_gguf, tmp_path_factory.mktemp("smollm2") / "hf")


@pytest.fixture(scope="module")
def gemma(gemma_gguf: pathlib.Path, tmp_path_factory: pytest.TempPathFactory) -> Real:
    return load_real(gemma_gguf, tmp_path_factory.mktemp("gemma") / "hf")


def assert_close(ours: np.ndarray, reference: np.ndarray) -> None:
    assert np.abs(ours - reference).max() <= 1e-4 * np.abs(reference).max()


@pytest.mark.slow
def test_smollm2_answers_as_in_transformers(smollm2: Real) -> None:
    tokenizer = smollm2.ours.tokenizer
    assert tokenizer is not None
    for question in ("What is the capital of France?", "Name three primary colors.", "What is 2 + 2?"):
        text = tokenizer.apply_chat_template(
            [{"role": "user", "content": question}], tokenize=False, add_generation_prompt=True
        )
        ids = tokenizer.encode(text, add_special_tokens=False)
        assert smollm2.their_tokenizer.encode(text, add_special_tokens=False) == ids
        answer = smollm2.ours_greedy(ids)
        assert answer == smollm2.their_greedy(ids)
        if "France" in question:
            assert tokenizer.decode(answer) == "The capital of France is Paris.<|im_end|>"
    plain = tokenizer.encode("The capital of France is")
    answer = smollm2.ours_greedy(plain)
    assert answer == smollm2.their_greedy(plain)
    assert tokenizer.decode(answer).startswith(" Paris.")


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_every_sampled_token_has_the_trainers_log_probability(smollm2: Real, dtype: str) -> None:
    """The exactness gate on a real model, with refill: unlike prompts and answers, 3 slots."""
    model, params = make_model(smollm2.ours.config, dtype=dtype), smollm2.ours.params
    tokenizer = smollm2.ours.tokenizer
    assert tokenizer is not None
    texts = ("Once upon a time", "The capital of France is", "1, 2, 3, 4, 5,", "def add(a, b):\n    return")
    prompts = [np.asarray(tokenizer.encode(text)) for text in texts]
    options = GenerateOptions([40, 8, 24, 16], sampling=Sampling(1.0), seed=0, batch_size=3)
    samples = generate(model, params, prompts, options)
    scores = score_samples(model, params, prompts, samples)
    apart = difference([sample.logprobs for sample in samples], scores)
    print(apart)
    assert apart.tokens == 88
    if dtype == "float32":
        assert apart.largest < FLOAT32_LARGEST
    else:
        assert apart.largest < BFLOAT16_LARGEST and apart.mean < BFLOAT16_MEAN


@pytest.mark.slow
def test_gemma_continues_as_in_transformers(gemma: Real) -> None:
    tokenizer = gemma.ours.tokenizer
    assert tokenizer is not None
    for text in ("The capital of France is", "Once upon a time", "def fibonacci(n):\n    "):
        ids = tokenizer.encode(text)
        assert ids[0] == tokenizer.bos_token_id
        assert gemma.their_tokenizer.encode(text) == ids
        assert gemma.ours_greedy(ids) == gemma.their_greedy(ids)


@pytest.mark.slow
def test_gemma_beyond_its_sliding_window(gemma: Real) -> None:
    """640 tokens, where 15 of 18 layers see the last 512."""
    ids = np.random.default_rng(0).integers(300, 200_000, 640).tolist()
    with torch.no_grad():
        reference = gemma.theirs(torch.tensor([ids])).logits.numpy()
    assert_close(gemma.logits(ids)[:, -80:], reference[:, -80:])


@pytest.mark.slow
@pytest.mark.parametrize("name", ["smollm2", "gemma"])
def test_logits_equal_transformers_own_gguf_reader(name: str, request: pytest.FixtureRequest) -> None:
    real: Real = request.getfixturevalue(name)
    tokenizer = real.ours.tokenizer
    assert tokenizer is not None
    theirs = AutoModelForCausalLM.from_pretrained(
        real.gguf.parent, gguf_file=real.gguf.name, attn_implementation="eager", dtype=torch.float32
    )
    ids = tokenizer.encode("The quick brown fox jumps over the lazy dog. 1, 2, 3:\n\n4")
    with torch.no_grad():
        reference = theirs.eval()(torch.tensor([ids])).logits.numpy()
    assert_close(real.logits(ids), reference)
