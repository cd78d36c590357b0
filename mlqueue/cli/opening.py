"""The store that a command speaks to: where, and which of its namespaces."""

from __future__ import annotations

import re
import time
from typing import Final

from .._keeper import STATE
from ..embedded import DATA
from ..errors import EmbeddedError, SettingsError
from ..functions import DEFAULT_NAMESPACE
from ..store import Connector, Store
from ..store.records import unquote
from .call import Call

#: What is in the embedded server's folder once it has run there.
TRACES: Final = (DATA, STATE)

#: Keys that a namespace has from its first job on (``seq``), from its first worker on (``actors``) or from its first
#: API key on (``keys``), as the server finds them, and exactly. The layout is in ``store/lua/common.lua``.
GLOB: Final = "mlq:{*}:[ask][ce][tqy]*"
KEY: Final = re.compile(rb"mlq:\{([^{}]+)\}:(?:seq|actors|keys)")

#: How many keys one step of the scan looks at, and for how many seconds it goes on: a large store has millions.
STEP: Final = 2000
LIMIT: Final = 5.0


def open_store(call: Call, *, start: bool = False) -> Store:
    """The store of the namespace that the call is about. The embedded server is started where it ran before; where it
    never did, only if `start`: a look at a folder leaves nothing behind in it."""
    settings = call.settings
    connector = Connector(settings)
    call.closing.callback(connector.close)
    if not start:
        _refuse_new_folder(connector)
    namespace = settings.namespace or the_only_namespace(connector) or DEFAULT_NAMESPACE
    return Store(connector, namespace, settings)


def _refuse_new_folder(connector: Connector) -> None:
    server = connector.embedded
    if server is not None and server.status() is None and not any((server.home / name).exists() for name in TRACES):
        raise EmbeddedError(
            f"there is no store here: no MLQUEUE_URL is set, and no embedded server has ever run in {server.home}. "
            "`mlqueue submit`, `mlqueue worker` and `mlqueue server` start one; or change to the project's folder, or "
            "give --url."
        )


def the_only_namespace(connector: Connector) -> str | None:
    """The one namespace of the store; None when there is none. Raises `SettingsError` when there are several."""
    found, complete = namespaces(connector)
    if len(found) > 1:
        raise SettingsError(
            f"the store has several namespaces: {', '.join(sorted(found))}{'' if complete else ', ...'}. "
            "Choose one with --namespace or MLQUEUE_NAMESPACE."
        )
    if not complete:
        seen = f"; {found.pop()} is one" if found else ""
        raise SettingsError(
            f"the store has so many keys that looking for its namespaces takes more than {LIMIT:g} s{seen}. "
            "Name yours with --namespace or MLQUEUE_NAMESPACE."
        )
    return found.pop() if found else None


def namespaces(connector: Connector) -> tuple[set[str], bool]:
    """The namespaces of the store, and whether these are all: looking for them takes long in a large one."""
    deadline = time.monotonic() + LIMIT
    found: set[str] = set()
    for keys in connector.scan(GLOB, STEP):
        found.update(unquote(match[1]) for key in keys if (match := KEY.fullmatch(key)))
        if time.monotonic() > deadline:
            return found, False
    return found, True


__all__ = ["namespaces", "open_store", "the_only_namespace"]
