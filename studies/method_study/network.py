"""SmolLM2 and Gemma-3 in torch, read from GGUF, with the attention left open: a method is what stands in its place.

Weights are written out as f32. Tensors have shapes (head, token, head_dim); a text has n tokens at positions 0 to n - 1.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional


@dataclass(frozen=True)
class Spec:
    n_layer: int
    n_embd: int
    n_head: int
    n_head_kv: int
    head_dim: int
    eps: float
    rope_bases: tuple[float, ...]  # per layer
    windows: tuple[int, ...]  # per layer; 0: the layer sees everything, and a policy bounds it
    is_gemma: bool = False

    @property
    def group(self) -> int:
        """Query heads that share a KV head."""
        return self.n_head // self.n_head_kv

    @property
    def bounded(self) -> list[int]:
        """Layers with a budget: those without a sliding window."""
        return [layer for layer, window in enumerate(self.windows) if not window]


def read_spec(fields: dict[str, Any]) -> Spec:
    """fields: the metadata of a GGUF file. Raises SystemExit if the architecture is neither llama nor gemma3."""
    arch = fields["general.architecture"]
    if arch not in ("llama", "gemma3"):
        raise SystemExit(f"the architecture {arch} is not known here: take one of llama or gemma3")
    n_layer, n_embd, n_head = (
        int(fields[f"{arch}.{key}"]) for key in ("block_count", "embedding_length", "attention.head_count")
    )
    head_dim = int(fields.get(f"{arch}.attention.key_length", n_embd // n_head))
    base = float(fields.get(f"{arch}.rope.freq_base", 10000.0))
    bases, windows = [base] * n_layer, [0] * n_layer
    if arch == "gemma3":  # every sixth layer sees everything; the others rotate by base 10,000 in any file
        for layer in range(n_layer):
            if layer % 6 != 5:
                bases[layer], windows[layer] = 10000.0, int(fields["gemma3.attention.sliding_window"])
    eps = float(fields[f"{arch}.attention.layer_norm_rms_epsilon"])
    n_head_kv = int(fields[f"{arch}.attention.head_count_kv"])
    return Spec(n_layer, n_embd, n_head, n_head_kv, head_dim, eps, tuple(bases), tuple(windows), arch == "gemma3")


def rotate(x: Tensor, positions: Tensor, base: float, *, neox: bool) -> Tensor:
    """RoPE: x (..., n, head_dim) by positions (n,), which may be negative or not whole."""
    half = x.shape[-1] // 2
    angles = positions[:, None].double() * base ** (-torch.arange(half, dtype=torch.float64) / half)
    cos, sin = angles.cos().float(), angles.sin().float()  # (n, half)
    a, b = (x[..., :half], x[..., half:]) if neox else (x[..., 0::2], x[..., 1::2])
    turned = a * cos - b * sin, b * cos + a * sin
    return torch.cat(turned, -1) if neox else torch.stack(turned, -1).flatten(-2)


class Network:
    """A model without its attention: `qkv()` before it, `finish()` behind it."""

    def __init__(self, spec: Spec, tensors: dict[str, Tensor]) -> None:
        """tensors: named as in GGUF, matrices as (out, in)."""
        self.spec, self.tensors = spec, tensors
        self.unembed = tensors.get("output.weight", tensors["token_embd.weight"])

    @classmethod
    def load(cls, path: Path) -> Network:
        import gguf

        reader = gguf.GGUFReader(path)
        names = [name for name in reader.fields if not name.startswith("tokenizer.")]
        spec = read_spec({name: reader.fields[name].contents() for name in names})
        tensors = {
            tensor.name: torch.from_numpy(gguf.quants.dequantize(tensor.data, tensor.tensor_type).copy())
            for tensor in reader.tensors
        }
        return cls(spec, tensors)

    def embed(self, tokens: list[int]) -> Tensor:
        """(n, n_embd)"""
        x = self.tensors["token_embd.weight"][tokens]
        return x * math.sqrt(self.spec.n_embd) if self.spec.is_gemma else x

    def turn(self, x: Tensor, positions: Tensor, layer: int) -> Tensor:
        return rotate(x, positions, self.spec.rope_bases[layer], neox=self.spec.is_gemma)

    def qkv(self, layer: int, x: Tensor, start: int) -> tuple[Tensor, Tensor, Tensor]:
        """Of tokens from position `start` on: q (n_head, n, head_dim), k and v (n_head_kv, n, head_dim), q and k rotated."""
        spec, y = self.spec, self._norm(x, layer, "attn_norm")
        q, k, v = (
            (y @ self._weight(layer, f"attn_{name}").T).view(len(x), n, spec.head_dim).transpose(0, 1)
            for name, n in (("q", spec.n_head), ("k", spec.n_head_kv), ("v", spec.n_head_kv))
        )
        if spec.is_gemma:
            q, k = self._norm(q, layer, "attn_q_norm"), self._norm(k, layer, "attn_k_norm")
        positions = torch.arange(start, start + len(x))
        return self.turn(q, positions, layer), self.turn(k, positions, layer), v.contiguous()

    def finish(self, layer: int, x: Tensor, attended: Tensor) -> Tensor:
        """The rest of a layer. attended: (n_head, n, head_dim); x and the result (n, n_embd)."""
        y = attended.transpose(0, 1).reshape(len(x), -1) @ self._weight(layer, "attn_output").T
        x = x + (self._norm(y, layer, "post_attention_norm") if self.spec.is_gemma else y)
        y = self._norm(x, layer, "ffn_norm")
        gate, up = (y @ self._weight(layer, f"ffn_{name}").T for name in ("gate", "up"))
        gate = functional.gelu(gate, approximate="tanh") if self.spec.is_gemma else functional.silu(gate)
        y = (gate * up) @ self._weight(layer, "ffn_down").T
        return x + (self._norm(y, layer, "post_ffw_norm") if self.spec.is_gemma else y)

    def last_norm(self, x: Tensor) -> Tensor:
        return self._rms(x, self.tensors["output_norm.weight"])

    def log_probs(self, hidden: Tensor) -> Tensor:
        """hidden: (n, n_embd) of last_norm(); the result (n, n_vocab)."""
        return functional.log_softmax(hidden @ self.unembed.T, -1)

    def _weight(self, layer: int, name: str) -> Tensor:
        return self.tensors[f"blk.{layer}.{name}.weight"]

    def _norm(self, x: Tensor, layer: int, name: str) -> Tensor:
        return self._rms(x, self._weight(layer, name))

    def _rms(self, x: Tensor, weight: Tensor) -> Tensor:
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.spec.eps) * weight


def attend(q: Tensor, k: Tensor, v: Tensor, visible: Tensor) -> tuple[Tensor, Tensor]:
    """Attention of grouped queries: the output (n_head, n, head_dim) and the weights (n_head_kv, group, n, n_kv).

    q: (n_head, n, head_dim), k and v: (n_head_kv, n_kv, head_dim), visible: (n, n_kv) or (n_head_kv, n, n_kv).
    """
    n_head_kv, n_kv, head_dim = k.shape
    n = q.shape[1]
    scores = q.reshape(n_head_kv, -1, head_dim) @ k.transpose(1, 2)
    scores = (scores * head_dim**-0.5).view(n_head_kv, -1, n, n_kv)
    hidden = ~(visible if visible.dim() == 2 else visible[:, None])
    weights = scores.masked_fill_(hidden, -math.inf).softmax(-1)
    return (weights.view(n_head_kv, -1, n_kv) @ v).view(-1, n, head_dim), weights


def causal(start: int, stop: int, window: int = 0) -> Tensor:
    """What queries at start to stop - 1 see of positions 0 to stop - 1: (stop - start, stop)."""
    distance = torch.arange(start, stop)[:, None] - torch.arange(stop)
    return (distance >= 0) & (distance < window) if window else distance >= 0


def attend_all(q: Tensor, k: Tensor, v: Tensor, start: int, window: int = 0, chunk: int = 256) -> Tensor:
    """The full cache: queries from position `start` on, in chunks; k and v from position 0 on."""
    parts = []
    for begin in range(start, k.shape[1], chunk):
        end = min(begin + chunk, k.shape[1])
        first = max(0, begin - window + 1) if window else 0
        visible = causal(begin, end, window)[:, first:]
        parts.append(attend(q[:, begin - start : end - start], k[:, first:end], v[:, first:end], visible)[0])
    return torch.cat(parts, 1)


@dataclass
class Full:
    """The run with the full cache that all others are compared with, and that they share a prefix with."""

    first: int  # the first bounded layer
    x: Tensor  # (n, n_embd), what enters it
    rows: list[tuple[Tensor, Tensor, Tensor]]  # q, k, v of each layer, (head, n, head_dim)
    hidden: Tensor  # (n, n_embd), behind the last norm


def run_full(network: Network, tokens: list[int]) -> Full:
    x, rows, first = network.embed(tokens), [], network.spec.bounded[0]
    entering = x
    for layer, window in enumerate(network.spec.windows):
        if layer == first:
            entering = x
        q, k, v = network.qkv(layer, x, 0)
        rows.append((q, k, v))
        x = network.finish(layer, x, attend_all(q, k, v, 0, window))
    return Full(first, entering, rows, network.last_norm(x))
