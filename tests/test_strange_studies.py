"""Studies that a stranger has made: no command reads, writes or removes anything outside of them."""

import contextlib
import json
import os
import re
import shutil
import sys
from pathlib import Path

import crash_host
import logs
import pytest
import report_studies
import short_training
from bucket_server import copied, impatient
from logs import holding

import carft_ray
from carft_ray.data import cache, sets
from carft_ray.data.file_index import open_table, write_table
from carft_ray.data.sets import open_sets, write_sets
from carft_ray.errors import StorageError, UsageError
from carft_ray.recipe.loading import dump_recipe, load_recipe
from carft_ray.recipe.schema.data import DataConfig
from carft_ray.recipe.schema.recipe import Recipe
from carft_ray.results.confirm_plan import read_plan
from carft_ray.store.log import log_of
from carft_ray.study import ledger, records
from carft_ray.study.opening import open_study
from carft_ray.study.place import DRIVEN, STUDIES, fetched
from carft_ray.study.recipe_identity import claim, recipe_for_use, study_recipe
from carft_ray.study.rows import best_first
from carft_ray.study.snapshot import snapshot
from carft_ray.study.take_over import recover_running
from carft_ray.study.trust import allowed, is_written

RECIPE = report_studies.make_recipe(4, ood=False)
LINE = {"time": "now", "user": "u", "recipe_hash": "h", "version": "1", "purpose": "test", "sets": [], "number": 1}
STRANGE_LINES = (
    {**LINE, "sets": None},
    {**LINE, "more": 1},
    {**LINE, "details": []},
    {**LINE, "purpose": "winner fixed", "details": {"against": [1]}},
    {**LINE, "purpose": "winner fixed", "details": {"against": {"x": "3"}}},
    {**LINE, "details": {"digests": ["x"], "rows": [], "confirmed": False}},
)
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
    logs.replace(study_dir, json.dumps(best_first(snapshot(study_dir).trials)[0].name), json.dumps(name))
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
    path = study_dir / link.format(best=best_first(snapshot(study_dir).trials)[0].name)
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
    os.mkfifo(study_dir / "ray.log")
    with pytest.raises(StorageError, match=r"ray.log: must be a file or a folder, but got a pipe, device or socket"):
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
    in_a_seed = {"rows": [{**row, "training": "t0"}], "seeds": ["/../../../victim/run1"]}
    for change, words in (({}, "a training must have a name"), (in_a_seed, "seeds.0: input should be a valid integer")):
        (study_dir / "confirm" / "plan.json").write_text(json.dumps({"first": {**content, **change}, "second": None}))
        with pytest.raises(StorageError, match=f"plan.json: .*{words}.*victim/run1"):
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


STRANGE_RECORDS = {
    records.RECIPE: [{}, {"recipe": []}, {"recipe": {"name": 1}}],
    records.PROVENANCE: [{}, {"provenance": "x"}, {"provenance": {"data": 3}}],
    records.TEST_SETS: [{"digests": ["x"]}, {"digests": {"id_test": 3}}],
    records.LEDGER: [{}, {"line": []}, {"line": {"number": "1"}}, *({"line": each} for each in STRANGE_LINES)],
    records.TAKEN_IN: [
        {},
        {"id": ["x"], "path": "y"},
        {"id": "x", "path": {}},
        {"id": "x", "path": "y", "test_reads": "3"},
    ],
    records.STARTED: [{}, {"training": [], "attempt": 0, "began": 0, "gpus": 0}],
    records.AT_A_TIME: [{}, {"number": "two", "reason": ""}],
    records.FITS: [{}, {"device": {}, "micro_batch": 1}],
    records.STOPPING: [{}, {"reason": ["x"]}],
}
READERS = ("status {}", "report {}", "ls {} --json", "test {}", "export {} {}/out")


