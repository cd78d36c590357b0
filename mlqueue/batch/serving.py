"""What a worker does for a pool of actors: the body of the actor that :mod:`mlqueue.named` declares.

A job of it is a place at a trainer's: it goes to the address in its arguments, takes leases there one after the other,
and ends when the trainer has ended, has had no work for a while, or has used the worker long enough while others may
wait for it. One process has one place at a trainer's. The sources that are needed are made once in a process, and kept
until they have not been used for a while, whichever trainer asks for them.
"""

from __future__ import annotations

import contextlib
import os
import threading
import time
from collections.abc import Callable, Mapping
from typing import Any, Final

import numpy as np

from mlqueue import codec
from mlqueue.batch import links, storage, ways
from mlqueue.batch import pool_worker as worker
from mlqueue.batch.applied import Applied, BatchFunction, function_of
from mlqueue.batch.errors import SourceFailed
from mlqueue.batch.links import Link, Order
from mlqueue.batch.requests import PURPOSE, decode_request, describe_error, signature_of
from mlqueue.batch.transport import Segment, SlotWriter, read_description
from mlqueue.broker import StoreBroker
from mlqueue.current import CurrentJob, current_job
from mlqueue.errors import SignatureInvalid, SigningKeyMissing, StoreError
from mlqueue.named import NamedSource
from mlqueue.signing import Keyring

__all__ = ["NAMED", "PICKLED", "by_reference", "constant", "serve", "shelf"]

#: How a source travels: as name, arguments and version, or pickled and signed.
NAMED, PICKLED = 1, 2
#: How often a worker without leases looks whether it should go, in seconds.
TICK: Final = 0.1
#: How long it waits for a trainer to let it go, in seconds.
PATIENCE: Final = 5.0
#: How long it has no leases until it looks whether other jobs wait for it, and how often it does so, in seconds.
IDLE: Final = 0.2
ASK_EVERY: Final = 0.5
#: For how long a source that nobody uses is kept, in seconds.
KEEP: Final = 60.0


class Refused(Exception):
    """This worker cannot prepare batches of a source; another may."""


class Shelf:
    """The sources of this process."""

    def __init__(self) -> None:
        self._kept: dict[Any, Any] = {}
        self._used: dict[Any, float] = {}
        self._lock = threading.Lock()
        self._making: dict[Any, threading.Lock] = {}
        self._sweeper: threading.Thread | None = None

    def get(self, key: Any, make: Callable[[], Any]) -> Any:
        """What is kept under `key`; made by `make` where there is nothing, by one thread while others wait."""
        with self._lock:
            if key in self._kept:
                self._used[key] = time.monotonic()
                return self._kept[key]
            making = self._making.setdefault(key, threading.Lock())
        with making:
            with self._lock:
                if key in self._kept:  # another thread has made it meanwhile
                    self._used[key] = time.monotonic()
                    return self._kept[key]
            value = make()
            with self._lock:
                self._kept[key], self._used[key] = value, time.monotonic()
                if self._sweeper is None:
                    self._sweeper = threading.Thread(target=self._sweep, name="mlqueue-batch-shelf", daemon=True)
                    self._sweeper.start()
            return value

    def forget(self, key: Any) -> None:
        """Let go of one."""
        with self._lock:
            self._kept.pop(key, None)
            self._used.pop(key, None)

    def touch(self, key: Any) -> None:
        """It is being used."""
        with self._lock:
            if key in self._kept:
                self._used[key] = time.monotonic()

    def has(self, key: Any) -> bool:
        """Whether it is kept."""
        return key in self._kept

    def _sweep(self) -> None:
        while True:
            time.sleep(min(KEEP / 4, 1.0))
            with self._lock:
                self.drop(KEEP)
                if not self._kept:
                    self._sweeper = None
                    return

    def drop(self, unused_for: float = 0.0) -> None:
        """Let go of what has not been used for so many seconds."""
        before = time.monotonic() - unused_for
        for key in [key for key, used in list(self._used.items()) if used <= before]:
            self._kept.pop(key, None)
            self._used.pop(key, None)
            self._making.pop(key, None)


