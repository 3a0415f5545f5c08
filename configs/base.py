"""Every key of an experiment with its default. A config starts from here and changes what its paper changes."""

from __future__ import annotations

from ml_collections import ConfigDict

# What a chat model is asked at every evaluation, so that its change can be read.
PROMPTS = (
    "What is the capital of France?",
    "Give three tips for staying healthy.",
    "Rewrite this sentence in the passive voice: The cat chased the mouse.",
)


def base_config() -> ConfigDict:
    """All keys, all defaults; units in the comments."""
    config = ConfigDict()
    config.algorithm = "sft"
    config.seed = 0

    config.model = ConfigDict()
    config.model.init = ""  # a MODEL, or "random" with model.config
    config.model.config = ConfigDict()  # for "random": the fields of a Hugging Face config.json
    config.model.tokenizer = ""  # "" = of model.init; a MODEL; or "bytes"
    config.model.dtype = "float32"  # compute dtype; parameters are float32
    config.model.attention = "auto"  # auto, xla, cudnn (GPU), splash (TPU)
    config.model.lora = ConfigDict()
    config.model.lora.rank = 0  # 0 = train every parameter
    config.model.lora.alpha = 16.0
    config.model.lora.targets = ("q", "k", "v", "o", "gate", "up", "down")
    config.model.lora.rslora = False

    config.data = ConfigDict(convert_dict=False)
    config.data.train = ""  # path, folder, hf:NAME, tfds:NAME, or a mixture: '[["SOURCE", weight], ...]'
    config.data.eval = ""  # the same, or "split:0.05" of the training rows; "" = none
    config.data.max_length = 1024  # tokens per row
    config.data.pack = True
    config.data.truncate = "right"  # right, drop, error
    config.data.on_bad_row = "stop"  # stop, skip
    config.data.columns = ""  # our name -> the file's, as JSON: {"prompt": "question", "completion": "best"}
    config.data.ignore_columns = ""  # columns of the rows that are not read, "a,b"
    config.data.train_on = "all_turns"  # all_turns, last_turn
    config.data.chat_template = ""  # "" = the model's own; a path, the text, or the name of one of several
    config.data.chat_template_kwargs = ""  # its variables, as JSON: {"enable_thinking": false}
    config.data.text_as = "plain"  # text prompts and completions: plain (as they are), chat (turns of a chat)

    config.train = ConfigDict()
    config.train.steps = 0  # exactly one of steps and epochs
    config.train.epochs = 0.0
    config.train.rows_per_step = 8  # global
    config.train.micro_rows = 0  # global rows at once; 0 = all
    config.train.remat = "elementwise"  # none, elementwise, mlp, full
    config.train.max_skipped = 5  # non-finite updates in a row that stop the run

    config.optim = ConfigDict()
    config.optim.name = "adamw"  # adamw, adafactor, lion, rmsprop, sgd, adam_tf
    config.optim.lr = 1e-5
    config.optim.schedule = "cosine"  # constant, linear, cosine, wsd
    config.optim.warmup = 0.0  # < 1: share of the updates; else updates (PPO, RLOO: several a step)
    config.optim.warmup_start = 0.0  # where the warm-up begins, as a share of lr
    config.optim.min_lr_ratio = 0.0
    config.optim.decay_share = 0.1  # wsd
    config.optim.beta1 = 0.9
    config.optim.beta2 = 0.999
    config.optim.eps = 1e-8
    config.optim.weight_decay = 0.0
    config.optim.momentum = 0.0  # sgd
    config.optim.clip_norm = 1.0  # 0 = off
    config.optim.ema = 0.0  # decay of the moving average of the weights; 0 = off

    config.mesh = ConfigDict()
    config.mesh.data = -1  # -1 = the devices that are left
    config.mesh.fsdp = 1
    config.mesh.tensor = 1

    config.log = ConfigDict()
    config.log.every = 10  # steps
    config.log.tensorboard = True
    config.log.wandb_project = ""  # "" = off
    config.log.profile = ""  # "10:12" = trace these steps

    config.eval = ConfigDict()
    config.eval.every = 0  # steps; 0 = before the first and after the last
    config.eval.weights = "raw"  # which it looks at: raw (the last), ema (their moving average, optim.ema)
    config.eval.batch_rows = 8
    config.eval.prompts = ()  # answered at every evaluation, into samples.jsonl
    config.eval.max_new_tokens = 128

    config.checkpoint = ConfigDict()
    config.checkpoint.every = 0  # steps; 0 = at the end
    config.checkpoint.keep = 2
    config.checkpoint.best_metric = ""  # such as eval/loss: its best checkpoint stays too
    config.checkpoint.best_is_high = (
        False  # whether the best is the highest (of an accuracy) or the lowest (of a loss)
    )
    return config


