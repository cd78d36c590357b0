"""Arguments that are too large for a record lie beside it, in chunks that belong to the job or go by themselves."""

from __future__ import annotations

import io

import dramatiq
import pytest
from dramatiq import Message

import mlqueue
from mlqueue import MLQ, DeadReason, EncodeError, State
from mlqueue.job import NewJob, new_id
from mlqueue.store.chunks import CHUNK, CHUNK_TTL, BodyReference, Chunks
from mlqueue.testing import drain

#: Three chunks, the last one short.
LARGE = bytes(range(256)) * (2 * CHUNK // 256) + b"end"


def chunks_of(mlq: MLQ, job_id: str) -> list[str]:
    return sorted(key.decode() for key in mlq.client.scan_iter(f"{mlq.store.root}:x:{job_id}:*", count=1000))


def ttls(mlq: MLQ, keys: list[str]) -> set[int]:
    return {mlq.client.ttl(key) for key in keys}


@pytest.fixture
def global_broker(mlq: MLQ, monkeypatch: pytest.MonkeyPatch) -> None:
    """A message of Dramatiq's own asks the global broker for its result."""
    monkeypatch.setattr(dramatiq.broker, "global_broker", mlq.broker)


@pytest.fixture
def size_of(mlq: MLQ) -> dramatiq.Actor:
    @mlq.actor(actor_name="size_of", max_retries=0)
    def size_of(data: bytes, tail: bool = False) -> object:
        return data[-3:] if tail else len(data)

    return size_of


class TestChunks:
    @pytest.mark.parametrize("size", [1, CHUNK - 1, CHUNK, CHUNK + 1, 3 * CHUNK])
    def test_join_to_what_they_were_cut_of(self, size: int) -> None:
        data = bytes(i % 251 for i in range(1000)) * (size // 1000 + 1)
        chunks = Chunks(data[:size])
        assert (-(-size // CHUNK), b"".join(chunks)) == (len(chunks), data[:size])
        assert chunks[0:2] == list(chunks)[0:2]

    @pytest.mark.parametrize("body", [b"", b"\xc1MQ1" + b"x" * 10, b"\xc1MQa", b"\xc1MQa\x01", b"\xc1MQa" + b"x" * 100])
    def test_are_not_read_into_other_bodies(self, body: bytes) -> None:
        assert BodyReference.of(body) is None

    def test_are_referred_to_in_few_bytes(self) -> None:
        reference = BodyReference("0123456789ab", 2**31, 2**53)
        assert BodyReference.of(reference.packed()) == reference
        assert len(reference.packed()) <= 64


class TestALargeArgument:
    def test_reaches_the_job_and_goes_with_it(self, mlq: MLQ, worker: dramatiq.Worker, size_of: dramatiq.Actor) -> None:
        job = size_of.submit(LARGE, tail=True)
        assert job.result(timeout=20) == b"end"
        keys = chunks_of(mlq, job.id)
        assert (3, {-1}) == (len(keys), ttls(mlq, keys))
        assert mlq.store.remove([job.id]) == 1
        assert chunks_of(mlq, job.id) == []

    def test_leaves_the_record_small(self, mlq: MLQ, size_of: dramatiq.Actor) -> None:
        job = size_of.submit(LARGE)
        assert mlq.client.memory_usage(f"{mlq.store.root}:j:{job.id}") < 1000
        assert mlq.client.exists(f"{mlq.store.root}:b:{job.id}") == 0
        assert mlq.get_job(job.id)["msg"]["args"] == [LARGE]

    def test_goes_by_itself_when_the_submitter_dies_in_between(self, mlq: MLQ) -> None:
        job_id = new_id()
        mlq.store.stash(job_id, LARGE)
        [ttl] = {round(ttl, -2) for ttl in ttls(mlq, chunks_of(mlq, job_id))}
        assert ttl == CHUNK_TTL

    def test_submitted_again_under_its_id_changes_nothing(self, mlq: MLQ, size_of: dramatiq.Actor) -> None:
        for _ in range(2):
            size_of.with_options(job_id="one").submit(LARGE)
        assert sorted(mlq.client.ttl(key) > 0 for key in chunks_of(mlq, "one")) == [False] * 3 + [True] * 3
        drain(mlq)
        assert mlq.job("one").result(timeout=1) == len(LARGE)

    @pytest.mark.usefixtures("global_broker")
    def test_of_a_job_that_a_job_submits_arrives(self, mlq: MLQ, size_of: dramatiq.Actor) -> None:
        @mlq.actor
        def gives() -> bytes:
            return LARGE

        pipe = gives.message() | size_of.message()
        pipe.run()
        drain(mlq)
        assert pipe.get_result() == len(LARGE)
        [last] = (record for record in mlq.store.scan() if record.actor == "size_of")
        assert {-1} == ttls(mlq, chunks_of(mlq, last.id)[:1])

    def test_beyond_the_limit_is_refused_before_anything_is_written(self, mlq: MLQ, size_of: dramatiq.Actor) -> None:
        with pytest.raises(EncodeError, match=r"args\[0\].*MLQUEUE_MAX_MESSAGE_BYTES|args\[0\].*max_message_bytes"):
            size_of.submit(b"x" * (mlq.settings.max_message_bytes + 1))
        assert list(mlq.client.scan_iter(f"{mlq.store.root}:*")) == []

    def test_whose_chunk_is_gone_makes_the_job_dead(
        self, mlq: MLQ, worker: dramatiq.Worker, caplog: pytest.LogCaptureFixture, size_of: dramatiq.Actor
    ) -> None:
        job = size_of.with_options(delay=0.3).submit(LARGE)
        mlq.client.unlink(chunks_of(mlq, job.id)[1])
        assert job.wait(20)
        assert job.record.dead_reason is DeadReason.UNDECODABLE
        assert job.record.error is not None
        assert "chunk 1 of job" in job.record.error.message
        # What Dramatiq logs of a message would have all of it.
        assert max(len(record.getMessage()) for record in caplog.records) < 1000

    def test_whose_chunks_are_gone_before_the_job_is_made_is_an_error(self, mlq: MLQ) -> None:
        body = BodyReference("x", 2, 2 * CHUNK).packed()
        with pytest.raises(mlqueue.StoreError, match="a chunk of the arguments is gone"):
            mlq.store.submit([NewJob(id=new_id(), queue="default", actor="size_of", body=body)])
        assert mlq.store.counts() == []


class TestDeadLettersWithLargeArguments:
    @pytest.fixture
    def dead(self, mlq: MLQ) -> str:
        @mlq.actor(actor_name="size_of", max_retries=0)
        def size_of(data: bytes) -> int:
            if len(data) == len(LARGE):
                raise ValueError("too large")
            return len(data)

        job = size_of.submit(LARGE)
        drain(mlq)
        assert job.state is State.DEAD
        return job.id

    def test_are_put_back_with_others(self, mlq: MLQ, dead: str) -> None:
        before = chunks_of(mlq, dead)
        mlq.dead_letters.requeue(dead, args=[LARGE + b"more"])
        keys = chunks_of(mlq, dead)
        assert (3, {-1}) == (len(keys), ttls(mlq, keys))
        assert not set(keys) & set(before)
        drain(mlq)
        assert mlq.job(dead).result(timeout=1) == len(LARGE) + 4

    def test_are_put_back_with_small_ones(self, mlq: MLQ, dead: str) -> None:
        mlq.dead_letters.requeue(dead, args=[b"x"])
        assert chunks_of(mlq, dead) == []

    def test_are_exported_and_imported_whole(self, mlq: MLQ, dead: str) -> None:
        file = io.StringIO()
        mlq.dead_letters.export(file)
        mlq.dead_letters.purge(dead)
        assert chunks_of(mlq, dead) == []
        assert mlq.dead_letters.import_(io.StringIO(file.getvalue())).created == [dead]
        assert mlq.dead_letters.show(dead).args == [LARGE]


@pytest.mark.usefixtures("global_broker")
def test_arguments_of_a_message_of_dramatiqs_own_are_the_same(mlq: MLQ, size_of: dramatiq.Actor) -> None:
    message: Message[int] = size_of.message(LARGE)
    mlq.broker.enqueue(message)
    drain(mlq)
    assert message.get_result() == len(LARGE)
