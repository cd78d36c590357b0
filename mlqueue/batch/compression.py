"""Whether to compress batches on their way to another host: only while a probe of real ones says that it pays.

The first batches go as they are, and it is measured how fast. Then one is compressed and taken apart again with what is
installed (lz4, zstd). Where that and sending what comes of it takes less time than sending the batch as it is, those
that follow are compressed; after a while it is looked again, since links and batches change.
"""

from __future__ import annotations

import importlib
import logging
import statistics
import time
from collections.abc import Callable
from functools import lru_cache, partial
from typing import Any, Final, NamedTuple

__all__ = ["NAMES", "Compression", "unpack"]

logger = logging.getLogger("mlqueue.batches")

#: How a body is packed, as frames say it.
RAW, LZ4, ZSTD = 0, 1, 2
NAMES: Final = {LZ4: "lz4", ZSTD: "zstd"}

#: Bodies of fewer bytes are sent as they are.
SMALLEST: Final = 1 << 16
#: How many bodies are sent as they are, and measured, before it is decided.
PROBES: Final = 3
#: After how many bodies it is decided anew.
AGAIN: Final = 500
#: How many bytes of a body are tried.
SAMPLE: Final = 1 << 22
#: What compressing may cost of the time that it is to save: what is measured is not that exact.
WORTH: Final = 0.9


class Codec(NamedTuple):
    """A way to compress."""

    pack: Callable[[Any], bytes]
    #: Packed bytes and the size of what is in them. Raises any exception for what was not packed so, or is larger.
    unpack: Callable[[Any, int], bytes]


@lru_cache(maxsize=1)
def codecs() -> dict[int, Codec]:
    """What is installed."""
    found = {}
    try:
        import lz4.block

        found[LZ4] = Codec(
            partial(lz4.block.compress, store_size=False),
            lambda packed, size: bytes(lz4.block.decompress(packed, uncompressed_size=size)),
        )
    except ImportError:
        pass
    try:
        import zstandard

        found[ZSTD] = Codec(lambda body: bytes(zstandard.ZstdCompressor(level=1).compress(body)), _unpack_zstd)
    except ImportError:
        pass
    return found


def _unpack_zstd(packed: Any, size: int) -> bytes:
    zstandard = importlib.import_module("zstandard")
    # The frame itself says how large it is, and that much is made room for: it has to be what was announced.
    if zstandard.frame_content_size(packed) != size:
        raise ValueError("a compressed batch is not of the size that was announced.")
    unpacked: bytes = zstandard.ZstdDecompressor().decompress(packed)
    return unpacked


def unpack(codec: int, packed: Any, target: memoryview) -> None:
    """Unpack into memory that is as large as the content. Raises ValueError, whatever is wrong with it."""
    known = codecs().get(codec)
    if known is None:
        raise ValueError(
            f"a batch came compressed with {NAMES.get(codec, codec)}, which is not installed here; "
            "pip install 'mlqueue[compression]', or set MLQUEUE_BATCHES_COMPRESS=off for the workers."
        )
    try:
        content = known.unpack(packed, len(target))
    except Exception as error:  # noqa: BLE001 - each library has its own
        raise ValueError(f"a compressed batch cannot be read: {type(error).__name__}: {error}") from None
    if len(content) != len(target):
        raise ValueError("a compressed batch is not of the size that was announced.")
    target[:] = content


class Compression:
    """What a worker decides for one trainer. Used by the thread that sends.

    `allowed`: what the trainer can read, by the numbers of `NAMES`.
    """

    def __init__(self, allowed: list[int]) -> None:
        self._codecs = {number: codec for number, codec in codecs().items() if number in allowed}
        self._chosen = RAW
        self._probes = PROBES
        self._until = AGAIN
        self._rates: list[float] = []

    def is_probing(self, size: int) -> bool:
        """Whether it has to be measured how long a body of this size takes."""
        return bool(self._codecs) and self._probes > 0 and size >= SMALLEST

    def pack(self, body: memoryview) -> tuple[int, Any]:
        """How the body is to go, and what is to be sent."""
        if not self._codecs or self._probes or len(body) < SMALLEST:
            return RAW, body
        self._until -= 1
        if not self._until:
            self._probes, self._until = PROBES, AGAIN
            return RAW, body
        if self._chosen == RAW:
            return RAW, body
        packed = self._codecs[self._chosen].pack(body)
        return (self._chosen, packed) if len(packed) < len(body) else (RAW, body)

    def note(self, body: memoryview, seconds: float) -> None:
        """A body has taken so long to arrive as it is."""
        self._rates.append(len(body) / max(seconds, 1e-6))
        self._probes -= 1
        if not self._probes:
            self._decide(body[:SAMPLE], statistics.median(self._rates))
            self._rates.clear()

    def _decide(self, sample: memoryview, rate: float) -> None:
        before, self._chosen = self._chosen, RAW
        least = WORTH * len(sample) / rate
        for number, codec in self._codecs.items():
            begun = time.perf_counter()
            packed = codec.pack(sample)
            codec.unpack(packed, len(sample))
            needed = time.perf_counter() - begun + len(packed) / rate
            if needed < least:
                least, self._chosen = needed, number
        if self._chosen != before:
            way = f"compressed with {NAMES[self._chosen]}" if self._chosen else "as they are"
            logger.info("batches go to the trainer %s from now on (the link carries %.0f MB/s)", way, rate / 1e6)
