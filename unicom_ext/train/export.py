"""The encoder of a run as files that need nothing of this package: `unicom-ext export`.

encoder.pt2          torch.export's program, for any number of images
encoder.onnx         the same for ONNX, where onnx and onnxscript are installed
encoder.safetensors  its tensors by name; encoder.pt where safetensors is not installed
preprocessing.json   from a picture to the input
README.md            a model card
"""

from __future__ import annotations

import copy
import dataclasses
import json
import shutil
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import import_module, metadata
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from unicom_ext import checkpoint
from unicom_ext.encoders import registry
from unicom_ext.encoders.encoder import ImageEncoder
from unicom_ext.train import checkpoints
from unicom_ext.train.card import card
from unicom_ext.train.config import Config
from unicom_ext.utils.files import CheckpointError
from unicom_ext.utils.settings import ConfigError
from unicom_ext.utils.versions import versions

IMAGES = 5  # of the batch that outputs are compared on; it is exported with another number
AGREES = 1e-3  # largest difference of outputs, as a share of the largest value
_EXTERNAL_BYTES = 1 << 30  # ONNX files of more tensors keep them in a file beside


@dataclass(frozen=True)
class Exported:
    """What was written: for each program its largest difference from the encoder, as a share of the
    largest value of its output; and what was not, and why."""

    differences: dict[str, float]
    left_out: dict[str, str]


