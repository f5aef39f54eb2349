"""Graphs of one backbone: time of a pass, and how near their vectors are to those of the whole model.

The model as timm makes it; its last block for the CLS token alone; attention written out besides; and a first
layer that reads bytes, as tuning exports it. Cosines are to the whole graph, and to torch in float32, on
pictures of both demo tasks. The default backbone as it was tuned, and a ViT-Tiny with as many streams. Passes
of the graphs take turns; speed-ups are medians of the turns' ratios to the whole model. TOSCA_BENCH_ROUNDS
sets the turns (15).
"""

import json
import os
import statistics
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import nn

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
from model_store.runtimes.runtime import REFERENCE, runtime_kind
from model_store.runtimes.split_attention import split_attention
from model_store.runtimes.torch_runtime import Embedding
from model_store.store import ModelStore

DEMO = Path(".tosca")
RESULT = Path(__file__).parent / "results" / "graph_forms.json"
ROUNDS = int(os.environ.get("TOSCA_BENCH_ROUNDS", "15"))
BATCH_SIZES = (1, 8)
MAX_PICTURES = 60
FORMS: dict[str, Callable[[nn.Module, Preprocessing], nn.Module]] = {
    "whole": lambda model, _: model,
    "cls_alone": lambda model, _: for_cls_alone(model),
    "split_attention": lambda model, _: split_attention(for_cls_alone(model)),
    "byte_patches": lambda model, given: split_attention(for_cls_alone(byte_patches(model, given))),
}


def main() -> None:
    about = machine()
    store = ModelStore(DEMO / "store")
    tuned = load_backbone(store)
    default = store.backbone(store.require_head().backbone_fingerprint)
    # An untrained backbone says nothing of int8's ranges: it stays in bfloat16.
    kinds = {tuned.runtime_name: default, "openvino-bfloat16": from_timm(TINY, pretrained=False)}
    rows = [
        row for runtime, artefact in kinds.items() for row in compare(artefact, runtime, tuned.num_streams)
    ]
    RESULT.write_text(json.dumps({"machine": about, "rounds": ROUNDS, "rows": rows}, indent=2) + "\n")
    print(json.dumps(rows))


def compare(artefact: BackboneArtefact, runtime: str, num_streams: int) -> Iterator[dict[str, object]]:
    preprocessing = artefact.manifest.preprocessing
    kind = runtime_kind(runtime)
    folders = {task: DEMO / "demo" / task / "test" for task in ("digits", "textiles")}
    pixels_NCHW = read_labelled(folders, preprocessing, MAX_PICTURES).pixels_NCHW
    backbones = {}
    for form, write in FORMS.items():
        assert kind.export is not None, "a runtime that runs an export"
        graph = export_float(Embedding(write(artefact.model(), preprocessing), preprocessing))
        export = make_export(kind.export, graph, pixels_NCHW)
        backbones[form] = Backbone.load(artefact, "cpu", runtime, export=export, num_streams=num_streams)
    whole_ND = embed_all(backbones["whole"], pixels_NCHW)
    exact_ND = embed_all(Backbone.load(artefact, "cpu", REFERENCE), pixels_NCHW)
    for batch_size in BATCH_SIZES:
        pixels_BCHW = pixels_NCHW[torch.arange(batch_size) % len(pixels_NCHW)]
        seconds: dict[str, list[float]] = {form: [] for form in FORMS}
        for _ in range(ROUNDS + 1):
            for form, backbone in backbones.items():
                seconds[form].append(time_side_by_side(backbone, pixels_BCHW))
        for form, backbone in backbones.items():
            ratios = [whole / own for whole, own in zip(seconds["whole"], seconds[form], strict=True)]
            cls_ND = embed_all(backbone, pixels_NCHW)
            cosine_N = torch.cosine_similarity(cls_ND, whole_ND, dim=1)
            exact_cosine_N = torch.cosine_similarity(cls_ND, exact_ND, dim=1)
            row: dict[str, object] = {
                "backbone": artefact.manifest.architecture,
                "runtime": runtime,
                "streams": num_streams,
                "batch_size": batch_size,
                "form": form,
                "images_per_s": num_streams * batch_size / statistics.median(seconds[form][1:]),
                "speedup": statistics.median(ratios[1:]),
                "min_cosine": float(cosine_N.min()),
                "mean_cosine_to_torch": float(exact_cosine_N.mean()),
                "min_cosine_to_torch": float(exact_cosine_N.min()),
            }
            print(row, flush=True)
            yield row


if __name__ == "__main__":
    main()
