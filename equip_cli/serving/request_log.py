"""What llama-server writes while it runs: its own log, and a line of JSON for each request."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

_MARK = "equip-request "
# what the page at / asks beside its conversation
_ASIDE = {("GET", "/slots"), ("POST", "/apply-template"), ("POST", "/tokenize")}
# "0.04.853.309 I srv  llama_server: model loaded"
_LOG = re.compile(r"^[\d.]+ (?P<level>[A-Z]) (?P<text>.*)$")
_BOUNDED = re.compile(r"KV cache bounded: policy (\S+), scope (\S+), budget (\d+) tokens(?:, a pool of (\d+))?")
_LISTENING = re.compile(r"listening on (https?://\S+)")
# warnings that are about what was asked for; the others are of no use without the rest of the log
_TOLD = re.compile(r"^(?:server_can_draft|llama_kv_policy_scope): (?P<said>.*)$")
# an error, after which the server goes on
_NO_DRAFTS = "failed to initialize speculative decoding context: "
_REFUSED = re.compile(r"^server_can_start: (?P<said>.*)$")


def request(line: str) -> dict[str, Any] | None:
    """The request that a line tells of: `method`, `path`, `client`, `status`, and where it was answered by the model
    `n_read`, `n_cached`, `n_reread`, `n_generated`, `n_kept`, `n_evicted`, `ms`. None for another line.
    """
    if not line.startswith(_MARK):
        return None
    try:
        found = json.loads(line.removeprefix(_MARK))
    except ValueError:  # two lines that ran into each other
        return None
    return found if isinstance(found, dict) else None


def is_aside(found: Mapping[str, Any]) -> bool:
    """Whether a request is one that the page sends by itself, and was answered."""
    return (found["method"], found["path"]) in _ASIDE and int(found["status"]) < 400


def sentence(found: Mapping[str, Any], clock: str) -> str:
    """A request in one line; clock: the time of day."""
    head = f"{clock} {found['client']} {found['method']} {found['path']} {found['status']}"
    if "n_read" not in found:
        return head
    again = f" ({found['n_reread']} of them again)" if found["n_reread"] else ""
    parts = [
        f"read {found['n_read']} of {found['n_read'] + found['n_cached']}{again}",
        f"generated {found['n_generated']}",
        f"kept {found['n_kept']}",
        f"evicted {found['n_evicted']}",
        f"{found['ms'] / 1000:.1f} s",
    ]
    return f"{head}: {', '.join(parts)}"


def address(line: str) -> str | None:
    """The URL at which the server answers, in the line that says that it does."""
    found = _LISTENING.search(line)
    return found[1] if found else None


@dataclass(frozen=True)
class Bounded:
    """What a server keeps. budget: most tokens of a lane; pool: of all lanes together, 0 where each has a cache of its own."""

    policy: str = "none"
    budget: int = 0
    pool: int = 0


def bounded(line: str) -> Bounded | None:
    """What is kept, in the line that says so."""
    found = _BOUNDED.search(line)
    return Bounded(found[1], int(found[3]), int(found[4] or 0)) if found else None


def warning(line: str) -> str | None:
    """What the user is told of a warning."""
    if (said := error(line) or "").startswith(_NO_DRAFTS):
        return f"no speculative decoding: {said.removeprefix(_NO_DRAFTS)}"
    found = _LOG.match(line)
    told = _TOLD.match(found["text"]) if found and found["level"] == "W" else None
    return told["said"] if told else None


def refusal(line: str) -> str | None:
    """Why the server does not start, in the words that the user is told."""
    found = _LOG.match(line)
    told = _REFUSED.match(found["text"]) if found else None
    return told["said"] if told else None


def error(line: str) -> str | None:
    """The text of an error of the log, without the function that it comes from."""
    found = _LOG.match(line)
    if found is None or found["level"] != "E":
        return None
    return re.sub(r"^(?:(?:srv|cmn|slot|llm|spc)\s+)?\w+: ", "", found["text"]).strip()
