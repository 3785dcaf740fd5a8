"""How the image tower trains: layer-wise learning rates, frozen layers, LoRA, averages, checkpointing, BatchNorm."""

import contextlib
import dataclasses
import functools
import itertools
import math
import shutil
import socket

import numpy as np
import open_clip
import pytest
import short_training
import torch
import torch.nn.functional as F
from conftest import CLASS_WORDS, TEMPLATES, ArraySource
from open_clip.timm_model import TimmModel
from stand_in import make_recipe
from test_loop import CPU, largest_difference, plain_fine_tuning, settings, without_speed
from timm.optim import param_groups_layer_decay
from tiny import CONFIG, make_tiny_clip
from torch.utils._python_dispatch import TorchDispatchMode

from carft_ray.data.source import ImageSet
from carft_ray.errors import OutOfMemoryError, RecipeError, StorageError
from carft_ray.launch import micro_batch
from carft_ray.launch.micro_batch import fitted, memory_failure, note
from carft_ray.launch.runs.single import train_once
from carft_ray.model import tower
from carft_ray.model.classifier import build_classifier
from carft_ray.model.clip import wrap_model
from carft_ray.model.heads import build_heads
from carft_ray.model.lora import merged_state, plain_name, trained_weights
from carft_ray.model.mixing import mix_weights
from carft_ray.model.tower import layer_factors, layer_groups, num_trained, recipe_problems, shape_tower, tower_problems
from carft_ray.recipe.loading import load_recipe
from carft_ray.results.reading.trained import evaluate_trained, open_trained
from carft_ray.training import run
from carft_ray.training.checkpoint import newest_checkpoint
from carft_ray.training.evaluate import Mixtures, predict, predict_all
from carft_ray.training.loop import StoppedRun, fine_tune
from carft_ray.training.optimizer import build_optimizer, set_learning_rate
from carft_ray.training.run_context import RunContext
from carft_ray.training.shared_inputs import SharedInputs

pytestmark = pytest.mark.slow

NUM_LAYERS = 4  # of the tiny tower: stem, two blocks, projection
MATRICES = ("attn.in_proj_weight", "attn.out_proj.weight", "mlp.c_fc.weight", "mlp.c_proj.weight")


RESNET = {"layers": [1, 1, 1, 1], "width": 8, "image_size": 32, "head_width": 64}


def make_resnet_clip(dtype=torch.float32):
    """A CLIP with BatchNorm: OpenAI's ResNet, 32 x 32 pixels, random weights, statistics other than those of data."""
    torch.manual_seed(0)
    config = {**CONFIG, "vision_cfg": RESNET}
    model = open_clip.CLIP(**config)
    with torch.no_grad():
        model.logit_scale.fill_(math.log(20.0))
    open_clip.set_model_preprocess_cfg(model, {**vars(open_clip.transform.PreprocessCfg()), "size": 32})
    return wrap_model(model.to(dtype), open_clip.SimpleTokenizer(context_length=16), config)


@pytest.fixture(scope="module")
def resnet_clip():
    return make_resnet_clip()


def classifier_of(clip, heads, train, shaped=True):
    classifier = build_classifier(clip, heads[0], train, CPU)
    if shaped:
        shape_tower(classifier, train)
    return classifier


def moved(clip, heads, state, train):
    """Names of the tensors of a fine-tuned state that are not those of the start."""
    start = classifier_of(clip, heads, train, shaped=False).state()
    assert state.keys() == start.keys()
    return {name for name in start if not torch.equal(start[name], state[name])}


# ---- layer-wise learning rates


@pytest.mark.parametrize("name", ["test_vit", "test_convnext", "test_resnet"])
def test_layer_decay_is_that_of_timm_below_one_more_layer_the_class_head(name):
    visual = TimmModel(name, embed_dim=16, image_size=160, pool="avg", proj="linear")
    ours = layer_factors(visual, 0.7)
    theirs = param_groups_layer_decay(visual.trunk, weight_decay=0.0, layer_decay=0.7)
    scales = {id(p): group["lr_scale"] for group in theirs for p in group["params"]}
    trunk = {name: scales[id(p)] for name, p in visual.named_parameters() if name.startswith("trunk.")}
    depth = max(trunk.values()) / max(ours[name] for name in trunk)  # timm counts from the head of its own
    assert ours == pytest.approx({**{k: v / depth for k, v in trunk.items()}, "head.proj.weight": 0.7})


