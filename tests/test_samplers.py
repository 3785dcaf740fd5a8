"""Samplers: every cell of the table of what each can do, options, conditions, enqueued values, kills."""

import json
import math
import re
import tempfile
import textwrap
from functools import partial
from pathlib import Path

import optuna
import pytest
from optuna.storages.journal import JournalFileBackend
from optuna.trial import TrialState
from ruamel.yaml import YAML
from stand_in import make_recipe
from study_steps import finish, searching

from carft_ray.errors import RecipeError
from carft_ray.recipe import rules
from carft_ray.recipe.loading import recipe_of
from carft_ray.recipe.rules import population_size
from carft_ray.recipe.schema.fields import members
from carft_ray.recipe.schema.search import AnySampler, CategoricalParameter
from carft_ray.recipe.space import contains, grid_index, grid_size, num_trials
from carft_ray.study.attributes import POINT
from carft_ray.study.proposals import optuna_samplers
from carft_ray.study.proposals.optuna_private import is_within
from carft_ray.study.proposals.optuna_samplers import distribution
from carft_ray.study.snapshot import snapshot

HISTORY = 8  # trials whose draws depend on no result, whatever the sampler
OPTUNA = {  # settings with which this is so
    "tpe": {"startup_trials": HISTORY},
    "gp": {"startup_trials": HISTORY},
    "nsga2": {"population_size": HISTORY},
}
NUMBERS = {
    "learning_rate": {"low": 1e-5, "high": 1e-2, "log": True},
    "kl_weight": {"low": 0.0, "high": 4.0, "step": 0.5},
    "epochs": {"type": "int", "low": 1, "high": 32, "log": True},
}
FINITE = {
    "kl_weight": {"low": 0.0, "high": 4.0, "step": 0.5},
    "warmup_steps": {"type": "int", "low": 0, "high": 30, "step": 10},
}
CHOICE = {"decay": {"choices": ["all", "matrices"]}}
ALPHA = {"alpha": {"low": 0.1, "high": 1.0, "step": 0.1}}
CHILD = {"label_smoothing": {"low": 0.0, "high": 0.3, "step": 0.05, "when": {"decay": "matrices"}}}


def recipe_for(name, more=None, trials=HISTORY + 4, **search):
    """A recipe with a sampler, a space that suits it, and more parameters."""
    numbers = FINITE if name == "grid" else NUMBERS
    sampler = {"name": name, **OPTUNA.get(name, {}), **search.pop("sampler", {})}
    recipe = make_recipe(trials, sampler=sampler, space={**numbers, **(more or {})}, baselines={}, **search)
    content = recipe.model_dump(mode="json")
    content["data"]["ood_val"] = {"sketch": {**content["data"]["id_val"], "domain": "sketch"}}
    return recipe_of(content)


def told(study, recipe, result, at_a_time=1, wanted=HISTORY + 4):
    """Searches with a study of Optuna alone; ``result`` gives state and objective of the values of a trial."""
    drawn = []
    while len(drawn) < wanted and not optuna_samplers.used_up(study, recipe):
        begun = []
        for _ in range(min(at_a_time, wanted - len(drawn))):
            trial = optuna_samplers.ask(study, recipe)
            values = optuna_samplers.draw(study, trial, recipe)
            trial.set_user_attr("name", f"t{trial.number:04d}")
            begun.append((trial, values))
            drawn.append(values)
        for trial, values in begun:
            outcome = result(values)
            trial.set_constraint("trained", outcome.get("constraint", -1.0))
            if "step" in outcome:
                trial.report(outcome["step"], 1)
            study.tell(trial, outcome.get("value"), outcome.get("state", TrialState.COMPLETE))
    return drawn


def new_study(objectives=1):
    return optuna.create_study(directions=["maximize"] * objectives)


def two_searches(recipe, result, objectives=1):
    """Returns what follows the history in two searches that differ in the sign of their results alone."""
    drawn = [told(new_study(objectives), recipe, partial(result, sign=sign)) for sign in (1, -1)]
    assert drawn[0][:HISTORY] == drawn[1][:HISTORY]
    return [each[HISTORY:] for each in drawn]


def number(values):
    """A number between 0 and 1 of values that every sampler has."""
    return values["kl_weight"] / 4


def check_learning(learns, result, objectives=1):
    """Gives a check that the samplers of these names, and no others, learn from the sign of what a result tells."""

    def check(name, recipe):
        drawn = two_searches(recipe, result, objectives)
        assert (drawn[0] != drawn[1]) == (name in learns)

    return check


