"""Markdown on a terminal while it is written: styles in place of marks, and lists, quotes and code with their own margins.

What may become a mark is held back until that is known, at most for LOOK_AHEAD characters of the same line. What does not
become one is text. Blocks keep their marks; where there is no colour, words do too.
"""

from __future__ import annotations

import re

from equip_cli.terminal.flow import BOLD, CYAN, DIM, ITALIC, UNDERLINE, Flow, has_no_spaces

LOOK_AHEAD = 80  # characters
_LONGEST = {"*": 3, "_": 1, "`": 8}  # a longer run of these is text; so are the underscores of __init__

_STYLES = {"*": (ITALIC, BOLD, f"{BOLD};{ITALIC}"), "_": (ITALIC,), "`": (CYAN, CYAN, CYAN)}

_MAY_BEGIN_BLOCK = re.compile(
    r"[ \t]*(?:>|[-+*_](?:[ \t]*[-*_])*[ \t]*|\d{1,9}[.)]?[ \t]*|#{1,6}[ \t]*|`{1,2}|`{3,}[^`]*|~{1,2}|~{3,}.*)?"
)
_QUOTE = re.compile(r"[ \t]*> ?")
_ITEM = re.compile(r"[ \t]*(?:[-+*]|\d{1,9}[.)])[ \t]+(?=\S)")
_HEADING = re.compile(r"[ \t]*(#{1,6})[ \t]+(?=\S)")
_RULE = re.compile(r"[ \t]*([-*_])(?:[ \t]*\1){2,}[ \t]*")
_FENCE = re.compile(r"[ \t]*(`{3,}|~{3,})(?:(?<=`)[^`]*|(?<=~).*)")
_SPACES = re.compile(r"[ \t]*")

_MARK = re.compile(r"\\.?|`+|\*+|_+", re.DOTALL)
_TICKS = re.compile(r"`+")
_BEFORE = frozenset("([{\"'“‘«—–-:,;>|!¡¿")  # beside spaces, what may stand before an emphasis


def _in_word(char: str) -> bool:
    return char.isalnum() and not has_no_spaces(char)


