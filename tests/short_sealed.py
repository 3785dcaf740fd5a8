"""A finished study of short trainings with test sets, made without Ray in seconds."""

import shutil

import short_training
from logs import replace
from short_study import search

from carft_ray.recipe.loading import apply, load_recipe
from carft_ray.study.opening import open_study
from carft_ray.study.take_over import recover_given
from carft_ray.training.run import run_training
from carft_ray.training.run_context import RunContext

TEST_SETS = {"photo_test": (3, 300), "cartoon": (2, 400), "painting": (4, 500)}  # domain -> images per class, seed


def shared(tmp_path_factory):
    """Returns the folder of such a study for all tests of a process, which leave it as it is."""
    folder = tmp_path_factory.getbasetemp() / "short_sealed"
    if not (folder / "study").exists():
        make(folder, short_training)
    return folder


def copy(folder, place):
    """Copies the study with images and weights of its own into another folder, at the same age; returns it."""
    for name in ("study", "images", "model"):
        shutil.copytree(folder / name, place / name, copy_function=shutil.copy2)
    path = place / "study" / "resolved.yaml"
    for name in ("images", "model"):
        path.write_text(path.read_text().replace(str(folder / name), str(place / name)))
        replace(place / "study", str(folder / name), str(place / name))
    return place / "study"


def alone(folder, place, monkeypatch):
    """Copies it all into an empty folder, which becomes the working directory; no other study has read its images."""
    shutil.rmtree(folder / "cache" / "test_reads", ignore_errors=True)
    copy(folder, place)
    monkeypatch.chdir(place)
    return place


def make(folder, short_training, *overrides, trials=2):
    """Writes images and recipe into ``folder`` and searches in ``folder/study``; returns the study directory."""
    recipe = load_recipe(write(folder, short_training), [*settings(folder, trials), *overrides])
    search(folder / "study", recipe)
    return folder / "study"


def write(folder, short_training):
    """Writes model, images and recipe, which has no test sets without ``settings``; returns the recipe's path."""
    path = short_training.make(folder)
    for domain, (num_per_class, offset) in TEST_SETS.items():
        for label, name in enumerate(short_training.CLASSES):
            for index in range(num_per_class):
                image = folder / "images" / domain / name / f"{index}.png"
                short_training.write_image(image, label, offset + index)
    return path


def settings(folder, trials):
    """What the recipe says besides that of ``short_training``."""
    return [
        f"data.cache_dir={folder / 'cache'}",
        "data.id_test={source: folder, path: images, domains: [photo_test]}",
        "data.ood_test.cartoon={source: folder, path: images, domains: [cartoon]}",
        "data.ood_test.painting={source: folder, path: images, domains: [painting]}",
        f"search.trials={trials}",
        "search.baselines.plain={kl_weight: 0}",
        "train.epochs=3",
    ]


def confirm(study_dir, trainings, train=run_training, num_attempts=None):
    """Runs trainings of a confirm, given by name with their values; returns the names of those that were run."""
    recipe, trained = load_recipe(study_dir / "resolved.yaml"), []
    with open_study(study_dir, recipe) as study:
        recover_given(study, trainings)
        while len(trained) != num_attempts and (spec := study.next()) is not None:
            folder = spec.folder(study_dir)
            folder.mkdir(parents=True, exist_ok=True)
            train(apply(recipe, spec.values), folder, study_dir / "prepared", RunContext(), spec.attempt)
            assert study.settle(spec).outcome == "complete"
            trained.append(spec.name)
        assert study.done() == (num_attempts is None)
    return trained
