"""StreamingLLM's perplexity beside a transformers model: figures for docs/evaluating.md, as Markdown tables.

    pip install kvpress torch transformers gguf
    python studies/sink_perplexity.py MODEL --text FILE

Three curves: a full cache, a window of the newest tokens, and a window with sinks, by the protocol of the benchmark of
https://github.com/tomaarsen/attention_sinks: one token per step, keys un-rotated in the cache and rotated to their places
in it at each step, and eviction down to the window after the step. So a step sees a window and one token more, which is
our budget: ours is the window plus 1. MODEL and FILE are those of `outside_oracle.py`.
"""

from __future__ import annotations

import argparse
import functools
import math
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from outside_oracle import F32, load_transformers, read_tokens, say
from torch import Tensor
from torch.nn import functional
from transformers import DynamicCache
from transformers.models.llama.modeling_llama import rotate_half

from equip_cli import CachePolicy, Model


class StreamCache:
    """StreamingLLM for a transformers model of llama's kind: un-rotated keys, rotated at each step to their places.

    Several streams that read the same tokens are the rows of one batch: they have the same window, of which so many are
    sinks. Written from section 3.2 of the paper (arXiv 2309.17453) and the protocol of the attention_sinks benchmark.
    """

    def __init__(self, model: Any, window: int, sinks: Sequence[int]) -> None:
        self.layers = [layer.self_attn for layer in model.model.layers]
        self.window, self.sinks = window, list(sinks)
        config = model.config
        # a row more than the window: the token of the step. (n_stream, n_head_kv, window + 1, head_dim)
        shape = (len(self.sinks), config.num_key_value_heads, window + 1, self.layers[0].head_dim)
        self.keys = [torch.zeros(shape) for _ in self.layers]
        self.values = [torch.zeros(shape) for _ in self.layers]
        self.n = 0  # tokens in each
        self.cos, self.sin = (
            table[0] for table in model.model.rotary_emb(self.keys[0], torch.arange(window + 1)[None])
        )  # (window + 1, head_dim)

    @contextmanager
    def installed(self) -> Iterator[None]:
        """The model's attention reads and writes this cache."""
        for layer, module in enumerate(self.layers):
            module.forward = functools.partial(self._attention, layer, module)
        try:
            yield
        finally:
            for module in self.layers:
                del module.forward

    def _rotate(self, x: Tensor, begin: int, end: int) -> Tensor:
        turned: Tensor = x * self.cos[begin:end] + rotate_half(x) * self.sin[begin:end]
        return turned

    def _attention(self, layer: int, module: Any, hidden_states: Tensor, **_: Any) -> tuple[Tensor, None]:
        """Attention of one token of each stream; hidden_states: (n_stream, 1, n_embd)."""
        n_stream, n = len(self.sinks), self.n + 1
        q, k, v = (
            project(hidden_states).view(n_stream, -1, 1, module.head_dim)
            for project in (module.q_proj, module.k_proj, module.v_proj)
        )
        self.keys[layer][:, :, n - 1 : n] = k
        self.values[layer][:, :, n - 1 : n] = v
        keys, values = self._rotate(self.keys[layer][:, :, :n], 0, n), self.values[layer][:, :, :n]
        q = self._rotate(q, n - 1, n)
        # the queries of each KV head: (n_stream, n_head_kv, n_group, head_dim)
        grouped = q.view(n_stream, keys.shape[1], -1, module.head_dim)
        weights = functional.softmax(grouped @ keys.transpose(2, 3) * module.scaling, dim=-1)
        return module.o_proj((weights @ values).reshape(n_stream, 1, -1)), None

    def step_done(self) -> None:
        """Evict down to the window: the oldest token behind the sinks."""
        self.n += 1
        if self.n <= self.window:
            return
        self.n = self.window
        for tensors in (self.keys, self.values):
            for tensor in tensors:
                for stream, sinks in enumerate(self.sinks):
                    tensor[stream, :, sinks : self.window] = tensor[stream, :, sinks + 1 : self.window + 1].clone()


