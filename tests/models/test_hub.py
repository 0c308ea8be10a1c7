"""Models by name: what is fetched from a hub on 127.0.0.1, what is on the disk, and what is said when it goes wrong."""

from __future__ import annotations

import hashlib
import json
import os
import re
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from hub_server import COMMIT, HubServer
from hub_support import CHUNK, LARGE, LIST, POSIX, Equip, Several, blobs, fetched, files, interrupt, sentence

from equip_cli.core.errors import EquipError, ModelFileError
from equip_cli.models import hub as names
from equip_cli.models import model_list

pytest_plugins = ("hub_fixtures",)

# ---- fetching


def test_an_alias_fetches_its_file(equip: Equip, hub: HubServer, home: Path, tiny_model: Path) -> None:
    result = equip("pull", "TINY")
    path = fetched(result)
    assert path.name == "tiny-Q8_0.gguf" and path.read_bytes() == tiny_model.read_bytes()
    assert path.is_relative_to(home) and COMMIT in path.parts
    assert result.stderr == f"fetching own/tiny-GGUF/tiny-Q8_0.gguf, {tiny_model.stat().st_size / 1e9:.2f} GB\n"
    assert (home / "hub" / "models--own--tiny-GGUF" / "refs" / "main").read_text() == COMMIT
    assert [b.name for b in blobs(home)] == [hashlib.sha256(tiny_model.read_bytes()).hexdigest()]


def test_a_second_pull_asks_nobody(equip: Equip, hub: HubServer) -> None:
    first = fetched(equip("pull", "tiny"))
    hub.requests.clear()
    again = equip("pull", "tiny")
    assert fetched(again) == first and again.stderr == "tiny is on this disk already\n"
    assert hub.requests == []


def test_the_cache_is_one_that_huggingface_hub_reads(equip: Equip, hub_environment: dict[str, str]) -> None:
    path = fetched(equip("pull", "tiny"))
    code = "import huggingface_hub as h; print(h.hf_hub_download('own/tiny-GGUF', 'tiny-Q8_0.gguf'))"
    offline = subprocess.run(
        [sys.executable, "-c", code], env=hub_environment | {"HF_HUB_OFFLINE": "1"}, capture_output=True, text=True
    )
    assert offline.stdout.strip() == str(path), offline.stderr


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("own/many-GGUF", b"q4_k_m"),  # the default, whatever its case
        ("own/many-GGUF:q4_k_m", b"q4_k_m"),
        ("own/many-GGUF:Q4_0", b"q4_0"),  # not IQ4_0
        ("own/many-GGUF:iq4_0", b"iq4_0"),
        ("own/many-GGUF:UD-Q4_K_XL", b"q4_k_xl"),
        ("own/many-GGUF:Q4_K_XL", b"q4_k_xl"),
        ("own/many-GGUF:BF16", b"bf16, 1"),
        ("own/first-GGUF", b"iq2_m"),  # no default quant: the first of the hub's listing
        ("own/tiny-GGUF", b"GGUF"),  # Q8_0 comes before the first
    ],
)
def test_a_repository_and_a_quant_fetch_their_file(several: Several, name: str, content: bytes) -> None:
    first, again = map(fetched, several(f"pull {name}", f"pull {name}"))
    assert first == again and first.read_bytes().startswith(content)


def test_a_split_model_is_fetched_whole(equip: Equip, home: Path) -> None:
    for name, stem in (("two-parts", "s-Q4_K_M"), ("own/many-GGUF:bf16", "many-BF16")):
        path = fetched(equip("pull", name))
        assert path.name == f"{stem}-00001-of-00002.gguf"
        second = path.with_name(f"{stem}-00002-of-00002.gguf")
        assert second.read_bytes().endswith(b"2")
        second.unlink()
        # one part is no model
        assert "equip pull" in sentence(equip("info", name))
        assert fetched(equip("pull", name)) == path and second.is_file()