def test_the_first_update_of_a_layer_is_its_factor_times_that_with_one_learning_rate(clip64, heads64, source):
    values = {"precision": "fp64", "epochs": 1, "batch_size": 40, "warmup_steps": 0, "weight_decay": 0.0}
    start = classifier_of(clip64, heads64, settings(**values)).state()
    one, decayed = (fine_tune(clip64, *heads64, source, settings(**values, layer_decay=x)) for x in (1.0, 0.5))
    layers = [[f"visual.{name}" for name in layer] for layer in layer_groups(clip64.model.visual)] + [["class_head"]]
    assert len(layers) == NUM_LAYERS + 1
    for index, layer in enumerate(layers):
        for name in layer:
            expected = 0.5 ** (NUM_LAYERS - index) * (one[name] - start[name])
            torch.testing.assert_close(decayed[name] - start[name], expected, rtol=1e-6, atol=1e-12)


def test_without_layer_decay_and_frozen_layers_the_groups_are_those_of_a_plain_optimizer(tiny_clip, heads):
    classifier = classifier_of(tiny_clip, heads, settings())
    groups = build_optimizer(classifier, settings()).param_groups
    assert [len(group["params"]) for group in groups] == [len(list(classifier.visual.parameters())), 1]
    assert all(group["lr_factor"] == 1.0 for group in groups)
    spared = build_optimizer(classifier, settings(decay="matrices", layer_decay=0.5)).param_groups
    assert {(g["lr_factor"], g["weight_decay"]) for g in spared[:-1]} >= {(0.0625, 0.1), (0.0625, 0.0), (0.5, 0.1)}


# ---- frozen layers


@pytest.mark.parametrize("number", [1, 3, 4])
def test_frozen_layers_keep_their_weights_and_have_no_gradient(tiny_clip, heads, source, number):
    train = settings(freeze_layers=number)
    layers = [{f"visual.{name}" for name in layer} for layer in layer_groups(tiny_clip.model.visual)]
    frozen, free = set().union(*layers[:number]), set().union(*layers[number:], {"class_head"})
    assert moved(tiny_clip, heads, fine_tune(tiny_clip, *heads, source, train), train) == free
    classifier = classifier_of(tiny_clip, heads, train).train()
    classifier(torch.from_numpy(source.images))[1].sum().backward()
    assert {name for name, p in classifier.named_parameters() if p.grad is None} == frozen
    in_optimizer = sum(len(group["params"]) for group in build_optimizer(classifier, train).param_groups)
    assert in_optimizer == len(free)


def test_with_all_layers_frozen_the_class_head_alone_trains_as_a_linear_probe(clip64, heads64, source):
    train = settings(freeze_layers=NUM_LAYERS, kl_weight=0.0, precision="fp64")
    mine = fine_tune(clip64, *heads64, source, train)
    reference = plain_fine_tuning(clip64, heads64[0], source, train, tower_trains=False)
    assert largest_difference(mine, reference) < 1e-12


# ---- LoRA


def test_lora_starts_as_the_zero_shot_model_bit_for_bit(tiny_clip, heads, source):
    pixels = torch.from_numpy(source.images)
    train = settings(lora_rank=4)
    plain, corrected = (classifier_of(tiny_clip, heads, train, shaped).eval() for shaped in (False, True))
    assert largest_difference(plain.state(), corrected.state()) == 0.0
    with torch.no_grad():
        assert torch.equal(plain(pixels)[1], corrected(pixels)[1])
    rows = []
    context = RunContext(report=rows.append)
    fine_tune(tiny_clip, *heads, source, settings(lora_rank=4, epochs=1, batch_size=40), context)
    assert abs(rows[0]["kl"]) <= 2e-4  # of the rounded targets


def test_lora_moves_the_matrices_of_the_blocks_alone_by_its_rank(tiny_clip, heads, source):
    train = settings(lora_rank=2, freeze_layers=2)  # of the blocks the second alone
    state = fine_tune(tiny_clip, *heads, source, train)
    expected = {f"visual.transformer.resblocks.1.{name}" for name in MATRICES}
    assert moved(tiny_clip, heads, state, train) == {*expected, "class_head"}
    start = classifier_of(tiny_clip, heads, train, shaped=False).state()
    for name in expected:
        singular = torch.linalg.svdvals((state[name] - start[name]).double())
        assert singular[2] < 1e-5 * singular[0], name


def test_lora_gradients_are_those_of_the_whole_matrix_seen_through_the_correction(clip64, heads64, source):
    pixels, labels = torch.from_numpy(source.images), torch.from_numpy(source.labels)
    train = settings(lora_rank=3, lora_alpha=6.0, precision="fp64")
    plain, corrected = (classifier_of(clip64, heads64, train, shaped) for shaped in (False, True))
    for classifier in (plain, corrected):
        F.cross_entropy(classifier(pixels)[1], labels).backward()
    whole = dict(plain.named_parameters())
    names = [name for name, _ in corrected.named_parameters() if name.endswith(".B")]
    assert len(names) == 2 * len(MATRICES)
    for name in names:
        factor_A = corrected.get_parameter(f"{name[:-1]}A")
        expected = 2 * whole[plain_name(name)].grad @ factor_A.T
        torch.testing.assert_close(corrected.get_parameter(name).grad, expected, rtol=1e-9, atol=1e-12)