shelf = Shelf()
_here = threading.local()


def constant(number: int) -> Any:
    """What the pickle of a shared constant calls in a worker."""
    return _serving().constant(number)


def by_reference(name: str, kwargs: bytes, version: str, files: bytes) -> Any:
    """The source of this name; what the pickle of one calls that has it among its parts."""
    return _serving().named(name, kwargs, version, files)


def _serving() -> Serving:
    serving: Serving | None = getattr(_here, "serving", None)
    if serving is None:
        raise RuntimeError("this can be loaded in a worker of a pool of actors only; pass the value itself.")
    return serving


def serve(
    broker: StoreBroker,
    sources: Mapping[str, NamedSource[..., Any]],
    address: dict[str, Any],
    terms: dict[str, Any],
) -> int:
    """Prepare batches for the trainer at `address`; how many. `terms`: see `ActorPool`, in seconds."""
    job = current_job()
    link = ways.connect(address, job.id, broker.settings, broker.store.connector)
    if link is None:
        return 0
    patience = Patience(broker, job, terms)
    serving = Serving(link, sources, broker.actors, broker.settings.signing_keys, patience)
    stopped = threading.Event()
    beat = threading.Thread(
        target=_beat, args=(link, terms["lease"] / 4, stopped), name="mlqueue-batch-beat", daemon=True
    )
    _here.serving = serving
    try:
        beat.start()
        serving.run()
    except (OSError, EOFError):
        pass  # the trainer has ended, or has let go of this worker
    finally:
        _here.serving = None
        stopped.set()
        with contextlib.suppress(OSError):
            link.tell(links.LEAVE)  # whatever ends this thread, it is not the batch's fault
        beat.join()
        serving.close()
    return serving.prepared


def _beat(link: Link, every: float, stopped: threading.Event) -> None:
    while not stopped.wait(every):
        try:
            link.tell(links.BEAT)
        except OSError:
            return


class Patience:
    """When a worker should leave a trainer."""

    def __init__(self, broker: StoreBroker, job: CurrentJob, terms: dict[str, Any]) -> None:
        self._broker, self._job, self._terms = broker, job, terms
        self._begun = self._used = self._asked = time.monotonic()

    def used(self) -> None:
        """There was work."""
        self._used = time.monotonic()

    def is_over(self) -> bool:
        """Whether the worker is being stopped, has had no work for long, or others wait for it."""
        now = time.monotonic()
        if self._job.stopping or now - self._used > self._terms["linger"]:
            return True
        may_ask = now - self._used > IDLE or now - self._begun > self._terms["slice"]
        return may_ask and now - self._asked > ASK_EVERY and self._others_wait()

    def _others_wait(self) -> bool:
        self._asked = time.monotonic()
        try:
            waiting = self._broker.store.oldest()
        except StoreError:
            return False
        worker = self._broker.worker
        return worker is not None and not waiting.keys().isdisjoint(worker.consumers)


