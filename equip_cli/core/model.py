"""A model file, loaded: facts about it, its tokenizer, its chat template, and the sessions that run on it."""

from __future__ import annotations

import functools
import json
import os
import stat
import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from equip_cli.core import limits, native, workers
from equip_cli.core.closing import Owner
from equip_cli.core.errors import ModelFileError, UnsupportedModelError, UsageError

if TYPE_CHECKING:
    from equip_cli.core.policy import CachePolicy
    from equip_cli.core.pool import Pool
    from equip_cli.core.session import Session


# what a call that counts answers when there is nothing to count
_FAILED = -(2**31)


def _not_gguf(head: bytes) -> str | None:
    """What a file is that begins with these bytes, and what to do; None if it may be a model."""
    if head.startswith(b"GGUF") and len(head) >= 8:
        version = int.from_bytes(head[4:8], "little")
        if version & 0xFFFF == 0:
            return "was made for a big-endian machine: download the little-endian file of the model"
        if version == 1:
            return "is a GGUF file of version 1, which llama.cpp reads no longer: get a newer file of the model"
        if version > 3:
            return f"is a GGUF file of version {version}, newer than this llama.cpp: update equip-llama"
        return None
    words = head.lstrip().lower()
    if words.startswith((b"<!doctype", b"<html", b"<?xml", b'{"error"')):
        return "is a web page, not a GGUF file: the server wanted a login or has moved the file, so download it again"
    if words.startswith(b"version https://git-lfs"):
        return "is git-lfs's pointer to a model, not a GGUF file: run git lfs pull, or download the file itself"
    others = {
        b"PK\x03\x04": "PyTorch's format",
        b"tjgg": "an older format",
        b"lmgg": "an older format",
        b"fmgg": "an older format",
    }
    for magic, name in others.items():
        if head.startswith(magic):
            return f"is in {name}, not a GGUF file: get a GGUF file of the model, or convert it with llama.cpp's convert_hf_to_gguf.py"
    if head[8:9] == b"{" and int.from_bytes(head[:8], "little") < 1 << 32:
        return "is in the safetensors format, not a GGUF file: get a GGUF file of the model, or convert it with llama.cpp's convert_hf_to_gguf.py"
    return "is not a GGUF file: give a model in llama.cpp's format"


def check_model_file(path: Path) -> None:
    """What can be said about a model file without the native library; raises ModelFileError."""
    try:
        mode = path.stat().st_mode
        if stat.S_ISDIR(mode):
            inside = min(path.glob("*.gguf"), default=None)
            remedy = (
                f"give the path of a GGUF file, {inside} for instance" if inside else "give the path of a GGUF file"
            )
            raise ModelFileError(f"{path} is a directory: {remedy}")
        if not stat.S_ISREG(mode):  # opening a pipe would wait for somebody to write
            raise ModelFileError(f"{path} is a pipe or a device: give the path of a GGUF file")
        with path.open("rb") as file:
            head = file.read(512)
    except FileNotFoundError:
        raise ModelFileError(f"there is no file {path}: check the path") from None
    except ValueError:
        raise ModelFileError(f"{str(path)!r} is no path: it has a zero byte in it") from None
    except OSError as error:
        raise ModelFileError(f"{path} cannot be read ({error.strerror}): check its permissions") from None
    if not head:
        raise ModelFileError(f"{path} is empty: download it again")
    if fault := _not_gguf(head):
        raise ModelFileError(f"{path} {fault}")


