"""Measurements that go together, by name; every option that is given wins over the preset's."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Preset:
    """Values of the options of `equip bench`, spelled as there."""

    policy: str
    budget: str
    n_gen: str
    repetitions: int
    update: str | None = None
    positions: str | None = None
    n_prompt: str | None = None
    shift_rope: str = "upstream"
    upto: int | None = None
    ttft: str | None = None
    latency: int | None = None


# every way for a token to go that `--compare` has
UPDATES = "context-shift,shift,gather,inplace"

PRESETS = {
    "quick": Preset("none,streaming,h2o", "256,1024", "32", 7, UPDATES, upto=8192, ttft="1,4", latency=256),
    "full": Preset(
        "none,streaming,h2o",
        "512,1024,4096",
        "64",
        11,
        UPDATES,
        n_prompt="512",
        shift_rope="upstream,cached",
        upto=32768,
        ttft="1,4,16",
        latency=1024,
    ),
    # StreamingLLM keeps ranks as positions, and so does H2O's own streaming variant
    "paper": Preset(
        "none,streaming,h2o",
        "512,1024,2048",
        "64",
        9,
        "shift,gather,inplace",
        "cache",
        shift_rope="upstream,cached",
        upto=32768,
    ),
}
