"""A toy learned gate behind the policy `external`: figures for docs/policies.md, as a Markdown table.

    .venv/bin/pip install gguf
    .venv/bin/python studies/learned_gate.py

Learned gates (TokenButler, arXiv 2503.07518; Dynamic Context Pruning, 2305.15805) are small networks beside a model that say
which tokens will be needed. This one looks at the embeddings of a token and of the three before it, and predicts for each
layer and KV head the logarithm of the largest attention weight, summed over the head's queries, that any query will pay to
the token once it has left the recent window. It is trained in numpy on the embedded model's own attention over dialogues and
prose of its training generators, and measured on what is held out of them: names that lie beyond the budget, and prose.

Two controls: the same scores dealt out to other tokens of the text, and scores of 0 (the oldest token goes).
"""

from __future__ import annotations

import argparse
import itertools
import random
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from numpy.typing import NDArray

from equip_cli import CachePolicy, Model, Session
from equip_cli.evaluation import quality
from equip_cli.models import embedded

sys.path.insert(0, str(Path(__file__).parent / "tiny_model"))
import prose
from dialogues import Dialogue
from names import train_name

Array = NDArray[np.float32]
Scorer = Callable[[Sequence[int]], Array]  # tokens of a text -> (n_layer, n_head_kv, n)

RECENT = 64  # tokens; what is younger is never evicted, and attention to it says nothing about what to keep
WINDOW = 4  # embeddings that the gate sees


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


class Teacher:
    """The embedded model in numpy, for its attention weights."""

    def __init__(self, path: Path) -> None:
        reader = gguf.GGUFReader(str(path))
        self.w: dict[str, Array] = {
            t.name: gguf.quants.dequantize(t.data, t.tensor_type).reshape(t.shape[::-1]).astype(np.float32)
            for t in reader.tensors
        }
        of = {name.removeprefix("llama."): field.contents for name, field in reader.fields.items()}
        self.n_layer, self.n_head, self.n_head_kv = (
            int(of[name]()) for name in ("block_count", "attention.head_count", "attention.head_count_kv")
        )
        self.eps, self.base = float(of["attention.layer_norm_rms_epsilon"]()), float(of["rope.freq_base"]())
        self.embd = self.w["token_embd.weight"]

    def _norm(self, x: Array, name: str) -> Array:
        scaled: Array = x / np.sqrt((x * x).mean(-1, keepdims=True) + self.eps) * self.w[name]
        return scaled

    def _rotate(self, x: Array) -> Array:
        half = x.shape[-1] // 2
        angle = np.arange(len(x))[:, None, None] * self.base ** (-np.arange(half) / half)
        even, odd = x[..., 0::2], x[..., 1::2]
        out = np.stack((even * np.cos(angle) - odd * np.sin(angle), even * np.sin(angle) + odd * np.cos(angle)), -1)
        return out.reshape(x.shape).astype(np.float32)

    def far_attention(self, tokens: Sequence[int]) -> Array:
        """(n_layer, n_head_kv, n): the largest weight, summed over a head's queries, from a token at least RECENT later."""
        n, group = len(tokens), self.n_head // self.n_head_kv
        x, out = self.embd[list(tokens)], []
        hidden = np.triu(np.full((n, n), -np.inf, dtype=np.float32), 1)
        near = np.arange(n)[:, None] - np.arange(n) < RECENT
        for il in range(self.n_layer):
            h = self._norm(x, f"blk.{il}.attn_norm.weight")
            q, k, v = (h @ self.w[f"blk.{il}.attn_{name}.weight"].T for name in "qkv")
            dim = q.shape[1] // self.n_head
            q, k, v = (m.reshape(n, -1, dim) for m in (q, k, v))
            q, k, v = (m.transpose(1, 0, 2) for m in (self._rotate(q), self._rotate(k), v))  # (heads, n, dim)
            mixed, far = [], []
            for g in range(self.n_head_kv):
                total = np.zeros((n, n), dtype=np.float32)
                for h in range(g * group, (g + 1) * group):
                    a = q[h] @ k[g].T / np.float32(np.sqrt(dim)) + hidden
                    a = np.exp(a - a.max(-1, keepdims=True))
                    a /= a.sum(-1, keepdims=True)
                    total += a
                    mixed.append(a @ v[g])
                far.append(np.where(near, 0.0, total).max(0))
            out.append(far)
            x = x + np.concatenate(mixed, axis=1) @ self.w[f"blk.{il}.attn_output.weight"].T
            h = self._norm(x, f"blk.{il}.ffn_norm.weight")
            gated, up = (h @ self.w[f"blk.{il}.ffn_{name}.weight"].T for name in ("gate", "up"))
            x = x + (gated / (1.0 + np.exp(-gated)) * up) @ self.w[f"blk.{il}.ffn_down.weight"].T
        return np.array(out, dtype=np.float32)


