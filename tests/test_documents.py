"""Links of the documents lead somewhere, and what they say to type works: README and tutorial are run as they stand."""

import re

import documents
import pytest
from documents import DOCUMENTS, ROOT

import carft_ray
from carft_ray.cli import app
from carft_ray.recipe.loading import load_recipe

NUMBERS = {8: "eight", 15: "fifteen"}

# what this file cannot run: by what it is run instead, a test or a benchmark that is named
ELSEWHERE = {
    "make quickstart": ("benchmarks/README.md", "| `make quickstart` ("),
    "carft-ray report studies/quickstart --html": ("tests/test_wheel.py", '"report", "studies/first", "--html"'),
    "ray get-auth-token --generate > /dev/null; RAY_AUTH_MODE=token ray start --head": (
        "tests/cluster.py",
        '"RAY_AUTH_MODE": "token"',
    ),
    "carft-ray submit search_spaces/quickstart.yaml --study studies/quickstart": (
        "tests/test_submit_real.py",
        '"submit"',
    ),
    "carft-ray status studies/quickstart": ("tests/test_wheel.py", '"status", "studies/first"'),
}


def anchors(path):
    """The addresses of the headings of a document, as viewers of repositories make them."""
    text = re.sub(r"(?ms)^```.*?^```", "", path.read_text())
    titles = [re.sub(r"\]\([^)]*\)", "", title) for title in re.findall(r"(?m)^#+ (.*)$", text)]
    return {re.sub(r"[^\w\- ]", "", title.strip().lower()).replace(" ", "-") for title in titles}


def test_links_lead_to_files_and_headings_and_each_page_is_named_by_another():
    texts = {name: (ROOT / name).read_text() for name in DOCUMENTS}
    for name, whole in texts.items():
        path = ROOT / name
        for link in re.findall(r"\]\(([^)\s]+)\)", re.sub(r"(?ms)^```.*?^```", "", whole)):
            if re.match(r"[a-z]+:", link):
                continue
            place, _, anchor = link.partition("#")
            target = (path.parent / place).resolve() if place else path
            assert target.is_file(), (name, link)
            assert target.is_relative_to(ROOT), (name, link)
            assert not anchor or anchor in anchors(target), (name, link)
        if name not in ("README.md", "docs/index.md"):
            assert any(path.name in text for other, text in texts.items() if other != name), name
    for name, most in (("README.md", 130), ("benchmarks/README.md", 150)):
        assert len(texts[name].splitlines()) <= most


def test_numbers_of_the_documents_are_those_of_the_package():
    recipes = list((ROOT / "search_spaces").glob("*.yaml"))
    assert f"{NUMBERS[len(recipes)]} recipes ship" in (ROOT / "README.md").read_text()
    tutorial = " ".join((ROOT / "docs/tutorial.md").read_text().split())
    [named] = re.findall(
        r"ImageNet with V2, R, A, Sketch and ObjectNet, DomainBed, WILDS, CIFAR and (\w+) more", tutorial
    )
    facts = {path.stem for path in (ROOT / "carft_ray/data/benchmarks/facts").glob("*.json")}
    domain_bed = {"pacs", "vlcs", "office-home", "terra-incognita", "domain-net"}
    others = facts - domain_bed - {"fmow", "iwildcam", "camelyon17", "objectnet"}
    assert named == NUMBERS[len([name for name in others if not name.startswith(("imagenet", "cifar"))])]


def test_the_functions_that_the_faq_names_are_those_that_are_commands():
    commands = {command.name or command.callback.__name__ for command in app.registered_commands}
    functions = sorted(commands & {*carft_ray.__all__})
    [answer] = re.findall(r"(?m)^Yes: (.* are functions) ", (ROOT / "docs/faq.md").read_text())
    assert sorted(re.findall(r"`(\w+)`", answer)) == functions


def test_each_statement_on_trust_names_the_test_that_holds_it():
    statements = re.findall(r"(?ms)^- .*?(?=^- |^$)", (ROOT / "docs/trust.md").read_text())
    assert len(statements) >= 20
    for statement in statements:
        named = re.findall(r"<!-- (\w+\.py)::(\w+) -->", statement)
        assert named
        assert statement.count("<!--") == len(named)
        for file, name in named:
            assert re.search(rf"(?m)^def {name}\(", (ROOT / "tests" / file).read_text()), name


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path


def test_what_is_run_elsewhere_is_run_there():
    for command, (place, text) in ELSEWHERE.items():
        assert text in (ROOT / place).read_text(), command


def test_the_recipe_of_the_readme_is_one(here):
    documents.draw_images(here / "my_images", ["photo", "painting", "sketch"], num_per_class=1)
    (written,) = re.findall(r"(?ms)^```yaml\n(.*?)^```", (ROOT / "README.md").read_text())
    assert len(written.splitlines()) == 15
    (here / "mine.yaml").write_text(written)
    recipe = load_recipe(here / "mine.yaml")
    assert {*recipe.search.space} == {"learning_rate", "kl_weight"}
    assert recipe.data.id_test is not None


@pytest.mark.whole
def test_the_commands_of_the_readme_run(here, capsys):
    """Each as it stands, in its order, on a small folder of images; the recipe that ``init`` writes is shortened."""
    documents.draw_images(here / "my_images", ["photo", "painting", "sketch"])
    lines = documents.commands("README.md")
    assert {*ELSEWHERE} < {*lines}
    for line in lines:
        if line in ELSEWHERE:
            continue
        if line.startswith("carft-ray init"):
            documents.run(line, capsys)
            assert "ViT-B-16" in (here / "recipe.yaml").read_text()  # what a reader gets; the weights are not here
            (here / "recipe.yaml").unlink()
            line += " --model sandbox"
        out, err = documents.run(line, capsys)
        if "init" in line:
            documents.shorten(here / "recipe.yaml")
    assert (here / "exports/mine/README.md").is_file()
    assert "test" in out + err or (here / "studies/mine/test").is_dir()


@pytest.mark.whole
def test_the_commands_of_the_tutorial_run(here, capsys):
    """All but those that make its folder of images, of which a small one is drawn here; its search is shorter."""
    documents.draw_images(here / "my_images", ["photo", "painting", "negative", "sketch", "cartoon"])
    for line in documents.commands("docs/tutorial.md"):
        if line.startswith(("mkdir", "mv")) or "sandbox images" in line:
            continue
        line = line.replace("trials=8", "trials=2").replace("epochs=4", "epochs=1")
        documents.run(line, capsys)
        if "init" in line:
            documents.shorten(here / "recipe.yaml")
    assert (here / "studies/mine/figure.png").is_file()
    assert (here / "studies/mine/report.html").is_file()
    exported = {path.name for path in (here / "exports/mine").iterdir()}
    assert {"open_clip_config.json", "class_head.safetensors", "README.md", "recipe.yaml"} <= exported
