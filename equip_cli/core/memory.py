"""Memory of this process, in bytes, without a dependency."""

from __future__ import annotations

import os
import sys
from pathlib import Path


def _windows_resident() -> int:
    if sys.platform != "win32":
        return 0
    import ctypes
    from ctypes import wintypes

    class Counters(ctypes.Structure):
        _fields_ = [
            ("length", wintypes.DWORD),
            ("faults", wintypes.DWORD),
            *[(name, ctypes.c_size_t) for name in ("peak", "resident", "a", "b", "c", "d", "e", "f")],
        ]

    kernel = ctypes.windll.kernel32
    counters = Counters()
    counters.length = ctypes.sizeof(Counters)
    kernel.GetCurrentProcess.restype = wintypes.HANDLE
    kernel.K32GetProcessMemoryInfo.argtypes = [wintypes.HANDLE, ctypes.c_void_p, wintypes.DWORD]
    known = kernel.K32GetProcessMemoryInfo(kernel.GetCurrentProcess(), ctypes.byref(counters), counters.length)
    return int(counters.resident) if known else 0


def rss_bytes() -> int:
    """Resident bytes of this process now (macOS: its peak); 0 where the platform does not say."""
    if sys.platform.startswith("linux"):
        pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
        return pages * os.sysconf("SC_PAGE_SIZE")
    if sys.platform == "win32":
        return _windows_resident()
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def megabytes(n_bytes: float) -> str:
    """`134217728` -> `128 MB` (MB as llama.cpp counts them: 2^20 bytes)."""
    value = n_bytes / 2**20
    return f"{value:.0f} MB" if value >= 10 else f"{value:.1f} MB"
