"""``mlqueue doctor`` and ``mlqueue repair``: what is wrong, and mending what can be mended."""

from __future__ import annotations

import dataclasses
from typing import Final

import click

from ..doctor import Severity, examine, mend
from .call import Call, command
from .opening import open_store
from .text import clean

#: The exit code by the worst finding.
EXIT_CODES: Final = {Severity.OK: 0, Severity.NOTE: 0, Severity.WARNING: 6, Severity.ERROR: 7}


@command()
def doctor(call: Call) -> int:
    """Look for what is wrong with the store, its server and its workers, and say what to do.

    A line of check, severity and finding each. Exit codes: 0 nothing (notes at most), 6 warnings, 7 errors, 4 the store
    cannot be reached. It changes nothing.
    """
    found = examine(open_store(call))
    for one in found:
        if call.json:
            call.emit(dataclasses.asdict(one), one_line=True)
        else:
            call.write(f"{one.check:<12}{one.severity:<9}{clean(one.text)}\n")
            if one.cure:
                call.write(f"{'':<21}{clean(one.cure)}\n")
    return max(EXIT_CODES[one.severity] for one in found)


@command()
@click.option("--dry-run", is_flag=True, help="Only say what would be done.")
def repair(call: Call, dry_run: bool) -> None:
    """Put jobs back that nobody would find, and remove keys that belong to no job.

    They come of evictions, of a restore from an old copy, of a damaged append-only file. Workers may run meanwhile.
    """
    mended = mend(open_store(call), dry_run=dry_run)
    if call.json:
        call.emit(dataclasses.asdict(mended))
        return
    for job_id in mended.put_back:
        call.write(f"{clean(job_id)}\tput back\n")
    for key in mended.removed:
        call.write(f"{clean(key)}\tremoved\n")
    done = "would be" if dry_run else "were"
    call.talk(f"{len(mended.put_back):,} jobs {done} put back, {len(mended.removed):,} keys {done} removed.")


__all__ = ["doctor", "repair"]
