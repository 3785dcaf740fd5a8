"""Checkpoints: what is written comes back, the newest whole one wins, damage is named, a full disk harms nothing."""

import contextlib
import errno
import json
import os
import resource
from pathlib import Path

import crash_host
import pytest
import short_training
import torch

from carft_ray import files
from carft_ray.errors import InterruptedRunError, StorageError
from carft_ray.launch.runs.single import train_once
from carft_ray.recipe.loading import load_recipe
from carft_ray.training.checkpoint import (
    Checkpoint,
    load_checkpoint,
    load_optimizer_tensors,
    load_tensors,
    newest_checkpoint,
    optimizer_tensors,
    save_checkpoint,
    save_tensors,
)


def checkpoint(step=8, value=1.0):
    generator = torch.Generator().manual_seed(step)
    weights = {
        "visual.weight": torch.randn(8, 4, generator=generator) * value,
        "visual.count": torch.tensor(3),
        "class_head": torch.randn(5, 4, generator=generator, dtype=torch.float64),
    }
    optimizer = {"0.exp_avg": torch.randn(8, 4, generator=generator), "0.step": torch.tensor(8.0)}
    return Checkpoint(step, weights, optimizer, {"seed": 3, "num_images": 7, "totals": {"loss": 0.1 + 0.2}})


def value_of(found):
    """The number that ``checkpoint`` was given, by the newest checkpoint that ``newest_checkpoint`` finds."""
    return float(found[0].weights["visual.weight"][0, 0] / checkpoint(found[0].step).weights["visual.weight"][0, 0])


# what comes back


def test_a_checkpoint_comes_back_bit_for_bit(tmp_path):
    written = checkpoint()
    folder = save_checkpoint(tmp_path, 1, written)
    assert folder == tmp_path / "attempt-1" / "step-00000008"
    names = sorted(path.name for path in folder.iterdir())
    assert names == ["optimizer.safetensors", "state.json", "weights.safetensors"]
    read, damaged = newest_checkpoint(tmp_path)
    assert damaged == []
    assert (read.step, read.position) == (written.step, written.position)
    for ours, theirs in ((read.weights, written.weights), (read.optimizer, written.optimizer)):
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[name], theirs[name]) and ours[name].dtype == theirs[name].dtype for name in ours)


def test_an_optimizer_goes_on_as_if_it_had_never_been_written():
    """Moments have the strides of their parameter, which fused kernels need."""

    def fresh():
        weight = torch.randn(4, 3, 2, 2, generator=torch.Generator().manual_seed(0))
        weights = [torch.nn.Parameter(weight.to(memory_format=torch.channels_last)), torch.nn.Parameter(torch.ones(3))]
        groups = [{"params": weights[:1], "weight_decay": 0.0}, {"params": weights[1:]}]
        return weights, torch.optim.AdamW(groups, lr=0.1, fused=True)

    def steps(parameters, optimizer, numbers):
        for number in numbers:
            for parameter in parameters:
                parameter.grad = (number * parameter.detach()).sin()
            optimizer.step()

    whole, optimizer = fresh()
    steps(whole, optimizer, [1, 2, 3, 4])
    first, optimizer = fresh()
    steps(first, optimizer, [1, 2])
    kept = {name: tensor.contiguous() for name, tensor in optimizer_tensors(optimizer).items()}  # as a file holds them
    second, resumed = fresh()
    for parameter, other in zip(second, first, strict=True):
        parameter.data.copy_(other.data)
    load_optimizer_tensors(resumed, kept)
    steps(second, resumed, [3, 4])
    assert all(torch.equal(one, other) for one, other in zip(whole, second, strict=True))


# which one wins


def test_the_newest_step_wins_and_of_equal_steps_the_later_attempt(tmp_path):
    assert newest_checkpoint(tmp_path / "none") == (None, [])
    (tmp_path / "attempt-1" / ".step-00000008.77.tmp").mkdir(parents=True)
    (tmp_path / "attempt-1" / "step-9.old").mkdir()
    assert newest_checkpoint(tmp_path) == (None, [])
    for attempt, step in ((1, 8), (2, 4), (10, 8), (9, 8)):
        save_checkpoint(tmp_path, attempt, checkpoint(step, value=attempt))
    assert value_of(newest_checkpoint(tmp_path)) == pytest.approx(10)


