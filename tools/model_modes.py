"""Fill in the column `modes` of models.txt: what `equip info` says of a file of each architecture's shape.

python tools/model_modes.py

The files are upstream's own tiny random models, and one of ours for gemma4, which upstream leaves out; so this tells what
the library accepts, not how well a model answers.
"""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import upstream_tests

from equip_cli import EquipError, Model
from equip_cli.core.native import load

LIST = Path(__file__).resolve().parents[1] / "models.txt"


def modes(supports: dict[str, list[str]]) -> str:
    """`streaming, random (true, cache)`: the policies that bound the cache, and the position rules.

    All of them are `all`, and more than three of them their number, `7 of 12`: `equip info` has the names.
    """
    policies = [name for name in supports["policies"] if name != "none"]
    n_known = len(load().policies()) - 1
    text = ", ".join(policies) if len(policies) <= 3 else f"{len(policies)} of {n_known}"
    if len(policies) == n_known:
        text = "all"
    return f"{text} ({', '.join(supports['positions'])})" if policies else "none"


def write_gemma4(path: Path) -> Path:
    """A tiny gemma4 with random weights: every fifth layer has full attention with larger heads, and the last five take
    the keys and values of the two layers before them."""
    import gguf
    import numpy as np

    n_layer, n_shared, n_embd, n_head, n_head_kv, n_ff, n_vocab, n_per_layer = 10, 5, 64, 2, 1, 96, 128, 16
    rng = np.random.default_rng(1)
    full = [il % 5 == 4 for il in range(n_layer)]
    head_dims = [64 if is_full else 32 for is_full in full]
    w = gguf.GGUFWriter(str(path), "gemma4")
    w.add_context_length(256)
    w.add_block_count(n_layer)
    w.add_embedding_length(n_embd)
    w.add_feed_forward_length(n_ff)
    w.add_head_count(n_head)
    w.add_head_count_kv(n_head_kv)
    w.add_layer_norm_rms_eps(1e-6)
    w.add_rope_freq_base(1e6)
    w.add_sliding_window(32)
    w.add_array("gemma4.attention.sliding_window_pattern", [not is_full for is_full in full])
    w.add_float32("gemma4.rope.freq_base_swa", 1e4)
    w.add_uint32("gemma4.attention.shared_kv_layers", n_shared)
    w.add_uint32("gemma4.embedding_length_per_layer_input", n_per_layer)
    for kind, head_dim in (("", max(head_dims)), ("_swa", min(head_dims))):
        w.add_uint32(f"gemma4.attention.key_length{kind}", head_dim)
        w.add_uint32(f"gemma4.attention.value_length{kind}", head_dim)
        w.add_uint32(f"gemma4.rope.dimension_count{kind}", head_dim)
    w.add_tokenizer_model("no_vocab")
    w.add_vocab_size(n_vocab)

    def add(name: str, *shape: int) -> None:
        weights = rng.standard_normal(shape) / np.sqrt(shape[-1]) if len(shape) > 1 else np.ones(shape)
        w.add_tensor(f"{name}.weight", weights.astype(np.float32))

    add("token_embd", n_vocab, n_embd)
    add("output_norm", n_embd)
    add("rope_freqs", max(head_dims) // 2)
    add("per_layer_token_embd", n_vocab, n_per_layer * n_layer)
    add("per_layer_model_proj", n_per_layer * n_layer, n_embd)
    add("per_layer_proj_norm", n_per_layer)
    for il, head_dim in enumerate(head_dims):
        for norm in ("attn_norm", "post_attention_norm", "ffn_norm", "post_ffw_norm", "post_norm"):
            add(f"blk.{il}.{norm}", n_embd)
        add(f"blk.{il}.attn_q", n_head * head_dim, n_embd)
        add(f"blk.{il}.attn_q_norm", head_dim)
        if il < n_layer - n_shared:
            add(f"blk.{il}.attn_k", n_head_kv * head_dim, n_embd)
            add(f"blk.{il}.attn_v", n_head_kv * head_dim, n_embd)
            add(f"blk.{il}.attn_k_norm", head_dim)
        add(f"blk.{il}.attn_output", n_embd, n_head * head_dim)
        add(f"blk.{il}.ffn_gate", n_ff, n_embd)
        add(f"blk.{il}.ffn_up", n_ff, n_embd)
        add(f"blk.{il}.ffn_down", n_embd, n_ff)
        add(f"blk.{il}.inp_gate", n_per_layer, n_embd)
        add(f"blk.{il}.proj", n_embd, n_per_layer)
    w.write_header_to_file()
    w.write_kv_data_to_file()
    w.write_tensors_to_file()
    w.close()
    return path


def modes_of(arch: str, folder: Path) -> str:
    """What the first model of this architecture in `folder` supports."""
    with tempfile.TemporaryDirectory() as own:
        ours = [write_gemma4(Path(own) / "gemma4.gguf")] if arch == "gemma4" else []
        for path in [*sorted(folder.rglob("*.gguf")), *ours]:
            try:
                with Model(path, n_gpu_layers=0) as model:
                    info: dict[str, Any] = model.info
            except EquipError:
                continue
            if info["arch"] == arch:
                return modes(info["supports"])
    return "not checked"


def updated(text: str, folder: Path) -> str:
    """The list with its column of modes, the seventh, made anew from the models in `folder`."""
    lines = text.splitlines()
    cells = {line: re.split(r"\s{2,}", line) for line in lines if line and not line.startswith("#")}
    found = {arch: modes_of(arch, folder) for arch in dict.fromkeys(row[3] for row in cells.values())}
    begin = max(line.index(f"  {row[6]}") + 2 for line, row in cells.items())
    width = max(map(len, found.values()))
    made = {
        line: "  ".join([line[: begin - 2].ljust(begin - 2), found[row[3]].ljust(width), *row[7:]]).rstrip()
        for line, row in cells.items()
    }
    return "\n".join(made.get(line, line) for line in lines) + "\n"


def main() -> int:
    """Write models.txt."""
    with tempfile.TemporaryDirectory() as folder:
        program = Path(upstream_tests.build("tests")) / "test-llama-archs"
        subprocess.run([str(program), "-o", folder], capture_output=True, check=True, cwd=folder)
        LIST.write_text(updated(LIST.read_text(encoding="utf-8"), Path(folder)), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
