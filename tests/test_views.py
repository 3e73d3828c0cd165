"""A teacher that is asked about several views of each image: the mean of its answers, on the cells of the plain one."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from segkd.pipeline.config import RunConfig, load
from segkd.pipeline.data.readers import open_data
from segkd.pipeline.data.sample import Role, with_role
from segkd.pipeline.device import find_device
from segkd.pipeline.evaluation.evaluate import evaluate_network
from segkd.pipeline.models.network import Grid, NetworkConfig, Preprocessing, TeacherConfig, Views
from segkd.pipeline.models.predictor import Predictor
from segkd.pipeline.models.references import described, described_predictor
from segkd.pipeline.student.inputs import open_inputs
from segkd.pipeline.student.live import open_live_teacher
from segkd.pipeline.teacher.cache import teacher_cache
from segkd.pipeline.teacher.checks import self_disagreement
from segkd.pipeline.teacher.fingerprints import portable
from segkd.pipeline.teacher.opened import open_run
from segkd.pipeline.teacher.plan import plan
from segkd.storage.errors import CacheMismatchError, ConfigError, DataError, NetworkError
from segkd.storage.geometry import Convention
from segkd.storage.reader import CacheReader

CLASSES = ("bright", "dark")
GAIN = 4.0
AS_IT_IS = Preprocessing(mean=(0, 0, 0), std=(1, 1, 1))
Image = npt.NDArray[np.uint8]


class Brightness(nn.Module):
    """A network whose first class has log odds of the red in a cell, on the grid that it is told of."""

    def __init__(self, convention: Convention = "span", stride: int = 8) -> None:
        super().__init__()
        self.grid = Grid(stride=stride, convention=convention)
        self.num_classes = 2
        self.shown: list[tuple[int, ...]] = []

    def forward(self, images: Tensor) -> Tensor:
        self.shown.append(tuple(images.shape))
        height, width = images.shape[-2:]
        stride = self.grid.stride
        if self.grid.convention == "stride":
            red = images[:, :1, ::stride, ::stride]
        else:
            red = shares(height, stride) @ images[:, :1] @ shares(width, stride).T
        return torch.cat([GAIN * red, torch.zeros_like(red)], 1)


def shares(pixels: int, stride: int) -> Tensor:
    """cells,pixels: what of each pixel lies in each of the cells that divide an axis evenly; rows add to 1."""
    cells = -(-pixels // stride)
    borders, pixel = torch.arange(cells + 1) * pixels / cells, torch.arange(pixels)
    lengths = torch.minimum(borders[1:, None], pixel + 1) - torch.maximum(borders[:-1, None], pixel)
    return lengths.clamp_min(0) * cells / pixels


def predictor_of(views: Views, preprocessing: Preprocessing = AS_IT_IS, convention: Convention = "span") -> Predictor:
    described = TeacherConfig(reference="brightness", preprocessing=preprocessing, views=views)
    return Predictor(Brightness(convention), described, CLASSES)


def noise(height: int, width: int) -> Image:
    return np.random.default_rng(height * width).integers(30, 226, (height, width, 3), np.uint8)


def ramp(height: int, width: int) -> Image:
    """Red that rises to the right and downwards."""
    y, x = np.mgrid[:height, :width]
    red = 20 + 100 * x / width + 100 * y / height
    return np.repeat(red.round().astype(np.uint8)[..., None], 3, 2)


def slowly(image: Image, views: Views, preprocessing: Preprocessing) -> npt.NDArray[np.float64]:
    """The mean over the views for cells that are at most as fine as the plain image's, cell by cell."""
    width = image.shape[1]
    plain = Predictor(Brightness(), NetworkConfig(reference="brightness", preprocessing=preprocessing), CLASSES)
    _, target = plain.predict([image])
    total = np.zeros((2, *target.shape))
    answers = 0
    for scale in views.scales:
        seen_at = replace(preprocessing, scale=preprocessing.scale * scale)
        network = Predictor(Brightness(), NetworkConfig(reference="brightness", preprocessing=seen_at), CLASSES)
        for mirrored in [False, True] if views.flip else [False]:
            seen = np.ascontiguousarray(image[:, ::-1]) if mirrored else image
            log_probs, mapping = network.predict([seen])
            logs = log_probs[0].double().numpy()
            answers += 1
            for row in range(target.y.cells):
                for column in range(target.x.cells):
                    y = target.y.scale * row + target.y.offset
                    x = target.x.scale * column + target.x.offset
                    x = width - 1 - x if mirrored else x
                    y_cell = min(max((y - mapping.y.offset) / mapping.y.scale, 0), mapping.y.cells - 1)
                    x_cell = min(max((x - mapping.x.offset) / mapping.x.scale, 0), mapping.x.cells - 1)
                    y0, x0 = int(y_cell), int(x_cell)
                    y1, x1 = min(y0 + 1, mapping.y.cells - 1), min(x0 + 1, mapping.x.cells - 1)
                    upper = logs[:, y0, x0] * (1 - (x_cell - x0)) + logs[:, y0, x1] * (x_cell - x0)
                    lower = logs[:, y1, x0] * (1 - (x_cell - x0)) + logs[:, y1, x1] * (x_cell - x0)
                    there = np.exp(upper * (1 - (y_cell - y0)) + lower * (y_cell - y0))
                    total[:, row, column] += there / there.sum()
    mean: npt.NDArray[np.float64] = total / answers
    return mean


