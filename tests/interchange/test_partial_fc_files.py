"""InsightFace's checkpoints: what is read goes on as their trainer, and comes out as it went in."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from click.testing import CliRunner
from support import published_trainer as published
from support.published_files import check_equal, files, tensors_of, write
from support.published_trainer import BATCH, MARGIN, SCALE, C, D

from unicom_ext import ArcFace, checkpoint, interchange
from unicom_ext.checkpoint import CheckpointError
from unicom_ext.cli.main import main
from unicom_ext.compat import PartialFC_V2
from unicom_ext.optim import RowAdamW, RowSGD


def ours(make, group=None, **options):
    """A trainer of this package, of modules that know nothing yet."""
    encoder = published.backbone()
    options = {"process_group": group} if group else options
    loss = PartialFC_V2(ArcFace(MARGIN), D, C, scale=SCALE, **options)
    with torch.no_grad():
        for param in encoder.parameters():
            param.zero_()
    optimizer = make(published.groups(encoder, loss))
    return {"modules": {"encoder": encoder, "loss": loss}, "optimizers": {"main": optimizer}}


def going_on(group, kind, directory, steps=5):
    parts = ours(published.OPTIMIZERS[kind], group)
    optimizer = parts["optimizers"]["main"]
    schedule = published.scheduler(optimizer)
    extra = checkpoint.load(directory, **parts, process_group=group)
    schedule.load_state_dict(extra["lr_scheduler"])
    first = extra["global_step"]
    return [
        published.step(*parts["modules"].values(), optimizer, schedule, number, group)
        for number in range(first, first + steps)
    ]


@pytest.mark.parametrize("kind", published.OPTIMIZERS)
@pytest.mark.parametrize("world_size", [1, 2])
def test_the_next_losses_are_those_of_the_published_trainer(tmp_path, ranks, kind, world_size):
    right, *_ = ranks.run(world_size, published.train, kind, tmp_path)
    interchange.read(files(tmp_path), num_classes=C).write(tmp_path / "c")
    for losses in ranks.run(world_size, going_on, kind, tmp_path / "c"):
        assert losses == pytest.approx(right, rel=1e-5)
    # Without its state the optimizer would go elsewhere: the test can see it.
    found = interchange.read(files(tmp_path))
    without = {name: t for name, t in found.tensors.items() if not name.startswith("optimizers")}
    interchange.Found({}, [], without, found.classes, found.optimizers, found.extra).write(
        tmp_path / "without"
    )
    forgetful, *_ = ranks.run(world_size, going_on, kind, tmp_path / "without")
    assert forgetful != pytest.approx(right, rel=1e-3)


# ---- bits: files without a training --------------------------------------------------------------


@pytest.mark.parametrize("kind", published.OPTIMIZERS)
def test_eight_ranks_to_three_and_back(tmp_path, kind):
    before = write(tmp_path / "8", 8, kind)
    interchange.read(files(tmp_path / "8")).write(tmp_path / "from-8")
    assert interchange.to_partial_fc(tmp_path / "from-8", tmp_path / "3", ranks=3) == []
    assert len(files(tmp_path / "3")) == 3
    interchange.read(files(tmp_path / "3"), num_classes=C).write(tmp_path / "from-3")
    interchange.to_partial_fc(tmp_path / "from-3", tmp_path / "8-again", ranks=8)
    after = [torch.load(path, weights_only=True) for path in files(tmp_path / "8-again")]
    check_equal(before, after)


def loaded(group, directory):
    """The classes of this rank, with what its optimizer has of them."""
    parts = ours(published.OPTIMIZERS["adamw"], group)
    checkpoint.load(directory, **parts, process_group=group)
    loss = parts["modules"]["loss"]
    state = parts["optimizers"]["main"].state[loss.weight]
    encoder = {name: p.detach() for name, p in parts["modules"]["encoder"].state_dict().items()}
    return loss.weight.detach(), state, int(loss.step), encoder


@pytest.mark.parametrize("world_size", [1, 3])
def test_any_number_of_ranks_gets_every_bit(tmp_path, ranks, world_size, monkeypatch):
    monkeypatch.setattr("unicom_ext.checkpoint.pieces.PIECE_BYTES", 100)  # 4 rows of D float32
    (first, *_) = write(tmp_path / "8", 8)
    interchange.read(files(tmp_path / "8")[::-1]).write(tmp_path / "c")
    weight, of_rows = tensors_of("adamw")
    of_ranks = ranks.run(world_size, loaded, tmp_path / "c")
    assert torch.equal(torch.cat([found[0] for found in of_ranks]), weight)
    for name, rows in of_rows.items():
        assert torch.equal(torch.cat([found[1][name] for found in of_ranks]), rows)
    for _, state, step, encoder in of_ranks:
        assert (float(state["step"]), step) == (1, 40)
        check_equal(encoder, dict(first["state_dict_backbone"]))


@pytest.mark.parametrize(
    ("kind", "make"),
    [
        ("sgd", lambda params: RowSGD(params, lr=0.1, momentum=0.9, weight_decay=5e-4)),
        ("adamw", lambda params: RowAdamW(params, lr=0.01, weight_decay=0.1)),
    ],
)
@pytest.mark.parametrize("sparse_grad", [False, True])
def test_row_optimizers_go_on_too(tmp_path, kind, make, sparse_grad):
    """Where each step has all classes they do what torch's do."""
    write(tmp_path / "2", 2, kind)
    interchange.read(files(tmp_path / "2")).write(tmp_path / "c")
    weights = []
    for parts in (ours(make, sparse_grad=sparse_grad), ours(published.OPTIMIZERS[kind])):
        checkpoint.load(tmp_path / "c", **parts)
        encoder, loss = parts["modules"].values()
        images, labels = published.batch(0)
        for _ in range(2):
            loss(encoder(images), labels).backward()
            parts["optimizers"]["main"].step()
            parts["optimizers"]["main"].zero_grad()
        weights.append(loss.weight.detach())
    torch.testing.assert_close(*weights)


