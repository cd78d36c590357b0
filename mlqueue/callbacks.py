"""Callbacks: the URL that is fetched when a job has ended, and webhooks: those that are told of its events.

The script that ends a job, or makes what else is told of, creates one of the actor here for it, and workers run that
beside their threads. Each try is noted on the record of the job, before the next one is arranged; a process that dies
in between makes it once more: delivered is at least once, and failed is what the record says.

A receiver may be anything: its address is checked when it is known, and called without asking again; one try ends at
a moment, however slowly the receiver speaks; nothing that it sends is kept but the status.
"""

from __future__ import annotations

import contextlib
import functools
import io
import logging
import queue
import random
import socket
import ssl
import string
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any, Final
from urllib.parse import SplitResult, quote, urlencode, urlsplit

import dramatiq

from .delivery import Delivery, HandBack, Retry, current_delivery
from .errors import JobNotFound, StoreUnavailable
from .job import CallbackAttempt, CallbackState, JobRecord, State
from .store import Store
from .store.records import CALLBACK, CALLBACKS, pack_callback_attempt
from .urlpolicy import AddressPolicy, AddressRefused, canonical, policy_of
from .webhook_message import Happening, headers_of, message_of

#: The pauses before the second and the third try of a callback, in seconds.
PAUSES: Final = (1.0, 5.0)

#: Those before the tries of a webhook, which go on for three days: as Standard Webhooks has it.
WEBHOOK_PAUSES: Final = (5.0, 300.0, 1800.0, 7200.0, 18000.0, 36000.0, 50400.0, 72000.0, 86400.0)

#: Those before the tries to tell of progress: later progress or the end of the job tells more.
PROGRESS_PAUSES: Final = (5.0, 30.0)

#: How much longer a pause of a webhook may be, at random, as a part of it: a receiver that comes back is not called
#: for all that it has missed at once.
JITTER: Final = 0.1

#: The longest pause that a receiver may ask for, in seconds.
LONGEST_PAUSE: Final = 86400.0

#: The status by which a receiver says that it wants no more.
GONE: Final = 410

#: The most that is read of an answer, its head included, in bytes.
MOST_READ: Final = 64 * 1024

#: How long the rest of an answer is waited for when its status is known, in seconds: a receiver that still writes when
#: the connection is closed would log an error.
LINGER: Final = 1.0

#: How many callbacks go to one receiver at a time, of those that a worker delivers (`mlqueue.beside.MOST_CALLBACKS`);
#: and how soon, and how late, one that found no place is looked at again, in seconds.
MOST_OF_HOST: Final = 8
SOONEST: Final = 0.05
LATEST: Final = 30.0

logger = logging.getLogger("mlqueue.callbacks")


def callback_actor(broker: Any) -> dramatiq.Actor[[], None]:
    """The actor that delivers callbacks."""
    return dramatiq.Actor(
        deliver, broker=broker, actor_name=CALLBACK, queue_name=CALLBACKS, priority=0, options={"max_retries": 10}
    )


def deliver(letter: str = "", at_ms: int = 0, attempt: int = 0, by_hand: int = 0) -> None:
    """Makes one try to fetch the URL of the job that this one is about, its parent; with arguments, to tell the webhook
    of that job of an event (`Happening`)."""
    delivery = current_delivery.get()
    if delivery is None:
        raise RuntimeError(f"{CALLBACK} was called outside a worker; Job.redeliver() has a callback delivered again.")
    store: Store = delivery.broker.store
    try:
        record = store.record(delivery.held.parent)
        if not letter:
            if _is_due(record, delivery):
                _try_once(delivery, store, record, _Call(callback_url(record), "callback", PAUSES))
        elif _is_wanted(record, event := Happening(letter, at_ms, attempt, bool(by_hand))):
            _try_once(delivery, store, record, _webhook_call(store, record, event))
    except JobNotFound:
        logger.info("job %s is gone; its callback is not delivered", delivery.held.parent)
    except StoreUnavailable as error:
        # No try of the receiver's, so it does not count as one.
        logger.warning("the callback of job %s waits for the store: %s", delivery.held.parent, error)
        raise HandBack from error


