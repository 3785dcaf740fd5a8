"""A search of stand-in trainings as a process of its own, for the tests that interrupt and kill it.

    python search_driver.py STUDY_DIR TRIALS [RESOURCES as JSON] [ADDRESS] [SEARCH as JSON] [TRAINING]

TRAINING is the module with ``prepare`` and ``train``, ``stand_in`` by default.

Prints one line per event, and ends with the exit code of the error, as the command line does.
"""

import importlib
import json
import sys

import stand_in

from carft_ray.errors import CarftError
from carft_ray.launch.cluster.ray_errors import set_aside_error
from carft_ray.launch.command import Plan, run_search
from carft_ray.launch.events import Note
from carft_ray.launch.workers.runtime import Runner
from carft_ray.results.figure import figure_at_the_end
from carft_ray.study.place import own_folder


def show(event):
    spec = getattr(event, "spec", None) or getattr(event, "row", None)
    told = (event.text,) if isinstance(event, Note) else (getattr(spec, "name", ""), getattr(spec, "attempt", ""))
    print(type(event).__name__, *told, flush=True)


def main(study_dir, trials, resources="{}", address="", search="{}", training="stand_in"):
    search = {"epochs": 4, **json.loads(search)}
    recipe = stand_in.make_recipe(int(trials), resources=json.loads(resources), **search)
    module = importlib.import_module(training)
    runner = Runner(module.prepare, module.train)
    try:
        plan = Plan(recipe, own_folder(study_dir), address or None, show, runner, around=figure_at_the_end)
        result = run_search(plan)
        if result.set_aside:
            raise set_aside_error(result.set_aside, "the same command")
    except CarftError as error:
        print(error, flush=True)
        return error.exit_code
    print("best", result.study.best.name, "new", result.num_new, flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
