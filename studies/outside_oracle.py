"""Our policies beside kvpress, on the same weights: figures for docs/evaluating.md, as a Markdown table.

    pip install kvpress torch transformers gguf
    python studies/outside_oracle.py MODEL --text FILE

MODEL is a GGUF file of the architecture llama with weights in f32, so that both sides multiply the same numbers;
`python -c "import sys; sys.path.insert(0, 'tools'); import real_models; print(real_models.f32_copy())"` makes one of
SmolLM2-135M-Instruct. Both sides read the tokens that our tokenizer makes of FILE. Nothing is downloaded.

The prompt is read in chunks; after each one both sides come down to the budget. kvpress compresses once, after the whole
prompt, and its BlockPress and ChunkPress score in pieces a prompt that the model has read as a whole. So with several
chunks the model is run here, and kvpress's press is applied between them to what is kept and the chunk. The press
chooses by its own `compress()`: it is given indices in place of values, and what comes back is what it keeps. Our side:
f32 cache, flash attention off, positions `true` (kvpress leaves keys where they were), and the sinks and the recent
window that the press has. The transformers model is run twice:

- *own sets*: it keeps what the press says, from the first chunk to the last;
- *same sets*: it keeps what ours keeps, so each choice is made, and the logits are computed, from the same kept sets.

Then the next tokens of the text are read as one chunk, which evicts nothing before it is read, on both sides. Or they
are read one by one, with an eviction for each: `Setting.while_decoding()` says what corresponds to what.

Columns: the share of its tokens that a head keeps on both sides, mean and least, and the heads that keep the same ones
(with the same sets: of all choices); the gap of `score_gap()`; the largest difference of two logits, in units of the range
of all at that token, and the tokens for which both sides have the same most likely successor.
"""

from __future__ import annotations

import argparse
import itertools
import math
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import numpy as np
import torch
from kvpress import KeyDiffPress, KnormPress, ObservedAttentionPress, ScorerPress, SnapKVPress, TOVAPress
from kvpress import StreamingLLMPress as StreamingPress
from torch import Tensor
from torch.nn import functional
from transformers import AutoModelForCausalLM, DynamicCache
from transformers.utils import logging as transformers_logging

from equip_cli import CachePolicy, Model, Session

F32 = {"type_k": "f32", "type_v": "f32", "flash_attn": "off"}

Kept = list[Tensor]  # per layer: positions (n_head_kv, n_kept), ascending in each head


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def load_transformers(path: Path) -> Any:
    """The same weights in transformers; `eager` gives the attention weights that some presses read."""
    transformers_logging.disable_progress_bar()
    model = AutoModelForCausalLM.from_pretrained(
        path.parent, gguf_file=path.name, dtype=torch.float32, attn_implementation="eager"
    )
    return model.eval()


# ---- presses ---------------------------------------------------------------------------------------------------------


@dataclass
class NewestKept(ScorerPress):
    """A press that does not drop the newest token: ours never does, it is the least `recent` window."""

    press: ScorerPress = field(default_factory=ScorerPress)

    def score(self, *args: Any) -> Tensor:
        scores: Tensor = self.press.score(*args).clone()
        scores[..., -1] = math.inf
        return scores


@dataclass
class SummedAttention(ScorerPress):
    """H2O: ObservedAttentionPress without its division by the number of queries, and summed over the chunks."""

    sums: dict[int, Tensor] = field(default_factory=dict)  # per layer (1, n_head_kv, n), of what was kept
    totals: dict[int, Tensor] = field(default_factory=dict)  # with the last chunk's

    def score(
        self, module: Any, hidden_states: Tensor, keys: Tensor, values: Tensor, attentions: Tensor, kwargs: Any
    ) -> Tensor:
        n_head_kv, n = keys.shape[1:3]
        total = attentions.sum(2).view(1, n_head_kv, -1, n).mean(2)
        if (before := self.sums.get(module.layer_idx)) is not None:
            total = total + functional.pad(before, (0, n - before.shape[-1]))
        self.totals[module.layer_idx] = total
        return total

    def carry(self, layer: int, indices: Tensor) -> None:
        self.sums[layer] = self.totals[layer].gather(2, indices)


@dataclass(frozen=True)
class Method:
    """One of our policies, with the settings of the presses that it is compared with."""

    policy: str
    settings: str
    presses: dict[str, Callable[[], ScorerPress]]  # the last one has our definition after a prompt
    decoding: tuple[str, Callable[[], ScorerPress]] | None = None  # that which has it while single tokens are read