def test_several_names_are_fetched_together_or_not_at_all(equip: Equip, hub: HubServer) -> None:
    result = equip("pull", "tiny", "own/first-GGUF")
    assert result.returncode == 0
    assert [Path(line).name for line in result.stdout.splitlines()] == ["tiny-Q8_0.gguf", "b-IQ2_M.gguf"]
    hub.requests.clear()
    assert "no model nothing" in sentence(equip("pull", "large", "nothing"))
    assert hub.requests == []  # said before anything is fetched


def test_a_small_file_needs_no_sha256(equip: Equip, hub: HubServer, home: Path) -> None:
    hub.small.add("tiny-Q8_0.gguf")
    path = fetched(equip("pull", "tiny"))
    assert path.read_bytes() == hub.repos["own/tiny-GGUF"]["tiny-Q8_0.gguf"]


def test_xet_storage_is_not_needed(equip: Equip, hub: HubServer) -> None:
    # it would not resume; whether hf_xet is installed makes no difference
    hub.xet = True
    assert fetched(equip("pull", "large", env={"HF_HUB_DISABLE_XET": "0"})).read_bytes() == LARGE
    assert len(hub.transfers()) == 1


def test_a_token_goes_to_the_hub_alone(equip: Equip, hub: HubServer) -> None:
    hub.refuse["own/tiny-GGUF"], hub.accept_token = (403, "GatedRepo"), "hf_secret"
    fetched(equip("pull", "own/tiny-GGUF", env={"HF_TOKEN": "hf_secret"}))
    assert len(hub.transfers()) == 1
    assert {r.authorization for r in hub.requests if not r.storage} == {"Bearer hf_secret"}
    assert {r.authorization for r in hub.requests if r.storage} == {None}


# ---- interruptions


def test_a_cut_transfer_is_resumed(equip: Equip, hub: HubServer) -> None:
    hub.cut_at = [CHUNK + 1000]
    result = equip("pull", "large")
    assert fetched(result).read_bytes() == LARGE
    assert re.fullmatch("fetching .*\n", result.stderr)  # huggingface_hub's warning is not the user's
    assert [request.range for request in hub.transfers()] == [None, f"bytes={CHUNK}-"]


def interrupted(hub_environment: dict[str, str], hub: HubServer, home: Path) -> Path:
    """A pull that was stopped by Ctrl-C when one chunk was there; returns the partial file."""
    hub.stall_at = CHUNK + 1000
    interrupt("large", hub_environment, hub, lambda: any(b.stat().st_size >= CHUNK for b in blobs(home)))
    [partial] = blobs(home)
    assert partial.name.endswith(".incomplete") and files(home) == set()
    return partial


@POSIX
def test_an_interrupt_keeps_what_has_arrived(
    equip: Equip, hub_environment: dict[str, str], hub: HubServer, home: Path
) -> None:
    partial = interrupted(hub_environment, hub, home)
    assert partial.stat().st_size == CHUNK
    assert "equip pull large" in sentence(equip("info", "large"))  # half a model is none
    assert fetched(equip("pull", "large")).read_bytes() == LARGE
    assert hub.transfers()[-1].range == f"bytes={CHUNK}-"
    assert not partial.exists()


@POSIX
def test_a_server_without_ranges_sends_it_all_again(
    equip: Equip, hub_environment: dict[str, str], hub: HubServer, home: Path
) -> None:
    interrupted(hub_environment, hub, home)
    hub.ignore_range = True
    assert fetched(equip("pull", "large")).read_bytes() == LARGE


@pytest.mark.parametrize("size", [1000, len(LARGE), len(LARGE) + 1])
def test_a_foreign_partial_file_is_not_believed(equip: Equip, hub: HubServer, home: Path, size: int) -> None:
    partial = home / "hub" / "models--own--large-GGUF" / "blobs" / f"{hashlib.sha256(LARGE).hexdigest()}.incomplete"
    partial.parent.mkdir(parents=True)
    partial.write_bytes(bytes(size))
    if size <= len(LARGE):
        assert "damaged" in sentence(equip("pull", "large"))
        assert blobs(home) == [] and files(home) == set()
    assert fetched(equip("pull", "large")).read_bytes() == LARGE


