"""The small CLIP of examples/pacs: its words, its masks and its messages, without a package or a network."""

import hashlib
import importlib
import io
import os
import re
import sys
import tarfile
import zipfile
from pathlib import Path

import numpy as np
import open_clip
import pytest
import torch
from PIL import Image
from torch.nn import functional

from carft_ray.recipe.loading import load_recipe

PLACE = Path(__file__).resolve().parents[1] / "examples" / "pacs"
TEMPLATES = [template("{}") for template in open_clip.OPENAI_IMAGENET_TEMPLATES]
# synset, file, words, hypernyms, definition
NOUNS = (
    ("00000001", "03", ["entity"], [], "that which exists"),
    ("00000002", "03", ["animal"], ["00000001"], "a living thing that moves"),
    ("00000003", "05", ["dog", "domestic_dog"], ["00000002"], "a friend"),
    ("00000004", "05", ["Chihuahua"], ["00000003"], "a small dog"),
    ("00000005", "15", ["Chihuahua"], ["00000001"], "a state"),
    ("00000006", "06", ["fire_engine"], ["00000001"], "a truck; used against fire"),
    ("00000007", "12", ["joy"], ["00000001"], "a feeling"),
)


@pytest.fixture(scope="module")
def made():
    sys.path.insert(0, str(PLACE))
    yield importlib.import_module("make_clip")
    sys.path.remove(str(PLACE))


@pytest.fixture(scope="module")
def wordnet(made):
    return importlib.import_module("wordnet")


@pytest.fixture(scope="module")
def choose(made):
    return importlib.import_module("choose")


@pytest.fixture(scope="module")
def nouns(wordnet):
    data, senses = ["  1 a licence"], {}
    for synset, kind, words, above, gloss in NOUNS:
        counted = f"{len(words):02x} " + " ".join(f"{word} 0" for word in words)
        pointers = f"{len(above):03d} " + " ".join(f"@ {one} n 0000" for one in above)
        data.append(f'{synset} {kind} n {counted} {pointers} | {gloss}; "as in"  ')
        for word in words:
            senses.setdefault(word.lower(), []).append(synset)
    index = [f"{word} n {len(found)} 1 @ {len(found)} 0 {' '.join(found)}  " for word, found in senses.items()]
    return wordnet.read_nouns("\n".join(data), "\n".join(index))


def test_nouns_are_read_with_their_words_hypernyms_and_definitions(nouns):
    assert nouns.words["00000003"] == ["dog", "domestic dog"]
    assert nouns.above["00000004"] == ["00000003"]
    assert nouns.gloss["00000006"] == "a truck; used against fire"
    assert nouns.senses["chihuahua"] == ["00000004", "00000005"]


def test_hypernyms_end_before_the_general_ones(wordnet, nouns):
    assert wordnet.with_hypernyms("00000004", nouns) == ["00000004", "00000003", "00000002"]


@pytest.mark.parametrize(
    ("name", "synset"),
    [
        ("dog-face", "00000003"),
        ("dog-with-tears-of-joy", "00000003"),
        ("fire-engine", "00000006"),
        ("red-fire-engine", "00000006"),
        ("dog-2-thin", "00000003"),
        ("joy", None),
        ("of", None),
        ("", None),
    ],
)
def test_the_name_of_an_icon_means_the_visible_thing_in_it(wordnet, nouns, name, synset):
    assert wordnet.synset_of_drawing(name, nouns) == synset


def test_a_class_means_the_sense_with_its_definition(wordnet, nouns):
    assert wordnet.synset_of_class(["chihuahua"], "a state", nouns) == "00000005"
    assert wordnet.synset_of_class(["chihuahua"], "written otherwise", nouns) == "00000004"


def test_icons_are_chosen_by_name_without_copies_in_other_skins(made, nouns):
    names = ["dog-5", "dog-4", "dog-3", "dog-2", "dog-1", "fire-engine", "dog-light-skin-tone", "joy"]
    icons = {"icons": {name: {"body": "<path d='M0 0'/>"} for name in names}, "width": 24, "height": 24}
    chosen = made.drawings_of(icons, nouns, most=2)
    assert [name for name, _, _ in chosen] == ["dog-1", "dog-2", "fire-engine"]
    assert 'viewBox="0 0 24 24"' in chosen[0][2]


def test_each_template_fits_photographs_or_drawings_and_never_both(made):
    fits = made.fits(TEMPLATES)
    assert fits.any(0).all()
    assert not (fits[0] & fits[1:].any(0)).any()
    assert fits[:, TEMPLATES.index("itap of a {}.")].tolist() == [True, False, False, False]
    assert fits[:, TEMPLATES.index("a sketch of a {}.")].tolist() == [False, False, True, False]


