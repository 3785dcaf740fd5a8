"""How the image tower trains: layer-wise learning rates, frozen layers, LoRA, averages, checkpointing, BatchNorm."""

import copy
import dataclasses
import logging
from pathlib import Path

import numpy as np
import open_clip
import pytest
import torch
import torch.nn.functional as F
from conftest import CLASS_WORDS, TEMPLATES, ArraySource
from open_clip.model import _build_vision_tower
from open_clip.timm_model import TimmModel
from stand_in import make_recipe
from test_loop import CPU, GPU, largest_difference, settings
from timm.optim import param_groups_layer_decay
from tiny import make_clip, make_resnet_clip
from torch import nn

from carft_ray.data.source import ImageSet
from carft_ray.errors import MachineError, OutOfMemoryError, RecipeError, StorageError
from carft_ray.launch.cluster.ray_errors import lost_rank
from carft_ray.launch.workers import micro_batch
from carft_ray.launch.workers.micro_batch import fitted, memory_failure
from carft_ray.model import tower
from carft_ray.model.classifier import ImageClassifier, build_classifier
from carft_ray.model.heads import build_heads
from carft_ray.model.lora import merged_state, plain_name, trained_weights
from carft_ray.model.mixing import mix_weights
from carft_ray.model.tower import layer_factors, layer_groups, num_trained, recipe_problems, shape_tower
from carft_ray.training import run
from carft_ray.training.evaluate import Mixtures, predict, predict_all
from carft_ray.training.loop import _explained, fine_tune
from carft_ray.training.optimizer import build_optimizer
from carft_ray.training.out_of_memory import explained_shortage
from carft_ray.training.run_context import RunContext
from carft_ray.training.shared_inputs import SharedInputs
from carft_ray.training.targets import Targets

pytestmark = pytest.mark.slow

NUM_LAYERS = 4  # of the tiny tower: stem, two blocks, projection
MATRICES = ("attn.in_proj_weight", "attn.out_proj.weight", "mlp.c_fc.weight", "mlp.c_proj.weight")


@pytest.fixture(scope="module")
def resnet_clip():
    return make_resnet_clip()


def classifier_of(clip, heads, train, shaped=True):
    classifier = build_classifier(clip, heads[0], train, CPU)
    if shaped:
        number = num_trained(clip.model.visual, train)  # counted without shaping a tower
        shape_tower(classifier, train)
        assert number == sum(value.numel() for value in classifier.visual.parameters() if value.requires_grad)
    return classifier


def moved(clip, heads, state, train):
    """Names of the tensors of a fine-tuned state that are not those of the start."""
    start = classifier_of(clip, heads, train, shaped=False).state()
    assert state.keys() == start.keys()
    return {name for name in start if not torch.equal(start[name], state[name])}


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


def test_decay_of_matrices_spares_norms_and_biases_in_every_layer(tiny_clip, heads):
    train = settings(decay="matrices", layer_decay=0.5)
    groups = build_optimizer(classifier_of(tiny_clip, heads, train), train).param_groups
    assert {(g["lr_factor"], g["weight_decay"]) for g in groups[:-1]} >= {(0.0625, 0.1), (0.0625, 0.0), (0.5, 0.1)}
    assert all(parameter.ndim < 2 for group in groups if not group["weight_decay"] for parameter in group["params"])


@pytest.mark.parametrize("number", [1, NUM_LAYERS])
def test_frozen_layers_keep_their_weights_and_have_no_gradient(tiny_clip, heads, source, number):
    train = settings(freeze_layers=number)
    layers = [{f"visual.{name}" for name in layer} for layer in layer_groups(tiny_clip.model.visual)]
    frozen, free = set().union(*layers[:number]), set().union(*layers[number:], {"class_head"})
    assert moved(tiny_clip, heads, fine_tune(tiny_clip, *heads, source, train), train) == free
    classifier = classifier_of(tiny_clip, heads, train).train()
    classifier(torch.from_numpy(source.images))[1].sum().backward()
    assert {name for name, p in classifier.named_parameters() if p.grad is None} == frozen