def test_the_names_of_parallel_and_compiled_backbones_are_taken_off(tmp_path):
    for prefix in ("module.", "_orig_mod.module."):
        folder = tmp_path / prefix
        (content,) = write(folder, 1)
        backbone = content["state_dict_backbone"]
        content["state_dict_backbone"] = {prefix + name: v for name, v in backbone.items()}
        torch.save(content, folder / "checkpoint_gpu_0.pt")
        tensors = interchange.read(files(folder)).tensors
        names = {n.removeprefix("modules.encoder.") for n in tensors if "modules.encoder." in n}
        assert set(backbone) <= names


def test_parameters_in_another_order_than_their_names(tmp_path):
    (content,) = write(tmp_path / "1", 1)
    backbone = content["state_dict_backbone"]
    content["state_dict_backbone"] = dict(sorted(backbone.items(), reverse=True))
    torch.save(content, tmp_path / "1/checkpoint_gpu_0.pt")
    with pytest.raises(
        CheckpointError, match=r"exp_avg of parameter 0 .* is \[8, 5\], but 4\.weig"
    ):
        interchange.read(files(tmp_path / "1"))
    found = interchange.read(files(tmp_path / "1"), encoder=published.backbone())
    (group, _) = found.optimizers["main"]["groups"]
    names = [f"modules.encoder.{name}" for name, _ in published.backbone().named_parameters()]
    assert group["params"] == names
    state = content["state_optimizer"]["state"]
    check_equal(
        found.tensors["optimizers.main.modules.encoder.3.weight.exp_avg"],
        state[names.index("modules.encoder.3.weight")]["exp_avg"],
    )


def test_buffers_that_may_be_parameters(tmp_path):
    (content,) = write(tmp_path / "1", 1)
    content["state_dict_backbone"]["mask"] = torch.ones(2)
    torch.save(content, tmp_path / "1/checkpoint_gpu_0.pt")
    with pytest.raises(CheckpointError, match="is of 9 parameters of the backbone, but 10 tensors"):
        interchange.read(files(tmp_path / "1"))
    encoder = published.backbone()
    encoder.register_buffer("mask", torch.ones(2))
    interchange.read(files(tmp_path / "1"), encoder=encoder)
    with pytest.raises(
        CheckpointError, match="9 parameters of the backbone, but the encoder has 2"
    ):
        interchange.read(files(tmp_path / "1"), encoder=published.backbone()[:1])


