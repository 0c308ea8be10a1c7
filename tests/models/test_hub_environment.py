"""Mistakes of the environment that `equip pull` meets: each is one sentence that names the variable or the place."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from pathlib import Path

import pytest
from hub_server import HubServer
from hub_support import LARGE, POSIX, Equip, Several, fetched, files, sentence
from index_server import CERTIFICATE, speak_tls

from equip_cli.commands.setup import loading
from equip_cli.core.errors import DownloadError, ModelFileError
from equip_cli.models import environment, hub_errors

pytest_plugins = ("hub_fixtures",)

Said = Callable[[], str]


@pytest.fixture
def said(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Said:
    """What is found wrong with the variables that a test sets; "" if nothing is."""
    for name in list(os.environ):
        if name.lower().endswith("_proxy") or name.startswith(("HF_", "HUGGING", "SSL_CERT")):
            monkeypatch.delenv(name)
    settings = hub_errors.constants()
    monkeypatch.setattr(settings, "HF_TOKEN_PATH", str(tmp_path / "no-token"))

    def say() -> str:
        try:
            hub_errors.check_environment(tmp_path)
        except DownloadError as error:
            return str(error)
        return ""

    return say


# ---- proxies


@pytest.mark.parametrize(
    ("value", "words"),
    [
        ("http://", "names no host"),
        ("http://:3128", "names no host"),
        ("host:port", "is no address, or its port is no number"),
        ("http://host:99999", "is no address, or its port is no number"),
        ("http://host:0", "has port 0"),
        ("http://[::1", "is no address"),
        ("http:/host", "is no address"),
        ("http//host", "is no address"),
        ("ftp://host", "does not begin with http:// or https:// or socks5"),
        ("socks4://host", "does not begin with"),
        ("http://ho st", "has a blank or a line break in it"),
        ("http://host\n", "has a blank or a line break in it"),
        ("“http://host”", "has the character “ in it"),
        ("'http://host'", "has quotes in it"),
    ],
)
@pytest.mark.parametrize("variable", ["HTTPS_PROXY", "http_proxy", "ALL_PROXY"])
def test_a_malformed_proxy_is_named(
    monkeypatch: pytest.MonkeyPatch, said: Said, variable: str, value: str, words: str
) -> None:
    monkeypatch.setenv(variable, value)
    assert said().startswith(f"{variable} is ")
    assert words in said() and "write it as http://host:port" in said()


@pytest.mark.parametrize("value", ["foo", "foo:3128", "http://me:word@foo:3128/", "https://foo", "HTTP://FOO"])
def test_a_well_formed_proxy_is_taken(monkeypatch: pytest.MonkeyPatch, said: Said, value: str) -> None:
    monkeypatch.setenv("HTTPS_PROXY", value)
    assert said() == ""


def test_the_password_of_a_proxy_is_not_shown(monkeypatch: pytest.MonkeyPatch, said: Said) -> None:
    monkeypatch.setenv("ALL_PROXY", "http://me:secret@host:x")
    assert "http://***@host:x" in said() and "secret" not in said()


def test_proxies_that_no_proxy_rules_out_are_not_judged(monkeypatch: pytest.MonkeyPatch, said: Said) -> None:
    monkeypatch.setenv("HTTPS_PROXY", "http://")
    monkeypatch.setenv("NO_PROXY", "host, *")
    assert said() == ""


def test_a_socks_proxy_names_the_package(equip: Equip, hub: HubServer) -> None:
    code = "import sys; sys.modules['socksio'] = None"
    message = sentence(equip("pull", "tiny", code=code, env={"ALL_PROXY": "socks5://me:secret@127.0.0.1:9"}))
    assert "ALL_PROXY is socks5://***@127.0.0.1:9, a SOCKS proxy" in message
    assert "pip install socksio, or unset ALL_PROXY" in message
    assert hub.requests == []


def test_a_proxy_that_does_not_exist_is_named(equip: Equip, hub_environment: dict[str, str]) -> None:
    message = sentence(equip("pull", "tiny", env={"HTTP_PROXY": "nowhere.invalid"}))
    assert "the proxy http://nowhere.invalid cannot be used" in message and "unset HTTP_PROXY" in message


def test_a_proxy_that_wants_a_password_says_where_it_goes(equip: Equip, hub: HubServer) -> None:
    proxy = HubServer(status=407)
    try:
        message = sentence(equip("pull", "tiny", env={"http_proxy": proxy.url}))
    finally:
        proxy.close()
    assert "wants a user name and password" in message and "into http_proxy as http://user:password@host" in message


def test_odd_exceptions_from_the_proxy_are_no_failure(equip: Equip, home: Path) -> None:
    odd = ",, ,host:port,http://,://,[::1],[,*.,::1/200,ü,a b,127.0.0.1"
    fetched(equip("pull", "tiny", env={"HTTP_PROXY": "http://127.0.0.1:9", "NO_PROXY": odd}))


def test_connections_that_cannot_be_prepared_are_one_sentence(monkeypatch: pytest.MonkeyPatch, said: Said) -> None:
    # an older HTTP library refuses an entry of NO_PROXY that it cannot parse
    def refuse() -> None:
        raise ValueError("Invalid port: 'x'")

    monkeypatch.setattr(hub_errors.library().utils, "get_session", refuse)
    assert "no connection can be prepared (Invalid port: 'x'): check NO_PROXY" in said()


# ---- tokens


@pytest.mark.parametrize(
    ("token", "words"),
    [
        ("“hf_abc”", "it has the character “ in it"),
        ("hf_äbc", "it has the character ä in it"),
        ("hf_abc\ndef", "it has a blank or a line break in it"),
        ("hf_abc def", "it has a blank or a line break in it"),
        ("Bearer hf_abc", "it has a blank or a line break in it"),
        ('"hf_abc"', 'it has the character " in it'),
    ],
)
def test_a_token_that_is_none_is_named(
    monkeypatch: pytest.MonkeyPatch, said: Said, tmp_path: Path, token: str, words: str
) -> None:
    for variable in ("HUGGING_FACE_HUB_TOKEN", "HF_TOKEN"):
        monkeypatch.setenv(variable, token)
        assert said() == f"{variable} is no token ({words}): copy it once more, or unset {variable}"
    for variable in ("HUGGING_FACE_HUB_TOKEN", "HF_TOKEN"):
        monkeypatch.delenv(variable)
    (tmp_path / "no-token").write_text(token, encoding="utf-8")
    assert f"{tmp_path / 'no-token'} holds no token ({words})" in said() and "hf auth login" in said()


@pytest.mark.parametrize("token", ["", "hf_abc", " hf_abc\r\n", "eyJ.a-b_c~d+e/f=="])
def test_a_token_that_is_one_is_taken(monkeypatch: pytest.MonkeyPatch, said: Said, tmp_path: Path, token: str) -> None:
    (tmp_path / "no-token").write_text(token)
    assert said() == ""
    monkeypatch.setenv("HF_TOKEN", token)
    assert said() == ""


@POSIX
def test_a_token_file_that_cannot_be_read_is_named(monkeypatch: pytest.MonkeyPatch, said: Said, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    places = {
        tmp_path: "cannot be read",
        Path("/dev/zero"): "is no file with a token",
        tmp_path / "file" / "x": "cannot be read",
    }
    for path, words in places.items():
        monkeypatch.setenv("HF_TOKEN_PATH", str(path))
        monkeypatch.setattr(hub_errors.constants(), "HF_TOKEN_PATH", str(path))
        assert str(path) in said() and words in said() and "HF_TOKEN_PATH" in said()
    monkeypatch.setattr(hub_errors.constants(), "HF_TOKEN_PATH", os.devnull)
    assert said() == ""


def test_a_token_is_blamed_and_not_the_hub(equip: Equip, hub: HubServer) -> None:
    message = sentence(equip("pull", "tiny", env={"HF_TOKEN": "“hf_abc”"}))
    assert "HF_TOKEN is no token" in message and "abc" not in message
    assert hub.requests == []


# ---- certificates


@pytest.mark.parametrize("kind", ["nothing", "folder", "text", "device"])
def test_certificates_that_are_none_are_named(equip: Equip, tmp_path: Path, kind: str) -> None:
    (tmp_path / "text").write_text("no certificate")
    path = {"folder": tmp_path, "device": Path("/dev/zero")}.get(kind, tmp_path / kind)
    words = {"nothing": "does not exist", "text": "holds no certificate"}.get(kind, "is no file")
    message = sentence(equip("pull", "tiny", env={"SSL_CERT_FILE": str(path)}))
    assert f"SSL_CERT_FILE is {path}, which {words}" in message and "unset SSL_CERT_FILE" in message


def test_a_folder_of_certificates_that_is_none_is_named(
    monkeypatch: pytest.MonkeyPatch, said: Said, tmp_path: Path
) -> None:
    monkeypatch.setenv("SSL_CERT_DIR", str(tmp_path / "nothing"))
    assert "SSL_CERT_DIR is" in said() and "is no folder" in said()
    monkeypatch.setenv("SSL_CERT_DIR", f"{tmp_path / 'nothing'}{os.pathsep}{tmp_path}")
    assert said() == ""
    monkeypatch.setenv("SSL_CERT_DIR", str(tmp_path / "nothing"))
    monkeypatch.setenv("SSL_CERT_FILE", str(CERTIFICATE))  # which is read in its place
    assert said() == ""


def test_a_certificate_that_nobody_vouches_for_is_refused(equip: Equip, several: Several, hub: HubServer) -> None:
    plain = hub.url
    speak_tls(hub)
    message = sentence(equip("pull", "tiny", env={"HF_ENDPOINT": hub.url}))
    assert f"the certificate of {hub.url} cannot be verified (self" in message
    assert "check the clock" in message and "set SSL_CERT_FILE" in message
    message = sentence(equip("pull", "tiny", env={"HF_ENDPOINT": plain}))
    assert plain in message


def test_tls_where_none_is_spoken_is_named(equip: Equip, hub: HubServer) -> None:
    url = hub.url.replace("http://", "https://")
    message = sentence(equip("pull", "tiny", env={"HF_ENDPOINT": url}))
    assert f"{url} does not speak TLS" in message and "http://" in message


# ---- the hub's address


@pytest.mark.parametrize(
    ("value", "words"),
    [
        ("", "is empty"),
        ("nonsense", "does not begin with http:// or https://"),
        ("hub.example", "does not begin with http:// or https://"),
        ("ftp://hub.example", "does not begin with http:// or https://"),
        ("https://", "names no host"),
        ("https://hub.example:port", "its port is no number"),
        ("https://hub example", "has a blank"),
        ("https://hub.example ", "has a blank"),
        ("‘https://hub.example’", "has the character ‘"),
    ],
)
def test_a_malformed_endpoint_is_named(monkeypatch: pytest.MonkeyPatch, said: Said, value: str, words: str) -> None:
    monkeypatch.setenv("HF_ENDPOINT", value)
    assert said().startswith(f"HF_ENDPOINT is {value!r}, which ") and words in said()
    assert "unset HF_ENDPOINT" in said()


@pytest.mark.parametrize("value", ["nonsense", "https://hub.example:port", ""])
def test_a_malformed_endpoint_ends_a_command_in_one_sentence(equip: Equip, value: str) -> None:
    # the library reads it when it is imported
    assert "HF_ENDPOINT" in sentence(equip("pull", "tiny", env={"HF_ENDPOINT": value}))


# ---- folders and the disk


@POSIX
def test_a_cache_folder_that_is_none_is_named(equip: Equip, home: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    (tmp_path / "link").symlink_to(tmp_path / "gone")
    for variable, value, words in (
        ("HF_HOME", tmp_path / "file", f"{tmp_path / 'file'} is a file where a folder is needed"),
        ("HF_HUB_CACHE", tmp_path / "file", f"{tmp_path / 'file'} is a file where a folder is needed"),
        ("HF_HOME", tmp_path / "link", f"{tmp_path / 'link'} is a link to {tmp_path / 'gone'}, which does not exist"),
        ("HF_HUB_CACHE", tmp_path / "link" / "x", f"{tmp_path / 'link'} is a link to"),
        ("HF_HUB_CACHE", "/dev/null/x", "/dev/null is a file where a folder is needed"),
    ):
        message = sentence(equip("pull", "tiny", env={variable: str(value)}))
        assert words in message and f"set {variable} to a folder that you may write to" in message


@pytest.mark.parametrize(
    ("code", "words"),
    [
        ("EROFS", "is on a disk that cannot be written to: set HF_HOME"),
        ("EDQUOT", "your quota on the disk of .* is used up: delete something, or set HF_HOME"),
        ("ENOSPC", "the disk of .* is full: free some space, or set HF_HOME"),
        ("EACCES", "may not be used .*: change its permissions, or set HF_HOME"),
        ("EPERM", "may not be used .*: change its permissions, or set HF_HOME"),
        ("EMFILE", r"too many files are open: close some programs, or raise the limit \(ulimit -n\)"),
        ("EIO", "cannot be used .*: set HF_HOME to a folder that you may write to"),
    ],
)
def test_a_disk_that_refuses_is_named(equip: Equip, home: Path, code: str, words: str) -> None:
    patch = f"""
