"""The rules of the house as tests: layers, doorways, light imports, gates for texts and files of strangers."""

import ast
import functools
import graphlib
import importlib
import json
import pickle
import re
import subprocess
import sys
from pathlib import Path

import pytest

import carft_ray
from carft_ray import errors

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "carft_ray"
# a layer may import those that stand after it
LAYERS = ("cli", "api", "ui", "results", "launch", "study", "training", "store")
LAYERS += ("evaluation", "model", "data", "recipe", "base")
APART = (  # neither imports the other
    ("study", "training"),
    ("study", "evaluation"),
    *(("store", layer) for layer in ("evaluation", "model", "data", "recipe")),
)
BASE = ("errors", "files", "layout", "environment", "words", "untrusted")
DOORWAYS = {  # the libraries that a layer alone, or with others, uses
    "cli": "typer rich",
    "api": "rich",
    "ui": "rich",
    "results": "open_clip torch matplotlib plotly jinja2",  # exports, as their user opens them
    "launch": "ray torch wandb mlflow",
    "study": "optuna pydantic",
    "store": "optuna obstore",  # a journal's backend
    "training": "torch",
    "model": "open_clip torch",
    "data": "torch simplejpeg",  # torch: its resize of uint8 alone
    "recipe": "ruamel pydantic",
}
FILES = sorted(PACKAGE.rglob("*.py"))


def layer_of(path):
    parts = path.relative_to(PACKAGE).parts
    if len(parts) > 1:
        return parts[0]
    return "base" if path.stem in BASE else "cli"  # the package itself gives out its API


@functools.cache
def nodes_of(path):
    """The nodes of a file's syntax tree."""
    return list(ast.walk(ast.parse(path.read_text())))


@functools.cache
def imports_of(path):
    """All modules that a file imports, those inside functions too."""
    found = []
    for node in nodes_of(path):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            found.append(node.module)
            if node.module == "carft_ray":
                found += [f"carft_ray.{alias.name}" for alias in node.names]
    return found


@pytest.mark.slow
def test_imports_run_one_way():
    for path in FILES:
        layer = layer_of(path)
        for module in imports_of(path):
            pieces = module.split(".")
            if pieces[0] != "carft_ray" or len(pieces) == 1 or not pieces[1][0].islower():
                continue
            target = "base" if pieces[1] in BASE else pieces[1]
            assert LAYERS.index(target) >= LAYERS.index(layer), f"{path} ({layer}) imports {module}"
            assert not any({layer, target} == set(pair) for pair in APART), f"{path} ({layer}) imports {module}"


