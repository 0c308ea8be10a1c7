"""Memory of this machine and of this process, in bytes, without a dependency."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path


def _read_int(path: str) -> int | None:
    try:
        return int(Path(path).read_text(encoding="ascii"))
    except (OSError, ValueError):
        return None  # absent, or "max"


def _linux_free() -> int | None:
    try:
        meminfo = Path("/proc/meminfo").read_text(encoding="ascii")
    except OSError:
        return None
    match = re.search(r"^MemAvailable:\s+(\d+) kB", meminfo, re.MULTILINE)
    free = int(match[1]) * 1024 if match else None
    # a container may be allowed less than the machine has
    for limit_path, used_path in (
        ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory.current"),
        ("/sys/fs/cgroup/memory/memory.limit_in_bytes", "/sys/fs/cgroup/memory/memory.usage_in_bytes"),
    ):
        limit, used = _read_int(limit_path), _read_int(used_path)
        if limit is None or used is None:
            continue
        # page cache counts as used but is given back on demand
        stat_path = Path(used_path).with_name("memory.stat")
        try:
            cached = re.search(r"^(?:total_)?inactive_file (\d+)", stat_path.read_text(encoding="ascii"), re.MULTILINE)
        except OSError:
            cached = None
        room = max(limit - used + (int(cached[1]) if cached else 0), 0)
        free = room if free is None else min(free, room)
    return free


def _darwin_free() -> int | None:
    try:
        text = subprocess.run(["vm_stat"], capture_output=True, text=True, check=True, timeout=5).stdout
    except (OSError, subprocess.SubprocessError):
        return None
    page = re.search(r"page size of (\d+) bytes", text)
    counts = re.findall(r"^Pages (?:free|inactive|speculative|purgeable):\s+(\d+)", text, re.MULTILINE)
    return int(page[1]) * sum(map(int, counts)) if page and counts else None


def _windows_memory() -> tuple[int | None, int | None]:
    """(free on the machine, resident in this process)."""
    if sys.platform != "win32":
        return None, None
    import ctypes
    from ctypes import wintypes

    class Status(ctypes.Structure):
        _fields_ = [
            ("length", wintypes.DWORD),
            ("load", wintypes.DWORD),
            *[(name, ctypes.c_ulonglong) for name in ("total", "free", "tp", "fp", "tv", "fv", "fe")],
        ]

    class Counters(ctypes.Structure):
        _fields_ = [
            ("length", wintypes.DWORD),
            ("faults", wintypes.DWORD),
            *[(name, ctypes.c_size_t) for name in ("peak", "resident", "a", "b", "c", "d", "e", "f")],
        ]

    kernel = ctypes.windll.kernel32
    status, counters = Status(), Counters()
    status.length, counters.length = ctypes.sizeof(Status), ctypes.sizeof(Counters)
    kernel.GetCurrentProcess.restype = wintypes.HANDLE
    kernel.K32GetProcessMemoryInfo.argtypes = [wintypes.HANDLE, ctypes.c_void_p, wintypes.DWORD]
    free = status.free if kernel.GlobalMemoryStatusEx(ctypes.byref(status)) else None
    known = kernel.K32GetProcessMemoryInfo(kernel.GetCurrentProcess(), ctypes.byref(counters), counters.length)
    return free, counters.resident if known else None


def free_bytes() -> int | None:
    """Bytes that this process may still use without swapping; None where the platform does not say."""
    if sys.platform.startswith("linux"):
        return _linux_free()
    if sys.platform == "darwin":
        return _darwin_free()
    return _windows_memory()[0]


def rss_bytes() -> int:
    """Resident bytes of this process now (macOS: its peak); 0 where the platform does not say."""
    if sys.platform.startswith("linux"):
        pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
        return pages * os.sysconf("SC_PAGE_SIZE")
    if sys.platform == "win32":
        return _windows_memory()[1] or 0
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def megabytes(n_bytes: float) -> str:
    """`134217728` -> `128 MB` (MB as llama.cpp counts them: 2^20 bytes)."""
    value = n_bytes / 2**20
    return f"{value:.0f} MB" if value >= 10 else f"{value:.1f} MB"