METHODS = {
    "StreamingLLM": Method(
        "streaming",
        "sinks=4",
        {"StreamingLLMPress": lambda: StreamingPress(n_sink=4)},
        ("StreamingLLMPress", lambda: StreamingPress(n_sink=4)),
    ),
    "SnapKV": Method(  # it chooses every 32 tokens while decoding, by queries that a press does not see
        "snapkv",
        "sinks=0,recent=64,window=64,kernel=5",
        {"SnapKVPress": lambda: SnapKVPress(window_size=64, kernel_size=5)},
    ),
    "TOVA": Method("tova", "sinks=0,recent=1", {"TOVAPress": TOVAPress}, ("TOVAPress", TOVAPress)),
    "KeyDiff": Method(
        "keydiff",
        "sinks=0,recent=1",
        {"KeyDiffPress": KeyDiffPress, "and the newest": lambda: NewestKept(press=KeyDiffPress())},
        ("KeyDiffPress", KeyDiffPress),
    ),
    "Knorm": Method(
        "knorm",
        "sinks=0,recent=1",
        {"KnormPress": KnormPress, "and the newest": lambda: NewestKept(press=KnormPress())},
        ("KnormPress", KnormPress),
    ),
    "H2O": Method(
        "h2o",
        "sinks=0,recent=1",
        {
            "ObservedAttentionPress": ObservedAttentionPress,
            "summed, and the newest": lambda: NewestKept(press=SummedAttention()),
        },
        ("summed", SummedAttention),
    ),
}


# ---- what is kept after a prompt -------------------------------------------------------------------------------------


def our_logits(session: Session, tokens: Sequence[int], n_past: int) -> np.ndarray:
    """Logits after each of the tokens but the first, when they are read as one chunk: (len(tokens) - 1, n_vocab).

    A session has the logits of a chunk's last token, so the chunk is read again with one token more each time. Its
    evictions come after it, and taking it back makes them undone. (A first token alone would evict before it is read.)
    """
    rows = []
    for n in range(2, len(tokens) + 1):
        session.eval(tokens[:n])
        rows.append(session.logits())
        assert session.rewind(n_past) == "exact"
    return np.stack(rows)


@dataclass
class Chunk:
    """What the layers of a transformers model computed for one chunk; lists are per layer."""

    hidden: list[Tensor] = field(default_factory=list)  # (1, n, n_embd), inputs of the attention
    attentions: list[Tensor] = field(default_factory=list)  # (1, n_head, n, n_kv)
    kwargs: list[dict[str, Any]] = field(default_factory=list)
    keys: list[Tensor] = field(default_factory=list)  # (1, n_head_kv, n_kv, head_dim), with what was kept before
    values: list[Tensor] = field(default_factory=list)
    logits: np.ndarray = field(default_factory=lambda: np.empty(0))  # (n_vocab,), of the last token


class Reader:
    """A transformers model that reads a prompt in chunks, from kept sets that are given to it."""

    def __init__(self, model: Any) -> None:
        self.model = model
        self.layers = [layer.self_attn for layer in model.model.layers]
        self.first: dict[tuple[int, ...], Chunk] = {}  # nothing was evicted before it, so all presses share it

    @torch.inference_mode()
    def read(self, tokens: Sequence[int], n_past: int, cache: list[tuple[Tensor, Tensor]] | None) -> Chunk:
        if cache is None and (known := self.first.get(tuple(tokens))):
            return known
        chunk = Chunk()

        def hook(module: Any, args: Any, kwargs: dict[str, Any], output: Any) -> None:
            chunk.hidden.append(kwargs["hidden_states"])
            chunk.attentions.append(output[1])
            chunk.kwargs.append(kwargs)

        past = self._cache(cache)
        hooks = [layer.register_forward_hook(hook, with_kwargs=True) for layer in self.layers]
        try:
            chunk.logits = self._forward(tokens, n_past, past).logits[0, -1].numpy()
        finally:
            for each in hooks:
                each.remove()
        for layer in past.layers:
            assert layer.keys is not None and layer.values is not None
            chunk.keys.append(layer.keys)
            chunk.values.append(layer.values)
        if cache is None:
            self.first[tuple(tokens)] = chunk
        return chunk

    @torch.inference_mode()
    def logits(self, tokens: Sequence[int], n_past: int, cache: list[tuple[Tensor, Tensor]]) -> np.ndarray:
        """(len(tokens), n_vocab), the tokens behind what is kept."""
        rows: np.ndarray = self._forward(tokens, n_past, self._cache(cache)).logits[0].numpy()
        return rows

    def _forward(self, tokens: Sequence[int], n_past: int, past: DynamicCache) -> Any:
        # the mask goes by places in the cache, the rotation by positions
        positions = torch.arange(n_past, n_past + len(tokens))[None]
        return self.model(torch.tensor([list(tokens)]), position_ids=positions, past_key_values=past, use_cache=True)

    def _cache(self, cache: list[tuple[Tensor, Tensor]] | None) -> DynamicCache:
        made = DynamicCache()
        for layer, (keys, values) in enumerate(cache or ()):
            made.update(keys, values, layer)
        return made


