"""The images of a recipe: the kinds of sets, and the sets by role."""

import re
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, Field

from carft_ray.recipe.schema.fields import (
    REQUIRED,
    Config,
    Fraction,
    PositiveFloat,
    PositiveInt,
    Resume,
    Seed,
    SetName,
    distinct_names,
    key,
    nothing_is_empty,
    path_in,
)

# ImageNet-C's fifteen
Corruption = Literal[
    "gaussian_noise", "shot_noise", "impulse_noise", "defocus_blur", "glass_blur", "motion_blur", "zoom_blur", "snow",
    "frost", "fog", "brightness", "contrast", "elastic_transform", "pixelate", "jpeg_compression",
]  # fmt: skip
MEASURED = Resume("identity", "the images that the objective is measured on")
TESTED = Resume("identity", "fixed before anything is selected")
SHARED = Resume(
    "running",
    "the list of shared images is made once, before the first trial; with keep, images that are found later stay",
)
KEPT_IMAGES = Resume("running", "where and how images are kept; the pixels are the same")
IMAGES = Resume("identity", "which images")
SHOWN = Resume("identity", "what the images look like")
LABELS = Resume("identity", "the labels")
CLASS_NAMES = Resume("identity", "the meaning of the labels; a file may move: the names are compared")
MOVED = Resume(
    "running",
    "images may move; their contents are compared with the study's. Test sets move only together with `data.train`",
)


def _interval(value: Any) -> Any:
    ends = tuple(value) if isinstance(value, list | tuple) else ()
    if len(ends) != 2 or not all(type(end) in (int, float) and 0 <= end <= 1 for end in ends) or ends[0] >= ends[1]:
        raise ValueError("must be two fractions [from, to] with 0 <= from < to <= 1")
    return tuple(float(end) for end in ends)


def _sample_ids(value: Any) -> Any:
    if isinstance(value, str) and value.strip():
        return value
    ids = tuple(value) if isinstance(value, list | tuple) else ()
    if not ids or not all(type(one) is int and 0 <= one < 2**64 for one in ids):
        raise ValueError(
            "must be a list of sample ids (whole numbers from 0 to 2**64 - 1), or the path of a file of them"
        )
    return ids


def _class_names(value: Any) -> Any:
    if isinstance(value, str) and value.strip():
        return value
    names = tuple(value) if isinstance(value, list | tuple) else ()
    if not names or not all(isinstance(name, str) and name.strip() for name in names):
        raise ValueError("must be a list of texts, or the path of a text file with one name per line")
    return distinct_names(names)


def _folder_names(names: tuple[str, ...]) -> tuple[str, ...]:
    if {".", ".."} & set(names):
        raise ValueError("must be names of folders, not paths")
    return distinct_names(names)


def _row_values(value: Any) -> tuple[Any, ...]:
    values = tuple(value) if isinstance(value, list | tuple) else (value,)
    if not values or not all(isinstance(one, RowValue) for one in values):
        raise ValueError("must be a text, a whole number, true or false, or a list of them")
    return values


def _sample_label(value: Any) -> Any:
    if isinstance(value, str) and re.fullmatch(r"json:.+|[^:/\s]+", value) is None:
        raise ValueError("must be the ending of a file such as cls, or json:KEY")
    return value


FolderName = Annotated[str, Field(pattern=r"^[^/\\\x00]+$")]
ClassName = Annotated[str, Field(pattern=r"^[^\x00]+$")]  # 'F/A-18' is one
Domains = Annotated[tuple[FolderName, ...], Field(min_length=1), AfterValidator(_folder_names)]
SampleIds = Annotated[tuple[int, ...] | str, BeforeValidator(_sample_ids)]
ClassNames = Annotated[str | tuple[str, ...], BeforeValidator(_class_names)]
RowValue = bool | int | str
RowValues = Annotated[Any, BeforeValidator(_row_values, json_schema_input_type=RowValue | list[RowValue])]
Where = Annotated[dict[str, RowValues], BeforeValidator(nothing_is_empty)]


MAX_PIXELS = 64_000_000  # of one image: decoding takes up to 20 bytes for each
PILLOWS_LIMIT = 178_956_970  # more are refused by Pillow itself


class SandboxSet(Config):
    """A set of procedural images: one domain, every class equally often."""

    source: Literal["sandbox"] = key(REQUIRED, "sandbox", IMAGES)
    """where the images come from"""
    domain: str = key(REQUIRED, "silhouette", IMAGES)
    """the kind of pictures, such as `photo`, `sketch`, `painting`"""
    split: Literal["train", "val", "test"] = key(REQUIRED, "val", IMAGES)
    """each split has other images"""
    num_per_class: PositiveInt = key(REQUIRED, 20, IMAGES)
    """images per class"""