def test_two_checkpoints_are_kept_over_all_attempts_and_an_older_one_replaces_nothing_of_a_newer(tmp_path):
    for attempt, step in ((1, 4), (1, 8), (2, 12), (3, 16)):
        save_checkpoint(tmp_path, attempt, checkpoint(step, value=attempt))
    kept = sorted(str(path.relative_to(tmp_path)) for path in tmp_path.glob("*/step-*"))
    assert kept == ["attempt-2/step-00000012", "attempt-3/step-00000016"]
    save_checkpoint(tmp_path, 1, checkpoint(16, value=1))
    assert value_of(newest_checkpoint(tmp_path)) == pytest.approx(3)


# damage


def cut(path):
    path.write_bytes(path.read_bytes()[:-1])


def flip(path):
    content = bytearray(path.read_bytes())
    content[-9] ^= 1
    path.write_bytes(content)


def replaced(old, new):
    return lambda path: path.write_text(path.read_text().replace(old, new))


NO_MATCH = "that does not match its hash"
DAMAGE = [
    ("weights.safetensors", cut, f"a file weights.safetensors {NO_MATCH}"),
    ("weights.safetensors", flip, f"a file weights.safetensors {NO_MATCH}"),
    ("weights.safetensors", Path.unlink, "weights.safetensors: No such file or directory"),
    ("optimizer.safetensors", flip, f"a file optimizer.safetensors {NO_MATCH}"),
    ("state.json", lambda path: path.write_bytes(b"\xff\xfe"), "a damaged state.json"),
    ("state.json", lambda path: path.write_text("[1]"), "a damaged state.json"),
    ("state.json", replaced('"sha256"', '"sha255"'), "a damaged state.json"),
    ("state.json", replaced('"num_images": 7', '"num_images": 8'), f"a state.json {NO_MATCH}"),
    ("state.json", replaced('"step": 8', '"step": 9'), f"a state.json {NO_MATCH}"),
    ("state.json", Path.unlink, "state.json: No such file or directory"),
]


@pytest.mark.parametrize(("name", "damage", "words"), DAMAGE)
def test_a_damaged_checkpoint_is_named_and_the_one_before_it_serves(tmp_path, name, damage, words):
    save_checkpoint(tmp_path, 1, checkpoint(4))
    folder = save_checkpoint(tmp_path, 1, checkpoint(8))
    damage(folder / name)
    read, damaged = newest_checkpoint(tmp_path)
    assert read.step == 4
    assert [str(problem) for problem in damaged] == [f"{folder}: must be a whole checkpoint, but got {words}"]


def test_a_checkpoint_of_another_version_is_told_apart_from_a_damaged_one(tmp_path):
    folder = save_checkpoint(tmp_path, 1, checkpoint())
    replaced('"format_version": 1', '"format_version": 2')(folder / "state.json")
    with pytest.raises(StorageError, match="must have format_version 1, but got 2"):
        load_checkpoint(folder)


def test_a_damaged_file_of_tensors_is_named(tmp_path):
    path = tmp_path / "t.safetensors"
    save_tensors(path, {"a": torch.ones(3)})
    cut(path)
    with pytest.raises(StorageError, match=r"t\.safetensors: must be a file of tensors, but got a damaged one"):
        load_tensors(path)
    with pytest.raises(StorageError, match="must be a file of tensors, but got none"):
        load_tensors(tmp_path / "nowhere.safetensors")


# no space


