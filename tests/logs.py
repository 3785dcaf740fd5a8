"""The log of a study for tests: held as a search holds it, read as it lies there, and written as a stranger would."""

import contextlib
import json

from carft_ray.layout import COMMITS
from carft_ray.store.commit import commit_name, digest_in, sealed
from carft_ray.store.folder import Folder
from carft_ray.store.heartbeat import identity
from carft_ray.store.log import _NOBODY, Log, log_of
from carft_ray.study.holding import check_fit, held, is_study
from carft_ray.study.ledger import record
from carft_ray.study.opening import open_study
from carft_ray.study.recipe_identity import recipe_record
from carft_ray.study.records import RECIPE, STOPPING, last_of
from carft_ray.study.snapshot import snapshot


@contextlib.contextmanager
def holding(folder, tell=lambda text: None):
    """Holds a study within the block, as a search does; gives its log."""
    check_fit(folder)
    log = Log(Folder(folder))
    with held(log, tell):
        yield log


def has_begun(folder):
    """Tells whether a folder is a study whose search has written its recipe: before that, readers refuse it."""
    return is_study(folder) and last_of(log_of(folder), RECIPE) is not None


def set_recipe(study_dir, recipe):
    """Makes a recipe that of a study, as a search does that has claimed it."""
    with holding(study_dir) as log:
        log.write(recipe_record(recipe))


def note_stop(study_dir, reason):
    """Says why the last search of a study has stopped, as it does itself."""
    with holding(study_dir) as log:
        log.write({"kind": STOPPING, "reason": reason})


def write_line(study_dir, recipe, purpose="test", **words):
    """Writes a line of the ledger, as a command does."""
    with holding(study_dir) as log:
        return record(study_dir, log, recipe, purpose, **words)


def goes_on(study_dir, recipe, reason, change_space=False):
    """Opens a study for a search that may need a reason; returns whether the ledger has a new line for it."""
    before = len(snapshot(study_dir).ledger) if study_dir.exists() else 0
    with open_study(study_dir, recipe, change_space, is_search=True, again=reason):
        return len(snapshot(study_dir).ledger) > before


def forget_line(study_dir, number):
    """Removes a line of the ledger, as a stranger would who makes all hashes again."""
    found = commits(study_dir)
    lines = [[record.get("line", {}).get("number") for record in commit["records"]] for commit in found]
    rewrite(study_dir, [commit for commit, numbers in zip(found, lines, strict=True) if number not in numbers])


def take(study_dir):
    """Takes over a study whose owner seems to be dead, as a search of another machine; returns its log."""
    log = Log(Folder(study_dir))
    log.follow()
    log._holder = _NOBODY
    log.claim(me={**identity(), "host": "node7", "boot": "another", "pid": 12, "since": "noon"})
    return log


def commits(study_dir):
    """Returns the commits of a study as they lie there."""
    return [json.loads(path.read_bytes().split(b"\n")[1]) for path in sorted((study_dir / COMMITS).glob("[0-9]*"))]


def kept(study_dir, kind):
    """Returns what the log keeps in its records of a kind, ``recipe`` or ``provenance``, oldest first."""
    return [one[kind] for commit in commits(study_dir) for one in commit["records"] if one["kind"] == kind]


def change(study_dir, kind, changed):
    """Changes what the log keeps in its records of a kind, by a function, as a stranger would."""
    found = commits(study_dir)
    for one in [one for commit in found for one in commit["records"] if one["kind"] == kind]:
        changed(one[kind])
    rewrite(study_dir, found)


def operations(study_dir):
    """Returns what Optuna has written."""
    return [each for commit in commits(study_dir) for each in commit["operations"]]


def rewrite(study_dir, changed):
    """Makes these commits the log of a study, whole in itself."""
    store, digest = Folder(study_dir), ""
    store.remove(COMMITS)
    for number, commit in enumerate(changed, start=1):
        data = sealed(json.dumps({**commit, "number": number, "previous": digest}).encode())
        store.put_new(commit_name(number), data)
        digest = digest_in(data)


def replace(study_dir, old, new):
    """Has one text for another in all that a study's log holds."""
    text = json.dumps(commits(study_dir))
    assert old in text
    rewrite(study_dir, json.loads(text.replace(old, new)))
