"""Clients of a server that ask at the same time, each with a secret that it may tell to nobody else.

With the standard library alone, for any llama-server: `studies/serve_load.py` uses it too.
"""

from __future__ import annotations

import http.client
import json
import random
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

from dropin_text import Messages, say

HOST = "127.0.0.1"
TIMEOUT = 240  # seconds; on a busy machine a request waits for all others


def ask(port: int, method: str, path: str, body: bytes | None = None, **headers: str) -> tuple[int, bytes]:
    """Status and answer, on a connection of its own. Raises OSError or http.client.HTTPException."""
    connection = http.client.HTTPConnection(HOST, port, timeout=TIMEOUT)
    try:
        connection.request(method, path, body, {"Content-Type": "application/json", **headers})
        answer = connection.getresponse()
        return answer.status, answer.read()
    finally:
        connection.close()


def send(port: int, path: str, body: dict[str, Any]) -> tuple[int, dict[str, Any]]:
    """Status and answer of a request."""
    status, answer = ask(port, "POST", path, json.dumps(body).encode())
    return status, json.loads(answer)


def secret(rng: random.Random) -> str:
    """A word of four syllables that no model writes by itself."""
    return "".join(rng.choice("bdfgklmnprstvz") + rng.choice("aeiou") for _ in range(4))


@dataclass(frozen=True)
class Answer:
    """What became of a request. status: of HTTP; n_prompt: tokens of the prompt; seconds: until its last byte."""

    client: int
    kind: str
    path: str
    body: dict[str, Any]
    status: int
    text: str
    timings: dict[str, Any]
    seconds: float

    @property
    def n_prompt(self) -> int:
        return int(self.timings["cache_n"]) + int(self.timings["prompt_n"])


def _text(path: str, told: dict[str, Any]) -> str:
    """The text of an answer as a whole, or of an event of a stream."""
    if path == "/completion":
        return str(told.get("content") or "")
    if path == "/v1/messages":
        parts = told["content"] if "content" in told else [told.get("delta", {})]
        return "".join(part.get("text", "") for part in parts)
    choice = (told.get("choices") or [{}])[0]
    return str((choice.get("message") or choice.get("delta") or {}).get("content") or "")


@dataclass
class Client:
    """One user: a chat that goes on, and requests beside it.

    A message ends with the secret and a question for it, behind n_words = (fewest, most) words that are not about it.
    """

    port: int
    number: int
    n_words: tuple[int, int]
    n_long: int = 300  # words of the longest prompts
    max_tokens: int = 16
    kinds: Sequence[str] = ("chat", "raw", "chat", "anthropic", "chat", "question", "chat", "long")
    options: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.rng = random.Random(self.number)
        self.secret = secret(self.rng)
        self.messages: Messages = []
        self.n_sent = 0

    def _say(self, n: int) -> str:
        return f"{say(self.rng.randrange(1 << 30), n)}. My secret word is {self.secret}."

    def request(self) -> Answer:
        """Send the next request, and read its answer; every other one is streamed."""
        kind = self.kinds[(self.number + self.n_sent) % len(self.kinds)]
        self.n_sent += 1
        n = self.n_long if kind == "long" else self.rng.randint(*self.n_words)
        asked = f"{self._say(n)} What is my secret word?"
        body: dict[str, Any] = {"temperature": 0, "stream": self.rng.random() < 0.5, **self.options}
        if kind == "raw":
            path = "/completion"
            body |= {"prompt": f"{self._say(n)} I repeat: my secret word is", "n_predict": self.max_tokens}
        else:
            path = "/v1/messages" if kind == "anthropic" else "/v1/chat/completions"
            before = self.messages if kind == "chat" else []
            body |= {"messages": [*before, {"role": "user", "content": asked}], "max_tokens": self.max_tokens}
        begin = time.monotonic()
        status, raw = ask(self.port, "POST", path, json.dumps(body).encode())
        seconds = time.monotonic() - begin
        events = (
            [json.loads(raw)]
            if not body["stream"] or status != 200
            else [json.loads(line[6:]) for line in raw.splitlines() if line.startswith(b"data: {")]
        )
        text = "".join(_text(path, event) for event in events)
        timings: dict[str, Any] = next((event["timings"] for event in reversed(events) if "timings" in event), {})
        if kind == "chat" and status == 200:
            self.messages = [*body["messages"], {"role": "assistant", "content": text}]
        return Answer(self.number, kind, path, body, status, text, timings, seconds)


def run(clients: Sequence[Client], n_requests: int) -> list[Answer]:
    """All clients at the same time, a thread for each. Raises the first error of one of them."""
    found: list[Answer] = []

    def all_of(client: Client) -> Callable[[], None]:
        return lambda: found.extend(client.request() for _ in range(n_requests))

    together([all_of(client) for client in clients])
    return found


def run_for(clients: Sequence[Client], seconds: float) -> list[Answer]:
    """All clients at the same time, each until so many seconds are over. Raises the first error of one of them."""
    found: list[Answer] = []
    end = time.monotonic() + seconds

    def all_of(client: Client) -> Callable[[], None]:
        def work() -> None:
            while time.monotonic() < end:
                found.append(client.request())

        return work

    together([all_of(client) for client in clients])
    return found


def together(work: Sequence[Callable[[], None]]) -> None:
    """A thread for each, until all have ended. Raises the first error of one of them."""
    with ThreadPoolExecutor(len(work)) as pool:
        for done in [pool.submit(each) for each in work]:
            done.result()
