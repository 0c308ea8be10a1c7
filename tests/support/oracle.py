"""The reference: a float64 forward pass that gets tokens and a rule, and derives kept set, positions and logits by itself.

It shares nothing with the library but the weights. K is stored un-rotated, one row per token ever seen, and is rotated
afresh at every use, so neither slots nor incremental rotations exist here.

The rule (scope token). P = max(sinks, pinned); a chunk is one ubatch.
- A chunk of one token: if `budget` tokens are kept, a victim goes first; then the token is added. It sees at most
  `budget` tokens, itself included.
- A longer chunk sees all kept tokens and itself, causally; afterwards victims go until `budget` are left.
- The victim has a position in [P, newest - recent]. Policy "streaming" (recent = 1): the oldest one. "random": the one
  with the lowest number, which each position draws once (splitmix64).
- positions "true": a token keeps its position. "cache": its position is its rank among the kept tokens, and the chunk's
  tokens continue the ranks (StreamingLLM, arXiv 2309.17453, section 3.2). "auto": true, until a chunk would put its last
  token n_ctx_train or more positions away from the oldest kept one; cache from that chunk on.
- Sliding-window layers are outside the policy: they see the last n_swa tokens ever processed, at true positions.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from models import FINAL_CAP, Array, Spec, Weights, weights

Rounding = Callable[[Array], Array]
EXACT, SHORTENED, IMPOSSIBLE = 0, 1, -9  # equip_session_rewind's answers


def rope(x: Array, pos: Array, base: float, norm: bool) -> Array:
    """Rotate x (n, heads, head_dim) to the positions pos, (n,) or (n, heads): pairs (2i, 2i+1) if norm, else
    (i, i + head_dim/2)."""
    half = x.shape[-1] // 2
    angle = pos.reshape(len(pos), -1, 1) * base ** (-np.arange(half) / half)  # (n, 1 or heads, head_dim/2)
    cos, sin = np.cos(angle), np.sin(angle)
    a, b = (x[..., 0::2], x[..., 1::2]) if norm else (x[..., :half], x[..., half:])
    out = np.empty_like(x)
    ra, rb = a * cos - b * sin, a * sin + b * cos
    if norm:
        out[..., 0::2], out[..., 1::2] = ra, rb
    else:
        out[..., :half], out[..., half:] = ra, rb
    return out


def rms_norm(x: Array, w: Array) -> Array:
    scaled: Array = x / np.sqrt(np.mean(x * x, axis=-1, keepdims=True) + 1e-5) * w
    return scaled


def silu(x: Array) -> Array:
    return x / (1.0 + np.exp(-x))


def gelu(x: Array) -> Array:
    """ggml's CPU table: tanh approximation with f16 input and output."""
    x16 = x.astype(np.float16).astype(np.float64)
    y = 0.5 * x16 * (1.0 + np.tanh(np.sqrt(2.0 / np.pi) * x16 * (1.0 + 0.044715 * x16 * x16)))
    return np.where(x <= -10.0, 0.0, np.where(x >= 10.0, x, y.astype(np.float16).astype(np.float64)))


def drawn(pos: int) -> int:
    """splitmix64 of the position (Steele, Lea, Flood 2014)."""
    mask = 2**64 - 1
    z = (pos + 1) * 0x9E3779B97F4A7C15 & mask
    z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9 & mask
    z = (z ^ z >> 27) * 0x94D049BB133111EB & mask
    return z ^ z >> 31


def softmax(x: Array) -> Array:
    e = np.exp(x - x.max(axis=-1, keepdims=True))
    weights: Array = e / e.sum(axis=-1, keepdims=True)
    return weights


