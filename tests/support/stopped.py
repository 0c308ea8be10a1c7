"""Decodes that native/tests/abort-step.cpp stops between two graph nodes, and then does again."""

from __future__ import annotations

import subprocess
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
from models import Array


def stopped_decodes(
    run_native: Callable[..., subprocess.CompletedProcess[str]],
    model: Path,
    policy: str,
    folder: Path,
    text: Sequence[int],
    chunks: Sequence[int],
    n_vocab: int,
    every: int,
) -> Iterator[tuple[int, list[int] | None, Array]]:
    """Of each chunk of the text: its tokens, what the first unit keeps if it was stopped (else None), and the logits, shape (n_vocab,).

    Each `every`-th decode is stopped, on an f32 cache without flash attention. `folder` is for the program's files.
    """
    np.array(text, dtype=np.int32).tofile(folder / "tokens")
    options = {
        "tokens": folder / "tokens",
        "chunks": ",".join(map(str, chunks)),
        "every": every,
        "type_k": "f32",
        "type_v": "f32",
    }
    given = (f"{key}={value}" for key, value in options.items())
    result = run_native("abort-step", model, policy, folder / "out", *given)
    assert result.returncode == 0, result.stderr[-2000:]
    out, pos = np.fromfile(folder / "out", dtype=np.int32), 0
    for n in chunks:
        kept = None
        pos += 1
        if out[pos - 1]:
            kept = out[pos + 1 : pos + 1 + out[pos]].tolist()
            pos += 1 + len(kept)
        yield n, kept, out[pos : pos + n_vocab].view(np.float32)
        pos += n_vocab
    assert pos == out.size
