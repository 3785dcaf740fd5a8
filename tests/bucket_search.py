"""A search of stand-in trainings on a study in a bucket, by the executor ``debug``.

python bucket_search.py ADDRESS TRIALS [SECONDS]    the last: between two uploads of checkpoints
"""

import sys

import stand_in

from carft_ray.errors import InterruptedRunError
from carft_ray.launch.runs.search import run_search
from carft_ray.launch.runtime import Runner
from carft_ray.study import uploads
from carft_ray.study.mirror import own_folder

RUNNER = Runner(stand_in.prepare, stand_in.train)


def search(place, trials, epochs=3):
    recipe = stand_in.make_recipe(int(trials), epochs, sampler={"name": "random"}, resources={"executor": "debug"})
    return run_search(recipe, own_folder(place), runner=RUNNER)


if __name__ == "__main__":
    address, num_trials, *every_s = sys.argv[1:]
    uploads.UPLOAD_EVERY_S = float(every_s[0]) if every_s else uploads.UPLOAD_EVERY_S
    try:
        search(address, num_trials)
    except InterruptedRunError as error:
        sys.exit(error.exit_code)
