"""Writes one set of images in every layout that a source reads: folders, tables, WebDataset shards, Hugging Face."""

import csv
import io
import os
import tarfile
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.feather
import pyarrow.parquet as pq
from PIL import Image

CLASSES = ("bird", "cat", "dog")
BINARY = ("parquet", "arrow", "feather")
KINDS = ("folder", "csv paths", "tsv paths")
KINDS += tuple(f"{ending} {form}" for ending in BINARY for form in ("paths", "bytes", "struct"))
KINDS += ("shards", "saved", "saved paths", "hub")


class Picture(NamedTuple):
    """An image file: its name below the folder of all, its class and its bytes."""

    name: str
    label: str
    content: bytes


def pictures(num_per_class=4, classes=CLASSES, seed=0):
    """Returns small PNG images, sorted by name: ``bird/0.png`` ..."""
    rng = np.random.default_rng(seed)
    named = [(f"{label}/{index}.png", label) for label in classes for index in range(num_per_class)]
    return [Picture(name, label, encoded(rng.integers(0, 256, (6, 7, 3), np.uint8))) for name, label in sorted(named)]


def encoded(pixels, kind="PNG", mode=None, **settings):
    image, buffer = pixels if isinstance(pixels, Image.Image) else Image.fromarray(pixels), io.BytesIO()
    (image if mode is None else image.convert(mode)).save(buffer, kind, **settings)
    return buffer.getvalue()


def mixed_modes(classes=CLASSES):
    """Returns images of every mode that decoding has a rule for."""
    rng = np.random.default_rng(1)
    pixels, clear = rng.integers(0, 256, (6, 8, 3), np.uint8), np.zeros((6, 8, 4), np.uint8)
    clear[..., :3], clear[:, 4:, 3] = pixels, 255
    grey = rng.integers(0, 65536, (6, 8), np.uint16)
    turned = Image.Exif()
    turned[0x0112] = 6
    contents = {
        "cmyk.jpg": encoded(pixels, "JPEG", "CMYK"),
        "exif.jpg": encoded(pixels, "JPEG", exif=turned.tobytes()),
        "grey.png": encoded(pixels, mode="L"),
        "grey16.png": encoded(grey),
        "palette.png": encoded(pixels, mode="P"),
        "rgba.png": encoded(clear),
        "webp.webp": encoded(clear, "WEBP", lossless=True),
    }
    found = [Picture(f"{label}/{name}", label, contents[name]) for label in classes for name in contents]
    return sorted(found)


def write_folder(root, images):
    for image in images:
        (root / image.name).parent.mkdir(parents=True, exist_ok=True)
        (root / image.name).write_bytes(image.content)


def image_column(images, form):
    """Returns the images as ``paths``, ``bytes``, or ``struct``: bytes and path, as Hugging Face has them."""
    if form == "paths":
        return pa.array([image.name for image in images])
    contents = pa.array([image.content for image in images], pa.binary())
    if form == "bytes":
        return contents
    paths = pa.array([image.name.replace("/", "_") for image in images])
    return pa.StructArray.from_arrays([contents, paths], names=["bytes", "path"])


def table_of(images, form="bytes", classes=None, **columns):
    """Returns columns ``image``, ``label`` (numbers where classes are given), ``name``, and further ones."""
    labels = [image.label if classes is None else classes.index(image.label) for image in images]
    names = [image.name for image in images]
    return pa.table({"image": image_column(images, form), "label": labels, "name": names, **columns})


def write_table(path, table, **settings):
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".parquet":
        pq.write_table(table, path, **{"row_group_size": 5, **settings})
    elif path.suffix == ".feather":
        pa.feather.write_feather(table, str(path), **{"compression": "uncompressed", "chunksize": 5, **settings})
    elif path.suffix == ".arrow":
        with pa.ipc.new_stream(str(path), table.schema) as writer:
            writer.write_table(table, max_chunksize=5)
    else:
        text = io.StringIO(newline="")
        writer = csv.writer(text, delimiter="\t" if path.suffix == ".tsv" else ",")
        writer.writerows([table.column_names, *zip(*(column.to_pylist() for column in table.columns), strict=True)])
        path.write_text(text.getvalue(), encoding="utf-8", newline="")
    return path


def write_tar(path, files):
    """Writes an archive of (name, bytes) and returns its path."""
    with tarfile.open(path, "w") as archive:
        for name, content in files:
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return path


def write_shards(folder, images, per_shard=5, classes=CLASSES):
    """Writes WebDataset shards as clip_benchmark has them: ``classnames.txt`` above, numbers as labels."""
    from webdataset import TarWriter

    folder.mkdir(parents=True, exist_ok=True)
    (folder.parent / "classnames.txt").write_text("\n".join(classes) + "\n")
    starts = range(0, len(images), per_shard)
    for number, start in enumerate(starts):
        with TarWriter(str(folder / f"{number:03d}.tar")) as writer:
            for image in images[start : start + per_shard]:
                key, ending = os.path.splitext(image.name)
                label = str(classes.index(image.label)).encode()
                writer.write({"__key__": key, ending[1:]: image.content, "cls": label})
    (folder / "nshards.txt").write_text(str(len(starts)))


def hf_dataset(images, classes=CLASSES):
    """Returns the images as a ``Dataset`` with the features of an image classification."""
    from datasets import ClassLabel, Dataset, Features, Value
    from datasets import Image as ImageFeature

    features = Features({"image": ImageFeature(), "label": ClassLabel(names=list(classes)), "name": Value("string")})
    return Dataset.from_dict(table_of(images, "struct", classes).to_pydict(), features=features)


def write_hub(folder, splits, num_files=2):
    """Writes ``Dataset`` s by split as the hub lays them out."""
    (folder / "data").mkdir(parents=True)
    for split, dataset in splits.items():
        for number in range(num_files):
            part = dataset.shard(num_files, number, contiguous=True)
            part.to_parquet(str(folder / "data" / f"{split}-{number:05d}-of-{num_files:05d}.parquet"))


def write_set(kind, base, images, name="set", classes=CLASSES):
    """Writes images below a folder in one of the layouts ``KINDS``; returns the keys of the set."""
    if kind == "folder":
        write_folder(base / name, images)
        return {"source": "folder", "path": name}
    if kind == "shards":
        write_shards(base / name / "shards", images, classes=classes)
        return {"source": "webdataset", "path": f"{name}/shards"}
    if kind == "saved paths":
        from datasets import Dataset

        Dataset.from_dict(table_of(images, "paths").to_pydict()).save_to_disk(base / name)
        write_folder(base / "images", images)
        return {"source": "huggingface", "path": name, "root": "images"}
    if kind in ("saved", "hub"):
        dataset = hf_dataset(images, classes)
        dataset.save_to_disk(base / name) if kind == "saved" else write_hub(base / name, {"train": dataset})
        return {"source": "huggingface", "path": name, "id": "name"}
    ending, form = kind.split()
    path = f"{name}/set.{ending}"
    write_table(base / path, table_of(images, form))
    if form == "paths":
        write_folder(base / name / "images", images)
        return {"source": "table", "path": path, "root": f"{name}/images"}
    return {"source": "table", "path": path, "id": "name"}
