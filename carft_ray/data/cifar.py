"""CIFAR-10 and CIFAR-100: arrays of 32 x 32 pixels, in the Python files (a pickle of Python 2) or the binary ones.

The Python files are read opcode by opcode into plain values: nothing is called, and a name that is not one of the few
with which NumPy writes an array ends the reading. Pixels are mapped into memory where they stand in the file.
"""

import math
import pickletools
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from carft_ray.data.facts import Facts
from carft_ray.data.images import unreadable
from carft_ray.data.index import told_stamp
from carft_ray.data.layouts import KIND, STEP, by_number, unreadable_list
from carft_ray.data.listing import Listing
from carft_ray.data.source import PixelArray
from carft_ray.errors import DataError, Problem
from carft_ray.recipe.schema import BenchmarkSet

SIDE = 32
PIXELS = 3 * SIDE * SIDE
_MAPPED_FROM = 1 << 16  # bytes from which a text stays in the file
_MARK = object()  # on the stack: where a tuple, a list or the items of a dictionary begin
_ARRAYS = ("numpy.core.multiarray _reconstruct", "numpy._core.multiarray _reconstruct")
_NAMES = (*_ARRAYS, "numpy ndarray", "numpy dtype")  # all that may be named


@dataclass(frozen=True)
class _Batch:
    """One file: its name for the ids, which both forms share, the pixels [N, 3, 32, 32] and the labels."""

    name: str
    path: Path
    pixels: PixelArray
    labels: list[Any]


def cifar10(root: Path, spec: BenchmarkSet, facts: Facts, place: str) -> Listing:
    """Lists ``data_batch_1`` to ``data_batch_5``, or ``test_batch``."""
    files = [f"data_batch_{i}" for i in range(1, 6)] if spec.split == "train" else ["test_batch"]
    return _listing(root, files, b"labels", 1, facts, ("batches.meta", b"label_names", "batches.meta.txt"))


def cifar100(root: Path, spec: BenchmarkSet, facts: Facts, place: str) -> Listing:
    """Lists ``train`` or ``test``, with the fine labels."""
    names = ("meta", b"fine_label_names", "fine_label_names.txt")
    return _listing(root, [str(spec.split)], b"fine_labels", 2, facts, names)


def _listing(
    root: Path, files: list[str], key: bytes, label_bytes: int, facts: Facts, meta: tuple[str, bytes, str]
) -> Listing:
    _check_names(root, meta, facts)
    python = any((root / name).is_file() for name in files)
    batches = [
        _python(root / name, name, key) if python else _binary(root / f"{name}.bin", name, label_bytes)
        for name in files
    ]
    rows = [(batch, index) for batch in batches for index in range(len(batch.labels))]
    names = [f"{batch.name}/{index:05d}" for batch, index in rows]
    classes = [by_number(batch.labels[index], 0, facts, batch.path, f"image {index}") for batch, index in rows]

    def read(index: int) -> bytes:
        batch, row = rows[index]
        return bytes(batch.pixels[row])

    return Listing(
        kind=KIND,
        home=str(root.resolve()),
        names=names,
        classes=classes,
        found=tuple(sorted(set(classes))),
        read=read,
        stamp=lambda index: told_stamp(rows[index][0].path),
        place=lambda index: f"{rows[index][0].path}, image {rows[index][1]}",
        decode=lambda content, index: _decoded(content),
    )


def _decoded(content: bytes) -> PixelArray:
    planes = np.frombuffer(content, np.uint8).reshape(3, SIDE, SIDE)
    return np.ascontiguousarray(planes.transpose(1, 2, 0))


def _check_names(root: Path, meta: tuple[str, bytes, str], facts: Facts) -> None:
    """Refuses a set whose own list of class names is another; a set without it is believed."""
    python, key, binary = root / meta[0], meta[1], root / meta[2]
    names: list[str] | None = None
    if python.is_file():
        names = [name.decode() for name in read_python(python).get(key, [])]
    elif binary.is_file():
        names = binary.read_text(encoding="utf-8", errors="replace").split()
    if names is not None and names != list(facts.classes):
        first = next((pair for pair in zip(names, facts.classes, strict=False) if pair[0] != pair[1]), None)
        value = f"{first[0]!r} for {first[1]!r}" if first else f"{len(names)} of {len(facts.classes)}"
        rule = f"must name the classes of {facts.title}, in their order"
        raise DataError(Problem(str(python if python.is_file() else binary), rule, value))


def _python(path: Path, name: str, key: bytes) -> _Batch:
    value = read_python(path)
    data, labels = value.get(b"data"), value.get(key)
    if not isinstance(data, np.ndarray) or not isinstance(labels, list) or data.shape != (len(labels), PIXELS):
        rule = f"must hold an array data of [N, {PIXELS}] bytes and a list {key.decode()} of N labels"
        raise DataError(Problem(str(path), rule, next_step=STEP))
    return _Batch(name, path, data, labels)


