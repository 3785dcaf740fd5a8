"""What is sent to a cluster with a search: recipe, lists, variables, the package; and what is not. No Ray runs."""

import json
import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from dashboard_stand_in import RECIPE, answering, ended, settle, told

from carft_ray import environment
from carft_ray.cli.submit import BUCKET_KEYS
from carft_ray.errors import UsageError
from carft_ray.launch.cluster import job_upload, jobs
from carft_ray.recipe.loading import load_recipe


@pytest.fixture
def dashboard():
    with answering() as dashboard:
        yield dashboard


@pytest.fixture
def here(tmp_path, monkeypatch):
    return settle(tmp_path, monkeypatch)


@pytest.fixture
def submit(run, dashboard):
    return ended(run, "submit", dashboard)


def test_the_recipe_that_is_sent_is_the_same_recipe_with_its_lists_next_to_it(here, tmp_path_factory):
    recipe = load_recipe(here / "r.yaml", ["search.trials=3"])
    sent = job_upload.search_upload(recipe, Path("studies/first"), ["--change-space"], here)
    folder = tmp_path_factory.mktemp("unpacked")
    sent.write(folder)
    names = {str(path.relative_to(folder)): path.read_text() for path in folder.rglob("*") if path.is_file()}
    assert names == sent.files
    assert {**names, "recipe.yaml": ""} == {"recipe.yaml": "", "files/0-bad.csv": "1\n", "files/1-bad.csv": "2\n"}
    again = load_recipe(folder / "recipe.yaml")
    assert again.prompts.templates == ("a photo of a {}", "a {}")  # the file itself is not needed any more
    assert (again.search, again.train) == (recipe.search, recipe.train)
    assert again.data.train.path == "/far/shards"
    assert again.data.id_val.path == str(here / "val.tar")
    assert again.data.train.class_names == again.data.id_val.class_names == ("cat", "dog")
    assert again.data.id_val.exclude == str(folder / "files/1-bad.csv")
    assert sent.paths == (Path("/far/shards"), here / "val.tar")
    kept = f"{here}/studies/first.recipe/{sent.command.split('first.recipe/')[1][:8]}"
    command = f"exec python -m carft_ray.cli search {kept}/recipe.yaml --study {here}/studies/first --address auto"
    assert sent.command == f"mkdir -p {kept} && cp -R ./. {kept} || exit 5; {command} --change-space"
    source = environment.code()["source"]
    check = "python -m carft_ray.launch.cluster.job_package"
    assert sent.entrypoint(installed=False) == f"{check} {source} || exit 5; {sent.command}"
    assert sent.entrypoint(installed=True) == f"{check} || exit 5; {sent.command}"
    assert job_upload.search_upload(recipe, Path("studies/first"), ["--change-space"], here) == sent
    (here / "names.txt").write_text("dog\ncat\n")
    assert job_upload.search_upload(recipe, Path("studies/first"), ["--change-space"], here).command != sent.command
    (here / "more/bad.csv").unlink()  # then it is one of the cluster
    sent = job_upload.search_upload(recipe, here / "study", [], here)
    assert sent.paths[-1] == here / "more/bad.csv"
    assert f"exclude: {here}/more/bad.csv" in sent.files["recipe.yaml"]
    sent = job_upload.search_upload(recipe, here / "a study; rm", ["--again", "it's me"], here)
    words = shlex.split(sent.command)  # paths with spaces stay one word for the shell
    assert (words[words.index("--study") + 1], words[-1]) == (f"{here}/a study; rm", "it's me")
    assert jobs.job_id(here / "a study; rm").startswith("carft-a-study-rm-")


