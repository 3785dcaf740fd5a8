"""Searches that are submitted to a cluster: what is sent, to whom, what comes back. The dashboard is a stand-in."""

import asyncio
import io
import json
import os
import re
import shlex
import socket
import subprocess
import sys
import threading
import zipfile
from collections import Counter
from pathlib import Path

import pytest
from aiohttp import web

from carft_ray import __version__, environment
from carft_ray.cli.submit import BUCKET_KEYS
from carft_ray.errors import UsageError
from carft_ray.launch import job_upload, jobs
from carft_ray.launch.ray_private import read_authentication_anew
from carft_ray.recipe.loading import load_recipe

RECIPE = """
data:
  train: {source: webdataset, path: /far/shards, label: cls, class_names: names.txt, exclude: lists/bad.csv}
  id_val: {source: webdataset, path: val.tar, label: cls, class_names: names.txt, exclude: more/bad.csv}
prompts: {templates: "file:templates.txt"}
train: {batch_size: 4}
search: {space: {kl_weight: {low: 1, high: 2}}}
"""


class Dashboard:
    """What the server answers, and what it was sent.

    A search ends when its status was asked ``polls`` times; its log, of ``pieces``, grows by one with each of them.
    """

    def __init__(self):
        self.address, self.token, self.version = "", "", "2.60.0"
        self.jobs, self.packages, self.headers, self.stopped, self.asked = {}, {}, [], [], Counter()
        self.polls, self.pieces = 2, ["first line\n", "second line\n"]
        self.end = {"status": "SUCCEEDED", "driver_exit_code": 0}
        self.is_deaf = False  # jobs go on when they are asked to stop
        self.without_agent = 0  # of the submissions: so many come before the head has an agent
        # of the questions for a job's status: not answered, with "no such job", with a log that cannot be had
        self.away, self.forgets, self.without_log = (), (), ()

    def add(self, name, study, **more):
        """Adds a job as if somebody had submitted it."""
        self.jobs[name] = {
            "type": "SUBMISSION",
            "submission_id": name,
            "status": "RUNNING",
            "entrypoint": "exec search",
            "metadata": {"study": str(study)},
            "runtime_env": {},
            "start_time": 1_700_000_000_000 + len(self.jobs),
            **more,
        }

    def sent(self):
        """The files of the folders that were sent: name -> bytes."""
        found = {}
        for data in self.packages.values():
            with zipfile.ZipFile(io.BytesIO(data)) as archive:
                found |= {name: archive.read(name) for name in archive.namelist() if not name.endswith("/")}
        return found

    @web.middleware
    async def _guard(self, request, handler):
        self.headers.append(request.headers.get("Authorization"))
        if self.token and request.headers.get("Authorization") != f"Bearer {self.token}":
            known = "Authorization" in request.headers
            return web.Response(status=403 if known else 401, text="Forbidden" if known else "Unauthorized")
        return await handler(request)

    async def _version(self, request):
        return web.json_response({"version": "4", "ray_version": self.version, "ray_commit": "", "session_name": ""})

    async def _has_package(self, request):
        return web.Response(status=200 if request.match_info["name"] in self.packages else 404)

    async def _take_package(self, request):
        self.packages[request.match_info["name"]] = await request.read()
        return web.Response()

    async def _submit(self, request):
        asked = await request.json()
        if self.without_agent > 0:
            self.without_agent -= 1
            return web.Response(status=500, text="No available agent to submit job, please try again later.")
        if asked["submission_id"] in self.jobs:
            return web.Response(status=500, text=f"Job with submission_id {asked['submission_id']} already exists.")
        self.add(asked["submission_id"], "", **{key: asked[key] for key in ("entrypoint", "metadata", "runtime_env")})
        return web.json_response({"job_id": asked["submission_id"], "submission_id": asked["submission_id"]})

    def _job(self, request):
        name = request.match_info["job"]
        if name not in self.jobs:
            raise web.HTTPNotFound(text=f"Job {name} does not exist")
        return self.jobs[name]

    async def _info(self, request):
        job = self._job(request)
        self.asked[job["submission_id"]] += 1
        asked = self.asked[job["submission_id"]]
        if asked in self.away:
            request.transport.abort()
        if asked in self.forgets:
            raise web.HTTPNotFound(text="Job does not exist")
        if job["status"] == "RUNNING" and asked > self.polls:
            job.update(self.end, end_time=job["start_time"] + 65_000)
        return web.json_response(job)

    async def _list(self, request):
        driver = {"type": "DRIVER", "job_id": "01000000", "status": "RUNNING", "entrypoint": "python x.py"}
        return web.json_response([*self.jobs.values(), driver])

    async def _logs(self, request):
        job = self._job(request)
        asked = self.asked[job["submission_id"]]
        if asked in self.without_log:
            return web.Response(status=500, text="its node is gone")
        shown = self.pieces[: asked or None] if job["status"] == "RUNNING" else self.pieces
        return web.json_response({"logs": "".join(shown)})

    async def _stop(self, request):
        job = self._job(request)
        self.stopped.append(request.match_info["job"])
        if not self.is_deaf:
            job["status"] = "STOPPED"
        return web.json_response({"stopped": True})

    def application(self):
        found = web.Application(middlewares=[self._guard], client_max_size=2**30)
        get, post, job = found.router.add_get, found.router.add_post, "/api/jobs/{job}"
        get("/api/version", self._version)
        get("/api/packages/gcs/{name}", self._has_package)
        found.router.add_put("/api/packages/gcs/{name}", self._take_package)
        post("/api/jobs/", self._submit)
        get("/api/jobs/", self._list)
        get(job, self._info)
        get(f"{job}/logs", self._logs)
        post(f"{job}/stop", self._stop)
        return found


