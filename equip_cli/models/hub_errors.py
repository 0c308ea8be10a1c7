"""Why a model did not come from the hub: the environment of huggingface_hub, and what its errors mean to the user."""

from __future__ import annotations

import errno
import os
import re
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from equip_cli.core.errors import DownloadError, EquipError
from equip_cli.models import environment
from equip_cli.models.environment import AGAIN
from equip_cli.models.model_list import KnownModel

# RFC 6750, section 2.1: what may stand behind "Bearer"
_TOKEN = re.compile(r"[A-Za-z0-9\-._~+/]+=*")
_CACHE_VARIABLES = ("HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE")


def library() -> Any:
    """huggingface_hub with what fetching needs of it. Raises EquipError for a library that cannot be imported."""
    try:
        import filelock  # noqa: F401
        import huggingface_hub.errors
        import huggingface_hub.file_download
        import huggingface_hub.utils

        return huggingface_hub
    except Exception as error:
        raise EquipError(_import_sentence(error)) from error


def constants() -> Any:
    """huggingface_hub's settings; alone they are quick to import. Raises EquipError."""
    try:
        from huggingface_hub import constants
    except Exception as error:
        raise EquipError(_import_sentence(error)) from error
    return constants


def _import_sentence(error: Exception) -> str:
    if isinstance(error, ImportError):
        return f"huggingface_hub cannot be imported ({error}): pip install --force-reinstall huggingface_hub"
    # it reads addresses and numbers when it is imported
    if text := _endpoint_sentence():
        return text
    guilty = [name for name, value in os.environ.items() if name.startswith("HF_") and repr(value) in str(error)]
    if guilty:
        return f"{guilty[0]} is {os.environ[guilty[0]]!r}, which is not what huggingface_hub takes: correct or unset it"
    return (
        f"huggingface_hub cannot be imported ({type(error).__name__}: {error}): check the variables that begin with HF_, "
        "or pip install --force-reinstall huggingface_hub"
    )


# ---- the environment


def _endpoint_sentence() -> str | None:
    endpoint = os.environ.get("HF_ENDPOINT")
    fault = None if endpoint is None else environment.address_fault(endpoint, {"http", "https"})
    if endpoint is None or fault is None:
        return None
    shown = environment.without_password(endpoint)
    return f"HF_ENDPOINT is {shown!r}, which {fault}: write the address of a hub as https://host, or unset HF_ENDPOINT"


def cache_variable() -> str:
    """The variable that the place of the cache depends on."""
    return next((name for name in _CACHE_VARIABLES if os.environ.get(name)), "HF_HOME")


def _token_fault(text: str) -> str | None:
    text = text.strip()
    if not text.isascii():
        return f"it has the character {next(c for c in text if not c.isascii())} in it"
    if re.search(r"[\x00-\x20\x7f]", text):
        return "it has a blank or a line break in it"
    if text and not _TOKEN.fullmatch(text):
        return f"it has the character {next(c for c in text if not _TOKEN.fullmatch(c))} in it"
    return None


def _check_token() -> None:
    settings = constants()
    if settings.HF_HUB_DISABLE_IMPLICIT_TOKEN:
        return
    for variable in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
        if value := os.environ.get(variable):
            if fault := _token_fault(value):
                raise DownloadError(f"{variable} is no token ({fault}): copy it once more, or unset {variable}")
            return
    path = Path(settings.HF_TOKEN_PATH)
    try:
        mode = path.stat().st_mode
        if not stat.S_ISREG(mode) and not stat.S_ISDIR(mode) and str(path) != os.devnull:
            raise DownloadError(f"{path} is no file with a token: correct HF_TOKEN_PATH, or run hf auth login")
        text = path.read_bytes().decode("utf-8", errors="replace")
    except FileNotFoundError:
        return
    except OSError as error:
        if isinstance(error, NotADirectoryError) and not os.environ.get("HF_TOKEN_PATH"):
            return  # the cache lies there too, and is told about
        raise DownloadError(
            f"the token in {path} cannot be read ({error.strerror}): correct HF_TOKEN_PATH, or run hf auth login"
        ) from error
    if fault := _token_fault(text):
        raise DownloadError(f"{path} holds no token ({fault}): run hf auth login, or delete that file")


def check_environment(cache: Path) -> None:
    """Raises DownloadError for the first variable that huggingface_hub or its HTTP library could not use."""
    if environment.no_home() and str(cache).startswith("~"):
        raise DownloadError("there is no home folder (HOME is not set): set HF_HOME to a folder that you may write to")
    if constants().HF_HUB_OFFLINE:
        return  # nothing is asked; the library says so
    if text := _endpoint_sentence():
        raise DownloadError(text)
    environment.check_proxies(socks=True)
    environment.check_certificate_variables()
    _check_token()
    try:
        library().utils.get_session()
    except Exception as error:
        variables = "NO_PROXY and the other variables of proxies and certificates"
        raise DownloadError(f"no connection can be prepared ({error}): check {variables}") from error