def test_no_matrix_of_an_mlp_is_made_anew_or_has_a_gradient_with_lora(tiny_clip, heads, source):
    classifier = classifier_of(tiny_clip, heads, settings(lora_rank=3))
    widths = {tuple(p.shape) for name, p in classifier.named_parameters() if ".mlp." in name and p.ndim == 2}
    made = set()

    class Shapes(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            found = function(*args, **(kwargs or {}))
            if isinstance(found, torch.Tensor) and not function.is_view:
                made.add(tuple(found.shape))
            return found

    with Shapes():
        classifier(torch.from_numpy(source.images[:7]))[1].sum().backward()
    whole = {shape for shape in widths if 3 not in shape}
    assert len(whole) == 2
    assert not whole & made
    assert (96, 32) in made  # of the attention, which reads its matrix


@pytest.mark.parametrize("alpha", [0.3, 1.0])
def test_alpha_scales_the_merged_correction(clip64, heads64, source, alpha):
    pixels, train = torch.from_numpy(source.images), settings(lora_rank=4, lora_alpha=8.0, precision="fp64")
    corrected, plain = (classifier_of(clip64, heads64, train, shaped).eval() for shaped in (True, False))
    start, generator = plain.state(), torch.Generator().manual_seed(1)
    factors = [p for name, p in corrected.named_parameters() if name.endswith(".B")]
    for factor in factors:
        factor.data = 0.05 * torch.randn(factor.shape, generator=generator, dtype=factor.dtype)
    plain.load_state_dict(mix_weights(start, corrected.state(), alpha))
    for factor in factors:
        factor.data *= alpha
    with torch.no_grad():
        torch.testing.assert_close(plain(pixels)[1], corrected(pixels)[1], rtol=0, atol=1e-10)  # logits up to 20
        torch.testing.assert_close(plain.features(pixels), corrected.features(pixels), rtol=0, atol=1e-12)
    assert largest_difference(plain.state(), corrected.state()) < 1e-12


def test_lora_adapts_the_linear_layers_of_a_timm_tower():
    visual = TimmModel("test_vit", embed_dim=16, image_size=160, pool="avg", proj="linear")
    names = set(dict(visual.named_parameters()))
    train = settings(lora_rank=4, layer_decay=0.5)
    classifier = open_classifier(visual)
    shape_tower(classifier, train)
    assert {f"visual.{name}" for name in names} | {"class_head"} == merged_state(classifier).keys()
    trained = trained_weights(classifier)
    assert len(trained) == 6 * 4 + 1
    assert all(".blocks." in name for name in trained if name != "class_head")
    factors = {group["lr_factor"] for group in build_optimizer(classifier, train).param_groups}
    assert factors == {1.0, *(0.5 ** (8 - layer) for layer in range(1, 7))}


def open_classifier(visual):
    from carft_ray.model.classifier import ImageClassifier

    return ImageClassifier(visual, torch.eye(3, 16), 10.0, (0.5,) * 3, (0.5,) * 3)


# ---- the average over the steps


@pytest.mark.parametrize("decay", [0.0, 0.7])
def test_the_average_is_the_weighted_mean_of_the_weights_of_all_steps(clip64, heads64, source, decay):
    values = {"precision": "fp64", "batch_size": 40, "epochs": 6}  # a step is an epoch
    steps = [classifier_of(clip64, heads64, settings(**values)).state()]
    looks = []
    fine_tune(clip64, *heads64, source, settings(**values), on_epoch=lambda state, epoch: steps.append(state()) or {})
    train = settings(**values, ema_decay=decay)
    state = fine_tune(clip64, *heads64, source, train, on_epoch=lambda state, epoch: looks.append(state()) or {})
    for step, found in enumerate(looks, start=1):
        weights = [decay ** (step - index) for index in range(step + 1)]
        mean = {
            name: sum(w * each[name] for w, each in zip(weights, steps, strict=False)) / sum(weights) for name in state
        }
        assert largest_difference(found, mean) < 1e-12
        assert decay or largest_difference(found, steps[step]) == 0.0  # decay 0 is the last step, bit for bit
    assert largest_difference(state, looks[-1]) == 0.0


def test_the_average_of_lora_is_that_of_the_merged_weights(clip64, heads64, source):
    values = {"precision": "fp64", "batch_size": 40, "epochs": 2, "lora_rank": 4}
    steps = [classifier_of(clip64, heads64, settings(**values)).state()]
    fine_tune(clip64, *heads64, source, settings(**values), on_epoch=lambda state, epoch: steps.append(state()) or {})
    state = fine_tune(clip64, *heads64, source, settings(**values, ema_decay=0.5))
    mean = {name: (steps[0][name] + 2 * steps[1][name] + 4 * steps[2][name]) / 7 for name in state}
    assert largest_difference(state, mean) < 1e-12


# ---- all together: kills, workers

TOGETHER = {"lora_rank": 3, "lora_alpha": 1.5, "ema_decay": 0.8, "layer_decay": 0.7, "freeze_layers": 1}


def stopped_and_resumed(clip, heads, source, train, folder):
    rows, state, attempts = [], None, itertools.count(1)
    while state is None:
        asked = iter(range(100))
        context = RunContext(report=rows.append, should_stop=lambda asked=asked: next(asked) == 0)
        with contextlib.suppress(StoppedRun):
            state = fine_tune(clip, *heads, source, train, context, checkpoint_dir=folder, attempt=next(attempts))
    return state, rows


def test_stopping_and_resuming_ends_with_the_weights_and_looks_of_an_uninterrupted_run(
    tiny_clip, heads, source, tmp_path
):
    train, whole_rows = settings(**TOGETHER, epochs=2, batch_size=3), []
    whole = fine_tune(tiny_clip, *heads, source, train, RunContext(report=whole_rows.append))
    state, rows = stopped_and_resumed(tiny_clip, heads, source, train, tmp_path)
    assert largest_difference(whole, state) == 0.0
    assert [without_speed(row) for row in rows] == [without_speed(row) for row in whole_rows]
    folders = sorted(tmp_path.glob("attempt-*/step-*"))
    assert len(folders) == 2
    assert all((folder / "average.safetensors").exists() for folder in folders)


def test_a_damaged_or_lost_average_makes_the_checkpoint_before_it_serve(tiny_clip, heads, source, tmp_path):
    train = settings(ema_decay=0.9, epochs=3)
    fine_tune(tiny_clip, *heads, source, train, checkpoint_dir=tmp_path)
    path = sorted(tmp_path.glob("attempt-1/step-*"))[-1] / "average.safetensors"
    path.write_bytes(path.read_bytes()[:-1] + b"?")
    found, [problem] = newest_checkpoint(tmp_path)
    assert found.step == 4
    assert "average.safetensors" in str(problem)
    path.unlink()
    assert newest_checkpoint(tmp_path)[0].step == 4
    with pytest.raises(
        StorageError, match="must hold an average of the weights with ema_decay, and only then, but got one"
    ):
        fine_tune(tiny_clip, *heads, source, settings(epochs=2), checkpoint_dir=tmp_path)


# ---- gradient checkpointing


def test_gradient_checkpointing_keeps_less_and_changes_no_bit(clip64, heads64, source):
    states, kept = [], []
    for on in (False, True):
        train = settings(precision="fp64", grad_checkpointing=on)
        states.append(fine_tune(clip64, *heads64, source, train))
        kept.append(bytes_kept(classifier_of(clip64, heads64, train).train(), source))
    assert largest_difference(*states) == 0.0
    assert kept[1] < 0.5 * kept[0]


def bytes_kept(classifier, source):
    sizes = []

    def keep(tensor):
        sizes.append(tensor.numel() * tensor.element_size())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        classifier(torch.from_numpy(source.images))
    return sum(sizes)


def test_gradient_checkpointing_of_a_timm_tower_gives_the_gradients_of_none():
    pixels = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (2, 160, 160, 3), dtype=np.uint8))
    torch.manual_seed(0)
    visual = TimmModel("test_vit", embed_dim=16, image_size=160, pool="avg", proj="linear").double()
    gradients = []
    for on in (False, True):
        classifier = open_classifier(visual).double()
        shape_tower(classifier, settings(grad_checkpointing=on))
        F.cross_entropy(classifier(pixels)[1], torch.tensor([0, 2])).backward()
        gradients.append({name: p.grad for name, p in classifier.named_parameters()})
    assert largest_difference(*gradients) == 0.0