class Differing(NamedTuple):
    """A head whose kept sets differ."""

    layer: int
    head: int
    theirs: list[int]  # positions that the press alone keeps
    ours: list[int]
    gap: float  # see score_gap()


@dataclass
class Comparison:
    """Shares of tokens that both keep, one of each head and choice, and what `Differing` says of those below 1."""

    shares: list[float] = field(default_factory=list)
    differing: list[Differing] = field(default_factory=list)

    @property
    def gap(self) -> str:
        """The largest; a dash where no head differs."""
        return f"{max(each.gap for each in self.differing):.0e}" if self.differing else "-"

    @property
    def n_identical(self) -> int:
        return sum(share == 1 for share in self.shares)


def score_gap(scores: Tensor, theirs: Sequence[int], ours: Sequence[int]) -> float:
    """How much the press prefers the best of the tokens that it alone keeps to the worst that we alone keep.

    As a share of the larger of the two scores: where only rounding decides, this is about the rounding of a score, and
    0 is a tie. theirs, ours: their places in `scores` (n,).
    """
    best, worst = float(scores[theirs].max()), float(scores[ours].min())
    return (best - worst) / max(abs(best), abs(worst))


def compare_head(
    found: Comparison, layer: int, head: int, candidates: Tensor, theirs: Tensor, ours: Tensor, scores: Tensor
) -> None:
    """All but `scores`, the press's of the candidates, are positions (n,); `found` is added to."""
    kept_by = set(theirs.tolist()), set(ours.tolist())
    found.shares.append(len(kept_by[0] & kept_by[1]) / len(ours))
    alone = sorted(kept_by[0] - kept_by[1]), sorted(kept_by[1] - kept_by[0])
    place = {position: i for i, position in enumerate(candidates.tolist())}
    if alone[0]:
        # where an earlier choice dropped what we keep, there is no score of it
        is_known = all(position in place for position in alone[1])
        gap = score_gap(scores, *([place[p] for p in side] for side in alone)) if is_known else math.nan
        found.differing.append(Differing(layer, head, *alone, gap))


def select(tensor: Tensor, indices: Tensor) -> Tensor:
    return tensor.gather(2, indices[..., None].expand(-1, -1, -1, tensor.shape[-1]))


@dataclass
class PressRun:
    """What a press kept when the transformers model had read all chunks, and what came before."""

    found: Comparison
    cache: list[tuple[Tensor, Tensor]]  # keys and values per layer (1, n_head_kv, n_kept, head_dim)
    logits: list[np.ndarray]  # (n_vocab,) of the last token of each chunk


def press_run(
    reader: Reader,
    press: ScorerPress,
    chunks: Sequence[Sequence[int]],
    budget: int,
    ours: Sequence[Kept] | None,
    *,
    same: bool,
    first: int = 0,
) -> PressRun:
    """Read the chunks, with the press after each, and compare what it keeps with what ours kept there.

    ours: after each chunk; same: go on with that, and compare all choices, not only the last. Before the `first` chunk it
    is always gone on with what is ours, and nothing is compared.
    """
    positions: Kept | None = None
    cache: list[tuple[Tensor, Tensor]] | None = None
    found, logits, start = Comparison(), [], 0
    inner = press.press if isinstance(press, NewestKept) else press
    for i, tokens in enumerate(chunks):
        chunk = reader.read(tokens, start, cache)
        logits.append(chunk.logits)
        is_compared = ours is not None and (i >= first if same else i == len(chunks) - 1)
        kept: Kept = []
        going_on: list[tuple[Tensor, Tensor]] = []
        for layer, module in enumerate(reader.layers):
            keys, values = chunk.keys[layer], chunk.values[layer]
            n_head_kv, n = keys.shape[1:3]
            new = torch.arange(start, start + len(tokens)).expand(n_head_kv, -1)
            now = new if positions is None else torch.cat([positions[layer], new], dim=1)  # (n_head_kv, n)
            rest = (chunk.attentions[layer], chunk.kwargs[layer])
            indices = torch.arange(n).expand(1, n_head_kv, -1)
            if n > budget:
                # int(n * (1 - ratio)) is the budget, whatever the division rounds to
                press.compression_ratio = 1 - (budget + 0.5) / n
                places = indices[..., None].expand(-1, -1, -1, keys.shape[-1])
                indices = press.compress(module, chunk.hidden[layer], keys, places, *rest)[1][..., 0].sort(-1).values
            elif isinstance(inner, SummedAttention):
                inner.score(module, chunk.hidden[layer], keys, values, *rest)
            if n > budget and ours is not None and is_compared:
                scores = press.score(module, chunk.hidden[layer], keys, values, *rest)[0]
                theirs = now.gather(1, indices[0])
                for head in range(n_head_kv):
                    compare_head(found, layer, head, now[head], theirs[head], ours[i][layer][head], scores[head])
            if ours is not None and (same or i < first):
                pairs = zip(now, ours[i][layer], strict=True)
                indices = torch.stack(
                    [torch.searchsorted(candidates.contiguous(), chosen) for candidates, chosen in pairs]
                )[None]
            if isinstance(inner, SummedAttention):
                inner.carry(layer, indices)
            kept.append(now.gather(1, indices[0]))
            going_on.append((select(keys, indices), select(values, indices)))
        positions, cache, start = kept, going_on, start + len(tokens)
    assert cache is not None
    return PressRun(found, cache, logits)


