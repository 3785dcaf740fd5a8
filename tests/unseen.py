"""A node that does not see the study, in this process: what it gets and sends goes through no Ray."""

from dataclasses import replace

from carft_ray.launch.study_files import FileServer, StudyFiles


class Here(StudyFiles):
    """Calls a server of this process. Every ``loses``th answer is lost after the call was done."""

    def __init__(self, folder, loses=0):
        super().__init__("file server-1")
        self.server, self.loses, self.calls, self.largest = FileServer(folder), loses, [], 0

    def begin(self, method, *given):
        self.calls.append((method, *given))
        return method, given

    def result(self, begun, timeout_s):
        method, given = begun
        answer = getattr(self.server, method)(*given)
        self.largest = max(self.largest, len(given[-1]) if method == "write" else 0)
        if self.loses and len(self.calls) % self.loses == 0:
            self.calls.append(("lost",))
            raise ConnectionError("no answer")
        return answer


def unseen(runtime, **more):
    """The runtime of a node that does not find the search's commit under the path of the study."""
    return replace(runtime, commit=(runtime.commit[0], "of another machine"), **more)
