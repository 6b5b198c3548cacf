"""What is seen of a training while it runs, and what is kept of it."""

import json
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from transformers import TrainerCallback

_SHOWN = {"loss": "loss", "eval_loss": "in evaluation", "reward": "reward", "learning_rate": "rate"}
_PAUSE = 10.0
"""Seconds between lines, at least."""


class Log(TrainerCallback):
    """Each of the trainer's reports as a line of JSON."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
        if state.is_world_process_zero:
            with self._path.open("a") as file:
                file.write(json.dumps({"step": state.global_step, **(logs or {})}) + "\n")


class Shown(TrainerCallback):
    """On a terminal a bar, within the block of `bar`; elsewhere a line now and then."""

    def __init__(self, console: Console, *, as_bar: bool) -> None:
        self._console = console
        self._as_bar = as_bar
        self.bar = Progress(
            TextColumn("training"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.description}"),
            TimeRemainingColumn(),
            console=console,
            disable=not as_bar,
        )
        self._said: dict[str, str] = {}
        self._due = 0.0

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        done = state.global_step
        self._task = self.bar.add_task("", total=state.max_steps, completed=done)
        self._began, self._from = time.monotonic(), done

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.bar.update(self._task, completed=state.global_step)

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
        told = {name: f"{logs[key]:.4g}" for key, name in _SHOWN.items() if key in (logs or {})}
        self._said |= told
        said = "  ".join(f"{name} {value}" for name, value in self._said.items())
        self.bar.update(self._task, description=said)
        now, step, last = time.monotonic(), state.global_step, state.max_steps
        if self._as_bar or not told or (now < self._due and step < last):
            return
        self._due = now + _PAUSE
        left = (last - step) * (now - self._began) / max(1, step - self._from)
        about = f"step {step}/{last}  {said}  {timedelta(seconds=round(left))} left"
        self._console.print(about, soft_wrap=True)
