"""How the next token is drawn: llama.cpp's sampler chain, its names and its defaults."""

from __future__ import annotations

from dataclasses import dataclass

from equip_cli.core import limits
from equip_cli.core.errors import UsageError

_LIMITS = {
    "seed": limits.SEED,
    "temp": limits.TEMP,
    "top_k": limits.TOP_K,
    "top_p": limits.SHARE,
    "min_p": limits.SHARE,
    "repeat_penalty": limits.REPEAT_PENALTY,
    "repeat_last_n": limits.REPEAT_LAST_N,
}


@dataclass(frozen=True)
class Sampling:
    """Options of the sampler chain; None leaves what the model's file recommends, else llama.cpp's default.

    seed: 0 to 4294967294, None or -1 = a new one each time; temp: 0 to 1000, 0 = greedy; top_k: 0 = all; top_p, min_p: 0 to 1;
    repeat_penalty: 0.01 to 100, 1 = none; repeat_last_n: 0 to 4096, 0 = none; grammar: GBNF; json_schema: JSON text; not both.
    Raises UsageError.
    """

    seed: int | None = None
    temp: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    repeat_penalty: float | None = None
    repeat_last_n: int | None = None
    ignore_eos: bool = False
    grammar: str | None = None
    json_schema: str | None = None

    def __post_init__(self) -> None:
        if self.grammar is not None and not self.grammar.strip():
            raise UsageError("the grammar is empty: give its rules, or leave it out")
        if self.grammar is not None and self.json_schema is not None:
            raise UsageError("a grammar and a JSON schema exclude each other: give one of them")
        for key, limit in _LIMITS.items():
            limit.check(getattr(self, key), key)

    def native_options(self) -> dict[str, object]:
        """Keys of `equip_session_set_sampler()`."""
        return {
            "seed": None if self.seed == -1 else self.seed,
            "temp": self.temp,
            "top_k": self.top_k,
            "top_p": self.top_p,
            "min_p": self.min_p,
            "repeat_penalty": self.repeat_penalty,
            "repeat_last_n": self.repeat_last_n,
            "ignore_eos": True if self.ignore_eos else None,
        }
