"""Models by name: the list in models.txt, the hub's cache on this disk, and the way from the hub into that cache.

EQUIP_MODELS_FILE names a list to use in place of models.txt. The cache, the token and the hub's address are those of
huggingface_hub (HF_HOME, HF_HUB_CACHE, HF_TOKEN, HF_ENDPOINT, HF_HUB_OFFLINE).
"""

from __future__ import annotations

import contextlib
import difflib
import errno
import hashlib
import os
import re
import shutil
import warnings
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from equip_cli import output
from equip_cli.errors import DownloadError, EquipError, ModelFileError

QUANTS = ("Q4_K_M", "Q8_0")  # llama.cpp's choice where none is asked for, before the first file that there is
# what lies beside models and is none; the same words as in llama.cpp's common/download.cpp
NO_MODELS = ("mmproj", "imatrix", "mtp-", "eagle3-", "dflash-", "dspark-")

HUB_NAME = re.compile(r"(?P<repo>\w[\w.\-]*/\w[\w.\-]*)(:(?P<quant>[\w.\-]+))?", re.ASCII)
ALIAS = re.compile(r"\w[\w.:\-]*", re.ASCII)
_PART = re.compile(r"(?P<stem>.+)-(?P<index>\d{5})-of-(?P<count>\d{5})\.gguf", re.IGNORECASE)
_QUANT = re.compile(r"(?<![a-z0-9])((?:UD-)?(?:I?Q\d\w*|TQ\d_\d|BF16|FP?16|F32|MXFP4\w*))(?=[./-])", re.IGNORECASE)
_SHA256 = re.compile(r"[0-9a-f]{64}")
CHECK_COST = 0.05  # of reading a byte for its sha256, in bytes fetched; the progress bar's guess
_AGAIN = "run the command again, it goes on where it stopped"


@dataclass(frozen=True)
class HubModel:
    """A model on the hub: a row of models.txt, or what `owner/repo[:quant]` says."""

    name: str  # as a user types it
    repo: str
    file: str = ""  # of a split model, its first file; "" = what `quant` says
    quant: str = ""  # "" = QUANTS, else the first file
    arch: str = ""
    size_gb: float = 0.0  # 10^9 bytes
    note: str = ""
    modes: str = ""


# ---- names


def _list_file() -> Path:
    given = os.environ.get("EQUIP_MODELS_FILE")
    if given:
        return Path(given)
    packaged = Path(__file__).with_name("models.txt")
    return packaged if packaged.is_file() else packaged.parents[1] / "models.txt"


def _row(line: str) -> HubModel:
    cells = re.split(r"\s{2,}", line)
    if len(cells) != 7:
        raise ValueError(f"it has {len(cells)} columns, not 7")
    name, repo, file, arch, size_gb, note, modes = cells
    if not ALIAS.fullmatch(name):
        raise ValueError(f"{name} is no alias")
    if not HUB_NAME.fullmatch(repo) or ":" in repo:
        raise ValueError(f"{repo} is no repository")
    if not file.endswith(".gguf"):
        raise ValueError(f"{file} is no GGUF file")
    if not re.fullmatch(r"\d+(\.\d+)?", size_gb) or not float(size_gb):
        raise ValueError(f"{size_gb} is no size in GB")
    return HubModel(name, repo, file, arch=arch, size_gb=float(size_gb), note=note, modes=modes)


def rows() -> list[HubModel]:
    """The models of the list, in its order. Raises EquipError for a list that is missing or malformed."""
    path, found = _list_file(), list[HubModel]()
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        remedy = "correct EQUIP_MODELS_FILE" if os.environ.get("EQUIP_MODELS_FILE") else "reinstall equip-llama"
        raise EquipError(f"the list of models {path} cannot be read ({error}): {remedy}") from error
    for n_line, line in enumerate(lines, 1):
        line = line.split("#")[0].strip()
        if not line:
            continue
        try:
            row = _row(line)
            if row.name.lower() in (other.name.lower() for other in found):
                raise ValueError(f"{row.name} is there already")
        except ValueError as error:
            raise EquipError(f"{path}, line {n_line}: {error}: correct the list of models") from None
        found.append(row)
    return found


def find(name: str) -> HubModel:
    """What an alias (of any case) or `owner/repo[:quant]` means; nothing is looked up on the hub.

    Raises ModelFileError for a name that is neither, EquipError for a malformed list.
    """
    if match := HUB_NAME.fullmatch(name):
        return HubModel(name, match["repo"], quant=match["quant"] or "")
    known = {row.name.lower(): row for row in rows()}
    if row := known.get(name.lower()):
        return row
    close = difflib.get_close_matches(name.lower(), known, n=3, cutoff=0.5)
    hint = f"did you mean {' or '.join(known[word].name for word in close)}? " if close else ""
    raise ModelFileError(
        f"there is no file and no model {name}: {hint}equip models lists the names, and a path or owner/repo works too"
    )


