"""What `equip serve` makes of llama-server's log."""

from __future__ import annotations

import json
from typing import Any

import pytest

from equip_cli.serving import request_log

ANSWERED = {
    "method": "POST", "path": "/v1/messages", "client": "10.0.0.7", "status": 200, "n_read": 30, "n_cached": 70,
    "n_reread": 0, "n_generated": 12, "n_kept": 256, "n_evicted": 900, "ms": 1250.0,
}  # fmt: skip


def line(found: dict[str, Any]) -> str:
    return f"equip-request {json.dumps(found)}"


def test_a_request_is_one_sentence() -> None:
    found = request_log.request(line(ANSWERED))
    assert found == ANSWERED
    assert request_log.sentence(found, "09:00:01") == (
        "09:00:01 10.0.0.7 POST /v1/messages 200: read 30 of 100, generated 12, kept 256, evicted 900, 1.2 s"
    )
    again = request_log.sentence({**ANSWERED, "n_reread": 8}, "09:00:01")
    assert "read 30 of 100 (8 of them again)," in again


def test_a_request_that_no_model_answered_has_its_status() -> None:
    found = {"method": "GET", "path": "/nowhere", "client": "::1", "status": 404}
    assert request_log.sentence(found, "09:00:01") == "09:00:01 ::1 GET /nowhere 404"


@pytest.mark.parametrize("text", ["equip-request {", "equip-request 7", "equip request {}", "", " equip-request {}"])
def test_what_is_no_request_is_none(text: str) -> None:
    assert request_log.request(text) is None


def test_what_the_server_says_of_itself_is_found() -> None:
    assert request_log.address("0.04.853.315 I srv  llama_server: listening on http://[::1]:80") == "http://[::1]:80"
    assert request_log.address("0.04.853.313 I srv  llama_server: model loaded") is None
    bounded = (
        "0.00.071.188 W attach: KV cache bounded: policy h2o, scope head, budget 128 tokens, sinks 4, positions auto"
    )
    assert request_log.bounded(bounded) == request_log.Bounded("h2o", 128)
    pool = bounded.replace("128 tokens", "128 tokens, a pool of 512")
    assert request_log.bounded(pool) == request_log.Bounded("h2o", 128, 512)
    assert (
        request_log.error("0.00.028.183 E srv    load_model: failed to load model, 'x'") == "failed to load model, 'x'"
    )
    assert request_log.error("0.00.028.183 E llama_load: no: such: file") == "no: such: file"
    assert request_log.error("0.00.028.183 W srv    load_model: slow") is None
    draft = "0.00.1.2 W server_can_draft: no speculative decoding: a draft may have 48 tokens"
    assert request_log.warning(draft) == "no speculative decoding: a draft may have 48 tokens"
    assert request_log.warning(bounded) is None
    other = "0.00.1.2 E srv    load_model: failed to initialize speculative decoding context: other words"
    assert request_log.warning(other) == "no speculative decoding: other words"
    assert request_log.refusal("0.00.1.2 E server_can_start: no head") == "no head"
    assert request_log.refusal(other) is None


def test_what_the_page_asks_by_itself_has_no_line() -> None:
    asked = {"method": "POST", "path": "/tokenize", "client": "127.0.0.1", "status": 200}
    assert request_log.is_aside(asked)
    assert not request_log.is_aside({**asked, "status": 401})
    assert not request_log.is_aside({**asked, "path": "/v1/chat/completions"})
