"""The settings: where they come from, what they accept, and what they say when they do not."""

from __future__ import annotations

import dataclasses
import inspect
import pickle
import subprocess
import sys
from datetime import timedelta
from pathlib import Path
from typing import Any

import hypothesis
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlqueue.errors import SettingsError
from mlqueue.settings import PREFIX, Settings

NAMES = [described.name for described in Settings().describe()]


class TestSources:
    def test_of_an_empty_environment_are_the_defaults(self) -> None:
        settings = Settings.load({})
        assert set(settings.sources.values()) == {"default"}
        assert (settings.url, settings.masked_url, settings.processes, settings.max_jobs, settings.max_rss) == (
            None,
        ) * 5
        assert (settings.lease, settings.sweep_interval, settings.drain, settings.server_grace) == (30, 2.5, 25, 60)
        assert (settings.connect_timeout, settings.socket_timeout, settings.command_timeout) == (5, 10, 10)
        assert (settings.max_crashes, settings.max_stalls, settings.max_retries, settings.threads) == (3, 5, 3, 8)
        assert (settings.result_ttl, settings.max_message_bytes, settings.max_result_bytes) == (2592000, 2**24, 2**29)
        assert (settings.durability, settings.log_level, settings.namespace) == ("everysec", "INFO", None)
        assert (settings.home, settings.server_bin) == (None, None)

    def test_an_argument_goes_before_the_environment(self) -> None:
        settings = Settings.load({"MLQUEUE_LEASE": "20", "MLQUEUE_DRAIN": "5"}, lease=10)
        assert (settings.lease, settings.sources["lease"]) == (10, "argument")
        assert (settings.drain, settings.sources["drain"]) == (5, "MLQUEUE_DRAIN")
        assert settings.sources["threads"] == "default"

    def test_redis_url_counts_when_mlqueue_url_is_not_set(self) -> None:
        environ = {"REDIS_URL": "redis://a", "MLQUEUE_URL": "redis://b"}
        assert Settings.load(environ).url == "redis://b"
        assert Settings.load(environ).sources["url"] == "MLQUEUE_URL"
        for unset in ("", "  "):
            settings = Settings.load({**environ, "MLQUEUE_URL": unset})
            assert (settings.url, settings.sources["url"]) == ("redis://a", "REDIS_URL")

    def test_none_as_an_argument_is_a_value(self) -> None:
        settings = Settings.load({"MLQUEUE_URL": "redis://b", "MLQUEUE_RESULT_TTL": "5m"}, url=None, result_ttl=None)
        assert (settings.url, settings.result_ttl, settings.sources["url"]) == (None, None, "argument")

    def test_the_environment_of_the_process_is_the_default(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("MLQUEUE_THREADS", "3")
        assert Settings.load().threads == 3

    def test_of_a_direct_construction_and_of_a_replacement(self) -> None:
        settings = dataclasses.replace(Settings(lease=10), threads=2)
        assert (settings.sources["lease"], settings.sources["threads"]) == ("argument", "argument")
        assert settings.sources["drain"] == "default"
        with pytest.raises(SettingsError):
            dataclasses.replace(settings, threads=0)

    def test_stay_when_they_are_sent_to_another_process(self) -> None:
        settings = Settings.load({"MLQUEUE_LEASE": "20"})
        again = pickle.loads(pickle.dumps(settings))
        assert (again, again.sources) == (settings, settings.sources)

    def test_cannot_be_changed(self) -> None:
        with pytest.raises(dataclasses.FrozenInstanceError):
            Settings().lease = 1.0  # type: ignore[misc]


class TestUnknownNames:
    def test_in_the_environment_are_refused_with_the_one_that_was_meant(self) -> None:
        with pytest.raises(
            SettingsError, match=r"^MLQUEUE_LAESE in the environment is no setting; did you mean MLQUEUE_LEASE\?"
        ):
            Settings.load({"MLQUEUE_LAESE": "1"})
        with pytest.raises(SettingsError, match=r"did you mean MLQUEUE_URL\?"):
            Settings.load({"MLQUEUE_ULR": ""})

    def test_that_resemble_none_are_refused_with_all(self) -> None:
        with pytest.raises(SettingsError, match=r"known are MLQUEUE_URL, MLQUEUE_HOME, .*`mlqueue settings`"):
            Settings.load({"MLQUEUE_XYZZY_QUUX": "1"})

    def test_as_arguments_are_refused_too(self) -> None:
        with pytest.raises(SettingsError, match=r"^threats is no setting; did you mean threads\?"):
            Settings.load({}, threats=1)
        with pytest.raises(SettingsError):
            Settings.load({}, sources={})

    def test_of_others_do_not_matter(self) -> None:
        Settings.load({"PATH": "x", "MLQ_URL": "x", "mlqueue_url": "x"})


class TestDurations:
    @pytest.mark.parametrize(
        ("text", "seconds"),
        [
            ("1.5", 1.5),
            ("500ms", 0.5),
            ("30s", 30),
            ("5m", 300),
            (" 1 h ", 3600),
            (".5h", 1800),
            ("20 S", 20),
            ("100ms", 0.1),
        ],
    )
    def test_as_texts(self, text: str, seconds: float) -> None:
        assert Settings.load({"MLQUEUE_DRAIN": text}).drain == seconds

    def test_as_numbers_and_timedeltas(self) -> None:
        assert Settings(drain=2).drain == 2
        assert type(Settings(drain=2).drain) is float
        assert Settings.load({}, drain=timedelta(minutes=1)).drain == 60

    @pytest.mark.parametrize("text", ["none", "never", "None", " NEVER "])
    def test_that_may_be_endless(self, text: str) -> None:
        assert Settings.load({"MLQUEUE_RESULT_TTL": text}).result_ttl is None
        with pytest.raises(SettingsError, match="no duration"):
            Settings.load({"MLQUEUE_LEASE": text})

    @pytest.mark.parametrize(
        "value", ["abc", "1y", "1,5", "-5", "1e3", "inf", "nan", "5 5", True, float("nan"), [], None]
    )
    def test_that_are_none(self, value: Any) -> None:
        with pytest.raises(
            SettingsError, match=r"^drain=.* is no duration; allowed are 0s to 24h, as seconds \(1\.5\) or"
        ):
            Settings(drain=value)

    def test_out_of_range(self) -> None:
        message = (
            r"^MLQUEUE_SWEEP_INTERVAL='10' is out of range; allowed are 50ms to 4s\. Change it, or leave .* 2\.5s\.$"
        )
        with pytest.raises(SettingsError, match=message):
            Settings.load({"MLQUEUE_SWEEP_INTERVAL": "10"})


class TestSizes:
    @pytest.mark.parametrize(
        ("text", "count"),
        [("2G", 2 * 2**30), ("512M", 512 * 2**20), ("512 mib", 512 * 2**20), ("1.5GB", 3 * 2**29), ("33554432", 2**25)],
    )
    def test_as_texts(self, text: str, count: int) -> None:
        assert Settings.load({"MLQUEUE_MAX_RSS": text}).max_rss == count

    @pytest.mark.parametrize("value", ["abc", "2X", "-1", "1.5.5", 2.5, True, b"2G"])
    def test_that_are_none(self, value: Any) -> None:
        with pytest.raises(
            SettingsError, match=r"is no size; allowed are 16M to 64T, .*\(512M, 1\.5G\), or none \(never\)\."
        ):
            Settings.load({}, max_rss=value)

    def test_out_of_range(self) -> None:
        with pytest.raises(SettingsError, match=r"max_message_bytes=1 is out of range; allowed are 1K to 64G\."):
            Settings(max_message_bytes=1)


class TestUrls:
    @pytest.mark.parametrize(
        "url",
        [
            "redis://localhost",
            "redis://localhost:6379/0",
            "rediss://user:p%40ss@example.com:6380/1?ssl_cert_reqs=none",
            "redis://[::1]:6379/",
            "unix:///tmp/x.sock?db=1",
            "unix://user:secret@/tmp/x.sock",
            "redis+sentinel://user:p%40ss@a:26379,b,[::1]:5/jobs/2?sentinel_password=x",
            "rediss+sentinel://a/jobs",
            "redis+cluster://a:7000,b:7001",
            "rediss+cluster://:pass@a?ssl_ca_certs=/x",
        ],
    )
    def test_of_the_schemes_that_are_supported(self, url: str) -> None:
        assert Settings.load({"MLQUEUE_URL": url}).url == url

    @pytest.mark.parametrize(
        ("url", "message"),
        [
            ("localhost:6379", "is no URL; allowed are redis://host:port/db"),
            ("http://x", "of scheme 'http', which is not supported; allowed are redis://"),
            ("redis+other://x", r"of scheme 'redis\+other'"),
            ("redis+sentinel://a:1,b:2", "whose path is not the name of the Sentinels' service"),
            ("redis+sentinel://a:1/jobs/x", "whose path is not the name"),
            ("redis+sentinel://a:1,:2/jobs", "whose hosts are not host:port,host:port"),
            ("redis+sentinel://a/s?sentinel_db=1", "with the parameter sentinel_db; there are sentinel_username"),
            ("redis+cluster://a:99999", "whose hosts are not host:port,host:port"),
            ("redis+cluster://a/1", "of a cluster with a path, which it has not"),
            ("redis+cluster://a?sentinel_password=x", "with parameters for Sentinels, but of a cluster"),
            ("redis://x:99999", "its port is no number up to 65535"),
            ("redis://x:abc", "its port is no number"),
            ("redis://:a[b@x", "percent-encoded"),
            ("redis://x/zero", "whose path is not the number of a database"),
            ("unix://x.sock", "without the socket's absolute path"),
            ("redis://x\n", None),
            ("redis://x\ny", "control characters"),
            (5, "of type int; a text is allowed"),
        ],
    )
    def test_of_others(self, url: Any, message: str | None) -> None:
        if message is None:
            assert Settings(url=url).url == url.strip()
            return
        with pytest.raises(SettingsError, match=message):
            Settings.load({}, url=url)

    def test_say_which_variable_is_wrong(self) -> None:
        with pytest.raises(SettingsError, match=r"^REDIS_URL='amqp://x' is"):
            Settings.load({"REDIS_URL": "amqp://x"})

    @pytest.mark.parametrize(
        ("url", "shown"),
        [
            ("redis://u:secret@h:1/0", "redis://u:***@h:1/0"),
            ("rediss://:secret@h", "rediss://:***@h"),
            ("redis://u@h", "redis://u@h"),
            ("redis://h:6379/0", "redis://h:6379/0"),
            ("redis://u:sec@ret@h", "redis://u:***@h"),
            ("unix:///s?db=1&password=secret&x=1", "unix:///s?db=1&password=***&x=1"),
            ("rediss://h?ssl_password=secret", "rediss://h?ssl_password=***"),
            (
                "redis+sentinel://u:secret@h,i:2/s/0?sentinel_password=secret",
                "redis+sentinel://u:***@h,i:2/s/0?sentinel_password=***",
            ),
        ],
    )
    def test_never_show_their_password(self, url: str, shown: str) -> None:
        settings = Settings(url=url)
        assert settings.masked_url == shown
        for text in (repr(settings), str(settings), str(settings.describe())):
            assert shown in text
            assert "ret" not in text.replace("retr", "").replace("The secret", "").replace("webhook_secret", "")

    @hypothesis.settings(deadline=None)
    @given(st.text("abc:/?#[]@%&= \n", min_size=1, max_size=12).map(lambda text: "Zq" + text + "qZ"))
    def test_never_show_their_password_in_errors_either(self, password: str) -> None:
        for url in (
            f"redis://u:{password}@h:1/0",
            f"http://u:{password}@h:port",
            f"redis+sentinel://u:{password}@h,i/s",
        ):
            try:
                text = repr(Settings.load({"MLQUEUE_URL": url}))
            except SettingsError as error:
                text = str(error)
            assert "Zq" not in text
            assert "qZ" not in text


class TestOtherKinds:
    @pytest.mark.parametrize("value", ["0", "1.5", "x", "", 1.5, True, None, "5000", "9" * 5000])
    def test_counts_out_of_range_or_none(self, value: Any) -> None:
        with pytest.raises(SettingsError, match=r"threads=.* is .*(allowed are 1 to 4096|empty)"):
            Settings.load({}, threads=value)

    def test_counts(self) -> None:
        settings = Settings.load({"MLQUEUE_THREADS": "3", "MLQUEUE_PROCESSES": "2", "MLQUEUE_MAX_JOBS": "none"})
        assert (settings.threads, settings.processes, settings.max_jobs) == (3, 2, None)

    def test_choices(self) -> None:
        settings = Settings.load({"MLQUEUE_LOG_LEVEL": "debug", "MLQUEUE_DURABILITY": "Always"})
        assert (settings.log_level, settings.durability) == ("DEBUG", "always")
        with pytest.raises(
            SettingsError, match=r"MLQUEUE_DURABILITY='no' is not one of those allowed: everysec, always\."
        ):
            Settings.load({"MLQUEUE_DURABILITY": "no"})

    def test_paths(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("HOME", "/somewhere")
        settings = Settings.load({"MLQUEUE_HOME": "~/x", "MLQUEUE_SERVER_BIN": "valkey-server"})
        assert (settings.home, settings.server_bin) == (Path("/somewhere/x"), "valkey-server")
        assert Settings(home=Path("y")).home == Path("y")

    def test_namespaces(self) -> None:
        assert Settings(namespace="vision ü").namespace == "vision ü"
        for name in ("", "a\nb", "x" * 101, 5):
            with pytest.raises(SettingsError):
                Settings.load({}, namespace=name)


class TestDescription:
    def test_has_every_setting_with_a_sentence(self) -> None:
        described = Settings().describe()
        assert [item.env for item in described] == [PREFIX + item.name.upper() for item in described]
        for item in described:
            assert item.doc.endswith(".")
            assert item.value
            assert item.source == "default"
        assert [field.name for field in dataclasses.fields(Settings)] == [*NAMES, "sources"]

    def test_shows_values_as_they_can_be_written(self) -> None:
        environ = {item.env: item.value for item in Settings(url="redis://h:1/0", lease=0.25, max_rss=2**31).describe()}
        environ = {name: value.split(" (")[0] for name, value in environ.items()}
        assert (environ["MLQUEUE_LEASE"], environ["MLQUEUE_MAX_RSS"]) == ("250ms", "2G")
        assert (environ["MLQUEUE_RESULT_TTL"], environ["MLQUEUE_MAX_MESSAGE_BYTES"]) == ("30d", "16M")
        assert Settings.load(environ) == Settings(url="redis://h:1/0", lease=0.25, max_rss=2**31)

    def test_says_what_no_value_means(self) -> None:
        values = {item.name: item.value for item in Settings(result_ttl=None).describe()}
        assert values["processes"] == "none (one per core)"
        assert values["result_ttl"] == "none (for ever)"

    def test_a_short_form_has_what_was_chosen(self) -> None:
        assert repr(Settings.load({"MLQUEUE_THREADS": "2"}, lease=10)) == "Settings(lease='10s', threads='2')"

    def test_takes_only_the_standard_library(self) -> None:
        # An empty package in place of ours, so that nothing but the settings is looked at.
        program = (
            "import sys, types; package = types.ModuleType('mlqueue'); sys.modules['mlqueue'] = package\n"
            f"package.__path__ = [{str(Path(inspect.getfile(Settings)).parent)!r}]; before = set(sys.modules)\n"
            "import mlqueue.settings; new = {name.split('.')[0] for name in set(sys.modules) - before}\n"
            "print(*(new - set(sys.stdlib_module_names)))"
        )
        done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
        assert (done.stdout.strip(), done.stderr) == ("mlqueue", "")
