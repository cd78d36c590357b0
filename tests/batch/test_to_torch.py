"""Sources as data sets of PyTorch; these tests need it."""

from __future__ import annotations

import json
from types import SimpleNamespace

import numpy as np
import pytest

from mlqueue.batch.data_source import ArrayDataSource, CallableDataSource

torch = pytest.importorskip("torch")


def source(n):
    y = np.arange(n)
    return ArrayDataSource([y[:, None] * np.ones(2, np.float32), y])


def labels(batches):
    return [batch[1].tolist() for batch in batches]


def test_batches_are_tensors_on_the_same_memory():
    from mlqueue.batch.to_torch import as_tensors

    array = np.arange(4.0)
    tensor, text = as_tensors((array, np.array(["a"])))
    array[0] = 9
    assert tensor[0] == 9
    assert text.tolist() == ["a"]
    frozen = np.arange(3)
    frozen.flags.writeable = False
    named = as_tensors({"frozen": frozen, "backwards": np.arange(3)[::-1], "big": np.arange(3, dtype=">i4")})
    assert {name: part.tolist() for name, part in named.items()} == {
        "frozen": [0, 1, 2],
        "backwards": [2, 1, 0],
        "big": [0, 1, 2],
    }


def test_tensors_are_read_as_arrays_on_their_memory():
    tensor = torch.arange(12.0).reshape(6, 2)
    ds = ArrayDataSource([tensor])
    tensor[0, 0] = 50
    for shuffle in (None, 1):
        (batch,) = next(ds.batch_iterator(6, shuffle=shuffle))
        assert type(batch) is np.ndarray
        assert sorted(batch[:, 0].tolist()) == [2, 4, 6, 8, 10, 50]
        batch[:] = 0
    assert tensor[0, 0] == 50


def test_each_iteration_is_an_epoch_and_can_be_resumed():
    ds = source(10).as_torch(4, shuffle=3)
    assert len(ds) == 3
    first, second = labels(ds), labels(ds)
    assert first != second
    assert first == labels(source(10).batch_iterator(4, shuffle=3, epoch=0))
    assert second == labels(source(10).batch_iterator(4, shuffle=3, epoch=1))
    ds.set_epoch(0)
    assert labels(ds) == first
    epoch = iter(ds)
    next(epoch)
    state = json.loads(json.dumps(ds.state_dict()))
    resumed = source(10).as_torch(4, shuffle=3)
    assert labels(resumed.resume(state)) == labels(epoch) == second[1:]
    assert labels(resumed) == labels(source(10).batch_iterator(4, shuffle=3, epoch=2))
    unbegun = source(10).as_torch(4, shuffle=3, epoch=1)
    state = json.loads(json.dumps(unbegun.state_dict()))
    assert labels(resumed.resume(state)) == second
    assert labels(resumed) == labels(source(10).batch_iterator(4, shuffle=3, epoch=2))
    assert labels(unbegun) == second
    endless = ArrayDataSource([np.zeros(3)], repeats=-1).as_torch(2)
    with pytest.raises(TypeError, match="never ends"):
        len(endless)


def test_workers_of_a_data_loader_share_the_batches():
    ds = source(10)
    for one in (ds, CallableDataSource(ds.batch_iterator)):
        loader = torch.utils.data.DataLoader(one.as_torch(3, shuffle=5), batch_size=None, num_workers=2)
        assert sorted(labels(loader)) == sorted(labels(ds.batch_iterator(3, shuffle=5)))


def test_workers_cannot_share_what_a_generator_draws(monkeypatch):
    worker = SimpleNamespace(id=1, num_workers=2)
    monkeypatch.setattr(torch.utils.data, "get_worker_info", lambda: worker)
    for shuffle in (True, np.random.default_rng(1)):
        with pytest.raises(ValueError, match="has to be a seed"):
            iter(source(10).as_torch(3, shuffle=shuffle))
    assert labels(source(10).as_torch(3)) == [[3, 4, 5], [9]]
