"""Files from strangers that never end, are far too large, or say what cannot be: each is one message, at once."""

import contextlib
import io
import json
import os
import tarfile
from pathlib import Path

import crash_host
import pyarrow as pa
import pytest
import short_training
from layouts_tables import hf_dataset, pictures, table_of, write_folder, write_table
from sources import open_set

from carft_ray import files
from carft_ray.data.images import MOST_BYTES
from carft_ray.errors import DataError, RecipeError, StorageError
from carft_ray.recipe.loading import load_recipe
from carft_ray.untrusted import parse_json

IMAGES = pictures()
TB = 10**12


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path


def opened(**spec):
    return open_set(base_dir=Path.cwd(), **spec)


def told(**spec):
    with pytest.raises(DataError) as caught:
        opened(**spec)
    return str(caught.value)


def recipe_file():
    """Writes a recipe; what it names is not there."""
    Path("recipe.yaml").write_text(short_training.RECIPE)
    return Path("recipe.yaml").absolute()


def sparse(path, size=TB, content=b""):
    """Writes a file with holes: it takes no place on the disk."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "wb") as file:
        file.write(content)
        file.truncate(size)


# what never ends


@pytest.mark.parametrize("name", ["pipe.tar", "pipe.csv", "pipe.parquet", "pipe.arrow"])
def test_a_pipe_in_place_of_a_set_is_told(here, name):
    os.mkfifo(name)
    source = "webdataset" if name.endswith("tar") else "table"
    for path in (name, "pipe*"):
        assert f"but got {here / name}" in told(source=source, path=path)


def test_a_pipe_or_a_device_in_place_of_an_image_is_told(here):
    write_folder(here / "images", IMAGES)
    os.mkfifo("images/cat/pipe.png")
    os.symlink("/dev/zero", "images/cat/zero.png")
    write_table(here / "set.csv", pa.table({"image": ["cat/pipe.png", "cat/zero.png"], "label": ["cat", "cat"]}))
    source = opened(source="table", path="set.csv", root="images")
    for index in range(2):
        with pytest.raises(DataError, match="must be a regular file, but got a pipe, device or socket"):
            source.content(index)


@pytest.mark.parametrize("kind", ["pipe", "/dev/zero"])
def test_a_pipe_or_a_device_in_place_of_a_list_is_told(here, kind):
    os.mkfifo("pipe")
    write_table(here / "set.parquet", table_of(IMAGES))
    rule = "must be a regular file, but got "
    assert rule in told(source="table", path="set.parquet", class_names=kind)
    assert rule in told(source="table", path="set.parquet", exclude=kind)
    recipe = recipe_file()
    with pytest.raises(RecipeError, match=rule):
        load_recipe(recipe, [f"prompts.templates='file:{kind}'"])
    with pytest.raises(RecipeError, match=rule):
        load_recipe(here / kind)


# what is too large


def test_an_image_of_a_terabyte_is_told_and_not_read(here):
    write_folder(here / "images", IMAGES)
    sparse(here / "images" / "cat" / "9.png", content=IMAGES[0].content)
    source = opened(source="folder", path="images")
    place = [source.place(index) for index in range(len(source))].index(str(here / "images" / "cat" / "9.png"))
    with pytest.raises(DataError, match=f"at most {MOST_BYTES:,} bytes, .*but got 1,000,000,000,000"):
        source.content(place)


def test_an_image_of_a_terabyte_in_a_shard_or_a_table_is_told_and_not_read(here):
    with tarfile.open("x.tar", "w", format=tarfile.GNU_FORMAT) as archive:
        member = tarfile.TarInfo("0.cls")
        member.size = 1
        archive.addfile(member, io.BytesIO(b"0"))
        member = tarfile.TarInfo("0.png")
        member.size = TB
        header = member.tobuf(tarfile.GNU_FORMAT)
        end = archive.offset
    written = (here / "x.tar").read_bytes()[:end] + header
    sparse(here / "x.tar", end + 512 + -(-TB // 512) * 512 + 1024, written)
    source = opened(source="webdataset", path="x.tar", class_names=["cat"])
    with pytest.raises(DataError, match=r"x\.tar: 0\.png: an image must have at most .* but got 1,000,000,000,000"):
        source.content(0)

    batch = pa.record_batch({"image": pa.array([b"x" * 512], pa.large_binary()), "label": ["cat"], "name": ["a"]})
    with pa.ipc.new_stream("x.arrow", batch.schema) as writer:
        writer.write_batch(batch)
    assert opened(source="table", path="x.arrow", id="name").content(0) == b"x" * 512


def test_a_header_of_20_gigabytes_is_told_and_not_read(here):
    header = tarfile.TarInfo("x")
    header.type, header.size = tarfile.XHDTYPE, 20 * 2**30
    sparse(here / "x.tar", 21 * 2**30, header.tobuf(tarfile.GNU_FORMAT))
    assert told(source="webdataset", path="x.tar").startswith(f"{here / 'x.tar'}: must be a whole tar archive")


def test_a_size_below_zero_does_not_lead_back_without_end(here):
    member = tarfile.TarInfo("0.png")
    raw = bytearray(member.tobuf(tarfile.GNU_FORMAT))
    raw[124:136] = b"\xff" * 10 + b"\xfe\x00"  # -512 as GNU writes it
    raw[148:156] = b" " * 8
    raw[148:156] = b"%06o\0 " % sum(raw)
    (here / "x.tar").write_bytes(bytes(raw) + bytes(10240))
    assert "must be a whole tar archive" in told(source="webdataset", path="x.tar")


def test_headers_that_call_each_other_without_end_are_told(here):
    header = tarfile.TarInfo("x")
    header.type = tarfile.XGLTYPE
    (here / "x.tar").write_bytes(header.tobuf(tarfile.GNU_FORMAT) * 5000)
    assert "must be a whole tar archive" in told(source="webdataset", path="x.tar")


def test_a_name_in_a_shard_that_is_no_text_is_told(here):
    with tarfile.open("x.tar", "w") as archive:
        archive.addfile(tarfile.TarInfo("\udcff.png"))
    assert "the name of a file must be text in UTF-8" in told(source="webdataset", path="x.tar")


def test_lists_of_a_terabyte_are_told_and_not_read(here):
    write_table(here / "set.parquet", table_of(IMAGES))
    sparse(here / "names.txt")
    sparse(here / "table.csv", content=b"image,label\n")
    rule = "since it is read whole, but got 1,000,000,000,000"
    assert rule in told(source="table", path="set.parquet", class_names="names.txt")
    assert rule in told(source="table", path="table.csv")
    sparse(here / "one_line.csv")
    assert "must be" in told(source="table", path="one_line.csv")
    with pytest.raises(RecipeError, match=rule):
        load_recipe(here / "names.txt")


def test_the_state_of_a_saved_data_set_may_be_nothing_but_json(here):
    hf_dataset(IMAGES).save_to_disk(here / "saved")
    for content, rule in (
        ("[" * 200_000, "nested too deep"),
        ('{"_data_files": [{"filename": "\\ud800"}]}', "surrogates not allowed"),
    ):
        (here / "saved" / "state.json").write_text(content)
        text = told(source="huggingface", path="saved")
        assert text.startswith(f"{here / 'saved' / 'state.json'}: must be a readable JSON file, but got ")
        assert text.endswith(rule)
    sparse(here / "saved" / "state.json")
    assert "since it is read whole" in told(source="huggingface", path="saved")


# what cannot be


def test_json_too_deep_or_with_half_of_a_pair_is_a_value_error():
    assert parse_json('{"a": "\\ud83d\\ude00"}') == {"a": "\U0001f600"}
    for text in ("[" * 200_000, '"\\ud800"', b'["\\udc00"]'):
        with pytest.raises(ValueError):  # noqa: PT011
            parse_json(text)


@pytest.mark.parametrize("where", ["names", "metadata", "anywhere"])
def test_a_damaged_arrow_set_is_told_whatever_is_damaged(here, where):
    """Damaged names are a SystemError or a UnicodeDecodeError of Arrow."""
    noted = json.dumps({"info": {"features": {"label": {"_type": "ClassLabel", "names": ["a"]}}}})
    table = table_of(IMAGES).replace_schema_metadata({"huggingface": noted})
    whole = write_table(here / "set.arrow", table).read_bytes()
    if where == "names":
        damaged = [whole.replace(b"label", b"\xff\xfelab"), whole.replace(b"label", b"lab\0l")]
    elif where == "metadata":
        damaged = [whole.replace(b'"info"', b'"in\xff"'), whole.replace(b"huggingface", b"hugg\xff\xffgface")]
    else:
        damaged = [whole[:at] + bytes([whole[at] ^ 0xFF]) + whole[at + 1 :] for at in range(0, 1500, 7)]
    for content in damaged:
        (here / "set.arrow").write_bytes(content)
        with contextlib.suppress(DataError):  # and nothing else is raised
            source = opened(source="table", path="set.arrow", id="name", image="image", label="label")
            for index in range(len(source)):
                source.content(index)


@pytest.mark.parametrize(
    ("setting", "rule"),
    [
        ("search.space.kl_weight={low: 0.1, high: 0.9, step: 1e-320}", "at most 1,000,000,000 steps must lie between"),
        ("search.space.kl_weight={low: 0, high: 1.7e308, step: 1}", "at most 1,000,000,000 steps must lie between"),
        ("search.space.kl_weight={low: -1.7e308, high: 1.7e308}", "high - low must be a finite number"),
        ('data.train.path="a\\0b"', "must be text without the character NUL"),
        ('model.name="local-dir:a\\0b"', "must be text without the character NUL"),
        ('prompts.templates="file:a\\0b"', "must be text without the character NUL"),
        ('search.warm_start=["a\\0b"]', "must be text without the character NUL"),
        ('prompts.class_names=["a\\ud800", b, c, d, e]', "must be text without the character NUL and without halves"),
        ("prompts.templates=file:~nosuchuser/x", "~nosuchuser/x: No such file or directory"),
        ("search.baselines={%s: {kl_weight: 0}}" % ("x" * 300), "letters, digits, _ and -, at most 100"),
        (
            f"data.train.path={'x' * 300}",
            "a path of the recipe: must have at most 4,095 bytes, and each name in it 255",
        ),
        (f"prompts.templates=file:{'x/' * 3000}", "must have at most 4,095 bytes"),
        ("name=" + "x" * 300, "letters, digits, _ and -, at most 100"),
    ],
)
def test_a_recipe_that_says_what_cannot_be_is_told(here, setting, rule):
    with pytest.raises(RecipeError) as caught:
        load_recipe(recipe_file(), [setting])
    assert rule in str(caught.value)


def test_the_home_of_an_unknown_user_is_a_folder_that_is_not_there(here):
    recipe = load_recipe(recipe_file(), ["data.train.path=~nosuchuser/x"])
    assert recipe.data.train.path == str(here / "~nosuchuser" / "x")


def test_json_of_a_study_that_never_ends_or_is_too_deep_is_told(here):
    os.mkfifo("pipe")
    Path("deep").write_text("[" * 200_000)
    for name, rule in (
        ("pipe", "must be a regular file, but got a pipe, device or socket"),
        ("deep", "nested too deep"),
    ):
        with pytest.raises(StorageError, match=rule):
            files.read_json(here / name)
        assert files.read_object(here / name) is None
    with pytest.raises(StorageError, match="must be a regular file"):
        files.read_json_lines(here / "pipe")
    assert files.read_json_lines(here / "deep") == []


@pytest.mark.slow
def test_commands_end_before_anything_is_trained(here, capfd):
    recipe = short_training.make(here)
    os.mkfifo("images/photo/arrow/pipe.png")
    os.mkfifo("pipe.tar")
    sparse(here / "images" / "photo_val" / "arrow" / "9.png")
    for setting, code in (
        ("data.train={source: webdataset, path: pipe.tar}", 4),
        ("name=short", 4),  # the image of a terabyte
    ):
        words = ["search", recipe, "--executor", "debug", "--study", "study", "--set", setting]
        assert crash_host.call(words) == code
        assert "fault of carft-ray" not in capfd.readouterr().err
        assert not list((here / "study").glob("trials/*"))
