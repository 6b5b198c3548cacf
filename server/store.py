"""Running and recent runs by name, for those who hold the key that started them."""

from collections import OrderedDict
from collections.abc import Generator
from contextlib import contextmanager
from typing import Protocol

from server import logs, metrics
from server.run import Run
from strategies.core.errors import NotFound
from strategies.core.events import Failed


def alone(processes: int) -> None:
    """Refuse to look into this process's memory if there are others that serve the same clients.

    Raises:
        NotFound: There are.
    """
    if processes > 1:
        raise NotFound(
            f"this server has {processes} processes, each with what it ran itself: "
            "to ask for it later, start it with --api-server-count 1"
        )


class Keeper(Protocol):
    """Is given each run that is over, and never waits."""

    def keep(self, run: Run) -> None:
        """Make of it what is to outlive it."""
        ...


class Store:
    """Keeps every running run, and the `kept` that ended last, in memory; others keep the rest."""

    def __init__(self, kept: int, *keepers: Keeper, processes: int = 1) -> None:
        """One of so many `processes`, of which a client cannot say which it means."""
        self._processes = processes
        self._kept = kept
        self._keepers = keepers
        self._running: dict[str, Run] = {}
        self._ended: OrderedDict[str, Run] = OrderedDict()

    @contextmanager
    def keeping(self, run: Run) -> Generator[None]:
        """Keep a run while the block lasts, and then as one that ended."""
        self._running[run.id] = run
        try:
            yield
        finally:
            if not run.trace.over:  # cancelled before it had begun
                run.trace.record(Failed(stopped="cancelled"))
            del self._running[run.id]
            self._ended[run.id] = run
            while len(self._ended) > self._kept:
                self._ended.popitem(last=False)
            metrics.count(run)
            if (tab := run.selection.tab) is not None:
                tab.search(run.usage().generated)
            logs.tell(run)
            for keeper in self._keepers:
                keeper.keep(run)

    def find(self, name: str, owner: str) -> Run:
        """The run of that id, or the newest of that `X-Request-Id`.

        Raises:
            NotFound: There is none, or another key started it; or another process may know it.
        """
        alone(self._processes)
        run = self._running.get(name) or self._ended.get(name)
        if run is not None and run.selection.owner == owner:
            return run
        for runs in (self._running, self._ended):
            for run in reversed(runs.values()):
                if run.selection.request_id == name and run.selection.owner == owner:
                    return run
        raise NotFound(f"there is no trace '{name[:100]}' of yours")
