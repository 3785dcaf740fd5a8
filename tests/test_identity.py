"""The recipe of a study is in its log: trials of one recipe are never continued with another one."""

import json
import shutil

import pytest
from crash_host import call
from logs import change, commits, holding, kept, rewrite
from stand_in import make_recipe
from study_steps import contents, run_search, searching

from carft_ray.errors import RecipeError, StorageError
from carft_ray.results.reading.study_view import read_study
from carft_ray.store.log import log_of
from carft_ray.study import opening
from carft_ray.study.opening import open_study
from carft_ray.study.provenance import provenance_of
from carft_ray.study.recipe_identity import study_recipe
from carft_ray.study.snapshot import snapshot

RECIPE, OTHER = make_recipe(3, baselines={}), make_recipe(4, baselines={}, train={"batch_size": 7})


@pytest.fixture
def study_dir(tmp_path):
    """A study with trials."""
    run_search(tmp_path / "study", RECIPE)
    return tmp_path / "study"


def log_alone(study_dir):
    (other := study_dir.with_name("other")).mkdir()
    shutil.move(study_dir / "log", other / "log")
    shutil.rmtree(study_dir)
    other.rename(study_dir)


def without_recipe(study_dir):
    found = commits(study_dir)
    for commit in found:
        commit["records"] = [one for one in commit["records"] if one["kind"] != "recipe"]
    rewrite(study_dir, found)


def cut_to_its_trials(study_dir):
    without_recipe(study_dir)
    log_alone(study_dir)


@pytest.mark.parametrize("attack", [log_alone, without_recipe, cut_to_its_trials])
def test_a_log_with_trials_is_not_adopted_by_another_recipe(study_dir, attack, capsys):
    attack(study_dir)
    before = contents(study_dir)
    for recipe in (OTHER, RECIPE):
        with pytest.raises(StorageError) as caught, open_study(study_dir, recipe):
            pass
        assert caught.value.exit_code == 5
        assert "or give another folder" in str(caught.value)
        assert contents(study_dir) == before
    has_manifest = (study_dir / "manifest.json").exists()
    assert call(["ls", str(study_dir)]) == (5 if has_manifest else 2)
    assert has_manifest or "but got one without manifest.json" in capsys.readouterr().err


def test_the_log_has_each_recipe_and_the_manifest_none(study_dir):
    with open_study(study_dir, make_recipe(5, baselines={})):
        pass
    assert [one["search"]["trials"] for one in kept(study_dir, "recipe")] == [3, 5]
    assert study_recipe(study_dir, log_of(study_dir)).search.trials == 5
    assert json.loads((study_dir / "manifest.json").read_text()).keys() == {"format_version", "id", "created"}
    assert {one["kind"] for one in commits(study_dir)[1]["records"]} == {"recipe", "provenance"}
    assert provenance_of(log_of(study_dir))["seeds"] == {"sampler": 0, "train": 0}
    with pytest.raises(RecipeError, match=r"train\.batch_size: must be"), open_study(study_dir, OTHER):
        pass


@pytest.mark.parametrize("num_claims", [0, 1, 3])
@pytest.mark.parametrize("has_manifest", [True, False])
def test_where_a_search_was_killed_before_its_recipe_any_recipe_begins_the_study(tmp_path, num_claims, has_manifest):
    study_dir, manifest = tmp_path / "study", None
    if has_manifest:
        with open_study(study_dir, RECIPE):
            pass
        manifest = (study_dir / "manifest.json").read_bytes()
        rewrite(study_dir, commits(study_dir)[:1])
        with pytest.raises(StorageError, match="must contain the recipe of its study") as caught:
            read_study(study_dir)
        assert f"carft-ray search RECIPE --study {study_dir}" in str(caught.value)
    study_dir.mkdir(exist_ok=True)
    for _ in range(num_claims):
        with holding(study_dir):
            pass
    with searching(study_dir, OTHER) as study:
        assert study.next().values
    assert study_recipe(study_dir, log_of(study_dir)) == OTHER
    assert manifest in (None, (study_dir / "manifest.json").read_bytes())
    assert len(snapshot(study_dir).trials) == 1


READERS = ("status {}", "ls {}", "logs {} 0", "stop {}", "resume {}", "report {}", "confirm {}", "evaluate {}")


@pytest.mark.parametrize("has_manifest", [True, False])
def test_a_study_whose_first_command_was_killed_or_starts_is_one_message_with_the_way_on(
    tmp_path, has_manifest, capsys
):
    study_dir = tmp_path / "study"
    with open_study(study_dir, RECIPE):
        pass
    rewrite(study_dir, commits(study_dir)[:1])
    if not has_manifest:
        (study_dir / "manifest.json").unlink()
    (study_dir / ".manifest.json.12-0f.tmp").write_text("")
    before = contents(study_dir)
    for words in READERS:
        assert call(words.format(study_dir).split()) == (5 if has_manifest else 2)
        err = capsys.readouterr().err
        assert err.count("error: ") == 1
        assert "but got one whose first command was killed before it wrote the recipe\n" in err, words
        assert f"Run the killed command again: carft-ray search RECIPE --study {study_dir}, or carft-ray train" in err
    assert contents(study_dir) == before
    with holding(study_dir):
        assert call(["status", str(study_dir)]) == (5 if has_manifest else 2)
        told = capsys.readouterr().err
    assert "but got one that process " in told
    assert "is starting\n    Wait until its first training starts, then run the same command again." in told


def spoil(recipe):
    recipe["search"]["trials"] = 0


@pytest.mark.parametrize("spoiled", [dict.clear, spoil, lambda recipe: recipe.update(data="x", train=[1])])
def test_an_invalid_recipe_in_a_log_is_one_message(study_dir, spoiled, capsys):
    change(study_dir, "recipe", spoiled)
    for words in (["status", study_dir], ["resume", study_dir], ["report", study_dir]):
        assert call([str(word) for word in words]) == 5
        err = capsys.readouterr().err
        assert err.count("error: ") == 1
        assert f"error: {study_dir.resolve()}/log: must contain a valid recipe, but got " in err
    with pytest.raises(StorageError), open_study(study_dir, RECIPE):
        pass


@pytest.mark.parametrize("is_new", [True, False])
def test_a_search_that_came_between_look_and_claim_is_not_continued_with_another_recipe(tmp_path, monkeypatch, is_new):
    study_dir, look = tmp_path / "study", opening._require_known
    if not is_new:
        run_search(study_dir, RECIPE)
    later = OTHER if is_new else make_recipe(5, baselines={})

    def overtaken(*given):
        look(*given)
        monkeypatch.setattr(opening, "_require_known", look)
        run_search(study_dir, later)

    monkeypatch.setattr(opening, "_require_known", overtaken)
    if is_new:
        with pytest.raises(RecipeError, match=r"train\.batch_size: must be 7 as in"), open_study(study_dir, RECIPE):
            pass
    else:
        run_search(study_dir, RECIPE)  # of 3 trials, when the other has made 5
    assert len(snapshot(study_dir).trials) == later.search.trials
    assert study_recipe(study_dir, log_of(study_dir)) == (later if is_new else RECIPE)
