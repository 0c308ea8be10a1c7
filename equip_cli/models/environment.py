"""What surrounds a download: proxies, certificates, folders. What is wrong with them is told in one sentence each.

Values of variables are shown without the passwords in them.
"""

from __future__ import annotations

import errno
import importlib.util
import os
import re
import shutil
import ssl
import urllib.request
from pathlib import Path
from urllib.parse import urlsplit

from equip_cli.core.errors import DownloadError

CHECK_COST = 0.05  # of reading a byte for its sha256, in bytes fetched; the progress bar's guess
AGAIN = "run the command again, it goes on where it stopped"
_PROXY_SCHEMES = {"http", "https"}
_SOCKS_SCHEMES = {"socks5", "socks5h"}


def without_password(text: str) -> str:
    """A text with the user and password of every URL in it left out."""
    return re.sub(r"(?<=//)[^/@\s]*@", "***@", text)


def address_fault(text: str, schemes: set[str]) -> str | None:
    """What is wrong with a URL that must have one of these schemes and a host; None if nothing is."""
    if not text:
        return "is empty"
    if re.search(r"[\x00-\x20\x7f]", text):
        return "has a blank or a line break in it"
    if not text.isascii():
        return f"has the character {next(c for c in text if not c.isascii())} in it"
    if text[0] in "\"'" or text[-1] in "\"'":
        return "has quotes in it"
    try:
        split = urlsplit(text)
        port = split.port
    except ValueError:
        return "is no address, or its port is no number up to 65535"
    if split.scheme not in schemes:
        return f"does not begin with {' or '.join(f'{scheme}://' for scheme in sorted(schemes))}"
    if not split.hostname:
        return "names no host"
    return "has port 0" if port == 0 else None


# ---- proxies


def proxies(given: str = "") -> dict[str, str]:
    """The proxies by scheme, as urllib knows them; `given` is one for all requests, in place of the environment's."""
    found = urllib.request.getproxies()
    if given:
        return found | {"http": given, "https": given}
    return {scheme: found["all"] for scheme in ("http", "https") if "all" in found} | found


def _source(scheme: str, proxy: str, given: str) -> str:
    """Where a proxy was set."""
    if given:
        return "pip's setting proxy"
    names = [
        name
        for name, value in os.environ.items()
        if name.lower() in (f"{scheme}_proxy", "all_proxy") and value == proxy
    ]
    return min(names, key=lambda name: (name.lower() == "all_proxy", name), default="the system's proxy")


def _whole(proxy: str) -> str:
    return proxy if "://" in proxy else f"http://{proxy}"


def check_proxies(*, socks: bool, given: str = "") -> None:
    """Raises DownloadError for a proxy that no request could use. socks: the HTTP library can use such a proxy."""
    found = proxies(given)
    if not given and "*" in [host.strip() for host in found.get("no", "").split(",")]:
        return  # none of them is used
    # urllib has no use for the proxy of all schemes once each has its own, httpx prepares it all the same
    for scheme in ("http", "https", "all") if socks else ("http", "https"):
        if not (proxy := found.get(scheme)):
            continue
        source, shown = _source(scheme, proxy, given), without_password(_whole(proxy))
        remedy = f"write it as http://host:port, or unset {source}"
        if _whole(proxy).partition("://")[0].lower() in _SOCKS_SCHEMES:
            if not socks:
                raise DownloadError(f"{source} is {shown}, a SOCKS proxy, which cannot be used here: {remedy}")
            if importlib.util.find_spec("socksio") is None:
                raise DownloadError(
                    f"{source} is {shown}, a SOCKS proxy, and the Python package for those is missing: "
                    f"pip install socksio, or unset {source}"
                )
        schemes = _PROXY_SCHEMES | _SOCKS_SCHEMES if socks else _PROXY_SCHEMES
        # http:/host, http//host
        half = re.match(r"\w+(:/(?!/)|//)", proxy)
        if fault := "is no address" if half else address_fault(_whole(proxy), schemes):
            raise DownloadError(f"{source} is {shown!r}, which {fault}: {remedy}")


def unreachable(url: str, reason: str, variables: str, given: str = "") -> str:
    """The sentence for an address that no connection could be made to. variables: what else may be wrong."""
    split, reason = urlsplit(url), without_password(reason)
    proxy = proxies(given).get(split.scheme)
    if not proxy or urllib.request.proxy_bypass(split.hostname or ""):
        return f"{_host(url)} cannot be reached ({reason}): check the connection, and {variables} if set"
    source, shown = _source(split.scheme, proxy, given), without_password(_whole(proxy))
    if "407" in reason:
        return (
            f"the proxy {shown} wants a user name and password ({reason}): write them into {source} as "
            "http://user:password@host:port"
        )
    return f"the proxy {shown} cannot be used ({reason}): check the connection, and correct or unset {source}"


