"""Accumulation, autocast, averaged weights, early stopping, workers, and images that are spoilt."""

from __future__ import annotations

import dataclasses
import io
import json
import signal
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import torch
from support.images import exactly, pictures
from support.training import (
    DATA,
    FLAT,
    PARTS,
    STEPS,
    TINY,
    apart_from_timing,
    assert_same_bits,
    run,
    saved,
    synthetic,
)

from unicom_ext.data.images.imageset import ImageSet
from unicom_ext.data.images.opening import Parts
from unicom_ext.data.images.pictures import ArrayPictures, PictureError
from unicom_ext.train import checkpoints, report
from unicom_ext.train import run as driver
from unicom_ext.train.interrupt import Interrupted
from unicom_ext.train.trainer import Trainer
from unicom_ext.utils.files import CheckpointError
from unicom_ext.utils.settings import ConfigError


@pytest.fixture(autouse=True)
def no_report(monkeypatch):
    """Drawing takes longer than training here."""
    monkeypatch.setattr(report, "write", lambda *arguments: None)


def changed(**settings):
    return dataclasses.replace(TINY, **settings)


def interrupted(tmp_path, after, **options):
    """A run that is stopped after so many steps, and goes on."""

    def stop(done):
        if done == after:
            signal.raise_signal(signal.SIGINT)

    with pytest.raises(Interrupted):
        run(tmp_path, on_step=stop, **options)
    return run(tmp_path, resume=True, **options)


# ---- accumulation --------------------------------------------------------------------------------


def losses_of_flat(group, accumulate, **settings):
    """Losses of two epochs, and the dimensions that each part of a step has drawn."""
    config = changed(batch_size=23, accumulate=accumulate, encoder=FLAT, **settings)
    trainer = Trainer(config, DATA[0], group)
    drawn = []
    trainer.loss.register_forward_hook(
        lambda loss, *_: drawn.append(tuple(loss.last_selection.feature_index.tolist()))
    )
    losses = [trainer.step_once() for _ in range(2 * trainer.steps_per_epoch)]
    assert int(trainer.loss.step) == len(losses)
    return losses, drawn


@pytest.mark.parametrize("accumulate", [2, 5])
def test_parts_of_a_batch_are_of_one_step(accumulate):
    """Batches of 23 and, at the end of an epoch, 5: parts of unequal sizes, and empty ones."""
    _, once = losses_of_flat(None, 1)
    losses, drawn = losses_of_flat(None, accumulate)
    assert drawn == [dims for dims in once for _ in range(accumulate)]
    assert np.isfinite(losses).all()


@pytest.mark.parametrize("accumulate", [2, 4])
def test_parts_have_the_loss_and_gradient_of_the_batch(accumulate):
    """With all classes in each part's softmax."""
    right, _ = losses_of_flat(None, 1, sample_rate=1.0)
    assert losses_of_flat(None, accumulate, sample_rate=1.0)[0] == pytest.approx(right, rel=1e-5)


def losses_of_ranks(group, accumulate):
    return losses_of_flat(group, accumulate, sample_rate=1.0)[0]


@pytest.mark.slow
def test_ranks_accumulate_too(ranks):
    right = losses_of_ranks(None, 1)
    for losses in ranks.run(2, losses_of_ranks, 3):
        assert losses == pytest.approx(right, rel=1e-5)


def test_too_many_parts():
    message = r"batch_size: got 16, must be at least 2 for each of 9 parts of the 1 ranks"
    with pytest.raises(ConfigError, match=message):
        Trainer(changed(accumulate=9), DATA[0])


# ---- precision, averages, compilation ------------------------------------------------------------


@pytest.mark.parametrize("autocast", ["bf16", "fp16"])
def test_autocast(tmp_path, autocast):
    config = changed(autocast=autocast)
    seen = set()
    trainer = Trainer(config, DATA[0])
    trainer.encoder.layers[0].register_forward_hook(lambda *args: seen.add(args[2].dtype))
    trainer.step_once()
    assert seen == {torch.bfloat16 if autocast == "bf16" else torch.float16}
    assert trainer.scaler.is_enabled() == (autocast == "fp16")
    whole = run(tmp_path / "whole", config=config)
    assert whole["loss"] != run(tmp_path / "off")["loss"]
    parts = interrupted(tmp_path / "parts", 5, config=config)
    assert apart_from_timing(parts) == apart_from_timing(whole)
    assert_same_bits(saved(tmp_path / "parts"), saved(tmp_path / "whole"))


