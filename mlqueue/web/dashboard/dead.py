"""Dead letters: what died of the same, together; one looked at and mended; many put back or forgotten."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import re
from collections.abc import Iterator
from typing import Any, Final
from urllib.parse import urlencode

from flask import Response

from ...dead_letters import DeadFilters
from ...errors import InvalidArguments, RequestError
from ...job import DeadReason, State
from ...store.store import DeadPlace, Died
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

#: How many dead letters a page looks at until it says so and offers to go on, and how many a page of them shows.
LOOKS: Final = 500
PAGE: Final = 50

#: What the address of a list of them has.
VIEW: Final = ("actor", "reason", "queue", "text", "pattern", "cursor")

#: The longest text that an argument is edited as, in characters.
MOST_TEXT: Final = 100_000

#: How many bytes of an error groups are made of.
MOST_OF_ERROR: Final = 400

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

    @property
    def name(self) -> str:
        """What tells it from the others of a page, however they are ordered."""
        return hashlib.sha256("\0".join((self.actor, self.reason, self.pattern)).encode()).hexdigest()[:16]


Key = tuple[str, str, str]


def _line(died: Died) -> str:
    """The error on a line."""
    return died.error.text.strip().partition("\n")[0]


def _key(died: Died) -> Key:
    """What those that died of the same have in common: actor, reason, and the error without what differs."""
    return died.actor, str(died.reason), _VARIES.sub("…", _line(died))[:200]


def _look(
    visit: Visit, filters: DeadFilters, cursor: DeadPlace | None, limit: int
) -> tuple[list[tuple[DeadPlace, Died]], DeadPlace | None, int]:
    """Of the next dead letters, the latest first, those that fit; where to go on; and how many were looked at. The text
    is looked for in the error, not in its traceback."""
    wanted = (filters.get("text") or "").casefold()
    places, following = visit.store.dead(
        reason=str(filters.get("reason") or ""),
        actor=filters.get("actor"),
        queue=filters.get("queue"),
        cursor=cursor,
        limit=limit,
        looks=LOOKS,
    )
    found = zip(places, visit.store.died([place.id for place in places], MOST_OF_ERROR), strict=True)
    fit = [(place, died) for place, died in found if died is not None and wanted in died.error.text.casefold()]
    return fit, following, len(places)


def _place(visit: Visit) -> DeadPlace | None:
    """Where the last page ended."""
    match = re.fullmatch(r"(\d{1,15}):([A-Za-z0-9._-]{1,128})", visit.asked("cursor"))
    return DeadPlace(int(match[1]), match[2]) if match else None


def _cursor(place: DeadPlace | None) -> str:
    return f"{place.died_ms}:{place.id}" if place is not None else ""


@operation("GET", "/dead", scope=READ, tag="pages", answers={})
def list_dead_letters(visit: Visit) -> Response:
    """Show what died, by actor and error."""
    filters, cursor = _filters(visit), _place(visit)
    found, following, looked = _look(visit, filters, cursor, LOOKS)
    groups: dict[Key, Group] = {}
    for _, died in found:
        group = groups.get(_key(died))
        if group is None:
            actor, reason, pattern = key = _key(died)
            example = _line(died)
            group = groups[key] = Group(actor=actor, reason=reason, pattern=pattern, example=example, last=died.at)
        group.count += 1
        group.first = died.at
    return visit.page(
        "dead",
        groups=sorted(groups.values(), key=lambda group: -group.count),
        looked=looked,
        total=visit.now.counts.get(State.DEAD, 0),
        filters=filters,
        cursor=_cursor(cursor),
        following=_cursor(following),
        export=_export(visit, filters),
    )


def _filters(visit: Visit) -> DeadFilters:
    found: Any = {name: visit.asked(name) for name in ("actor", "reason", "queue", "text") if visit.asked(name)}
    if found.get("reason") and found["reason"] not in set(DeadReason):
        raise InvalidArguments(
            f"reason {found['reason']!r}: one of {', '.join(DeadReason)}.", faults=[("?reason", "is unknown")]
        )
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
    ids = list(_of_group(visit, (actor, reason, pattern)))[::-1]
    visit.note(f"{act} dead letters", f"{len(ids)} of {actor}, {reason}: {pattern}")
    letters = visit.mlq.dead_letters
    if act == "purge":
        return visit.go("list_dead_letters", "purged", letters.purge(ids))
    return visit.go("list_dead_letters", "requeued", len(letters.requeue_many(ids)))


def _of_group(visit: Visit, key: Key) -> Iterator[str]:
    cursor: DeadPlace | None = None
    while True:
        found, cursor, _ = _look(visit, {"actor": key[0], "reason": key[1]}, cursor, LOOKS)
        yield from (place.id for place, died in found if _key(died) == key)
        if cursor is None:
            return


@operation("GET", "/dead/letters", scope=READ, tag="pages", answers={})
def list_dead_group(visit: Visit) -> Response:
    """List dead letters, the latest first."""
    filters, pattern = _filters(visit), visit.request.args.get("pattern", "")[:400]
    # Of a text or a pattern nothing has an index: some are looked at, then the page offers to go on.
    sifts = bool(filters.get("text") or pattern)
    found, following, _ = _look(visit, filters, _place(visit), LOOKS if sifts else PAGE)
    if pattern:
        found = [(place, died) for place, died in found if _key(died)[2] == pattern]
    if len(found) > PAGE:
        found = found[:PAGE]
        following = found[-1][0]
    records = visit.store.records([place.id for place, _ in found])
    letters = [record for record in records if record is not None and record.state is State.DEAD]
    query = {name: str(value) for name, value in filters.items()} | ({"pattern": pattern} if pattern else {})
    here = query | ({"cursor": visit.asked("cursor")} if visit.asked("cursor") else {})
    return visit.page("dead_group", letters=letters, cursor=_cursor(following), filters=query, here=here)


@operation("POST", "/dead/letters", scope=ADMIN, tag="pages", answers={})
def change_dead_letters(visit: Visit) -> Response:
    """Put those back that were selected, or forget them."""
    ids, act = visit.request.form.getlist("id")[:1000], visit.field("act")
    view: dict[str, Any] = visit.view(VIEW)
    if not ids:
        return visit.go("list_dead_group", "nothing", **view)
    if act == "purge" and not visit.is_sure():
        what = "this dead letter" if len(ids) == 1 else f"these {len(ids):,} dead letters"
        question, back = f"Forget {what}? That cannot be undone.", visit.url("list_dead_group", **view)
        return visit.ask_whether_sure(question, "Forget", {"id": ids, "act": act}, back)
    letters = visit.mlq.dead_letters
    visit.note(f"{act} dead letters", ", ".join(ids))
    if act == "purge":
        return visit.go("list_dead_group", "purged", letters.purge(ids), **view)
    return visit.go("list_dead_group", "requeued", len(letters.requeue_many(ids)), **view)


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
        if not visit.is_sure():
            died = letters.show(job_id).record
            question = f"Forget {job_id} of {died.actor}, with its arguments? That cannot be undone."
            back = visit.url("show_dead_letter", job_id=job_id)
            return visit.ask_whether_sure(question, "Forget it", {"act": "purge"}, back)
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
