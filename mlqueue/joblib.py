"""A backend of joblib: ``Parallel(...)`` and what is built on it, as scikit-learn's GridSearchCV, on mlqueue's workers.

::

    import joblib, mlqueue.joblib
    with joblib.parallel_config(backend="mlqueue", mlq=mlq, n_jobs=8):
        search.fit(X, y)

The calls are sent as code, so the sender and the workers need the same ``MLQUEUE_SIGNING_KEY``. Workers that have it
serve the queue ``joblib`` besides their own; what holds Python's global lock is best run by many processes of one
thread (``mlqueue worker --processes 8 --threads 1 --queues joblib``). Large arrays are sent once for each call of
``Parallel`` (or once for ``with Parallel(...) as parallel``); workers get them read-only. A call whose worker dies runs
again; one that brings down its worker three times raises `JobFailed`.
"""

from __future__ import annotations

import contextlib
import pickle
import queue
import threading
import uuid
import weakref
from collections.abc import Callable
from typing import Any, Final

try:
    import joblib
    from joblib._parallel_backends import AutoBatchingMixin, ParallelBackendBase
except ImportError as error:
    from .errors import MissingDependency

    raise MissingDependency("mlqueue.joblib needs joblib: pip install 'mlqueue[batch]'") from error

from .app import MLQ
from .calls import CALL, QUEUE, buffer_key, open_answer, pickler, sign_call
from .errors import InvalidTransition, JobNotFound, MLQueueError, SettingsError
from .job import new_id
from .waiting import LOOK_AGAIN, Subscription, bell_of

__all__ = ["MLQueueBackend", "register"]

#: Arrays of so many bytes or more are stored beside the call, once.
LARGE: Final = 64 * 1024

#: How long they are kept when whoever sent them was killed, in seconds.
KEPT: Final = 24 * 3600.0


class _Pending:
    """A call under way: what joblib takes for its future."""

    def __init__(self, job_id: str, callback: Callable[[Any], None] | None) -> None:
        self.id = job_id
        self.callback = callback
        self.subscription: Subscription | None = None
        self.full: Any = None
        self.error: BaseException | None = None


