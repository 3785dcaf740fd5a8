"""The benchmarks' arguments, verdicts and numbers on made-up data, and how the sandbox's weights are made."""

import importlib
import json
import math
import re
from pathlib import Path

import numpy as np
import open_clip
import pytest
import torch
from PIL import Image
from stand_in import make_recipe
from study_steps import finish, searching
from torch.nn import functional

from benchmarks import (
    acceptance,
    effect,
    gpu,
    pairs,
    photos,
    pretrain,
    rows,
    speed_engine,
    speed_methods,
    speed_sets,
    speed_views,
    statistics,
    table,
)
from benchmarks import landscape as landscapes
from benchmarks import methods as compared
from carft_ray import model
from carft_ray.data.cached_sets import Keeping, image_set
from carft_ray.data.sandbox import DOMAINS, TEMPLATES, render
from carft_ray.data.selection import stored_source
from carft_ray.data.sets import list_set
from carft_ray.recipe.loading import load_recipe
from carft_ray.recipe.schema.data import FolderSet
from carft_ray.study.journal import trial_name
from carft_ray.study.snapshot import snapshot
from carft_ray.training.loop import same_attention


def right(accuracy, num_seeds, num_images=200):
    """Correctness with exactly this accuracy in every seed, the same images right in all seeds."""
    return np.tile(np.arange(num_images) < round(accuracy * num_images), (num_seeds, 1))


def methods(car_id, car_ood):
    def of(id_accuracy, ood_accuracy, num_seeds):
        ood = {name: right(ood_accuracy, num_seeds) for name in ("sketch", "cartoon")}
        return {"id_test": right(id_accuracy, num_seeds), **ood}

    return of(0.70, 0.68, 1), of(0.80, 0.55, 5), of(car_id, car_ood, 5)


def test_verdicts_pass_at_the_threshold_and_fail_just_below_or_without_a_number():
    gain = acceptance.Threshold("gain", "a gain", 0.03, 0.08)
    thresholds = [gain, acceptance.Threshold("ratio", "a ratio", 3.0, points=False)]
    lines, passed = acceptance.verdicts({"gain": 0.03, "ratio": 3.0}, thresholds)
    assert passed
    assert lines[0] == "PASS  a gain: +3.0 points (at least +3.0 points, aim +8.0 points)"
    lines, passed = acceptance.verdicts({"gain": 0.0299, "ratio": math.nan}, thresholds)
    assert not passed
    assert [line[:4] for line in lines] == ["FAIL", "FAIL"]


def test_effect_numbers_of_made_up_methods():
    numbers = acceptance.effect_numbers(acceptance.effect_intervals(*methods(car_id=0.79, car_ood=0.65)))
    assert numbers["plain_id_gain"] == pytest.approx(0.10)
    assert numbers["plain_ood_loss"] == pytest.approx(0.13)
    assert numbers["car_ft_ood_change"] == pytest.approx(-0.03)
    assert numbers["car_ft_id_gain"] == pytest.approx(0.09)
    assert 0.06 < numbers["ood_gain_low"] < 0.10  # 0.10 less the image error of two sets
    assert acceptance.verdicts(numbers, [t for t in acceptance.THRESHOLDS if t.text[0] in "134"])[1]
    without = acceptance.effect_numbers(acceptance.effect_intervals(*methods(car_id=0.80, car_ood=0.55)))
    assert not acceptance.verdicts(without, [acceptance.THRESHOLDS[0]])[1]


def test_spread_is_measured_in_pooled_seed_deviations():
    numbers = acceptance.spread_numbers([0.50, 0.52, 0.54], [[0.50, 0.502, 0.504], [0.6, 0.6, 0.6]])
    assert (numbers["spread_sd"], numbers["seed_sd"]) == pytest.approx((0.02, 0.002 / math.sqrt(2)))
    assert numbers["spread_ratio"] == pytest.approx(10 * math.sqrt(2))


def test_role_numbers_where_the_objective_chooses_right_and_id_chooses_wrong():
    def stacked(**sets):
        return {name: np.concatenate([right(a, 1) for a in values]) for name, values in sets.items()}

    validation = stacked(id_val=[0.7, 0.8, 0.9], noisy=[0.6, 0.8, 0.2])
    test = stacked(id_test=[0.7, 0.8, 0.9], sketch=[0.6, 0.7, 0.3])
    numbers = acceptance.role_numbers(validation, test, {"id_val": 0.5, "noisy": 0.5}, {"id_test": 0.5, "sketch": 0.5})
    assert numbers["role_correlation"] == pytest.approx(1.0)
    assert (numbers["regret_objective"], numbers["regret_gap"]) == pytest.approx((0.0, 0.15))
    assert 0 < numbers["regret_gap_se"] < 0.05


