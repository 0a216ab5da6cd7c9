import copy
import math

import pytest
import torch
from torch import nn

from memfit import checkpoint as checkpoints
from memfit.errors import CheckpointError, DataError, MemfitError
from memfit.nvm.model import CharacterNet
from memfit.nvm.online import learn_online, moving_average
from memfit.nvm.schemes import RATES, SCHEMES, Learner, Rates, Writes
from memfit.nvm.streams import UserStream
from memfit.nvm.worlds import WORLDS, ImageStream
from memfit.weights.quantize import quantize


def learner(scheme: str, seed: int = 0) -> Learner:
    torch.manual_seed(1)
    return Learner(CharacterNet(8, 3), scheme, Rates(0.1, 0.05), limit=1.0, seed=seed, writes=Writes(30, 0.01))


def state(one: Learner) -> dict[str, torch.Tensor]:
    return {key: value for key, value in one.model.state_dict().items() if isinstance(value, torch.Tensor)}


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("world", ["control", "analog"])
def test_a_run_that_is_resumed_ends_with_the_same_bits(images, tmp_path, scheme, world, monkeypatch):
    monkeypatch.setattr("memfit.nvm.online.EVERY", 100)
    stream = ImageStream(images, world, 0)
    whole, path = learner(scheme), tmp_path / "run.safetensors"
    record = learn_online(whole, stream, world=world, seed=0, samples=250)

    learn_online(learner(scheme), stream, world=world, seed=0, samples=100, checkpoint=path)
    torch.rand(3)  # what else draws random numbers does not matter
    resumed = learner(scheme)
    again = learn_online(resumed, stream, world=world, seed=0, samples=250, checkpoint=path, resume=True)
    assert torch.equal(record.correct, again.correct)
    assert torch.equal(record.worst, again.worst)
    for key, value in state(whole).items():
        assert torch.equal(value, state(resumed)[key]), key

    finished = learner(scheme)
    learn_online(finished, stream, world=world, seed=0, samples=250, checkpoint=path, resume=True)
    for key, value in state(whole).items():
        assert torch.equal(value, state(finished)[key]), key


def test_each_scheme_writes_what_it_is_for(images):
    stream = ImageStream(images, "control", 0)
    start = copy.deepcopy(learner("inference").model.state_dict())
    biases = [key for key in start if key.endswith("bias")]
    weights = [key for key in start if key.endswith("weight")]
    assert biases
    for scheme in SCHEMES:
        one = learner(scheme)
        learn_online(one, stream, world="control", seed=0, samples=200)
        after = state(one)
        moved = any(not torch.equal(after[key], start[key]) for key in biases if key in after)
        assert moved == (scheme != "inference")
        assert all(torch.equal(value, quantize(value, 16, -8, 8)) for key, value in after.items() if key in biases)
        writes = sum(int(array.writes.sum()) for array in one.arrays)
        assert (writes > 0) == (scheme not in ("inference", "bias"))
        assert int(one.arrays[0].reads) == 200 * (1 if scheme == "inference" else 2)
        assert len(one.arrays) == len(weights) == 6
        for array in one.arrays:
            assert torch.equal(array.values, quantize(array.values.detach(), 8, -1, 1))
        if scheme.startswith("low-rank"):
            assert max(int(array.writes.max()) for array in one.arrays) <= 200 // 30


def test_only_drift_changes_the_cells_of_a_device_that_does_not_learn(images):
    for world in WORLDS:
        one = learner("inference")
        before = [array.values.clone() for array in one.arrays]
        learn_online(one, ImageStream(images, world, 0), world=world, seed=0, samples=100)
        same = all(torch.equal(array.values, old) for array, old in zip(one.arrays, before, strict=True))
        assert same == (world in ("control", "shift"))


def test_what_is_predicted_is_predicted_before_it_is_learned_from(images):
    inputs, labels = ImageStream(images, "control", 0).chunk(0)
    one = learner("sgd")
    expected = []
    for number in range(30):
        with torch.no_grad():
            expected.append(int(one.model(inputs[number : number + 1]).argmax()) == int(labels[number]))
        assert one.learn(inputs[number : number + 1], labels[number : number + 1]) == expected[-1]