def preference_config() -> ConfigDict:
    """The keys of `base_config` and those of learning from preferences.

    `train.rows_per_step` counts prompts (for pairs: comparisons); `train.micro_rows` counts packed rows.
    """
    config = base_config()
    config.algorithm = "dpo"
    del config.data["pack"], config.data["train_on"]  # completions are always packed, and trained on whole
    config.data.row_length = (
        0  # tokens in a packed row; 0 = what the longest prompt with its completions needs
    )
    config.data.share_prompt = "auto"  # the prompt once for all its completions: auto, yes, no
    config.dpo = ConfigDict()
    config.dpo.loss = "dpo"  # algorithms/dpo.py::LOSSES
    config.dpo.beta = 0.1
    config.dpo.label_smoothing = 0.0  # cdpo, robust: share of wrong labels; exo: its epsilon
    config.dpo.gamma = 0.0  # simpo, slic
    config.dpo.alpha = 0.0  # rdpo, dpop, cpo, orpo, slic: weight of the second term
    config.dpo.eta = 1.0  # rpo
    config.dpo.nll_weight = 0.0  # of the chosen completion's mean negative log-likelihood
    config.dpo.skip_eos = False  # leave the end-of-turn token out of the comparison
    config.dpo.reference = "cached"  # cached, memory, adapter (LoRA off), none

    config.kto = ConfigDict()
    config.kto.beta = 0.1
    config.kto.desirable_weight = 1.0  # lambda_D
    config.kto.undesirable_weight = 1.0  # lambda_U

    config.reward = ConfigDict()
    config.reward.loss = "bradley_terry"  # algorithms/reward_model.py::LOSSES
    config.reward.head_init = "normal"  # normal (standard deviation 1 / sqrt(d_model + 1)), zeros
    config.reward.label_smoothing = 0.0  # smoothed_label: share of wrong labels
    config.reward.center = 0.0  # coefficient of (r_w + r_l)^2
    config.reward.margin_scale = 1.0  # margin: the data's margins times this
    config.reward.normalize = "demonstrations"  # none, demonstrations (score 0), unit (mean 0, variance 1)
    config.reward.members = 1  # models in the ensemble
    config.reward.bootstrap = True  # each member has its own draw of the prompts
    return config


