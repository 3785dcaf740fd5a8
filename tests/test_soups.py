"""Soups: means of the weights of trainings, made and measured as a training without steps. No Ray runs."""

import itertools
import re

import numpy as np
import pytest
import torch
from crash_host import call, printed

from carft_ray.model.soups import Mean
from carft_ray.results.delivered import delivered
from carft_ray.results.page.data import page_document
from carft_ray.results.page.page import page
from carft_ray.results.reading.study_view import read_study
from carft_ray.study.snapshot import snapshot
from carft_ray.study.training import result_of

SHORT = ["search.trials=2", "train.epochs=1", "search.baselines={}", "data.id_val.num_per_class=20"]
SHORT += ["resources.executor=debug", "search.soups=[greedy, uniform]"]
SEARCH = ["search", "search_spaces/quickstart.yaml", *(word for each in SHORT for word in ("--set", each))]


def states(number, dtype=torch.float32):
    """States of one start, each with a table that nobody has moved and a counter."""
    rng = torch.Generator().manual_seed(0)
    drawn = [torch.randn(7, 5, generator=rng).to(dtype) for _ in range(number + 1)]
    found = [{"w": each, "fixed": torch.ones(3, dtype=dtype), "seen": torch.tensor(4)} for each in drawn]
    return found[0], [{**each, "w": found[0]["w"] + 0.1 * each["w"]} for each in found[1:]]


def mean_of(members, start=None):
    mean = Mean(start)
    for each in members:
        mean.add(each)
    return mean


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.float64])
def test_the_mean_of_one_training_is_that_training_bit_for_bit(dtype):
    start, [member] = states(1, dtype)
    for found in (mean_of([member]).mean(), mean_of([member], start).stock()):
        assert all(
            torch.equal(found[name], tensor) and found[name].dtype == tensor.dtype for name, tensor in member.items()
        )


def test_the_order_of_the_members_changes_nothing_but_rounding():
    start, members = states(3)
    for way in itertools.permutations(members):
        for kind in ("mean", "stock"):
            found, first = (getattr(mean_of(each, start), kind)() for each in (way, members))
            assert torch.allclose(found["w"], first["w"], rtol=0, atol=1e-6)


@pytest.mark.parametrize("number", [2, 3, 5])
def test_model_stock_is_the_formula_of_the_paper(number):
    start, members = states(number)
    w0, ws = (start["w"].double().numpy(), [each["w"].double().numpy() for each in members])
    moved = [(w - w0).ravel() for w in ws]
    pairs = itertools.combinations(moved, 2)
    cosine = np.mean([a @ b / np.linalg.norm(a) / np.linalg.norm(b) for a, b in pairs])
    share = np.clip(number * cosine / (1 + (number - 1) * cosine), 0, 1)
    found = mean_of(members, start).stock()
    np.testing.assert_allclose(found["w"].numpy(), share * np.mean(ws, axis=0) + (1 - share) * w0, rtol=0, atol=1e-6)
    assert torch.equal(found["fixed"], start["fixed"])
    assert torch.equal(found["seen"], start["seen"])


@pytest.mark.parametrize("odd", [{"w": torch.ones(2)}, {"w": torch.ones(7, 5).half()}, {"more": torch.ones(1)}])
def test_members_with_other_tensors_are_refused(odd):
    _, members = states(2)
    with pytest.raises(ValueError, match="same tensors"):
        mean_of([members[0], {**members[1], **odd}])


@pytest.fixture(scope="module")
def study_dir(tmp_path_factory):
    """A finished search with its soups."""
    folder = tmp_path_factory.mktemp("soups") / "study"
    assert call([*SEARCH, "--study", str(folder)]) == 0
    return folder


def test_a_search_makes_its_soups_and_the_same_command_makes_nothing_new(study_dir):
    now = snapshot(study_dir)
    assert [row.outcome for row in now.soups] == ["complete", "complete"]
    assert [row.attempt for row in now.soups] == [1, 1]
    assert call([*SEARCH, "--study", str(study_dir)]) == 0
    assert [(row.name, row.attempt, row.digest) for row in snapshot(study_dir).soups] == [
        (row.name, row.attempt, row.digest) for row in now.soups
    ]


def test_the_model_of_a_study_is_a_soup_if_and_only_if_it_measured_more(study_dir):
    now = snapshot(study_dir)
    model, standing = delivered(now)
    best = max(row.objective for row in (*now.trainings_of(now.best), *now.soups))
    assert standing == "searched"
    assert model["objective"] == best
    assert model["trial"].startswith("soups/") == (best > max(row.objective for row in now.trainings_of(now.best)))


def test_a_soup_is_exported_by_its_name_and_the_card_names_its_members(study_dir, tmp_path):
    [name, *_] = [row.called for row in snapshot(study_dir).soups]
    assert call(["export", str(study_dir), "--trial", name, "--to", str(tmp_path / "out")]) == 0
    card = (tmp_path / "out" / "README.md").read_text()
    assert name in card
    assert "the mean of the weights of t0" in card
    assert "Training of the first member" in card


def test_commands_that_read_know_soups(study_dir, capsys):
    for command in ("ls", "status"):
        answer = printed(capsys, command, str(study_dir))
        assert all(1 <= len(row["members"]) <= 2 for row in answer["soups"])  # a greedy one may leave one out
        assert all(row["values"] == {} for row in answer["soups"])


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--member", "0", "--member", "0"], "must name each training once"),
        (["--member", "0"], "needs two trainings"),
        (["--member", "0", "--member", "77"], "must be the number or name"),
        (["--kind", "greedyy"], "did you mean 'greedy'"),
        (["--kind", "repeats", "--member", "0", "--member", "1"], "must be another kind"),
    ],
)
def test_a_soup_that_cannot_be_made_gets_one_message(study_dir, capsys, words, said):
    assert call(["soup", str(study_dir), *words]) == 2
    assert said in capsys.readouterr().err


def test_the_page_has_a_part_about_the_model_with_what_each_soup_is_made_of(study_dir):
    view = read_study(study_dir)
    part = (
        page(view, page_document(view), study_dir / "page.html")
        .partition('<section id="model"')[2]
        .partition("</section>")[0]
    )
    now = snapshot(study_dir)
    model, _ = delivered(now)
    rows = {cells[0]: cells[1] for row in part.split("<tr")[2:] if (cells := re.findall(r"<t[hd][^>]*>([^<]*)<", row))}
    assert rows.keys() == {row.called for row in (*now.trainings_of(now.best), *now.soups)}
    assert f'<tr class="best"><th scope="row">{model["trial"]}<' in part
    for row in now.soups:
        used = result_of(study_dir, row)["soup"]["members"]
        assert rows[row.called].split(", ") == [name.split("/")[1] for name in used]
