"""A stand-in for the dashboard of a Ray: the HTTP and WebSocket paths that the job client of Ray asks for."""

import asyncio
import contextlib
import io
import json
import threading
import zipfile

from aiohttp import web

from carft_ray import environment
from carft_ray.launch.jobs.package import MARK

RAY_VERSION = "2.60.0"


class Dashboard:
    """What the server answers, and what it was sent.

    A search ends when its status was asked ``polls`` times; its log is ``pieces``. Each stream of the log sends as
    many of them as ``streams`` says next (all, where it says nothing more) and ends; with ``breaks`` it ends badly.
    """

    def __init__(self):
        self.address, self.token, self.version = "", "", RAY_VERSION
        self.jobs, self.packages, self.headers, self.stopped = {}, {}, [], []
        self.polls, self.pieces, self.streams, self.breaks = 2, ["first line\n", "second line\n"], [], False
        self.end = {"status": "SUCCEEDED", "driver_exit_code": 0}
        self.found = {"python": "3.12.3", "code": environment.code(), "libraries": {}}
        self.answer_to_submit = None  # status and text
        self.away, self.forgets = (), ()  # of the questions for a job's status: not answered, or with "no such job"

    def add(self, name, study, **more):
        """Adds a job as if somebody had submitted it."""
        self.jobs[name] = {
            "type": "SUBMISSION",
            "submission_id": name,
            "status": "RUNNING",
            "entrypoint": "exec search",
            "metadata": {"study": str(study), "carft_ray": "search"},
            "runtime_env": {},
            "start_time": 1_700_000_000_000 + len(self.jobs),
            "asked": 0,
            **more,
        }

    def names(self, kind="search"):
        return [name for name, job in self.jobs.items() if job["metadata"].get("carft_ray") == kind]

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
        kind = asked["metadata"].get("carft_ray")
        if kind == "search" and self.answer_to_submit:
            return web.Response(status=self.answer_to_submit[0], text=self.answer_to_submit[1])
        more = {key: asked[key] for key in ("entrypoint", "metadata", "runtime_env")}
        self.add(asked["submission_id"], "", **more)
        if kind == "question":
            self.jobs[asked["submission_id"]] |= {"status": "SUCCEEDED", "driver_exit_code": 0}
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
        question = job["metadata"].get("carft_ray") == "question"
        return web.json_response({"logs": MARK + json.dumps(self.found) if question else "".join(self.pieces)})

    async def _tail(self, request):
        self._job(request)
        socket = web.WebSocketResponse()
        await socket.prepare(request)
        for piece in self.pieces[: self.streams.pop(0) if self.streams else None]:
            await socket.send_str(piece)
        if self.breaks:
            request.transport.abort()
        return socket

    async def _stop(self, request):
        job = self._job(request)
        self.stopped.append(request.match_info["job"])
        job["status"] = "STOPPED"
        return web.json_response({"stopped": True})

    def application(self):
        found = web.Application(middlewares=[self._guard], client_max_size=2**30)
        found.add_routes(
            [
                web.get("/api/version", self._version),
                web.get("/api/packages/gcs/{name}", self._has_package),
                web.put("/api/packages/gcs/{name}", self._take_package),
                web.post("/api/jobs/", self._submit),
                web.get("/api/jobs/", self._list),
                web.get("/api/jobs/{job}", self._info),
                web.get("/api/jobs/{job}/logs", self._logs),
                web.get("/api/jobs/{job}/logs/tail", self._tail),
                web.post("/api/jobs/{job}/stop", self._stop),
            ]
        )
        return found


@contextlib.contextmanager
def serving():
    """Gives a ``Dashboard`` that answers at its address."""
    dashboard, loop, ready = Dashboard(), asyncio.new_event_loop(), threading.Event()

    async def begin():
        runner = web.AppRunner(dashboard.application(), shutdown_timeout=0.1)
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        dashboard.address = f"http://127.0.0.1:{runner.addresses[0][1]}"
        ready.set()
        return runner

    def work():
        asyncio.set_event_loop(loop)
        runner = loop.run_until_complete(begin())
        loop.run_forever()
        loop.run_until_complete(runner.cleanup())
        loop.close()

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    ready.wait(30)
    try:
        yield dashboard
    finally:
        loop.call_soon_threadsafe(loop.stop)
        thread.join(30)
