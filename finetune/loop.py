"""`mull-finetune loop`: a server solves, learns from what was right, and serves that; again.

Expert iteration (Anthony et al. 2017, arXiv:1705.08439) with rejection sampling (STaR, Zelikman et
al. 2022, arXiv:2203.14465) or preferences. Everything goes through the commands and routes that an
operator would use: `mull serve`, `mull-finetune data`, a method, `/v1/adapters` with its gate.
"""

import argparse
import json
import secrets
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import httpx
import yaml
from rich.console import Console
from rich.progress import track
from rich.table import Table

from finetune import data, traces
from finetune.serving import started
from models import MULL_TINY

COLUMNS: dict[str, traces.Kind] = {
    "sft": "demonstrations",
    "dpo": "pairs",
    "orpo": "pairs",
    "simpo": "pairs",
    "kto": "labelled",
}
"""What each method that can be looped learns from."""

_READY_SECONDS = 600
_ANSWER_SECONDS = 3600


@dataclass(frozen=True, slots=True, kw_only=True)
class Round:
    """What one time around brought and took."""

    number: int
    problems: int
    tokens: int
    """Generated while solving."""
    solving_seconds: float
    rows: int
    training_seconds: float
    training_flops: float
    seconds: float
    """All of it, checks included."""
    evaluation: dict[str, float]
    served: bool
    """Whether the gate let the alias move to it."""
    verdict: str
    """The version, or what the gate said."""


def main(arguments: Sequence[str]) -> None:
    """Go around as often as asked; rounds that are done are not done again."""
    parser = argparse.ArgumentParser(
        prog="mull-finetune loop",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="further --key value pairs are the method's own, as for mull-finetune METHOD",
        allow_abbrev=False,
    )
    parser.add_argument(
        "--model", default=str(MULL_TINY), help="a folder, or a name on the hub (default mull-tiny)"
    )
    parser.add_argument("--problems", required=True, help="rows of {prompt, answer} to solve")
    parser.add_argument("--exam", required=True, help="the same, to see what was gained")
    parser.add_argument("--general", help="the same of what must not be forgotten")
    parser.add_argument("--work", type=Path, default=Path("runs/loop"))
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument(
        "--adapter", type=Path, help="what mull-finetune published, to begin with and go on from"
    )
    parser.add_argument("--method", choices=list(COLUMNS), default="sft")
    parser.add_argument("--config", help="a YAML file of the method's keys")
    parser.add_argument(
        "--strategy",
        type=json.loads,
        default={"kind": "best_of_n", "n": 16, "verifier": "likelihood"},
        help="as in a request (default best_of_n of 16)",
    )
    parser.add_argument(
        "--by",
        default="grader",
        help="what tells right from wrong: grader, score or votes (default grader)",
    )
    parser.add_argument("--grader", default="answer", help="'answer' or module:function")
    parser.add_argument("--per-prompt", default="4", help="rows of one prompt at most (default 4)")
    parser.add_argument("--max-tokens", type=int, default=400, help="of an answer (default 400)")
    parser.add_argument("--alias", default="improved", help="the name it is served by")
    parser.add_argument("--min-gain", type=float, default=0.0, help="on the exam (default 0)")
    parser.add_argument(
        "--max-loss", type=float, default=0.05, help="of what must not be forgotten (default 0.05)"
    )
    parser.add_argument("--clients", type=int, default=16, help="questions at once (default 16)")
    parser.add_argument(
        "--processes", type=int, default=1, help="that train together; on CPU, one a core pays"
    )
    parser.add_argument("--serve", default="", help="further flags of mull serve, in one string")
    options, keys = parser.parse_known_args(arguments)
    exam = data.Exam(data.listed(data.read(options.exam)))
    problems = [row for row in data.listed(data.read(options.problems)) if not exam.has(row)]
    if not problems:
        raise SystemExit(f"every problem of '{options.problems}' is in '{options.exam}'")
    options.work.mkdir(parents=True, exist_ok=True)
    console = Console()
    log = options.work / "rounds.jsonl"
    done = [Round(**json.loads(line)) for line in _lines(log)]
    begun = sum(one.number > 0 for one in done)

    def note(one: Round) -> None:
        done.append(one)
        with log.open("a") as file:
            file.write(json.dumps(asdict(one)) + "\n")

    if begun < options.rounds:
        # Who ends this process ends its server, too.
        signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))
        with _served(options) as server:
            if options.adapter is not None and not done:
                note(_begin(options, server))
            for number in range(begun + 1, options.rounds + 1):
                console.rule(f"round {number}")
                last = _last(options, done)
                note(_round(number, problems, options, keys, last, server, console))
    console.print(_table(done))
    _plot(done, options.work / "rounds.png")
    console.print(
        f"[green]plotted[/] {options.work / 'rounds.png'}; serve it again with: "
        f"MULL_ADAPTERS={options.work / 'registry'} mull serve, "
        f'and ask "model": "{options.alias}"',
        soft_wrap=True,
    )