def check_conditional(name, recipe):
    first, second = two_searches(
        recipe, lambda values, sign: {"value": sign * values.get("label_smoothing", 0.1) + 0.01 * number(values)}
    )
    for values in first + second:
        assert ("label_smoothing" in values) == (values["decay"] == "matrices")
    pairs = [
        (one["label_smoothing"], other["label_smoothing"])
        for one, other in zip(first, second, strict=True)
        if {"label_smoothing"} <= one.keys() & other.keys()
    ]
    assert pairs
    assert any(one != other for one, other in pairs) == (name == "tpe")  # for others the child is drawn at random


BAYESIAN = ("tpe", "gp", "nsga2")
check_pruning = check_learning(
    ("tpe",), lambda values, sign: {"state": TrialState.PRUNED, "step": sign * number(values)}
)
check_constraints = check_learning(
    BAYESIAN, lambda values, sign: {"value": 0.1 * number(values), "constraint": sign * (number(values) - 0.4)}
)
check_categorical = check_learning(
    BAYESIAN, lambda values, sign: {"value": sign * float(values["decay"] == "all") + 0.01 * number(values)}
)
check_pareto = check_learning(
    BAYESIAN, lambda values, sign: {"value": [number(values), -sign * number(values)]}, objectives=2
)


def check_resume(name, recipe):
    """From any prefix of what Optuna has written, within a trial too, the same values are drawn."""
    few = {"startup_trials": 2} if name in ("tpe", "gp") else {"population_size": 3} if name == "nsga2" else {}
    recipe = recipe_for(name, {**CHOICE, **CHILD}, 5, enqueue=[{"kl_weight": 2.0}], sampler=few)
    with tempfile.TemporaryDirectory() as folder:
        whole, part = Path(folder) / "whole", Path(folder) / "part"
        study = optuna.create_study(storage=journal(whole), study_name="search", direction="maximize")
        drawn = told(study, recipe, lambda values: {"value": number(values)}, wanted=5)
        lines = whole.read_bytes().splitlines(keepends=True)
        for end in range(2, len(lines)):
            part.write_bytes(b"".join(lines[:end]))
            study = optuna.load_study(storage=journal(part), study_name="search")
            running = study.get_trials(deepcopy=False, states=(TrialState.RUNNING,))
            if running and len(running[0].params) == len(drawn[running[0].number]):
                continue  # nothing is left to draw
            trial = optuna.trial.Trial(study, running[0]._trial_id) if running else optuna_samplers.ask(study, recipe)
            assert optuna_samplers.draw(study, trial, recipe) == drawn[trial.number], (end, trial.number)


def journal(file):
    return optuna.storages.JournalStorage(JournalFileBackend(str(file)))


def check_many(name, recipe):
    wanted = 12 if name == "gp" else 16
    drawn = told(new_study(), recipe, lambda values: {"value": number(values)}, at_a_time=4, wanted=wanted)
    for key, form in recipe.search.space.items():
        kind = int if key in ("epochs", "warmup_steps") else float if key == "kl_weight" else object
        assert all(contains(form, values[key]) and isinstance(values[key], kind) for values in drawn), key
    first = HISTORY if name == "nsga2" else wanted  # a child may be its parent
    assert len({json.dumps(values) for values in drawn[:first]}) == first
    if name in ("qmc", "random"):
        alone = told(new_study(), recipe, lambda values: {"value": number(values)}, wanted=wanted)
        assert drawn == alone


FEATURES = {  # feature -> keys of search, further parameters, what holds
    "pruning": ({"pruner": {"name": "median"}}, {}, check_pruning),
    "constraints": ({"constraints": {"id_drop": {"zero_shot": 0.1}}}, {}, check_constraints),
    "conditional": ({}, {**CHOICE, **CHILD}, check_conditional),
    "categorical": ({}, CHOICE, check_categorical),
    "pareto": ({"objective": {"kind": "pareto"}, "alpha": {"mode": "sample"}}, ALPHA, check_pareto),
    "resume": ({}, {}, check_resume),
    "many at a time": ({}, {"clip_norm": {"choices": [None, 1.0]}}, check_many),
}
NAMES = [kind.model_fields["name"].default for kind in members(AnySampler)]
TEXT = (Path(__file__).parents[1] / "docs" / "samplers.md").read_text()
ROWS = [[cell.strip(" `") for cell in line.split("|")[1:-1]] for line in TEXT.splitlines() if line.startswith("|")]
CELLS = {(row[0], row[1]): (row[2], row[3]) for row in ROWS if len(row) == 4 and row[1] in FEATURES}  # verdict, why
WHOLE = [pytest.mark.slow, pytest.mark.whole]
GP_MARKS = {"resume": [pytest.mark.slow], "many at a time": [pytest.mark.slow]}  # the others in `make test-whole` alone
TABLE = [pytest.param(*cell, marks=GP_MARKS.get(cell[1], WHOLE) if cell[0] == "gp" else ()) for cell in CELLS]