def training_texts(model: Model, seed: int, n_tokens: int) -> Iterator[list[int]]:
    """Dialogues as the recall test has them, and prose, in turns; no held-out name."""
    rng = random.Random(seed)
    while True:
        talk, messages, tokens = Dialogue(rng, train_name, rng.choice((0.3, 0.5, 0.7)), 8), [], list[int]()
        while len(tokens) < n_tokens:
            for _ in range(12):
                turn = talk.turn()
                messages += [{"role": "user", "content": turn.user}, {"role": "assistant", "content": turn.assistant}]
            tokens = model.tokenize(model.render_chat(messages))
        yield tokens[:n_tokens]
        text = "\n\n".join(prose.passage(rng, lambda: train_name(rng)) for _ in range(12))
        yield model.tokenize(text)[:n_tokens]


class Gate:
    """Embeddings of WINDOW tokens -> a hidden layer -> a number per layer and KV head."""

    def __init__(self, teacher: Teacher, seed: int, n_hidden: int = 64) -> None:
        rng = np.random.default_rng(seed)
        self.embd, self.shape = teacher.embd / teacher.embd.std(), (teacher.n_layer, teacher.n_head_kv)
        sizes = (WINDOW * self.embd.shape[1], n_hidden, teacher.n_layer * teacher.n_head_kv)
        self.w = [(rng.normal(size=(a, b)) / np.sqrt(a)).astype(np.float32) for a, b in itertools.pairwise(sizes)]
        self.b = [np.zeros(n, dtype=np.float32) for n in sizes[1:]]

    def features(self, tokens: Sequence[int]) -> Array:
        """(n, WINDOW * n_embd): zeros where the text has not begun."""
        x = np.pad(self.embd[list(tokens)], ((WINDOW - 1, 0), (0, 0)))
        return np.concatenate([x[i : i + len(tokens)] for i in range(WINDOW)], axis=1)

    def __call__(self, tokens: Sequence[int]) -> Array:
        h = np.maximum(self.features(tokens) @ self.w[0] + self.b[0], 0.0)
        return (h @ self.w[1] + self.b[1]).T.reshape(*self.shape, -1)

    def train(self, x: Array, y: Array, n_steps: int, seed: int) -> None:
        """Adam on the mean squared error; y: (n, outputs)."""
        rng, n_batch, rate = np.random.default_rng(seed), 512, 2e-3
        params = [self.w[0], self.b[0], self.w[1], self.b[1]]
        first, second = ([np.zeros_like(p) for p in params] for _ in range(2))
        self.b[1][:] = y.mean(0)
        for step in range(1, n_steps + 1):
            i = rng.integers(0, len(x), n_batch)
            h = np.maximum(x[i] @ self.w[0] + self.b[0], 0.0)
            error = (h @ self.w[1] + self.b[1] - y[i]) * (2.0 / n_batch)
            back = error @ self.w[1].T * (h > 0.0)
            for p, g, m, s in zip(
                params, (x[i].T @ back, back.sum(0), h.T @ error, error.sum(0)), first, second, strict=True
            ):
                m += 0.1 * (g - m)
                s += 0.001 * (g * g - s)
                scale = rate * (1.0 - step / n_steps) * np.sqrt(1.0 - 0.999**step) / (1.0 - 0.9**step)
                p -= (scale * m / (np.sqrt(s) + 1e-8)).astype(np.float32)

    def explained(self, x: Array, y: Array) -> float:
        """The share of the variance of each output, the mean over them."""
        h = np.maximum(x @ self.w[0] + self.b[0], 0.0)
        return float(1.0 - (((h @ self.w[1] + self.b[1] - y) ** 2).mean(0) / y.var(0)).mean())


