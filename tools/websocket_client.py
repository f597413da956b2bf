"""The receiving half of a WebSocket (RFC 6455), enough to follow a ComfyUI server.

The demo has nothing but the standard library, and what ComfyUI sends is text frames.
"""

from __future__ import annotations

import base64
import os
import select
import socket
import struct

TEXT, BINARY, CLOSE, PING, PONG = 0x1, 0x2, 0x8, 0x9, 0xA


class WebSocket:
    """An open connection; `receive` returns one whole message at a time."""

    def __init__(self, host: str, port: int, path: str, timeout: float = 10.0):
        self._socket = socket.create_connection((host, port), timeout)
        self._buffer = b""
        self._message = b""
        self._kind = TEXT
        key = base64.b64encode(os.urandom(16)).decode()
        self._socket.sendall(
            f"GET {path} HTTP/1.1\r\nHost: {host}:{port}\r\nUpgrade: websocket\r\n"
            f"Connection: Upgrade\r\nSec-WebSocket-Key: {key}\r\n"
            "Sec-WebSocket-Version: 13\r\n\r\n".encode()
        )
        while b"\r\n\r\n" not in self._buffer:
            self._fill()
        answer, self._buffer = self._buffer.split(b"\r\n\r\n", 1)
        if b" 101 " not in answer.split(b"\r\n", 1)[0]:
            self.close()
            raise ConnectionError(f"no websocket at {path}: {answer.decode(errors='replace')}")

    def receive(self, timeout: float) -> str | bytes | None:
        """The next message, text as str; None when none came within `timeout` seconds.

        Raises ConnectionError when the server closes. A message that began to arrive before the
        timeout is kept and continued by the next call.
        """
        while True:
            frame = self._frame()
            if frame is None:
                if not select.select([self._socket], [], [], max(timeout, 0.0))[0]:
                    return None
                self._fill()
                continue
            final, kind, payload = frame
            if kind == CLOSE:
                raise ConnectionError("the server closed the websocket")
            if kind == PING:
                self._send(PONG, payload)
            elif kind != PONG:
                self._kind = kind or self._kind  # 0 continues the message before
                self._message += payload
                if final:
                    message, self._message = self._message, b""
                    return message.decode() if self._kind == TEXT else message

    def close(self) -> None:
        self._socket.close()

    def _fill(self) -> None:
        received = self._socket.recv(1 << 16)
        if not received:
            raise ConnectionError("the server closed the connection")
        self._buffer += received

    def _frame(self) -> tuple[bool, int, bytes] | None:
        """(final, kind, payload) of the first frame in the buffer; None while it is incomplete."""
        data = self._buffer
        if len(data) < 2:
            return None
        length, start = data[1] & 0x7F, 2
        if length >= 126:
            size = 2 if length == 126 else 8
            start += size
            if len(data) < start:
                return None
            length = int.from_bytes(data[2:start], "big")
        if len(data) < start + length:
            return None
        self._buffer = data[start + length :]
        return bool(data[0] & 0x80), data[0] & 0x0F, data[start : start + length]

    def _send(self, kind: int, payload: bytes) -> None:
        """Sends one short frame (up to 125 bytes), masked as a client must."""
        mask = os.urandom(4)
        masked = bytes(byte ^ mask[i % 4] for i, byte in enumerate(payload))
        self._socket.sendall(struct.pack("!BB", 0x80 | kind, 0x80 | len(payload)) + mask + masked)
