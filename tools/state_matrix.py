"""Which policies, at which scopes, go on to the bit from a saved session, for each kind of memory: the table of docs/lab-notes.md.

    python tools/state_matrix.py

Tiny models with random weights; 230 tokens in chunks and one by one, so that tokens were evicted. A session that saves, another one
that takes it over from a file, and both read 40 more tokens: `=` where all logits and kept sets are equal, `-` where the model rules
the policy out, else what was said.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "support"), str(ROOT / "native" / "cmake")]

import upstream  # noqa: E402
from dropin_models import write_hybrid  # noqa: E402
from models import MODELS, write  # noqa: E402

from equip_cli import EquipError, Model, UnsupportedModelError  # noqa: E402
from equip_cli.core import native  # noqa: E402
from equip_cli.terminal.columns import from_rows, table  # noqa: E402

MORE = {"pagedeviction": ",page_size=8", "rkv": ",evict_every=4", "snapkv": ",evict_every=4", "lagkv": ",evict_every=4"}


def outcome(model: Model, policy: str, path: Path) -> str:
    """`=`, or a sentence."""
    text = [3 + 7 * i % 190 for i in range(270)]
    options = {"n_threads": 1, "n_ubatch": 32}
    try:
        with model.session(policy, **options) as one, model.session(policy, **options) as other:
            one.eval(text[:200])
            for token in text[200:230]:
                one.eval([token])
            assert one.stats()["n_evicted"] > 0
            one.save(path)
            other.load(path)
            for token in text[230:]:
                for session in (one, other):
                    session.eval([token])
                if one.logits().tobytes() != other.logits().tobytes():
                    return "other logits"
            return "=" if one.shares() == other.shares() else "other kept sets"
    except UnsupportedModelError:
        return "-"
    except EquipError as error:
        return str(error).partition(":")[0]


def main() -> None:
    policies = [each for each in native.load().policies() if each["name"] != "none"]
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        vocabulary = place / "vocabulary.gguf"
        pin = upstream.load_pin()
        for name, data, *_ in upstream.tarball_files(upstream.fetch(pin), pin.folder):
            if name == "models/ggml-vocab-llama-spm.gguf":
                vocabulary.write_bytes(data)
        files = {
            "plain (llama)": write(MODELS["llama-gqa"], place / "plain.gguf"),
            "sliding window (gemma3)": write(MODELS["gemma3"], place / "window.gguf"),
            "hybrid (lfm2)": write_hybrid(place / "hybrid.gguf", vocabulary),
        }
        loaded = {name: Model(path) for name, path in files.items()}
        rows = []
        for policy in policies:
            for scope in policy["scopes"]:
                recent = "" if policy["name"] == "streaming" else ",recent=8"
                words = f"{policy['name']}:budget=64,scope={scope}{recent}{MORE.get(policy['name'], '')}"
                found = [outcome(model, words, place / "state") for model in loaded.values()]
                rows.append([policy["name"], scope, *found])
        print(table(from_rows(["policy", "scope", *loaded], rows)), end="")


if __name__ == "__main__":
    main()
