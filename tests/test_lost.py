"""Several ranks: they end with the weights of one, agree, see different files, or lose a peer.

Of the options of a training (compiled, checkpointed, accumulated, LoRA, average, frozen layers, one or two ranks)
sixteen trainings hold every combination of any three. What changes memory and speed alone changes no number beyond
rounding: the sixteen end in eight states, one for each choice of LoRA, average and frozen layers.
"""

import errno
import functools
import itertools
import json
import os
import shutil
import signal
import socket
from dataclasses import replace
from datetime import timedelta
from types import SimpleNamespace

import attempts
import killed_searches as searches
import pytest
import ray
import stand_in
import torch
from conftest import CLASS_WORDS, ArraySource
from test_loop import CPU, clip_and_heads, largest_difference, settings, without_speed
from test_targets import blocks_of
from unseen import Here, unseen

import cluster
from carft_ray import files
from carft_ray.errors import CarftError, DataError, MachineError, StorageError
from carft_ray.launch.cluster.ray_errors import UNKNOWN, lost_rank
from carft_ray.launch.workers.preparation import _prepare
from carft_ray.launch.workers.worker import run_worker, take_gpu
from carft_ray.model import device
from carft_ray.recipe.schema.train import TrainConfig
from carft_ray.store.attempt_files import read_result
from carft_ray.store.folder import Folder
from carft_ray.store.log import Log
from carft_ray.study.opening import open_study
from carft_ray.study.snapshot import snapshot
from carft_ray.training import checkpoint, loop
from carft_ray.training.loop import StoppedRun, fine_tune
from carft_ray.training.out_of_memory import shortage
from carft_ray.training.own_training import own_fine_tune
from carft_ray.training.ranks import from_rank_0, gather, on_all_ranks
from carft_ray.training.run_context import RunContext
from carft_ray.training.shared_inputs import SharedInputs


def raised_from(error, cause):
    error.__cause__ = cause
    return error


@pytest.mark.parametrize(
    ("error", "rank"),
    [
        (RuntimeError("[gloo/transport/tcp/pair.cc:538] Read error [127.0.0.1]:4: Connection reset by peer"), UNKNOWN),
        (RuntimeError("DataLoader worker (pid 7) is killed by signal: Bus error. It is possible that"), 1),
        (RuntimeError("Application timeout caused pair closure (gloo)"), UNKNOWN),
        (RuntimeError("Timed out waiting 1800000ms for recv operation to complete"), UNKNOWN),
        (ValueError("Default process group has not been initialized, please call init_process_group."), UNKNOWN),
        (torch.distributed.DistBackendError("NCCL error in: ProcessGroupNCCL.cpp:1, remote process exited"), UNKNOWN),
        (torch.distributed.DistNetworkError("failed to recv, got 0 bytes"), UNKNOWN),
        (ray.exceptions.RayActorError(error_msg="The actor died"), UNKNOWN),
        (MachineError("rank 0 does not see it", 0), 0),
        (OSError(errno.ESTALE, "Stale file handle"), 1),
        (raised_from(StorageError("must be writable"), OSError(errno.ENOTCONN, "not connected")), 1),
        (raised_from(DataError("must be an image"), OSError(errno.ETIMEDOUT, "timed out")), 1),
        (raised_from(ValueError("no"), RuntimeError("CUDA error: an illegal memory access was encountered")), 1),
        (raised_from(StorageError("must be writable"), OSError(errno.ENOSPC, "No space left on device")), None),
        (RuntimeError("can't start new thread"), 1),
        (OSError(errno.EMFILE, "Too many open files"), 1),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), None),
        (AssertionError(), None),
    ],
)
def test_what_shows_that_a_machine_has_failed_is_told_from_other_errors(error, rank):
    assert lost_rank(error, RunContext(rank=1, world_size=2)) == rank


def test_a_worker_that_is_alone_has_no_peer_to_lose():
    assert lost_rank(RuntimeError("Connection closed by peer"), RunContext()) is None
    assert lost_rank(OSError(errno.EIO, "Input/output error"), RunContext()) == 0


