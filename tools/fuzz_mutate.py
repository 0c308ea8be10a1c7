"""Changes that make a GGUF lie: numbers, types, tensors, bytes. For tools/fuzz.py."""

from __future__ import annotations

import math
import random
import struct
from collections.abc import Callable, Iterator
from typing import Any

import gguf
from fuzz_gguf import ARRAY, FLOATS, STRING, File, Tensor, Value

INTS = [
    0,
    1,
    2,
    3,
    5,
    7,
    8,
    31,
    32,
    33,
    63,
    64,
    65,
    96,
    127,
    128,
    255,
    256,
    257,
    511,
    512,
    513,
    1000,
    1024,
    4096,
    65535,
]
INTS += [
    65536,
    1 << 20,
    (1 << 24) + 1,
    1 << 30,
    (1 << 31) - 1,
    1 << 31,
    (1 << 32) - 256,
    (1 << 32) - 1,
    1 << 40,
    1 << 63,
]
INTS += [-1, -2, -32, -128, -(1 << 31)]
NUMBERS = [0.0, -0.0, 1.0, -1.0, 0.5, 1e-45, 1e-30, 1e-6, 10.0, 1e4, 1e6, 3e38, -3e38, math.inf, -math.inf, math.nan]
WORDS = [
    "",
    "none",
    "linear",
    "yarn",
    "longrope",
    "su",
    "gpt2",
    "llama",
    "bert",
    "t5",
    "rwkv",
    "plamo2",
    "no_vocab",
    "test",
]
WORDS += ["hybriddna", "default", "qwen2", "x" * 5000, "\xff\xfe", "a\nb", "%s%n", "silu", "gelu"]
ARCHES = [
    "llama",
    "qwen2",
    "qwen3",
    "gemma",
    "gemma2",
    "gemma3",
    "gpt-oss",
    "phi3",
    "mamba",
    "lfm2",
    "bert",
    "t5",
    "clip",
]
ARCHES += [
    "rwkv6",
    "rwkv7",
    "deepseek2",
    "llama4",
    "falcon",
    "bloom",
    "gpt2",
    "mpt",
    "jamba",
    "granitehybrid",
    "plamo2",
]
ARCHES += [
    "command-r",
    "qwen2vl",
    "chatglm",
    "smollm3",
    "cohere2",
    "nemotron_h",
    "wavtokenizer-dec",
    "llada",
    "dream",
    "nonsense",
]

# keys that upstream knows and the tiny models do not have; "." stands for the architecture
FOREIGN = """.rope.dimension_count .rope.freq_base .rope.freq_base_swa .rope.scaling.type .rope.scaling.factor .rope.scaling.attn_factor
.rope.scaling.original_context_length .rope.scaling.yarn_log_multiplier .rope.scaling.yarn_ext_factor .rope.scaling.alpha
.rope.scale_linear .rope.dimension_sections .rope.dimension_count_swa .attention.key_length .attention.value_length
.attention.key_length_swa .attention.value_length_swa .attention.key_length_mla .attention.value_length_mla
.attention.sliding_window .attention.sliding_window_pattern .attention.causal .attention.scale .attention.temperature_scale
.attention.temperature_length .attention.max_alibi_bias .attention.clamp_kqv .attention.layer_norm_epsilon
.attention.layer_norm_rms_epsilon .attention.group_norm_epsilon .attention.group_norm_groups .attention.shared_kv_layers
.attention.q_lora_rank .attention.kv_lora_rank .attention.output_scale .attention.softmax_scale .attention.recurrent_layers
.attn_logit_softcapping .final_logit_softcapping .router_logit_softcapping .logit_scale .residual_scale .embedding_scale
.pooling_type .nextn_predict_layers .expert_count .expert_used_count .expert_group_count .expert_group_used_count
.expert_feed_forward_length .expert_shared_count .expert_weights_scale .expert_weights_norm .expert_gating_func
.expert_shared_feed_forward_length .leading_dense_block_count .interleave_moe_layer_step .moe_every_n_layers
.full_attention_interval .embedding_length_out .embedding_length_per_layer_input .vocab_size .use_parallel_residual
.tensor_data_layout .decoder_start_token_id .decoder_block_count .classifier.output_labels .ssm.group_count
.ssm.inner_size .ssm.state_size .ssm.conv_kernel .ssm.time_step_rank .ssm.dt_b_c_rms .shortconv.l_cache .wkv.head_size
.token_shift_count .altup.num_inputs .altup.active_idx .activation_sparsity_scale .n_deepstack_layers .swin_norm .rescale_every_n_layers
.time_mix_extra_dim .time_decay_extra_dim .residual_scale .swiglu_clamp_exp .swiglu_clamp_shexp .context_length .embedding_length
.block_count .feed_forward_length .attention.head_count .attention.head_count_kv general.alignment general.architecture
general.name general.file_type general.quantization_version general.sampling.temp general.sampling.top_k general.sampling.top_p
general.sampling.min_p general.sampling.penalty_repeat general.sampling.penalty_last_n general.sampling.sequence split.count split.no
split.tensors.count tokenizer.ggml.model tokenizer.ggml.pre tokenizer.ggml.tokens tokenizer.ggml.scores
tokenizer.ggml.token_type tokenizer.ggml.token_type_count tokenizer.ggml.merges tokenizer.ggml.bos_token_id tokenizer.ggml.eos_token_id
tokenizer.ggml.eot_token_id tokenizer.ggml.eom_token_id tokenizer.ggml.unknown_token_id tokenizer.ggml.seperator_token_id
tokenizer.ggml.padding_token_id tokenizer.ggml.cls_token_id tokenizer.ggml.mask_token_id tokenizer.ggml.add_bos_token
tokenizer.ggml.add_eos_token tokenizer.ggml.add_sep_token tokenizer.ggml.add_space_prefix tokenizer.ggml.remove_extra_whitespaces
tokenizer.ggml.precompiled_charsmap tokenizer.ggml.fim_pre_token_id tokenizer.ggml.fim_suf_token_id tokenizer.ggml.fim_mid_token_id
tokenizer.ggml.prefix_token_id tokenizer.ggml.suffix_token_id tokenizer.ggml.middle_token_id tokenizer.ggml.suppress_tokens
tokenizer.chat_template tokenizer.chat_template.tool_use tokenizer.chat_templates tokenizer.rwkv.world""".split()