def test_a_micro_batch_that_fits_is_remembered_for_what_decides_over_memory(tmp_path):
    plain = make_recipe(1, train={"batch_size": 64})
    note(tmp_path, memory_failure(OutOfMemoryError("short", 64), plain, {}, 1))
    for values in ({"lora_rank": 4}, {"freeze_layers": 2}, {"ema_decay": 0.9}, {"compile": True}):
        other = plain.model_copy(update={"train": plain.train.model_copy(update=values)})
        assert fitted(other, tmp_path, 1).train.micro_batch is None
    assert fitted(plain, tmp_path, 1).train.micro_batch == 32


def test_a_micro_batch_that_fits_beside_another_training_is_not_that_of_a_whole_gpu(tmp_path, monkeypatch):
    monkeypatch.setattr(micro_batch, "_device", lambda recipe: "a GPU")
    whole, half = (make_recipe(1, train={"batch_size": 64}, resources={"gpus_per_worker": n}) for n in (1.0, 0.5))
    note(tmp_path, memory_failure(OutOfMemoryError("short", 64), half, {}, 1))
    assert fitted(whole, tmp_path, 1).train.micro_batch is None
    assert fitted(half, tmp_path, 1).train.micro_batch == 32


def test_a_micro_batch_that_fits_is_remembered_apart_for_gradient_checkpointing(tmp_path):
    short = OutOfMemoryError("short", 8)
    kept = make_recipe(2)
    checkpointed = kept.model_copy(update={"train": kept.train.model_copy(update={"grad_checkpointing": True})})
    failure = memory_failure(short, kept, {}, 1)
    assert failure.outcome == "memory"
    note(tmp_path, failure)
    assert fitted(kept, tmp_path, 1).train.micro_batch == 4
    assert fitted(checkpointed, tmp_path, 1) == checkpointed