class Serving:
    """One place at a trainer's."""

    def __init__(
        self,
        link: Link,
        sources: Mapping[str, NamedSource[..., Any]],
        actors: Mapping[str, Any],
        keys: tuple[str, ...],
        patience: Patience,
    ) -> None:
        #: How many batches were prepared here.
        self.prepared = 0
        self._link, self._sources, self._actors, self._keys, self._patience = link, sources, actors, keys, patience
        self._announced: dict[int, Order] = {}
        self._made: dict[int, tuple[Any, Any]] = {}  # of sources: key on the shelf, value or exception
        self._tidied = time.monotonic()

    def run(self) -> None:
        """Take leases until there are no more."""
        asked: float | None = None
        while True:
            order = self._link.receive(TICK)
            if order is None:
                if asked is not None and time.monotonic() > asked + PATIENCE:
                    return
            elif order.kind == links.END:
                return
            else:
                self._obey(order)
                self._patience.used()
            if asked is None and self._patience.is_over():
                asked = time.monotonic()
                self._link.tell(links.LEAVE)
            if time.monotonic() > self._tidied + KEEP / 4:
                self.tidy()

    def _obey(self, order: Order) -> None:
        if order.kind == links.LEASE:
            self._prepare(order)
        elif order.kind == links.SOURCE:
            self._announced[order.number] = order
        else:
            self._forget(order.number)

    def _forget(self, number: int) -> None:
        announced = self._announced.pop(number, None)
        if announced is not None and announced.fd is not None:
            os.close(announced.fd)
        self._made.pop(number, None)

    def _prepare(self, order: Order) -> None:
        request = self._link.claim(order)
        if request is None:
            self._link.deliver(links.SKIPPED, order)
            return
        begun = time.perf_counter_ns()
        writer = self._link.place(order)
        try:
            kind, (place, length) = links.DONE, self._perform(request, writer)
            self.prepared += 1
        except Refused as refusal:
            writer = self._link.place(order)
            kind, (place, length) = links.REFUSED, writer.write({"text": str(refusal)})
        except (Exception, SystemExit) as error:  # noqa: BLE001 - it belongs to whoever waits for the batch
            writer = self._link.place(order)
            kind, (place, length) = links.FAILED, writer.write(describe_error(error, self._keys))
        self._link.deliver(kind, order, place, length, time.perf_counter_ns() - begun)

    def _perform(self, request: bytes, writer: SlotWriter) -> tuple[int, int]:
        asked = decode_request(request, self._keys)
        if asked[0] == "call":
            return self._write_value(worker.perform(asked, self.constant, writer.empty), writer)
        if worker.is_pure(self.constant(asked[1])):
            return writer.write(worker.perform(asked, self.constant, writer.empty))
        with worker.seeding():  # for which only workers that serve several trainers at once ever wait
            return writer.write(worker.perform(asked, self.constant, writer.empty))

    def _write_value(self, value: Any, writer: SlotWriter) -> tuple[int, int]:
        """A function's value: as it is where that can travel, else pickled."""
        try:
            return writer.write({"value": value})
        except TypeError:
            pickled = worker.dump(value)
            signature = signature_of(b"value", pickled, self._keys)
            return writer.write({"pickled": np.frombuffer(pickled, np.uint8), "signature": signature})

    # --- sources ---

    def tidy(self) -> None:
        """Let go of the sources that the shelf has let go of: they are made again when they are needed again."""
        self._tidied = time.monotonic()
        for number, (key, _) in list(self._made.items()):
            if key is not None and not shelf.has(key):
                del self._made[number]

    def constant(self, number: int) -> Any:
        """The source, or the shared constant, of this number."""
        if number not in self._made:
            self._made[number] = self._make(self._announced[number])
        key, value = self._made[number]
        if isinstance(value, Refused | SourceFailed):
            raise value.with_traceback(None)  # else it would grow with each batch
        shelf.touch(key)
        return value

    def _make(self, order: Order) -> tuple[Any, Any]:
        assert order.fd is not None
        segment = Segment.attach(os.dup(order.fd))
        try:
            whole = segment.as_private_bytes()
            described = read_description(whole, order.place, order.length)(whole, None)
            if order.how == NAMED:
                reference = described["name"], described["kwargs"].tobytes(), described["version"]
                files = described["files"].tobytes()
                key, value = self._key_of(*reference, files), self.named(*reference, files)
            else:
                key, value = self._load(described)
            if "function" in described:
                value = Applied(value, self._function(described["function"].tobytes()))
            return key, value
        except Refused as refusal:
            return None, refusal
        except Exception as error:  # noqa: BLE001 - a factory may raise anything: each of its batches does, then
            text = f"the data source could not be made on host {storage.host_name()}: {type(error).__name__}: {error}"
            failed = SourceFailed(text)
            failed.__cause__ = error
            return None, failed
        finally:
            segment.close()

    def named(self, name: str, kwargs: bytes, version: str, files: bytes) -> Any:
        """The source of this name, if it is the one that is meant."""
        named = self._sources.get(name)
        if named is None:
            known = ", ".join(sorted(self._sources)) or "none"
            raise Refused(
                f"this worker has no data source {name!r} (it has: {known}); start it with the module that registers "
                "it: mlqueue worker MODULE."
            )
        own = found(lambda: named.version(kwargs))
        if own != version:
            raise Refused(
                f"the data source {name!r} is of version {own} in this worker and of {version} in the trainer "
                "(code of the factory/version=); start both with the same code, on the same data."
            )

        def make() -> tuple[Any, list[storage.Seen]]:
            source = found(lambda: named.make(kwargs))
            # A factory may have its files elsewhere on each host: they are compared in their order.
            return source, same_files(files, storage.files_of(source))

        return kept(self._key_of(name, kwargs, version, files), make)

    def _key_of(self, name: str, kwargs: bytes, version: str, files: bytes) -> Any:
        return "named", name, kwargs, version, files

    def _load(self, described: dict[str, Any]) -> tuple[Any, Any]:
        body, files, buffers = described["body"], described["files"], described["buffers"]
        signature = described["signature"].tobytes()

        def load() -> tuple[Any, list[storage.Seen]]:
            parts = [body.data, files.data, *[part.data for part in buffers]]
            Keyring(self._keys, PURPOSE).verify(signature, b"source", *parts)
            seen = same_files(files.tobytes())
            return found(lambda: worker.load(body, buffers)), seen

        # The signature says what is meant: another source has another one.
        key = ("pickled", signature)
        try:
            return key, kept(key, load)
        except (SignatureInvalid, SigningKeyMissing) as error:
            raise Refused(str(error)) from None

    def _function(self, described: bytes) -> BatchFunction:
        """The function of an actor that is applied to the batches of a source."""
        name, version, more = codec.decode(described)
        actor = self._actors.get(name)
        if actor is None:
            raise Refused(
                f"this worker has no actor {name!r}; start it with the module that declares it: mlqueue worker MODULE."
            )
        function = BatchFunction(function_of(actor), name, **more)
        if version and function.version != version:
            raise Refused(
                f"the actor {name!r} has other code in this worker (host {storage.host_name()}) than in the trainer; "
                "start both with the same code."
            )
        return function

    def close(self) -> None:
        self._link.close()
        for number in list(self._announced):
            self._forget(number)


