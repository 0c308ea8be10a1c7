"""Tiny GGUF models with random weights, for tests: every architecture that the policy must handle, in a megabyte or two.

The weights are seeded, and their scale is chosen so that attention is uneven: a wrong kept set, slot or position moves the
logits by far more than any tolerance in the tests (tests/native/test_oracle.py checks that).
"""

from __future__ import annotations

import functools
import string
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]
Weights = dict[str, Array]

FINAL_CAP = 30.0  # of gemma2's logits

BYTE_TEMPLATE = (
    "{% for m in messages %}<s>{{ m['role'] }}: {{ m['content'] }}</s>{% endfor %}"
    "{% if add_generation_prompt %}<s>assistant: {% endif %}"
)


@dataclass(frozen=True)
class Spec:
    """Shape of a model. `arch` is llama (NORM rope), smollm3 (the same, but no rope in every fourth layer), qwen2 (NEOX rope, q/k/v bias), gemma3 (sliding-window layers,
    q/k norm), gemma2 (sliding-window layers, soft-capped scores and logits, output tied to the embedding), gpt-oss (sliding-window layers, attention sinks, experts) or bert (no cache at all, for refusals)."""

    arch: str = "llama"
    n_layer: int = 2
    n_embd: int = 128
    n_head: int = 4
    n_head_kv: int = 2
    head_dim: int = 64
    n_ff: int = 128
    n_vocab: int = 256
    n_ctx_train: int = 512
    rope_base: float = 10000.0
    n_swa: int = 32
    swa_period: int = 3  # every n-th layer has full attention; 0 = no such key in the file: upstream's default
    longrope: int = 0  # context of the short RoPE factors, beyond which there are long ones; 0: no factors
    n_expert: int = 3
    n_expert_used: int = 3  # all: a choice that rounding can flip would swamp every other error
    peak: float = 2.0  # standard deviation of the attention scores
    attn_cap: float = 0.0  # the scores are cap * tanh(score / cap); 0: they are not
    attn_gain: float = 2.0  # weight of the attention output in the residual stream
    dtype: str = "f32"  # of the matrices: f32 | f16 | q8_0 | q4_0
    tokenizer: str = "none"  # none (token ids only) | bytes (text) | path of a GGUF whose tokenizer is copied
    seed: int = 1

    @property
    def norm_rope(self) -> bool:
        return self.arch in ("llama", "smollm3")

    def has_rope(self, layer: int) -> bool:
        return self.arch != "smollm3" or (layer + 1) % 4 != 0

    @property
    def has_swa(self) -> bool:
        return self.is_gemma or self.arch == "gpt-oss"

    @property
    def is_gemma(self) -> bool:
        return self.arch in ("gemma2", "gemma3")

    def is_swa(self, layer: int) -> bool:
        """Upstream's set_swa_pattern: the last layer of each period has full attention."""
        period = self.swa_period or {"gemma3": 6, "gemma2": 2, "gpt-oss": 2}.get(self.arch, 1)
        return self.has_swa and layer % period < period - 1

    def layer_rope_base(self, layer: int) -> float:
        """gemma3 rotates its sliding-window layers with base 10000 whatever the full ones use; gpt-oss has one base."""
        return 10000.0 if self.arch == "gemma3" and self.is_swa(layer) else self.rope_base


MODELS: dict[str, Spec] = {
    "llama-gqa": Spec(),
    "llama-mha": Spec(n_head=3, n_head_kv=3, n_layer=3, n_embd=96, seed=2),
    "llama-gqa-128": Spec(n_head=4, n_head_kv=1, head_dim=128, seed=3),
    "llama-mha-128": Spec(n_head=2, n_head_kv=2, head_dim=128, n_embd=64, seed=4),
    "llama-gqa-32": Spec(n_head=6, n_head_kv=2, head_dim=32, n_embd=64, n_layer=4, seed=5),
    "qwen2-gqa": Spec("qwen2", n_embd=256, n_head=4, n_head_kv=2, rope_base=1e6, seed=6),
    "qwen2-gqa-128": Spec("qwen2", n_embd=256, n_head=2, n_head_kv=1, head_dim=128, rope_base=1e6, seed=7),
    "gemma3": Spec("gemma3", n_layer=6, n_embd=96, n_head=4, n_head_kv=2, rope_base=1e6, seed=8),
    "gemma3-128": Spec("gemma3", n_layer=6, n_embd=64, n_head=2, n_head_kv=1, head_dim=128, rope_base=1e6, seed=9),
    "gemma3-period6": Spec("gemma3", n_layer=7, n_embd=64, n_head=2, n_head_kv=1, rope_base=1e6, swa_period=0, seed=10),
    "gpt-oss": Spec("gpt-oss", n_layer=4, n_embd=96, n_head=4, n_head_kv=2, rope_base=150000.0, swa_period=0, seed=11),
    "smollm3": Spec("smollm3", n_layer=5, n_embd=96, n_head=4, n_head_kv=2, seed=13),
    "gemma2": Spec("gemma2", n_layer=4, n_embd=96, n_head=4, n_head_kv=2, swa_period=0, attn_cap=4.0, seed=14),
    "bert": Spec("bert", n_embd=64, n_head=2, n_head_kv=2, head_dim=32, n_ctx_train=128, seed=12),
}