@pytest.mark.parametrize("values", [{"lora_rank": 4}, {"freeze_layers": 2}, {"ema_decay": 0.9}])
def test_a_trial_for_which_no_image_fits_is_infeasible_where_its_values_decide_over_memory(tmp_path, values):
    assert memory_failure(OutOfMemoryError("short", 1), make_recipe(2), values, 1).outcome == "error"
    assert memory_failure(OutOfMemoryError("short", 1), make_recipe(2), {}, 1).outcome == "fatal"


# ---- mixtures


def image_set(size):
    source = ArraySource(num_images=11, size=size, seed=5)
    return ImageSet("id_val", source.images, source.labels, source.sample_ids)


@pytest.mark.parametrize("world_size", [2, 3, 12])
def test_the_parts_of_any_number_of_workers_are_one_table(resnet_clip, monkeypatch, world_size):
    classifier, images = classifier_of(resnet_clip, (torch.eye(5, 16),), settings()), image_set(32)
    whole, parts = predict(classifier, images, 0.5, 1, RunContext()), []
    monkeypatch.setattr("carft_ray.training.evaluate.gather", lambda context, part: parts.append(part) or [part])
    for rank in range(world_size):  # of 12 workers the last has no image
        predict(classifier, images, 0.5, 1, RunContext(rank, world_size))
    monkeypatch.setattr("carft_ray.training.evaluate.gather", lambda context, part: parts[::-1])
    assert predict(classifier, images, 0.5, 1, RunContext(0, world_size)).equals(whole)


def test_mixtures_are_those_of_mixed_states_and_leave_the_model_as_it_was(resnet_clip):
    heads = build_heads(resnet_clip.model, resnet_clip.tokenizer, CLASS_WORDS, TEMPLATES)
    source, sets, context = ArraySource(num_images=24, size=32), [image_set(32)], RunContext()
    tuned = [fine_tune(resnet_clip, *heads, source, settings(seed=seed)) for seed in (0, 1)]
    before = {name: tensor.clone() for name, tensor in resnet_clip.model.visual.state_dict().items()}
    mixtures = Mixtures(resnet_clip, heads[0], settings(), CPU)
    start = classifier_of(resnet_clip, heads, settings()).state()
    assert largest_difference(mixtures.zero_shot, start) == 0.0
    for state in (*tuned, tuned[0]):
        with mixtures.between(lambda state=state: state) as mixed:
            for alpha in (1.0, 0.4, 0.0, 0.4):  # an order leaves no trace
                by_hand = classifier_of(resnet_clip, heads, settings())
                by_hand.load_state_dict(mix_weights(start, state, alpha))
                assert largest_difference(by_hand.state(), mixed(alpha).state()) == 0.0
                table = predict_all(mixed(alpha), sets, alpha, 4, context)
                assert table.equals(predict_all(by_hand, sets, alpha, 4, context))
        assert largest_difference(mixtures.zero_shot, start) == 0.0
    assert largest_difference(before, resnet_clip.model.visual.state_dict()) == 0.0


def test_mixtures_have_no_weights_of_their_own_between_two_looks(tiny_clip, heads):
    def storages(tensors):
        return {tensor.untyped_storage().data_ptr() for name, tensor in tensors if name.startswith("visual.")}

    mixtures = Mixtures(tiny_clip, heads[0], settings(), CPU)
    shared = {each.untyped_storage().data_ptr() for each in tiny_clip.model.visual.state_dict().values()}
    with mixtures.between(lambda: mixtures.zero_shot) as mixed:
        classifier = mixed(0.5)
        assert not storages(classifier.named_parameters()) & shared
        assert mixed(1.0) is classifier
    assert storages(classifier.named_parameters()) <= shared


