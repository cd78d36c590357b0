"""Dead letters: what died of the same, together; one looked at and mended; many put back or forgotten."""

from __future__ import annotations

import dataclasses
import json
import math
import re
from collections.abc import Iterator
from typing import Any, Final
from urllib.parse import urlencode

from flask import Response

from ...dead_letters import DeadFilters
from ...errors import InvalidArguments, RequestError
from ...job import JobRecord, State
from ..auth import ADMIN, READ
from ..body import from_json
from ..operation import operation
from .values import Shown, described
from .visit import Visit

__all__ = [
    "change_dead_group",
    "change_dead_letters",
    "list_dead_group",
    "list_dead_letters",
    "mend_dead_letter",
    "show_dead_letter",
]

#: Of how many of the latest dead letters groups are made, and how many a page of a group shows.
LATEST: Final = 400
PAGE: Final = 50

#: The longest text that an argument is edited as, in characters.
MOST_TEXT: Final = 100_000

#: What differs between errors that are the same: numbers, ids, addresses, what stands between quotation marks.
_VARIES: Final = re.compile(r"0x[0-9a-f]+|'[^']*'|\"[^\"]*\"|\b[0-9a-f]{8,}\b|\d+")


@dataclasses.dataclass(kw_only=True)
class Group:
    """Dead letters of one actor that died of the same."""

    actor: str
    reason: str
    #: The error without what differs.
    pattern: str
    #: The error of the latest.
    example: str
    count: int = 0
    first: float = 0.0
    last: float = 0.0


def _pattern(record: JobRecord) -> str:
    return _VARIES.sub("…", record.short_text)[:200]


def _key(record: JobRecord) -> tuple[str, str, str]:
    return record.actor, str(record.dead_reason or "failed"), _pattern(record)


@operation("GET", "/dead", scope=READ, tag="pages", answers={})
def list_dead_letters(visit: Visit) -> Response:
    """Show what died, by actor and error."""
    filters = _filters(visit)
    groups: dict[tuple[str, str, str], Group] = {}
    looked = 0
    for record in visit.mlq.dead_letters.scan(**filters):
        looked += 1
        actor, reason, pattern = key = _key(record)
        group = groups.get(key)
        died = record.finished_at or record.created_at
        if group is None:
            groups[key] = group = Group(
                actor=actor, reason=reason, pattern=pattern, example=record.short_text[:400], last=died
            )
        group.count += 1
        group.first = died
        if looked == LATEST:
            break
    total = visit.now.counts.get(State.DEAD, 0)
    ordered = sorted(groups.values(), key=lambda group: -group.count)
    return visit.page(
        "dead", groups=ordered, looked=looked, total=total, filters=filters, export=_export(visit, filters)
    )


def _filters(visit: Visit) -> DeadFilters:
    found: Any = {name: visit.asked(name) for name in ("actor", "reason", "queue", "text") if visit.asked(name)}
    return found  # type: ignore[no-any-return]


def _export(visit: Visit, filters: DeadFilters) -> str:
    return f"{visit.url('export_dead_letters')}?{urlencode({k: str(v) for k, v in filters.items()})}"


@operation("POST", "/dead", scope=ADMIN, tag="pages", answers={})
def change_dead_group(visit: Visit) -> Response:
    """Put a group back, or forget it: all that are dead of the same, however many."""
    actor, reason, pattern = visit.field("actor"), visit.field("reason"), visit.request.form.get("pattern", "")[:400]
    act = visit.field("act")
    if act == "purge" and not visit.is_sure():
        fields = {"actor": actor, "reason": reason, "pattern": pattern, "act": act}
        question = f"Forget every dead letter of {actor} that died of “{pattern or reason}”? That cannot be undone."
        return visit.ask_whether_sure(question, "Forget them", fields, visit.url("list_dead_letters"))
    ids = list(_of_group(visit, actor, reason, pattern))[::-1]
    visit.note(f"{act} dead letters", f"{len(ids)} of {actor}, {reason}: {pattern}")
    letters = visit.mlq.dead_letters
    if act == "purge":
        return visit.go("list_dead_letters", "purged", letters.purge(ids))
    return visit.go("list_dead_letters", "requeued", len(letters.requeue_many(ids)))


def _of_group(visit: Visit, actor: str, reason: str, pattern: str) -> Iterator[str]:
    for record in visit.mlq.dead_letters.scan(actor=actor, reason=reason):
        if _key(record) == (actor, reason, pattern):
            yield record.id