def test_imports_have_no_cycle_neither_of_modules_nor_of_folders():
    """In each folder, the modules and folders that lie in it are the nodes of a graph without a cycle."""
    modules = {".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path for path in FILES}
    imports = {name: {*imports_of(path)} & modules.keys() - {name} for name, path in modules.items()}
    imports.pop("carft_ray")  # gives its version and, late, its API
    imports.pop("carft_ray.training")  # gives out its names late
    graphlib.TopologicalSorter(imports).prepare()  # or a CycleError
    for folder in {"carft_ray"} | {name.rpartition(".")[0] for name in imports}:
        edges = {}
        for name, targets in imports.items():
            if name.startswith(f"{folder}."):
                child = name.removeprefix(f"{folder}.").split(".")[0]
                inside = [each.removeprefix(f"{folder}.") for each in targets if each.startswith(f"{folder}.")]
                edges.setdefault(child, set()).update({each.split(".")[0] for each in inside} - {child})
        graphlib.TopologicalSorter(edges).prepare()


def test_each_outside_library_has_one_doorway():
    libraries = {library for names in DOORWAYS.values() for library in names.split()}
    found = {layer: set() for layer in (*LAYERS, *DOORWAYS)}
    for path in FILES:
        found[layer_of(path)] |= {module.split(".")[0] for module in imports_of(path)} & libraries
    assert {layer: used for layer, used in found.items() if used} == {
        layer: {*names.split()} for layer, names in DOORWAYS.items()
    }


def test_private_names_of_ray_and_optuna_stand_in_one_module_each():
    for path in FILES:
        if path.stem in ("ray_private", "optuna_private"):
            continue
        text = path.read_text().replace('"ray._private.authentication"', "")  # the name of a logger
        assert not re.findall(
            r"(?:ray|optuna)[\w.]*\._\w+|\._trial_id|\._study_id|\._cached_|\b\w+\._contains", text
        ), path


def test_no_module_unpickles():
    """One tries whether an exception that it has just caught can be pickled, as torch would pickle it."""
    for path in FILES:
        modules = {module.split(".")[0] for module in imports_of(path) if path.stem != "ranks"}
        assert not modules & {"pickle", "cloudpickle", "dill", "joblib", "shelve"}, path
        assert not re.search(
            r"(?<!safetensors\.)torch\.(load\((?!.*weights_only=True)|save\()|allow_pickle=True", path.read_text()
        ), path


AROUND = {  # why a module may read files without ``untrusted``
    "the gate": "untrusted",
    "writes": "files training/tensorboard store/bucket launch/workers/worker",
    "the package's own files": "environment recipe/presets recipe/benchmarks recipe/methods data/draft data/sandbox"
    " data/corruptions data/duplicates/shared_images results/export/export results/page/page",
    "the kernel's files": "store/heartbeat",
    "the user's own cache, token, and code that is trusted": "data/cache data/file_index training/targets"
    " launch/cluster/jobs training/own_function",
    "what has been opened as a regular file, or counted, before": "data/table_rows data/benchmarks/layouts"
    " model/pretrained model/weights_files",
    "what this process or its driver has just written": "model/clip",
    "what a process that has ended has left, and a node's own files": "launch/cluster/ray_errors"
    " launch/workers/file_transfer",
}
BY_PATH = {  # why a module that has to do with studies may read a file by its path: it is no file of a study
    "pieces of files that a node has made": "launch/workers/file_transfer",
    "the user's own cache and token": "study/place results/test_summary launch/cluster/jobs",
    "the package's own files": "results/export/export results/page/page",
    "what this process or its driver has just written": "launch/workers/worker launch/cluster/ray_errors",
}
READS = {"read_text", "read_bytes", "memory_map", "memmap", "fromfile", "loadtxt", "genfromtxt"}
GATES = ("carft_ray.untrusted", "carft_ray.data.decode_images")


def reads_around(path):
    """Yields the lines of a module that read a file by its path and not through a gate."""
    through = {
        alias.asname or alias.name
        for node in nodes_of(path)
        if isinstance(node, ast.ImportFrom) and node.module in GATES
        for alias in node.names
    }
    for node in nodes_of(path):
        called = node.func if isinstance(node, ast.Call) else None
        is_open = isinstance(called, ast.Attribute) and called.attr == "open"
        holder = ast.unparse(called.value).lower() if is_open else ""
        if (
            (isinstance(called, ast.Name) and called.id in {"open", *READS} - through)
            or holder == "os"
            or "path" in holder
            or (isinstance(node, ast.Attribute) and node.attr in READS)  # called, or given to what calls it
        ):
            yield node.lineno


@pytest.mark.slow
def test_strangers_files_are_read_through_the_gate():
    found = {str(path.relative_to(PACKAGE).with_suffix("")): list(reads_around(path)) for path in FILES}
    around = {name: lines for name, lines in found.items() if lines}
    allowed = {name for names in AROUND.values() for name in names.split()}
    assert not around.keys() - allowed, {name: around[name] for name in around.keys() - allowed}
    assert not allowed - around.keys(), "no longer needed"


@pytest.mark.slow
def test_files_of_a_study_are_read_through_their_one_doorway():
    """That is ``files``, which takes the folder of the study and refuses what leads out of it."""
    found = set()
    for path in FILES:
        name = str(path.relative_to(PACKAGE).with_suffix(""))
        text = path.read_text()
        by_path = re.search(r"import .*\b(open_regular|read_regular|read_text)\b|untrusted\.(open_|read_)", text)
        if name.partition("/")[0] in ("study", "results", "api", "cli", "launch", "ui") and (
            by_path or list(reads_around(path))
        ):
            found.add(name)
    assert found == {name for names in BY_PATH.values() for name in names.split()}


def test_no_file_names_a_path_of_one_machine():
    texts = [*ROOT.glob("*.md"), *ROOT.glob("*/*.md"), *ROOT.glob("search_spaces/*.yaml"), ROOT / "Makefile"]
    for path in (*FILES, *texts):
        assert not re.search(r"(?<![\w.~])/(home|root|work|mnt|data)/", path.read_text()), path


def test_no_assert_checks_what_a_user_gives():
    """An assertion vanishes with -O and has no message: the package raises errors of errors.py."""
    for path in FILES:
        assert not [node for node in nodes_of(path) if isinstance(node, ast.Assert)], path


QUICK = {  # what is not loaded, and by which modules, one after the other
    "torch ray optuna open_clip numpy pyarrow PIL": "carft_ray carft_ray.environment carft_ray.recipe.loading"
    " carft_ray.recipe.space carft_ray.recipe.rules",
    "torch ray optuna open_clip": "carft_ray.cli carft_ray.model.catalog carft_ray.data.sets"
    " carft_ray.data.views carft_ray.data.cached_sets",
    # readers of a study; else `status` and the other quick verbs would take seconds
    "torch ray open_clip": "carft_ray.api.studies carft_ray.api.actions carft_ray.api.trained"
    " carft_ray.results.compare_trainings"
    " carft_ray.results.report carft_ray.results.reading.study_view"
    " carft_ray.results.rescore carft_ray.results.page.page carft_ray.evaluation.metrics"
    " carft_ray.evaluation.alpha_curve"
    " carft_ray.launch.stop",
}
# which every command ends with: its next step
LAST = {
    "scipy.stats scipy.ndimage scipy.cluster": "carft_ray.results.adviser carft_ray.results.reading.finished"
    " carft_ray.data.sets"
}


@pytest.mark.slow
@pytest.mark.parametrize("quick", [QUICK, LAST], ids=["quick", "last"])
def test_modules_that_must_be_quick_load_nothing_heavy(quick):
    """One after the other in one process, and after each it is told what heavy ones are there."""
    code = (
        "import importlib, json, sys\n"
        "found = []\n"
        "for heavy, modules in json.loads(sys.argv[1]).items():\n"
        "    for module in modules.split():\n"
        "        importlib.import_module(module)\n"
        "        found += [[module, name] for name in heavy.split() if name in sys.modules]\n"
        "print(json.dumps(found))\n"
    )
    command = [sys.executable, "-c", code, json.dumps(quick)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=True)
    assert json.loads(done.stdout) == []  # the first of these is at fault


def test_every_error_has_the_exit_code_of_its_kind_and_survives_the_pickling_with_which_ray_moves_it():
    kinds = [kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, errors.CarftError)]
    codes = {2: "UsageError", 3: "RecipeError", 4: "DataError", 6: "NoSuccessfulTrialError DivergedError"}
    codes |= {5: "StorageError ClusterError MachineError OutOfMemoryError", 7: "BudgetError", 8: "HoldOutError"}
    expected = {name: code for code, names in codes.items() for name in names.split()} | {"InterruptedRunError": 130}
    assert {kind.__name__: kind.exit_code for kind in kinds if kind is not errors.CarftError} == expected
    problems = [errors.Problem("a", "must b", "c", ("d",), "d", "Do e."), errors.Problem("f", "must g")]
    for kind in kinds:
        again = pickle.loads(pickle.dumps(kind(problems)))
        assert (type(again), str(again), again.problems) == (kind, str(kind(problems)), tuple(problems))


