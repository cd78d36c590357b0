"""Each shipped data set, from files in its published format on an HTTP server to its attributes."""

from __future__ import annotations

import pickle
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import published
import pytest
import tables
from fileserver import FileServer, Publish

from mlqueue.batch import config
from mlqueue.batch.data_source import ArrayDataSource
from mlqueue.batch.datasets import cifar10, cifar100, fashion_mnist, formats, mnist, stl, svhn, usps
from mlqueue.batch.datasets.catalogue import CATALOGUE, UnknownDataset, find
from mlqueue.batch.datasets.dataset import BadSourceFile, DatasetUnavailable, DownloadSourceFile
from mlqueue.batch.datasets.hdf5 import DatasetFileError
from mlqueue.batch.work_pool import WorkerProcessPool, WorkerThreadPool
from mlqueue.errors import MissingDependency

RNG = np.random.default_rng(4)
N_TRAIN, N_TEST = 30, 12
DIGITS = 10


def images(count: int, *row_shape: int) -> np.ndarray:
    return RNG.integers(0, 256, (count, *row_shape), dtype=np.uint8)


def labels(count: int, classes: int = 10) -> np.ndarray:
    return RNG.permutation(np.arange(count) % classes).astype(np.int32)


@dataclass(kw_only=True)
class Small:
    """A small data set: what it holds, and the files in which it is published."""

    module: ModuleType
    open: Callable[..., Any]
    sources: list[DownloadSourceFile]
    files: list[bytes]
    target: str
    train_X: np.ndarray
    train_y: np.ndarray
    test_X: np.ndarray
    test_y: np.ndarray
    more: dict[str, Any] = field(default_factory=dict)


def small_idx(module: ModuleType, class_name: str, target: str) -> Small:
    train_X, train_y = images(N_TRAIN, 1, 28, 28), labels(N_TRAIN)
    test_X, test_y = images(N_TEST, 1, 28, 28), labels(N_TEST)
    return Small(
        module=module,
        open=getattr(module, class_name),
        sources=module._SOURCES,
        files=[published.idx(array) for array in (train_X[:, 0], train_y, test_X[:, 0], test_y)],
        target=target,
        train_X=train_X,
        train_y=train_y,
        test_X=test_X,
        test_y=test_y,
    )


def small_cifar10(dump: Callable[[dict[str, Any]], bytes] = published.python2_pickle) -> Small:
    train_X, train_y = images(N_TRAIN, 3, 32, 32), labels(N_TRAIN)
    test_X, test_y = images(N_TEST, 3, 32, 32), labels(N_TEST)

    def batch(x: np.ndarray, y: np.ndarray) -> bytes:
        return dump({"batch_label": ["a batch"], "labels": y.tolist(), "data": x.reshape(len(x), -1)})

    members = {
        f"cifar-10-batches-py/data_batch_{1 + k}": batch(train_X[6 * k : 6 * k + 6], train_y[6 * k : 6 * k + 6])
        for k in reversed(range(5))  # the order of the archive is none of the reader's business
    }
    members |= {"cifar-10-batches-py/readme.html": b"<p>", "cifar-10-batches-py/test_batch": batch(test_X, test_y)}
    return Small(
        module=cifar10,
        open=cifar10.CIFAR10,
        sources=[cifar10._SOURCE],
        files=[published.tar(members)],
        target="cifar10.h5",
        train_X=train_X,
        train_y=train_y,
        test_X=test_X,
        test_y=test_y,
    )


