"""The command line: the real command against a real embedded server and a real `mlqueue worker`."""

from __future__ import annotations

import base64
import json
import os
import pty
import re
import select
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from typing import Any

import click
import numpy as np
import pytest
from command import DEADLINE, ROOT, Folder, a_folder
from support import eventually

from mlqueue import __version__
from mlqueue.cli import types
from mlqueue.cli.group import COMMANDS, cli
from mlqueue.cli.live import bar, outcome, status
from mlqueue.cli.text import ago, clean, duration, one_line, table
from mlqueue.cli.values import from_text, plain
from mlqueue.errors import InvalidJob
from mlqueue.job import DeadReason, JobError, JobRecord, State

MANUAL = (ROOT / "docs" / "reference" / "commands.md").read_text()

ACTORS = """
import os
import threading
import numpy as np
import mlqueue

mlq = mlqueue.MLQ("shop")

@mlq.actor
def echo(*args, **kwargs):
    return {"args": args, "kwargs": kwargs} if kwargs else list(args)

@mlq.actor
def text():
    return "fünf"

@mlq.actor
def image(content: bytes = bytes(range(256))):
    return mlqueue.Result(short=f"{len(content)} bytes", full=content, content_type="image/png")

@mlq.actor
def array():
    return np.arange(6, dtype="<f4").reshape(2, 3)

@mlq.actor(max_retries=0)
def boom():
    raise ValueError("no\\x1b[31m\\nway")

@mlq.actor
def gate(path):
    mlqueue.current_job().progress(50, "at the gate")
    for _ in range(2000):
        if os.path.exists(path):
            return "through"
        threading.Event().wait(0.01)

@mlq.actor
def steps(count):
    job = mlqueue.current_job()
    for _ in job.track(range(count), note="a step"):
        if job.cancelled:
            return None
        threading.Event().wait(0.05)
    return "done"
"""


@pytest.fixture
def folder() -> Iterator[Folder]:
    """A new folder."""
    with a_folder() as folder:
        yield folder


@pytest.fixture(scope="module")
def shop() -> Iterator[Folder]:
    """A folder with a worker, started by the command."""
    with a_folder() as folder:
        (folder.path / "shop_actors.py").write_text(ACTORS)
        log = folder.path / "worker.log"
        with log.open("wb") as file:
            args = ("shop_actors", "--processes", "1", "--threads", "3")
            worker = folder.spawn("worker", *args, stdout=subprocess.DEVNULL, stderr=file)
            try:
                _until(lambda: _is_working(folder) or worker.poll() is not None)
                assert worker.poll() is None, log.read_text()
                yield folder
                worker.send_signal(signal.SIGTERM)
                assert worker.wait(DEADLINE) == 0, log.read_text()
            finally:
                worker.kill()
                worker.wait()


def _is_working(folder: Folder) -> bool:
    ran = folder("stats", "--json")
    return ran.code == 0 and bool(ran.json["workers"])


def _until(condition: Any) -> Any:
    deadline = time.monotonic() + DEADLINE
    while not (found := condition()):
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.01)
    return found


# Help and wrong command lines: no store is needed.


def test_help_is_printed_on_stdout_and_lists_every_command(folder: Folder) -> None:
    ran = folder.process("--help")
    assert (0, "") == (ran.code, ran.err)
    for name, entry in COMMANDS.items():
        assert f"  {name}" in ran.text
        assert entry.help in " ".join(ran.text.split())
    assert not folder.home.exists()


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_help(folder: Folder, name: str) -> None:
    ran = folder(name, "--help")
    assert (0, "") == (ran.code, ran.err)
    assert COMMANDS[name].help.rstrip(".") in " ".join(ran.text.split())
    if name != "datasets":  # a group of its own, which needs no store
        assert "--json" in ran.text
        assert "--namespace" in ran.text


def test_no_command_is_a_usage_error_with_the_help(folder: Folder) -> None:
    ran = folder()
    assert (2, b"") == (ran.code, ran.out)
    assert "Commands:" in ran.err


def test_the_version_is_printed(folder: Folder) -> None:
    assert folder("--version").text == f"mlqueue {__version__}\n"
    assert folder("--json", "--version").json == {"version": __version__}


