"""A stand-in for the dashboard of a Ray: the HTTP paths that the job client of Ray asks for."""

import asyncio
import contextlib
import io
import threading
import zipfile
from functools import partial

from aiohttp import web

RAY_VERSION = "2.60.0"


class Dashboard:
    """What the server answers, and what it was sent.

    A search ends when its status was asked ``polls`` times; its log, of ``pieces``, grows by one with each of them.
    """

    def __init__(self):
        self.address, self.token, self.version = "", "", RAY_VERSION
        self.jobs, self.packages, self.headers, self.stopped = {}, {}, [], []
        self.polls, self.pieces = 2, ["first line\n", "second line\n"]
        self.end = {"status": "SUCCEEDED", "driver_exit_code": 0}
        self.answer_to_submit = None  # status and text
        self.is_deaf = False  # jobs go on when they are asked to stop
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
            "asked": 0,
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
        if asked["submission_id"] in self.jobs:
            return web.Response(status=500, text=f"Job with submission_id {asked['submission_id']} already exists.")
        if self.answer_to_submit:
            return web.Response(status=self.answer_to_submit[0], text=self.answer_to_submit[1])
        self.add(asked["submission_id"], "", **{key: asked[key] for key in ("entrypoint", "metadata", "runtime_env")})
        return web.json_response({"job_id": asked["submission_id"], "submission_id": asked["submission_id"]})

    def _job(self, request):
        name = request.match_info["job"]
        if name not in self.jobs:
            raise web.HTTPNotFound(text=f"Job {name} does not exist")
        return self.jobs[name]

    async def _info(self, request):
        job = self._job(request)
        job["asked"] += 1
        if job["asked"] in self.away:
            request.transport.abort()
        if job["asked"] in self.forgets:
            raise web.HTTPNotFound(text="Job does not exist")
        if job["status"] == "RUNNING" and job["asked"] > self.polls:
            job.update(self.end, end_time=job["start_time"] + 65_000)
        return web.json_response({key: value for key, value in job.items() if key != "asked"})

    async def _list(self, request):
        jobs = [{key: value for key, value in job.items() if key != "asked"} for job in self.jobs.values()]
        driver = {"type": "DRIVER", "job_id": "01000000", "status": "RUNNING", "entrypoint": "python x.py"}
        return web.json_response([*jobs, driver])

    async def _logs(self, request):
        job = self._job(request)
        if job["asked"] in self.without_log:
            return web.Response(status=500, text="its node is gone")
        shown = self.pieces[: job["asked"] or None] if job["status"] == "RUNNING" else self.pieces
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
def serving():
    """Gives a ``Dashboard`` that answers at its address."""
    dashboard, ready, ends = Dashboard(), threading.Event(), []

    async def serve():
        over = asyncio.Event()
        ends.append(partial(asyncio.get_running_loop().call_soon_threadsafe, over.set))
        runner = web.AppRunner(dashboard.application(), shutdown_timeout=0.1)
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        dashboard.address = f"http://127.0.0.1:{runner.addresses[0][1]}"
        ready.set()
        await over.wait()
        await runner.cleanup()

    thread = threading.Thread(target=asyncio.run, args=(serve(),), daemon=True)
    thread.start()
    ready.wait(30)
    try:
        yield dashboard
    finally:
        ends[0]()
        thread.join(30)