class StoredSet(Config):
    """What every set of stored images has: where it is, and which of its images belong to it."""

    path: str = key(REQUIRED, "../my_images", MOVED, path_in="path")
    """where the images are"""
    part: Annotated[tuple[float, float], BeforeValidator(_interval)] | None = key(None, [0, 0.1], IMAGES)
    """`[from, to)`: the images whose fraction, a hash of the sample id, is in this interval; disjoint parts of one set
    share no image, so `id_val` can be cut from the images of `train`"""
    shots: PositiveInt | None = key(None, 16, IMAGES)
    """images per class, drawn from the part; fewer shots are a subset of more"""
    shots_seed: Seed = key(0, 1, IMAGES)
    """seed of the draw of shots"""
    classes: Literal["all", "some"] = key(
        "all", "some", Resume("identity", "the classes among which images are classified")
    )
    """`all`: the set has every class of the class list; `some`: some of them, among which its images are classified"""
    on_bad_image: Literal["fail", "skip"] = key("fail", "skip", IMAGES)
    """for an image that cannot be decoded: `fail` stops with an error that names it; `skip` leaves it out with a
    warning, and the study records their number (every image is decoded once to find them)"""
    max_pixels: Annotated[int, Field(ge=1, le=PILLOWS_LIMIT, strict=True)] = key(
        MAX_PIXELS,
        120000000,
        Resume(
            "running",
            "a limit on memory; the images left out with `on_bad_image` are compared with the study's",
        ),
    )
    """most pixels of an image, by the size in its file; a larger one counts as one that cannot be decoded"""
    exclude: SampleIds | None = key(
        None,
        "lists/bad_labels.csv",
        Resume("identity", "which images; a file may move: the remaining images are compared"),
        path_in="path",
    )
    """images to leave out, after `part` and `shots`: sample ids, or a file of them, one per line or in the column
    `sample_id` of a CSV file"""

    @property
    def path_keys(self) -> list[str]:
        """The keys whose texts are paths."""
        return [name for name, field in type(self).model_fields.items() if path_in(field)]


class FolderSet(StoredSet):
    """Images in a tree ``path/domain/class/*.png|jpg``, or ``path/class/*`` without domains."""

    source: Literal["folder"] = key(REQUIRED, "sandbox", IMAGES)
    domains: Domains | None = key(None, ["silhouette", "quickdraw"], IMAGES)
    """the domain folders of the set; null: the class folders are at `path`"""


class ColumnSet(StoredSet):
    """A row per image: which columns hold what, and which rows belong to the set."""

    image: str | None = key(None, "file_name", IMAGES)
    """column with the images: paths, or the bytes of files; null: `image`, or the only column that can be it"""
    label: str | None = key(None, "category", LABELS)
    """column with the labels: texts, or whole numbers from 0; null: `label`, or the only column that can be it"""
    id: str | None = key(
        None, "image_id", Resume("identity", "the names of the images, from which parts, shots and views are drawn")
    )
    """column with a stable and unique name for each image, or `COLUMN.FIELD`; null: the path below `root`, else a hash
    of the bytes, for which the files are read once"""
    root: str | None = key(None, "../my_images", MOVED, path_in="path")
    """if `image` has paths: the folder that they are relative to; null: that of the files"""
    where: Where = key({}, {"fold": [1, 2]}, IMAGES)
    """the rows of the set, by values of columns (texts, whole numbers, true, false); sets without a
    common value share no row"""
    class_names: ClassNames | None = key(None, ["cat", "dog"], CLASS_NAMES, path_in="path")
    """class names in the order of the numbers: a list, or a text file with one per line; null: those that
    the files name (features of Hugging Face), else the texts of the labels, sorted"""


class TableSet(ColumnSet):
    """CSV, Parquet or Arrow files with equal columns."""

    source: Literal["table"] = key(REQUIRED, "sandbox", IMAGES)


class HuggingFaceSet(ColumnSet):
    """A folder that ``datasets`` has saved, or Parquet files as the hub lays them out."""

    source: Literal["huggingface"] = key(REQUIRED, "sandbox", IMAGES)
    split: str | None = key(None, "train", IMAGES)
    """split of the data set; null: its only split"""


class WebDatasetSet(StoredSet):
    """Tar archives of samples: files of one name with several endings."""

    source: Literal["webdataset"] = key(REQUIRED, "sandbox", IMAGES)
    image: str | None = key(None, "jpg", IMAGES)
    """ending of the images; null: the one image of each sample"""
    label: Annotated[str | None, BeforeValidator(_sample_label)] = key(None, "json:category", LABELS)
    """ending of the file with the label, or `json:KEY`; null: `cls`"""
    class_names: ClassNames | None = key(None, ["cat", "dog"], CLASS_NAMES, path_in="path")
    """class names in the order of the numbers: a list, or a text file with one per line; null: those of
    `classnames.txt` next to the shards, else the texts of the labels, sorted"""


class BenchmarkSet(StoredSet):
    """A public benchmark as its archives unpack, with its own class list, splits and masks."""

    source: Literal["benchmark"] = key(REQUIRED, "sandbox", IMAGES)
    # a key of benchmarks.py
    name: str = key(REQUIRED, "vlcs", IMAGES)
    """which benchmark of the table above"""
    split: str | None = key(None, "out", IMAGES)
    """split of the benchmark, of the table above; null: all its images"""
    domains: Domains | None = key(None, ["sketch"], IMAGES)
    """domains of DomainBed's sets; null: all of them"""
    trial_seed: Annotated[int, Field(ge=0, lt=2**31, strict=True)] = key(0, 1, IMAGES)
    """DomainBed's `--trial_seed`, of its splits `in` and `out`"""


