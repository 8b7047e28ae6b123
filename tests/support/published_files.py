"""Files of a published trainer that has not trained: any bits will do."""

from __future__ import annotations

from pathlib import Path

import torch

from support import published_trainer as published
from support.published_trainer import C, D


def files(folder: Path) -> list[Path]:
    return sorted(folder.glob("checkpoint_gpu_*.pt"))


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
