"""``mlqueue worker``: worker processes under a supervisor."""

from __future__ import annotations

import click

from ..supervisor import Supervisor
from .call import Call, command


@command()
@click.argument("modules", metavar="MODULE...", nargs=-1, required=True)
@click.option("--processes", metavar="N", help="How many processes [MLQUEUE_PROCESSES; else one per core].")
@click.option("--threads", metavar="N", help="How many jobs each runs at a time [MLQUEUE_THREADS; else 8].")
@click.option(
    "-Q", "--queues", multiple=True, metavar="NAME[,NAME]", help="The queues to serve [all that the actors declare]."
)
@click.option("--max-jobs", metavar="N", help="Replace a process after so many jobs [MLQUEUE_MAX_JOBS; else never].")
@click.option("--max-rss", metavar="SIZE", help="Replace a process of more memory: 2G [MLQUEUE_MAX_RSS; else never].")
@click.option(
    "--kill-grace",
    metavar="DURATION",
    help="Kill the process of a cancelled or overdue job that has not ended so much later [MLQUEUE_KILL_GRACE; else "
    "those of actors with kill=True, after 10s].",
)
@click.option(
    "--job-logs",
    metavar="SIZE",
    help="How much is kept of what a job prints and logs: 1M, none [MLQUEUE_JOB_LOGS; else 256K].",
)
def worker(
    call: Call,
    modules: tuple[str, ...],
    processes: str | None,
    threads: str | None,
    queues: tuple[str, ...],
    max_jobs: str | None,
    max_rss: str | None,
    kill_grace: str | None,
    job_logs: str | None,
) -> int:
    """Run worker processes for the actors of these modules: `tasks`, `package.module`, `tasks.py`.

    SIGTERM or Ctrl-C lets running jobs end (MLQUEUE_DRAIN); a second one gives them back at once. --namespace chooses
    the app where the modules make several.
    """
    given = {"processes": processes, "threads": threads, "max_jobs": max_jobs, "max_rss": max_rss}
    given |= {"kill_grace": kill_grace, "job_logs": job_logs}
    settings = call.settings_under(given)
    names = [name.strip() for text in queues for name in text.split(",") if name.strip()]
    supervisor = Supervisor(modules, settings, queues=names or None, namespace=call.namespace)
    with call.logging("%(asctime)s [supervisor] %(levelname)s %(name)s: %(message)s", settings.log_level):
        return supervisor.run()


__all__ = ["worker"]
