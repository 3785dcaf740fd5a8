"""Studies of strangers for ``fuzz.py``: a sound finished one, damaged, as a folder or as the objects of a bucket.

In half of the cases of its log, results and predictions all hashes are made again, so that what was changed gets past
them: who owns a study can do that.
"""

import contextlib
import hashlib
import json
import os
import shutil

import logs
import mutations
import pyarrow as pa
import pyarrow.parquet as pq
from logs import commits, rewrite
from mutations import CANARY, anything, damaged, warped

from carft_ray.layout import COMMITS, MANIFEST, PREDICTIONS, RESULT

LARGEST_OBJECT = 2**24
ADDRESS = "s3://fuzz/study"
TRAINED, MADE = "try/study", ("made", "pareto")  # of the last two nothing can be trained or exported
NUMBERS = (10**30, 4 * 10**10, -1, 0, 1e308, float("nan"), float("inf"), 2**63, "a", None, [], {}, True, "x" * 100000)
TARGETS = ("../../{canary}/x", "../{canary}", "/dev/zero", "/proc/self/mem", "{name}", ".", "..", "log", "nowhere")


def study(rng, here, base):
    """Writes a changed study, and a sound one beside it; in some cases the first is to be put into a bucket."""
    sample = rng.choice((TRAINED, TRAINED, *MADE))
    for name, of in (("study", sample), ("sound", TRAINED)):
        shutil.copytree(base / of, here / name, symlinks=True)
    (here / "sample").write_text(sample)
    folder = here / "study"
    changes = (log_file, log_content, log_content, numbers, manifest, a_file, a_file, result, answers, kind)
    chosen = [rng.choice(changes) for _ in range(rng.choice((1, 1, 1, 2, 4)))]
    for change in sorted(chosen, key=lambda change: change is kind):  # nothing here opens a pipe
        with contextlib.suppress(
            OSError, ValueError, LookupError, TypeError, AssertionError, MemoryError
        ):  # an earlier change stands in its way
            change(rng, folder)
    (here / "in_bucket").write_text(str(rng.random() < 0.4))


def write_samples(base):
    """Writes studies without a training; the one with weights is that of the sound case."""
    import report_studies

    report_studies.make(base / MADE[0], 3, report_studies.make_recipe(3), lambda number: number == 1)
    pareto = report_studies.make_recipe(3, objective={"kind": "pareto"}, alpha={"mode": "sample"})
    report_studies.make(base / MADE[1], 3, pareto)


def files_of(folder):
    return sorted(path for path in folder.rglob("*") if path.is_file() and not path.is_symlink())


def log_file(rng, folder):
    path = rng.choice(sorted((folder / COMMITS).iterdir()))
    path.write_bytes(damaged(rng, path.read_bytes()))


def log_content(rng, folder):
    found = commits(folder)
    index = rng.randrange(len(found))
    changed = rng.choice(
        (lambda: warped(rng, found[index]), lambda: {**found[index], **warped(rng, pick(rng, found[index]))})
    )
    rewrite(folder, [*found[:index], changed(), *found[index + 1 :]][: rng.choice((len(found), len(found), index + 1))])


def pick(rng, commit):
    return {name: commit[name] for name in ("records", "operations") if commit.get(name)}


def numbers(rng, folder):
    """Has another value for one attribute of trainings, or for one key of an operation."""
    found = commits(folder)
    operations = [each for commit in found for each in commit["operations"]]
    attributes = [each for each in operations if "user_attr" in each]
    chosen = rng.choice(attributes if rng.random() < 0.7 else operations)
    holder = chosen.get("user_attr", chosen)
    key = rng.choice(sorted(holder))
    holder[key] = odd(rng, holder[key])
    rewrite(folder, found)


def odd(rng, value):
    """Returns a value with an odd one somewhere in it."""
    if isinstance(value, dict | list) and value and rng.random() < 0.8:
        key = rng.choice(sorted(value) if isinstance(value, dict) else range(len(value)))
        value[key] = odd(rng, value[key])
        return value
    return rng.choice((*NUMBERS, anything(rng)))


def manifest(rng, folder):
    """Changes the manifest."""
    path = folder / MANIFEST
    content = json.loads(path.read_text())
    if rng.random() < 0.2:
        path.write_bytes(damaged(rng, path.read_bytes()))
        return
    changed = warped(rng, content) if rng.random() < 0.5 else odd(rng, content)
    path.write_text(json.dumps(changed), errors="surrogatepass")


def a_file(rng, folder):
    """Damages any file: as bytes, or as the JSON that it is."""
    path = rng.choice([path for path in files_of(folder) if path.parent.name != COMMITS and path.name != MANIFEST])
    content = path.read_bytes()
    try:
        parts = (
            [json.loads(line) for line in content.splitlines()] if path.suffix == ".jsonl" else [json.loads(content)]
        )
        changed = [warped(rng, part) if rng.random() < 0.5 else odd(rng, part) for part in parts]
        text = "\n".join(map(json.dumps, changed)) + "\n"
        if rng.random() < 0.05:
            text = text.replace(":", ":" + "[" * rng.choice((300, 100000)), 1)
        path.write_bytes(text.encode("utf-8", "surrogatepass"))
    except (ValueError, UnicodeDecodeError):
        path.write_bytes(damaged(rng, content))


