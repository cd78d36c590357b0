"""Pools of actors whose workers come by TCP, by TLS and through the store: the batches of the source, in its order,
whatever else is sent."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import json
import logging
import os
import random
import re
import socket
import struct
import sys
import threading
import time
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import redis
import test_actor_pool
import trustme
from hypothesis import given, settings
from hypothesis import strategies as st
from support import eventually, fresh_app
from test_actor_pool import KEY, NEEDS_SEED, Bench
from test_work_pool import assert_same

from mlqueue import Settings
from mlqueue.batch import compression, links, parts, remote, tcp, through_store, ways
from mlqueue.batch.actor_pool import ActorPool
from mlqueue.batch.channel import PLAIN, WAKE, Channel
from mlqueue.batch.compression import LZ4, RAW, ZSTD, Compression
from mlqueue.batch.data_source import ArrayDataSource
from mlqueue.batch.transport import HEADER_BYTES, Segment, TransportError, read_description
from mlqueue.batch.work_pool import WorkerDied, WorkerError
from mlqueue.errors import StoreError
from mlqueue.signing import Keyring

LOOPBACK = {"signing_key": KEY, "batches_ways": "tcp", "batches_bind": "127.0.0.1"}
#: What the trainer offers, and what is said of it. The workers take what they find.
WAYS = {"TCP": LOOPBACK, "the store": {"batches_ways": "store", "batches_store_bytes": 2**20}}


def certificates(folder: Path) -> dict[str, str]:
    """Settings for TLS on the loopback address, both sides showing a certificate."""
    authority = trustme.CA()
    own = authority.issue_cert("127.0.0.1")
    authority.cert_pem.write_to_path(folder / "ca.pem")
    own.private_key_and_cert_chain_pem.write_to_path(folder / "own.pem")
    return {"batches_tls_ca": str(folder / "ca.pem"), "batches_tls_cert": str(folder / "own.pem")}


@pytest.fixture(scope="module")
def workers(tmp_path_factory, server):
    bench = Bench(tmp_path_factory.mktemp("network"), server, signing_key=KEY)
    bench.work(queues=["batches"])
    yield bench
    bench.close()


@pytest.fixture(params=sorted(WAYS))
def bench(request, workers):
    workers.way = request.param
    workers.forget()
    offered = dataclasses.replace(workers.mlq.settings, **WAYS[request.param])
    with mock.patch.object(workers.mlq, "settings", offered):
        yield workers


@pytest.fixture
def pool(bench):
    sys.modules["batch_sources"] = bench.module
    with bench.pool() as pool:
        yield pool


def stored(app):
    """What batches have left, or have just now, in the store: bytes of each key."""
    found = {}
    for key in app.client.scan_iter(f"{app.store.root}:batches:*", count=1000):
        found[key.decode()] = app.client.strlen(key) if b":d:" in key or b":s:" in key else 0
    return found


class TestBatches:
    def test_every_kind_of_source_gives_its_own_batches_in_its_order(self, bench, pool):
        for kind, make in bench.module.SOURCES.items():
            ds = bench.module.any_source(kind=kind)
            seeds = [5] if kind in NEEDS_SEED else [None, 5]
            for seed in seeds:
                expected = itertools.islice(make().batch_iterator(16, shuffle=seed), 14)
                with pool.parallel_data_source(ds, 6).batch_iterator(16, shuffle=seed) as batches:
                    for one, other in itertools.zip_longest(expected, itertools.islice(batches, 14)):
                        assert_same(one, other)
        assert pool.stats().transport == bench.way
        assert 0 == pool.stats().here == pool.stats().retries

    def test_views_copies_and_arrays_of_ones_own(self, bench, pool):
        ds = bench.module.any_source(kind="arrays")
        expected = list(ds.batch_iterator(50))
        kept = list(pool.parallel_data_source(ds, 3).batch_iterator(50))
        for one, other in zip(expected, kept, strict=True):
            assert_same(one, other)
            other[0][:] += 1
        with pool.parallel_data_source(ds, 3, copy=False).batch_iterator(50) as views:
            for one, other in zip(expected, views, strict=True):
                assert_same(one, other)

    def test_a_source_sent_as_code_and_the_state_of_an_iterator(self, bench, pool):
        large = np.arange(100_000).reshape(-1, 2)  # 0.8 MB, which the store is to take
        source = ArrayDataSource([large]).map(lambda x: x * 2)
        ds, expected = pool.parallel_data_source(source, 5), list(source.batch_iterator(12_000, shuffle=2))
        with ds.batch_iterator(12_000, shuffle=2) as batches:
            assert_same(expected[0], next(batches))
            state = batches.state_dict()
        with ds.batch_iterator(12_000, shuffle=2) as batches:
            batches.load_state_dict(state)
            assert_same(expected[1:], list(batches))

    def test_a_batch_that_is_called_off_is_not_prepared(self, bench, pool):
        source = bench.module.faulty(how="none", n=4000, seconds=0.05)
        batches = pool.parallel_data_source(source, 40).batch_iterator(5)
        next(batches)
        before = pool.stats().prepared
        batches.close()
        ds = bench.module.any_source(kind="arrays")
        assert_same(list(ds.batch_iterator(50)), list(pool.parallel_data_source(ds).batch_iterator(50)))
        assert pool.stats().prepared - before < 5 + 2 * 4


class TestFaults:
    numbers = test_actor_pool.TestErrors.numbers

    def spare_supervisors(self, bench):
        if bench.way != "TCP":
            # They start a child again later and later; tests/faults/test_two_hosts.py has the patience.
            pytest.skip("workers are killed with one way only")

    def test_an_exception_is_raised_in_its_place_with_the_sample_indices(self, bench, pool):
        found = self.numbers(bench, pool, "raise")
        error = found.pop(10)
        assert [*range(0, 50, 5), *range(55, 100, 5)] == found
        assert isinstance(error, ValueError)
        assert "sample indices [50 51 52 53 54]" in "".join(error.__notes__)

    def test_a_batch_whose_worker_dies_is_prepared_by_another(self, bench):
        self.spare_supervisors(bench)
        with bench.pool(lease=0.2) as pool:
            assert [*range(0, 100, 5)] == self.numbers(bench, pool, "kill once")
            assert pool.stats().retries > 0

    def test_a_batch_that_ends_two_workers_is_an_error(self, bench):
        self.spare_supervisors(bench)
        with bench.pool(lease=0.2) as pool:
            found = self.numbers(bench, pool, "kill")
            assert isinstance(found[10], WorkerDied)
            assert [*range(0, 50, 5), *range(55, 100, 5)] == found[:10] + found[11:]

    def test_a_source_that_cannot_be_made_is_an_error(self, bench, pool, monkeypatch):
        monkeypatch.setenv("BATCH_TESTS_TRAINER", "1")
        ds = bench.module.broken()
        with pytest.raises(Exception, match="OSError: the disk is gone"):
            next(pool.parallel_data_source(ds).batch_iterator(5))

    def test_nothing_is_left_of_a_pool_that_is_closed(self, bench):
        with bench.pool() as pool:
            batches = pool.parallel_data_source(bench.module.any_source(kind="mapped")).batch_iterator(5)
            next(batches)
        with pytest.raises(RuntimeError, match="the pool is closed"):
            next(batches)
        del batches, pool
        left = {}

        def gone():
            left["threads"] = [t.name for t in threading.enumerate() if t.name.startswith("mlqueue-batch-")]
            return not left["threads"]

        with contextlib.suppress(AssertionError):
            eventually(gone)
        assert {"threads": []} == left
        eventually(lambda: not stored(bench.mlq))
        eventually(lambda: bench.jobs() == [], 20)


class TestBudget:
    """Of the store, one megabyte of which batches may take here."""

    @pytest.fixture(autouse=True)
    def only_the_store(self, bench):
        if bench.way != "the store":
            pytest.skip("of the store alone")

    def test_batches_never_take_more_than_they_may(self, bench):
        ds = bench.module.wide(rows=900, columns=5000)  # batches of 400 kB
        most = 0
        with bench.pool() as pool:
            batches = pool.parallel_data_source(ds, 12).batch_iterator(10, shuffle=4)
            for one, other in itertools.zip_longest(ds.batch_iterator(10, shuffle=4), batches):
                assert_same(one, other)
                most = max(most, sum(stored(bench.mlq).values()))
        assert 0 < most <= 2**20

    def test_a_larger_batch_is_an_error_that_names_the_setting(self, bench, pool):
        ds = bench.module.wide(rows=100, columns=5000)
        batches = pool.parallel_data_source(ds, 3).batch_iterator(50)
        with pytest.raises(WorkerError, match="MLQUEUE_BATCHES_STORE_BYTES"):
            next(batches)
        assert_same(next(ds.batch_iterator(20)), next(pool.parallel_data_source(ds, 3).batch_iterator(20)))

    @pytest.mark.parametrize("size", [0, 1, parts.PART, parts.PART + 1, 3_000_000])
    def test_parts_arrive_and_are_deleted(self, bench, size):
        connector, key = bench.mlq.store.connector, f"{bench.mlq.store.root}:batches:parts"
        body, target = random.Random(size).randbytes(size), bytearray(size)

        def own():
            """Not what the worker of a pool that a test before has closed was about to send."""
            return [name for name in stored(bench.mlq) if name.startswith(key)]

        with contextlib.closing(Redis(connector)) as out, contextlib.closing(Redis(connector)) as back:
            parts.write_parts(out.socket, key, body)
            assert all(bench.mlq.client.pttl(name) > 0 for name in own())
            parts.read_parts(back.socket, key, memoryview(target))
            assert bytes(target) == body
            assert not own()
            if size:
                with pytest.raises(parts.GoneError):
                    parts.read_parts(back.socket, key, memoryview(target))
                parts.write_parts(out.socket, key, body + b"x")
                with pytest.raises((remote.Hostile, parts.GoneError)):
                    parts.read_parts(back.socket, key, memoryview(bytearray(size + parts.PART)))
                parts.delete_parts(out.connection, key)
                assert not own()


def test_parts_are_kept_out_of_the_file_of_a_store_that_writes_one(mlq):
    def written():
        return mlq.client.info("persistence")["aof_current_size"]

    if not mlq.client.info("persistence")["aof_enabled"]:
        pytest.skip("the store of these tests writes no file")
    key, body, found = f"{mlq.store.root}:batches:parts", bytes(2_000_000), {}
    with contextlib.closing(Redis(mlq.store.connector)) as connection:
        assert parts.hands_on(connection.connection)
    for apart in (True, False):
        with contextlib.closing(Redis(mlq.store.connector)) as connection:
            before = written()
            parts.write_parts(connection.socket, key, body, apart=apart)
            target = bytearray(len(body))
            parts.read_parts(connection.socket, key, memoryview(target))
            assert body == bytes(target)
            found[apart] = written() - before
    assert found[True] < 10_000
    assert found[False] > len(body)


@pytest.mark.parametrize(
    ("told", "expected"),
    [
        ("aof_enabled:0\r\nconnected_slaves:0\r\n", False),
        ("aof_enabled:1\r\nconnected_slaves:0\r\n", True),
        ("aof_enabled:0\r\nconnected_slaves:1\r\n", True),
        ("redis_version:7.0.0\r\n", True),
        (redis.exceptions.NoPermissionError("this user has no permissions to run the 'info' command"), True),
    ],
)
def test_a_store_hands_on_what_it_is_given_to_its_file_or_replicas(told, expected):
    connection = mock.Mock()
    if isinstance(told, str):
        connection.read_response.return_value = told.encode()
    else:
        connection.read_response.side_effect = told
    assert expected is parts.hands_on(connection)


class Redis:
    """A connection of a test's own."""

    def __init__(self, connector):
        self.connection = connector.connection()
        self.socket = parts.raw(self.connection)

    def close(self):
        self.connection.disconnect()


