"""What a program that knows nothing of a policy does with llama-cpp-python; runs in the binding's interpreter.

    python dropin_scenarios.py NAME MODEL [JSON]

prints one JSON object on stdout. The environment says which library is loaded and which policy bounds it.
"""

from __future__ import annotations

import ctypes
import json
import os
import re
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import llama_cpp
import numpy as np
from dropin_text import Messages, say

N_CTX = 32768

C = llama_cpp.llama_cpp
NATIVE: Any = ctypes.CDLL(C._lib._name)  # the functions that the policy adds, without the binding's conversions


class Stats(ctypes.Structure):
    """struct llama_kv_policy_stats"""

    _fields_ = [
        ("n_evicted", ctypes.c_int64),
        ("n_used", ctypes.c_int32),
        ("n_slots", ctypes.c_int32),
        ("budget", ctypes.c_int32),
        ("n_protect", ctypes.c_int32),
        ("t_host_us", ctypes.c_int64),
        ("n_steps", ctypes.c_int64),
        ("n_rotations", ctypes.c_int64),
        ("rotate_every", ctypes.c_int32),
        ("is_ranks", ctypes.c_bool),
        ("evict_every", ctypes.c_int32),
        ("page_size", ctypes.c_int32),
        ("score_queries", ctypes.c_int32),
        ("score_bytes", ctypes.c_int64),
        ("ledger_bytes", ctypes.c_int64),
        ("n_evicted_pool", ctypes.c_int64),
        ("n_device_reads", ctypes.c_int64),
        ("n_device_writes", ctypes.c_int64),
        ("n_filtered", ctypes.c_int64),
        ("n_filterable", ctypes.c_int64),
    ]


def stats(ctx: Any, seq: int = 0) -> dict[str, int]:
    out = Stats()
    NATIVE.llama_kv_policy_get_stats.restype = ctypes.c_bool
    if not NATIVE.llama_kv_policy_get_stats(ctypes.c_void_p(ctx), seq, ctypes.byref(out)):
        return {}
    return {name: getattr(out, name) for name in ("n_evicted", "n_used", "n_slots", "budget", "n_protect")}


def kept(ctx: Any, seq: int = 0) -> list[int]:
    """Positions of the kept tokens."""
    get = NATIVE.llama_kv_policy_get_kept
    n = get(ctypes.c_void_p(ctx), seq, None, None, 0)
    pos = (ctypes.c_int32 * max(1, n))()
    get(ctypes.c_void_p(ctx), seq, pos, None, n)
    return list(pos)[:n]


def rss() -> int:
    """Resident bytes of this process, or 0 where the system does not say."""
    try:
        with open("/proc/self/statm", encoding="ascii") as file:
            return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        return 0


class Llama(llama_cpp.Llama):
    """Counts what is evaluated."""

    def __init__(self, model: str, **options: Any) -> None:
        self.evals: list[int] = []
        self.rss_at: dict[int, int] = {}
        super().__init__(model, n_threads=1, n_threads_batch=1, verbose=False, **{"n_ctx": N_CTX, **options})
        # only these can be generated: whole words, so that the answer's text gives the same tokens again
        pieces = {i: self._model.token_get_text(i) for i in range(self.n_vocab())}
        words = [i for i, piece in pieces.items() if is_word(piece) and self.tokenize(piece[1:].encode(), False) == [i]]
        mask = np.full(self.n_vocab(), -np.inf, dtype=np.single)
        mask[words[:500]] = 0.0
        self.words = llama_cpp.LogitsProcessorList([lambda _, scores: scores + mask])

    def eval(self, tokens: Any) -> None:
        self.evals.append(len(tokens))
        super().eval(tokens)
        if self.n_tokens % 500 == 0:
            self.rss_at[self.n_tokens] = rss()

    def complete(self, prompt: str, n: int) -> dict[str, Any]:
        self.evals.clear()
        answer: Any = self.create_completion(prompt, max_tokens=n, temperature=0.0, logits_processor=self.words)
        return dict(answer)

    def text(self, prompt: str, n: int = 16) -> str:
        return str(self.complete(prompt, n)["choices"][0]["text"])

    def chat(self, messages: Messages, n: int = 24) -> dict[str, Any]:
        before = self.n_tokens
        self.evals.clear()
        answer: Any = self.create_chat_completion(
            list(messages), max_tokens=n, temperature=0.0, logits_processor=self.words
        )
        return {
            "text": answer["choices"][0]["message"]["content"],
            "n_prompt": answer["usage"]["prompt_tokens"],
            "n_before": before,  # evaluated by the object before this call
            "n_read": self.evals[0],  # prompt tokens that this call evaluated
        }


