"""InsightFace's checkpoints: what is read goes on as their trainer, and comes out as it went in."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from click.testing import CliRunner
from support import published_trainer as published
from support.published_trainer import BATCH, MARGIN, SCALE, C, D

from unicom_ext import ArcFace, checkpoint, interchange
from unicom_ext.checkpoint import CheckpointError
from unicom_ext.cli.main import main
from unicom_ext.compat import PartialFC_V2
from unicom_ext.optim import RowAdamW, RowSGD


def files(folder: Path) -> list[Path]:
    return sorted(folder.glob("checkpoint_gpu_*.pt"))


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


def tensors_of(kind):
    """Of all classes: the prototypes and the optimizer's state of them."""
    names = {"sgd": ["momentum_buffer"], "adamw": ["exp_avg", "exp_avg_sq"]}[kind]
    generator = torch.Generator().manual_seed(3)
    weight, *state = (torch.randn(C, D, generator=generator) for _ in ["weight", *names])
    return weight, {name: rows.abs() for name, rows in zip(names, state, strict=True)}


def write(folder, ranks, kind="adamw"):
    """A trainer's files; the contents, in rank order."""
    folder.mkdir()
    weight, of_rows = tensors_of(kind)
    model = published.backbone()
    head = torch.nn.Linear(D, 1, bias=False)  # in whose place the prototypes will be
    optimizer = published.OPTIMIZERS[kind](published.groups(model, head))
    for param in [*model.parameters(), head.weight]:
        param.grad = torch.ones_like(param)
    optimizer.step()
    contents = []
    for rank in range(ranks):
        classes = published.share(C, rank, ranks)
        part = slice(classes.start, classes.stop)
        state = optimizer.state_dict()
        last = state["param_groups"][-1]["params"][-1]
        own = {name: rows[part].clone() for name, rows in of_rows.items()}
        contents.append(
            {
                "epoch": 2,
                "global_step": 40,
                "state_dict_backbone": model.state_dict(),
                "state_dict_softmax_fc": {"weight": weight[part].clone()},
                "state_optimizer": {
                    **state, "state": {**state["state"], last: {**state["state"][last], **own}},
                },
                "state_lr_scheduler": {"last_epoch": 40, "base_lrs": [0.1, 0.1]},
            }
        )  # fmt: skip
        torch.save(contents[-1], folder / f"checkpoint_gpu_{rank}.pt")
    return contents


def check_equal(here, there):
    """Values of any depth: the same types, and tensors of the same dtype, shape and bytes."""
    assert type(here) is type(there) or isinstance(here, dict)
    if isinstance(here, torch.Tensor):
        assert (here.dtype, here.shape) == (there.dtype, there.shape)
        assert here.detach().numpy().tobytes() == there.detach().numpy().tobytes()
    elif isinstance(here, dict):
        assert here.keys() == there.keys()
        for key, value in here.items():
            check_equal(value, there[key])
    elif isinstance(here, list | tuple):
        for pair in zip(here, there, strict=True):
            check_equal(*pair)
    else:
        assert here == there


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


# ---- heads until 2022 ----------------------------------------------------------------------------


def head_of_2022(rank, optimizer="sgd"):
    """The state dict of a head that samples, after a step: new rows are beside the old ones."""
    weight, of_rows = tensors_of(optimizer)
    classes = published.share(C, rank, 2)
    old = {"momentum_buffer": "mom", "exp_avg": "exp_avg", "exp_avg_sq": "exp_avg_sq"}
    head, index = {}, torch.tensor([1, 4, 9])
    for name, rows in {"weight": weight, **of_rows}.items():
        own = rows[classes.start : classes.stop]
        stale = own.clone()
        stale[index] = 0
        end = "" if name == "weight" else f"_{old[name]}"
        head[f"weight{end}"], head[f"weight_activated{end}"] = stale, own[index]
    return {**head, "weight_index": index}