def test_a_caption_is_true_of_its_thing_and_of_what_is_below_it_in_the_same_style(made):
    says = torch.tensor([[True, True, False], [False, True, False]])  # a chihuahua that is a dog; a dog
    style_fits = torch.tensor([[True, False], [True, True]])  # a photograph; a picture that fits both templates
    valid = made.valid_pairs(says, torch.tensor([0, 1]), style_fits, torch.tensor([0, 1]))
    assert valid.tolist() == [[True, False], [False, True]]
    valid = made.valid_pairs(says, torch.tensor([1, 1]), style_fits, torch.tensor([0, 0]))
    assert valid.all()


def test_a_caption_that_is_true_of_another_picture_is_not_counted_against_it(made):
    torch.manual_seed(0)
    image, text = (functional.normalize(torch.randn(3, 4), dim=1) for _ in range(2))
    valid = torch.eye(3, dtype=torch.bool)
    valid[0, 1] = True
    logits = 5 * image @ text.T
    rows = [logits[0, [0, 2]], logits[1], logits[2]]
    columns = [logits[:, 0], logits[[1, 2], 1], logits[:, 2]]
    goals = [(0, 1, 2), (0, 0, 2)]
    parts = [
        sum(part.logsumexp(0) - part[goal] for part, goal in zip(side, own, strict=True)) / 3
        for side, own in zip((rows, columns), goals, strict=True)
    ]
    loss = made.contrastive_loss(image, text, torch.tensor(5.0), valid)
    assert loss.item() == pytest.approx(float(sum(parts)) / 2, rel=1e-5)


def test_short_sentences_have_the_vectors_of_encode_text(made):
    torch.manual_seed(0)
    model = open_clip.CLIP(**made.MODEL)
    tokens = open_clip.SimpleTokenizer(context_length=24)(
        ["a dog", "a photo of the very large guitar", "art of it", "x"]
    )
    with torch.no_grad():
        expected = functional.normalize(model.encode_text(tokens), dim=1)
        assert torch.allclose(made.embed_texts(model, tokens, parts=2), expected, atol=1e-5)


def test_the_tower_refuses_weights_of_another_network(made):
    with pytest.raises(made.MakeError, match="not those of EfficientNet-Lite0"):
        made.build_tower({"weight": torch.zeros(3)})


@pytest.mark.parametrize("style", ["plain", "lines", "paint"])
def test_a_view_is_a_square_that_depends_on_its_random_numbers_alone(made, style):
    drawing = Image.new("RGBA", (112, 60))
    drawing.paste((200, 30, 30, 255), (20, 10, 90, 50))
    first, again = (made.view(drawing, style, np.random.default_rng(3)) for _ in range(2))
    assert first.size == (112, 112)
    assert first.mode == "RGB"
    assert np.array_equal(np.asarray(first), np.asarray(again))
    assert np.asarray(first).std() > 1


def package(path, members):
    with tarfile.open(path, "w:gz") as archive:
        for name, content in members.items():
            member = tarfile.TarInfo(name)
            if isinstance(content, str):
                member.type, member.linkname = tarfile.SYMTYPE, content
                archive.addfile(member)
            else:
                member.size = len(content)
                archive.addfile(member, io.BytesIO(content))
    return path


def test_reading_a_package_writes_nothing_and_follows_no_link(made, tmp_path):
    inside = tmp_path / "inside"
    inside.mkdir()
    (tmp_path / "secret").write_text("secret")
    members = {"../outside": b"x", "/tmp/outside": b"x", "package/icons.json": "../../secret", "package/a": b"{}"}
    archive = package(inside / "bad.tgz", members)
    assert made.read_member(archive, "package/a") == b"{}"
    with pytest.raises(made.MakeError, match=r"has no file package/icons\.json"):
        made.read_member(archive, "package/icons.json")
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["bad.tgz", "inside", "secret"]


def test_a_file_is_read_from_a_wheel_or_named_as_missing(made, tmp_path):
    path = tmp_path / "a-1-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as wheel:
        wheel.writestr("a/b", b"c")
    assert made.read_member(path, "a/b") == b"c"
    with pytest.raises(made.MakeError, match="has no file a/x"):
        made.read_member(path, "a/x")


def test_a_package_that_is_another_one_is_refused(made, tmp_path):
    path, thing = tmp_path / "thing-1.0.tgz", ("npm", "thing", "1.0")
    digests = {thing: hashlib.sha256(b"good").hexdigest()}
    path.write_bytes(b"good")
    assert made.fetch(thing, tmp_path, digests) == path
    path.write_bytes(b"bad")
    with pytest.raises(made.MakeError, match=r"is not thing 1\.0.* remove it and start again"):
        made.fetch(thing, tmp_path, digests)


