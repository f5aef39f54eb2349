"""Graphs of one backbone: time of a pass, and how near their vectors are to those of the whole model.

The model as timm makes it; its last block for the CLS token alone; attention written out besides; a first
layer that reads bytes besides; sums of a narrow model in bfloat16 besides; and where products are in int8,
inputs of like size (measured on training pictures), scales that more features share, and both, as tuning
exports it. Cosines are to the whole graph, and to torch in float32, on test pictures of both demo tasks. The
default backbone as it was tuned, and a ViT-Tiny with as many streams. Passes of the graphs take turns;
speed-ups are medians of the turns' ratios to the whole model. TOSCA_BENCH_ROUNDS sets the turns (15).
"""

import json
import os
import statistics
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from benchmarks.machine import machine
from benchmarks.serving import TINY
from model_store.backbone import Backbone, BackboneArtefact
from model_store.backbone_loading import load_backbone
from model_store.backbone_sources import from_timm
from model_store.measuring import embed_all, time_side_by_side
from model_store.parity import read_labelled
from model_store.preprocess import Preprocessing
from model_store.runtimes.byte_patches import byte_patches
from model_store.runtimes.cls_block import for_cls_alone
from model_store.runtimes.loading import make_export
from model_store.runtimes.onnx_export import export_float
from model_store.runtimes.rewriting import rewritten
from model_store.runtimes.runtime import PLAIN_GROUP, REFERENCE, runtime_kind
from model_store.runtimes.smoothing import activation_group, smooth
from model_store.runtimes.split_attention import split_attention
from model_store.runtimes.torch_runtime import Embedding
from model_store.store import ModelStore

DEMO = Path(".tosca")
RESULT = Path(__file__).parent / "results" / "graph_forms.json"
ROUNDS = int(os.environ.get("TOSCA_BENCH_ROUNDS", "15"))
BATCH_SIZES = (1, 8)
MAX_PICTURES = 60


@dataclass(frozen=True)
class Form:
    """How a model is written, and whether inputs are of like size and many features share a scale."""

    write: Callable[[nn.Module, Preprocessing], nn.Module]
    is_smooth: bool = False
    shares_scales: bool = False


def reading_bytes(model: nn.Module, preprocessing: Preprocessing) -> nn.Module:
    return split_attention(for_cls_alone(byte_patches(model, preprocessing)))


FORMS = {
    "whole": Form(lambda model, _: model),
    "cls_alone": Form(lambda model, _: for_cls_alone(model)),
    "split_attention": Form(lambda model, _: split_attention(for_cls_alone(model))),
    "byte_patches": Form(reading_bytes),
    "narrow_sums": Form(rewritten),  # of a wide model the same as before
}
INT8_FORMS = {
    "smooth": Form(rewritten, is_smooth=True),
    "shared_scales": Form(rewritten, shares_scales=True),
    "smooth_shared_scales": Form(rewritten, is_smooth=True, shares_scales=True),
}


def main() -> None:
    about = machine()
    store = ModelStore(DEMO / "store")
    tuned = load_backbone(store)
    default = store.backbone(store.require_head().backbone_fingerprint)
    tiny = from_timm(TINY, pretrained=False)
    measured = (
        (default, tuned.runtime_name),
        (tiny, "openvino-bfloat16"),
        (tiny, "openvino-int8-bfloat16"),  # untrained: its vectors say little of int8
    )
    rows = [row for artefact, runtime in measured for row in compare(artefact, runtime, tuned.num_streams)]
    RESULT.write_text(json.dumps({"machine": about, "rounds": ROUNDS, "rows": rows}, indent=2) + "\n")
    print(json.dumps(rows))


def compare(artefact: BackboneArtefact, runtime: str, num_streams: int) -> Iterator[dict[str, object]]:
    preprocessing = artefact.manifest.preprocessing
    kind = runtime_kind(runtime)
    pixels_NCHW, train_NCHW = (pictures(part, preprocessing) for part in ("test", "train"))
    forms = FORMS | (INT8_FORMS if "int8" in kind.precision else {})
    backbones = {}
    for name, form in forms.items():
        assert kind.export is not None, "a runtime that runs an export"
        model = artefact.model()
        group = activation_group(model) if form.shares_scales else PLAIN_GROUP
        if form.is_smooth:
            model = smooth(model, preprocessing, train_NCHW)
        graph = export_float(Embedding(form.write(model, preprocessing), preprocessing), group)
        export = make_export(kind.export, graph, train_NCHW)
        backbones[name] = Backbone.load(artefact, "cpu", runtime, export=export, num_streams=num_streams)
    whole_ND = embed_all(backbones["whole"], pixels_NCHW)
    exact_ND = embed_all(Backbone.load(artefact, "cpu", REFERENCE), pixels_NCHW)
    for batch_size in BATCH_SIZES:
        pixels_BCHW = pixels_NCHW[torch.arange(batch_size) % len(pixels_NCHW)]
        seconds: dict[str, list[float]] = {name: [] for name in forms}
        for _ in range(ROUNDS + 1):
            for name, backbone in backbones.items():
                seconds[name].append(time_side_by_side(backbone, pixels_BCHW))
        for name, backbone in backbones.items():
            ratios = [whole / own for whole, own in zip(seconds["whole"], seconds[name], strict=True)]
            cls_ND = embed_all(backbone, pixels_NCHW)
            cosine_N = torch.cosine_similarity(cls_ND, whole_ND, dim=1)
            exact_cosine_N = torch.cosine_similarity(cls_ND, exact_ND, dim=1)
            row: dict[str, object] = {
                "backbone": artefact.manifest.architecture,
                "runtime": runtime,
                "streams": num_streams,
                "batch_size": batch_size,
                "form": name,
                "images_per_s": num_streams * batch_size / statistics.median(seconds[name][1:]),
                "speedup": statistics.median(ratios[1:]),
                "min_cosine": float(cosine_N.min()),
                "mean_cosine_to_torch": float(exact_cosine_N.mean()),
                "min_cosine_to_torch": float(exact_cosine_N.min()),
            }
            print(row, flush=True)
            yield row


def pictures(part: str, preprocessing: Preprocessing) -> Tensor:
    folders = {task: DEMO / "demo" / task / part for task in ("digits", "textiles")}
    return read_labelled(folders, preprocessing, MAX_PICTURES).pixels_NCHW


if __name__ == "__main__":
    main()
