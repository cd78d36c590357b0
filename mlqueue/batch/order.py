"""The order in which samples are visited: what the ``shuffle`` argument means.

==============================  ======================================================================================
``None``, ``False``             in order
``True``                        numpy's global random state (``numpy.random.seed``)
an ``int``, a ``SeedSequence``  the order is a function of (seed, epoch); nothing is consumed and nothing needs saving
``RandomState``, ``Generator``  its own stream: a ``permutation`` for each epoch, drawn when the epoch begins
any other object                the same; it has to have ``permutation``
==============================  ======================================================================================
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

import numpy as np

from mlqueue.batch.errors import StateError

__all__ = ["KEYED_ABOVE", "KeyedPermutation", "Shuffle", "as_shuffle", "check_batch_size", "member_seed"]

#: Epochs of more samples than this are shuffled by a :class:`KeyedPermutation` when the order comes from a seed:
#: ten million indices are 80 MB.
KEYED_ABOVE = 10_000_000

#: What separates the streams that are drawn from one seed.
_MEMBER, _ORDER, _DRAWS, _NOISE = range(4)


class Indexable(Protocol):
    """What holds the order of one epoch: an array, or a :class:`KeyedPermutation`."""

    def __len__(self) -> int: ...
    def __getitem__(self, positions: slice, /) -> np.ndarray: ...


class Shuffle:
    """A source of orders; see :func:`as_shuffle`."""

    def permutation(self, x: int | np.ndarray, epoch: int) -> Indexable:
        """The order of one epoch: of the indices 0 to x - 1, or of the values of x."""
        raise NotImplementedError

    def shuffle(self, x: np.ndarray, epoch: int) -> None:
        """Put the values of x in random order, in place."""
        raise NotImplementedError

    def draws(self, epoch: int) -> Draws:
        """An endless stream of draws with replacement."""
        raise NotImplementedError

    def for_user(self, epoch: int) -> Any:
        """A generator, with permutation and choice, for a sampler that knows nothing of seeds."""
        raise NotImplementedError

    def noise_entropy(self) -> int:
        """A number from which map functions' generators are derived. Consumes nothing."""
        raise NotImplementedError

    def get_state(self) -> Any:
        """What has to be saved now to draw the same again; plain Python values."""
        raise NotImplementedError

    def set_state(self, state: Any) -> None:
        """Go back to a state that :meth:`get_state` gave."""
        raise NotImplementedError


class Draws(Protocol):
    """Draws with replacement, each index as often as its weight says."""

    def draw(self, cumulative: np.ndarray, size: int) -> np.ndarray:
        """`size` indices as int64, given the cumulative weights (float64, the last one 1)."""
        ...

    def get_state(self) -> Any: ...
    def set_state(self, state: Any) -> None: ...


class SeededShuffle(Shuffle):
    """Orders as a function of (seed, epoch)."""

    def __init__(self, seed: int) -> None:
        self.seed = seed

    def _generator(self, purpose: int, epoch: int) -> np.random.Generator:
        return np.random.Generator(np.random.PCG64(np.random.SeedSequence(self.seed, spawn_key=(purpose, epoch))))

    def permutation(self, x: int | np.ndarray, epoch: int) -> Indexable:
        if isinstance(x, int) and x > KEYED_ABOVE:
            return KeyedPermutation(x, self.seed, epoch)
        order: np.ndarray = self._generator(_ORDER, epoch).permutation(x)
        return order

    def shuffle(self, x: np.ndarray, epoch: int) -> None:
        self._generator(_ORDER, epoch).shuffle(x)

    def draws(self, epoch: int) -> Draws:
        return SeededDraws(np.random.SeedSequence(self.seed, spawn_key=(_DRAWS, epoch)))

    def for_user(self, epoch: int) -> Any:
        return self._generator(_ORDER, epoch)

    def noise_entropy(self) -> int:
        return int(np.random.SeedSequence(self.seed, spawn_key=(_NOISE,)).generate_state(1, np.uint64)[0])

    def get_state(self) -> Any:
        return {"seed": self.seed}

    def set_state(self, state: Any) -> None:
        if not isinstance(state, Mapping) or "seed" not in state:
            raise StateError(
                f"the state was saved with another kind of shuffle ({_kind_of(state)}); this iterator was made with "
                f"the seed {self.seed}. Give the same `shuffle` as when the state was saved."
            )
        if state["seed"] != self.seed:
            raise StateError(
                f"the state was saved with shuffle={state['seed']}, this iterator was made with shuffle={self.seed}; "
                "give the same seed."
            )


class SeededDraws:
    """Draws of which the k-th is a function of (seed, epoch, k)."""

    def __init__(self, seed: np.random.SeedSequence) -> None:
        self._seed = seed
        self._generator = np.random.Generator(np.random.PCG64(seed))
        self._drawn = 0

    def draw(self, cumulative: np.ndarray, size: int) -> np.ndarray:
        self._drawn += size
        return cumulative.searchsorted(self._generator.random(size), side="right")

    def get_state(self) -> Any:
        return {"drawn": self._drawn}

    def set_state(self, state: Any) -> None:
        # One draw takes one step of PCG64, which can be moved on by any number of steps at once.
        bits = np.random.PCG64(self._seed)
        bits.advance(state["drawn"])
        self._generator, self._drawn = np.random.Generator(bits), state["drawn"]