def test_lora_starts_as_the_zero_shot_model_and_moves_the_matrices_of_the_blocks_by_its_rank(tiny_clip, heads, source):
    train = settings(lora_rank=2, freeze_layers=2)  # of the blocks the second alone
    plain, corrected = (classifier_of(tiny_clip, heads, train, shaped).eval() for shaped in (False, True))
    start = plain.state()
    assert largest_difference(start, corrected.state()) == 0.0
    with torch.no_grad():
        assert torch.equal(*(model(torch.from_numpy(source.images))[1] for model in (plain, corrected)))
    state = fine_tune(tiny_clip, *heads, source, train)
    expected = {f"visual.transformer.resblocks.1.{name}" for name in MATRICES}
    assert moved(tiny_clip, heads, state, train) == {*expected, "class_head"}
    for name in expected:
        singular = torch.linalg.svdvals((state[name] - start[name]).double())
        assert singular[2] < 1e-5 * singular[0], name


def test_lora_alpha_and_the_alpha_of_mixing_scale_the_merged_correction(clip64, heads64, source):
    pixels, train = torch.from_numpy(source.images), settings(lora_rank=4, lora_alpha=8.0, precision="fp64")
    corrected, plain = (classifier_of(clip64, heads64, train, shaped).eval() for shaped in (True, False))
    start, generator = plain.state(), torch.Generator().manual_seed(1)
    factors = {name: p for name, p in corrected.named_parameters() if name.endswith(".B")}
    assert len(factors) == 2 * len(MATRICES)
    for factor in factors.values():
        factor.data = 0.05 * torch.randn(factor.shape, generator=generator, dtype=factor.dtype)
    merged = corrected.state()
    for name, factor in factors.items():
        correction = 8 / 4 * factor @ corrected.get_parameter(f"{name[:-1]}A")
        torch.testing.assert_close(merged[plain_name(name)] - start[plain_name(name)], correction, rtol=0, atol=1e-12)
    plain.load_state_dict(mix_weights(start, merged, 0.3))
    for factor in factors.values():
        factor.data *= 0.3
    with torch.no_grad():
        torch.testing.assert_close(plain(pixels)[1], corrected(pixels)[1], rtol=0, atol=1e-10)  # logits up to 20
    assert largest_difference(plain.state(), corrected.state()) < 1e-12


def test_lora_adapts_the_linear_layers_of_a_timm_tower_and_checkpointing_changes_no_bit_of_it():
    pixels = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (2, 160, 160, 3), dtype=np.uint8))
    torch.manual_seed(0)
    visual = TimmModel("test_vit", embed_dim=16, image_size=160, pool="avg", proj="linear").double()
    names = {*(f"visual.{name}" for name, _ in visual.named_parameters()), "class_head"}
    gradients = []
    for on in (False, True):
        train = settings(lora_rank=4, layer_decay=0.5, grad_checkpointing=on)
        torch.manual_seed(1)
        classifier = ImageClassifier(copy.deepcopy(visual), torch.eye(3, 16), 10.0, (0.5,) * 3, (0.5,) * 3).double()
        shape_tower(classifier, train)
        F.cross_entropy(classifier(pixels)[1], torch.tensor([0, 2])).backward()
        gradients.append({name: p.grad for name, p in classifier.named_parameters() if p.grad is not None})
    assert largest_difference(*gradients) == 0.0
    assert merged_state(classifier).keys() == names
    trained = trained_weights(classifier)
    assert len(trained) == 6 * 4 + 1
    assert all(".blocks." in name for name in trained if name != "class_head")
    factors = {group["lr_factor"] for group in build_optimizer(classifier, train).param_groups}
    assert factors == {1.0, *(0.5 ** (8 - layer) for layer in range(1, 7))}


@pytest.mark.parametrize(("decay", "values"), [(0.0, {}), (0.7, {"head_lr_factor": 0.0}), (0.5, {"lora_rank": 4})])
def test_the_average_is_the_weighted_mean_of_the_merged_weights_of_all_steps(clip64, heads64, source, decay, values):
    values = {"precision": "fp64", "batch_size": 40, "epochs": 4, **values}  # a step is an epoch
    steps, looks = [classifier_of(clip64, heads64, settings(**values)).state()], []
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