def test_a_second_process_is_told(equip: Equip, home: Path) -> None:
    from filelock import FileLock

    lock = home / "hub" / ".locks" / "models--own--large-GGUF" / f"{hashlib.sha256(LARGE).hexdigest()}.lock"
    lock.parent.mkdir(parents=True)
    with FileLock(lock):
        assert "another process" in sentence(equip("pull", "large"))
    fetched(equip("pull", "large"))


# ---- what arrives is not what the hub names


def test_damaged_content_is_not_kept(equip: Equip, hub: HubServer, home: Path) -> None:
    hub.damage = True
    said = sentence(equip("pull", "tiny"))
    assert "tiny-Q8_0.gguf arrived damaged" in said and "sha256" in said and "run the command again" in said
    assert blobs(home) == [] and files(home) == set()
    hub.damage = False
    assert fetched(equip("pull", "tiny")).is_file()


@pytest.mark.parametrize("n_bytes", [-1, 1])
def test_a_wrong_size_is_not_kept(equip: Equip, hub: HubServer, home: Path, n_bytes: int) -> None:
    hub.append = n_bytes
    said = sentence(equip("pull", "tiny"))
    assert "arrived damaged" in said and "bytes" in said and "run the command again" in said
    assert blobs(home) == [] and files(home) == set()
    hub.append = 0
    assert fetched(equip("pull", "tiny")).is_file()


def test_a_wrong_size_of_a_small_file_is_not_kept(equip: Equip, hub: HubServer, home: Path) -> None:
    hub.small.add("tiny-Q8_0.gguf")
    hub.append = 1
    assert "tiny-Q8_0.gguf arrived damaged" in sentence(equip("pull", "tiny"))
    assert files(home) == set()


def test_a_file_too_large_for_plain_http_names_the_package(equip: Equip, hub: HubServer, home: Path) -> None:
    code = "import huggingface_hub.constants as c; c.MAX_HTTP_DOWNLOAD_SIZE = 1000"
    said = sentence(equip("pull", "tiny", code=code, env={"HF_HUB_DISABLE_XET": "1"}))
    assert "pip install hf_xet" in said
    # what stands in for hf_xet: the library fetches, and the result is compared all the same
    code += """
import huggingface_hub.file_download as f
def get(*args, f=f, get=f.http_get, **options):
    c.MAX_HTTP_DOWNLOAD_SIZE = 10**12
    return get(*args, **options)
f.http_get = get
"""
    hub.damage = True
    assert "sha256" in sentence(equip("pull", "tiny", code=code))
    assert blobs(home) == [] and files(home) == set()
    hub.damage = False
    fetched(equip("pull", "tiny", code=code))


# ---- refusals


@pytest.mark.parametrize(
    ("status", "code", "env", "words"),
    [
        (
            401,
            "GatedRepo",
            {},
            "HTTP 401, gated.*accept the licence on .*/own/tiny-GGUF and set HF_TOKEN.*equip models",
        ),
        (403, "GatedRepo", {"HF_TOKEN": "hf_x"}, "HTTP 403, gated.*accept the licence.*HF_TOKEN.*equip models"),
        (401, "", {}, "HTTP 401.*HF_TOKEN"),
        (403, "", {}, "HTTP 403.*HF_TOKEN"),
        (401, "Invalid credentials in Authorization header", {"HF_TOKEN": "hf_x"}, "does not accept the token.*unset"),
        (401, "RepoNotFound", {}, "no repository own/tiny-GGUF: check the name.*private"),
        (404, "RepoNotFound", {}, "no repository own/tiny-GGUF: check the name"),
        (404, "RevisionNotFound", {}, "HTTP 404"),
        (418, "", {}, "HTTP 418"),
    ],
)
def test_a_refusal_of_the_hub_says_what_to_do(
    several: Several, hub: HubServer, home: Path, status: int, code: str, env: dict[str, str], words: str
) -> None:
    hub.refuse["own/tiny-GGUF"] = (status, code)
    for result in several("pull tiny", "pull own/tiny-GGUF", "pull own/tiny-GGUF:Q8_0", env=env):
        assert re.search(words, sentence(result))
    assert files(home) == set()