@pytest.fixture
def trainer(server):
    """An app whose pool takes workers by all ways; on the loopback address by TCP."""
    with fresh_app(
        Settings.load({}, **{**plain_settings(server), **LOOPBACK, "batches_ways": "host,tcp,store"})
    ) as app:
        yield app


def plain_settings(server):
    return {"url": server.url} if server.url else {"home": server.home}


def arrays():
    return ArrayDataSource([np.arange(400, dtype=np.float32).reshape(100, 4), np.arange(100)])


class TestWays:
    def test_the_first_that_leads_there_is_taken_and_the_log_says_why(self, trainer, caplog):
        caplog.set_level(logging.INFO, "mlqueue.batches")
        with ActorPool(trainer, "nobody") as pool:
            address = pool._crew.desk.listener.address
            assert list(address) == ["host", "tcp", "store"]
            nowhere = {"socket": b"\0mlqueue-no-such-socket", "token": b"x" * 32}
            with socket.create_server(("127.0.0.1", 0)) as free:
                port = free.getsockname()[1]
            closed = {**address["tcp"], "addresses": [["127.0.0.1", port]]}
            others = {"tcp": {**address["tcp"], "token": b"1" * 32}, "store": {**address["store"], "token": b"2" * 32}}
            for given_, kind, shown in (
                (address, links.HostLink, "shared memory"),
                ({**address, "host": nowhere}, tcp.TcpLink, "TCP to 127.0.0.1:"),
                ({**address, "host": nowhere, "tcp": closed}, through_store.StoreLink, "the store ("),
                ({"host": nowhere, "tcp": closed}, None, f"tcp: 127.0.0.1:{port}: Connection refused"),
                ({"tcp": others["tcp"]}, None, "the trainer refuses us"),
            ):
                link = ways.connect(given_, "a job", trainer.settings, trainer.store.connector)
                if link is not None:
                    link.close()
                assert (type(link) if link else None) == kind
                assert shown in caplog.text
            assert "because not by host: " in caplog.text

    def test_who_has_no_key_or_another_one_is_refused_and_told_so(self, trainer, caplog):
        with ActorPool(trainer, "nobody") as pool:
            entry = pool._crew.desk.listener.address["tcp"]
            with pytest.raises(PermissionError, match="needs the MLQUEUE_SIGNING_KEY"):
                tcp.TcpLink(entry, "a job", Settings.load({}))
            with pytest.raises(PermissionError, match="its MLQUEUE_SIGNING_KEY is another one"):
                tcp.TcpLink(entry, "a job", Settings.load({}, signing_key="a key that nobody else has"))
            eventually(lambda: "who has not our signing key" in caplog.text)
            assert not pool._crew.desk.places
            link = tcp.TcpLink(entry, "a job", trainer.settings)
            link.close()

    def test_a_trainer_without_the_key_is_found_out(self, trainer):
        with contextlib.ExitStack() as stack:
            listening = stack.enter_context(socket.create_server(("127.0.0.1", 0)))

            def pretend():
                connection, _ = listening.accept()
                with connection:
                    connection.sendall(tcp.CHALLENGE.pack(tcp.MAGIC, b"n" * 32))
                    connection.recv(4096)
                    connection.sendall(tcp.VERDICT.pack(tcp.WELCOME, b"s" * 32))

            thread = threading.Thread(target=pretend)
            thread.start()
            entry = {"addresses": [listening.getsockname()], "token": b"t" * 32, "tls": False, "codecs": [], "limit": 9}
            with pytest.raises(PermissionError, match="has not the MLQUEUE_SIGNING_KEY"):
                tcp.TcpLink(entry, "a job", trainer.settings)
            thread.join()

    def test_without_a_key_nobody_is_let_in_by_tcp_and_the_log_says_what_to_do(self, server, caplog):
        given_ = {**plain_settings(server), "batches_bind": "127.0.0.1"}
        with fresh_app(Settings.load({}, **given_)) as app, ActorPool(app, "nobody") as pool:
            assert "tcp" not in pool._crew.desk.listener.address
            assert "MLQUEUE_BATCHES_BIND=127.0.0.1: that needs MLQUEUE_SIGNING_KEY" in caplog.text

    def test_an_address_that_cannot_be_listened_at_is_an_error(self, server):
        given_ = {**plain_settings(server), "signing_key": KEY, "batches_bind": "192.0.2.1:7"}
        refused = pytest.raises(OSError, match=re.escape("MLQUEUE_BATCHES_BIND=192.0.2.1:7"))
        with fresh_app(Settings.load({}, **given_)) as app, ActorPool(app, "nobody") as pool, refused:
            pool.parallel_data_source(arrays()).batch_iterator(5)

    def test_a_worker_that_wants_tls_takes_no_trainer_without_it_nor_one_of_another_authority(self, server, tmp_path):
        for name in ("ours", "theirs"):
            (tmp_path / name).mkdir()
        ours, theirs = (certificates(tmp_path / name) for name in ("ours", "theirs"))
        secured = Settings.load({}, **{**plain_settings(server), **LOOPBACK, **ours})
        entry = {"addresses": [], "token": b"t" * 32, "tls": False, "codecs": [], "limit": 9}
        with pytest.raises(PermissionError, match="the trainer speaks no TLS"):
            tcp.TcpLink(entry, "a job", secured)
        with fresh_app(secured) as app, ActorPool(app, "nobody") as pool:
            entry = pool._crew.desk.listener.address["tcp"]
            with pytest.raises(PermissionError, match="MLQUEUE_BATCHES_TLS_CA is not set"):
                tcp.TcpLink(entry, "a job", Settings.load({}, signing_key=KEY))
            with pytest.raises(OSError, match="CERTIFICATE_VERIFY_FAILED"):
                tcp.TcpLink(entry, "a job", Settings.load({}, signing_key=KEY, **theirs))
            batches = pool.parallel_data_source(arrays(), 1).batch_iterator(10)
            link = tcp.TcpLink(entry, "a job", secured)
            sent = np.random.default_rng(1).integers(0, 99, 800_000)
            work_once(link, sent)
            np.testing.assert_array_equal(sent, next(batches)[0])
            link.close()


