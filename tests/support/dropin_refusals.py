"""What a program does with a refusal of the cache, and with contexts that no policy is for; runs in the binding's interpreter.

    python dropin_refusals.py NAME MODEL [JSON]

as dropin_scenarios.py.
"""

from __future__ import annotations

import ctypes
import os
from contextlib import closing
from typing import Any

import llama_cpp
from dropin_scenarios import C, Llama, decode, feed, logits, main, raw, stats
from llama_cpp.llama_speculative import LlamaPromptLookupDecoding

N_CTX = 8192


def switched_chats(model: str, prompts: list[str], order: str) -> dict[str, Any]:
    """Completions with the binding's own cache, which saves after each call and restores before the next.

    `order` names the prompts ("0100"). What a call may answer: the prompt read by an object that knows nothing else, or one
    that has answered it before.
    """
    may: dict[int, list[str]] = {}
    for i, prompt in enumerate(prompts):
        with closing(Llama(model, n_ctx=N_CTX)) as alone:
            may[i] = [alone.text(prompt), alone.text(prompt)]
    calls: list[dict[str, Any]] = []
    with closing(Llama(model, n_ctx=N_CTX)) as llm:
        llm.set_cache(llama_cpp.LlamaRAMCache())
        for at in map(int, order):
            call: dict[str, Any] = {"may": may[at], "text": None, "evicted": stats(llm.ctx)["n_evicted"]}
            try:
                call["text"] = llm.text(prompts[at])
            except RuntimeError as error:  # a refusal is honest
                call["error"] = str(error)
            calls.append(call)
    return {"calls": calls}


def looked_up(model: str, prompt: str, n: int) -> dict[str, Any]:
    """n tokens with drafts that are looked up in the text, and without."""
    report: dict[str, Any] = {}
    for name, draft in (("drafted", LlamaPromptLookupDecoding()), ("plain", None)):
        with closing(Llama(model, n_ctx=1024, draft_model=draft)) as llm:
            report[name] = llm.text(prompt, n)
            report[f"{name}_evals"] = llm.evals
            report[f"{name}_evicted"] = stats(llm.ctx)["n_evicted"]
    return report


def embeddings(model: str, texts: list[str]) -> dict[str, Any]:
    """The same texts as vectors, with the variable set and without."""
    policy = os.environ.pop("LLAMA_KV_POLICY")
    report: dict[str, Any] = {}
    for name, value in (("plain", ""), ("policy", policy)):
        os.environ["LLAMA_KV_POLICY"] = value
        for pooling in (llama_cpp.LLAMA_POOLING_TYPE_UNSPECIFIED, llama_cpp.LLAMA_POOLING_TYPE_MEAN):
            options = {"n_ctx": N_CTX, "n_batch": 1024, "n_ubatch": 1024, "embedding": True, "pooling_type": pooling}
            with closing(Llama(model, **options)) as llm:
                got: Any = llm.embed(texts)
                if pooling != llama_cpp.LLAMA_POOLING_TYPE_MEAN:
                    got = [vectors[-1] for vectors in got]
                report[f"{name}-{pooling}"] = [vector[:16] for vector in got]
                report[f"{name}-bounded"] = bool(stats(llm.ctx))
    return report


def save(ctx: Any, flags: int) -> Any:
    size = C.llama_state_seq_get_size_ext(ctx, 0, flags)
    data = (ctypes.c_uint8 * size)()
    if C.llama_state_seq_get_data_ext(ctx, data, size, 0, flags) != size:
        raise RuntimeError("the state was not saved as a whole")
    return data


def refused_restore(model: str) -> dict[str, Any]:
    """Another text is in the cache when the state of another policy is refused: what the sequence then answers, until it is cleared."""
    report: dict[str, Any] = {}
    policy = os.environ["LLAMA_KV_POLICY"]
    os.environ["LLAMA_KV_POLICY"] = "streaming:budget=96"
    with raw(model) as ctx:
        feed(ctx, 0, 50)
        state = save(ctx, 0)
    os.environ["LLAMA_KV_POLICY"] = policy
    with raw(model) as ctx:
        mem = C.llama_get_memory(ctx)

        def look() -> list[int]:
            return [C.llama_memory_seq_pos_min(mem, 0), C.llama_memory_seq_pos_max(mem, 0)]

        feed(ctx, 0, 100)
        report["restored"] = C.llama_state_seq_set_data_ext(ctx, state, len(state), 0, 0) == len(state)
        report["after"] = look()
        report["tail"] = [
            bool(C.llama_memory_seq_rm(mem, seq, p0, -1)) for seq, p0 in ((0, 30), (-1, 50), (-1, 100), (-1, 101))
        ]
        report["decoded"] = [decode(ctx, pos, [100]) == 0 for pos in (1, 50, 100)]
        report["cleared"] = bool(C.llama_memory_seq_rm(mem, -1, 0, -1))
        feed(ctx, 0, 120)
        report["logits"] = logits(ctx)
        report["decoded_again"] = decode(ctx, 120, [100]) == 0
    with raw(model) as ctx:
        feed(ctx, 0, 120)
        report["logits_fresh"] = logits(ctx)
    return report


def checkpoint(model: str, n_after: int, cut: bool) -> dict[str, Any]:
    """A checkpoint at position 99, taken back after n_after more tokens, as llama-server does."""
    report: dict[str, Any] = {}
    with raw(model) as ctx:
        mem = C.llama_get_memory(ctx)
        feed(ctx, 0, 100)
        state = save(ctx, C.LLAMA_STATE_SEQ_FLAGS_PARTIAL_ONLY)
        feed(ctx, 100, 100 + n_after)
        n = C.llama_state_seq_set_data_ext(ctx, state, len(state), 0, C.LLAMA_STATE_SEQ_FLAGS_PARTIAL_ONLY)
        report["accepted"] = n == len(state)  # the server aborts if it is not
        if cut:
            report["cut"] = bool(C.llama_memory_seq_rm(mem, 0, 100, -1))  # and here
        report["decoded"] = decode(ctx, 100, [100]) == 0
        report["logits"] = logits(ctx) if report["decoded"] else None
        report["cleared"] = bool(C.llama_memory_seq_rm(mem, 0, -1, -1))
        feed(ctx, 0, 100)
        report["decoded_again"] = decode(ctx, 100, [100]) == 0
        report["logits_fresh"] = logits(ctx)
    return report


SCENARIOS = {f.__name__: f for f in (switched_chats, looked_up, embeddings, refused_restore, checkpoint)}

if __name__ == "__main__":
    main(SCENARIOS)
