"""Exports of a backbone: the graph that the engines other than torch run."""

import tempfile
import warnings
from pathlib import Path

import numpy as np
import onnx
import onnx.numpy_helper
import torch
from torch import Tensor

from model_store.errors import InvalidBackbone
from model_store.runtimes.byte_patches import as_graph_reads
from model_store.runtimes.runtime import ACTIVATION_GROUP, PLAIN_GROUP
from model_store.runtimes.torch_runtime import Embedding

INPUT, OUTPUT = "pixels", "cls"
MAX_BYTES = 2**31 - 1  # of a protocol buffer
OPSET = 20


def export_float(embedding: Embedding, activation_group: int = PLAIN_GROUP) -> bytes:
    """The float32 graph from uint8 pixels, as the embedding prepares them, to [B, D] CLS vectors, for any B.

    It tells how many features of a token may share a scale where products quantise what they read.
    Raises InvalidBackbone when torch cannot express the model as a graph, and for more than 2 GiB.
    """
    size_bytes = sum(value.numel() * 4 for value in embedding.state_dict().values())
    if size_bytes > MAX_BYTES - 2**24:
        raise InvalidBackbone(f"{size_bytes} bytes of weights exceed the 2 GiB an ONNX file may have")
    example = embedding.prepare(torch.zeros((2, 3, *embedding.image_size), dtype=torch.uint8))
    try:
        with warnings.catch_warnings(), torch.inference_mode():
            warnings.simplefilter("ignore")  # the exporter warns of its own deprecations
            program = torch.onnx.export(
                embedding,
                (example,),
                dynamo=True,
                opset_version=OPSET,
                input_names=[INPUT],
                output_names=[OUTPUT],
                dynamic_shapes=({0: torch.export.Dim("B")},),
                verbose=False,
            )
    except torch.onnx.errors.OnnxExporterError as error:
        raise InvalidBackbone(f"the backbone cannot be exported: {error}") from error
    assert program is not None, "the dynamo exporter returns its program"
    graph: onnx.ModelProto = program.model_proto
    for item in [*graph.graph.node, *graph.graph.input, *graph.graph.output, *graph.graph.value_info]:
        item.ClearField("metadata_props")  # the exporter leaves stack traces with paths of this machine
        item.ClearField("doc_string")
    graph.graph.ClearField("metadata_props")
    graph.ClearField("metadata_props")
    onnx.helper.set_model_props(graph, {ACTIVATION_GROUP: str(activation_group)})
    return bytes(graph.SerializeToString(deterministic=True))


def quantise_weights(export: bytes) -> bytes:
    """The float32 graph with int8 weights in its linear layers, symmetric, one scale an output channel; but
    for the first, whose numbers are exact as they are."""
    graph = onnx.load_model_from_string(export)
    weights = {item.name: item for item in graph.graph.initializer}
    of_bytes = {node.output[0] for node in graph.graph.node if node.op_type == "Cast"}
    nodes: list[onnx.NodeProto] = []
    for node in graph.graph.node:
        if node.op_type == "MatMul" and node.input[1] in weights and node.input[0] not in of_bytes:
            name = node.input[1]
            item = weights.pop(name)  # a weight that two layers share stays as it is for the second
            weight_IO = onnx.numpy_helper.to_array(item)
            scale_O = np.maximum(np.abs(weight_IO).max(axis=0), np.finfo(np.float32).tiny) / 127.0
            quantised_IO = np.rint(weight_IO / scale_O).clip(-127, 127).astype(np.int8)
            graph.graph.initializer.extend(
                [
                    onnx.numpy_helper.from_array(quantised_IO, f"{name}_int8"),
                    onnx.numpy_helper.from_array(scale_O.astype(np.float32), f"{name}_scale"),
                ]
            )
            nodes.append(
                onnx.helper.make_node(
                    "DequantizeLinear", [f"{name}_int8", f"{name}_scale"], [f"{name}_float"], axis=1
                )
            )
            node.input[1] = f"{name}_float"
        nodes.append(node)
    del graph.graph.node[:]
    graph.graph.node.extend(nodes)
    _drop_unused_weights(graph)
    return bytes(graph.SerializeToString(deterministic=True))


def _drop_unused_weights(graph: onnx.ModelProto) -> None:
    used = {name for node in graph.graph.node for name in node.input}
    kept = [item for item in graph.graph.initializer if item.name in used]
    del graph.graph.initializer[:]
    graph.graph.initializer.extend(kept)


def calibrate_static(export: bytes, pixels_NCHW: Tensor) -> bytes:
    """The float32 graph with int8 weights and activations, whose ranges are those of the given pictures.

    Only the layers whose input is a layer norm's output are quantised: the inputs of the others have
    outliers that one scale a tensor cannot hold (docs/decisions/0003-runtimes.md).
    """
    from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static
    from onnxruntime.quantization.quant_utils import add_pre_process_metadata

    class Pictures(CalibrationDataReader):  # type: ignore[misc]
        def __init__(self) -> None:
            self._left = iter(pixels_NCHW)

        def get_next(self) -> dict[str, np.ndarray] | None:
            one = next(self._left, None)
            return None if one is None else {INPUT: as_graph_reads(one[None], shape).numpy()}

    graph = onnx.load_model_from_string(export)
    shape = [axis.dim_value for axis in graph.graph.input[0].type.tensor_type.shape.dim]
    add_pre_process_metadata(graph)  # the exporter has inferred shapes and folded constants already
    normed = {node.output[0] for node in graph.graph.node if node.op_type == "LayerNormalization"}
    chosen = [node.name for node in graph.graph.node if node.op_type == "MatMul" and node.input[0] in normed]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "static8.onnx"
        quantize_static(
            graph,
            path,
            Pictures(),
            quant_format=QuantFormat.QDQ,
            per_channel=True,
            activation_type=QuantType.QUInt8,
            weight_type=QuantType.QInt8,
            nodes_to_quantize=chosen,
        )
        return path.read_bytes()
