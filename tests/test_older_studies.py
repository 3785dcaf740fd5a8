"""Studies of earlier releases: read and continued with the same numbers, or refused with one message.

Earlier releases did not write some records and keys; those of another format had another manifest, or no log.
"""

import json
import shutil
from hashlib import sha256

import crash_host
import pytest
import report_studies
import short_sealed
import verbs_host
from logs import commits, rewrite

from carft_ray.files import write_json
from carft_ray.study.snapshot import snapshot

VERBS = ("status", "ls", "report", "resume", "confirm", "test", "evaluate", "export", "search")
WORDS = {"search": ["recipe.yaml", "--study", "study"], "export": ["study", "--to", "exported"]}
LATER = ("test sets", "started", "at_a_time")  # kinds of records that were added since, and keys of trainings
LATER_KEYS = ("text_weight", "class_kl_weight", "feature_weight", "penalty_schedule", "teacher", "probe_epochs")
LATER_KEYS += ("l2_sp_weight", "lora_rank", "lora_alpha")
NEXT = "Another release of carft-ray wrote this study. Read it with that release, or search in another folder."


def without(content, keys):
    return {key: value for key, value in content.items() if key not in keys}


def as_earlier(study_dir):
    """Takes from a study what earlier releases did not write; what was measured stays, under its hashes."""
    found, hashes = commits(study_dir), {}
    for path in study_dir.glob("*/*/attempt-*/result.json"):
        before = path.read_bytes()
        content = json.loads(before)
        content["train"] = without(content["train"], LATER_KEYS)
        write_json(path, content | {"fine_tuned": {"objective": 0.5}})
        hashes[sha256(before).hexdigest()] = sha256(path.read_bytes()).hexdigest()
    for commit in found:
        kept = [record for record in commit["records"] if record["kind"] not in LATER]
        for record in kept:
            if record["kind"] == "recipe":
                record["recipe"]["train"] = without(record["recipe"]["train"], LATER_KEYS)
        commit["records"] = kept
    text = json.dumps(found)
    assert any(before in text for before in hashes)
    for before, after in hashes.items():
        text = text.replace(before, after)
    rewrite(study_dir, json.loads(text))


def numbers(study_dir):
    rows = [*snapshot(study_dir).trials, *snapshot(study_dir).baselines, *snapshot(study_dir).confirmations]
    read = json.loads((study_dir / "test" / "summary.json").read_text())
    found = [[row["name"], row["objective"]["mean"], row["sets"]] for row in read["rows"]]
    return [[row.name, row.outcome, row.objective, row.alpha, row.metrics] for row in rows], found


@pytest.mark.whole
def test_a_study_without_what_later_releases_write_has_the_same_numbers_and_goes_on(tmp_path_factory, tmp_path):
    made = short_sealed.shared(tmp_path_factory)
    debug = ["--executor", "debug"]
    commands = [["status", "study"], ["ls", "study"], ["report", "study"], ["evaluate", "study"]]
    commands += [
        ["resume", "study", "--trials", "+1", *debug],
        ["confirm", "study", "--top", "1", "--seeds", "2", *debug],
    ]
    commands += [["test", "study"], ["export", "study", "--to", "exported"]]
    for name in ("now", "earlier"):
        shutil.copytree(made / "study", tmp_path / name / "study")
    as_earlier(tmp_path / "earlier" / "study")
    with crash_host.started(tmp_path) as run:
        found = {}
        for name in ("now", "earlier"):  # one after the other: they share a cache, where reads are noted
            shutil.rmtree(made / "cache" / "test_reads", ignore_errors=True)
            found |= run([{"name": name, "commands": [{"argv": argv} for argv in commands]}])
    for place, answers in found.values():
        for argv, answer in zip(commands, answers, strict=True):
            assert answer["code"] == 0, (place.name, argv, answer["log"])
            assert "Traceback" not in answer["log"], (place.name, argv, answer["log"])
    (now, _), (earlier, _) = found.values()
    assert numbers(earlier / "study") == numbers(now / "study")


@pytest.mark.parametrize("lacks", ["", "id", "log"])
@pytest.mark.slow
def test_a_study_of_another_format_is_refused_by_each_command_and_nothing_changes(tmp_path, monkeypatch, capsys, lacks):
    monkeypatch.chdir(tmp_path)
    study_dir = report_studies.make(tmp_path / "study", 2)
    manifest = json.loads((study_dir / "manifest.json").read_text()) | {"format_version": 1}
    write_json(study_dir / "manifest.json", without(manifest, (lacks,)))
    if lacks == "log":
        shutil.rmtree(study_dir / "log")
    (tmp_path / "recipe.yaml").write_text(verbs_host.RECIPE)
    before = {path: path.read_bytes() for path in study_dir.rglob("*") if path.is_file()}
    for verb in VERBS:
        words = WORDS.get(verb, ["study"])
        assert crash_host.call([verb, *words]) == 5, (verb, capsys.readouterr().err)
        told = capsys.readouterr().err
        assert "manifest.json: must have format_version 2, but got 1" in told, verb
        assert NEXT in told, verb
        assert "Traceback" not in told, verb
    assert {path: path.read_bytes() for path in study_dir.rglob("*") if path.is_file()} == before
