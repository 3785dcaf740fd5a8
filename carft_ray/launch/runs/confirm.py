"""Training configurations of a search again with fresh seeds; killed and run again, it continues where it was."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from carft_ray.errors import InterruptedRunError
from carft_ray.launch.curves import Curves
from carft_ray.launch.events import Decided, Event, Note, Preparing, Started, TrialFinished, to_all
from carft_ray.launch.runs.search import set_aside_error
from carft_ray.launch.runtime import RUNNER, Runner
from carft_ray.launch.session import begin, computing, prepare
from carft_ray.launch.stop import interruption
from carft_ray.launch.trainings import run_trainings
from carft_ray.recipe.schema.recipe import Recipe
from carft_ray.recipe.shared_targets import decide_targets
from carft_ray.study.opening import open_study
from carft_ray.study.outcome import TrialRow
from carft_ray.study.recovery import recover_confirm
from carft_ray.study.rows import num_finished
from carft_ray.study.study import Study
from carft_ray.words import counted

Trainings = Mapping[str, dict[str, Any]]


def run_confirm(
    recipe: Recipe,
    study_dir: Path,
    fix: Callable[[Study], Trainings],
    resume_command: str,
    address: str | None = None,
    on_event: Callable[[Event], None] = lambda event: None,
    runner: Runner | None = None,
) -> list[TrialRow]:
    """Trains what ``fix`` names, as trials of a search are trained; what is finished already is left alone.

    Trainings of one seed share the frozen model's targets: the first one that needs them stores them.

    Args:
        recipe: The study's resolved recipe.
        study_dir: The study directory.
        fix: Called with the open study and before anything is trained. Returns the values over the
            recipe's ``train`` by name, ``seed`` and ``alpha`` among them.
        resume_command: Shown after an interruption.
        address: Ray cluster to attach to; None: a Ray of our own on this machine.
        on_event: Told what happens, in the calling thread.
        runner: What is trained; by default ``training.run``.

    Returns:
        The rows of these trainings, in the order of their numbers.

    Raises:
        InterruptedRunError: Stopped on request; run it again to resume.
        MachineError: Trainings were set aside; run it again to try these again.
        DataError: Images, classes or weights are no longer those of the study.
        CarftError: As ``run_search``.
    """
    with open_study(study_dir, recipe, tell=lambda text: on_event(Note(text))) as study:
        on_event = to_all(on_event, Curves(study.study_dir, recipe))
        for note in study.notes:
            on_event(Note(note))
        trainings = fix(study)
        begin(study.study_dir, recipe)
        for row in recover_confirm(study, trainings):
            on_event(TrialFinished(row, is_best=False))

        def rows() -> list[TrialRow]:
            return [row for row in study.rows("confirm") if row.name in trainings]

        def interrupted() -> InterruptedRunError:
            what = f"stopped; {num_finished(rows())} of {counted(len(trainings), 'training')} finished"
            return interruption(what, resume_command)

        def say(text: str) -> None:
            on_event(Preparing(text))

        if not study.done():
            with computing(study, recipe, runner or RUNNER, address, interrupted, say) as runtime:
                on_event(Preparing())
                prepare(study, runtime, say)
                decided, note = decide_targets(runtime.recipe, trainings.values())
                runtime = replace(runtime, recipe=decided)
                if note:
                    on_event(Decided(note))
                capacity = runtime.capacity
                on_event(
                    Started(len(trainings), num_finished(rows()), capacity.concurrency, capacity.reason, "confirm")
                )
                if run_trainings(study, runtime, on_event):
                    raise interrupted()
        if set_aside := [row for row in rows() if row.set_aside]:
            raise set_aside_error(set_aside, resume_command)
        return rows()
