"""Which policy to take: the one place of the rule that docs/policies.md argues with figures, and `equip info` says in a line."""

from __future__ import annotations

import shlex
from collections.abc import Collection

# answers about what was said earlier in a text of a few budgets; in a longer one it does no better, and reads prose worse
REMEMBERS = "h2o"
# reads nothing but positions, so it fits nearly every model
NEWEST = "streaming"


def recommended(policies: Collection[str]) -> str:
    """The policy for a conversation of a few budgets in which earlier things are asked about, of those that a model supports."""
    return next((name for name in (REMEMBERS, NEWEST) if name in policies), "none")


def recommendation(policies: Collection[str], model: str | None) -> tuple[str, str]:
    """A sentence, and the command to type. model: as the user names it; None = the embedded one."""
    name = recommended(policies)
    sentence = {
        REMEMBERS: "to ask about earlier things in a text of up to about four budgets, keep what received most attention; "
        "in a longer one the default does as well",
        NEWEST: "this model gives no attention weights to choose by, so the newest text is kept, as by default",
        "none": "this model's cache cannot be bounded, so a text ends where the cache does",
    }[name]
    return f"Recommended: {sentence}.", " ".join(
        ["equip chat", *([shlex.quote(model)] if model else []), "--policy", name]
    )