@pytest.mark.parametrize("kind", STRANGE_RECORDS)
def test_a_record_that_is_not_of_its_type_is_one_message(kind, study_dir, tmp_path, capsys):
    """Records are found in one place, which has a type for each kind: no command meets anything else."""
    assert STRANGE_RECORDS.keys() == records.TYPES.keys()
    for number, content in enumerate(STRANGE_RECORDS[kind]):
        copy = shutil.copytree(study_dir, tmp_path / f"copy{number}")
        with holding(copy) as log:
            log.write({"kind": kind, **content})
        codes = set()
        for command in READERS:
            codes.add(crash_host.call(command.format(copy, tmp_path).split()))
            told = capsys.readouterr().err
            assert "Traceback" not in told, (command, told)
            assert "internal error" not in told, (command, told)
        assert 1 not in codes, content


def test_records_of_the_log_are_looked_for_in_one_place():
    found = {path.name for path in Path("carft_ray").rglob("*.py") if re.search(r"\blog\.records\b", path.read_text())}
    assert found == {"records.py"}


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


# ---- the files that the recipe of a study in a bucket names


OPENED = []  # folder, what was opened below it


@pytest.fixture(scope="session")
def _audited():
    def hook(event, given):
        if OPENED and event in ("open", "os.listdir", "os.scandir") and isinstance(given[0], str | bytes | os.PathLike):
            path = os.path.abspath(os.fsdecode(given[0]))
            OPENED.extend([path] if path.startswith(OPENED[0]) else [])

    sys.addaudithook(hook)


@pytest.fixture
def opened(_audited, tmp_path):
    """Gives all paths below ``victim`` that this process has opened or listed."""
    OPENED[:] = [str(tmp_path / "victim")]
    yield lambda: OPENED[1:]
    OPENED.clear()


@pytest.fixture
def server(monkeypatch, tmp_path):
    with impatient(monkeypatch, tmp_path / "cache") as server:
        yield server


def strangers(recipe, folder, monkeypatch, server, num=0):
    """Has another machine put a study into a bucket; returns its address."""
    with monkeypatch.context() as elsewhere:
        elsewhere.setenv("XDG_CACHE_HOME", str(folder / "cache"))
        report_studies.make(folder / "study", num, RECIPE if num else recipe)
        logs.set_recipe(folder / "study", recipe)
    copied(folder / "study", server.address("study"))
    return server.address("study")


def naming(recipe, victim):
    """A recipe that names files of the user in every way in which one can."""
    content = recipe.model_dump(mode="json")
    table = {"source": "table", "path": f"{victim}/t.csv", "root": f"{victim}/root", "class_names": f"{victim}/names"}
    content["data"]["train"] = table
    content["data"]["id_val"] = {"source": "folder", "path": f"{victim}/images", "exclude": f"{victim}/bad.csv"}
    content["data"]["id_test"] = {
        "source": "corrupted",
        "severity": 1,
        "of": {"source": "webdataset", "path": f"{victim}/0.tar"},
    }
    content["data"] |= {"cache_dir": f"{victim}/cache", "cache_gb": 1e-6}
    content["model"] = {"name": f"local-dir:{victim}/model"}
    content["search"]["warm_start"] = [f"{victim}/first", "s3://mine/second"]
    return Recipe.model_validate(content)


NAMED = {
    "data.train.path": "t.csv",
    "data.train.root": "root",
    "data.train.class_names": "names",
    "data.id_val.path": "images",
    "data.id_val.exclude": "bad.csv",
    "data.id_test.of.path": "0.tar",
    "model.name": "model",
    "search.warm_start.0": "first",
}