def test_a_checkpoint_of_a_training_with_an_average_is_none_of_one_without(tiny_clip, heads, source, tmp_path):
    fine_tune(tiny_clip, *heads, source, settings(ema_decay=0.9), checkpoint_dir=tmp_path)
    with pytest.raises(
        StorageError, match="must contain an average of the weights if ema_decay is set, or teacher is average, else"
    ):
        fine_tune(tiny_clip, *heads, source, settings(), checkpoint_dir=tmp_path)


OF_MEMORY = [{"lora_rank": 4}, {"freeze_layers": 2}, {"ema_decay": 0.9}, {"teacher": "average"}]  # decide over it


@pytest.mark.parametrize("values", [*OF_MEMORY, {"compile": True}, {"grad_checkpointing": True}])
def test_a_micro_batch_that_fits_is_remembered_for_what_decides_over_memory(values):
    plain, other = (make_recipe(1, train={"batch_size": 64, **more}) for more in ({}, values))
    failure = memory_failure(OutOfMemoryError("short", 64), plain, {}, 1)
    found = {failure.device: failure.fits}
    assert fitted(plain, found, 1) == 32
    assert fitted(other, found, 1) is None
    no_image = memory_failure(OutOfMemoryError("short", 1), plain, values, 1)
    assert no_image.outcome == ("error" if values in OF_MEMORY else "fatal")


@pytest.mark.parametrize("more", [{"text_weight": 1.0}, {"teacher": "average"}, {"l2_sp_weight": 0.1}])
def test_a_micro_batch_that_fits_with_one_penalty_is_not_that_of_one_that_keeps_more(more):
    train = {"batch_size": 64, "feature_weight": 1.0}
    less, other = (make_recipe(1, train=train | values) for values in ({"class_kl_weight": 1.0}, more))
    failure = memory_failure(OutOfMemoryError("short", 64), less, {}, 1)
    found = {failure.device: failure.fits}
    assert fitted(make_recipe(1, train=train), found, 1) == 32  # one frozen pass for both
    assert fitted(other, found, 1) is None


def test_a_micro_batch_that_fits_beside_another_training_is_not_that_of_a_whole_gpu(monkeypatch):
    monkeypatch.setattr(micro_batch, "_device", lambda recipe: "a GPU")
    whole, half = (make_recipe(1, train={"batch_size": 64}, resources={"gpus_per_worker": n}) for n in (1.0, 0.5))
    failure = memory_failure(OutOfMemoryError("short", 64), half, {}, 1)
    found = {failure.device: failure.fits}
    assert fitted(whole, found, 1) is None
    assert fitted(half, found, 1) == 32


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
    statistics = [name for name in start if "running_" in name or "num_batches" in name]
    assert statistics
    for state in (*tuned, tuned[0]):
        assert all(torch.equal(state[name], start[name]) for name in statistics)
        with mixtures.between(lambda state=state: state) as mixed:
            for alpha in (1.0, 0.4, 0.0, 0.4):  # an order leaves no trace
                by_hand = classifier_of(resnet_clip, heads, settings())
                by_hand.load_state_dict(mix_weights(start, state, alpha))
                assert largest_difference(by_hand.state(), mixed(alpha).state()) == 0.0
                table = predict_all(mixed(alpha), sets, alpha, 4, context)
                assert table.equals(predict_all(by_hand, sets, alpha, 4, context))
        assert largest_difference(mixtures.zero_shot, start) == 0.0
        shared = {each.untyped_storage().data_ptr() for each in resnet_clip.model.visual.state_dict().values()}
        assert mixed(0.0).visual.conv1.weight.untyped_storage().data_ptr() in shared  # no weights of its own is left
    assert largest_difference(before, resnet_clip.model.visual.state_dict()) == 0.0


def test_what_drops_at_random_as_a_function_stays_off_while_a_tower_trains():
    clip = make_clip({"timm_model_name": "test_efficientnet", "timm_pool": "avg", "image_size": 32})
    clip.model.visual.trunk.drop_rate = 0.5  # of torch's functional dropout, no module
    heads = build_heads(clip.model, clip.tokenizer, CLASS_WORDS, TEMPLATES)
    classifier, pixels = classifier_of(clip, heads, settings()), torch.from_numpy(image_set(32).images_NHWC.copy())
    assert torch.equal(classifier.train().features(pixels), classifier.eval().features(pixels))