def test_worker_processes_and_a_trainer_speak_tls(tmp_path, server):
    secured = Bench(tmp_path, server, **LOOPBACK, **certificates(tmp_path))
    try:
        secured.work(processes=1, queues=["batches"])
        with secured.pool(workers=1) as pool:
            # Who has a CA, as these workers have, speaks to no trainer without TLS.
            assert pool._crew.desk.listener.address["tcp"]["tls"]
            for kind, rows in (("wide", 200), ("arrays", 50)):  # of 8 MB, and small ones
                ds = (
                    secured.module.wide(rows=400, columns=5000)
                    if kind == "wide"
                    else secured.module.any_source(kind=kind)
                )
                expected = list(ds.batch_iterator(rows, shuffle=3))
                assert_same(expected, list(pool.parallel_data_source(ds, 3).batch_iterator(rows, shuffle=3)))
            assert pool.stats().transport == "TCP"
            assert 0 == pool.stats().here
    finally:
        secured.close()


def next_lease(link):
    """Takes a lease."""
    while True:
        order = eventually(lambda: link.receive(0.1))
        if order.kind == links.LEASE:
            break
        os.close(order.fd)
    assert link.claim(order)
    return order


def work_once(link, array):
    """Takes a lease, and answers it with this array."""
    order = next_lease(link)
    link.deliver(links.DONE, order, *link.place(order).write((array,)), 1000)


