"""A finished study of short trainings with test sets, made without Ray in seconds."""

from short_study import search

from carft_ray.recipe.loading import load_recipe

TEST_SETS = {"photo_test": (3, 300), "cartoon": (2, 400), "painting": (4, 500)}  # domain -> images per class, seed


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
