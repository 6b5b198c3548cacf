"""What is seen of a training while it runs."""

from io import StringIO
from types import SimpleNamespace

from rich.console import Console

from finetune.progress import Shown


def seen(*, terminal: bool) -> str:
    """Of three steps, of which the last is evaluated."""
    file = StringIO()
    shown = Shown(Console(file=file, force_terminal=terminal, width=120), as_bar=terminal)
    state = SimpleNamespace(global_step=0, max_steps=3)
    with shown.bar:
        shown.on_train_begin(None, state, None)
        for step in (1, 2, 3):
            state.global_step = step
            shown.on_step_end(None, state, None)
            shown.on_log(None, state, None, logs={"loss": 1 / step, "learning_rate": 0.01})
        shown.on_log(None, state, None, logs={"eval_loss": 0.25})
        shown.on_log(None, state, None, logs={"train_runtime": 1.0})
    return file.getvalue()


def test_on_a_terminal_a_bar_tells_the_latest():
    last = seen(terminal=True).split("training")[-1]
    assert "3/3" in last
    assert "loss 0.3333" in last
    assert "in evaluation 0.25" in last


def test_elsewhere_lines_come_first_last_and_now_and_then():
    lines = seen(terminal=False).splitlines()
    assert [line.split("  ")[0] for line in lines] == ["step 1/3", "step 3/3", "step 3/3"]
    assert "in evaluation 0.25" in lines[-1]