class Liar:
    """A worker that has the key, and sends what no worker sends."""

    def __init__(self, pool, key=KEY):
        entry = pool._crew.desk.listener.address["tcp"]
        keyring, session = Keyring((key,), tcp.PURPOSE), os.urandom(16)
        self.channels = []
        for connection in (tcp.CONTROL, tcp.DATA):
            channel, _ = tcp.reach(entry["addresses"], None)
            tcp.prove(channel, keyring, entry["token"], session, connection, "no job")
            self.channels.append(channel)
        self.control, self.data = self.channels

    def lease(self):
        """The next lease that comes."""
        while True:
            record = remote.OrderRecord.unpack(self.control.read(remote.ORDER.size))
            if record.size:
                self.control.read(record.size)
            if record.kind == links.LEASE:
                return record

    def answer(self, record, description, arrays=b"", **fields):
        """A batch of this description, which is announced as `fields` say."""
        text = description if isinstance(description, bytes) else json.dumps(description).encode()
        body = arrays + text
        frame = remote.Frame(
            links.DONE, 0, False, record.number, record.slot, HEADER_BYTES + len(arrays), len(text), 1000, len(body)
        )
        self.data.write(frame._replace(**fields).pack(), body)

    def is_cut_off(self):
        """Waits until the trainer has closed the connections."""
        for channel in self.channels:
            with contextlib.suppress(OSError, EOFError):
                while channel.read(1):
                    pass
        self.close()

    def close(self):
        for channel in self.channels:
            channel.close()


