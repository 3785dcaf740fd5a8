"""``benchmarks.soups`` on the public results of "Model soups": its numbers, and what it says of bad files.

``soup_results.json`` is a compact copy of these results (github.com/mlfoundations/model-soups, MIT licence, copyright
2023 mlfoundations).
"""

import json
import re
from pathlib import Path

import pytest

from benchmarks import soups

KEPT = json.loads((Path(__file__).parent / "soup_results.json").read_text())
EXPECTED = {  # %, by validation shift: ImageNetV2, Sketch, R, ObjectNet, A
    "training chosen": (61.6, 64.6, 62.1, 64.8, 66.8),
    "best training by test": (62.4, 65.2, 62.7, 64.9, 67.2),
    "uniform soup": (63.7, 66.3, 63.9, 66.5, 68.6),
    "greedy soup": (63.6, 66.3, 64.3, 66.7, 68.8),
    "mean of all trainings": (59.9, 62.9, 60.7, 62.9, 65.2),
}


def accuracies(counts):
    return {name: count / num for (name, num), count in zip(KEPT["images"].items(), counts, strict=True)}


def write(path, *lines):
    path.write_text("".join(f"{json.dumps(line)}\n" for line in lines))


@pytest.fixture
def folder(tmp_path):
    named = [{"model_name": f"model_{at}", **accuracies(each)} for at, each in enumerate(KEPT["models"])]
    write(tmp_path / soups.MODELS_FILE, *named)
    for name, file in (("uniform", soups.UNIFORM_FILE), ("greedy", soups.GREEDY_FILE)):
        write(tmp_path / file, {"model_name": f"{name}_soup", **accuracies(KEPT[name])})
    return tmp_path


def test_the_numbers_of_each_validation_shift(folder):
    published = soups.read_published(folder)
    found = [soups.worth(published, shift) for shift in soups.SHIFTS]
    assert [*found[0]] == [*EXPECTED]
    for name, numbers in EXPECTED.items():
        assert [100 * column[name] for column in found] == pytest.approx(numbers, abs=0.05), name


def test_the_printed_table(folder, capsys):
    assert soups.main(["--from", str(folder)]) == 0
    first, _, head, _, *lines = capsys.readouterr().out.splitlines()
    assert first.startswith("72 models, 71 different;")
    assert head == "| | ImageNetV2 | ImageNet-Sketch | ImageNet-R | ObjectNet | ImageNet-A |"
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    assert {name: tuple(map(float, numbers)) for name, *numbers in cells} == EXPECTED


def test_the_table_in_the_results_is_the_printed_one(folder):
    lines = [*soups.table_of(soups.read_published(folder))][1:]
    page = (Path(__file__).parents[1] / "docs" / "results.md").read_text()
    assert "\n".join(lines) in page


def test_a_choice_does_not_look_at_what_is_measured():
    model = dict(zip(soups.COLUMNS, (0.5, 0.75, 0.25, 0.125, 0.5, 0.625, 0.75), strict=True))
    for shift in soups.SHIFTS:
        for name in soups.COLUMNS:
            changed = {**model, name: 1.0}
            is_seen = soups.chosen_by(changed, shift) != soups.chosen_by(model, shift)
            is_measured = soups.measured(changed, shift) != soups.measured(model, shift)
            assert (is_seen, is_measured) == ((True, False) if name in (soups.HELD_OUT, shift) else (False, True))
    assert soups.chosen_by(model, "ImageNetV2") == (0.5 + 0.25) / 2
    assert soups.measured(model, "ImageNetV2") == (0.75 + (0.125 + 0.5 + 0.625 + 0.75) / 4) / 2


def one(**changes):
    return json.dumps({**accuracies(KEPT["uniform"]), **changes}).encode()


BAD = {
    "a missing file": (None, "must be a readable file, but got No such file"),
    "nothing": (b"", "must have a line for each model, but got none"),
    "blank lines": (b"\n \n", "must have a line for each model, but got none"),
    "half a line": (one()[:50], ":1: must be a JSON object"),
    "a list": (b"[1]", ":1: must be a JSON object, but got [1]"),
    "no UTF-8": (b"\xff\xfe", "must be text in UTF-8"),
    "percent": (one(ObjectNet=45.9), ":1: ObjectNet must be an accuracy from 0 to 1, but got 45.9"),
    "no number": (one(ImageNet=float("nan")), ":1: ImageNet must be an accuracy from 0 to 1, but got nan"),
    "yes": (one(ImageNetA=True), ":1: ImageNetA must be an accuracy from 0 to 1, but got True"),
    "null": (one(ImageNetR=None), ":1: ImageNetR must be an accuracy from 0 to 1, but got None"),
    "a column that is missing": (b'{"model_name": "model_0"}', ":1: ImageNet2p must be an accuracy from 0 to 1"),
    "two soups": (one() + b"\n" + one(), "must have one line, but got 2"),
}


@pytest.mark.parametrize("case", BAD)
def test_a_missing_or_damaged_file_is_one_message(case, folder, capsys):
    content, words = BAD[case]
    path = folder / soups.GREEDY_FILE
    path.unlink() if content is None else path.write_bytes(content)
    assert soups.main(["--from", str(folder)]) == 2
    printed = capsys.readouterr()
    said = re.sub(r"\s+", " ", printed.err)
    assert not printed.out
    assert f"error: {path}" in said
    assert words in said
    assert f"Copy {soups.GREEDY_FILE} from {soups.SOURCE}, and name its folder with --from." in said
    assert said.count("error:") == 1


def test_a_folder_in_the_place_of_a_file(folder, capsys):
    (folder / soups.MODELS_FILE).unlink()
    (folder / soups.MODELS_FILE).mkdir()
    assert soups.main(["--from", str(folder)]) == 2
    assert "must be a regular file, but got a folder" in capsys.readouterr().err


def test_without_a_folder_it_says_what_it_needs(capsys):
    with pytest.raises(SystemExit) as ended:
        soups.main([])
    assert ended.value.code == 2
    assert "--from" in capsys.readouterr().err
