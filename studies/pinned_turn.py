"""A chat whose first turn is pinned, beside one in which it may be evicted: facts of that turn that are known 20 turns later.

    python studies/pinned_turn.py MODEL --policy streaming,h2o --budget 256

The chats are those of `equip eval --chat`, with the same seed.
"""

from __future__ import annotations

import argparse

from equip_cli import CachePolicy, Model
from equip_cli.evaluation import facts
from equip_cli.evaluation.quality import wilson


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--policy", default="streaming,h2o")
    parser.add_argument("--budget", type=int, default=256)
    parser.add_argument("--chats", type=int, default=3)
    parser.add_argument("--turns", type=int, default=20)
    args = parser.parse_args()
    with Model(args.model, n_gpu_layers=0) as model:
        chats = facts.chat_tasks(model, args.turns, args.chats)
        print(f"{args.chats} chats, {sum(len(chat.tokens) for chat in chats) // len(chats)} tokens each", flush=True)
        print("| policy, budget | first turn | pinned tokens | known | 95% interval |")
        print("| --- | --- | ---: | ---: | ---: |", flush=True)
        for name in args.policy.split(","):
            with model.session(CachePolicy(name, args.budget), n_threads=1) as session:
                for is_pinned in (False, True):
                    before = {"before": facts.pin_told} if is_pinned else {}
                    [(n_right, n)] = facts.hits(session, chats, lambda _: None, **before).values()
                    low, high = wilson(n_right, n)
                    words = ("pinned", chats[0].n_told) if is_pinned else ("as it comes", 0)
                    print(
                        f"| {name}, {args.budget} | {words[0]} | {words[1]} | {n_right} of {n} | {low:.2f} to {high:.2f} |",
                        flush=True,
                    )


if __name__ == "__main__":
    main()
