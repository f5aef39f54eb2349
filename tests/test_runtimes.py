"""Every runtime gives the CLS vectors of torch in float32, as near as its number format allows."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace
from typing import Any

import onnx
import pytest
import torch
from torch import Tensor

from model_store.backbone import Backbone, BackboneArtefact
from model_store.errors import InvalidBackbone
from model_store.measuring import Tuned
from model_store.parity import LabelledPixels
from model_store.preprocess import stack_pixels
from model_store.runtimes.loading import load_export, make_export
from model_store.runtimes.onnx_export import INPUT, OUTPUT, export_float
from model_store.runtimes.rewriting import rewritten
from model_store.runtimes.runtime import (
    ACTIVATION_GROUP,
    KINDS,
    PLAIN_GROUP,
    REFERENCE,
    RUNTIMES,
    RuntimeKind,
    runtime_kind,
)
from model_store.runtimes.smoothing import smooth
from model_store.runtimes.torch_runtime import Embedding

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
HERE = [kind for kind in KINDS if kind.unavailable_on(CPU) is None]
# Of the worst of the pictures below; the number formats keep 24, 8 and 7 bits.
MIN_COSINE = {"float32": 0.999999, "bfloat16": 0.999, "int8": 0.998, "int8-bfloat16": 0.998}
MakeExport = Callable[[RuntimeKind], bytes | None]


def pixels(batch: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (batch, 3, 32, 32), generator=generator, dtype=torch.uint8)


@pytest.fixture(scope="module")
def float_export(tiny_tuned: Tuned) -> bytes:
    assert tiny_tuned.export is not None
    return tiny_tuned.export


@pytest.fixture(scope="module")
def export_of(float_export: bytes) -> MakeExport:
    made: dict[str, bytes] = {}

    def make(kind: RuntimeKind) -> bytes | None:
        if kind.export is None:
            return None
        if kind.export not in made:
            made[kind.export] = make_export(kind.export, float_export, pixels(8, seed=5))
        return made[kind.export]

    return make


@pytest.fixture(scope="module")
def load(tiny_artefact: BackboneArtefact, export_of: MakeExport) -> Callable[[RuntimeKind], Backbone]:
    return lambda kind: Backbone.load(tiny_artefact, "cpu", kind.name, export=export_of(kind))


@pytest.mark.parametrize("kind", HERE, ids=lambda kind: kind.name)
def test_a_runtime_agrees_with_torch(
    kind: RuntimeKind, load: Callable[[RuntimeKind], Backbone], tiny_backbone: Backbone
) -> None:
    pixels_BCHW = pixels(6)
    backbone = load(kind)
    cls_BD = backbone.embed(pixels_BCHW)
    assert (cls_BD.shape, cls_BD.dtype, cls_BD.device.type) == ((6, 192), torch.float32, "cpu")
    cosine_B = torch.cosine_similarity(cls_BD, tiny_backbone.embed(pixels_BCHW))
    assert float(cosine_B.min()) > MIN_COSINE[kind.precision]
    assert (backbone.runtime_name, backbone.precision) == (kind.name, kind.precision)


@pytest.mark.parametrize("kind", HERE, ids=lambda kind: kind.name)
def test_a_picture_has_its_vector_whatever_its_batch_mates(
    kind: RuntimeKind, load: Callable[[RuntimeKind], Backbone]
) -> None:
    """One bright picture among dark ones would move a scale that a whole batch shares."""
    pixels_BCHW = pixels(5) // 16
    pixels_BCHW[2] = 255
    backbone = load(kind)
    alone_BD = torch.cat([backbone.embed(one[None]) for one in pixels_BCHW])
    torch.testing.assert_close(backbone.embed(pixels_BCHW), alone_BD, rtol=0, atol=1e-4)


@pytest.mark.parametrize("kind", HERE, ids=lambda kind: kind.name)
def test_a_later_pass_leaves_earlier_vectors_alone(
    kind: RuntimeKind, load: Callable[[RuntimeKind], Backbone]
) -> None:
    backbone = load(kind)
    first_BD = backbone.embed(pixels(2))
    kept_BD = first_BD.clone()
    backbone.embed(pixels(2, seed=9))
    assert torch.equal(first_BD, kept_BD)


@pytest.mark.parametrize("kind", [one for one in HERE if one.export], ids=lambda kind: kind.name)
def test_streams_give_the_vectors_of_the_whole_device_bit_for_bit(
    kind: RuntimeKind, tiny_artefact: BackboneArtefact, export_of: MakeExport
) -> None:
    pixels_BCHW = pixels(7)
    export = export_of(kind)
    one = Backbone.load(tiny_artefact, "cpu", kind.name, export=export, num_threads=2)
    two = Backbone.load(tiny_artefact, "cpu", kind.name, export=export, num_threads=2, num_streams=2)
    assert (one.num_streams, two.num_streams) == (1, 2)
    whole_BD = one.embed(pixels_BCHW)
    assert torch.equal(two.embed(pixels_BCHW), whole_BD)
    with ThreadPoolExecutor(2) as pool:
        halves = list(pool.map(two.embed_on, (0, 1), (pixels_BCHW[:4], pixels_BCHW[4:])))
    assert torch.equal(torch.cat(halves), whole_BD)
    assert one.variant == two.variant


def test_torch_runs_its_passes_one_after_another(tiny_artefact: BackboneArtefact) -> None:
    backbone = Backbone.load(tiny_artefact, "cpu", REFERENCE, num_streams=2)
    assert backbone.num_streams == 1
    assert torch.equal(backbone.embed_on(0, pixels(2)), backbone.embed(pixels(2)))


def test_the_reference_is_the_first_and_runs_everywhere() -> None:
    assert RUNTIMES[0] == REFERENCE
    assert runtime_kind(REFERENCE).device_types == ("cpu", "cuda")


def test_variants_tell_runtimes_and_exports_apart(load: Callable[[RuntimeKind], Backbone]) -> None:
    variants = [load(kind).variant for kind in HERE]
    assert len(set(variants)) == len(variants)
    assert variants[0] == REFERENCE


@pytest.mark.parametrize("sha256, variant", [("", "torch-float32"), ("e" * 64, "torch-float32-eeeeeeeeeeee")])
def test_variants_tell_a_gpu_from_the_cpu(sha256: str, variant: str, tiny_artefact: BackboneArtefact) -> None:
    """Its kernels round otherwise: what one computed does not stand for what the other would."""

    class Placed:
        batch_buckets = ()

        def __init__(self, device: torch.device) -> None:
            self.device = device

        def embed(self, pixels_BCHW: Tensor) -> Tensor:
            raise NotImplementedError

    manifest = tiny_artefact.manifest
    assert Backbone(manifest, Placed(CPU), REFERENCE, sha256).variant == variant
    on_cuda = Backbone(manifest, Placed(torch.device("cuda", 1)), REFERENCE, sha256).variant
    assert on_cuda == variant.replace("float32", "float32-cuda")


# -- exports -----------------------------------------------------------------------------------------


@pytest.mark.slow
def test_equal_weights_and_pictures_give_equal_exports(
    tiny_artefact: BackboneArtefact, float_export: bytes, labelled_pixels: LabelledPixels
) -> None:
    preprocessing = tiny_artefact.manifest.preprocessing
    model = smooth(tiny_artefact.model(), preprocessing, labelled_pixels.pixels_NCHW)
    again = export_float(Embedding(rewritten(model, preprocessing), preprocessing), 192)
    assert again == float_export


@pytest.fixture(scope="module")
def export_of_pixels(tiny_artefact: BackboneArtefact) -> bytes:
    """As timm writes the model."""
    return export_float(Embedding(tiny_artefact.model(), tiny_artefact.manifest.preprocessing))


@pytest.mark.parametrize("kind", [kind for kind in HERE if kind.export], ids=lambda kind: kind.name)
def test_an_export_that_reads_pixels_goes_on_working(
    kind: RuntimeKind, tiny_artefact: BackboneArtefact, tiny_backbone: Backbone, export_of_pixels: bytes
) -> None:
    """As stores have them from before first layers read bytes, and as other models are exported."""
    assert kind.export is not None
    export = make_export(kind.export, export_of_pixels, pixels(8, seed=5))
    backbone = Backbone.load(tiny_artefact, "cpu", kind.name, export=export)
    cls_BD = backbone.embed(pixels(3))
    assert (
        float(torch.cosine_similarity(cls_BD, tiny_backbone.embed(pixels(3))).min())
        > MIN_COSINE[kind.precision]
    )
    assert torch.equal(backbone.embed(stack_pixels(list(pixels(3)))), cls_BD)  # however they lie


def test_vectors_that_changed_have_another_name_in_caches(tiny_artefact: BackboneArtefact) -> None:
    """Torch in bfloat16 read normalised pixels, which rounded otherwise."""
    assert Backbone.load(tiny_artefact, "cpu", REFERENCE).variant == REFERENCE
    assert Backbone.load(tiny_artefact, "cpu", "torch-bfloat16").variant == "torch-bfloat16-2"


def test_an_export_takes_patches_of_any_batch_and_tells_nothing_of_this_machine(float_export: bytes) -> None:
    model = onnx.load_model_from_string(float_export)
    graph = model.graph
    (given,), (made,) = graph.input, graph.output
    assert (given.name, made.name) == (INPUT, OUTPUT)
    assert given.type.tensor_type.elem_type == onnx.TensorProto.INT8
    assert given.type.tensor_type.shape.dim[0].dim_param
    for weight in graph.initializer:
        weight.ClearField("raw_data")  # whose bytes may look like anything
    assert b".py" not in model.SerializeToString()


def test_int8_weights_take_a_quarter_of_the_bytes(export_of: MakeExport, float_export: bytes) -> None:
    export = export_of(runtime_kind("openvino-int8"))
    assert export is not None and len(export) < 0.35 * len(float_export)
    graph = onnx.load_model_from_string(export).graph
    quantised = [node for node in graph.node if node.op_type == "DequantizeLinear"]
    # Query, key, value, projection and two MLP layers of each block; the last one's key and value are one.
    assert len(quantised) == 6 * 12 - 1


def test_openvino_shares_scales_as_the_graph_says(
    tiny_artefact: BackboneArtefact, export_of: MakeExport
) -> None:
    """An export of before says nothing: its scales are those it was measured with."""
    pytest.importorskip("openvino")
    kind = runtime_kind("openvino-int8")
    export = export_of(kind)
    assert export is not None

    def embed(group: int | None) -> Tensor:
        graph = onnx.load_model_from_string(export)
        assert {one.key: one.value for one in graph.metadata_props} == {ACTIVATION_GROUP: "192"}
        graph.ClearField("metadata_props")
        if group is not None:
            onnx.helper.set_model_props(graph, {ACTIVATION_GROUP: str(group)})
        given = graph.SerializeToString()
        return Backbone.load(tiny_artefact, "cpu", kind.name, export=given).embed(pixels(3))

    assert torch.equal(embed(None), embed(PLAIN_GROUP))
    assert not torch.equal(embed(192), embed(PLAIN_GROUP))


def test_openvino_reads_keys_where_they_lie(float_export: bytes) -> None:
    """No key is copied to be turned; what the graph says is not changed (the parity tests)."""
    openvino = pytest.importorskip("openvino")
    from model_store.runtimes.openvino_runtime import with_keys_as_they_lie

    model = with_keys_as_they_lie(openvino.Core().read_model(float_export))
    turning = [
        node
        for node in model.get_ordered_ops()
        if node.get_type_name() == "MatMul" and node.get_attributes()["transpose_b"]
    ]
    assert len(turning) == 11  # but the last block, where one token asks


def test_openvino_adds_a_narrow_models_sums_in_bfloat16(float_export: bytes) -> None:
    """Each block has two; those of the last one, of the CLS token alone, stay in float32."""
    openvino = pytest.importorskip("openvino")
    from model_store.runtimes.openvino_runtime import has_bfloat16

    if not has_bfloat16():
        pytest.skip("this processor has no bfloat16")
    core = openvino.Core()
    compiled = core.compile_model(core.read_model(float_export), "CPU", {"INFERENCE_PRECISION_HINT": "bf16"})
    told = [node.get_rt_info() for node in compiled.get_runtime_model().get_ordered_ops()]
    sums = [one["outputPrecisions"].value for one in told if one["layerType"].value == "Eltwise"]
    assert sums.count("bf16") >= 22
    assert sums.count("f32") == 2


@pytest.mark.parametrize("kind", [kind for kind in HERE if kind.export], ids=lambda kind: kind.name)
def test_a_damaged_export_is_refused(
    kind: RuntimeKind, tiny_artefact: BackboneArtefact, float_export: bytes
) -> None:
    for damaged in (b"", b"not a graph", float_export[: len(float_export) // 2]):
        with pytest.raises(InvalidBackbone, match=f"{kind.engine} cannot load the exported backbone"):
            Backbone.load(tiny_artefact, "cpu", kind.name, export=damaged)


def test_a_runtime_without_its_export_points_to_tuning(tiny_artefact: BackboneArtefact) -> None:
    with pytest.raises(InvalidBackbone, match="needs an exported form: run `tosca backbone tune`"):
        Backbone.load(tiny_artefact, "cpu", "onnxruntime-float32")


def test_a_backbone_too_large_for_a_graph_is_refused(
    tiny_artefact: BackboneArtefact, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("model_store.runtimes.onnx_export.MAX_BYTES", 2**24 + 1000)
    embedding = Embedding(tiny_artefact.model(), tiny_artefact.manifest.preprocessing)
    with pytest.raises(InvalidBackbone, match="exceed the 2 GiB"):
        export_float(embedding)


def test_a_runtime_for_another_device_is_not_available() -> None:
    reason = runtime_kind("onnxruntime-int8").unavailable_on(CUDA)
    assert reason == "runs on cpu and not on cuda"


def test_onnx_runtime_needs_another_package_for_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    kind = runtime_kind("onnxruntime-float32")
    monkeypatch.setattr("onnxruntime.get_available_providers", lambda: ["CPUExecutionProvider"])
    assert "onnxruntime-gpu" in (kind.unavailable_on(CUDA) or "")
    monkeypatch.setattr("onnxruntime.get_available_providers", lambda: ["CUDAExecutionProvider"])
    assert kind.unavailable_on(CUDA) is None


@pytest.mark.parametrize("falls_back", [False, True], ids=["on CUDA", "fallen back to the CPU"])
def test_onnx_runtime_asks_for_one_cuda_device_and_bears_no_fallback(
    falls_back: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As far as it can be seen without such a device: what ONNX Runtime is asked for, and what it says."""
    asked: list[Any] = []

    class Session:
        def __init__(self, export: bytes, options: Any, providers: list[Any]) -> None:
            asked.extend(providers)

        def get_providers(self) -> list[str]:
            return (
                ["CPUExecutionProvider"] if falls_back else ["CUDAExecutionProvider", "CPUExecutionProvider"]
            )

        def get_inputs(self) -> list[Any]:
            return [SimpleNamespace(shape=["B", 196, 768])]

    monkeypatch.setattr("onnxruntime.InferenceSession", Session)
    kind, device = runtime_kind("onnxruntime-float32"), torch.device("cuda", 1)
    if falls_back:
        with pytest.raises(InvalidBackbone, match="could not load its CUDA provider"):
            load_export(kind, b"", device, num_threads=1)
    else:
        (runtime,) = load_export(kind, b"", device, num_threads=1)
        assert runtime.device == device
    (provider, options), fallback = asked
    assert (provider, options["device_id"], fallback) == (
        "CUDAExecutionProvider",
        "1",
        "CPUExecutionProvider",
    )


