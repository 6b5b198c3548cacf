"""`mull adapters`: what an operator does with adapters, over a server's API."""

import argparse
from typing import Any

import httpx
from pydantic import SecretStr
from rich.console import Console
from rich.table import Table


def arguments(parser: argparse.ArgumentParser) -> None:
    """Describe what may be asked."""
    parser.add_argument("--url", default="http://127.0.0.1:8000", help="default %(default)s")
    parser.add_argument("--api-key", help="the server's, if it was started with one")
    asked = parser.add_subparsers(dest="asked", required=True, metavar="what")
    asked.add_parser("list", help="versions, their evaluations, and aliases")
    taken = asked.add_parser("import", help="take in a folder as peft saves it")
    taken.add_argument("name", help="of the version, before its digest")
    taken.add_argument("path", help="of the folder, where the server's MULL_ADAPTER_IMPORTS is")
    taken.add_argument("--alias", help="a name that is to mean it at once")
    pointed = asked.add_parser("point", help="let an alias mean a version, or several by shares")
    pointed.add_argument("alias")
    pointed.add_argument("versions", nargs="+", metavar="VERSION[=SHARE]")
    pointed.add_argument(
        "--pinned",
        action=argparse.BooleanOptionalAction,
        help="whether what it means stays in the engine; as it was, if not said",
    )
    rolled = asked.add_parser("rollback", help="let an alias mean what it meant before")
    rolled.add_argument("alias")
    removed = asked.add_parser("remove", help="forget an alias, or delete a version")
    removed.add_argument("name")


def run(options: argparse.Namespace, key: SecretStr | None) -> int:
    """Ask the server; return the exit status."""
    console = Console()
    headers = {} if key is None else {"X-Mull-Admin-Key": key.get_secret_value()}
    if options.api_key:
        headers["Authorization"] = f"Bearer {options.api_key}"
    method, path, body = _request(options)
    try:
        reply = httpx.request(
            method, f"{options.url}/v1/adapters{path}", json=body, headers=headers, timeout=600
        )
    except httpx.HTTPError as error:
        console.print(f"[red]no server at {options.url}:[/] {error}")
        return 1
    if reply.status_code >= 400:
        console.print(f"[red]refused ({reply.status_code}):[/] {_reason(reply)}", soft_wrap=True)
        return 1
    if options.asked == "list":
        console.print(_table(reply.json()))
    else:
        console.print_json(data=reply.json())
    return 0


def _request(options: argparse.Namespace) -> tuple[str, str, Any]:
    match options.asked:
        case "import":
            alias = {} if options.alias is None else {"alias": options.alias}
            return "POST", "", {"name": options.name, "path": options.path} | alias
        case "point":
            shares = [one.partition("=") for one in options.versions]
            whole = 1 / len(shares)
            versions = {id: float(share) if share else whole for id, _, share in shares}
            pinned = {} if options.pinned is None else {"pinned": options.pinned}
            return "PUT", f"/{options.alias}", {"versions": versions} | pinned
        case "rollback":
            return "POST", f"/{options.alias}/rollback", None
        case "remove":
            return "DELETE", f"/{options.name}", None
        case _:
            return "GET", "", None


def _reason(reply: httpx.Response) -> str:
    try:
        said: Any = reply.json()["error"]
        return str(said if isinstance(said, str) else said["message"])
    except (ValueError, KeyError, TypeError):
        if reply.status_code == 404:
            return "this server has no registry of adapters: it is started with MULL_ADAPTERS"
        return reply.text[:500]


def _table(listed: dict[str, Any]) -> Table:
    table = Table()
    table.add_column("version", no_wrap=True)  # to be copied
    for heading in ("kind", "aliases", "evaluation", "resident", "requests"):
        table.add_column(heading, overflow="fold")
    for card in listed["data"]:
        shares = [
            f"{name} ({listed['aliases'][name]['versions'][card['id']]:.0%})"
            for name in card["aliases"]
        ]
        measured = "\n".join(f"{name} {worth:g}" for name, worth in card["evaluation"].items())
        resident = "pinned" if card["pinned"] else "yes" if card["resident"] else ""
        row = (card["id"], card["kind"], "\n".join(shares), measured, resident)
        table.add_row(*row, str(card["requests"]))
    return table