@contextlib.contextmanager
def limited(size):
    """Within the block no file can grow beyond ``size`` bytes; Python ignores the signal, writes fail."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize(("size", "name"), [(100, "weights.safetensors"), (500, "state.json")])
def test_without_space_the_checkpoint_before_stays_and_nothing_is_half_written(tmp_path, size, name):
    save_checkpoint(tmp_path, 1, checkpoint(4))
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(StorageError) as caught, limited(size):
        save_checkpoint(tmp_path, 1, checkpoint(8))
    assert caught.value.exit_code == 5
    place, _, rest = str(caught.value).partition(": ")
    assert rest.splitlines() == [
        "must be writable, but got File too large",
        "    Raise the limit on file sizes (ulimit -f), then run the same command again.",
    ]
    folder = tmp_path / "attempt-1" / "step-00000008"
    assert Path(place) in (folder, folder / name)
    assert sorted(tmp_path.rglob("*")) == before
    assert newest_checkpoint(tmp_path)[0].step == 4


def test_a_full_device_is_a_storage_error_with_the_next_step():
    with pytest.raises(StorageError) as caught:
        files.append_line(Path("/dev/full"), "a line")
    assert caught.value.exit_code == 5
    assert str(caught.value).splitlines() == [
        "/dev/full: must be writable, but got No space left on device",
        "    Free some space or choose another folder, then run the same command again.",
    ]
    for number in (errno.EDQUOT, errno.EACCES, errno.EROFS, errno.EIO):
        reason, step = str(files.storage_error(Path("x"), OSError(number, os.strerror(number)))).splitlines()
        assert reason == f"x: must be writable, but got {os.strerror(number)}"
        assert step.strip().endswith(".")


# files


def test_files_of_tensors_have_the_mode_that_the_umask_gives_to_every_file(tmp_path):
    before = os.umask(0o007)
    try:
        files.write_text(tmp_path / "plain", "text")
        save_tensors(tmp_path / "tensors", {"x": torch.zeros(2)})
    finally:
        os.umask(before)
    assert {path.stat().st_mode & 0o777 for path in tmp_path.iterdir()} == {0o660}


def test_a_whole_file_replaces_or_nothing_does(tmp_path):
    path = tmp_path / "value.json"
    files.write_json(path, {"a": 1})
    with pytest.raises(ValueError, match="not JSON compliant"):
        files.write_json(path, {"a": float("nan")})
    path.chmod(0o400)
    files.write_json(path, {"a": 2})  # the folder counts, not the file
    assert json.loads(path.read_text()) == {"a": 2}
    assert list(tmp_path.iterdir()) == [path]


def test_an_append_after_a_crash_in_the_middle_of_a_line_keeps_every_whole_line(tmp_path):
    path = tmp_path / "rows.jsonl"
    for torn in (b"", b'{"a": 1}\n{"a', b'{"a'):
        path.write_bytes(torn)
        whole = torn.count(b"\n")
        assert len(files.read_json_lines(path)) == whole
        files.append_line(path, '{"a": 9}')
        assert path.read_bytes().endswith(b'{"a": 9}\n')
        assert len(files.read_json_lines(path)) == len(path.read_bytes().splitlines()) == whole + 1


def fill(path, write):
    with files.new_folder(path) as folder:
        write(folder / "a")


def test_a_new_folder_takes_its_name_only_whole(tmp_path):
    def half(path):
        path.write_text("half")
        raise KeyboardInterrupt

    def cannot(path):
        path.mkdir()
        files.write_text(path, "a folder stands there")

    with pytest.raises(KeyboardInterrupt):
        fill(tmp_path / "f", half)
    with pytest.raises(StorageError, match=f"{tmp_path}/f/a: must be writable"):
        fill(tmp_path / "f", cannot)
    assert list(tmp_path.iterdir()) == []


def test_remains_of_killed_writes_are_removed_and_nothing_else(tmp_path):
    kept = [tmp_path / name for name in ("a.tmp", ".b.12.txt", ".c.tmp", "sub/d.12.tmp")]
    gone = [tmp_path / name for name in (".a.json.12.tmp", "sub/.step-1.12.tmp/w", "sub/.step-1.12.tmp/.w.12.tmp")]
    for path in (*kept, *gone):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("")
    files.remove_remains(tmp_path)
    assert sorted(path for path in tmp_path.rglob("*") if path.is_file()) == sorted(kept)


# through the command line


def test_train_resume_names_a_damaged_checkpoint_and_goes_on_from_the_one_before(tmp_path, capsys):
    path, cache = short_training.make(tmp_path), f"data.cache_dir={tmp_path / 'cache'}"

    def train(out, progress):
        return train_once(load_recipe(path, [cache]), out, False, "again", str, progress, lambda row: None)

    def stop_after_two_epochs(row):
        if row["step"] == 6:
            (tmp_path / "out" / "stop").write_text("")

    def weights(out):
        return (short_training.place_in(out) / "fine_tuned.safetensors").read_bytes()

    train(tmp_path / "whole", lambda row: None)
    with pytest.raises(InterruptedRunError, match=r"continues from step 6 \(epoch 2 done\)"):
        train(tmp_path / "out", stop_after_two_epochs)
    older, newer = sorted(short_training.training_in(tmp_path / "out").glob("attempt-1/step-*"))
    flip(newer / "weights.safetensors")
    assert crash_host.call(["train", path, "--set", cache, "--out", tmp_path / "out", "--resume", "--json"]) == 0
    assert weights(tmp_path / "out") == weights(tmp_path / "whole")
    warnings = [line for line in capsys.readouterr().err.splitlines() if "warning" in line]
    reason = "must be a whole checkpoint, but got a file weights.safetensors that does not match its hash"
    assert warnings == [f"warning: passed over a damaged checkpoint: {newer}: {reason}"]
    assert older.name == "step-00000003"
