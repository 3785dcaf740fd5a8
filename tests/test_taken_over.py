"""Two machines and one bucket: one falls asleep at any of its writes, the other takes the study over and ends it.

When the first one wakes up, it has lost the study: nothing of it replaces or removes what is there. It ends with one
message.
"""

import json
import re
import shutil
from collections import Counter

import pytest
import short_sealed
import verbs_host
from bucket_server import bucket_server
from hosts import Host

from carft_ray.study.place import pull
from carft_ray.study.snapshot import snapshot

OF_ATTEMPT = re.compile(r"study/(trials|baselines)/[^/]+/.+/")  # what an attempt leaves that does not count any more
PACK = "study/log/pack-00000001"  # a copy of commits, which is not believed unless it is of the log


@pytest.fixture
def server(monkeypatch, tmp_path):
    (tmp_path / "recipe.yaml").write_text(verbs_host.RECIPE)
    with bucket_server(monkeypatch) as server:
        yield server


def search(server, trials):
    return ["search", "../recipe.yaml", "--study", server.address("study"), "--set", f"search.trials={trials}"]


def lost(host):
    """Checks how a command ends that has lost its study."""
    assert host.ended() == 5, host.output
    assert "Traceback" not in host.output
    assert host.output.count("error: ") == 1, host.output
    *_, error, step = host.output.rstrip().splitlines()
    assert error.endswith("was written by another search, which has taken the study over"), host.output
    assert step == "    The other search continues from all commits; this one has ended."


MOMENTS = [
    ("before", "put best.yaml", 1),
    ("before", "put best.yaml", 2),
    ("after", "put best.yaml", 1),
    ("before", "put manifest.json", 1),
    ("before", "put prepared/zero_shot.parquet", 1),
    ("before", "put resolved.yaml", 1),
    ("before", "put shared_images.csv", 1),
    ("before", "put baselines/plain/log.txt", 1),
    ("before", "put trials/t0001.*/log.txt", 1),
    ("before", "put trials/t0001.*/metrics.jsonl", 1),
    ("before", "put trials/t0001.*/result.json", 1),
    ("before", "put trials/t0001.*/validation.parquet", 1),
    ("before", "put trials/t0002.*tfevents", 1),
    ("before", "put figure.png", 1),
    ("before", "delete .*fine_tuned.safetensors", 1),
    ("before", "delete .*rows.jsonl", 1),
    ("before", "put log/00000008", 1),
    ("after", "put log/00000013", 1),
    ("before", "put log/00000014", 1),
]


@pytest.mark.whole
@pytest.mark.parametrize("asleep", MOMENTS, ids=lambda moment: " ".join(map(str, moment)))
def test_a_search_that_fell_asleep_at_a_write_while_another_machine_took_over_changes_nothing(server, tmp_path, asleep):
    number = 6 if "fine_tuned" in asleep[1] else 3  # the sixth trial is expected to be better than the first
    first = Host(tmp_path, "one", search(server, number), server.environment, asleep)
    assert first.sleeps(), first.output
    second = Host(tmp_path, "two", search(server, number + 2), server.environment)
    assert second.ended() == 0, second.output
    assert f"took over from process {first.process.pid} on " in second.output
    before = server.objects()
    first.wakes()
    lost(first)
    after = server.objects()
    assert {name for name, data in before.items() if after.get(name) != data} <= {PACK}
    assert {name for name in after.keys() - before.keys() if not OF_ATTEMPT.match(name)} == set()
    pull(server.address("study"), tmp_path / "back")
    rows = snapshot(tmp_path / "back").trials
    assert Counter(row.outcome for row in rows) == {"complete": number + 2}
    assert [row.number for row in rows] == list(range(number + 2))


READS = [
    ("after", "link .*/log/", 1),
    ("after", "link .*/log/", 2),
    ("before", "replace .*/manifest.json", 1),
    ("before", "replace .*/zero_shot.parquet", 1),
    ("after", "replace .*/plain.parquet", 1),
    ("before", "replace .*/test/summary.json", 1),
    ("before", "replace .*/read-1/summary.json", 1),
]


@pytest.mark.whole
@pytest.mark.parametrize("asleep", READS, ids=lambda moment: " ".join(map(str, moment)))
def test_a_read_that_fell_asleep_while_another_machine_ended_it_spends_no_second_seal(
    tmp_path_factory, tmp_path, asleep
):
    made = short_sealed.shared(tmp_path_factory)
    shutil.rmtree(made / "cache" / "test_reads", ignore_errors=True)
    study = shutil.copytree(made / "study", tmp_path / "study")
    words = ["test", study, "--trust-paths"]
    first = Host(tmp_path, "one", words, {}, asleep)
    assert first.sleeps(), first.output
    second = Host(tmp_path, "two", words, {})
    assert second.ended() == 0, second.output
    before = json.loads((study / "test" / "summary.json").read_text())
    first.wakes()
    if first.ended():
        lost(first)
    assert json.loads((study / "test" / "summary.json").read_text()) == before
    assert [(each.number, each.purpose) for each in snapshot(study).ledger] == [(1, "test")]
