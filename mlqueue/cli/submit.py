"""``mlqueue submit``: a job by the name of its actor, whose code need not be here."""

from __future__ import annotations

import difflib
import re
import sys
from pathlib import Path
from typing import Any, Final

import click
from dramatiq import Message

from ..app import MLQ, message_options
from ..errors import InvalidJob
from ..job import State, check_id, new_id
from ..limits import check_keys
from ..store import Store
from . import types
from .call import Call, command
from .opening import open_store
from .result import BinaryForTerminal, print_result
from .values import from_text, object_from_text, short
from .watch import follow

#: An argument that looks like an option and is a number.
NEGATIVE: Final = re.compile(r"-\d+(\.\d+)?([eE][+-]?\d+)?")

#: Marks such an argument for click's parser, which would take it for an option. No argument of a process has it.
MARK: Final = "\0"


class NumbersAreArguments(click.Command):
    """A command whose arguments may be negative numbers."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """As click's, with ``-0.5`` being no option."""
        valued = {
            name
            for parameter in self.params
            if isinstance(parameter, click.Option) and not parameter.is_flag
            for name in parameter.opts
        }
        before = [None, *args]
        marked = [
            MARK + word if NEGATIVE.fullmatch(word) and previous not in valued else word
            for previous, word in zip(before, args, strict=False)
        ]
        return super().parse_args(ctx, marked)


@command(cls=NumbersAreArguments)
@click.argument("actor")
@click.argument("arguments", nargs=-1, metavar="[JSON]...")
@click.option("--kwargs", metavar="JSON", help="Keyword arguments, as one JSON object.")
@click.option(
    "--file",
    "files",
    multiple=True,
    metavar="NAME=PATH",
    help="A keyword argument whose value is the bytes of a file (- for stdin). May be repeated.",
)
@click.option("--queue", metavar="NAME", help="The queue, for an actor that no worker has declared yet [default].")
@click.option(
    "--delay", type=types.duration, metavar="DURATION", help="How long the job waits before it may start: 30, 10m, 2h."
)
@click.option(
    "--queue-timeout",
    type=types.duration,
    metavar="DURATION",
    help="The job is dead unless it begins within this time.",
)
@click.option(
    "--hard-time-limit",
    type=types.duration,
    metavar="DURATION",
    help="The process that runs the job is killed when it takes longer.",
)
@click.option("--priority", type=click.IntRange(-1000, 1000), help="Lower runs first [0].")
@click.option("--tag", "tags", multiple=True, metavar="TEXT", help="A text to find the job by. May be repeated.")
@click.option("--callback", metavar="URL", help="What is fetched when the job has ended.")
@click.option("--webhook", metavar="URL", help="Where its ends are posted to, as a signed webhook.")
@click.option("--fair-by", metavar="TEXT", help="Jobs of each such text have their turn.")
@click.option("--concurrency-key", metavar="TEXT", help="Of the actor's jobs with this key so many run at a time.")
@click.option("--unique-key", metavar="TEXT", help="Of the actor's jobs with this key there is one.")
@click.option(
    "--unique-for", type=types.scope, metavar="TIME", help="As long as it is queued, active [active], or a duration."
)
@click.option(
    "--unique-policy",
    type=click.Choice(["return", "reject", "replace"]),
    help="What another one does: it gives that job, is refused, or ends it [return].",
)
@click.option("--job-id", metavar="ID", help="Its id. Nothing is created when there is a job of that id already.")
@click.option("--wait", is_flag=True, help="Wait for its end, showing its progress, and print its result.")
def submit(
    call: Call,
    actor: str,
    arguments: tuple[str, ...],
    kwargs: str | None,
    files: tuple[str, ...],
    queue: str | None,
    delay: float | None,
    queue_timeout: float | None,
    hard_time_limit: float | None,
    priority: int | None,
    tags: tuple[str, ...],
    callback: str | None,
    webhook: str | None,
    fair_by: str | None,
    concurrency_key: str | None,
    unique_key: str | None,
    unique_for: str | float | None,
    unique_policy: str | None,
    job_id: str | None,
    wait: bool,
) -> int | None:
    """Submit a job by the name of its actor.

    Each argument is JSON: 0.5, true, '[1, 2]', '{"a": 1}'. One that is not is sent as text: resnet50. Prints the job's
    id, or with --wait its result.
    """
    if job_id is not None:
        check_id(job_id)
    if queue == "":
        raise click.UsageError("--queue '': the name of a queue is not empty; leave it out for the actor's own")
    actor = actor.removeprefix(MARK)
    args = tuple(from_text(text.removeprefix(MARK)) for text in arguments)
    keywords = ({} if kwargs is None else object_from_text("--kwargs", kwargs)) | _files(
        files, call.settings.max_message_bytes
    )
    options: dict[str, Any] = {"delay": delay, "priority": priority, "tags": list(tags) or None}
    options |= {"callback": callback, "webhook": webhook}
    options |= {"queue_timeout": queue_timeout, "hard_time_limit": hard_time_limit}
    if unique_key is None and (unique_for is not None or unique_policy is not None):
        raise click.UsageError("--unique-for and --unique-policy say more of a --unique-key; give that, too")
    options |= {"unique_for": unique_for, "unique_policy": unique_policy}
    given = {name: value for name, value in options.items() if value is not None}
    keys = {"fair_by": fair_by, "concurrency_key": concurrency_key, "unique_key": unique_key}
    given |= {name: key or None for name, key in keys.items() if key is not None}
    store = open_store(call, start=True)
    message = _enqueue(MLQ(store.namespace, settings=call.settings), store, actor, args, keywords, queue, given, job_id)
    _warn_if_unknown(call, store, actor, message.queue_name)
    if not wait:
        if call.json:
            call.emit({"id": message.message_id, "actor": actor, "queue": message.queue_name})
        else:
            call.write(message.message_id + "\n")
        return None
    return _await(call, store, message.message_id)