@pytest.mark.parametrize("views", [Views(flip=True), Views(scales=(0.5, 1.0)), Views(flip=True, scales=(1.0, 0.75))])
@pytest.mark.parametrize("preprocessing", [AS_IT_IS, replace(AS_IT_IS, multiple_of=32), replace(AS_IT_IS, scale=0.8)])
def test_the_answer_is_the_mean_of_the_probabilities(views: Views, preprocessing: Preprocessing) -> None:
    image = noise(61, 93)
    log_probs, mapping = predictor_of(views, preprocessing).predict([image, image[::-1].copy()])
    assert mapping.shape == tuple(log_probs.shape[-2:])
    expected = slowly(image, views, preprocessing)
    np.testing.assert_allclose(log_probs[0].exp().numpy(), expected, atol=1e-5)
    np.testing.assert_allclose(log_probs.exp().sum(1).numpy(), 1, atol=1e-6)


@pytest.mark.parametrize("convention", ["span", "stride"])
@given(
    height=st.integers(64, 100),
    width=st.integers(64, 100),
    flip=st.booleans(),
    scales=st.lists(st.sampled_from([0.5, 0.75, 1.25, 1.5, 2.0]), min_size=1, max_size=3, unique=True),
)
def test_a_ramp_stays_where_it_is(
    convention: Convention, height: int, width: int, flip: bool, scales: list[float]
) -> None:
    """At every size and scale, mirrored or not: a view that lay half a cell off would tilt it or move it."""
    image = ramp(height, width)
    log_probs, mapping = predictor_of(Views(flip=flip, scales=(1.0, *scales)), convention=convention).predict([image])
    plain, same = predictor_of(Views(), convention=convention).predict([image])
    assert mapping == same
    # Beyond a view's outermost centres its values stay what they are there.
    inside = (slice(None), slice(None), slice(2, -2), slice(2, -2))
    a_cell = 100 / 255 * 8 / max(height, width)
    # Pixels hold whole numbers, at every size anew, and without a mean one of them is all that a cell knows.
    rounding = 0.75 / 255 if convention == "span" else 1.1 / 255
    seen, expected = ((odds[:, :1] - odds[:, 1:]) / GAIN for odds in (log_probs, plain))
    assert float((seen - expected)[inside].abs().max()) < 0.01 * a_cell + rounding


def test_a_teacher_that_sees_both_sides_takes_none() -> None:
    """Mirrored, it says the same, mirrored: whatever it prefers."""
    predictor = predictor_of(Views(flip=True, scales=(1.0, 1.5)))
    image = noise(48, 64)
    straight, _ = predictor.predict([image])
    mirrored, _ = predictor.predict([image[:, ::-1].copy()])
    torch.testing.assert_close(mirrored.flip(-1), straight, atol=1e-5, rtol=0)


def test_one_view_of_another_scale_is_brought_to_the_plain_cells() -> None:
    predictor = predictor_of(Views(scales=(2.0,)))
    log_probs, mapping = predictor.predict([ramp(64, 96)])
    assert predictor.network.shown == [(1, 3, 128, 192)]  # type: ignore[union-attr]
    assert mapping == predictor_of(Views()).mapping(64, 96)
    assert log_probs.shape == (1, 2, 8, 12)