@pytest.mark.parametrize(("name", "feature"), TABLE, ids=lambda word: word)
def test_a_cell_of_the_table_is_as_it_says(name, feature):
    more, parameters, check = FEATURES[feature]
    recipe = recipe_for(name, parameters, **more)
    verdict, why = CELLS[name, feature]
    lines = [line for line in rules.warnings(recipe) if line.startswith(f"search.sampler.name {name} with ")]
    assert [line.split(": ")[1] for line in lines] == ([why] if verdict == "warns" else [])
    check(name, recipe)


def test_the_table_is_whole():
    assert set(CELLS) == {(name, feature) for name in NAMES for feature in FEATURES}
    shown = {row[0]: row[1:] for row in ROWS if len(row) == len(NAMES) + 1}
    head = shown.pop("")
    assert {(name, feature): shown[feature][head.index(name)] for name, feature in CELLS} == {
        cell: verdict for cell, (verdict, _) in CELLS.items()
    }


def test_the_examples_of_the_documentation_are_valid():
    examples = re.findall(r"(?m)(?:^    .*\n)+", TEXT)
    assert len(examples) == 2
    base = {"learning_rate": {"low": 1e-5, "high": 1e-3}, "kl_weight": {"low": 1, "high": 20}}
    for example in examples:
        search = YAML(typ="safe").load(textwrap.dedent(example))["search"]
        recipe = recipe_of({"data": DATA, "search": {"space": base, **search}})
        assert [line for line in rules.warnings(recipe) if "ood_val" not in line] == []


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("tpe", {"multivariate": False, "constant_liar": False, "n_ei_candidates": 3}),
        ("tpe", {"group": True}),
        ("gp", {"deterministic": True}),
        ("nsga2", {"population_size": 6, "mutation_prob": 0.5, "crossover_prob": 0}),
        ("nsga2", {"swapping_prob": 0.1}),
        ("qmc", {"type": "halton", "scramble": False}),
    ],
)
def test_every_option_reaches_the_sampler_and_changes_its_draws(name, options):
    parameters = {"kl_weight": {"low": 0.0, "high": 1.0}, "epochs": {"low": 1, "high": 9}, **CHOICE}
    parameters["label_smoothing"] = {"low": 0, "high": 0.3, "when": {"decay": "all"}}
    always = {"startup_trials": 4} if name in ("tpe", "gp") else {}
    always |= {"crossover_prob": 1.0} if "swapping_prob" in options else {}

    def drawn(chosen):
        recipe = make_recipe(16, space=parameters, baselines={}, sampler={"name": name, **always, **chosen})
        wanted = 8 if name == "gp" else 32
        return told(new_study(), recipe, lambda values: {"value": math.sin(9 * values["kl_weight"])}, 2, wanted)

    for key in options:
        assert drawn(options) != drawn({other: value for other, value in options.items() if other != key}), key


@pytest.mark.parametrize("kind", ["sobol", "halton"])
@pytest.mark.parametrize("scramble", [True, False])
def test_qmc_draws_the_points_of_the_sequence_in_their_order(kind, scramble):
    from scipy.stats import qmc

    forms = {"weight_decay": {"low": 0.0, "high": 1.0}, "crop_scale": {"low": 0.5, "high": 1.0}, **CHOICE}
    sampler = {"name": "qmc", "seed": 7, "type": kind, "scramble": scramble}
    recipe = make_recipe(16, space=forms, baselines={}, sampler=sampler)
    drawn = told(new_study(), recipe, lambda values: {"value": 0.0}, wanted=16)
    engine = {"sobol": qmc.Sobol, "halton": qmc.Halton}[kind](3, scramble=scramble, seed=7)
    for values, (crop_scale, decay, weight_decay) in zip(drawn, engine.random(16), strict=True):
        assert values["crop_scale"] == pytest.approx(0.5 + 0.5 * crop_scale)
        assert values["weight_decay"] == pytest.approx(weight_decay)
        assert values["decay"] == CHOICE["decay"]["choices"][int(2 * decay)]