def test_heads_with_their_own_momentum(tmp_path):
    for rank in range(2):
        torch.save(head_of_2022(rank), tmp_path / f"softmax_fc_gpu_{rank}.pt")
    torch.save(published.backbone().state_dict(), tmp_path / "model.pt")
    found = interchange.read(sorted(tmp_path.glob("*.pt")))
    found.write(tmp_path / "c")
    weight, of_rows = tensors_of("sgd")
    encoder, loss = published.backbone(), PartialFC_V2(ArcFace(MARGIN), D, C)
    optimizer = torch.optim.SGD(loss.parameters(), lr=0.1, momentum=0.9)
    modules = {"encoder": encoder, "loss": loss}
    assert checkpoint.load(tmp_path / "c", modules=modules, optimizers={"main": optimizer}) == {}
    assert torch.equal(loss.weight.detach(), weight)
    assert torch.equal(optimizer.state[loss.weight]["momentum_buffer"], of_rows["momentum_buffer"])
    row_sgd = RowSGD(loss.parameters(), lr=0.1, momentum=0.9)
    checkpoint.load(tmp_path / "c", modules=modules, optimizers={"main": row_sgd})
    assert torch.equal(row_sgd.state[loss.weight]["momentum_buffer"], of_rows["momentum_buffer"])


def test_heads_with_moments_and_the_optimizer_that_counts_their_steps(tmp_path):
    for rank, content in enumerate(write(tmp_path / "2", 2)):
        content["state_dict_softmax_fc"] = head_of_2022(rank, "adamw")
        state = content["state_optimizer"]["state"]
        last = max(state)
        state[last] = {"step": 7, "exp_avg": torch.ones(3, D), "exp_avg_sq": torch.ones(3, D)}
        torch.save(content, tmp_path / f"2/checkpoint_gpu_{rank}.pt")
    interchange.read(files(tmp_path / "2")).write(tmp_path / "c")
    weight, state, *_ = loaded(None, tmp_path / "c")
    right, of_rows = tensors_of("adamw")
    assert torch.equal(weight, right)
    check_equal(state, {**of_rows, "step": torch.tensor(7.0)})


def test_moments_without_a_number_of_steps_are_left_out(tmp_path):
    for rank in range(2):
        torch.save(head_of_2022(rank, "adamw"), tmp_path / f"softmax_fc_gpu_{rank}.pt")
    found = interchange.read(sorted(tmp_path.glob("*.pt")))
    assert found.optimizers == {}
    assert found.notes == [
        "nothing says how many steps the moments of the prototypes have had: they are left out"
    ]


def test_state_of_the_sampled_classes_alone_is_left_out(tmp_path):
    """As those heads do when they go on: nothing in the file says which classes they were."""
    for rank, content in enumerate(write(tmp_path / "2", 2)):
        state = content["state_optimizer"]["state"]
        last = max(state)
        state[last] = {"step": 7, "exp_avg": torch.ones(3, D), "exp_avg_sq": torch.ones(3, D)}
        torch.save(content, tmp_path / f"2/checkpoint_gpu_{rank}.pt")
    found = interchange.read(files(tmp_path / "2"))
    assert "the classes of the last step alone" in found.notes[0]
    found.write(tmp_path / "c")
    weight, state, *_ = loaded(None, tmp_path / "c")
    assert torch.equal(weight, tensors_of("adamw")[0])
    assert not state


@pytest.mark.parametrize(
    "name", ["rank:{}_softmax_weight", "rank_{}_softmax_weight", "{}_softmax_weight"]
)
def test_the_oldest_files(tmp_path, name):
    weight, of_rows = tensors_of("sgd")
    for rank in range(3):
        part = published.share(C, rank, 3)
        path = tmp_path / name.format(rank)
        torch.save(
            weight[part.start : part.stop], f"{path}.pt", _use_new_zipfile_serialization=False
        )
        torch.save(of_rows["momentum_buffer"][part.start : part.stop], f"{path}_mom.pt")
    interchange.read(list(tmp_path.glob("*.pt")), num_classes=C).write(tmp_path / "c")
    loss = PartialFC_V2(ArcFace(MARGIN), D, C)
    optimizer = torch.optim.SGD(loss.parameters(), lr=0.1, momentum=0.9)
    checkpoint.load(tmp_path / "c", modules={"loss": loss}, optimizers={"main": optimizer})
    assert torch.equal(loss.weight.detach(), weight)
    assert torch.equal(optimizer.state[loss.weight]["momentum_buffer"], of_rows["momentum_buffer"])


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


