"""Shapes of real models: what a random-weight file needs to cost what the model costs.

Numbers are from the models' published config.json files.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from equip_cli.core.errors import UsageError
from equip_cli.models.gguf_file import Tensor, Value, f32, u32

WEIGHT_TYPES = ("f16", "q8_0", "q4_0")


@dataclass(frozen=True)
class Shape:
    """One architecture at one size.

    tied: the output layer is the embedding.
    llama3_rope: the factor by which Llama 3.1 and later stretch the slow rotations; 0 = not at all.
    window: tokens of sliding-window attention in five layers of six (gemma 3); 0 = none.
    """

    arch: str
    n_layer: int
    n_embd: int
    n_head: int
    n_head_kv: int
    head_dim: int
    n_ff: int
    n_vocab: int
    n_ctx: int
    rope_base: float
    tied: bool = True
    llama3_rope: float = 0.0
    window: int = 0

    def metadata(self) -> dict[str, Value]:
        """The keys of this architecture, without tokenizer and name."""
        values = {
            "context_length": u32(self.n_ctx),
            "embedding_length": u32(self.n_embd),
            "block_count": u32(self.n_layer),
            "feed_forward_length": u32(self.n_ff),
            "attention.head_count": u32(self.n_head),
            "attention.head_count_kv": u32(self.n_head_kv),
            "attention.key_length": u32(self.head_dim),
            "attention.value_length": u32(self.head_dim),
            "attention.layer_norm_rms_epsilon": f32(1e-5),
            "rope.dimension_count": u32(self.head_dim),
            "rope.freq_base": f32(self.rope_base),
            "vocab_size": u32(self.n_vocab),
        }
        if self.window:
            values["attention.sliding_window"] = u32(self.window)
        return {f"{self.arch}.{key}": value for key, value in values.items()}

    def tensors(self, kind: str) -> list[Tensor]:
        """Every tensor of the file; matrices have the type `kind`, vectors are f32."""
        q, kv, d = self.n_head * self.head_dim, self.n_head_kv * self.head_dim, self.n_embd
        found = [Tensor("token_embd.weight", (d, self.n_vocab), kind), Tensor("output_norm.weight", (d,), "f32")]
        if not self.tied:
            found.append(Tensor("output.weight", (d, self.n_vocab), kind))
        if self.llama3_rope:
            found.append(Tensor("rope_freqs.weight", (self.head_dim // 2,), "f32"))
        for layer in range(self.n_layer):
            matrices = {
                "attn_q": (d, q),
                "attn_k": (d, kv),
                "attn_v": (d, kv),
                "attn_output": (q, d),
                "ffn_gate": (d, self.n_ff),
                "ffn_up": (d, self.n_ff),
                "ffn_down": (self.n_ff, d),
            }
            vectors = {"attn_norm.weight": d, "ffn_norm.weight": d}
            if self.arch == "qwen2":
                vectors |= {"attn_q.bias": q, "attn_k.bias": kv, "attn_v.bias": kv}
            if self.arch in ("gemma3", "qwen3"):
                vectors |= {"attn_q_norm.weight": self.head_dim, "attn_k_norm.weight": self.head_dim}
            if self.arch == "gemma3":
                vectors |= {"post_attention_norm.weight": d, "post_ffw_norm.weight": d}
            found += [Tensor(f"blk.{layer}.{name}.weight", extents, kind) for name, extents in matrices.items()]
            found += [Tensor(f"blk.{layer}.{name}", (n,), "f32") for name, n in vectors.items()]
        return found

    def rope_factors(self) -> list[float]:
        """Llama 3's frequency factors, one per pair of a head: `llama3_rope` below 1 turn in 8192 tokens, 1 above 4.

        As in transformers' `_compute_llama3_parameters`; ggml divides the frequency by them.
        """
        factors: list[float] = []
        for i in range(self.head_dim // 2):
            turns = 8192 / (2 * math.pi * self.rope_base ** (2 * i / self.head_dim))
            smooth = min(1.0, max(0.0, (turns - 1.0) / 3.0))
            factors.append(1.0 / ((1.0 - smooth) / self.llama3_rope + smooth))
        return factors


SHAPES: dict[str, Shape] = {
    #                          layers width heads  kv  dim    ffn   vocab     ctx       base
    "tiny": Shape("llama", 4, 64, 4, 2, 32, 128, 32000, 2048, 10000.0),
    "smollm-135m": Shape("llama", 30, 576, 9, 3, 64, 1536, 49152, 2048, 10000.0),
    "smollm2-360m": Shape("llama", 32, 960, 15, 5, 64, 2560, 49152, 8192, 100000.0),
    "smollm2-1.7b": Shape("llama", 24, 2048, 32, 32, 64, 8192, 49152, 8192, 130000.0),
    "tinyllama-1.1b": Shape("llama", 22, 2048, 32, 4, 64, 5632, 32000, 2048, 10000.0, tied=False),
    "llama-2-7b": Shape("llama", 32, 4096, 32, 32, 128, 11008, 32000, 4096, 10000.0, tied=False),
    "llama-3.1-8b": Shape("llama", 32, 4096, 32, 8, 128, 14336, 128256, 131072, 500000.0, tied=False, llama3_rope=8.0),
    "llama-3.2-1b": Shape("llama", 16, 2048, 32, 8, 64, 8192, 128256, 131072, 500000.0, llama3_rope=32.0),
    "llama-3.2-3b": Shape("llama", 28, 3072, 24, 8, 128, 8192, 128256, 131072, 500000.0, llama3_rope=32.0),
    "mistral-7b": Shape("llama", 32, 4096, 32, 8, 128, 14336, 32768, 32768, 1000000.0, tied=False),  # v0.3
    "qwen2.5-0.5b": Shape("qwen2", 24, 896, 14, 2, 64, 4864, 151936, 32768, 1000000.0),
    "qwen2.5-1.5b": Shape("qwen2", 28, 1536, 12, 2, 128, 8960, 151936, 32768, 1000000.0),
    "qwen2.5-7b": Shape("qwen2", 28, 3584, 28, 4, 128, 18944, 152064, 32768, 1000000.0, tied=False),
    "qwen3-0.6b": Shape("qwen3", 28, 1024, 16, 8, 128, 3072, 151936, 40960, 1000000.0),
    "qwen3-4b": Shape("qwen3", 36, 2560, 32, 8, 128, 9728, 151936, 40960, 1000000.0),
    "gemma-3-270m": Shape("gemma3", 18, 640, 4, 1, 256, 2048, 262144, 32768, 1000000.0, window=512),
    "gemma-3-1b": Shape("gemma3", 26, 1152, 4, 1, 256, 6912, 262144, 32768, 1000000.0, window=512),
}


def parse_shape(text: str, default_type: str = "q4_0") -> tuple[str, str]:
    """`NAME[:TYPE]` -> (name, type); raises UsageError that lists what there is."""
    name, _, kind = text.partition(":")
    if name not in SHAPES:
        raise UsageError(f"there is no shape {name!r}: choose one of {', '.join(SHAPES)}")
    kind = kind or default_type
    if kind not in WEIGHT_TYPES:
        raise UsageError(f"a shape has no type {kind!r}: choose one of {', '.join(WEIGHT_TYPES)}")
    return name, kind
