"""The soups of a study as text: what each is made of, what it measured, and which model `export` writes."""

from carft_ray.results.delivered import STANDING, delivered, members_words
from carft_ray.study.snapshot import Snapshot
from carft_ray.study.training import result_of
from carft_ray.words import counted


def soup_lines(study: Snapshot) -> list[str]:
    """Returns a line for each soup, and one about the model if any is made; nothing for a study without soups.

    Raises:
        HoldOutError, StorageError: The study is damaged.
    """
    made = [row for row in study.soups if row.outcome == "complete"]
    lines = [f"Soup {row.called} was not made: {row.reason}." for row in study.soups if row.outcome == "error"]
    if not made or study.best is None:
        return lines
    for row in made:
        result = result_of(study.study_dir, row)
        text = f"Soup {row.called}: {members_words(result)}, {100 * (row.objective or 0.0):.1f} %"
        text += f" at alpha {row.alpha or 0.0:.2f} on the images that chose it"
        if left_out := result.get("soup", {}).get("left_out"):
            text += f"; {counted(len(left_out), 'training')} left out"
        lines.append(f"{text}.")
    model, standing = delivered(study)
    what = "a soup" if (model["trial"] or "").startswith("soups/") else "one training"
    return [*lines, f"Model of `export`: {model['trial']} at alpha {model['alpha']:.2f}, {what}; {STANDING[standing]}."]