class Markdown:
    """Feed it an answer in pieces of any size; `close()` it at the end."""

    def __init__(self, flow: Flow) -> None:
        self._flow = flow
        self._line = ""  # of the line, what is not shown yet
        self._has_begun = False  # it is known what block the line belongs to
        self._style = ""  # of the line
        self._before = ""  # the character before `_line`, "" at the beginning of a line
        self._fence: str | None = None  # the marks that ended the line before a block of code

    def feed(self, text: str) -> None:
        """More of the answer."""
        first, *others = text.split("\n")
        self._line += first
        for line in others:
            self._show(is_whole=True)
            self._flow.write("\n")
            self._flow.margin = ""
            self._line, self._has_begun, self._style, self._before = line, False, "", ""
        self._show(is_whole=False)

    def close(self) -> None:
        """Show what was held back, and end the line if one has begun."""
        self._show(is_whole=True)
        self._flow.close()
        self._flow.margin = ""

    def _show(self, *, is_whole: bool) -> None:
        """As much of the line as can be told; is_whole: no more of it comes."""
        self._has_begun = self._has_begun or (self._begin_code if self._fence else self._begin)(is_whole)
        if not self._has_begun or not self._line:
            return
        if self._fence:
            self._flow.write_raw(self._line, CYAN)
            self._line = ""
        elif self._flow.coloured:
            self._line = self._words(self._line, self._style, is_whole)
        else:
            self._flow.write(self._line)
            self._line = ""

    # ---- blocks

    def _begin_code(self, is_whole: bool) -> bool:
        """Whether it is known that the line belongs to the code, or ends it."""
        fence = self._fence or ""
        may_end = re.fullmatch(rf"[ \t>]*({re.escape(fence[0])}*)[ \t]*", self._line)
        if may_end is None or len(self._line) > LOOK_AHEAD:
            return True
        if is_whole and len(may_end[1]) >= len(fence):
            self._flow.write_raw(self._line, DIM)
            self._line, self._fence = "", None
        return is_whole

    def _begin(self, is_whole: bool) -> bool:
        """Whether it is known what the line is; then its marks are shown, or are a style, and the text is left."""
        while True:
            line, is_short = self._line, len(self._line) <= LOOK_AHEAD
            if not is_whole and is_short and _MAY_BEGIN_BLOCK.fullmatch(line):
                return False
            if is_whole and is_short and _RULE.fullmatch(line):
                self._take(len(line))
            elif is_whole and is_short and (found := _FENCE.fullmatch(line)):
                self._take(len(line))
                self._fence = found[1]
            elif (found := _QUOTE.match(line) or _ITEM.match(line)) and found.end() <= LOOK_AHEAD:
                is_quote = ">" in found[0]
                mark = found[0].expandtabs()
                self._flow.margin += mark if is_quote else " " * len(mark)
                self._style = self._style or (ITALIC if is_quote else "")
                self._take(found.end(), DIM if is_quote else "")
                continue
            elif (found := _HEADING.match(line)) and found.end() <= LOOK_AHEAD:
                self._style = f"{BOLD};{UNDERLINE}" if len(found[1]) == 1 else BOLD
                if self._flow.coloured:
                    self._line = line[found.end() :]
            elif found := _SPACES.match(line):
                self._flow.margin += " " * min(len(found[0].expandtabs()), LOOK_AHEAD)
            return True

    def _take(self, n: int, style: str = DIM) -> None:
        """Show the first `n` characters of the line as they are."""
        self._flow.write_raw(self._line[:n], style)
        self._line = self._line[n:]

    # ---- words

    def _words(self, text: str, style: str, is_whole: bool) -> str:
        """Show the text of a line; returns what has to wait for more."""
        begin = 0
        while found := _MARK.search(text, begin):
            self._put(text[begin : found.start()], style)
            begin, mark = found.start(), found[0]
            span: tuple[int, int] | None = (0, 0)
            if mark[0] == "\\":
                span = None if mark == "\\" and not is_whole else span
            elif len(mark) <= _LONGEST[mark[0]] and self._before != mark[0]:
                may_go_on = found.end() == len(text) and not is_whole
                span = None if may_go_on else self._span(text, found, is_whole)
            if span is None:
                return text[begin:]
            end, after = span
            if not after:
                self._put(mark, style)
                begin = found.end()
                continue
            both = ";".join(filter(None, (style, _STYLES[mark[0]][min(len(mark), 3) - 1])))
            if mark[0] == "`":
                self._put(text[found.end() : end], both)
            else:
                self._before = ""
                self._words(text[found.end() : end], both, True)
            self._before, begin = mark[0], after
        self._put(text[begin:], style)
        return ""

    def _put(self, text: str, style: str) -> None:
        self._flow.write(text, style)
        self._before = text[-1:] or self._before

    def _span(self, text: str, mark: re.Match[str], is_whole: bool) -> tuple[int, int] | None:
        """(end of what the mark encloses, end of the mark that closes it), (0, 0) if it encloses nothing, None if that
        cannot be told yet."""
        limit = mark.start() + LOOK_AHEAD
        is_decided = is_whole or len(text) > limit
        known = min(limit, len(text) if is_whole else len(text) - 1)  # behind it a run may go on
        if mark[0][0] == "`":
            end = self._code_end(text, mark.end(), len(mark[0]), known)
            return (end - len(mark[0]), end) if end else (0, 0) if is_decided else None
        if not self._may_open(self._before, text[mark.end() : mark.end() + 1], mark[0]):
            return 0, 0
        n, inside, at = len(mark[0]), 0, mark.end()
        while (found := _MARK.search(text, at)) and found.end() <= known:
            at, run = found.end(), found[0]
            before, after = text[found.start() - 1], text[at : at + 1]
            if run[0] == "`":
                end = self._code_end(text, at, len(run), known)
                if not end and not is_decided:
                    return None
                at = end or at
            elif run[0] == mark[0][0] and found.start() > mark.end():
                if self._may_close(before, after, run):
                    if len(run) == n:
                        return found.start(), at
                    if inside and len(run) == n + inside:
                        return at - n, at
                    inside = 0 if len(run) == inside else inside
                elif self._may_open(before, after, run) and len(run) < 3:
                    inside = len(run)
        return (0, 0) if is_decided else None

    @staticmethod
    def _code_end(text: str, begin: int, n: int, known: int) -> int:
        """End of the next run of `n` backticks, 0 if there is none as far as is known."""
        runs = (run.end() for run in _TICKS.finditer(text, begin) if len(run[0]) == n)
        return next((end for end in runs if end <= known), 0)

    @staticmethod
    def _may_open(before: str, after: str, mark: str) -> bool:
        if not after or after.isspace():
            return False
        return not before or before.isspace() or before in _BEFORE or (mark[0] == "*" and has_no_spaces(before))

    @staticmethod
    def _may_close(before: str, after: str, mark: str) -> bool:
        if before.isspace():
            return False
        return not _in_word(after) or (mark[0] == "*" and before.isalnum())