def losses_in_half(group):
    config = changed(autocast="fp16", encoder=FLAT, batch_size=23)
    trainer = Trainer(config, DATA[0], group)
    return [trainer.step_once() for _ in range(trainer.steps_per_epoch)]


@pytest.mark.slow
def test_ranks_train_in_half_precision(ranks):
    right = losses_in_half(None)
    for losses in ranks.run(2, losses_in_half):
        assert losses[:4] == pytest.approx(right[:4], rel=1e-2)  # then roundings part
        assert np.isfinite(losses).all()


def test_averaged_weights(tmp_path):
    trainer = Trainer(changed(ema=0.75), DATA[0])
    means = None
    for _ in range(4):
        trainer.step_once()
        now = {k: v.clone() for k, v in trainer.encoder.state_dict().items()}
        if means is None:
            means = now
        means = {k: 0.75 * means[k] + 0.25 * v for k, v in now.items()}
    averaged = trainer.evaluated.state_dict()
    assert averaged.keys() == means.keys()
    for name, mean in means.items():
        if averaged[name].is_floating_point():
            torch.testing.assert_close(averaged[name], mean)
    found = trainer.embed(DATA[1]).embeddings
    trainer.encoder.load_state_dict(averaged)
    trainer.averaged = None
    assert torch.equal(trainer.embed(DATA[1]).embeddings, found)

    whole = run(tmp_path / "whole", config=changed(ema=0.75))
    assert whole["evaluations"] != run(tmp_path / "none")["evaluations"]
    parts = interrupted(tmp_path / "parts", 5, config=changed(ema=0.75))
    assert apart_from_timing(parts) == apart_from_timing(whole)
    assert_same_bits(saved(tmp_path / "parts"), saved(tmp_path / "whole"))


@pytest.mark.slow
def test_compiled_encoder(tmp_path):
    eager, compiled = (Trainer(changed(encoder=FLAT, compile=c), DATA[0]) for c in (False, True))
    losses = [[trainer.step_once() for _ in range(4)] for trainer in (eager, compiled)]
    assert losses[1] == pytest.approx(losses[0], rel=1e-3)
    assert compiled.encoder.state_dict().keys() == eager.encoder.state_dict().keys()


def test_noise_of_the_encoder_is_that_of_the_step(tmp_path):
    """As dropout draws it: the same after a resume, and not from the user's generator."""
    config = changed(encoder="support.encoder:dropping")
    torch.manual_seed(1)
    whole = run(tmp_path / "whole", config=config)
    torch.manual_seed(2)
    expected = torch.rand(3)
    torch.manual_seed(2)
    parts = interrupted(tmp_path / "parts", 5, config=config)
    assert torch.equal(torch.rand(3), expected)
    assert apart_from_timing(parts) == apart_from_timing(whole)
    assert whole["loss"] != run(tmp_path / "none", config=changed(encoder=FLAT))["loss"]


# ---- early stopping ------------------------------------------------------------------------------


def early(**settings):
    return changed(validation_fraction=0.5, patience=2, epochs=8, **settings)


VALIDATED = Parts(DATA[0], synthetic(8, seed=5), DATA[1], None)


@pytest.fixture
def recalls(monkeypatch):
    """Sets what Recall@1 on the validation classes is, one evaluation after the other."""
    real, of_validation = driver.evaluate, []

    def evaluate(query, gallery, dims, group, **options):
        results = real(query, gallery, dims, group, **options)
        if query.images is VALIDATED.validation:
            number = len([e for e in seen if e == "validation"])
            seen.append("validation")
            results[-1]["recall"]["1"] = of_validation[number]
        return results

    seen = []
    monkeypatch.setattr(driver, "evaluate", evaluate)
    return of_validation


