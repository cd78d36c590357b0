"""Imports point down, none is hidden, and `import mlqueue` stays light; what it exports is there and documented."""

from __future__ import annotations

import ast
import graphlib
import importlib
import inspect
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import mlqueue

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "mlqueue"

#: The layers, lowest first. A module imports from lower ones; those of one layer do not import each other. The modules
#: of a package may, as long as they make no cycle.
LAYERS: tuple[tuple[str, ...], ...] = (
    ("errors", "processes", "_keeper", "urlpolicy", "files", "values", "board", "storeurl", "interrupting"),
    ("outliving", "webhooks"),
    ("settings", "codec", "job", "embedded", "schema"),
    ("store", "encoder"),
    (
        "message",
        "waiting",
        "events",
        "delivery",
        "heartbeat",
        "keys",
        "data",
        "signing",
        "overdue",
        "migration",
        "doctor",
        "webhook_message",
        "named",
        "overview",
    ),
    (
        "progress",
        "journal",
        "limits",
        "why",
        "pump",
        "middleware",
        "callbacks",
        "posted",
        "reaper",
        "dead_lines",
        "calls",
    ),
    ("beside", "client_http", "capture", "usage"),
    ("nested", "client_events", "following", "estimate", "notebook"),
    ("handle", "dead_letters", "functions"),
    ("broker", "client"),
    ("current", "loading"),
    ("listeners",),
    ("app",),
    ("queue", "child", "testing", "joblib", "listening"),
    ("supervisor",),
    ("foreman",),
    ("batch",),
    ("web",),
    ("cli",),
    ("__main__",),
)

#: What may be imported inside a function, and why.
LATE = {
    "numpy": "`import mlqueue` must not wait for it; the codec needs it for arrays only",
    "http": "`import mlqueue` must not wait for it; it is needed when a callback is delivered",
    "click": "batch.download needs it for a progress bar on a terminal only",
    "platformdirs": "batch.config needs it where no folder is set only",
    "hashlib": "a process that prepares rows of arrays is sooner ready without it",
    "random": "as hashlib",
    "tempfile": "as hashlib",
    "IPython": "shows a Job in a notebook, and is there when it asks for that",
    "PIL": "optional",
    "pynvml": "optional",
    "cloudpickle": "optional",
    "lz4": "optional",
    "zstandard": "optional",
    "pandas": "optional",
    "pyarrow": "optional",
    "rich": "optional",
    "scipy": "optional",
    "tables": "optional",
    "torch": "optional",
    "tqdm": "optional",
}

#: What `import mlqueue` and `mlqueue.MLQ` must not load.
HEAVY = (
    "numpy",
    "scipy",
    "sklearn",
    "tables",
    "matplotlib",
    "flask",
    "torch",
    "PIL",
    "click",
    "http.client",
    "mlqueue.batch",
    "mlqueue.web",
)


#: The modules of mlqueue.batch that know the queue; none of the others imports one of them.
BATCHES_ON_THE_QUEUE = {
    f"mlqueue.batch.{name}"
    for name in (
        "actor_pool",
        "actor_crew",
        "applied",
        "identity",
        "inference",
        "kept",
        "links",
        "requests",
        "serving",
        "ways",
        "remote",
        "tcp",
        "parts",
        "through_store",
    )
}