def parts(file: str) -> list[str]:
    """All files of a split model from the name of one of them; of another model, its file alone."""
    match = _PART.fullmatch(file)
    if match is None:
        return [file]
    return [f"{match['stem']}-{i:05d}-of-{match['count']}.gguf" for i in range(1, int(match["count"]) + 1)]


def _models(files: Iterable[str]) -> list[str]:
    """The GGUF files that are models, of a split one the first file."""
    kept = [f for f in files if f.endswith(".gguf") and not any(word in f.rsplit("/", 1)[-1] for word in NO_MODELS)]
    return [f for f in kept if parts(f)[0] == f]


def choose(files: Iterable[str], quant: str = "") -> str | None:
    """The file that llama.cpp's -hf takes from a repository's files; None if no file has that quant."""
    models = _models(files)
    for wanted in [quant] if quant else QUANTS:
        # Q4_0 is not IQ4_0
        pattern = re.compile(rf"(?<![a-z0-9]){re.escape(wanted)}[./-]", re.IGNORECASE)
        for file in models:
            if pattern.search(file):
                return file
    return models[0] if models and not quant else None


# ---- on this disk


def _cache_folder() -> Path:
    from huggingface_hub import constants  # alone it is light

    return Path(constants.HF_HUB_CACHE)


def _repo_folder(repo: str) -> Path:
    return _cache_folder() / f"models--{repo.replace('/', '--')}"


def _snapshots(repo: str) -> list[Path]:
    """The folders of the commits that are in the cache: what was last known as main first, then the newest."""
    folder = _repo_folder(repo)
    try:
        found = [path for path in (folder / "snapshots").iterdir() if path.is_dir()]
    except OSError:
        return []
    try:
        main = (folder / "refs" / "main").read_text().strip()
    except OSError:
        main = ""
    return sorted(found, key=lambda path: (path.name != main, -path.stat().st_mtime))


def on_disk(model: HubModel) -> Path | None:
    """Path of a model in the hub's cache (of a split one, its first file); None if it is not there. No network.

    Without a quant it is the default one, else the first file that is on the disk.
    """
    for snapshot in _snapshots(model.repo):
        files = sorted(path.relative_to(snapshot).as_posix() for path in snapshot.rglob("*.gguf") if path.is_file())
        file = model.file or choose(files, model.quant)
        if file and set(parts(file)) <= set(files):
            return snapshot / file
    return None


# ---- from the hub


@dataclass(frozen=True)
class _Remote:
    """One file as the hub describes it. `etag` is the sha256 of a large file, something else for a small one."""

    repo: str
    file: str
    commit: str
    etag: str
    size: int | None

    @property
    def blob(self) -> Path:
        return _repo_folder(self.repo) / "blobs" / self.etag

    @property
    def partial(self) -> Path:
        return self.blob.with_name(f"{self.etag}.incomplete")  # huggingface_hub's own name for it

    @property
    def n_missing(self) -> int:
        """Bytes that are not on the disk yet."""
        if self.blob.is_file():
            return 0
        return max(0, (self.size or 0) - (self.partial.stat().st_size if self.partial.is_file() else 0))

    def fault(self, path: Path, progress: output.Progress) -> str | None:
        """What is wrong with the bytes in `path`."""
        n_bytes = path.stat().st_size
        if self.size is not None and n_bytes != self.size:
            return f"{n_bytes} bytes of {self.size}"
        if _SHA256.fullmatch(self.etag):
            digest = hashlib.sha256()
            with path.open("rb") as file:
                while chunk := file.read(2**20):
                    digest.update(chunk)
                    progress.advance(len(chunk) * CHECK_COST)
            if digest.hexdigest() != self.etag:
                return "its sha256 is not the hub's"
        return None


def _damaged(file: str, fault: str) -> DownloadError:
    return DownloadError(f"{file} arrived damaged ({fault}) and was deleted: run the command again")


