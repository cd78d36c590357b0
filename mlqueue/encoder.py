"""Dramatiq's messages in mlqueue's bytes.

For a broker or result backend of Dramatiq's own that shall carry arrays::

    RedisBackend(url=..., encoder=MessageEncoder())

It is in a module of its own because importing Dramatiq takes far longer than importing the codec.
"""

from __future__ import annotations

from dramatiq.encoder import Encoder, MessageData
from dramatiq.errors import DecodeError as DramatiqDecodeError

from . import codec
from .errors import DecodeError

__all__ = ["MessageEncoder"]


class MessageEncoder(Encoder):
    """A Dramatiq encoder that writes what :mod:`mlqueue.codec` writes.

    Errors name the part of the message: ``args[0]['x']``. Do not pass it to ``dramatiq.set_encoder``, which would
    change the encoder of every broker in the process.
    """

    def __init__(self, *, max_bytes: int = codec.MAX_BYTES) -> None:
        #: How many bytes a message may have.
        self.max_bytes = max_bytes

    def encode(self, data: MessageData) -> bytes:
        """The bytes of a message. Raises :class:`mlqueue.errors.EncodeError`."""
        return codec.encode_fields(data, max_bytes=self.max_bytes)

    def decode(self, data: bytes) -> MessageData:
        """The message of these bytes. Raises Dramatiq's own DecodeError, which its brokers know how to handle."""
        cause: DecodeError | None = None
        try:
            message = codec.decode(data)
            if isinstance(message, dict):
                return message
            what = f"a message is a dict; these bytes are a {type(message).__name__}"
        except DecodeError as error:
            what, cause = str(error), error
        raise DramatiqDecodeError(what, data, cause) from cause
