"""The architectures of `transformers`, found in its own mappings, and configurations that make them tiny."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import transformers
from transformers import PretrainedConfig, PreTrainedModel
from transformers.models.auto import modeling_auto
from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

TASKS = (
    "FOR_SPEECH_SEQ_2_SEQ", "FOR_CTC", "FOR_AUDIO_CLASSIFICATION", "FOR_MASKED_LM", "FOR_SEQ_TO_SEQ_CAUSAL_LM",
    "FOR_CAUSAL_LM", "FOR_IMAGE_CLASSIFICATION", "FOR_VIDEO_CLASSIFICATION", "FOR_SEMANTIC_SEGMENTATION",
    "FOR_DEPTH_ESTIMATION", "FOR_MASKED_IMAGE_MODELING", "FOR_IMAGE_TEXT_TO_TEXT", "FOR_SEQUENCE_CLASSIFICATION",
    "FOR_TIME_SERIES_PREDICTION", "FOR_TIME_SERIES_CLASSIFICATION", "FOR_PRETRAINING", "FOR_OBJECT_DETECTION", "",
)  # fmt: skip
"""Of transformers' mappings from model types to classes; of each type, the class of the first of them is trained."""

VOCABULARY = 128
SPECIAL = 96
"""Tokens from here on have a meaning of their own, such as the place of an image."""
WIDTH, HEADS, HEAD, LAYERS = 32, 4, 8, 3
IMAGE, PATCH = 32, 8
POSITIONS = 64

Value = object


@dataclass(frozen=True, kw_only=True)
class Architecture:
    """One model type of transformers, and which of its classes is trained."""

    name: str
    task: str
    config: str
    model: str


def architectures() -> list[Architecture]:
    """All that transformers has a class for, by name."""
    found: list[Architecture] = []
    for name, config in CONFIG_MAPPING_NAMES.items():
        for task in TASKS:
            mapping = getattr(modeling_auto, f"MODEL_{task}_MAPPING_NAMES".replace("__", "_"))
            if name in mapping:
                first = mapping[name] if isinstance(mapping[name], str) else mapping[name][0]
                found.append(Architecture(name=name, task=task, config=config, model=first))
                break
    return sorted(found, key=lambda a: a.name)


# ---------------------------------------------------------------- tiny configurations

