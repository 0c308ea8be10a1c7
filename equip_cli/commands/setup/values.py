"""What the words of options mean: comma lists, numbers in a range, llama.cpp's own spellings."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from equip_cli.core import limits
from equip_cli.core.errors import UsageError
from equip_cli.core.policy import check_cache_types, number_or_word


def words(text: str) -> list[str]:
    """The parts of a comma list."""
    return [word.strip() for word in text.split(",") if word.strip()]


def some_words(text: str, option: str) -> list[str]:
    """The same; raises UsageError that names the option if there is none."""
    found = words(text)
    if not found:
        raise UsageError(f"{option} is {text!r}: give one value, or several separated by commas")
    return found


def numbers(text: str, option: str, limit: limits.Limit) -> list[int]:
    """A comma list of whole numbers within `limit`. Raises UsageError, or `limit.error`, that names the option."""
    return [limit.parse(word, option) for word in some_words(text, option)]


def parse_score_queries(text: str) -> int | Literal["all"]:
    """What --score-queries says: `all`, or a number. Raises UsageError."""
    if text == "all":
        return "all"
    queries = number_or_word(text)
    if not isinstance(queries, int) or not limits.SCORE_QUERIES.allows(queries):
        raise UsageError(f"--score-queries is {text!r}: give all, or {limits.SCORE_QUERIES}")
    return queries


def numbers_or_none(text: str | None, option: str, limit: limits.Limit) -> Sequence[int | None]:
    """The same, or the one value None where the option was not given."""
    return [None] if text is None else numbers(text, option, limit)


def parse_gpu_layers(text: str) -> int:
    """llama.cpp's `-ngl`: a number, `all` or `auto`; -1 = all. Raises UsageError."""
    if text in ("all", "auto"):
        return -1
    return int(limits.GPU_LAYERS.parse(text, "-ngl"))


def parse_flash_attention(text: str) -> str:
    """llama.cpp's words for `-fa` -> `on`, `off` or `auto`. Raises UsageError."""
    words = {"on": "on", "1": "on", "true": "on", "enabled": "on", "off": "off", "0": "off", "false": "off"}
    words |= {"disabled": "off", "auto": "auto", "-1": "auto"}
    if text.lower() not in words:
        raise UsageError(f"-fa is {text!r}: give on, off or auto")
    return words[text.lower()]


def cache_types(text: str, option: str) -> list[str]:
    """A comma list of types of K or V. Raises UsageError."""
    types = some_words(text, option)
    check_cache_types(types)
    return types
