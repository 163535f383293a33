"""Frames of the protocol over a socket: one JSON document behind its length in four bytes."""

import socket
import struct
from typing import Generic, TypeVar

import msgspec

T = TypeVar("T")
_LENGTH = struct.Struct("!I")


def send(connection: socket.socket, message: msgspec.Struct) -> None:
    """Write one message. OSError if the other side is gone."""
    data = msgspec.json.encode(message)
    connection.sendall(_LENGTH.pack(len(data)) + data)


class Frames(Generic[T]):
    """Assembler of one type of message from the bytes of a socket."""

    def __init__(self, kind: type[T]) -> None:
        self._decoder = msgspec.json.Decoder(kind)
        self._data = bytearray()

    def feed(self, data: bytes) -> list[T]:
        """Return the messages that are now complete."""
        self._data += data
        found = []
        while len(self._data) >= _LENGTH.size:
            end = _LENGTH.size + _LENGTH.unpack_from(self._data)[0]
            if len(self._data) < end:
                break
            found.append(self._decoder.decode(self._data[_LENGTH.size : end]))
            del self._data[:end]
        return found