def test_training_stops_when_nothing_gets_better(tmp_path, recalls):
    recalls += [0.1, 0.5, 0.4, 0.5, 0.9]
    text = io.StringIO()
    metrics = run(tmp_path, config=early(), data=VALIDATED, text=text)
    steps = len(metrics["loss"]) // 4
    assert metrics["stopped_early"]
    assert metrics["step"] == 4 * steps < metrics["steps"]
    assert metrics["best"] == {"step": 2 * steps, "recall": 0.5, "since": 2}
    assert [e["part"] for e in metrics["evaluations"]] == ["validation"] * 4 + ["test"]
    assert f"Not better than after step {2 * steps} (0.500) in 2 evaluations" in text.getvalue()
    # The encoder that was tested, and that the checkpoint has, is that of the best step.
    best = checkpoints.read_best(tmp_path)
    trainer = Trainer(early(), DATA[0])
    for _ in range(2 * steps):
        trainer.step_once()
    assert_same_bits(dict(trainer.encoder.state_dict()), dict(best))
    expected = driver.evaluate(trainer.embed(DATA[1]), None, TINY.dims, None, bootstrap=1000)
    assert metrics["evaluations"][-1]["results"] == expected
    kept = {k: v for k, v in saved(tmp_path)["tensors"].items() if k.startswith("modules.encoder")}
    assert kept
    for name, value in kept.items():
        assert torch.equal(value, best[name.split("modules.encoder.")[1]])
    # It is at its end: going on does nothing more.
    assert run(tmp_path, config=early(), data=VALIDATED, resume=True)["loss"] == metrics["loss"]


def test_the_best_step_may_be_the_last_or_before_a_kill(tmp_path, recalls):
    recalls += [0.1 * i for i in range(8)]
    metrics = run(tmp_path, config=early(), data=VALIDATED)
    assert not metrics["stopped_early"]
    assert metrics["best"]["step"] == metrics["step"] == metrics["steps"]


def test_a_kill_after_the_last_checkpoint_leaves_nothing_undone(tmp_path, monkeypatch):
    expected = run(tmp_path / "whole")

    class Killed(BaseException):
        pass

    def killed(output, path, metrics):
        if path.name == f"step-{STEPS}":
            raise Killed
        beside(output, path, metrics)

    beside = checkpoints.write_beside
    monkeypatch.setattr(checkpoints, "write_beside", killed)
    with pytest.raises(Killed):
        run(tmp_path / "run")
    monkeypatch.undo()
    assert json.loads((tmp_path / "run" / "metrics.json").read_text())["step"] < STEPS
    run(tmp_path / "run", resume=True)
    found = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert apart_from_timing(found) == json.loads(json.dumps(apart_from_timing(expected)))
    assert [p.name for p in (tmp_path / "run" / "checkpoints").iterdir()] == [f"step-{STEPS}"]


def test_what_may_differ_when_a_run_goes_on(tmp_path):
    run(tmp_path)
    other = dataclasses.replace(TINY, workers=0, checkpoint_every=5)
    assert run(tmp_path, config=other, resume=True)["step"] == STEPS
    with pytest.raises(
        CheckpointError, match=r"is of another config: scale: 8\.0 here, 32\.0 there$"
    ):
        run(tmp_path, config=dataclasses.replace(other, scale=8.0), resume=True)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"patience": 1, "evaluate_every": 0}, "patience: got 1, which needs evaluations on the"),
        ({"ema": 1.0}, r"ema: got 1.0, must be a number in \[0, 1\)"),
        ({"accumulate": 0}, "accumulate: got 0, must be a whole number >= 1"),
        ({"compile": 1}, "compile: got 1, must be true or false"),
        ({"workers": -2}, "workers: got -2, must be a whole number from -1 to 256"),
        ({"device": "tpu"}, "device: got 'tpu', must be auto or cpu or cuda"),
    ],
)
def test_bad_settings(settings, words):
    with pytest.raises(ConfigError, match=words):
        changed(**settings)


def test_patience_needs_classes_to_look_at(tmp_path):
    with pytest.raises(ConfigError, match="patience: got 2, but there are no validation classes"):
        run(tmp_path / "new", config=early())
    assert not (tmp_path / "new").exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_is_not_there():
    with pytest.raises(ConfigError, match="device: cuda cannot be used: torch finds no GPU"):
        Trainer(changed(device="cuda"), DATA[0])


# ---- curves --------------------------------------------------------------------------------------