def test_help_needs_neither_numpy_nor_the_modules_of_the_commands() -> None:
    code = (
        "import sys; from mlqueue.cli import main; assert main(['--help']) == 0; "
        "bad = [n for n in sys.modules if n == 'numpy' or n in ('mlqueue.supervisor', 'mlqueue.cli.look')]; "
        "assert not bad, bad"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=DEADLINE, stdout=subprocess.DEVNULL, cwd=ROOT)


@pytest.mark.parametrize(
    ("args", "expected"),
    [
        (["frob"], "no command 'frob'; there are submit, post"),
        (["job"], "did you mean jobs?"),
        (["submit"], "Missing argument 'ACTOR'"),
        (["watch"], "Missing argument"),
        (["show"], "Missing argument"),
        (["worker"], "Missing argument"),
        (["jobs", "--since", "yesterday"], "'yesterday' is no time"),
        (["jobs", "--limit", "0"], "0 is not in the range"),
        (["jobs", "--state", "lost"], "'lost' is not one of"),
        (["result", "x", "--timeout", "soon"], "'soon' is no duration"),
        (["submit", "a", "--delay", "-5"], "'-5' is no duration"),
        (["submit", "a", "--priority", "5000"], "5000 is not in the range"),
        (["submit", "a", "--priority", "high"], "'high' is not a whole number from -1,000 to 1,000."),
        (["jobs", "--cursor", "x"], "'x' is not a whole number of 0 or more."),
        (["submit", "a", "--queue", ""], "the name of a queue is not empty"),
        (["submit", "a", "--unique-for", "soon", "--unique-key", "k"], "'soon' is neither queued nor active"),
        (["submit", "a", "--unique-policy", "reject"], "give that, too"),
        (["limit", "--unset"], "--unset needs the NAME of a limit"),
        (["dead", "frob"], "No such command 'frob'; there are export, import"),
        (["submit", "a", "--tga", "x"], "Did you mean '--tag'? Try `mlqueue submit --help`."),
        (["submit", "a", "--no-such"], "--no-such"),
        (["submit", "a", "--kwargs", "[1]"], "is JSON, but a list; it must be an object"),
        (["submit", "a", "--kwargs", "{x"], "is not JSON; it must be an object"),
        (["submit", "a", "--file", "cat.png"], "write it as NAME=PATH"),
        (["submit", "a", "--file", "x=/no/such/file"], "/no/such/file cannot be read (No such file"),
        (["submit", "a", "--file", "x=/dev/null", "--file", "x=/dev/null"], "given twice"),
        (["submit", "a", "--job-id", "a b"], "job id 'a b': an id is"),
        (["submit", "a", "[" * 100_000], "nested too deeply"),
        (["--url", "http://x", "jobs"], "scheme 'http', which is not supported"),
        (["worker", "m", "--threads", "none"], "threads='none' is no whole number"),
        (["worker", "m", "--max-rss", "12"], "max_rss='12' is out of range"),
        (["server", "--status", "--stop"], "choose one"),
        (["server", "--url", "redis://localhost:1"], "the embedded server is not in use"),
    ],
)
def test_wrong_input_is_one_line_on_stderr_and_code_2(folder: Folder, args: list[str], expected: str) -> None:
    ran = folder(*args)
    assert (2, b"") == (ran.code, ran.out)
    assert ran.err.startswith("mlqueue: ")
    assert ran.err.count("\n") == 1
    assert expected in ran.err
    ran = folder(*args, "--json") if "--" not in args else ran
    assert ran.code == 2
    assert expected in ran.error["message"]
    assert ran.error["exit_code"] == 2
    assert not folder.home.exists()


def test_an_unknown_variable_is_refused(folder: Folder) -> None:
    folder.environ["MLQUEUE_NAMSPACE"] = "x"
    ran = folder("jobs")
    assert ran.code == 2
    assert "did you mean MLQUEUE_NAMESPACE?" in ran.err


# Without a server.


@pytest.mark.parametrize(
    "args",
    [["jobs"], ["stats"], ["show", "x"], ["watch", "x"], ["result", "x"], ["cancel", "x"], ["retry", "x"]],
    ids=lambda args: args[0],
)
def test_a_look_at_a_folder_without_a_store_starts_none(folder: Folder, args: list[str]) -> None:
    ran = folder(*args)
    assert (4, b"") == (ran.code, ran.out)
    assert "there is no store here" in ran.err
    assert "mlqueue submit" in ran.err
    assert not folder.home.exists()