def _host(url: str) -> str:
    split = urlsplit(url)
    return f"{split.scheme}://{split.netloc.rpartition('@')[2]}"


# ---- certificates


def check_certificates(variable: str, value: str, *, folder: bool = False) -> None:
    """Raises DownloadError if what a variable names is no file of certificates (`folder`: and no folder)."""
    path, fault = Path(value), ""
    try:
        if folder and path.is_dir():
            return
        if not path.exists():
            fault = "does not exist"
        elif not path.is_file():
            fault = "is no file"
        else:
            ssl.create_default_context(cafile=value)
    except ssl.SSLError:
        fault = "holds no certificate"
    except (OSError, ValueError) as error:
        fault = f"cannot be read ({getattr(error, 'strerror', None) or error})"
    if fault:
        raise DownloadError(
            f"{variable} is {value}, which {fault}: name a file of certificates in PEM format, or unset {variable}"
        )


def check_certificate_variables() -> None:
    """Raises DownloadError if the variables of OpenSSL name no certificates."""
    if value := os.environ.get("SSL_CERT_FILE"):
        check_certificates("SSL_CERT_FILE", value)
    elif (value := os.environ.get("SSL_CERT_DIR")) and not any(map(os.path.isdir, value.split(os.pathsep))):
        raise DownloadError(
            f"SSL_CERT_DIR is {value}, which is no folder: name a folder of certificates, or unset SSL_CERT_DIR"
        )


def tls_sentence(url: str, reason: str, remedy: str) -> str | None:
    """The sentence for a connection that failed over a certificate or over TLS itself; None if it failed otherwise.

    remedy: how a file of certificates is named to the one who connects.
    """
    failed = re.search(r"certificate verify failed:? *([^(\[\]]*)", reason, re.IGNORECASE)
    if failed or "CERTIFICATE_VERIFY_FAILED" in reason:
        cause = (failed[1] if failed else "").strip(" '\",")
        return (
            f"the certificate of {_host(url)} cannot be verified ({cause or 'no reason given'}): check the clock; if "
            f"your network replaces certificates, {remedy}"
        )
    if re.search("WRONG_VERSION_NUMBER|RECORD_LAYER_FAILURE|UNKNOWN_PROTOCOL|PACKET_LENGTH_TOO_LONG", reason):
        return f"{_host(url)} does not speak TLS ({reason}): check the address, which may have to begin with http://"
    return None


# ---- folders


def no_home() -> bool:
    """Neither HOME nor the list of users names a home folder."""
    return os.path.expanduser("~").startswith("~")


def _obstacle(path: Path) -> str | None:
    """What stands in the way where a folder is needed."""
    for place in [*reversed(path.parents), path]:
        if os.path.islink(place) and not os.path.exists(place):
            return f"{place} is a link to {os.readlink(place)}, which does not exist"
        if os.path.exists(place) and not os.path.isdir(place):
            return f"{place} is a file where a folder is needed"
    return None


def disk_sentence(error: OSError, folder: Path, variable: str) -> str:
    """What an error of the operating system means for a cache. variable: what moves the cache elsewhere."""
    place = Path(os.fsdecode(error.filename)) if isinstance(error.filename, (str, bytes)) else folder
    elsewhere = f"set {variable} to a folder on another disk"
    writable = f"set {variable} to a folder that you may write to"
    if error.errno == errno.ENOSPC:
        return f"the disk of {folder} is full: free some space, or {elsewhere}"
    if error.errno == errno.EDQUOT:
        return f"your quota on the disk of {folder} is used up: delete something, or {elsewhere}"
    if error.errno == errno.EFBIG:
        return f"{folder} does not take files of this size: raise the limit (ulimit -f), or {elsewhere}"
    if error.errno in (errno.EMFILE, errno.ENFILE):
        return "too many files are open: close some programs, or raise the limit (ulimit -n), and run the command again"
    if error.errno == errno.EROFS:
        return f"{folder} is on a disk that cannot be written to: {elsewhere}"
    if error.errno in (errno.EACCES, errno.EPERM):
        return f"{place} may not be used ({error.strerror}): change its permissions, or {writable}"
    if error.errno in (errno.EEXIST, errno.ENOTDIR, errno.ENOENT) and (obstacle := _obstacle(place)):
        return f"{obstacle}: remove it, or {writable}"
    return f"{place} cannot be used ({error.strerror}): {writable}"


def check_space(n_bytes: float, folder: Path, variable: str) -> None:
    """Raises DownloadError if the disk of a folder, which need not exist, has not so many bytes free."""
    while not folder.exists() and folder != folder.parent:
        folder = folder.parent
    free = shutil.disk_usage(folder).free
    if n_bytes > free:
        raise DownloadError(
            f"{n_bytes / 1e9:.2f} GB are to be fetched, and {folder} has {free / 1e9:.2f} GB free: free some space, or "
            f"set {variable} to a folder on another disk"
        )
