"""``mlqueue settings``: what is set, and by what."""

from __future__ import annotations

import textwrap

from .call import Call, command
from .text import on_terminal, table


@command()
def settings(call: Call) -> None:
    """Show all settings and where each is from: an environment variable, an option, the default.

    Passwords are masked. Lines of variable, value and source, parted by tabs, where stdout is no terminal.
    """
    described = call.settings.describe()
    if call.json:
        for one in described:
            call.emit(one._asdict(), one_line=True)
    elif not on_terminal():
        call.write(table(("variable", "value", "source"), [(one.env, one.value, one.source) for one in described]))
    else:
        for one in described:
            call.write(f"{one.env} = {one.value}  [{one.source}]\n")
            call.write(textwrap.fill(one.doc, 100, initial_indent="    ", subsequent_indent="    ") + "\n")


__all__ = ["settings"]