def test_a_tower_trains_that_keeps_what_it_has_computed_from_weights_in_eval_mode():
    vision = {"timm_model_name": "efficientvit_m0", "timm_pool": "", "timm_proj": "linear", "image_size": 64}
    clip = make_clip(vision, noise=0.02)
    heads = build_heads(clip.model, clip.tokenizer, CLASS_WORDS, TEMPLATES)
    classifier, pixels = classifier_of(clip, heads, settings()).train(), torch.from_numpy(image_set(64).images_NHWC[:2])
    biases = [value for name, value in classifier.named_parameters() if "attention_biases" in name]
    for _ in range(2):  # the second step needs another graph
        classifier(pixels)[1].logsumexp(dim=1).sum().backward()
    assert any(value.grad.abs().max() > 0 for value in biases)
    frozen = Targets(clip, heads[1], ArraySource(), settings(teacher="average"), CPU)
    before = frozen.of([], pixels, 0).features_BD
    with torch.no_grad():
        for name, weights in frozen.teacher([name for name, _ in classifier.named_parameters()]).items():
            weights.add_("attention_biases" in name)
    assert not torch.equal(frozen.of([], pixels, 1).features_BD, before)  # a moving teacher, too


def test_mixtures_of_such_a_tower_are_evaluated_with_the_weights_that_they_have_now(monkeypatch):
    """With a timm, too, that forgets what it keeps only where a module begins to train."""
    vision = {"timm_model_name": "efficientvit_m0", "timm_pool": "", "timm_proj": "linear", "image_size": 64}
    clip = make_clip(vision, noise=0.02)
    keeping = {type(module) for module in clip.model.visual.modules() if hasattr(module, "attention_bias_cache")}
    assert keeping

    def train(module, mode=True):
        torch.nn.Module.train(module, mode)
        if mode:
            module.attention_bias_cache = {}
        return module

    for kind in keeping:
        monkeypatch.setattr(kind, "train", train)
    heads, sets = build_heads(clip.model, clip.tokenizer, CLASS_WORDS, TEMPLATES), [image_set(64)]
    mixtures, start = Mixtures(clip, heads[0], settings(), CPU), classifier_of(clip, heads, settings()).state()
    end = {
        name: tensor + ("attention_biases" in name) if tensor.is_floating_point() else tensor
        for name, tensor in start.items()
    }
    with mixtures.between(lambda: end) as mixed:
        tables = [predict_all(mixed(alpha), sets, 0.0, 4, RunContext()) for alpha in (0.0, 1.0)]
    by_hand = classifier_of(clip, heads, settings())
    by_hand.load_state_dict(end)
    assert not tables[0].equals(tables[1])
    assert tables[1].equals(predict_all(by_hand, sets, 0.0, 4, RunContext()))


def test_auto_compiles_long_trainings_on_a_gpu_with_a_compiler(monkeypatch):
    monkeypatch.setattr(tower, "has_compiler", lambda device: True)
    long, short = (settings(epochs=epochs, batch_size=100) for epochs in (10, 9))
    assert [tower.compiles(train, 9_901, GPU) for train in (long, short)] == [True, False]
    assert not tower.compiles(long, 9_901, CPU)
    for fixed in (True, False):
        assert tower.compiles(settings(compile=fixed), 100, CPU) is fixed
    monkeypatch.setattr(tower, "has_compiler", lambda device: False)
    assert not tower.compiles(long, 9_901, GPU)


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
def test_a_compiler_that_fails_is_named_with_what_to_do(tiny_clip, heads, source, tmp_path, monkeypatch, caplog):
    import torch._inductor.config as inductor

    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))  # where no compiler has built anything
    torch.compiler.reset()
    with inductor.patch({"cpp.cxx": (None, str(tmp_path / "nothing")), "fx_graph_cache": False}):
        assert not tower.has_compiler(CPU)
        with pytest.raises(RecipeError) as caught:
            fine_tune(tiny_clip, *heads, source, settings(compile=True, batch_size=11))
    torch.compiler.reset()
    (message,) = [record.getMessage() for record in caplog.records if record.name == tower.__name__]
    assert message.startswith("train.compile is off: torch cannot compile here: InvalidCxxCompiler")
    rule = "train.compile: must be false here: torch cannot compile the image tower, but got InvalidCxxCompiler"
    assert str(caught.value).startswith(rule)
    assert "\n    Write train.compile: false, or give torch a C++ compiler" in str(caught.value)


