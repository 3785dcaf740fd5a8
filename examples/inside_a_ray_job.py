"""A search inside a larger Ray job: the program is already connected to Ray, and the search uses this connection.

    python examples/inside_a_ray_job.py RECIPE STUDY          (or submitted with `ray job submit`)

It only needs ``address="auto"``. Trials use the resources that the rest of the job leaves free. The connection stays
after the search. Nodes that do not see the study's folder exchange its files through Ray.
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
