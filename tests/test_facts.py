"""The records of the public benchmarks: their sources, and what open_clip, timm and torchvision say."""

import hashlib
import importlib.util
import json
import runpy
from pathlib import Path

from carft_ray.data.benchmarks.reader import benchmark_words, within_groups
from carft_ray.recipe.benchmarks import BENCHMARKS, RECORDS

SOURCES = json.loads(Path(__file__).with_name("benchmark_sources.json").read_text())
ITEMS = ("classes", "words", "groups", "domains", "counts", "templates")
WITHIN_IMAGENET = {"imagenet-a", "imagenet-r", "imagenet-sketch", "imagenet-v2", "objectnet"}
CLASSES = {"imagenet": 1000, "imagenet-v2": 1000, "imagenet-r": 200, "imagenet-a": 200, "imagenet-sketch": 1000}
CLASSES |= {"objectnet": 113, "fmow": 62, "iwildcam": 182, "camelyon17": 2}
CLASSES |= {"pacs": 7, "vlcs": 5, "office-home": 65, "terra-incognita": 10, "domain-net": 345}
CLASSES |= {"cifar10": 10, "cifar100": 100, "flowers102": 102, "fgvc-aircraft": 100, "stanford-cars": 196}
CLASSES |= {"food101": 101, "dtd": 47, "sun397": 397, "oxford-pets": 37, "caltech101": 101}


def counts_of(name):
    """Returns the number of images for each split or domain, also where only one source has it."""
    return SOURCES[name].get("counts", BENCHMARKS[name].counts)


def test_each_set_has_its_number_of_classes_and_files_are_small():
    assert {name: len(facts.classes) for name, facts in BENCHMARKS.items()} == CLASSES
    assert sum(path.stat().st_size for path in RECORDS.iterdir()) < 500_000


def test_hashes_and_sources_are_complete():
    assert SOURCES.keys() == BENCHMARKS.keys()
    for name, of_set in SOURCES.items():
        record = json.loads((RECORDS / f"{name}.json").read_text())
        assert of_set["items"].keys() == {item for item in ITEMS if item in record} | {"counts"}
        assert ("counts" in record) == of_set["items"]["counts"]["sure"] == ("counts" not in of_set), name
        for item, found in of_set["items"].items():
            text = json.dumps({**of_set, **record}[item], ensure_ascii=False, separators=(",", ":"))
            assert found["sha256"] == hashlib.sha256(text.encode()).hexdigest(), (name, item)
            assert all(source["repo"] and source["path"] for source in found["sources"]), (name, item)
            owners = {source["repo"].split("/")[0] for source in found["sources"]}
            assert len(owners) >= 2 if found["sure"] else found["note"], (name, item)


def test_splits_and_domains_are_those_that_are_counted():
    for name, facts in BENCHMARKS.items():
        if facts.domains or facts.needs_split:
            assert {*counts_of(name)} == {*(facts.domains or facts.splits)}, name


def test_masks_lie_within_imagenet():
    imagenet = BENCHMARKS["imagenet"]
    assert {name for name, facts in BENCHMARKS.items() if facts.within} == WITHIN_IMAGENET
    for name in WITHIN_IMAGENET:
        facts = BENCHMARKS[name]
        groups = within_groups(facts)
        flat = [wnid for group in groups for wnid in group]
        assert facts.within == "imagenet"
        assert len(groups) == len(facts.classes)
        assert len(flat) == len(set(flat)) == (125 if name == "objectnet" else len(facts.classes))
        assert set(flat) <= set(imagenet.classes)
        if facts.groups is None:
            assert flat == list(facts.classes) == sorted(flat)
    assert within_groups(BENCHMARKS["imagenet-v2"]) == tuple((wnid,) for wnid in imagenet.classes)
    assert within_groups(imagenet) == within_groups(BENCHMARKS["imagenet-v2"])


def test_prompt_words_come_from_the_set_from_imagenet_or_from_the_names():
    imagenet, words = BENCHMARKS["imagenet"], benchmark_words("imagenet")
    assert tuple(words.values()) == imagenet.words
    assert benchmark_words("imagenet-sketch") == benchmark_words("imagenet-v2") == words
    assert benchmark_words("imagenet-r") == {wnid: words[wnid] for wnid in BENCHMARKS["imagenet-r"].classes}
    assert benchmark_words("office-home")["Alarm_Clock"] == "Alarm Clock"
    assert benchmark_words("objectnet")["alarm_clock"] == "alarm clock"
    groups = dict(zip(BENCHMARKS["objectnet"].classes, within_groups(BENCHMARKS["objectnet"]), strict=True))
    assert [words[wnid] for wnid in groups["chair"]] == ["barber chair", "folding chair", "rocking chair"]


def installed(package, file):
    """A file of an installed package; to find it does not import the package."""
    return Path(importlib.util.find_spec(package).origin).parent / file


def test_lists_are_those_of_open_clip_of_torchvision_and_of_timm():
    theirs, imagenet = runpy.run_path(str(installed("open_clip", "zero_shot_metadata.py"))), BENCHMARKS["imagenet"]
    assert imagenet.words == tuple(theirs["IMAGENET_CLASSNAMES"])
    assert [t.format("x y") for t in imagenet.templates] == [f("x y") for f in theirs["OPENAI_IMAGENET_TEMPLATES"]]
    categories = runpy.run_path(str(installed("torchvision", "models/_meta.py")))["_IMAGENET_CATEGORIES"]
    same = [theirs == ours for theirs, ours in zip(categories, imagenet.words, strict=True)]
    assert sum(same) > 500  # OpenAI renamed the others; in another order hardly one would agree
    for name in ("imagenet", "imagenet-r", "imagenet-a"):
        read = installed("timm", f"data/_info/{name.replace('-', '_')}_synsets.txt").read_text().split()
        assert list(BENCHMARKS[name].classes) == read


def test_sets_of_domainbed_and_wilds_have_the_published_totals():
    totals = {"pacs": 9_991, "vlcs": 10_729, "office-home": 15_588, "terra-incognita": 24_788, "domain-net": 586_575}
    totals |= {"fmow": 141_696, "iwildcam": 203_029, "camelyon17": 455_954}
    assert {name: sum(counts_of(name).values()) for name in totals} == totals


def test_the_table_of_the_documents_says_what_the_records_say():
    text = (Path(__file__).parents[1] / "docs" / "benchmarks.md").read_text()
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if "| `" in line]
    assert sorted(row[0].strip("`") for row in rows) == sorted(BENCHMARKS)
    for cell, classes, images, *_, unsure in rows:
        name = cell.strip("`")
        counts = counts_of(name)
        total = sum(n for split, n in counts.items() if split != "trainval" or "train" not in counts)
        assert (classes, images) == (str(len(BENCHMARKS[name].classes)), f"{total:,}"), name
        assert unsure == ", ".join(item for item, found in SOURCES[name]["items"].items() if not found["sure"]), name
