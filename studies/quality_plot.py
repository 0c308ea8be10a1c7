"""Draw the table of a real model in docs/evaluating.md with the plots of `equip eval`, so that picture and table cannot differ.

    python studies/quality_plot.py docs/quality-smollm2.svg

The window without sinks is left out: it lies so far above all others that these would be one line.
"""

from __future__ import annotations

import argparse
import re
from pathlib import Path
from typing import Any

from equip_cli import plots

PAGE = Path(__file__).parents[1] / "docs" / "evaluating.md"
HEADING = "## A real model\n"
MODEL = "SmolLM2-135M-Instruct.Q4_1.gguf"
WINDOW = "window without sinks"
BYTES_PER_TOKEN = 23040  # of keys and values in f16: 30 layers, 3 KV heads of width 64
N_TOKENS = 4000


def cells(line: str) -> list[str]:
    return [cell.strip() for cell in line.strip().strip("|").split("|")]


def records(page: str) -> list[dict[str, Any]]:
    """The first table below the heading as `equip eval --json` would print it; what it does not tell is left out.

    Raises ValueError for a table of another form.
    """
    section = page.partition(HEADING)[2].partition("\n## ")[0]
    lines = [line for line in section.splitlines() if line.startswith("|")]
    titles = cells(lines[0])
    budgets = [int(title.partition(":")[0]) for title in titles if re.fullmatch(r"\d+: perplexity", title)]
    full = re.search(r"full cache has a perplexity of (\d+\.\d+)", section)
    if not budgets or full is None or len(titles) != 1 + 3 * len(budgets):
        raise ValueError("the table is not one of perplexity, top token and KL by budget")
    same = {
        "model": MODEL,
        "n_tokens": N_TOKENS,
        "update": "inplace",
        "type_k": "f16",
        "type_v": "f16",
        "positions": "",
    }
    found: list[dict[str, Any]] = [same | {"policy": "none", "scope": "token", "sinks": 0, "ppl": float(full[1])}]
    for line in lines[2:]:
        name, *values = cells(line)
        if len(values) != 3 * len(budgets):
            break
        name = name.strip("`")
        if name == WINDOW:
            continue
        for i, budget in enumerate(budgets):
            ppl, top1, kl = values[3 * i : 3 * i + 3]
            mean, low, high = (float(number) for number in re.findall(r"[\d.]+", kl))
            found.append(
                same
                | {
                    "policy": name,
                    "sinks": 4,
                    "scope": "token",
                    "budget": budget,
                    "kept_bytes": budget * BYTES_PER_TOKEN,
                    "ppl": float(ppl),
                    "agreement": {"top1": float(top1), "kl": mean, "kl_ci95": [low, high]},
                }
            )
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("target", help="the picture: .svg or .png")
    plots.eval_figure(records(PAGE.read_text(encoding="utf-8")), parser.parse_args().target)


if __name__ == "__main__":
    main()
