"""``mlqueue limit`` and ``why``: the real command against a real embedded server."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from command import Folder, a_folder

from mlqueue import MLQ, Settings


@pytest.fixture(scope="module")
def folder() -> Iterator[Folder]:
    with a_folder() as whole:
        whole.environ["MLQUEUE_NAMESPACE"] = "limits"
        yield whole


def test_limits_are_set_shown_and_forgotten(folder: Folder) -> None:
    assert 4 == folder("limit").code, "there is no store yet"
    assert "gpu\t2\n" == folder("limit", "gpu", "2").text
    assert {"name": "@train", "capacity": 3} == folder("limit", "@train", "3", "--json").json
    assert "@train\t0\t3\thand\t\ngpu\t0\t2\thand\t\n" == folder("limit").text
    [shown] = folder("limit", "gpu", "--json").lines
    assert {"name": "gpu", "capacity": 2, "used": 0, "source": "hand", "held_by": {}} == shown
    assert "gpu\t1\n" == folder("limit", "gpu", "--unset").text
    for wrong in (("gpu", "many"), ("gpu", "10001"), ("gpu", "2", "--unset"), ("--unset",), ("tape",), ("@", "1")):
        assert 2 == folder("limit", *wrong).code, wrong


def test_why_says_why_in_a_sentence(folder: Folder) -> None:
    job_id = folder("submit", "train", "1", "--fair-by", "ann", "--unique-key", "k").text.strip()
    assert job_id == folder("submit", "train", "2", "--unique-key", "k").text.strip()
    refused = folder("submit", "train", "2", "--unique-key", "k", "--unique-policy", "reject", "--json")
    assert (1, "JobExists") == (refused.code, refused.error["type"])
    assert f"job {job_id} waits for a worker: none is alive" in folder("why", job_id).text
    told = folder("why", job_id, "--json").json
    assert ("no_worker", None, []) == (told["reason"], told["limit"], told["held_by"])
    shown = folder("show", job_id).text
    assert "turn of     ann" in shown
    assert "unique      k" in shown
    assert 3 == folder("why", "nobody").code


def test_keys_that_the_actor_makes_are_to_be_given(folder: Folder) -> None:
    app = MLQ("limits", settings=Settings.load(folder.environ))
    try:
        app.store.start_worker("w", {}, {"keyed": "here"}, keys={"keyed": ["concurrency_key", "unique_key"]})
        refused = folder("submit", "keyed", "1", "--concurrency-key", "a")
        assert 2 == refused.code
        assert "the unique_key of a job of keyed is made of its arguments" in refused.err
        assert "--unique-key TEXT ('' for none)" in refused.err
        job_id = folder("submit", "keyed", "1", "--concurrency-key", "a", "--unique-key", "").text.strip()
        record = app.store.record(job_id)
        assert ("here", "a", None) == (record.queue, record.concurrency_key, record.unique_key)
    finally:
        app.close()
