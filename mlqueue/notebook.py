"""How a job is shown in a notebook: a bar with its place in the queue, when it will start, and its progress, which
moves until the job has ended. In IPython on a terminal it is a line.

IPython is not needed: it calls these methods where it is there.
"""

from __future__ import annotations

import html
import logging
import threading
import time
from datetime import datetime
from typing import Any, Final

from .errors import JobNotFound, MLQueueError
from .job import JobRecord, State

__all__ = ["Bar", "line_of", "markup_of"]

#: The pause between two looks at the job, in seconds: the shortest, and the longest, when nothing changes.
FRAME: Final = 0.1
REFRESH: Final = 2.0

#: The colours of the states.
COLOURS: Final = {
    State.QUEUED: "#8a8f98",
    State.SCHEDULED: "#8a8f98",
    State.RUNNING: "#2f6fde",
    State.SUCCEEDED: "#2e8b57",
    State.DEAD: "#c0392b",
    State.CANCELLED: "#b8860b",
}

logger = logging.getLogger("mlqueue.notebook")


class Bar:
    """What a job needs to be shown. A base class: whoever derives from it has `_look`."""

    id: str

    def _look(self) -> JobRecord:
        """The record, with `estimated_start` where it waits."""
        raise NotImplementedError

    def _repr_html_(self) -> str:
        """The bar as it stands now."""
        return markup_of(self._seen(), self.id)

    def _repr_mimebundle_(self, include: Any = None, exclude: Any = None) -> dict[str, str]:
        """The bar as HTML, and a line for a terminal."""
        record = self._seen()
        return {"text/plain": line_of(record, self.id), "text/html": markup_of(record, self.id)}

    def _ipython_display_(self) -> None:
        """Shows the bar, and has it move in a thread until the job has ended."""
        from IPython.display import display

        record = self._seen()
        handle = display(_bundle(record, self.id), raw=True, display_id=True)
        # A terminal shows what it has shown: each change would be another line.
        if handle is not None and record is not None and not record.state.ended and _in_notebook():
            thread = threading.Thread(target=self._move, args=(handle,), name="mlqueue-notebook", daemon=True)
            thread.start()

    def _seen(self) -> JobRecord | None:
        """The record; None when there is none any more."""
        try:
            return self._look()
        except JobNotFound:
            return None

    def _move(self, handle: Any) -> None:
        shown: dict[str, str] = {}
        changed_at = time.monotonic()
        while True:
            try:
                record = self._seen()
            except MLQueueError as error:
                logger.info("the bar of job %s stands still: %s", self.id, error)
                return
            bundle = _bundle(record, self.id)
            if bundle != shown:
                shown, changed_at = bundle, time.monotonic()
                handle.update(bundle, raw=True)
            if record is None or record.state.ended:
                return
            # The longer nothing changes, the seldomer it looks.
            threading.Event().wait(min(REFRESH, FRAME + (time.monotonic() - changed_at) / 10))


def _in_notebook() -> bool:
    from IPython import get_ipython

    shell = get_ipython()
    return shell is not None and getattr(shell, "kernel", None) is not None


def _bundle(record: JobRecord | None, job_id: str) -> dict[str, str]:
    return {"text/plain": line_of(record, job_id), "text/html": markup_of(record, job_id)}


def line_of(record: JobRecord | None, job_id: str) -> str:
    """How a job stands, as a line: ``<Job 01a2... running, 40%: epoch 4 of 10>``."""
    return f"<Job {job_id} {', '.join(_words(record))}>"


def markup_of(record: JobRecord | None, job_id: str) -> str:
    """How a job stands, as a bar in HTML that needs no style sheet."""
    colour = COLOURS[record.state] if record is not None else "#8a8f98"
    percent = _percent(record)
    head = html.escape(job_id if record is None else f"{record.actor} {job_id}")
    bar = (
        f'<div style="width:20em;height:0.6em;border-radius:0.3em;background:#8a8f9840;overflow:hidden" '
        f'role="progressbar" aria-valuemin="0" aria-valuemax="100" aria-valuenow="{percent:.0f}">'
        f'<div style="width:{percent:.1f}%;height:100%;background:{colour}"></div></div>'
    )
    words = html.escape(", ".join(_words(record)))
    return (
        f'<div style="font-family:sans-serif;line-height:1.5"><code>{head}</code>{bar}'
        f'<span style="color:{colour}">{words}</span></div>'
    )


def _percent(record: JobRecord | None) -> float:
    if record is None:
        return 0.0
    if record.state is State.SUCCEEDED:
        return 100.0
    value = record.progress
    return float(value) if isinstance(value, int | float) and 0 <= value <= 100 else 0.0


def _words(record: JobRecord | None) -> list[str]:
    """What is to be said of a job, the state first."""
    if record is None:
        return ["not there any more"]
    words = [f"dead ({record.dead_reason})" if record.state is State.DEAD else str(record.state)]
    if record.state is State.QUEUED and record.position is not None:
        words.append(f"{record.position:,} ahead of it" if record.position else "next")
    if record.estimated_start is not None:
        words.append(f"starts about {datetime.fromtimestamp(record.estimated_start).astimezone():%H:%M:%S}")
    if record.state is State.RUNNING:
        words += [f"attempt {record.attempt}"] if record.attempt > 1 else []
    if not record.state.ended and record.progress is not None:
        value = record.progress
        shown = value if isinstance(value, str) else f"{value:.3g}%"
        words.append(f"{shown}: {record.progress_note}" if record.progress_note else shown)
    if record.state is State.SUCCEEDED and record.short_result is not None:
        words.append(str(record.short_result))
    if record.state is State.DEAD and record.error is not None:
        words.append(record.short_text)
    return words
