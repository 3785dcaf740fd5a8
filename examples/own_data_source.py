"""Images from a source that carft-ray cannot read: write them to a table once, then search on this table.

    python examples/own_data_source.py FOLDER

Replace ``my_source`` with your own code: a database, a bucket, a simulator, an archive. carft-ray needs one row per
image: a name that stays the same, the class, the bytes of an image file, and a column that separates the sets. A reader
inside carft-ray would be a file in ``carft_ray/data/formats`` and a row in ``carft_ray/data/sets.py``.
"""

import io
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image, ImageDraw

import carft_ray

NUM_PER_CLASS = {"train": 16, "val": 10, "dark": 10}  # the last is a shift: ood_val
CLASSES = ("circle", "square", "triangle")


def my_source(fold: str) -> Iterator[tuple[str, str, bytes]]:
    """Yields name, class and image file of every image; here drawings at random places."""
    for label in CLASSES:
        for index in range(NUM_PER_CLASS[fold]):
            rng = np.random.default_rng([CLASSES.index(label), index, list(NUM_PER_CLASS).index(fold)])
            image = Image.new("RGB", (48, 48), tuple(rng.integers(150, 255, 3).tolist()))
            draw, (x, y, r) = ImageDraw.Draw(image), rng.integers((16, 16, 8), (32, 32, 15)).tolist()
            colour = tuple(rng.integers(0, 120, 3).tolist())
            if label == "circle":
                draw.ellipse((x - r, y - r, x + r, y + r), colour)
            else:
                draw.regular_polygon((x, y, r), 4 if label == "square" else 3, fill=colour)
            image = image.point(lambda value: value // 3) if fold == "dark" else image
            image.save(buffer := io.BytesIO(), "PNG")
            yield f"{fold}/{label}/{index}", label, buffer.getvalue()


def main(folder: Path) -> None:
    """Writes the table, and searches."""
    folder.mkdir(parents=True, exist_ok=True)
    rows = [(name, fold, label, content) for fold in NUM_PER_CLASS for name, label, content in my_source(fold)]
    columns = dict(zip(("id", "fold", "label", "image"), map(list, zip(*rows, strict=True)), strict=True))
    pq.write_table(pa.table(columns), folder / "images.parquet", row_group_size=100)

    def images(fold: str) -> dict[str, object]:
        table = {"source": "table", "path": folder / "images.parquet", "image": "image", "label": "label", "id": "id"}
        return {**table, "where": {"fold": fold}}

    recipe = {
        "format_version": 1,
        "name": "own_data",
        "model": {"name": "sandbox"},  # {"name": "ViT-B-16-quickgelu", "pretrained": "openai"} for photographs
        "prompts": {"templates": "sandbox"},
        "data": {"train": images("train"), "id_val": images("val"), "ood_val": {"dark": images("dark")}},
        "train": {"epochs": 2, "batch_size": 16},
        "search": {"trials": 2, "space": {"learning_rate": {"low": 1e-4, "high": 5e-3, "log": True}}},
        "resources": {"executor": "debug"},  # in this process; leave it out for Ray
    }
    print(carft_ray.search(recipe, folder / "study"))


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "own_data"))
