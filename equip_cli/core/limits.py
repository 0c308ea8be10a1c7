"""The range of every number that a user gives: one place for the command line, its help, and the Python API."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from numbers import Integral, Real
from typing import Any

from equip_cli.core.errors import BudgetError, EquipError, UsageError

INT32_MAX = 2**31 - 1
MAX_TOKENS = 1 << 30  # libequip does slot arithmetic in 32 bits


@dataclass(frozen=True)
class Limit:
    """A range of numbers, whole ones if `low` is an int. meaning: what a special value of them stands for."""

    low: int | float
    high: int | float
    meaning: str = ""
    error: type[EquipError] = UsageError

    def __str__(self) -> str:
        kind = "a whole number" if isinstance(self.low, int) else "a number"
        return f"{kind} from {self.low:g} to {self._high}" + (f" ({self.meaning})" if self.meaning else "")

    @property
    def _high(self) -> str:
        return str(self.high) if isinstance(self.high, int) else f"{self.high:g}"

    @property
    def short(self) -> str:
        """For help texts: without an upper end that is there for safety alone, as all are that large but a seed's."""
        return f"{self.low:g} or more" if 1 << 20 <= self.high <= INT32_MAX else f"{self.low:g} to {self._high}"

    def allows(self, value: object) -> bool:
        """Whether the value is a number of this range; NaN is in none."""
        if isinstance(value, bool) or not isinstance(value, Integral if isinstance(self.low, int) else Real):
            return False
        return bool(self.low <= value <= self.high)  # type: ignore[operator]

    def check(self, value: object, name: str) -> None:
        """Raises UsageError, or what `error` says, for a value out of range; None is what was not given."""
        if value is not None and not self.allows(value):
            raise self.error(f"{name} is {value}: give {self}")

    def parse(self, text: str, name: str) -> Any:
        """The number that `text` is. Raises UsageError, or what `error` says, that names the option `name`."""
        is_number = re.fullmatch(r"[+-]?[0-9]+", text.strip()) if isinstance(self.low, int) else True
        try:
            value = (int if isinstance(self.low, int) else float)(text) if is_number else None
        except ValueError:
            value = None
        if value is None:
            raise self.error(f"{name} is {text!r}: give {self}")
        if not self.allows(value):
            raise self.error(f"{name} is {text.strip()}: give {self}")
        return value

    def parser(self, name: str) -> Callable[[Any], Any]:
        """What Typer makes the value of the option `name` with; its own words for what is no number differ by release."""
        return lambda value: self.parse(value, name) if isinstance(value, str) else value


# generate and chat
PREDICT = Limit(-1, INT32_MAX, "-1 = no limit")
# the last number of 32 bits asks llama.cpp for a random seed
SEED = Limit(-1, 2**32 - 2, "-1 = a new one each time")
TEMP = Limit(0.0, 1000.0, "0 = greedy")
TOP_K = Limit(0, INT32_MAX, "0 = all")
SHARE = Limit(0.0, 1.0)
REPEAT_PENALTY = Limit(0.01, 100.0, "1 = none")
REPEAT_LAST_N = Limit(0, 4096, "0 = none")

SAVED_CACHES = Limit(0, 10000, "0 = none")
CACHE_MB = Limit(0, 1 << 30, "0 = none")

# the cache
BUDGET = Limit(0, MAX_TOKENS, "0 = the trained context", BudgetError)
KEPT = Limit(0, MAX_TOKENS)  # sinks, recent
ROTATE_EVERY = Limit(1, MAX_TOKENS, "1 = exact at each step")
SCORE_QUERIES = Limit(1, MAX_TOKENS)
EVICT_EVERY = Limit(1, MAX_TOKENS)
PAGE_SIZE = Limit(1, 1 << 16)
FILTER = Limit(0.0, 0.9, "0 = none")
FILTER_LAYERS = Limit(1, MAX_TOKENS)
FILTER_WARMUP = Limit(0, MAX_TOKENS)
CTX_SIZE = Limit(0, MAX_TOKENS, "0 = the trained context")

# the device
THREADS = Limit(-1, 512, "0 and -1 = physical cores")
BATCH = Limit(1, 1 << 20)
UBATCH = Limit(1, 1 << 16)
GPU_LAYERS = Limit(-1, INT32_MAX, "-1, all = all of them")

# serve
LANES = Limit(1, 256)  # llama.cpp's most sequences
PORT = Limit(0, 65535, "0 = a free one")
WORKER_PORT = Limit(1, 65535)
POOL = Limit(1, MAX_TOKENS, error=BudgetError)

# bench
ROW_BUDGET = Limit(1, MAX_TOKENS, error=BudgetError)
REPETITIONS = Limit(1, 10_000)
TEST_TOKENS = Limit(0, 1 << 24, "0 = not measured")
DEPTH = Limit(1, 1 << 24)
UPTO = Limit(256, 1 << 24)
TTFT = Limit(1, 4096)
LATENCY = Limit(8, 1 << 20)

# eval
EVAL_SEED = Limit(0, 2**32 - 1)
N_TOKENS = Limit(0, INT32_MAX, "0 = no perplexity")
N_OUTPUTS = Limit(1, 1 << 16)
DIALOGUES = Limit(0, INT32_MAX, "0 = no recall")
PASSKEY_LENGTH = Limit(1, 1 << 20)
PASSKEY_TRIALS = Limit(1, 10_000)
FACTS_LENGTH = Limit(1, 1 << 20)
FACTS_TRIALS = Limit(1, 10_000)
CHAT_TURNS = Limit(0, 10_000)
CHAT_TRIALS = Limit(1, 10_000)

# check
CHECK_BUDGET = Limit(16, MAX_TOKENS, error=BudgetError)
EVICTIONS = Limit(1, 1 << 20)

# positions and counts of tokens in the Python API
COUNT = Limit(0, INT32_MAX)