def is_word(piece: str) -> bool:
    return re.fullmatch("\u2581[a-z]{3,}", piece) is not None


def talk(llm: Llama, messages: Messages, seeds: Iterable[int], n_words: int) -> list[dict[str, Any]]:
    """Append one turn per seed; the answers' records."""
    turns = []
    for seed in seeds:
        messages.append({"role": "user", "content": say(seed, n_words)})
        turns.append(llm.chat(messages))
        messages.append({"role": "assistant", "content": turns[-1]["text"]})
    return turns


def long_life(model: str, flash_attn: bool) -> dict[str, Any]:
    """One object: 2,000 tokens in one call, a chat that continues, its first message edited, another chat."""
    start = rss()
    llm = Llama(model, flash_attn=flash_attn)
    answer = llm.complete("The river and the stone", 2000)
    report: dict[str, Any] = {
        "rss_growth": {n: at - start for n, at in llm.rss_at.items()},
        "finish_reason": answer["choices"][0]["finish_reason"],
        "n_gen": answer["usage"]["completion_tokens"],
        "n_prompt": answer["usage"]["prompt_tokens"],
        "kept": kept(llm.ctx),
        "stats": stats(llm.ctx),
    }

    def fresh(messages: Messages) -> dict[str, Any]:
        other = Llama(model, flash_attn=flash_attn)
        record = other.chat(messages)
        other.close()
        return record

    first: Messages = []
    report["other"] = talk(llm, first, [1], 60)[0]  # shares nothing with the completion
    report["other_fresh"] = fresh(first[:1])

    report["turns"] = talk(llm, first, range(2, 10), 60)
    report["evicted_in_chat"] = stats(llm.ctx)["n_evicted"]

    edited = [{"role": "user", "content": say(100, 60)}, *first[1:], {"role": "user", "content": say(11, 60)}]
    unedited = [first[0], *edited[1:]]
    report["unedited"] = llm.chat(unedited)
    report["unedited_fresh"] = fresh(unedited)
    report["edited"] = llm.chat(edited)
    report["edited_fresh"] = fresh(edited)
    llm.close()
    return report


def saved_state(model: str) -> dict[str, Any]:
    """Save after evictions, hold another chat, restore and go on; beside it, an object that only went on."""
    report: dict[str, Any] = {}
    prompt = say(1, 300)
    for name in ("restored", "straight"):
        llm = Llama(model)
        answer = llm.complete(prompt, 8)["choices"][0]["text"]
        if name == "restored":
            report["n_evicted"] = stats(llm.ctx)["n_evicted"]
            state = llm.save_state()
            llm.complete(say(2, 400), 8)
            llm.load_state(state)
        report[name] = llm.complete(prompt + answer + say(3, 20), 8)["choices"][0]["text"]
        report[f"{name}_evals"] = list(llm.evals)
        llm.close()
    return report


