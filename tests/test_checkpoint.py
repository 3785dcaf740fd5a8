"""Checkpoints: what is written comes back, the newest whole one wins, damage is named, a full disk harms nothing."""

import contextlib
import errno
import json
import os
import resource
import shutil
from pathlib import Path

import pytest
import torch
from test_loop import largest_difference, settings

from carft_ray import files
from carft_ray.errors import StorageError
from carft_ray.store import attempt_files
from carft_ray.training import checkpoint as checkpoints
from carft_ray.training.checkpoint import Checkpoint, newest_checkpoint, save_checkpoint
from carft_ray.training.loop import fine_tune


def checkpoint(step=8, value=3):
    torch.manual_seed(step)
    weights = {"visual.count": torch.tensor(value), "class_head": torch.randn(5, 4, dtype=torch.float64)}
    optimizer, average = {"0.exp_avg": torch.randn(8, 4), "0.step": torch.tensor(8.0)}, {"class_head": torch.rand(5, 4)}
    return Checkpoint(step, weights, optimizer, {"seed": 3, "num_images": 7, "totals": {"loss": 0.1 + 0.2}}, average)


def test_moments_come_back_with_the_strides_of_their_parameter_which_fused_kernels_need():
    weight = torch.nn.Parameter(torch.rand(4, 3, 2, 2).to(memory_format=torch.channels_last))
    weight.grad = torch.rand_like(weight)
    first, second = (torch.optim.AdamW([weight], fused=True) for _ in range(2))
    first.step()
    in_file = {name: tensor.contiguous() for name, tensor in checkpoints.optimizer_tensors(first).items()}
    checkpoints.load_optimizer_tensors(second, in_file)
    for key, value in first.state[weight].items():
        torch.testing.assert_close(second.state[weight][key], value, rtol=0, atol=0, check_stride=True)


def test_two_checkpoints_are_kept_and_the_newest_step_wins_and_of_equal_steps_the_later_attempt(tmp_path):
    assert newest_checkpoint(tmp_path / "none") == (None, [])
    (tmp_path / "attempt-1" / ".step-00000008.77.tmp").mkdir(parents=True)
    (tmp_path / "attempt-1" / "step-9.old").mkdir()
    assert newest_checkpoint(tmp_path) == (None, [])
    for attempt, step in ((1, 8), (2, 4), (10, 8), (9, 8)):
        save_checkpoint(tmp_path, attempt, checkpoint(step, value=attempt))
    assert newest_checkpoint(tmp_path)[0].weights["visual.count"] == 10
    for attempt, step in ((1, 4), (1, 8), (2, 12), (3, 16)):
        save_checkpoint(tmp_path, attempt, checkpoint(step, value=attempt))
    kept = sorted(str(path.relative_to(tmp_path)) for path in tmp_path.glob("*/step-0*"))
    assert kept == ["attempt-2/step-00000012", "attempt-3/step-00000016"]
    save_checkpoint(tmp_path, 1, checkpoint(16, value=1))
    assert newest_checkpoint(tmp_path)[0].weights["visual.count"] == 3


def test_what_a_kill_has_left_of_a_checkpoint_is_none_and_replaces_none(tmp_path):
    whole = save_checkpoint(tmp_path, 1, checkpoint(50))
    for step in (10, 100, 200):  # of copies, files are removed, and their folders stay
        (tmp_path / "attempt-1" / f"step-{step:08d}").mkdir()
    shutil.copy(whole / "weights.safetensors", tmp_path / "attempt-1" / "step-00000200")
    assert [folder for _, folder in attempt_files.checkpoints(tmp_path)] == [whole]
    assert (attempt_files.progress_of(tmp_path), attempt_files.progress_words(tmp_path)) == (
        [0, 50],
        "step 50 (epoch 1)",
    )
    newer = save_checkpoint(tmp_path, 1, checkpoint(60))
    assert [folder for _, folder in attempt_files.checkpoints(tmp_path)] == [newer, whole]
    read, damaged = newest_checkpoint(tmp_path)
    assert (read.step, damaged) == (60, [])
    newest = save_checkpoint(tmp_path, 1, checkpoint(200))
    assert [folder for _, folder in attempt_files.checkpoints(tmp_path)] == [newest, newer]


def flip(path):
    content = bytearray(path.read_bytes())
    content[-9] ^= 1
    path.write_bytes(content)


def replaced(old, new):
    return lambda path: path.write_text(path.read_text().replace(old, new))