# every kind of set but those that are made of another
PlainSet = SandboxSet | FolderSet | TableSet | WebDatasetSet | HuggingFaceSet | BenchmarkSet


class CorruptedSet(Config):
    """Another set under ImageNet-C's corruptions, each image under one of them."""

    source: Literal["corrupted"] = key(REQUIRED, "sandbox", IMAGES)
    of: Annotated[PlainSet, Field(discriminator="source")] = key(
        REQUIRED, {"source": "folder", "path": "images", "part": [0, 0.1]}, IMAGES
    )
    """the set to corrupt, of another source"""
    corruptions: Annotated[tuple[Corruption, ...], Field(min_length=1), AfterValidator(distinct_names)] | None = key(
        None, ["fog", "gaussian_noise"], SHOWN
    )
    """corruptions to draw from; null: the fifteen of ImageNet-C"""
    severity: Annotated[int, Field(ge=1, le=5, strict=True)] = key(REQUIRED, 5, SHOWN)
    """strength, as in ImageNet-C"""
    seed: Seed = key(0, 1, SHOWN)
    """seed of the draw of corruptions and of their noise"""
    size: PositiveInt = key(224, 336, SHOWN)
    """side in pixels: larger images are first resized (short side to 8/7 of it) and cropped to a square, as in
    ImageNet-C"""


SetSpec = Annotated[PlainSet | CorruptedSet, Field(discriminator="source")]
SetSpecs = Annotated[dict[SetName, SetSpec], BeforeValidator(nothing_is_empty)]


def plain(spec: SetSpec) -> PlainSet:
    """Returns the set of images that a set is made of: itself, or that which is shown corrupted."""
    return spec.of if isinstance(spec, CorruptedSet) else spec


class DataConfig(Config):
    """The sets by role. A set has one role; `test` alone shows test roles to a model."""

    train: SetSpec = key(
        REQUIRED,
        {"source": "sandbox", "domain": "photo", "split": "train", "num_per_class": 32},
        Resume("identity", "the training images"),
    )
    """training images"""
    id_val: SetSpec = key(
        REQUIRED, {"source": "sandbox", "domain": "photo", "split": "val", "num_per_class": 125}, MEASURED
    )
    """validation images like the training images"""
    ood_val: SetSpecs = key(
        {}, {"silhouette": {"source": "sandbox", "domain": "silhouette", "split": "val", "num_per_class": 63}}, MEASURED
    )
    """validation images under shifts; every set has the same weight"""
    id_test: SetSpec | None = key(
        None, {"source": "sandbox", "domain": "photo", "split": "test", "num_per_class": 125}, TESTED
    )
    """test images like the training images"""
    ood_test: SetSpecs = key(
        {}, {"cartoon": {"source": "sandbox", "domain": "cartoon", "split": "test", "num_per_class": 63}}, TESTED
    )
    """test images under shifts, names other than in `ood_val`"""
    classes: Annotated[tuple[ClassName, ...], Field(min_length=2), AfterValidator(_folder_names)] | None = key(
        None, None, Resume("identity", "the meaning of the labels")
    )
    """classes in the order of the labels; null: those of `train` (folders: sorted)"""
    shared_images: Literal["drop", "keep", "fail"] = key("drop", "keep", SHARED)
    """for images that are in two roles: `drop` keeps them only in the role nearest to the test; `keep` keeps all, and
    test numbers are also given without them; `fail` stops with exit code 8"""
    shared_limit: Fraction = key(0.05, 0.1, SHARED)
    """largest share of a set that `drop` may leave out; above it the command stops with exit code 8"""
    cache_dir: str | None = key(None, "~/carft-cache", KEPT_IMAGES, path_in="path")
    """folder for decoded images; null: the user's cache folder"""
    cache_gb: PositiveFloat | None = key(None, 50, KEPT_IMAGES)
    """size limit of the cache in 10^9 bytes; after a build, the least recently used entries are removed until it
    fits, but none in use; null: no limit"""
    pack: Literal["auto", "always", "never"] = key("auto", "always", KEPT_IMAGES)
    """keep the files of `train` as one file in the cache; auto: if they are on network disks and the cache is not, for
    the images of Parquet files, and for corrupted images, which are made once"""
    resize_short_side: PositiveInt | None = key(None, 288, Resume("identity", "the training images"))
    """pixels of the shorter side: larger stored images of `train` are resized to it once and kept as JPEG in the cache;
    null: crops are from the original images"""


# keys of ``data`` that say where and how images are kept: other values of them do not make another study
CACHE_KEYS = ("cache_dir", "cache_gb", "pack")
TEST_ROLES = ("id_test", "ood_test")