@functools.cache
def weights(spec: Spec) -> Weights:
    """Tensor name -> float32 array of shape (out, in), row-major as in GGUF's dims reversed."""
    rng = np.random.default_rng(spec.seed)
    d, hd, nh, ng = spec.n_embd, spec.head_dim, spec.n_head, spec.n_head_kv
    out: Weights = {}

    def add(name: str, *shape: int, std: float) -> None:
        out[name] = rng.normal(0.0, std, shape).astype(np.float32)

    def norm(name: str, n: int, mean: float = 1.0) -> None:
        out[name] = (mean * (1.0 + 0.1 * rng.normal(size=n))).astype(np.float32)

    add("token_embd.weight", spec.n_vocab, d, std=1.0 / np.sqrt(d) if spec.is_gemma else 1.0)
    s = np.sqrt(spec.peak)
    qk_norm = spec.arch == "gemma3"
    for il in range(spec.n_layer):
        p = f"blk.{il}."
        add(p + "attn_q.weight", nh * hd, d, std=(1.0 if qk_norm else s) / np.sqrt(d))
        add(p + "attn_k.weight", ng * hd, d, std=(1.0 if qk_norm else s) / np.sqrt(d))
        add(p + "attn_v.weight", ng * hd, d, std=1.0 / np.sqrt(d))
        add(p + "attn_output.weight", d, nh * hd, std=spec.attn_gain / np.sqrt(nh * hd))
        if spec.arch == "bert":
            for part, n in (("attn_output_norm", d), ("layer_output_norm", d)):
                norm(p + part + ".weight", n)
                add(p + part + ".bias", n, std=0.02)
            add(p + "ffn_up.weight", spec.n_ff, d, std=1.0 / np.sqrt(d))
            add(p + "ffn_down.weight", d, spec.n_ff, std=1.0 / np.sqrt(spec.n_ff))
            continue
        norm(p + "attn_norm.weight", d)
        if spec.arch in ("qwen2", "gpt-oss"):
            for part, n in (("attn_q", nh * hd), ("attn_k", ng * hd), ("attn_v", ng * hd)):
                add(f"{p}{part}.bias", n, std=0.2)
        if qk_norm:
            norm(p + "attn_q_norm.weight", hd, mean=s)
            norm(p + "attn_k_norm.weight", hd, mean=s)
        if spec.is_gemma:
            # small: upstream's GELU rounds to f16, which is not what is tested
            norm(p + "post_ffw_norm.weight", d, mean=0.1)
        if spec.has_swa:
            norm(p + "post_attention_norm.weight", d)
        if spec.arch == "gpt-oss":
            add(p + "attn_output.bias", d, std=0.1)
            add(p + "attn_sinks.weight", nh, std=1.0)
            add(p + "ffn_gate_inp.weight", spec.n_expert, d, std=1.0 / np.sqrt(d))
            add(p + "ffn_gate_inp.bias", spec.n_expert, std=0.1)
            for part, rows, cols in (("gate", spec.n_ff, d), ("up", spec.n_ff, d), ("down", d, spec.n_ff)):
                add(f"{p}ffn_{part}_exps.weight", spec.n_expert, rows, cols, std=0.7 / np.sqrt(cols))
                add(f"{p}ffn_{part}_exps.bias", spec.n_expert, rows, std=0.1)
        else:
            norm(p + "ffn_norm.weight", d)
            for part, rows, cols in (("gate", spec.n_ff, d), ("up", spec.n_ff, d), ("down", d, spec.n_ff)):
                add(f"{p}ffn_{part}.weight", rows, cols, std=0.7 / np.sqrt(cols))
    if spec.arch == "bert":
        add("token_types.weight", 2, d, std=0.1)
        add("position_embd.weight", spec.n_ctx_train, d, std=0.1)
        norm("token_embd_norm.weight", d)
        add("token_embd_norm.bias", d, std=0.02)
    else:
        norm("output_norm.weight", d)
        if spec.arch != "gemma2":
            add("output.weight", spec.n_vocab, d, std=1.0 / np.sqrt(d))
    return out