@dataclass
class Difference:
    """Of two blocks of logits (n, n_vocab)."""

    largest: float  # of all, in units of the range of its row
    same_top: int  # rows with the same most likely token

    @classmethod
    def of(cls, ours: np.ndarray, theirs: np.ndarray) -> Difference:
        spans = np.ptp(theirs, axis=1, keepdims=True)
        return cls(
            float((np.abs(ours - theirs) / spans).max()), int((ours.argmax(axis=1) == theirs.argmax(axis=1)).sum())
        )


@dataclass
class Row:
    method: str
    press: str
    budget: int
    read: str  # how the tokens before the choices came
    own: Comparison
    same: Comparison
    logits_own: Difference
    logits_same: Difference
    n_logits: int

    @classmethod
    def of(
        cls,
        method: str,
        press: str,
        budget: int,
        read: str,
        runs: Iterable[tuple[Comparison, np.ndarray]],
        ours: np.ndarray,
    ) -> Row:
        """runs: own sets and same sets, each with its logits; ours: our logits (n, n_vocab)."""
        (own, theirs), (same, theirs_same) = runs
        differences = Difference.of(ours, theirs), Difference.of(ours, theirs_same)
        return cls(method, press, budget, read, own, same, *differences, len(ours))

    HEADER: ClassVar[str] = (
        "| method | press | budget | read in | own sets: mean, least, identical | same sets: least, identical, gap "
        "| logits, own sets | logits, same sets |\n| --- | --- | ---: | --- |" + " ---: |" * 4
    )

    def __str__(self) -> str:
        own, same = self.own.shares, self.same.shares
        cells = [
            *(self.method, self.press, str(self.budget), self.read),
            f"{np.mean(own):.4f}, {min(own):.3f}, {self.own.n_identical} of {len(own)}",
            f"{min(same):.3f}, {self.same.n_identical} of {len(same)}, {self.same.gap}",
            *(
                f"{each.largest:.0e}, {each.same_top} of {self.n_logits}"
                for each in (self.logits_own, self.logits_same)
            ),
        ]
        return f"| {' | '.join(cells)} |"