def test_the_moving_average_is_its_own_sum():
    correct = torch.rand(300, generator=torch.Generator().manual_seed(0)) < 0.7
    found = moving_average(correct, 0.9)
    for end in (1, 2, 50, 300):
        weights = [0.9 ** (end - 1 - number) for number in range(end)]
        mean = sum(w * bool(c) for w, c in zip(weights, correct[:end], strict=True)) / sum(weights)
        assert float(found[end - 1]) == pytest.approx(mean)


def test_a_checkpoint_of_another_run_is_refused(images, tmp_path):
    stream, path = ImageStream(images, "control", 0), tmp_path / "run.safetensors"

    def go(samples: int, **settings: int) -> None:
        learn_online(
            learner("bias"),
            stream,
            world="control",
            seed=0,
            samples=samples,
            checkpoint=path,
            resume=True,
            settings=settings,
        )

    go(150, seed=0)
    with pytest.raises(CheckpointError, match="seed was 0 and is 1"):
        go(150, seed=1)
    with pytest.raises(CheckpointError, match="150"):
        go(100, seed=0)
    with pytest.raises(CheckpointError, match="150"):
        go(300, seed=0)
    checkpoints.save(path, {"model": 1})
    with pytest.raises(CheckpointError, match="memfit nvm"):
        go(150, seed=0)


def test_streams_of_the_users_own_give_the_same_samples_from_any_chunk():
    def make():
        return ((torch.full((2,), float(number)), torch.tensor(number % 3)) for number in range(250))

    stream = UserStream(make, "mine:make")
    last = stream.chunk(2)
    assert last[0][:, 0].tolist() == list(range(200, 250))
    first = stream.chunk(0)
    second = stream.chunk(1)
    assert torch.cat([first[1], second[1], last[1]]).tolist() == [number % 3 for number in range(250)]
    assert len(stream.chunk(3)[1]) == 0
    model = nn.Sequential(nn.Linear(2, 3))
    one = Learner(model, "bias", Rates(0, 0.01), limit=None, seed=0)
    with pytest.raises(DataError, match="ends after 250 samples"):
        learn_online(one, stream, world="control", seed=0, samples=1000)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: 3, "iterable"),
        (lambda: [torch.zeros(2)], "pairs"),
        (lambda: [(torch.zeros(2), 0), (torch.zeros(3), 0)], "put together"),
        (lambda: [(torch.zeros(2), "cat")], "is no label: labels are whole numbers from 0, not words"),
    ],
)
def test_a_stream_that_gives_something_else_is_refused(make, words):
    with pytest.raises(DataError, match=words):
        UserStream(make, "mine:make").chunk(0)


def test_models_that_the_device_cannot_hold_are_refused():
    with pytest.raises(MemfitError, match=r"no nn\.Conv2d"):
        Learner(nn.Sequential(nn.ReLU()), "sgd", RATES["sgd"], limit=None, seed=0)
    model = nn.Sequential(nn.Linear(2, 2), nn.LayerNorm(2))
    model[1].weight.data.fill_(9.0)
    with pytest.raises(MemfitError, match=r"1\.weight.*values of up to 9"):
        Learner(model, "sgd", RATES["sgd"], limit=None, seed=0)
    for lr in (-1.0, math.nan, math.inf):
        with pytest.raises(MemfitError, match="learning rate"):
            Rates(lr, 0.1)


def test_weights_of_any_size_fit_the_cells_of_their_own_layer():
    for scheme in SCHEMES:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 2))
        model[0].weight.data.mul_(20)
        before = model[0].weight.detach().clone()
        one = Learner(model, scheme, Rates(0.1, 0.1), limit=None, seed=0)
        assert one.arrays[0].high >= float(before.abs().max())
        assert float((one.arrays[0].values - before).detach().abs().max()) <= one.arrays[0].step
