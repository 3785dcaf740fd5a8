"""The dashboard of a cluster, for searches that are submitted: a server that answers as Ray's does."""

import asyncio
import contextlib
import io
import threading
import zipfile
from collections import Counter

from aiohttp import web

from carft_ray.launch.cluster import jobs
from carft_ray.launch.cluster.ray_private import read_authentication_anew

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


@contextlib.contextmanager
def answering():
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


def settle(tmp_path, monkeypatch):
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


def told(text):
    """A message on one line, as it would be in a wide terminal."""
    return " ".join(text.split())