class MLQueueBackend(AutoBatchingMixin, ParallelBackendBase):  # type: ignore[misc]
    """joblib's face of an app.

    Parameters:
      mlq: The app whose workers run the calls; one of the environment's settings when None.
      queue_name: The queue of the calls; its workers have to know it (``--queues``).
    """

    supports_retrieve_callback = True
    supports_sharedmem = False
    default_n_jobs = -1

    def __init__(
        self, mlq: MLQ | None = None, queue_name: str = QUEUE, nesting_level: int | None = None, **kwargs: Any
    ) -> None:
        super().__init__(nesting_level=nesting_level, **kwargs)
        self.mlq = MLQ() if mlq is None else mlq
        if not isinstance(self.mlq, MLQ):
            raise SettingsError(f"mlq={mlq!r} is no MLQ; write parallel_config(backend='mlqueue', mlq=mlqueue.MLQ()).")
        self.queue_name = queue_name
        self._start()

    def _start(self) -> None:
        self._run_id = f"joblib.{uuid.uuid4().hex}"
        self._sent: set[str] = set()
        self._known: dict[int, tuple[weakref.ref[Any], str]] = {}
        self._pending: dict[str, _Pending] = {}
        self._ended: queue.SimpleQueue[_Pending | None] = queue.SimpleQueue()
        self._collector: threading.Thread | None = None

    # joblib's face

    def effective_n_jobs(self, n_jobs: int | None) -> int:
        """`n_jobs`; for -1 and below, from the threads of the workers that serve the queue."""
        if n_jobs == 0:
            raise ValueError("n_jobs == 0 in Parallel has no meaning; give 1 or more, or -1 for all threads.")
        if n_jobs is None or n_jobs > 0:
            return n_jobs or 1
        places = sum(
            int(worker.info.get("threads", 1))
            for worker in self.mlq.store.workers()
            if self.queue_name in worker.info.get("queues", ())
        )
        return max(1, places + 1 + n_jobs)

    def configure(self, n_jobs: int = 1, parallel: Any = None, **_: Any) -> int:
        """How many calls are under way at a time."""
        self.parallel = parallel
        return self.effective_n_jobs(n_jobs)

    def submit(self, func: Callable[[], Any], callback: Callable[[Any], None] | None = None) -> _Pending:
        """Sends a call."""
        buffers: list[pickle.PickleBuffer] = []
        code = pickler()(func, protocol=5, buffer_callback=lambda buffer: self._keep_out(buffer, buffers))
        keys = [self._store_buffer(buffer) for buffer in buffers]
        call = _Pending(new_id(), callback)
        signature = sign_call(self.mlq.store, call.id, code, keys)
        self._pending[call.id] = call
        self.mlq.submit(CALL, code, keys, signature, job_id=call.id, queue_name=self.queue_name)
        self._watch(call)
        return call

    def retrieve_result_callback(self, out: _Pending) -> Any:
        """What the call gave; raises what it raised."""
        if out.error is not None:
            raise out.error
        return open_answer(self.mlq.store, out.id, out.full)

    def abort_everything(self, ensure_ready: bool = True) -> None:
        """Cancels what is under way."""
        for call in list(self._pending.values()):
            with contextlib.suppress(MLQueueError):
                self.mlq.job(call.id).cancel()
        self.terminate()

    def terminate(self) -> None:
        """Ends the waiting, and forgets what was stored for the calls."""
        collector, self._collector = self._collector, None
        if collector is not None:
            self._ended.put(None)
            if collector is not threading.current_thread():
                collector.join()
        for call in list(self._pending.values()):
            self._forget(call)
        for key in self._sent:
            with contextlib.suppress(MLQueueError):
                self.mlq.store.drop_data(key)
        self._start()

    def __reduce__(self) -> Any:
        """A call that is sent names the backend for what it calls itself: that is a thread pool of the worker's."""
        return joblib.parallel.ThreadingBackend, ()

    # Arrays

    def _keep_out(self, buffer: pickle.PickleBuffer, buffers: list[pickle.PickleBuffer]) -> bool:
        """Whether a buffer is to go into the pickle: what is small."""
        with memoryview(buffer) as view:
            small = view.nbytes < LARGE or not view.c_contiguous
        if not small:
            buffers.append(buffer)
        return small

    def _store_buffer(self, buffer: pickle.PickleBuffer) -> str:
        view = buffer.raw()
        owner = view.obj
        known = self._known.get(id(owner))
        if known is not None and known[0]() is owner:
            return known[1]
        key = buffer_key(self._run_id, view)
        if key not in self._sent:
            self.mlq.store.put_data(key, bytes(view), KEPT)
            self._sent.add(key)
        with contextlib.suppress(TypeError):  # bytes cannot be watched
            self._known[id(owner)] = weakref.ref(owner), key
        return key

    # Results

    def _watch(self, call: _Pending) -> None:
        store = self.mlq.store
        bell = bell_of(store)
        ended = self._ended
        call.subscription = bell.subscribe(call.id, lambda: ended.put(call))
        if self._collector is None:
            self._collector = threading.Thread(target=self._collect, args=(ended,), name="mlqueue-joblib", daemon=True)
            self._collector.start()
        if store.watch(call.id, bell.name).ended:
            ended.put(call)

    def _collect(self, ended: queue.SimpleQueue[_Pending | None]) -> None:
        while True:
            try:
                call = ended.get(timeout=LOOK_AGAIN)
            except queue.Empty:
                self._look_again(ended)
                continue
            if call is None:
                return
            if call.id in self._pending and self._take(call):
                self._forget(call)
                if call.callback is not None:
                    call.callback(call)

    def _look_again(self, ended: queue.SimpleQueue[_Pending | None]) -> None:
        """The store may have lost a bell."""
        bell = bell_of(self.mlq.store)
        for call in list(self._pending.values()):
            try:
                if self.mlq.store.watch(call.id, bell.name).ended:
                    ended.put(call)
            except JobNotFound:
                ended.put(call)
            except MLQueueError:
                return  # the store is away; later

    def _take(self, call: _Pending) -> bool:
        """Whether the call has ended; then its result or its error is in it."""
        try:
            job = self.mlq.job(call.id)
            if not job.done:
                return False
            call.full = job.result(timeout=0)
            self.mlq.store.remove([call.id])
        except (InvalidTransition, MLQueueError) as error:
            call.error = error
        return True

    def _forget(self, call: _Pending) -> None:
        self._pending.pop(call.id, None)
        if call.subscription is not None:
            bell_of(self.mlq.store).unsubscribe(call.subscription)
            call.subscription = None


def register() -> None:
    """Makes the backend known to joblib under the name ``mlqueue``; importing this module does it."""
    joblib.register_parallel_backend("mlqueue", MLQueueBackend)


register()