def small_cifar100() -> Small:
    train_X, train_y = images(N_TRAIN, 3, 32, 32), labels(N_TRAIN, 6)
    test_X, test_y = images(N_TEST, 3, 32, 32), labels(N_TEST, 6)
    members = {
        "cifar-100-python/meta": published.python2_pickle(
            {"fine_label_names": list("abcdef"), "coarse_label_names": ["big", "small"]}
        )
    }
    for name, x, y in (("train", train_X, train_y), ("test", test_X, test_y)):
        members[f"cifar-100-python/{name}"] = published.python2_pickle(
            {"data": x.reshape(len(x), -1), "fine_labels": y.tolist(), "coarse_labels": (y // 3).tolist()}
        )
    return Small(
        module=cifar100,
        open=cifar100.CIFAR100,
        sources=[cifar100._SOURCE],
        files=[published.tar(members)],
        target="cifar100.h5",
        train_X=train_X,
        train_y=train_y,
        test_X=test_X,
        test_y=test_y,
    )


def small_svhn() -> Small:
    train_X, train_y = images(N_TRAIN, 3, 32, 32), labels(N_TRAIN)
    test_X, test_y = images(N_TEST, 3, 32, 32), labels(N_TEST)
    return Small(
        module=svhn,
        open=svhn.SVHN,
        sources=svhn._SVHN_SOURCES,
        files=[published.matlab(train_X, train_y), published.matlab(test_X, test_y)],
        target="svhn_train_test.h5",
        train_X=train_X,
        train_y=train_y,
        test_X=test_X,
        test_y=test_y,
    )


def small_stl() -> Small:
    train_X, train_y = images(N_TRAIN, 3, 96, 96), labels(N_TRAIN)
    test_X, test_y = images(N_TEST, 3, 96, 96), labels(N_TEST)
    unlabelled = images(7, 3, 96, 96)
    folds = [RNG.choice(N_TRAIN, 6, replace=False) for _ in range(4)]
    members = {
        "train_X.bin": published.stl_binary(train_X),
        "train_y.bin": (train_y + 1).astype(np.uint8).tobytes(),
        "test_X.bin": published.stl_binary(test_X),
        "test_y.bin": (test_y + 1).astype(np.uint8).tobytes(),
        "unlabeled_X.bin": published.stl_binary(unlabelled),
        "class_names.txt": b"airplane\nbird\ncar\n",
        "fold_indices.txt": b"".join(b" ".join(b"%d" % index for index in fold) + b" \n" for fold in folds),
    }
    return Small(
        module=stl,
        open=stl.STL,
        sources=[stl._SOURCE],
        files=[published.tar({f"stl10_binary/{name}": content for name, content in members.items()})],
        target="stl10.h5",
        train_X=train_X,
        train_y=train_y,
        test_X=test_X,
        test_y=test_y,
        more={"unlabelled": unlabelled, "folds": folds},
    )


MAKERS: dict[str, Callable[[], Small]] = {
    "mnist": lambda: small_idx(mnist, "MNIST", "mnist.h5"),
    "fashion_mnist": lambda: small_idx(fashion_mnist, "FashionMNIST", "fashion-mnist.h5"),
    "cifar10": small_cifar10,
    "cifar100": small_cifar100,
    "svhn": small_svhn,
}


@pytest.fixture(params=MAKERS)
def small(request: pytest.FixtureRequest, publish: Publish) -> Small:
    small = MAKERS[request.param]()
    publish(small.sources, small.files)
    return small


def assert_split(part_X_u8: Any, part_X: Any, part_y: np.ndarray, expected_X: np.ndarray, expected_y: Any) -> None:
    """Bytes, floats in 0 to 1, and labels are the expected ones, with the promised shapes and types."""
    assert part_X_u8.dtype == np.uint8
    assert part_X_u8.shape == part_X.shape == expected_X.shape
    np.testing.assert_array_equal(np.asarray(part_X_u8), expected_X)
    assert part_X.dtype == np.float32
    np.testing.assert_array_equal(part_X[:], expected_X.astype(np.float32) * np.float32(1 / 255))
    assert isinstance(part_y, np.ndarray)
    assert part_y.dtype == np.int32
    assert part_y.shape == (len(expected_X),)
    np.testing.assert_array_equal(part_y, expected_y)


def test_a_set_is_fetched_once_and_split(small: Small, server: FileServer, data_home: Path) -> None:
    for _ in range(2):
        with small.open(n_val=8) as ds:
            assert_split(ds.train_X_u8, ds.train_X, ds.train_y, small.train_X[:-8], small.train_y[:-8])
            assert_split(ds.val_X_u8, ds.val_X, ds.val_y, small.train_X[-8:], small.train_y[-8:])
            assert_split(ds.test_X_u8, ds.test_X, ds.test_y, small.test_X, small.test_y)
            assert isinstance(ds.train_X_u8, np.ndarray)
            assert isinstance(ds.val_X_u8, np.ndarray)
            assert ds.path == str(data_home / "data" / small.target)
    assert len(server.requests) == len(small.files)
    assert [path.name for path in (data_home / "data").iterdir()] == [small.target]


@pytest.mark.parametrize("n_val", [0, None])
def test_without_validation_the_training_set_is_whole(small: Small, n_val: int | None) -> None:
    ds = small.open(n_val=n_val)
    assert_split(ds.train_X_u8, ds.train_X, ds.train_y, small.train_X, small.train_y)
    assert_split(ds.val_X_u8, ds.val_X, ds.val_y, small.train_X[:0], small.train_y[:0])


def test_the_whole_training_set_may_validate(small: Small) -> None:
    ds = small.open(n_val=N_TRAIN)
    assert_split(ds.train_X_u8, ds.train_X, ds.train_y, small.train_X[:0], small.train_y[:0])
    assert_split(ds.val_X_u8, ds.val_X, ds.val_y, small.train_X, small.train_y)


def test_values_lie_in_the_range_asked_for(small: Small) -> None:
    ds = small.open(8, -1.0, 1.0)
    for part in (ds.train_X, ds.val_X, ds.test_X):
        values = part[:]
        assert values.min() == -1
        assert values.max() == 1
    assert small.open(n_val=8, val_lower=-3.0).test_X[:].min() == -3


@pytest.mark.parametrize(
    ("n_val", "error"), [(N_TRAIN + 1, ValueError), (-1, ValueError), (True, TypeError), (2.5, TypeError)]
)
def test_a_validation_set_that_cannot_be_is_refused(small: Small, n_val: Any, error: type[Exception]) -> None:
    with pytest.raises(error, match="n_val"):
        small.open(n_val=n_val)


def test_every_part_can_be_mini_batched(small: Small) -> None:
    """Shuffled, drawn across epochs (with repeats within a batch), in memory and from the file."""
    ds = small.open(n_val=0)
    for X, y, expected in ((ds.train_X, ds.train_y, small.train_X), (ds.test_X, ds.test_y, small.test_X)):
        source = ArrayDataSource([X, y, np.arange(len(y))], repeats=2)
        seen = []
        for batch_X, batch_y, numbers in source.batch_iterator(7, shuffle=np.random.RandomState(5)):
            np.testing.assert_array_equal(batch_X, expected[numbers].astype(np.float32) * np.float32(1 / 255))
            np.testing.assert_array_equal(batch_y, np.asarray(y)[numbers])
            seen.append(numbers)
        np.testing.assert_array_equal(np.sort(np.concatenate(seen)), np.repeat(np.arange(len(y)), 2))


def test_a_set_can_be_sent_to_another_process(small: Small) -> None:
    ds = pickle.loads(pickle.dumps(small.open(n_val=8)))
    assert_split(ds.test_X_u8, ds.test_X, ds.test_y, small.test_X, small.test_y)
    assert_split(ds.train_X_u8, ds.train_X, ds.train_y, small.train_X[:-8], small.train_y[:-8])


def test_delete_cache_removes_the_file(small: Small, server: FileServer, data_home: Path) -> None:
    with small.open(n_val=0):
        pass
    small.module.delete_cache()
    assert list((data_home / "data").iterdir()) == []
    small.module.delete_cache()
    with small.open(n_val=0):
        pass
    assert len(server.requests) == 2 * len(small.files)


def test_a_set_that_cannot_be_fetched_is_an_error_that_says_why(small: Small, server: FileServer) -> None:
    server.files.clear()
    with pytest.raises(RuntimeError, match=r"could not load .*HTTP 404") as failure:
        small.open()
    assert isinstance(failure.value, DatasetUnavailable)


@pytest.mark.parametrize("name", [name for name in MAKERS if name != "svhn"] + ["svhn", "stl"])
def test_a_cut_source_without_a_digest_leaves_nothing(
    name: str, publish: Publish, data_home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    small = small_stl() if name == "stl" else MAKERS[name]()
    publish(small.sources, [content[: len(content) * 2 // 3] for content in small.files])
    for source in small.sources:
        monkeypatch.setattr(source, "sha256", None)
    with pytest.raises(BadSourceFile):
        small.open()
    assert [path for path in data_home.rglob("*") if path.is_file()] == []


def test_a_file_that_batchup_left_cut_short_is_an_error_that_says_what_to_do(data_home: Path) -> None:
    (data_home / "data").mkdir(parents=True)
    path = data_home / "data" / "mnist.h5"
    with tables.open_file(path, "w") as file:
        group = file.create_group(file.root, "mnist", "MNIST data")
        file.create_array(group, "train_X_u8", images(4, 1, 28, 28))
    with pytest.raises(DatasetFileError, match=r"has no /mnist/train_y.*Remove it and fetch it again"):
        mnist.MNIST(n_val=0)
    with tables.open_file(path, "a") as file:
        for name, array in (
            ("train_y", labels(5)), ("test_X_u8", images(4, 1, 28, 28)), ("test_y", labels(4))
        ):  # fmt: skip
            file.create_array(file.root.mnist, name, array)
    with pytest.raises(DatasetFileError, match=r"expected uint8 of \(5, 1, 28, 28\)"):
        mnist.MNIST(n_val=0)


def test_the_layout_is_batchups(publish: Publish, data_home: Path) -> None:
    """Group, names, shapes and types of the nodes, by which either program reads the other's files."""
    found: dict[str, set[tuple[str, str]]] = {}
    for make in (*MAKERS.values(), small_stl):
        small = make()
        publish(small.sources, small.files)
        ds = small.open() if small.module is stl else small.open(n_val=0)
        with tables.open_file(ds.path) as file:
            (group,) = file.root._v_groups.values()
            found[small.target] = {(node._v_pathname, str(node.dtype)) for node in group if node.name != "fold_indices"}
            if small.module is stl:
                assert file.root.stl.fold_indices.atom.dtype == np.int32
        ds.close()
    plain = {("train_X_u8", "uint8"), ("train_y", "int32"), ("test_X_u8", "uint8"), ("test_y", "int32")}

    def under(group: str, *more: tuple[str, str]) -> set[tuple[str, str]]:
        return {(f"/{group}/{name}", kind) for name, kind in plain | set(more)}

    assert found == {
        "mnist.h5": under("mnist"),
        "fashion-mnist.h5": under("mnist"),
        "cifar10.h5": under("cifar10"),
        "cifar100.h5": under(
            "cifar100",
            ("train_y_coarse", "int32"),
            ("test_y_coarse", "int32"),
            ("class_names", "|S1"),
            ("class_names_coarse", "|S5"),
        ),
        "svhn_train_test.h5": under("svhn"),
        "stl10.h5": under("stl", ("unl_X_u8", "uint8"), ("class_names", "|S8")),
    }


def test_cifar10_names_its_classes(publish: Publish) -> None:
    small = small_cifar10()
    publish(small.sources, small.files)
    names = cifar10.CIFAR10(n_val=0).class_names
    assert (len(names), names[0], names[9]) == (10, "airplane", "truck")


@pytest.mark.parametrize("protocol", [2, 4, 5])
def test_cifar10_from_pickles_of_today(publish: Publish, protocol: int) -> None:
    small = small_cifar10(lambda batch: pickle.dumps({k.encode(): v for k, v in batch.items()}, protocol=protocol))
    publish(small.sources, small.files)
    ds = cifar10.CIFAR10(n_val=0)
    assert_split(ds.train_X_u8, ds.train_X, ds.train_y, small.train_X, small.train_y)


def test_a_hostile_pickle_in_a_cifar_archive_runs_nothing(
    publish: Publish, data_home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Hostile:
        def __reduce__(self) -> tuple[Any, ...]:
            return Path.touch, (tmp_path / "owned",)

    small = small_cifar10(lambda batch: pickle.dumps(batch | {"data": Hostile()}))
    publish(small.sources, small.files)
    monkeypatch.setattr(cifar10._SOURCE, "sha256", None)
    with pytest.raises(BadSourceFile, match="asks for pathlib"):
        cifar10.CIFAR10()
    assert not (tmp_path / "owned").exists()
    assert [path for path in data_home.rglob("*") if path.is_file()] == []


def test_cifar100_has_coarse_classes_too(publish: Publish) -> None:
    small = small_cifar100()
    publish(small.sources, small.files)
    ds = cifar100.CIFAR100(n_val=8)
    assert ds.class_names == list("abcdef")
    assert ds.class_names_coarse == ["big", "small"]
    for fine, coarse in (
        (ds.train_y, ds.train_y_coarse),
        (ds.val_y, ds.val_y_coarse),
        (ds.test_y, ds.test_y_coarse),
    ):
        assert coarse.dtype == np.int32
        np.testing.assert_array_equal(coarse, fine // 3)


def test_svhn_extra_is_read_by_the_row(publish: Publish, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(svhn, "_ROWS_PER_WRITE", 8)  # more than one write
    X, y = images(N_TRAIN, 3, 32, 32), labels(N_TRAIN)
    publish(svhn._EXTRA_SOURCES, [published.matlab(X, y)])
    ds = svhn.SVHNExtra()
    assert_split(ds.X_u8, ds.X, ds.y, X, y)
    with tables.open_file(ds.path) as file:
        assert isinstance(file.root.svhn.extra_X_u8, tables.EArray)
        assert file.root.svhn.extra_X_u8.filters.complib.startswith("blosc")
    assert svhn.SVHNExtra(-1.0, 1.0).X[:].min() == -1
    index = np.array([9, 2, 2])
    np.testing.assert_array_equal(ds.X_u8[index], X[index])


def test_svhn_reads_a_file_of_one_image(publish: Publish) -> None:
    X, y = images(1, 3, 32, 32), np.array([0], np.int32)
    publish(svhn._EXTRA_SOURCES, [published.matlab(X, y)])
    ds = svhn.SVHNExtra()
    assert_split(ds.X_u8, ds.X, ds.y, X, y)


@pytest.mark.parametrize("n_folds", [0, None, 1, 2, 4])
def test_stl_validates_on_the_last_folds(publish: Publish, n_folds: int | None) -> None:
    small = small_stl()
    publish(small.sources, small.files)
    ds = stl.STL(n_val_folds=n_folds)
    folds = small.more["folds"]
    chosen = np.concatenate([np.empty(0, int), *folds[len(folds) - (n_folds or 0) :]])
    rest = np.setdiff1d(np.arange(N_TRAIN), chosen)
    assert_split(ds.train_X_u8, ds.train_X, ds.train_y, small.train_X[rest], small.train_y[rest])
    assert_split(ds.val_X_u8, ds.val_X, ds.val_y, small.train_X[chosen], small.train_y[chosen])
    assert_split(ds.test_X_u8, ds.test_X, ds.test_y, small.test_X, small.test_y)
    assert [fold.tolist() for fold in ds.tr_folds] == [fold.tolist() for fold in folds]
    assert ds.class_names == ["airplane", "bird", "car"]
    np.testing.assert_array_equal(np.asarray(ds.unl_X_u8), small.more["unlabelled"])
    assert ds.unl_X.shape == (7, 3, 96, 96)


@pytest.mark.parametrize(("n_folds", "error"), [(5, ValueError), (-1, ValueError), (True, TypeError), (1.0, TypeError)])
def test_stl_refuses_folds_that_are_not(publish: Publish, n_folds: Any, error: type[Exception]) -> None:
    small = small_stl()
    publish(small.sources, small.files)
    with pytest.raises(error, match="n_val_folds"):
        stl.STL(n_val_folds=n_folds)


def test_stl_is_written_in_blocks(publish: Publish, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(formats, "_BLOCK_BYTES", 5 * 3 * 96 * 96)
    small = small_stl()
    publish(small.sources, small.files)
    ds = stl.STL(n_val_folds=0)
    np.testing.assert_array_equal(np.asarray(ds.train_X_u8), small.train_X)
    np.testing.assert_array_equal(np.asarray(ds.unl_X_u8), small.more["unlabelled"])


@pytest.mark.parametrize("stored", [np.float32, np.float64])
def test_usps_is_the_file_itself(
    publish: Publish, data_home: Path, tmp_path: Path, stored: type[np.floating[Any]]
) -> None:
    train_X, test_X = RNG.random((N_TRAIN, 1, 16, 16)).astype(stored), RNG.random((N_TEST, 1, 16, 16)).astype(stored)
    train_y, test_y = labels(N_TRAIN).astype(np.int64), labels(N_TEST).astype(np.int64)
    content = published.usps_h5(
        tmp_path / "usps.h5", {"train_X": train_X, "train_y": train_y, "test_X": test_X, "test_y": test_y}
    )
    publish([usps._SOURCE], [content])
    assert Path(str(usps.usps_data())).read_bytes() == content
    for n_val, split in ((8, N_TRAIN - 8), (0, N_TRAIN), (None, N_TRAIN)):
        ds = usps.USPS(n_val=n_val)
        parts = (
            (ds.train_X, ds.train_y, train_X[:split], train_y[:split]),
            (ds.val_X, ds.val_y, train_X[split:], train_y[split:]),
            (ds.test_X, ds.test_y, test_X, test_y),
        )
        for part_X, part_y, expected_X, expected_y in parts:
            assert (part_X.dtype, part_X.shape) == (np.float32, expected_X.shape)
            np.testing.assert_array_equal(np.asarray(part_X), expected_X.astype(np.float32))
            assert part_y.dtype == np.int32
            np.testing.assert_array_equal(part_y, expected_y)
        batch_X, _ = next(ArrayDataSource([ds.test_X, ds.test_y]).batch_iterator(5, shuffle=3))
        assert (batch_X.shape, batch_X.dtype) == ((5, 1, 16, 16), np.float32)
    assert [path.name for path in (data_home / "data").iterdir()] == ["usps.h5"]
    usps.delete_cache()
    assert list((data_home / "data").iterdir()) == []


def test_usps_that_cannot_be_fetched_is_an_error(publish: Publish, server: FileServer) -> None:
    publish([usps._SOURCE], [b"x"])
    server.files.clear()
    with pytest.raises(RuntimeError, match="could not load USPS"):
        usps.USPS()


def test_every_shipped_source_has_a_digest_and_a_place_of_its_own() -> None:
    targets = [entry.path for entry in CATALOGUE.values()]
    assert len(set(targets)) == len(targets) == 8
    for entry in CATALOGUE.values():
        assert hasattr(__import__(f"mlqueue.batch.datasets.{entry.module}", fromlist=["x"]), entry.class_name)
        for source in entry.fetch.source_files:
            assert isinstance(source, DownloadSourceFile)
            assert source.sha256 is not None
            int(source.sha256, 16)
            assert len(source.sha256) == 64
            assert all(url.startswith(("https://", "http://")) for url in (source.url, *source.mirrors))


def test_sets_are_found_by_name() -> None:
    assert find("Fashion-MNIST").class_name == "FashionMNIST"
    with pytest.raises(UnknownDataset, match="Did you mean cifar10"):
        find("cifar1")
    with pytest.raises(UnknownDataset, match="There are mnist, "):
        find("zzz")


@pytest.mark.parametrize("pool_class", [WorkerThreadPool, WorkerProcessPool])
def test_pools_prepare_the_same_batches_from_the_file(
    publish: Publish, pool_class: type[WorkerThreadPool | WorkerProcessPool]
) -> None:
    small = small_idx(mnist, "MNIST", "mnist.h5")
    publish(small.sources, small.files)
    ds = mnist.MNIST(n_val=0)
    source = ArrayDataSource([ds.train_X, ds.train_y], repeats=2)
    serial = list(source.batch_iterator(7, shuffle=3))
    with pool_class(2) as pool:
        parallel = [
            tuple(np.array(array) for array in batch)
            for batch in pool.parallel_data_source(source).batch_iterator(7, shuffle=3)
        ]
    assert len(serial) == len(parallel)
    for batch, expected in zip(parallel, serial, strict=True):
        for array, expected_array in zip(batch, expected, strict=True):
            np.testing.assert_array_equal(array, expected_array)


def cifar10_with(batch: Any) -> bytes:
    names = [f"data_batch_{k}" for k in range(1, 6)] + ["test_batch"]
    return published.tar({f"cifar-10-batches-py/{name}": pickle.dumps(batch) for name in names})


def cifar100_with(**meta: Any) -> bytes:
    batch = {"data": images(6, 3072), "fine_labels": [0] * 6, "coarse_labels": [0] * 6}
    names = {"fine_label_names": ["a"], "coarse_label_names": ["b"]} | meta
    content = {"train": batch, "test": batch, "meta": names}
    return published.tar({f"cifar-100-python/{name}": pickle.dumps(value) for name, value in content.items()})


def stl_with(**members: bytes) -> bytes:
    content = {
        "train_X.bin": published.stl_binary(images(3, 3, 96, 96)),
        "train_y.bin": bytes([1, 2, 3]),
        "test_X.bin": published.stl_binary(images(2, 3, 96, 96)),
        "test_y.bin": bytes([1, 2]),
        "unlabeled_X.bin": published.stl_binary(images(2, 3, 96, 96)),
        "class_names.txt": b"a\nb\nc\n",
        "fold_indices.txt": b"0 1\n2\n",
    }
    content |= {name.replace("_bin", ".bin").replace("_txt", ".txt"): value for name, value in members.items()}
    return published.tar({f"stl10_binary/{name}": value for name, value in content.items()})


IDX = [
    published.idx(images(4, 28, 28)),
    published.idx(np.arange(4)),
    published.idx(images(2, 28, 28)),
    published.idx(np.arange(2)),
]


@pytest.mark.parametrize(
    ("name", "files", "message"),
    [
        ("mnist", [published.idx(images(4, 16, 16)), *IDX[1:]], "not 28 x 28"),
        ("mnist", [IDX[0], published.idx(np.arange(5)), *IDX[2:]], "expected 4 integer labels"),
        ("mnist", [IDX[0], published.idx(np.arange(4) + 9), *IDX[2:]], "labels run from 9 to 12, allowed are 0 to 9"),
        ("cifar10", [cifar10_with([1, 2])], "expected a dictionary"),
        ("cifar10", [cifar10_with({"labels": [1]})], "expected 'data' to be uint8"),
        ("cifar10", [cifar10_with({"data": images(2, 3071), "labels": [1, 2]})], r"found uint8 of \(2, 3071\)"),
        ("cifar10", [cifar10_with({"data": images(2, 3072), "labels": [1, 2, 3]})], "expected 2 integer labels"),
        ("cifar10", [cifar10_with({"data": images(2, 3072)})], "integer labels"),
        ("cifar100", [cifar100_with(fine_label_names=[])], "expected 'fine_label_names' to be a list of names"),
        ("cifar100", [cifar100_with(coarse_label_names=[1])], "expected 'coarse_label_names' to be a list of names"),
        ("svhn", [published.matlab(images(3, 3, 16, 16), np.arange(3))] * 2, r"expected uint8 of \(32, 32, 3, n\)"),
        ("svhn", [published.matlab(images(3, 3, 32, 32), np.arange(4))] * 2, "expected 3 integer labels"),
        ("stl", [stl_with(train_X_bin=bytes(27648 + 1))], "not a multiple of 27648"),
        ("stl", [stl_with(train_y_bin=bytes([1, 2]))], "expected 3 integer labels"),
        ("stl", [stl_with(test_y_bin=bytes([0, 1]))], "labels run from -1 to 0"),
        ("stl", [stl_with(fold_indices_txt=b"0 one\n")], "something else than numbers"),
        ("stl", [stl_with(fold_indices_txt=b"0 3\n")], "fold 0 goes beyond the 3 training images"),
        ("stl", [stl_with(fold_indices_txt=b"-1\n")], "fold 0 goes beyond"),
    ],
)
def test_content_that_is_not_the_data_sets_is_an_error(
    name: str, files: list[bytes], message: str, publish: Publish, data_home: Path
) -> None:
    module, sources, fetch = {
        "mnist": (mnist, mnist._SOURCES, mnist.fetch_mnist),
        "cifar10": (cifar10, [cifar10._SOURCE], cifar10.fetch_cifar10),
        "cifar100": (cifar100, [cifar100._SOURCE], cifar100.fetch_cifar100),
        "svhn": (svhn, svhn._SVHN_SOURCES, svhn.fetch_svhn_train_test),
        "stl": (stl, [stl._SOURCE], stl.fetch_stl),
    }[name]
    publish(sources, files)
    with pytest.raises(BadSourceFile, match=message):
        fetch()
    assert not Path(fetch.target_path).exists()
    assert not any(".unfinished-" in str(path) for path in data_home.rglob("*"))
    module.delete_cache()
    assert [path for path in data_home.rglob("*") if path.is_file()] == []


def test_files_of_other_shapes_are_refused_when_opened(data_home: Path) -> None:
    (data_home / "data").mkdir(parents=True)
    with tables.open_file(data_home / "data" / "usps.h5", "w") as file:
        group = file.create_group(file.root, "usps", "USPS")
        for name, array in (
            ("train_X", np.zeros((4, 256))),
            ("train_y", labels(4)),
            ("test_X", np.zeros((4, 256))),
            ("test_y", labels(4)),
        ):
            file.create_array(group, name, array)
    with pytest.raises(DatasetFileError, match=r"expected \(4, 1, 16, 16\)"):
        usps.USPS(n_val=1)
    with tables.open_file(data_home / "data" / "usps.h5", "a") as file:
        file.remove_node("/usps/train_y")
        file.create_array(file.root.usps, "train_y", np.zeros((4, 10), np.int32))
    with pytest.raises(DatasetFileError, match="expected one label a row"):
        usps.USPS(n_val=1)


@pytest.mark.parametrize(
    ("package", "use", "cure"),
    [
        ("tables", lambda: mnist.MNIST(), "mlqueue\\[datasets\\]"),
        ("scipy.io", lambda: svhn.fetch_svhn_extra(), "mlqueue\\[datasets\\]"),
        ("platformdirs", lambda: config.get_data_dir(), "set MLQUEUE_DATA_HOME"),
    ],
)
def test_a_package_that_is_not_installed_is_named_with_its_cure(
    package: str, use: Callable[[], object], cure: str, publish: Publish, monkeypatch: pytest.MonkeyPatch
) -> None:
    publish(svhn._EXTRA_SOURCES, [published.matlab(images(3, 3, 32, 32), np.arange(3))])
    publish(mnist._SOURCES, IDX)
    if package == "platformdirs":
        monkeypatch.delenv("MLQUEUE_DATA_HOME")
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(MissingDependency, match=cure):
        use()