def _number(rng: random.Random, old: Any) -> Any:
    near = [int(old) + 1, int(old) - 1, int(old) * 2, int(old) // 2, -int(old)] if isinstance(old, int) else []
    return rng.choice(INTS if rng.random() < 0.6 or not near else near)


def _value(rng: random.Random, kind: int, old: Any) -> Any:
    if kind == STRING:
        return rng.choice(WORDS)
    if kind in FLOATS:
        return rng.choice(NUMBERS)
    return rng.choice([0, 1]) if kind == 7 else _number(rng, old)


def _fresh(rng: random.Random, old: Any = 1) -> Value:
    """A value of any type: scalar, or an array of 0 to 600 elements."""
    kind = rng.choice([4, 4, 4, 5, 6, 6, 7, STRING, 0, 3, 10, 11, 12])
    if rng.random() < 0.75:
        return Value(kind, _value(rng, kind, old))
    n = rng.choice([0, 1, 2, 3, 4, 6, 511, 512, 513, 600])
    return Value(ARRAY, [_value(rng, kind, old) for _ in range(n)], kind)


def change_key(rng: random.Random, file: File) -> None:
    """Another value of the same type, for one of the model's own keys."""
    key = rng.choice(list(file.keys))
    value = file.keys[key]
    if key == "general.architecture":
        file.keys[key] = Value(STRING, rng.choice(ARCHES))
        if rng.random() < 0.7:  # with the numbers under the new name
            old, new = str(value.data), str(file.keys[key].data)
            file.keys = {k.replace(old + ".", new + ".", 1): v for k, v in file.keys.items()}
    elif value.type == ARRAY:
        data = list(value.data)
        how = rng.randrange(4)
        if how == 0:
            data = data[: rng.randrange(len(data) + 1)]
        elif how == 1:
            data = data + data[: rng.randrange(len(data) + 1)]
        elif data:
            for _ in range(rng.choice([1, 1, 3, len(data)])):
                i = rng.randrange(len(data))
                data[i] = _value(rng, value.sub, data[i]) if how == 2 else data[rng.randrange(len(data))]
        file.keys[key] = Value(ARRAY, data, value.sub)
    else:
        file.keys[key] = Value(value.type, _value(rng, value.type, value.data))


def retype_key(rng: random.Random, file: File) -> None:
    key = rng.choice(list(file.keys))
    file.keys[key] = _fresh(rng, file.keys[key].data)


def remove_key(rng: random.Random, file: File) -> None:
    del file.keys[rng.choice(list(file.keys))]


def add_key(rng: random.Random, file: File) -> None:
    """One that upstream knows and this model lacks; most often with a number."""
    key = rng.choice(FOREIGN)
    key = file.arch + key if key[0] == "." else key
    if rng.random() < 0.6:
        kind = rng.choice([4, 4, 6])
        file.keys[key] = Value(kind, _value(rng, kind, 4))
    else:
        file.keys[key] = _fresh(rng)


def double_key(rng: random.Random, file: File) -> None:
    key = rng.choice(list(file.keys))
    file.more.append((rng.choice([key, "", "a.b"]), file.keys[key]))


def per_layer(rng: random.Random, file: File) -> None:
    """A number becomes an array, as some files have one entry per layer."""
    own = [k for k, v in file.keys.items() if k.startswith(file.arch + ".") and v.type in (4, 5, 6)]
    if own:
        key = rng.choice(own)
        value, block = file.keys[key], file.keys.get(file.arch + ".block_count")
        n_layer = int(block.data) if block and isinstance(block.data, int) else 2
        n = rng.choice([n_layer, n_layer, n_layer, n_layer + 1, max(0, n_layer - 1), 512]) % 1024
        data = [value.data if rng.random() < 0.6 else _value(rng, value.type, value.data) for _ in range(n)]
        file.keys[key] = Value(ARRAY, data, value.type)


def change_tensor(rng: random.Random, file: File) -> None:
    if not file.tensors:
        return
    t = rng.choice(file.tensors)
    how = rng.randrange(7)
    if how == 0:
        t.dims = [*t.dims]
        t.dims[rng.randrange(len(t.dims))] = _number(rng, t.dims[0])
    elif how == 1:
        t.dims = t.dims[::-1] if rng.random() < 0.5 else [rng.choice([0, 1, 2, 64, 128])] * rng.randrange(6)
    elif how == 2:
        t.type = rng.choice([*range(42), 255, -1])
    elif how == 3:
        t.offset = rng.choice([0, 1, 32, t.offset + 32, t.offset + 1, 1 << 20, 1 << 40, 1 << 63, (1 << 64) - 32])
    elif how == 4:
        t.name = rng.choice(
            ["", "x" * 63, "x" * 64, "blk.1000000.attn_q.weight", rng.choice(file.tensors).name, t.name + ".w"]
        )
    elif how == 5:
        file.tensors.remove(t)
    else:
        t.dims = [math.prod(t.dims)] if rng.random() < 0.5 else [*t.dims, 1]


def swap_types(rng: random.Random, file: File) -> None:
    """A whole tensor in another type, with data of the right size: norms in q8_0, weights in i32."""
    if file.tensors:
        t = rng.choice(file.tensors)
        t.type = rng.choice([0, 1, 2, 8, 12, 24, 25, 26, 27, 28, 30])
        block, size = gguf.GGML_QUANT_SIZES.get(gguf.GGMLQuantizationType(t.type), (1, 4))
        t.data = rng.randbytes(math.prod(t.dims) // block * size)
        offset = 0
        for other in file.tensors:
            other.offset = offset
            offset += len(other.data) + -len(other.data) % 32


def poison_weights(rng: random.Random, file: File) -> None:
    """NaN, infinities or huge numbers in the weights themselves."""
    if file.tensors:
        t = rng.choice(file.tensors)
        bad = struct.pack("<f", rng.choice([math.nan, math.inf, 3e38, -3e38]))
        t.data = bad * (len(t.data) // 4) if rng.random() < 0.5 else bad + t.data[4:]


MUTATIONS: list[tuple[Callable[[random.Random, File], None], int]] = [
    (change_key, 8),
    (retype_key, 3),
    (remove_key, 1),
    (add_key, 8),
    (double_key, 1),
    (per_layer, 2),
    (change_tensor, 3),
    (swap_types, 1),
    (poison_weights, 1),
]


def mutate(rng: random.Random, base: File) -> bytes:
    """One to three changes of the keys and tensors; sometimes of the bytes too."""
    file = File(
        dict(base.keys),
        [Tensor(t.name, list(t.dims), t.type, t.offset, t.data) for t in base.tensors],
    )
    steps, weights = [m for m, _ in MUTATIONS], [w for _, w in MUTATIONS]
    for step in rng.choices(steps, weights, k=rng.choice([1, 1, 1, 2, 2, 3])):
        if file.keys:
            step(rng, file)
    raw = file.pack()
    if rng.random() < 0.12:
        raw = b"".join(_damage(rng, raw, len(raw) - sum(len(t.data) for t in file.tensors)))
    return raw


def _damage(rng: random.Random, raw: bytes, n_head: int) -> Iterator[bytes]:
    if rng.random() < 0.3:
        yield raw[: rng.randrange(len(raw) if rng.random() < 0.3 else max(1, n_head))]
        return
    out = bytearray(raw)
    for _ in range(rng.choice([1, 1, 2, 8])):
        out[rng.randrange(max(1, min(n_head, len(out))))] = rng.choice([0, 1, 0x7F, 0x80, 0xFF, rng.randrange(256)])
    yield bytes(out)
