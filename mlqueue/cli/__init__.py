"""The ``mlqueue`` command.

`main` is its entry point. Each module here is one concern; `group` has the table of the commands and loads the module
of the one that is called, so that ``mlqueue --help`` waits for none of them. Its manual is
``docs/reference/commands.md``.

What a command found out goes to stdout and can be piped; what it has to say besides goes to stderr. With ``--json``
both are JSON.
"""

from __future__ import annotations

from .group import main

__all__ = ["main"]
