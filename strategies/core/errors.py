"""One tree of errors.

The server maps each leaf to an HTTP status, so an error cannot look like an answer.
"""


class MullError(Exception):
    """Anything that ends a request without an answer."""


class InvalidRequest(MullError):
    """The request asks for something that is refused; `field` names the part at fault."""

    def __init__(self, message: str, *, field: str | None = None) -> None:
        super().__init__(message)
        self.field = field


class NoCandidate(MullError):
    """The budget or the deadline ran out before a single candidate existed."""


class VerifierFailed(MullError):
    """A verifier could not give an opinion.

    A missing score is never replaced by a neutral number.
    """


class BudgetSpent(MullError):
    """The deadline passed, or the tokens ran out; whoever asked makes do with what there is."""


class EngineUnavailable(MullError):
    """The engine died or refuses work; the request may be tried again."""


class StorageFailed(MullError):
    """A disk is full, or cannot be written; nothing was changed."""


class Busy(MullError):
    """Too much runs already; the request may come again after `seconds`."""

    def __init__(self, message: str, *, seconds: int, scarce: str | None = None) -> None:
        """`scarce` is what there is not enough of: a word of the code, never of a client."""
        super().__init__(message)
        self.seconds = seconds
        self.scarce = scarce


class Unauthorized(MullError):
    """A key is missing, or is the wrong one."""


class Forbidden(MullError):
    """Nobody may do this here."""


class NotFound(MullError):
    """There is no such thing, or it belongs to somebody else."""
