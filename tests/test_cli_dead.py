"""``mlqueue dead``, ``clear`` and ``post``: the real command against a real embedded server."""

from __future__ import annotations

import json
import os
import pty
import re
import select
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
import pytest
from command import DEADLINE, ROOT, Folder, a_folder

from mlqueue import MLQ, Settings, codec
from mlqueue.cli.group import ALIASES, cli
from mlqueue.job import DeadReason, JobError, JobRecord, NewJob, State, new_id
from mlqueue.message import LISTENER
from mlqueue.store.records import pack_dead

MANUAL = (ROOT / "docs" / "reference" / "commands.md").read_text()

#: A traceback that would do something to a terminal.
ERROR = JobError(type="builtins.ValueError", message="no\x1b[31m\nway", traceback="Traceback ...\n  in line 7\x1b[2J\n")


@pytest.fixture(scope="module")
def whole() -> Iterator[Folder]:
    """A folder for the module; each test has a namespace of its own in it."""
    with a_folder() as folder:
        yield folder


@pytest.fixture
def folder(whole: Folder, request: pytest.FixtureRequest) -> Iterator[Folder]:
    """The folder, in a namespace that no other test has."""
    whole.environ["MLQUEUE_NAMESPACE"] = request.node.name[:100]
    yield whole
    whole.environ.pop("MLQUEUE_URL", None)


@pytest.fixture
def mlq(folder: Folder) -> Iterator[MLQ]:
    """The namespace that the command is about."""
    app = MLQ(folder.environ["MLQUEUE_NAMESPACE"], settings=Settings.load({}, home=folder.home))
    yield app
    app.close()


def bury(mlq: MLQ, *args: Any, age: float = 10, **fields: Any) -> str:
    """A dead letter; its id."""
    given = {"queue": "default", "actor": "train", "functions": (), **fields}
    reason = given.pop("dead_reason", DeadReason.FAILED)
    body = codec.encode_call(args, {}, {"max_retries": 2})
    job = NewJob(id=new_id(), body=body, **given)
    died = time.time() - age
    record = JobRecord(
        **given, id=job.id, state=State.DEAD, created_at=died, finished_at=died, error=ERROR, dead_reason=reason
    )
    assert mlq.store.import_dead([pack_dead(job, record)]) == [True]
    return job.id


def body_of(mlq: MLQ, job_id: str) -> Any:
    return codec.decode_call(mlq.store.body(job_id))


# Dead letters


def test_dead_letters_are_listed_filtered_and_paged(folder: Folder, mlq: MLQ) -> None:
    old = bury(mlq, age=10_000, actor="infer", queue="gpu", dead_reason=DeadReason.CRASHED)
    middle, new = bury(mlq, age=1000), bury(mlq, age=10)

    def found(*args: str) -> list[str]:
        ran = folder("dead", "ls", *args)
        assert ran.code == 0, ran
        return [line.split("\t")[0] for line in ran.text.splitlines()]

    assert [new, middle, old] == found()
    assert [old] == found("--actor", "infer") == found("--reason", "crashed") == found("--queue", "gpu")
    assert [old] == found("--older-than", "2h")
    assert [middle, old] == found("--older-than", "15m") == found("--older-than", "500s")
    assert [new] == found("--newer-than", "10m")
    assert [new, middle, old] == found("--text", "LINE 7")
    assert [] == found("--text", "line 8")
    assert ["train", "infer"] == [
        line.split("\t")[2] for line in folder("dead", "ls", "--older-than", "15m").text.splitlines()
    ]
    page = folder("dead", "ls", "--limit", "2")
    assert [new, middle] == [line.split("\t")[0] for line in page.text.splitlines()]
    cursor = re.search(r"--cursor (\S+)", page.err)
    assert cursor is not None
    assert [old] == found("--cursor", cursor[1])
    ran = folder("dead", "ls", "--limit", "1", "--json")
    assert json.loads(ran.err) == {"cursor": mlq.dead_letters.list(limit=1).cursor}
    [line] = ran.lines
    assert (line["id"], line["dead_reason"], line["error"]["message"]) == (new, "failed", ERROR.message)
    assert "\x1b" not in folder("dead", "ls").text


