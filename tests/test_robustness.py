"""Effective robustness: identities on the line, when it is not defined, and the reference file."""

import numpy as np
import pytest
import scipy.stats
from scipy.special import expit, logit

from carft_ray.errors import DataError
from carft_ray.evaluation.robustness import CAVEAT, above_line, read_reference

SLOPE, INTERCEPT = 0.9, -1.1
IDS = (0.55, 0.62, 0.66, 0.71, 0.8, 0.83)
MANY = (100_000, 100_000)  # images: nothing is clipped


def line(id_accuracy):
    return float(expit(SLOPE * logit(id_accuracy) + INTERCEPT))


ON_LINE = {f"model{i}": (x, line(x)) for i, x in enumerate(IDS)}


@pytest.mark.parametrize("id_accuracy", [0.56, 0.7, 0.829])
def test_points_on_the_line_have_none(id_accuracy):
    found = above_line("effective_robustness", ON_LINE, (id_accuracy, line(id_accuracy)), MANY)
    assert found.value == pytest.approx(0, abs=1e-12)
    assert found.expected == pytest.approx(line(id_accuracy), abs=1e-12)
    assert (found.extrapolated, found.reason) == (False, "")
    assert found.models == tuple(ON_LINE)


@pytest.mark.parametrize("shift", [-1.5, 0.2, 3])
@pytest.mark.parametrize("id_accuracy", [0.6, 0.75])
def test_a_shift_of_the_ood_logit_gives_what_it_does_to_the_accuracy(shift, id_accuracy):
    on_line = logit(line(id_accuracy))
    found = above_line("effective_robustness", ON_LINE, (id_accuracy, float(expit(on_line + shift))), MANY)
    assert found.value == pytest.approx(expit(on_line + shift) - expit(on_line), abs=1e-12)


def test_the_line_is_that_of_scipy():
    rng = np.random.default_rng(0)
    models = {f"m{i}": (float(x), float(y)) for i, (x, y) in enumerate(rng.uniform(0.3, 0.9, (12, 2)))}
    x, y = logit(np.array(list(models.values()))).T
    fit = scipy.stats.linregress(x, y)
    found = above_line("effective_robustness", models, (0.5, 0.6), MANY)
    assert found.expected == pytest.approx(expit(fit.slope * logit(0.5) + fit.intercept), abs=1e-12)
    assert found.value == pytest.approx(0.6 - found.expected, abs=1e-12)


def test_it_is_not_defined_with_few_models_or_a_narrow_range():
    few = dict(list(ON_LINE.items())[:4])
    found = above_line("effective_robustness", few, (0.6, 0.5), MANY)
    assert (found.value, found.expected) == (None, None)
    assert found.words == "effective_robustness is not defined: it needs at least 5 models, but got 4"
    assert above_line("effective_robustness", {}, (0.6, 0.5), MANY).value is None
    narrow = {f"m{i}": (0.7 + 0.01 * i, 0.5) for i in range(5)}
    found = above_line("effective_robustness", narrow, (0.7, 0.5), MANY)
    assert found.words.endswith("must span 5 points of ID accuracy, but got 4.0")
    wide = {f"m{i}": (0.7 + 0.0125 * i, 0.5) for i in range(5)}  # just 5 points
    assert above_line("effective_robustness", wide, (0.7, 0.5), MANY).value == pytest.approx(0, abs=1e-12)


def test_extrapolation_is_marked_and_said():
    inside, below = ((x, 0.5) for x in (0.55, 0.54))
    assert not above_line("effective_robustness", ON_LINE, inside, MANY).extrapolated
    found = above_line("effective_robustness", ON_LINE, below, MANY)
    assert found.extrapolated
    assert found.words.endswith("extrapolated beyond their ID accuracies 0.550 to 0.830")
    assert "over 6 models: model0, model1" in found.words


def test_accuracies_of_zero_and_one_are_clipped_by_the_number_of_images():
    models = {**ON_LINE, "none": (0.5, 0.0), "all": (1.0, 1.0)}
    clipped = {**ON_LINE, "none": (0.5, 1 / 400), "all": (1 - 1 / 1000, 1 - 1 / 400)}
    found, same = (above_line("effective_robustness", each, (0.7, 1.0), (500, 200)) for each in (models, clipped))
    assert found.value == pytest.approx(same.value, abs=1e-12)
    assert found.value == pytest.approx(1 - 1 / 400 - found.expected, abs=1e-12)


def test_the_line_through_plain_fine_tuning_has_another_name():
    found = above_line("gain_over_ft_line", ON_LINE, (0.7, line(0.7)), MANY)
    assert found.measure == "gain_over_ft_line"
    assert found.value == pytest.approx(0, abs=1e-12)
    assert found.words.startswith("gain_over_ft_line")
    assert "2302.01381" in CAVEAT


def test_a_reference_file_gives_the_models_of_each_set(tmp_path):
    path = tmp_path / "models.csv"
    path.write_text("model,acc_id,acc_ood/sketch,acc_ood/noisy\nresnet,0.7,0.4,0.5\nvit,0.8,,0.6\n")
    assert read_reference(path) == {
        "sketch": {"resnet": (0.7, 0.4)},
        "noisy": {"resnet": (0.7, 0.5), "vit": (0.8, 0.6)},
    }


def test_every_bad_cell_of_a_reference_file_is_named(tmp_path):
    path = tmp_path / "models.csv"
    path.write_text("model,acc_id,acc_ood/sketch\nresnet,70.1,0.4\nresnet,0.7,x\n,0.5,0.5\n")
    with pytest.raises(DataError) as error:
        read_reference(path)
    text = str(error.value)
    assert len(error.value.problems) == 4
    assert ":2: acc_id: must be a fraction from 0 to 1, but got '70.1'\n    Percent? Divide by 100." in text
    assert ":3: model: must be a name, each once, but got 'resnet'" in text
    assert ":3: acc_ood/sketch: must be a fraction from 0 to 1, but got 'x'" in text
    path.write_text("model,acc_id\nresnet,0.7\n")
    with pytest.raises(DataError, match=r"columns model, acc_id and one acc_ood/<set>.*got model, acc_id"):
        read_reference(path)
    for bad, rule in ((tmp_path / "none.csv", "must be a readable CSV file"), (tmp_path, "must be a regular file")):
        with pytest.raises(DataError, match=rule):
            read_reference(bad)
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(DataError, match="must be text in UTF-8"):
        read_reference(path)