#: What hostile workers send: of a batch its description, what is announced otherwise, and bytes in front of it.
LIES = {
    "objects": (["a", "|O", [1], 64], {}, bytes(64)),
    "objects inside": (["a", "[('a', '|O')]", [1], 64], {}, bytes(64)),
    "beyond the end": (["a", "<i8", [1000], 64], {}, bytes(64)),
    "before the beginning": (["a", "|u1", [8], -8], {}, bytes(64)),
    "negative": (["a", "|u1", [-8], 64], {}, bytes(64)),
    "overflow": (["a", "<i8", [2**62, 2**62], 64], {}, bytes(64)),
    "a pickle": (["p", [[64, 10]]], {}, b"cos\nsystem\n(S'exit 1'\ntR."),
    "no such dtype": (["a", "whatever", [1], 64], {}, bytes(64)),
    "code for a dtype": (["a", "[__import__('os').abort()]", [1], 64], {}, bytes(64)),
    "no JSON": (b"\xff\xfe{", {}, b""),
    "deep": (b"[" * 100_000, {}, b""),
    "no description": ([], {}, b""),
    "larger than allowed": (["v", "1"], {"place": 2**40, "size": 2**40}, b""),
    "a long description": (["v", "1"], {"length": 2**40, "size": 2**40}, b""),
    "sizes that differ": (["v", "1"], {"size": 2**20}, b""),
    "another lease": (["v", "1"], {"lease": 2**63}, b""),
    "another slot": (["v", "1"], {"slot": 2**20}, b""),
    "a place in the header": (["v", "1"], {"place": 0}, b""),
    "no such kind": (["v", "1"], {"kind": 99}, b""),
    "no such codec": (["v", "1"], {"codec": 77, "place": 2**20}, b""),
    "packed badly": (["v", "1"], {"codec": 1, "place": 2**20}, b""),
    "an error that is none": (["l", [["v", "1"]]], {"kind": links.FAILED}, b""),
    "a refusal that is none": (["d", ["text"], [["v", "1"]]], {"kind": links.REFUSED}, b""),
}


class TestHostileWorkers:
    def test_whatever_they_send_they_are_cut_off_and_the_batches_are_right(self, trainer, caplog):
        expected = list(arrays().batch_iterator(25, shuffle=1))
        with ActorPool(trainer, "nobody", alone_after=0.1, workers=len(LIES) + 2) as pool:
            batches = pool.parallel_data_source(arrays(), 10).batch_iterator(25, shuffle=1)
            for name, (description, fields, content) in LIES.items():
                liar = Liar(pool)
                caplog.clear()
                liar.answer(liar.lease(), description, content, **fields)
                liar.is_cut_off()
                eventually(lambda: not pool._crew.desk.places)
                assert "cut off" in caplog.text or "a worker on" in caplog.text, name
            assert_same(expected, list(batches))
            assert 0 == pool.stats().prepared

    def test_one_that_hangs_up_in_the_middle_of_a_batch_and_one_that_is_silent(self, trainer):
        expected = list(arrays().batch_iterator(25, shuffle=1))
        with ActorPool(trainer, "nobody", alone_after=0.1, lease=0.1, workers=5) as pool:
            batches = pool.parallel_data_source(arrays(), 10).batch_iterator(25, shuffle=1)
            for talk in (True, False):
                liar = Liar(pool)
                lease = liar.lease()
                if talk:
                    liar.answer(lease, ["v", "1"], size=200_000, place=HEADER_BYTES + 199_993)
                    liar.close()
                else:
                    liar.is_cut_off()
                eventually(lambda: not pool._crew.desk.places)
            assert_same(expected, list(batches))

    def test_strangers_who_say_anything_or_nothing_are_let_go_and_keep_nobody_out(self, trainer):
        with ActorPool(trainer, "nobody", workers=2) as pool:
            host, port = pool._crew.desk.listener.address["tcp"]["addresses"][0]
            strangers = [socket.create_connection((host, port)) for _ in range(tcp.MOST_UNKNOWN + 8)]
            noise = random.Random(1)
            for stranger in strangers[:40]:
                with contextlib.suppress(OSError):
                    stranger.sendall(noise.randbytes(noise.randrange(1, 2000)))
            for stranger in strangers[:40]:
                stranger.close()

            def served():
                try:
                    return Liar(pool)
                except (OSError, EOFError):
                    return None

            eventually(served).close()
            for stranger in strangers:
                stranger.close()

    def test_an_array_that_was_sent_honestly_is_read(self, trainer):
        with ActorPool(trainer, "nobody", workers=1) as pool:
            batches = pool.parallel_data_source(arrays(), 1).batch_iterator(10)
            liar = Liar(pool)
            liar.answer(liar.lease(), ["t", [["a", "<i8", [2], 64]]], struct.pack("<2q", 3, 4) + bytes(48))
            assert [3, 4] == next(batches)[0].tolist()
            liar.close()