def _sentence(error: Exception, model: HubModel) -> str:
    """What an error of huggingface_hub, of its HTTP library or of the disk means to the user."""
    from huggingface_hub import constants, errors

    while isinstance(error, errors.LocalEntryNotFoundError) and isinstance(error.__cause__, Exception):
        error = error.__cause__
    hub, repo = constants.ENDPOINT, model.repo
    status = int(getattr(getattr(error, "response", None), "status_code", 0))
    if isinstance(error, errors.OfflineModeIsEnabled):
        return f"HF_HUB_OFFLINE is set, and {model.name} is not on this disk: unset it to fetch the model"
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
    if status == 429:
        return f"{hub} asks for a pause (HTTP 429): run the command again in some minutes, or set HF_TOKEN"
    if status >= 500:
        return f"{hub} is out of order (HTTP {status}): run the command again later"
    if status:
        return f"{hub} answers HTTP {status} for {model.name}: check the name, and that equip-llama is up to date"
    if isinstance(error, errors.HFValidationError):
        return f"{repo} cannot be a repository's name: write owner/repo[:quant]"
    if "Consistency check failed" in str(error):
        return str(_damaged(model.file, "not the bytes that the hub names"))
    if "pip install hf_xet" in str(error):
        return f"{model.file} is too large for plain HTTP: pip install hf_xet, then run the command again"
    # by name: the HTTP library is another one in every second release of huggingface_hub
    names = {kind.__name__ for kind in type(error).__mro__}
    if "TimeoutException" in names:
        return f"{hub} does not answer in time: check the connection and {_AGAIN}"
    if names & {"ConnectError", "ProxyError"}:
        return f"{hub} cannot be reached ({error}): check the connection, and HTTPS_PROXY and HF_ENDPOINT if set"
    if "TransportError" in names and "UnsupportedProtocol" not in names:
        return f"the connection to {hub} broke: {_AGAIN}"
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return f"the disk of {_cache_folder()} is full: free some space, or set HF_HOME to a folder on another disk"
    if isinstance(error, OSError) and error.errno:
        place = error.filename or _cache_folder()
        return f"{place} cannot be used ({error.strerror}): set HF_HOME to a folder that you may write to"
    return f"{hub} does not answer as the hub does: check HF_ENDPOINT, the proxy, and whether the network wants a login"


@contextlib.contextmanager
def _explained(model: HubModel) -> Iterator[None]:
    from huggingface_hub.errors import HfHubHTTPError

    http_error: Any = HfHubHTTPError.__mro__[1]  # the base class of the HTTP library in use
    try:
        yield
    except (OSError, ValueError, http_error) as error:
        raise DownloadError(_sentence(error, model)) from error


def _utils() -> Any:
    import huggingface_hub.utils

    return huggingface_hub.utils  # it exports these names without saying so to a type checker


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without the log lines and warnings of huggingface_hub."""
    logging = _utils().logging
    before = logging.get_verbosity()
    logging.set_verbosity(logging.CRITICAL + 1)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.set_verbosity(before)


def _bar_class(progress: output.Progress) -> Any:
    """A class for huggingface_hub's `tqdm_class` that shows nothing and forwards what arrives."""
    tqdm: Any = _utils().tqdm

    class Bar(tqdm):  # type: ignore[misc]
        def __init__(self, *args: Any, **options: Any) -> None:
            super().__init__(*args, **(options | {"disable": True}))

        def update(self, n: float | None = 1) -> None:
            progress.advance(n or 0)

        def update_transfer(self, n: float) -> None:
            pass  # what the network carried; update() counts what is on the disk

    return Bar


def _choose_on_hub(model: HubModel) -> str:
    from huggingface_hub import HfApi, constants

    info = HfApi().model_info(model.repo, timeout=constants.HF_HUB_ETAG_TIMEOUT)
    files = [sibling.rfilename for sibling in info.siblings or []]
    file = choose(files, model.quant)
    if file is None and not _models(files):
        raise DownloadError(f"{model.repo} has no GGUF model: look for a repository whose name ends in -GGUF")
    if file is None:
        quants = dict.fromkeys(q.upper() for f in _models(files) for q in _QUANT.findall(f))
        raise DownloadError(
            f"{model.repo} has no quant {model.quant}: choose one of {', '.join(quants or _models(files))}"
        )
    return file


def _describe(repo: str, file: str, revision: str = "main") -> _Remote:
    from huggingface_hub import constants, get_hf_file_metadata, hf_hub_url

    about = get_hf_file_metadata(hf_hub_url(repo, file, revision=revision), timeout=constants.HF_HUB_ETAG_TIMEOUT)
    if not about.commit_hash or not about.etag:
        raise ValueError("a header is missing")
    return _Remote(repo, file, about.commit_hash, about.etag, about.size)


