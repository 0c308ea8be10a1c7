"""How the next token is drawn: llama.cpp's sampler chain, its names and its defaults."""

from __future__ import annotations

from dataclasses import dataclass

from equip_cli.errors import UsageError


@dataclass(frozen=True)
class Sampling:
    """Options of the sampler chain; None leaves what the model's file recommends, else llama.cpp's default.

    seed: None or -1 = a new one each time; temp 0 = greedy; grammar: GBNF; json_schema: JSON text; not both.
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
        if self.grammar is not None and self.json_schema is not None:
            raise UsageError("a grammar and a JSON schema exclude each other: give one of them")
        if self.seed is not None and not -1 <= self.seed < 2**32:
            raise UsageError(f"the seed is {self.seed}: give 0 to {2**32 - 1}, or -1 for a new one each time")

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
