"""A text on workers, as a program of its own: `python rpc_run.py WORKERS POLICY [LAYERS]` prints what was generated and
what is kept, and how often a step reads from the devices and writes to them.

WORKERS: HOST:PORT,... or "" for this machine's CPU. POLICY: the text of a policy. LAYERS: how many are on them (default: all).
"""

from __future__ import annotations

import json
import sys

from equip_cli import CachePolicy, Model, Sampling
from equip_cli.models import embedded

N_PROMPT, N_GENERATED, N_STEADY = 150, 20, 40  # what a device remembers of its choices, 62 tokens, does not run full


def main(workers: str, policy: str, n_gpu_layers: str = "-1") -> None:
    with (
        Model(embedded.MODEL, rpc=workers or None, n_gpu_layers=int(n_gpu_layers)) as model,
        model.session(CachePolicy.parse(policy), n_ubatch=32, type_k="f32", type_v="f32", flash_attn=False) as session,
    ):
        session.eval(model.tokenize(embedded.prose())[:N_PROMPT])
        session.set_sampler(Sampling(temp=0))
        tokens = session.generate_tokens(N_GENERATED)
        before = session.stats()
        tokens += session.generate_tokens(N_STEADY)
        after = session.stats()
        info = model.info
        kept = [
            [position for position, _ in session.head(layer, head)]
            for layer in range(info["n_layer"])
            for head in range(info["n_head_kv"])
        ]
        per_step = {key: (after[key] - before[key]) / N_STEADY for key in ("device_reads", "device_writes")}
        print(
            json.dumps(
                {"tokens": tokens, "kept": kept, "n_evicted": before["n_evicted"], "n_filtered": after["n_filtered"]}
                | per_step
            )
        )


if __name__ == "__main__":
    main(*sys.argv[1:])