NO_MATCH = "that does not match its hash"
DAMAGE = [
    ("weights.safetensors", lambda path: os.truncate(path, 100), f"a file weights.safetensors {NO_MATCH}"),
    ("weights.safetensors", flip, f"a file weights.safetensors {NO_MATCH}"),
    ("weights.safetensors", Path.unlink, "weights.safetensors: No such file or directory"),
    ("optimizer.safetensors", flip, f"a file optimizer.safetensors {NO_MATCH}"),
    ("average.safetensors", flip, f"a file average.safetensors {NO_MATCH}"),
    ("average.safetensors", Path.unlink, "average.safetensors: No such file or directory"),
    ("state.json", lambda path: path.write_bytes(b"\xff\xfe"), "a damaged state.json"),
    ("state.json", lambda path: path.write_text("[1]"), "a damaged state.json"),
    ("state.json", replaced('"sha256"', '"sha255"'), "a damaged state.json"),
    ("state.json", replaced('"num_images": 7', '"num_images": 8'), f"a state.json {NO_MATCH}"),
    ("state.json", replaced('"step": 8', '"step": 9'), f"a state.json {NO_MATCH}"),
    ("state.json", replaced('"format_version": 1', '"format_version": 2'), "must have format_version 1, but got 2"),
]


@pytest.mark.parametrize(("name", "damage", "words"), DAMAGE)
def test_a_damaged_checkpoint_is_named_and_the_one_before_it_serves(tmp_path, name, damage, words):
    save_checkpoint(tmp_path, 1, checkpoint(4))
    folder = save_checkpoint(tmp_path, 1, checkpoint(8))
    damage(folder / name)
    read, damaged = newest_checkpoint(tmp_path)
    assert read.step == 4
    rule = "" if words.startswith("must") else "must be a whole checkpoint, but got "
    assert [str(problem) for problem in damaged] == [f"{folder}: {rule}{words}"]


def test_a_training_goes_on_from_the_checkpoint_before_a_damaged_one(tiny_clip, heads, source, tmp_path, caplog):
    whole = fine_tune(tiny_clip, *heads, source, settings(), checkpoint_dir=tmp_path)
    _, newer = sorted(tmp_path.glob("attempt-1/step-*"))
    flip(newer / "weights.safetensors")
    again = fine_tune(tiny_clip, *heads, source, settings(), checkpoint_dir=tmp_path, attempt=2)
    assert largest_difference(whole, again) == 0.0
    reason = f"must be a whole checkpoint, but got a file weights.safetensors {NO_MATCH}"
    assert caplog.messages == [f"skipped a damaged checkpoint: {newer}: {reason}"]


@contextlib.contextmanager
def limited(size):
    """Within the block no file can grow beyond ``size`` bytes; Python ignores the signal, writes fail."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize(("size", "name"), [(100, "step-00000008"), (500, "state.json")])
def test_without_space_the_checkpoint_before_stays_and_nothing_is_half_written(tmp_path, size, name):
    save_checkpoint(tmp_path, 1, checkpoint(4))
    before = sorted(tmp_path.rglob("*"))
    step = r"Raise the limit on file sizes \(ulimit -f\), then run the same command again\."
    told = rf"{name}: must be writable, but got File too large\n    {step}$"
    with pytest.raises(StorageError, match=told), limited(size):
        save_checkpoint(tmp_path, 1, checkpoint(8))
    assert sorted(tmp_path.rglob("*")) == before
    assert newest_checkpoint(tmp_path)[0].step == 4


def test_a_full_device_is_a_storage_error_with_the_next_step():
    told = "/dev/full: must be writable, but got No space left on device\n    Free some space or choose another folder"
    with pytest.raises(StorageError, match=f"^{told}, then run the same command again.$"):
        files.append_line(Path("/dev/full"), "a line")
    for number in (errno.EDQUOT, errno.EACCES, errno.EROFS, errno.EIO):
        reason, step = str(files.storage_error(Path("x"), OSError(number, os.strerror(number)))).splitlines()
        assert reason == f"x: must be writable, but got {os.strerror(number)}"
        assert step.strip().endswith(".")


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
        assert len(files.read_json_lines(path.parent, path.name)) == whole
        files.append_line(path, '{"a": 9}')
        assert path.read_bytes().endswith(b'{"a": 9}\n')
        assert len(files.read_json_lines(path.parent, path.name)) == len(path.read_bytes().splitlines()) == whole + 1


def test_an_append_to_a_file_without_an_end_of_line_takes_no_memory_of_its_size(tmp_path, monkeypatch):
    path = tmp_path / "rows.jsonl"
    for rest in (2**16 - 1, 2**16, 2**16 + 1, 2**18):
        path.write_bytes(b"{}\n" + b"x" * rest)
        files.append_line(path, "[]")
        assert path.read_bytes() == b"{}\n[]\n"
    monkeypatch.setattr(files, "MOST_JSON_BYTES", 2**20)
    with open(path, "wb") as file:
        file.truncate(10**12)
    with pytest.raises(
        StorageError, match=r"rows\.jsonl: must have lines of at most 1,048,576 bytes, but got a longer"
    ):
        files.append_line(path, "[]")


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