def nll_of(logits: Tensor, tokens: Tensor) -> Tensor:
    """-log p of each token, in nats; logits (n, n_vocab)."""
    losses: Tensor = functional.cross_entropy(logits.double(), tokens, reduction="none")
    return losses


@torch.inference_mode()
def stream_nll(model: Any, tokens: Sequence[int], window: int, sinks: Sequence[int]) -> np.ndarray:
    """(len(sinks), len(tokens) - 1): of every token but the first, token by token, for each number of sinks."""
    cache = StreamCache(model, window, sinks)
    ids = torch.tensor(tokens)
    losses = torch.zeros(len(sinks), len(tokens) - 1, dtype=torch.float64)
    begin = time.perf_counter()
    with cache.installed():
        for i in range(len(tokens) - 1):
            logits = model(ids[i].expand(len(sinks), 1), use_cache=False).logits[:, 0]
            cache.step_done()
            losses[:, i] = nll_of(logits, ids[i + 1].expand(len(sinks)))
            if (i + 1) % 500 == 0:
                say(f"transformers, {i + 1} tokens: {time.perf_counter() - begin:.0f} s")
    found: np.ndarray = losses.numpy()
    return found


@torch.inference_mode()
def full_nll(model: Any, tokens: Sequence[int], size: int = 256) -> np.ndarray:
    """The same with a cache that keeps all: nothing is evicted, so chunks give what single tokens give."""
    past = DynamicCache()
    ids = torch.tensor(tokens)
    losses = []
    for start in range(0, len(tokens) - 1, size):
        end = min(start + size, len(tokens) - 1)
        logits = model(ids[None, start:end], past_key_values=past, use_cache=True).logits[0]
        losses.append(nll_of(logits, ids[start + 1 : end + 1]))
    found: np.ndarray = torch.cat(losses).numpy()
    return found


def our_nll(model: Model, policy: CachePolicy, tokens: Sequence[int], n_threads: int) -> np.ndarray:
    with model.session(policy, n_ctx=len(tokens), n_threads=n_threads, **F32) as session:
        session.eval(tokens[:1])
        return np.array(session.nll(tokens[1:]))


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, help="a GGUF file with weights in f32")
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("-n", type=int, default=8000, help="tokens that are predicted")
    parser.add_argument("--window", type=int, default=1024, help="tokens that are kept after a step")
    parser.add_argument("--sinks", type=int, default=4)
    parser.add_argument("--every", type=int, default=1000, help="tokens between two rows of the curves")
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    labels = ("full cache", "window", f"window with {args.sinks} sinks")
    bounded = f"streaming:budget={args.window + 1},positions=cache,rotate_every=1"
    policies = ("none", f"{bounded},sinks=0", f"{bounded},sinks={args.sinks}")
    ours = []
    with Model(args.model) as model:
        tokens = read_tokens(model, args.text, args.n + 1)
        for label, policy in zip(labels, policies, strict=True):
            begin = time.perf_counter()
            ours.append(our_nll(model, CachePolicy.parse(policy), tokens, args.threads))
            say(f"ours, {label}: {time.perf_counter() - begin:.0f} s")
    reference = load_transformers(args.model)
    theirs = [full_nll(reference, tokens), *stream_nll(reference, tokens, args.window, [0, args.sinks])]
    print(f"| tokens | {' | '.join(f'{label}: ours | transformers' for label in labels)} |")
    print(f"| ---: |{' ---: | ---: |' * len(labels)}")
    for n in [*range(args.every, args.n, args.every), args.n]:
        pairs = [(math.exp(a[:n].mean()), math.exp(b[:n].mean())) for a, b in zip(ours, theirs, strict=True)]
        print(f"| {n:,} | {' | '.join(f'{a:.4f} | {b:.4f}' for a, b in pairs)} |")
    print("\n| curve | largest difference of one token, nats | mean |\n| --- | ---: | ---: |")
    for label, a, b in zip(labels, ours, theirs, strict=True):
        apart = np.abs(a - b)
        print(f"| {label} | {apart.max():.1e} | {apart.mean():.1e} |")


if __name__ == "__main__":
    main()
