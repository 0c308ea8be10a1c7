"""What a program does with a refusal of the cache, and with contexts that no policy is for; runs in the binding's interpreter.

    python dropin_refusals.py NAME MODEL [JSON]

as dropin_scenarios.py.
"""

from __future__ import annotations

import os
from contextlib import closing
from typing import Any

import llama_cpp
from dropin_scenarios import Llama, main, stats
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


SCENARIOS = {f.__name__: f for f in (switched_chats, looked_up, embeddings)}

if __name__ == "__main__":
    main(SCENARIOS)