RULES: tuple[tuple[str, int], ...] = (
    (r"(num_labels|.*(kernel|stride|dilation|padding|ratio|interval|period|factor|_step|reduction).*)", 0),
    (r"num_feat_extract_layers|chunk_size_feed_forward|pretraining_tp|.*_(ignore_index|coefficient|cost)", 0),
    (r"(spatial_merge_size|temporal_patch_size|tubelet_size|num_frames|type_vocab_size|feature_size|input_size)", 0),
    (r"(num_channels|in_channels|audio_channels|input_channels|in_chans|.*sampling_rate|sample_rate)", 0),
    (r".*vocab(_size.*)?|num_embeddings|codebook_size", VOCABULARY),
    (r".*max_(position|source_positions|target_positions|2d_position|seq_len|length).*|n_positions|n_ctx", POSITIONS),
    (r"context_length|prediction_length|seq_len(gth)?|max_seq_len|num_patches|block_size", 16),
    (r".*(key_value_heads|kv_heads|kv_n_heads|key_value_groups)", 2),
    (r"n_groups|.*n_group|topk_group|num_expert_group", 1),
    (r".*(experts_per_tok(en)?|top_?k|moe_k)", 2),
    (r".*(n_shared_experts|num_shared_experts)", 1),
    (r".*num_.*experts|n_routed_experts|num_experts", 4),
    (r".*(linear|mamba|ssm).*num.*heads|n_mamba_heads", HEADS),
    (r"mamba_n_heads|mamba_num_heads", 2 * WIDTH // HEAD),
    (r".*head_dim.*|d_kv|d_head|dim_head|qk_.*_dim|v_head_dim|rotary_dim|.*_d_head", HEAD),
    (r".*heads?|n_head|.*num_heads.*", HEADS),
    (r"first_k_dense_replace|num_dense_layers|num_kv_shared_layers", 1),
    (r"decoder_sparse_step|(layer_)?depths|.*numb?_of_layers|num_block.*", 1),
    (r"(.*_)?(layers|depth|n_layer|num_blocks|blocks)(_.*)?|num_hidden_groups", LAYERS),
    (r"image_size|img_size|pretrain_image_size|resolution", IMAGE),
    (r"patch_sizes?", PATCH),
    (r".*(state_size|d_state)", HEAD),
    (r"time_step_rank|.*dt_rank|.*lora_rank|.*_rank", HEAD),
    (r".*(mel_bins|mel_dim|input_feat.*)", 16),
    (r".*chunk_size", 8),
    (r".*window.*", 4),
    (r"mask_(time|feature)_length|mask_time_min_masks", 2),
    (r".*(intermediate|ffn|mlp|inner|d_ff|dim_ff|feed_?forward|dff).*", 2 * WIDTH),
    (r"num_(queries|latents|query_tokens|.*tokens.*)|.*_n_latents|max_.*tiles", 8),
    (r"(.*_)?(num_buckets|codevectors.*)", 16),
    (r".*(hidden|embed|d_model|_dims?|channels|_groups|width|units|_size|filters|emb).*|dim|.*_dim", WIDTH),
)  # fmt: skip
"""Names of numbers in configurations, whole, and the most that they may be; 0: as they are. The first match counts."""

KINDS_OF_ID = re.compile(r".*(_token_id|_token_index|_bos_id|_eos_id|_pad_id|_id|_index)$")
LEFT_OUT = {
    "per_layer_config",
    "out_features",
    "out_indices",
    "stage_names",
    "transformers_version",
    "architectures",
    "id2label",
    "label2id",
    "dtype",
    "_name_or_path",
}

FIXES: dict[str, dict[str, Value]] = {
    "big_bird": {"attention_type": "original_full"},  # it turns to this itself in its first call for a short text
    "bigbird_pegasus": {"attention_type": "original_full"},
    "wav2vec2-bert": {"vocab_size": VOCABULARY},
    "moonshine": {"pad_token_id": 0},
    "mamba2": {"num_heads": 8},
    "reformer": {"axial_pos_embds_dim": [16, 16], "axial_pos_shape": [8, 8]},
    "bit": {"num_groups": 4},
    "autoformer": {"prediction_length": 8, "context_length": 16},
}
"""What the rules do not get right, per model type; a key with dots goes into inner configurations."""


def tiny(architecture: Architecture) -> PretrainedConfig:
    """The smallest sensible configuration.

    Raises:
        Exception: whatever transformers raises when it does not like it.
    """
    kind = getattr(transformers, architecture.config)
    small = _shrunk(kind().to_dict(), {})
    for key, value in FIXES.get(architecture.name, {}).items():
        *outer, last = key.split(".")
        inner = small
        for name in outer:
            inner = inner[name]  # type: ignore[assignment]
        inner[last] = value  # type: ignore[index]
    config = kind(**small)
    if not isinstance(config, getattr(transformers, architecture.model).config_class):
        config = config.get_text_config()
    for part in parts(config):
        if hasattr(part, "use_cache"):
            part.use_cache = False
    return config


def parts(config: PretrainedConfig) -> Iterator[PretrainedConfig]:
    """A configuration and those inside it."""
    yield config
    for value in vars(config).values():
        if isinstance(value, PretrainedConfig):
            yield from parts(value)


def _shrunk(values: Mapping[str, Value], ids: dict[str, int]) -> dict[str, Value]:
    layers = next((values[k] for k in ("num_hidden_layers", "n_layer", "num_layers") if k in values), None)
    made: dict[str, Value] = {}
    for name, value in values.items():
        if name in LEFT_OUT:
            continue
        if isinstance(value, Mapping) and name.endswith("config"):
            made[name] = _shrunk(value, ids)
        elif name == "rope_parameters" and isinstance(value, Mapping) and "rope_theta" in value:
            made[name] = {
                **value,
                "mrope_section": [2, 1, 1],
            }  # of half a head, where a model has three kinds of places
        elif KINDS_OF_ID.match(name) and isinstance(value, int) and not isinstance(value, bool):
            made[name] = _special(name, value, ids)
        elif name == "head_dim" and value is None:
            made[name] = HEAD
        elif name == "num_key_value_heads" and value == values.get("num_attention_heads"):
            made[name] = HEADS
        elif isinstance(value, list) and layers is not None and len(value) == layers and layers > LAYERS:
            made[name] = [_number(name, v) for v in _various(value, LAYERS)]  # one value per layer
        else:
            made[name] = _number(name, value)
    return made


def _various(values: list[Value], count: int) -> list[Value]:
    """So many of a list, as different as there are."""
    distinct = [v for i, v in enumerate(values) if v not in values[:i]]
    return (distinct * count)[:count]


def _special(name: str, value: int, ids: dict[str, int]) -> int:
    known = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1}
    if name in known:
        return known[name]
    return value if value < 3 else ids.setdefault(name, SPECIAL + len(ids))


def _number(name: str, value: Value) -> Value:
    if isinstance(value, (list, tuple)):
        return type(value)(_number(name, v) for v in value)
    if isinstance(value, bool) or not isinstance(value, int):
        return value
    most = next((most for pattern, most in RULES if re.fullmatch(pattern, name)), 0)
    if most == HEADS and value > 0:  # a power of two
        return min(1 << value.bit_length() - 1, HEADS)
    return min(value, most) if most else value


# ---------------------------------------------------------------- what they are


def kind_of(architecture: Architecture, config: PretrainedConfig) -> str:
    """One of the words of the table's second column."""
    names = {n for part in parts(config) for n, v in vars(part).items() if isinstance(v, int) and v > 1}
    task = architecture.task
    if task in ("FOR_SPEECH_SEQ_2_SEQ", "FOR_CTC", "FOR_AUDIO_CLASSIFICATION"):
        return "speech"
    if any(re.fullmatch(r".*(num_.*experts|n_routed_experts)", n) for n in names):
        return "mixture of experts"
    if any(re.fullmatch(r".*(state_size|d_state|linear_num.*heads|conv_L_cache)|.*mamba.*", n) for n in names):
        return "state space"
    if "IMAGE_TEXT" in task:
        return "vision and text"
    if config.is_encoder_decoder:
        return "encoder-decoder"
    main = main_input(architecture)
    if main.startswith("pixel") or "IMAGE" in task:
        return "vision"
    if main.startswith("input_values") or main.startswith("input_features"):
        return "speech"
    if "TIME_SERIES" in task or main.startswith("past_values"):
        return "time series"
    return "decoder" if task == "FOR_CAUSAL_LM" else "encoder"


def main_input(architecture: Architecture) -> str:
    return getattr(transformers, architecture.model).main_input_name


def make(architecture: Architecture, config: PretrainedConfig) -> PreTrainedModel:
    """A model in training mode."""
    return getattr(transformers, architecture.model)(config).train()


def arguments(model: PreTrainedModel) -> dict[str, inspect.Parameter]:
    """Of its forward."""
    return dict(inspect.signature(type(model).forward).parameters)
