"""Write the trained model as GGUF, the held-out texts, and the logits that a test compares with.

    python export.py TRAINED_FOLDER     (needs torch, gguf, numpy)

Writes equip_cli/assets/{equip-tiny.gguf, recall.jsonl.gz, prose.txt.gz} and tests/data/tiny_logits.npz.
"""

from __future__ import annotations

import argparse
import gzip
import json
import random
from pathlib import Path

import gguf
import numpy as np
import torch
from corpus import Probe, held_out_prose, make_probe
from network import Network, Shape
from tokenizer import BOS, END, EOS, N_BYTES, SPECIAL, UNK, Tokenizer

ROOT = Path(__file__).resolve().parents[2]
ASSETS = ROOT / "equip_cli" / "assets"
LOGITS = ROOT / "tests" / "data" / "tiny_logits.npz"

SEED = 20261124
BUCKET, PER_BUCKET = 128, 50
PROSE_TOKENS = 60_000

TEMPLATE = (
    "{%- for message in messages -%}{{- '<|' + message['role'] + '|>' + message['content'] | trim + '<|end|>' -}}"
    "{%- endfor -%}{%- if add_generation_prompt -%}{{- '<|assistant|>' -}}{%- endif -%}"
)
ABOUT = (
    "A demonstration model: it remembers names that are told to it, and writes simple prose. Trained from scratch on "
    "generated text alone, on two CPU cores, by studies/tiny_model of EQUIP for llama.cpp."
)


def write_vocabulary(writer: gguf.GGUFWriter, tokenizer: Tokenizer) -> None:
    """SentencePiece BPE as llama.cpp knows it: the score of a piece is minus its rank."""
    kind = gguf.TokenType
    control = [kind.UNKNOWN if i == UNK else kind.CONTROL for i in range(len(SPECIAL))]
    texts = [*SPECIAL, *(f"<0x{byte:02X}>" for byte in range(N_BYTES)), *tokenizer.pieces]
    types = [*control, *[kind.BYTE] * N_BYTES, *[kind.NORMAL] * len(tokenizer.pieces)]
    scores = [0.0] * tokenizer.first_id + [-float(rank) for rank in range(len(tokenizer.pieces))]
    writer.add_tokenizer_model("llama")
    writer.add_tokenizer_pre("default")
    writer.add_token_list([text.encode() for text in texts])
    writer.add_token_scores(scores)
    writer.add_token_types(types)
    writer.add_bos_token_id(BOS)
    writer.add_eos_token_id(EOS)
    writer.add_eot_token_id(END)
    writer.add_unk_token_id(UNK)
    writer.add_add_bos_token(True)
    writer.add_add_eos_token(False)
    writer.add_add_space_prefix(True)
    writer.add_chat_template(TEMPLATE)


def write_gguf(path: Path, network: Network, tokenizer: Tokenizer, n_tokens: int) -> None:
    """The model in F16, its norms in F32."""
    shape = network.shape
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_name("EQUIP tiny")
    writer.add_description(f"{ABOUT} {n_tokens / 1e6:.0f} million tokens, sequences of up to {shape.context}.")
    writer.add_author("EQUIP for llama.cpp authors")
    writer.add_license("mit")
    writer.add_languages(["en"])
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_F16)
    writer.add_float32("general.sampling.temp", 0.0)  # names are recalled, not invented
    writer.add_context_length(shape.context)
    writer.add_embedding_length(shape.n_embd)
    writer.add_block_count(shape.n_layer)
    writer.add_feed_forward_length(shape.n_ff)
    writer.add_head_count(shape.n_head)
    writer.add_head_count_kv(shape.n_head_kv)
    writer.add_key_length(shape.head_dim)
    writer.add_value_length(shape.head_dim)
    writer.add_rope_dimension_count(shape.head_dim)
    writer.add_rope_freq_base(shape.rope_base)
    writer.add_layer_norm_rms_eps(shape.norm_eps)
    writer.add_vocab_size(shape.n_vocab)
    write_vocabulary(writer, tokenizer)
    for name, tensor in network.state_dict().items():  # the modules have GGUF's names
        writer.add_tensor(name, tensor.numpy().astype(np.float32 if tensor.ndim == 1 else np.float16))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def recall_line(probe: Probe) -> str:
    """One dialogue as JSON: the messages up to the question, the answer, and the name in it."""
    messages = [
        {"role": role, "content": content}
        for turn in probe.turns
        for role, content in (("user", turn.user), ("assistant", turn.assistant))
    ]
    answer = messages.pop()["content"]
    return json.dumps({"messages": messages, "answer": answer, "value": probe.turns[-1].value})


def compress(path: Path, text: str) -> None:
    """gzip without a time stamp, so that the same text gives the same file."""
    path.write_bytes(gzip.compress(text.encode(), mtime=0))


def write_logits(path: Path, network: Network, probe: Probe, tokenizer: Tokenizer, prose: str) -> None:
    """PyTorch's f32 logits at every eighth position of a dialogue and of some prose."""
    arrays: dict[str, np.ndarray] = {}
    with torch.no_grad():
        for name, ids in (
            ("dialogue", probe.tokens(tokenizer, answered=True)[:128]),
            ("prose", [BOS, *tokenizer.encode(prose[:1200])][:192]),
        ):
            arrays[f"{name}_tokens"] = np.array(ids, dtype=np.int32)
            arrays[f"{name}_logits"] = network(torch.tensor([ids]))[0][0, 7::8].numpy().astype(np.float32)
    path.parent.mkdir(exist_ok=True)
    np.savez_compressed(path, **arrays)


def main() -> None:
    """Export from the command line."""
    parser = argparse.ArgumentParser(description="Export the embedded model.")
    parser.add_argument("folder", type=Path)
    args = parser.parse_args()
    state = torch.load(args.folder / "weights.pt")
    network = Network(Shape())
    # what the file holds, and what PyTorch computes with to compare
    network.load_state_dict({k: w.half().float() if w.ndim > 1 else w for k, w in state["network"].items()})
    network.eval()
    tokenizer = Tokenizer(json.loads((args.folder / "tokenizer.json").read_text()))

    ASSETS.mkdir(exist_ok=True)
    write_gguf(ASSETS / "equip-tiny.gguf", network, tokenizer, state["n_tokens"])
    rng = random.Random(SEED)
    context = network.shape.context
    probes = [
        make_probe(tokenizer, rng, low, min(low + BUCKET, context - 24), context)
        for low in range(0, context, BUCKET)
        for _ in range(PER_BUCKET)
    ]
    compress(ASSETS / "recall.jsonl.gz", "".join(recall_line(probe) + "\n" for probe in probes))
    prose = held_out_prose(tokenizer, SEED, PROSE_TOKENS)
    compress(ASSETS / "prose.txt.gz", prose)
    write_logits(LOGITS, network, probes[100], tokenizer, prose)


if __name__ == "__main__":
    main()