def result(rng, folder):
    path = rng.choice(sorted(folder.glob(f"*/*/*/{RESULT}")))
    before = hashlib.sha256(path.read_bytes()).hexdigest()
    content = json.loads(path.read_text())
    changed = warped(rng, content) if rng.random() < 0.4 else odd(rng, content)
    path.write_text(json.dumps(changed), errors="surrogatepass")
    record(folder, before, path)


def record(folder, before, path):
    """Has the log name the result as it is now."""
    logs.replace(folder, before, hashlib.sha256(path.read_bytes()).hexdigest())


def answers(rng, folder):
    """Changes predictions: a column, its values or its type, or the bytes; recorded as if they were so."""
    path = rng.choice(sorted(folder.glob(f"*/*/*/{PREDICTIONS}")))
    place = path.parents[1] / RESULT
    if rng.random() < 0.3:
        path.write_bytes(damaged(rng, path.read_bytes()))
    else:
        table = pq.read_table(path)
        index = rng.randrange(table.num_columns)
        values, field = table.column(index).to_pylist(), table.schema.field(index)
        for at in rng.sample(range(len(values)), rng.choice((1, 3, len(values)))):
            values[at] = rng.choice((None, *mutations.NUMBERS, *mutations.FLOATS, "x" * 1000))
        with contextlib.suppress(pa.ArrowException, OverflowError, ValueError, TypeError):
            column = pa.array(values, None if rng.random() < 0.2 else field.type)
            table = table.set_column(index, field if column.type == field.type else field.name, column)
        if rng.random() < 0.1:
            table = pa.concat_tables([table] * 3)
        pq.write_table(table.replace_schema_metadata(table.schema.metadata), path)
    before = hashlib.sha256(place.read_bytes()).hexdigest()
    content = json.loads(place.read_text())
    sealed = {"bytes": path.stat().st_size, "sha256": hashlib.sha256(path.read_bytes()).hexdigest()}
    content["files"][PREDICTIONS] = sealed
    place.write_text(json.dumps(content))
    record(folder, before, place)


def kind(rng, folder):
    """Puts something else in place of a file or folder, or adds it: a pipe, a link, a file with holes, a folder."""
    there = [path for path in folder.rglob("*") if not path.is_symlink()]
    new = [folder / name for name in ("stop", "best.yaml", "ray.log", "confirm/plan.json", "test/summary.json")]
    path = rng.choice((rng.choice(there), rng.choice(new), rng.choice(sorted(folder.iterdir()))))
    shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
    path.parent.mkdir(parents=True, exist_ok=True)
    what = rng.randrange(6)
    if what == 0:
        os.mkfifo(path)
    elif what in (1, 2):
        up = "../" * (len(path.relative_to(folder.parent).parts) - 1)
        target = rng.choice((f"{up}../{CANARY}/x", f"{up}../{CANARY}", *TARGETS)).format(canary=CANARY, name=path.name)
        path.symlink_to(target)
    elif what == 3:
        with open(path, "wb") as file:
            file.truncate(rng.choice((10**9, 2 * 10**12)))
    elif what == 4:
        path.mkdir()
    else:
        path.write_bytes(rng.choice((b"", b"\0" * 1000, b"{}", b"[]", b"null", b"budget: \x1b[2J", b"[" * 100000)))
        if rng.random() < 0.3:
            path.with_name(
                rng.choice(("x" * 250, "attempt-99999999999999999999", "step-x", "\udcff", "a b", "-"))
            ).mkdir()


def into_bucket(here):
    """Makes the changed study the objects of a bucket in this process, behind ``Bucket``; no connection is begun."""
    import obstore
    from obstore.store import MemoryStore

    from carft_ray.store import bucket

    stores = {}
    bucket._opened = lambda address, *given: stores.setdefault(address, MemoryStore())
    stores[ADDRESS] = store = MemoryStore()
    for path in files_of(here / "study"):
        if path.stat().st_size <= LARGEST_OBJECT:
            with contextlib.suppress(Exception):  # no object may have the name
                obstore.put(store, path.relative_to(here / "study").as_posix(), path.read_bytes())


def commands(here):
    """Returns what reads or continues a study, with its place."""
    in_bucket = (here / "in_bucket").read_text() == "True"
    if in_bucket:
        into_bucket(here)
    place = ADDRESS if in_bucket else "study"
    found = [
        ("status", place),
        ("status", place, "--json"),
        ("ls", place),
        ("ls", place, "--json"),
        ("ls", ".", "--json"),
        ("logs", place, "0"),
        ("logs", place, "zero_shot", "--json"),
        ("report", place, "--json"),
        ("report", place, "--html", "--out", "page.html"),
        ("compare", place, "sound", "--json"),
        ("compare", "sound:zero_shot", f"{place}:0"),
    ]
    if (here / "sample").read_text() == TRAINED:
        trust = ("--trust-paths",) if in_bucket else ()
        found += [
            ("export", place, "--to", "exported", "--json", *trust),
            ("resume", place, "--executor", "debug", *trust),
        ]
    return [*found, *([("pull", place, "copy", "--json")] if in_bucket else [])]


def quicken():
    """Leaves out what takes time and depends on no input: the process that opens an export, waits for the dead."""
    from carft_ray.results.export import export
    from carft_ray.store import heartbeat, log

    export.farthest_logit = lambda *given: 0.0
    heartbeat.SILENT_FOR_S = heartbeat.LOOK_EVERY_S = log.UNCLEAR_FOR_S = 0.1