class Gated(Session):
    """A session whose tokens get their scores before they are read."""

    scorer: Scorer
    history: list[int]

    def _announce(self, tokens: Sequence[int]) -> None:
        begin = len(self.history)
        self.history += tokens
        scores = self.scorer(self.history)
        for il, heads in enumerate(scores):
            for head, values in enumerate(heads):
                self.set_scores(il, head, range(begin, len(self.history)), values[begin:].tolist())

    def eval(self, tokens: Sequence[int]) -> int:
        self._announce(tokens)
        return super().eval(tokens)

    def nll(self, tokens: Sequence[int], *args: Any, **options: Any) -> list[float]:
        self._announce(tokens)
        return super().nll(tokens, *args, **options)

    def reset(self) -> None:
        self.history = []
        super().reset()


def dealt_out(gate: Scorer) -> Scorer:
    """The same scores at other positions of the text: each token gets those of one drawn for its position."""

    def scorer(tokens: Sequence[int]) -> Array:
        scores = gate(tokens)
        order = [random.Random(i).randrange(i + 1) for i in range(len(tokens))]
        return scores[..., order]

    return scorer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--texts", type=int, default=160, help="training texts of 1,024 tokens")
    parser.add_argument("--steps", type=int, default=6000, help="of 512 tokens")
    parser.add_argument("--budget", type=int, nargs="*", default=[256, 128])
    parser.add_argument("--dialogues", type=int, default=400, help="held-out ones")
    parser.add_argument("-n", type=int, default=4000, help="tokens of held-out prose")
    parser.add_argument("-t", type=int, default=1, help="threads")
    args = parser.parse_args()

    begin = time.monotonic()
    model, teacher = Model(str(embedded.MODEL)), Teacher(embedded.MODEL)
    gate, source, xs, ys = Gate(teacher, 1), training_texts(model, 1, 1024), list[Array](), list[Array]()
    for i in range(args.texts):
        tokens = next(source)
        y = np.log(teacher.far_attention(tokens) + 1e-4).reshape(-1, len(tokens)).T
        ys.append(y[1 : len(tokens) - RECENT])  # the first token is a sink
        xs.append(gate.features(tokens)[1 : len(tokens) - RECENT].astype(np.float16).astype(np.float32))
        if i % 20 == 0:
            say(f"text {i}, {time.monotonic() - begin:.0f} s")
    held = max(2, args.texts // 10)
    gate.train(np.concatenate(xs[:-held]), np.concatenate(ys[:-held]), args.steps, 1)
    print(
        f"trained on {sum(map(len, xs[:-held]))} tokens; share of the variance that is explained, on other texts: "
        f"{gate.explained(np.concatenate(xs[-held:]), np.concatenate(ys[-held:])):.2f}\n"
    )
    say(f"trained after {time.monotonic() - begin:.0f} s")

    text = model.tokenize(embedded.prose())[: args.n]
    held_out = embedded.recall_dialogues()
    asked = held_out[:: max(1, len(held_out) // args.dialogues)]
    print(
        "| policy | budget | names beyond the budget | within | perplexity of prose |\n| --- | ---: | ---: | ---: | ---: |"
    )
    rows: list[tuple[str, str, Scorer | None]] = [
        ("streaming", "streaming", None),
        ("random, per head", "random:scope=head", None),
        ("h2o, per head", "h2o", None),
        *((f"external: the gate, per {s}", f"external:scope={s}", gate) for s in ("head", "layer", "token")),
        ("external: its scores dealt out", "external", dealt_out(gate)),
        ("external: no scores", "external", lambda tokens: np.zeros((*gate.shape, len(tokens)), dtype=np.float32)),
    ]
    for budget in args.budget:
        for name, policy, scorer in rows:
            given = CachePolicy.parse(f"{policy}{',' if ':' in policy else ':'}budget={budget}")
            kind = Session if scorer is None else Gated
            with kind(model, given, n_threads=args.t, n_threads_batch=args.t) as session:
                if isinstance(session, Gated) and scorer is not None:
                    session.scorer, session.history = scorer, []
                counts = quality.recall(session, asked, lambda n: None)
                near, far = ([x for d, x in counts.items() if (d > budget) == is_far] for is_far in (False, True))
                told = [f"{sum(h for h, _ in x)} of {sum(n for _, n in x)}" for x in (far, near)]
                ppl = quality.perplexity(session, text, lambda n: None)
            print(f"| {name} | {budget} | {told[0]} | {told[1]} | {ppl:.3f} |", flush=True)


if __name__ == "__main__":
    main()