# ---- whole trainings: curve, evaluate, export


def train_once_with(folder, recipe_path, **values):
    always = [f"data.cache_dir={folder / 'cache'}", "train.epochs=2"]
    recipe = load_recipe(recipe_path, [*always, *(f"train.{key}={value}" for key, value in values.items())])
    out = folder / "-".join(values)
    train_once(recipe, out, False, "", str, lambda row: None, lambda row: None)
    return open_trained(out)


def test_what_lora_and_the_average_leave_are_plain_weights(tmp_path):
    path = short_training.make(tmp_path)
    trained = train_once_with(tmp_path, path, lora_rank=2, ema_decay=0.5, freeze_layers=1)
    start = classifier_of(trained.inputs.clip, (trained.class_head_CD,), settings()).state()
    assert trained.fine_tuned.keys() == start.keys()
    assert evaluate_trained(trained, trained.result["alpha"])[0] == trained.result["metrics"]


# ---- two workers


def work(rank, world_size, port, folder):
    """One gloo worker; module level, so that it can be started in a new process."""
    import torch.distributed as dist

    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"tcp://127.0.0.1:{port}", rank=rank, world_size=world_size)
    torch.save(trained_by(RunContext(rank=rank, world_size=world_size)), folder / f"{rank}.pt")
    dist.destroy_process_group()


def trained_by(context):
    clip = make_tiny_clip(dtype=torch.float64)
    heads = build_heads(clip.model, clip.tokenizer, CLASS_WORDS, TEMPLATES)
    values = {"precision": "fp64", "batch_size": 13, "micro_batch": 4, "grad_checkpointing": True}
    states = [
        fine_tune(clip, *heads, ArraySource(), settings(**values, **more), context)
        for more in (TOGETHER, {"freeze_layers": NUM_LAYERS, "ema_decay": 0.9})
    ]
    resnet = make_resnet_clip()
    classifier = classifier_of(resnet, (torch.eye(5, 16),), settings())
    table = predict_all(classifier, [image_set(32)] * 2, 0.5, 4, context)
    return [*states, {"prediction": torch.tensor(table["prediction"].to_pylist())}]


@pytest.mark.whole
def test_two_gloo_workers_end_with_the_weights_and_predictions_of_one(tmp_path):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    torch.multiprocessing.spawn(work, (2, port, tmp_path), nprocs=2)
    lora, probe_head, table = trained_by(RunContext())
    for rank in (0, 1):
        found = torch.load(tmp_path / f"{rank}.pt", weights_only=True)
        assert largest_difference(lora, found[0]) < 1e-9
        assert largest_difference(probe_head, found[1]) < 1e-9
        assert largest_difference(table, found[2]) == 0


# ---- what a GPU does


def test_a_tower_whose_weights_have_the_channels_last_trains_and_resumes_as_one_on_a_gpu(
    resnet_clip, source, tmp_path, monkeypatch
):
    heads = build_heads(resnet_clip.model, resnet_clip.tokenizer, CLASS_WORDS, TEMPLATES)
    train = settings(epochs=2, batch_size=20, learning_rate=1e-4, ema_decay=0.5)
    plain = fine_tune(resnet_clip, *heads, source, train)

    def turned(*given):
        return build_classifier(*given).to(memory_format=torch.channels_last)

    monkeypatch.setattr("carft_ray.training.loop.build_classifier", turned)
    whole = fine_tune(resnet_clip, *heads, source, train)
    weight = whole["visual.layer1.0.conv2.weight"]
    assert weight.is_contiguous(memory_format=torch.channels_last)
    assert not weight.is_contiguous()
    assert largest_difference(plain, whole) < 5e-4  # a few steps of Adam, some of which follow rounding
    stops = RunContext(should_stop=lambda: True)
    with pytest.raises(StoppedRun):
        fine_tune(resnet_clip, *heads, source, train, stops, checkpoint_dir=tmp_path)
    resumed = fine_tune(resnet_clip, *heads, source, train, checkpoint_dir=tmp_path, attempt=2)
    assert largest_difference(whole, resumed) == 0.0


# ---- torch.compile


@pytest.fixture
def without_compiler(monkeypatch, tmp_path):
    """torch finds no C++ compiler, and nothing that one has built."""
    import torch._inductor.config as inductor

    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    torch.compiler.reset()
    with inductor.patch({"cpp.cxx": (None, str(tmp_path / "nothing")), "fx_graph_cache": False}):
        yield
    torch.compiler.reset()


