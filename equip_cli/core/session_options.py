"""A session's options from Python to the library: checked for their ranges, and written as its text."""

from __future__ import annotations

import os
from typing import Any

from equip_cli.core import limits, native
from equip_cli.core.errors import UsageError
from equip_cli.core.policy import CONTEXT_SHIFT, CachePolicy, check_cache_types

_LIMITS = {
    "n_ctx": limits.CTX_SIZE,
    "n_batch": limits.BATCH,
    "n_ubatch": limits.UBATCH,
    "n_threads": limits.THREADS,
    "n_threads_batch": limits.THREADS,
    "n_outputs": limits.N_OUTPUTS,
}


def native_arguments(
    policy: CachePolicy | None,
    *,
    flash_attn: str | bool = "auto",
    type_k: str = "f16",
    type_v: str = "f16",
    rope_upstream: bool = False,
    **options: Any,
) -> tuple[Any, bytes]:
    """The policy and the options of `equip_session_create()` and `equip_session_plan()`, from `Session`'s arguments.

    A policy of None is LLAMA_KV_POLICY's, `CachePolicy()` if that says nothing. Raises UsageError.
    """
    check_cache_types((type_k, type_v))
    for key, limit in _LIMITS.items():
        limit.check(options.get(key), key)
    if isinstance(flash_attn, bool):
        flash_attn = "on" if flash_attn else "off"
    if flash_attn not in ("auto", "on", "off"):
        raise UsageError(f"flash_attn is {flash_attn!r}: give auto, on or off, True or False")
    for key in ("n_threads", "n_threads_batch"):
        n = options.get(key)
        options[key] = n if n is not None and n > 0 else None  # the library's default
    options |= {"flash_attn": flash_attn, "type_k": type_k, "type_v": type_v, "rope_upstream": rope_upstream or None}
    if policy is None and not os.environ.get("LLAMA_KV_POLICY"):
        policy = CachePolicy()
    if policy is not None and policy.update == CONTEXT_SHIFT:
        options |= {"context_shift": True, "n_keep": policy.sinks}
    text = native.load().ffi.NULL if policy is None else native.c_string(policy.text, "the policy")
    return text, native.option_text(options)