def test_a_study_in_a_bucket_keeps_its_recipe_in_the_cache_of_the_head(here, submit, monkeypatch):
    for name in BUCKET_KEYS:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "an-id")
    address = "s3://bucket/studies/first"
    out, err = submit(0, "r.yaml", "--study", f"{address}/", "--dry-run", "--json")
    found = json.loads(out)
    assert found["study"] == address
    assert found["job"] == jobs.job_id(address) != jobs.job_id(here / "first")
    assert "an-id" not in out + err
    assert "If the cluster has none, add --env AWS_ACCESS_KEY_ID." in told(err)
    copied = found["entrypoint"].partition("; ")[2].replace("exec python -m carft_ray.cli", "echo")
    home = {"HOME": f"{here}/a home", "PATH": os.environ["PATH"]}
    printed = subprocess.check_output(["sh", "-c", copied], env=home, cwd=here / "more", text=True)
    kept = next(here.glob("a home/.cache/carft-ray/recipes/*"))
    assert (kept / "bad.csv").read_text() == "2\n"
    assert printed == f"search {kept}/recipe.yaml --study {address} --address auto\n"
    out, _ = submit(0, "--resume", address, "--dry-run", "--json", "--env", "AWS_ACCESS_KEY_ID")
    assert f"resume {address} --address auto" in json.loads(out)["entrypoint"]
    assert "an-id" not in out
    _, err = submit(2, "--resume", "s3://No Bucket/first", "--dry-run")
    assert "must be a bucket and perhaps a prefix" in told(err)


def test_a_dry_run_prints_all_that_would_be_sent_and_sends_nothing(here, dashboard, submit):
    words = ("r.yaml", "--study", "study", "--dry-run", "--set", "search.trials=3")
    out, err = submit(0, *words, "--set", "tracking.wandb.project=mine")
    for text in ("If the cluster has none, add --env WANDB_API_KEY", "under these absolute paths", "Nothing was sent."):
        assert text in told(err)
    for text in (dashboard.address, jobs.job_id(here / "study"), "trials: 3", "files/0-bad.csv: 2"):
        assert text in out
    for text in ("path: /far/shards is_here: false", f"py_modules: - {environment.PACKAGE_DIR}"):
        assert text in told(out)
    found = json.loads(submit(0, *words, "--json", "--installed")[0])
    assert found["runtime_env"] == {"env_vars": {"RAY_JOB_STOP_WAIT_TIME_S": "120"}}
    assert found["not_sent"][0] == {"path": "/far/shards", "is_here": False}
    assert found["files"]["files/1-bad.csv"] == 2
    assert dashboard.headers == []


@pytest.mark.parametrize(
    ("key", "way"), [("class_names", "absolute"), ("class_names", "link"), ("exclude", "relative"), ("exclude", "link")]
)
def test_a_file_that_a_strangers_recipe_names_outside_its_folder_is_not_sent(here, dashboard, submit, key, way):
    secret = here / "home" / ".ssh" / "id_rsa"
    secret.parent.mkdir(parents=True)
    secret.write_text("-----BEGIN OPENSSH PRIVATE KEY-----\nc2VjcmV0\n")
    (here / "strange").mkdir()
    (here / "strange" / "list.txt").symlink_to(secret)
    named = {"absolute": str(secret), "relative": "../home/.ssh/id_rsa", "link": "list.txt"}[way]
    other = {"class_names": "exclude: [1]", "exclude": "class_names: [cat, dog]"}[key]
    text = RECIPE.replace("class_names: names.txt, exclude: lists/bad.csv", f"{key}: {named}, {other}", 1)
    text = text.replace(", exclude: more/bad.csv", "").replace("class_names: names.txt", "class_names: [cat, dog]")
    (here / "strange" / "r.yaml").write_text(text.replace("file:templates.txt", "simple"))
    for more in ([], ["--dry-run"]):
        out, err = submit(2, "strange/r.yaml", "--study", "study", *more)
        assert f"must be in the folder of the recipe, {here}/strange, to be sent to the cluster" in told(err)
        assert "Then add --send " in told(err)
        assert "id_rsa" in err
        assert "c2VjcmV0" not in out + err
    assert (dashboard.headers, dashboard.jobs) == ([], {})


@pytest.mark.parametrize("way", ["absolute", "relative", "link", "set"])
def test_a_file_of_templates_outside_the_folder_of_the_recipe_is_not_even_read(here, dashboard, submit, way):
    secret = here / "home" / "notes.txt"
    secret.parent.mkdir()
    secret.write_text("a sentence of mine\nanother {} of mine\n")
    (here / "strange").mkdir()
    (here / "strange" / "list.txt").symlink_to(secret)
    named = {"relative": "../home/notes.txt", "link": "list.txt"}.get(way, str(secret))
    text = RECIPE.replace("class_names: names.txt, exclude: lists/bad.csv", "class_names: [cat, dog]")
    text = text.replace("class_names: names.txt, exclude: more/bad.csv", "class_names: [cat, dog]")
    (here / "strange" / "r.yaml").write_text(text.replace("templates.txt", named) if way != "set" else text)
    more = ["--set", f"prompts.templates=file:{secret}"] if way == "set" else []
    for dry in ([], ["--dry-run"]):
        out, err = submit(2, "strange/r.yaml", "--study", "study", *more, *dry)
        assert f"{secret}: must be in the folder of the recipe, {here}/strange, to be sent" in told(err)
        assert "sentence" not in out + err
    assert (dashboard.headers, dashboard.jobs) == ([], {})
    secret.write_text("a picture of {}\n")
    out, _ = submit(0, "strange/r.yaml", "--study", "study", *more, "--dry-run", "--send", str(secret))
    assert "a picture of {}" in out


