"""A search inside a larger Ray job: the program is connected to its Ray already, and the search takes that one.

    python examples/inside_a_ray_job.py RECIPE STUDY          (or submitted with `ray job submit`)

``address="auto"`` is all that it needs. Trials take what the rest of the job leaves free, and the connection stays when
the search has ended. Nodes that do not see the study get and send what they need of it through Ray.
"""

import sys

import ray

import carft_ray


@ray.remote(num_cpus=0)
def before() -> str:
    """Another part of the job: data that is made ready, a model that is fetched."""
    return "ready"


@ray.remote(num_cpus=0)
def after(values: dict[str, object], objective: float) -> str:
    """What comes of the search: a longer training, a message, an entry in a registry."""
    return f"best {objective:.3f} with {values}"


def main(recipe: str, study: str) -> None:
    """Runs the job."""
    ray.init()  # of a job on a cluster: that of the cluster
    print(ray.get(before.remote()))
    found = carft_ray.search(recipe, study, address="auto")
    best = found.best  # never None: a search without a complete trial raises
    print(ray.get(after.remote(best.values, best.objective)))


if __name__ == "__main__":
    main(*sys.argv[1:3])