def test_a_store_that_cannot_be_reached_is_code_4(folder: Folder) -> None:
    folder.environ["MLQUEUE_COMMAND_TIMEOUT"] = "100ms"
    ran = folder("jobs", "--url", "redis://user:hidden@localhost:1/0", "--json")
    assert (4, b"") == (ran.code, ran.out)
    assert ran.error["type"] == "StoreUnavailable"
    assert "user:***@localhost:1/0 cannot be reached" in ran.error["message"]
    assert "hidden" not in ran.err


def test_settings_are_printed_with_their_sources(folder: Folder) -> None:
    ran = folder("settings", "--url", "redis://:hidden@host/1")
    rows = [line.split("\t") for line in ran.text.splitlines()]
    assert ["MLQUEUE_URL", "redis://:***@host/1", "argument"] in rows
    assert ["MLQUEUE_SERVER_GRACE", "20s", "MLQUEUE_SERVER_GRACE"] in rows
    assert ["MLQUEUE_LEASE", "30s", "default"] in rows
    found = {one["name"]: one for one in folder("settings", "--json").lines}
    assert found["threads"] == {
        "name": "threads",
        "env": "MLQUEUE_THREADS",
        "value": "8",
        "source": "default",
        "doc": "How many jobs each of these processes runs at a time.",
    }
    assert not folder.home.exists()


# The embedded server.


def test_server_runs_in_the_foreground_until_it_is_stopped(folder: Folder) -> None:
    ran = folder("server", "--status")
    assert (4, b"") == (ran.code, ran.out)
    assert "no server runs in" in ran.err
    assert folder("server", "--stop", "--json").json == {"stopped": False, "home": str(folder.home)}
    server = folder.spawn("server", "--json")
    assert server.stdout is not None
    ready = json.loads(server.stdout.readline())
    assert ready["home"] == str(folder.home)
    found = folder("server", "--status", "--json").json
    assert found["pid"] == ready["pid"]
    assert f"pid      {ready['pid']} " in folder("server", "--status").text
    assert folder("server", "--stop", "--json").json["stopped"] is True
    assert server.wait(DEADLINE) == 0
    server.communicate()


def test_a_server_whose_file_is_damaged_is_mended(folder: Folder) -> None:
    assert 0 == folder("submit", "add", "1").code
    assert 0 == folder("server", "--stop").code
    assert {"lost": 0, "copy": None} == folder("server", "--mend", "--json").json
    [path] = (folder.home / "appendonlydir").glob("*.incr.aof")
    path.write_bytes(path.read_bytes() + b"damaged\r\n")
    assert "`mlqueue server --mend` keeps a copy" in folder("jobs").err
    ran = folder("server", "--mend")
    assert (0, True) == (ran.code, "the last 9 bytes of changes were cut off; what was there is in " in ran.err)
    assert 1 == len(folder("jobs").text.splitlines())
    ran = folder("server", "--mend", "--stop")
    assert (2, True) == (ran.code, "--stop and --mend were given; choose one" in ran.err)


def test_an_interrupted_server_ends_well(folder: Folder) -> None:
    server = folder.spawn("server")
    assert server.stderr is not None
    said = b""
    while b"Ctrl-C" not in said:
        said += server.stderr.readline()
    server.send_signal(signal.SIGINT)
    out, _ = server.communicate(timeout=DEADLINE)
    assert (0, b"") == (server.returncode, out)
    assert folder("server", "--status").code == 4


# Namespaces.


def test_the_only_namespace_is_found_and_several_must_be_named(folder: Folder) -> None:
    job_id = folder.submit("nobody", "--namespace", "a b")
    assert folder("jobs").text.split("\t")[0] == job_id
    assert folder("stats", "--json").json["namespace"] == "a b"
    folder.submit("nobody", "--namespace", "other")
    ran = folder("jobs")
    assert (2, b"") == (ran.code, ran.out)
    assert "the store has several namespaces: a b, other." in ran.err
    assert folder("--namespace", "other", "stats", "--json").json["states"]["queued"] == 1
    folder.environ["MLQUEUE_NAMESPACE"] = "a b"
    assert folder("stats", "--json").json["namespace"] == "a b"
    assert folder("stats", "--json", "--namespace", "other").json["namespace"] == "other"