def _download(remote: _Remote, progress: output.Progress) -> None:
    """Put the checked file where the cache keeps its content; what has arrived stays in `partial` until then.

    hf_hub_download would throw away what an interrupted download has written.
    """
    from huggingface_hub import hf_hub_url
    from huggingface_hub.file_download import http_get

    partial, size = remote.partial, remote.size
    if size is not None and partial.is_file() and partial.stat().st_size > size:
        partial.unlink()
    fault: str | None
    try:
        # not "a": should a lock fail, two writers write the same bytes to the same places
        with partial.open("r+b" if partial.exists() else "w+b") as target:
            http_get(
                hf_hub_url(remote.repo, remote.file, revision=remote.commit),
                target,
                resume_size=target.seek(0, os.SEEK_END),
                headers=_utils().build_hf_headers() | {"Accept-Encoding": "identity"},
                expected_size=size,
                tqdm_class=_bar_class(progress),
            )
            os.fsync(target.fileno())
        fault = remote.fault(partial, progress)
    except OSError as error:
        # the transfer ended well, with another size than the hub named
        if error.errno is not None or "Consistency check failed" not in str(error):
            raise
        fault = f"not the {size} bytes that the hub names"
    if fault:
        partial.unlink()
        raise _damaged(remote.file, fault)
    os.replace(partial, remote.blob)


def _fetch(remote: _Remote, progress: output.Progress) -> Path:
    """Bring one file into the cache; returns its path there. Raises DownloadError for one that does not arrive whole."""
    from filelock import Timeout
    from huggingface_hub import constants, hf_hub_download

    # a small file has another etag, and plain HTTP ends at 50 GB: those go the library's way, without resuming
    resumable = _SHA256.fullmatch(remote.etag) and (remote.size or 0) <= constants.MAX_HTTP_DOWNLOAD_SIZE
    if resumable and not remote.blob.is_file():
        lock = _cache_folder() / ".locks" / _repo_folder(remote.repo).name / f"{remote.etag}.lock"
        for folder in (lock.parent, remote.blob.parent):
            folder.mkdir(parents=True, exist_ok=True)
        try:
            with _utils().WeakFileLock(lock, timeout=1):
                if not remote.blob.is_file():
                    _download(remote, progress)
        except Timeout:
            raise DownloadError(f"another process is fetching {remote.file}: wait until it has ended") from None
    # where the content is there already, this only gives it its name
    path = Path(hf_hub_download(remote.repo, remote.file, revision=remote.commit, tqdm_class=_bar_class(progress)))
    if not resumable and (fault := remote.fault(path, progress)):
        path.resolve().unlink()
        path.unlink(missing_ok=True)
        raise _damaged(remote.file, fault)
    return path


def _check_space(n_bytes: int) -> None:
    folder = _cache_folder()
    while not folder.exists():
        folder = folder.parent
    free = shutil.disk_usage(folder).free
    if n_bytes > free:
        raise DownloadError(
            f"{n_bytes / 1e9:.2f} GB are to be fetched, and {folder} has {free / 1e9:.2f} GB free: free some space, or "
            "set HF_HOME to a folder on another disk"
        )


def pull(model: HubModel) -> Path:
    """Bring a model into the hub's cache unless it is there; returns its path, of a split one that of its first file.

    What an interrupted call has fetched is used by the next one. Raises DownloadError; nothing is then under the
    model's name that was not there before.
    """
    wanted = model if model.file or model.quant else replace(model, quant=QUANTS[0])
    if path := on_disk(wanted):
        output.note(f"{model.name} is on this disk already")
        return path
    with _quiet(), _explained(model):
        first = model.file or _choose_on_hub(model)
        model = replace(model, file=first)
        if path := on_disk(model):
            output.note(f"{model.name} is on this disk already")
            return path
        remotes: list[_Remote] = []
        for file in parts(first):
            with _explained(replace(model, file=file)):
                # all parts of one commit: they must lie in one folder
                remotes.append(_describe(model.repo, file, remotes[0].commit if remotes else "main"))
        _check_space(sum(remote.n_missing for remote in remotes))
        n_bytes = sum(remote.size or 0 for remote in remotes)
        output.note(f"fetching {model.repo}/{first}, {n_bytes / 1e9:.2f} GB")
        progress = output.Progress("fetching", sum(r.n_missing for r in remotes) + n_bytes * CHECK_COST)
        try:
            paths = []
            for remote in remotes:
                with _explained(replace(model, file=remote.file)):
                    paths.append(_fetch(remote, progress))
        finally:
            progress.done()
        main = _repo_folder(model.repo) / "refs" / "main"
        main.parent.mkdir(parents=True, exist_ok=True)
        main.write_text(remotes[0].commit)
    return paths[0]