@pytest.mark.slow
def test_a_study_in_a_bucket_that_this_machine_has_not_written_reads_no_file_outside_of_it(
    server, victim, tmp_path, monkeypatch, capsys, opened
):
    victim = victim.parent
    address = strangers(naming(RECIPE, victim), tmp_path / "stranger", monkeypatch, server, 3)
    objects, before = server.objects(), everything(victim)
    del OPENED[1:]
    refused = {
        "resume": [],
        "confirm": [],
        "test": [],
        "evaluate": [],
        "export": ["--to", str(tmp_path / "export")],
        "reproduce": [],
    }
    for verb, more in refused.items():
        assert crash_host.call([verb, address, *more]) == 2, verb
        told = " ".join(capsys.readouterr().err.split())
        for key, name in NAMED.items():
            rule = f"{key}: must be inside {address}, a study that this machine has not written"
            assert f"{rule}, but got '{victim}/{name}'" in told or f"{rule}, but got {victim}/{name}" in told, (
                verb,
                told,
            )
        assert "search.warm_start.1: must be inside" in told
        assert f"carft-ray {verb} {address} {' '.join([*more, '--trust-paths'])}" in told
        assert "cache_dir" not in told
    copy = fetched(address)
    for words in (
        ["train", f"{copy}/resolved.yaml", "--out", address, "--resume"],
        ["search", f"{copy}/resolved.yaml", "--study", address],
        ["doctor", f"{copy}/resolved.yaml"],
    ):
        (copy / "resolved.yaml").write_text(dump_recipe(naming(RECIPE, victim)))
        assert crash_host.call(words) == 2, words
        assert f"data.train.class_names: must be inside {address}" in capsys.readouterr().err
    for words in (["status"], ["ls"], ["report"], ["rescore", "--objective", "harmonic"], ["logs", "zero_shot"]):
        assert crash_host.call([words[0], address, *words[1:]]) != UsageError.exit_code, words
    assert crash_host.call(["report", address, "--html", "--out", str(tmp_path / "page.html")]) == 0
    assert crash_host.call(["compare", f"{address}:0", f"{address}:1"]) == 0
    for function in (carft_ray.resume, carft_ray.confirm, carft_ray.evaluate):
        with pytest.raises(UsageError, match="a study that this machine has not written"):
            function(address)
    assert opened() == []
    assert everything(victim) == before
    assert server.objects() == objects


@pytest.mark.parametrize("up", ["{..,..}", "{.,.}.", ".{,}.", "{a,{..,..}}"])
def test_a_pattern_in_a_study_that_leads_out_of_it_counts_as_outside(tmp_path, monkeypatch, up):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    copy = cache.user_cache_dir() / DRIVEN / "0123" / "study"
    (copy / "sub").mkdir(parents=True)
    copy.parent.with_suffix(".txt").write_text("s3://strangers/study")
    sets = {"source": "table", "path": f"{copy}/sub/{up}/{up}/t.csv"}
    data = RECIPE.data.model_dump(mode="json", exclude_unset=True)
    content = RECIPE.model_dump(mode="json", exclude_unset=True)
    recipe = Recipe.model_validate({**content, "data": {**data, "train": sets}})
    with pytest.raises(UsageError, match=r"data.train.path: must be inside s3://strangers/study"):
        allowed(copy, recipe, recipe, (), False, "resume {}")
    sets["path"] = f"{copy}/sub/{{000..012}}/{{a.x,b.x}}/t.csv"
    recipe = Recipe.model_validate({**content, "data": {**data, "train": sets}})
    assert allowed(copy, recipe, recipe, (), False, "resume {}") == recipe