@dataclass(frozen=True)
class Setting:
    """One of our policies at one budget, beside the presses of its method."""

    model: Model
    reader: Reader
    name: str
    budget: int
    n_threads: int = 1

    @contextmanager
    def session(self, size: int) -> Iterator[Session]:
        method = METHODS[self.name]
        policy = CachePolicy.parse(f"{method.policy}:budget={self.budget},positions=true,{method.settings}")
        with self.model.session(policy, n_batch=size, n_ubatch=size, n_threads=self.n_threads, **F32) as session:
            yield session

    def kept_by(self, session: Session) -> Kept:
        """Of our heads."""
        n_head_kv = self.reader.model.config.num_key_value_heads
        return [
            torch.tensor([[position for position, _ in session.head(layer, head)] for head in range(n_head_kv)])
            for layer in range(len(self.reader.layers))
        ]

    def after_prompt(self, prompt: Sequence[int], following: Sequence[int], size: int) -> Iterator[Row]:
        """A row for each press: the prompt in chunks of a size, then the logits of what follows."""
        chunks = [prompt[start : start + size] for start in range(0, len(prompt), size)]
        ours = []
        with self.session(size) as session:
            for chunk in chunks:
                session.eval(chunk)
                ours.append(self.kept_by(session))
            logits = our_logits(session, following, len(prompt))

        def run(press: ScorerPress, same: bool) -> tuple[Comparison, np.ndarray]:
            done = press_run(self.reader, press, chunks, self.budget, ours, same=same)
            return done.found, self.reader.logits(following, len(prompt), done.cache)[1:]

        for label, make in METHODS[self.name].presses.items():
            read = "one chunk" if len(chunks) == 1 else f"chunks of {size}"
            yield Row.of(self.name, label, self.budget, read, [run(make(), same) for same in (False, True)], logits)

    def while_decoding(self, prompt: Sequence[int], following: Sequence[int]) -> Row:
        """A prompt in one chunk, then single tokens, with a choice before each.

        We evict when a token comes, a press after it has come. So what we keep beside the new token is what a press keeps of
        the tokens before it, at a budget of one less; and `recent=1` is the new token, so that the one before it may go.
        The first choice is not compared: after the prompt we have come down to the budget, and then by one token more.
        """
        decoding = METHODS[self.name].decoding
        assert decoding is not None, f"{self.name} has no press for single tokens"
        label, make = decoding
        ours, logits = [], []
        with self.session(len(prompt)) as session:
            session.eval(prompt)
            for token in following:
                session.eval([token])
                logits.append(session.logits())
                ours.append([layer[:, :-1] for layer in self.kept_by(session)])

        def run(same: bool) -> tuple[Comparison, np.ndarray]:
            chunks = [prompt, *([token] for token in following[:-1])]
            done = press_run(self.reader, make(), chunks, self.budget - 1, ours, same=same, first=1)
            last = self.reader.logits(following[-1:], len(prompt) + len(following) - 1, done.cache)
            return done.found, np.stack([*done.logits[1:], last[0]])

        runs = [run(same) for same in (False, True)]
        return Row.of(self.name, label, self.budget, f"{len(following)} single", runs, np.stack(logits))


# ---- command line ----------------------------------------------------------------------------------------------------


def read_tokens(model: Model, text: Path, n: int) -> list[int]:
    """The first n tokens of a text. Raises SystemExit where it has fewer."""
    # ten bytes a token are more than any text of a natural language has
    tokens = model.tokenize(text.read_text(encoding="utf-8")[: 10 * n])[:n]
    if len(tokens) < n:
        raise SystemExit(f"{text} has {len(tokens)} tokens and {n} are wanted: give a longer text")
    return tokens


def numbers(text: str) -> list[int]:
    return [int(word) for word in text.split(",")]


def methods(text: str) -> list[str]:
    names = text.split(",")
    if unknown := [name for name in names if name not in METHODS]:
        raise argparse.ArgumentTypeError(f"there is no method {unknown[0]}: choose of {', '.join(METHODS)}")
    return names


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, help="a GGUF file with weights in f32")
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--methods", type=methods, default=list(METHODS), help="by commas; default: all")
    parser.add_argument("--prompt", type=int, default=1024, help="tokens of the prompt")
    parser.add_argument("--budgets", type=numbers, default=[256, 512, 768])
    parser.add_argument(
        "--chunks",
        type=numbers,
        default=[1024, 256, 1],
        help="tokens of a chunk of the prompt; 1: the prompt is one chunk, and what follows is read token by token",
    )
    parser.add_argument("--next", type=int, default=64, help="tokens behind the prompt whose logits are compared")
    parser.add_argument("--details", action="store_true", help="each head that differs, on stderr")
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    reader = Reader(load_transformers(args.model))
    print(Row.HEADER, flush=True)
    with Model(args.model) as model:
        tokens = read_tokens(model, args.text, args.prompt + 1 + args.next)
        prompt, following = tokens[: args.prompt], tokens[args.prompt :]
        for size in args.chunks:
            for name, budget in itertools.product(args.methods, args.budgets):
                setting = Setting(model, reader, name, budget, args.threads)
                begin = time.perf_counter()
                if size > 1:
                    rows = setting.after_prompt(prompt, following, size)
                elif METHODS[name].decoding:
                    rows = iter([setting.while_decoding(prompt, following[1:])])
                else:
                    continue
                for row in rows:
                    print(row, flush=True)
                    for each in row.same.differing if args.details else ():
                        say(f"{row.method}, {row.press}, {budget}, {row.read}: {each}")
                say(f"{name}, {budget}, {size}: {time.perf_counter() - begin:.0f} s")
            if size != args.prompt:
                reader.first.clear()


if __name__ == "__main__":
    main()
