"""``carft-ray confirm`` with real trainings on a real Ray: killed at random moments, and asked to look at test sets."""

import json
import random
import re
import secrets
import shutil
import subprocess
import sys
import time
from pathlib import Path

import killed_searches as searches
import pytest
import short_sealed
import short_training

from carft_ray.search.ledger import read_ledger
from carft_ray.search.rows import confirmations

ROOT = Path(__file__).parents[1]
NUM_KILLS = 5
pytestmark = pytest.mark.timeout(600)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("confirm")
    short_sealed.make(path, short_training)
    return path


def confirm(study_dir, *words):
    """Starts a confirm in a process group of its own, with two seeds of the winner and of the baseline."""
    command = [sys.executable, "-m", "carft_ray.cli", "confirm", str(study_dir), "--top", "1", "--seeds", "2", *words]
    return subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
        env=searches.environment(),
        cwd=ROOT,
    )


def finished(study_dir):
    """Numbers of every training that has finished, less the time it took."""
    contents = {path.parent.name: json.loads(path.read_text()) for path in study_dir.glob("confirm/*/result.json")}
    return {name: {**content, "elapsed_s": None, "environment": None} for name, content in contents.items()}


@pytest.mark.slow
def test_a_confirm_killed_five_times_ends_with_the_numbers_of_one_left_in_peace(folder, tmp_path):
    seed = secrets.randbelow(10**6)
    print("seed", seed)
    rng = random.Random(seed)
    calm, killed = (Path(shutil.copytree(folder / "study", tmp_path / name)) for name in ("calm", "killed"))
    began = time.monotonic()
    code, output = searches.finish(confirm(calm))
    assert code == 0, output
    whole_s = time.monotonic() - began
    before = {}
    for number in range(NUM_KILLS):  # one in each fifth of the time that it takes
        process = confirm(killed)
        time.sleep(whole_s * rng.uniform(number, number + 1) / NUM_KILLS)
        searches.kill_group(process)
        now = finished(killed)
        assert {name for name in before if now[name] != before[name]} == set()
        before = now
    code, output = searches.finish(confirm(killed))
    assert code == 0, output
    assert finished(killed) == finished(calm)
    assert len(finished(killed)) == 4
    summaries = [json.loads((study / "confirm" / "summary.json").read_text()) for study in (calm, killed)]
    assert summaries[0] == summaries[1]
    assert {row.outcome for row in confirmations(killed)} == {"complete"}
    assert len(confirmations(killed)) == 4
    assert [entry.purpose for entry in read_ledger(killed)] == ["winner fixed"]
    assert list(killed.rglob("*.tmp")) == []


LEAKS = [
    ("a test set as one more OOD set", "sketch:", "domains: [sketch", "domains: [cartoon", 8),
    ("the ID test set for validation", "id_val:", "domains: [photo_val", "domains: [photo_test", 8),
]


@pytest.mark.parametrize(("what", "key", "old", "new", "code"), LEAKS, ids=[row[0] for row in LEAKS])
def test_a_confirm_with_a_recipe_that_was_changed_to_see_a_test_set_is_refused(
    folder, tmp_path, what, key, old, new, code
):
    study_dir = Path(shutil.copytree(folder / "study", tmp_path / "study"))
    path = study_dir / "resolved.yaml"
    text = path.read_text()
    domain, other = (re.search(r"\[(\w+)", each)[1] for each in (old, new))
    changed = re.sub(rf"(?s)({key}.*?domains:\s*(?:-\s*|\[)){domain}\b", rf"\g<1>{other}", text, count=1)
    assert changed != text
    path.write_text(changed)
    process = confirm(study_dir)
    output, _ = process.communicate(timeout=120)
    assert process.returncode == code, output
    assert "must not share images with data." in output
    assert "Traceback" not in output
    assert not (study_dir / "confirm").exists()
