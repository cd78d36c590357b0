"""``mlqueue post``: a job for MLQ listeners."""

from __future__ import annotations

import click

from ..app import MLQ
from ..store import Store
from .call import Call, command, redis_options
from .opening import open_store
from .submit import MARK, NumbersAreArguments
from .values import from_text

#: The option that takes several words.
FUNCTIONS = "--functions"


class TakesFunctions(NumbersAreArguments):
    """A command whose ``--functions`` takes all the words up to the next option, as MLQ's did."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """As click's, ``--functions a b`` being ``--functions a --functions b``."""
        words: list[str] = []
        taking = False
        for word in args:
            if word.startswith("-"):
                taking = word == FUNCTIONS
            elif taking and words[-1] != FUNCTIONS:
                words.append(FUNCTIONS)
            words.append(word)
        try:
            return super().parse_args(ctx, words)
        except click.MissingParameter:
            if FUNCTIONS not in words:
                raise
            raise click.UsageError(
                f"{FUNCTIONS} takes all the words behind it, and none is left for MESSAGE: write that before it, or "
                "behind --",
                ctx,
            ) from None


@command(cls=TakesFunctions)
@click.argument("message")
@click.option("--callback", metavar="URL", help="A URL that is fetched when the job has ended.")
@click.option("--webhook", metavar="URL", help="Where its ends are posted to, as a signed webhook.")
@click.option(
    FUNCTIONS,
    multiple=True,
    metavar="NAME...",
    help="The functions that are to run, in this order [all that the worker has]. Behind MESSAGE.",
)
@redis_options
def post(call: Call, message: str, callback: str | None, webhook: str | None, functions: tuple[str, ...]) -> None:
    """Post a job for the listeners of a name.

    MESSAGE is JSON ('{"arg1": 6}'), else it is sent as text. Prints the job's id.
    """
    store = open_store(call, start=True)
    mlq = MLQ(store.namespace, settings=call.settings)
    try:
        job_id = mlq.post(from_text(message.removeprefix(MARK)), callback, functions or None, webhook=webhook)
    finally:
        mlq.close()
    _warn_if_nobody_listens(call, store)
    if call.json:
        call.emit({"id": job_id})
    else:
        call.write(job_id + "\n")


def _warn_if_nobody_listens(call: Call, store: Store) -> None:
    """The job waits and blocks nothing; but it may have gone to a wrong name."""
    if not any(worker.info.get("functions") for worker in store.workers()):
        call.talk(
            f"no listener of the name {store.namespace!r} is alive; the job waits until one is started "
            "(mlq.create_listener, or mlqueue worker MODULE)."
        )


__all__ = ["post"]