def kept(key: Any, make: Callable[[], tuple[Any, list[storage.Seen]]]) -> Any:
    """The source on the shelf; made anew where a file that it reads has been touched since it was made."""
    source, files = shelf.get(key, make)
    if storage.changed(files):
        shelf.forget(key)
        source, _ = shelf.get(key, make)
    return source


def found(make: Callable[[], Any]) -> Any:
    """What `make` gives; Refused, with host and path, where it misses a file."""
    try:
        return make()
    except (FileNotFoundError, NotADirectoryError, PermissionError) as error:
        raise Refused(storage.missing(str(error.filename or "a file"), error)) from error


def same_files(described: bytes, paths: list[str] | None = None) -> list[storage.Seen]:
    """The files that a source reads on this host, if they are those that the trainer has; else Refused.

    `paths`: where they are here; where the trainer has them when None.
    """
    host, stamps = codec.decode(described)
    meant = [storage.Stamp(*fields) for fields in stamps]
    paths = [stamp.path for stamp in meant] if paths is None else paths
    if len(paths) != len(meant):
        raise Refused(
            f"the data source reads {len(paths)} files on host {storage.host_name()} ({listed(paths)}) and "
            f"{len(meant)} on the trainer's host {host} ({listed([stamp.path for stamp in meant])}); start both with "
            "the same data."
        )
    for stamp, path in zip(meant, paths, strict=True):
        wrong = None if stamp.size < 0 else storage.difference(stamp, host, path)
        if wrong is not None:
            raise Refused(wrong)
    return [storage.look(path) for stamp, path in zip(meant, paths, strict=True) if stamp.size >= 0]


def listed(paths: list[str]) -> str:
    """Some paths as a text."""
    return ", ".join(paths[:3]) + (", ..." if len(paths) > 3 else "") or "none"