class StreamShuffle(Shuffle):
    """Orders drawn from a random number generator that belongs to the caller."""

    def __init__(self, rng: Any) -> None:
        self.rng = rng
        self._uniform = getattr(rng, "random_sample", None) or getattr(rng, "random", None)

    def permutation(self, x: int | np.ndarray, epoch: int) -> Indexable:
        order: np.ndarray = self.rng.permutation(x)
        return order

    def shuffle(self, x: np.ndarray, epoch: int) -> None:
        self.rng.shuffle(x)

    def draws(self, epoch: int) -> Draws:
        return self

    def draw(self, cumulative: np.ndarray, size: int) -> np.ndarray:
        if self._uniform is None:
            weights = np.diff(cumulative, prepend=0.0)
            return np.asarray(self.rng.choice(len(cumulative), size=size, p=weights))
        # The very draws of rng.choice(n, size=size, p=weights), which sums the weights anew at each call.
        return cumulative.searchsorted(np.asarray(self._uniform(size)), side="right")

    def for_user(self, epoch: int) -> Any:
        return self.rng

    def noise_entropy(self) -> int:
        try:
            state = self.get_state()
        except StateError:
            return int(np.random.SeedSequence().generate_state(1, np.uint64)[0])
        # Imported here: worker processes that only take rows do without it, and so without OpenSSL.
        import hashlib

        return int.from_bytes(hashlib.blake2b(repr(state).encode(), digest_size=8).digest(), "little")

    def get_state(self) -> Any:
        if isinstance(self.rng, np.random.Generator):
            return plain(self.rng.bit_generator.state)
        if hasattr(self.rng, "get_state"):
            return plain(self.rng.get_state(legacy=False))
        raise StateError(
            f"a {type(self.rng).__name__} given as `shuffle` has no state that can be saved; give an int, a "
            "numpy.random.Generator or a numpy.random.RandomState."
        )

    def set_state(self, state: Any) -> None:
        if not isinstance(state, Mapping) or "bit_generator" not in state:
            raise StateError(
                f"the state was saved with another kind of shuffle ({_kind_of(state)}); this iterator was made with a "
                f"{type(self.rng).__name__}. Give the same `shuffle` as when the state was saved."
            )
        try:
            if isinstance(self.rng, np.random.Generator):
                self.rng.bit_generator.state = _arrays(state)
            else:
                self.rng.set_state(_arrays(state))
        except (ValueError, TypeError, AttributeError) as error:
            raise StateError(
                f"the state was saved with a {state['bit_generator']}, which does not fit the "
                f"{type(self.rng).__name__} given as `shuffle`: {error}"
            ) from error


def as_shuffle(shuffle: Any) -> Shuffle | None:
    """What a ``shuffle`` argument means; None for in order. The module's text lists what is allowed."""
    if shuffle is None or isinstance(shuffle, Shuffle):
        return shuffle
    if isinstance(shuffle, bool | np.bool_):
        return StreamShuffle(np.random) if shuffle else None
    if isinstance(shuffle, int | np.integer):
        if shuffle < 0:
            raise ValueError(f"shuffle={shuffle}: a seed must not be negative.")
        return SeededShuffle(int(shuffle))
    if isinstance(shuffle, np.random.SeedSequence):
        return SeededShuffle(seed_of(shuffle))
    if hasattr(shuffle, "permutation"):
        return StreamShuffle(shuffle)
    raise TypeError(
        f"shuffle must be None, a bool, an int (a seed), a numpy.random.SeedSequence, RandomState or Generator, or an "
        f"object with a permutation method; got a {type(shuffle).__name__}."
    )


def seed_of(sequence: np.random.SeedSequence) -> int:
    """The seed, of 128 bits, that a SeedSequence stands for."""
    low, high = (int(word) for word in sequence.generate_state(2, np.uint64))
    return high << 64 | low


def member_seed(shuffle: Any, member: int) -> Any:
    """The ``shuffle`` argument for one member of a composite.

    Members share a random number generator, but must not share a seed: members of equal length would then be shuffled
    alike, and the same samples would meet in every epoch.
    """
    if isinstance(shuffle, np.random.SeedSequence):
        shuffle = seed_of(shuffle)
    if isinstance(shuffle, int | np.integer) and not isinstance(shuffle, bool):
        sequence = np.random.SeedSequence(int(shuffle), spawn_key=(_MEMBER, member))
        return int(sequence.generate_state(1, np.uint64)[0])
    return shuffle


def check_batch_size(batch_size: Any) -> int:
    """The batch size as an int; it must be at least 1."""
    return at_least_one(batch_size, "batch_size")