def export(run: str | Path, output: str | Path) -> Exported:
    """Write the encoder of a run to a directory, and read it again to compare its outputs.

    Args:
        run: the output directory of `train`, whose last checkpoint is taken, or one checkpoint.
        output: the directory; it must not be there.

    The encoder is the one that counts: with `ema` the average, with `patience` the best one.

    Raises:
        CheckpointError: there is no checkpoint of a run. ConfigError: the output directory is
        there, or the encoder cannot be exported, or the program computes something else. Nothing
        is left in the output directory then.
    """
    where, output = _checkpoint(Path(run)), Path(output)
    if output.exists():
        raise ConfigError(f"output: {output} is there already, must be a new directory")
    extra = checkpoint.read_about(where)["extra"]
    if "config" not in extra or "metrics" not in extra:
        raise CheckpointError(f"{where}: is not a checkpoint of `unicom-ext train`")
    config = dataclasses.replace(Config.from_mapping(extra["config"]), weights=str(where))
    encoder = registry.create(config, config.embedding_size)
    encoder.module.eval()
    temporary = output.with_name(output.name + ".tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        exported = _write(encoder, temporary)
        tensors = _write_tensors(encoder.module, temporary)
        facts = _preprocessing(encoder)
        (temporary / "preprocessing.json").write_text(json.dumps(facts, indent=1) + "\n")
        text = card(config, extra, facts, tensors, exported.differences, exported.left_out,
                    versions() | _installed())  # fmt: skip
        (temporary / "README.md").write_text(text)
        temporary.rename(output)
    except BaseException:
        shutil.rmtree(temporary)
        raise
    return exported


def _checkpoint(run: Path) -> Path:
    if (run / ".metadata").exists():
        return run
    found = checkpoint.latest(run / checkpoints.CHECKPOINTS) or checkpoint.latest(run)
    if found is None:
        raise CheckpointError(f"{run}: there is no checkpoint of a run")
    return found


def _write(encoder: ImageEncoder, directory: Path) -> Exported:
    """The programs, each of which is read again and compared."""
    prepared = encoder.preprocessing
    shape = (prepared.channels, prepared.size, prepared.size)
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(IMAGES, *shape, generator=generator)
    with torch.no_grad():
        expected = encoder.module(images)
    differences, left_out = {}, {}
    path = directory / "encoder.pt2"
    try:
        # A dimension of 1 would be taken for a constant.
        program = torch.export.export(
            copy.deepcopy(encoder.module), (images[:2],),
            dynamic_shapes=({0: torch.export.Dim("batch", min=1)},),
        )  # fmt: skip
        torch.export.save(program, path)
    except Exception as error:  # whatever torch's compiler raises
        reason = str(error).strip().partition("\n")[0]
        raise ConfigError(
            f"encoder: {encoder.name} cannot be exported by torch.export: {reason}"
        ) from error
    again = torch.export.load(path).module()
    with torch.no_grad():
        differences[path.name] = _compared(encoder, path, expected, again(images))
        _compared(encoder, path, expected[:1], again(images[:1]))
    path = directory / "encoder.onnx"
    missing = [name for name in ("onnx", "onnxscript") if find_spec(name) is None]
    if missing:
        left_out[path.name] = f"needs pip install {' '.join(missing)}"
        return Exported(differences, left_out)
    try:
        _write_onnx(encoder.module, images[:2], path)
    except Exception as error:  # an operator that ONNX does not have, and whatever else there is
        reason = str(error).strip().partition("\n")[0]
        left_out[path.name] = f"torch.onnx cannot write it: {reason}"
        for part in directory.glob(f"{path.name}*"):
            part.unlink()
        return Exported(differences, left_out)
    if find_spec("onnxruntime") is None:
        left_out[f"{path.name} was not compared"] = "that needs pip install onnxruntime"
        return Exported(differences, left_out)
    session = import_module("onnxruntime").InferenceSession(
        str(path), providers=["CPUExecutionProvider"]
    )
    name = session.get_inputs()[0].name
    for count in (1, IMAGES):
        found = torch.from_numpy(session.run(None, {name: images[:count].numpy()})[0])
        differences[path.name] = _compared(encoder, path, expected[:count], found)
    return Exported(differences, left_out)


def _write_onnx(module: nn.Module, images: Tensor, path: Path) -> None:
    size = sum(tensor.nbytes for tensor in module.state_dict().values())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of what torch will change in its own code
        torch.onnx.export(
            copy.deepcopy(module), (images,), path, dynamo=True, verbose=False,
            input_names=["images"], output_names=["embeddings"],
            dynamic_shapes=({0: torch.export.Dim("batch", min=1)},),
            external_data=size > _EXTERNAL_BYTES,
        )  # fmt: skip


def _compared(encoder: ImageEncoder, path: Path, expected: Tensor, found: Tensor) -> float:
    """The largest difference. Raises ConfigError where the outputs are not the same."""
    if expected.shape != found.shape:
        difference = float("inf")
    else:
        difference = float((expected - found).abs().max() / expected.abs().max().clamp(min=1e-30))
    if not difference <= AGREES:
        raise ConfigError(
            f"encoder: {path.name} of {encoder.name} gives other outputs than the encoder: "
            f"{difference:.2g} of the largest value, must be at most {AGREES}"
        )
    return difference


def _write_tensors(module: nn.Module, directory: Path) -> str:
    """Returns the name of the file."""
    state = {name: value.contiguous().cpu() for name, value in module.state_dict().items()}
    if find_spec("safetensors") is not None:
        content = import_module("safetensors.torch").save(state)
        (directory / "encoder.safetensors").write_bytes(content)
        return "encoder.safetensors"
    torch.save(state, directory / "encoder.pt")
    return "encoder.pt"


def _preprocessing(encoder: ImageEncoder) -> dict[str, Any]:
    facts = dataclasses.asdict(encoder.preprocessing)
    channels, size = encoder.preprocessing.channels, encoder.preprocessing.size
    return {
        **facts,
        "input": ["batch", channels, size, size],
        "output": ["batch", encoder.dim],
        "steps": [
            f"convert to {facts['mode']}",
            f"scale the shorter side to floor(size / crop) pixels, {facts['interpolation']}",
            "cut the square of size out of the middle",
            "divide by 255, subtract mean, divide by std, channel by channel",
        ],
    }


def _installed() -> dict[str, str]:
    def found() -> Iterator[tuple[str, str]]:
        for name in ("onnx", "onnxscript", "onnxruntime", "safetensors"):
            if find_spec(name) is not None:
                yield name, metadata.version(name)

    return dict(found())
