"""Processor time per token with `filter=RATIO` against the same policy without it, in turns: for a machine that others use too.

    python studies/filter_time.py MODEL.gguf TEXT [BUDGET [ROUNDS]]

One thread. The time is that of this process on a processor, not the wall's, so waiting for others does not count; what they
do to the caches of the processor does. Every session has read BUDGET tokens of the text and then decodes 8 tokens in each
round, one session after the other; a ratio is the median over the rounds, with the middle half of them.
"""

from __future__ import annotations

import statistics
import sys
import time
from pathlib import Path

from equip_cli import Model

RATIOS = (0.1, 0.3, 0.5)
N_STEP, N_WARM = 8, 48


def main(path: str, text: str, budget: int = 1024, rounds: int = 24) -> None:
    policies = [f"h2o:budget={budget},positions=true"]
    policies += [f"{policies[0]},filter={ratio},filter_warmup=16" for ratio in RATIOS]
    with Model(path, n_gpu_layers=0) as model:
        tokens = model.tokenize(Path(text).read_text(encoding="utf-8"))[: budget + 1]
        sessions = [model.session(policy, n_threads=1, flash_attn=True) for policy in policies]
        for session in sessions:
            session.eval(tokens)
            session.time_decode(N_WARM)
        spent: list[list[float]] = [[] for _ in sessions]
        for _ in range(rounds):
            for session, times in zip(sessions, spent, strict=True):
                start = time.process_time()
                session.time_decode(N_STEP)
                times.append((time.process_time() - start) / N_STEP)
        print(f"without a filter: {1e3 * statistics.median(spent[0]):.1f} ms of processor time per token")
        for ratio, session, times in zip(RATIOS, sessions[1:], spent[1:], strict=True):
            pairs = sorted(one / other for one, other in zip(times, spent[0], strict=True))
            low, high = pairs[len(pairs) // 4], pairs[-1 - len(pairs) // 4]
            stats = session.stats()
            share = stats["n_filtered"] / stats["n_filterable"]
            print(f"filter={ratio}: {statistics.median(pairs):.3f} ({low:.3f} to {high:.3f}), left out {share:.3f}")


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], *map(int, sys.argv[3:]))