def gloo(function, *args):
    """Runs a module-level function as two gloo workers, in processes of their own; returns their exit codes."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    workers = [attempts.forked(_join, rank, port, function, *args) for rank in (0, 1)]
    for worker in workers:
        worker.join()
    return [worker.exitcode for worker in workers]


def _join(rank, port, function, *args):
    torch.set_num_threads(1)
    limit = timedelta(minutes=3)  # of a wait for the other rank, which has taken another way
    torch.distributed.init_process_group("gloo", f"tcp://127.0.0.1:{port}", timeout=limit, rank=rank, world_size=2)
    function(RunContext(rank=rank, world_size=2), *args)


class NotPickledError(Exception):
    def __init__(self):
        super().__init__("of a user")
        self.lock = (one for one in ())


class NotOpenedError(Exception):
    """Is pickled, and cannot be made again with what it was pickled with."""

    def __init__(self, first, second):
        super().__init__(f"{first} and {second}")


def agree(context, study_dir, recipe, folder):
    assert gather(context, context.rank) == [0, 1]
    assert from_rank_0(context, lambda: f"made on {context.rank}") == "made on 0"
    for error, there in (
        (StorageError("not by rank 0"), StorageError),
        (NotPickledError(), RuntimeError),  # reaches the other rank in words
        (NotOpenedError(1, 2), RuntimeError),
    ):

        def fail(error=error):
            raise error

        with pytest.raises(there if context.rank else type(error), match=str(error)):
            from_rank_0(context, fail)
        assert gather(context, context.rank) == [0, 1]
    for cause in (OSError(errno.EIO, "Input/output error"), raised_from(StorageError("no"), OSError(errno.EIO, ""))):

        def fail_as_a_disk(error=cause):
            raise error

        with pytest.raises(MachineError) as caught:  # of rank 0, on every rank
            from_rank_0(context, fail_as_a_disk)
        assert lost_rank(caught.value, context) == 0
    assert on_all_ranks(context, lambda: context.rank) == context.rank

    def missing():
        if context.rank == 1:
            raise StorageError("no such file")
        return 1

    with pytest.raises(
        MachineError, match="rank 1 does not see the files that other ranks see: no such file"
    ) as caught:
        on_all_ranks(context, missing)
    assert caught.value.rank == 1
    meet_on_one_rank(context, folder.parent / "own")
    resume_with_different_listings(context, folder)
    start_without_the_study(context, study_dir, recipe)
    lose_the_peer(context, folder)


def resume_with_different_listings(context, folder):
    """Rank 1 lists an older checkpoint than rank 0, and then cannot open the one that rank 0 names."""
    (clip, heads), source = clip_and_heads(), ArraySource()
    train = settings(precision="fp64", epochs=3, batch_size=10)
    whole = fine_tune(clip, *heads, source, train, context)
    asked = iter(range(9))
    stop = replace(context, should_stop=lambda: next(asked) == 1)  # at the end of the second epoch
    with pytest.raises(StoppedRun):
        fine_tune(clip, *heads, source, train, stop, checkpoint_dir=folder)
    torch.distributed.barrier()  # rank 0 has written it
    plain = checkpoint.checkpoints
    assert len(plain(folder)) == 2
    if context.rank == 1:
        checkpoint.checkpoints = lambda path: plain(path)[1:]  # as a network disk lists it for a while
    again = fine_tune(clip, *heads, source, train, context, checkpoint_dir=folder, attempt=2)
    assert largest_difference(whole, again) == 0.0

    def unseen(path):
        raise StorageError(f"{path} must be a whole checkpoint, but got no such file")

    if context.rank == 1:
        loop.load_checkpoint = unseen
    with pytest.raises(
        MachineError, match=r"rank 1 does not see the files that other ranks see: .*step-0000"
    ) as caught:
        fine_tune(clip, *heads, source, train, context, checkpoint_dir=folder, attempt=3)
    assert len(set(gather(context, str(caught.value)))) == 1


def start_without_the_study(context, study_dir, recipe):
    """A rank runs on a node without the study: both train, and what they leave lies in the study."""
    data = recipe.data.model_copy(update={"cache_dir": str(study_dir.parent / "cache")})
    runtime = attempts.make_runtime(recipe, study_dir, (attempts.Node(2, 0),), attempts.STAND_IN)
    runtime = replace(runtime, recipe=recipe.model_copy(update={"data": data}), files=Here(study_dir))
    for attempt, without in ((11, 1), (12, 0)):
        seen = replace(runtime, commit=(1, Log(Folder(study_dir)).digest_of(1)))
        spec = stand_in.spec(attempt)
        assert run_worker(unseen(seen) if context.rank == without else seen, spec, context) == "go"
        torch.distributed.barrier()  # rank 0 has written it
        assert read_result(spec.place(study_dir))[0]["metrics"]["ranks"] == 3.0


def lose_the_peer(context, folder):
    """Rank 1 is killed while rank 0 waits for it."""
    torch.distributed.barrier()
    if context.rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    try:
        while True:
            torch.distributed.all_reduce(torch.ones(1000))
    except RuntimeError as error:
        files.write_json(folder / "lost.json", [str(error), lost_rank(error, context)])
    os._exit(0)  # the group cannot be left in an orderly way


@pytest.mark.whole
def test_ranks_agree_on_what_they_resume_from_or_end_at_once_with_one_message(tmp_path):
    recipe = stand_in.make_recipe(1, baselines={}, resources={"gpus_per_worker": 0})
    with open_study(tmp_path / "study", recipe):
        pass
    assert gloo(agree, tmp_path / "study", recipe, tmp_path / "checkpoints") == [0, -signal.SIGKILL]
    text, rank = json.loads((tmp_path / "checkpoints" / "lost.json").read_text())
    assert rank == UNKNOWN, text


@pytest.mark.nodes
@pytest.mark.parametrize("executor", ["inline", "ray-train"])
def test_a_node_that_does_not_see_the_drivers_temporary_folder_trains(executor, tmp_path, monkeypatch):
    stand_in.tell(tmp_path, seconds=0.1)
    hidden = tmp_path / "hidden"
    hidden.mkdir()
    with cluster.head() as head, cluster.node(head, 4, hidden=(hidden,)):
        monkeypatch.setenv("TMPDIR", str(hidden))
        given = {"search": {"max_concurrent_trials": 2}, "cpus_per_worker": 0.5, "wait_for_nodes": 120}
        try:
            searches.finished(searches.driver(tmp_path / "study", 3, executor, *head.reached, **given))
        finally:
            searches.kill_drivers()
    assert {row.outcome for row in snapshot(tmp_path / "study").rows} == {"complete"}
    assert list(hidden.iterdir()) == []  # nothing is left behind


TWO = settings(precision="fp64", batch_size=40, checkpoint_every=1e-9)
NUM_IMAGES = 121  # two blocks of targets; the last batch has one image, so one of two workers has none


def train_as_two(context, folder):
    """A checkpoint is written after every other step."""
    loop.LOG_EVERY, rows = 2, []
    (clip, heads), images = clip_and_heads(), ArraySource(NUM_IMAGES)
    train, context = TWO.model_copy(update={"micro_batch": 4}), replace(context, report=rows.append)
    store = folder / f"store-{context.rank}"
    state = fine_tune(clip, *heads, images, train, context, checkpoint_dir=folder / "two", target_store=store)
    grown = fine_tune(clip, *heads, images, train, context, checkpoint_dir=folder / "grown", attempt=2)
    torch.save((state, grown, rows), folder / f"{context.rank}.pt")


@pytest.mark.slow
def test_two_workers_end_with_the_weights_and_targets_of_one(clip64, heads64, tmp_path, monkeypatch):
    """And so do two that continue from the checkpoint of one."""
    monkeypatch.setattr(loop, "LOG_EVERY", 2)
    rows, reported, images = [], [], ArraySource(NUM_IMAGES)
    alone = RunContext(report=rows.append)
    one = fine_tune(clip64, *heads64, images, TWO, alone, target_store=tmp_path / "store")
    ends = RunContext(report=reported.append, should_stop=lambda: bool(reported))
    with pytest.raises(StoppedRun, match="at step 4 of 12"):
        fine_tune(clip64, *heads64, images, TWO, ends, checkpoint_dir=tmp_path / "grown")
    assert gloo(train_as_two, tmp_path) == [0, 0]
    assert {path.name for path in tmp_path.glob("two/attempt-1/step-*")} == {"step-00000008", "step-00000010"}
    blocks = blocks_of(tmp_path / "store", NUM_IMAGES)
    for rank, expected in enumerate(([*rows, *rows[1:]], [])):
        state, grown, found = torch.load(tmp_path / f"{rank}.pt", weights_only=True)
        # Adam divides by 1e-8 where a gradient is nothing but rounding (1e-16)
        assert largest_difference(one, state) < 1e-9
        assert largest_difference(one, grown) < 1e-9
        assert blocks_of(tmp_path / f"store-{rank}", NUM_IMAGES).items() <= blocks.items()  # what it has met
        for mine, theirs in zip(expected, found, strict=True):
            assert without_speed(mine) == pytest.approx(without_speed(theirs), rel=1e-9, abs=1e-12)


def own(context, folder, function, epochs, on_epoch=lambda state, epoch: {}):
    clip, (class_head_CD, _) = clip_and_heads(torch.float32)
    inputs = SharedInputs(clip, CLASS_WORDS, (), ArraySource(), (), {}, "key")
    return own_fine_tune(function, TrainConfig(epochs=epochs), inputs, class_head_CD, context, CPU, folder, on_epoch)


def meet_on_one_rank(context, folder):
    stops, epochs = [], []

    def told(function):
        asks = replace(context, should_stop=lambda: context.rank == 0 and bool(stops))
        with pytest.raises(CarftError) as caught:
            own(asks, folder, function, 2)
        return f"{type(caught.value).__name__}: {caught.value}"

    def diverges_on_one(values, own):
        own.report({"loss": float("inf") if own.rank else 1.0})

    def stops_on_one(values, own):
        stops.append(True)
        assert own.should_stop()

    def moves_on_one(values, own):
        own.report({"loss": 1.0})
        if own.rank == 1:
            with torch.no_grad():
                next(own.model.parameters()).add_(1)
        own.report({"loss": 1.0 + own.rank})
        own.report({"loss": 1.0}, own.model.state_dict() if own.rank == 0 else None)
        return own.model.state_dict() if own.rank == 0 else None

    assert "the loss must stay finite, but got loss inf" in told(diverges_on_one)
    assert "must return a state dict" in told(lambda values, own: None)
    assert "StoppedRun: stopped on request" in told(stops_on_one)
    rows, reports = [], replace(context, report=lambda row: rows.append(row["loss"]))
    # an evaluation is a collective
    state = own(reports, folder, moves_on_one, 3, lambda state, epoch: epochs.append(gather(context, epoch)) or {})
    assert epochs == [[2, 2], [3, 3]]
    assert rows == ([] if context.rank else [1.0, 1.0, 1.0])
    assert len(set(gather(context, float(state["class_head"].sum())))) == 1


FIRST_BUCKET = 20_000  # bytes of gradients that are sent first: torch splits the tiny tower, too, where it compiles


def combinations():
    """Returns (name, values, number of ranks) of sixteen trainings of five steps."""
    found = []
    for compiled, lora, average, again in itertools.product((False, True), repeat=4):
        frozen, accumulated, ranks = lora ^ average ^ again, compiled ^ lora ^ again, 1 + (compiled ^ average ^ again)
        values = {"compile": compiled, "grad_checkpointing": again, "micro_batch": 2 if accumulated else None}
        values |= {"lora_rank": 2 if lora else None, "ema_decay": 0.9 if average else None}
        values["freeze_layers"] = 2 if frozen else 0
        found.append(("".join(str(int(value)) for value in (compiled, lora, average, again)), values, ranks))
    return found


ALL = combinations()


def train_twice(context, folder, wanted, backend):
    """Trains each combination as a whole, and stopped after two steps and resumed; rank 0 keeps the states."""
    torch.distributed._DEFAULT_FIRST_BUCKET_BYTES = FIRST_BUCKET
    loop.LOG_EVERY = 2
    clip, heads = clip_and_heads()
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(torch, "compile", functools.partial(torch.compile, backend=backend))
        for name, values, _ in wanted:
            train = settings(precision="fp64", epochs=1, batch_size=8, **values)
            whole = fine_tune(clip, *heads, ArraySource(), train, context)
            stops = RunContext(context.rank, context.world_size, should_stop=lambda: True)
            with pytest.raises(StoppedRun, match="at step 2 of 5"):
                fine_tune(clip, *heads, ArraySource(), train, stops, checkpoint_dir=folder / name)
            again = fine_tune(clip, *heads, ArraySource(), train, context, checkpoint_dir=folder / name, attempt=2)
            assert largest_difference(whole, again) == 0.0, name
            if context.rank == 0:
                torch.save(whole, folder / f"{name}.pt")


@pytest.mark.whole
@pytest.mark.filterwarnings("ignore::DeprecationWarning:torch")
def test_options_that_save_memory_or_time_change_no_number_in_any_combination(tmp_path, monkeypatch):
    monkeypatch.setattr(loop, "LOG_EVERY", 2)
    monkeypatch.setattr(torch.distributed, "_DEFAULT_FIRST_BUCKET_BYTES", FIRST_BUCKET)
    of_one, of_two = ([each for each in ALL if each[2] == number] for number in (1, 2))
    assert len(of_one) == len(of_two) == len(ALL) // 2
    assert gloo(train_twice, tmp_path, of_two, "aot_eager") == [0, 0]
    train_twice(RunContext(), tmp_path, of_one, "aot_eager")
    torch.compiler.reset()
    states = {}
    for name, values, _ in ALL:
        key = tuple(values[field] for field in ("lora_rank", "ema_decay", "freeze_layers"))
        state = torch.load(tmp_path / f"{name}.pt", weights_only=True)
        assert largest_difference(states.setdefault(key, state), state) < 1e-9, name
    assert len(states) == len(ALL) // 2


@pytest.mark.whole
@pytest.mark.skipif(shutil.which("g++") is None, reason="needs a C++ compiler")
def test_two_ranks_train_with_a_tower_that_is_built_by_a_compiler_and_checkpointed(tmp_path):
    values = {"compile": True, "grad_checkpointing": True, "micro_batch": 2}
    assert gloo(train_twice, tmp_path, [("built", values, 2)], "inductor") == [0, 0]


def test_a_process_with_a_gpu_of_ray_that_torch_does_not_find_is_a_failure_of_its_machine(monkeypatch):
    def of(gpus, in_process=False):
        resources = SimpleNamespace(gpus_per_worker=gpus)
        return SimpleNamespace(recipe=SimpleNamespace(resources=resources), in_process=in_process)

    monkeypatch.setattr(device, "has_lost_gpu", lambda: True)
    told = r"Ray has given this process a GPU, but torch finds none \(does nvidia-smi work on [\d.]+\?\)"
    with pytest.raises(MachineError, match=told) as caught:
        take_gpu(of(0.5), RunContext(rank=1, world_size=2))
    assert caught.value.rank == 1
    with pytest.raises(MachineError, match=told):  # before it computes heads and predictions for all trainings
        _prepare(of(1))
    for free in (of(0), of(1, in_process=True)):
        take_gpu(free, RunContext())
    monkeypatch.undo()
    monkeypatch.setattr(torch.version, "cuda", None)
    assert not device.has_lost_gpu()  # a build for the CPU, which may have been meant
    monkeypatch.setattr(torch.version, "cuda", "12.8")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert device.has_lost_gpu()


def test_a_training_on_a_share_of_a_gpu_keeps_to_that_share_of_its_memory_and_is_told_so(monkeypatch):
    shares = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "set_per_process_memory_fraction", shares.append)
    for gpus, in_process in ((0.25, False), (0.5, True), (0, False), (1.0, False), (2.0, False)):
        resources = SimpleNamespace(gpus_per_worker=gpus)
        take_gpu(SimpleNamespace(recipe=SimpleNamespace(resources=resources), in_process=in_process), RunContext())
    assert shares == [0.25]
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (60e9, 80e9))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "H100")
    for share, told in ((1.0, "60.0 of 80.0 GB free on H100"), (0.25, ", of which this process may use 20.0")):
        monkeypatch.setattr(torch.cuda, "get_per_process_memory_fraction", lambda device, share=share: share)
        assert shortage("training", 8, 224, torch.device("cuda")).value.endswith(told)
