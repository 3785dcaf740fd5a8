"""``carft-ray confirm`` with real trainings on a real Ray: killed at random moments, and asked to look at test sets.

Five kills of one confirm are a row of ``make kill-matrix``.
"""

import random
import re
import secrets
import shutil
from pathlib import Path

import crash_host
import killed_searches as searches
import pytest
import short_sealed
import short_training

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("confirm")
    short_sealed.make(path, short_training)
    return path


def test_a_confirm_killed_twice_ends_with_the_numbers_of_one_left_in_peace(folder, tmp_path):
    seed = secrets.randbelow(10**6)
    print("seed", seed)
    try:
        searches.kill_confirm(folder / "study", tmp_path, 2, random.Random(seed))
    finally:
        searches.kill_drivers()


LEAKS = [
    ("a test set as one more OOD set", "sketch:", "domains: [sketch", "domains: [cartoon", 8),
    ("the ID test set for validation", "id_val:", "domains: [photo_val", "domains: [photo_test", 8),
]


@pytest.mark.parametrize(("what", "key", "old", "new", "code"), LEAKS, ids=[row[0] for row in LEAKS])
def test_a_confirm_with_a_recipe_that_was_changed_to_see_a_test_set_is_refused(
    folder, tmp_path, capsys, what, key, old, new, code
):
    study_dir = Path(shutil.copytree(folder / "study", tmp_path / "study"))
    path = study_dir / "resolved.yaml"
    text = path.read_text()
    domain, other = (re.search(r"\[(\w+)", each)[1] for each in (old, new))
    changed = re.sub(rf"(?s)({key}.*?domains:\s*(?:-\s*|\[)){domain}\b", rf"\g<1>{other}", text, count=1)
    assert changed != text
    path.write_text(changed)
    assert crash_host.call(["confirm", study_dir, "--top", "1", "--seeds", "2"]) == code
    shown = capsys.readouterr()
    assert "must not share images with data." in shown.err
    assert "Traceback" not in shown.out + shown.err
    assert not (study_dir / "confirm").exists()
