"""Records of jobs as answers show them."""

from __future__ import annotations

import dataclasses
from typing import Any, Final

from ..job import JobRecord, State
from ..values import plain
from .call import Call

__all__ = ["shown"]


#: Fields that are more than numbers, texts and lists of texts.
STRUCTURED: Final = frozenset(
    {"error", "attempts", "callback_attempts", "webhook", "progress", "short_result", "usage", "resumed_from"}
)
SIMPLE: Final = tuple(field.name for field in dataclasses.fields(JobRecord) if field.name not in STRUCTURED)


def shown(call: Call, record: JobRecord) -> dict[str, Any]:
    """A record as plain values, with links to what can be done."""
    # Not by `asdict`, which looks at every value of every field: it would take as long as all else that is done here.
    found = {name: getattr(record, name) for name in SIMPLE}
    found["progress"], found["short_result"] = plain(record.progress), plain(record.short_result)
    found["error"] = record.error and dataclasses.asdict(record.error)
    found["attempts"] = [dataclasses.asdict(attempt) for attempt in record.attempts]
    found["usage"] = record.usage and dataclasses.asdict(record.usage)
    found["resumed_from"] = record.resumed_from and dataclasses.asdict(record.resumed_from)
    found["callback_attempts"] = [dataclasses.asdict(attempt) for attempt in record.callback_attempts]
    found["webhook"] = record.webhook and record.webhook.asdict()
    found["links"] = _links(call, record)
    return found


def _links(call: Call, record: JobRecord) -> dict[str, str]:
    own = f"{call.jobs_url}/{record.id}"
    links = {"self": own}
    if record.state is State.SUCCEEDED:
        links["result"] = f"{own}/result"
    if not record.state.ended:
        links["cancel"] = f"{own}/cancel"
    if record.state in (State.DEAD, State.CANCELLED):
        links["retry"] = f"{own}/retry"
    return links