def test_a_dead_letter_is_shown_with_all_that_is_known(folder: Folder, mlq: MLQ) -> None:
    job_id = bury(mlq, 0.1, b"bytes", tags=("night",))
    ran = folder("dead", "show", job_id)
    assert ran.code == 0
    for line in ("state       dead (failed)", "arguments   0.1, <5 bytes>", "options     max_retries=2", "  in line 7"):
        assert f"\n{line}" in ran.text
    assert "\x1b" not in ran.text
    shown = folder("dead", "show", job_id, "--json").json
    assert (shown["id"], shown["args"], shown["kwargs"]) == (job_id, [0.1, {"$bytes": "Ynl0ZXM="}], {})
    assert (shown["options"], shown["msg"], shown["error"]["traceback"]) == ({"max_retries": 2}, None, ERROR.traceback)
    posted = bury(mlq, {"a": 1}, actor=LISTENER, functions=("greet",))
    shown = folder("dead", "show", posted, "--json").json
    assert (shown["msg"], shown["functions"]) == ({"a": 1}, ["greet"])
    assert "functions   greet" in folder("dead", "show", posted).text
    queued = mlq.submit("train").id
    ran = folder("dead", "show", queued)
    assert ran.code == 3
    assert f"job {queued} is queued, no dead letter" in ran.err


def test_dead_letters_are_put_back_by_id_each_with_its_outcome(folder: Folder, mlq: MLQ) -> None:
    one, two, queued = bury(mlq), bury(mlq), mlq.submit("train").id
    ran = folder("dead", "requeue", one, "nope", queued, two, one)
    assert (3, f"{one}\tqueued\n{two}\tqueued\n") == (ran.code, ran.text)
    assert "no job 'nope'" in ran.err
    assert f"job {queued} is queued; only a dead job" in ran.err
    assert folder("dead", "requeue", one, "--json").error["type"] == "InvalidTransition"
    assert (0, 3) == (mlq.dead_letters.count(), mlq.job_count())


def test_one_is_put_back_with_other_arguments(folder: Folder, mlq: MLQ) -> None:
    job_id, posted = bury(mlq, 0.9), bury(mlq, {"a": 1}, actor=LISTENER)
    ran = folder("dead", "requeue", job_id, "--args", "[0.1]", "--kwargs", '{"epochs": 3}', "--json")
    assert ran.lines == [{"id": job_id, "state": "queued"}]
    assert body_of(mlq, job_id) == ([0.1], {"epochs": 3}, {"max_retries": 2})
    assert folder("dead", "requeue", posted, "--msg", "hello").code == 0
    assert body_of(mlq, posted)[0] == ["hello"]
    ran = folder("dead", "requeue", bury(mlq, 1), "--msg", "hello")
    assert ran.code == 2
    assert "msg alone is for jobs that were posted" in ran.err


def test_all_that_the_filters_let_through_are_put_back(folder: Folder, mlq: MLQ) -> None:
    first, second = bury(mlq, age=20), bury(mlq, age=10)
    kept = bury(mlq, actor="infer")
    ran = folder("dead", "requeue", "--all", "--actor", "train")
    assert (0, f"{first}\tqueued\n{second}\tqueued\n") == (ran.code, ran.text)
    assert folder("dead", "requeue", "--all", "--text", "no such").text == ""
    assert folder("dead", "requeue", "--all", "--json").lines == [{"id": kept, "state": "queued"}]


def test_dead_letters_are_purged_by_id_or_by_filter(folder: Folder, mlq: MLQ) -> None:
    ids = [bury(mlq) for _ in range(3)] + [bury(mlq, dead_reason=DeadReason.CRASHED)]
    queued = mlq.submit("train").id
    ran = folder("dead", "purge", ids[0], queued)
    assert (3, f"{ids[0]}\tpurged\n") == (ran.code, ran.text)
    assert f"job {queued} is queued, no dead letter" in ran.err
    assert folder("dead", "purge", "--all", "--reason", "failed").text == "2\n"
    assert folder("dead", "purge", "--all", "--json").json == {"purged": 1}
    assert [queued] == [record.id for record in mlq.jobs().jobs]