def test_a_list_outside_the_folder_of_the_recipe_is_sent_where_it_is_asked_for(here, tmp_path_factory):
    lists = tmp_path_factory.mktemp("lists")
    (here / "names.txt").rename(lists / "names.txt")
    (here / "lists/bad.csv").write_text("path,sample_id,note\na.png,18446744073709551615,of mine\n")
    (here / "r.yaml").write_text(RECIPE.replace("names.txt", str(lists / "names.txt")))
    recipe = load_recipe(here / "r.yaml")
    for send in ([lists / "names.txt"], [lists]):
        sent = job_upload.search_upload(recipe, here / "study", [], here, send)
        assert sent.files["files/0-bad.csv"] == "18446744073709551615\n"  # what was read, and no other column
        assert "names.txt" not in sent.files["recipe.yaml"]
        assert "- cat" in sent.files["recipe.yaml"]
    with pytest.raises(UsageError, match=r"names.txt: must be in the folder of the recipe"):
        job_upload.search_upload(recipe, here / "study", [], here, [here / "lists"])


def test_variables_are_given_by_name_and_their_values_reach_the_job_alone(here, dashboard, submit, monkeypatch):
    monkeypatch.setenv("WANDB_API_KEY", "a secret key")
    monkeypatch.setenv("NCCL_SOCKET_IFNAME", "eth0")
    words = ("r.yaml", "--study", "study", "--env", "WANDB_API_KEY", "--env", "NCCL_SOCKET_IFNAME")
    out, err = submit(0, *words, "--dry-run", "--json")
    assert json.loads(out)["runtime_env"]["env_vars"]["WANDB_API_KEY"] == "(its value here)"
    assert "a secret key" not in out + err
    out, err = submit(0, *words, "--no-wait")
    assert "a secret key" not in out + err
    (sent,) = dashboard.jobs.values()
    given = {"WANDB_API_KEY": "a secret key", "NCCL_SOCKET_IFNAME": "eth0", "RAY_JOB_STOP_WAIT_TIME_S": "120"}
    assert sent["runtime_env"]["env_vars"] == given
    del sent["runtime_env"]["env_vars"]
    assert "a secret key" not in json.dumps(sent, default=str)
    assert not any("a secret key" in path.read_text(errors="ignore") for path in here.rglob("*") if path.is_file())


# the package


def begin(*words, **environ):
    command = [sys.executable, "-m", "carft_ray.launch.cluster.job_package", *words]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, **environ})
    return done.returncode, told(done.stderr)


@pytest.mark.slow
def test_a_job_begins_with_the_code_that_was_sent_and_its_libraries_or_says_what_it_lacks(tmp_path):
    source = environment.code()["source"]
    assert begin(source) == begin() == (0, "")
    code, err = begin("0123456789abcdef")
    assert code == 5
    assert f"must run the code that was sent, 0123456789abcdef, but got {source} of {environment.PACKAGE_DIR}" in err
    about = tmp_path / "carft_ray-0.1.0.dist-info"  # comes first, as the folder that was sent
    about.mkdir()
    needs = "Requires-Dist: no-such-library>=2\nRequires-Dist: torch\nRequires-Dist: nor-this; extra == 'hf'\n"
    (about / "METADATA").write_text(f"Metadata-Version: 2.1\nName: carft-ray\nVersion: 0.1.0\n{needs}")
    path = os.pathsep.join([str(tmp_path), str(environment.PACKAGE_DIR.parent)])
    code, err = begin(source, PYTHONPATH=path)
    assert code == 5
    assert "lacks no-such-library Install it on all nodes" in err