@pytest.mark.parametrize(
    ("said", "kind"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"), OutOfMemoryError),
        (RuntimeError("Triton Error [CUDA]: out of memory"), OutOfMemoryError),
        (RuntimeError("CppCompileError: C++ compile error"), RecipeError),
    ],
)
def test_a_shortage_of_memory_within_the_compiler_is_no_failure_of_the_compiler(said, kind):
    from torch._inductor.exc import InductorError

    with pytest.raises(kind), explained_shortage("training", 8, 32, CPU, 8), _explained(1, 5):
        raise InductorError(said, None)


def test_a_library_that_a_kill_has_left_half_built_fails_an_attempt_and_is_set_aside(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    whole = Path(torch._C.__file__).read_bytes()  # any library
    (tmp_path / "ab").mkdir()
    for name, content in (("whole", whole), ("half", whole[: len(whole) // 2]), ("empty", b"")):
        (tmp_path / "ab" / f"{name}.so").write_bytes(content)
    said = f"{tmp_path}/ab/half.so: file too short"
    with pytest.raises(MachineError, match="left half built, now set aside") as caught, _explained(1, 5):
        raise ImportError(said)
    assert lost_rank(caught.value, RunContext()) is not None
    assert {path.name for path in (tmp_path / "ab").iterdir()} == {"whole.so", "half.half", "empty.half"}
    with pytest.raises(ImportError, match="file too short"), _explained(1, 5):
        raise ImportError(said)  # nothing is half built any more: it is another one's
    from torch._dynamo.exc import TorchDynamoException

    with pytest.raises(MachineError, match="left half built, now set aside"), _explained(1, 5):
        raise TorchDynamoException("torch remembers what it could not load")
    tower.half_built.clear()
    with pytest.raises(RecipeError, match="must be false here"), _explained(1, 5):
        raise TorchDynamoException("no compiler")


LAYERS = "train.freeze_layers: must be at most"
RANK = "train.lora_rank: must be"
NO_BLOCK = "no Linear layer is left in a block that trains, but got"
CANNOT = [
    ("tiny", {"freeze_layers": 5}, f"{LAYERS} 4, the number of layers of the image tower, but got 5"),
    ("tiny", {"freeze_layers": 4, "head_lr_factor": 0.0}, f"{LAYERS} 3 with head_lr_factor 0, or nothing trains, but"),
    ("tiny", {"lora_rank": 33}, f"{RANK} at most 32, the smallest side of a matrix, but got 33"),
    ("tiny", {"lora_rank": 2, "freeze_layers": 3}, f"{RANK} null with freeze_layers 3: {NO_BLOCK} 2"),
    ("resnet", {"lora_rank": 2}, f"{RANK} null: the blocks of this image tower have no Linear layers, but got 2"),
    ("resnet", {"grad_checkpointing": True}, "train.grad_checkpointing: must be false: this image tower has no "),
]


@pytest.mark.parametrize(("kind", "values", "message"), CANNOT)
def test_what_a_tower_cannot_do_is_said_once(tiny_clip, resnet_clip, source, kind, values, message):
    clip = {"tiny": tiny_clip, "resnet": resnet_clip}[kind]
    with pytest.raises(RecipeError) as caught:
        fine_tune(clip, torch.eye(5, 16), torch.eye(5, 16), source, settings(**values))
    [problem] = caught.value.problems
    assert str(problem).startswith(message)


def test_a_study_is_refused_before_it_trains_for_what_its_space_or_a_baseline_would_ask(tiny_clip):
    visual = tiny_clip.model.visual
    space = {"freeze_layers": {"low": 0, "high": 4}, "lora_rank": {"choices": [None, 4, 64]}}
    recipe = make_recipe(2, space=space, baselines={"plain": {}, "deep": {"freeze_layers": 9}})
    assert [str(problem) for problem in recipe_problems(visual, recipe)] == [
        "search.space.lora_rank: must be at most 32, the smallest side of a matrix, but got 64",
        f"search.space.lora_rank: must be null with freeze_layers 4: {NO_BLOCK} 4",
        f"search.space.lora_rank: must be null with freeze_layers 4: {NO_BLOCK} 64",
        "search.baselines.deep.freeze_layers: must be at most 4, the number of layers of the image tower, but got 9",
    ]
    assert not recipe_problems(visual, make_recipe(2, space={"freeze_layers": {"low": 0, "high": 4}}))
    apart = {**space, "freeze_layers": {"low": 0, "high": 4, "when": {"lora_rank": None}}}
    assert [str(problem) for problem in recipe_problems(visual, make_recipe(2, space=apart))] == [
        "search.space.lora_rank: must be at most 32, the smallest side of a matrix, but got 64"
    ]


# name -> number of layers: stem, blocks, and what stands after them
VITS = ("ViT-B-32", "coca_ViT-B-32", "ViT-B-16-SigLIP", "EVA02-B-16", "PE-Core-B-16", "MobileCLIP2-B")
TOWERS = {
    **dict.fromkeys(VITS, 12 + 2),
    "ViT-L-14-CLIPA": 24 + 2,
    "RN50": 3 + 4 + 6 + 3 + 2,
    "convnext_base_w": 3 + 3 + 27 + 3 + 2,
}


def built(name):
    config = open_clip.get_model_config(name)
    level = logging.getLogger().level
    with torch.device("meta"):
        visual = _build_vision_tower(config["embed_dim"], config["vision_cfg"])
    logging.getLogger().setLevel(level)
    return visual


@pytest.mark.parametrize("name", TOWERS)
def test_each_parameter_stands_in_one_layer_and_the_blocks_are_counted(name):
    visual = built(name)
    groups = layer_groups(visual)
    names = [parameter for parameter, _ in visual.named_parameters()]
    assert sorted(parameter for group in groups for parameter in group) == sorted(names)
    assert len(groups) == TOWERS[name]
    assert all(group == [parameter for parameter in names if parameter in set(group)] for group in groups)


@pytest.mark.parametrize("name", ["ViT-B-32", "ViT-L-14-CLIPA"])
def test_the_last_layers_of_a_vit_are_those_that_open_clip_unlocks(name):
    for num_unlocked in (1, 2, 13):
        visual = built(name)
        visual.lock(unlocked_groups=num_unlocked)
        trained = {parameter for parameter, value in visual.named_parameters() if value.requires_grad}
        assert trained == {parameter for group in layer_groups(visual)[-num_unlocked:] for parameter in group}


@pytest.mark.parametrize("name", ["ViT-B-16-SigLIP", "EVA02-B-16", "MobileCLIP2-S2", "swin_base_patch4_window7_224"])
def test_the_layers_of_a_timm_tower_are_those_of_its_layer_decay(name):
    visual = built(name)
    theirs = param_groups_layer_decay(visual.trunk, layer_decay=0.5)
    factors = {id(parameter): group["lr_scale"] for group in theirs for parameter in group["params"]}
    ours = layer_factors(visual, 0.5)  # below one more layer, the class head
    after = 0.5 if name.startswith("swin") else 1.0  # timm does not know the projection that open_clip adds to it
    for parameter, value in visual.named_parameters():
        assert ours[parameter] == 0.5 * (after * factors[id(value)] if parameter.startswith("trunk.") else 1.0)


def test_attention_pooling_stands_before_the_last_norm_and_any_other_module_counts_its_children():
    assert "ln_post.weight" in layer_groups(built("coca_ViT-B-32"))[13]
    module = nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU(), nn.BatchNorm2d(4))
    module.register_parameter("scale", nn.Parameter(torch.ones(1)))
    assert layer_groups(module) == [["scale"], ["0.weight", "0.bias"], ["2.weight", "2.bias"]]