def test_curves_for_tensorboard(tmp_path, monkeypatch):
    written, opened = [], []

    class SummaryWriter:
        def __init__(self, directory, purge_step):
            opened.append((directory, purge_step))

        def add_scalar(self, *values):
            written.append(values)

        def close(self):
            opened.append("closed")

    monkeypatch.setitem(sys.modules, "tensorboard", types.ModuleType("tensorboard"))
    stand_in = types.ModuleType("torch.utils.tensorboard")
    stand_in.SummaryWriter = SummaryWriter
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", stand_in)
    metrics = run(tmp_path, config=changed(tensorboard=True))
    assert opened == [(tmp_path / "tensorboard", 0), "closed"]
    losses = [(value, step) for name, value, step in written if name == "loss"]
    assert losses == [(loss, i + 1) for i, loss in enumerate(metrics["loss"])]
    recalls = [(value, step) for name, value, step in written if name == "Recall@1/test"]
    assert recalls == [(e["results"][-1]["recall"]["1"], e["step"]) for e in metrics["evaluations"]]


def test_tensorboard_is_not_installed(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorboard", None)
    with pytest.raises(ConfigError, match="tensorboard: is not installed; pip install tensorboard"):
        run(tmp_path / "new", config=changed(tensorboard=True))
    assert not (tmp_path / "new").exists()


# ---- images --------------------------------------------------------------------------------------


class Spoilt(ArrayPictures):
    def read(self, number):
        if number % 9 == 4:
            raise PictureError(f"picture {number}: is spoilt")
        return super().read(number)

    def name(self, number):
        return f"{number:03}.png"


def spoilt(images):
    return dataclasses.replace(images, pictures=Spoilt(images.pictures.images))


def test_images_that_cannot_be_read_are_left_out_counted_and_listed(tmp_path):
    data = Parts(spoilt(DATA[0]), None, spoilt(DATA[1]), None)
    text = io.StringIO()
    metrics = run(tmp_path / "whole", data=data, text=text)
    bad = [f"{i:03}.png" for i in range(120) if i % 9 == 4]
    assert list(metrics["unreadable"]) == bad
    assert f"{len(bad)} of 120 images could not be read" in " ".join(text.getvalue().split())
    lines = (tmp_path / "whole" / "unreadable.txt").read_text().splitlines()
    assert lines[0] == "004.png\tpicture 4: is spoilt"
    assert len(lines) == len(bad)
    assert metrics["evaluations"][-1]["results"][0]["num_queries"] == 72 - 8
    parts = interrupted(tmp_path / "parts", 11, data=data)
    assert apart_from_timing(parts) == apart_from_timing(metrics)
    # What is left trains as it would alone, but for the batches' limits.
    assert metrics["loss"] != run(tmp_path / "good")["loss"]


@pytest.mark.slow
def test_workers_change_nothing_and_outlive_ctrl_c(tmp_path):
    whole = run(tmp_path / "whole")
    again = interrupted(tmp_path / "again", 5, config=changed(workers=2))
    with pytest.raises(AssertionError):
        assert apart_from_timing(again) == apart_from_timing(whole)  # the settings differ
    for metrics in (again, whole):
        del metrics["config"]
    assert apart_from_timing(again) == apart_from_timing(whole)


def test_images_without_labels(tmp_path):
    none = dataclasses.replace(DATA[0], labels=np.full(len(DATA[0]), -1), class_names=[])
    with pytest.raises(ConfigError, match="data: the images of glyphs have no labels"):
        run(tmp_path / "new", data=Parts(none, None, None, None))
    assert not (tmp_path / "new").exists()
    # Labels of clusters do, and nothing need be tested.
    np.save(tmp_path / "labels.npy", DATA[0].labels)
    config = changed(labels=str(tmp_path / "labels.npy"))
    metrics = run(tmp_path / "new", config=config, data=Parts(none, None, None, None))
    assert metrics["loss"] == run(tmp_path / "true")["loss"]
    assert metrics["evaluations"] == []
    assert json.loads((tmp_path / "new" / "metrics.json").read_text()) == metrics
    # Where some have labels, these are trained on.
    some = dataclasses.replace(DATA[0], labels=np.where(DATA[0].labels < 10, DATA[0].labels, -1))
    assert run(tmp_path / "some", data=Parts(some, None, None, None))["data"]["train_images"] == 60


def test_parts_that_cannot_be_trained_on_or_searched(tmp_path):
    each_once = DATA[1].take(np.arange(0, 72, 6))
    train_set, one = DATA[0], DATA[0].take(np.arange(1))
    for parts, message in (
        (Parts(one, None, DATA[1], None), "glyphs has 1 images to train on, must have at least 2"),
        (
            Parts(train_set, each_once, DATA[1], None),
            "no validation image of glyphs has another one of its class in the part, so that there "
            "is nothing to find",
        ),
        (
            Parts(train_set, None, DATA[1].take(np.arange(6)), DATA[1].take(np.arange(6, 12))),
            "no test image of glyphs has another one of its class in the gallery, so that there is "
            "nothing to find",
        ),
    ):
        with pytest.raises(ConfigError, match=exactly(f"data: {message}")):
            run(tmp_path / "new", data=parts)
        assert not (tmp_path / "new").exists()


class NoPictures(ArrayPictures):
    def read(self, number):
        raise PictureError(f"{number}: is no image")


def test_parts_of_which_nothing_can_be_read(tmp_path):
    train_set, test = (
        dataclasses.replace(images, pictures=NoPictures(images.pictures.images)) for images in DATA
    )
    with pytest.raises(ConfigError, match=exactly(
        "data: none of the 120 images to train on of glyphs can be read: 0: is no image"
    )):  # fmt: skip
        run(tmp_path / "train", data=Parts(train_set, None, DATA[1], None))
    config = changed(patience=1)
    with pytest.raises(ConfigError, match=exactly(
        "data: 0 validation images of glyphs can be read, and none of them has another one of its "
        "class to be found"
    )):  # fmt: skip
        run(tmp_path / "new", config=config, data=Parts(DATA[0], test, DATA[1], None))
    # The encoder is not lost where it cannot be tested.
    expected = run(tmp_path / "expected", data=Parts(DATA[0], None, None, None))
    for gallery in (None, DATA[1]):
        text = io.StringIO()
        data = Parts(DATA[0], None, test, gallery)
        metrics = run(tmp_path / "new", data=data, text=text, overwrite=True)
        assert "data: 0 test images of glyphs can be read, and none of them has" in text.getvalue()
        assert (metrics["evaluations"], metrics["loss"]) == ([], expected["loss"])
        assert run(tmp_path / "new", data=data, resume=True) == metrics


def test_parts_that_share_classes(tmp_path, monkeypatch):
    """Results on classes that were trained on are none on others."""
    monkeypatch.chdir(tmp_path)
    for part, classes in (("train", "ab"), ("val", "cd"), ("test", "ae")):
        pictures(Path("shared", part), [f"{c}/{i}.png" for c in classes for i in (1, 2)])
    config = changed(data="shared")
    with pytest.raises(ConfigError, match=exactly(
        "data: shared has 1 of the classes both in train and in test (a); must have each class in "
        "one of them alone"
    )):  # fmt: skip
        run("new", config=config, data=None)
    Path("shared/train/a").rename("shared/train/d")
    with pytest.raises(
        ConfigError, match=r" 1 of the classes both in train and in validation .d.;"
    ):
        run("new", config=config, data=None)
    assert not Path("new").exists()
    Path("shared/train/d").rename("shared/train/f")
    Path("shared/test/a").rename("shared/test/g")
    assert run("new", config=config, data=None)["data"]["test_classes"] == 2


def test_a_gallery_of_its_own(tmp_path):
    query, gallery = DATA[1].take(np.arange(0, 72, 6)), DATA[1].take(np.arange(72) % 6 > 0)
    metrics = run(tmp_path, data=Parts(DATA[0], None, query, gallery))
    assert metrics["data"]["gallery_images"] == 60
    result = metrics["evaluations"][-1]["results"][-1]
    assert result["num_queries"] == 12
    assert result["recall"]["1"] > 0


def test_a_colour_picture_for_a_grey_encoder(tmp_path):
    images = DATA[0].pictures.images
    colour = ImageSet.of_arrays(np.stack([images] * 3, -1), DATA[0].labels, DATA[0].class_names)
    assert run(tmp_path / "a", data=dataclasses.replace(PARTS, train=colour))[
        "loss"
    ] == pytest.approx(run(tmp_path / "b")["loss"], rel=1e-3)


def test_names_in_the_list_of_what_cannot_be_read_need_not_be_text(tmp_path):
    checkpoints.write_unreadable(tmp_path, {"caf\udce9": "is no image"})
    assert (tmp_path / "unreadable.txt").read_bytes() == b"caf\xe9\tis no image\n"
