"""A search of stand-in trainings, one after the other, as on another machine, whose waits are a hundredth.

Two of them with other words for BOOT take each other's processes for some of another machine: neither is looked for.
"""

import search_driver

from carft_ray.store import log, owner
from carft_ray.study import holding

TIMES = 100
WAITS = {
    log: ("BEAT_AFTER_S", "SILENT_FOR_S", "READERS_SILENT_FOR_S", "LOOK_EVERY_S", "UNCLEAR_FOR_S", "RETRY_EVERY_S"),
    holding: ("LOOK_EVERY_S",),
}


def move(boot):
    """Makes this process one of another machine, for good."""
    me = {**owner.identity(), "boot": boot}
    owner.identity = log.identity = lambda: dict(me)
    for module, names in WAITS.items():
        for name in names:
            setattr(module, name, getattr(module, name) / TIMES)


def main(boot, study_dir, trials):
    move(boot)
    return search_driver.main(study_dir, trials, '{"executor": "debug"}', search='{"baselines": {}}')