def test_a_kill_right_after_a_study_has_its_recipe_leaves_it_written_by_this_machine(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    copy, spec = cache.user_cache_dir() / DRIVEN / "0123" / "study", {"source": "folder", "path": "/images"}
    copy.mkdir(parents=True)
    copy.parent.with_suffix(".txt").write_text("s3://mine/study")
    recipe = Recipe.model_validate({"data": {"train": spec, "id_val": {**spec, "path": "/others"}}})
    with holding(copy) as log, monkeypatch.context() as patch:
        commit = log.commit

        @contextlib.contextmanager
        def killed(*records):
            with commit(*records):
                yield
            raise KeyboardInterrupt

        patch.setattr(log, "commit", killed)
        with pytest.raises(KeyboardInterrupt):
            claim(copy, log, recipe)
    assert study_recipe(copy, log_of(copy)) == recipe
    assert is_written(copy, recipe)


def test_a_search_of_another_user_leaves_a_study_the_cache_that_it_does_not_use(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "mine"))
    recipe = RECIPE.model_copy(update={"data": RECIPE.data.model_copy(update={"cache_dir": str(tmp_path / "large")})})
    with open_study(tmp_path / "study", recipe):
        pass
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "of another user"))

    def used(*overrides, trust_paths=False):
        kept = study_recipe(tmp_path / "study", log_of(tmp_path / "study"))
        return recipe_for_use(tmp_path / "study", kept, "resume {}", overrides, trust_paths)

    later = used("search.trials=9")
    assert later.data.cache_dir is None
    with open_study(tmp_path / "study", later):
        pass
    assert used().data.cache_dir is None
    assert used(trust_paths=True).data.cache_dir == str(tmp_path / "large")
    assert study_recipe(tmp_path / "study", log_of(tmp_path / "study")).search.trials == 9
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "mine"))
    with open_study(tmp_path / "study", used(trust_paths=True)):
        pass
    with open_study(tmp_path / "study", RECIPE):  # who has written it says so anew
        pass
    assert study_recipe(tmp_path / "study", log_of(tmp_path / "study")).data.cache_dir is None


def test_the_command_of_a_refusal_may_have_braces(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    copy = cache.user_cache_dir() / STUDIES / "0123" / "{study}"
    copy.mkdir(parents=True)
    copy.parent.with_suffix(".txt").write_text("s3://strangers/{study}")
    spec = {"source": "folder", "path": "/images"}
    recipe = Recipe.model_validate({"data": {"train": spec, "id_val": {**spec, "path": "/others"}}})
    command = "carft-ray export 's3://strangers/{study}' --to '{out}' --trust-paths"
    with pytest.raises(UsageError, match=re.escape(command)):
        allowed(copy, recipe, recipe, (), False, "export {} --to '{out}'")


def test_code_that_only_the_log_names_is_never_run(study_dir):
    """``--trust`` is about the code of the recipe; trials and baselines in the log may be a stranger's, too."""
    with open_study(study_dir, RECIPE) as study:
        recover_running(study)
        values = {"learning_rate": 1e-3, "function": "evil:run", "function_dir": str(study_dir)}
        study.journal.add("trial", "t0009-evil", values)
    with open_study(study_dir, RECIPE) as study:
        recover_running(study)
        with pytest.raises(StorageError, match=r"trial t0009-evil: function must be the recipe's, but got 'evil:run'"):
            list(iter(study.next, None))


@pytest.mark.slow
def test_lines_of_a_local_file_come_into_a_strangers_bucket_only_with_trust_paths(
    server, tmp_path, monkeypatch, capsys
):
    path = short_training.make(tmp_path / "victim")
    secret = tmp_path / "victim" / "passwords.txt"
    secret.write_text("".join(f"hunter-{number}\n" for number in range(5)))
    rows = [
        f"{image},{short_training.CLASSES.index(image.parent.name)}"
        for image in sorted((tmp_path / "victim/images/photo").rglob("*.png"))
    ]
    table = tmp_path / "victim" / "t.csv"
    table.write_text("image,label\n" + "".join(f"{row}\n" for row in rows))
    sets = f"source: table, path: {table}, class_names: {secret}"
    words = [f"data.train={{{sets}, part: [0, 0.6]}}", f"data.id_val={{{sets}, part: [0.6, 1]}}"]
    words += ["data.ood_val={}", "search.trials=1", "train.epochs=1", "resources.executor=debug", "data.cache_gb=1e-6"]
    address = strangers(load_recipe(path, words), tmp_path / "stranger", monkeypatch, server)
    before = server.objects()
    assert crash_host.call(["resume", address]) == 2
    assert "data.train.class_names: must be inside" in capsys.readouterr().err
    assert server.objects() == before

    def told():
        return b"".join(server.objects().values()).count(b"hunter-3")

    assert told() == 0
    moved = [each for word in words[:2] for each in ("--set", word)]
    assert crash_host.call(["resume", address, *moved[:2]]) == 2, "the others are the study's still"
    assert "data.train.class_names: must be inside" not in capsys.readouterr().err
    assert crash_host.call(["resume", address, "--trust-paths"]) == 0
    assert told()
    capsys.readouterr()
    for words in (["resume", address], ["evaluate", address]):
        assert crash_host.call(words) == 0, "this machine has written it"
    copy, more = fetched(address), {"search": {"trials": 9}, "resources": {"threads": 1}}
    kept = study_recipe(copy, log_of(copy))
    for change, is_known in (
        (more, True),
        ({"data": {"cache_gb": 1e-9}}, False),
        ({"model": {"name": "sandbox"}}, False),
    ):
        parts = {name: getattr(kept, name).model_copy(update=values) for name, values in change.items()}
        assert is_written(copy, kept.model_copy(update=parts)) is is_known, change


@pytest.mark.slow
def test_the_recipe_of_the_user_is_enough_on_a_machine_that_comes_back(server, tmp_path, monkeypatch, capsys):
    recipe, address = str(short_training.make(tmp_path)), server.address("study")
    words = ["search", recipe, "--study", address, "--executor", "debug", "--set", "search.trials=1"]
    assert crash_host.call(words) == 0
    assert crash_host.call(["evaluate", address]) == 0
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "another machine"))
    assert crash_host.call(["evaluate", address]) == 2
    assert crash_host.call(words) == 0
    assert crash_host.call(["evaluate", address]) == 0


