"""Slots of shared memory: what is written arrives, memory is used again when it is free and never before."""

import gc
import os
import pickle
import socket
import subprocess
import sys
import threading

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst

from mlqueue.batch import transport
from mlqueue.batch.transport import Recycler, Segment, SlotArena, SlotWriter, TransportError


def dump(value, keep_buffer):
    return pickle.dumps(value, protocol=5, buffer_callback=keep_buffer)


def load(body, buffers):
    return pickle.loads(body, buffers=buffers)


def quiet(number, segment):
    """For arenas whose slots are filled in the same process."""


def send(arena, batch, how, *, pickles=False):
    """Write a batch into a slot of the arena, and read it."""
    number, segment = arena.take()
    writer = SlotWriter(segment, dump if pickles else None)
    writer.begin()
    place, length = writer.write(batch)
    return number, arena.read(number, place, length, how, load if pickles else None)


def assert_same(a, b):
    assert type(a) is type(b)
    if isinstance(a, np.ndarray):
        assert (a.dtype, a.shape) == (b.dtype, b.shape)
        np.testing.assert_array_equal(a, b)
    elif isinstance(a, tuple | list):
        assert len(a) == len(b)
        for x, y in zip(a, b, strict=True):
            assert_same(x, y)
    elif isinstance(a, dict):
        assert list(a) == list(b)
        for name in a:
            assert_same(a[name], b[name])
    else:
        assert a == b or (a != a and b != b)


def open_fds():
    return len(os.listdir("/proc/self/fd"))


arrays = npst.arrays(
    st.one_of(
        npst.boolean_dtypes(),
        npst.integer_dtypes(endianness="?"),
        npst.floating_dtypes(endianness="?"),
        npst.complex_number_dtypes(),
        npst.unicode_string_dtypes(),
        npst.byte_string_dtypes(),
        npst.datetime64_dtypes(),
        npst.array_dtypes(npst.integer_dtypes()),
    ),
    npst.array_shapes(min_dims=0, max_dims=3, min_side=0, max_side=4),
)
batches = st.recursive(
    arrays | st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda part: (
        st.lists(part, max_size=3).map(tuple)
        | st.lists(part, max_size=3)
        | st.dictionaries(st.text(max_size=3), part, max_size=3)
    ),
    max_leaves=6,
)


class TestContent:
    @settings(max_examples=150, deadline=None)
    @given(batch=batches, how=st.sampled_from(["lend", "copy", "view"]))
    def test_any_batch_arrives_as_it_was(self, batch, how):
        arena = SlotArena(quiet, small=0)
        _, got = send(arena, batch, how)
        assert_same(batch, got)

    @pytest.mark.parametrize("scalar", [np.float32(1.5), np.int64(-3), np.datetime64(7, "s"), np.str_("é"), np.True_])
    def test_numpy_scalars_keep_their_type(self, scalar):
        _, got = send(SlotArena(quiet), (scalar,), "copy")
        assert type(got[0]) is type(scalar)
        assert got[0] == scalar

    def test_arrays_that_are_not_contiguous_arrive(self):
        x = np.arange(60).reshape(3, 4, 5)
        batch = (x[:, ::2], x.T, np.asfortranarray(x), x[::-1], np.broadcast_to(np.float32(3), (4, 2)))
        _, got = send(SlotArena(quiet), batch, "copy")
        for a, b in zip(batch, got, strict=True):
            np.testing.assert_array_equal(a, b)

    def test_other_objects_are_pickled_with_their_arrays_beside_them(self):
        value = ({1, 2}, np.array([[1], None], dtype=object), np.ma.masked_array([1, 2], [True, False]), 3 + 4j)
        for how in ("lend", "copy", "view"):
            _, got = send(SlotArena(quiet, small=0), value, how, pickles=True)
            assert got[0] == {1, 2}
            assert got[1].tolist() == [[1], None]
            assert got[2].tolist() == [None, 2]
            assert got[3] == 3 + 4j

    def test_a_copied_pickle_does_not_share_the_slot(self):
        class Holder:
            def __init__(self, x):
                self.x = x

            def __reduce__(self):
                return np.asarray, (self.x,)

        arena = SlotArena(quiet)
        _, got = send(arena, (Holder(np.arange(100)),), "copy", pickles=True)
        send(arena, (np.zeros(1000),), "copy")
        assert got[0].tolist() == list(range(100))

    def test_without_pickles_other_objects_are_refused_on_both_sides(self):
        with pytest.raises(TypeError, match="a set cannot travel"):
            send(SlotArena(quiet), ({1},), "copy")
        arena = SlotArena(quiet)
        number, segment = arena.take()
        place, length = SlotWriter(segment, dump).write(({1},))
        with pytest.raises(TransportError, match="holds a pickle"):
            arena.read(number, place, length, "copy")