def test_without_any_namespace_it_is_default(folder: Folder) -> None:
    ran = folder("submit", "nobody")
    assert ran.code == 0
    assert "no worker of the namespace 'default' is alive" in ran.err
    assert folder("stats", "--json").json["namespace"] == "default"


# Jobs that wait, and listings of them.


def test_jobs_are_listed_filtered_and_paged(folder: Folder) -> None:
    ids = [folder.submit("train", str(number), "--tag", f"t{number % 2}") for number in range(4)]
    late = folder.submit("infer", "--queue", "gpu", "--delay", "1h", "--priority", "-5", "--job-id", "mine")
    assert late == "mine"
    newest_first = [late, *reversed(ids)]
    listed = folder("jobs")
    rows = [line.split("\t") for line in listed.text.splitlines()]
    assert newest_first == [row[0] for row in rows]
    assert ["mine", "scheduled", "infer", "gpu"] == rows[0][:4]
    assert datetime.now(UTC) - datetime.fromisoformat(rows[0][4]) < timedelta(seconds=60)

    def found(*args: str) -> list[str]:
        return [record["id"] for record in folder("jobs", *args, "--json").lines]

    assert newest_first == found()
    assert [late] == found("--state", "scheduled")
    assert newest_first == found("--state", "scheduled", "--state", "queued")
    assert [] == found("--state", "dead")
    assert [late] == found("--actor", "infer")
    assert [late] == found("--queue", "gpu")
    assert [ids[3], ids[1]] == found("--tag", "t1")
    assert newest_first == found("--since", "10m")
    assert [] == found("--until", "10m")
    assert [] == found("--since", f"@{time.time() + 60:.0f}")
    page = folder("jobs", "--limit", "2")
    cursor = re.search(r"--cursor (\d+)", page.err)
    assert cursor is not None
    assert newest_first[2:] == found("--cursor", cursor[1])
    assert json.loads(folder("jobs", "--limit", "2", "--json").err) == {"cursor": int(cursor[1])}

    shown = folder("show", ids[2], "--json").json
    assert (2, [2], {}, ["t0"]) == (shown["position"], shown["args"], shown["kwargs"], shown["tags"])
    assert "queued, 2 ahead" in folder("show", ids[2]).text
    assert "priority    -5" in folder("show", late).text
    assert "prolonged" not in folder("show", late).text


def test_jobs_are_cancelled_and_retried_each_with_its_outcome(folder: Folder) -> None:
    one, two = folder.submit("train"), folder.submit("train")
    ran = folder("cancel", one, "nope")
    assert (3, f"{one}\tcancelled\n") == (ran.code, ran.text)
    assert "no job 'nope'" in ran.err
    assert folder("cancel", one, "--json").lines == [{"id": one, "state": "cancelled"}]
    ran = folder("retry", two, one, "--json")
    assert (1, [{"id": one, "state": "queued"}]) == (ran.code, ran.lines)
    assert ran.error["type"] == "InvalidTransition"
    assert "is queued; only a dead or cancelled job" in ran.error["message"]
    assert folder("retry", "nope").code == 3


def test_only_running_jobs_are_given_more_time(folder: Folder) -> None:
    job_id = folder.submit("train")
    ran = folder("extend", job_id, "nope", "--by", "10m", "--json")
    assert (1, []) == (ran.code, ran.lines)
    assert "is queued; only a running job can be prolonged" in ran.err
    assert "no job 'nope'" in ran.err
    assert folder("extend", "nope", "--by", "1").code == 3
    for wrong in ([], ["--by", "0"], ["--by", "soon"]):
        assert folder("extend", job_id, *wrong).code == 2


def test_waiting_ends_with_a_timeout_or_an_interrupt_and_the_job_goes_on(folder: Folder) -> None:
    job_id = folder.submit("train")
    for args in (["result", job_id, "--timeout", "0"], ["result", job_id, "--timeout", "50ms", "--short"]):
        ran = folder(*args)
        assert (5, b"") == (ran.code, ran.out)
        assert f"job {job_id} is queued after" in ran.err
    ran = folder("watch", job_id, "--timeout", "0.05")
    assert (5, b"") == (ran.code, ran.out)
    assert f"{job_id} queued, next\n" in ran.err
    watch = folder.spawn("watch", job_id)
    assert watch.stderr is not None
    assert watch.stderr.readline().decode() == f"{job_id} queued, next\n"
    watch.send_signal(signal.SIGINT)
    _, err = watch.communicate(timeout=DEADLINE)
    assert watch.returncode == 130
    assert err == b"mlqueue: interrupted; jobs that were submitted go on.\n"
    assert folder("show", job_id, "--json").json["state"] == "queued"


