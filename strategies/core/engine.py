"""What a search needs of a language model, whoever runs it."""

from collections.abc import AsyncGenerator, Collection, Mapping, Sequence
from typing import Any, Protocol

from strategies.core.types import Chunk, Generation, Labels, Turn


class Engine(Protocol):
    """Generates one sequence a call; siblings share whatever prefix cache it has."""

    def generate(self, generation: Generation) -> AsyncGenerator[Chunk, None]:
        """Yield the sequence piece by piece; the last chunk carries `finish_reason`.

        Closing the generator aborts the sequence in the engine. It never yields more than
        `generation.max_tokens` tokens.

        Raises:
            InvalidRequest: The engine refuses the request.
            EngineUnavailable: The engine is dead or full.
        """
        ...

    @property
    def longest(self) -> int:
        """Tokens that a prompt may have."""
        ...

    @property
    def ends(self) -> Sequence[int]:
        """The tokens with which a sequence ends itself, the usual one first."""
        ...

    async def render(self, turns: Sequence[Turn]) -> tuple[int, ...]:
        """A conversation as the model reads it when it is to answer.

        Raises:
            InvalidRequest: The model has no template for it, or it is too long.
        """
        ...

    async def encode(self, text: str) -> tuple[int, ...]:
        """Words as tokens, with nothing added."""
        ...

    async def decode(self, token_ids: Sequence[int]) -> str:
        """Tokens in words."""
        ...

    def labels(self, adapter: str) -> Labels:
        """The labels of an adapter that judges.

        Raises:
            InvalidRequest: There is no such adapter, or it does not judge.
        """
        ...

    async def tokens_with(self, text: str) -> Collection[int]:
        """The ids of all tokens in which this text is whole: those that may end a step.

        Raises:
            InvalidRequest: They are too many to look for.
        """
        ...

    async def abort(self, indices: Collection[int]) -> None:
        """End these generations now: each reader gets what was generated, then reason `abort`.

        Nothing that was generated is lost to the account, as it would be by closing the reader.
        An index that is not being generated is passed over; one that comes later ends at once.
        """
        ...


class Remote(Protocol):
    """Model servers with names, which a verifier may ask."""

    async def post(self, name: str, body: Mapping[str, object], index: int) -> dict[str, Any]:
        """What the server of that name answers to a call, which has its number within the run.

        Raises:
            VerifierFailed: It does not answer, or with an error.
        """
        ...
