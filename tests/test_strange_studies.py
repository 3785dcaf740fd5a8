"""Studies that a stranger has made: no command reads, writes or removes anything outside of them."""

import json
import os
import shutil

import crash_host
import logs
import pytest
import report_studies
import short_training
from logs import holding

from carft_ray.errors import StorageError
from carft_ray.results.confirm.configurations import read_plan
from carft_ray.study import ledger
from carft_ray.study.rows import best_first, trials

RECIPE = report_studies.make_recipe(4, ood=False)
RECIPE = RECIPE.model_copy(update={"train": RECIPE.train.model_copy(update={"batch_size": 16, "micro_batch": 16})})


@pytest.fixture
def study_dir(tmp_path):
    return report_studies.make(tmp_path / "here" / "study", 3, RECIPE)


@pytest.fixture
def victim(tmp_path):
    """A training of someone else, with all that a study would remove or write."""
    folder = tmp_path / "victim" / "run1"
    (folder / "attempt-1" / "step-00000010").mkdir(parents=True)
    for name in ("log.txt", "attempt-1/fine_tuned.safetensors", "attempt-1/step-00000010/state.json"):
        (folder / name).write_text("precious\n")
    return folder


def everything(folder):
    """All that lies in a folder; the lock is of who holds the study."""
    paths = [path for path in folder.rglob("*") if path.name != "lock"]
    return {path: path.read_bytes() if path.is_file() else None for path in paths}


WRITERS = ["resume {}", "confirm {} --seeds 2", "test {}", "report {} --html --out page.html"]


@pytest.mark.slow
@pytest.mark.parametrize("is_absolute", [False, True])
def test_a_training_whose_name_leads_out_of_the_study_is_refused(
    study_dir, victim, tmp_path, monkeypatch, capsys, is_absolute
):
    monkeypatch.chdir(tmp_path)
    name = str(victim) if is_absolute else "../../../victim/run1"
    logs.replace(study_dir, json.dumps(best_first(trials(study_dir))[0].name), json.dumps(name))
    before = everything(tmp_path)
    for command in (*WRITERS, "report {}", "status {}", "logs {} 0", "export {} --to exported"):
        code = crash_host.call(command.format(study_dir).split())
        told = capsys.readouterr().err
        assert code == StorageError.exit_code, (command, told)
        assert "log/: a training must have a name of letters, digits and . _ - (at most 200)" in told
        assert "victim/run1'" in told
        assert "Traceback" not in told
        after = everything(tmp_path)
        assert {path: after.get(path) for path in before} == before
        assert all(path.is_relative_to(study_dir / "log") for path in after.keys() - before)  # who held it, and when


LINKS = {
    "trials": "victim",
    "trials/{best}": "victim/run1",
    "trials/{best}/log.txt": "victim/run1/log.txt",
    "trials/{best}/checkpoint": "victim/run1/checkpoint",
    "lock": "victim/new",
    "ray.log": "victim/run1/log.txt",
}


@pytest.mark.parametrize("link", LINKS)
def test_a_study_from_which_a_link_leads_out_is_not_opened_for_writing(
    study_dir, victim, tmp_path, monkeypatch, capsys, link
):
    monkeypatch.chdir(tmp_path)
    path = study_dir / link.format(best=best_first(trials(study_dir))[0].name)
    if path.exists():
        path.rename(tmp_path / "taken away")
    path.symlink_to(tmp_path / LINKS[link])
    before = everything(victim.parent)
    for command in WRITERS:
        code = crash_host.call(command.format(study_dir).split())
        told = capsys.readouterr().err
        assert code == StorageError.exit_code, told
        assert command != "resume {}" or f"{path}: must not lead out of {study_dir}" in told
    assert everything(victim.parent) == before
    assert not (tmp_path / "page.html").exists()


def test_a_pipe_in_a_study_is_refused_and_nothing_waits_for_it(study_dir):
    os.mkfifo(study_dir / "fits.json")
    with pytest.raises(StorageError, match=r"fits.json: must be a file or a folder, but got a pipe, device or socket"):
        holding(study_dir).__enter__()


def test_a_link_that_stays_within_a_study_and_a_study_that_is_a_link_are_no_matter(study_dir, tmp_path):
    (study_dir / "tracking").mkdir()
    (study_dir / "tracking" / "latest").symlink_to("../trials")
    (tmp_path / "linked").symlink_to(study_dir)
    with holding(tmp_path / "linked"):
        pass


def test_a_plan_of_a_confirm_that_names_a_place_elsewhere_is_refused(study_dir):
    place = "../../../victim/run1"
    row = {"name": "x", "role": "winner", "training": place, "alpha": 1.0, "values": {}, "objective": 1}
    content = {"winner": "x", "seeds": [1], "rows": [row]}
    (study_dir / "confirm").mkdir()
    for change in ({}, {"rows": [{**row, "training": "t0"}], "seeds": ["/../../../victim/run1"]}):
        (study_dir / "confirm" / "plan.json").write_text(json.dumps({"first": {**content, **change}, "second": None}))
        with pytest.raises(StorageError, match=r"plan.json: a training must have a name .*victim/run1"):
            read_plan(study_dir)