class Oracle:
    def __init__(
        self,
        spec: Spec,
        *,
        budget: int | None = None,
        sinks: int = 4,
        pinned: int = 0,
        positions: str = "true",
        policy: str = "streaming",
        recent: int = 1,
        round_kv: Rounding | None = None,
    ) -> None:
        self.spec, self.budget, self.protect = spec, budget, max(sinks, pinned)
        self.positions, self.round_kv = positions, round_kv
        self.policy, self.recent = policy, recent
        self.w = {name: data.astype(np.float64) for name, data in self._read_weights().items()}
        self.kept: list[int] = []  # positions, ascending
        self.evictions: list[tuple[int, int]] = []  # (position of the token that evicted, position of the victim)
        self.n_past = 0
        # one row per token ever seen, K un-rotated; [layer] (capacity, n_head_kv, head_dim)
        self.k: list[Array] = [np.zeros((0, spec.n_head_kv, spec.head_dim))] * spec.n_layer
        self.v: list[Array] = [np.zeros((0, spec.n_head_kv, spec.head_dim))] * spec.n_layer

    def _read_weights(self) -> Weights:
        return weights(self.spec)

    # ---- the rule ---------------------------------------------------------------------------------------------------

    def _evict(self, by: int, newest: int | None = None) -> None:
        last = by if newest is None else newest
        candidates = [p for p in self.kept if self.protect <= p <= last - self.recent]
        victim = candidates[0] if self.policy == "streaming" else min(candidates, key=drawn)
        self.kept.remove(victim)
        self.evictions.append((by, victim))

    def chunk(self, tokens: Sequence[int]) -> Array:
        """Process one ubatch; returns the logits of its last token, shape (n_vocab,)."""
        new = list(range(self.n_past, self.n_past + len(tokens)))
        if len(new) == 1 and len(self.kept) == self.budget:
            self._evict(new[0])
        visible = np.array(self.kept + new)
        if self.positions == "auto" and visible[-1] - visible[0] >= self.spec.n_ctx_train:
            self.positions = "cache"
        rank = np.arange(len(visible)) if self.positions == "cache" else visible
        logits = self._forward(np.asarray(tokens), visible, rank)
        self.kept += new
        self.n_past += len(new)
        if self.budget is not None:
            excess = max(0, len(self.kept) - self.budget)
            for by in new[len(new) - excess :]:
                self._evict(by, new[-1])
        return logits

    def eval(self, tokens: Sequence[int], n_ubatch: int) -> Array:
        """Process a batch as upstream splits it into ubatches."""
        for i in range(0, len(tokens), n_ubatch):
            logits = self.chunk(tokens[i : i + n_ubatch])
        return logits

    def fail(self) -> None:
        """A single-token step at a full cache was placed, but not computed: its victim is gone all the same."""
        self._evict(self.n_past)

    def draft(self, tokens: Sequence[int], n_accepted: int) -> Array:
        """A ubatch of more than one token of which all but the first ones are taken back before anything else happens.

        Evictions that a ubatch owes wait until then, so what is rejected evicts nothing; `settle()` carries them out.
        Returns the logits of the ubatch's last token.
        """
        budget, self.budget = self.budget, None
        first = self.n_past
        logits = self.chunk(tokens)
        self.budget = budget
        if n_accepted < len(tokens):
            self.rewind(first + n_accepted)
        return logits

    def settle(self) -> None:
        """The evictions that the last ubatch still owes."""
        for by in range(self.n_past - len(self.kept) + (self.budget or len(self.kept)), self.n_past):
            self._evict(by, self.n_past - 1)

    def rewind(self, p0: int) -> int:
        """Drop the tokens at positions >= p0, if the rule of rewinds in docs/design.md allows it."""
        if p0 <= 0:
            self.kept, self.evictions, self.n_past = [], [], 0
            return EXACT
        if self.evictions and p0 <= max(victim for _, victim in self.evictions):
            return IMPOSSIBLE
        exact = all(by < p0 for by, _ in self.evictions)
        self.kept = [p for p in self.kept if p < p0]
        self.n_past = min(self.n_past, p0)
        return EXACT if exact else SHORTENED

    # ---- the model --------------------------------------------------------------------------------------------------

    def _forward(self, tokens: Array, visible: Array, rank: Array) -> Array:
        spec, w = self.spec, self.w
        n, true = len(tokens), np.arange(self.n_past, self.n_past + len(tokens))
        x = w["token_embd.weight"][tokens] * (np.sqrt(spec.n_embd) if spec.is_gemma else 1.0)
        for il in range(spec.n_layer):
            p = f"blk.{il}."
            h = rms_norm(x, w[p + "attn_norm.weight"])
            q = self._project(h, p + "attn_q", spec.n_head)
            k = self._project(h, p + "attn_k", spec.n_head_kv)
            v = self._project(h, p + "attn_v", spec.n_head_kv)
            if spec.arch == "gemma3":
                q, k = rms_norm(q, w[p + "attn_q_norm.weight"]), rms_norm(k, w[p + "attn_k_norm.weight"])
            self._store(il, k, v)
            if spec.is_swa(il):
                keys = np.arange(max(0, self.n_past - spec.n_swa + 1), self.n_past + n)
                key_pos, window = keys, spec.n_swa
            else:
                keys, key_pos, window = visible, rank, np.iinfo(np.int64).max
            distance = true[:, None] - keys[None, :]  # (n, n_keys), true positions
            mask = np.where((distance < 0) | (distance >= window), -np.inf, 0.0)
            attn = self._attention(il, q, keys, key_pos, mask)
            attn = attn @ w[p + "attn_output.weight"].T + w.get(p + "attn_output.bias", 0.0)
            x = self._feed_forward(p, x, attn)
        x = rms_norm(x[-1], w["output_norm.weight"])
        logits: Array = x @ w.get("output.weight", w["token_embd.weight"]).T
        return np.tanh(logits / FINAL_CAP) * FINAL_CAP if spec.arch == "gemma2" else logits

    def _project(self, h: Array, name: str, heads: int) -> Array:
        y: Array = h @ self.w[name + ".weight"].T + self.w.get(name + ".bias", 0.0)
        return y.reshape(len(h), heads, self.spec.head_dim)

    def _store(self, il: int, k: Array, v: Array) -> None:
        end = self.n_past + len(k)
        for rows in (self.k, self.v):
            if len(rows[il]) < end:
                rows[il] = np.concatenate([rows[il], np.zeros((max(1024, end), *k.shape[1:]))])
        self.k[il][self.n_past : end], self.v[il][self.n_past : end] = k, v

    def _attention(self, il: int, q: Array, keys: Array, key_pos: Array, mask: Array) -> Array:
        k, v = self._as_stored(il, self.k[il][keys], self.v[il][keys], key_pos)
        return self._mix(self._weights(il, q, key_pos[-len(q) :], k, mask), v)

    def _rotated(self, il: int, x: Array, pos: Array) -> Array:
        return rope(x, pos, self.spec.layer_rope_base(il), self.spec.norm_rope) if self.spec.has_rope(il) else x

    def _as_stored(self, il: int, k: Array, v: Array, pos: Array) -> tuple[Array, Array]:
        k, rounding = self._rotated(il, k, pos), self.round_kv
        return (k, v) if rounding is None else (rounding(k), rounding(v))

    def _weights(self, il: int, q: Array, q_pos: Array, k: Array, mask: Array) -> Array:
        """Softmax weights (n_head_kv, group, n, n_keys) of the queries (n, n_head, head_dim) on the rotated keys."""
        spec, n = self.spec, len(q)
        q = self._rotated(il, q, q_pos).reshape(n, spec.n_head_kv, -1, spec.head_dim)
        s = q.transpose(1, 2, 0, 3) @ k.transpose(1, 2, 0)[:, None] / np.sqrt(spec.head_dim)
        if spec.attn_cap:
            s = spec.attn_cap * np.tanh(s / spec.attn_cap)
        s = s + mask
        if spec.arch == "gpt-oss":  # one more column per head that takes weight and has no value
            sink = self.w[f"blk.{il}.attn_sinks.weight"].reshape(spec.n_head_kv, -1, 1, 1)
            s = np.concatenate([s, np.broadcast_to(sink, (*s.shape[:3], 1))], axis=-1)
        return softmax(s)[..., : len(k)]

    def _mix(self, a: Array, v: Array) -> Array:
        mixed: Array = (a @ v.transpose(1, 0, 2)[:, None]).transpose(2, 0, 1, 3).reshape(a.shape[2], -1)
        return mixed

    def _feed_forward(self, p: str, x: Array, attn: Array) -> Array:
        w = self.w
        if self.spec.is_gemma:
            x = x + rms_norm(attn, w[p + "post_attention_norm.weight"])
            h = rms_norm(x, w[p + "ffn_norm.weight"])
            y = (gelu(h @ w[p + "ffn_gate.weight"].T) * (h @ w[p + "ffn_up.weight"].T)) @ w[p + "ffn_down.weight"].T
            return x + rms_norm(y, w[p + "post_ffw_norm.weight"])
        x = x + attn
        if self.spec.arch == "gpt-oss":
            return x + self._experts(p, rms_norm(x, w[p + "post_attention_norm.weight"]))
        h = rms_norm(x, w[p + "ffn_norm.weight"])
        out: Array = (
            x + (silu(h @ w[p + "ffn_gate.weight"].T) * (h @ w[p + "ffn_up.weight"].T)) @ w[p + "ffn_down.weight"].T
        )
        return out

    def _experts(self, p: str, h: Array) -> Array:
        w, used = self.w, self.spec.n_expert_used
        router = h @ w[p + "ffn_gate_inp.weight"].T + w[p + "ffn_gate_inp.bias"]  # (n, n_expert)
        top = np.argsort(-router, axis=-1)[:, :used]
        share = softmax(np.take_along_axis(router, top, axis=-1))

        def each(name: str, y: Array) -> Array:  # (n, used, in) -> (n, used, out)
            return (w[f"{p}ffn_{name}_exps.weight"][top] @ y[..., None])[..., 0] + w[f"{p}ffn_{name}_exps.bias"][top]

        inp = np.repeat(h[:, None, :], used, axis=1)
        gate, up = np.minimum(each("gate", inp), 7.0), np.clip(each("up", inp), -7.0, 7.0)
        y = gate / (1.0 + np.exp(-1.702 * gate)) * (up + 1.0)
        mixed: Array = np.sum(each("down", y) * share[:, :, None], axis=1)
        return mixed