class Places:
    """How many callbacks this process delivers to one receiver at a time: one that hangs does not hold up others.

    Parameters:
      most: How many. Another one waits in the queue until, by how long the last one took, its turn should come.
    """

    def __init__(self, most: int) -> None:
        self._most = most
        self._lock = threading.Lock()
        self._receivers: dict[str, _Receiver] = {}

    @contextlib.contextmanager
    def of(self, host: str) -> Iterator[None]:
        """Within, one of the places of a receiver is taken. Raises `HandBack` when there is none."""
        begun = time.monotonic()
        with self._lock:
            receiver = self._receivers.setdefault(host, _Receiver())
            if receiver.taken >= self._most:
                receiver.next = min(max(receiver.next, begun + SOONEST) + receiver.took / self._most, begun + LATEST)
                raise HandBack(receiver.next - begun)
            receiver.taken += 1
        try:
            yield
        finally:
            with self._lock:
                receiver.taken -= 1
                receiver.took = time.monotonic() - begun
                if not receiver.taken:
                    self._receivers.pop(host, None)


@dataclass(slots=True)
class _Receiver:
    #: How many callbacks are on their way to it.
    taken: int = 0
    #: How long the last one took, in seconds.
    took: float = 1.0
    #: When the last one that waits in the queue has its turn (monotonic).
    next: float = 0.0


places = Places(MOST_OF_HOST)


def _is_due(record: JobRecord, delivery: Delivery) -> bool:
    if not record.state.ended:
        logger.info("job %s was put back and is %s; it calls back at its next end", record.id, record.state)
        return False
    if delivery.held.retries and record.callback_state is CallbackState.DELIVERED:
        logger.info("the callback of job %s was delivered meanwhile, by Job.redeliver()", record.id)
        return False
    return True


def _is_wanted(record: JobRecord, event: Happening) -> bool:
    if event.is_stale(record):
        logger.info("job %s has gone on since it was told of as %s; that is not told any more", record.id, event.name)
        return False
    if not event.by_hand and any(tried.event and tried.status == GONE for tried in record.callback_attempts):
        logger.info("the webhook of job %s wants no more; %s is not told", record.id, event.name)
        return False
    return record.webhook is not None


@dataclass(frozen=True, slots=True)
class _Call:
    """What is to be called."""

    url: str
    #: What it is, for the log.
    what: str
    #: The pauses before further tries, in seconds.
    pauses: tuple[float, ...]
    #: What is posted; None for a GET.
    body: bytes | None = None
    headers: Mapping[str, str] = field(default_factory=dict)
    #: Of which event a webhook is told; empty for a callback.
    event: str = ""

    def pause(self, answer: Answer, retries: int) -> float | None:
        """How long to wait before the next try; None when there is none."""
        again = answer.again
        if self.event and answer.status is not None:
            again = bool(answer.error) and answer.status != GONE  # whatever it was, somebody may mend it
        if not again or retries >= len(self.pauses):
            return None
        if not self.event:
            return self.pauses[retries]
        asked = min(answer.retry_after, LONGEST_PAUSE)
        return max(self.pauses[retries], asked) * (1 + random.uniform(0, JITTER))


def _webhook_call(store: Store, record: JobRecord, event: Happening) -> _Call:
    assert record.webhook is not None
    body = message_of(record, event, store.settings, store.namespace)
    headers = headers_of(store.root, record, event, body, store.now(), store.settings)
    pauses = PROGRESS_PAUSES if event.letter == "p" else WEBHOOK_PAUSES
    return _Call(record.webhook.url, f"webhook ({event.name})", pauses, body, headers, event.name)


def _try_once(delivery: Delivery, store: Store, record: JobRecord, call: _Call) -> None:
    settings, pump = store.settings, delivery.broker.pump
    at, begun = store.now(), time.monotonic()
    policy = policy_of(settings.callback_allow, loopback=store.connector.embedded is not None)
    with places.of(urlsplit(call.url).netloc):
        answer = fetch(call.url, policy, settings.callback_timeout, body=call.body, headers=call.headers)
    took = round(time.monotonic() - begun, 4)
    pause = call.pause(answer, delivery.held.retries)
    attempt = CallbackAttempt(
        at=at,
        seconds=took,
        status=answer.status,
        error=answer.error,
        worker=pump.worker if pump else "",
        event=call.event,
    )
    state = "d" if not answer.error else "f" if pause is None else "p"
    of_webhook: dict[str, Any] = {}
    if call.event:
        of_webhook = {"delivery": delivery.held.id, "no_more": answer.status == GONE}
    if not store.note_callback(record.id, state, pack_callback_attempt(attempt), **of_webhook):
        raise JobNotFound.of(record.id, store.namespace)
    # The host only: a query may hold what is nobody's business.
    host = urlsplit(call.url).netloc
    if not answer.error:
        logger.info("the %s of job %s is delivered: %s answered %s", call.what, record.id, host, answer.status)
    elif pause is None:
        logger.warning("the %s of job %s is given up: %s: %s", call.what, record.id, host, answer.error)
    else:
        logger.info("the %s of job %s is tried again in %g s: %s: %s", call.what, record.id, pause, host, answer.error)
        delivery.retry_delay = pause  # also where an app has other middleware than Retries
        raise Retry(answer.error, delay=pause)


