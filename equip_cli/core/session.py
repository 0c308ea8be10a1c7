"""A sequence of tokens in a cache of fixed size: read a prompt, generate, look inside."""

from __future__ import annotations

import codecs
import json
import os
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from numbers import Real
from typing import TYPE_CHECKING, Any

from equip_cli.core import limits, native
from equip_cli.core.closing import Owner
from equip_cli.core.errors import EquipError, UsageError
from equip_cli.core.policy import CachePolicy
from equip_cli.core.sampling import Sampling
from equip_cli.core.session_options import native_arguments

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from equip_cli.core.model import Model

STOP_EOG = 1  # enum equip_stop

# signals are handled between two native calls, so one call should not last longer than this
_CALL_SECONDS = 0.1


class Session(Owner):
    """One sequence. It belongs to one thread at a time; `cancel()` alone may be called from another.

    policy: a CachePolicy, its text form (`"streaming:budget=1024"`), or None for what LLAMA_KV_POLICY says in the
        environment, `CachePolicy()` if it says nothing.
    n_ctx: slots with the policy `none` (None = as many as a budget that is not given, 0 = the trained context). A bounded cache has as
        many slots as its budget asks for; n_ctx then only says how far apart tokens can be, which decides between the short
        and the long RoPE factors of models that have both (LongRoPE); None = the trained context.
    n_batch, n_ubatch: tokens per call and per chunk.
    n_threads, n_threads_batch: up to 512; None, 0 and -1 = the physical cores that this process may use, within its control
        groups' CPU quota.
    adapt_threads: take fewer threads while other programs are busy, and all of them again afterwards, where no result depends
        on their number (not with llama.cpp's own flash attention); Linux; None = where n_threads is None.
    flash_attn: `auto`, `on` or `off`; True is `on` and False `off`. type_k, type_v: `f16`, `q8_0`, ... ; offload_kv: keep the
        cache on the GPU.
    n_outputs: tokens of a chunk whose logits are wanted, for `nll(chunk=...)`.
    cpu_attn: our own CPU kernel for the attention of single tokens, where flash attention is on and the kernel covers the
        model's shape; None = with every policy but `none`.
    rope_upstream: the update `shift` with upstream's own RoPE kernel, to the same bits, for benchmarks.

    Raises UsageError, BudgetError, UnsupportedModelError, OutOfMemoryError.
    """

    _closed = "the session is closed: make a new one"

    def __init__(
        self,
        model: Model,
        policy: CachePolicy | str | None = None,
        *,
        n_ctx: int | None = None,
        n_batch: int | None = None,
        n_ubatch: int | None = None,
        n_threads: int | None = None,
        n_threads_batch: int | None = None,
        adapt_threads: bool | None = None,
        flash_attn: str | bool = "auto",
        type_k: str = "f16",
        type_v: str = "f16",
        offload_kv: bool = True,
        n_outputs: int = 1,
        cpu_attn: bool | None = None,
        rope_upstream: bool = False,
    ) -> None:
        if isinstance(policy, str):
            policy = CachePolicy.parse(policy)
        text, options = native_arguments(
            policy,
            n_ctx=n_ctx, n_batch=n_batch, n_ubatch=n_ubatch, n_threads=n_threads, n_threads_batch=n_threads_batch,
            adapt_threads=adapt_threads, flash_attn=flash_attn, type_k=type_k, type_v=type_v, offload_kv=offload_kv,
            n_outputs=n_outputs, cpu_attn=cpu_attn, rope_upstream=rope_upstream,
        )  # fmt: skip
        library = native.load()
        out = library.ffi.new("equip_session **")
        library.check(library.lib.equip_session_create(out, model.handle, text, options))
        self._begin(model, out[0], policy)

    @classmethod
    def of_pool(cls, model: Model, handle: Any, policy: CachePolicy) -> Session:
        """The session that cffi's `equip_session *` is; `Pool.session()` makes them."""
        session = cls.__new__(cls)
        session._begin(model, handle, policy)
        return session

    def _begin(self, model: Model, handle: Any, policy: CachePolicy | None) -> None:
        self.model = model
        self._native = native.load()
        self._own(handle, self._native.lib.equip_session_free)
        self.busy = threading.Lock()  # held by the calls that take long, so that close() does not free what they use
        model.register(self)
        self._seconds_per_token = _CALL_SECONDS
        self.stopped = False
        self.set_sampler(Sampling())
        stats = self.stats()
        self._chunk = max(1, int(stats["n_ubatch"]))
        if policy is None:
            policy = CachePolicy.from_stats(stats)
        elif policy.budget is None and policy.name != "none":
            policy = replace(policy, budget=int(stats["budget"]))
        self._policy = policy

    def close(self) -> None:
        """Free the cache. A second call does nothing; a call that still runs in another thread is cancelled first."""
        if self._handle is None:
            return
        while not self.busy.acquire(timeout=0.05):
            if self.is_inherited:  # by a thread that this process lacks
                return self._abandon()
            self.cancel()  # again: it may have come between two calls
        try:
            self._free()
        finally:
            self.busy.release()

    @property
    def policy(self) -> CachePolicy:
        """What decides which tokens are kept; it cannot change within a session."""
        return self._policy

    @policy.setter
    def policy(self, value: object) -> None:
        raise UsageError(
            "the policy of a session cannot change, because keys rotated under one rule cannot be mixed with those of "
            "another: make a new session"
        )

    # ---- tokens in

    def pin(self, n: int) -> None:
        """Never evict the first `n` tokens; only before the first one. Raises BudgetError, UsageError."""
        limits.COUNT.check(n, "the number of pinned tokens")
        self._native.check(self._native.lib.equip_session_pin(self.handle, n))

    def eval(self, tokens: Sequence[int]) -> int:
        """Append tokens, one chunk of n_ubatch per native call, so that Ctrl-C stops within a chunk.

        Returns how many were read (all of them). Raises ContextFullError, BackendError, CancelledError; the tokens
        of the chunks before are then in the cache, `stats()["n_past"]` counts them, and the session stays usable.
        """
        n = len(tokens)
        if n == 0:
            return 0
        ffi, lib = self._native.ffi, self._native.lib
        data = self._token_data(tokens)
        n_done = ffi.new("int32_t *")
        done = 0
        while done < n:
            with self.busy:
                status = lib.equip_session_eval(self.handle, data + done, min(self._chunk, n - done), n_done)
            done += n_done[0]
            self._native.check(status)
        return done

    def _token_data(self, tokens: Sequence[int]) -> Any:
        """cffi's `int32_t[n]`; raises UsageError for a token that is not in the vocabulary."""
        n_vocab = self.model.n_vocab
        if tokens and not (min(tokens) >= 0 and max(tokens) < n_vocab):
            raise UsageError(f"a token is out of range: this model has the tokens 0 to {n_vocab - 1}")
        return self._native.ffi.new("int32_t[]", list(tokens))

    def nll(
        self, tokens: Sequence[int], advance: Callable[[int], object] = lambda n: None, chunk: int = 1
    ) -> list[float]:
        """-log p(token | everything before it), in nats, for each token.

        They are read `chunk` per step (at most `n_outputs`): with 1 as generation does, with more as a prompt. The first
        one is scored by the logits of the token read last. advance: called with the number of tokens that were done, at
        least ten times a second where a step takes less.
        Raises UsageError if there are no logits yet or after a `rewind()`, ContextFullError, BackendError,
        CancelledError; `stats()["n_past"]` counts what was read until then, and the session stays usable.
        """
        limits.N_OUTPUTS.check(chunk, "chunk")
        ffi, lib = self._native.ffi, self._native.lib
        n = len(tokens)
        data, values = self._token_data(tokens), ffi.new("double[]", max(n, 1))
        done = 0
        while done < n:
            want = min(n - done, max(chunk, self._steps_per_call() // chunk * chunk))
            begin = time.perf_counter()
            with self.busy:
                status = lib.equip_session_nll(self.handle, data + done, want, chunk, values + done, ffi.NULL)
            self._native.check(status)
            self._seconds_per_token = max((time.perf_counter() - begin) / want, 1e-6)
            done += want
            advance(want)
        return list(ffi.unpack(values, n)) if n else []

    def _steps_per_call(self) -> int:
        """Single-token steps that one native call may take."""
        return max(1, int(_CALL_SECONDS / self._seconds_per_token))

    def rewind(self, position: int) -> str:
        """Drop the tokens at `position` and after it; logits are gone until the next `eval()`.

        Returns `exact`, or `shortened` when a dropped token had evicted another one.
        Raises RewindError if the position does not lie behind the newest one that any layer or head has evicted (0 always
        does); nothing changes then. Raises UsageError for what is no position.
        """
        limits.COUNT.check(position, "the position")
        return (
            "shortened" if self._native.check(self._native.lib.equip_session_rewind(self.handle, position)) else "exact"
        )

    def reset(self) -> None:
        """Forget everything; the sampler starts over too."""
        self._native.check(self._native.lib.equip_session_reset(self.handle))
        self.stopped = False

    # ---- tokens out

    def set_sampler(self, sampling: Sampling) -> None:
        """Draw the next tokens this way. Raises UsageError for a grammar or a schema that cannot be read."""
        ffi = self._native.ffi
        grammar, schema = sampling.grammar, sampling.json_schema
        self._native.check(
            self._native.lib.equip_session_set_sampler(
                self.handle,
                native.option_text(sampling.native_options()),
                ffi.NULL if grammar is None else native.c_string(grammar, "the grammar"),
                ffi.NULL if schema is None else native.c_string(schema, "the JSON schema"),
            )
        )

    def iter_tokens(self, n: int = -1, *, per_call: int = 1) -> Iterator[int]:
        """Sample and evaluate up to `n` tokens (-1: until the model ends its turn); yields ids as they come.

        per_call: tokens per native call: 1 shows each at once; 0 takes as many as fit a tenth of a second.
        The token that ends the turn is the last one, is not in the cache, and sets `stopped`.
        Raises UsageError for an `n` below -1; ContextFullError, BackendError, CancelledError, after the tokens that came
        before.
        """
        limits.PREDICT.check(n, "n")
        limits.COUNT.check(per_call, "per_call")
        ffi, lib = self._native.ffi, self._native.lib
        self.stopped = False
        n_out, stop = ffi.new("int32_t *"), ffi.new("int *")
        left = n if n >= 0 else None
        while not self.stopped and (left is None or left > 0):
            want = per_call or self._steps_per_call()
            want = want if left is None else min(want, left)
            out = ffi.new("int32_t[]", want)
            begin = time.perf_counter()
            with self.busy:
                status = lib.equip_session_generate(self.handle, want, out, n_out, stop)
            tokens: list[int] = ffi.unpack(out, n_out[0]) if n_out[0] else []
            # the message is read before the caller can run another native call in between
            error: EquipError | None = None
            try:
                self._native.check(status)
            except EquipError as caught:
                error = caught
            if tokens:
                self._seconds_per_token = max((time.perf_counter() - begin) / len(tokens), 1e-6)
            self.stopped = status >= 0 and stop[0] == STOP_EOG
            left = None if left is None else left - len(tokens)
            yield from tokens
            if error is not None:
                raise error
            if not tokens:
                return

    def generate_tokens(self, n: int) -> list[int]:
        """Up to `n` token ids, in as few native calls as keep Ctrl-C quick; see `iter_tokens()`."""
        return list(self.iter_tokens(n, per_call=0))

    def generate(
        self,
        prompt: str | Sequence[int] | None = None,
        n: int = -1,
        sampling: Sampling | None = None,
        *,
        per_call: int = 1,
    ) -> Iterator[str]:
        """Read the prompt, then yield text as it is generated, never half a character.

        prompt: text, token ids, or None to go on from where the session is.
        n: most tokens to generate, -1 = until the model ends its turn; sampling: None = as set before.
        Raises what `eval()`, `set_sampler()` and `iter_tokens()` raise.
        """
        limits.PREDICT.check(n, "n")
        if sampling is not None:
            self.set_sampler(sampling)
        if prompt is not None:
            self.eval(self.model.tokenize(prompt) if isinstance(prompt, str) else prompt)
        decoder = codecs.getincrementaldecoder("utf-8")("replace")
        try:
            for token in self.iter_tokens(n, per_call=per_call):
                piece = decoder.decode(b"" if self.model.is_eog(token) else self.model.piece(token))
                if piece:
                    yield piece
        except EquipError:
            rest = decoder.decode(b"", final=True)
            if rest:
                yield rest
            raise
        rest = decoder.decode(b"", final=True)
        if rest:
            yield rest

    def cancel(self) -> None:
        """Ask a running call to stop; it raises CancelledError there. May be called from any thread."""
        self._native.lib.equip_session_cancel(self.handle)

    # ---- looking inside

    def stats(self) -> dict[str, Any]:
        """What `equip_session_stats()` in equip.h lists: policy, budget, n_past, n_used, kv_bytes; times in us."""
        return dict(json.loads(self._native.text(self._native.lib.equip_session_stats(self.handle))))

    def kept(self) -> list[tuple[int, int]]:
        """(position, slot) of every kept token, ordered by position.

        At scope layer or head these are the first layer's or KV head's; `head()` and `shares()` tell of the others.
        """
        return self._pairs(partial(self._native.lib.equip_session_kept, self.handle), "int32_t[]")

    def head(self, layer: int, head: int) -> list[tuple[int, float]]:
        """(position, accumulated weight) of every token that one KV head keeps, ordered by position.

        layer: 0 to n_layer - 1; head: 0 to n_head_kv - 1 of that layer. At scope layer the heads of a layer keep the
        same tokens, at scope token all do. The weight is the sum of the attention weights that the head's queries gave
        the token, as far as the policy counts them (it may let them decay), not divided by age; 0 where the policy
        reads none. With the policy `external` it is the score that was set, NaN where none was. The weights come from the
        layer's device: one call per head waits for it.
        Raises UsageError for a layer or head that does not exist, for a layer without a cache of its own, and with the
        policy `none`.
        """
        if not all(map(limits.COUNT.allows, (layer, head))):
            raise UsageError(f"there is no layer {layer} with a KV head {head}: both are counted from 0")
        return self._pairs(partial(self._native.lib.equip_session_head, self.handle, layer, head), "float[]")

    def set_scores(self, layer: int | None, head: int | None, positions: Sequence[int], values: Sequence[float]) -> int:
        """With the policy `external`: `values[i]` is what the token at `positions[i]` is worth to a KV head; the lowest goes.

        layer, head: counted from 0; None is all of them. Where heads decide together (scopes layer and token), their scores
        are added. A token that the head keeps has its score until it goes, one that is yet to come from when it is read;
        one that the head has evicted is left out. A token without a score is worth the policy's `unscored` (0).

        Scores decide from the next token on. Those that are set right after `eval()` of one chunk (n_ubatch tokens) also
        decide what the chunk evicts; whoever asks before them what is kept (`kept()`, `head()`, `shares()`, `stats()`)
        has it carried out with what was set until then. `eval()` of several chunks wants them ahead.

        A rewind, and a call that fails, forget the scores of the tokens that they drop, and those of tokens to come.
        Returns how many of the tokens hold their score now. Raises UsageError, and changes nothing, under another policy,
        for a layer or head that does not exist, lists of different lengths, and values that are not finite.
        """
        if len(positions) != len(values):
            raise UsageError(f"{len(positions)} positions have {len(values)} values: give one for each")
        if not all(each is None or limits.COUNT.allows(each) for each in (layer, head)):
            raise UsageError(
                f"there is no layer {layer} with a KV head {head}: both are counted from 0, and None is all"
            )
        for position, value in zip(positions, values, strict=True):
            if not limits.COUNT.allows(position) or not isinstance(value, Real):
                raise UsageError(
                    f"the score of the token at position {position} is {value}: give whole numbers and numbers"
                )
        ffi = self._native.ffi
        wanted = [-1 if each is None else each for each in (layer, head)]
        where, worth = ffi.new("int32_t[]", list(positions)), ffi.new("float[]", list(values))
        return self._native.check(
            self._native.lib.equip_session_set_scores(self.handle, *wanted, where, worth, len(positions))
        )

    def shares(self) -> dict[int, float]:
        """For every position that can still be read somewhere, ordered: the share of units that keep it, in (0, 1].

        A unit is what keeps a set of tokens of its own: the whole cache at scope token and with the policy `none` (every
        share is 1 then), a layer at scope layer, a KV head of a layer at scope head. A position that is missing was
        evicted by all of them. The shares add up to the tokens that a unit keeps.
        """
        return dict(self._pairs(partial(self._native.lib.equip_session_shares, self.handle), "float[]"))

    def _pairs(self, read: Callable[..., int], kind: str) -> list[tuple[int, Any]]:
        """(position, value of this C array type) of each token that `read(positions, values, n_max)` tells of."""
        ffi = self._native.ffi
        n = self._native.check(read(ffi.NULL, ffi.NULL, 0))
        position, value = ffi.new("int32_t[]", max(n, 1)), ffi.new(kind, max(n, 1))
        n = min(n, self._native.check(read(position, value, n)))
        return list(zip(ffi.unpack(position, n), ffi.unpack(value, n), strict=True)) if n else []

    def logits(self) -> NDArray[np.float32]:
        """Logits of the last token read, f32 `[n_vocab]`, a copy. Raises UsageError if there are none."""
        import numpy

        pointer = self._native.lib.equip_session_logits(self.handle)
        if pointer == self._native.ffi.NULL:
            raise UsageError("there are no logits yet: eval() a token first")
        data = bytes(self._native.ffi.buffer(pointer, 4 * self.model.n_vocab))
        return numpy.array(numpy.frombuffer(data, dtype=numpy.float32))

    # ---- saved sessions

    def save_bytes(self) -> bytes:
        """The session as bytes, also after evictions: what is kept, the sums by which more will go, the newest tokens.

        A session of the same model, policy and shapes that loads them goes on as this one does, with the same numbers where
        it has as many threads. Not saved: the sampler, and the logits of the last token. Raises StateError after a step
        that cost the session its text, UnsupportedModelError with the update `shift`.
        """
        ffi, lib = self._native.ffi, self._native.lib
        size = ffi.new("size_t *")
        self._native.check(lib.equip_session_save(self.handle, ffi.NULL, 0, size))
        buffer = ffi.new("uint8_t[]", max(int(size[0]), 1))
        self._native.check(lib.equip_session_save(self.handle, buffer, size[0], size))
        return bytes(ffi.buffer(buffer, size[0]))

    def load_bytes(self, data: bytes) -> None:
        """Take over what `save_bytes()` gave, in place of what is here.

        Raises StateError if the bytes are damaged, or of another model, policy or shape; the session is empty then, and
        refuses tokens until it is reset.
        """
        ffi, lib = self._native.ffi, self._native.lib
        self.stopped = False
        self._native.check(lib.equip_session_load(self.handle, ffi.from_buffer(data), len(data)))

    def save(self, path: str | os.PathLike[str]) -> None:
        """`save_bytes()` into a file, which only its owner may read and which at any time is the old one or the new one as
        a whole. Raises what that raises, and StateError where the file cannot be written."""
        self._native.check(self._native.lib.equip_session_save_file(self.handle, os.fsencode(path)))

    def load(self, path: str | os.PathLike[str]) -> None:
        """`load_bytes()` from a file. One that cannot be read raises StateError, and changes nothing."""
        self.stopped = False
        self._native.check(self._native.lib.equip_session_load_file(self.handle, os.fsencode(path)))

    def fill(self, n: int) -> None:
        """Make the sequence `n` tokens longer without reading any, for benchmarks: rows that are there are copied.

        With the policy `none` only; raises UnsupportedModelError where the cache is not a plain one, or has no room.
        """
        limits.COUNT.check(n, "n")
        self._native.check(self._native.lib.equip_session_fill(self.handle, n))

    def time_decode(self, n: int, *, rewind: bool = False) -> tuple[list[int], list[int]]:
        """Time `n` single-token steps without sampling: nanoseconds per step, and the part outside graph compute.

        rewind: drop the token after each step, so that the cache stays at its size.
        """
        limits.COUNT.check(n, "n")
        ffi, lib = self._native.ffi, self._native.lib
        total, host = ffi.new("int64_t[]", max(n, 1)), ffi.new("int64_t[]", max(n, 1))
        self._native.check(lib.equip_session_time_decode(self.handle, n, rewind, total, host))
        return (ffi.unpack(total, n), ffi.unpack(host, n)) if n > 0 else ([], [])
