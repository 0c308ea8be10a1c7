"""Rules of positions that a model or an update rules out: one sentence that names the reason."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable
from pathlib import Path

import gguf
import numpy as np
import pytest
from gguf_copy import copy_metadata, finish
from models import MODELS

from equip_cli import CachePolicy, Model, UnsupportedModelError, UsageError


def write_mrope(source: Path, target: Path, sections: list[int]) -> Path:
    """A qwen2 file as qwen2vl, whose tokens have several positions each."""
    reader = gguf.GGUFReader(source)
    writer = gguf.GGUFWriter(str(target), "qwen2vl")
    copy_metadata(reader, writer, rename=lambda name: name.replace("qwen2.", "qwen2vl.", 1))
    writer.add_rope_dimension_sections(sections)
    for tensor in reader.tensors:
        writer.add_tensor(tensor.name, np.array(tensor.data))
    finish(writer)
    return target


def write_gpt2(path: Path) -> Path:
    """A random GPT-2: learned positions, no RoPE."""
    rng, d, n_vocab, n_ctx = np.random.default_rng(0), 64, 256, 128
    writer = gguf.GGUFWriter(str(path), "gpt2")
    writer.add_tokenizer_model("no_vocab")
    writer.add_vocab_size(n_vocab)
    writer.add_context_length(n_ctx)
    writer.add_embedding_length(d)
    writer.add_block_count(1)
    writer.add_feed_forward_length(d)
    writer.add_head_count(2)
    writer.add_layer_norm_eps(1e-5)

    def add(name: str, *shape: int) -> None:
        writer.add_tensor(name, rng.normal(0, 0.1, shape).astype(np.float32))

    for name, rows in (("token_embd", n_vocab), ("position_embd", n_ctx), ("output", n_vocab)):
        add(f"{name}.weight", rows, d)
    for name in ("output_norm", "blk.0.attn_norm", "blk.0.ffn_norm"):
        add(f"{name}.weight", d)
        add(f"{name}.bias", d)
    for name, rows in (("attn_qkv", 3 * d), ("attn_output", d), ("ffn_up", d), ("ffn_down", d)):
        add(f"blk.0.{name}.weight", rows, d)
        add(f"blk.0.{name}.bias", rows)
    finish(writer)
    return path


@pytest.fixture(scope="module", params=["M-RoPE positions", "learned positions"])
def unrotated(
    request: pytest.FixtureRequest, model_file: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, str]:
    """A model whose positions cannot be ranks, and the property that the refusal names."""
    path = tmp_path_factory.mktemp("unrotated") / "model.gguf"
    if request.param == "learned positions":
        return write_gpt2(path), request.param
    half = MODELS["qwen2-gqa"].head_dim // 2
    return write_mrope(model_file("qwen2-gqa"), path, [half // 4, half // 4, half // 2, 0]), request.param


# ---- the model's properties


@pytest.mark.parametrize("name", ["streaming", "random"])
def test_ranks_are_refused_by_the_models_property(unrotated: tuple[Path, str], name: str) -> None:
    path, words = unrotated
    with Model(path) as model:
        assert model.info["supports"]["positions"] == ["true"]
        with pytest.raises(UnsupportedModelError, match=words) as caught:
            model.session(CachePolicy(name, budget=64, positions="cache"), n_threads=1)
        assert "positions=true" in str(caught.value)


def test_such_a_model_streams_with_true_positions(unrotated: tuple[Path, str]) -> None:
    with Model(unrotated[0]) as model, model.session(CachePolicy("streaming", budget=32), n_threads=1) as session:
        assert session.stats()["positions"] == session.stats()["positions_now"] == "true"
        for i in range(100):
            session.eval([i])
        assert [position for position, _ in session.kept()] == [0, 1, 2, 3, *range(72, 100)]


def test_such_a_model_is_checked_without_shift(unrotated: tuple[Path, str], capsys: pytest.CaptureFixture[str]) -> None:
    from equip_cli.cli import main

    assert main(["check", str(unrotated[0]), "-t", "1", "--budget", "32", "-n", "32"]) == 0
    shown = capsys.readouterr().out
    assert shown.endswith("All 8 rows agree.\n") or "GPU" in shown
    assert "shift gives every token its rank as position, and this model's must stay true" in " ".join(shown.split())


def test_the_command_line_names_the_options_of_a_refusal(equip_bin: Path, unrotated: tuple[Path, str]) -> None:
    path, words = unrotated
    command = [str(equip_bin), "bench", str(path), "-t", "1", "-n", "2", "-r", "1", "--policy", "streaming"]
    environment = {key: value for key, value in os.environ.items() if key != "LLAMA_KV_POLICY"}
    result = subprocess.run(
        [*command, "--budget", "32", "--positions", "cache"],
        capture_output=True,
        text=True,
        env=environment,
        timeout=120,
    )
    errors = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert (result.returncode, result.stdout, len(errors)) == (1, "", 1)
    assert words in errors[0]


# ---- what does not go together


@pytest.mark.parametrize("positions", ["true", "auto"])
def test_shift_needs_ranks(positions: str) -> None:
    with pytest.raises(UsageError, match=f"positions cannot be {positions}: use positions=cache"):
        CachePolicy("streaming", budget=64, positions=positions, update="shift")
    with pytest.raises(UsageError, match="use positions=cache"):
        CachePolicy.parse(f"random:positions={positions},update=shift")
    assert CachePolicy("streaming", positions="cache", update="shift").update == "shift"
