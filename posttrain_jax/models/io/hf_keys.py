"""Which keys of a Hugging Face config.json are read, which change nothing, and how all others are handled.

The reference is what transformers computes from a file. A key that it reads is read here or refused. A key of another
family, which it ignores (`sliding_window` of a llama), is ignored here too, with a message. A key that nobody
reads is named; where its name sounds as if it changed the computation, the file is refused.
"""

from __future__ import annotations

import functools
import logging
import re
from typing import Any

from posttrain_jax.core.errors import InputError, shown
from posttrain_jax.models.config import MOST_LAYERS

_SIZES = (
    "head_dim",
    "hidden_size",
    "intermediate_size",
    "max_position_embeddings",
    "num_attention_heads",
    "num_hidden_layers",
    "num_key_value_heads",
    "vocab_size",
)
_MOST = {"num_hidden_layers": MOST_LAYERS, "num_labels": 10_000}
_READ = (
    *_SIZES,
    "architectures",
    "bos_token_id",
    "eos_token_id",
    "id2label",
    "is_causal",
    "label2id",
    "model_type",
    "num_labels",
    "original_max_position_embeddings",
    "pad_token_id",
    "partial_rotary_factor",
    "per_layer_config",
    "quantization_config",
    "rms_norm_eps",
    "rope_parameters",
    "rope_scaling",
    "rope_theta",
    "score_bias",
    "tie_word_embeddings",
)
_GEMMA = (
    "attention_bias",
    "final_logit_softcapping",
    "hidden_activation",
    "layer_types",
    "query_pre_attn_scalar",
    "sliding_window",
    "use_bidirectional_attention",
)
_QWEN = ("hidden_act", "layer_types", "max_window_layers", "sliding_window", "use_sliding_window")
_READ_BY = {
    "gemma2": (*_GEMMA, "attn_logit_softcapping"),
    "gemma3_text": (*_GEMMA, "rope_local_base_freq", "sliding_window_pattern"),
    "llama": ("attention_bias", "hidden_act", "mlp_bias"),
    "ministral": ("hidden_act", "layer_types", "sliding_window"),
    "mistral": ("hidden_act", "sliding_window"),
    "qwen2": _QWEN,
    "qwen3": (*_QWEN, "attention_bias"),
}
"""The keys that transformers reads of every family, and of each."""

_HARMLESS = (
    # what the file is about, and how it was written
    *(
        "_commit_hash",
        "_name_or_path",
        "auto_map",
        "dtype",
        "finetuning_task",
        "is_llama_config",
        "name_or_path",
    ),
    *("prefix", "task_specific_params", "tokenizer_class", "torch_dtype", "transformers_version"),
    *("transformers.js_config", "unsloth_fixed", "unsloth_version"),
    # how it is run
    *("_attn_implementation", "_attn_implementation_autoset", "_attn_implementation_internal"),
    *(
        "_experts_implementation_internal",
        "attn_implementation",
        "cache_implementation",
        "chunk_size_feed_forward",
    ),
    *(
        "is_decoder",
        "output_attentions",
        "output_hidden_states",
        "pretraining_tp",
        "return_dict",
        "tf_legacy_loss",
    ),
    *("tie_last_hidden_states", "torchscript", "use_bfloat16", "use_cache", "use_return_dict"),
    # how it was or would be trained
    *(
        "attention_dropout",
        "classifier_dropout",
        "gradient_checkpointing",
        "initializer_range",
        "max_sequence_length",
    ),
    *("neftune_noise_alpha", "problem_type"),
    # ids of tokens that nothing here reads
    *("cls_token_id", "decoder_start_token_id", "mask_token_id", "sep_token_id", "unk_token_id"),
    # how tokens are drawn (transformers' generation config, as older files have it)
    *("bad_words_ids", "begin_suppress_tokens", "diversity_penalty", "do_sample", "early_stopping"),
    *("encoder_no_repeat_ngram_size", "encoder_repetition_penalty", "epsilon_cutoff", "eta_cutoff"),
    *("exponential_decay_length_penalty", "forced_bos_token_id", "forced_eos_token_id", "length_penalty"),
    *("max_length", "max_new_tokens", "min_length", "no_repeat_ngram_size", "num_beam_groups", "num_beams"),
    *("num_return_sequences", "output_scores", "remove_invalid_values", "repetition_penalty"),
    *("return_dict_in_generate", "suppress_tokens", "temperature", "top_k", "top_p", "typical_p"),
)
_HARMLESS_BY = {
    "gemma2": ("hidden_act", "sliding_window_size"),
    "gemma3_text": ("_sliding_window_pattern", "hidden_act"),
}
"""Keys that change no logit. Gemma's files have an old `hidden_act` beside `hidden_activation`, and numbers of which
`layer_types` and `sliding_window` mean the same."""

_GEMMA3_WITH_IMAGES = (
    *("boi_token_index", "eoi_token_index", "image_token_index", "mm_tokens_per_image", "text_config"),
    *("boi_token_id", "eoi_token_id", "image_token_id", "vision_config"),
)
_SOUNDS = re.compile(
    "rope|rotary|attn|attention|window|causal|cap|norm|scal|multipl|bias|expert|moe|layer|head|residual|embed|activ"
    "|mask|position|alibi|mup|skip|sparse|lora|decoder"
)
"""Parts of names of things that change what a transformer computes."""


def check_keys(fields: dict[str, Any], model_type: str, where: str) -> None:
    """Refuses, or names in the log, the keys of a config.json that transformers does not read for this family.

    A value that means "off" (null, false, 0, nothing) is accepted for every such key.

    Args:
      fields: the text model's part.
      model_type: a key of `_READ_BY`, or "gemma3" for the part around the text model's.

    Raises:
      InputError: a key sounds as if it changed the computation, and transformers knows no such key.
    """
    read = _GEMMA3_WITH_IMAGES if model_type == "gemma3" else _READ_BY[model_type]
    known = {*_READ, *_HARMLESS, *_HARMLESS_BY.get(model_type, ()), *read}
    others = {key for keys in _READ_BY.values() for key in keys}
    extra = sorted(key for key, value in fields.items() if key not in known and value)
    for key in extra:
        if key not in others and "drop" not in key and _SOUNDS.search(key.lower()):
            raise InputError(
                f"{where}: {shown(key)} is {shown(fields[key])}. transformers reads no such key of a {model_type} "
                "model, but it sounds as if it changed what the model computes; if transformers' results are right "
                "for this model, remove the key from the file."
            )
    if extra:
        log_once(
            f"{where}: ignored, as transformers does for a {model_type} model: "
            f"{', '.join(f'{shown(key)[1:-1]} = {shown(fields[key], 40)}' for key in extra[:12])}"
            f"{f' and {len(extra) - 12} more' if len(extra) > 12 else ''}."
        )


@functools.cache
def log_once(line: str) -> None:
    """Once in a process: a config is read several times on its way to a model."""
    logging.getLogger(__name__).warning("%s", line)


def check_values(fields: dict[str, Any], where: str) -> None:
    """Refuses sizes that no model can have, before transformers makes an entry for each layer or label.

    Raises:
      InputError: one that is no positive whole number, or too large.
    """
    for key in (*_SIZES, "num_labels", "sliding_window_pattern"):
        value = fields.get(key)
        most = _MOST.get(key, 2**31 - 1)
        right = isinstance(value, int) and not isinstance(value, bool) and 0 < value <= most
        if value is not None and not right:
            raise InputError(
                f"{where}: {key} is {shown(value)}, but must be a whole number from 1 to {most}."
            )
