"""Train the embedded model on CPU: short sequences until it binds names to what they name, then longer ones.

    python train.py OUT_FOLDER [--scale 1.0]     (needs torch; two cores: about 80 minutes)

Writes tokenizer.json, weights.pt and train.csv; a run that was cut off goes on where it was last saved.
"""

from __future__ import annotations

import argparse
import csv
import json
import random
import time
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from corpus import W_RECALL, Corpus, Probe, Sample, held_out_pairs, make_probe, shuffled, tokenizer_texts
from network import Network, Shape
from tokenizer import Tokenizer
from torch import Tensor

SEED = 1
TOKENS_PER_STEP = 8192
LEARNING_RATE = 3e-3
WARM_UP = 100
DECAY = 0.3  # share of the steps in which the learning rate falls to zero
N_PROBES = 24  # per bucket and look
BUCKET = 128


@dataclass(frozen=True)
class Phase:
    """Part of the training: its steps, sequence length, share of prose, and most facts in a dialogue.

    sink: reward for the BOS as an attention sink, in nats per unit of `network.sink_margin()`. Without it no head of a
    model this small finds that sink.
    """

    steps: int
    context: int
    prose: float
    facts: int
    sink: float


PHASES = (
    Phase(1400, 256, 0.15, 6, 0.0),
    Phase(500, 512, 0.3, 9, 0.0),
    Phase(300, 1024, 0.4, 12, 0.0),
    Phase(1100, 1024, 0.4, 12, 0.05),
)
N_SINK_ROWS = 32  # positions of a sequence, drawn anew at each step, whose attention is looked at


def batch(corpus: Corpus, phase: Phase) -> tuple[Tensor, Tensor]:
    """Tokens `[n, context + 1]` and loss weights of the tokens that are predicted, `[n, context]`."""
    samples: list[Sample] = []
    for _ in range(TOKENS_PER_STEP // phase.context):
        is_prose = corpus.rng.random() < phase.prose
        n = phase.context + 1
        samples.append(corpus.prose(n) if is_prose else corpus.dialogue(n, phase.facts))
    return torch.tensor([s.ids for s in samples]), torch.tensor([s.weights for s in samples])[:, 1:]


def recall(network: Network, tokenizer: Tokenizer, probes: list[Probe]) -> list[bool]:
    """For each probe, whether every token of the answer is the most likely one."""
    hits = []
    network.eval()
    with torch.no_grad():
        for probe in probes:
            ids = probe.tokens(tokenizer, answered=True)
            begin = len(probe.tokens(tokenizer, answered=False))
            best = network(torch.tensor([ids[:-1]]))[0][0, begin - 1 :].argmax(-1).tolist()
            hits.append(best == ids[begin:])
    network.train()
    return hits


def optimizers(network: Network) -> list[torch.optim.Optimizer]:
    """Muon for the matrices inside the blocks, AdamW for the embedding and the norms."""
    inside = [p for p in network.blk.parameters() if p.ndim == 2]
    rest = [p for p in network.parameters() if not any(p is q for q in inside)]
    return [
        torch.optim.Muon(inside, lr=LEARNING_RATE, weight_decay=0.1, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(rest, lr=LEARNING_RATE, betas=(0.9, 0.95), weight_decay=0.01),
    ]


def learning_rate(step: int, n_steps: int) -> float:
    """Warm-up, plateau, then a fall to zero, as a share of the full rate."""
    left = (n_steps - step) / (DECAY * n_steps)
    return min(1.0, (step + 1) / WARM_UP, left)


def main() -> None:
    """Train from the command line."""
    parser = argparse.ArgumentParser(description="Train the embedded model.")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--scale", type=float, default=1.0, help="share of the steps; for a quick look")
    args = parser.parse_args()
    torch.set_num_threads(2)
    torch.manual_seed(SEED)
    args.folder.mkdir(parents=True, exist_ok=True)

    shape = Shape()
    tokenizer = Tokenizer.train(tokenizer_texts(SEED), shape.n_vocab)
    (args.folder / "tokenizer.json").write_text(json.dumps(tokenizer.pieces))
    forbidden = torch.zeros(shape.n_vocab, shape.n_vocab, dtype=torch.bool)
    for first, second in held_out_pairs(tokenizer):
        forbidden[first, second] = True

    network = Network(shape)
    print(f"{sum(p.numel() for p in network.parameters()) / 1e6:.2f} M parameters", flush=True)
    both = optimizers(network)
    plan = [phase for phase in PHASES for _ in range(round(phase.steps * args.scale))]
    saved = args.folder / "weights.pt"
    first_step, n_tokens, seconds = 0, 0, 0.0
    if saved.exists():
        state = torch.load(saved)
        network.load_state_dict(state["network"])
        for optimizer, its in zip(both, state["optimizers"], strict=True):
            optimizer.load_state_dict(its)
        first_step, n_tokens, seconds = state["step"], state["n_tokens"], state["seconds"]
    corpus = Corpus(tokenizer, SEED + first_step)
    log = csv.writer((args.folder / "train.csv").open("a", newline=""))
    begin = time.monotonic() - seconds

    for step in range(first_step, len(plan)):
        phase = plan[step]
        tokens, weights = batch(corpus, phase)
        if forbidden[tokens[:, :-1], tokens[:, 1:]].any():
            raise ValueError("a training sequence contains a held-out pair")
        with torch.autocast("cpu", dtype=torch.bfloat16):
            logits, margin = network(tokens[:, :-1], torch.randint(phase.context, (N_SINK_ROWS,)))
        losses = F.cross_entropy(logits.float().flatten(0, 1), tokens[:, 1:].flatten(), reduction="none")
        loss = (losses * weights.flatten()).sum() / weights.sum()
        for optimizer in both:
            optimizer.zero_grad()
        (loss - phase.sink * margin).backward()
        torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        for optimizer in both:
            for group in optimizer.param_groups:
                group["lr"] = LEARNING_RATE * learning_rate(step, len(plan))
            optimizer.step()
        n_tokens += TOKENS_PER_STEP

        last = step + 1 == len(plan)
        if (step + 1) % 100 == 0 or last:
            rng = random.Random(step)
            row: list[object] = [step + 1, phase.context, n_tokens, round(time.monotonic() - begin)]
            row.append(f"{margin.item():.3f}")
            in_recall = weights.flatten() == W_RECALL
            row += [f"{loss.item():.3f}", f"{losses[in_recall].mean().item():.3f}"]
            at_first = [make_probe(tokenizer, rng, 0, BUCKET, 224) for _ in range(N_PROBES)]
            control = [shuffled(probe, rng) for probe in at_first]
            row.append(f"control {sum(recall(network, tokenizer, control))}/{N_PROBES}")
            for low in range(0, phase.context, BUCKET):
                most = 256 if phase.context == 256 else phase.context
                probes = [make_probe(tokenizer, rng, low, min(low + BUCKET, most - 16), most) for _ in range(N_PROBES)]
                row.append(sum(recall(network, tokenizer, probes)))
            print(*row, flush=True)
            log.writerow(row)
        if (step + 1) % 200 == 0 or last:
            state = {"network": network.state_dict(), "optimizers": [optimizer.state_dict() for optimizer in both]}
            state |= {"step": step + 1, "n_tokens": n_tokens, "seconds": time.monotonic() - begin}
            partial = saved.with_suffix(".tmp")
            torch.save(state, partial)
            partial.replace(saved)


if __name__ == "__main__":
    main()
