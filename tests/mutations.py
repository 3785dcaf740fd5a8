"""What strangers may send, damaged: for each kind of input a small sound one, and random changes of it.

``write_samples`` writes the sound ones once; ``KINDS`` has for each kind a function that writes a changed one into the
folder of a case and returns what the recipe names: the set of ``train``, or the model. Half of the changes are made
without knowing the format (bits, pieces, numbers), half with it, so that they pass the first check.
"""

import contextlib
import gzip
import io
import json
import math
import os
import pickle
import random
import re
import struct
import tarfile

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from layouts_tables import Picture, encoded, hf_dataset, table_of, write_folder, write_table, write_tar

CLASSES = ("circle", "square")
IMAGE_KINDS = {"jpeg": ".jpg", "png": ".png", "bmp": ".bmp", "webp": ".webp", "tiff": ".tif", "ppm": ".ppm"}
CANARY = "canary"  # a folder beside that of a case: nothing may write there
ESCAPES = (f"../{CANARY}/x", f"{{here}}/../{CANARY}/x", f"a/../../{CANARY}/x", "..", "~/x")
ESCAPES += ("/dev/zero", "/proc/self/mem")
WORDS = (
    *(*ESCAPES, "", " ", "\0", "\x1b[2J", "\u202e", "\ud7ff", "[/red]", "$x^", "=1+1", "x" * 5000, "a\nb", "'", '"'),
    *("null", "true", "nan", ".inf", "1e-320", "1e400", "0x10", "-0", "evil:run", "evil", "__import__", "C:\\x", "{}"),
    *("[" * 20000, "{a: " * 3000, "&a [*a]", "!!python/object/apply:os.system [touch x]", "${x}", "%s%n", "json:a"),
    "~nobody1/x",
)
NUMBERS = (0, -1, 1, 2, 255, 256, 2**15, 2**31 - 1, 2**31, 2**32 - 1, 2**63 - 1, 2**63, 2**64, 10**30, -(2**63))
FLOATS = (0.5, -0.5, 1e-320, 1e308, math.inf, -math.inf, math.nan, 3.0, 1e20)


class Evil:
    """Makes a file where it is unpickled."""

    def __init__(self, path=f"../{CANARY}/unpickled"):
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch {self.path}",)


class Pickled(pa.ExtensionType):
    """Ray's type of pickled objects, by its name."""

    def __init__(self, parameters=b""):
        self.parameters = parameters
        super().__init__(pa.large_binary(), "ray.data.arrow_pickled_object")

    def __arrow_ext_serialize__(self):
        return self.parameters

    @classmethod
    def __arrow_ext_deserialize__(cls, storage_type, serialized):
        return cls(serialized)


def pickled(evil, count, parameters=b""):
    """Returns a column of such objects."""
    kind = Pickled(parameters)
    return pa.ExtensionArray.from_storage(kind, pa.array([pickle.dumps(evil)] * count, kind.storage_type))


# without knowing the format


