"""Placement groups that a killed trial has left behind, and their removal.

When the process that waits for a Ray Train group is killed (by the kernel when memory is full, say), the group's
controller dies with it, and its placement group stays until the search ends: Ray's own cleaner asks a dashboard that
need not run, and is left out. The trials that follow would wait for these resources without a message. So the search
removes the group.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import ray
from ray.util.placement_group import PlacementGroup, remove_placement_group

HEAD = "node:__internal_head__"  # Tune's own groups, which Tune removes, hold this alone


def groups_of_job() -> dict[str, bool]:
    """Returns the placement groups of this driver's trainings, and whether each has got its resources.

    The identifier of a group ends with that of its job.
    """
    job_id = ray.get_runtime_context().get_job_id()
    return {
        name: group["state"] != "PENDING"
        for name, group in ray.util.placement_group_table().items()
        if name.endswith(job_id)
        and group["state"] != "REMOVED"
        and any(HEAD not in bundle for bundle in group["bundles"].values())
    }


def remove_group(name: str) -> None:
    """Removes a placement group, and with it what runs in it."""
    remove_placement_group(PlacementGroup(ray.PlacementGroupID(bytes.fromhex(name))))


@dataclass
class Leaks:
    """Finds the groups of killed trials: those that were there when it died and belong to no other.

    A training posts which group is its own when its workers begin. Until all that run have done so or wait for
    resources, nothing is removed. A group that has no training now (``launch.workers.group``) is removed, too:
    the next training starts another.

    Groups that the program had when the search began are its own, and stay.

    Attributes:
        groups: Lists the groups of the job.
        remove: Removes one.
    """

    groups: Callable[[], dict[str, bool]] = groups_of_job
    remove: Callable[[str], None] = remove_group
    _suspects: set[str] = field(default_factory=set)
    _others: set[str] = field(init=False)

    def __post_init__(self) -> None:
        self._others = set(self.groups())

    def _own(self) -> dict[str, bool]:
        return {name: state for name, state in self.groups().items() if name not in self._others}

    def suspect(self) -> None:
        """Notes that the process of an attempt has died."""
        self._suspects |= set(self._own())

    def check(self, owned: Sequence[str]) -> int:
        """Removes what is known to be left behind; returns how many groups that were.

        Args:
            owned: The group of each attempt that runs; empty where it is not known yet.
        """
        if not self._suspects:
            return 0
        now = self._own()
        if owned.count("") > sum(not has_resources for has_resources in now.values()):
            return 0
        leaked = {name for name in self._suspects - set(owned) if now.get(name)}
        self._suspects = set()
        for name in leaked:
            self.remove(name)
        return len(leaked)

    def clear(self) -> None:
        """Removes all groups of the trainings, once none of them runs."""
        for name in self._own():
            self.remove(name)
