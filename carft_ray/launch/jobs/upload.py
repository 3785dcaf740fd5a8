"""What a submitted search brings to the cluster: its command, and one small folder with the recipe.

    recipe.yaml     the keys that were set, ``--set`` included, with absolute paths; class names and templates as lists
    files/          lists of sample ids that the recipe names

A list is read here, and what was read is sent: never the bytes of a file that a recipe of a stranger may name. One
that lies outside the recipe's folder is sent only where ``--send`` names it.

A study outlives its job, and with it the folder that Ray unpacks: the job copies the folder next to the study first
(``STUDY.recipe/HASH``) and searches with the copy, which ``resolved.yaml`` then names. Images, shards and weights are
never sent: they must lie on disks that the nodes see, under the paths that they have here.
"""

import hashlib
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from carft_ray import files as disk
from carft_ray.data.formats.labels import read_class_names
from carft_ray.data.readers import excluded_ids
from carft_ray.errors import DataError, Problem, StorageError, UsageError
from carft_ray.recipe.loading import dump_given, named_paths, with_paths
from carft_ray.recipe.schema import Recipe

LARGEST_UPLOAD = 100 * 2**20  # bytes; Ray's dashboard takes no more at once
RECIPE, FILES = "recipe.yaml", "files"
CARFT_RAY = ("python", "-m", "carft_ray.cli")  # of the job's environment, where a folder has no commands


@dataclass(frozen=True)
class Upload:
    """A search as it is sent.

    Attributes:
        study: The study directory, as the cluster will see it.
        entrypoint: The shell command of the job.
        recipe: Text of ``recipe.yaml``; empty where the study has its own.
        files: Name in the folder -> text of the file.
        sources: Name in the folder -> file here that it was read from.
        paths: What the recipe names and is not sent: it must be there on the cluster.
    """

    study: Path
    entrypoint: str
    recipe: str = ""
    files: Mapping[str, str] = field(default_factory=dict)
    sources: Mapping[str, Path] = field(default_factory=dict)
    paths: tuple[Path, ...] = ()

    def sizes(self) -> dict[str, int]:
        """Returns the bytes of each file that is sent, by its name in the folder."""
        found = {RECIPE: len(self.recipe.encode())} if self.recipe else {}
        return found | {name: len(text.encode()) for name, text in self.files.items()}

    def write(self, folder: Path) -> None:
        """Writes the folder that is sent.

        Raises:
            StorageError: There is no space.
        """
        with disk.writing(folder):
            (folder / RECIPE).write_text(self.recipe, encoding="utf-8")
            for name, text in self.files.items():
                (folder / name).parent.mkdir(parents=True, exist_ok=True)
                (folder / name).write_text(text, encoding="utf-8")


def search_upload(recipe: Recipe, study: Path, flags: Sequence[str], home: Path, send: Sequence[Path] = ()) -> Upload:
    """Returns what a search, or the resumption of its study, sends.

    Args:
        recipe: The recipe, with absolute paths.
        study: The study directory.
        flags: Further options of `carft-ray search`.
        home: Folder of the recipe.
        send: Lists, or folders of lists, that may be sent though they lie elsewhere.

    Raises:
        UsageError: The lists that it names are too large, or lie elsewhere and may not be sent.
        DataError: One of them is no list of sample ids or class names, or cannot be read.
    """
    study = study.absolute()
    lists, paths = named_paths(recipe)
    there = [path for path in map(Path, lists) if path.is_file()]
    _check_places(there, home, send)
    _check_size(there)
    files: dict[str, str] = {}
    sources: dict[str, Path] = {}
    replaced: dict[str, str | tuple[str, ...] | None] = {}
    for path in there:
        if lists[str(path)] == "class_names":
            replaced[str(path)] = read_class_names(str(path), "class_names")
            continue
        name = f"{FILES}/{path.name}"
        name = f"{FILES}/{len(files)}-{path.name}" if name in files else name
        ids, problems = excluded_ids(str(path), "exclude")
        if problems:
            raise DataError(problems)
        files[name], sources[name], replaced[str(path)] = "".join(f"{one}\n" for one in ids.tolist()), path, name
    text = dump_given(with_paths(recipe, lambda written: replaced.get(written, written)))
    kept = study.with_name(f"{study.name}.recipe") / _digest(text, files)
    command = shlex.join([*CARFT_RAY, "search", f"{kept}/{RECIPE}", "--study", str(study), "--address", "auto", *flags])
    folder = shlex.quote(str(kept))
    entrypoint = f"mkdir -p {folder} && cp -R ./. {folder} || exit {StorageError.exit_code}; exec {command}"
    absent = [path for path in lists if path not in replaced]
    return Upload(study, entrypoint, text, files, sources, tuple(map(Path, [*paths, *absent])))


def resume_upload(study: Path, overrides: Sequence[str], flags: Sequence[str]) -> Upload:
    """Returns what the resumption of a study by its own recipe sends: nothing but the command."""
    study = study.absolute()
    settings = [word for text in overrides for word in ("--set", text)]
    command = [*CARFT_RAY, "resume", str(study), "--address", "auto", *settings, *flags]
    return Upload(study, f"exec {shlex.join(command)}")


def _digest(text: str, sent: Mapping[str, str]) -> str:
    """Returns a name for the content of the folder."""
    digest = hashlib.sha256(text.encode())
    for name, content in sent.items():
        digest.update(f"{name} {hashlib.sha256(content.encode()).hexdigest()} ".encode())
    return digest.hexdigest()[:8]


def _check_places(paths: Sequence[Path], home: Path, send: Sequence[Path]) -> None:
    """Refuses lists outside the folder of the recipe, which a stranger may have written, unless they may be sent."""
    allowed = [place.resolve() for place in (home, *send)]
    problems = [
        Problem(
            str(path),
            f"must lie in the folder of the recipe, {home}, to be sent to the cluster",
            "" if path.resolve() == path else f"a link to {path.resolve()}",
            next_step=f"Is it a list that you want to send? Then add --send {shlex.quote(str(path))}",
        )
        for path in paths
        if not any(path.resolve().is_relative_to(place) for place in allowed)
    ]
    if problems:
        raise UsageError(problems)


def _check_size(sent: Sequence[Path]) -> None:
    sizes = {path: path.stat().st_size for path in sent}
    if sum(sizes.values()) <= LARGEST_UPLOAD:
        return
    largest = sorted(sizes, key=lambda path: -sizes[path])[:3]
    named = ", ".join(f"{path} ({sizes[path] / 2**20:.0f} MiB)" for path in largest)
    step = "Put them where the nodes see them and not this machine, and name those paths: such lists are not sent."
    rule = f"the lists that the recipe names must not be larger than {LARGEST_UPLOAD // 2**20} MiB together"
    value = f"{sum(sizes.values()) / 2**20:.0f} MiB; the largest: {named}"
    raise UsageError(Problem("submit", rule, value, next_step=step))