class TestInPlace:
    def test_arrays_made_in_the_slot_are_not_copied(self):
        arena = SlotArena(quiet, small=0)
        number, segment = arena.take()
        writer = SlotWriter(segment)
        writer.begin()
        made = writer.empty((1000, 7), np.float32)
        made[:] = np.arange(7)
        place, length = writer.write((made, made[10:20]))
        # Both lie where the first was made: nothing but the description follows it.
        assert place - made.nbytes < 2 * transport.ALIGNMENT
        whole, part = arena.read(number, place, length, "lend")
        made[10, 0] = 99
        assert whole[10, 0] == 99
        assert part[0, 0] == 99

    def test_arrays_are_aligned(self):
        writer = SlotWriter(Segment.create())
        writer.begin(65)
        for shape in [(3,), (1, 1), 7, ()]:
            assert writer.empty(shape, np.uint8).__array_interface__["data"][0] % transport.ALIGNMENT == 0

    def test_arrays_made_before_the_slot_grew_are_in_it_still(self):
        arena = SlotArena(quiet)
        number, segment = arena.take()
        writer = SlotWriter(segment)
        small = writer.empty(10, np.int64)
        small[:] = 5
        big = writer.empty(10_000_000, np.uint8)
        big[:] = 7
        got = arena.read(number, *writer.write((small, big)), "copy")
        assert got[0].tolist() == [5] * 10
        assert (got[1] == 7).all()

    def test_objects_are_made_elsewhere(self):
        writer = SlotWriter(Segment.create(), dump)
        assert writer.empty(3, object).dtype == object


class TestLending:
    def test_a_slot_comes_back_with_the_last_array_over_it(self):
        arena = SlotArena(quiet, small=0)
        number, (x, y) = send(arena, (np.arange(1000), np.ones((4, 4))), "lend")
        part = y[1:].reshape(-1)[::2].reshape(2, 3).T
        other, _ = send(arena, (np.zeros(1000),), "copy")
        assert other != number
        del x
        assert arena.lent == 1
        del y
        assert arena.lent == 1
        del part
        gc.collect()
        assert (arena.lent, arena.free, arena.busy) == (0, 2, 0)

    def test_lent_arrays_can_be_written_and_stay_as_they_are(self):
        arena = SlotArena(quiet, small=0)
        kept = [send(arena, (np.full(5000, n),), "lend")[1][0] for n in range(20)]
        kept[3][0] = -1
        assert arena.lent == arena.most_lent
        assert len(arena.slots) == arena.most_lent + 1
        assert all(array.flags.writeable for array in kept)
        assert [array[1] for array in kept] == list(range(20))

    def test_small_batches_are_copied(self):
        arena = SlotArena(quiet)
        _, (x,) = send(arena, (np.arange(10),), "lend")
        assert arena.lent == 0
        assert x.flags.owndata
        assert x.flags.writeable

    def test_arrays_outlive_the_arena(self):
        arena = SlotArena(quiet, small=0)
        _, (x,) = send(arena, (np.arange(1000),), "lend")
        arena.close()
        del arena
        gc.collect()
        assert x.sum() == 499500

    def test_views_cannot_be_written_and_the_slot_waits_for_release(self):
        arena = SlotArena(quiet)
        number, (x,) = send(arena, (np.arange(10),), "view")
        assert arena.busy == 1
        with pytest.raises(ValueError, match="read-only"):
            x[0] = 1
        arena.release(number)
        assert send(arena, (np.arange(10, 20),), "view")[0] == number
        assert x.tolist() == list(range(10, 20))