def callback_url(record: JobRecord) -> str:
    """The URL of a job that has ended, with what is told in its query; the query that it has stays as it is."""
    told = {
        "success": int(record.state is State.SUCCEEDED),
        "job_id": record.id,
        "short_result": record.short_text,
    }
    url = urlsplit(record.callback or "")
    query = "&".join(filter(None, (url.query, urlencode(told, quote_via=quote))))
    return url._replace(query=query).geturl()


@dataclass(frozen=True, slots=True)
class Answer:
    """How a try went."""

    #: The HTTP status; None when there was none.
    status: int | None
    #: Why it was no delivery, without anything of the URL but its host; empty when it was one.
    error: str = ""
    #: Whether another try may go better.
    again: bool = False
    #: For how many seconds the receiver asks to be left alone.
    retry_after: float = 0.0


def fetch(
    url: str,
    policy: AddressPolicy,
    timeout: float,
    *,
    body: bytes | None = None,
    headers: Mapping[str, str] | None = None,
) -> Answer:
    """Makes one GET of a URL, or a POST of a body, in `timeout` seconds all in all. Follows no redirect, uses no proxy,
    sends no cookie."""
    try:
        status, retry_after = _status(url, policy, _Deadline(timeout), body, headers or {})
    except AddressRefused as error:
        return Answer(None, str(error))
    except UnicodeError:
        return Answer(None, "its host cannot be a name")
    except TimeoutError:
        return Answer(None, f"no answer within {timeout:g} s", again=True)
    except ssl.SSLCertVerificationError as error:
        return Answer(None, f"its certificate is not accepted: {error.verify_message}", again=True)
    except socket.gaierror as error:
        return Answer(None, f"its host is not found: {error.strerror}", again=True)
    except OSError as error:
        return Answer(None, f"its connection failed: {error.strerror or type(error).__name__}", again=True)
    except _NoAnswer as error:
        return Answer(None, str(error), again=True)
    if 200 <= status < 300:
        return Answer(status)
    if 300 <= status < 400:
        return Answer(status, f"answered {status}, a redirect; they are not followed")
    return Answer(status, f"answered {status}", again=status == 429 or status >= 500, retry_after=retry_after)


class _NoAnswer(Exception):
    """What came back is not HTTP. Its text holds nothing of that: a receiver may send back what it was sent."""


class _Deadline:
    """The moment at which a try ends."""

    def __init__(self, timeout: float) -> None:
        self._at = time.monotonic() + timeout

    def left(self) -> float:
        """Seconds until then. Raises TimeoutError when it has passed."""
        left = self._at - time.monotonic()
        if left <= 0:
            raise TimeoutError
        return left

    def hasten(self, seconds: float) -> None:
        """Moves it nearer: to `seconds` from now."""
        self._at = min(self._at, time.monotonic() + seconds)


def _status(
    url: str, policy: AddressPolicy, deadline: _Deadline, body: bytes | None, headers: Mapping[str, str]
) -> tuple[int, float]:
    parts = urlsplit(url)
    host, tls = canonical(parts.hostname or ""), parts.scheme == "https"
    port = parts.port if parts.port is not None else 443 if tls else 80
    with contextlib.ExitStack() as stack:
        connection = stack.enter_context(_connect(host, port, policy, deadline))
        if tls:
            connection.settimeout(deadline.left())
            connection = tls_context().wrap_socket(connection, server_hostname=host, do_handshake_on_connect=False)
            stack.enter_context(connection).do_handshake()
        connection.settimeout(deadline.left())
        connection.sendall(_request(parts, host, body, headers))
        return _answered(connection, deadline, "GET" if body is None else "POST")


