"""A soup that is the model of a study: one file through all commands, studies that lie, kills."""

import hashlib
import shutil
from pathlib import Path

import pytest
import short_sealed
import short_training
from crash_host import call, printed

import carft_ray
from carft_ray.layout import WEIGHTS
from carft_ray.study.snapshot import snapshot

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore:The given NumPy array is not writable")]

HERE = Path(__file__).parent
SETTINGS = [
    "search.trials=2",
    "search.space={learning_rate: {choices: [0.001, 0.01]}}",
    "search.sampler.name=grid",
    "search.baselines={}",
    "search.soups=[uniform]",
    "search.alpha.grid=[0, 1]",
    "train.epochs=200",
    "evaluate.every_epochs=0",
    "resources.executor=debug",
    "train.function=own_functions:opposites",
    f"train.function_dir={HERE}",
]


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A folder with images and a finished search, whose model is a soup."""
    folder = tmp_path_factory.mktemp("soup_model")
    recipe = short_sealed.write(folder, short_training)
    given = [each for each in short_sealed.settings(folder, 2) if "_test" in each or "cache" in each]
    words = [word for each in (*given, *SETTINGS) for word in ("--set", each)]
    assert call(["search", str(recipe), "--study", str(folder / "study"), *words, "--trust"]) == 0
    return folder


def soup_of(study_dir):
    """The soup of a study, and the SHA-256 of its weights."""
    [row] = snapshot(study_dir).soups
    return row, hashlib.sha256((row.place(study_dir) / WEIGHTS).read_bytes()).hexdigest()


def test_one_file_is_chosen_exported_in_three_formats_tested_and_made_again(made, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(made / "study", tmp_path / "study")
    row, sha256 = soup_of(tmp_path / "study")
    assert row.objective > max(each.objective for each in snapshot(tmp_path / "study").trials)
    forms, answers = "open_clip,huggingface,onnx", []
    first = printed(capsys, "export", "study", "--to", "first", "--format", forms, "--trust-paths")
    for form in forms.split(","):
        printed(capsys, "export", "study", "--to", form, "--format", form, "--trust-paths")
        found = carft_ray.predict(form, made / "images" / "photo_val", progress=False)
        answers.append([(each["file"], each["class"]) for each in found.rows.to_pylist()])
    assert answers[0] == answers[1] == answers[2]
    tested = printed(capsys, "test", "study", "--trust-paths")["rows"][0]
    last = printed(capsys, "export", "study", "--to", "last", "--trust-paths")
    assert (first["standing"], last["standing"]) == ("searched", "tested")
    assert first["sha256"] == tested["sha256"] == last["sha256"] == sha256
    assert first["trial"] == last["trial"] == f"soups/{row.name}"
    again = printed(capsys, "reproduce", "study", f"soups/{row.name}", "--out", "again", "--trust", "--trust-paths")
    assert (again["same"], again["weights_compared"], again["differences"]) == (True, True, [])
    [same] = Path("again").glob(f"attempt-*/{WEIGHTS}")
    assert hashlib.sha256(same.read_bytes()).hexdigest() == sha256
