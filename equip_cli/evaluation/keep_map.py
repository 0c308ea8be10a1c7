"""Which tokens each layer and head keeps as a text goes by."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from equip_cli.core.errors import UsageError
from equip_cli.core.policy import CachePolicy

if TYPE_CHECKING:
    from equip_cli.core.session import Session
    from equip_cli.evaluation.quality import Advance

_COLUMNS, _MIN_COLUMNS = 200, 50
_PANELS = 64
_CELLS = 16_000_000  # kept positions held at once, 8 bytes each

Unit = tuple[str, Callable[[], list[tuple[int, float]]]]  # the label, and what reads (position, weight) of the kept


@dataclass
class KeepMap:
    """What a cache kept while it read.

    title: model, policy and budget; n_read: tokens read at each look at the cache, ascending; panels: a label, and for
    each look the positions that were kept, per layer or per layer and head.
    """

    title: str
    n_read: list[int]
    panels: list[tuple[str, list[list[int]]]]


def length(budget: int, n_tokens: int) -> int:
    """Tokens of a text of `n_tokens` that are read: four budgets, from 1024 up to 2048, or two if that is more."""
    return min(n_tokens, max(2 * budget, min(max(4 * budget, 1024), 2048)))


def spread(n: int, n_max: int) -> list[int]:
    """`n_max` of the numbers below `n`, evenly spread; all of them if there are no more."""
    n_max = min(n, n_max)
    return [i * n // n_max for i in range(n_max)]


def _reader(session: Session, layer: int, head: int) -> Callable[[], list[tuple[int, float]]]:
    return lambda: session.head(layer, head)


def _exists(session: Session, layer: int, head: int) -> bool:
    try:
        session.head(layer, head)
    except UsageError:  # a layer without a cache of its own, or one with less heads
        return False
    return True


def units(session: Session) -> tuple[list[Unit], str]:
    """What is drawn, at most 64 panels, and a word on what is left out ("" = nothing).

    Scope token: one panel; layer: one per layer; head: one per layer and KV head. Layers without a cache of their own
    are skipped. The session has read a token.
    """
    scope, info = session.stats()["scope"], session.model.info
    if scope == "token":
        return [("all layers and heads", lambda: [(position, 0.0) for position, _ in session.kept()])], ""
    n_layer = int(info["n_layer"])
    n_head = int(info["n_head_kv"]) if scope == "head" else 1
    layers = [layer for layer in range(n_layer) if _exists(session, layer, 0)]
    heads = spread(n_head, min(n_head, max(8, _PANELS // max(len(layers), 1))))
    shown = [layers[i] for i in spread(len(layers), _PANELS // len(heads))]
    found = [
        (f"layer {layer}" if scope == "layer" else f"layer {layer}, head {head}", _reader(session, layer, head))
        for layer in shown
        for head in heads
        if _exists(session, layer, head)
    ]
    words = []
    if len(shown) < len(layers):
        words.append(f"{len(shown)} of {len(layers)} layers")
    if len(heads) < n_head:
        words.append(f"{len(heads)} of {n_head} heads")
    return found, ", ".join(words)


def read(session: Session, tokens: Sequence[int], title: str, advance: Advance, chunk: int = 1) -> KeepMap:
    """Read `tokens` in `chunk` tokens per step, and note about 200 times what every unit keeps.

    title: of the figure, before what is left out. Raises UsageError for less than two tokens or the policy
    `none`, and what `Session.nll()` raises.
    """
    from equip_cli.evaluation import quality  # numpy comes with it, and a plot wants KeepMap alone

    if len(tokens) < 2 or session.policy == CachePolicy("none"):
        raise UsageError("a keep map needs a policy that evicts, and a text: give both")
    session.reset()
    session.eval(tokens[:1])
    drawn, left_out = units(session)
    budget = int(session.stats()["budget"])
    n_columns = max(_MIN_COLUMNS, min(_COLUMNS, _CELLS // (budget * len(drawn))))
    step = -(-len(tokens) // n_columns)
    step = -(-step // chunk) * chunk
    position = list(range(len(tokens)))  # one object per number, however often it is kept
    n_read: list[int] = []
    columns: list[list[list[int]]] = [[] for _ in drawn]
    for i in range(1, len(tokens), step):
        part = tokens[i : i + step]
        quality.read(session, part, advance, chunk)
        n_read.append(i + len(part))
        for column, (_, kept) in zip(columns, drawn, strict=True):
            column.append([position[p] for p, _ in kept()])
    panels = [(label, column) for (label, _), column in zip(drawn, columns, strict=True)]
    return KeepMap(f"{title}, {left_out}" if left_out else title, n_read, panels)
