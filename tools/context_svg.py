"""Draw docs/context.svg: what `/context` shows after a newcomer has talked past a budget, on the embedded model.

python tools/context_svg.py [OUT.svg]
"""

from __future__ import annotations

import io
import re
import sys
from pathlib import Path

from rich._export_format import CONSOLE_SVG_FORMAT
from rich.console import Console

from equip_cli import CachePolicy, Model
from equip_cli.chat import context_view
from equip_cli.chat.conversation import Conversation
from equip_cli.models import embedded

TARGET = Path(__file__).resolve().parents[1] / "docs" / "context.svg"
BUDGET = 128
MESSAGES = (
    "My cat is called Tobelin.",
    "My dog is called Rimoka.",
    "What is my cat called?",
    "I had soup for lunch.",
    "The weather is cold today.",
    "I am reading about stars.",
    "We walked to the park.",
    "My sister is called Zanuri.",
    "I bought a red lamp.",
    "What is my sister called?",
    "What is my cat called?",
)


def main() -> int:
    """Write the picture."""
    target = Path(sys.argv[1]) if len(sys.argv) > 1 else TARGET
    with Model(embedded.MODEL) as model, model.session(CachePolicy("streaming", BUDGET), n_threads=1) as session:
        conversation = Conversation(session, "You are a friendly assistant.")
        for message in MESSAGES:
            for _ in conversation.say(message, 64):
                pass
        console = Console(
            highlight=False, record=True, width=72, force_terminal=True, color_system="truecolor", file=io.StringIO()
        )
        console.print("> /context", style="bold green")
        for passage in context_view.passages(conversation):
            console.print(context_view.render(model, passage, colour=True))
        console.print(context_view.summary(conversation), style="italic")
    # no font from the network; a fixed id, so that the same conversation gives the same file
    svg = console.export_svg(
        title=f"equip chat --policy streaming --budget {BUDGET}",
        code_format=re.sub(r"@font-face \{\{.*?\}\}", "", CONSOLE_SVG_FORMAT, flags=re.DOTALL),
        unique_id="equip",
    )
    target.write_text(svg, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