import errno, os
real = os.mkdir
def mkdir(path, *args, **options):
    if {str(home)!r} in os.fspath(path):
        raise OSError(errno.{code}, os.strerror(errno.{code}), os.fspath(path))
    return real(path, *args, **options)
os.mkdir = mkdir
"""
    assert re.search(words, sentence(equip("pull", "tiny", code=patch)))


@POSIX
def test_a_file_too_large_for_the_disk_is_named(equip: Equip, home: Path) -> None:
    code = f"import resource; resource.setrlimit(resource.RLIMIT_FSIZE, ({len(LARGE) // 2},) * 2)"
    message = sentence(equip("pull", "large", code=code))
    assert "does not take files of this size: raise the limit (ulimit -f), or set HF_HOME" in message
    assert files(home) == set()
    fetched(equip("pull", "large"))


def test_too_many_open_files_are_not_the_network(equip: Equip) -> None:
    code = """
import errno, socket
def connect(*_, **__):
    raise OSError(errno.EMFILE, "Too many open files")
socket.create_connection = connect
"""
    assert "too many files are open" in sentence(equip("pull", "tiny", code=code))


@POSIX
def test_without_a_home_folder_the_variable_is_named(
    equip: Equip, hub_environment: dict[str, str], tmp_path: Path
) -> None:
    code = f"""