def test_a_set_that_a_study_claims_to_have_listed_is_not_taken_for_one_of_the_sandbox(tmp_path):
    recipe = load_recipe(short_training.make(tmp_path / "victim"))
    folder = tmp_path / "prepared"
    write_sets(recipe, folder)
    sandbox = {"source": "sandbox", "domain": "photo", "split": "val", "num_per_class": 2}
    drawn = recipe.model_copy(update={"data": DataConfig(train=sandbox, id_val={**sandbox, "split": "test"})})
    for path in (folder / "sets").iterdir():
        table = open_table(path)
        about = json.loads(table.schema.metadata[b"about"])
        about["key"] = sets._key(drawn, path.stem)
        write_table(path, table.replace_schema_metadata({"about": json.dumps(about)}))
    assert {type(source).__name__ for source in open_sets(drawn, folder).values()} == {"SandboxSource"}


@pytest.mark.slow
def test_the_cache_of_a_study_in_a_folder_counts_only_where_this_machine_has_written_it(
    tmp_path, monkeypatch, capsys, caplog
):
    path = short_training.make(tmp_path)
    more = ["--set", "data.cache_dir=theirs", "--set", "data.cache_gb=0.000001", "--set", "search.trials=1"]
    words = ["search", str(path), "--study", str(tmp_path / "study"), "--executor", "debug", *more]
    assert crash_host.call(words) == 0
    theirs = tmp_path / "theirs"
    shutil.rmtree(theirs)
    assert crash_host.call(["evaluate", str(tmp_path / "study")]) == 0
    assert theirs.exists(), "this machine has written the study"
    shutil.rmtree(theirs)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "elsewhere"))
    mine = tmp_path / "elsewhere" / "carft-ray"
    with cache.own_folder(mine, "targets", "0" * 32):
        pass
    for verb in (["evaluate"], ["resume", "--trials", "+1"]):
        caplog.clear()
        assert crash_host.call([verb[0], str(tmp_path / "study"), *verb[1:]]) == 0
        assert f"data.cache_dir: {theirs} and data.cache_gb: 1e-06 of the study has no effect" in caplog.text
        assert not theirs.exists()
        assert (mine / "targets" / ("0" * 32)).exists(), "the limit of the study does not hold, either"
    again = ["resume", str(tmp_path / "study"), "--trials", "+1", "--set", f"data.cache_dir={theirs}"]
    assert crash_host.call(again) == 0
    assert theirs.exists()
