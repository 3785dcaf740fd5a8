"""The documents: their commands, their links, and a small folder of images on which their commands run."""

import re
import shlex
from pathlib import Path

from crash_host import call
from PIL import Image
from suggestions import check_suggestions

from carft_ray.data.synthetic.sandbox import CLASSES, render

ROOT = Path(__file__).resolve().parents[1]
PLACES = ("*.md", "docs/*.md", "search_spaces/*.md", "cluster/*.md", "benchmarks/*.md", "examples/*.md")
DOCUMENTS = tuple(path.relative_to(ROOT).as_posix() for place in PLACES for path in sorted(ROOT.glob(place)))
# seconds instead of minutes, in this process
SHORTER = {r"trials: \d+": "trials: 2", r"epochs: \d+": "epochs: 1", r"batch_size: \d+": "batch_size: 32"}


def code_lines(names=DOCUMENTS):
    """Yields the lines of all code blocks, fenced or indented, with continued lines joined and prompts removed."""
    for name in names:
        text = (ROOT / name).read_text()
        fenced = re.findall(r"(?ms)^```[a-z]*\n(.*?)^```", text)
        rest = re.sub(r"(?ms)^```.*?^```", "", text)
        lines = [line for block in fenced for line in block.replace("\\\n", " ").splitlines()]
        lines += [line for line in rest.replace("\\\n", " ").splitlines() if line.startswith("    ")]
        yield from ((name, line.strip().removeprefix("$ ").removeprefix(".venv/bin/")) for line in lines)


def commands(name):
    """Returns the command lines of a document, without their comments."""
    return [line.split("  #")[0].rstrip() for line in console_lines(name)]


def console_lines(name):
    """Returns the lines of a document's blocks of commands that begin with a prompt."""
    blocks = re.findall(r"(?ms)^```console\n(.*?)^```", (ROOT / name).read_text())
    lines = [line for block in blocks for line in block.replace("\\\n", " ").splitlines() if line.startswith("$ ")]
    return [line.removeprefix("$ ").removeprefix(".venv/bin/") for line in lines]


def draw_images(folder, domains, num_per_class=10):
    """Writes pictures of the sandbox as ``folder/domain/class/number.png``, for its tiny CLIP."""
    for domain in domains:
        for name in CLASSES:
            (folder / domain / name).mkdir(parents=True)
            for index in range(num_per_class):
                pixels, _ = render(domain, "train", name, index)
                Image.fromarray(pixels).save(folder / domain / name / f"{index}.png")


def shorten(recipe):
    """Makes the searches of a recipe short."""
    text = recipe.read_text()
    for long, short in SHORTER.items():
        text = re.sub(long, short, text)
    recipe.write_text(text.replace("resources:\n", "resources:\n  executor: debug\n"))


def run(line, capsys, *more):
    """Runs a command line of carft-ray, which must succeed; returns its output and messages."""
    capsys.readouterr()
    code = call([*shlex.split(line)[1:], *more])
    told = capsys.readouterr()
    assert code == 0, f"{line}\n{told.out}\n{told.err}"
    check_suggestions(told.err)
    return told.out, told.err