def test_a_missing_engine_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("model_store.runtimes.runtime.find_spec", lambda _: None)
    reason = runtime_kind("openvino-int8").unavailable_on(CPU)
    assert reason is not None and "pip install 'tosca-serving[openvino]'" in reason


@pytest.mark.skipif(
    runtime_kind("onnxruntime-float32").unavailable_on(CUDA) is not None or not torch.cuda.is_available(),
    reason="needs a CUDA device and onnxruntime-gpu",
)
def test_onnx_runtime_on_cuda_agrees_with_torch_on_the_cpu(
    tiny_artefact: BackboneArtefact, tiny_backbone: Backbone, float_export: bytes
) -> None:
    backbone = Backbone.load(tiny_artefact, "cuda", "onnxruntime-float32", export=float_export)
    torch.testing.assert_close(
        backbone.embed(pixels(3)).cpu(), tiny_backbone.embed(pixels(3)), rtol=1e-3, atol=1e-3
    )


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("batch", [1, 3, 64, 70])
def test_graphs_on_cuda_agree_with_torch_on_the_cpu(
    batch: int, tiny_artefact: BackboneArtefact, tiny_backbone: Backbone
) -> None:
    cls_BD = Backbone.load(tiny_artefact, "cuda", "torch-float32").embed(pixels(batch)).cpu()
    torch.testing.assert_close(cls_BD, tiny_backbone.embed(pixels(batch)), rtol=1e-3, atol=1e-3)
