"""The training task of timm, its optimizer and its checkpoints. Started again, it goes on.

    python examples/with_timm.py --output runs/timm --epochs 2

`MarginTask` is what timm's own train.py needs besides the lines that examples/README.md shows.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from common import Characters, arguments
from timm.models import create_model
from timm.optim import create_optimizer_v2
from timm.task import ClassificationTask
from timm.task import resume_task_checkpoint as resume
from timm.utils import CheckpointSaver
from torch.utils.data import DataLoader

from unicom_ext import ArcFace, PartialMarginSoftmax


class MarginTask(ClassificationTask):
    """A classification task whose loss has prototypes, which belong into its checkpoints."""

    def get_task_state(self, module: Any = None, ema: bool = False) -> dict[str, Any]:
        return {} if ema else {"loss": self.criterion.state_dict()}

    def load_task_state(self, state: Any, strict: bool = True, **_: Any) -> None:
        if state:
            self.criterion.load_state_dict(state["loss"], strict)


def main() -> None:
    args = arguments(__doc__)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(0)
    data = Characters(args.classes)
    # For timm its classes are the dimensions of the embedding.
    model = create_model("test_resnet", in_chans=1, num_classes=128).to(device)
    loss_fn = PartialMarginSoftmax(
        128, data.num_classes, margin=ArcFace(0.3), scale=32.0, sample_rate=0.5, feature_rate=0.75,
        device=device,
    )  # fmt: skip
    task = MarginTask(model, loss_fn, device=device, verbose=False)
    optimizer = create_optimizer_v2(model, opt="adamw", lr=2e-3, weight_decay=0.05)
    # The task trains the model alone; before resuming, as the optimizer's state has this group.
    optimizer.add_param_group({"params": loss_fn.parameters(), "weight_decay": 0.0})

    output = Path(args.output)
    output.mkdir(parents=True, exist_ok=True)
    saver = CheckpointSaver(model, optimizer, task=task, checkpoint_dir=str(output), max_history=2)
    last = output / "last.pth.tar"
    start = resume(task, str(last), optimizer) if last.exists() else 0

    for epoch in range(start, args.epochs):
        order = torch.Generator().manual_seed(epoch)  # so that no state of it has to be saved
        for images, labels in DataLoader(data, 64, True, generator=order, drop_last=True):
            loss = task(images.to(device), labels.to(device))["loss"]
            loss.backward()
            torch.nn.utils.clip_grad_norm_(task.get_clip_parameters(), 5.0)
            optimizer.step()
            optimizer.zero_grad()
        print(f"epoch {epoch}: loss {loss.item():.3f}")
        saver.save_checkpoint(epoch)


if __name__ == "__main__":
    main()
