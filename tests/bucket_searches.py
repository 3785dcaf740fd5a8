"""Searches with stand-in trainings, on a study in a bucket or in a folder."""

import stand_in

from carft_ray.launch.command import Plan, run_search
from carft_ray.launch.workers.runtime import Runner
from carft_ray.study.place import own_folder

RESOURCES, SEARCH = {"executor": "debug"}, {"epochs": 3, "sampler": {"name": "random"}}


def search(place, trials):
    """Searches to the end, on the study at this place."""
    recipe = stand_in.make_recipe(trials, resources=RESOURCES, **SEARCH)
    return run_search(Plan(recipe, own_folder(place), runner=Runner(stand_in.prepare, stand_in.train)))


def ended(server):
    """How many trainings have ended, by the commits of the studies of a server."""
    return sum(b'"outcome"' in data for name, data in server.objects().items() if "/log/0" in name)