# ---- the commands --------------------------------------------------------------------------------


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


# ---- what is refused -----------------------------------------------------------------------------


def change(folder, rank, **values):
    path = folder / f"checkpoint_gpu_{rank}.pt"
    content = torch.load(path)
    for key, value in values.items():
        content[key] = value(content[key]) if callable(value) else value
    torch.save(content, path)


def sized(rows, dim=D):
    return lambda head: {"weight": torch.ones(rows, dim)}


def in_halves(state):
    last = max(state["state"])
    own = {k: v.half() if v.dim() else v for k, v in state["state"][last].items()}
    return {**state, "state": {**state["state"], last: own}}


def moved(backbone):
    return {**backbone, "0.weight": backbone["0.weight"] * 1.1}


FAULTS = {
    "a rank is missing": (
        lambda f: (f / "checkpoint_gpu_2.pt").unlink(),
        r"checkpoint_gpu_3.pt: are of the ranks 0, 1, 3; rank 2 is missing",
    ),
    "a rank is there twice": (
        lambda f: torch.save(torch.load(f / "checkpoint_gpu_1.pt"), f / "copy_gpu_1.pt"),
        r"checkpoint_gpu_1.pt and \S+copy_gpu_1.pt are both of rank 1",
    ),
    "nothing says which rank": (
        lambda f: (f / "checkpoint_gpu_1.pt").rename(f / "a.pt"),
        r"a.pt: its name does not say of which rank it is, as a_gpu_0.pt would",
    ),
    "another step": (
        lambda f: change(f, 1, global_step=39),
        r"0.pt and \S+1.pt are not of one run: global_step is 40 and 39",
    ),
    "another learning rate": (
        lambda f: change(
            f, 1, state_optimizer=lambda s: {**s, "param_groups": s["param_groups"][::-1]}
        ),
        "are not of one run: the number of parameters of the optimizer's group 0 is 9 and 1",
    ),
    "another backbone": (
        lambda f: change(f, 3, state_dict_backbone=moved),
        r"0.pt and \S+3.pt are not of one run: 0.weight of the backbone differs",
    ),
    "another size of embeddings": (
        lambda f: change(f, 2, state_dict_softmax_fc=sized(6, 7)),
        r"0.pt and \S+2.pt are not of one run: the embedding size is 6 and 7",
    ),
    "a split that is none": (
        lambda f: change(f, 0, state_dict_softmax_fc=sized(7)),
        r"have \[7, 6, 6, 5\] classes, .* of 24 classes \[6, 6, 6, 6\]. Are files of several",
    ),
    "state of other classes": (
        lambda f: change(
            f, 0, state_optimizer=lambda s: {**s, "state": {**s["state"], 9: {"step": 1}}}
        ),
        "of the prototypes their optimizers have step and step, exp_avg, exp_avg_sq",
    ),
    "an unknown key": (
        lambda f: change(f, 1, ema=1),
        r"1.pt: ema is not known; it holds epoch, .*, ema, expected are state_dict_backbone, ",
    ),
    "an unknown tensor in the head": (
        lambda f: change(f, 1, state_dict_softmax_fc={"kernel": torch.ones(6, D)}),
        r"1.pt: kernel is not known; it holds kernel, expected are weight, weight_mom",
    ),
    "another schedule": (
        lambda f: change(f, 2, state_lr_scheduler={"last_epoch": 40, "base_lrs": [0.1, 0.2]}),
        r"base_lrs of the scheduler is \[0.1, 0.1\] and \[0.1, 0.2\]",
    ),
    "a backbone of another shape": (
        lambda f: change(f, 2, state_dict_backbone=lambda b: {**b, "3.bias": torch.ones(9)}),
        r"not of one run: 3.bias of the backbone is \[6\] and \[9\]",
    ),
    "moments of another dtype": (
        lambda f: change(f, 2, state_optimizer=in_halves),
        r"exp_avg of the prototypes is torch.float32 and torch.float16",
    ),
    "newer rows of unknown classes": (
        lambda f: change(
            f, 0, state_dict_softmax_fc=lambda h: {**h, "weight_activated": torch.ones(2, D)}
        ),
        r"0.pt: the head has newer rows of weight, but no weight_index that says of which",
    ),
    "no state of an optimizer": (
        lambda f: change(f, 0, state_optimizer={"state": {}}),
        r"0.pt: state_optimizer holds state, must hold state and param_groups",
    ),
    "three groups": (
        lambda f: [
            change(
                f, rank,
                state_optimizer=lambda s: {**s, "param_groups": [*s["param_groups"] * 2][:3]},
            )
            for rank in range(4)
        ],
        "has groups of 9, 1, 9 parameters, and nothing says which",
    ),
    "a damaged file": (
        lambda f: (f / "checkpoint_gpu_1.pt").write_bytes(
            (f / "checkpoint_gpu_1.pt").read_bytes()[:3000]
        ),
        r"1.pt: cannot be read: ",
    ),
    "something else": (
        lambda f: (f / "checkpoint_gpu_1.pt").write_text("epoch 1"),
        r"1.pt: is no file that torch.save has written",
    ),
    "code": (
        lambda f: change(f, 1, state_lr_scheduler=Path("x")),
        r"1.pt: holds pathlib.PosixPath, and reading that could run code; must hold tensors and pl",
    ),
}  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS)
def test_what_is_refused(tmp_path, fault):
    folder = tmp_path / "4"
    write(folder, 4)
    spoil, message = FAULTS[fault]
    spoil(folder)
    output = tmp_path / "c"
    result = run("import", *sorted(folder.iterdir()), "--output", output, "--num-classes", C)
    assert result.exit_code == 1
    assert re.search(message, result.output), result.output
    assert sorted(path.name for path in tmp_path.iterdir()) == ["4"]


