"""libequip's C API as the tests drive it: a little cffi of their own, so that they do not rest on the package's wrapper."""

from __future__ import annotations

import json
import os
import re
import sys
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import cffi
import numpy as np
from models import Array
from oracle_formulas import gate
from places import REPOSITORY

CONTEXT_FULL, CANCELLED, REWIND = -5, -8, -9  # enum equip_status


class NativeError(Exception):
    def __init__(self, status: int, message: str) -> None:
        super().__init__(f"{message} ({status})")
        self.status = status


def library_folder() -> Path:
    """EQUIP_LIB_PATH (a folder or the file), else equip_cli/lib of the source tree or of an installed package."""
    name = {"win32": "equip.dll", "darwin": "libequip.dylib"}.get(sys.platform, "libequip.so")
    given = os.environ.get("EQUIP_LIB_PATH")
    if given:
        folders = [Path(given) if Path(given).is_dir() else Path(given).parent]
    else:
        folders = [Path(p) / "equip_cli" / "lib" for p in [str(REPOSITORY), *sys.path]]
    for folder in folders:
        if (folder / name).is_file():
            return folder.resolve()
    places = ", ".join(map(str, folders))
    raise FileNotFoundError(f"{name} was not found in {places}: install the package or set EQUIP_LIB_PATH.")


def declarations() -> str:
    """equip.h as cffi takes it."""
    text = (REPOSITORY / "native" / "include" / "equip.h").read_text(encoding="utf-8")
    text = re.sub(r"#ifdef __cplusplus.*?#endif", "", text, flags=re.DOTALL)
    return re.sub(r"^\s*#.*$", "", text, flags=re.MULTILINE).replace("EQUIP_API", "")


class Library:
    def __init__(self) -> None:
        self.folder = library_folder()
        self.ffi: Any = cffi.FFI()
        self.ffi.cdef(declarations())
        self.c: Any = self.ffi.dlopen(str(next(self.folder.glob("*equip.*"))))

    def check(self, status: int) -> int:
        if status < 0:
            raise NativeError(status, self.ffi.string(self.c.equip_error()).decode("utf-8", "replace"))
        return status


class Model:
    def __init__(self, lib: Library, path: Path) -> None:
        self.lib = lib
        out = lib.ffi.new("equip_model **")
        lib.check(lib.c.equip_model_load(out, str(path).encode(), b"", lib.ffi.NULL, lib.ffi.NULL))
        self.handle = out[0]
        self.n_vocab = int(json.loads(lib.ffi.string(lib.c.equip_model_info(self.handle)))["n_vocab"])

    def close(self) -> None:
        self.lib.c.equip_model_free(self.handle)


SESSION_OPTIONS = {
    *("n_ctx", "n_batch", "n_ubatch", "n_outputs", "n_threads", "n_threads_batch", "adapt_threads", "flash_attn"),
    *("type_k", "type_v", "offload_kv", "cpu_attn", "context_shift", "n_keep", "rope_upstream"),
}