class Model(Owner):
    """A GGUF model. It may be shared by threads; close it, or use it as a context manager, to free its memory.

    path: the file (of a split model: its first file).
    n_gpu_layers: layers on the GPU, -1 = all (no effect without a GPU backend).
    vocab_only: load the tokenizer and nothing else.
    rpc: "HOST:PORT,..." of workers (`equip rpc`), whose devices share the layers with this machine's. They stay known: models
        that are loaded later use them too. If one of them ends while it is used, so does this process, with a sentence.
    progress: called with 0..1 while the weights are read; what it raises cancels the load and comes out here.

    Raises ModelFileError, UnsupportedModelError, OutOfMemoryError, UsageError; BackendError for a worker that does not answer.
    """

    _closed = "the model is closed: load it again"

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        n_gpu_layers: int = -1,
        use_mmap: bool = True,
        vocab_only: bool = False,
        rpc: str | None = None,
        progress: Callable[[float], None] | None = None,
    ) -> None:
        limits.GPU_LAYERS.check(n_gpu_layers, "n_gpu_layers")
        self.path = Path(path)
        check_model_file(self.path)
        self._native = native.load()
        if rpc is not None:
            workers.add(workers.parse(rpc))
        ffi, lib = self._native.ffi, self._native.lib
        raised: list[BaseException] = []

        def on_error(_type: object, error: BaseException, _traceback: object) -> None:
            raised.append(error)

        def on_progress(fraction: float, _user_data: object) -> int:
            if progress is not None:
                progress(fraction)
            return 1

        # Ctrl-C during the load surfaces inside the callback: it answers 0, the load stops, and the error goes on here
        callback = ffi.callback("int(float, void *)", on_progress, error=0, onerror=on_error)
        options = native.option_text({"n_gpu_layers": n_gpu_layers, "use_mmap": use_mmap, "vocab_only": vocab_only})
        out = ffi.new("equip_model **")
        status = lib.equip_model_load(out, os.fsencode(self.path), options, callback, ffi.NULL)
        if raised:
            if status == 0:
                lib.equip_model_free(out[0])
            raise raised[0]
        self._native.check(status)
        self._own(out[0], lib.equip_model_free)
        self._sessions: weakref.WeakSet[Session | Pool] = weakref.WeakSet()
        self._info: dict[str, Any] | None = None

    def close(self) -> None:
        """Free the model and every session that still runs on it. A second call does nothing."""
        for session in list(self._sessions):
            session.close()
        self._free()

    @property
    def info(self) -> dict[str, Any]:
        """What `equip_model_info()` in equip.h lists: arch, n_layer, n_head, n_ctx_train, kv_bytes_per_token, ..."""
        if self._info is None:
            self._info = dict(json.loads(self._native.text(self._native.lib.equip_model_info(self.handle))))
        return self._info

    @property
    def n_vocab(self) -> int:
        """Tokens in the vocabulary."""
        return int(self.info["n_vocab"])

    @property
    def n_ctx_train(self) -> int:
        """Tokens of the context that the model was trained on."""
        return int(self.info["n_ctx_train"])

    @functools.cached_property
    def control_tokens(self) -> tuple[str, ...]:
        """Texts that `tokenize()` reads as a control token, and as themselves with parse_special=False."""
        return tuple(json.loads(self._native.text(self._native.lib.equip_control_tokens(self.handle))))

    def tokenize(self, text: str, *, add_special: bool = True, parse_special: bool = True) -> list[int]:
        """Token ids of `text`.

        add_special: add the model's begin-of-sequence token where it wants one (never twice).
        parse_special: read `<|...|>` and the like as control tokens.
        Raises UsageError for a text that is no Unicode (half of a surrogate pair), UnsupportedModelError.
        """
        data = native.utf8(text, "the text")
        ffi, lib = self._native.ffi, self._native.lib
        n_max = len(data) + 8
        for _ in range(2):
            out = ffi.new("int32_t[]", n_max)
            n = lib.equip_tokenize(self.handle, data, len(data), add_special, parse_special, out, n_max)
            if n == _FAILED:
                break
            if n >= 0:
                tokens: list[int] = ffi.unpack(out, n) if n else []
                bos = self.info.get("bos", -1)
                # a chat template may have written the token that the tokenizer adds
                return tokens[1:] if add_special and bos >= 0 and tokens[:2] == [bos, bos] else tokens
            n_max = -n
        raise UnsupportedModelError(self._native.message())

    def piece(self, token: int, *, special: bool = False) -> bytes:
        """Bytes of one token's text; they may be part of a UTF-8 sequence. special: show control tokens too."""
        ffi, lib = self._native.ffi, self._native.lib
        n_max = 64
        for _ in range(2):
            buffer = ffi.new("char[]", n_max)
            n = lib.equip_token_piece(self.handle, token, special, buffer, n_max)
            if n == _FAILED:
                break
            if n >= 0:
                return bytes(ffi.buffer(buffer, n))
            n_max = -n
        raise UsageError(self._native.message())

    def detokenize(self, tokens: Iterable[int], *, special: bool = False) -> str:
        """Text of the tokens; bytes that are no valid UTF-8 become U+FFFD."""
        return b"".join(self.piece(token, special=special) for token in tokens).decode("utf-8", "replace")

    def is_eog(self, token: int) -> bool:
        """True if the token ends the model's turn."""
        return bool(self._native.lib.equip_token_is_eog(self.handle, token))

    def render_chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Mapping[str, Any]] | None = None,
        template: str | None = None,
        add_generation_prompt: bool = True,
    ) -> str:
        """The prompt that the model's chat template makes of a conversation.

        messages: `[{"role": ..., "content": ...}, ...]` and tools: as in the OpenAI chat API.
        template: Jinja source that replaces the model's own.
        Raises UnsupportedModelError if there is no template, or if it refuses these messages, UsageError for a zero byte
        in them, which would end the prompt, and for what is no Unicode text.
        """
        ffi, lib = self._native.ffi, self._native.lib
        prompt = lib.equip_chat_render(
            self.handle,
            native.utf8(json.dumps(list(messages), ensure_ascii=False), "a message"),
            ffi.NULL if tools is None else native.utf8(json.dumps(list(tools), ensure_ascii=False), "a tool"),
            ffi.NULL if template is None else native.c_string(template, "the chat template"),
            add_generation_prompt,
        )
        return self._native.text(prompt, UnsupportedModelError)

    def session(self, policy: CachePolicy | str | None = None, **options: Any) -> Session:
        """A new `Session` on this model; see there for the options."""
        from equip_cli.core.session import Session

        return Session(self, policy, **options)

    def pool(self, policy: CachePolicy | str | None = None, n_sessions: int = 4, **options: Any) -> Pool:
        """A new `Pool` of sessions on this model, which share one cache; see there for the options."""
        from equip_cli.core.pool import Pool

        return Pool(self, policy, n_sessions, **options)

    def plan(self, policy: CachePolicy | str | None = None, **options: Any) -> dict[str, Any]:
        """What `session()` would make of the same arguments: `{text, policy, budget, n_slots, n_ctx, n_ubatch, kv_bytes}`.

        text: the policy's, with every setting filled in; without a policy the budget is that of the context.
        Raises what `Session` raises, but for what shows only when the cache is made.
        """
        from equip_cli.core.policy import CachePolicy
        from equip_cli.core.session_options import native_arguments

        policy = CachePolicy.parse(policy) if isinstance(policy, str) else policy
        found = self._native.lib.equip_session_plan(self.handle, *native_arguments(policy, **options))
        return dict(json.loads(self._native.text(found)))

    def register(self, session: Session | Pool) -> None:
        """Remember a session, or a pool of them, so that `close()` frees it before the model."""
        self._sessions.add(session)