def test_a_read_of_the_test_sets_that_names_a_place_elsewhere_is_refused(study_dir, victim, tmp_path, capsys):
    row = {"name": "x", "role": "winner", "alpha": 1.0, "objective": 1.0, "runs": ["trials/../../../victim/run1"]}
    with holding(study_dir) as log:
        details = {"confirmed": False, "seeds": [1], "rows": [row]}
        ledger.record(study_dir, log, RECIPE, ledger.TEST, ("id_test",), details)
    before = everything(tmp_path / "victim")
    assert crash_host.call(["test", str(study_dir)]) == StorageError.exit_code
    assert "log: the ledger must name trainings of the study, but got" in capsys.readouterr().err
    assert everything(tmp_path / "victim") == before


def test_a_file_of_a_result_that_was_damaged_is_a_message_or_makes_no_difference(study_dir, capsys):
    commands = [[name, study_dir, "--json"] for name in ("report", "ls", "status")]
    commands.append(["compare", f"{study_dir}:0", f"{study_dir}:1", "--json"])

    def numbers(command):
        capsys.readouterr()
        code = crash_host.call(command)
        told = capsys.readouterr()
        assert "Traceback" not in told.err, (command, told.err)
        return code, told.out

    whole = [numbers(command) for command in commands]
    assert [code for code, _ in whole] == [0] * len(commands)
    first, second = (next(study_dir.glob(f"trials/t000{number}*/*")) for number in (0, 1))
    names = [path.relative_to(first) for path in first.rglob("*") if path.is_file()]
    assert {name.name for name in names} == {"result.json", "validation.parquet"}
    for path in [first / name for name in names]:
        data, refused = path.read_bytes(), 0
        middle, other = len(data) // 2, (second / path.relative_to(first)).read_bytes()
        flipped = [data[:at] + bytes([data[at] ^ 4]) + data[at + 1 :] for at in (middle, len(data) - 2)]
        for content in (data[:middle], b"", *flipped, other, None):
            path.unlink() if content is None else path.write_bytes(content)
            for command, undisturbed in zip(commands, whole, strict=True):
                found = numbers(command)
                assert found == undisturbed or found[0] == StorageError.exit_code, (path, content, command, found)
                refused += found != undisturbed
            path.write_bytes(data)
        assert refused >= 4
    assert [numbers(command) for command in commands] == whole


@pytest.fixture
def repository(tmp_path, monkeypatch):
    """The repository of a stranger: a recipe, and a cache in which each link leads to a folder of the user."""
    home = tmp_path / "repository"
    recipe = short_training.make(home)
    recipe.write_text(recipe.read_text().replace("data:\n", "data:\n  cache_dir: cache\n  cache_gb: 0.000001\n"))
    victim = tmp_path / "victim"
    for name in ("thesis", "0" * 32, "1" * 16, "ab"):
        (victim / name).mkdir(parents=True)
        (victim / name / f"{'2' * 32}.arrow").write_bytes(b"precious")
        os.utime(victim / name, (1e9, 1e9))
    (home / "cache").mkdir()
    for name in ("targets", "unseen", "index", "test_reads"):
        (home / "cache" / name).symlink_to("../../victim")
    monkeypatch.chdir(home)
    return home


@pytest.mark.slow
def test_a_link_in_the_cache_of_a_repository_leads_no_command_out(repository, tmp_path, capsys):
    before = everything(tmp_path / "victim")
    tests = "data.id_test={source: folder, path: images, domains: [photo_val], part: [0, 0.4]}"
    sets = "data.id_val={source: folder, path: images, domains: [photo_val], part: [0.4, 1]}"
    more = ["--set", tests, "--set", sets, "--set", "resources.targets=stored", "--set", "search.trials=1"]
    for words in (
        ["doctor", "recipe.yaml", "--set", tests, "--set", sets],
        ["search", "recipe.yaml", "--study", "study", "--executor", "debug", *more],
        ["evaluate", "study"],
        ["export", "study", "--to", "export"],
        ["test", "study"],
        ["data", "clean", "--all", "--yes", "--cache", "cache"],
    ):
        code = crash_host.call(words)
        told = capsys.readouterr().err
        assert code == 0, (words, told)
        assert everything(tmp_path / "victim") == before, words
    assert (repository / "cache" / "targets").is_symlink()


@pytest.mark.slow
def test_a_cache_that_a_recipe_lays_into_a_folder_of_the_user_removes_and_replaces_nothing_there(
    repository, tmp_path, capsys
):
    shutil.rmtree(repository / "cache")
    victim = tmp_path / "victim"
    for name in ("targets", "unseen"):
        (victim / name / ("0" * 32)).mkdir(parents=True)
        (victim / name / ("0" * 32) / "visit-0000").write_bytes(b"precious")
    (victim / f"{'3' * 32}.arrow").write_bytes(b"precious")
    before = everything(victim)
    for words in (["doctor", "recipe.yaml"], ["data", "add", "recipe.yaml"]):
        assert crash_host.call([*words, "--set", f"data.cache_dir={victim}"]) == 0
    assert crash_host.call(["data", "clean", "--all", "--yes", "--cache", str(victim)]) == 0
    after = everything(victim)
    assert {path: after.get(path) for path in before} == before
