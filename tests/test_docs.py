"""The documentation is complete, and what it shows can be run.

The examples of README.md, docs/tutorial and docs/howto run in a fresh folder with an embedded server of their own and
real worker processes, as a reader would run them. A python block whose first line is a comment ``# NAME.py`` is that
file. The lines of a sh block run one after the other: in the background when they end in ``&``, and not at all when
they install or build something. A line may end in ``# exit code N``. A text block behind it is what was printed,
``...`` standing for anything.
"""

from __future__ import annotations

import contextlib
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

from mlqueue import DeadReason, Settings, State, errors
from mlqueue.cli.group import COMMANDS
from mlqueue.job import MOVES

ROOT = Path(__file__).resolve().parent.parent
DOCS = ROOT / "docs"
PAGES = [ROOT / "README.md", *sorted(DOCS.rglob("*.md"))]
TUTORIALS = sorted([*(DOCS / "tutorial").glob("*.md"), *(DOCS / "howto").glob("*.md")])

#: What a line of a sh block begins with that is not run here.
NOT_RUN = ("#", "make", "pip", "cd ", "git ")

#: How long a line may take, in seconds.
PATIENCE = 60


# Reading pages


class Block(NamedTuple):
    language: str
    text: str
    line: int


def blocks(page: Path) -> list[Block]:
    text = page.read_text()
    found = re.finditer(r"^```(\w*)[^\n]*\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    return [Block(match[1], match[2], text.count("\n", 0, match.start()) + 2) for match in found]


def file_of(block: Block) -> str | None:
    """The name of the file that a python block is, or None."""
    match = re.match(r"# (\w+\.py)\n", block.text)
    return match[1] if match and block.language == "python" else None


def rows(page: Path, title: str) -> list[list[str]]:
    """The cells of the table whose first column has this title, on a page that may have several of them."""
    found: list[list[str]] = []
    inside = False
    for line in page.read_text().splitlines():
        cells = [cell.strip() for cell in line.strip().strip("|").split("|")] if line.startswith("|") else []
        if not cells:
            inside = False
        elif cells[0] == title:
            inside = True
        elif inside and not set(cells[0]) <= set("-:"):
            found.append(cells)
    return found


def code(cell: str) -> list[str]:
    """What stands between backticks."""
    return re.findall(r"`([^`]+)`", cell)


def is_named(page: Path) -> str:
    return str(page.relative_to(ROOT))


# The reference is complete


def test_every_setting_stands_in_the_reference_with_its_default_and_bounds() -> None:
    table = {code(row[0])[0]: (row[1], row[2]) for row in rows(DOCS / "reference/settings.md", "variable")}
    fields = {name: field for name, field in Settings.__dataclass_fields__.items() if "kind" in field.metadata}
    expected = {}
    for described in Settings.load({}).describe():
        kind = fields[described.name].metadata["kind"]
        allowed = table.get(described.env, ("", "is missing"))[1]
        if hasattr(kind, "low"):
            allowed = f"{kind.show(kind.low)} to {kind.show(kind.high)}"
        elif hasattr(kind, "choices"):
            allowed = ", ".join(f"`{choice}`" for choice in kind.choices)
        expected[described.env] = (described.value, allowed)
    assert expected == table


def test_every_state_stands_in_the_reference_with_its_moves() -> None:
    table = {code(row[0])[0]: set(code(row[2])) for row in rows(DOCS / "reference/states.md", "state")}
    assert {state.value: {target.value for target in MOVES[state]} for state in State} == table


def test_every_dead_reason_stands_in_the_reference() -> None:
    table = [code(row[0])[0] for row in rows(DOCS / "reference/states.md", "reason")]
    assert [reason.value for reason in DeadReason] == table


def test_every_error_stands_in_the_reference_with_its_status_and_exit_code() -> None:
    page = DOCS / "reference/errors.md"
    expected, told = {}, {}
    for name in errors.__all__:
        kind = getattr(errors, name)
        bases = {base.__name__ for base in kind.__bases__} - {"MLQueueError", "Exception"}
        expected[name] = (bases, str(kind.status), str(kind.exit_code))
    for row in rows(page, "error"):
        told[code(row[0])[0]] = (set(code(row[1])), row[2], row[3])
    assert expected == told
    text = page.read_text()
    sections = dict(re.findall(r"^## (\w+)\n(.*?)(?=^## |\Z)", text, re.MULTILINE | re.DOTALL))
    assert set(errors.__all__) == set(sections)
    for name in set(sections) - {"MLQueueError"}:
        assert "\nWhen: " in sections[name], name
        assert "\nWhat to do: " in sections[name], name


def test_every_command_has_its_section_in_the_reference() -> None:
    told = set(re.findall(r"^## mlqueue (\w+)$", (DOCS / "reference/commands.md").read_text(), re.MULTILINE))
    assert set(COMMANDS) == told


# One table of transitions

#: The states as common.lua calls them.
LETTERS = {"q": "queued", "w": "scheduled", "r": "running", "s": "succeeded", "d": "dead", "c": "cancelled"}


def transitions_of_lua() -> list[list[str]]:
    """The rows of the table on top of common.lua, with the states' names for their letters."""
    lines = iter((ROOT / "mlqueue/store/lua/common.lua").read_text().splitlines())
    assert any(line.split()[:2] == ["transition", "by"] for line in lines)
    found = []
    for line in lines:
        if not line.strip():
            break
        cells = re.split(r"\s{2,}", line.strip())
        if len(cells) == 5:  # "any but r -> gone" leaves no room between from and to
            cells[2:3] = cells[2].split(" -> ")
        found.append(
            [
                re.sub(r"\b[qwrsdc]\b", lambda match: LETTERS[match[0]], cell) if number in (2, 3, 5) else cell
                for number, cell in enumerate(cells)
            ]
        )
    return found


def test_the_explanation_has_the_table_of_transitions_row_by_row() -> None:
    table = rows(DOCS / "explanation/one-job-one-record.md", "transition")
    # The page separates states by commas, the comment by spaces.
    told = [[cell.replace("queued, scheduled", "queued scheduled") for cell in row] for row in table]
    told = [[cell.replace("dead, cancelled", "dead cancelled") for cell in row] for row in told]
    expected = transitions_of_lua()
    assert len(expected) > 10
    for row, other in zip(expected, told, strict=True):
        assert row == other


# Links


@pytest.mark.parametrize("page", PAGES, ids=is_named)
def test_links_lead_to_what_is_there(page: Path) -> None:
    text = re.sub(r"^```.*?^```$", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if "://" in target:
            continue
        name, _, anchor = target.partition("#")
        linked = (page.parent / name).resolve() if name else page
        assert linked.exists(), f"{target} leads nowhere"
        if anchor:
            headings = re.findall(r"^#+ (.*)$", linked.read_text(), re.MULTILINE)
            assert anchor in {re.sub(r"[^\w\- ]", "", heading).lower().replace(" ", "-") for heading in headings}


def test_every_page_stands_in_the_index() -> None:
    index = (DOCS / "README.md").read_text()
    for page in DOCS.rglob("*.md"):
        if page.name != "README.md":
            assert f"({page.relative_to(DOCS)})" in index


# Examples


@pytest.mark.parametrize("page", PAGES, ids=is_named)
def test_python_examples_can_be_compiled(page: Path) -> None:
    for block in blocks(page):
        if block.language == "python":
            compile("\n" * (block.line - 1) + block.text, str(page), "exec")


class Reader:
    """Somebody who types a page's examples into an empty folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        programs = folder / "bin"
        programs.mkdir()
        # What an installation would put there; with -P nothing is imported from the current folder by accident.
        command = "-P -c 'import sys; from mlqueue.cli import main; sys.exit(main())'"
        for name, arguments in {"python": "", "mlqueue": command}.items():
            script = programs / name
            script.write_text(f'#!/bin/sh\nexec {shlex.quote(sys.executable)} {arguments} "$@"\n')
            script.chmod(0o755)
        self.site = folder / "site"
        self.site.mkdir()
        self.environment = {
            name: value for name, value in os.environ.items() if not name.startswith("MLQUEUE_") and name != "REDIS_URL"
        }
        self.environment |= {
            "PATH": f"{programs}{os.pathsep}{os.environ.get('PATH', os.defpath)}",
            "PYTHONPATH": str(ROOT),
            "MLQUEUE_PROCESSES": "2",  # a reader with many cores has more of them, a test should not
        }
        self.background: list[subprocess.Popen[bytes]] = []
        self.log = folder / "log"

    def read(self, page: Path) -> None:
        """Does what the page says, and runs the programs that it shows but does not run."""
        left = []
        printed = ""
        for block in blocks(page):
            if (name := file_of(block)) is not None:
                (self.site / name).write_text(block.text)
                left.append(name)
            elif block.language == "sh":
                lines = [line for line in block.text.splitlines() if line.strip() and not line.startswith(NOT_RUN)]
                printed = "".join(self.type(line) for line in lines)
                left = [name for name in left if not any(name in line for line in lines)]
            elif block.language == "text":
                self.check(block, printed)
        for name in left:
            self.type(f"python {name}")

    def type(self, line: str) -> str:
        """Runs a line; what it printed."""
        told = re.search(r"#.*exit code (\d+)", line)
        command = line.partition(" # ")[0].strip()
        if command.endswith("&"):
            with self.log.open("ab") as log:
                self.background.append(self.start("exec " + command.removesuffix("&"), log.fileno()))
            return ""
        with tempfile.TemporaryFile() as output:
            process = self.start(command, output.fileno())
            try:
                process.wait(PATIENCE)
            except subprocess.TimeoutExpired:
                end(process, signal.SIGKILL)
            output.seek(0)
            printed = output.read().decode()
        assert process.returncode == int(told[1] if told else 0), f"{line}\n{printed}\n{self.logged()}"
        return printed

    def start(self, command: str, output: int) -> subprocess.Popen[bytes]:
        return subprocess.Popen(
            ["sh", "-c", command],
            cwd=self.site,
            env=self.environment,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            start_new_session=True,
        )

    def check(self, block: Block, printed: str) -> None:
        """The lines of a text block were printed, in this order."""
        lines = iter(printed.splitlines())
        for expected in block.text.splitlines():
            pattern = ".*".join(re.escape(part) for part in expected.split("..."))
            assert any(re.fullmatch(pattern, line.rstrip()) for line in lines), (
                f"line {block.line}: no {expected!r} (behind the lines before it) in\n{printed}\n{self.logged()}"
            )

    def logged(self) -> str:
        return self.log.read_text(errors="replace") if self.log.exists() else ""

    def leave(self) -> None:
        # Servers are begun before those who need them, and end after them.
        for process in reversed(self.background):
            if process.poll() is None:
                process.terminate()
            try:
                process.wait(15)
            except subprocess.TimeoutExpired:
                end(process, signal.SIGKILL)
        self.type("mlqueue server --stop")


def end(process: subprocess.Popen[bytes], signum: signal.Signals) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signum)
    process.wait()


@pytest.fixture
def reader() -> Iterator[Reader]:
    folder = Path(tempfile.mkdtemp(prefix="mlq-"))
    someone = Reader(folder)
    try:
        yield someone
    finally:
        try:
            someone.leave()
        finally:
            shutil.rmtree(folder, ignore_errors=True)


def test_the_readme_runs_as_it_stands(reader: Reader) -> None:
    reader.read(ROOT / "README.md")
    reader.type("""python -c '
import inside
from mlqueue.testing import eager, isolated
with isolated(inside.mlq), eager(inside.mlq):
    result = inside.fit.submit(3).full_result(timeout=30)
assert (result.short, result.full) == ("loss 0.125", b"any bytes"), result
'""")


@pytest.mark.docs
@pytest.mark.parametrize("page", TUTORIALS, ids=is_named)
def test_a_tutorial_runs_as_it_stands(reader: Reader, page: Path) -> None:
    reader.read(page)
    assert any(block.language == "text" for block in blocks(page))
    assert reader.background
