"""The facts of the public benchmarks: counts, order, masks, hashes, and what open_clip, timm and torchvision say."""

import hashlib
import importlib.util
import json
import runpy
from collections import Counter
from pathlib import Path

import pytest

from carft_ray.data.benchmarks.facts import FOLDER, fact_names, label_groups, load_facts, prompt_words, read_file
from carft_ray.errors import DataError

ITEMS = ("classes", "words", "groups", "domains", "counts", "templates", "table")
WITHIN_IMAGENET = ("imagenet-a", "imagenet-c", "imagenet-r", "imagenet-sketch", "imagenet-v2", "objectnet")
CLASSES = {"imagenet": 1000, "imagenet-v2": 1000, "imagenet-r": 200, "imagenet-a": 200, "imagenet-sketch": 1000}
CLASSES |= {"imagenet-c": 1000, "objectnet": 113, "fmow": 62, "iwildcam": 182, "camelyon17": 2}
CLASSES |= {"pacs": 7, "vlcs": 5, "office-home": 65, "terra-incognita": 10, "domain-net": 345}
CLASSES |= {"cifar10": 10, "cifar100": 100, "flowers102": 102, "fgvc-aircraft": 100, "stanford-cars": 196}
CLASSES |= {"food101": 101, "dtd": 47, "sun397": 397, "oxford-pets": 37, "caltech101": 101}


def test_each_set_has_its_number_of_classes_and_files_are_small():
    assert {name: len(load_facts(name).classes) for name in fact_names()} == CLASSES
    assert sum(path.stat().st_size for path in FOLDER.iterdir()) < 500_000


def test_hashes_and_sources_are_complete():
    for name in CLASSES:
        read, facts = read_file(name), load_facts(name)
        assert read["name"] == name
        given = {item for item in ITEMS if read[item]}
        assert Counter(found["item"] for found in read["provenance"]) == Counter(given)
        for found in read["provenance"]:
            text = json.dumps(read[found["item"]], ensure_ascii=False, separators=(",", ":"))
            assert found["sha256"] == hashlib.sha256(text.encode()).hexdigest(), (name, found["item"])
            assert all(source["repo"] and source["path"] for source in found["sources"]), (name, found["item"])
            assert found["sure"] == facts.is_sure(found["item"])
            owners = {source["repo"].split("/")[0] for source in found["sources"]}
            assert len(owners) >= 2 if found["sure"] else found["note"], (name, found["item"])
        assert not facts.is_sure("nothing")


def test_masks_lie_within_imagenet():
    imagenet = load_facts("imagenet")
    assert {name for name in fact_names() if load_facts(name).within} == set(WITHIN_IMAGENET)
    for name in WITHIN_IMAGENET:
        facts = load_facts(name)
        groups = label_groups(facts)
        flat = [i for group in groups for i in group]
        assert facts.within == "imagenet"
        assert len(groups) == len(facts.classes)
        assert len(flat) == len(set(flat))
        assert set(flat) <= set(range(1000))
        assert len(flat) == (125 if name == "objectnet" else len(facts.classes))
        if facts.groups is None:
            assert [imagenet.classes[i] for i in flat] == list(facts.classes)
            assert flat == sorted(flat)
    assert label_groups(load_facts("imagenet-v2")) == tuple((i,) for i in range(1000))
    assert label_groups(imagenet) is None


def test_prompt_words_come_from_the_set_from_imagenet_or_from_the_names():
    imagenet, rendition, objects = (load_facts(name) for name in ("imagenet", "imagenet-r", "objectnet"))
    assert prompt_words(load_facts("imagenet-sketch")) == prompt_words(load_facts("imagenet-v2")) == imagenet.words
    by_wnid = dict(zip(imagenet.classes, imagenet.words, strict=True))
    assert prompt_words(rendition) == tuple(by_wnid[wnid] for wnid in rendition.classes)
    assert prompt_words(load_facts("office-home"))[0] == "Alarm Clock"
    assert prompt_words(objects)[0] == "alarm clock"
    groups = dict(zip(objects.classes, label_groups(objects), strict=True))
    assert [imagenet.words[i] for i in groups["chair"]] == ["barber chair", "folding chair", "rocking chair"]


def installed(package, file):
    """A file of an installed package; to find it does not import the package."""
    return Path(importlib.util.find_spec(package).origin).parent / file


def test_lists_are_those_of_open_clip_of_torchvision_and_of_timm():
    theirs, imagenet = runpy.run_path(str(installed("open_clip", "zero_shot_metadata.py"))), load_facts("imagenet")
    assert imagenet.words == tuple(theirs["IMAGENET_CLASSNAMES"])
    assert [t.format("x y") for t in imagenet.templates] == [f("x y") for f in theirs["OPENAI_IMAGENET_TEMPLATES"]]
    categories = runpy.run_path(str(installed("torchvision", "models/_meta.py")))["_IMAGENET_CATEGORIES"]
    same = [theirs == ours for theirs, ours in zip(categories, imagenet.words, strict=True)]
    assert sum(same) > 500  # OpenAI renamed the others; in another order hardly one would agree
    for name in ("imagenet", "imagenet-r", "imagenet-a"):
        read = installed("timm", f"data/_info/{name.replace('-', '_')}_synsets.txt").read_text().split()
        assert list(load_facts(name).classes) == read


def test_sets_of_domainbed_and_wilds_have_the_published_totals():
    totals = {"pacs": 9_991, "vlcs": 10_729, "office-home": 15_588, "terra-incognita": 24_788, "domain-net": 586_575}
    totals |= {"fmow": 141_696, "iwildcam": 203_029, "camelyon17": 455_954}
    for name, total in totals.items():
        facts = load_facts(name)
        assert sum(facts.counts.values()) == total
        parts = read_file(name)["table"]["splits"] if name in ("fmow", "iwildcam", "camelyon17") else facts.domains
        assert {*facts.counts} == {*parts}, name


def test_the_table_of_the_documents_says_what_the_files_say():
    text = (Path(__file__).parents[1] / "docs" / "benchmarks.md").read_text()
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if "| `" in line]
    assert sorted(row[0].strip("`") for row in rows) == list(fact_names())
    for name, classes, images, *_, unsure in rows:
        facts = load_facts(name.strip("`"))
        total = sum(n for split, n in facts.counts.items() if split != "trainval" or "train" not in facts.counts)
        assert (classes, images) == (str(len(facts.classes)), f"{total:,}" if total else ""), name
        assert unsure == ", ".join(each["item"] for each in facts.provenance if not each["sure"]), name


def test_an_unknown_set_is_refused_with_the_nearest_name():
    with pytest.raises(DataError, match="but got 'imagenet_r'; did you mean 'imagenet-r'"):
        load_facts("imagenet_r")
