"""llama-server: where it is, and the words that it is started with."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from equip_cli.core import native
from equip_cli.core.errors import BackendError, UsageError
from equip_cli.core.model import Model

PAGE = Path(__file__).parent / "page"  # what a browser is shown at /
NAME = "llama-server.exe" if os.name == "nt" else "llama-server"

# llama-server's options that `equip serve` has itself, or reads the answer to, and what to write in their place
_OWN = {
    **dict.fromkeys(
        ("-m", "--model", "-hf", "-hfr", "--hf-repo", "-mu", "--model-url", "-dr", "--docker-repo"), "MODEL"
    ),
    **dict.fromkeys(("-np", "--parallel"), "-np"),
    **dict.fromkeys(("--host", "--port", "--alias"), ""),
    **dict.fromkeys(("-a",), "--alias"),
    **dict.fromkeys(("--api-key", "--api-key-file"), "--api-key"),
    **dict.fromkeys(("--slot-save-path",), "--slots-dir"),
    **dict.fromkeys(("--rpc",), "--rpc"),
    **dict.fromkeys(("-v", "--verbose", "--log-verbose", "-lv", "--verbosity", "--log-verbosity"), "-v"),
    **dict.fromkeys(("--log-disable", "--log-jsonl", "--no-log-prefix"), "-v"),
}
_N_WAITING = 128  # clients that may stand still before others have to wait for them; a thread that sleeps for each
_CLIENT_PATIENCE = 120  # seconds in which a client must send, or read, something

_UNIFIED = ("-kvu", "--kv-unified")
_EMBEDDINGS, _RERANKING = {"--embedding", "--embeddings"}, {"--rerank", "--reranking"}
_TRUE = {"on", "enabled", "true", "1"}  # of a variable, as llama-server reads it
_DRAFT_MODEL = {"-md", "--model-draft", "--spec-draft-model"}
_POOL = re.compile(r"[:,]pool=")
_N_CHECKPOINTS = 4  # llama-server's own default is 32


@dataclass(frozen=True)
class Settings:
    """What `equip serve` decides, in llama-server's terms. rest: what stands behind `--`, as it was typed."""

    model: Path
    alias: str
    policy: str
    host: str
    port: int
    n_lanes: int
    key: str | None = None
    slots: Path | None = None
    options: Sequence[str] = ()
    rest: Sequence[str] = ()

    @property
    def has_pool(self) -> bool:
        """Whether all lanes share one cache."""
        return _POOL.search(self.policy) is not None


def find() -> Path:
    """The installed llama-server, which lies beside the libraries. Raises BackendError without it."""
    folder = native.library_folder()
    program = folder / NAME
    if not program.is_file():
        raise BackendError(
            f"there is no {NAME} in {folder}: install equip-llama with it (without -DEQUIP_SERVER=OFF in CMAKE_ARGS)"
        )
    return program


def with_pool(policy: str, pool: int | Literal["auto"] | None, model: Path, n_lanes: int) -> str:
    """The policy's text with this pool in it, unless it has one of its own or bounds nothing.

    `auto` is left out where there is nothing to share: with one lane, and for a model of which each sequence has a recurrent
    state. Raises what `Model` raises.
    """
    if pool is None or policy.partition(":")[0] == "none" or _POOL.search(policy):
        return policy
    if pool == "auto":
        if n_lanes == 1:
            return policy
        with Model(model, vocab_only=True) as about:
            if about.info["is_hybrid"]:
                return policy
    return f"{policy}{',' if ':' in policy else ':'}pool={pool}"


def _asks_for(flags: set[str], variable: str, rest: Sequence[str]) -> bool:
    return bool(flags & set(rest)) or os.environ.get(variable, "") in _TRUE


def _reranks(rest: Sequence[str]) -> bool:
    return _asks_for(_RERANKING, "LLAMA_ARG_RERANKING", rest)


def is_for_text(rest: Sequence[str]) -> bool:
    """Whether a server with these words behind `--`, and llama-server's variables, writes text: no embeddings, no scores of
    documents."""
    return not (_reranks(rest) or _asks_for(_EMBEDDINGS, "LLAMA_ARG_EMBEDDINGS", rest))


def example(rest: Sequence[str]) -> tuple[str, dict[str, Any]]:
    """A first request to such a server: path and body."""
    if is_for_text(rest):
        return "/v1/chat/completions", {"messages": [{"role": "user", "content": "Hello"}]}
    if _reranks(rest):
        return "/v1/rerank", {"query": "Hello", "documents": ["Good morning", "Goodbye"]}
    return "/v1/embeddings", {"input": "Hello"}


def warnings(rest: Sequence[str]) -> list[str]:
    """Sentences on what stands behind `--` and does nothing."""
    types = [types for word, types in zip(rest, rest[1:], strict=False) if word == "--spec-type"]
    if _DRAFT_MODEL & set(rest) and not any("draft" in each for each in types):
        return ["a draft model alone drafts nothing: add --spec-type draft-simple behind --"]
    return []


def check_rest(rest: Sequence[str]) -> None:
    """Raises UsageError for an option behind `--` that would work against one of `equip serve`."""
    for word in rest:
        flag = word.split("=", 1)[0]
        if flag in _UNIFIED and is_for_text(rest):
            raise UsageError(f"{flag} shares one cache among all lanes, which cannot be bounded: leave it out")
        if flag in _OWN:
            own = _OWN[flag] or flag
            raise UsageError(f"{flag} is not for the part behind --: give {own} to equip serve itself")


def arguments(settings: Settings) -> list[str]:
    """llama-server's command line, without the program. Raises UsageError."""
    check_rest(settings.rest)
    words = ["--model", str(settings.model), "--alias", settings.alias]
    words += ["--host", settings.host, "--port", str(settings.port)]
    words += ["--parallel", str(settings.n_lanes), "--metrics"]
    # a stream of its own for each lane; one for all of them in a pool, which takes from idle lanes what others need, and where
    # texts are pooled, which no policy bounds: llama.cpp reads texts of several streams in pieces of equal length, and takes
    # the mean of the last one
    words += ["--kv-unified"] if settings.has_pool or not is_for_text(settings.rest) else ["--no-kv-unified"]
    if settings.has_pool:
        words += ["--no-cache-idle-slots"]
    # of a hybrid model each is the whole state of a lane
    words += ["--ctx-checkpoints", str(_N_CHECKPOINTS)]
    words += ["--ui", "--path", str(PAGE)]
    # clients that send half a body, or read nothing, each hold one of the threads that wait for clients: for an hour with
    # llama-server's own numbers, whose n_lanes + 4 threads 20 of them take
    words += ["--threads-http", str(settings.n_lanes + _N_WAITING), "--timeout", str(_CLIENT_PATIENCE)]
    if settings.key is None:
        # a page of the web that is open in a browser must not talk to it
        words += ["--cors-origins", "localhost"]
    if settings.slots is not None:
        words += ["--slot-save-path", f"{settings.slots}{os.sep}"]
    return [*words, *settings.options, *settings.rest]


def environment(settings: Settings, given: Mapping[str, str]) -> dict[str, str]:
    """The server's environment, made of `given`; keys are in it and on no command line."""
    own = {"LLAMA_KV_POLICY": settings.policy, "EQUIP_REQUEST_LOG": "1"}
    if settings.key is not None:
        own["LLAMA_API_KEY"] = settings.key
    return {**given, **own}