def _await(call: Call, store: Store, job_id: str) -> int:
    if call.json:
        print_result(call, store, job_id)
        return 0
    call.talk(f"job {job_id}")
    [record] = follow(call, store, [job_id])
    if record.state is not State.SUCCEEDED:
        return 1
    try:
        print_result(call, store, job_id)
    except BinaryForTerminal as refused:
        # The job itself went well.
        call.report(refused)
    return 0


def _enqueue(
    mlq: MLQ,
    store: Store,
    actor: str,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    queue: str | None,
    options: dict[str, Any],
    job_id: str | None,
) -> Message[Any]:
    # Not by `MLQ.submit`: there a keyword argument `delay` of the actor would be an option of the job.
    rest, delay_ms, _ = message_options(options)
    declared, keys = store.declared(actor)
    check_keys(actor, keys, options)
    message: Message[Any] = Message(
        queue_name=queue or declared or "default",
        actor_name=actor,
        args=args,
        kwargs=kwargs,
        options=rest,
        message_id=job_id or new_id(),
    )
    try:
        return mlq.broker.enqueue(message, delay=delay_ms)
    finally:
        mlq.close()


def _files(given: tuple[str, ...], most: int) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for text in given:
        name, equals, path = text.partition("=")
        if not equals or not name.isidentifier() or not path:
            raise InvalidJob(f"--file {short(text)}: write it as NAME=PATH, as in image=cat.png.")
        if name in found:
            raise InvalidJob(f"--file {name}=... was given twice; a keyword argument has one value.")
        found[name] = _read(path, most)
    return found


def _read(path: str, most: int) -> bytes:
    try:
        if path == "-":
            data = sys.stdin.buffer.read(most + 1)
        else:
            with Path(path).open("rb") as file:
                data = file.read(most + 1)
    except OSError as error:
        raise InvalidJob(f"--file: {path} cannot be read ({error.strerror or error}).") from None
    if len(data) > most:
        raise InvalidJob(
            f"--file: {path} is larger than the {most:,} bytes that a job may have (MLQUEUE_MAX_MESSAGE_BYTES). Put it "
            "where the workers can read it, and send its path."
        )
    return data


def _warn_if_unknown(call: Call, store: Store, actor: str, queue: str) -> None:
    """A job that nobody can run waits and blocks nothing; but it may be a typing error."""
    workers = store.workers()
    known = {name for worker in workers for name in worker.info.get("actors", ())}
    if not workers:
        call.talk(
            f"no worker of the namespace {store.namespace!r} is alive; the job waits until one is started: mlqueue "
            "worker MODULE"
        )
    elif actor not in known:
        close = difflib.get_close_matches(actor, known, n=1)
        hint = f" Did you mean {close[0]}?" if close else f" They know {', '.join(sorted(known))}." if known else ""
        call.talk(f"no worker that is alive knows the actor {actor!r}; the job waits in queue {queue!r}.{hint}")


__all__ = ["submit"]
