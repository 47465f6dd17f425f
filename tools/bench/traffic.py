"""How many bytes this process has really sent to other processes over TCP, as the kernel counts them."""

import os
import socket
import struct
from pathlib import Path

# Offsets into struct tcp_info of <linux/tcp.h>, which only ever grows at its end.
_TCP_INFO_BYTES = 216
_NOTSENT_BYTES = 144  # u32: handed over by the process, and still to be sent
_BYTES_SENT = 200  # u64: payload, repetitions included
_BYTES_RETRANS = 208  # u64: repetitions


class TrafficMeter:
    """Counts what this process's TCP connections carry from the making of the meter on.

    Gloo's collectives go over such connections; those of NCCL do not, nor do pipes between processes.
    Connections that were closed in the meantime are not counted. Linux 4.19 or later.
    """

    def __init__(self) -> None:
        self._before = _sent_by_connection()

    def bytes_sent(self) -> int:
        """Payload bytes that this process has handed to its connections since the meter was made."""
        now = _sent_by_connection()
        return sum(sent - self._before.get(connection, 0) for connection, sent in now.items())


def _sent_by_connection() -> dict[str, int]:
    """By the inode of each connected TCP socket of this process."""
    sent = {}
    for entry in Path("/proc/self/fd").iterdir():
        try:
            target = str(entry.readlink())
            if not target.startswith("socket:"):
                continue
            duplicate = os.dup(int(entry.name))
        except OSError:
            continue  # closed since it was listed
        with socket.socket(fileno=duplicate) as connection:
            if connection.family not in (socket.AF_INET, socket.AF_INET6):
                continue
            if connection.type != socket.SOCK_STREAM:
                continue
            info = connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, _TCP_INFO_BYTES)
        (notsent,) = struct.unpack_from("I", info, _NOTSENT_BYTES)
        bytes_sent, repeated = struct.unpack_from("QQ", info, _BYTES_SENT)
        sent[target] = bytes_sent - repeated + notsent
    return sent
