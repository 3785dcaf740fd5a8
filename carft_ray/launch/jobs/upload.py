"""What a submitted search brings to the cluster: its command, and one small folder with the recipe.

    recipe.yaml     the keys that were set, ``--set`` included, with absolute paths
    files/          lists of sample ids and class names that the recipe names

A study outlives its job, and with it the folder that Ray unpacks: the job copies the folder next to the study first
(``STUDY.recipe/HASH``) and searches with the copy, which ``resolved.yaml`` then names. Images, shards and weights are
never sent: they must lie on disks that the nodes see, under the paths that they have here.
"""

import hashlib
import shlex
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from carft_ray import files
from carft_ray.errors import Problem, StorageError, UsageError
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
        files: Name in the folder -> file here.
        paths: What the recipe names and is not sent: it must be there on the cluster.
    """

    study: Path
    entrypoint: str
    recipe: str = ""
    files: Mapping[str, Path] = field(default_factory=dict)
    paths: tuple[Path, ...] = ()

    def sizes(self) -> dict[str, int]:
        """Returns the bytes of each file that is sent, by its name in the folder."""
        found = {RECIPE: len(self.recipe.encode())} if self.recipe else {}
        return found | {name: path.stat().st_size for name, path in self.files.items()}

    def write(self, folder: Path) -> None:
        """Writes the folder that is sent.

        Raises:
            StorageError: There is no space, or a file cannot be read.
        """
        with files.writing(folder):
            (folder / RECIPE).write_text(self.recipe, encoding="utf-8")
            for name, path in self.files.items():
                (folder / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(path, folder / name)


def search_upload(recipe: Recipe, study: Path, flags: Sequence[str]) -> Upload:
    """Returns what a search, or the resumption of its study, sends.

    Args:
        recipe: The recipe, with absolute paths.
        study: The study directory.
        flags: Further options of `carft-ray search`.

    Raises:
        UsageError: The lists that it names are too large.
        StorageError: One of them cannot be read.
    """
    study = study.absolute()
    lists, paths = named_paths(recipe)
    sent: dict[str, Path] = {}
    for path in filter(Path.is_file, map(Path, lists)):
        name = f"{FILES}/{path.name}"
        sent[f"{FILES}/{len(sent)}-{path.name}" if name in sent else name] = path
    _check_size(sent)
    names = {str(path): name for name, path in sent.items()}
    text = dump_given(with_paths(recipe, lambda written: names.get(written, written)))
    kept = study.with_name(f"{study.name}.recipe") / _digest(text, sent)
    command = shlex.join([*CARFT_RAY, "search", f"{kept}/{RECIPE}", "--study", str(study), "--address", "auto", *flags])
    folder = shlex.quote(str(kept))
    entrypoint = f"mkdir -p {folder} && cp -R ./. {folder} || exit {StorageError.exit_code}; exec {command}"
    absent = [path for path in lists if path not in names]
    return Upload(study, entrypoint, text, sent, tuple(map(Path, [*paths, *absent])))


def resume_upload(study: Path, overrides: Sequence[str], flags: Sequence[str]) -> Upload:
    """Returns what the resumption of a study by its own recipe sends: nothing but the command."""
    study = study.absolute()
    settings = [word for text in overrides for word in ("--set", text)]
    command = [*CARFT_RAY, "resume", str(study), "--address", "auto", *settings, *flags]
    return Upload(study, f"exec {shlex.join(command)}")


def _digest(text: str, sent: Mapping[str, Path]) -> str:
    """Returns a name for the content of the folder."""
    digest = hashlib.sha256(text.encode())
    for name, path in sent.items():
        with files.writing(path), open(path, "rb") as file:
            digest.update(f"{name} {hashlib.file_digest(file, 'sha256').hexdigest()} ".encode())
    return digest.hexdigest()[:8]


def _check_size(sent: Mapping[str, Path]) -> None:
    sizes = {path: path.stat().st_size for path in sent.values()}
    if sum(sizes.values()) <= LARGEST_UPLOAD:
        return
    largest = sorted(sizes, key=lambda path: -sizes[path])[:3]
    named = ", ".join(f"{path} ({sizes[path] / 2**20:.0f} MiB)" for path in largest)
    step = "Put them where the nodes see them and not this machine, and name those paths: such lists are not sent."
    rule = f"the lists that the recipe names must not be larger than {LARGEST_UPLOAD // 2**20} MiB together"
    value = f"{sum(sizes.values()) / 2**20:.0f} MiB; the largest: {named}"
    raise UsageError(Problem("submit", rule, value, next_step=step))
