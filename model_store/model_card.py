"""The model card of a repository of module files: what they tell apart, how well, and how to serve them.

The card is written from the files themselves. It stands between two marks, so that what people write around
it stays when it is written anew.
"""

import html
from collections.abc import Mapping

from model_store.backbone import BackboneManifest
from model_store.module_file import ModuleFile

BEGIN, END = "<!-- tosca: written by `tosca push` -->", "<!-- tosca: end -->"
_LABELS_SHOWN = 100


def write_card(
    repository: str,
    modules: Mapping[str, ModuleFile],
    backbone: BackboneManifest,
    *,
    holds_backbone: bool,
    licence: str | None,
    previous: str | None = None,
) -> str:
    """The text of README.md. Of a `previous` one only the part between the marks is replaced.

    `licence` is a licence identifier of the hub, such as "mit", for the modules; it enters a new card alone.
    """
    section = _section(repository, modules, backbone, holds_backbone)
    if previous is None:
        return f"{_front_matter(licence)}\n# {_plain(repository)}\n\n{section}\n"
    before, begin, rest = previous.partition(BEGIN)
    if not begin:
        return f"{previous.rstrip()}\n\n{section}\n"
    _, _, after = rest.partition(END)
    return f"{before}{section}{after}"


def _front_matter(licence: str | None) -> str:
    from huggingface_hub import ModelCardData

    data = ModelCardData(
        license=licence,
        library_name="tosca-serving",
        pipeline_tag="image-classification",
        tags=["tosca", "image-classification", "continual-learning"],
    )
    return f"---\n{data.to_yaml()}\n---\n"


def _section(
    repository: str, modules: Mapping[str, ModuleFile], backbone: BackboneManifest, holds_backbone: bool
) -> str:
    rows = [
        f"| {task} | {len(file.manifest.labels)} | {_figure(file, 'accuracy')} | {_figure(file, 'ece')} | "
        f"{_plain(file.manifest.provenance.get('held_out', '–'))} ({_num_held_out(file)}) | "
        f"{file.size_bytes:,} | `{file.sha256}` |"
        for task, file in sorted(modules.items())
    ]
    labels = [f"- **{task}**: {_labels(file)}" for task, file in sorted(modules.items())]
    preprocessing = backbone.preprocessing
    add = (
        f"tosca pull {repository} --backbone"
        if holds_backbone
        else "tosca backbone add …                 # the one named above"
    )
    tasks = "".join(f" --task {task}" for task in sorted(modules)[:1])
    return f"""{BEGIN}
Image classification tasks for [TOSCA Serving](https://arxiv.org/abs/2502.14762): every task is one small
module file on a frozen backbone, and a server holds many of them at once.

| task | classes | accuracy | ECE | measured on | bytes | SHA-256 |
|---|---|---|---|---|---|---|
{chr(10).join(rows)}

Accuracy and expected calibration error (15 bins) are of each task alone, before others compete with it.

## Labels

{chr(10).join(labels)}

## Backbone

| | |
|---|---|
| fingerprint | `{backbone.fingerprint}` |
| architecture (timm) | {_plain(backbone.architecture)} |
| weights | {_plain(backbone.source)} |
| pictures | {preprocessing.width}×{preprocessing.height}, {preprocessing.interpolation} |
| features | {backbone.feature_dim} |
| in this repository | {"yes" if holds_backbone else "no"} |

A module answers only with the backbone of this fingerprint.

## Serving

    {add}
    tosca pull {repository}{tasks}
    tosca serve
    curl --data-binary @picture.jpg http://127.0.0.1:8000/predict
{END}"""


def _figure(file: ModuleFile, name: str) -> str:
    value = file.manifest.metrics.get(name)
    return "–" if value is None else f"{value:.4f}"


def _num_held_out(file: ModuleFile) -> str:
    return f"{file.manifest.metrics.get('num_held_out', 0):.0f} pictures"


def _labels(file: ModuleFile) -> str:
    labels = file.manifest.labels
    shown = ", ".join(_plain(one) for one in labels[:_LABELS_SHOWN])
    return shown if len(labels) <= _LABELS_SHOWN else f"{shown} and {len(labels) - _LABELS_SHOWN} more"


def _plain(text: str) -> str:
    """Text of a file as Markdown that shows it and does nothing else."""
    escaped = html.escape(text, quote=False)
    return "".join(f"\\{one}" if one in "\\`*_[]|#!" else one for one in escaped.replace("\n", " "))