@pytest.mark.parametrize("command", ["show", "watch", "result", "cancel", "retry", "why"])
def test_an_unknown_id_is_code_3(shop: Folder, command: str) -> None:
    ran = shop(command, "nope")
    assert (3, b"") == (ran.code, ran.out)
    assert "no job 'nope' in 'shop'" in ran.err
    assert shop(command, "nope", "--json").error["type"] == "JobNotFound"


def test_a_reader_that_leaves_is_no_error(folder: Folder) -> None:
    folder.submit("train")
    for args in (["jobs"], ["--help"], ["jobs", "--json"]):
        read_end, write_end = os.pipe()
        os.close(read_end)
        process = folder.spawn(*args, stdout=write_end)
        os.close(write_end)
        _, err = process.communicate(timeout=DEADLINE)
        assert (0, b"") == (process.returncode, err)


# Jobs that a worker runs.


def test_submit_prints_the_id_and_result_the_result(shop: Folder) -> None:
    submitted = shop.process("submit", "echo", "1", "-2.5", "true", "null", '["x"]', "a text", "NaN", "--", "-x", "-5")
    assert (0, "") == (submitted.code, submitted.err)
    ran = shop.process("result", submitted.text.strip(), "--timeout", "20s")
    assert (0, [1, -2.5, True, None, ["x"], "a text", "NaN", "-x", -5]) == (ran.code, ran.json)
    assert shop("submit", "echo", "--json").json.keys() == {"id", "actor", "queue"}


def test_show_tells_of_the_callback_and_of_each_try(shop: Folder) -> None:
    job_id = shop("submit", "echo", "1", "--callback", "http://10.255.255.1/done?token=secret").text.strip()
    record = eventually(lambda: (found := shop("show", job_id, "--json").json)["callback_attempts"] and found)
    assert (record["state"], record["callback_state"]) == ("succeeded", "failed")
    shown = shop("show", job_id).text
    assert "http://10.255.255.1/done?token=secret  (failed)" in shown
    assert "MLQUEUE_CALLBACK_ALLOW" in shown.partition("tries to deliver the callback")[2]


def test_keyword_arguments_are_the_actors_whatever_their_names(shop: Folder) -> None:
    (shop.path / "cat.png").write_bytes(b"\x89PNG")
    keywords = {"delay": 3, "priority": 1, "tags": "x"}
    args = ("--kwargs", json.dumps(keywords), "--file", "image=cat.png", "--file", "more=-", "--wait")
    ran = shop.process("submit", "echo", *args, stdin=b"stdin")
    image, more = ({"$bytes": base64.b64encode(data).decode()} for data in (b"\x89PNG", b"stdin"))
    assert ran.code == 0, ran
    assert ran.json == {"args": [], "kwargs": keywords | {"image": image, "more": more}}


def test_names_that_are_not_utf_8_are_refused(shop: Folder) -> None:
    for args in (["show", "\udcff"], ["submit", "\udcff"], ["submit", "echo", "\udcff"]):
        ran = shop(*args)
        assert (2, b"", 1) == (ran.code, ran.out, ran.err.count("\n")), ran


def test_a_file_that_is_too_large_is_refused(shop: Folder) -> None:
    with (shop.path / "large").open("wb") as file:
        file.truncate(17 * 2**20)
    ran = shop("submit", "echo", "--file", "x=large")
    assert ran.code == 2
    assert "large is larger than the 16,777,216 bytes" in ran.err


def test_an_actor_that_no_worker_knows_is_told_of(shop: Folder) -> None:
    ran = shop("submit", "ecko")
    assert ran.code == 0
    assert "no worker that is alive knows the actor 'ecko'; the job waits in queue 'default'." in ran.err
    assert "Did you mean echo?" in ran.err
    assert shop("cancel", ran.text.strip()).code == 0


