"""How a running training and a running search are shown: a bar on a terminal, plain lines elsewhere."""

import contextlib
import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

from carft_ray import console

if TYPE_CHECKING:
    from carft_ray.launch.events import Event
    from carft_ray.search.outcome import TrialRow

Row = dict[str, float]


@contextlib.contextmanager
def training_shown(show: bool) -> Iterator[tuple[Callable[[Row], None], Callable[[Row], None]]]:
    """Gives ``(progress, report)`` of a training's context: a bar with loss, CE, KL, learning rate and speed, and a
    line per epoch.

    Args:
        show: False: nothing is shown.
    """
    if not show:
        yield (lambda row: None), (lambda row: None)
        return
    bar = console.training_progress()
    task = bar.add_task("training", total=None, detail="")

    def progress(row: Row) -> None:
        detail = (
            f"epoch {row['epoch']:.0f}  loss {row['loss']:.3f} (CE {row['ce']:.3f}, KL {row['kl']:.4f})  "
            f"lr {row['learning_rate']:.1e}  {row['images_per_s']:.0f} images/s"
        )
        bar.update(task, completed=row["step"], total=row["num_steps"], detail=detail)

    def report(row: Row) -> None:
        line = f"epoch {row['epoch']:.0f}: loss {row['loss']:.3f}, CE {row['ce']:.3f}, KL {row['kl']:.4f}"
        line += f", context entropy {row['context_entropy']:.2f} nats"
        if "subset/id_accuracy" in row:
            line += f"; on a subset at alpha 1: ID {console.percent(row['subset/id_accuracy'])} %"
        if "subset/ood_accuracy" in row:
            line += f", OOD {console.percent(row['subset/ood_accuracy'])} %"
        bar.console.print(line, markup=False)

    with bar if console.err.is_terminal else contextlib.nullcontext():
        yield progress, report


def announce(show: bool) -> Callable[["Event"], None]:
    """Returns what ``run_search`` tells its events to: a line per thing that happened.

    Args:
        show: False: only notes are shown.
    """
    from carft_ray.launch import events

    began = time.monotonic()
    state = {"finished": 0, "wanted": 0}

    def clock() -> str:
        seconds = int(time.monotonic() - began)
        return f"[{seconds // 60:d}:{seconds % 60:02d}]"

    def on_event(event: "Event") -> None:
        if isinstance(event, events.Note):
            console.warn(event.text)
        elif not show:
            return
        elif isinstance(event, events.Preparing):
            console.say(f"{clock()} preparing: model, sets, heads, zero-shot, the frozen model's targets")
        elif isinstance(event, events.Started):
            state.update(finished=event.num_finished, wanted=event.num_trials)
            left = event.num_trials - event.num_finished
            console.say(f"{clock()} {left} trials to go, {event.concurrency} at a time ({event.reason})")
        elif isinstance(event, events.BaselineFinished):
            console.say(f"{clock()} baseline {_result(event.row)}")
        elif isinstance(event, events.TrialFinished):
            state["finished"] += 1
            mark = "  <- best so far" if event.is_best else ""
            console.say(f"{clock()} {state['finished']}/{state['wanted']} {_result(event.row)}{mark}")
        elif isinstance(event, events.Stopping):
            console.say(f"{clock()} stopping; {event.num_running} trainings write their checkpoints")

    return on_event


def _result(row: "TrialRow") -> str:
    values = " ".join(f"{name}={console.value_text(value)}" for name, value in row.values.items() if name != "alpha")
    text = f"{row.name} {values}".rstrip()
    if row.objective is None:
        return f"{text}: {row.outcome}, {row.reason}"
    metrics = row.metrics
    ood = f", OOD {console.percent(metrics['ood_accuracy'])}" if "ood_accuracy" in metrics else ""
    at = f" at alpha {row.alpha:.2f}" if row.alpha is not None else ""
    return (
        f"{text}: ID {console.percent(metrics['id_accuracy'])}{ood}, objective {console.percent(row.objective)} %{at}"
    )