def test_other_ranks_files_beside_those_given(tmp_path):
    write(tmp_path / "4", 4)
    with pytest.raises(CheckpointError, match=r"gpu_3.pt: beside the files that are given, but"):
        interchange.read(files(tmp_path / "4")[:3])


def test_another_number_of_classes(tmp_path):
    write(tmp_path / "4", 4)
    with pytest.raises(
        ValueError, match=r"is 24, but the files are of 23: 3 ranks with 6, 1 with 5 in the files"
    ):
        interchange.read(files(tmp_path / "4"), num_classes=24)


@pytest.mark.parametrize(
    ("ranks", "spoil", "message"),
    [
        (0, {}, r"ranks must be .* got 0"),
        (24, {}, r"ranks must be at most the 23 classes, got 24"),
        (2, {"modules": ["loss"]}, r"must have the modules 'encoder' and 'loss', .*; has loss"),
        (2, {"optimizers": {}}, r"must have the optimizer 'main', has none"),
        (2, {"order": -1}, r"last parameter must be the prototypes, .* is modules.encoder.4.bias"),
        (2, {"make": RowAdamW, "sparse_grad": True}, r"state of modules.loss.weight is by rows"),
        (2, {"num_centers": 2}, r"has 2 centers of each class, PartialFC has one"),
    ],
)  # fmt: skip
def test_what_partial_fc_cannot_have(tmp_path, ranks, spoil, message):
    spoil = dict(spoil)
    names, order = spoil.pop("modules", ["encoder", "loss"]), spoil.pop("order", 1)
    optimizers, make = spoil.pop("optimizers", None), spoil.pop("make", torch.optim.AdamW)
    encoder, loss = published.backbone(), PartialFC_V2(ArcFace(MARGIN), D, C, **spoil)
    modules = {"encoder": encoder, "loss": loss}
    optimizer = make(published.groups(encoder, loss)[::order])
    loss(encoder(published.batch(0)[0]), published.batch(0)[1]).backward()
    optimizer.step()
    if optimizers is None and "encoder" in names:
        optimizers = {"main": optimizer}
    checkpoint.save(
        tmp_path / "c", modules={name: modules[name] for name in names}, optimizers=optimizers
    )
    with pytest.raises((CheckpointError, ValueError), match=message):
        interchange.to_partial_fc(tmp_path / "c", tmp_path / "out", ranks=ranks)
    assert [path.name for path in tmp_path.iterdir()] == ["c"]


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