@pytest.mark.slow
def test_false_claims_of_simulated_tests_stay_rare_and_real_gains_are_found():
    checks, lines = statistics.claim_checks(np.random.default_rng(0), 100, num_trials=10)
    assert len(checks) == 11 + 1 + 4
    for check in checks:  # two Monte Carlo standard errors of a coverage beside the bounds of the 4,000 studies
        assert check.least - 0.05 <= check.value <= check.most, check.line()
    one, two = ([float(share) for share in re.findall(r"([\d.]+) with", line)] for line in lines[:2])
    assert max(one) < max(two)
    assert two[0] < two[-1]  # three and five seeds


def test_plan_has_paired_seeds_and_no_training_twice():
    plans = effect.first_plan(load_recipe(effect.RECIPE))
    counts = {"random": 30, "rates": 5, "repeats": 12, "plain": 5, "CAR-FT": 5}
    assert {name: len(part) for name, part in plans.items()} == counts
    for seed, (plain, car_ft) in enumerate(zip(plans["plain"], plans["CAR-FT"], strict=True), start=1):
        assert {**plain.values, "kl_weight": None} == {**car_ft.values, "kl_weight": None}
        assert (plain.values["kl_weight"], car_ft.values["kl_weight"], plain.values["seed"]) == (0, 10, seed)
    folders = [planned.folder_name for part in plans.values() for planned in part]
    assert len(set(folders)) == len(folders)
    assert all(re.fullmatch(r"[a-z0-9.-]+", folder) for folder in folders)


def test_each_command_says_what_it_is_and_stands_in_the_readme(capsys):
    folder = Path(effect.__file__).parent
    commands = {path.stem for path in folder.glob("*.py") if "__main__" in path.read_text()}
    assert commands == {*re.findall(r"(?m)^\| `python -m benchmarks\.(\w+)` \|", (folder / "README.md").read_text())}
    for name in commands:
        with pytest.raises(SystemExit) as left:
            importlib.import_module(f"benchmarks.{name}").main(["--help"])
        assert left.value.code == 0
        assert f"usage: python -m benchmarks.{name} " in capsys.readouterr().out


def test_a_recipe_that_cannot_be_compared_ends_before_anything_is_trained(tmp_path, capsys):
    changed = ["search.space.learning_rate=null", "data.id_test=null"]
    words = [word for setting in changed for word in ("--set", setting)]
    words += ["--again", "0"]
    assert compared.main([str(effect.RECIPE), "--methods", "fine_tuning", "--out", str(tmp_path / "out"), *words]) == 2
    told = capsys.readouterr().err
    assert "besides those of methods" in told
    assert "--again" in told
    assert "data.id_test" in told
    assert not (tmp_path / "out").exists()


def test_searches_are_compared_at_equal_id_accuracies(tmp_path):
    """The highest OOD accuracy on a front at each level: none that lies between two points is made up."""
    curves = {"fine_tuning": [(0.5, 0.4), (0.72, 0.5), (0.8, 0.3)], "other": [(0.5, 0.4), (0.75, 0.35), (0.75, 0.2)]}
    for name, curve in curves.items():
        points = [
            {"alpha": alpha, "objective": (left + right) / 2, "id_accuracy": left, "ood_accuracy": right}
            for alpha, (left, right) in zip((0.0, 0.5, 1.0), curve, strict=True)
        ]
        with searching(tmp_path / name, make_recipe(1)) as study:
            while (spec := study.next()) is not None:
                finish(study, spec, points[1]["objective"], alpha=0.5, curve=points)
    fronts, levels, table = compared.equal_id({name: tmp_path / name for name in curves})
    assert fronts == {"fine_tuning": [(0.72, 0.5), (0.8, 0.3)], "other": [(0.5, 0.4), (0.75, 0.35)]}
    assert levels == pytest.approx([0.71, 0.74, 0.77])
    assert [row.split(" | ")[1:] for row in table[2:]] == [["50.0", "30.0", "30.0 |"], ["35.0", "35.0", "- |"]]