class TestDescriptions:
    @settings(max_examples=60, deadline=None)
    @given(
        st.recursive(
            st.none() | st.integers() | st.text(max_size=4) | st.sampled_from("astldvp"), st.lists, max_leaves=9
        )
    )
    def test_no_description_reads_outside_of_its_slot(self, node):
        text = json.dumps(node).encode()
        whole = np.frombuffer(bytes(64) + text, np.uint8)
        with contextlib.suppress(Exception):
            value = read_description(whole, 64, len(text))(whole, None)
            assert not isinstance(value, np.ndarray) or np.shares_memory(value, whole) or not value.size

    def test_arrays_of_objects_are_refused(self):
        text = json.dumps(["a", "|O", [0], 64]).encode()
        whole = np.frombuffer(bytes(64) + text, np.uint8)
        with pytest.raises(TransportError, match="Python objects"):
            read_description(whole, 64, len(text))


class TestCompression:
    """Whether it pays is measured; what does not is left alone."""

    def decide(self, body, rate):
        probed = Compression([LZ4, ZSTD])
        for _ in range(compression.PROBES):
            assert probed.is_probing(len(body))
            assert (RAW, body) == probed.pack(body)
            probed.note(body, len(body) / rate)
        assert not probed.is_probing(len(body))
        return probed

    def test_on_a_slow_link_what_can_be_compressed_is(self):
        body = memoryview(np.repeat(np.arange(100_000, dtype=np.int32), 8).tobytes())
        codec, packed = self.decide(body, rate=1e6).pack(body)
        assert codec in (LZ4, ZSTD)
        assert len(packed) < len(body) / 2
        target = bytearray(len(body))
        compression.unpack(codec, packed, memoryview(target))
        assert bytes(body) == bytes(target)

    def test_on_a_fast_link_and_for_noise_nothing_is(self):
        smooth, noise = memoryview(bytes(3_000_000)), memoryview(random.Random(3).randbytes(3_000_000))
        assert (RAW, smooth) == self.decide(smooth, rate=1e13).pack(smooth)
        assert (RAW, noise) == self.decide(noise, rate=1e6).pack(noise)

    def test_it_is_decided_again_after_a_while(self):
        body = memoryview(bytes(1 << 20))
        probed = self.decide(body, rate=1e6)
        for _ in range(compression.AGAIN):
            probed.pack(body)
        assert probed.is_probing(len(body))

    @pytest.mark.parametrize("codec", [LZ4, ZSTD])
    def test_content_of_another_size_is_refused(self, codec):
        packed = compression.codecs()[codec].pack(bytes(1_000_000))
        for size in (10, 2_000_000):
            with pytest.raises(ValueError, match="batch"):
                compression.unpack(codec, packed, memoryview(bytearray(size)))
        with pytest.raises(ValueError, match="cannot be read"):
            compression.unpack(codec, b"no such thing", memoryview(bytearray(10)))


def test_a_store_that_takes_no_more_says_so(mlq):
    connection = Redis(mlq.store.connector)
    with contextlib.closing(connection), pytest.raises(StoreError, match="the store takes no batch"):
        parts.write_parts(connection.socket, "k", b"x", ttl=-1)


def test_a_channel_carries_any_sizes_both_ways_at_once():
    one, other = (Channel(end) for end in tcp_pair())
    sizes, chance = [0, 1, 4095, 4096, 4097, 3_000_000, 17, 70_000], random.Random(2)
    sent = [chance.randbytes(size) for size in sizes]
    writers = [threading.Thread(target=lambda end=end: [end.write(part) for part in sent]) for end in (one, other)]
    for writer in writers:
        writer.start()
    for end in (other, one):
        for part in sent:
            target = bytearray(len(part))
            end.read_into(memoryview(target))
            assert part == bytes(target)
    for writer in writers:
        writer.join()
    one.close()
    begun = time.monotonic()
    with pytest.raises(EOFError):
        other.read(1)
    assert time.monotonic() - begun < 1
    other.close()


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere the system decides")
@pytest.mark.parametrize(("source", "changed"), [("127.0.0.1", True), ("127.0.0.2", False)])
def test_within_a_host_nothing_spaces_packets_out_and_between_hosts_the_system_decides(source, changed):
    with socket.create_server(("127.0.0.1", 0)) as listening:
        one = socket.create_connection(listening.getsockname(), source_address=(source, 0))
        other, _ = listening.accept()

    def control():
        return one.getsockopt(socket.IPPROTO_TCP, socket.TCP_CONGESTION, 16).rstrip(b"\0")

    with one, other:
        before = control()
        Channel(one)
        assert (PLAIN if changed else before) == control()