def online_config() -> ConfigDict:
    """The keys of `base_config` and those of learning from the policy's own answers.

    `train.rows_per_step` counts prompts; `train.micro_rows` counts answers; `data.max_length` holds a prompt with its
    answer. A step is an iteration: answers, then all updates on them.
    """
    config = base_config()
    config.algorithm = "ppo"
    del config.data["pack"], config.data["train_on"], config.data["truncate"]
    # An evaluation answers the held-out prompts as an iteration does, the first 16 of them into samples.jsonl.
    del config.eval["batch_rows"], config.eval["prompts"], config.eval["max_new_tokens"]
    config.eval.temperature = -1.0  # of its answers, 0 = the likeliest token; -1 = rollout.temperature
    config.data.long_prompts = "error"  # error, drop
    config.data.prompt_tokens = 0  # a `text` row's first so many tokens are its prompt
    config.rollout = ConfigDict()
    config.rollout.max_new_tokens = 64
    config.rollout.temperature = 1.0
    config.rollout.samples = 1  # answers per prompt
    config.rollout.batch_size = 0  # answers written side by side; 0 = all
    config.rollout.truncate_token = -1  # answers end after the first of these; -1 = off
    config.rollout.truncate_after = 0  # but not within so many tokens
    config.rollout.max_logp_difference = 0.0  # nats, engine to trainer; more stops the run; 0 = off
    # auto (where the KL is charged or watched: the policy at the start; else none), none, frozen (a second copy of the
    # policy), adapter (LoRA off), ema (optim.ema's), or a MODEL
    config.rollout.reference = "auto"

    config.score = ConfigDict()
    config.score.functions = ()  # "module:function", each run in worker processes
    config.score.arguments = ""  # of functions, as JSON: {"module:function": {"argument": value}}
    config.score.completions_per_call = 1  # of a function
    config.score.models = ()  # MODELs with a score head
    config.score.weights = ()  # of the functions, then of the models; () = 1 each
    config.score.aggregate = (
        "sum"  # of the weighted rewards; piecewise: Llama 2's, safety first, helpfulness second
    )
    config.score.safety_threshold = 0.15  # piecewise: a probability
    config.score.normalize = (
        0  # gain and bias by this many answers of the starting policy (Ziegler: 256); 0 = off
    )
    config.score.gold_function = ""  # scores held-out answers as eval/gold; nothing is learnt from it
    config.score.gold_model = ""  # the same, by a reward model
    config.score.ensemble = "mean"  # an ensemble's members: mean, min, uncertainty
    config.score.coefficient = 0.0  # uncertainty: of the variance
    config.score.free_tokens = 0
    config.score.per_token = 0.0  # taken off for each token beyond free_tokens
    config.score.clip = 0.0  # 0 = off
    config.score.missing_eos = "keep"  # an answer without an end token: keep, replace, penalize
    config.score.missing_eos_value = -1.0
    config.score.seconds = 10.0  # that a function may take for an answer
    config.score.failure = (
        0.0  # in evaluations, of an answer that a function fails at; training leaves it out
    )
    config.score.workers = 2

    config.ppo = ConfigDict()
    config.ppo.epochs = 4
    config.ppo.minibatches = 1
    config.ppo.clip = 0.2
    config.ppo.clip_high = 0.0  # how far the ratio may rise, where not clip (DAPO: 0.28); 0 = clip
    config.ppo.dual_clip = 0.0  # 0 = off
    config.ppo.value = (
        "policy"  # policy (a copy of it), shared (a head on its trunk), or a MODEL with a score head
    )
    config.ppo.value_lr = 0.0  # the value network's own peak; 0 = optim.lr
    config.ppo.value_warmup = 0  # iterations in which the value network alone is trained
    config.ppo.value_clip = 0.2
    config.ppo.value_coefficient = 0.1
    config.ppo.gamma = 1.0
    config.ppo.lam = 0.95
    config.ppo.kl_coefficient = 0.05
    config.ppo.kl_target = 0.0  # nats per answer; 0 = the coefficient stays
    config.ppo.kl_horizon = 10_000.0  # answers
    config.ppo.whiten_rewards = False
    config.ppo.whiten_advantages = True
    config.ppo.ptx_coefficient = 0.0  # of the pretraining loss mixed in (PPO-ptx; InstructGPT: 27.8); 0 = off
    config.ppo.ptx_data = ""  # as data.train of SFT
    config.ppo.ptx_rows = 0  # packed rows an iteration (InstructGPT: 8 for each answer)
    config.ppo.ptx_length = 0  # tokens in such a row; 0 = data.max_length

    config.rloo = ConfigDict()
    config.rloo.epochs = 1
    config.rloo.minibatches = 1
    config.rloo.clip = 0.2
    config.rloo.kl_coefficient = 0.05

    config.stop = ConfigDict()  # what ends a run early, checked wherever it is logged; 0 = off
    config.stop.kl = 0.0  # train/kl_per_sequence above this, nats
    config.stop.entropy = 0.0  # train/entropy_per_token below this, nats
    config.stop.repetition = 0.0  # train/repeated_4gram_share above this, a share
    config.stop.gold_errors = 0.0  # eval/gold below its best by this many standard errors

    config.optim.eps = 1e-5
    config.optim.schedule = "linear"
    return config


def tiny(config: ConfigDict) -> ConfigDict:
    """Turns an experiment into one of the same shape that takes seconds on a CPU and needs no download."""
    config.model.init = "random"
    config.model.tokenizer = "bytes"
    config.model.dtype = "float32"
    config.data.train = "configs/tiny/chats.jsonl"
    config.data.eval = "split:0.2"
    config.data.max_length = 256
    config.data.chat_template = ""
    config.train.steps = 4
    config.train.epochs = 0.0
    config.train.rows_per_step = 4
    config.train.micro_rows = 0
    config.optim.lr = 1e-3
    config.mesh.data, config.mesh.fsdp, config.mesh.tensor = -1, 1, 1
    config.log.every = 1
    config.eval.every = 2
    if "batch_rows" in config.eval:
        config.eval.batch_rows = 2
        config.eval.max_new_tokens = 8
        config.eval.prompts = config.eval.prompts[:1]
    config.checkpoint.every = 2
    return config


def tiny_preferences(config: ConfigDict) -> ConfigDict:
    """`tiny` for an experiment on preferences."""
    tiny(config)
    config.data.train = "configs/tiny/pairs.jsonl"
    config.data.eval = "split:6"
    config.data.row_length = 0
    config.data.truncate = "right"
    config.train.micro_rows = 0
    return config


def tiny_prompts(config: ConfigDict) -> ConfigDict:
    """`tiny` for an experiment on the policy's own answers: its reward is the share of the letter "e" in them."""
    tiny(config)
    config.data.train = "configs/tiny/prompts.jsonl"
    config.data.eval = "split:2"
    config.data.max_length = 48
    config.data.long_prompts = "error"
    config.rollout.max_new_tokens = 8
    config.rollout.truncate_token, config.rollout.truncate_after = -1, 0
    config.score.functions, config.score.models = ("configs.tiny.rewards:share_of_e",), ()
    config.score.normalize = 0  # a new model's answers hold no "e"
    config.score.workers = 1
    if config.ppo.value not in ("policy", "shared"):
        config.ppo.value = "policy"
    config.train.rows_per_step = 8
    return config