# ---- errors


def damaged(file: str, fault: str) -> DownloadError:
    return DownloadError(f"{file} arrived damaged ({fault}) and was deleted: run the command again")


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def _address(error: Exception, default: str) -> str:
    """The URL that the HTTP library was asking: large files come from another host than the hub's."""
    try:
        return str(error.request.url)  # type: ignore[attr-defined]
    except (AttributeError, RuntimeError):
        return default


def _answer_sentence(error: Exception, status: int, model: KnownModel) -> str:
    """What an answer of the hub with this HTTP status means."""
    from huggingface_hub import errors

    hub, repo = constants().ENDPOINT, model.repo
    if status == 401 and "Invalid credentials" in str(error):
        return f"{hub} does not accept the token: correct or unset HF_TOKEN, or run hf auth login"
    if isinstance(error, errors.RepositoryNotFoundError) and not isinstance(error, errors.GatedRepoError):
        return f"{hub} shows no repository {repo}: check the name, or set HF_TOKEN if the repository is private"
    if status in (401, 403):
        return (
            f"{hub} refuses {repo} (HTTP {status}, gated): accept the licence on {hub}/{repo} and set HF_TOKEN, or "
            "choose another model from equip models"
        )
    if isinstance(error, errors.EntryNotFoundError):
        return (
            f"{repo} has no file {model.file}: choose another model from equip models, or let the repository choose "
            f"with equip pull {repo}"
        )
    if status == 407:
        return environment.unreachable(_address(error, hub), "HTTP 407", "HF_ENDPOINT")
    if status == 429:
        return f"{hub} asks for a pause (HTTP 429): run the command again in some minutes, or set HF_TOKEN"
    if status >= 500:
        return f"{hub} is out of order (HTTP {status}): run the command again later"
    return f"{hub} answers HTTP {status} for {model.name}: check the name, and that equip-llama is up to date"


def _transport_sentence(error: Exception) -> str | None:
    """What an error of the HTTP library without an answer means; None if it is not one.

    The kinds are known by name: the library is another one in every second release of huggingface_hub.
    """
    hub = constants().ENDPOINT
    names, address = {kind.__name__ for kind in type(error).__mro__}, _address(error, hub)
    if "TimeoutException" in names:
        return f"{hub} does not answer in time: check the connection and {AGAIN}"
    if sentence := environment.tls_sentence(address, str(error), "set SSL_CERT_FILE to a file with its certificates"):
        return sentence
    if names & {"ConnectError", "ProxyError"}:
        return environment.unreachable(address, str(error), "HF_ENDPOINT")
    if names & {"UnsupportedProtocol", "InvalidURL", "LocalProtocolError"}:
        return f"no request can be made ({environment.without_password(str(error))}): check HF_ENDPOINT and HF_TOKEN"
    return f"the connection to {hub} broke: {AGAIN}" if "TransportError" in names else None


def sentence(error: Exception, model: KnownModel, cache: Path) -> str:
    """What an error of huggingface_hub, of its HTTP library or of the disk means to the user."""
    from huggingface_hub import errors

    while isinstance(error, errors.LocalEntryNotFoundError) and isinstance(error.__cause__, Exception):
        error = error.__cause__
    hub = constants().ENDPOINT
    status = int(getattr(getattr(error, "response", None), "status_code", 0))
    if isinstance(error, errors.OfflineModeIsEnabled):
        return f"HF_HUB_OFFLINE is set, and {model.name} is not on this disk: unset it to fetch the model"
    if status:
        return _answer_sentence(error, status, model)
    if isinstance(error, errors.HFValidationError):
        return f"{model.repo} cannot be a repository's name: write owner/repo[:quant]"
    if "Consistency check failed" in str(error):
        return str(damaged(model.file, "not the bytes that the hub names"))
    if "pip install hf_xet" in str(error):
        return f"{model.file} is too large for plain HTTP: pip install hf_xet, then run the command again"
    for cause in _chain(error):  # a socket that could not be opened, too
        if isinstance(cause, OSError) and cause.errno in (errno.EMFILE, errno.ENFILE):
            return environment.disk_sentence(cause, cache, cache_variable())
    if text := _transport_sentence(error):
        return text
    if isinstance(error, OSError) and error.errno:
        return environment.disk_sentence(error, cache, cache_variable())
    http_error: Any = errors.HfHubHTTPError.__mro__[1]  # the base class of the HTTP library in use
    if isinstance(error, (OSError, ValueError, http_error)):
        return f"{hub} does not answer as the hub does: check HF_ENDPOINT, the proxy, and whether the network wants a login"
    return (
        f"{model.name} cannot be fetched ({type(error).__name__}: {error}): run the command again, and reinstall "
        "equip-llama if that does not help"
    )
