"""Every program in the pages on data sources runs, and what it asserts holds."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PAGES = ("tutorial", "porting", "sources")
OPTIONAL = ("PIL", "pyarrow", "sklearn", "tables", "torch", "tqdm")


def programs():
    for page in PAGES:
        text = (ROOT / "docs" / "batch" / f"{page}.md").read_text(encoding="utf-8")
        heading = ""
        for part in re.finditer(r"^#+ (?P<heading>[^\n]*)$|^```python\n(?P<program>.*?)^```$", text, re.M | re.S):
            heading = part["heading"] or heading
            if part["program"]:
                assert heading
                yield pytest.param(part["program"], id=f"{page}: {heading}")


@pytest.mark.parametrize("program", list(programs()))
def test_the_program_runs(program, tmp_path):
    for package in OPTIONAL:
        if re.search(rf"^(import|from) {package}\b", program, re.M) and not find_spec(package):
            pytest.skip(f"{package} is not installed")
    script = tmp_path / "program.py"
    script.write_text(program, encoding="utf-8")
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    run = subprocess.run(
        [sys.executable, "-W", "error", script.name],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert run.returncode == 0, run.stderr


def test_importing_loads_nothing_but_numpy():
    heavy = ["joblib", "tables", "h5py", "pooch", "PIL", "torch", "pyarrow", "tqdm", "rich", "dramatiq", "redis"]
    code = (
        "import sys, mlqueue.batch.data_source, mlqueue.batch.sampling, mlqueue.batch.sources, mlqueue.batch.mixing\n"
        "import mlqueue.batch.collate, mlqueue.batch.progress\n"
        f"print([name for name in {heavy!r} if name in sys.modules])"
    )
    run = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    assert run.stdout.strip() == "[]"
