"""The last block for the CLS token alone, against the whole block: time of a pass, and what the vectors say.

The default backbone as it was tuned, and a ViT-Tiny with as many streams. Passes of the two graphs alternate;
ratios are medians of the pairs. TOSCA_BENCH_ROUNDS sets the pairs (15).
"""

import json
import os
import statistics
from collections.abc import Iterator
from pathlib import Path

import torch

from benchmarks.machine import machine
from benchmarks.serving import TINY
from model_store.backbone import Backbone, BackboneArtefact
from model_store.backbone_loading import load_backbone
from model_store.backbone_sources import from_timm
from model_store.measuring import embed_all, time_side_by_side
from model_store.parity import read_labelled
from model_store.runtimes.cls_block import for_cls_alone
from model_store.runtimes.loading import make_export
from model_store.runtimes.onnx_export import export_float
from model_store.runtimes.runtime import runtime_kind
from model_store.runtimes.torch_runtime import Embedding
from model_store.store import ModelStore

DEMO = Path(".tosca")
RESULT = Path(__file__).parent / "results" / "last_block.json"
ROUNDS = int(os.environ.get("TOSCA_BENCH_ROUNDS", "15"))
BATCH_SIZES = (1, 8)
MAX_PICTURES = 60


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
    folder = DEMO / "demo" / "textiles" / "test"
    pixels_NCHW = read_labelled({"textiles": folder}, preprocessing, MAX_PICTURES).pixels_NCHW
    backbones = []
    for model in (artefact.model(), for_cls_alone(artefact.model())):
        assert kind.export is not None, "a runtime that runs an export"
        export = make_export(kind.export, export_float(Embedding(model, preprocessing)), pixels_NCHW)
        loaded = Backbone.load(artefact, "cpu", runtime, export=export, num_streams=num_streams)
        backbones.append(loaded)
    whole, alone = backbones
    cosine_N = torch.cosine_similarity(embed_all(whole, pixels_NCHW), embed_all(alone, pixels_NCHW), dim=1)
    for batch_size in BATCH_SIZES:
        pixels_BCHW = pixels_NCHW[torch.arange(batch_size) % len(pixels_NCHW)]
        pairs = [[time_side_by_side(one, pixels_BCHW) for one in backbones] for _ in range(ROUNDS + 1)][1:]
        row: dict[str, object] = {
            "backbone": artefact.manifest.architecture,
            "runtime": runtime,
            "streams": num_streams,
            "batch_size": batch_size,
            "whole_images_per_s": num_streams * batch_size / statistics.median(one[0] for one in pairs),
            "cls_alone_images_per_s": num_streams * batch_size / statistics.median(one[1] for one in pairs),
            "speedup": statistics.median(one[0] / one[1] for one in pairs),
            "min_cosine": float(cosine_N.min()),
        }
        print(row, flush=True)
        yield row


if __name__ == "__main__":
    main()
