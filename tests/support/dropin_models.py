"""Files that tests/support/models.py does not make: a model with recurrent layers beside attention, and a LoRA adapter."""

from __future__ import annotations

from pathlib import Path

import gguf
import numpy as np


def write_hybrid(path: Path, vocabulary: Path, seed: int = 5) -> Path:
    """A tiny lfm2 with random weights: convolution layers with a recurrent state, attention in every second layer.

    Its tokenizer is the one of the GGUF `vocabulary`.
    """
    n_layer, n_embd, n_head, n_head_kv, n_ff, n_conv = 4, 128, 4, 2, 128, 3
    head_dim = n_embd // n_head
    rng = np.random.default_rng(seed)
    tmp = path.with_suffix(".tmp")
    w = gguf.GGUFWriter(str(tmp), "lfm2")
    n_vocab = 0
    for f in gguf.GGUFReader(str(vocabulary)).fields.values():
        if f.name.startswith("tokenizer."):
            sub = f.types[-1] if f.types[0] == gguf.GGUFValueType.ARRAY else None
            w.add_key_value(f.name, f.contents(), f.types[0], sub_type=sub)
            if f.name == "tokenizer.ggml.tokens":
                n_vocab = len(f.data)
    w.add_context_length(4096)
    w.add_embedding_length(n_embd)
    w.add_block_count(n_layer)
    w.add_feed_forward_length(n_ff)
    w.add_head_count(n_head)
    w.add_head_count_kv([0 if il % 2 == 0 else n_head_kv for il in range(n_layer)])
    w.add_vocab_size(n_vocab)
    w.add_rope_dimension_count(head_dim)
    w.add_rope_freq_base(10000.0)
    w.add_layer_norm_rms_eps(1e-5)
    w.add_shortconv_l_cache(n_conv)

    def add(name: str, *shape: int, std: float) -> None:
        w.add_tensor(name, rng.normal(0.0, std, shape).astype(np.float32))

    def norm(name: str, n: int, mean: float = 1.0) -> None:
        w.add_tensor(name, (mean * (1.0 + 0.1 * rng.normal(size=n))).astype(np.float32))

    row = 1.0 / np.sqrt(n_embd)
    add("token_embd.weight", n_vocab, n_embd, std=1.0)
    norm("token_embd_norm.weight", n_embd)
    add("output.weight", n_vocab, n_embd, std=row)
    for il in range(n_layer):
        p = f"blk.{il}."
        norm(p + "attn_norm.weight", n_embd)
        norm(p + "ffn_norm.weight", n_embd)
        for part, rows, cols in (("gate", n_ff, n_embd), ("up", n_ff, n_embd), ("down", n_embd, n_ff)):
            add(f"{p}ffn_{part}.weight", rows, cols, std=0.7 / np.sqrt(cols))
        if il % 2 == 0:
            add(p + "shortconv.conv.weight", n_embd, n_conv, std=0.6)
            add(p + "shortconv.in_proj.weight", 3 * n_embd, n_embd, std=row)
            add(p + "shortconv.out_proj.weight", n_embd, n_embd, std=row)
        else:
            norm(p + "attn_q_norm.weight", head_dim, mean=1.4)
            norm(p + "attn_k_norm.weight", head_dim, mean=1.4)
            add(p + "attn_q.weight", n_head * head_dim, n_embd, std=row)
            add(p + "attn_k.weight", n_head_kv * head_dim, n_embd, std=row)
            add(p + "attn_v.weight", n_head_kv * head_dim, n_embd, std=row)
            add(p + "attn_output.weight", n_embd, n_head * head_dim, std=2.0 * row)
    w.write_header_to_file()
    w.write_kv_data_to_file()
    w.write_tensors_to_file()
    w.close()
    return tmp.replace(path)


def write_lora(path: Path, n_layer: int, n_in: int, n_out: int, seed: int = 3) -> Path:
    """A random adapter of rank 4 for the value projections of a llama model."""
    rng, rank = np.random.default_rng(seed), 4
    tmp = path.with_suffix(".tmp")
    w = gguf.GGUFWriter(str(tmp), "llama")
    w.add_type(gguf.GGUFType.ADAPTER)
    w.add_string(gguf.Keys.Adapter.TYPE, "lora")
    w.add_float32(gguf.Keys.Adapter.LORA_ALPHA, float(rank))
    for il in range(n_layer):
        name = f"blk.{il}.attn_v.weight"
        w.add_tensor(name + ".lora_a", rng.normal(0.0, 1.0 / np.sqrt(n_in), (rank, n_in)).astype(np.float32))
        w.add_tensor(name + ".lora_b", rng.normal(0.0, 1.0, (n_out, rank)).astype(np.float32))
    w.write_header_to_file()
    w.write_kv_data_to_file()
    w.write_tensors_to_file()
    w.close()
    return tmp.replace(path)
