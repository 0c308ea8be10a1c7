"""The rows of the study: a method with its settings, and the row that it has to beat."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from .eviction import Method
from .methods import (
    Cascade,
    Compose,
    Everything,
    Expected,
    Filtered,
    Lazy,
    Pyramid,
    Random,
    Streaming,
    Summed,
    Vase,
    Windowed,
)


@dataclass(frozen=True)
class Entry:
    make: Callable[[str, int], Method]  # of the row's name and the budget
    base: str | None = None
    needs_heads: bool = False  # says nothing about a model with one KV head per layer


def tenth(budget: int) -> int:
    """Of 2605.18053: what is reserved at either end."""
    return budget // 10


H2O = "h2o, eight at once"

ROWS: dict[str, Entry] = {
    "none": Entry(Everything),
    # in the library, with its protection: 4 sinks, and max(16, a quarter of the budget) recent tokens
    "streaming": Entry(Streaming),
    "random": Entry(Random, "streaming"),
    "h2o": Entry(Summed, "streaming"),
    "tova": Entry(lambda name, b: Summed(name, b, by_layer=True, decay=0.0), "streaming"),
    "snapkv": Entry(Windowed, "streaming"),
    "a2sf": Entry(lambda name, b: Summed(name, b, decay=0.95), "streaming"),
    # SnapKV's own protection, which leaves room for budgets that differ
    "snapkv, recent 32": Entry(lambda name, b: Windowed(name, b, recent=32), "snapkv"),
    # eight victims at once: the base of what is built upon h2o, since it is read in an eighth of the steps
    "h2o, eight at once": Entry(lambda name, b: Summed(name, b, block=8), "h2o"),
    # the largest weight in place of the sum
    "h2o, max of queries": Entry(lambda name, b: Summed(name, b, block=8, queries="max"), H2O),
    "h2o, max of heads": Entry(lambda name, b: Summed(name, b, block=8, heads="max"), H2O),
    "snapkv, max of queries": Entry(lambda name, b: Windowed(name, b, queries="max"), "snapkv"),
    "snapkv, max of heads": Entry(lambda name, b: Windowed(name, b, heads="max"), "snapkv"),
    "KVCompose, equal layers": Entry(lambda name, b: Compose(name, b, recent=32), "snapkv, recent 32"),
    "KVCompose": Entry(lambda name, b: Compose(name, b, recent=32, layered=True), "KVCompose, equal layers"),
    "PyramidKV": Entry(lambda name, b: Pyramid(name, b, recent=32), "snapkv, recent 32"),
    "PyramidKV, beta 2": Entry(lambda name, b: Pyramid(name, b, recent=32, beta=2.0), "snapkv, recent 32"),
    "Ada-KV": Entry(lambda name, b: Windowed(name, b, recent=32, pooled=0.2), "snapkv, recent 32", needs_heads=True),
    "SpAtten": Entry(lambda name, b: Cascade(name, b, block=8, recent=32), H2O),
    "LazyLLM": Entry(Lazy, "tova"),
    "LazyLLM, evicting": Entry(lambda name, b: Cascade(name, b, recent=32, importance="last"), "tova"),
    "Expected Attention": Entry(Expected, "snapkv"),
    "VaSE": Entry(Vase, "snapkv"),
    "VaSE, no chance": Entry(lambda name, b: Vase(name, b, noise=0.0), "snapkv"),
    # these keep more bytes than a budget: none is evicted
    "Token Filtering, 0.1": Entry(lambda name, b: Filtered(name, b, 0.1)),
    "Token Filtering, 0.3": Entry(lambda name, b: Filtered(name, b, 0.3)),
    "Token Filtering, 0.5": Entry(lambda name, b: Filtered(name, b, 0.5)),
    # protection at both ends
    "h2o, a tenth at both ends": Entry(lambda name, b: Summed(name, b, tenth(b), tenth(b), 8), H2O),
    "h2o, newest token only": Entry(lambda name, b: Summed(name, b, 0, 1, 8), H2O),
    "random, a tenth at both ends": Entry(lambda name, b: Random(name, b, tenth(b), tenth(b)), "random"),
    "streaming, a tenth of sinks": Entry(lambda name, b: Streaming(name, b, tenth(b)), "streaming"),
}

BUILT = ("streaming", "h2o", "h2o, eight at once", "tova", "snapkv", "a2sf")