@pytest.mark.filterwarnings("ignore::DeprecationWarning:torch")
def test_a_compiled_tower_starts_at_kl_zero_and_trains_as_one_that_is_not(tiny_clip, heads, source, monkeypatch):
    # all but the last stage of the compiler: C++ for the tiny tower takes a minute
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))
    torch.compiler.reset()
    rows, states = [], []
    for on in (False, True):
        train = settings(compile=on, epochs=2, batch_size=40, warmup_steps=0, lora_rank=4)
        states.append(fine_tune(tiny_clip, *heads, source, train, RunContext(report=rows.append)))
    assert torch._dynamo.utils.counters["frames"]["ok"] > 0
    assert abs(rows[2]["kl"]) < 1e-6
    assert rows[3]["kl"] == pytest.approx(rows[1]["kl"], rel=1e-2)
    assert largest_difference(*states) < 2e-3  # Adam's first steps have the sign of a gradient that may be rounding
    torch.compiler.reset()


@pytest.mark.filterwarnings("ignore::DeprecationWarning:torch")
def test_one_shape_is_compiled_whatever_the_last_batch_and_micro_batch_hold(tiny_clip, heads, source, monkeypatch):
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))
    graphs = []
    for values in ({"batch_size": 40}, {"batch_size": 11}, {"batch_size": 13, "micro_batch": 4}, {"batch_size": 11}):
        torch._dynamo.utils.counters.clear()
        train = settings(compile=True, epochs=2, warmup_steps=0, **values)
        state = fine_tune(tiny_clip, *heads, source, train)
        graphs.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])
        plain = fine_tune(tiny_clip, *heads, source, train.model_copy(update={"compile": False}))
        assert largest_difference(plain, state) < 5e-3  # as above
    assert len(set(graphs)) == 1
    torch.compiler.reset()


@pytest.mark.whole
@pytest.mark.skipif(shutil.which("g++") is None, reason="needs a C++ compiler")
@pytest.mark.filterwarnings("ignore::DeprecationWarning:torch")
def test_a_compiled_training_resumes_bit_for_bit_before_a_smaller_batch(
    tiny_clip, heads, source, tmp_path, monkeypatch
):
    monkeypatch.setattr("carft_ray.training.loop.LOG_EVERY", 3)
    train = settings(compile=True, epochs=2, batch_size=12)  # 12, 12, 12, 4
    whole = fine_tune(tiny_clip, *heads, source, train)
    stops = RunContext(should_stop=lambda: True)
    with pytest.raises(StoppedRun, match="at step 3 of 8"):
        fine_tune(tiny_clip, *heads, source, train, stops, checkpoint_dir=tmp_path)
    resumed = fine_tune(tiny_clip, *heads, source, train, checkpoint_dir=tmp_path, attempt=2)
    assert largest_difference(whole, resumed) == 0.0
    torch.compiler.reset()


def test_auto_compiles_long_trainings_on_a_gpu_with_a_compiler(monkeypatch):
    gpu, cpu = torch.device("cuda"), torch.device("cpu")
    monkeypatch.setattr(tower, "has_compiler", lambda device: True)
    long, short = (settings(epochs=epochs, batch_size=100) for epochs in (10, 9))
    assert [tower.compiles(train, 9_901, gpu) for train in (long, short)] == [True, False]
    assert not tower.compiles(long, 9_901, cpu)
    for fixed in (True, False):
        assert tower.compiles(settings(compile=fixed), 100, cpu) is fixed
    monkeypatch.setattr(tower, "has_compiler", lambda device: False)
    assert not tower.compiles(long, 9_901, gpu)


def test_what_auto_means_is_decided_once_for_a_study(tiny_clip, source, tmp_path, monkeypatch):
    validation = (ImageSet("id_val", source.images, source.labels, source.sample_ids),)
    inputs = SharedInputs(tiny_clip, CLASS_WORDS, TEMPLATES, source, validation, {}, "key")
    recipe = make_recipe(1, train={"learning_rate": 1e-3, "batch_size": 10})
    for decides, key in ((True, "key"), (False, "key"), (False, "of another version")):
        monkeypatch.setattr(run, "compiles", lambda *given, decides=decides: decides)
        found = run.prepare(recipe, tmp_path, opened=dataclasses.replace(inputs, key=key))
        assert "compile" not in found
        assert run.is_compiled(recipe, tmp_path)
    explicit = recipe.model_copy(update={"train": recipe.train.model_copy(update={"compile": False})})
    assert not run.is_compiled(explicit, tmp_path)


@pytest.mark.filterwarnings("ignore::DeprecationWarning:torch")
def test_a_compiler_that_fails_is_found_out_and_named(without_compiler, caplog):
    assert not tower.has_compiler(torch.device("cpu"))
    (message,) = [record.getMessage() for record in caplog.records if record.name == tower.__name__]
    assert message.startswith("train.compile is off: torch cannot compile here: InvalidCxxCompiler")


