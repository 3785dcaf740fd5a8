"""WordNet's nouns, and which of them the name of an icon or a class of ImageNet means."""

import re
from collections.abc import Sequence
from dataclasses import dataclass

KINDS = {5, 6, 8, 13, 17, 18, 20}  # WordNet's files of animals, artifacts, bodies, foods, objects, persons and plants
GENERAL = {
    *("entity", "physical entity", "abstraction", "object", "whole", "part", "unit", "matter", "substance"),
    *("living thing", "organism", "causal agent", "chordate", "vertebrate", "placental", "carnivore"),
    *("artifact", "instrumentality", "device", "implement", "equipment", "container", "covering", "structure"),
    *("article", "commodity", "creation"),
}
SMALL_WORDS = {"with", "in", "of", "on", "for", "behind", "and", "from", "at", "to"}
LOOKS = {"face", "outline", "thin", "light", "bold", "fill", "duotone", "variant", "skin", "tone", "medium", "dark"}


@dataclass(frozen=True)
class Nouns:
    """WordNet's nouns.

    Attributes:
        words: Lemmas per synset.
        kind: Number of its lexicographer's file.
        above: Its hypernyms.
        gloss: Its definition.
        senses: Synsets of a lemma, the most frequent first.
    """

    words: dict[str, list[str]]
    kind: dict[str, int]
    above: dict[str, list[str]]
    gloss: dict[str, str]
    senses: dict[str, list[str]]


def read_nouns(data: str, index: str) -> Nouns:
    """Reads WordNet's `data.noun` and `index.noun`.

    Args:
        data: Text of the first file.
        index: Text of the second file.
    """
    nouns = Nouns({}, {}, {}, {}, {})
    for line in data.splitlines():
        if line.startswith(" "):  # the licence
            continue
        left, _, gloss = line.partition(" | ")
        fields = left.split(" ")
        synset, num_words = fields[0], int(fields[3], 16)
        nouns.words[synset] = [word.replace("_", " ").lower() for word in fields[4 : 4 + 2 * num_words : 2]]
        nouns.kind[synset], nouns.gloss[synset] = int(fields[1]), gloss.split('; "')[0].strip()
        pointers = fields[5 + 2 * num_words :]
        nouns.above[synset] = [pointers[i + 1] for i in range(0, len(pointers) - 3, 4) if pointers[i][:1] == "@"]
    for line in index.splitlines():
        if not line.startswith(" "):
            fields = line.split()
            nouns.senses[fields[0].replace("_", " ")] = fields[-int(fields[2]) :]
    return nouns


def with_hypernyms(synset: str, nouns: Nouns, levels: int = 7) -> list[str]:
    """Returns a synset and those above it that are not too general, nearest first."""
    found, row = [synset], [synset]
    for _ in range(levels):
        row = [above for below in row for above in nouns.above[below]]
        found += [one for one in row if nouns.words[one][0] not in GENERAL]
    return list(dict.fromkeys(found))


def synset_of_drawing(name: str, nouns: Nouns) -> str | None:
    """Returns the thing that the name of an icon means, or None if it means none that can be seen.

    The first of: the whole name, its last words, its first words, whichever is a noun of a visible thing.

    Args:
        name: For example `dog-face`, `person-in-suit-light-skin-tone`.
        nouns: WordNet.
    """
    words = re.sub(r"[-_0-9]+", " ", name).split()
    cut = next((i for i, word in enumerate(words) if word in SMALL_WORDS), len(words))
    words = [word for word in words[:cut] if word not in LOOKS]
    parts = [words[i:] for i in range(len(words))] + [words[:i] for i in range(len(words) - 1, 0, -1)]
    for part in parts:
        for synset in nouns.senses.get(" ".join(part), [])[:2]:
            if nouns.kind[synset] in KINDS or nouns.words[synset][0] == "person":
                return synset
    return None


def synset_of_class(lemmas: Sequence[str], gloss: str, nouns: Nouns) -> str:
    """Returns the synset of a class of ImageNet: the sense with its definition, otherwise with its words."""
    senses = [synset for lemma in lemmas for synset in nouns.senses.get(lemma, [])]
    same = [synset for synset in senses if nouns.gloss[synset].split(";")[0] == gloss.split(";")[0]]
    visible = [synset for synset in senses if nouns.kind[synset] in KINDS]
    return (same or visible or senses)[0]
