"""What the tests on real models share: which models, how many threads, and the text that they read."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable

from equip_cli import Model
from equip_cli.models import embedded

Load = Callable[[str], Model]

MODELS = ("smollm2", "gemma3")
N_THREADS = min(2, os.cpu_count() or 1)


@functools.cache
def prose(model: Model) -> list[int]:
    return model.tokenize(embedded.prose())