def at_least_one(value: Any, name: str) -> int:
    """The value, if it is an int of at least 1."""
    number = check_int(value, name)
    if number < 1:
        raise ValueError(f"{name} must be at least 1, got {value}.")
    return number


def check_int(value: Any, name: str) -> int:
    """The value as an int, if it is one, or one of numpy's."""
    if isinstance(value, bool) or not isinstance(value, int | np.integer):
        raise TypeError(f"{name} must be an int, got {value!r}.")
    return int(value)


class KeyedPermutation:
    """A permutation of 0 .. length - 1 that is computed, not stored: a function of (length, seed, epoch).

    A Feistel network over the bits of an index, walked until the result lies within the length. Any part of it costs
    time in proportion to that part (about 0.2 microseconds an index) and memory for one block.

    Bounds: `length` from 1 to 2**62. It reaches at most 2**256 of the length! orders and is no cipher: enough that
    no test of randomness known to us tells it from a drawn permutation at lengths above 1,000, no protection against
    somebody who wants to predict it. Below ten million samples (``KEYED_ABOVE``) a real permutation is drawn instead.

    Indexing with a slice gives an int64 array; with an int, an int.
    """

    #: Indices computed at a time.
    BLOCK = 1 << 16
    _ROUNDS = 8

    def __init__(self, length: int, seed: int, epoch: int = 0) -> None:
        if not 1 <= length <= 1 << 62:
            raise ValueError(f"the length of a keyed permutation must be 1 to 2**62, got {length}.")
        self._length = length
        bits = max(2, (length - 1).bit_length())
        self._low_bits = bits // 2
        self._low_mask = np.uint64((1 << self._low_bits) - 1)
        self._high_mask = np.uint64((1 << (bits - self._low_bits)) - 1)
        sequence = np.random.SeedSequence(seed, spawn_key=(_ORDER, epoch, length))
        self._keys = sequence.generate_state(self._ROUNDS, np.uint64)
        self._places, self._block = range(0), np.empty(0, np.int64)

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, positions: Any) -> Any:
        if not isinstance(positions, slice):
            return int(self.at(np.array([range(self._length)[positions]]))[0])
        wanted = range(self._length)[positions]
        if wanted.step < 1 or not 0 < len(wanted) <= self.BLOCK:
            return self.at(np.arange(wanted.start, wanted.stop, wanted.step))
        if not self._in_block(wanted):
            # Epochs are gone through from the start to the end, so the places behind these are next.
            places = range(wanted.start, self._length, wanted.step)[: self.BLOCK]
            self._places, self._block = places, self.at(np.arange(places.start, places.stop, places.step))
        first = (wanted.start - self._places.start) // wanted.step
        return self._block[first : first + len(wanted)].copy()

    def _in_block(self, wanted: range) -> bool:
        return self._places.step == wanted.step and wanted[0] in self._places and wanted[-1] in self._places

    def at(self, positions: np.ndarray) -> np.ndarray:
        """The values at these positions (1-D, integers from 0 to length - 1), as int64."""
        values = self._permute(positions.astype(np.uint64))
        outside = np.flatnonzero(values >= self._length)
        while outside.size:
            walked = self._permute(values[outside])
            values[outside] = walked
            outside = outside[walked >= self._length]
        return values.astype(np.int64)

    def _permute(self, values: np.ndarray) -> np.ndarray:
        low, high = values & self._low_mask, values >> np.uint64(self._low_bits)
        for number, key in enumerate(self._keys):
            if number % 2:
                low ^= _mix(high, key) & self._low_mask
            else:
                high ^= _mix(low, key) & self._high_mask
        high <<= np.uint64(self._low_bits)
        high |= low
        return high


def _mix(values: np.ndarray, key: np.uint64) -> np.ndarray:
    """Scatter 64-bit integers (the finaliser of Murmur3)."""
    mixed = values + key
    mixed ^= mixed >> np.uint64(33)
    mixed *= np.uint64(0xFF51AFD7ED558CCD)
    mixed ^= mixed >> np.uint64(29)
    mixed *= np.uint64(0xC4CEB9FE1A85EC53)
    mixed ^= mixed >> np.uint64(32)
    return mixed


def plain(state: Any) -> Any:
    """The same as values that JSON and msgpack can hold: arrays become lists."""
    if isinstance(state, Mapping):
        return {key: plain(value) for key, value in state.items()}
    if isinstance(state, np.ndarray):
        return state.tolist()
    return state.item() if isinstance(state, np.generic) else state


def _arrays(state: Any) -> Any:
    if isinstance(state, Mapping):
        return {key: _arrays(value) for key, value in state.items()}
    return np.array(state, np.uint64 if len(state) < 600 else np.uint32) if isinstance(state, list) else state


def _kind_of(state: Any) -> str:
    if state is None:
        return "in order"
    if isinstance(state, Mapping):
        return f"seed {state['seed']}" if "seed" in state else str(state.get("bit_generator", "unknown"))
    return type(state).__name__