API = {"Study", "__version__", "load_recipe", "open_study"}
API |= {"confirm", "evaluate", "export", "predict", "report", "resume", "search", "soup", "train"}
LEARNING = {"RunContext", "context_distribution", "context_kl", "fine_tune", "load_clip", "mix_weights"}
PUBLIC = {"carft_ray": API, "carft_ray.cli": {"app", "main"}, "carft_ray.training": LEARNING}


def test_a_package_gives_out_the_names_that_are_listed_each_with_a_docstring():
    for path in PACKAGE.rglob("__init__.py"):
        package = ".".join(path.parent.relative_to(ROOT).parts)
        module = importlib.import_module(package)
        names = getattr(module, "__all__", [])
        assert len(names) == len({*names})
        assert {*names} == PUBLIC.get(package, set()), package
        for name in names:
            assert isinstance(getattr(module, name), str) or getattr(module, name).__doc__, name
    with pytest.raises(AttributeError, match="has no attribute 'test'"):  # which the command line has alone
        carft_ray.test  # noqa: B018  (looking it up is what fails)


# texts of strangers go through ``untrusted`` and ``console``; what leads around them -> modules that may, and why
MAY = {
    "sys.stdout": {
        "ui/console.py": "is the gate; JSON has no control characters",
        "cli/submit.py": "the log of a job, through `visible`",
        "cli/recipes.py": "a recipe as YAML, to be read back as it is",
    },
    "sys.stderr": {
        "cli/submit.py": "as above",
        "launch/cluster/cluster.py": "our own words, in a thread while the process ends",
        "launch/cluster/job_package.py": "our own words at the beginning of a job",
        "ui/console.py": "where prints of a user's trainer go beside a document",
    },
    "typer.echo": {"cli/program.py": "our own words", "cli/recipes.py": "a recipe as YAML, to be read back as it is"},
    "traceback.print_exc": {"cli/program.py": "--debug asks for it"},
    "Console": {
        "ui/console.py": "is the gate",
        "ui/notebook.py": "as the gate, for HTML",
        "ui/live.py": "a type",
        "ui/progress.py": "a type",
    },
    "Text": {"ui/console.py": "is the gate", "ui/live.py": "numbers, and `visible`", "ui/notebook.py": "`visible`"},
    ".print": {"ui/console.py": "is the gate", "ui/notebook.py": "as the gate", "ui/progress.py": "`console.plain`"},
    "Markup": {"results/page/page.py": "what is Markup is not changed"},
    "html.escape": {"ui/notebook.py": "a whole page of ours in an attribute"},
    "csv.writer": {"data/duplicates/shared_images.py": "`csv_cell`", "results/export/predict.py": "`csv_cell`"},
    "write_csv": {"results/report.py": "`csv_cell`"},
}
NOWHERE = ("print", "from_markup", "from_ansi", "markup=True", "saxutils", "csv.DictWriter", "to_csv")
MAY |= {name: {} for name in NOWHERE}
SAFE = {"style", "scripts.first", "scripts.plotly", "scripts.page", "data"}  # our own, and JSON through `embedded`
LAST = {name.rpartition(".")[2] for name in MAY}