def test_the_population_is_a_quarter_of_the_trials_and_has_parents_then():
    for wanted, expected in ((4, 4), (16, 4), (100, 25), (1000, 50)):
        assert population_size(make_recipe(wanted, sampler={"name": "nsga2"})) == expected
    recipe = make_recipe(16, space=NUMBERS, baselines={}, sampler={"name": "nsga2"})
    study = new_study()
    told(study, recipe, lambda values: {"value": number(values)}, wanted=16)
    generations = [trial.system_attrs["NSGAIISampler:generation"] for trial in study.trials]
    assert generations == [number // 4 for number in range(16)]


@pytest.mark.slow
def test_the_grid_with_its_chains_of_conditions_is_tried_once_each_and_then_the_search_ends(tmp_path):
    parameters = {
        "label_smoothing": {"low": 0, "high": 0.3, "step": 0.1, "when": {"decay": ["matrices"]}},  # before its parents
        "decay": {"choices": ["all", "matrices"], "when": {"head_bias": True}},
        "head_bias": {"choices": [True, False]},
        "epochs": {"low": 1, "high": 3, "when": {"head_bias": [True, False]}},
        "warmup_steps": {"low": 1, "high": 2, "when": {"head_bias": False}},
    }
    recipe = make_recipe(100, space=parameters, baselines={}, sampler={"name": "grid"})
    size = 3 * (2 + (1 + 4))
    assert grid_size(recipe.search.space) == num_trials(recipe) == size
    study_dir = tmp_path / "study"
    for _ in range(3):  # opened again in the middle, and at the end
        with searching(study_dir, recipe) as study:
            begun = [study.next() for _ in range(9)]
            for spec in filter(None, begun):
                finish(study, spec)
            assert study.done() == (len(snapshot(study_dir).trials) == size)
    rows = snapshot(study_dir).trials
    assert len({json.dumps(row.values) for row in rows}) == len(rows) == size
    assert None not in [grid_index(recipe.search.space, row.values) for row in rows]
    for values in [row.values for row in rows]:
        assert ("decay" in values) == values["head_bias"]
        assert ("label_smoothing" in values) == (values.get("decay") == "matrices")
    [line] = [line for line in rules.warnings(recipe) if "grid" in line]
    assert line == "search.trials is 100, but the grid has 21 points: the search ends after 21"


def test_the_grid_passes_over_trials_without_values_and_those_of_another_space():
    recipe = make_recipe(99, space={**CHOICE, "epochs": {"low": 1, "high": 3}}, baselines={}, sampler={"name": "grid"})
    study = new_study()
    study.add_trial(optuna.trial.create_trial(state=TrialState.FAIL))
    wider = optuna.distributions.IntDistribution(1, 9)
    study.add_trial(optuna.trial.create_trial(value=0.0, params={"epochs": 2}, distributions={"epochs": wider}))
    own = {name: distribution(parameter) for name, parameter in recipe.search.space.items()}
    for kind in ("warm_from", "training_of"):  # no trainings of this study
        values = {"params": {"decay": "all", "epochs": 2}, "distributions": own, "user_attrs": {kind: 0}}
        study.add_trial(optuna.trial.create_trial(value=0.0, **values))
    drawn = told(study, recipe, lambda values: {"value": 0.0}, wanted=99)
    assert len({json.dumps(values) for values in drawn}) == len(drawn) == 6


def test_the_grid_does_not_depend_on_the_order_in_which_the_space_is_written():
    parameters = {**CHOICE, "epochs": {"low": 1, "high": 3}}
    study, drawn = new_study(), []
    for space, wanted in ((parameters, 3), (dict(reversed(parameters.items())), 99)):
        recipe = make_recipe(99, space=space, baselines={}, sampler={"name": "grid"})
        drawn += told(study, recipe, lambda values: {"value": 0.0}, wanted=wanted)
    assert len({json.dumps(values, sort_keys=True) for values in drawn}) == len(drawn) == 6


def test_of_choices_another_value_is_none():
    assert is_within(distribution(CategoricalParameter(choices=[0.25, 1])), 1.0)
    assert not is_within(distribution(CategoricalParameter(choices=[0.25, 1])), 0.2)


def test_a_warm_start_that_a_sampler_does_not_use_is_told():
    for name in ("tpe", "gp", "nsga2", "qmc", "random"):
        recipe = recipe_for(name, warm_start=["/studies/other"])
        told = any("search.warm_start has no effect" in line for line in rules.warnings(recipe))
        assert told == (name not in ("tpe", "gp"))


def test_what_a_pareto_search_tells_besides_its_trials_takes_no_place_in_the_sequence():
    recipe = recipe_for("qmc", sampler={"seed": 3})
    alone = told(new_study(), recipe, lambda values: {"value": 0.0}, wanted=6)
    study = new_study()
    first = told(study, recipe, lambda values: {"value": 0.0}, wanted=3)
    study.add_trial(optuna.trial.create_trial(value=0.0, params={}, distributions={}))
    assert first + told(study, recipe, lambda values: {"value": 0.0}, wanted=3) == alone


def test_enqueued_values_that_are_added_to_a_study_are_tried_next():
    entries = [{"kl_weight": 2.0}, {"kl_weight": 2.0}]  # with another learning rate each
    recipes = [
        make_recipe(6, space=NUMBERS, baselines={}, enqueue=each) for each in (entries, [{"kl_weight": 1.0}, *entries])
    ]
    study, drawn = new_study(), []
    for recipe, wanted in zip(recipes, (3, 2), strict=True):
        drawn += told(study, recipe, lambda values: {"value": 0.0}, wanted=wanted)
    assert [values["kl_weight"] for values in drawn][:2] == [2.0, 2.0]
    assert drawn[3]["kl_weight"] == 1.0
    assert len([trial for trial in study.trials if POINT in trial.user_attrs]) == 3


DATA = make_recipe().model_dump(mode="json")["data"]


def drawn_when(condition, parameter="kl_weight"):
    form = CHOICE["decay"] if parameter == "decay" else {"low": 0.1, "high": 1}
    return {"space": {**CHOICE, "head_bias": {"choices": [True, False]}, parameter: {**form, "when": condition}}}


def tried(entry):
    parameters = {
        "kl_weight": {"low": 0, "high": 1, "step": 0.1},
        "epochs": {"low": 1, "high": 9},
        **CHOICE,
        "crop_scale": {"low": 0.5, "high": 1, "when": {"decay": "matrices"}},
    }
    return {"space": parameters, "enqueue": [entry]}


CASES = [  # a part of a recipe, and how its one message begins
    ({"sampler": {"name": "random", "startup_trials": 3}}, "sampler.startup_trials: unknown key (allowed: seed, name)"),
    ({"sampler": {"group": True, "multivariate": False}}, "sampler: group: true needs multivariate: true, but got"),
    (
        {"sampler": {"name": "grid"}, "space": {"kl_weight": {"low": 0, "high": 1}}},
        "space.kl_weight: must have a step for the grid\n    Give kl_weight a step, or choices: [...], or another",
    ),
    (drawn_when({"deacy": "all"}), "space.kl_weight.when.deacy: must be a categorical parameter of search.space, but"),
    (drawn_when({"decay": ["matrx"]}), "space.kl_weight.when.decay: must be among the choices of decay, but got"),
    (drawn_when({"head_bias": 1}), "space.kl_weight.when.head_bias: must be among the choices of head_bias, but got 1"),
    (drawn_when({"decay": "all"}, "decay"), "space.decay.when: conditions must not form a cycle, but got decay -> de"),
    (drawn_when(5), "space.kl_weight.when: must be a mapping of keys to values, but got 5"),
    (drawn_when({"decay": []}), "space.kl_weight.when.decay: must be a value of the other parameter, or a list of"),
    (
        {"alpha": {"mode": "sample"}, **drawn_when({"decay": "all"}, "alpha")},
        "space.alpha.when: alpha must be drawn in every trial",
    ),
    (tried({"kl_weigth": 0.5}), 'enqueue.0.kl_weigth: must be a parameter of search.space, but got "kl_weigth"; did'),
    (tried({"kl_weight": 0.55}), "enqueue.0.kl_weight: must be a number from 0.0 to 1.0 in steps of 0.1, but got 0.55"),
    (tried({"epochs": True}), "enqueue.0.epochs: must be a number from 1 to 9 in steps of 1, but got true"),
    (tried({"decay": "matrix"}), 'enqueue.0.decay: must be one of the choices, but got "matrix"; did you mean'),
    (tried({"crop_scale": 0.9}), "enqueue.0.crop_scale: crop_scale is drawn under a condition, which the entry must"),
    (tried({}), "enqueue.0: must contain a value of at least one parameter, but got {} (allowed: kl_weight, epochs"),
    ({**tried({}), "trials": 1, "enqueue": 2 * [{"epochs": 1}]}, "enqueue: must be at most as many as search.trials"),
    (tried(5), "enqueue.0: must be a mapping of keys to values, but got 5"),
]


@pytest.mark.parametrize(("search", "message"), CASES, ids=[message.partition(",")[0] for _, message in CASES])
def test_what_a_sampler_a_condition_or_an_entry_cannot_be_is_one_message(search, message):
    with pytest.raises(RecipeError) as caught:
        recipe_of({"data": DATA, "search": search})
    [problem] = caught.value.problems
    assert str(problem).startswith(f"search.{message}")
