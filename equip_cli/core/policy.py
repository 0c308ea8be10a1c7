"""What the cache keeps: a policy as Python's fields and as text. What it means, and whether it can be, the library says."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, Literal

from equip_cli.core import limits
from equip_cli.core.errors import UsageError

# bytes per cached element, as ggml stores them (block bytes / block length)
CACHE_TYPES: dict[str, float] = {
    "f32": 4.0,
    "f16": 2.0,
    "bf16": 2.0,
    "q8_0": 34 / 32,
    "q5_1": 24 / 32,
    "q5_0": 22 / 32,
    "q4_1": 20 / 32,
    "q4_0": 18 / 32,
    "iq4_nl": 18 / 32,
}

# fields that hold whole numbers
_LIMITS = {
    "budget": limits.BUDGET,
    "sinks": limits.KEPT,
    "recent": limits.KEPT,
    "rotate_every": limits.ROTATE_EVERY,
    "evict_every": limits.EVICT_EVERY,
    "page_size": limits.PAGE_SIZE,
    "filter_layers": limits.FILTER_LAYERS,
    "filter_warmup": limits.FILTER_WARMUP,
}

# fields that the library reports among the numbers of the formula
_AMONG_PARAMETERS = {"page_size": int, "filter": float, "filter_layers": int, "filter_warmup": int}

# and those that hold one or a word
_LIMITS_OR_WORDS = {"score_queries": ("all", limits.SCORE_QUERIES), "pool": ("auto", limits.POOL)}

# settings of the choice that only some policies have, and why the others have none
CHOICE = {
    "score_queries": "reads no attention weights",
    "evict_every": "chooses a fixed number of victims at once",
    "page_size": "evicts tokens, not pages",
    "parameters": "has no such numbers in its formula",
}

# what llama.cpp's programs do without a policy: half of a full cache goes at once
CONTEXT_SHIFT = "context-shift"

# ways for a victim to go that exist to be compared with
BASELINE_UPDATES = ("shift", "gather", CONTEXT_SHIFT)


@dataclass(frozen=True)
class CachePolicy:
    """How a bounded cache chooses its victims.

    name: `none`, `streaming`, ...; `equip info MODEL` lists what a model supports.
    budget: most tokens kept after a step; 0 = the trained context; None = at most 4096 of it, less where that would take
        more than half of the free memory (`Model.plan()` tells).
    sinks: first tokens of the sequence, never evicted.
    recent: newest tokens, never evicted; None = the policy's default; not for `streaming`, where it is implied.
    scope: None = the policy's default.
    positions: `true`, `cache`, or `auto`: true until a kept token would be further away than the trained context, cache
        from there on; None = the policy's default.
    update: `inplace`, or one of the baselines `shift` and `gather`; None = `inplace`. With the name `none`:
        `context-shift`, llama.cpp's own remedy: when the cache is full, half of what follows the sinks goes.
    rotate_every: evictions after which keys are rotated to their new ranks, in one batch; 1 = exact at each step;
        None = the library's default.
    score_queries: newest queries of a chunk whose attention weights count, or `"all"`; evict_every: victims that are
        chosen at once; page_size: tokens of a page, which goes whole. Each for the policies that take it
        (`has_setting()`); None = the library's default.
    filter: share of the single tokens, at a full cache, that later layers leave out (Token Filtering, docs/policies.md);
        filter_layers: how many layers do, the last ones; None = half; filter_warmup: single tokens that a layer judges before
        it leaves one out; None = the library's default.
    pool: most tokens of all sequences together, which share one cache (`Model.pool()`, `equip serve`); `"auto"`: a budget
        for each, less where that would take more than half of the free memory; None = each has a cache of its own.
    parameters: numbers of the policy's formula by name, `{"decay": 0.9}` for a2sf; `equip info` lists them with their
        defaults. It is kept as (name, value) pairs, ordered by name, but for those that have a field of their own.

    Raises BudgetError for a budget out of range, in no whole pages, or too small for what must be kept; UsageError for the
    rest; BackendError without the native library, which says so.
    """

    name: str = "streaming"
    budget: int | None = None
    sinks: int | None = None
    recent: int | None = None
    scope: str | None = None
    positions: str | None = None
    update: str | None = None
    rotate_every: int | None = None
    score_queries: int | Literal["all"] | None = None
    evict_every: int | None = None
    page_size: int | None = None
    filter: float | None = None
    filter_layers: int | None = None
    filter_warmup: int | None = None
    pool: int | Literal["auto"] | None = None
    parameters: Mapping[str, float] | tuple[tuple[str, float], ...] = ()

    def __post_init__(self) -> None:
        parameters = dict(self.parameters)
        for key, kind in _AMONG_PARAMETERS.items():
            value = parameters.get(key)
            if value is not None and (kind is float or float(value).is_integer()):  # else it is refused as a parameter
                object.__setattr__(self, key, kind(parameters.pop(key)))
        limits.FILTER.check(self.filter if self.filter is None else float(self.filter), "filter")
        object.__setattr__(self, "parameters", tuple(sorted(parameters.items())))
        for key, limit in _LIMITS.items():
            limit.check(getattr(self, key), key)
        for key, (word, limit) in _LIMITS_OR_WORDS.items():
            value = getattr(self, key)
            if value not in (None, word) and not limit.allows(value):
                raise limit.error(f"{key} is {value}: give {word}, or {limit}")
        if self.name == "none":
            if self.update not in (None, "inplace", CONTEXT_SHIFT):
                raise UsageError(f"the policy none evicts nothing, so its update is {CONTEXT_SHIFT} or none at all")
            return
        from equip_cli.core import native

        native.load().check_policy(self.text)

    @property
    def text(self) -> str:
        """As LLAMA_KV_POLICY has it: `h2o:budget=1024,sinks=4`; what is None is left out."""
        if self.name == "none":
            return "none"  # the update context-shift is the caller's own, not a policy's
        given: dict[str, object] = {
            field.name: getattr(self, field.name) for field in fields(self) if field.name not in ("name", "parameters")
        }
        given |= {name: f"{number:.9g}" for name, number in dict(self.parameters).items()}
        given["filter"] = None if self.filter is None else f"{self.filter:.9g}"
        items = ",".join(f"{key}={value}" for key, value in given.items() if value is not None)
        return f"{self.name}:{items}" if items else self.name

    @staticmethod
    def goes_together(update: str | None, positions: str | None, scope: str | None = None) -> bool:
        """Whether this update can follow this rule of positions, at this scope."""
        return update != "shift" or (positions in (None, "cache") and scope in (None, "token"))

    @property
    def rotates_by_debt(self) -> bool:
        """Whether `rotate_every` means anything: true positions rotate nothing, and shift rotates at every eviction."""
        return self.name != "none" and self.positions != "true" and self.update != "shift"

    @classmethod
    def parse(cls, text: str) -> CachePolicy:
        """The spelling of LLAMA_KV_POLICY: `streaming:budget=1024,sinks=4`, `a2sf:decay=0.9`. Raises UsageError.

        Where policies stand in a comma list, their settings are parted by semicolons.
        """
        from equip_cli.core import native

        text = text.replace(";", ",").rstrip(":")
        native.load().check_policy(text)
        name, _, rest = text.partition(":")
        known = {field.name for field in fields(cls)} - {"name", "parameters"}
        values: dict[str, Any] = {}
        parameters: dict[str, float] = {}
        for key, _, value in (part.partition("=") for part in rest.split(",") if part):
            if key in ("cpu_attn", "adapt_threads"):
                raise UsageError(f"{key} changes nothing about what is kept: give it to the session")
            if key in _LIMITS:
                values[key] = int(value)
            elif key in _LIMITS_OR_WORDS:
                values[key] = number_or_word(value)
            elif key == "filter":
                values[key] = float(value)
            elif key in known:
                values[key] = value
            else:
                parameters[key] = float(value)
        return cls(name=name, parameters=parameters, **values)

    @classmethod
    def from_stats(cls, stats: Mapping[str, Any]) -> CachePolicy:
        """The policy that `Session.stats()` reports, every default filled in."""
        name = str(stats["policy"])
        if name == "none":
            return cls("none", update=CONTEXT_SHIFT) if stats["update"] == CONTEXT_SHIFT else cls("none")
        given = {key: stats[key] for key in ("budget", "sinks", "scope", "positions", "update")}
        recent = stats["recent"] if ",recent=" in stats["text"] else None
        chosen = choice(stats) | {"parameters": stats.get("parameters", {})}
        return cls(name, recent=recent, rotate_every=stats["rotate_every"] or None, **given, **chosen)


def number_or_word(text: str) -> int | str:
    """A whole number if it is one, else the word as it stands: how `score_queries` and `pool` are written."""
    try:
        return int(text)
    except ValueError:
        return text


def has_setting(policy: Mapping[str, Any], key: str) -> bool:
    """Whether a policy of `Native.policies()` takes `score_queries`, `evict_every`, `page_size` or `filter`.

    True where the library does not say. `streaming` chooses by position alone, and a page goes whole, so neither takes a
    number of victims.
    """
    if key == "evict_every":
        return policy.get("evict_every", 1) > 0 and not policy.get("pages", False)
    if key == "filter":  # in some layers, not in all of them
        return any(scope != "token" for scope in policy.get("scopes", ("head",)))
    return bool(policy.get("scores" if key == "score_queries" else "pages", True))


def parameter_limit(row: Mapping[str, Any]) -> limits.Limit:
    """The range of a row of `parameters` of `Native.policies()`."""
    kind = float if row["type"] == "real" else int
    return limits.Limit(kind(row["min"]), kind(row["max"]))


def range_of(row: Mapping[str, Any]) -> str:
    """The same in words: `1 to 63, odd`."""
    kind = {"odd": ", odd", "count": "", "real": ""}[str(row["type"])]
    return f"{row['min']:g} to {row['max']:g}{kind}"


def choice(stats: Mapping[str, Any]) -> dict[str, Any]:
    """`score_queries`, `evict_every` and `page_size` of `Session.stats()`, those that the session's policy has, and
    `parameters` as text (`decay=0.9`), those that are not the default.
    """
    found = {key: stats[key] for key in CHOICE if stats.get(key) not in (None, 0, "none", {})}
    if "parameters" in found:
        given = {key: value for key, value in found.pop("parameters").items() if key not in found}
        if given:
            found["parameters"] = ",".join(f"{key}={value:g}" for key, value in given.items())
    if "page_size" in found:
        found.pop("evict_every", None)
    return found


def choice_words(choice: Mapping[str, Any]) -> list[str]:
    """The same in words, for labels; values of None are left out."""
    own = ("score_queries", "evict_every", "page_size", "filter", "filter_layers", "filter_warmup")
    given = choice.get("parameters") or ()
    pairs = [pair.split("=") for pair in given.split(",")] if isinstance(given, str) else given
    found = [f"{key.replace('_', ' ')} {choice[key]}" for key in own if choice.get(key) is not None]
    return found + [f"{key} {float(value):g}" for key, value in pairs]


def differ_in_scope(records: Sequence[dict[str, Any]]) -> bool:
    """Whether a row has another scope than `token`."""
    return any(record["scope"] != "token" for record in records if record["policy"] != "none")


def differ_in_rotation(records: Sequence[dict[str, Any]]) -> bool:
    """Whether rows with the same update and positions differ in `rotate_every`."""
    rows = {(record["update"], record["positions"], record["rotate_every"]) for record in records}
    return len({row[:2] for row in rows}) < len(rows)


def type_words(record: Mapping[str, Any]) -> str:
    """The types of K and V of a record: `f16`, or `K q8_0, V q4_0` where they differ."""
    k, v = record["type_k"], record["type_v"]
    return str(k) if k == v else f"K {k}, V {v}"


def check_cache_types(types: Iterable[str]) -> None:
    """Raises UsageError for what is no type of K or V."""
    for name in types:
        if name not in CACHE_TYPES:
            raise UsageError(f"there is no cache type {name!r}: choose one of {', '.join(CACHE_TYPES)}")


def cache_bytes_per_token(f16_bytes: int, type_k: str = "f16", type_v: str = "f16") -> float:
    """Bytes of one slot when K and V have these types; `f16_bytes` is the model's `kv_bytes_per_token`."""
    scale = (CACHE_TYPES.get(type_k, 2.0) + CACHE_TYPES.get(type_v, 2.0)) / 4.0
    return f16_bytes * scale
