"""Data sets of Hugging Face on disk: a folder of ``datasets``' ``save_to_disk``, or Parquet files as the hub has them.

    saved/state.json, dataset_info.json, data-00000-of-00002.arrow      a data set
    saved/dataset_dict.json, saved/train/state.json, ...                one with splits
    repository/data/train-00000-of-00004.parquet                        the hub; also without data/

The library ``datasets`` is not needed. Columns, labels and names are those of a table (``data/formats/tables.py``).
"""

import os
import re
from pathlib import Path
from typing import Any

from carft_ray.data.decode_images import cause_of
from carft_ray.errors import DataError, Problem, nearest
from carft_ray.recipe.schema.data import HuggingFaceSet
from carft_ray.untrusted import parse_json, read_regular
from carft_ray.words import counted

KIND = "huggingface-1"
_PARQUET = re.compile(r"(?P<split>[^/]+?)(-(?P<number>\d{5})-of-(?P<of>\d{5})(-[0-9a-f]+)?)?\.parquet")
_STEP = "Expected: a folder written by save_to_disk, or one with data/train-00000-of-00001.parquet."


def data_files(spec: HuggingFaceSet, place: str) -> list[Path]:
    """Returns the files of a set, in order.

    Raises:
        DataError: The layout is another one, or the split or a file is missing.
        PermissionError: A folder may not be read.
    """
    root = Path(spec.path)
    names = set(os.listdir(root)) if root.is_dir() else set()
    if "dataset_dict.json" in names:
        splits = _read(root / "dataset_dict.json").get("splits")
        texts = [split for split in splits if isinstance(split, str)] if isinstance(splits, list) else []
        named = [name for name in (Path(split).name for split in texts) if name != ".."]  # of this folder
        return _saved(root / _chosen(named, spec, place), place)
    if "state.json" in names:
        split = _read(root / "state.json").get("_split")
        if spec.split not in (None, split):
            rule = "must be left out: the folder holds one data set" + (f", the split {split}" if split else "")
            raise DataError(Problem(f"{place}.split", rule, repr(spec.split)))
        return _saved(root, place)
    for folder in (root / "data", root):
        if shards := _shards(folder):
            return _all(folder, shards[_chosen(sorted(shards), spec, place)], place)
    within = [name for name in sorted(names) if _shards(root / name) or _shards(root / name / "data")]
    rule = "must be the folder of a data set"
    value = f"no such folder: {root}" if not root.is_dir() else f"{root}, which is none"
    raise DataError(Problem(place, rule, value, tuple(str(root / name) for name in within), next_step=_STEP))


def _chosen(splits: list[str], spec: HuggingFaceSet, place: str) -> str:
    if spec.split is None and len(splits) == 1:
        return splits[0]
    if spec.split in splits:
        return str(spec.split)
    rule = "must be a split of the data set"
    value = repr(spec.split) if spec.split is not None else "none"
    raise DataError(Problem(f"{place}.split", rule, value, tuple(splits), nearest(spec.split or "", splits)))


def _saved(folder: Path, place: str) -> list[Path]:
    """Returns the files that the state of a saved data set names."""
    state = _read(folder / "state.json")
    if state.get("_indices_data_files"):
        step = "Save it again with save_to_disk of datasets 2 or newer."
        raise DataError(Problem(f"{place}: {folder}", "must be a data set without a file of indices", next_step=step))
    listed = state.get("_data_files")
    rows = [file if isinstance(file, dict) else {} for file in listed] if isinstance(listed, list) else []
    files = [folder / Path(str(row.get("filename"))).name for row in rows]
    missing = [str(file) for file in files if not os.path.isfile(file)]  # of a name too long, too
    if missing or not files:
        rule = "must contain the files that its state.json names, at least one"
        raise DataError(Problem(f"{place}: {folder}", rule, f"no {missing[0]}" if missing else "none"))
    return files


def _shards(folder: Path) -> dict[str, list[re.Match[str]]]:
    """Returns the names of the Parquet files of a folder by split, sorted."""
    splits: dict[str, list[re.Match[str]]] = {}
    for found in map(_PARQUET.fullmatch, sorted(os.listdir(folder)) if folder.is_dir() else []):
        if found is not None:
            splits.setdefault(found["split"], []).append(found)
    return splits


def _all(folder: Path, shards: list[re.Match[str]], place: str) -> list[Path]:
    """Returns the files of a split, of which none may be missing."""
    expected, split = max(int(found["of"] or 1) for found in shards), shards[0]["split"]
    rule = f"the split {split} must have {counted(expected, 'file')}"
    if missing := sorted(set(range(expected)) - {int(found["number"] or 0) for found in shards}):
        first = f"{split}-{missing[0]:05d}-of-{expected:05d}.parquet"
        raise DataError(Problem(f"{place}: {folder}", rule, f"{len(shards)}, without {first}"))
    if len(shards) != expected:
        step = "Remove the files of the other export."
        value = f"{len(shards)}: {', '.join(found.string for found in shards[:4])}"
        raise DataError(Problem(f"{place}: {folder}", rule, value, next_step=step))
    return [folder / found.string for found in shards]


def _read(path: Path) -> dict[str, Any]:
    """Returns what a JSON file of ``datasets`` holds.

    Raises:
        DataError: It is missing or damaged.
    """
    try:
        value = parse_json(read_regular(path))
    except PermissionError:
        raise
    except (OSError, ValueError) as error:
        raise DataError(Problem(str(path), "must be a readable JSON file", cause_of(error))) from error
    if not isinstance(value, dict):
        raise DataError(Problem(str(path), "must be a JSON object", type(value).__name__))
    return value
