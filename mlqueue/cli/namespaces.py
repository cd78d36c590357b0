"""Which namespaces a store has: what a command uses that was given none."""

from __future__ import annotations

import re
import time
from typing import Final

from ..errors import SettingsError
from ..store import Connector
from ..store.records import unquote

#: Keys that a namespace has from its first job on (``seq``) or from its first worker on (``actors``), as the server
#: finds them, and exactly. The layout is in ``store/lua/common.lua``.
GLOB: Final = "mlq:{*}:[as][ce][tq]*"
KEY: Final = re.compile(rb"mlq:\{([^{}]+)\}:(?:seq|actors)")

#: How many keys one step of the scan looks at, and for how many seconds it goes on: a large store has millions.
STEP: Final = 2000
LIMIT: Final = 5.0


def the_only_namespace(connector: Connector) -> str | None:
    """The one namespace of the store; None when there is none. Raises `SettingsError` when there are several."""
    found, complete = _namespaces(connector)
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


def _namespaces(connector: Connector) -> tuple[set[str], bool]:
    """The namespaces, and whether these are all."""
    deadline = time.monotonic() + LIMIT
    found: set[str] = set()
    cursor = b"0"
    while True:
        cursor, keys = connector.execute("SCAN", cursor, "MATCH", GLOB, "COUNT", STEP)
        found.update(unquote(match[1]) for key in keys if (match := KEY.fullmatch(key)))
        if cursor == b"0":
            return found, True
        if time.monotonic() > deadline:
            return found, False


__all__ = ["the_only_namespace"]