def cached_chats(model: str, folder: str = "") -> dict[str, Any]:
    """Two chats in turns, with the binding's own cache: it saves the state after each call, and restores before the next; beside
    it, an object for each chat that knows of no other.

    folder: the cache is on disk, there. The binding forgets what it takes from it and reads each chat again, with stock
    llama.cpp too; beside it stand objects that are new each time.
    """
    report: dict[str, Any] = {"answers": [], "expected": [], "n_evicted": []}
    cached, alone = Llama(model), [Llama(model), Llama(model)]
    cached.set_cache(llama_cpp.LlamaDiskCache(folder) if folder else llama_cpp.LlamaRAMCache())
    chats: list[Messages] = [[], []]
    for turn in range(3):
        for i, messages in enumerate(chats):
            messages.append({"role": "user", "content": say(10 * i + turn, 300 if turn == 0 else 20)})
            if folder:
                alone[i].close()
                alone[i] = Llama(model)
            answers = {"answers": cached.chat(messages), "expected": alone[i].chat(messages)}
            for name, answer in answers.items():
                report[name].append({"text": answer["text"], "n_read": answer["n_read"]})
            report["n_evicted"].append(stats(cached.ctx)["n_evicted"])
            messages.append({"role": "assistant", "content": answers["expected"]["text"]})
    for llm in (cached, *alone):
        llm.close()
    return report


@contextmanager
def raw(model: str, **params: Any) -> Iterator[Any]:
    """A context through the C API; yields None if it is refused."""
    handle = C.llama_model_load_from_file(model.encode(), C.llama_model_default_params())
    options = C.llama_context_default_params()
    options.n_threads = options.n_threads_batch = 1
    for key, value in {"n_ctx": N_CTX, "n_batch": 64, "n_ubatch": 64, **params}.items():
        setattr(options, key, value)
    ctx = C.llama_init_from_model(handle, options)
    yield ctx
    if ctx:
        C.llama_free(ctx)
    C.llama_model_free(handle)


def decode(ctx: Any, pos: int, tokens: list[int], seq: int = 0) -> int:
    batch = C.llama_batch_init(len(tokens), 0, 1)
    batch.n_tokens = len(tokens)
    for i, token in enumerate(tokens):
        batch.token[i], batch.pos[i], batch.n_seq_id[i], batch.seq_id[i][0] = token, pos + i, 1, seq
        batch.logits[i] = i == len(tokens) - 1
    status = C.llama_decode(ctx, batch)
    C.llama_batch_free(batch)
    return int(status)


def feed(ctx: Any, first: int, last: int, step: int = 64) -> None:
    """Decode the positions [first, last) with tokens that depend on the position alone."""
    for pos in range(first, last, step):
        tokens = [100 + 37 * p % 1000 for p in range(pos, min(last, pos + step))]
        if decode(ctx, pos, tokens) != 0:
            raise RuntimeError(f"decode failed at position {pos}")


def logits(ctx: Any) -> list[float]:
    n_vocab = C.llama_vocab_n_tokens(C.llama_model_get_vocab(C.llama_get_model(ctx)))
    return [float(x) for x in np.ctypeslib.as_array(C.llama_get_logits_ith(ctx, -1), (n_vocab,))[:64]]