def module_of(path: Path) -> str:
    """The name of the module in a file."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_of(path): path for path in sorted(PACKAGE.rglob("*.py"))}


def imports(name: str, nodes: Iterator[ast.AST]) -> Iterator[str]:
    """The full names of what these nodes of a module import; `from m import n` is m.n when that is a module of ours."""
    package = name if MODULES[name].name == "__init__.py" else name.rpartition(".")[0]
    for node in nodes:
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                above = package.split(".")[: len(package.split(".")) - node.level + 1]
                base = ".".join([*above, base]).rstrip(".")
            for alias in node.names:
                yield f"{base}.{alias.name}" if f"{base}.{alias.name}" in MODULES else base


def inner_imports(name: str) -> set[str]:
    """The modules of mlqueue that a module imports, wherever in it, for the type checker too."""
    tree = ast.parse(MODULES[name].read_text())
    return {found for found in imports(name, ast.walk(tree)) if found in MODULES} - {name}


GRAPH = {name: inner_imports(name) for name in MODULES}


def part_of(name: str) -> str:
    """The module or package right below mlqueue; empty for mlqueue itself."""
    return name.split(".")[1] if "." in name else ""


def layer_of(name: str) -> int:
    for number, layer in enumerate(LAYERS):
        if part_of(name) in layer:
            return number
    raise AssertionError(f"{name} stands in no layer of LAYERS: say where it belongs")


def test_every_module_has_a_layer_and_every_layer_its_modules() -> None:
    assert {part_of(name) for name in MODULES} - {""} == {part for layer in LAYERS for part in layer}


@pytest.mark.parametrize("name", sorted(set(MODULES) - {"mlqueue"}))
def test_imports_point_down(name: str) -> None:
    for target in GRAPH[name]:
        if part_of(target) == "":
            assert part_of(name) in ("cli", "testing", "web"), f"{name} imports mlqueue, which imports nearly all"
        elif part_of(target) != part_of(name):
            assert layer_of(target) < layer_of(name), f"{name} imports {target}, which is not below it"


def test_imports_make_no_cycle() -> None:
    order = list(graphlib.TopologicalSorter(GRAPH).static_order())
    assert set(MODULES) == set(order)


def test_the_queue_does_not_know_the_batches() -> None:
    for name, targets in GRAPH.items():
        if part_of(name) not in ("batch", "cli"):
            assert not [target for target in targets if part_of(target) == "batch"], name
    for name, targets in GRAPH.items():
        if part_of(name) == "batch" and name not in BATCHES_ON_THE_QUEUE:
            assert {part_of(target) for target in targets} <= {"batch", "errors"}, name
            assert not targets & BATCHES_ON_THE_QUEUE, name


@pytest.mark.parametrize("name", sorted(MODULES))
def test_no_import_is_hidden_in_a_function(name: str) -> None:
    for function in ast.walk(ast.parse(MODULES[name].read_text())):
        if isinstance(function, ast.FunctionDef | ast.AsyncFunctionDef):
            hidden = {target.partition(".")[0] for target in imports(name, ast.walk(function))}
            assert hidden <= set(LATE), f"{name}.{function.name}"


@pytest.mark.parametrize("name", sorted(MODULES))
def test_the_library_does_not_import_what_this_repository_runs(name: str) -> None:
    found = {target.partition(".")[0] for target in imports(name, ast.walk(ast.parse(MODULES[name].read_text())))}
    assert not found & {"tasks", "webapp", "tests", "benchmarks"}


# Importing is light

PROBE = """
import json, sys, time
begun = time.perf_counter()
import mlqueue
took = [time.perf_counter() - begun]
mlqueue.MLQ
took.append(time.perf_counter() - begun)
print(json.dumps([took, sorted(sys.modules)]))
"""


def test_importing_mlqueue_is_light(capsys: pytest.CaptureFixture[str]) -> None:
    run = subprocess.run(
        [sys.executable, "-c", PROBE], cwd=ROOT, capture_output=True, text=True, check=True, timeout=60
    )
    took, loaded = json.loads(run.stdout)
    with capsys.disabled():
        bare, used = (f"{1000 * seconds:.0f} ms" for seconds in took)
        print(f"\nimport mlqueue: {bare}, with mlqueue.MLQ {used} and {len(loaded)} modules", end=" ")
    assert [] == [name for name in HEAVY if name in loaded]


# What is exported


def test_exported_names_exist_and_have_docstrings() -> None:
    assert len(set(mlqueue.__all__)) == len(mlqueue.__all__)
    for name in mlqueue.__all__:
        assert inspect.getdoc(getattr(mlqueue, name)), name


def test_every_module_exports_what_it_says() -> None:
    for name in MODULES:
        if part_of(name) in ("batch", "__main__", "listening"):
            continue  # batch needs optional packages; __main__ runs, and listening makes an app
        module = importlib.import_module(name)
        assert [] == [export for export in getattr(module, "__all__", []) if not hasattr(module, export)], name


def test_exported_names_stand_in_the_documentation() -> None:
    pages = [ROOT / "README.md", *(ROOT / "docs").rglob("*.md")]
    text = "\n".join(page.read_text() for page in pages)
    assert [] == [name for name in mlqueue.__all__ if name not in text]


def public(kind: type) -> Iterator[str]:
    """The methods and properties of a class of ours."""
    for name in vars(kind):
        if not name.startswith("_"):
            yield name


@pytest.mark.parametrize(
    "kind",
    [mlqueue.MLQ, mlqueue.Actor, mlqueue.Job, mlqueue.CurrentJob, mlqueue.Data, mlqueue.DeadLetters, mlqueue.Limits],
)
def test_public_methods_stand_in_the_reference(kind: type) -> None:
    text = (ROOT / "docs/reference/python.md").read_text()
    section = text.partition(f"\n## {kind.__name__}\n")[2].partition("\n## ")[0]
    assert section, f"docs/reference/python.md has no section {kind.__name__}"
    assert [] == [name for name in public(kind) if f"`{name}" not in section and f".{name}" not in section]


def test_the_library_is_typed() -> None:
    assert (PACKAGE / "py.typed").exists()