def write(spec: Spec, path: Path) -> Path:
    """Write the model of `spec` as GGUF; the file appears whole or not at all."""
    tmp = path.with_suffix(".tmp")
    w = gguf.GGUFWriter(str(tmp), spec.arch)
    n_vocab = _add_tokenizer(w, spec)
    if n_vocab != spec.n_vocab:
        raise ValueError(f"the tokenizer has {n_vocab} tokens, the spec {spec.n_vocab}")
    w.add_name(f"tiny-{spec.arch}")
    w.add_context_length(spec.n_ctx_train)
    w.add_embedding_length(spec.n_embd)
    w.add_block_count(spec.n_layer)
    w.add_feed_forward_length(spec.n_ff)
    w.add_head_count(spec.n_head)
    w.add_head_count_kv(spec.n_head_kv)
    w.add_key_length(spec.head_dim)
    w.add_value_length(spec.head_dim)
    w.add_vocab_size(spec.n_vocab)
    if spec.arch == "bert":
        w.add_layer_norm_eps(1e-5)
        w.add_causal_attention(False)
        w.add_pooling_type(gguf.PoolingType.MEAN)
        w.add_token_type_count(2)
    else:
        w.add_rope_dimension_count(spec.head_dim)
        w.add_rope_freq_base(spec.rope_base)
        w.add_layer_norm_rms_eps(1e-5)
    if spec.longrope:
        w.add_rope_scaling_type(gguf.RopeScalingType.LONGROPE)
        w.add_rope_scaling_orig_ctx_len(spec.longrope)
        n = spec.head_dim // 2
        w.add_tensor("rope_factors_long.weight", np.linspace(1.0, 20.0, n, dtype=np.float32))
        w.add_tensor("rope_factors_short.weight", np.linspace(1.0, 1.5, n, dtype=np.float32))
    if spec.has_swa:
        w.add_sliding_window(spec.n_swa)
        if spec.swa_period:
            w.add_uint32(f"{spec.arch}.attention.sliding_window_pattern", spec.swa_period)
    if spec.attn_cap:
        w.add_attn_logit_softcapping(spec.attn_cap)
        w.add_final_logit_softcapping(FINAL_CAP)
    if spec.arch == "gpt-oss":
        w.add_expert_count(spec.n_expert)
        w.add_expert_used_count(spec.n_expert_used)
        w.add_expert_feed_forward_length(spec.n_ff)
    kind = gguf.GGMLQuantizationType[spec.dtype.upper()]
    for name, data in weights(spec).items():
        if data.ndim > 1 and not name.endswith(".bias"):
            w.add_tensor(name, gguf.quants.quantize(data, kind), raw_dtype=kind)
        else:
            w.add_tensor(name, data)
    w.write_header_to_file()
    w.write_kv_data_to_file()
    w.write_tensors_to_file()
    w.close()
    return tmp.replace(path)


def _add_tokenizer(w: gguf.GGUFWriter, spec: Spec) -> int:
    if spec.tokenizer == "none":
        w.add_tokenizer_model("no_vocab")
        return spec.n_vocab
    if spec.tokenizer == "bytes":  # sentencepiece: one token per byte, some whole pieces up to n_vocab; a chat template
        kind = gguf.TokenType
        pieces = [("<unk>", kind.UNKNOWN), ("<s>", kind.CONTROL), ("</s>", kind.CONTROL)]
        pieces += [(f"<0x{b:02X}>", kind.BYTE) for b in range(256)]
        pieces += [("\u2581" + c, kind.NORMAL) for c in ["", *string.ascii_letters]]
        pieces += [(f"piece{i}", kind.NORMAL) for i in range(spec.n_vocab - len(pieces))]
        w.add_tokenizer_model("llama")
        w.add_token_list([text for text, _ in pieces])
        w.add_token_scores([-float(i) for i in range(len(pieces))])
        w.add_token_types([int(t) for _, t in pieces])
        w.add_bos_token_id(1)
        w.add_eos_token_id(2)
        w.add_unk_token_id(0)
        w.add_chat_template(BYTE_TEMPLATE)
        return len(pieces)
    n_vocab = 0
    for f in gguf.GGUFReader(spec.tokenizer).fields.values():
        if f.name.startswith("tokenizer."):
            sub = f.types[-1] if f.types[0] == gguf.GGUFValueType.ARRAY else None
            w.add_key_value(f.name, f.contents(), f.types[0], sub_type=sub)
            if f.name == "tokenizer.ggml.tokens":
                n_vocab = len(f.data)
    return n_vocab
