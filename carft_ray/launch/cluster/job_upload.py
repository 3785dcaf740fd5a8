"""What a submitted search brings to the cluster: its command, and one small folder with the recipe.

    recipe.yaml     the keys that were set, ``--set`` included, with absolute paths; class names and templates as lists
    files/          lists of sample ids that the recipe names

A list is read here, and what was read is sent: never the bytes of a file that a recipe of a stranger may name. One
that lies outside the recipe's folder is sent only where ``--send`` names it.

A study outlives its job, and with it the folder that Ray unpacks: the job copies the folder next to the study first
(``STUDY.recipe/HASH``; of a study in a bucket to the cache of the head, ``recipes/HASH``) and searches with the copy,
which the study's recipe then names. Images, shards and weights are never sent: they must lie on disks that the nodes
see, under the paths that they have here.
"""

import hashlib
import json
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from carft_ray import environment
from carft_ray import files as disk
from carft_ray.data.formats.folder import read_class_names
from carft_ray.data.sets import excluded_ids
from carft_ray.errors import ClusterError, Problem, StorageError, UsageError
from carft_ray.launch.cluster import job_package
from carft_ray.recipe.loading import dump_given, named_paths, with_paths
from carft_ray.recipe.schema.recipe import Recipe
from carft_ray.study.place import Place, absolute, in_bucket

RECIPE = "recipe.yaml"
_CACHE = '"${XDG_CACHE_HOME:-$HOME/.cache}"/carft-ray/recipes/'  # of the head, for a shell
_CLI = "exec python -m carft_ray.cli"  # where modules are sent, there are no commands


@dataclass(frozen=True)
class Upload:
    """A search as it is sent.

    Attributes:
        study: The study directory as the cluster will see it, or the address of the study.
        command: What the job runs once its carft-ray is found good, for a shell.
        files: Name in the folder that is sent -> text of the file; empty where the study has its own recipe.
        paths: What the recipe names and is not sent: it must be there on the cluster.
    """

    study: str
    command: str
    files: Mapping[str, str] = field(default_factory=dict)
    paths: tuple[Path, ...] = ()

    def entrypoint(self, installed: bool) -> str:
        """Returns the shell command of the job.

        Args:
            installed: Whether it runs the carft-ray of the cluster, whatever its version.
        """
        source = "" if installed else f" {environment.code()['source']}"
        return f"python -m {job_package.__name__}{source} || exit {ClusterError.exit_code}; {self.command}"

    def write(self, folder: Path) -> None:
        """Writes the folder that is sent.

        Raises:
            StorageError: There is no space.
        """
        with disk.writing(folder):
            for name, text in self.files.items():
                (folder / name).parent.mkdir(parents=True, exist_ok=True)
                (folder / name).write_text(text, encoding="utf-8")


def search_upload(recipe: Recipe, study: Place, flags: Sequence[str], home: Path, send: Sequence[Path] = ()) -> Upload:
    """Returns what a search, or the resumption of its study, sends.

    Args:
        recipe: The recipe, with absolute paths.
        study: The study directory, or the address of the study.
        flags: Further options of `carft-ray search`.
        home: Folder of the recipe.
        send: Lists, or folders of lists, that may be sent though they lie elsewhere.

    Raises:
        UsageError: A list that it names lies elsewhere and may not be sent.
        DataError: One of them is no list of sample ids or class names, or cannot be read.
    """
    study = absolute(study)
    lists, paths = named_paths(recipe)
    there = [path for path in map(Path, lists) if path.is_file()]
    require_sendable(there, home, send)
    files: dict[str, str] = {}
    replaced: dict[str, str | tuple[str, ...] | None] = {}
    for path in there:
        if lists[str(path)] == "class_names":
            replaced[str(path)] = read_class_names(str(path), "class_names")
            continue
        name = f"files/{len(files)}-{path.name}"
        ids = excluded_ids(str(path), "exclude").tolist()
        files[name], replaced[str(path)] = "".join(f"{one}\n" for one in ids), name
    files[RECIPE] = dump_given(with_paths(recipe, lambda written: replaced.get(written, written)))
    digest = hashlib.sha256(json.dumps(files, sort_keys=True).encode()).hexdigest()[:8]
    kept = f"{_CACHE}{digest}" if in_bucket(study) else shlex.quote(f"{study}.recipe/{digest}")
    words = shlex.join(["--study", study, "--address", "auto", *flags])
    absent = [path for path in lists if path not in replaced]
    command = (
        f"mkdir -p {kept} && cp -R ./. {kept} || exit {StorageError.exit_code}; {_CLI} search {kept}/{RECIPE} {words}"
    )
    return Upload(study, command, files, tuple(map(Path, [*paths, *absent])))


def resume_upload(study: Place, flags: Sequence[str]) -> Upload:
    """Returns what the resumption of a study by its own recipe sends: nothing but the command."""
    study = absolute(study)
    return Upload(study, f"{_CLI} resume {shlex.join([study, '--address', 'auto', *flags])}")


def require_sendable(paths: Sequence[Path], home: Path, send: Sequence[Path]) -> None:
    """Refuses lists outside the folder of the recipe, which a stranger may have written, unless they may be sent.

    Raises:
        UsageError: One lies elsewhere.
    """
    allowed = [place.resolve() for place in (home, *send)]
    problems = []
    for path in paths:
        real = path.resolve()
        if not any(real.is_relative_to(place) for place in allowed):
            rule = f"must be in the folder of the recipe, {home}, to be sent to the cluster"
            value = "" if real == path else f"a link to {real}"
            step = f"Is it a list that you want to send? Then add --send {shlex.quote(str(path))}"
            problems.append(Problem(str(path), rule, value, next_step=step))
    if problems:
        raise UsageError(problems)
