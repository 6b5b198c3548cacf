"""Two engines behind one API (data parallel): each search stays on one, with its prefix cache."""

from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import pytest
from vllm.config import ParallelConfig

from server.local.ranks import Ranks
from tests.server.test_gateway_replicas import CHAT, asked

VOTE = {"kind": "self_consistency", "n": 8, "early_stop": "never"}


def finished(client: httpx.Client) -> Counter[str]:
    """Sequences that each engine has finished."""
    found: Counter[str] = Counter()
    for line in client.get("/metrics").text.splitlines():
        if line.startswith("vllm:request_success_total{"):
            found[line.split('engine="')[1].split('"')[0]] += int(float(line.rsplit(" ", 1)[1]))
    return found


@pytest.fixture(scope="module")
def two(serve: Any, tmp_path_factory: pytest.TempPathFactory):
    with (
        serve(tmp_path_factory.mktemp("two") / "log", "--data-parallel-size", "2") as served,
        httpx.Client(base_url=served.url, timeout=120) as client,
    ):
        yield client


@pytest.mark.slow
def test_a_search_stays_on_one_engine_and_many_use_both(two: httpx.Client):
    before = finished(two)
    reply = two.post(CHAT, json=asked(0, strategy=VOTE)).json()
    alone = finished(two) - before
    assert reply["mull"]["usage"]["engine_calls"] == 8
    assert [*alone.values()] == [8]
    # The samples after the first round read the prompt from that engine's cache.
    with ThreadPoolExecutor(8) as pool:
        replies = [*pool.map(lambda at: two.post(CHAT, json=asked(at, strategy=VOTE)), range(1, 9))]
    assert {one.status_code for one in replies} == {200}
    together = finished(two) - before - alone
    assert together.total() == 64
    assert min(together.values()) >= 24  # searches are as good as shared out


@pytest.mark.slow
def test_a_beam_finds_its_prefixes_and_the_clients_rank_is_obeyed(two: httpx.Client):
    beam = {"kind": "beam_search", "width": 3, "branch": 2}
    before = finished(two)
    for rank in ("0", "1"):
        question = asked(40 + int(rank), strategy=beam)
        reply = two.post(CHAT, json=question, headers={"X-data-parallel-rank": rank})
        assert reply.status_code == 200, reply.text
        usage = reply.json()["mull"]["usage"]
        assert usage["continuation_cached_tokens"] > 0.5 * usage["continuation_prompt_tokens"] > 0
        grown = finished(two) - before
        assert set(grown) == {rank}
        before = finished(two)


def test_the_idlest_engine_is_home_and_one_engine_needs_no_choice():
    ranks = Ranks(ParallelConfig(data_parallel_size=3))
    with ranks.home({}) as first, ranks.home({"priority": 1}) as second:
        assert first == {"data_parallel_rank": 0}
        assert second == {"priority": 1, "data_parallel_rank": 1}
        with ranks.home({"data_parallel_rank": 0}) as named:
            assert named == {"data_parallel_rank": 0}
        with ranks.home({}) as third:
            assert third["data_parallel_rank"] == 2
    assert ranks.searches == [0, 0, 0]
    with Ranks(ParallelConfig()).home({"priority": 2}) as only:
        assert only == {"priority": 2}
