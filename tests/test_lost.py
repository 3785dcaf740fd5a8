"""Failures of machines told from failures of values; ranks that agree, see different files, or lose a peer."""

import errno
import json
import os
import signal
import socket
import time
from dataclasses import replace
from datetime import timedelta

import attempts
import pytest
import ray
import stand_in
import torch
from conftest import CLASS_WORDS, TEMPLATES, ArraySource
from test_loop import largest_difference, settings
from tiny import make_tiny_clip
from unseen import Here, unseen

from carft_ray import files
from carft_ray.errors import DataError, MachineError, StorageError
from carft_ray.launch.failures.causes import UNKNOWN, lost_rank
from carft_ray.launch.worker import run_worker
from carft_ray.model.heads import build_heads
from carft_ray.store.folder import Folder
from carft_ray.store.log import Log
from carft_ray.store.result import read_result
from carft_ray.study.opening import open_study
from carft_ray.training import checkpoint, loop
from carft_ray.training.loop import StoppedRun, fine_tune
from carft_ray.training.ranks import from_rank_0, gather, on_all_ranks
from carft_ray.training.run_context import RunContext

TWO = RunContext(rank=1, world_size=2)


def raised_from(error, cause):
    try:
        raise error from cause
    except type(error) as caught:
        return caught


@pytest.mark.parametrize(
    ("error", "rank"),
    [
        (RuntimeError("[gloo/transport/tcp/pair.cc:538] Read error [127.0.0.1]:4: Connection reset by peer"), UNKNOWN),
        (RuntimeError("Connection closed by peer [127.0.0.1]:31337"), UNKNOWN),
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
        (OSError(errno.EROFS, "read-only"), None),
        (PermissionError(errno.EACCES, "Permission denied"), None),
        (ValueError("the class igloo has no image"), None),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), None),
        (AssertionError(), None),
    ],
)
def test_what_shows_that_a_machine_has_failed_is_told_from_other_errors(error, rank):
    assert lost_rank(error, TWO) == rank


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


def agree(context, study_dir, recipe, folder):
    assert gather(context, context.rank) == [0, 1]
    assert from_rank_0(context, lambda: f"made on {context.rank}") == "made on 0"
    with pytest.raises(StorageError, match="not by rank 0"):
        from_rank_0(context, lambda: (_ for _ in ()).throw(StorageError("not by rank 0")))
    assert on_all_ranks(context, lambda: context.rank) == context.rank

    def missing():
        if context.rank == 1:
            raise StorageError("no such file")
        return 1

    with pytest.raises(MachineError, match="rank 1 does not see the files that others see: no such file") as caught:
        on_all_ranks(context, missing)
    assert caught.value.rank == 1
    resume_with_different_listings(context, folder)
    start_without_the_study(context, study_dir, recipe)
    lose_the_peer(context, folder)


def resume_with_different_listings(context, folder):
    """Rank 1 lists an older checkpoint than rank 0, and then cannot open the one that rank 0 names."""
    clip, source = make_tiny_clip(dtype=torch.float64), ArraySource()
    heads = build_heads(clip.model, clip.tokenizer, CLASS_WORDS, TEMPLATES)
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
    began = time.monotonic()
    with pytest.raises(MachineError, match=r"rank 1 does not see the files that others see: .*step-0000") as caught:
        fine_tune(clip, *heads, source, train, context, checkpoint_dir=folder, attempt=3)
    seconds = gather(context, time.monotonic() - began)
    assert len(set(gather(context, str(caught.value)))) == 1
    assert max(seconds) < 600  # the time-out of a collective is 1800 s


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
        (folder / "killed").write_text("")
        os.kill(os.getpid(), signal.SIGKILL)
    try:
        while True:
            torch.distributed.all_reduce(torch.ones(1000))
    except RuntimeError as error:
        files.write_json(folder / "lost.json", [str(error), lost_rank(error, context)])
    os._exit(0)  # the group cannot be left in an orderly way


@pytest.mark.slow
def test_ranks_agree_on_what_they_resume_from_or_end_at_once_with_one_message(tmp_path):
    recipe = stand_in.make_recipe(1, baselines={}, resources={"gpus_per_worker": 0})
    with open_study(tmp_path / "study", recipe):
        pass
    codes = gloo(agree, tmp_path / "study", recipe, tmp_path / "checkpoints")
    assert codes == [0, -signal.SIGKILL]
    text, rank = json.loads((tmp_path / "checkpoints" / "lost.json").read_text())
    assert rank == UNKNOWN, text