class Session:
    """One sequence; e.g. Session(model, policy="streaming", budget=64): what no option of a session is called is the policy's."""

    # layers and heads whose tokens get the score of the tests before they are read
    gates: Sequence[tuple[int, int]] = ()

    def __init__(self, model: Model, **options: object) -> None:
        self.lib, self.n_vocab = model.lib, model.n_vocab
        options = {"n_threads": 1, "n_threads_batch": 1, **options}
        name = str(options.pop("policy", "none"))
        own = ",".join(f"{key}={value}" for key, value in options.items() if key in SESSION_OPTIONS)
        settings = ",".join(f"{key}={value}" for key, value in options.items() if key not in SESSION_OPTIONS)
        policy = f"{name}:{settings}" if settings and name != "none" else name
        out = self.lib.ffi.new("equip_session **")
        self.lib.check(self.lib.c.equip_session_create(out, model.handle, policy.encode(), own.encode()))
        self.handle = out[0]
        self.n_done = 0  # of the last eval

    def __enter__(self) -> Session:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.lib.c.equip_session_free(self.handle)

    def eval(self, tokens: Sequence[int]) -> Array:
        """Append the tokens; returns the logits of the last one, shape (n_vocab,)."""
        if self.gates:
            first = int(self.stats()["n_past"])
            pos = range(first, first + len(tokens))
            for il, h in self.gates:
                assert self.set_scores(il, h, pos, [gate(il, h, p) for p in pos]) == len(pos)
        done = self.lib.ffi.new("int32_t *")
        status = self.lib.c.equip_session_eval(self.handle, [int(t) for t in tokens], len(tokens), done)
        self.n_done = int(done[0])
        self.lib.check(status)
        logits = self.logits()
        assert logits is not None
        return logits

    def logits(self) -> Array | None:
        p = self.lib.c.equip_session_logits(self.handle)
        if p == self.lib.ffi.NULL:
            return None
        logits: Array = np.frombuffer(self.lib.ffi.buffer(p, 4 * self.n_vocab), dtype=np.float32).copy()
        return logits

    def kept(self) -> dict[int, int]:
        """Position -> slot, ordered by position."""
        n = self.lib.c.equip_session_kept(self.handle, self.lib.ffi.NULL, self.lib.ffi.NULL, 0)
        pos, slot = self.lib.ffi.new("int32_t[]", max(1, n)), self.lib.ffi.new("int32_t[]", max(1, n))
        assert self.lib.c.equip_session_kept(self.handle, pos, slot, n) == n
        kept = dict(zip(list(pos)[:n], list(slot)[:n], strict=True))
        assert len(kept) == n, "a position occurs twice"
        return kept

    def head(self, il: int, i_head: int) -> dict[int, float]:
        """Position -> accumulated weight of the tokens that one KV head keeps, ordered by position."""
        return self._by_position(lambda *out: self.lib.c.equip_session_head(self.handle, il, i_head, *out))

    def set_scores(self, il: int, i_head: int, positions: Sequence[int], values: Sequence[float]) -> int:
        pos, score = [int(p) for p in positions], [float(x) for x in values]
        return self.lib.check(self.lib.c.equip_session_set_scores(self.handle, il, i_head, pos, score, len(pos)))

    def shares(self) -> dict[int, float]:
        """Position -> share of the lanes that keep it, ordered by position."""
        return self._by_position(lambda *out: self.lib.c.equip_session_shares(self.handle, *out))

    def _by_position(self, call: Callable[..., int]) -> dict[int, float]:
        ffi = self.lib.ffi
        n = self.lib.check(call(ffi.NULL, ffi.NULL, 0))
        pos, value = np.zeros(n, dtype=np.int32), np.zeros(n, dtype=np.float32)
        assert call(ffi.cast("int32_t *", pos.ctypes.data), ffi.cast("float *", value.ctypes.data), n) == n
        assert np.all(np.diff(pos) > 0), "not ordered by position"
        return dict(zip(pos.tolist(), value.tolist(), strict=True))

    def rewind(self, p0: int) -> int:
        return self.lib.check(self.lib.c.equip_session_rewind(self.handle, p0))

    def reset(self) -> None:
        self.lib.check(self.lib.c.equip_session_reset(self.handle))

    def pin(self, n: int) -> None:
        self.lib.check(self.lib.c.equip_session_pin(self.handle, n))

    def cancel(self) -> None:
        self.lib.c.equip_session_cancel(self.handle)

    def save(self) -> bytes:
        size = self.lib.ffi.new("size_t *")
        self.lib.check(self.lib.c.equip_session_save(self.handle, self.lib.ffi.NULL, 0, size))
        data = self.lib.ffi.new("uint8_t[]", int(size[0]))
        self.lib.check(self.lib.c.equip_session_save(self.handle, data, size[0], size))
        return bytes(self.lib.ffi.buffer(data, size[0]))

    def load(self, data: bytes) -> None:
        self.lib.check(self.lib.c.equip_session_load(self.handle, data, len(data)))

    def stats(self) -> dict[str, Any]:
        return dict(json.loads(self.lib.ffi.string(self.lib.c.equip_session_stats(self.handle))))


def eval_until_cancelled(session: Session, tokens: Sequence[int], delay: float) -> bool:
    """Evaluate while another thread cancels after `delay` seconds; True if it was cancelled."""
    timer = threading.Timer(delay, session.cancel)
    timer.start()
    try:
        session.eval(tokens)
        return False
    except NativeError as error:
        assert error.status == CANCELLED
        return True
    finally:
        timer.join()