def memory(model: str) -> dict[str, Any]:
    """The sequence operations of llama.h on a cache that has evicted; each with what it changed."""
    report: dict[str, Any] = {}
    with raw(model) as ctx:
        mem = C.llama_get_memory(ctx)

        def look() -> list[Any]:
            return [kept(ctx), C.llama_memory_seq_pos_min(mem, 0), C.llama_memory_seq_pos_max(mem, 0)]

        def removes(p0: int, p1: int) -> dict[str, Any]:
            before = look()
            return {"result": bool(C.llama_memory_seq_rm(mem, 0, p0, p1)), "before": before, "after": look()}

        report["pos_empty"] = look()
        feed(ctx, 0, 1000)
        report["can_shift"] = bool(C.llama_memory_can_shift(mem))

        before = look()
        C.llama_memory_seq_add(mem, 0, 0, -1, 5)
        C.llama_memory_seq_div(mem, 0, 0, -1, 2)
        C.llama_memory_seq_cp(mem, 0, 1, 0, -1)
        report["void_calls"] = {"before": before, "after": look()}
        feed(ctx, 1000, 1001)
        report["logits_after_void_calls"] = logits(ctx)

        report["past_the_end"] = removes(1001, -1)
        report["ends_early"] = removes(900, 950)
        report["ends_early_from_0"] = removes(0, 500)
        report["evicted"] = removes(300, -1)
        report["newest_evicted"] = removes(C.llama_memory_seq_pos_min(mem, 0) - 1, -1)
        report["between_sinks"] = removes(2, -1)
        feed(ctx, 1001, 1002)
        report["logits_after_refusals"] = logits(ctx)
        report["tail"] = removes(990, -1)
        feed(ctx, 990, 1002)
        report["after_tail"] = look()
        report["at_pos_min"] = removes(C.llama_memory_seq_pos_min(mem, 0), -1)
        report["all"] = removes(0, -1)
        feed(ctx, 0, 1000)
        report["all_negative"] = removes(-1, -1)
        feed(ctx, 0, 1002)
        report["logits_again"] = logits(ctx)

    with raw(model) as ctx:
        feed(ctx, 0, 1000)
        feed(ctx, 1000, 1001)
        report["logits_untouched"] = [logits(ctx)]
        feed(ctx, 1001, 1002)
        report["logits_untouched"].append(logits(ctx))
    with raw(model) as ctx:
        feed(ctx, 0, 1002)
        report["logits_fresh"] = logits(ctx)
    return report


def prompt_lookup(model: str) -> dict[str, Any]:
    """300 tokens with drafts that are looked up in the text so far."""
    from llama_cpp.llama_speculative import LlamaPromptLookupDecoding

    drafted = []

    class Lookup(LlamaPromptLookupDecoding):
        def __call__(self, input_ids: Any, /, **kwargs: Any) -> Any:
            found = super().__call__(input_ids, **kwargs)
            drafted.append(len(found))
            return found

    llm = Llama(model, draft_model=Lookup(max_ngram_size=2, num_pred_tokens=6))
    tokens = []
    for token in llm.generate(llm.tokenize(b"Tell me about the wind, and the sea, and the wind."), temp=0.0):
        tokens.append(token)
        if len(tokens) == 300:
            break
    return {"n": len(tokens), "drafted": sum(drafted), "n_evicted": stats(llm.ctx)["n_evicted"]}


def malformed(model: str, values: list[str]) -> dict[str, Any]:
    """Llama() under each value; a marker line on stderr before each."""
    outcome = {}
    for value in values:
        os.environ["LLAMA_KV_POLICY"] = value
        print(f"@@@{value}", file=sys.stderr, flush=True)
        try:
            Llama(model).close()
            outcome[value] = "made"
        except ValueError as error:
            outcome[value] = str(error)
    return outcome


def several_sequences(model: str) -> dict[str, Any]:
    report: dict[str, Any] = {}
    with raw(model, n_seq_max=4, kv_unified=True) as ctx:
        report["unified"] = ctx is not None
    with raw(model, n_seq_max=4, kv_unified=False) as ctx:
        report["separate"] = ctx is not None
        tokens = [100 + i for i in range(400)]
        for seq in (0, 3):
            for pos in range(0, 400 - 40 * seq, 40):
                if decode(ctx, pos, tokens[pos : pos + 40], seq) != 0:
                    raise RuntimeError("decode failed")
        report["kept"] = {seq: kept(ctx, seq) for seq in range(4)}
        report["stats"] = {seq: stats(ctx, seq) for seq in range(4)}
    return report


SCENARIOS: dict[str, Callable[..., dict[str, Any]]] = {
    f.__name__: f for f in (long_life, saved_state, cached_chats, memory, malformed, several_sequences, prompt_lookup)
}


def main(scenarios: dict[str, Callable[..., dict[str, Any]]]) -> None:
    arguments = json.loads(sys.argv[3]) if len(sys.argv) > 3 else {}
    print(json.dumps(scenarios[sys.argv[1]](sys.argv[2], **arguments)))


if __name__ == "__main__":
    main(SCENARIOS)