import os, pwd
def nobody(_):
    raise KeyError("uid not found")
pwd.getpwuid = nobody
os.environ.pop("HOME", None)
os.chdir({str(tmp_path)!r})
"""
    del hub_environment["HF_HOME"]
    message = sentence(equip("pull", "tiny", code=code))
    assert "there is no home folder (HOME is not set): set HF_HOME" in message
    assert not (tmp_path / "~").exists()
    assert "is not on this disk" in sentence(equip("info", "tiny", code=code))


def test_the_home_of_an_unknown_user_is_refused() -> None:
    with pytest.raises(ModelFileError, match="home folder that is not known: write the whole path"):
        loading.model_path("~no-such-user/model.gguf")


# ---- the library


@pytest.mark.parametrize("module", ["huggingface_hub", "httpx2", "filelock"])
def test_a_missing_library_is_named(equip: Equip, module: str) -> None:
    code = f"import sys; sys.modules[{module!r}] = None"
    if module == "httpx2":  # or what it is called in this release
        code += "; sys.modules['httpx'] = None"
    message = sentence(equip("pull", "tiny", code=code))
    assert "huggingface_hub cannot be imported" in message and "pip install --force-reinstall" in message


def test_a_number_of_the_library_that_is_none_is_named(equip: Equip) -> None:
    message = sentence(equip("pull", "tiny", env={"HF_HUB_ETAG_TIMEOUT": "soon"}))
    assert "HF_HUB_ETAG_TIMEOUT is 'soon'" in message and "correct or unset it" in message


def test_an_error_that_nobody_expects_is_one_sentence(equip: Equip) -> None:
    code = """
import huggingface_hub.file_download as f
def get(*_, **__):
    raise RuntimeError("surprise")
f.http_get = get
"""
    assert "tiny cannot be fetched (RuntimeError: surprise)" in sentence(equip("pull", "tiny", code=code))


# ---- the list


@POSIX
@pytest.mark.parametrize("kind", ["folder", "device", "pipe", "binary", "utf-16", "endless"])
def test_a_list_that_is_none_is_named(equip: Equip, tmp_path: Path, kind: str) -> None:
    path = tmp_path / kind
    if kind == "folder":
        path.mkdir()
    elif kind == "device":
        path = Path("/dev/zero")
    elif kind == "pipe":
        os.mkfifo(path)
    else:
        content = {"binary": b"GGUF\0\0", "utf-16": "name".encode("utf-16"), "endless": b"# " + b"x" * 2**21}
        path.write_bytes(content[kind])
    message = sentence(equip("models", env={"EQUIP_MODELS_FILE": str(path)}))
    assert f"the list of models {path} cannot be read" in message and "correct EQUIP_MODELS_FILE" in message


def test_passwords_are_left_out() -> None:
    assert environment.without_password("a http://b:c@d/ https://e@f g@h") == "a http://***@d/ https://***@f g@h"