@pytest.mark.skipif(sys.platform != "linux", reason="memory is lent on Linux only")
class TestLending:
    """Batches whose memory is lent to the connection, instead of copied."""

    @pytest.fixture
    def ends(self):
        one, other = (Channel(end) for end in tcp_pair())
        yield one, other
        one.close()
        other.close()

    def test_what_is_lent_arrives_between_what_is_written(self, ends):
        one, other = ends
        sizes, chance = [1, 4096, 70_001, WAKE, 2 * WAKE + 1, 9_633_792], random.Random(3)
        segments = [Segment.create(HEADER_BYTES + size) for size in sizes]
        bodies = [chance.randbytes(size) for size in sizes]
        for segment, body in zip(segments, bodies, strict=True):
            segment.memory[HEADER_BYTES : HEADER_BYTES + len(body)] = body

        def send():
            for segment, body in zip(segments, bodies, strict=True):
                one.lend(b"head", segment.fd, HEADER_BYTES, len(body))
                one.write(b"tail", body[:999])

        sender = threading.Thread(target=send)
        sender.start()
        for body in bodies:
            target = bytearray(len(body))
            assert b"head" == other.read(4)
            other.read_into(memoryview(target))
            assert body == bytes(target)
            assert b"tail" + body[:999] == other.read(4 + len(body[:999]))
        sender.join()
        for segment in segments:
            segment.close()

    def test_who_waits_for_much_gets_what_comes_in_small_pieces_and_notices_the_end(self, ends):
        one, other = ends
        body = random.Random(4).randbytes(3 * WAKE + 5)

        def trickle():
            for at in range(0, len(body), 50_000):
                one.write(body[at : at + 50_000])
            one.write(body[: 2 * WAKE])
            one.shut()

        sender = threading.Thread(target=trickle)
        sender.start()
        target = bytearray(len(body))
        other.read_into(memoryview(target))
        assert body == bytes(target)
        with pytest.raises((EOFError, OSError)):
            other.read_into(memoryview(bytearray(len(body))))
        sender.join()

    def test_a_file_that_is_too_short_and_a_connection_that_breaks_are_errors(self, ends):
        one, other = ends
        segment = Segment.create(1000)
        with pytest.raises(OSError, match="a file of memory ends at byte 1,000, not 1,064"):
            one.lend(b"head", segment.fd, HEADER_BYTES, 1000)
        other.close()
        with pytest.raises(OSError, match=r"Broken pipe|reset"):  # noqa: PT012 - the first may still be taken
            for _ in range(3):
                one.lend(b"head", segment.fd, 0, 1000)
                other.socket.close()
        segment.close()

    def test_memory_is_written_to_again_only_when_the_trainer_has_received_it(self, trainer, monkeypatch):
        """As long as the trainer does not read, its system has the worker's own pages."""
        monkeypatch.setattr(remote, "MOST_UNSENT", 2)
        monkeypatch.setattr(tcp, "LENT", 1)  # what is sent has to be small, to be sent while nobody receives it
        with ActorPool(trainer, "nobody", workers=1) as pool:
            link = tcp.TcpLink(pool._crew.desk.listener.address["tcp"], "a job", trainer.settings)
            batches = pool.parallel_data_source(arrays(), 2).batch_iterator(50)
            peer = eventually(lambda: [place.peer for place in pool._crew.desk.places.values()])[0]
            may_receive, receive = threading.Event(), peer.receive

            def when_told(*args):
                assert may_receive.wait(10)
                receive(*args)

            monkeypatch.setattr(peer, "receive", when_told)
            chance, sent, used = np.random.default_rng(5), [], []
            for _ in range(2):
                order = next_lease(link)
                sent.append(chance.integers(0, 99, 1000))
                used.append(link.place(order))
                array = used[-1].empty(sent[-1].shape, sent[-1].dtype)
                array[:] = sent[-1]
                link.deliver(links.DONE, order, *used[-1].write((array,)), 1000)
            assert used[0] is not used[1]
            eventually(lambda: not link._unsent and not link._sending)
            assert [] == link._free, "all of it is sent, and none of it received"

            def write_again():
                # 8 bytes wide, as what was there
                link.place(links.Order(links.LEASE, 1 << 40)).empty((1000,), np.int64)[:] = -1

            writing = threading.Thread(target=write_again)
            writing.start()
            may_receive.set()
            writing.join(10)
            assert not writing.is_alive()
            for one in sent:
                np.testing.assert_array_equal(one, next(batches)[0])
            eventually(lambda: len(link._free) == 1 and not link._lent)
            link.close()

    def test_a_trainer_that_does_not_say_that_it_has_received_gets_copies(self, trainer):
        with ActorPool(trainer, "nobody", workers=1) as pool:
            entry = {**pool._crew.desk.listener.address["tcp"]}
            del entry["lent"]
            link = tcp.TcpLink(entry, "a job", trainer.settings)
            batches = pool.parallel_data_source(arrays(), 3).batch_iterator(10)
            sent = np.random.default_rng(6).integers(0, 99, 100_000)
            with mock.patch.object(link._data, "lend", side_effect=AssertionError):
                for _ in range(2 * remote.MOST_UNSENT):
                    work_once(link, sent)
                    np.testing.assert_array_equal(sent, next(batches)[0])
            link.close()


