"""What goes in and out, as types: the schemas of bodies and answers are made from them."""

from __future__ import annotations

import inspect
import re
from typing import Annotated, Any, Final, Literal, NotRequired, TypedDict

from ..job import JobRecord
from ..schema import Limits, schema_of
from .operation import JSON, TEXT, Answer

Callback = Annotated[
    str, "A URL to be fetched by GET when the job has ended.", Limits(max_length=2048, pattern=r"^https?://[^/@\s]+")
]
Event = Literal["started", "progress", "completed", "failed", "cancelled"]


class Hook(TypedDict):
    """A webhook that is told of chosen events."""

    url: Annotated[str, "Where the events are posted to.", Limits(max_length=2048, pattern=r"^https?://[^/@\s]+")]
    events: NotRequired[
        Annotated[list[Event], "Which events; the ends without it.", Limits(min_length=1, max_length=5)]
    ]
    progress_every: NotRequired[
        Annotated[float, "The shortest time between two events of progress, in seconds.", Limits(ge=0.1, le=86400)]
    ]


HookUrl = Annotated[
    str, "A URL that the ends of the job are posted to.", Limits(max_length=2048, pattern=r"^https?://[^/@\s]+")
]
Delay = Annotated[float, "Seconds until the job may start.", Limits(ge=0, le=1e10)]
QueueTimeout = Annotated[
    float,
    "Seconds within which it is to begin, counted from when it is due; else it is dead.",
    Limits(ge=0.001, le=1e10),
]
HardLimit = Annotated[
    float,
    "Seconds after which the process that runs it is killed; jobs beside it go back to their queues.",
    Limits(ge=1, le=1e10),
]
Priority = Annotated[int, "Lower runs first.", Limits(ge=-1000, le=1000)]
Tag = Annotated[str, Limits(min_length=1, max_length=100)]
Tags = Annotated[list[Tag], "Texts to find the job by.", Limits(max_length=20)]
Key = Annotated[str, Limits(min_length=1, max_length=200)]
ConcurrencyKey = Annotated[
    Key, "Of the actor's jobs with the same key only so many run at a time as its `concurrency` says."
]
FairBy = Annotated[Key, "Jobs of each value have their turn; `tag:PREFIX` is the tag that begins so."]
UniqueKey = Annotated[Key, "Of the actor's jobs with this key there is one: another is answered with it."]
UniqueFor = Annotated[
    Literal["queued", "active"] | Annotated[float, Limits(ge=0.001, le=1e9)],
    "While it waits (`queued`), until it has ended (`active`, the default), or for so many seconds.",
]
UniquePolicy = Annotated[
    Literal["return", "reject", "replace"],
    "What becomes of another: it is answered with the one that is there, is 409, or ends that one.",
]
Function = Annotated[str, Limits(min_length=1, max_length=200)]
Functions = Annotated[
    list[Function],
    "The functions of MLQ's listeners that are to run; all of them without it.",
    Limits(min_length=1, max_length=100),
]


class Options(TypedDict, total=False):
    """What may be chosen for a job. Options of Dramatiq are none of these."""

    callback: Callback | None
    webhook: HookUrl | Hook | None
    delay: Delay | None
    hard_time_limit: HardLimit | None
    priority: Priority | None
    queue_timeout: QueueTimeout | None
    tags: Tags | None
    concurrency_key: ConcurrencyKey | None
    fair_by: FairBy | None
    unique_key: UniqueKey | None
    unique_for: UniqueFor | None
    unique_policy: UniquePolicy | None


#: The names of the options.
OPTIONS: Final = frozenset(Options.__annotations__)


class Post(Options):
    """A message for MLQ's listeners."""

    msg: Annotated[Any, "The message: any value."]
    functions: NotRequired[Functions | None]


class Submit(Options):
    """The call of an actor."""

    args: NotRequired[Annotated[list[Any], "Positional arguments."]]
    kwargs: NotRequired[Annotated[dict[str, Any], "Arguments by name."]]


def record_schema() -> dict[str, Any]:
    """The schema of a job's record, as `mlqueue.web.records.shown` gives it."""
    schema = schema_of(JobRecord)
    record = schema["$defs"]["JobRecord"]
    record["properties"]["links"] = {"type": "object", "additionalProperties": {"type": "string"}}
    record["properties"]["result"] = {"description": "The full result, of a job that was waited for, if it is small."}
    record["required"] = [name for name in record["properties"] if name != "result"]
    told = _comments(JobRecord)
    for name, part in record["properties"].items():
        part.pop("default", None)
        if name in told:
            part["description"] = told[name]
    return schema


def _comments(kind: type) -> dict[str, str]:
    """What the ``#:`` comments say of the fields of a class."""
    try:
        source = inspect.getsource(kind)
    except OSError:
        return {}  # it is installed without its source
    found = re.finditer(r"((?:^ +#: .*\n)+)^ +(\w+):", source, re.MULTILINE)
    return {match[2]: " ".join(line.strip()[3:] for line in match[1].splitlines()) for match in found}


RECORD: Final = record_schema()

ID_TEXT: Final = {"type": "string", "description": "The id of the job."}

#: The record of a job, as an answer.
RECORD_ANSWER: Final = Answer("The record of the job.", {JSON: RECORD})


def text_or(schema: Any, description: str) -> dict[str, Any]:
    """The content of an answer of MLQ's: text, or JSON where it is asked for."""
    return {TEXT: {"type": "string", "description": description}, JSON: schema}