@pytest.mark.filterwarnings("ignore::DeprecationWarning:torch")
def test_without_a_compiler_the_message_says_what_to_do(tiny_clip, heads, source, without_compiler):
    with pytest.raises(RecipeError) as caught:
        fine_tune(tiny_clip, *heads, source, settings(compile=True, batch_size=11))
    assert str(caught.value).startswith(
        "train.compile: must be false here: torch cannot compile the image tower, but got InvalidCxxCompiler"
    )
    assert "\n    Write train.compile: false, or give torch a C++ compiler" in str(caught.value)


# ---- what a tower cannot do

CANNOT = [
    (
        {"freeze_layers": 5},
        "train.freeze_layers: must be at most 4, the number of layers of the image tower, but got 5",
    ),
    (
        {"freeze_layers": 4, "head_lr_factor": 0.0},
        "train.freeze_layers: must be at most 3 with head_lr_factor 0, or nothing trains, but got 4",
    ),
    ({"lora_rank": 33}, "train.lora_rank: must be at most 32, the smallest side of a matrix, but got 33"),
    (
        {"lora_rank": 2, "freeze_layers": 3},
        "train.lora_rank: must be null with freeze_layers 3: no Linear layer is left in a block that trains, but got 2",
    ),
]
RESNET_CANNOT = [
    (
        {"lora_rank": 2},
        "train.lora_rank: must be null: the blocks of this image tower have no Linear layers, but got 2\n"
        "    train.freeze_layers trains a part of any tower.",
    ),
    (
        {"grad_checkpointing": True},
        "train.grad_checkpointing: must be false: this image tower has no gradient checkpointing, but got true\n"
        "    To need less memory, write a smaller train.micro_batch; the gradient stays the same.",
    ),
    (
        {"freeze_layers": 7},
        "train.freeze_layers: must be at most 6, the number of layers of the image tower, but got 7",
    ),
]


@pytest.mark.parametrize(("values", "message"), CANNOT)
def test_what_a_tower_cannot_do_is_said_once(tiny_clip, heads, source, values, message):
    with pytest.raises(RecipeError) as caught:
        fine_tune(tiny_clip, *heads, source, settings(**values))
    assert [str(problem) for problem in caught.value.problems] == [message]


@pytest.mark.parametrize(("values", "message"), RESNET_CANNOT)
def test_what_a_resnet_cannot_do_is_said_once(resnet_clip, values, message):
    assert [str(problem) for problem in tower_problems(resnet_clip.model.visual, settings(**values))] == [message]


def test_a_resnet_freezes_layers(resnet_clip):
    assert tower_problems(resnet_clip.model.visual, settings(freeze_layers=6)) == []


def test_a_study_is_refused_before_it_trains_for_what_its_space_or_a_baseline_would_ask(tiny_clip):
    visual = tiny_clip.model.visual
    space = {
        "freeze_layers": {"low": 0, "high": 4},
        "lora_rank": {"choices": [None, 4, 64]},
        "learning_rate": {"low": 1e-4, "high": 1e-3},
    }
    recipe = make_recipe(2, space=space, baselines={"plain": {}, "deep": {"freeze_layers": 9}})
    assert [str(problem) for problem in recipe_problems(visual, recipe)] == [
        "search.space.lora_rank: must be at most 32, the smallest side of a matrix, but got 64",
        "search.space.lora_rank: must be null with freeze_layers 4: no Linear layer is left in a block that trains, "
        "but got 4",
        "search.space.lora_rank: must be null with freeze_layers 4: no Linear layer is left in a block that trains, "
        "but got 64",
        "search.baselines.deep.freeze_layers: must be at most 4, the number of layers of the image tower, but got 9",
    ]
    assert not recipe_problems(visual, make_recipe(2, space={"freeze_layers": {"low": 0, "high": 4}}))


@pytest.mark.parametrize("values", [{}, {"freeze_layers": 2}, {"lora_rank": 3}, {"lora_rank": 3, "freeze_layers": 2}])
def test_the_numbers_that_train_are_counted_without_shaping_a_tower(tiny_clip, heads, values):
    train = settings(**values)
    tower = classifier_of(tiny_clip, heads, train).visual
    counted = sum(parameter.numel() for parameter in tower.parameters() if parameter.requires_grad)
    assert num_trained(tiny_clip.model.visual, train) == counted


def test_set_learning_rate_keeps_the_factors_of_layers(tiny_clip, heads):
    train = settings(layer_decay=0.5)
    optimizer = build_optimizer(classifier_of(tiny_clip, heads, train), train)
    set_learning_rate(optimizer, 3.0)
    assert sorted(group["lr"] for group in optimizer.param_groups) == [3 / 16, 3 / 8, 3 / 4, 3 / 2, 3]