def test_bytes_come_raw_text_as_text_and_arrays_as_npy(shop: Folder) -> None:
    image = shop.submit("image")
    assert shop.process("result", image).out == bytes(range(256))
    assert shop("result", image, "--short").out == b"256 bytes\n"
    written = shop("result", image, "-o", "out.png")
    assert (0, b"", "mlqueue: wrote 256 bytes (image/png) to out.png\n") == written
    assert (shop.path / "out.png").read_bytes() == bytes(range(256))
    assert shop("result", image, "--json").json == {
        "id": image,
        "short": "256 bytes",
        "full": {"$bytes": base64.b64encode(bytes(range(256))).decode()},
        "content_type": "image/png",
    }
    assert shop("result", image, "--json", "--short").json == {"id": image, "short": "256 bytes"}

    text = shop.submit("text")
    assert shop("result", text).out == "fünf\n".encode()
    assert shop("result", text, "-o", "-").out == "fünf".encode()
    assert shop("result", text, "-o", "out.txt").code == 0
    assert (shop.path / "out.txt").read_text(encoding="utf-8") == "fünf"

    array = shop.submit("array")
    expected = np.arange(6, dtype="<f4").reshape(2, 3)
    assert shop("result", array, "-o", "out.npy").code == 0
    np.testing.assert_array_equal(np.load(shop.path / "out.npy"), expected)
    shown = shop("result", array).json["$ndarray"]
    assert ("<f4", [2, 3]) == (shown["dtype"], shown["shape"])
    assert base64.b64decode(shown["data"]) == expected.tobytes()
    refused = shop("result", array, "-o", "no/such/folder/x")
    assert refused.code == 2
    assert "no/such/folder/x cannot be written (No such file or directory)" in refused.err
    assert not [path for path in shop.path.iterdir() if path.suffix == ".part"]


def test_a_failed_job_is_code_1_with_its_error_on_one_line(shop: Folder) -> None:
    waited = shop.process("submit", "boom", "--wait")
    assert (1, b"") == (waited.code, waited.out)
    assert "dead (failed) after " in waited.err.splitlines()[-1]
    assert "\x1b" not in waited.err
    job_id = waited.err.split()[2]
    ran = shop("result", job_id)
    assert (1, b"") == (ran.code, ran.out)
    assert ran.err.startswith(f"mlqueue: job {job_id} is dead (failed): ValueError: no")
    assert ran.err.count("\n") == 1
    assert f"`mlqueue show {job_id}` has the traceback" in ran.err
    assert "\x1b" not in ran.err
    error = shop("result", job_id, "--json").error
    assert ("JobFailed", 1, "failed", "builtins.ValueError") == (
        error["type"],
        error["exit_code"],
        error["reason"],
        error["error_type"],
    )
    assert "Traceback" in error["remote_traceback"]
    assert shop("result", job_id, "--short").code == 1
    assert shop("watch", job_id).code == 1
    shown = shop("show", job_id)
    assert "Traceback (most recent call last)" in shown.text
    assert "attempts that did not succeed" in shown.text
    assert "\x1b" not in shown.text
    record = shop("show", job_id, "--json").json
    assert ("dead", "failed", 1) == (record["state"], record["dead_reason"], len(record["attempts"]))
    assert shop("retry", job_id, "--json").lines == [{"id": job_id, "state": "queued"}]
    assert shop("watch", job_id).code == 1
    assert shop("show", job_id, "--json").json["attempt"] == 2
    assert shop("submit", "boom", "--wait", "--json").error["type"] == "JobFailed"


def test_watch_writes_lines_or_events_and_ends_with_the_outcome(shop: Folder) -> None:
    gate = shop.path / "gate"
    ids = [shop.submit("gate", str(gate)), shop.submit("echo", "5")]
    watch = shop.spawn("watch", *ids)
    assert watch.stderr is not None
    said = ""
    while f"{ids[0]} running 50% at the gate\n" not in said:
        said += watch.stderr.readline().decode()
    gate.touch()
    out, err = watch.communicate(timeout=DEADLINE)
    said += err.decode()
    assert (0, b"") == (watch.returncode, out)
    assert re.search(rf"^{ids[0]} succeeded after .*: through$", said, re.MULTILINE)
    assert re.search(rf"^{ids[1]} succeeded after \S+$", said, re.MULTILINE)
    job_id = shop.submit("steps", "20")
    events = shop("watch", job_id, "--json").lines
    percents = [event["progress"] for event in events if event["state"] == "running" and event["progress"]]
    assert percents == sorted(percents)
    assert len(percents) >= 2
    assert events[-2]["progress_note"] == "a step"
    assert ("succeeded", "done", 100) == tuple(events[-1][name] for name in ("state", "short_result", "progress"))


