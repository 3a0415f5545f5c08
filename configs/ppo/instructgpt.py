"""PPO-ptx as InstructGPT was trained.

Paper: Training language models to follow instructions with human feedback (arXiv:2203.02155, section 3.5, appendices
C.3 and C.4): 512 prompts an iteration of at most 1,000 tokens, completions of at most 1,000, temperature 1; 8
minibatches of 64, one epoch; beta 0.02, fixed; no discount; clip 0.2; the weights' average with decay 0.992; a
constant learning rate, warmed up over 10 iterations from a tenth of it; the value network from the reward model
(there of 6B for every policy) at 9e-6; 8 pretraining examples for each completion, their gradient times 27.8,
added in the same minibatch; 256,000 completions.
Not printed, and so ours: the learning rate (scanned between 2.55e-6 and 2.55e-5; without pretraining text all above
8.05e-6 diverged), GAE's lambda, the value's coefficient and clip, whitening, what a completion without EOS scores, the
clipping of the gradient norm, Adam's epsilon, weight decay (none).
Departs: a pretraining example is a packed row of `ppo.ptx_length` tokens.
Make the policy (`configs/sft/`) and the reward model (`configs/reward_model/`, bias by demonstrations) first and name
them,
  --config.model.init=SFT_MODEL --config.score.models="('REWARD_MODEL',)" --config.ppo.value=REWARD_MODEL
  --config.data.train=PROMPTS
Command: python -m launch.train --config=configs/ppo/instructgpt.py --workdir=runs/instructgpt (and the above)
Variant: `:tiny` (seconds, no download, another reward). Not run at its own size by us.
"""

from __future__ import annotations

from ml_collections import ConfigDict

from configs.base import online_config, tiny_prompts
from configs.sft.smollm2_135m import TINY_MODEL

ANSWERS = 512


def get_config(variant: str = "") -> ConfigDict:
    """The experiment; see the module's docstring for the variants."""
    config = online_config()
    config.model.init = "runs/instructgpt_sft"
    config.model.dtype = "bfloat16"
    config.data.train = "runs/instructgpt_prompts.jsonl"
    config.data.eval = "split:512"
    config.data.max_length = 2000  # C.1: prompts and completions of 1,000 tokens
    config.data.long_prompts = "drop"
    config.rollout.max_new_tokens = 1000
    config.rollout.temperature = 1.0
    config.score.models = ("runs/instructgpt_reward",)
    config.score.missing_eos = "replace"  # not printed
    config.ppo.value = "runs/instructgpt_reward"
    config.ppo.value_lr = 9e-6
    config.ppo.epochs = 1
    config.ppo.minibatches = 8
    config.ppo.clip = 0.2
    config.ppo.gamma = 1.0
    config.ppo.lam = 0.95  # not printed
    config.ppo.kl_coefficient = 0.02
    config.ppo.ptx_coefficient = 27.8
    config.ppo.ptx_data = "hf:NeelNanda/pile-10k"
    config.ppo.ptx_rows = 8 * ANSWERS
    config.ppo.ptx_length = 2048
    config.train.rows_per_step = ANSWERS
    config.train.micro_rows = 32
    config.train.steps = 500  # 256,000 completions
    config.optim.lr = 5e-6  # not printed
    config.optim.schedule = "constant"
    config.optim.warmup = 10 * config.ppo.minibatches  # updates: 10 iterations
    config.optim.warmup_start = 0.1
    config.optim.beta2 = 0.95
    config.optim.ema = 0.992
    config.eval.weights = "ema"
    config.mesh.data, config.mesh.fsdp = 1, -1
    config.log.every = 1
    config.eval.every = 50
    config.checkpoint.every = 50
    if variant == "tiny":
        tiny_prompts(config).model.config = dict(TINY_MODEL)
        config.ppo.minibatches = 1
        config.ppo.ptx_data = "configs/tiny/chats.jsonl"
        config.ppo.ptx_rows, config.ppo.ptx_length = 16, 64
    elif variant:
        raise ValueError(f"unknown variant {variant!r}; use tiny")
    return config