@dataclass(frozen=True, slots=True)
class _Server:
    """A Mull server of our own, by HTTP."""

    http: httpx.Client
    base: str
    """The served name of the model."""

    def model(self, alias: str) -> str:
        """The alias, once there is one."""
        listed = self.http.get("/v1/models").json()["data"]
        return alias if alias in {one["id"] for one in listed} else self.base

    def solve(self, row: data.Row, model: str, options: argparse.Namespace) -> int:
        """Have a problem solved; what was generated for it, in tokens."""
        asked = row["prompt"]
        where, prompt = (
            ("/v1/completions", {"prompt": asked})
            if isinstance(asked, str)
            else ("/v1/chat/completions", {"messages": asked})
        )
        body = {"model": model, "strategy": options.strategy, "max_tokens": options.max_tokens}
        reply = self.http.post(where, json=body | prompt)
        if reply.status_code != 200:
            raise SystemExit(f"the server refused a problem: {reply.text[:500]}")
        return int(reply.json()["usage"]["completion_tokens"])

    def publish(self, folder: Path, alias: str) -> tuple[bool, str]:
        """Take a version in and point the alias at it, if the gate lets it."""
        body = {"name": alias, "path": str(folder), "alias": alias}
        reply = self.http.post("/v1/adapters", json=body)
        told = reply.json()
        if reply.status_code == 201:
            return True, str(told["id"])
        return False, str(told["error"]["message"])


@contextmanager
def _served(options: argparse.Namespace) -> Iterator[_Server]:
    """`mull serve` on a registry, with the gate, keeping its traces; ended afterwards."""
    work = options.work.resolve()
    gate = {"task.gain": {"at_least": options.min_gain, "lose_at_most": 0.0}}
    if options.general is not None:
        gate["general.gain"] = {"at_least": -options.max_loss}
    config = work / "server.yaml"
    config.write_text(
        yaml.safe_dump(
            {
                "adapters": str(work / "registry"),
                "adapter_imports": str(work),
                "traces": str(work / "traces"),
                "adapter_gate": gate,
            }
        )
    )
    key = secrets.token_hex(16)
    name = Path(options.model).name
    command = [str(Path(sys.executable).parent / "mull"), "serve"]
    if options.model != str(MULL_TINY):  # which has defaults of its own
        command += ["--model", options.model, "--served-model-name", name]
    command += options.serve.split()
    known = {"MULL_CONFIG": str(config), "MULL_ADMIN_KEY": key}
    with (
        (work / "server.log").open("w+b") as log,
        started(command, log, seconds=_READY_SECONDS, **known) as base,
        httpx.Client(
            base_url=base, headers={"X-Mull-Admin-Key": key}, timeout=_ANSWER_SECONDS
        ) as http,
    ):
        yield _Server(http, name)


def _begin(options: argparse.Namespace, server: _Server) -> Round:
    """Serve what it is to begin with, as round 0.

    Raises:
        SystemExit: The server does not take it.
    """
    folder = options.work.resolve() / "round-0" / "adapter"
    if not folder.exists():
        shutil.copytree(options.adapter, folder)
    served, verdict = server.publish(folder, options.alias)
    if not served:
        raise SystemExit(f"it cannot begin with '{options.adapter}': {verdict}")
    manifest: Mapping[str, Any] = json.loads((folder / "manifest.json").read_text())
    return Round(
        number=0,
        problems=0,
        tokens=0,
        solving_seconds=0.0,
        rows=0,
        training_seconds=manifest["compute"]["seconds"],
        training_flops=manifest["compute"]["flops"],
        seconds=manifest["compute"]["seconds"],
        evaluation=manifest["evaluation"],
        served=True,
        verdict=verdict,
    )


def _last(options: argparse.Namespace, done: Sequence[Round]) -> Path | None:
    """The adapter that is served now, to be trained further; None: each begins anew."""
    if options.adapter is None:
        return None
    number = max((one.number for one in done if one.served), default=0)
    return options.work / f"round-{number}" / "adapter"