def damaged(rng, content, others=()):
    """Returns bytes after one to three changes: cut off, flipped, repeated, filled, or with other numbers."""
    content = bytearray(content)
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        size = len(content)
        at, length = rng.randrange(size + 1), rng.choice((1, 2, 4, 8, 33, 200, size // 3 + 1))
        if rng.random() < 0.4:  # formats say most in their first bytes, some in their last
            at = rng.randrange(min(size, 200) + 1) if rng.random() < 0.7 else max(0, size - rng.randrange(200))
        change = rng.randrange(12)
        if change == 0:
            del content[at:]
        elif change in (1, 9, 10, 11):
            for _ in range(rng.choice((1, 1, 2, 8, 60)) if size else 0):
                content[rng.randrange(size)] ^= 1 << rng.randrange(8)
        elif change == 2:
            content[at : at + length] = rng.randbytes(length)
        elif change == 3:
            del content[at : at + length]
        elif change == 4:
            content[at:at] = content[at : at + length] * rng.choice((1, 2, 50))
        elif change == 5:
            piece = rng.choice([bytes(content), *others])
            start = rng.randrange(len(piece) + 1)
            content[at:at] = piece[start : start + length]
        elif change == 6:
            content[at:at] = _text(rng).encode("utf-8", "surrogatepass")
        elif change == 7:
            width, order = rng.choice((1, 2, 4, 8)), rng.choice(("big", "little"))
            number = rng.choice((*NUMBERS, size, size - 1, size + 1)) % 256**width
            content[at : at + width] = number.to_bytes(width, order)
        else:
            found = list(re.finditer(rb"-?\d+(?:\.\d+)?", content[:20000]))
            if found:
                one, new = rng.choice(found), str(rng.choice(NUMBERS + FLOATS)).encode()
                content[one.start() : one.end()] = new
    return bytes(content)


def _text(rng):
    return rng.choice(WORDS)[: rng.choice((20, 200, 100000))]


def warped(rng, value):
    """Returns a value as of JSON after one to four changes: other values, types and names, one more, one fewer."""
    value = json.loads(json.dumps(value))
    for _ in range(rng.choice((1, 1, 1, 2, 4))):
        path, holder = [], value
        while isinstance(holder, dict | list) and holder:
            key = rng.choice(list(holder) if isinstance(holder, dict) else range(len(holder)))
            path.append((holder, key))
            holder = holder[key]
        if not path:
            return anything(rng)
        inside, key = path[-1] if rng.random() < 0.7 else rng.choice(path)
        change = rng.randrange(8)
        if change == 0:
            del inside[key]
        elif change == 1 and isinstance(inside, dict):
            inside[rng.choice((_text(rng), f"{key}x", str(key)[1:], "path"))] = inside[key]
        elif change == 2:
            inside[key] = rng.choice(([inside[key]], {"a": inside[key]}, str(inside[key]), [inside[key]] * 9))
        elif change == 3 and isinstance(inside[key], int | float):
            number = inside[key]
            inside[key] = rng.choice((-number, number + 1, number * 2, number / 3, float(number)))
        else:
            inside[key] = anything(rng)
    return value


def anything(rng, depth=0):
    kind = rng.randrange(8 if depth < 3 else 6)
    if kind < 2:
        return rng.choice(NUMBERS)
    if kind == 2:
        return rng.choice(FLOATS)
    if kind < 5:
        return _text(rng)
    if kind == 5:
        return rng.choice((None, True, False))
    if kind == 6:
        return [anything(rng, depth + 1) for _ in range(rng.randrange(4))]
    return {_text(rng): anything(rng, depth + 1) for _ in range(rng.randrange(4))}


def json_file(rng, content):
    if rng.random() < 0.25:
        return damaged(rng, content)
    text = json.dumps(warped(rng, json.loads(content)), indent=rng.choice((None, 2)))
    if rng.random() < 0.04:
        text = text.replace(":", ":" + "[" * 100000, 1)
    return text.encode("utf-8", "surrogatepass")


# sound ones


def picture(label, seed, kind):
    """Returns a small image file with a corner that tells its class."""
    pixels = np.random.default_rng([label, seed]).integers(0, 256, (12, 10, 3), dtype=np.uint8)
    pixels[:6, :5] = (200 * label, 255 - 200 * label, 128)
    mode = {"tiff": ("RGB", "L", "I;16"), "png": ("RGB", "RGBA", "P")}.get(kind, ("RGB",) * 3)[seed % 3]
    deep = pixels[..., 0].astype(np.uint16) * 257
    more = {"compression": ("tiff_lzw", "tiff_adobe_deflate", None)[seed // 3 % 3]} if kind == "tiff" else {}
    return encoded(deep, "TIFF", **more) if mode == "I;16" else encoded(pixels, kind.upper(), mode, **more)


def images_of(kind):
    """Returns sound images of a kind, three of each class; of ``val`` two others."""
    count, first, written = (2, 100, "png") if kind == "val" else (3, 0, kind)
    return [
        Picture(f"{word}/{index}{IMAGE_KINDS[written]}", word, picture(label, first + index, written))
        for label, word in enumerate(CLASSES)
        for index in range(count)
    ]


def write_samples(base):
    """Writes sound inputs of all kinds, and what cases share: images and a model."""
    import torch
    from safetensors.torch import load_file
    from short_training import write_model

    for kind in ("val", *IMAGE_KINDS):
        write_folder(base / kind, images_of(kind))
    write_model(base / "model")
    torch.save(load_file(base / "model" / "open_clip_model.safetensors"), base / "open_clip_pytorch_model.bin")
    images = images_of("png")
    for ending in ("parquet", "arrow"):
        write_table(base / ending / f"data.{ending}", table_of(images))
    hf_dataset(images, CLASSES).save_to_disk(base / "hf")
    lines = [f"png/{image.name},{image.label},{CLASSES.index(image.label)}" for image in images]
    (base / "data.csv").write_text("\n".join(["image,label,fold", *lines, ""]))
    write_tar(base / "000.tar", shard_files())


def shard_files():
    for image in images_of("png"):
        number = CLASSES.index(image.label)
        for ending, data in (("png", image.content), ("cls", b"%d" % number), ("json", b'{"name": "%d"}' % number)):
            yield image.name.removesuffix("png") + ending, data


# the kinds: each writes into the folder ``here`` and returns parts of the recipe


@contextlib.contextmanager
def copied(source, target):
    """Gives the contents of a folder's files by name; what they are at the end of the block is written as another."""
    files = {str(path.relative_to(source)): path.read_bytes() for path in sorted(source.rglob("*")) if path.is_file()}
    yield files
    write_folder(target, [Picture(name, "", content) for name, content in files.items()])


def image_files(kind):
    def make(rng, here, base):
        with copied(base / kind, here / "images") as files:
            for name in rng.sample(sorted(files), rng.choice((1, 1, 2, 6))):
                files[name] = damaged(rng, files[name], list(files.values())[:3])
        return {"source": "folder", "path": "images"}

    return make


def csv(rng, here, base):
    content = (base / "data.csv").read_bytes()
    if rng.random() < 0.4:
        lines = [line.split(",") for line in content.decode().splitlines()]
        for _ in range(rng.choice((1, 2, 5))):
            line = rng.choice(lines)
            line[rng.randrange(len(line))] = rng.choice((_text(rng), str(rng.choice(NUMBERS + FLOATS)), lines[0][0]))
        quote = rng.choice(("", "", '"'))
        text = "\n".join(",".join(f"{quote}{cell}{quote}" for cell in line) for line in lines)
        content = text.encode(rng.choice(("utf-8", "utf-8", "utf-8-sig", "utf-16", "latin-1")), "replace")
    else:
        content = damaged(rng, content)
    (here / "data.csv").write_bytes(content.replace(b"{here}", os.fsencode(here)))
    return {"source": "table", "path": "data.csv", "root": str(base), **columns(rng, "image")}


def columns(rng, name="name"):
    """Returns keys of a set that name its columns, mostly none."""
    if rng.random() < 0.7:
        return {}
    keys = {"image": "image", "label": "label", "id": name, "class_names": list(CLASSES)}
    keys["where"] = {"label": list(CLASSES)}
    chosen = dict(rng.sample(sorted(keys.items()), rng.choice((1, 2))))
    changed = warped(rng, chosen) if rng.random() < 0.3 else chosen
    return changed if isinstance(changed, dict) else {}


def table_file(ending):
    def make(rng, here, base):
        path, is_sound = here / f"data.{ending}", rng.random() < 0.5
        content = (base / ending / path.name).read_bytes() if is_sound else file_of(rng, random_table(rng), ending)
        path.write_bytes(damaged(rng, content) if is_sound or rng.random() < 0.4 else content)
        return {"source": "table", "path": path.name, **columns(rng)}

    return make


def file_of(rng, table, ending):
    buffer = io.BytesIO()
    if ending == "parquet":
        with contextlib.suppress(pa.ArrowException):  # of what Parquet has no type for: a file without an end
            pq.write_table(table, buffer, row_group_size=rng.choice((1, 4, 100)))
    else:
        with rng.choice((pa.ipc.new_file, pa.ipc.new_stream))(buffer, table.schema) as file:
            file.write_table(table)
    return buffer.getvalue()


def random_table(rng):
    """Returns a table like the sound one, with columns of other types, names and values."""
    sound = table_of(images_of("png"))
    contents, labels, names = (column.to_pylist() for column in sound.columns)
    numbers = [CLASSES.index(label) for label in labels]
    found = list(zip(sound.column_names, sound.columns, strict=True))
    for _ in range(rng.choice((1, 1, 2, 4))):
        floats = [rng.choice(FLOATS) for _ in names]
        column = rng.choice((names, labels, numbers, contents, [None] * len(names), floats))
        place, name = rng.randrange(4), rng.choice(("image", "label", "name", "bytes", "path", "", "a.b", _text(rng)))
        found[place : place + rng.randrange(2)] = [(name, _column(rng, column))]
    return pa.Table.from_arrays([values for _, values in found], [name.replace("\0", "") for name, _ in found])


def _column(rng, values):
    """Returns values as an array of a random type that can hold them."""
    kinds = [pa.binary(), pa.large_binary(), pa.string(), pa.large_string(), pa.int8(), pa.uint64(), pa.float32()]
    kinds += [pa.binary(3), pa.bool_(), pa.null(), pa.date32(), pa.timestamp("ns"), pa.decimal128(10, 2), pa.float16()]
    kinds += [pa.string_view(), pa.binary_view(), pa.int64(), pa.duration("s")]
    array = pa.array(values)
    for kind in rng.sample(kinds, 4):
        try:
            array = pa.array(values, kind) if rng.random() < 0.5 else array.cast(kind)
            break
        except (pa.ArrowException, TypeError, ValueError, OverflowError):
            pass
    shape, count = rng.randrange(9), len(array)
    if shape == 0 and pa.types.is_binary(array.type) | pa.types.is_string(array.type):
        return array.dictionary_encode()
    if shape == 1:
        return pa.StructArray.from_arrays([array, pa.array(["a"] * count)], rng.choice((["bytes", "path"], ["a", "b"])))
    if shape == 2:
        return pa.ListArray.from_arrays(pa.array(range(count + 1), pa.int32()), array)
    if shape == 3:
        return pa.array([None if rng.random() < 0.4 else value for value in array.to_pylist()], array.type)
    if shape in (4, 5):
        evil = pickled(Evil(), count, pickle.dumps(Evil()))
        return evil if shape == 4 else pa.StructArray.from_arrays([array, evil], ["bytes", "path"])
    return array


def hf(rng, here, base):
    with copied(base / "hf", here / "hf") as files:
        name = rng.choice(sorted(files))
        if rng.random() < 0.25:
            files["data-00000-of-00001.arrow"] = file_of(rng, random_table(rng), "arrow")
        else:
            files[name] = json_file(rng, files[name]) if name.endswith(".json") else damaged(rng, files[name])
    return {"source": "huggingface", "path": "hf", **columns(rng)}


def tar(rng, here, base):
    label = rng.choice(({}, {}, {"label": "json:name"}, {"label": "cls", "image": "png"}))
    label = {**label, "class_names": list(CLASSES)} if rng.random() < 0.9 else label
    if rng.random() < 0.5:
        (here / "000.tar").write_bytes(damaged(rng, (base / "000.tar").read_bytes()))
        return {"source": "webdataset", "path": "000.tar", **label}
    kinds = (tarfile.REGTYPE, tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.FIFOTYPE, tarfile.CHRTYPE, tarfile.DIRTYPE)
    kinds += (tarfile.GNUTYPE_SPARSE, tarfile.GNUTYPE_LONGNAME, tarfile.XHDTYPE, tarfile.XGLTYPE, b"Z")
    with tarfile.open(here / "000.tar", "w", format=rng.choice((tarfile.PAX_FORMAT, tarfile.GNU_FORMAT))) as shard:
        for name, data in shard_files():
            member = tarfile.TarInfo(name)
            if rng.random() < 0.06:
                member.name = rng.choice((*ESCAPES, "n" * 300 + ".png", ".cls", "a.b.c/d", name, "a\udcff.png"))
            if rng.random() < 0.06:
                member.type, member.linkname = rng.choice(kinds), rng.choice(ESCAPES)
            if rng.random() < 0.04:
                size = str(rng.choice((*NUMBERS, 20 * 10**9)))
                member.pax_headers = {rng.choice(("size", "path", "GNU.sparse.size", "hdrcharset")): size}
            if not name.endswith("png") and rng.random() < 0.1:
                text = _text(rng).encode("utf-8", "replace")
                data = rng.choice((text, b"[" * 50000, rng.randbytes(9), b"1" * 5000))
            member.size = len(data)
            shard.addfile(member, io.BytesIO(data))
    return {"source": "webdataset", "path": "000.tar", **label}


def weights(rng, here, base):
    """An open_clip folder: its configuration, its tensors, or a pickle in their place."""
    config, tensors = "open_clip_config.json", "open_clip_model.safetensors"
    with copied(base / "model", here / "model") as files:
        what = rng.random()
        if what < 0.5:
            files[config] = json_file(rng, files[config])
        elif what < 0.85:
            files[tensors] = safetensors(rng, files[tensors])
        else:
            del files[tensors]
            name = "open_clip_pytorch_model.bin"
            content = (base / name).read_bytes()
            files[name] = rng.choice((damaged(rng, content), pickle.dumps(Evil()), pickle.dumps({"a": Evil()}, 2)))
        if rng.random() < 0.1:
            files["no_merges.txt.gz"] = gzip.compress(rng.choice((b"", b"a b\n" * 10, _text(rng).encode())), mtime=0)
    return "local-dir:model"


def safetensors(rng, content):
    """Returns a file of tensors with another header, other numbers, or other bytes."""
    if rng.random() < 0.4:
        return damaged(rng, content)
    size = int.from_bytes(content[:8], "little")
    header, data = json.loads(content[8 : 8 + size]), bytearray(content[8 + size :])
    if rng.random() < 0.6:
        header = warped(rng, header)
    else:
        for _ in range(rng.choice((1, 3, len(data) // 40))):
            at = rng.randrange(len(data) // 4) * 4
            data[at : at + 4] = struct.pack("<f", rng.choice((math.nan, math.inf, 1e38, -1e30, 1e-40, 0.0, 5.0)))
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + bytes(data)


KINDS = {
    "csv": csv,
    "parquet": table_file("parquet"),
    "arrow": table_file("arrow"),
    "hf": hf,
    "tar": tar,
    **{kind: image_files(kind) for kind in IMAGE_KINDS},
    "weights": weights,
}


# recipes


def recipe_value(base):
    """Returns a sound recipe of the samples, as a value."""
    images = {"source": "folder", "path": str(base / "png")}
    space = {"learning_rate": {"low": 1e-3, "high": 1e-2, "log": True}}
    return {
        "format_version": 1,
        "name": "fuzz",
        "model": {"name": f"local-dir:{base / 'model'}"},
        "data": {"train": images, "id_val": {**images, "path": str(base / "val")}},
        "prompts": {"templates": ["a photo of a {}", "a sketch of a {}"]},
        "train": {"epochs": 1, "batch_size": 6, "learning_rate": 1e-3},
        "evaluate": {"thumbnails": 4},
        "search": {"trials": 1, "space": space, "alpha": {"grid": [0, 0.5, 1]}},
    }


def recipe(rng, here, base):
    """Writes a recipe: keys with their documented examples, then changes of values, or of text."""
    from recipe_keys import keys
    from ruamel.yaml import YAML

    value = recipe_value(base)
    if rng.random() < 0.3:
        value["data"]["ood_val"] = {"other": {**value["data"]["id_val"], "part": [0, 0.9]}}
    for key in rng.sample(keys.documented_keys(), rng.choice((0, 1, 1, 2, 3, 6))):
        place = key.name.replace("<set>", "data.train").replace("<parameter>", "kl_weight").split(".")
        example = key.field.examples[0]
        if place[-1] in ("num_per_class", "wait_for_nodes", "function") or example == "sandbox":
            continue  # what is large because it says so; what only a cluster or `--trust` has
        part = value
        for name in place[:-1]:
            part = part.setdefault(name, {})
        part[place[-1]] = example
    if rng.random() < 0.45:
        value = warped(rng, value)
    text = io.StringIO()
    if rng.random() < 0.5:
        YAML(typ="safe").dump(value, text)
    else:
        text.write(json.dumps(value, indent=1))
    content = text.getvalue().encode("utf-8", "surrogatepass")
    if rng.random() < 0.15:
        content = damaged(rng, content)
    (here / "recipe.yaml").write_bytes(content.replace(b"{here}", os.fsencode(here)))


def write_case(kind, number, seed, here, base):
    """Writes a case into an empty folder: its recipe, and what it names."""
    rng = random.Random(f"{seed} {kind} {number}")  # of a text: the same in every process
    (here / "evil.py").write_text(f"open('../{CANARY}/imported', 'w')\n")
    if kind == "study":
        import mutated_studies  # which has its changes from here

        mutated_studies.study(rng, here, base)
        return
    if kind == "recipe":
        recipe(rng, here, base)
        return
    made, value = KINDS[kind](rng, here, base), recipe_value(base)
    if isinstance(made, str):
        value["model"] = {"name": made}
    else:
        value["data"]["train"] = {**made, "on_bad_image": rng.choice(("fail", "skip", "skip"))}
        value["train"]["batch_size"] = rng.choice((1, 2))
    (here / "recipe.yaml").write_text(json.dumps(value, indent=1), "utf-8", "surrogatepass")
