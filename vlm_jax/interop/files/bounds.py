"""The values that settings of published folders may have, by their names in the files.

Each setting that this library or what it calls reads has its bounds here, wide enough for every model there is. What depends on
several settings is checked by `config/consistency.py`.
"""

from __future__ import annotations

from vlm_jax.interop.files.settings import (
    FLAG,
    NULL,
    OBJECT,
    TEXT,
    WORD,
    Bounds,
    Rule,
    listed,
    number,
    number_from,
    one_of,
    whole,
)

WIDTH, HEADS, LAYERS, VOCABULARY = whole(1, 2**18), whole(1, 2**12), whole(1, 2**10), whole(1, 2**24)
POSITIONS, PIXELS, PATCH, COUNT = whole(1, 2**31 - 1), whole(1, 2**12), whole(1, 2**10), whole(1, 2**16)
EPS, FACTOR, SHARE, THETA = number(0, 0.1), number(0, 1e6), number(0, 1), number(1, 1e10)
TOKEN = whole(0, 2**31 - 1)
TOKENS = TOKEN | listed(TOKEN, 1, 10_000) | NULL
PINPOINTS = listed(listed(whole(1, 2**14), 2, 2), 1, 1000)


def _each(names: str, rule: Rule) -> dict[str, Rule]:
    return dict.fromkeys(names.split(), rule)


ROPE: Bounds = {
    **_each("rope_type type", WORD | NULL),
    "rope_theta": THETA,
    "partial_rotary_factor": SHARE,
    **_each("factor attention_factor beta_fast beta_slow", FACTOR | NULL),
    **_each("low_freq_factor high_freq_factor", FACTOR),
    **_each("mscale mscale_all_dim", number_from(0, 1000) | NULL),
    **_each("short_factor long_factor", listed(FACTOR, 1, 2**12)),
    "original_max_position_embeddings": whole(2, 2**31 - 1),
    "truncate": FLAG,
}

CONFIG: Bounds = {
    **_each("hidden_size intermediate_size d_model ffn_dim embed_dim projection_dim", WIDTH),
    **_each("head_dim word_embed_proj_dim projection_size", WIDTH | NULL),
    **_each("num_attention_heads n_heads resampler_n_heads", HEADS),
    "num_key_value_heads": HEADS | NULL,
    "resampler_head_dim": WIDTH,
    **_each("num_hidden_layers n_layers resampler_depth cross_layer_interval", LAYERS),
    **_each("max_window_layers num_register_tokens", whole(0, 2**10)),
    **_each("num_local_experts num_experts_per_tok", whole(1, 2**10)),
    "vocab_size": VOCABULARY,
    "additional_vocab_size": whole(0, 2**24),
    "type_vocab_size": whole(1, 2**10),
    "num_labels": whole(0, 2**20) | NULL,
    **_each("resampler_n_latents expansion_ratio num_channels", COUNT),
    "mlp_ratio": number(0, 256),
    **_each("max_position_embeddings max_seq_len", POSITIONS),
    "sliding_window": POSITIONS | NULL,
    "image_size": PIXELS | listed(PIXELS, 1, 2),
    "patch_size": PATCH | listed(PATCH, 1, 2),
    "image_grid_pinpoints": PINPOINTS,
    **_each("vision_feature_layer vision_feature_layers", whole(-1024, 1024) | listed(whole(-1024, 1024), 1, 1024)),
    **_each("rms_norm_eps layer_norm_eps layer_norm_epsilon projector_layernorm_eps", EPS),
    **_each("rope_theta rotary_emb_base", THETA),
    **_each("partial_rotary_factor rotary_pct", SHARE),
    "original_max_position_embeddings": ROPE["original_max_position_embeddings"],
    **dict.fromkeys(("rope_scaling", "rope_parameters"), ROPE),
    "alibi_bias_max": number(0, 10_000),
    "logit_scale_init_value": number_from(-100, 100),
    "eos_token_id": TOKENS,
    "pad_token_id": TOKEN | NULL,
    **_each("hidden_act activation_function projector_hidden_act alpha_type attn_type", WORD),
    "position_embedding_type": WORD | NULL,
    "model_type": TEXT,
    "vision_feature_select_strategy": WORD,
    **_each("layer_types architectures", listed(WORD, 0, 2**10) | NULL),
    **_each("tie_word_embeddings attention_bias mlp_bias qkv_bias use_qkv_bias no_bias enable_bias", FLAG),
    **_each("multimodal_projector_bias qk_layernorm qk_ln attn_qk_ln qk_layer_norms qk_layer_norms_perceiver", FLAG),
    **_each("use_parallel_residual use_sliding_window use_swiglu_ffn use_mask_token use_resampler", FLAG),
    **_each("do_layer_norm_before _remove_final_layer_norm layer_norm_elementwise_affine alibi prefix_lm", FLAG),
    **_each("vision_use_head is_decoder add_cross_attention", FLAG),
    "use_bidirectional_attention": FLAG | NULL,
    **_each("text_config vision_config perceiver_config attn_config", OBJECT | NULL),
    "id2label": OBJECT | NULL,
}