def _request(parts: SplitResult, host: str, body: bytes | None, headers: Mapping[str, str]) -> bytes:
    name = f"[{host}]" if ":" in host else host
    # What is no ASCII is encoded, what is stays as it was written.
    query = f"?{parts.query}" if parts.query else ""
    target = quote(f"{parts.path or '/'}{query}", safe=string.punctuation)
    length = {} if body is None else {"Content-Length": str(len(body))}
    lines = (
        f"{'GET' if body is None else 'POST'} {target} HTTP/1.1",
        f"Host: {name}" if parts.port is None else f"Host: {name}:{parts.port}",
        f"User-Agent: mlqueue/{sys.modules[__package__].__version__}",
        "Accept: */*",
        "Connection: close",
        *(f"{name}: {value}" for name, value in {**headers, **length}.items()),
        "",
        "",
    )
    return "\r\n".join(lines).encode("ascii") + (body or b"")


def _answered(connection: socket.socket, deadline: _Deadline, method: str) -> tuple[int, float]:
    import http.client

    incoming: Any = _Incoming(connection, deadline)  # http.client reads from whatever has a `makefile`
    with http.client.HTTPResponse(incoming, method=method) as response:
        try:
            response.begin()
        except (http.client.HTTPException, ValueError) as error:
            hung_up = isinstance(error, ConnectionError)
            raise _NoAnswer("hung up without an answer" if hung_up else "its answer is not HTTP") from None
        deadline.hasten(LINGER)
        with contextlib.suppress(OSError, http.client.HTTPException, ValueError):
            response.read(MOST_READ)
        return response.status, _retry_after(response.getheader("Retry-After") or "")


def _retry_after(text: str) -> float:
    """The seconds that a Retry-After header asks for: a number of them, or a date; 0 for anything else."""
    if text.isascii() and text.isdigit():
        return float(text[:10])
    try:
        until = datetime.strptime(text, "%a, %d %b %Y %H:%M:%S GMT").replace(tzinfo=UTC)
    except ValueError:
        return 0.0
    return max(0.0, until.timestamp() - time.time())


class _Incoming(io.RawIOBase):
    """What comes over a connection, until the deadline and at most `MOST_READ` bytes: neither a receiver that drips nor
    one that floods holds a try for longer."""

    def __init__(self, connection: socket.socket, deadline: _Deadline) -> None:
        self._connection = connection
        self._deadline = deadline
        self._room = MOST_READ

    def makefile(self, mode: str) -> io.BufferedReader:
        return io.BufferedReader(self)

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        self._connection.settimeout(self._deadline.left())
        count = self._connection.recv_into(buffer, min(len(buffer), self._room)) if self._room else 0
        self._room -= count
        return count


def _connect(host: str, port: int, policy: AddressPolicy, deadline: _Deadline) -> socket.socket:
    """A connection to an address of a host, which is looked up once: a second answer might be another one."""
    found = _resolve(host, port, deadline)
    policy.check(host, [address[0] for *_, address in found])
    failure: OSError | None = None
    for number, (family, kind, protocol, _, address) in enumerate(found):
        connection = None
        try:
            connection = socket.socket(family, kind, protocol)
            connection.settimeout(deadline.left() / (len(found) - number))
            connection.connect(address)
        except OSError as error:
            failure = error
            if connection is not None:
                connection.close()
        else:
            return connection
    raise failure or socket.gaierror(socket.EAI_NONAME, "no address")


def _resolve(host: str, port: int, deadline: _Deadline) -> list[tuple[Any, ...]]:
    """All addresses of a host. Asked in a thread, which is left behind when it takes too long: nothing can stop it."""
    answers: queue.SimpleQueue[list[tuple[Any, ...]] | Exception] = queue.SimpleQueue()

    def look_up() -> None:
        try:
            answers.put(list(socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)))
        except Exception as error:  # noqa: BLE001 - it is raised where it is waited for
            answers.put(error)

    threading.Thread(target=look_up, name="mlqueue-resolve", daemon=True).start()
    try:
        answer = answers.get(timeout=deadline.left())
    except queue.Empty:
        raise TimeoutError from None
    if isinstance(answer, Exception):
        raise answer
    return answer


@functools.cache
def tls_context() -> ssl.SSLContext:
    """Checks certificates against those of the system, or of ``SSL_CERT_FILE``. Made once: reading them takes time."""
    context = ssl.create_default_context()
    context.set_alpn_protocols(["http/1.1"])
    return context


__all__ = ["callback_actor"]
