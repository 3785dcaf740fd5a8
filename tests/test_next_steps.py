"""What commands suggest next: nothing that a study would refuse as it stands, nothing that is done."""

import json

import crash_host
import pytest
from logs import replace, write_line
from stand_in import make_recipe
from study_steps import finish, searching
from suggestions import check_suggestions
from test_verbs import start

from carft_ray.recipe.schema.recipe import Recipe
from carft_ray.results.confirm.configurations import PlanRow, Stage, write_plan
from carft_ray.results.next_steps import BEHIND, behind_zero_shot, next_steps
from carft_ray.results.reading.study_view import read_study
from carft_ray.study.ledger import WENT_ON


@pytest.fixture
def study(tmp_path, monkeypatch):
    """Gives a function that makes a study of so many finished trials; one more has begun where the recipe has more."""
    monkeypatch.chdir(tmp_path)

    def make(trials, num_finished, objective=0.5, **search):
        values = make_recipe(trials, baselines={}, **search).model_dump(mode="json")
        values["data"]["id_test"] = {**values["data"]["id_val"], "split": "test"}  # which is not opened
        recipe, study_dir = Recipe.model_validate(values), tmp_path / f"{num_finished}-of-{trials}"
        with searching(study_dir, recipe) as study:
            study.add_zero_shot({"objective": 0.25, "id_accuracy": 0.3, "ood_accuracy": 0.2})
            for _ in range(num_finished):
                finish(study, start(study), objective)
            if not study.done():
                start(study)
        return study_dir.relative_to(tmp_path)

    return make


def steps(study_dir, after="status"):
    """The suggestions without the program and the folder."""
    lines = next_steps(read_study(study_dir), study_dir, after)
    check_suggestions("".join(f"\n  {line}\n" for line in lines))
    return [" ".join(line.partition("  #")[0].replace(f" {study_dir}", "").split()[1:]) for line in lines]


def plan(study_dir, training=None):
    best = read_study(study_dir).best
    row = PlanRow(best.name, "winner", training, 0.5, {}, best.objective)
    write_plan(study_dir, Stage(best.name, (11, 12), (row,)), None)


def confirm(study_dir):
    """What a finished confirm leaves, without its trainings."""
    plan(study_dir)
    (study_dir / "confirm" / "summary.json").write_text('{"lines": [], "baselines": []}')


def read_tests(study_dir, number):
    write_line(study_dir.resolve(), read_study(study_dir).recipe, sets=("id_test",))
    (study_dir / "test" / f"read-{number}").mkdir(parents=True)
    (study_dir / "test" / f"read-{number}" / "summary.json").write_text("{}")


def test_a_study_is_led_from_its_search_to_its_test_and_no_step_is_told_twice(study, tmp_path):
    study_dir = study(2, 2)
    export = "export --to exports/study"
    assert steps(study_dir) == ["report", "confirm", export, "resume --trials +4", "ls"]
    assert steps(study_dir, after="report")[0] == "confirm"
    plan(study_dir, "its-own")  # stopped before its end
    assert steps(study_dir)[:2] == ["report", "confirm --top 1 --seeds 2"]
    confirm(study_dir)
    assert steps(study_dir) == ["report", "test", export, "resume --trials +4", "ls"]
    (tmp_path / "exports" / "study").mkdir(parents=True)
    read_tests(study_dir, 1)
    assert steps(study_dir) == ["report", f"{export}-2", "ls"]  # more trials would need a reason
    (study_dir / "test" / "read-1" / "summary.json").unlink()  # that read was killed
    assert "test" in steps(study_dir)
    grid = {"space": {"learning_rate": {"choices": [1e-4, 1e-3]}}, "sampler": {"name": "grid"}}
    assert not any(step.startswith("resume") for step in steps(study(8, 2, **grid)))  # which is used up


def test_what_is_not_finished_goes_on_with_a_reason_once_tests_were_read(study):
    study_dir = study(4, 1)
    assert steps(study_dir)[:2] == ["resume", "report"]
    assert steps(study_dir, after="resume")[0] == "report"
    read_tests(study_dir, 1)
    assert steps(study_dir)[0] == "resume --again REASON"
    write_line(study_dir.resolve(), read_study(study_dir).recipe, WENT_ON, details={"trials": 4}, reason="why")
    assert steps(study_dir)[0] == "resume"
    manifest = (study_dir / "manifest.json").read_text()
    (study_dir / "manifest.json").write_text(manifest.replace('"gpu_hours": null', '"gpu_hours": 3', 1))
    (study_dir / "stop").write_text("budget: 3 GPU hours are used (budget.gpu_hours, 3)\n")
    assert steps(study_dir)[0] == "resume --set budget.gpu_hours=6"
    assert steps(study(4, 0)) == ["resume", "ls"]


def test_a_best_behind_zero_shot_is_not_to_be_exported(study, capsys):
    study_dir = study(1, 1, objective=0.2)
    assert behind_zero_shot(read_study(study_dir))
    assert not any(step.startswith("export") for step in steps(study_dir))
    assert crash_host.call(["status", str(study_dir)]) == 0
    assert BEHIND in capsys.readouterr().err
    better = study(2, 2)
    confirm(better)
    assert not behind_zero_shot(read_study(better))
    found = {"other": "zero_shot", "objective": {"mean": -0.01}}  # with fresh seeds it is
    (better / "confirm" / "summary.json").write_text(json.dumps({"lines": [], "baselines": [found]}))
    assert behind_zero_shot(read_study(better))


def test_status_tells_how_often_test_sets_were_read_and_names_a_broken_ledger(study, capsys):
    study_dir = study(2, 2)

    def status():
        assert crash_host.call(["status", str(study_dir)]) == 0
        shown = capsys.readouterr()
        assert crash_host.call(["status", str(study_dir), "--json"]) == 0
        return "Test sets were read once." in shown.out, shown.err, json.loads(capsys.readouterr().out)["ledger"]

    was_read, _, found = status()
    assert (was_read, found) == (False, {"test_reads": 0, "problems": []})
    read_tests(study_dir, 1)
    was_read, _, found = status()
    assert (was_read, found) == (True, {"test_reads": 1, "problems": []})
    replace(study_dir, '"test"', '"winner fixed"')
    was_read, err, found = status()
    assert (was_read, found["test_reads"]) == (False, None)
    assert "must have the ledger of which manifest.json tells" in err
    assert "must have the ledger of which manifest.json tells" in found["problems"][0]
    assert steps(study_dir) == ["ls"]