def test_a_running_job_is_prolonged_and_told_that_it_is_cancelled(shop: Folder) -> None:
    job_id = shop.submit("steps", "10000")
    _until(lambda: shop("show", job_id, "--json").json["state"] == "running")
    [worker] = shop("stats", "--json").json["workers"]
    assert job_id in worker["jobs"]
    assert worker["actors"] == ["array", "boom", "echo", "gate", "image", "steps", "text"]
    assert f"{worker['pid']}" in shop("stats").text
    for _ in range(2):
        ran = shop("extend", job_id, "--by", "1.5m")
        assert (0, f"{job_id}\trunning\n") == (ran.code, ran.text), ran
    assert shop("show", job_id, "--json").json["extended_by"] == 180
    ran = shop("cancel", job_id)
    assert (0, f"{job_id}\tcancelling\n") == (ran.code, ran.text), ran
    ran = shop("watch", job_id)
    assert ran.code == 1
    assert f"{job_id} cancelled after" in ran.err
    assert shop("result", job_id, "--json").error["type"] == "JobCancelled"
    done = shop.submit("echo")
    assert shop("watch", done).code == 0
    assert shop("cancel", done).text == f"{done}\tsucceeded\n"


def test_a_terminal_gets_a_live_bar_and_no_binary(shop: Folder) -> None:
    job_id = shop.submit("image")
    ours, theirs = pty.openpty()
    try:
        wait = shop.spawn("submit", "steps", "12", "--wait", stderr=theirs)
        refused = shop.spawn("result", job_id, stdout=theirs)
        out, _ = wait.communicate(timeout=DEADLINE)
        _, err = refused.communicate(timeout=DEADLINE)
        assert (0, b"done\n") == (wait.returncode, out)
        assert refused.returncode == 2
        assert "is 256 bytes of image/png, which a terminal would not survive" in err.decode()
        drawn = b""
        while select.select([ours], [], [], 0)[0]:
            drawn += os.read(ours, 65536)
    finally:
        os.close(ours)
        os.close(theirs)
    assert re.search(rb"running +\[#+-+\] \d+(\.\d+)?% a step", drawn)
    assert b"\x1b[1A" in drawn
    assert b"succeeded after" in drawn.splitlines()[-1]
    assert b"\x00" not in drawn


def test_a_worker_whose_module_is_missing_fails(folder: Folder) -> None:
    ran = folder.process("worker", "no_such_module", "--processes", "1")
    assert (2, b"") == (ran.code, ran.out)
    assert "No module named 'no_such_module', seen from " in ran.err
    assert "Give the module that declares your actors" in ran.err
    assert "Traceback" not in ran.err
    ran = folder.process("worker", "here/no_such_file.py", "--processes", "1")
    assert (2, b"") == (ran.code, ran.out)
    assert "there is no here/no_such_file.py, seen from " in ran.err
    (folder.path / "broken.py").write_text("raise OSError('not yet')\n")
    ran = folder.process("worker", "broken", "--processes", "1")
    assert (1, True) == (ran.code, "OSError: not yet" in ran.err)


# The parts.


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ({"a": [1, 2.5, None, True, "x"]}, {"a": [1, 2.5, None, True, "x"]}),
        (b"hello", {"$bytes": "aGVsbG8="}),
        (float("nan"), {"$float": "nan"}),
        (float("-inf"), {"$float": "-inf"}),
        (datetime(2026, 1, 31, 12, tzinfo=UTC), {"$datetime": "2026-01-31T12:00:00+00:00"}),
        (datetime(2026, 1, 31).date(), {"$date": "2026-01-31"}),
        (timedelta(seconds=90), {"$timedelta": 90.0}),
        ({1: "a"}, {"$dict": [[1, "a"]]}),
        (np.float32(0.5), 0.5),
        (np.int64(7), 7),
        (np.bool_(True), True),
        (np.float64("nan"), {"$float": "nan"}),
        (np.array([1, 2], "<i2"), {"$ndarray": {"dtype": "<i2", "shape": [2], "data": "AQACAA=="}}),
        (np.array(1, "<i2"), {"$ndarray": {"dtype": "<i2", "shape": [], "data": "AQA="}}),
        (np.complex64(1j), {"$ndarray": {"dtype": "<c8", "shape": [], "data": "AAAAAAAAgD8="}}),
        (
            np.zeros(1, [("a", "<i2")]),
            {"$ndarray": {"dtype": [["a", "<i2"]], "shape": [1], "data": "AAA="}},
        ),
    ],
)
def test_every_value_has_a_form_in_json(value: object, expected: object) -> None:
    shown = json.loads(json.dumps(plain(value), allow_nan=False))
    assert expected == shown