def test_dead_letters_go_through_a_file_or_a_pipe(folder: Folder, mlq: MLQ) -> None:
    one, two = bury(mlq, age=20), bury(mlq, age=10)
    other = bury(mlq, actor="infer", age=30)
    ran = folder("dead", "export", "out.jsonl", "--actor", "train")
    assert (0, b"") == (ran.code, ran.out)
    assert "wrote 2 dead letters to out.jsonl" in ran.err
    assert folder("dead", "export", "--json").lines[0]["id"] == two
    assert folder("dead", "export", "out2.jsonl", "--json").json == {"exported": 3}
    mlq.dead_letters.purge([one, other])
    ran = folder("dead", "import", "out.jsonl")
    assert (0, f"{one}\tcreated\n{two}\texists\n") == (ran.code, ran.text)
    piped = (folder.path / "out2.jsonl").read_bytes()
    ran = folder.process("dead", "import", "-", "--json", stdin=piped)
    assert ran.lines[0] == {"id": other, "state": "created"}
    assert {one, two, other} == {record.id for record in mlq.dead_letters}


def test_a_bad_line_is_an_error_with_its_number(folder: Folder, mlq: MLQ) -> None:
    job_id = bury(mlq)
    folder("dead", "export", "bad.jsonl")
    mlq.dead_letters.purge(job_id)
    path = folder.path / "bad.jsonl"
    path.write_text(path.read_text() + '{"id": "x"}\n')
    ran = folder("dead", "import", "bad.jsonl")
    assert (2, b"") == (ran.code, ran.out)
    assert "line 2: queue is missing" in ran.err
    assert "The lines before it are in (1 new" in ran.err
    assert [job_id] == [record.id for record in mlq.dead_letters]


@pytest.mark.parametrize(
    ("args", "expected"),
    [
        (["requeue"], "name dead letters by their ids, or give --all. Try `mlqueue dead requeue --help`"),
        (["purge"], "name dead letters by their ids, or give --all"),
        (["requeue", "x", "--all"], "name dead letters by their ids, or give --all"),
        (["purge", "x", "--actor", "a"], "filters go with --all, not with ids"),
        (["purge", "--all", "--older-than", "soon"], "'soon' is no duration"),
        (["ls", "--reason", "bored"], "'bored' is not one of 'failed', 'crashed'"),
        (["ls", "--cursor", "7"], "cursor='7': give the cursor of the page before"),
        (["ls", "--limit", "0"], "0 is not in the range"),
        (["requeue", "--all", "--args", "[1]"], "--args, --kwargs and --msg change one letter"),
        (["requeue", "x", "y", "--msg", "1"], "--args, --kwargs and --msg change one letter"),
        (["requeue", "x", "--args", "{x"], '--args "{x" is not JSON; it must be a list'),
        (["requeue", "x", "--args", "{}"], '--args "{}" is JSON, but a dict; it must be a list'),
        (["requeue", "x", "--kwargs", "[1]"], '--kwargs "[1]" is JSON, but a list; it must be an object'),
        (["requeue", "x", "--msg", "null"], "say --args '[null]'"),
        (["import"], "Missing argument 'FILE'"),
        (["import", "/no/such/file"], "/no/such/file cannot be read (No such file"),
        (["export", "/no/such/folder/file"], "/no/such/folder/file cannot be written (No such file"),
        (["frob"], "No such command 'frob'"),
    ],
    ids=str,
)
def test_a_wrong_command_line_is_one_line_and_code_2(folder: Folder, args: list[str], expected: str) -> None:
    ran = folder("dead", *args)
    assert (2, b"") == (ran.code, ran.out), ran.err
    assert expected in ran.err
    assert folder("dead", *args, "--json").error["exit_code"] == 2


def test_dead_alone_says_what_there_is(folder: Folder) -> None:
    ran = folder("dead")
    assert (2, b"") == (ran.code, ran.out)
    assert "requeue" in ran.err


# Clearing


