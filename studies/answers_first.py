"""A chat in which the assistant's words are evicted before the user's: facts of the first turn that are known 20 turns later.

    python studies/answers_first.py MODEL --budget 256

"Random Attention" (arXiv 2609.03430) finds for reasoning that the prompt should stay and the answer go. In a chat the prompt is what
the user says. The policy `external` evicts by scores that are set here before a chat is read: a token's position, so that the oldest
goes, and more than any position for the user's. The chats are those of `equip eval --chat`, with the same seed.
"""

from __future__ import annotations

import argparse

import numpy as np

from equip_cli import CachePolicy, Model, Session
from equip_cli.evaluation import facts
from equip_cli.evaluation.quality import wilson

USER, ASSISTANT = b"User:", b"Assistant:"


def is_of_user(model: Model, tokens: list[int]) -> list[bool]:
    """Whether each token of a chat is the user's; a speaker's name is his own."""
    pieces = [model.piece(token) for token in tokens]
    text = b"".join(pieces)
    starts = np.cumsum([0, *map(len, pieces[:-1])])
    result = []
    for start in starts:
        before = text[: start + max(len(USER), len(ASSISTANT))]
        result.append(before.rfind(USER) >= before.rfind(ASSISTANT))
    return result


def score(session: Session, chat: facts.Task) -> None:
    """The user's tokens above all others, and of equals the newer one above the older."""
    mine = is_of_user(session.model, chat.tokens)
    session.set_scores(None, None, range(len(mine)), [i + len(mine) * float(user) for i, user in enumerate(mine)])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--budget", type=int, default=256)
    parser.add_argument("--chats", type=int, default=3)
    parser.add_argument("--turns", type=int, default=20)
    args = parser.parse_args()
    with Model(args.model, n_gpu_layers=0) as model:
        chats = facts.chat_tasks(model, args.turns, args.chats)
        n = sum(len(chat.tokens) for chat in chats)
        n_user = sum(sum(is_of_user(model, chat.tokens)) for chat in chats)
        print(f"{args.chats} chats, {n // len(chats)} tokens each, {n_user / n:.0%} of them the user's", flush=True)
        print("| policy, budget | evicted first | known | 95% interval |")
        print("| --- | --- | ---: | ---: |", flush=True)
        for name, words in (("streaming", "the oldest"), ("external", "the assistant's"), ("h2o", "by its sums")):
            before = {"before": score} if name == "external" else {}
            with model.session(CachePolicy(name, args.budget), n_threads=1) as session:
                [(n_right, n_questions)] = facts.hits(session, chats, lambda _: None, **before).values()
            low, high = wilson(n_right, n_questions)
            print(
                f"| {name}, {args.budget} | {words} | {n_right} of {n_questions} | {low:.2f} to {high:.2f} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
