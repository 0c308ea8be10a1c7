"""How far two arrays of logits are apart."""

from __future__ import annotations

import numpy as np
from models import Array


def relative(a: Array, b: Array) -> float:
    """Largest difference in units of b's range."""
    return float(np.abs(a - b).max() / (b.max() - b.min()))


def rms(x: Array) -> float:
    return float(np.sqrt(np.mean(np.square(x))))
