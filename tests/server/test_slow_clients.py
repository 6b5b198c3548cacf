"""Clients that send or read next to nothing: they wait, and nobody else does."""

import asyncio
import json
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from urllib.parse import urlsplit

import httpx
import pytest

CHAT = "/v1/chat/completions"
BODY: dict[str, Any] = {
    "model": "mull-tiny",
    "messages": [{"role": "user", "content": "Use the numbers 3, 5, 2 with + - * / to make 16."}],
    "seed": 7,
    "max_tokens": 100,
}
MUCH = BODY | {
    "ignore_eos": True,
    "max_tokens": 400,
    "logprobs": True,
    "top_logprobs": 20,
    "stream": True,
    "strategy": {"kind": "self_consistency", "n": 2, "early_stop": "never"},
}
"""A stream of some hundred kilobytes, more than the sockets below hold."""


@contextmanager
def connections(url: str, count: int, said: bytes) -> Iterator[list[socket.socket]]:
    """So many, each of which said this and takes in next to nothing."""
    place = urlsplit(url)
    opened: list[socket.socket] = []
    try:
        for _ in range(count):
            one = socket.socket()
            one.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
            one.connect((place.hostname, place.port))
            one.sendall(said)
            opened.append(one)
        yield opened
    finally:
        for one in opened:
            one.close()


def request(body: dict[str, Any]) -> bytes:
    raw = json.dumps(body).encode()
    head = f"POST {CHAT} HTTP/1.1\r\nHost: mull\r\nContent-Type: application/json\r\n"
    return f"{head}Content-Length: {len(raw)}\r\n\r\n".encode() + raw


@pytest.mark.slow
async def test_who_reads_nothing_holds_no_place_and_nobody_up(server, running):
    async with httpx.AsyncClient(base_url=server.url, timeout=60) as client:
        with connections(server.url, 16, request(MUCH)) as opened:
            async with asyncio.timeout(20):
                while await running(client) == 0:
                    await asyncio.sleep(0.02)
            began = time.monotonic()
            assert (await client.get("/health")).status_code == 200
            assert time.monotonic() - began < 1
            reply = await client.post(CHAT, json=BODY | {"strategy": "self_consistency"})
            assert reply.status_code == 200
            async with asyncio.timeout(60):  # all have been answered, though nobody read it
                while await running(client) > 0:
                    await asyncio.sleep(0.1)
            heard = b""
            while not heard.endswith(b"0\r\n\r\n"):
                heard += opened[0].recv(1 << 16)
        assert b"data: [DONE]" in heard
        assert len(heard) > 200_000


async def test_who_says_only_half_holds_no_place(server, running):
    half = request(BODY | {"strategy": "self_consistency"})[:-10]
    async with httpx.AsyncClient(base_url=server.url, timeout=60) as client:
        with connections(server.url, 200, half) as opened:
            reply = await client.post(CHAT, json=BODY | {"strategy": "self_consistency"})
            assert reply.status_code == 200
            assert await running(client) == 0
            opened[0].sendall(request(BODY | {"strategy": "self_consistency"})[-10:])
            assert opened[0].recv(100).startswith(b"HTTP/1.1 200")
