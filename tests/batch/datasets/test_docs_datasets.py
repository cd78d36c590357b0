"""Every example of docs/batch/datasets.md runs, in order, as one program; its tables and commands are true."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import published
import pytest
from click.testing import CliRunner
from fileserver import Publish

from mlqueue.batch.cli import datasets
from mlqueue.batch.datasets import mnist
from mlqueue.batch.datasets.catalogue import CATALOGUE

PAGE = (Path(__file__).parents[3] / "docs" / "batch" / "datasets.md").read_text(encoding="utf-8")


def test_the_examples_run(publish: Publish, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    images = np.random.default_rng(0).integers(0, 256, (10_100, 28, 28), dtype=np.uint8)
    labels = np.arange(10_100) % 10
    publish(mnist._SOURCES, [published.idx(array) for array in (images, labels, images[:200], labels[:200])])
    examples = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
    assert len(examples) == 4
    names: dict[str, object] = {}
    for example in examples:
        exec(compile(example, "datasets.md", "exec"), names)
    batch_X = names["batch_X"]
    assert isinstance(batch_X, np.ndarray)
    assert batch_X.shape[1:] == (1, 28, 28)


def test_every_data_set_is_in_the_table() -> None:
    for entry in CATALOGUE.values():
        assert f"| `{entry.module}.{entry.class_name}` |" in PAGE


def test_every_command_on_the_page_exists_and_is_on_it() -> None:
    commands = set(re.findall(r"^mlqueue datasets (\w+)", PAGE, re.MULTILINE))
    assert commands == set(datasets.commands)
    for command in commands:
        assert CliRunner().invoke(datasets, [command, "--help"]).exit_code == 0
