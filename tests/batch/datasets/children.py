"""Child processes whose standard error is heard as it is written."""

from __future__ import annotations

import io
import multiprocessing
import sys
import time
from collections.abc import Callable
from multiprocessing.connection import Connection, wait
from typing import Any

#: Seconds in which anything must happen.
DEADLINE = 30.0


class Telling(io.TextIOBase):
    """A text stream that hands each piece on."""

    def __init__(self, send: Callable[[str], object]) -> None:
        self._send = send

    def write(self, text: str) -> int:
        self._send(text)
        return len(text)


def _run(connection: Connection, function: Callable[..., object], arguments: tuple[Any, ...]) -> None:
    sys.stderr = Telling(connection.send)
    try:
        function(*arguments)
    finally:
        connection.close()


class Children:
    """Spawned processes that all run one function."""

    def __init__(self, count: int, function: Callable[..., object], *arguments: Any) -> None:
        context = multiprocessing.get_context("spawn")
        self.said = ""
        self._ears: list[Connection] = []
        self.processes = []
        for _ in range(count):
            ear, mouth = context.Pipe(duplex=False)
            process = context.Process(target=_run, args=(mouth, function, arguments), daemon=True)
            process.start()
            mouth.close()
            self._ears.append(ear)
            self.processes.append(process)

    def hear(self, text: str | None = None) -> None:
        """Wait until one of them has written ``text``; without one, until all have ended."""
        deadline = time.monotonic() + DEADLINE
        while self._ears and (text is None or text not in self.said):
            ready = wait(self._ears, max(0.0, deadline - time.monotonic()))
            assert ready, f"not heard in {DEADLINE} s: {text!r}; heard: {self.said!r}"
            for ear in ready:
                assert isinstance(ear, Connection)
                try:
                    self.said += ear.recv()
                except EOFError:
                    ear.close()
                    self._ears.remove(ear)
        assert text is None or text in self.said

    def end(self) -> list[int | None]:
        """The exit codes, once all have ended."""
        self.hear()
        for process in self.processes:
            process.join(DEADLINE)
        return [process.exitcode for process in self.processes]
