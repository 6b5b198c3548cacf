"""`mull keys`: makes, lists and revokes keys in the file that servers look at."""

import argparse
import sys
from datetime import UTC, datetime, timedelta
from pathlib import Path

from pydantic import ValidationError
from rich.console import Console
from rich.table import Table

from server.keys.keyring import Key, changing, digest, make, read

_BUDGETS = {
    "requests_per_minute": "requests",
    "tokens_per_minute": "generated tokens, those of candidates and verifiers, too",
    "concurrent": "requests at once",
}


def arguments(parser: argparse.ArgumentParser) -> None:
    """Describe what may be asked."""
    parser.add_argument("--file", type=Path, required=True, help="what servers have in MULL_KEYS")
    asked = parser.add_subparsers(dest="asked", required=True, metavar="what")
    added = asked.add_parser("add", help="make a key, and print it this once")
    added.add_argument("name", help="whose it is; keys of one name share its budgets")
    added.add_argument(
        "--scopes",
        nargs="+",
        choices=("client", "admin"),
        default=["client"],
        help="what it is for",
    )
    added.add_argument("--days", type=float, help="until it expires; else never")
    for budget, what in _BUDGETS.items():
        added.add_argument(f"--{budget.replace('_', '-')}", type=int, help=f"most {what}")
    asked.add_parser("list", help="names, scopes, budgets; never the keys")
    revoked = asked.add_parser("revoke", help="forget one key, or all of a name")
    revoked.add_argument("which", help="a name, or the id of one key")


def run(options: argparse.Namespace) -> int:
    """Do it; return the exit status."""
    try:
        match options.asked:
            case "add":
                _add(options)
            case "revoke":
                _revoke(options.file, options.which)
            case _:
                Console().print(_table(read(options.file)))
    except ValidationError as error:
        first = error.errors()[0]
        print(f"mull: {first['loc'][0]}: {first['msg']}", file=sys.stderr)
        return 2
    except (ValueError, OSError, OverflowError) as error:
        print(f"mull: {error}", file=sys.stderr)
        return 2
    return 0


def _add(options: argparse.Namespace) -> None:
    key, expires = make(), None
    if options.days is not None:
        expires = datetime.now(UTC).replace(microsecond=0) + timedelta(days=options.days)
    kept = Key(
        name=options.name,
        digest=digest(key),
        scopes=tuple(dict.fromkeys(options.scopes)),
        expires=expires,
        **{budget: getattr(options, budget) for budget in _BUDGETS},
    )
    with changing(options.file) as keys:
        keys.append(kept)
    print(f"mull: {kept.id}, of {kept.name}; the key is shown this once:", file=sys.stderr)
    print(key)  # alone on standard output, to be piped to where secrets are kept


def _revoke(file: Path, which: str) -> None:
    with changing(file) as keys:
        left = [one for one in keys if which not in (one.name, one.id)]
        if len(left) == len(keys):
            raise ValueError(f"{file} has no key '{which}'")
        keys[:] = left


def _table(keys: tuple[Key, ...]) -> Table:
    table = Table("id", "name", "scopes", "expires", "requests/min", "tokens/min", "at once")
    for key in keys:
        expires = "never" if key.expires is None else f"{key.expires:%Y-%m-%d %H:%M}"
        budgets = ("" if (of := getattr(key, name)) is None else str(of) for name in _BUDGETS)
        said = f"{expires} (over)" if key.over else expires
        table.add_row(key.id, key.name, " ".join(key.scopes), said, *budgets)
    return table
