"""What a setting changes: rows of `equip eval --save FILE`, each less the first row of its policy and budget, on the same tokens.

    equip eval MODEL --policy "h2o,h2o:recent=16,h2o:recent=64" --budget 128 --agreement --save rows.jsonl ...
    python studies/paired_rows.py rows.jsonl

Below 0 is better than the first row; an interval that leaves 0 out is a difference. Rows of other texts are not paired.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from equip_cli.evaluation.paired import Series, difference
from equip_cli.evaluation.tables import labels


def cell(found: dict[str, Any] | None) -> str:
    return "-" if found is None else f"{found['difference']:+.4f} [{found['ci95'][0]:+.4f}, {found['ci95'][1]:+.4f}]"


def table(lines: list[str]) -> str:
    """Markdown of the rows in a file of `--save`."""
    rows = [json.loads(line) for line in lines]
    names = labels([row["record"] for row in rows])
    first: dict[str, tuple[dict[str, Any], str]] = {}
    shown = ["| row | less | tokens | log loss | KL |", "| --- | --- | ---: | ---: | ---: |"]
    for row, name in zip(rows, names, strict=True):
        record = row["record"]
        base, base_name = first.setdefault(
            json.dumps([row["measured"], record["policy"], record["budget"]], sort_keys=True), (row, name)
        )
        if base is row:
            continue
        ours, theirs = Series(**row["series"]), Series(**base["series"])
        n = record["budget"]
        losses, kl = difference(ours.nll, theirs.nll, n), difference(ours.kl, theirs.kl, n)
        n_tokens = (losses or kl or {"n_tokens": 0})["n_tokens"]
        shown.append(f"| {name} | {base_name} | {n_tokens} | {cell(losses)} | {cell(kl)} |")
    return "\n".join(shown)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path)
    print(table(parser.parse_args().file.read_text(encoding="utf-8").splitlines()))


if __name__ == "__main__":
    main()