def test_without_npm_the_message_says_what_to_do(made, monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(
        made.MakeError, match=r"npm is not installed; install it, or put scope-thing-1\.tgz of @scope/thing"
    ):
        made.fetch(("npm", "@scope/thing", "1"), tmp_path, {})


@pytest.mark.parametrize(("tool", "command"), [("npm", "npm"), ("apt", "apt-get")])
def test_a_failing_download_says_why_in_one_line(made, monkeypatch, tmp_path, tool, command):
    program = tmp_path / command
    program.write_text("#!/bin/sh\necho first >&2\necho no network >&2\nexit 1\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/bin:/usr/bin")
    with pytest.raises(made.MakeError, match=r"could not download thing 1 \(no network\); start again") as raised:
        made.fetch((tool, "thing", "1"), tmp_path, {})
    assert "\n" not in str(raised.value)


def test_an_existing_folder_is_not_touched(made, tmp_path, capsys):
    assert made.main([str(tmp_path)]) == 1
    assert capsys.readouterr().err == f"make_clip: {tmp_path} exists; remove it or name another folder\n"
    assert not list(tmp_path.iterdir())


def test_files_are_read_from_a_resource_of_qt(choose):
    name = b"\0\1\0\0\0\0\0a"  # length, hash, UTF-16
    tree = (
        bytes(4) + b"\0\2" + (1).to_bytes(4, "big") * 2 + bytes(8)
    )  # the root: flags of a folder, one child, number 1
    tree += bytes(14) + bytes(8)  # a file: name 0, data 0
    starts = [2, 20, 20 + len(tree), 20 + len(tree) + 7]  # version, tree, data, names
    content = b"qres" + b"".join(start.to_bytes(4, "big") for start in starts) + tree + b"\0\0\0\3abc" + name
    assert choose.qt_files(content) == {"/a": b"abc"}


@pytest.mark.parametrize(
    ("path", "name"),
    [("x/polar_bear.webp", "polar bear"), ("frog-1.png", "frog"), ("zebra2.png", "zebra"), ("fish12.webp", "fish")],
)
def test_the_name_of_a_picture_has_no_numbers(choose, path, name):
    assert choose.name_of(path) == name


def test_the_example_has_texts_only_and_names_no_host(made):
    files = [path for path in PLACE.rglob("*") if path.is_file() and "__pycache__" not in path.parts]
    assert {path.suffix for path in files} <= {".py", ".md", ".yaml", ""}
    hosts = {host for path in files for host in re.findall(r"https?://([^/\s\")]+)", path.read_text())}
    assert hosts <= {"www.w3.org", "arxiv.org"}  # the name spaces of SVG; papers
    assert all(re.fullmatch("[0-9a-f]{64}", digest) for digest in made.listed(made.PACKAGES).values())


def test_the_notice_names_every_package(made, choose):
    notice = (PLACE / "NOTICE").read_text()
    packages = made.listed(made.PACKAGES) | made.listed(choose.PICTURES)
    assert not [name for _, name, version in packages if f"{name} {version}" not in notice]


def test_the_recipes_train_on_one_domain_and_seal_two_others():
    """Neither a model nor PACS is there, so only what they say is read."""
    domains = {"photo", "art_painting", "cartoon", "sketch"}
    for name in ("photo", "art_painting"):
        recipe = load_recipe(PLACE / f"{name}.yaml")
        assert recipe.data.train.domains == recipe.data.id_val.domains == recipe.data.id_test.domains == (name,)
        parts = sorted(part.part for part in (recipe.data.train, recipe.data.id_val, recipe.data.id_test))
        (_, val_end), (test_from, test_end), (train_from, _) = parts
        # the first fifth of each test set is for tables (``benchmarks.seed_table``)
        assert test_from == pytest.approx(val_end + (train_from - val_end) / 5)
        assert test_end == train_from
        assert all(part.part == (0.2, 1) for part in recipe.data.ood_test.values())
        assert {*recipe.data.ood_val} == {"sketch"}
        assert {*recipe.data.ood_test} == domains - {name, "sketch"}
        paths = {
            each.path for each in (recipe.data.train, *recipe.data.ood_val.values(), *recipe.data.ood_test.values())
        }
        assert {*map(os.path.realpath, paths)} == {os.path.realpath(PLACE.parents[1] / "data" / "pacs")}
        model = os.path.realpath(recipe.model.name.removeprefix("local-dir:"))
        assert model == os.path.realpath(PLACE.parents[1] / "models" / "small_clip")


def test_the_folder_appears_whole_and_nothing_beside_it_is_touched(made, tmp_path):
    (tmp_path / "models" / "clip.new").mkdir(parents=True)
    (tmp_path / "models" / "clip.new" / "mine").write_text("kept")
    made.write_folder(torch.nn.Linear(2, 3), tmp_path / "models" / "clip")
    assert sorted(path.name for path in (tmp_path / "models").iterdir()) == ["clip", "clip.new"]
    assert (tmp_path / "models" / "clip.new" / "mine").read_text() == "kept"
    written = {path.name for path in (tmp_path / "models" / "clip").iterdir()}
    assert written == {"open_clip_config.json", "open_clip_model.safetensors"}