def test_clear_forgets_what_does_not_run_of_one_namespace(folder: Folder, mlq: MLQ) -> None:
    bury(mlq, age=7200)
    mlq.submit("train")
    cancelled = mlq.submit("train")
    cancelled.cancel()
    mlq.data.put("kept", "k")
    other = MLQ(mlq.name + "2", settings=mlq.settings)
    try:
        other.submit("train")
        assert folder("clear", "--state", "cancelled", "--state", "succeeded", "--yes").text == "1\n"
        assert folder("clear", "--older-than", "1h", "--yes", "--json").json == {"forgotten": 1}
        assert mlq.data.get("k") == b"kept"
        assert folder("clear", "--yes").text == "1\n"
        assert mlq.data.get("k") is None
        assert other.clear() == 1
    finally:
        other.close()


def test_clear_does_nothing_where_nobody_can_be_asked(folder: Folder, mlq: MLQ) -> None:
    bury(mlq)
    ran = folder.process("clear")
    assert (2, b"") == (ran.code, ran.out)
    assert "there is no terminal to ask on; give --yes" in ran.err
    ran = folder("clear", "--state", "running", "--yes")
    assert ran.code == 2
    assert "'running' is not one of" in ran.err
    assert mlq.dead_letters.count() == 1


def answer(folder: Folder, *args: str, say: bytes) -> tuple[int, str]:
    """Runs the command on a terminal and answers its question; the exit code, and all that was shown."""
    ours, theirs = pty.openpty()
    try:
        process = folder.spawn(*args, stdin=theirs, stdout=theirs, stderr=theirs)
        os.close(theirs)
        shown = b""
        deadline = time.monotonic() + DEADLINE
        while time.monotonic() < deadline:
            if not select.select([ours], [], [], 0.1)[0]:
                continue
            try:
                data = os.read(ours, 4096)
            except OSError:  # the other end is closed
                break
            if not data:
                break
            shown += data
            if say and b"[y/N]" in shown:
                os.write(ours, say)
                say = b""
        return process.wait(DEADLINE), shown.decode()
    finally:
        os.close(ours)


def test_clear_asks_on_a_terminal(folder: Folder, mlq: MLQ) -> None:
    bury(mlq)
    mlq.submit("train")
    code, shown = answer(folder, "clear", "--state", "dead", say=b"n\n")
    assert f"Forget 1 job (dead) of '{mlq.name}'? [y/N]" in shown
    assert (code, mlq.dead_letters.count()) == (1, 1)
    assert "nothing was forgotten" in shown
    code, shown = answer(folder, "clear", say=b"y\n")
    assert f"Forget 2 jobs of '{mlq.name}'? [y/N]" in shown
    assert (code, mlq.jobs().jobs) == (0, [])


def test_clear_all_is_mlqs_word_for_it(folder: Folder, mlq: MLQ) -> None:
    bury(mlq)
    mlq.submit("train")
    assert folder("clear_all").text == "2\n"
    assert [] == mlq.jobs().jobs
    assert "clear_all" not in folder("--help").text


# Posting


def test_a_message_is_json_or_text(folder: Folder, mlq: MLQ) -> None:
    messages = {
        '{"arg1": 6, "arg2": [1.5, null]}': {"arg1": 6, "arg2": [1.5, None]},
        "hello": "hello",
        '"5"': "5",
        "-5": -5,
        "null": None,
        "{x": "{x",
    }
    for text, message in messages.items():
        ran = folder("post", text)
        assert ran.code == 0, ran
        assert "no listener of the name" in ran.err
        job_id = ran.text.strip()
        assert mlq.get_job(job_id)["msg"] == message
    assert folder("post", "--json", "--", "--x").json.keys() == {"id"}
    assert mlq.job_count() == len(messages) + 1


