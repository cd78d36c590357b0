"""What wakes a thread that waits for descriptors."""

from __future__ import annotations

import os

__all__ = ["Bell"]


class Bell:
    """Wakes a thread that polls. May be rung by anybody at any moment, also when nobody listens any more: the
    descriptors are closed with the last reference to it, so what is written never reaches another's."""

    def __init__(self) -> None:
        self.reader, self._writer = os.pipe()
        os.set_blocking(self.reader, False)
        os.set_blocking(self._writer, False)

    def ring(self) -> None:
        """Wake the thread. Takes no lock."""
        try:
            os.write(self._writer, b"\0")
        except BlockingIOError:
            pass  # it has been rung often enough

    def hush(self) -> None:
        """Take note of the ringing so far."""
        try:
            os.read(self.reader, 65536)
        except BlockingIOError:
            pass

    def __del__(self) -> None:
        os.close(self.reader)
        os.close(self._writer)
