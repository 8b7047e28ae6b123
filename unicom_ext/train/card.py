"""The model card of an exported encoder."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from unicom_ext.train.config import Config

_LOADING = """\
    import json, torch
    facts = json.load(open("preprocessing.json"))
    encoder = torch.export.load("encoder.pt2").module()
    images = torch.rand(4, *facts["input"][1:])  # prepared as below
    embeddings = torch.nn.functional.normalize(encoder(images))"""


def card(
    config: Config,
    saved: Mapping[str, Any],
    preprocessing: Mapping[str, Any],
    tensors: str,
    differences: Mapping[str, float],
    left_out: Mapping[str, str],
    versions: Mapping[str, str],
) -> str:
    """Markdown.

    Args:
        config: of the run.
        saved: `data`, `metrics` and `step`, as a checkpoint of the run has them.
        preprocessing: as preprocessing.json has it.
        tensors: the name of the file of tensors.
        differences: of the outputs of each program.
        left_out: what was not written or not compared, and why.
        versions: of what it was exported with.
    """
    data, dim = saved["data"], preprocessing["output"][1]
    shape = ", ".join(map(str, preprocessing["input"]))
    classes = "pseudo-classes (clusters)" if config.labels else config.noun
    lines = [
        f"# {config.encoder}, {dim} dimensions",
        "",
        "An image encoder: images of one kind get embeddings of a high cosine. Trained with "
        f"`unicom_ext` (partial margin softmax), {saved['step']:,} steps.",
        "",
        "Licence: *to be filled in by whoever publishes this*",
        "",
        "## Use",
        "",
        _LOADING,
        "",
        f"Input: fp32 [{shape}]. Output: fp32 [batch, {dim}], not normalised; compare by "
        "cosine. The first dimensions alone serve too where results below say so. "
        f"`{tensors}` has the tensors by name, `unicom-ext train --encoder {config.encoder} "
        f"--weights {tensors}` goes on from them.",
        "",
        "Preparing a picture (`preprocessing.json`):",
        "",
        *(f"{number}. {step}" for number, step in enumerate(preprocessing["steps"], 1)),
        "",
        "## Data",
        "",
        f"{data['train_images']:,} images of {data['train_classes']:,} {classes}, from "
        f"`{config.data}`. SHA-256 of all images' names, sizes and labels: `{data['sha256']}`.",
        "",
        "## Results",
        "",
        *_results(config, saved),
        "",
        "## Settings",
        "",
        *(f"    {line}" for line in _settings(config)),
        "",
        "## Checks",
        "",
        "Largest difference of outputs from those of the encoder on a random batch, as a share of "
        "the largest value:",
        "",
        *(f"- `{name}`: {difference:.1e}" for name, difference in differences.items()),
        *(f"- `{name}`: not there, {why}" for name, why in left_out.items()),
        "",
        "Exported with " + ", ".join(f"{n} {version}" for n, version in versions.items()) + ".",
        "",
        "## Limits",
        "",
        "- Results hold for images like those of the data; of others nothing is known.",
        "- Embeddings say what is alike, with whatever bias the data have. They are no proof of "
        "who or what is in a picture.",
        "- Pictures must be prepared as above.",
        "",
    ]
    return "\n".join(lines)


def _results(config: Config, saved: Mapping[str, Any]) -> list[str]:
    tests = [e for e in saved["metrics"]["evaluations"] if e["part"] == "test"]
    if not tests:
        return ["It was not evaluated: there were no images of classes that it was not trained on."]
    data, results = saved["data"], tests[-1]["results"]
    among = f"{data['gallery_images']:,}" if "gallery_images" in data else "all the others"
    rows = [
        f"| {r['dim']} | {r['recall']['1']:.3f} | {r['recall']['10']:.3f} | {r['map_at_r']:.3f} |"
        for r in results
    ]
    return [
        f"{data['test_images']:,} images of {data['test_classes']:,} {config.noun} that it was not "
        f"trained on, each searched among {among}, after step {tests[-1]['step']:,}:",
        "",
        "| dimensions | Recall@1 | Recall@10 | mAP@R |",
        "| ---: | ---: | ---: | ---: |",
        *rows,
    ]


def _settings(config: Config) -> list[str]:
    """Those that are not the default."""
    own, default = config.to_dict(), Config().to_dict()
    changed = {n: v for n, v in own.items() if v != default[n] and n not in ("weights", "labels")}
    return [f"{name} = {value}" for name, value in changed.items()] or ["all as by default"]