@pytest.mark.parametrize(
    "args",
    [
        ["hello", "--functions", "a", "b"],
        ["hello", "--functions", "a", "--functions", "b"],
        ["hello", "--functions", "a", "b", "--callback", "http://example.com/x?y=1"],
        ["hello", "--callback", "http://example.com/x?y=1", "--functions=a", "--functions", "b"],
        ["--functions", "a", "b", "--", "hello"],
    ],
    ids=str,
)
def test_functions_and_callback_reach_the_job(folder: Folder, mlq: MLQ, args: list[str]) -> None:
    ran = folder("post", "--json", *args)
    assert ran.code == 0, ran
    job = mlq.get_job(ran.json["id"])
    assert (job["msg"], job["functions"]) == ("hello", ["a", "b"])
    assert job["callback"] == ("http://example.com/x?y=1" if "--callback" in args else None)


def test_a_post_that_cannot_be_is_refused(folder: Folder, mlq: MLQ) -> None:
    for args, said in (
        (["x", "--callback", "ftp://host/"], "option callback='ftp://host/': it must be a URL"),
        (["--functions", "a", "b"], "none is left for MESSAGE: write that before it, or behind --"),
        ([], "Missing argument 'MESSAGE'"),
        (["x", "--functions"], "requires an argument"),
        (["x", "y"], "Got unexpected extra argument"),
    ):
        ran = folder("post", *args)
        assert (2, b"") == (ran.code, ran.out)
        assert said in ran.err
    assert mlq.job_count() == 0


def test_the_store_can_be_named_in_mlqs_words(folder: Folder, tmp_path: Path) -> None:
    folder.environ["MLQUEUE_COMMAND_TIMEOUT"] = "100ms"
    folder.environ["MLQUEUE_URL"] = "unix:///no/such/socket"
    try:
        for command in (["post", "x"], ["clear", "--yes"], ["clear_all"]):
            ran = folder(*command, "--redis_host", "127.0.0.1", "--redis_port", "1")
            assert ran.code == 4
            assert "redis://127.0.0.1:1/0 cannot be reached" in ran.err
        # MLQ's one parser took them anywhere.
        for words in (
            ["post", "x", "--redis_port", "1"],
            ["--redis_port", "1", "post", "x"],
            ["jobs", "--redis_port", "1"],
        ):
            assert "redis://localhost:1/0 cannot be reached" in folder(*words).err
        assert (
            "redis://[::1]:1/0 cannot be reached"
            in folder("dead", "ls", "--redis_host", "::1", "--redis_port", "1").err
        )
        ran = folder("post", "x", "--redis_host", "h", "--url", "redis://localhost:1/0")
        assert ran.code == 2
        assert "both --url (redis://localhost:1/0) and --redis_host" in ran.err
    finally:
        del folder.environ["MLQUEUE_COMMAND_TIMEOUT"]


# The manual


@pytest.mark.parametrize("name", ["ls", "show", "requeue", "purge", "export", "import"])
def test_every_command_of_dead_and_its_options_are_in_the_manual(name: str) -> None:
    dead = cli.get_command(click.Context(cli), "dead")
    assert isinstance(dead, click.Group)
    section = MANUAL.split("\n## mlqueue dead\n")[1].split("\n## ")[0]
    common = MANUAL.split("\n## Options of every command\n")[1].split("\n## ")[0]
    assert f"\n`mlqueue dead {name}" in section
    for parameter in dead.commands[name].params:
        for option in parameter.opts if isinstance(parameter, click.Option) else ():
            assert f"`{option}" in section + common, option


def test_dead_has_no_other_commands_than_those_and_mlqs_words_are_in_the_manual() -> None:
    dead = cli.get_command(click.Context(cli), "dead")
    assert isinstance(dead, click.Group)
    section = MANUAL.split("\n## mlqueue dead\n")[1].split("\n## ")[0]
    assert list(dead.commands) == re.findall(r"^`mlqueue dead (\w+)", section, re.MULTILINE)
    for name in ALIASES:
        assert f"`mlqueue {name}" in MANUAL


@pytest.mark.parametrize("args", [["dead", "ls"], ["dead", "purge", "x"], ["dead", "export"], ["clear", "--yes"]])
def test_a_look_at_a_folder_without_a_store_starts_none(args: list[str]) -> None:
    with a_folder() as empty:
        ran = empty(*args)
        assert (4, b"") == (ran.code, ran.out)
        assert not empty.home.exists()
