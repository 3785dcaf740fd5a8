"""A search of stand-in trainings on a study in a bucket, by the executor ``debug``: bucket_search.py ADDRESS TRIALS."""

import sys

import stand_in

from carft_ray.launch.runs.search import run_search
from carft_ray.launch.runtime import Runner
from carft_ray.study.mirror import own_folder

RUNNER = Runner(stand_in.prepare, stand_in.train)


def search(place, trials, epochs=3):
    recipe = stand_in.make_recipe(int(trials), epochs, sampler={"name": "random"}, resources={"executor": "debug"})
    return run_search(recipe, own_folder(place), runner=RUNNER)


if __name__ == "__main__":
    search(*sys.argv[1:])