def used(path):
    """Yields the names of ``MAY`` that a module calls, imports or passes on, and others."""
    for node in nodes_of(path):
        if isinstance(node, ast.Name):
            yield node.id
        if isinstance(node, ast.Attribute) and node.attr in LAST:
            yield f".{node.attr}"
            yield node.attr if node.attr != "print" else ""
            yield f"{getattr(node.value, 'id', '')}.{node.attr}"
        if isinstance(node, ast.ImportFrom):
            yield (node.module or "").rpartition(".")[2]
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        if isinstance(node, ast.keyword) and node.arg == "markup" and ast.unparse(node.value) != "False":
            yield "markup=True"


def test_texts_go_through_the_gates():
    names = {path.relative_to(PACKAGE).as_posix(): {*used(path)} for path in FILES}
    found = {name: {module for module, names_of in names.items() if name in names_of} for name in MAY}
    assert found == {name: {*modules} for name, modules in MAY.items()}
    for module, reason in (pair for modules in MAY.values() for pair in modules.items()):
        if called := re.search(r"`(\w+)`", reason):
            assert f"{called[1]}(" in (text := (PACKAGE / module).read_text()) or f"({called[1]}," in text, module


def test_templates_escape_all_but_what_is_ours_and_scripts_make_no_code_of_texts():
    for path in PACKAGE.rglob("*.jinja"):
        assert {*re.findall(r"\{\{ ([\w.]+)\|safe \}\}", path.read_text())} == SAFE
        assert len(re.findall(r"\bsafe\b|autoescape", path.read_text())) == len(SAFE)
    ways = r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\b|new Function|srcdoc|import\("
    for path in PACKAGE.rglob("*.js"):
        assert re.findall(ways, path.read_text()) == [], path
