"""The same tables with several builds of the library: a process for each, of which one computes at a time.

All processes go through the same samples, and each of them waits for its turn after every sample. So two builds are
compared as two rows are, by the ratio of samples that were taken one after the other.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from equip_cli.benchmark.jobs import Request, Table, measured
from equip_cli.benchmark.measure import Advance
from equip_cli.benchmark.records import INSTALLED, Record, about_machine, compare
from equip_cli.core.closing import Closing
from equip_cli.core.errors import BackendError, EquipError

if TYPE_CHECKING:
    from multiprocessing.connection import Connection
    from multiprocessing.context import SpawnContext

_PAUSE = 0.05  # seconds after which the threads of the process before spin no longer


@dataclass(frozen=True)
class Task:
    """What each of the processes does. n_gpu_layers: -1 = all."""

    model: Path
    n_gpu_layers: int
    request: Request
    verbose: bool = False


def _serve(pipe: Connection, folder: Path | None, task: Task) -> None:
    """A process's work: a message for each thing that is done, and a wait for the next turn after `done`.

    Messages: `model` n_ctx_train, `done` work, `table` Table, `end`, `failed` exception.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the process that asks
    if folder is not None:
        os.environ["EQUIP_LIB_PATH"] = str(folder)

    def advance(n: float) -> None:
        pipe.send(("done", n))
        pipe.recv()

    try:
        from equip_cli.core import native
        from equip_cli.core.model import Model

        pipe.recv()
        native.load().set_verbosity(2 if task.verbose else 0)
        with Model(task.model, n_gpu_layers=task.n_gpu_layers) as model:
            pipe.send(("model", model.n_ctx_train))
            advance(0)
            library = native.load()
            machine = {**about_machine(library.info(), task.n_gpu_layers), "library_path": str(library.folder)}
            for table in measured(model, task.request, machine, advance):
                pipe.send(("table", table))
        pipe.send(("end", None))
    except (EOFError, BrokenPipeError):
        pass  # the process that asks has gone
    except Exception as error:  # what nobody foresaw is told there, too
        pipe.send(("failed", error))


class _Worker(Closing):
    """A process with one library. tables: those that it has measured and nobody has taken yet."""

    def __init__(self, name: str, folder: Path | None, task: Task, context: SpawnContext) -> None:
        self.name, self._named = name, name if folder is None else str(folder)
        self.n_ctx_train = 0
        self.is_at_work = True
        self.tables: list[Table] = []
        self._pipe, other = context.Pipe()
        self._process = context.Process(target=_serve, args=(other, folder, task), daemon=True)
        with _without_interrupts():
            self._process.start()
        other.close()

    def turn(self) -> float:
        """Let it take its next sample; returns the work done. Raises what went wrong there, and BackendError if it died."""
        try:
            self._pipe.send(None)
            while True:
                kind, value = self._pipe.recv()
                if kind == "done":
                    return float(value)
                if kind == "table":
                    self.tables.append(value)
                elif kind == "model":
                    self.n_ctx_train = value
                elif kind == "failed":
                    known = isinstance(value, EquipError)
                    raise type(value)(f"with the library {self._named}: {value}") if known else value
                else:
                    self.is_at_work = False
                    return 0.0
        except (EOFError, ConnectionError):
            raise BackendError(
                f"the process that measured the library {self._named} has ended: measure with it alone, as EQUIP_LIB_PATH"
            ) from None

    def close(self) -> None:
        """End the process. A second call does nothing."""
        self._process.terminate()
        self._process.join()
        self._pipe.close()


@contextlib.contextmanager
def _without_interrupts() -> Iterator[None]:
    """A process that is started in here never sees Ctrl-C, which would end it with a traceback while it imports."""
    if not hasattr(signal, "pthread_sigmask"):
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def measured_in_turns(
    others: Mapping[str, Path],
    task: Task,
    advance: Advance,
    begin: Callable[[int], object] = lambda n_ctx_train: None,
    first_sample: int = 0,
) -> Iterator[Table]:
    """`jobs.measured()` with the installed library and with others: the tables have each row once per library.

    others: folders by the name that the records get; begin: called with the trained context of the model.
    Raises what `jobs.measured()` raises, with the library's name, and BackendError if a process dies.
    """
    context = multiprocessing.get_context("spawn")
    with ExitStack() as stack:
        folders: dict[str, Path | None] = {INSTALLED: None, **others}
        workers = [stack.enter_context(_Worker(name, folder, task, context)) for name, folder in folders.items()]
        for worker in workers:
            worker.turn()
        begin(workers[0].n_ctx_train)
        while any(worker.is_at_work for worker in workers):
            for worker in workers:
                if worker.is_at_work:
                    time.sleep(_PAUSE)
                    advance(worker.turn() / len(workers))
            while all(worker.tables for worker in workers):
                yield together({worker.name: worker.tables.pop(0) for worker in workers}, first_sample)


def together(tables: Mapping[str, Table], first_sample: int = 0) -> Table:
    """The same table of several libraries, the first of which the others are compared with: `ratio_vs_library`."""
    names = list(tables)
    found: dict[tuple[Any, ...], list[Record]] = {}
    for i, (name, table) in enumerate(tables.items()):
        for label, record in table.rows:
            alike = found.setdefault((label, record["kind"], record["test"], record["budget"]), [])
            base = next((each for each in alike if each["library"] == names[0]), None)
            order = [first_sample + n * len(names) + i for n in record["sample_order"]]
            ratio = None if base is None else _ratio(record, base)
            alike.append({**record, "library": name, "sample_order": order, "ratio_vs_library": ratio})
    rows = [(str(key[0]), record) for key, records in found.items() for record in records]
    refused = [f"{name}: {why}" for name, table in tables.items() for why in table.refused]
    return Table(rows, refused)


def _ratio(record: Record, base: Record) -> Record | None:
    """Time of the record / time of the base; None for a latency, which is a single sum."""
    if record["kind"] == "latency":
        return None
    return {"baseline": base["library"], **compare(record["samples_ns"], base["samples_ns"])}