@operation("GET", "/dead/letters", scope=READ, tag="pages", answers={})
def list_dead_group(visit: Visit) -> Response:
    """List dead letters, the latest first."""
    filters, cursor = _filters(visit), visit.asked("cursor")
    page = visit.mlq.dead_letters.list(cursor=cursor or None, limit=PAGE, **filters)
    query = {name: str(value) for name, value in filters.items()}
    return visit.page("dead_group", letters=page.letters, cursor=page.cursor, filters=query)


@operation("POST", "/dead/letters", scope=ADMIN, tag="pages", answers={})
def change_dead_letters(visit: Visit) -> Response:
    """Put those back that were selected, or forget them."""
    ids, act = visit.request.form.getlist("id")[:1000], visit.field("act")
    if not ids:
        return visit.go("list_dead_group", "nothing")
    letters = visit.mlq.dead_letters
    visit.note(f"{act} dead letters", ", ".join(ids))
    if act == "purge":
        return visit.go("list_dead_group", "purged", letters.purge(ids))
    return visit.go("list_dead_group", "requeued", len(letters.requeue_many(ids)))


# One, to be mended


@dataclasses.dataclass(frozen=True, kw_only=True)
class Field:
    """An argument of a dead letter: its field in the form, or how it looks where it cannot be written as JSON."""

    #: What the form calls it.
    name: str
    label: str
    #: As JSON; None where it has no form there.
    text: str | None
    shown: Shown


def _field(name: str, label: str, value: Any) -> Field:
    text = json.dumps(value, ensure_ascii=False, indent=2) if _is_json(value) else None
    if text is not None and len(text) > MOST_TEXT:
        text = None
    return Field(name=name, label=label, text=text, shown=described(value))


def _is_json(value: Any) -> bool:
    """Whether a value comes back from JSON as it was: no bytes, arrays or dates are in it."""
    if isinstance(value, list):
        return all(map(_is_json, value))
    if isinstance(value, dict):
        return all(isinstance(name, str) and _is_json(item) for name, item in value.items())
    return value is None or isinstance(value, str | bool | int) or (type(value) is float and math.isfinite(value))


def _fields(args: list[Any], kwargs: dict[str, Any]) -> list[Field]:
    positional = [_field(f"arg.{index}", f"argument {index + 1}", value) for index, value in enumerate(args)]
    return [*positional, *(_field(f"kwarg.{name}", name, value) for name, value in kwargs.items())]


@operation("GET", "/dead/<job_id>", scope=READ, tag="pages", answers={})
def show_dead_letter(visit: Visit, job_id: str) -> Response:
    """Show a dead letter, its arguments to be mended."""
    return _letter(visit, job_id, {}, {})


def _letter(visit: Visit, job_id: str, given: dict[str, str], faults: dict[str, str]) -> Response:
    letter = visit.mlq.dead_letters.show(job_id)
    fields = None
    if visit.sees_values and letter.args is not None and letter.kwargs is not None:
        fields = _fields(letter.args, letter.kwargs)
    status = 422 if faults else 200
    return visit.page("dead_letter", status, job=letter.record, fields=fields, given=given, faults=faults)


@operation("POST", "/dead/<job_id>", scope=ADMIN, tag="pages", answers={})
def mend_dead_letter(visit: Visit, job_id: str) -> Response:
    """Put it back, with the arguments that the form has; or forget it."""
    letters = visit.mlq.dead_letters
    if visit.field("act") == "purge":
        visit.note("purge dead letters", job_id)
        return visit.go("list_dead_letters", "purged", letters.purge(job_id))
    letter = letters.show(job_id)
    args, kwargs, faults, edited = list(letter.args or []), dict(letter.kwargs or {}), {}, []
    for field in _fields(args, kwargs) if visit.sees_values else ():
        text = visit.request.form.get(field.name)
        if text is None or field.text is None or text.replace("\r\n", "\n") == field.text:
            continue
        try:
            value = from_json(text.encode(), visit.mount.max_values)
        except (InvalidArguments, RequestError) as error:
            faults[field.name] = str(error)
            continue
        edited.append(field.label)
        kind, _, name = field.name.partition(".")
        if kind == "arg":
            args[int(name)] = value
        else:
            kwargs[name] = value
    if faults:
        return _letter(visit, job_id, dict(visit.request.form), faults)
    visit.note("requeue", f"{job_id}{', with other ' + ', '.join(edited) if edited else ''}")
    letters.requeue(job_id, args if edited else None, kwargs if edited else None)
    return visit.go("show_job", "requeued", 1, job_id=job_id)
