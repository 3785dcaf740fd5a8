"""What a study was made of: a command that loads something else refuses, spends nothing, and works again afterwards."""

import io
import json
import os
import re
import shutil
import tarfile
from functools import partial
from pathlib import Path

import pytest
import short_sealed
import short_study
import short_training
from bucket_server import bucket_server, copied
from logs import change, commits, holding, rewrite
from PIL import Image
from safetensors.torch import load_file, save_file

from carft_ray.data.duplicates.find_duplicates import digests_of_tests
from carft_ray.data.same_as_study import differences_of, require_same
from carft_ray.errors import DataError, MachineError
from carft_ray.recipe.loading import load_recipe
from carft_ray.study.ledger import note_test_sets, read_ledger, reads_of
from carft_ray.study.place import fetched, log_at
from carft_ray.training.run import run_training
from carft_ray.training.run_context import RunContext
from carft_ray.training.shared_inputs import forget_inputs

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with a finished study, its images and its model."""
    return short_sealed.shared(tmp_path_factory)


@pytest.fixture
def here(folder, tmp_path, monkeypatch):
    """The working directory with a copy of all that; no other study has read these images."""
    return short_sealed.alone(folder, tmp_path, monkeypatch)


@pytest.fixture(params=["folder", pytest.param("bucket", marks=pytest.mark.whole)])
def study(request, here, monkeypatch):
    """The place of the study."""
    if request.param == "folder":
        yield "study"
        return
    with bucket_server(monkeypatch) as server:
        copied(here / "study", server.address("study"))
        yield server.address("study")


@pytest.fixture
def asked(run, here):
    """Runs a command on a study as a process of its own does, that has loaded nothing; returns code and output."""

    def call(name, study, *words):
        forget_inputs()
        shutil.rmtree(here / "out", ignore_errors=True)
        more = {"export": ["--to", "out"], "evaluate": ["--json"]}.get(name, [])
        code, out, err = run(name, study, *more, *words, "--trust-paths")
        return code, out, " ".join(err.split())

    return call


def written(here):
    """Returns what an export holds; of weights their values, since their metadata has no order."""
    paths = [*(here / "out").iterdir()]
    weights = {path.name: load_file(path) for path in paths if path.suffix == ".safetensors"}
    values = {name: {key: tensor.tolist() for key, tensor in found.items()} for name, found in weights.items()}
    return values, {path.name: path.read_bytes() for path in paths if path.name not in weights}


def rename_class(here):
    """Renames a class in every domain; returns what undoes it."""
    pairs = [(path, path.with_name("zarrow")) for path in (here / "images").glob("*/arrow")]
    assert len(pairs) == 6
    for old, new in pairs:
        old.rename(new)

    def undo():
        for old, new in pairs:
            new.rename(old)

    return undo, "data.classes: the classes must be as in the study, hash ", '"arrow" is missing, "zarrow" is new'


def overwrite_weights(here):
    path = here / "model" / "open_clip_model.safetensors"
    before = path.read_bytes()
    save_file({name: values + 0.1 for name, values in load_file(path).items()}, path)
    return lambda: path.write_bytes(before), "model: the weights must be as in the study, ", "Restore the weights"


def edit_configuration(part, **values):
    def edit(here):
        path = here / "model" / "open_clip_config.json"
        before, content = path.read_text(), json.loads(path.read_text())
        content[part].update(values)
        path.write_text(json.dumps(content))
        return (
            lambda: path.write_text(before),
            "must be as in the study, ",
            "Restore the configuration beside the weights",
        )

    return edit


CHANGES = [
    rename_class,
    overwrite_weights,
    edit_configuration("model_cfg", quick_gelu=True),
    edit_configuration("preprocess_cfg", mean=[0.1, 0.2, 0.3]),
    edit_configuration("preprocess_cfg", interpolation="bilinear"),
]


@pytest.mark.parametrize("changed", CHANGES)
def test_other_weights_or_classes_are_refused_by_all_that_load_a_study_and_spend_no_seal(here, study, asked, changed):
    before = asked("evaluate", study)
    assert before[0] == 0, before
    assert asked("export", study)[0] == 0
    exported = written(here)
    undo, rule, value = changed(here)
    for name in ("evaluate", "export", "test"):
        code, _, err = asked(name, study)
        assert code == 4, (name, err)
        assert rule in err
        assert value in err
        assert not (here / "out").exists()
    assert reads_of(read_ledger_at(study)) == []
    undo()
    assert asked("evaluate", study)[:2] == before[:2]
    assert asked("export", study)[0] == 0
    assert written(here) == exported
    code, _, err = asked("test", study)
    assert code == 0, err
    assert [entry.number for entry in reads_of(read_ledger_at(study))] == [1]


def read_ledger_at(study):
    return read_ledger(Path(fetched(study)), log_at(study))


@pytest.mark.parametrize(
    ("key", "told"),
    [("templates", "prompts.templates: the templates must"), ("class_names", "prompts.class_names: the names of the")],
)
def test_other_prompts_are_refused(here, asked, key, told):
    """As after an upgrade that has other templates under one name."""

    def reword(provenance):
        provenance[key] = [f"{word}, once" for word in provenance.get(key, [])]

    change(here / "study", "provenance", reword)
    for name in ("evaluate", "export", "test"):
        code, _, err = asked(name, "study")
        assert code == 4, (name, err)
        assert told in err
    assert reads_of(read_ledger_at("study")) == []


def test_a_refused_search_changes_nothing_that_is_prepared(here, asked):
    """What `evaluate` and the report take from there belongs to the study still."""
    recipe = load_recipe(here / "study" / "resolved.yaml")
    before = prepared(here)
    undo, _, _ = rename_class(here)
    forget_inputs()
    with pytest.raises(DataError, match=r'data\.classes: .* "arrow" is missing, "zarrow" is new'):
        short_study.search(here / "study", recipe)
    assert prepared(here) == before
    undo()
    overwrite_weights(here)
    forget_inputs()
    with pytest.raises(DataError, match="model: the weights must be as in the study"):
        short_study.search(here / "study", recipe)
    now = prepared(here)  # of the sets, which are those of the study, the listing was written again
    assert {name: now[name] for name in before if not name.endswith(".arrow")}.items() <= before.items()


def prepared(here):
    return {path.name: path.read_bytes() for path in (here / "study" / "prepared").rglob("*") if path.is_file()}


def test_other_validation_images_are_named_and_concern_no_command_that_does_not_read_them(here, asked):
    images = here / "images" / "photo_val" / "star"
    before = asked("evaluate", "study")
    kept = (images / "0.png").read_bytes()
    short_training.write_image(images / "0.png", 1, 7)
    short_training.write_image(images / "new.png", 1, 8)
    code, _, err = asked("evaluate", "study")
    assert code == 4
    assert "data.id_val: the contents of this set must be those of the study, digest " in err
    assert "16 images instead of 15; star/new.png is new, star/0.png has changed" in err.replace("photo_val/", "")
    assert asked("export", "study")[0] == 0
    (images / "new.png").unlink()
    (images / "0.png").write_bytes(kept)
    assert asked("evaluate", "study") == before


def test_an_export_works_without_images_from_what_the_study_has_noted(here, asked):
    assert asked("export", "study")[0] == 0
    before = written(here)
    (here / "images").rename(here / "away")
    code, _, err = asked("export", "study")
    assert code == 0, err
    assert "The classes are those that the study has noted: " in err
    assert written(here) == before
    code, _, err = asked("export", "study", "--alpha", ".33")  # its accuracy is not known
    assert code == 4
    overwrite_weights(here)
    code, _, err = asked("export", "study")
    assert code == 4
    assert "model: the weights must be as in the study, " in err


def test_an_image_that_changes_while_size_and_date_stay_is_noticed(here, asked):
    """As pictures without compression have one size, and `rsync -t` keeps the date."""
    for path in [*(here / "images").rglob("*.png")]:
        Image.open(path).save(path.with_suffix(".bmp"))
        path.unlink()
    recipe = load_recipe(here / "study" / "resolved.yaml", ["search.trials=1", f"data.cache_dir={here / 'bmp_cache'}"])
    short_study.search(here / "bmp", recipe)
    assert asked("evaluate", "bmp")[0] == 0
    for domain in ("photo_val", "photo"):
        one, other = (here / "images" / domain / "star" / f"{number}.bmp" for number in (0, 1))
        before = one.stat()
        one.write_bytes(other.read_bytes())
        os.utime(one, ns=(before.st_atime_ns, before.st_mtime_ns))
        assert (one.stat().st_size, one.stat().st_mtime_ns) == (before.st_size, before.st_mtime_ns)
    code, _, err = asked("evaluate", "bmp")
    assert code == 4
    assert "photo_val/star/0.bmp has changed" in err
    forget_inputs()
    with pytest.raises(DataError, match=r"data\.train: .*photo/star/0\.bmp has changed"):
        short_study.search(here / "bmp", recipe)


def noted(study):
    """Has a study note its test images, as a search does that begins."""
    recipe = load_recipe(study / "resolved.yaml")
    with holding(study) as log:
        note_test_sets(log, partial(digests_of_tests, recipe, Path(recipe.data.cache_dir)))


def other_image(images):
    short_training.write_image(images / "star" / "0.png", 4, 12345)


def other_class(images):
    (images / "star" / "0.png").rename(images / "heart" / "moved.png")


@pytest.mark.parametrize(
    ("changed", "rule"),
    [
        (other_image, "its images must be those with which the search began, digest "),
        (other_class, "its images must have the classes that they had when the search began, digest "),
    ],
)
def test_other_test_images_or_classes_are_refused_until_a_reason_is_given(here, asked, changed, rule):
    noted(here / "study")
    changed(here / "images" / "painting")
    assert asked("evaluate", "study")[0] == asked("export", "study")[0] == 0  # they do not read them
    code, _, err = asked("test", "study")
    assert code == 4, err
    assert f"data.ood_test.painting: {rule}" in err
    assert "/study --again REASON" in err
    assert reads_of(read_ledger_at("study")) == []
    code, _, err = asked("test", "study", "--again", "labels were mended")
    assert code == 0, err
    assert "The images of painting have changed since the search began." in err
    found = json.loads((here / "study" / "test" / "summary.json").read_text())
    assert (found["changed_sets"], found["reason"]) == (["painting"], "labels were mended")


def test_a_study_that_has_noted_less_is_compared_on_that_and_says_so(here, asked):
    """As of a release that noted no classes of test images, and a test set that was under lock."""
    noted(here / "study")
    found = commits(here / "study")
    [record] = [one for commit in found for one in commit["records"] if one["kind"] == "test sets"]
    del record["with_classes"]
    del record["digests"]["cartoon"]
    rewrite(here / "study", found)
    change(here / "study", "provenance", lambda provenance: provenance.pop("templates", None))
    code, _, err = asked("test", "study")
    assert code == 0, err
    assert "not compared with the beginning of the search, which has not noted it: cartoon, id_test, painting" in err
    assert "The study has not noted the templates: not compared" in err
    change(here / "study", "provenance", lambda provenance: provenance.pop("data", None))
    code, _, err = asked("evaluate", "study")
    assert code == 0, err
    assert "The study has not noted what it was made of" in err


def test_the_classes_of_shards_are_compared_too(here, asked, tmp_path):
    """Labels that are numbers take their names from ``classnames.txt``."""
    recipe = tmp_path / "shards.yaml"
    for domain in ("photo", "photo_val", "sketch", "photo_test"):
        write_numbered(tmp_path / "shards" / domain, tmp_path / "images" / domain)
    text = short_training.RECIPE.replace(
        "source: folder, path: images, domains: [", "source: webdataset, path: shards/["
    )
    recipe.write_text(re.sub(r"shards/\[(\w+)\]", r"shards/\1/*.tar", text))
    sealed = ["data.id_test={source: webdataset, path: shards/photo_test/*.tar}", f"data.cache_dir={tmp_path / 'own'}"]
    short_study.search(tmp_path / "shards_study", load_recipe(recipe, [*sealed, "search.trials=1"]))
    before = asked("evaluate", "shards_study")
    assert before[0] == 0, before
    for domain in (tmp_path / "shards").iterdir():
        names = (domain / "classnames.txt").read_text().split()
        (domain / "classnames.txt").write_text("\n".join([*names[1:], names[0]]))
    for name in ("evaluate", "export", "test"):
        code, _, err = asked(name, "shards_study")
        assert code == 4, (name, err)
        assert 'number 1 is "circle" instead of "arrow"' in err
    assert reads_of(read_ledger_at("shards_study")) == []
    for domain in (tmp_path / "shards").iterdir():
        (domain / "classnames.txt").write_text("\n".join(short_training.CLASSES))
    assert asked("evaluate", "shards_study") == before
    assert asked("export", "shards_study")[0] == asked("test", "shards_study")[0] == 0


def write_numbered(folder, images):
    """Writes the images of a domain as a shard whose labels are numbers."""
    folder.mkdir(parents=True)
    with tarfile.open(folder / "0.tar", "w") as tar:
        for label, name in enumerate(short_training.CLASSES):
            for path in sorted((images / name).glob("*.png")):
                for ending, content in (("png", path.read_bytes()), ("cls", str(label).encode())):
                    info = tarfile.TarInfo(f"{name}-{path.stem}.{ending}")
                    info.size = len(content)
                    tar.addfile(info, io.BytesIO(content))
    (folder / "classnames.txt").write_text("\n".join(short_training.CLASSES))


def test_a_machine_with_other_weights_than_were_prepared_trains_nothing(here):
    """A node with another copy of them, or a training that begins after they were overwritten: no failed trial."""
    recipe = load_recipe(here / "study" / "resolved.yaml")
    overwrite_weights(here)
    forget_inputs()
    with pytest.raises(MachineError, match="model: the weights must be as in the study, "):
        run_training(recipe, here / "run", here / "study" / "prepared", RunContext())
    assert not (here / "run").exists()


def test_what_differs_is_named_with_both_hashes_and_three_examples():
    kept = {"data": {}, "classes": list("abcdefg"), "class_names": list("abcdefg"), "preparation": {"compile": False}}
    [problem] = differences_of(kept, {"classes": list("bcdefgx"), "class_names": list("bcdefgx")})
    assert problem.value.endswith('; "a" is missing, "x" is new')
    [problem] = differences_of(kept, {"classes": list("gfedcba")})
    start = 'number 1 is "g" instead of "a", number 2 is "f" instead of "b", number 3 is "e" instead of "c"'
    assert problem.value.endswith(f"{start} and 3 more")
    [problem] = differences_of(kept, {"preparation": {"compile": True}})
    assert (problem.place, problem.value) == ("train.compile", "true")
    require_same({}, {"classes": ["a"]})  # a new study is compared with nothing