def test_where_every_image_is_resized_views_are_resized_from_there() -> None:
    predictor = predictor_of(Views(scales=(1.0, 0.5)), replace(AS_IT_IS, resize=(80, 112)))
    predictor.predict([noise(40, 56)])
    assert predictor.network.shown == [(1, 3, 80, 112), (1, 3, 40, 56)]  # type: ignore[union-attr]


def test_a_view_whose_cells_all_lie_in_padding_is_refused(run: Path) -> None:
    """It would count as a teacher that knows nothing."""
    predictor = predictor_of(Views(scales=(1.0, 0.25)), replace(AS_IT_IS, multiple_of=32))
    # 12 pixels become 3 of 32, and the first centre lies at 3.5: 14 in the image.
    assert (predictor.blind_scale(12, 64), predictor.blind_scale(64, 64)) == (0.25, None)
    expected = (
        "img: no cell of the network lies in its 12x64 pixels at 0.25 times its size; leave 0.25 out of "
        "teacher.views.scales, or leave the image out"
    )
    with pytest.raises(NetworkError, match=f"^{re.escape(expected)}$"):
        predictor.predict([noise(12, 64)], ["img"])
    with pytest.raises(
        NetworkError, match=r"^an image: no cell of the network lies in its 12x64 pixels at 0\.25 times"
    ):
        predictor_of(Views(scales=(0.25,)), replace(AS_IT_IS, multiple_of=32)).predict([noise(12, 64)])
    # Three pixels, padded to 32: the first centre lies at 3.5. Twice as large it would be seen.
    large = predictor_of(Views(scales=(2.0,)), replace(AS_IT_IS, multiple_of=32))
    assert large.blind_scale(3, 64) == 1
    settings = [
        "teacher.views.scales=[0.0625]",
        "teacher.preprocessing.scale=0.5",
        "teacher.preprocessing.multiple_of=32",
    ]
    with pytest.raises(DataError, match=r"^\w/0: no cell of the network lies in its \d+x\d+ pixels at 0\.0625 times"):
        open_run(load(run, settings))


def test_a_plain_teacher_is_asked_once_and_answers_as_ever() -> None:
    plain = predictor_of(Views())
    log_probs, _ = plain.predict([noise(40, 56)])
    student = Predictor(Brightness(), NetworkConfig(reference="brightness", preprocessing=AS_IT_IS), CLASSES)
    assert torch.equal(log_probs, student.predict([noise(40, 56)])[0])
    assert plain.network.shown == [(1, 3, 40, 56)]  # type: ignore[union-attr]


def test_a_description_without_views_is_what_it_was_before_there_were_any() -> None:
    """So that caches that are older than views are still of their teacher."""
    assert portable(TeacherConfig(reference="enet")) == portable(NetworkConfig(reference="enet"))
    assert portable(TeacherConfig(reference="enet", views=Views(flip=True)))["views"] == {
        "flip": True,
        "scales": (1.0,),
    }


@pytest.mark.parametrize(
    ("scales", "problem"),
    [
        ("[]", "scales is []; it must name at least one factor, from 1/16 to 16"),
        ("[1.0, 0.0]", "scales is [1.0, 0.0]; it must name at least one factor, from 1/16 to 16"),
        ("[17.0]", "scales is [17.0]; it must name at least one factor, from 1/16 to 16"),
        ("[1.0, 0.5, 1.0]", "scales is [1.0, 0.5, 1.0]; they must differ"),
    ],
)
def test_scales_that_mean_nothing_are_refused(run: Path, scales: str, problem: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(problem)):
        load(run, [f"teacher.views.scales={scales}"])


def test_a_student_has_no_views(run: Path) -> None:
    with pytest.raises(ConfigError, match=r"--set student\.views\.flip=true: student\.views: there is no such key"):
        load(run, ["student.reference='enet'", "student.views.flip=true"])


def averaged(run: Path, *settings: str) -> RunConfig:
    return load(run, ["teacher.views.flip=true", "teacher.views.scales=[1.0,1.5]", *settings])