OPEN_FLAMINGO: Bounds = {"cross_attn_every_n_layers": LAYERS, **_each("checkpoint vision language", WORD)}

GENERATION: Bounds = {
    "eos_token_id": TOKENS,
    "do_sample": FLAG | NULL,
    "temperature": number_from(0, 10_000) | NULL,
    "top_k": whole(0, 2**31 - 1) | NULL,
    "top_p": number_from(0, 1) | NULL,
    "num_beams": whole(1, 1024) | NULL,
    "early_stopping": FLAG | NULL | one_of("never"),
    **_each("max_new_tokens max_length", POSITIONS | NULL),
    "repetition_penalty": number(0, 1000) | NULL,
    "length_penalty": number_from(-1000, 1000) | NULL,
}

_TEMPLATE = (
    TEXT
    | NULL
    | Rule(
        "templates by their names",
        lambda found: (
            (isinstance(found, dict) and all(isinstance(one, str) for one in found.values()))
            or (
                isinstance(found, list) and all(isinstance(one, dict) and isinstance(one.get("template"), str) for one in found)
            )
        ),
    )
)
_SIDES = ({"height", "width"}, {"shortest_edge"}, {"longest_edge"}, {"shortest_edge", "longest_edge"})
_SIZE = (
    PIXELS
    | listed(PIXELS, 2, 2)
    | Rule(
        "an object with height and width, shortest_edge or longest_edge, in pixels",
        lambda size: isinstance(size, dict) and size.keys() in _SIDES and all(map(PIXELS.good, size.values())),
    )
)

PROCESSING: Bounds = {
    **_each("size crop_size", _SIZE),
    "pad_size": _SIZE | NULL,
    "image_size": PIXELS | listed(PIXELS, 2, 2) | OBJECT,
    "resample": whole(0, 5),
    "rescale_factor": SHARE,
    "image_mean": listed(number_from(0, 1), 3, 3),
    "image_std": listed(number(0, 10), 3, 3),
    **_each("do_resize do_rescale do_normalize do_image_splitting", FLAG),
    **_each("do_center_crop do_convert_rgb do_pad", FLAG | NULL),
    "image_grid_pinpoints": PINPOINTS,
    "data_format": one_of("channels_first") | NULL,
    "input_data_format": one_of("channels_last") | NULL,
    "image_seq_len": COUNT,
    **_each("image_token fake_image_token", WORD | OBJECT),
    "chat_template": _TEMPLATE,
}
PROCESSING["image_processor"] = PROCESSING  # processor_config.json has the picture processor's settings within

_NAMED = WORD | OBJECT | NULL  # a special token
TOKENIZER: Bounds = {
    "tokenizer_class": WORD,
    **_each("bos_token eos_token unk_token pad_token image_token", _NAMED),
    "model_max_length": number(0, 1e40) | NULL,
    **_each("padding_side truncation_side", one_of("left", "right") | NULL),
    **_each("add_bos_token add_eos_token add_prefix_space clean_up_tokenization_spaces legacy", FLAG | NULL),
    "chat_template": _TEMPLATE,
}

GGUF: Bounds = {
    **_each("llama.embedding_length llama.feed_forward_length llama.attention.key_length", WIDTH),
    **_each("llama.attention.head_count llama.attention.head_count_kv", HEADS),
    "llama.block_count": LAYERS,
    "llama.context_length": POSITIONS,
    "llama.attention.sliding_window": whole(0, 2**31 - 1),
    "llama.attention.layer_norm_rms_epsilon": EPS,
    "llama.rope.freq_base": THETA,
    "llama.rope.scaling.factor": FACTOR,
}
