"""The examples train, and started again they go on as if they had never been stopped."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from support.programs import Programs

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
CLASSES = 25  # of which two ranks own 13 and 12
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def programs():
    running = Programs()
    yield running
    running.close()


def resumed(programs, folder, name, *arguments, **options):
    """Two epochs at once, of which the second one has been run alone, too; of each rank."""
    script, given = EXAMPLES / f"{name}.py", ["--classes", CLASSES, *arguments]

    def run(output, epochs):
        output = folder / output
        return programs.run(script, "--output", output, "--epochs", epochs, *given, **options)

    whole = run("whole", 2)
    first, second = run("parts", 1), run("parts", 2)
    for a, b, right in zip(first, second, whole, strict=True):
        assert len(a.losses) == len(b.losses) > 1
        assert a.losses + b.losses == right.losses
        assert a.features + b.features == right.features
        assert a.updates + b.updates == right.updates
        assert b.step == right.step
        for x, y, z in zip(right.before, right.after, b.after, strict=True):
            assert np.array_equal(y, z)
            assert y.size == 0 or not np.array_equal(x, y)
    # Of the first rank: the others' are taken from it.
    assert whole[0].statistics
    assert all(map(np.array_equal, second[0].statistics, whole[0].statistics))
    return whole


def assert_shared(trained):
    """Ranks have one loss and one encoder, and each its own classes."""
    first, second = trained
    assert (first.losses, first.features) == (second.losses, second.features)
    assert all(map(np.array_equal, first.after[:-1], second.after[:-1]))
    assert [len(t.after[-1]) for t in trained] == [13, 12]


def draws(trained):
    return len({str(dimensions) for dimensions in trained.features})


def test_plain_loop(programs, tmp_path):
    (trained,) = resumed(programs, tmp_path, "plain_loop")
    assert draws(trained) == trained.updates == len(trained.losses) / 2
    assert trained.step == 0  # which the loop counts itself


def test_ddp(programs, tmp_path):
    trained = resumed(programs, tmp_path, "ddp", ranks=2)
    assert_shared(trained)
    assert draws(trained[0]) == trained[0].updates == trained[0].step == len(trained[0].losses)


def test_fsdp2(programs, tmp_path):
    given = {"ranks": 2, "imports": ("torch.distributed.fsdp",)}
    trained = resumed(programs, tmp_path, "fsdp2", **given)
    assert trained[0].losses == trained[1].losses
    assert [len(t.after[-1]) for t in trained] == [13, 12]
    assert draws(trained[0]) == trained[0].updates == trained[0].step == len(trained[0].losses)


@pytest.mark.parametrize("ranks", [1, 2])
def test_lightning(programs, tmp_path, ranks):
    pytest.importorskip("lightning")
    given = {"ranks": ranks, "imports": ("lightning",)}
    trained = resumed(programs, tmp_path, "with_lightning", **given)
    assert draws(trained[0]) == trained[0].updates < len(trained[0].losses)
    if ranks == 2:
        assert_shared(trained)


def test_transformers(programs, tmp_path):
    pytest.importorskip("transformers")
    (trained,) = resumed(programs, tmp_path, "with_transformers", imports=("transformers.trainer",))
    assert draws(trained) == trained.step == len(trained.losses) > trained.updates


@pytest.mark.parametrize("ranks", [1, 2])
def test_accelerate(programs, tmp_path, ranks):
    pytest.importorskip("accelerate")
    given = {"ranks": ranks, "imports": ("accelerate",)}
    trained = resumed(programs, tmp_path, "with_accelerate", **given)
    assert draws(trained[0]) == trained[0].step == len(trained[0].losses) > trained[0].updates
    if ranks == 2:
        assert_shared(trained)


def test_metric_learning(programs, tmp_path):
    pytest.importorskip("pytorch_metric_learning")
    given = {"imports": ("pytorch_metric_learning.trainers",)}
    (trained,) = resumed(programs, tmp_path, "with_metric_learning", **given)
    assert draws(trained) == trained.updates == trained.step == len(trained.losses)


def test_accelerate_goes_on_with_another_number_of_ranks(programs, tmp_path):
    pytest.importorskip("accelerate")
    given = [EXAMPLES / "with_accelerate.py", "--output", tmp_path, "--classes", CLASSES]
    (one,) = programs.run(*given, "--epochs", 1, imports=("accelerate",))
    two = programs.run(*given, "--epochs", 2, ranks=2, imports=("accelerate",))
    assert_shared(two)
    assert len(two[0].losses) == len(one.losses) // 2  # one epoch, of half as many batches
    assert two[0].step == len(one.losses) + len(two[0].losses)


def test_timm(programs, tmp_path):
    pytest.importorskip("timm")  # which pip installs with another torch: no test needs it
    (trained,) = resumed(programs, tmp_path, "with_timm")
    assert draws(trained) == trained.updates == trained.step == len(trained.losses)
