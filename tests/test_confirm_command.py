"""``carft-ray confirm`` with real trainings: killed at moments of its course, and asked to look at test sets.

Five kills of one confirm on a real Ray are a row of ``make kill-matrix WHAT=driver``.
"""

import json
import re
import shutil
import signal
from pathlib import Path

import crash_host
import killed_searches as searches
import pytest
import short_sealed
import short_training
from safetensors.torch import load_file, save_file

from carft_ray.errors import DataError

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("confirm")
    short_sealed.make(path, short_training)
    return path


def test_a_confirm_killed_at_durable_operations_ends_with_the_numbers_of_one_left_in_peace(folder, tmp_path):
    """In forks of one process, without Ray; some are killed once, one is killed four times."""
    confirm = ["confirm", "study", "--top", "1", "--seeds", "2", "--executor", "debug"]
    with crash_host.started(tmp_path, "confirm_program") as host:

        def run(jobs):
            for job in jobs:
                shutil.copytree(folder / "study", tmp_path / job["name"] / "study")
            return host(jobs)

        kinds = tmp_path / "kinds.json"
        calm, [answer] = run([{"name": "calm", "commands": [{"argv": confirm, "count_to": str(kinds)}]}])["calm"]
        assert answer["code"] == 0, answer["log"]
        number = len(json.loads(kinds.read_text()))
        kill_at = [[number * part // 10] for part in (1, 3, 5, 7, 9)] + [[number // 5] * 4]
        jobs = [
            {
                "name": "-".join(map(str, kills)),
                "commands": [*({"argv": confirm, "kill": (at, "after")} for at in kills), {"argv": confirm}],
            }
            for kills in kill_at
        ]
        found = run(jobs)
    for name, (place, (*killed, last)) in found.items():
        assert {answer["code"] for answer in killed} == {-signal.SIGKILL}, name
        assert last["code"] == 0, last["log"]
        searches.check_confirm(place / "study", calm / "study")


LEAKS = [
    ("a test set as one more OOD set", "sketch", "sketch", "cartoon", 8),
    ("the ID test set for validation", "id_val", "photo_val", "photo_test", 8),
]


@pytest.mark.parametrize(("what", "key", "old", "new", "code"), LEAKS, ids=[row[0] for row in LEAKS])
def test_a_confirm_with_a_recipe_that_was_changed_to_see_a_test_set_is_refused(
    folder, tmp_path, capsys, what, key, old, new, code
):
    study_dir = Path(shutil.copytree(folder / "study", tmp_path / "study"))
    path = study_dir / "manifest.json"
    text = path.read_text()
    changed = re.sub(rf'(?s)("recipe":.*?"{key}".*?"domains":\s*\[\s*"){old}\b', rf"\g<1>{new}", text, count=1)
    assert changed != text
    path.write_text(changed)
    assert crash_host.call(["confirm", study_dir, "--top", "1", "--seeds", "2"]) == code
    shown = capsys.readouterr()
    assert "must not share images with data." in shown.err
    assert "Traceback" not in shown.out + shown.err
    assert not (study_dir / "confirm").exists()


def test_a_confirm_on_images_or_weights_that_are_no_longer_those_of_the_study_is_refused(tmp_path):
    place = tmp_path / "here"
    short_training.make(place)
    search = ["search", "recipe.yaml", "--study", "study", "--set", "search.trials=1", "--set", "search.baselines={}"]
    image, weights = place / "images/photo_val/heart/0.png", place / "model/open_clip_model.safetensors"
    with crash_host.started(tmp_path, "confirm_program") as host:

        def run(*commands):
            argvs = [{"argv": [*words, "--executor", "debug"]} for words in commands]
            return host([{"name": "here", "commands": argvs}])["here"][1]

        assert [answer["code"] for answer in run(search)] == [0]
        for path, rule in ((image, "data.id_val: the contents of this set"), (weights, "model: the weights")):
            before = path.read_bytes()
            if path == image:
                short_training.write_image(path, 2, seed=999)
            else:
                save_file({name: tensor + 1 for name, tensor in load_file(path).items()}, path)
            found = run(["confirm", "study", "--seeds", "2"], ["resume", "study", "--trials", "2"])
            assert [answer["code"] for answer in found] == [DataError.exit_code] * 2
            confirm, resume = (answer["log"].partition("error: ")[2] for answer in found)
            assert f"{rule} must be " in confirm
            assert confirm == resume
            assert not list(place.glob("study/confirm/*/*/result.json"))
            path.write_bytes(before)