def test_a_missing_repository_file_or_quant_is_named(several: Several, home: Path) -> None:
    wanted = {
        "lost": ["no repository own/lost-GGUF"],
        "stale": ["own/tiny-GGUF has no file renamed-Q8_0.gguf", "equip pull own/tiny-GGUF"],
        "own/many-GGUF:Q3_K_S": ["no quant Q3_K_S: choose one of BF16, IQ4_0, Q4_0, UD-Q4_K_XL, Q4_K_M"],
        "own/no-GGUF": ["no GGUF model"],
        "own/a--b": ["cannot be a repository's name"],
    }
    results = several(*(f"pull {name}" for name in wanted))
    for result, words in zip(results, wanted.values(), strict=True):
        assert all(word in sentence(result) for word in words)
    assert files(home) == set()


def test_a_missing_part_is_named_and_nothing_kept(equip: Equip, hub: HubServer, home: Path) -> None:
    del hub.repos["own/split-GGUF"]["s-Q4_K_M-00002-of-00002.gguf"]
    assert "has no file s-Q4_K_M-00002-of-00002.gguf" in sentence(equip("pull", "two-parts"))
    assert blobs(home) == []


@pytest.mark.parametrize("status", [500, 503])
def test_a_server_error_says_to_try_later(several: Several, hub: HubServer, status: int) -> None:
    hub.status = status
    for result in several("pull tiny", "pull own/tiny-GGUF"):
        assert f"HTTP {status}): run the command again later" in sentence(result)


def test_a_hub_that_does_not_answer_is_named(equip: Equip, several: Several, hub: HubServer) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # nobody listens there
        env = {"HF_ENDPOINT": f"http://127.0.0.1:{taken.getsockname()[1]}"}
        for result in several("pull tiny", "pull own/tiny-GGUF", env=env):
            assert "cannot be reached" in sentence(result)
    said = sentence(equip("pull", "tiny", env={"HTTP_PROXY": "http://me:secret@127.0.0.1:9"}))
    assert "the proxy http://***@127.0.0.1:9 cannot be used" in said and "unset HTTP_PROXY" in said
    hub.mute = True
    assert "does not answer in time" in sentence(equip("pull", "tiny", env={"HF_HUB_ETAG_TIMEOUT": "1"}))


def test_another_server_in_the_hubs_place_is_named(several: Several, hub: HubServer) -> None:
    hub.no_headers = True
    for result in several("pull tiny", "pull own/tiny-GGUF"):
        assert "check HF_ENDPOINT" in sentence(result)


def test_the_offline_switch_asks_nobody(equip: Equip, several: Several, hub: HubServer) -> None:
    env = {"HF_HUB_OFFLINE": "1"}
    for result in several("pull tiny", "pull own/tiny-GGUF", env=env):
        said = sentence(result)
        assert "HF_HUB_OFFLINE" in said and result.args[1] in said
    path = fetched(equip("pull", "tiny"))
    hub.requests.clear()
    assert {fetched(result) for result in several("pull tiny", "pull own/tiny-GGUF:q8_0", env=env)} == {path}
    assert hub.requests == []


# ---- the disk