@pytest.mark.parametrize(
    ("settings", "passes"),
    [
        (["teacher.views.flip=true", "teacher.views.scales=[1.0,1.5]"], None),
        (["teacher.views.window=[16,16]", "teacher.preprocessing.multiple_of=4"], (16, 16)),
    ],
)
def test_stage_1_keeps_the_average(run: Path, settings: list[str], passes: tuple[int, int] | None) -> None:
    """Over views, and over windows."""
    config = load(run, [*settings, 'cache.profile="exact"'])
    assert teacher_cache(config).sealed
    reader, data = CacheReader(config.cache.path), open_data(config.data)
    predictor = described_predictor(config.the_teacher(), data.classes.names, device=torch.device("cpu"))
    for sample in with_role(data, *config.cache.roles):
        seen = predictor.seen(*data.size(sample))
        assert len(seen) == 4 if passes is None else len(seen) > 1 and {*seen} == {passes}
        log_probs, mapping = predictor.predict([data.image(sample)])
        entry = reader.entry(sample.id)
        assert entry.mapping == mapping
        kept = torch.from_numpy(reader.values(entry, "soft"))[None]
        torch.testing.assert_close(kept.exp(), log_probs.exp(), atol=2e-3, rtol=0)


def test_another_choice_of_views_is_another_teacher(run: Path) -> None:
    teacher_cache(load(run))
    with pytest.raises(CacheMismatchError, match="teacher"):
        teacher_cache(averaged(run))
    with pytest.raises(CacheMismatchError, match=re.escape("views.flip (False, now True), views.scales")):
        open_inputs(averaged(run, "student.reference='enet'"), NetworkConfig(reference="enet"), distill=True)


STATED = """

SEGKD_NETWORK = {"views": {"flip": True}}
"""


def test_what_a_module_says_of_views_counts_beside_what_the_run_file_says(run: Path) -> None:
    config = load(run)
    module = Path(config.the_teacher().reference.partition(":")[0])
    module.write_text(module.read_text() + STATED)
    both = load(run, ["teacher.views.scales=[1.0,1.5]"])
    assert len(open_run(both).predictor.views) == 4
    teacher_cache(both)
    # The run file leaves flip at its default, which says nothing.
    assert open_inputs(both, described(both.the_student()), distill=True)
    # As a student it is asked plainly, whatever it says of itself as a teacher.
    student = described(NetworkConfig(reference=both.the_teacher().reference))
    assert type(student) is NetworkConfig


def test_what_is_so_by_construction_is_no_noise(run: Path) -> None:
    """A teacher that sees both sides does not disagree with itself in the mirror."""
    plain, both = (open_run(config) for config in (load(run), load(run, ["teacher.views.flip=true"])))
    sample = plain.planned[0].id
    images = [(sample, plain.data.image(plain.samples[sample]))]
    alone, averaged = (self_disagreement(opened.predictor, images) for opened in (plain, both))
    assert alone["flip"] is not None
    assert averaged["flip"] is None
    assert averaged["scale 1/2"] is not None
    # This one says the same of a mirrored image whether it is asked so or not; advice must not come of rounding.
    found = plan(load(run))
    (warning,) = (warning for warning in found.warnings if "set cache.max_kl" in warning)
    least = min(nats for nats in found.disagreement.values() if nats is not None and nats > 1e-6)
    assert f"disagreement with itself, {least:.3g};" in warning
    assert min(nats for nats in found.disagreement.values() if nats is not None) < 1e-6


def test_a_teacher_beside_the_student_is_asked_alike(run: Path) -> None:
    config = averaged(run)
    data = open_data(config.data)
    live = open_live_teacher(config, data.classes, ("soft",))
    assert live.fingerprints["teacher"] == open_run(config).spec.fingerprints["teacher"]
    assert live.fingerprints["teacher"] != open_run(load(run)).spec.fingerprints["teacher"]


def test_what_views_cost_is_told(run: Path) -> None:
    costs = []
    for config in (load(run), averaged(run)):
        data = open_data(config.data)
        predictor = described_predictor(config.the_teacher(), data.classes.names, device=find_device("cpu"))
        cost = evaluate_network(predictor, data, Role.REPORT).cost
        assert cost is not None
        costs.append(cost)
    plain, views = costs
    assert (plain.passes, views.passes) == (1, 4)
    assert "passes" not in plain.text()
    assert views.text().endswith(" in 4 passes")
    # Twice at the image's size and twice at 1.5 times its sides, up to how sizes are rounded.
    assert views.flops == pytest.approx(plain.flops * (2 + 2 * 1.5**2), rel=0.2)
