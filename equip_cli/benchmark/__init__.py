"""Speed of several caches side by side: all alive at once, measured in turns, compared pair by pair.

Turns (A B A B ...) because a machine's speed drifts: two samples taken one after the other share the drift, so their
ratio does not. `request` and `jobs` say what is asked for, `rows` what is measured, `measure` and `modes` how, `records` what is
printed, `presets` which measurements go together, `summary` what they come to.
"""

from equip_cli.benchmark.measure import run
from equip_cli.benchmark.records import baseline_of, compare, percentiles, record
from equip_cli.benchmark.rows import Row, Settings, filler, padded, plan

__all__ = ["Row", "Settings", "baseline_of", "compare", "filler", "padded", "percentiles", "plan", "record", "run"]
