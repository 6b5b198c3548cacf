"""Where a search runs when vLLM has several engines (data parallel): all of it on one.

vLLM balances sequence by sequence, and each engine has a prefix cache of its own; so siblings that
are spread would read their prompt on every engine, and a step would miss what its parent left.
"""

from collections.abc import Generator, Mapping
from contextlib import contextmanager
from typing import Any

from vllm.config import ParallelConfig


class Ranks:
    """The engines of one client, each with the searches that run there."""

    def __init__(self, config: ParallelConfig) -> None:
        local = config.local_engines_only
        size = config.data_parallel_size_local if local else config.data_parallel_size
        self.searches = [0] * size
        self._first = max(0, getattr(config, "_api_process_rank", 0))
        """Where this one of several API processes, none of which knows of the others, begins."""

    @contextmanager
    def home(self, options: Mapping[str, Any]) -> Generator[dict[str, Any]]:
        """The arguments of `generate` with an engine: the client's own choice, else the idlest."""
        if len(self.searches) == 1 or options.get("data_parallel_rank") is not None:
            yield dict(options)
            return
        size = len(self.searches)
        rank = min(range(size), key=lambda at: (self.searches[at], (at - self._first) % size))
        self.searches[rank] += 1
        try:
            yield {**options, "data_parallel_rank": rank}
        finally:
            self.searches[rank] -= 1
