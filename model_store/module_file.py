"""The module file: one self-describing safetensors file per task version. Format: docs/module-format.md.

Reading trusts nothing: size, header, names, dtypes, shapes, finiteness and digest are checked before a
tensor is used, and no pickle is ever involved.
"""
# K classes, D features, R bottleneck, P = D(D+1)/2, M calibration vectors

import hashlib
import json
import struct
from dataclasses import dataclass
from typing import Any

import safetensors
import safetensors.torch
import torch
from pydantic import ValidationError
from torch import Tensor

from model_store.backbone import BackboneManifest
from model_store.calibration import CalibrationSet
from model_store.errors import FingerprintMismatch, GoldenCheckFailed, InvalidModule
from model_store.landmarks import LandmarkRidge, Standardisation
from model_store.luca import CosineHead, LuCA, matrix_names
from model_store.manifest import ModuleManifest
from model_store.sparse_matrix import pack_sparse, packed_mask_size, unpack_sparse
from model_store.statistics import MAX_SCATTER, ClassStatistics, is_covariance, packed_size
from model_store.task_module import TaskModule

FORMAT = "tosca-module"
MAX_CALIBRATION_VECTORS = 128
MAX_HEADER_BYTES = 4 * 2**20
GOLDEN_TOLERANCE = 1e-3  # of the largest golden logit (at least 1)
_DTYPES = {
    torch.float32: "F32",
    torch.float16: "F16",
    torch.int64: "I64",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


@dataclass(frozen=True)
class ModuleFile:
    """A checked module file: its manifest, its content ready for a bank, and its size."""

    manifest: ModuleManifest
    module: TaskModule
    size_bytes: int

    @property
    def sha256(self) -> str:
        return self.module.sha256


def write_module(manifest: ModuleManifest, module: TaskModule) -> bytes:
    """The bytes of a module file; equal content gives equal bytes.

    Expert weights are stored in float16: round them (`round_weights`) before computing golden outputs.
    """
    D = manifest.feature_dim
    standardisation = module.standardisation or Standardisation(torch.zeros(D), torch.ones(D))
    calibration, statistics = module.calibration, module.statistics
    tensors = {
        **_luca_tensors(module.luca),
        "head.weight": module.head.weight_KD.half(),
        "head.scale": module.head.scale,
        "input.mean": standardisation.mean_D,
        "input.scale": standardisation.scale_D,
        "ridge.kernel": module.ridge.kernel_weight_MK.half(),
        "ridge.linear": module.ridge.linear_weight_DK.half(),
        "statistics.mean": statistics.mean_KD,
        "statistics.count": statistics.count_K,
        "statistics.variance": statistics.variance_D,
        "statistics.correlation": statistics.correlation_P,
        "calibration.cls": calibration.cls_MD,
        "calibration.label": calibration.label_M,
        "calibration.logits": calibration.logits_MK,
        "calibration.held_out_logits": calibration.held_out_logits_MK,
        "calibration.in_statistics": calibration.in_statistics_M,
    }
    text = json.dumps(manifest.model_dump(mode="json"), sort_keys=True)
    data = {name: value.detach().cpu().contiguous() for name, value in tensors.items()}
    payload = safetensors.torch.save(data)
    (header_bytes,) = struct.unpack("<Q", payload[:8])
    entries = json.loads(payload[8 : 8 + header_bytes])
    metadata = {"format": FORMAT, "manifest": text, "digest": _content_digest(text, entries, payload)}
    # The library writes metadata in an order that changes from run to run; a file's identity must not.
    header = _compact({"__metadata__": metadata, **entries}).encode()
    header += b" " * (-len(header) % 8)
    return struct.pack("<Q", len(header)) + header + payload[8 + header_bytes :]


def round_weights(luca: LuCA, head: CosineHead, ridge: LandmarkRidge) -> LandmarkRidge:
    """Round the experts' weights to what the file will hold; LuCA and head in place, the ridge returned."""
    with torch.no_grad():
        for parameter in [*luca.parameters(), head.weight_KD]:
            parameter.copy_(parameter.half().float())
    return LandmarkRidge(ridge.kernel_weight_MK.half().float(), ridge.linear_weight_DK.half().float())


def read_module(data: bytes, device: torch.device | str = "cpu") -> ModuleFile:
    """Check the bytes of a module file and build its module on `device`. Raises InvalidModule."""
    try:
        manifest, entries = _read_header(data)
        expected = _check_layout(manifest, entries)  # before anything is allocated
    except RecursionError as error:
        raise InvalidModule("not a safetensors file: its header is nested too deep") from error
    try:
        tensors = safetensors.torch.load(data)
    except (safetensors.SafetensorError, ValueError, KeyError, TypeError, RuntimeError) as error:
        raise InvalidModule(f"not a whole safetensors file: {str(error)[:200]}") from error
    _check_values(manifest, tensors, expected)
    luca = LuCA(manifest.feature_dim, manifest.bottleneck_dim, manifest.flow)
    head = CosineHead(manifest.feature_dim, len(manifest.labels))
    luca.load_state_dict(_luca_state(manifest, luca, tensors))
    head.load_state_dict({"weight_KD": tensors["head.weight"], "scale": tensors["head.scale"]})
    # As the file holds them, at half the memory: every product is taken in float32 all the same.
    luca.requires_grad_(False).to(device, torch.float16)
    head.requires_grad_(False).to(device)
    head.weight_KD.data = head.weight_KD.half()
    at = {name: value.to(device) for name, value in tensors.items() if not name.startswith("statistics.")}
    standardisation = Standardisation(at["input.mean"], at["input.scale"])
    module = TaskModule(
        task=manifest.task,
        labels=manifest.labels,
        sha256=hashlib.sha256(data).hexdigest(),
        standardisation=standardisation if manifest.standardised else None,
        luca=luca,
        head=head,
        ridge=LandmarkRidge(
            kernel_weight_MK=at["ridge.kernel"],
            linear_weight_DK=at["ridge.linear"],
        ),
        luca_weight=manifest.luca_weight,
        ridge_weight=manifest.ridge_weight,
        statistics=ClassStatistics(
            mean_KD=tensors["statistics.mean"],
            count_K=tensors["statistics.count"],
            variance_D=tensors["statistics.variance"],
            correlation_P=tensors["statistics.correlation"],
        ),
        calibration=CalibrationSet(
            at["calibration.cls"],
            at["calibration.label"],
            at["calibration.logits"],
            at["calibration.held_out_logits"],
            at["calibration.in_statistics"],
        ),
        label_space=manifest.label_space,
        abstain_level=manifest.abstain_level,
    )
    return ModuleFile(manifest, module, len(data))


def check_module(file: ModuleFile, backbone: BackboneManifest) -> None:
    """Raise unless the module was made for this backbone and reproduces its trainer's outputs here."""
    manifest = file.manifest
    if manifest.feature_dim != backbone.feature_dim:
        raise FingerprintMismatch(
            f"task {manifest.task!r}: module is for D = {manifest.feature_dim}, "
            f"backbone {backbone.architecture} has D = {backbone.feature_dim}"
        )
    if manifest.backbone_fingerprint != backbone.fingerprint:
        raise FingerprintMismatch(
            f"task {manifest.task!r}: module was trained on backbone {manifest.backbone_fingerprint[:12]}…, "
            f"this store serves {backbone.fingerprint[:12]}…"
        )
    if not is_covariance(file.module.statistics):
        raise InvalidModule(f"task {manifest.task!r}: the within-class scatter is no covariance")
    mean_KD = file.module.statistics.mean_KD.to(file.module.calibration.cls_MD.device)
    if not bool(file.module.logits(mean_KD).isfinite().all()):
        raise InvalidModule(f"task {manifest.task!r}: the module's logits on its class means are not finite")
    golden_MK = file.module.calibration.logits_MK
    if golden_MK.numel() == 0:
        return
    logits_MK = file.module.logits(file.module.calibration.cls_MD.float())
    error = float((logits_MK - golden_MK).abs().max())
    allowed = GOLDEN_TOLERANCE * max(1.0, float(golden_MK.abs().max()))
    if not error <= allowed:
        raise GoldenCheckFailed(
            f"task {manifest.task!r}: the module's logits differ by {error:.3g} from those its trainer "
            f"recorded, at most {allowed:.3g} is allowed"
        )


def _luca_tensors(luca: LuCA) -> dict[str, Tensor]:
    """LuCA as the file holds it: matrices as mask and values, vectors in float16."""
    state = luca.state_dict()
    tensors: dict[str, Tensor] = {}
    for name in matrix_names(luca.flow):
        mask_S, value_N = pack_sparse(state.pop(name))
        tensors |= {f"luca.{name}.mask": mask_S, f"luca.{name}.values": value_N}
    return tensors | {f"luca.{name}": value.half() for name, value in state.items()}


def _luca_state(manifest: ModuleManifest, luca: LuCA, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    state = {name: tensors.get(f"luca.{name}", value) for name, value in luca.state_dict().items()}
    for name in matrix_names(luca.flow):
        rows, columns = state[name].shape
        mask_S, value_N = tensors[f"luca.{name}.mask"], tensors[f"luca.{name}.values"]
        try:
            state[name] = unpack_sparse(mask_S, value_N, (rows, columns))
        except ValueError as error:
            raise InvalidModule(f"task {manifest.task!r}: luca.{name}: {error}") from error
    return state


def _content_digest(manifest_text: str, entries: dict[str, Any], data: bytes) -> str:
    """SHA-256 over the manifest's text, the header's entries (sorted, compact JSON) and the tensor bytes."""
    (header_bytes,) = struct.unpack("<Q", data[:8])
    digest = hashlib.sha256(manifest_text.encode())
    digest.update(_compact(entries).encode())
    digest.update(memoryview(data)[8 + header_bytes :])
    return digest.hexdigest()


def _compact(value: dict[str, Any]) -> str:
    return json.dumps(value, separators=(",", ":"), sort_keys=True)


def _read_header(data: bytes) -> tuple[ModuleManifest, dict[str, Any]]:
    """The manifest, and the header's entry of every tensor, not yet judged."""
    if len(data) < 8:
        raise InvalidModule(f"not a safetensors file: {len(data)} bytes are fewer than its length field")
    (header_bytes,) = struct.unpack("<Q", data[:8])
    if header_bytes > min(MAX_HEADER_BYTES, len(data) - 8):
        raise InvalidModule(
            f"not a whole safetensors file: its header claims {header_bytes} bytes, "
            f"{len(data) - 8} follow and {MAX_HEADER_BYTES} are allowed"
        )
    try:
        header = json.loads(data[8 : 8 + header_bytes])
    except ValueError as error:
        raise InvalidModule(f"not a safetensors file: its header is no JSON ({error})") from error
    entries: dict[str, Any] = header if isinstance(header, dict) else {}
    metadata = entries.pop("__metadata__", None)
    if not isinstance(metadata, dict) or metadata.get("format") != FORMAT or "manifest" not in metadata:
        raise InvalidModule(f"a safetensors file, but no module: its metadata lacks format {FORMAT!r}")
    text = str(metadata["manifest"])
    if not text.isascii() or metadata.get("digest") != _content_digest(text, entries, data):
        raise InvalidModule("the file was damaged or altered: its content does not match its own digest")
    try:
        return ModuleManifest.model_validate_json(text), entries
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        where = ".".join(str(part) for part in first["loc"]) or "manifest"
        raise InvalidModule(f"module manifest: {where}: {first['msg']}") from error


def _check_layout(manifest: ModuleManifest, entries: dict[str, Any]) -> dict[str, torch.dtype]:
    """Names, shapes and types of all tensors, from the header alone; returns the type of each."""
    D, K = manifest.feature_dim, len(manifest.labels)
    M = _num_calibration_vectors(manifest, entries)
    expected: dict[str, tuple[tuple[int, ...], torch.dtype]] = {
        **_luca_layout(manifest, entries),
        "head.weight": ((K, D), torch.float16),
        "head.scale": ((), torch.float32),
        "input.mean": ((D,), torch.float32),
        "input.scale": ((D,), torch.float32),
        "ridge.kernel": ((M, K), torch.float16),
        "ridge.linear": ((D, K), torch.float16),
        "statistics.mean": ((K, D), torch.float32),
        "statistics.count": ((K,), torch.int64),
        "statistics.variance": ((D,), torch.float32),
        "statistics.correlation": ((packed_size(D),), torch.int8),
        "calibration.cls": ((M, D), torch.float16),
        "calibration.label": ((M,), torch.int64),
        "calibration.logits": ((M, K), torch.float32),
        "calibration.held_out_logits": ((M, K), torch.float32),
        "calibration.in_statistics": ((M,), torch.bool),
    }
    for name in sorted(expected.keys() - entries.keys()):
        raise InvalidModule(f"task {manifest.task!r}: tensor {name!r} is missing")
    for name in sorted(entries.keys() - expected.keys()):
        raise InvalidModule(f"task {manifest.task!r}: tensor {name[:80]!r} is not part of the format")
    for name, (shape, dtype) in expected.items():
        found = (
            (entries[name].get("shape"), entries[name].get("dtype"))
            if isinstance(entries[name], dict)
            else ()
        )
        if found != (list(shape), _DTYPES[dtype]):
            text = " ".join(str(part)[:80] for part in found)
            raise InvalidModule(
                f"task {manifest.task!r}: {name} is {text}, expected {list(shape)} {_DTYPES[dtype]}"
            )
    return {name: dtype for name, (_, dtype) in expected.items()}


def _luca_layout(
    manifest: ModuleManifest, entries: dict[str, Any]
) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    with torch.device("meta"):
        state = LuCA(manifest.feature_dim, manifest.bottleneck_dim, manifest.flow).state_dict()
    layout: dict[str, tuple[tuple[int, ...], torch.dtype]] = {}
    for name in matrix_names(manifest.flow):
        num_entries = state.pop(name).numel()
        num_values = min(_length(entries, f"luca.{name}.values"), num_entries)
        layout[f"luca.{name}.mask"] = ((packed_mask_size(num_entries),), torch.uint8)
        layout[f"luca.{name}.values"] = ((num_values,), torch.float16)
    return layout | {f"luca.{name}": (tuple(value.shape), torch.float16) for name, value in state.items()}


def _length(entries: dict[str, Any], name: str) -> int:
    """The length that the header gives a vector, 0 for anything else."""
    entry = entries.get(name)
    shape = entry.get("shape") if isinstance(entry, dict) else None
    if isinstance(shape, list) and len(shape) == 1 and isinstance(shape[0], int):
        return max(0, shape[0])
    return 0


def _num_calibration_vectors(manifest: ModuleManifest, entries: dict[str, Any]) -> int:
    M = _length(entries, "calibration.label")
    if M > MAX_CALIBRATION_VECTORS:
        raise InvalidModule(
            f"task {manifest.task!r}: {M} calibration vectors, at most {MAX_CALIBRATION_VECTORS} are allowed"
        )
    return M


def _check_values(
    manifest: ModuleManifest, tensors: dict[str, Tensor], dtypes: dict[str, torch.dtype]
) -> None:
    for name, dtype in dtypes.items():
        if dtype.is_floating_point and not bool(torch.isfinite(tensors[name]).all()):
            raise InvalidModule(f"task {manifest.task!r}: {name} holds NaN or infinity")
    label_M, K = tensors["calibration.label"], len(manifest.labels)
    if not bool(((label_M >= 0) & (label_M < K)).all()):
        raise InvalidModule(f"task {manifest.task!r}: calibration labels must lie in 0 … {K - 1}")
    if int(tensors["statistics.count"].min()) < 1 or int(tensors["statistics.count"].max()) > 2**40:
        raise InvalidModule(f"task {manifest.task!r}: class counts must lie in 1 … 2^40")
    variance_D = tensors["statistics.variance"]
    if float(variance_D.min()) < 0.0 or float(variance_D.max()) >= MAX_SCATTER:
        raise InvalidModule(
            f"task {manifest.task!r}: the scatter's diagonal must lie in 0 … {MAX_SCATTER:.0e}"
        )
    if int(tensors["statistics.correlation"].min()) < -127:
        raise InvalidModule(f"task {manifest.task!r}: correlations must lie in -127 … 127")