def test_too_little_space_is_said_first(equip: Equip, hub: HubServer) -> None:
    n_free = len(LARGE) - 1
    code = f"import shutil, types; shutil.disk_usage = lambda path: types.SimpleNamespace(free={n_free})"
    said = sentence(equip("pull", "large", code=code))
    assert "0.02 GB" in said and "HF_HOME" in said
    assert hub.transfers() == []
    fetched(equip("pull", "tiny", code=code))


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="/dev/full, a disk that is full")
def test_a_disk_that_fills_up_is_named_and_nothing_kept(equip: Equip, hub: HubServer, home: Path) -> None:
    blob = home / "hub" / "models--own--large-GGUF" / "blobs" / hashlib.sha256(LARGE).hexdigest()
    blob.parent.mkdir(parents=True)
    Path(f"{blob}.incomplete").symlink_to("/dev/full")
    said = sentence(equip("pull", "large"))
    assert "is full" in said and "HF_HOME" in said
    assert not blob.exists() and files(home) == set()


@POSIX
def test_a_cache_that_cannot_be_written_is_named(equip: Equip, home: Path) -> None:
    home.write_text("a file where a folder should be")
    said = sentence(equip("pull", "tiny"))
    assert f"{home} is a file where a folder is needed: remove it, or set HF_HOME" in said


# ---- models and names


def test_models_marks_what_is_on_disk(equip: Equip, hub: HubServer) -> None:
    def marks() -> dict[str, str]:
        result = equip("models")
        assert result.returncode == 0 and "equip pull NAME" in result.stderr
        rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in result.stdout.splitlines()]
        assert rows[0] == ["name", "file", "arch", "modes", "note", "on disk"]
        assert ["tiny", "0.01 GB", "llama", "not checked", "Test, 256"] in [row[:5] for row in rows]
        return {row[0]: row[5] for row in rows[2:]}

    assert marks() == dict.fromkeys(["tiny", "large", "two-parts", "stale", "lost"], "")
    assert hub.requests == []
    fetched(equip("pull", "tiny"))
    assert {name for name, mark in marks().items() if mark == "yes"} == {"tiny"}


def test_models_as_json_is_a_record_per_row(equip: Equip) -> None:
    path = fetched(equip("pull", "tiny"))
    result = equip("models", "--json")
    assert (result.returncode, result.stderr) == (0, "")
    records = json.loads(result.stdout)
    assert records[0] == {
        "name": "tiny", "repo": "own/tiny-GGUF", "file": "tiny-Q8_0.gguf", "arch": "llama", "size_gb": 0.01,
        "note": "Test, 256", "modes": "not checked", "path": str(path),
    }  # fmt: skip
    assert [record["path"] for record in records[1:]] == [None] * 4


def test_a_fetched_model_works_by_name(several: Several, tiny_model: Path) -> None:
    known = ("tiny", "own/tiny-GGUF", "own/tiny-GGUF:q8_0")
    *before, pulled = several(*(f"info {name}" for name in known), "pull tiny")
    assert [sentence(r) for r in before] == [f"{name} is not on this disk: run: equip pull {name}" for name in known]
    fetched(pulled)
    *after, other = several(*(f"info {name} --json" for name in known), "info own/tiny-GGUF:Q4_0")
    for result in after:
        assert result.returncode == 0, result.stderr
        assert json.loads(result.stdout)["model"]["file_bytes"] == tiny_model.stat().st_size
    assert "equip pull own/tiny-GGUF:Q4_0" in sentence(other)


def test_an_unknown_name_gets_a_near_one(several: Several) -> None:
    close, far, path, file = map(sentence, several("info tinny", "info zzzz", "info ./tiny", "info tiny.gguf"))
    assert "no file and no model tinny" in close and "did you mean tiny?" in close and "equip models" in close
    assert "did you mean" not in far and "equip models" in far
    assert "there is no file" in path and "there is no file" in file


