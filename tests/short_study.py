"""A study of short trainings made in this process, as a search makes it, without Ray: seconds instead of a minute."""

from carft_ray import environment, files
from carft_ray.data.sets import write_sets
from carft_ray.recipe.loading import apply, dump_recipe
from carft_ray.recipe.schema.recipe import with_threads
from carft_ray.study.opening import open_study
from carft_ray.study.provenance import made_of, record_provenance
from carft_ray.study.take_over import recover_running
from carft_ray.training.run import prepare, run_training
from carft_ray.training.run_context import RunContext


def search(study_dir, recipe, num_attempts=None):
    """Does what ``run_search`` does; with ``num_attempts`` it ends early, as a search that was stopped."""
    with open_study(study_dir, recipe) as study:
        files.write_text(study_dir / "resolved.yaml", dump_recipe(recipe))
        recover_running(study)
        known, folder = made_of(study.log), study_dir / "prepared"  # as a search does
        write_sets(recipe, folder, known)
        found = prepare(with_threads(recipe, environment.usable_cores()), folder, made_of=known)
        record_provenance(study_dir, study.log, recipe, found.pop("provenance"))
        study.add_zero_shot(found)
        while num_attempts != 0 and (spec := study.next()) is not None:
            folder = spec.folder(study_dir)
            folder.mkdir(parents=True, exist_ok=True)
            values = apply(recipe, spec.values)
            context = RunContext(references=spec.references)
            run_training(values, folder, study_dir / "prepared", context, spec.attempt)
            study.settle(spec)
            num_attempts = None if num_attempts is None else num_attempts - 1
    return study_dir