def _binary(path: Path, name: str, label_bytes: int) -> _Batch:
    """Maps a binary file: per image the labels, the fine one last, and the red, green and blue plane."""
    row = label_bytes + PIXELS
    try:
        size = path.stat().st_size
        if not size or size % row:
            rule = f"must hold whole images of {row} bytes"
            raise DataError(Problem(str(path), rule, f"{size} bytes", next_step="Unpack the archive again."))
        rows = np.memmap(path, np.uint8, "r", shape=(size // row, row))
    except OSError as error:
        raise DataError(unreadable(str(path), error)) from error
    return _Batch(name, path, rows[:, label_bytes:], rows[:, label_bytes - 1].tolist())


def read_python(path: Path) -> dict[bytes, Any]:
    """Returns what a Python file of CIFAR holds; arrays are mapped into memory. No code of the file is run.

    Raises:
        DataError: It cannot be read, or asks for anything but lists, numbers, texts and arrays of bytes.
    """
    try:
        with open(path, "rb") as file:
            value = _run(file, path)
    except DataError:
        raise
    except Exception as error:  # a damaged file fails in many ways
        raise unreadable_list(path, error) from error
    if not isinstance(value, dict):
        raise unreadable_list(path, ValueError("no dictionary"))
    return value


@dataclass(frozen=True)
class _Raw:
    """Bytes that stay in the file."""

    start: int
    length: int


def _run(file: BinaryIO, path: Path) -> Any:
    """Runs the opcodes on a stack of plain values; texts are bytes, as Python 2 wrote them."""
    stack: list[Any] = []
    memo: dict[int, Any] = {}

    def pop_mark() -> list[Any]:
        mark = max(index for index, value in enumerate(stack) if value is _MARK)
        values = stack[mark + 1 :]
        del stack[mark:]
        return values

    def pop(count: int) -> list[Any]:
        values = stack[-count:]
        del stack[-count:]
        return values

    value: Any
    for opcode, value, position in pickletools.genops(file):
        match opcode.name:
            case "STOP":
                return stack[-1]
            case "PROTO" | "FRAME":
                pass
            case "MARK":
                stack.append(_MARK)
            case "EMPTY_DICT":
                stack.append({})
            case "EMPTY_LIST":
                stack.append([])
            case "NONE" | "EMPTY_TUPLE":
                stack.append(())
            case "NEWTRUE" | "NEWFALSE":
                stack.append(opcode.name == "NEWTRUE")
            case "BININT" | "BININT1" | "BININT2" | "LONG1":
                stack.append(value)
            case "BINSTRING" | "SHORT_BINSTRING" | "BINUNICODE":
                text = value.encode("utf-8" if opcode.name == "BINUNICODE" else "latin-1")
                large = opcode.name == "BINSTRING" and len(text) >= _MAPPED_FROM
                start = int(position or 0) + 5  # after the opcode and 4 bytes of length
                stack.append(_Raw(start, len(text)) if large else text)
            case "BINPUT" | "LONG_BINPUT":
                memo[value] = stack[-1]
            case "BINGET" | "LONG_BINGET":
                stack.append(memo[value])
            case "TUPLE":
                stack.append(tuple(pop_mark()))
            case "TUPLE1" | "TUPLE2" | "TUPLE3":
                stack.append(tuple(pop(int(opcode.name[-1]))))
            case "APPEND" | "APPENDS":
                values = pop_mark() if opcode.name == "APPENDS" else pop(1)
                stack[-1].extend(values)
            case "SETITEM" | "SETITEMS":
                values = pop_mark() if opcode.name == "SETITEMS" else pop(2)
                stack[-1].update(zip(values[::2], values[1::2], strict=True))
            case "GLOBAL" if value in _NAMES:
                stack.append(value)
            case "REDUCE":  # an array that is built below, or the type of its elements
                name, arguments = pop(2)
                stack.append(name if name in _ARRAYS else _element(name, arguments))
            case "BUILD":
                made, state = pop(2)
                stack.append(_array(path, state) if made in _ARRAYS else made)
            case _:
                what = f"the name {value}" if opcode.name == "GLOBAL" else f"opcode {opcode.name}"
                rule = "must hold lists, numbers, texts and arrays of bytes, as CIFAR's files do"
                raise DataError(Problem(str(path), rule, what, next_step="Do not open it: it is another file."))
    raise ValueError("it is cut off")


def _element(name: Any, arguments: tuple[Any, ...]) -> str:
    if name != "numpy dtype" or arguments[0] != b"u1":
        raise ValueError("arrays must be of bytes")
    return "u1"


def _array(path: Path, state: tuple[Any, ...]) -> PixelArray:
    """Makes the array of a state (version, shape, type, whether column by column, bytes), of bytes only."""
    _, shape, element, by_column, raw = state
    if element != "u1" or by_column:
        raise ValueError("arrays must be of bytes, row by row")
    if isinstance(raw, _Raw):
        if raw.length != math.prod(shape):
            raise ValueError("an array must have as many bytes as its shape says")
        return np.memmap(path, np.uint8, "r", raw.start, shape)
    return np.frombuffer(raw, np.uint8).reshape(shape)
