"""A headless Chromium, driven by its DevTools protocol: opens a page, clicks, reads, takes pictures. No network."""

import asyncio
import contextlib
import re
import shutil
import subprocess
import threading

import aiohttp

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")


def program():
    """Returns the path of a Chromium, or None."""
    return next(filter(None, map(shutil.which, NAMES)), None)


class Page:
    def __init__(self, socket):
        self._socket, self._number = socket, 0
        self._loaded = set()  # documents, by the id of their loader
        self.problems = []  # exceptions of scripts, what the policy forbade, addresses that it wanted to load

    async def call(self, method, **parameters):
        self._number += 1
        await self._socket.send_json({"id": self._number, "method": method, "params": parameters})
        while True:
            message = await self._socket.receive_json(timeout=120)
            if message.get("method") == "Runtime.exceptionThrown":
                self.problems.append(str(message["params"]["exceptionDetails"])[:500])
            if message.get("method") == "Log.entryAdded" and "Content Security" in message["params"]["entry"]["text"]:
                self.problems.append(message["params"]["entry"]["text"])
            if message.get("method") == "Network.requestWillBeSent":
                address = message["params"]["request"]["url"]
                if re.match(r"(https?|wss?):", address):
                    self.problems.append(address)
            if message.get("method") == "Page.lifecycleEvent" and message["params"]["name"] == "load":
                self._loaded.add(message["params"]["loaderId"])
            if message.get("id") == self._number:
                assert "error" not in message, message
                return message["result"]

    async def evaluate(self, expression):
        """Returns the value of an expression, which may be a promise."""
        found = await self.call("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in found, found["exceptionDetails"]
        return found["result"].get("value")

    async def open(self, path, width=1024, height=800, dark=False, scripts=True):
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        await self.call("Emulation.setEmulatedMedia", features=[scheme])
        await self.call("Emulation.setScriptExecutionDisabled", value=not scripts)
        size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 500}
        await self.call("Emulation.setDeviceMetricsOverride", **size)
        loader = (await self.call("Page.navigate", url=path.resolve().as_uri()))["loaderId"]
        for _ in range(600):
            await asyncio.sleep(0.1)
            if not scripts:
                await self.call("DOM.getDocument")  # an answer brings the events before it
                if loader in self._loaded:
                    return
            elif await self.evaluate("document.body?.dataset.ready === 'true' && location.protocol === 'file:'"):
                return
        raise TimeoutError(f"{path} does not become ready: {self.problems}")


@contextlib.asynccontextmanager
async def browser(folder):
    """Starts a Chromium with its files in a folder, and gives a page."""
    flags = ["--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--remote-debugging-port=0"]
    flags += ["--no-first-run", "--disable-background-networking", "--hide-scrollbars", f"--user-data-dir={folder}"]
    with subprocess.Popen(
        [program(), *flags, "about:blank"], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    ) as process:
        try:
            for line in process.stderr:
                if found := re.search(r"DevTools listening on ws://([^/]+)/", line):
                    break
            threading.Thread(target=process.stderr.read, daemon=True).start()  # a full pipe would stop it
            async with aiohttp.ClientSession() as session:
                async with session.get(f"http://{found[1]}/json") as answer:
                    target = next(one for one in await answer.json() if one["type"] == "page")
                async with session.ws_connect(target["webSocketDebuggerUrl"], max_msg_size=0) as socket:
                    page = Page(socket)
                    for domain in ("Page", "Runtime", "Network", "DOM", "Log"):
                        await page.call(f"{domain}.enable")
                    await page.call("Page.setLifecycleEventsEnabled", enabled=True)
                    yield page
        finally:
            process.terminate()
            process.wait(30)
