"""The network of the embedded model in PyTorch: a Llama as llama.cpp runs it (RMS norm, NORM RoPE, SwiGLU, grouped queries)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

SINK_MARGIN = 5.0  # attention of 0.993


@dataclass(frozen=True)
class Shape:
    """Sizes of the network; `context` is the longest sequence that it is trained on."""

    n_vocab: int = 2048
    n_embd: int = 192
    n_layer: int = 6
    n_head: int = 6
    n_head_kv: int = 2
    head_dim: int = 32
    n_ff: int = 512
    context: int = 1024
    rope_base: float = 10000.0
    norm_eps: float = 1e-5


def rope_tables(shape: Shape, n: int) -> tuple[Tensor, Tensor]:
    """Cosines and sines of the positions 0 to n-1, each `[n, head_dim / 2]`."""
    inverse = shape.rope_base ** (-torch.arange(0, shape.head_dim, 2, dtype=torch.float64) / shape.head_dim)
    angles = torch.arange(n, dtype=torch.float64)[:, None] * inverse
    return angles.cos().float(), angles.sin().float()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """RoPE on neighbouring pairs (llama.cpp's NORM), x is `[batch, head, position, head_dim]`."""
    even, odd = x[..., 0::2], x[..., 1::2]
    cos, sin = cos.to(x.dtype), sin.to(x.dtype)
    return torch.stack((even * cos - odd * sin, even * sin + odd * cos), -1).flatten(-2)


def sink_margin(q: Tensor, k: Tensor, rows: Tensor) -> Tensor:
    """log(a / (1 - a)) of the attention a that queries pay to the first position, at most SINK_MARGIN each; the mean.

    q: `[batch, head, rows, head_dim]`, the queries of the positions `rows`; k: `[batch, head, position, head_dim]`.
    """
    scores = (q @ k.transpose(-1, -2)).float() / q.shape[-1] ** 0.5
    hidden = torch.arange(k.shape[2]) > rows[:, None]
    hidden[:, 0] = True
    others = scores.masked_fill(hidden, -torch.inf).logsumexp(-1)
    return (scores[..., 0] - others)[..., rows > 0].clamp(max=SINK_MARGIN).mean()


class Block(nn.Module):
    """Attention and feed-forward, each behind its norm."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.shape = shape
        wide, narrow = shape.n_head * shape.head_dim, shape.n_head_kv * shape.head_dim
        self.attn_norm = nn.RMSNorm(shape.n_embd, eps=shape.norm_eps)
        self.attn_q = nn.Linear(shape.n_embd, wide, bias=False)
        self.attn_k = nn.Linear(shape.n_embd, narrow, bias=False)
        self.attn_v = nn.Linear(shape.n_embd, narrow, bias=False)
        self.attn_output = nn.Linear(wide, shape.n_embd, bias=False)
        self.ffn_norm = nn.RMSNorm(shape.n_embd, eps=shape.norm_eps)
        self.ffn_gate = nn.Linear(shape.n_embd, shape.n_ff, bias=False)
        self.ffn_up = nn.Linear(shape.n_embd, shape.n_ff, bias=False)
        self.ffn_down = nn.Linear(shape.n_ff, shape.n_embd, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, rows: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """x: `[batch, position, n_embd]`. Also what `sink_margin()` says of the positions `rows`."""
        n_batch, n, _ = x.shape
        dim = self.shape.head_dim
        h = self.attn_norm(x)
        q, k, v = (m(h).view(n_batch, n, -1, dim).transpose(1, 2) for m in (self.attn_q, self.attn_k, self.attn_v))
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        group = self.shape.n_head // self.shape.n_head_kv
        k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
        margin = x.new_zeros(()) if rows is None else sink_margin(q[:, :, rows], k, rows)
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.attn_output(mixed.transpose(1, 2).reshape(n_batch, n, -1))
        h = self.ffn_norm(x)
        return x + self.ffn_down(F.silu(self.ffn_gate(h)) * self.ffn_up(h)), margin


class Network(nn.Module):
    """Embedding, blocks, norm; the output layer is the embedding."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.shape = shape
        self.token_embd = nn.Embedding(shape.n_vocab, shape.n_embd)
        self.blk = nn.ModuleList(Block(shape) for _ in range(shape.n_layer))
        self.output_norm = nn.RMSNorm(shape.n_embd, eps=shape.norm_eps)
        nn.init.normal_(self.token_embd.weight, std=0.04)

    def forward(self, tokens: Tensor, rows: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Logits `[batch, position, n_vocab]` of tokens `[batch, position]`.

        Also the mean of the blocks' `sink_margin()` (0 without rows).
        """
        cos, sin = rope_tables(self.shape, tokens.shape[1])
        x = self.token_embd(tokens)
        total = x.new_zeros(())
        for block in self.blk:
            x, margin = block(x, cos, sin, rows)
            total = total + margin
        return F.linear(self.output_norm(x), self.token_embd.weight), total / len(self.blk)
