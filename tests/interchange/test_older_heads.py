"""Heads of InsightFace until 2022: their momentum is in them, or in files beside."""

from __future__ import annotations

import pytest
import torch
from support import published_trainer as published
from support.published_files import check_equal, files, tensors_of, write
from support.published_trainer import MARGIN, C, D

from unicom_ext import ArcFace, checkpoint, interchange
from unicom_ext.compat import PartialFC_V2
from unicom_ext.optim import RowSGD


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


def loaded(directory):
    """The prototypes, and what AdamW has of them."""
    encoder, loss = published.backbone(), PartialFC_V2(ArcFace(MARGIN), D, C)
    optimizer = published.OPTIMIZERS["adamw"](published.groups(encoder, loss))
    modules = {"encoder": encoder, "loss": loss}
    checkpoint.load(directory, modules=modules, optimizers={"main": optimizer})
    return loss.weight.detach(), optimizer.state[loss.weight]


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


def test_momenta_of_several_dtypes(tmp_path):
    for rank in range(2):
        head = head_of_2022(rank)
        if rank == 0:
            head = {k: v.half() if "mom" in k else v for k, v in head.items()}
        torch.save(head, tmp_path / f"softmax_fc_gpu_{rank}.pt")
    message = "the dtype of momentum_buffer is torch.float16 and torch.float32"
    with pytest.raises(checkpoint.CheckpointError, match=message):
        interchange.read(sorted(tmp_path.glob("*.pt")))


def test_heads_with_moments_and_the_optimizer_that_counts_their_steps(tmp_path):
    for rank, content in enumerate(write(tmp_path / "2", 2)):
        content["state_dict_softmax_fc"] = head_of_2022(rank, "adamw")
        state = content["state_optimizer"]["state"]
        last = max(state)
        state[last] = {"step": 7, "exp_avg": torch.ones(3, D), "exp_avg_sq": torch.ones(3, D)}
        torch.save(content, tmp_path / f"2/checkpoint_gpu_{rank}.pt")
    interchange.read(files(tmp_path / "2")).write(tmp_path / "c")
    weight, state = loaded(tmp_path / "c")
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
    weight, state = loaded(tmp_path / "c")
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
