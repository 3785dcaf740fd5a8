"""A node that does not see the study, in this process: what it gets and sends goes through no Ray."""

from dataclasses import replace

import attempts
import stand_in

from carft_ray.launch.workers.file_transfer import FileServer, StudyFiles
from carft_ray.study.opening import open_study


class Here(StudyFiles):
    """Calls a server of this process. Every ``loses``th answer is lost after the call was done."""

    def __init__(self, folder, loses=0, address=""):
        super().__init__("file server-1")
        self.server, self.loses, self.calls, self.largest = FileServer(folder, address), loses, [], 0

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


def plan_of(study, away):
    last, first = (study.log.number, study.log.digest), study.log.digest_of(1)
    runtime = attempts.plan_of(study)
    data = runtime.recipe.data.model_copy(update={"cache_dir": str(study.study_dir.parent / "cache")})
    recipe = runtime.recipe.model_copy(update={"data": data})
    return replace(runtime, recipe=recipe, files=away, commit=last, first_commit=first)


def opened(folder, epochs=2):
    """Opens a study of one training."""
    return open_study(folder / "study", stand_in.make_recipe(1, epochs=epochs, baselines={}))