class TestSegment:
    def test_no_room_is_an_error_that_says_so(self):
        segment = Segment.create()
        with pytest.raises(TransportError, match=r"no memory for a slot of 1,[0-9,]+ bytes \([0-9,]+ bytes are free"):
            segment.grow(1 << 60)
        segment.set_word(0, 7)
        assert segment.word(0) == 7

    def test_an_end_outside_the_segment_is_refused(self):
        segment = Segment.create()
        with pytest.raises(TransportError, match="ends at byte"):
            segment.cover(segment.size + 1)

    def test_another_process_fills_a_slot_and_nothing_is_left(self):
        before, shm_before = open_fds(), set(os.listdir("/dev/shm"))
        program = """
import socket, sys
import numpy as np
from mlqueue.batch.transport import Segment, SlotWriter, receive_record
connection = socket.socket(fileno=int(sys.argv[1]))
record, fd = receive_record(connection, 4)
assert record == b"slot"
writer = SlotWriter(Segment.attach(fd))
writer.begin(200)
image = writer.empty((300, 1000), np.uint16)
image[:] = np.arange(1000)
place, length = writer.write({"image": image, "label": np.array([3])})
connection.sendall(place.to_bytes(8, "little") + length.to_bytes(8, "little"))
"""
        arena = SlotArena(quiet, small=0)
        number, segment = arena.take()
        ours, theirs = socket.socketpair()
        with ours, theirs:
            process = subprocess.Popen(
                [sys.executable, "-c", program, str(theirs.fileno())],
                pass_fds=[theirs.fileno()],
                env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
            )
            theirs.close()
            transport.send_record(ours, b"slot", segment.fd)
            ours.settimeout(30)
            answer, fd = transport.receive_record(ours, 16)
            assert process.wait(30) == 0
            with pytest.raises(EOFError):
                transport.receive_record(ours, 1)
        assert fd is None
        batch = arena.read(number, int.from_bytes(answer[:8], "little"), int.from_bytes(answer[8:], "little"), "lend")
        assert batch["image"].shape == (300, 1000)
        assert (batch["image"] == np.arange(1000)).all()
        assert batch["label"].tolist() == [3]
        arena.close()
        del batch, segment, arena
        gc.collect()
        assert open_fds() == before
        assert set(os.listdir("/dev/shm")) == shm_before

    def test_where_there_is_no_memfd_a_file_without_a_name_serves(self, monkeypatch, tmp_path):
        monkeypatch.delattr(os, "memfd_create", raising=False)
        monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
        arena = SlotArena(quiet, small=0)
        _, (x,) = send(arena, (np.arange(100_000),), "lend")
        assert x.sum() == 4999950000
        assert list(tmp_path.iterdir()) == []

    def test_where_room_cannot_be_asked_for_it_is_taken_at_once(self, monkeypatch):
        monkeypatch.delattr(os, "posix_fallocate", raising=False)
        segment = Segment.create()
        segment.grow(40_000_000)
        assert os.fstat(segment.fd).st_blocks * 512 >= segment.size >= 40_000_000

    def test_private_bytes_are_seen_here_only(self):
        segment = Segment.create()
        segment.memory[100] = 5
        private = segment.as_private_bytes()
        private[100] = 9
        assert segment.memory[100] == 5
        assert private[100] == 9


class TestRecycler:
    def test_memory_is_used_again_when_the_last_view_is_gone(self):
        recycler = Recycler()
        first = recycler.empty((1000, 100), np.float32)
        address = first.__array_interface__["data"][0]
        part = first[500:].T
        del first
        assert recycler.empty((1000, 100), np.float32).__array_interface__["data"][0] != address
        del part
        addresses = {recycler.empty((1000, 100), np.float32).__array_interface__["data"][0] for _ in range(3)}
        kept = [recycler.empty((1000, 100), np.float32) for _ in range(2)]
        assert address in addresses | {array.__array_interface__["data"][0] for array in kept}

    def test_arrays_in_use_never_share_memory(self):
        recycler, failures = Recycler(), []

        def work(seed):
            rng, held = np.random.default_rng(seed), []
            for step in range(300):
                array = recycler.empty((int(rng.integers(20_000, 60_000)),), np.int64)
                array[:] = seed * 1000 + step
                held.append((array[5:], seed * 1000 + step))
                if len(held) > 5:
                    array, value = held.pop(int(rng.integers(len(held))))
                    if not (array == value).all():
                        failures.append(value)

        threads = [threading.Thread(target=work, args=(seed,)) for seed in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
        assert failures == []

    def test_what_is_kept_free_is_bounded(self):
        recycler = Recycler(most_idle=2_400_000)
        arrays = [recycler.empty((100_000,), np.float64) for _ in range(10)]
        del arrays
        gc.collect()
        assert len(recycler._free) == 3
        assert recycler._in_use == {}

    @pytest.mark.parametrize(("shape", "dtype"), [((3,), "f4"), (5, "i8"), ((100_000,), object), ((), "u1")])
    def test_small_arrays_and_objects_are_plain(self, shape, dtype):
        assert Recycler().empty(shape, dtype).flags.owndata