def test_an_argument_is_json_or_text() -> None:
    assert [1, -0.5, "x", "x y", {"a": []}, "NaN", "Infinity", "", "1_000"] == [
        from_text(text) for text in ("1", "-0.5", '"x"', "x y", '{"a": []}', "NaN", "Infinity", "", "1_000")
    ]
    with pytest.raises(InvalidJob, match="nested too deeply"):
        from_text("[" * 100_000)


def test_durations_and_times_are_read() -> None:
    assert [1.5, 0.25, 30, 300, 7200, 172800] == [
        types.duration(text) for text in ("1.5", "250ms", "30s", "5m", "2h", "2d")
    ]
    assert types.moment("@1700000000.5") == 1700000000.5
    assert types.moment("2026-01-31T12:00:00Z") == datetime(2026, 1, 31, 12, tzinfo=UTC).timestamp()
    assert types.moment("2026-01-31") == datetime(2026, 1, 31).astimezone().timestamp()
    assert abs(types.moment("10m") - (time.time() - 600)) < 5
    for text in ("", "x", "-5", "5 years", "١"):
        with pytest.raises(click.BadParameter):
            types.duration(text)
        with pytest.raises(click.BadParameter):
            types.moment(text)


def test_texts_for_people_obey_nothing() -> None:
    assert clean("a\x1b[31mb\r\nc") == "a [31mb  c"
    assert one_line(" a\n\tb\x07 ") == "a b"
    assert ["0.5s", "45s", "2m", "3h", "4d"] == [duration(s) for s in (0.5, 45, 120, 3 * 3600, 4 * 86400)]
    assert ago(None) == ""
    assert ago(time.time() + 100).startswith("in ")
    assert table(("a", "b"), [("x\ty", 1)], people=False) == "x y\t1\n"
    assert table(("a", "b"), [("long", 1)], people=True) == "A     B\nlong  1\n"


def test_a_jobs_line_says_what_belongs_to_its_state() -> None:
    def record(state: State, **fields: Any) -> JobRecord:
        return JobRecord(id="j", state=state, queue="q", actor="a", created_at=0.0, **fields)

    assert status(record(State.QUEUED, position=1200)) == "queued, 1,200 ahead"
    assert status(record(State.RUNNING, attempt=2, cancel_requested_at=1.0)) == "running, attempt 2, to be cancelled"
    assert status(record(State.SCHEDULED, due_at=time.time() + 90)).startswith("scheduled, due in ")
    assert bar(record(State.RUNNING, progress=50), 80) == "j  running    [####----] 50%"
    assert bar(record(State.RUNNING, progress="loading", progress_note="x"), 80).endswith("loading x")
    dead = record(State.DEAD, dead_reason=DeadReason.CRASHED, error=JobError(type="", message="signal 9"))
    assert outcome(dead) == "j dead (crashed): signal 9 (`mlqueue show j` has more)"
    assert outcome(record(State.CANCELLED)) == "j cancelled"


# The manual.


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_and_option_is_in_the_manual(name: str) -> None:
    assert f"\n## mlqueue {name}\n" in MANUAL
    section = MANUAL.split(f"\n## mlqueue {name}\n")[1].split("\n## ")[0]
    command = cli.get_command(click.Context(cli), name)
    assert command is not None
    options = [opt for parameter in command.params if isinstance(parameter, click.Option) for opt in parameter.opts]
    common = MANUAL.split("\n## Options of every command\n")[1].split("\n## ")[0]
    missing = [opt for opt in options if f"`{opt}" not in section + common]
    assert [] == missing


def test_the_manual_has_no_command_that_there_is_not() -> None:
    assert list(COMMANDS) == re.findall(r"^## mlqueue (\w+)$", MANUAL, re.MULTILINE)
