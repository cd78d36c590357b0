"""Large values beside the record: cut into chunks, and what stands for them in the record of a job.

The arguments and options of a job (its body) of more than `CHUNK` bytes are written in chunks before the job is made,
each with a time to live that the script which makes the job takes away; so of a submitter that dies in between nothing
stays, and no command is larger than a chunk. In the record stands a reference. It begins with the byte C1, as a frame
of the codec does, but goes on differently: nothing else that is a body begins like that.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final, NamedTuple, overload

import msgpack

#: Values of more bytes are cut into chunks of so many.
CHUNK: Final = 4 * 2**20

#: How long a chunk waits for the script that makes it part of a job, in seconds.
CHUNK_TTL: Final = 3600

#: How a reference begins; part_create.lua, part_remove.lua and retry.lua know it too.
REFERENCE: Final = b"\xc1MQa"

#: No reference is longer: it stands in the record itself.
LONGEST: Final = 64


class Chunks(Sequence[bytes]):
    """The chunks of a value, each cut off when it is asked for: all of them would be the value once more."""

    def __init__(self, data: bytes | memoryview) -> None:
        self._data = memoryview(data)

    def __len__(self) -> int:
        return -(-len(self._data) // CHUNK)

    @overload
    def __getitem__(self, index: int) -> bytes: ...
    @overload
    def __getitem__(self, index: slice) -> list[bytes]: ...
    def __getitem__(self, index: int | slice) -> bytes | list[bytes]:
        if isinstance(index, slice):
            return [self[number] for number in range(*index.indices(len(self)))]
        if index >= len(self):
            raise IndexError(index)
        return bytes(self._data[index * CHUNK : (index + 1) * CHUNK])


class BodyReference(NamedTuple):
    """What stands in the record for a body in chunks."""

    #: Tells the chunks from those of another body of the same job; they are ``a<generation>``.
    generation: str
    number: int
    #: In bytes.
    size: int

    @classmethod
    def of(cls, body: bytes | memoryview) -> BodyReference | None:
        """The reference that a body is; None for a body that is one itself."""
        if len(body) > LONGEST or body[: len(REFERENCE)] != REFERENCE:
            return None
        try:
            generation, number, size = msgpack.unpackb(body[len(REFERENCE) :])
        except (ValueError, TypeError):
            return None
        return cls(generation, number, size)

    @property
    def what(self) -> str:
        """The part of the chunks' keys that says whose they are."""
        return f"a{self.generation}"

    def packed(self) -> bytes:
        """As it stands in the record."""
        packed: bytes = msgpack.packb(tuple(self))
        return REFERENCE + packed


__all__ = ["CHUNK", "CHUNK_TTL", "BodyReference", "Chunks"]