def test_a_path_wins_over_a_name(tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from equip_cli.commands.setup.loading import model_path

    monkeypatch.chdir(tiny_model.parent)
    (tiny_model.parent / "qwen3-4b").write_bytes(b"")
    assert model_path("qwen3-4b") == Path("qwen3-4b")


def test_a_newer_commit_of_another_file_hides_nothing(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(names, "_cache_folder", lambda: home / "hub")
    folder = home / "hub" / "models--a--b"
    for i, file in ((1, "x-Q8_0.gguf"), (2, "x-Q4_0.gguf"), (3, "x-Q4_0.gguf"), (4, "x-F32.gguf"), (5, "x-F32.gguf")):
        snapshot = folder / "snapshots" / (str(i) * 40)
        snapshot.mkdir(parents=True)
        (snapshot / file).write_bytes(b"")
        (snapshot / "x-F16.gguf").symlink_to("missing")
        os.utime(snapshot, (i, i))
    (folder / "refs").mkdir()
    (folder / "refs" / "main").write_text("2" * 40)

    def at(name: str) -> str | None:
        path = names.on_disk(model_list.find(name))
        return f"{path.parent.name[0]} {path.name}" if path else None

    assert at("a/b:Q8_0") == "1 x-Q8_0.gguf"
    assert at("a/b:Q4_0") == "2 x-Q4_0.gguf"
    assert at("a/b:F32") == "5 x-F32.gguf"
    assert at("a/b:F16") is None


# ---- the list


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("a  own/a  a.gguf  llama  1.0  note", "it has 6 columns"),
        ("a  own/a  a.gguf  llama  1.0  note  modes  more", "it has 8 columns"),
        ("a/b  own/a  a.gguf  llama  1.0  note  modes", "a/b is no alias"),
        ("a  own  a.gguf  llama  1.0  note  modes", "own is no repository"),
        ("a  own/a:Q4_0  a.gguf  llama  1.0  note  modes", "own/a:Q4_0 is no repository"),
        ("a  own/a  a.bin  llama  1.0  note  modes", "a.bin is no GGUF file"),
        ("a  own/a  a.gguf  llama  big  note  modes", "big is no size"),
        ("a  own/a  a.gguf  llama  0.0  note  modes", "0.0 is no size"),
        ("TINY  own/a  a.gguf  llama  1.0  note  modes", "TINY is there already"),
    ],
)
def test_a_malformed_list_is_named_with_its_line(
    home: Path, monkeypatch: pytest.MonkeyPatch, line: str, words: str
) -> None:
    file = home.with_name("models.txt")
    file.write_text(LIST + line + "\n", encoding="utf-8")
    monkeypatch.setenv("EQUIP_MODELS_FILE", str(file))
    with pytest.raises(EquipError, match=f"line {len(LIST.splitlines()) + 1}: {re.escape(words)}.*: correct"):
        model_list.rows()
    assert model_list.find("own/other").repo == "own/other"  # needs no list


def test_a_missing_list_names_the_variable(equip: Equip) -> None:
    assert "EQUIP_MODELS_FILE" in sentence(equip("models", env={"EQUIP_MODELS_FILE": "/nowhere/models.txt"}))


def test_the_shipped_list_is_complete(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("EQUIP_MODELS_FILE", raising=False)
    rows = model_list.rows()
    assert 8 <= len(rows) <= 24
    families = {re.match(r"[\w\-]+", row.note)[0] for row in rows}  # type: ignore[index]
    assert families >= {"Llama", "Qwen", "Gemma", "Ministral", "SmolLM", "Granite", "LFM", "gpt-oss"}
    assert len({row.name.lower() for row in rows}) == len(rows) == len({(row.repo, row.file) for row in rows})
    for row in rows:
        assert re.fullmatch(r"[a-z0-9.\-]+", row.name)
        assert re.search(r"[-.](q4_k_m|q4_1|mxfp4)\.gguf$", row.file, re.IGNORECASE)
        assert re.fullmatch(r"[\w\- ]+[\d.]*, \d+", row.note)
        assert 0.05 < row.size_gb < 15
        assert model_list.find(row.name.upper()) == row
    with pytest.raises(ModelFileError, match="did you mean qwen3-4b"):
        model_list.find("qwen3-4")