@pytest.fixture
def dashboard():
    """Gives a ``Dashboard`` that answers at its address."""
    dashboard, loop = Dashboard(), asyncio.new_event_loop()
    runner = web.AppRunner(dashboard.application(), shutdown_timeout=0.1)
    loop.run_until_complete(runner.setup())
    loop.run_until_complete(web.TCPSite(runner, "127.0.0.1", 0).start())
    dashboard.address = f"http://127.0.0.1:{runner.addresses[0][1]}"
    thread = threading.Thread(target=loop.run_forever)
    thread.start()
    try:
        yield dashboard
    finally:
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        loop.run_until_complete(runner.cleanup())
        loop.close()


@pytest.fixture
def here(tmp_path, monkeypatch):
    """A recipe with small files, a home without a token, and no cluster in the environment."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    for name in (*jobs.REDIRECTIONS, jobs.TOKEN, jobs.TOKEN_PATH, "RAY_AUTH_MODE"):
        monkeypatch.delenv(name, raising=False)
    read_authentication_anew()  # another test may have had a cluster
    monkeypatch.setattr(jobs, "POLL_S", 0.05)
    (tmp_path / "r.yaml").write_text(RECIPE)
    texts = {"names.txt": "cat\ndog\n", "templates.txt": "a photo of a {}\na {}\n", "val.tar": "images"}
    for name, text in {**texts, "lists/bad.csv": "1\n", "more/bad.csv": "2\n"}.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    return tmp_path


def ended(run, command, dashboard):
    """Gives a function that runs a command, which must end with a code; it returns what was printed."""

    def call(code, *words):
        found, out, err = run(command, *words, "--address", dashboard.address)
        assert found == code, err
        return out, err

    return call


@pytest.fixture
def submit(run, dashboard):
    return ended(run, "submit", dashboard)


def told(text):
    """A message on one line, as it would be in a wide terminal."""
    return " ".join(text.split())


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
    check = "python -m carft_ray.launch.job_package"
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


@pytest.mark.slow
def test_a_search_is_submitted_with_this_package_followed_to_its_end_and_its_exit_code_is_ours(
    here, dashboard, submit, monkeypatch
):
    for redirection in jobs.REDIRECTIONS:
        monkeypatch.setenv(redirection, "http://127.0.0.1:9")
    dashboard.pieces = [f"line {n}\n" for n in range(7)]
    dashboard.polls, dashboard.without_log = 5, (2, 3, 5)  # when the log cannot be had
    out, err = submit(0, "r.yaml", "--study", "study")
    assert out == "".join(dashboard.pieces)
    (name,) = dashboard.jobs
    assert name == jobs.job_id(here / "study")
    assert f"Submitted {name} to {dashboard.address}. Its study" in told(err)
    job, sent = dashboard.jobs[name], dashboard.sent()
    assert job["metadata"] == {"study": str(here / "study"), "version": __version__}
    assert job["runtime_env"]["env_vars"]["RAY_JOB_STOP_WAIT_TIME_S"] == "120"
    assert {"recipe.yaml", "files/0-bad.csv", "files/1-bad.csv"} <= set(sent)
    for path in environment.PACKAGE_DIR.rglob("*.py"):
        assert sent[f"carft_ray/{path.relative_to(environment.PACKAGE_DIR)}"] == path.read_bytes()
    assert f"carft_ray-{__version__}.dist-info/METADATA" in sent
    assert not any("__pycache__" in name for name in sent)
    submit(0, "r.yaml", "--study", "other", "--no-wait", "--installed")
    assert "py_modules" not in dashboard.jobs[jobs.job_id(here / "other")]["runtime_env"]
    dashboard.end = {"status": "FAILED", "driver_exit_code": -9, "error_type": "JOB_ENTRYPOINT_COMMAND_ERROR"}
    submit(137, "r.yaml", "--study", "study", "--json")
    assert [*dashboard.jobs][-1] == f"{name}-2"  # the first had ended


NEVER_RAN = {"status": "FAILED", "error_type": "RUNTIME_ENV_SETUP_FAILURE"}
NEVER_RAN["message"] = "Failed to set up runtime environment.\nNo space left on device\n"


@pytest.mark.parametrize(
    ("end", "code", "text"),
    [
        ({"status": "STOPPED"}, 130, "carft-ray submit --resume {here}/study --address {address}"),
        ({"status": "FAILED", "driver_exit_code": 6}, 6, "exit code 6"),
        (NEVER_RAN, 5, "must run to its end, but got Failed to set up runtime environment. No space left on device"),
    ],
)
def test_a_study_whose_job_runs_is_followed_to_its_end_and_nothing_is_submitted(
    here, dashboard, submit, end, code, text
):
    dashboard.add("carft-by-hand", here / "study")
    dashboard.end = end
    _, err = submit(code, "r.yaml", "--study", "study")
    assert text.format(here=here, address=dashboard.address) in told(err)
    assert "already runs" in err
    assert [*dashboard.jobs] == ["carft-by-hand"]
    assert dashboard.packages == {}


def test_resume_sends_the_command_alone(here, dashboard, submit):
    words = ("--resume", "study", "--trials", "+4", "--wall-time", "8h", "--warm-start", "other", "--no-wait")
    _, err = submit(0, *words, "--installed")
    (job,) = dashboard.jobs.values()
    options = f"--set budget.wall_time=8h --trials +4 --warm-start {here}/other"
    assert job["entrypoint"].endswith(f"exec python -m carft_ray.cli resume {here}/study --address auto {options}")
    assert dashboard.packages == {}
    assert f"carft-ray submit --attach {jobs.job_id(here / 'study')} --address {dashboard.address}" in err


@pytest.mark.slow
def test_attach_takes_a_job_or_a_study_json_has_the_end_and_ctrl_c_leaves_the_job(here, dashboard, submit, monkeypatch):
    dashboard.add("one", here / "study")
    out, err = submit(0, "--attach", "study", "--json")
    found = json.loads(out)
    assert (found["id"], found["status"], found["exit_code"]) == ("one", "SUCCEEDED", 0)
    assert "second line" in err
    assert f"Stop it with: ray job stop one --address {dashboard.address}" in told(err)
    assert submit(0, "--attach", "one")[0] == "first line\nsecond line\n"  # also when it has ended
    _, err = submit(5, "--attach", "two")
    assert "no such job or study: two" in told(err)

    def interrupted(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr(jobs, "follow", interrupted)
    _, err = submit(130, "r.yaml", "--study", "third")
    name = jobs.job_id(here / "third")
    assert f"Attach with: carft-ray submit --attach {name} --address {dashboard.address}" in told(err)
    assert dashboard.stopped == []


NO_VARIABLE = "must be the name of a variable that is set here, and that carft-ray does not set itself, but got"
NEW = "r.yaml --study x"


@pytest.mark.parametrize(
    ("line", "code", "rules"),
    [
        ("", 2, ["needs exactly one of: a recipe, --resume, --attach"]),
        (f"{NEW} --attach y", 2, ["needs exactly one of"]),
        ("--attach y --no-wait", 2, ["--no-wait: can only be used with a recipe or --resume"]),
        ("--attach y --set train.epochs=1 --trust", 2, ["--set: can only be used with a recipe or --resume"]),
        ("r.yaml", 2, ["needs --study as well"]),
        ("--resume x --study y", 2, ["needs a recipe as well"]),
        (f"{NEW} --trials 3", 2, ["can only be used with --resume"]),
        (f"{NEW} --set train.epochs=0 --executor fast", 3, ["epochs", ".executor"]),
        (f"{NEW} --env WANDB_API_KEY", 2, [f"{NO_VARIABLE} WANDB_API_KEY "]),
        (f"{NEW} --env HF_TOKEN=hf_secret", 2, [f"{NO_VARIABLE} HF_TOKEN "]),
        (f"{NEW} --env ''", 2, [f"{NO_VARIABLE} '' "]),
        (f"{NEW} --env RAY_JOB_STOP_WAIT_TIME_S", 2, [NO_VARIABLE]),  # set by carft-ray
        (f"{NEW} --env RAY_TRAIN_METRICS_ENABLED", 2, [NO_VARIABLE]),
    ],
)
def test_what_cannot_be_is_refused_before_the_cluster_is_asked(here, dashboard, submit, monkeypatch, line, code, rules):
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.setenv("RAY_TRAIN_METRICS_ENABLED", "1")
    _, err = submit(code, *shlex.split(line))
    assert [rule for rule in rules if rule not in told(err)] == []
    assert "hf_secret" not in err
    assert dashboard.headers == []


# the server


@pytest.mark.slow
def test_the_token_is_found_where_ray_finds_it_and_sent(here, dashboard, submit, monkeypatch):
    dashboard.token = "right"
    _, err = submit(5, "--attach", "x")
    assert "requires the token of the cluster: none" in told(err)
    assert "ray get-auth-token" in err
    (here / "home/.ray").mkdir(parents=True)
    (here / "home/.ray/auth_token").write_text("right\n")
    submit(0, "r.yaml", "--study", "study")
    (here / "t").write_text("wrong")
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(here / "t"))
    _, err = submit(5, "--attach", "x")
    assert f": the one from {here}/t" in told(err)
    monkeypatch.setenv("RAY_AUTH_TOKEN", "right")
    submit(0, "r.yaml", "--study", "study")
    assert set(dashboard.headers) == {None, "Bearer right", "Bearer wrong"}
    monkeypatch.delenv("RAY_AUTH_TOKEN")
    (here / "t").unlink()
    _, err = submit(2, "--attach", "x")
    assert "No such file" in err


def test_a_head_that_hangs_or_is_none_is_told_in_one_message(here, dashboard, run, monkeypatch):
    def message(address):
        code, _, err = run("submit", "--attach", "x", "--address", address)
        assert code in (2, 5)
        return told(err)

    with socket.create_server(("127.0.0.1", 0)) as silent, monkeypatch.context() as patience:
        patience.setattr(jobs, "SILENCE_S", 0.2)
        port = silent.getsockname()[1]
        assert ": silence for 0.2 s" in message(f"127.0.0.1:{port}")
    none = "no Ray dashboard answers"
    assert f"{none} at http://127.0.0.1:{port}: Connection refused" in message(f"127.0.0.1:{port}")
    for address in ("ray://head:10001", "auto"):
        assert "must be like http://127.0.0.1:8265" in message(address)
    assert none in message("http://no-such-host.invalid:8265")
    for version, said in (("1.8.0", "Ray version 1.8.0 is running on the cluster"), (None, none)):
        dashboard.version = version
        assert said in message(dashboard.address)


@pytest.mark.slow
def test_a_head_that_is_away_for_a_moment_is_asked_again_and_one_that_stays_away_or_forgets_the_job_is_told(
    here, dashboard, submit, monkeypatch
):
    dashboard.add("one", here / "study")
    dashboard.polls, dashboard.away = 8, range(2, 6)
    out, _ = submit(0, "--attach", "one")
    assert out == "first line\nsecond line\n"
    monkeypatch.setattr(jobs, "HEAD_MAY_BE_AWAY_S", 0.1)
    dashboard.add("two", here / "study")
    dashboard.polls, dashboard.away = 1000, range(3, 1000)
    _, err = submit(5, "--attach", "two")
    assert "no longer answers" in err
    assert "carft-ray submit --attach two" in told(err)
    dashboard.add("three", here / "study")
    dashboard.away, dashboard.forgets = (), range(3, 1000)
    _, err = submit(5, "--attach", "three")
    assert "no longer knows the job" in told(err)
    assert "The same command again resumes the study" in told(err)


def test_submit_waits_for_the_agent_of_the_head_and_names_its_port_where_there_is_none(
    here, dashboard, submit, monkeypatch
):
    dashboard.without_agent = 3
    _, err = submit(0, "r.yaml", "--study", "study", "--installed")
    assert told(err).count("The agent of the head, which starts jobs, is not running yet; waiting 60 s at most.") == 1
    assert [*dashboard.jobs] == [jobs.job_id(here / "study")]
    monkeypatch.setattr(jobs, "AGENT_WITHIN_S", 0.2)
    dashboard.without_agent = 10**6
    _, err = submit(5, "r.yaml", "--study", "other", "--installed")
    assert "must have an agent that starts jobs; it had none for 0.2 s" in told(err)
    assert "Another Ray on the head probably uses its port, 52365." in told(err)
    assert "ray start --head --dashboard-agent-listen-port 52366" in told(err)
    assert len(dashboard.jobs) == 1


# the package


def begin(*words, **environ):
    command = [sys.executable, "-m", "carft_ray.launch.job_package", *words]
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


@pytest.mark.slow
def test_the_commands_of_ray_that_submit_prints_list_a_job_print_its_log_and_stop_it(
    here, dashboard, submit, monkeypatch
):
    dashboard.token, dashboard.polls = "right", 1000
    monkeypatch.setenv("RAY_AUTH_TOKEN", "right")
    monkeypatch.setenv("RAY_ADDRESS", "http://127.0.0.1:9")
    monkeypatch.setenv("HF_TOKEN", "a secret key")
    _, err = submit(0, "r.yaml", "--study", "study", "--installed", "--no-wait", "--env", "HF_TOKEN")
    logs, stop, listing = re.findall(r"(?m)^  (env -u RAY_ADDRESS RAY_AUTH_MODE=token ray job .*)", err)
    name, path = jobs.job_id(here / "study"), f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"

    def printed(command):
        return subprocess.check_output(command, shell=True, text=True, env={**os.environ, "PATH": path})

    found = printed(listing)
    assert name in found
    assert str(here / "study") in found
    assert "a secret key" in found, "as docs/clusters.md warns"
    assert "first line" in printed(logs)
    assert "stopped" in printed(stop)
    assert dashboard.stopped == [name]
    _, err = submit(130, "--attach", "study")
    assert "carft-ray submit --resume" in err
    _, err = submit(5, "--attach", "other")
    assert f"See: env -u RAY_ADDRESS RAY_AUTH_MODE=token ray job list --address {dashboard.address}" in told(err)


def test_a_command_of_ray_names_the_token_only_if_there_is_one(here, dashboard, submit):
    _, err = submit(5, "--attach", "other")
    assert f"See: ray job list --address {dashboard.address}" in told(err)


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


def test_resume_passes_on_that_the_paths_of_the_study_are_trusted(here, dashboard, submit):
    out, _ = submit(0, "--resume", "s3://bucket/study", "--trust-paths", "--dry-run")
    assert "resume s3://bucket/study --address auto --trust-paths" in out


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