def _round(
    number: int,
    problems: Sequence[data.Row],
    options: argparse.Namespace,
    keys: Sequence[str],
    last: Path | None,
    server: _Server,
    console: Console,
) -> Round:
    began = time.monotonic()
    model = server.model(options.alias)
    with ThreadPoolExecutor(options.clients) as clients:
        asked = [clients.submit(server.solve, row, model, options) for row in problems]
        try:
            tokens = sum(
                one.result()
                for one in track(
                    as_completed(asked), f"{model} solves", total=len(asked), console=console
                )
            )
        except BaseException:
            clients.shutdown(cancel_futures=True)
            raise
    solved = time.monotonic()
    folder = (options.work / f"round-{number}").resolve()
    rows = folder / "rows.jsonl"
    said = ["--by", options.by, "--per-prompt", options.per_prompt, "--seed", str(number)]
    if options.by == "grader":
        said += ["--answers", options.problems, "--grader", options.grader]
    _run(
        "data",
        *("--from-traces", str(options.work / "traces"), "--exclude", options.exam),
        *("--to", COLUMNS[options.method], "--out", str(rows), *said),
    )
    given = {
        "model_name_or_path": options.model,
        "dataset_name": str(rows),
        "output_dir": str(folder),
        "grader": options.grader,
        "check_problems": options.exam,
        "check_general": options.general,
        "data_tokens": str(tokens),
        "resume_adapter": None if last is None else str(last),
    }
    flags = [part for k, value in given.items() if value for part in (f"--{k}", value)]
    config = [] if options.config is None else ["--config", options.config]
    _run(options.method, *config, *flags, *keys, processes=options.processes)
    manifest: Mapping[str, Any] = json.loads((folder / "adapter/manifest.json").read_text())
    served, verdict = server.publish(folder / "adapter", options.alias)
    color = "green" if served else "yellow"
    console.print(f"[{color}]{'served' if served else 'not served'}[/]: {verdict}", soft_wrap=True)
    return Round(
        number=number,
        problems=len(problems),
        tokens=tokens,
        solving_seconds=round(solved - began, 1),
        rows=len(_lines(rows)),
        training_seconds=manifest["compute"]["seconds"],
        training_flops=manifest["compute"]["flops"],
        seconds=round(time.monotonic() - began, 1),
        evaluation=manifest["evaluation"],
        served=served,
        verdict=verdict,
    )


def _run(*arguments: str, processes: int = 1) -> None:
    """A command of ours in processes of its own, whose memory goes with them."""
    torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    launch = [*(torchrun if processes > 1 else []), "-m", "finetune"]
    done = subprocess.run([sys.executable, *launch, *arguments], check=False)
    if done.returncode:
        raise SystemExit(f"mull-finetune {arguments[0]} failed")


def _lines(file: Path) -> list[str]:
    return file.read_text().splitlines() if file.exists() else []


def _table(rounds: Sequence[Round]) -> Table:
    table = Table(title="what each round brought over the base, and took")
    for heading in ("round", "exam", "gain", "general", "lost", "rows", "tokens", "s", "served"):
        table.add_column(heading, justify="right", overflow="fold")
    for one in rounds:
        found = one.evaluation
        error = found.get("task.gain_standard_error")
        table.add_row(
            str(one.number),
            f"{found['task.accuracy']:.3f}",
            f"{found['task.gain']:+.3f}" + ("" if error is None else f" ± {error:.3f}"),
            f"{found['general.accuracy']:.3f}" if "general.accuracy" in found else "-",
            f"{-found['general.gain']:+.3f}" if "general.gain" in found else "-",
            f"{one.rows:,}",
            f"{one.tokens:,}",
            f"{one.seconds:.0f}",
            "yes" if one.served else "no",
        )
    return table


def _plot(rounds: Sequence[Round], path: Path) -> None:
    import matplotlib as mpl

    mpl.use("agg")
    from matplotlib import pyplot as plt

    figure, (worth, cost) = plt.subplots(1, 2, figsize=(9, 3.6), layout="constrained")
    numbers = [one.number for one in rounds]
    places = [numbers[0] - 1, *numbers]  # the base stands before them
    for name in ("task", "general"):
        found = [one.evaluation for one in rounds]
        if f"{name}.accuracy" in found[0]:
            means = [found[0][f"{name}.accuracy_before"], *(e[f"{name}.accuracy"] for e in found)]
            errors = [0.0, *(e.get(f"{name}.gain_standard_error", 0.0) for e in found)]
            worth.errorbar(places, means, errors, marker="o", capsize=3, label=name)
    worth.set(xlabel="round", ylabel="accuracy of one sample", ylim=(0, 1))
    worth.set_xticks(places, ["base", *map(str, numbers)])
    worth.legend()
    bottom = [0.0] * len(rounds)
    for name, seconds in (
        ("solving", [one.solving_seconds for one in rounds]),
        ("training", [one.training_seconds for one in rounds]),
        ("data, checks", [o.seconds - o.solving_seconds - o.training_seconds for o in rounds]),
    ):
        cost.bar(numbers, seconds, bottom=bottom, label=name)
        bottom = [a + b for a, b in zip(bottom, seconds, strict=True)]
    cost.set(xlabel="round", ylabel="seconds", xticks=numbers)
    cost.legend()
    figure.savefig(path, dpi=120)
    plt.close(figure)
