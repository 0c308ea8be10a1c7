"""What llama-server is started with, and where it may listen."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest
from dropin_models import write_hybrid

from equip_cli.core import native
from equip_cli.core.errors import BackendError, EquipError, UsageError
from equip_cli.serving import address, program


def settings(**given: object) -> program.Settings:
    base: dict[str, object] = {
        "model": Path("m.gguf"), "alias": "m", "policy": "streaming", "host": "127.0.0.1", "port": 8080, "n_lanes": 4,
    }  # fmt: skip
    return program.Settings(**{**base, **given})  # type: ignore[arg-type]


def test_keys_are_on_no_command_line() -> None:
    secret = settings(key="open-sesame")
    assert "open-sesame" not in " ".join(program.arguments(secret))
    assert program.environment(secret, {"A": "b"}) == {
        "A": "b",
        "LLAMA_API_KEY": "open-sesame",
        "LLAMA_KV_POLICY": "streaming",
        "EQUIP_REQUEST_LOG": "1",
    }


def test_a_page_of_the_web_has_no_access_to_a_server_without_a_key() -> None:
    without, with_key = program.arguments(settings()), program.arguments(settings(key="k"))
    assert without[without.index("--cors-origins") + 1] == "localhost"
    assert "--cors-origins" not in with_key


def test_options_of_llama_server_come_last_and_win() -> None:
    given = program.arguments(settings(options=["--threads", "2"], rest=["--threads", "1", "--cors-origins", "*"]))
    assert given[-6:] == ["--threads", "2", "--threads", "1", "--cors-origins", "*"]


@pytest.mark.parametrize("word", ["--embedding", "--embeddings", "--rerank", "--reranking"])
def test_lanes_share_a_cache_only_where_no_text_is_written(word: str) -> None:
    assert "--no-kv-unified" in program.arguments(settings())
    pooled = program.arguments(settings(rest=[word, "-kvu"]))
    assert "--kv-unified" in pooled and "--no-kv-unified" not in pooled


def test_lanes_share_a_pool_where_there_can_be_one(tiny_model: Path, tmp_path: Path) -> None:
    plain, hybrid = tiny_model, write_hybrid(tmp_path / "hybrid.gguf", tiny_model)
    assert program.with_pool("streaming", "auto", plain, 4) == "streaming:pool=auto"
    assert program.with_pool("h2o:budget=64", "auto", plain, 4) == "h2o:budget=64,pool=auto"
    assert program.with_pool("h2o:budget=64", 512, hybrid, 4) == "h2o:budget=64,pool=512"  # which the server refuses
    left_alone = [
        ("h2o:pool=99", "auto", plain, 4), ("none", "auto", plain, 4), ("none:cpu_attn=1", "auto", plain, 4), ("h2o", "auto", hybrid, 4),
        ("h2o", "auto", plain, 1), ("h2o", None, plain, 4),
    ]  # fmt: skip
    for text, *given in left_alone:
        assert program.with_pool(text, *given) == text  # type: ignore[arg-type]
    assert "--kv-unified" in program.arguments(settings(policy="h2o:pool=auto"))
    assert "--no-kv-unified" in program.arguments(settings(policy="h2o"))


def test_the_first_request_that_is_shown_is_one_that_the_server_answers() -> None:
    assert program.example(["--temp", "0"])[0] == "/v1/chat/completions"
    assert program.example(["--embeddings"])[0] == "/v1/embeddings"
    assert program.example(["--embeddings", "--rerank"])[0] == "/v1/rerank"


@pytest.mark.parametrize(
    ("variable", "value", "path"),
    [
        ("LLAMA_ARG_EMBEDDINGS", "1", "/v1/embeddings"),
        ("LLAMA_ARG_RERANKING", "on", "/v1/rerank"),
        ("LLAMA_ARG_EMBEDDINGS", "0", "/v1/chat/completions"),
    ],
)
def test_a_variable_of_llama_server_counts_as_its_option(
    monkeypatch: pytest.MonkeyPatch, variable: str, value: str, path: str
) -> None:
    monkeypatch.setenv(variable, value)
    assert program.example([])[0] == path
    is_text = path == "/v1/chat/completions"
    assert ("--kv-unified" in program.arguments(settings(policy="h2o"))) != is_text


@pytest.mark.parametrize(
    ("rest", "is_warned"),
    [(["-md", "x"], True), (["-md", "x", "--spec-type", "ngram-simple"], True), (["-md", "x", "--spec-type", "draft-simple"], False),
     (["--spec-type", "ngram-simple,draft-mtp", "--model-draft", "x"], False), (["--spec-type", "ngram-simple"], False), ([], False)],
)  # fmt: skip
def test_a_draft_model_that_would_draft_nothing_is_warned_of(rest: list[str], is_warned: bool) -> None:
    assert [("--spec-type draft-simple" in each) for each in program.warnings(rest)] == [True] * is_warned


@pytest.mark.parametrize(
    ("word", "instead"),
    [("-m", "give MODEL"), ("--port=1", "give --port"), ("-lv", "give -v"), ("--api-key", "give --api-key"), ("-kvu", "leave it out")],
)  # fmt: skip
def test_what_equip_serve_has_itself_is_refused_behind_the_dashes(word: str, instead: str) -> None:
    with pytest.raises(UsageError, match=instead):
        program.check_rest([word, "x"])


def test_a_missing_program_is_named_with_its_remedy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "library_folder", lambda: tmp_path)
    with pytest.raises(BackendError, match="there is no llama-server.*install"):
        program.find()


@pytest.mark.parametrize(
    ("host", "is_alone"),
    [("127.0.0.1", True), ("127.8.8.8", True), ("::1", True), ("localhost", True), ("0.0.0.0", False), ("::", False),
     ("192.168.1.7", False), ("example.org", False), ("", False)],
)  # fmt: skip
def test_loopback_is_what_this_machine_alone_reaches(host: str, is_alone: bool) -> None:
    assert address.is_loopback(host) == is_alone


def test_a_port_that_is_taken_is_named() -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen(1)
        port = other.getsockname()[1]
        with pytest.raises(EquipError, match=f"port {port} of 127.0.0.1 is taken: .* --port"):
            address.check("127.0.0.1", port)
    address.check("127.0.0.1", port)
    address.check("127.0.0.1", 0)


@pytest.mark.parametrize("host", ["no such host", "999.1.1.1", "\ud800"])
def test_a_host_without_an_address_is_refused(host: str) -> None:
    with pytest.raises(UsageError, match="--host is"):
        address.check(host, 0)


def test_the_page_is_served_unless_another_one_is_asked_for() -> None:
    given = program.arguments(settings(rest=["--path", "mine"]))
    at = given.index("--path")
    assert (Path(given[at + 1]) / "index.html").is_file()
    assert "--ui" in given and given[-2:] == ["--path", "mine"]
