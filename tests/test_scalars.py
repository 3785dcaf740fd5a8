"""What TensorBoard reads of a training, as its own reader reads it; and a disk that is full."""

from dataclasses import replace

import pytest
import short_training
import stand_in
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData
from test_checkpoint import limited

from carft_ray.errors import InterruptedRunError, StorageError
from carft_ray.launch.command import Plan, train_once
from carft_ray.launch.curves import Curves
from carft_ray.launch.events import TrialStep
from carft_ray.launch.workers.worker import RUNNER
from carft_ray.recipe.loading import load_recipe
from carft_ray.training.tensorboard import add_scalars, begin_file, run_folder

RUN = "lr=0.01 kl=1"


def read(folder):
    events = EventAccumulator(str(folder))
    events.Reload()
    return events


def test_a_training_that_was_stopped_and_resumed_is_one_run_with_curves_and_a_line_of_the_hparams_table(tmp_path):
    overrides = ["train.epochs=2", "evaluate.every_epochs=1", "search.baselines.soft={label_smoothing: 0.1}"]
    recipe = load_recipe(short_training.make(tmp_path), [f"data.cache_dir={tmp_path / 'cache'}", *overrides])
    out = short_training.training_in(tmp_path / "out")

    def train(recipe, prepared, place, context, attempt):
        def progress(row):
            context.progress(row)
            if row["step"] == 3:
                (tmp_path / "out" / "stop").write_text("")

        return RUNNER.train(recipe, prepared, place, replace(context, progress=progress), attempt)

    with pytest.raises(InterruptedRunError):
        train_once(Plan(recipe, tmp_path / "out", runner=replace(RUNNER, train=train)))
    result, _ = train_once(Plan(recipe, tmp_path / "out"), resume=True)
    files = sorted(out.rglob("events.out.tfevents.*"))
    assert {path.parent for path in files} == {out / RUN}
    train_once(Plan(recipe, tmp_path / "out"), resume=True)  # it has finished
    assert sorted(out.rglob("events.out.tfevents.*")) == files

    events = read(out / RUN)
    assert [point.step for point in events.Scalars("epochs/3_objective")] == [3, 6]
    curves = [f"curves/{name}" for name in ("1_loss", "2_ce", "3_kl", "4_learning_rate")]
    epochs = [f"epochs/{name}" for name in ("1_id_accuracy", "2_ood_accuracy", "3_objective", "4_alpha")]
    assert sorted(events.Tags()["scalars"])[:8] == curves + epochs  # as TensorBoard sorts them

    content = events.PluginTagToContent("hparams")
    start = HParamsPluginData.FromString(content["_hparams_/session_start_info"]).session_start_info
    experiment = HParamsPluginData.FromString(content["_hparams_/experiment"]).experiment
    values = {name: getattr(value, value.WhichOneof("kind")) for name, value in start.hparams.items()}
    expected = {"learning_rate": recipe.train.learning_rate, "kl_weight": recipe.train.kl_weight, "label_smoothing": 0}
    assert values == pytest.approx(expected)
    names = {info.name.tag for info in experiment.metric_infos}
    assert names == {"final/objective", "final/id_accuracy", "final/ood_accuracy", "final/alpha"}
    for name in names:
        last = events.Scalars(name)[-1]
        assert (last.step, last.value) == (6, pytest.approx({**result["metrics"], **result}[name.partition("/")[2]]))

    other = recipe.model_copy(update={"train": recipe.train.model_copy(update={"learning_rate": 0.5})})
    assert run_folder(out, other) == out / RUN  # an attempt that goes on has the name of the first
    searched = ["search.space.weight_decay={low: 0.0, high: 0.2}", "search.space.epochs={low: 1, high: 9}"]
    more = load_recipe(tmp_path / "recipe.yaml", [*searched, "train.learning_rate=1.234567e-5"])
    assert run_folder(out / "new", more).name == "lr=1.23e-5 kl=1 wd=0.1 epochs=3"  # what the search varies


def test_what_a_killed_attempt_wrote_after_its_checkpoint_is_void(tmp_path):
    recipe = stand_in.make_recipe(1)
    curves = Curves(tmp_path, recipe)
    for attempt, steps in ((1, range(1, 6)), (2, range(3, 5))):
        spec = stand_in.spec(attempt)
        for step in steps:
            curves(TrialStep(spec, {"step": step, "num_steps": 9, "loss": attempt}))
    points = read(run_folder(spec.folder(tmp_path), recipe)).Scalars("curves/1_loss")
    assert [(point.step, point.value) for point in points] == [(1, 1), (2, 1), (3, 2), (4, 2)]


def test_a_full_disk_is_a_storage_error_that_names_the_file(tmp_path):
    told = r"events.out.tfevents.*: must be writable, but got File too large"
    with limited(10_000), pytest.raises(StorageError, match=told) as caught:
        add_scalars(begin_file(tmp_path), {f"loss {number}": 0.5 for number in range(1000)}, 1)
    assert caught.value.exit_code == 5


def test_curves_that_cannot_be_written_are_left_out(tmp_path):
    spec, curves = stand_in.spec(), Curves(tmp_path, stand_in.make_recipe(1))
    with limited(300):
        for step in range(20):
            curves(TrialStep(spec, {"step": step, "num_steps": 20, "loss": 0.5}))
    [path] = tmp_path.rglob("events.out.tfevents.*")
    assert 0 < len(read(path.parent).Scalars("curves/1_loss")) < 20