class TestMessages:
    """Each wakes somebody, which takes the time of a part of a batch: so there are few."""

    def test_what_may_wait_goes_with_what_may_not_or_with_its_like(self):
        one, other = tcp_pair()
        outbox = tcp.Outbox(Channel(one), lambda: None)
        outbox.put(b"later,", now=False)
        with pytest.raises(BlockingIOError):
            other.recv(99, socket.MSG_DONTWAIT)
        outbox.put(b"head,", b"body")
        assert b"later,head,body" == other.recv(99)
        outbox.put(b"later,", now=False)
        outbox.put(b"later too", now=False)
        assert b"later,later too" == other.recv(99)
        body = b"-" * (tcp.TOGETHER + 1)
        outbox.put(b"later,", now=False)
        outbox.put(b"head,", body)
        assert b"later,head," + body == Channel(other).read(11 + len(body))
        one.close()
        other.close()

    def test_a_worker_that_leaves_does_not_wait_for_word_of_its_last_batch(self, trainer, monkeypatch):
        monkeypatch.setattr(tcp, "LENT", 1)
        with ActorPool(trainer, "nobody", workers=1, alone_after=None) as pool:
            link = tcp.TcpLink(pool._crew.desk.listener.address["tcp"], "a job", trainer.settings)
            batches = pool.parallel_data_source(arrays(), 1).batch_iterator(50)
            last = next_lease(link)
            link.tell(links.LEAVE)
            assert links.END == eventually(lambda: link.receive(0.1)).kind
            link.deliver(links.DONE, last, *link.place(last).write((np.arange(3),)), 1000)
            begun = time.monotonic()
            link.close()
            assert time.monotonic() - begun < remote.FLUSH / 2
            np.testing.assert_array_equal(np.arange(3), next(batches)[0])

    def test_what_a_peer_announces_is_taken_up_though_the_desk_forgets_the_peer_meanwhile(self):
        told = []
        answers = iter([lambda: told.append("taken up"), None])
        peer = type("Peer", (), {"take_up": property(lambda self: next(answers))})()
        remote.RemotePeer.announce(peer)
        assert ["taken up"] == told

    @pytest.mark.skipif(sys.platform != "linux", reason="elsewhere every message wakes")
    def test_what_is_prepared_wakes_nobody_and_is_known_when_the_worker_has_gone(self, trainer):
        with ActorPool(trainer, "nobody", workers=1, alone_after=None) as pool:
            link = tcp.TcpLink(pool._crew.desk.listener.address["tcp"], "a job", trainer.settings)
            batches = pool.parallel_data_source(arrays(), 3).batch_iterator(10)
            [place] = eventually(lambda: list(pool._crew.desk.places.values()))
            peer, sent, tell = place.peer, [], link._tell
            link._tell = lambda frame: (sent.append((frame.kind, frame.lease)), tell(frame))
            link.tell(links.BEAT)
            eventually(lambda: peer._control._woken_at == tcp.PADDED)
            eventually(lambda: len(link._requests) == 3)
            for number in range(2):
                work_once(link, np.arange(number, 3))
                np.testing.assert_array_equal(np.arange(number, 3), next(batches)[0])
            last = next_lease(link)
            assert 0 == peer._preparing, "nobody has read it yet"
            link._control.shut()
            eventually(lambda: not pool._crew.desk.places)
            assert last.number == peer._preparing
            leases = [lease for kind, lease in sent if kind == remote.PREPARING]
            assert [1, 2, 3] == leases, "the next says that the one before is done"
            link.close()

    @pytest.mark.skipif(sys.platform != "linux", reason="elsewhere every message wakes")
    def test_a_lease_that_is_called_off_says_that_the_one_before_is_done(self, trainer):
        with ActorPool(trainer, "nobody", workers=1, alone_after=None) as pool:
            link = tcp.TcpLink(pool._crew.desk.listener.address["tcp"], "a job", trainer.settings)
            batches = pool.parallel_data_source(arrays(), 3).batch_iterator(10)
            [peer] = [place.peer for place in eventually(lambda: list(pool._crew.desk.places.values()))]
            first = next_lease(link)
            eventually(lambda: len(link._orders) == 2)
            batches.close()
            eventually(lambda: len(link._called_off) == 2)
            link.deliver(links.DONE, first, *link.place(first).write((np.arange(3),)), 1000)
            assert link.claim(link.receive(1)) is None
            link.tell(links.BEAT)
            eventually(lambda: peer._control._woken_at == tcp.PADDED)
            assert 0 == peer._preparing
            link.close()


def tcp_pair():
    with socket.create_server(("127.0.0.1", 0)) as listening:
        one = socket.create_connection(listening.getsockname())
        other, _ = listening.accept()
    return one, other