@pytest.mark.slow
def test_a_written_study_is_as_a_searched_one_and_goes_on(tmp_path):
    """One real trial, then copies of its lines: all are read, all have folders, and the sampler takes them."""
    speed_engine.fill(tmp_path / "study", 6)
    rows = snapshot(tmp_path / "study").trials
    assert [(row.number, row.outcome) for row in rows] == [(number, "complete") for number in range(6)]
    assert len({row.values["learning_rate"] for row in rows}) == 6
    assert [row.name for row in rows] == [trial_name(row.number, row.values) for row in rows]
    assert [row.objective for row in rows] == [speed_engine.objective_of(row.values["learning_rate"]) for row in rows]
    assert {path.name for path in tmp_path.glob("study/trials/*")} == {row.name for row in rows}
    cost = speed_engine.study_cost(tmp_path / "other", 6, num_asked=2, commands={})
    assert [row.outcome for row in snapshot(tmp_path / "other").trials] == ["complete"] * 8
    assert min(cost.log_mb, cost.ask_ms, cost.tell_ms, cost.open_s, cost.memory_mb) > 0
    cost = speed_engine.driver_cost(tmp_path / "driver", num_finished=3, num_live=4, num_reports=5, num_seconds=1)
    assert min(cost.read_ms, cost.read_share, cost.view_ms, cost.view_share) > 0


@pytest.mark.whole
def test_steps_and_memory_of_methods_are_compared_with_plain_fine_tuning():
    few = ["data.train.num_per_class=8"]
    found = {row.name: row for row in speed_methods.method_rows(1, 2, few, ("fine_tuning", "lp_ft"))}
    others = ("lp_ft", "car_ft, targets stored")
    step, memory = "step of fine_tuning, ms, batch 64", "memory of a training of fine_tuning, MB"
    ratios = [f"{what} of {name} / of fine_tuning" for what in ("step", "memory") for name in others]
    assert [*found] == [step, *ratios[:2], memory, *ratios[2:]]
    assert min(row.value for row in found.values()) > 0
    assert found[ratios[0]].detail.startswith("before it a linear probe of ")


