"""Keep patches/ in step with a git work tree of the pinned llama.cpp.

    python tools/export_patches.py --make-worktree DIR   the pristine tree and one commit per patch, to edit the series
    python tools/export_patches.py DIR                   write the commits of that work tree to patches/
    python tools/export_patches.py --check               patches/ applies, re-exports to itself, and is small
    python tools/export_patches.py --count               how many lines it changes

Only this developer's tool needs git; --check leaves out the re-export where there is none.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "native" / "cmake"))

import upstream  # noqa: E402
from upstream import UpstreamError, say  # noqa: E402

MAX_LINES = 600  # added + removed: the series is call sites, code belongs into native/
TAG = "pristine"
NAME = re.compile(r"\d{4}-[A-Za-z0-9-]+\.patch")
GIT = ["git", "-c", "user.name=equip", "-c", "user.email=equip@localhost", "-c", "core.autocrlf=false"]
GIT += ["-c", "commit.gpgsign=false", "-c", "gc.auto=0"]


def git(tree: Path, *args: str) -> bytes:
    # a hook or an outer repository must not decide which tree this is about
    env = {k: v for k, v in os.environ.items() if not k.startswith("GIT_")}
    result = subprocess.run([*GIT, "-C", str(tree), *args], capture_output=True, env=env)
    if result.returncode != 0:
        raise UpstreamError(f"git {args[0]} failed in {tree}: {result.stderr.decode(errors='replace').strip()}")
    return result.stdout


def pristine_files() -> dict[str, upstream.SourceFile]:
    pin = upstream.load_pin()
    given = os.environ.get("EQUIP_LLAMA_CPP_SOURCE")
    if given and Path(given).is_dir():
        return {file[0]: file for file in upstream.tree_files(Path(given))}
    tarball = Path(given) if given else upstream.fetch(pin)
    return {file[0]: file for file in upstream.tarball_files(tarball, pin.folder)}


def message(patch: Path) -> str:
    """Subject and body: what stands before the diff."""
    head = patch.read_text(encoding="utf-8").split("\ndiff --git ", 1)[0]
    subject = re.search(r"^Subject: (.*(?:\n .*)*)", head, re.MULTILINE)
    body = head.split("\n\n", 1)[1] if "\n\n" in head else ""
    title = subject[1].replace("\n", "").removeprefix("[PATCH] ") if subject else patch.stem
    return f"{title}\n\n{re.split(r'^---$', body, maxsplit=1, flags=re.MULTILINE)[0].strip()}\n"


def changed_lines(patches: Iterable[Path]) -> tuple[int, int]:
    added = removed = 0
    for patch in patches:
        for line in patch.read_text(encoding="utf-8").splitlines():
            added += line.startswith("+") and not line.startswith("+++ ")
            removed += line.startswith("-") and not line.startswith("--- ") and line != "---"
    return added, removed


def commit_series(tree: Path, files: Iterable[upstream.SourceFile], patches: list[Path]) -> None:
    """A new repository in `tree`: `files`, tagged, and one commit per patch."""
    upstream.write_files(files, tree)
    git(tree, "init", "--quiet")
    # upstream's own ignore rules hide some of its files
    git(tree, "add", "--all", "--force")
    git(tree, "commit", "--quiet", "--allow-empty", "-m", f"llama.cpp {upstream.load_pin().commit}")
    git(tree, "tag", TAG)
    for patch in patches:
        upstream.apply_patch(patch, tree)
        git(tree, "add", "--all", "--force")
        git(tree, "commit", "--quiet", "--cleanup=verbatim", "-m", message(patch))


def base_of(tree: Path) -> str:
    try:
        return git(tree, "rev-parse", "--verify", "--quiet", f"{TAG}^{{commit}}").decode().strip()
    except UpstreamError:
        return git(tree, "rev-list", "--max-parents=0", "HEAD").decode().split()[-1]


def export(tree: Path, out: Path) -> list[Path]:
    """format-patch without what differs from one machine to the next: author, date, mail headers, hash lengths."""
    args = ["--zero-commit", "--no-signature", "--no-numbered", "-U3", "--no-stat", "--no-renames", "--no-color"]
    args += ["--abbrev=12", "--subject-prefix=", "--diff-algorithm=myers", "--src-prefix=a/", "--dst-prefix=b/"]
    git(tree, "format-patch", *args, "-o", str(out), f"{base_of(tree)}..HEAD")
    patches = upstream.series(out)
    for patch in patches:
        head, diff = patch.read_bytes().split(b"\ndiff --git ", 1)
        subject, _, body = head.partition(b"\n\n")
        subject = re.search(rb"^Subject: .*(?:\n .*)*", subject, re.MULTILINE)[0].replace(b"\n", b"")  # type: ignore[index]
        body = body.removesuffix(b"---\n").rstrip()
        parts = [subject, body, b"---"] if body else [subject, b"---"]
        patch.write_bytes(b"\n\n".join(parts) + b"\n\ndiff --git " + diff)
    return patches


def compare(files: dict[str, upstream.SourceFile], patches: list[Path], tree: Path) -> None:
    """The series on the pristine files gives the files of HEAD. Raises UpstreamError."""
    names = {name for patch in patches for name in upstream.touched(patch)}
    ours = {**{name: file[1] for name, file in files.items() if name not in names}}
    ours.update({name: data for name, data, _ in upstream.patched(files, patches)})
    listed = git(tree, "ls-tree", "-r", "-z", "--name-only", "HEAD").decode().strip("\0").split("\0")
    differ = sorted(set(listed) ^ set(ours))
    differ += [name for name in names & set(listed) if git(tree, "show", f"HEAD:{name}") != ours.get(name)]
    if differ:
        raise UpstreamError(f"The exported series does not give the work tree back: {', '.join(differ[:5])} differ.")


def summary(patches: list[Path]) -> None:
    added, removed = changed_lines(patches)
    files = {name for patch in patches for name in upstream.touched(patch)}
    say(f"patches: {len(patches)}, files: {len(files)}, lines: {added} added + {removed} removed (limit {MAX_LINES})")
    if added + removed > MAX_LINES:
        raise UpstreamError(
            f"The series changes {added + removed} lines, more than {MAX_LINES}; move code from the patches into native/."
        )


def check() -> None:
    patches = upstream.series(upstream.PATCHES)
    for number, patch in enumerate(patches, start=1):
        if not NAME.fullmatch(patch.name) or int(patch.name[:4]) != number:
            raise UpstreamError(f"{patch.name} is out of order or badly named; export the series from its work tree.")
    files = pristine_files()
    upstream.patched(files, patches)
    if shutil.which("git"):
        with tempfile.TemporaryDirectory() as tmp:
            tree, out = Path(tmp) / "tree", Path(tmp) / "patches"
            tree.mkdir()
            touched = {name for patch in patches for name in upstream.touched(patch)}
            commit_series(tree, (files[name] for name in sorted(touched) if name in files), patches)
            again = export(tree, out)
            if [p.name for p in again] != [p.name for p in patches]:
                raise UpstreamError(
                    "The names of the patches are not those of their subjects; export the series again."
                )
            for old, new in zip(patches, again, strict=True):
                if old.read_bytes() != new.read_bytes():
                    raise UpstreamError(f"{old.name} is not as the export writes it; export the series again.")
        say("patches: the series applies and re-exports to itself")
    else:
        say("patches: the series applies; the re-export needs git and was left out")
    summary(patches)


def main() -> int:
    parser = argparse.ArgumentParser(description="Keep patches/ in step with a git work tree of the pinned llama.cpp.")
    parser.add_argument("worktree", nargs="?", type=Path, help="work tree whose commits become the series")
    parser.add_argument("--make-worktree", type=Path, metavar="DIR", help="create a work tree from the series")
    parser.add_argument("--check", action="store_true", help="verify patches/")
    parser.add_argument("--count", action="store_true", help="print the size of patches/")
    args = parser.parse_args()
    if sum([args.worktree is not None, args.make_worktree is not None, args.check, args.count]) != 1:
        parser.error("give a work tree, or --make-worktree DIR, or --check, or --count")
    try:
        if args.count:
            summary(upstream.series(upstream.PATCHES))
        elif args.check:
            check()
        elif args.make_worktree:
            if args.make_worktree.exists() and any(args.make_worktree.iterdir()):
                raise UpstreamError(f"{args.make_worktree} is not empty; give a new folder.")
            args.make_worktree.mkdir(parents=True, exist_ok=True)
            patches = upstream.series(upstream.PATCHES)
            commit_series(args.make_worktree, pristine_files().values(), patches)
            say(f"work tree: {args.make_worktree}, {len(patches)} commits on the tag {TAG}")
        else:
            with tempfile.TemporaryDirectory() as tmp:
                patches = export(args.worktree, Path(tmp))
                compare(pristine_files(), patches, args.worktree)
                summary(patches)
                upstream.PATCHES.mkdir(exist_ok=True)
                for old in upstream.series(upstream.PATCHES):
                    old.unlink()
                for patch in patches:
                    shutil.copyfile(patch, upstream.PATCHES / patch.name)
                say(f"patches: written to {upstream.PATCHES}")
    except UpstreamError as error:
        print(f"equip: error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