def test_steps_that_a_rank_has_skipped(tmp_path):
    """A GradScaler skips a step where a rank's gradients overflow, on that rank alone."""
    contents = write(tmp_path / "2", 2)
    state = contents[1]["state_optimizer"]["state"]
    state[max(state)]["step"] = torch.tensor(3.0)
    torch.save(contents[1], tmp_path / "2/checkpoint_gpu_1.pt")
    found = interchange.read(files(tmp_path / "2"))
    assert float(found.tensors["optimizers.main.modules.loss.weight.step"]) == 3
    assert "have made 1 to 3 steps; the largest number counts" in found.notes[0]


def test_a_scheduler_that_json_cannot_hold_is_left_out(tmp_path):
    (content,) = write(tmp_path / "1", 1)
    content["state_lr_scheduler"]["milestones"] = {3: 1}  # a number for a key
    torch.save(content, tmp_path / "1/checkpoint_gpu_0.pt")
    found = interchange.read(files(tmp_path / "1"))
    assert found.extra == {"epoch": 2, "global_step": 40}
    assert "must be made from global_step" in found.notes[0]


def saved_by_ranks(group, directory):
    torch.manual_seed(0)
    parts = ours(published.OPTIMIZERS["sgd"], group)
    encoder, loss = parts["modules"].values()
    rank, world_size = dist.get_rank(group), dist.get_world_size(group)
    images, labels = published.batch(0)
    part = slice(rank * BATCH // world_size, (rank + 1) * BATCH // world_size)
    loss(encoder(images[part]), labels[part]).backward()
    parts["optimizers"]["main"].step()
    checkpoint.save(directory, **parts, process_group=group)
    return loss.weight.detach()


def test_a_run_of_ours_goes_to_partial_fc(tmp_path, ranks):
    weight = torch.cat(ranks.run(2, saved_by_ranks, tmp_path / "c"))
    missing = interchange.to_partial_fc(tmp_path / "c", tmp_path / "3", ranks=3)
    assert missing == ["epoch", "state_lr_scheduler"]
    contents = [torch.load(path) for path in files(tmp_path / "3")]
    heads = [content["state_dict_softmax_fc"]["weight"] for content in contents]
    assert [len(head) for head in heads] == [8, 8, 7]
    assert torch.equal(torch.cat(heads), weight)
    for content in contents:
        model = published.backbone()
        model.load_state_dict(content["state_dict_backbone"])
        head = torch.nn.Linear(D, len(content["state_dict_softmax_fc"]["weight"]), bias=False)
        optimizer = published.OPTIMIZERS["sgd"](published.groups(model, head))
        optimizer.load_state_dict(content["state_optimizer"])
        assert optimizer.state[head.weight]["momentum_buffer"].shape == head.weight.shape
        assert content["global_step"] == 1
    missing = interchange.to_partial_fc(tmp_path / "c", tmp_path / "1", ranks=1, optimizer=False)
    assert missing == ["state_optimizer", "epoch", "state_lr_scheduler"]


def run(*arguments):
    return CliRunner().invoke(main, list(map(str, arguments)))


def test_there_and_back_by_commands(tmp_path):
    before = write(tmp_path / "2", 2)
    given = ["--output", tmp_path / "c", "--num-classes", C]
    result = run("import", *files(tmp_path / "2"), *given)
    assert result.exit_code == 0, result.output
    assert result.output.splitlines() == [
        "format      InsightFace's checkpoint_gpu_{rank}.pt",
        "classes     23: 1 rank with 12, 1 with 11",
        "embeddings  6 dimensions, float32",
        "encoder     15 tensors, 168 values",
        "optimizer   Adam or AdamW: exp_avg, exp_avg_sq, step of 10 of 10 parameters, "
        "of the prototypes exp_avg, exp_avg_sq, step",
        "progress    epoch 2, global_step 40",
        "Note: running statistics of the backbone are those of rank 0.",
        f"Written: {tmp_path / 'c'}",
    ]
    result = run("checkpoint", "to-partial-fc", tmp_path / "c", tmp_path / "again", "--ranks", 2)
    assert result.output == f"Written: 2 files in {tmp_path / 'again'}\n"
    check_equal(before, [torch.load(path) for path in files(tmp_path / "again")])
    result = run("import", *files(tmp_path / "2"), *given)
    assert (result.exit_code, result.output) == (1, f"Error: {tmp_path / 'c'}: is there already\n")