@pytest.mark.whole
def test_a_pass_of_each_side_gives_every_image_and_reading_is_measured(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", "")  # the reading sets it
    root = tmp_path / "images" / "photo"
    photos.write_tree(root, 16, 40, 30)
    spec = FolderSet(source="folder", path=str(tmp_path / "images"), domains=("photo",))
    source = stored_source(list_set(spec, "train"), spec, photos.CLASSES, "train")
    images = image_set(source, None, "as-is", Keeping(tmp_path / "cache"))
    passes = [speed_views.folder_pass(root, 5, 0, training, to_floats) for training in (0, 1) for to_floats in (0, 1)]
    passes += [speed_views.evaluation_pass(images, 5, to_floats) for to_floats in (False, True)]
    passes += [speed_views.training_pass(source, 5, workers) for workers in (0, 1)]
    assert [one_pass() for one_pass in passes] == [16] * 8
    assert min(speed_views.read_times(source, tmp_path / "cache", 1).values()) > 0
    for sides in ((speed_sets.one_pass, speed_sets.plain_loop), (speed_sets.decoded_set, speed_sets.with_one_thread)):
        assert speed_sets.ratio_row("ratio", source, sides, 1, None).value > 0
    speed_sets.write(tmp_path / "kinds", 30, 100, 3)
    found = [speed_sets.read(str(tmp_path / "kinds"), kind) for kind in speed_sets.KINDS]
    found.append(rows.apart(speed_sets.read, str(tmp_path / "kinds"), "shards"))
    assert all(min(each["in_order"], each["at_random"], each["index_s"]) > 0 for each in found)


def test_operations_of_a_tower_are_those_that_torch_counts():
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils.flop_counter import FlopCounterMode

    tower = gpu.TOWERS["tiny"]
    visual = open_clip.CLIP(**gpu.TINY).visual.eval()
    plain = sdpa_kernel(SDPBackend.MATH)  # of attention in one piece it counts nothing on a CPU
    with FlopCounterMode(display=False) as counter, torch.no_grad(), same_attention(), plain:
        visual(torch.zeros(1, 3, tower.image_size, tower.image_size))
    assert counter.get_total_flops() == gpu.num_operations(tower)
    assert gpu.num_operations(gpu.TOWERS["ViT-B-16"]) == pytest.approx(35.1e9, rel=1e-3)


@pytest.mark.whole
@pytest.mark.skipif(torch.cuda.is_available(), reason="measures that card, for minutes")
def test_the_gpu_benchmark_runs_without_one(capsys, monkeypatch):
    monkeypatch.setattr(gpu, "has_compiler", lambda device: False)  # which takes a minute
    assert gpu.main(["--threads", "1", "--json"]) == 0
    out, err = capsys.readouterr()
    found = json.loads(out)
    assert [cell["what"] for cell in found["cells"]] == ["input", "step", "both", "step", "both"]
    assert all(cell["images_per_s"] > 0 and not cell["error"] for cell in found["cells"])
    assert 0 <= found["kl"]["fp32"] < 2e-4
    assert "No number means anything" in err


def test_the_spline_through_the_table_foretells_trainings_that_it_has_not_seen():
    landscape = landscapes.read_landscape(table.TABLE, load_recipe(table.RECIPE))
    assert landscape.cv_correlation > 0.6
    values = {"learning_rate": 1e-3, "kl_weight": 1.0}
    training = landscape.training(values)
    assert training.objectives == pytest.approx((training.id_accuracies + training.ood_accuracies) / 2)
    assert landscape.objective(values, 0.1) == max(training.objectives[1:])


def test_true_templates_name_what_is_seen_and_hide_what_is_not():
    for domain in DOMAINS:
        shown = render(domain, "train", "moon", 1)[1]
        captions = {TEMPLATES[i] for i in pretrain.true_templates(shown)}
        assert {DOMAINS[domain], "a picture of a {}"} <= captions
        assert len(captions & set(DOMAINS.values())) == 1
        assert (f"a {shown.figure_colour} {{}}" in captions) == (domain not in {"negative", "silhouette"})
        assert (f"a {{}} on a {shown.ground_colour} ground" in captions) == (domain not in {"negative", "sketch"})


def test_contrastive_loss_is_the_loss_of_clip_when_no_caption_is_shared():
    generator = torch.Generator().manual_seed(0)
    images, texts = (functional.normalize(torch.randn(7, 5, generator=generator), dim=1) for _ in range(2))
    expected = open_clip.ClipLoss()(images, texts, torch.tensor(20.0))
    torch.testing.assert_close(pretrain.contrastive_loss(20.0 * images @ texts.T, torch.arange(7)), expected)


def test_packaged_weights_are_small_and_belong_to_the_code_that_makes_them():
    weights = Path(model.__file__).parent / "sandbox_weights"
    assert sum(path.stat().st_size for path in weights.iterdir()) <= 10_000_000
    config = json.loads((weights / "open_clip_config.json").read_text())
    assert config == {"model_cfg": pretrain.MODEL_CONFIG, "preprocess_cfg": pretrain.PREPROCESS_CONFIG}


@pytest.mark.whole
def test_pretraining_writes_a_model_that_open_clip_opens_and_repeats_bit_for_bit(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(pretrain, "_NUM_PICTURES", 192)
    monkeypatch.setattr(pretrain, "_BATCH_SIZE", 16)
    for name in ("a", "b"):
        assert effect.main(["--pretrain", str(tmp_path / name), "--steps", "10"]) == 0
    first, second = ((tmp_path / name / "open_clip_model.safetensors").read_bytes() for name in ("a", "b"))
    assert first == second
    assert "step 10/10  loss " in capsys.readouterr().out
    open_clip.create_model_and_transforms(f"local-dir:{tmp_path / 'a'}")


def test_copies_of_images_are_counted_and_pairs_that_are_none_are_judged(tmp_path, capsys):
    names = [f"photo/cat/{index}.{'jpg' if index % 2 else 'png'}" for index in range(4)]
    for index, name in enumerate(names):
        path = tmp_path / "images" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(photos.photo(index // 2, 80, 70)).save(path)
    rows = [(names[0], names[1], "yes"), (names[0], names[2], "no")]
    labels = tmp_path / "pairs.csv"
    labels.write_text("\n".join(map(",".join, [("first", "second", "same_picture"), *rows])))
    pairs.main([str(tmp_path / "images"), str(labels), "--copies", "2"])
    shown = capsys.readouterr().out
    assert "pairs marked 'yes': 1 of 1 found\npairs marked 'no': 0 of 1 found\npass: 4 images" in shown
    assert shown.splitlines()[-1].startswith(" | photo | 100.0 | 100.0 | 100.0 | 100.0 | 100.0 | ")
    labels.write_text(labels.read_text().replace("yes", "no"))
    assert pairs.main([str(tmp_path / "images"), str(labels), "--copies", "0"]) == 1
