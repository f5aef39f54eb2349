"""What the protocol calls models: the whole service under one name, and each active task."""

from dataclasses import dataclass

from model_store.backbone import BackboneManifest
from model_store.errors import UnknownTask
from model_store.revision_reader import ActiveSet
from service.errors import UnknownVersion

SERVICE_MODEL = "tosca"
PLATFORM = "tosca"
EXTENSIONS = ("binary_tensor_data", "model_repository")


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """A tensor of a model; a side of -1 is as long as the batch."""

    name: str
    datatype: str
    shape: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Model:
    """The whole service, or the task that answers alone.

    The version of the service is the number of its revision, that of a task the SHA-256 of its module:
    whoever asks for a version gets an answer of it or none.
    """

    name: str
    version: str
    task: str | None = None
    labels: tuple[str, ...] = ()

    @property
    def outputs(self) -> tuple[TensorSpec, ...]:
        specs = [
            TensorSpec("task", "BYTES", (-1,)),
            TensorSpec("label", "BYTES", (-1,)),
            TensorSpec("confidence", "FP32", (-1,)),
            TensorSpec("task_probability", "FP32", (-1,)),
            TensorSpec("p_value", "FP32", (-1,)),
            TensorSpec("abstained", "BOOL", (-1,)),
            TensorSpec("receipt", "BYTES", (-1,)),
            TensorSpec("alternatives", "BYTES", (-1,)),
            TensorSpec("prediction_set", "BYTES", (-1,)),
        ]
        if self.task is not None:
            specs.append(TensorSpec("probability", "FP32", (-1, len(self.labels))))
            specs.append(TensorSpec("labels", "BYTES", (len(self.labels),)))
        return tuple(specs)


def inputs_of(backbone: BackboneManifest) -> tuple[TensorSpec, ...]:
    """What every model takes: one of these."""
    sides = backbone.preprocessing.height, backbone.preprocessing.width
    return (
        TensorSpec("image", "BYTES", (-1,)),
        TensorSpec("pixels", "FP32", (-1, 3, *sides)),
        TensorSpec("cls", "FP32", (-1, backbone.feature_dim)),
    )


def find_model(active: ActiveSet, name: str, version: str = "") -> Model:
    """The model of that name as it is served now; without `version`, whichever that is.

    Raises UnknownTask and UnknownVersion.
    """
    if name == SERVICE_MODEL:
        model = Model(name, str(active.revision.number))
    elif name in active.files:
        file = active.files[name]
        model = Model(name, file.sha256, task=name, labels=tuple(file.manifest.labels))
    else:
        raise UnknownTask(
            f"model {name[:100]!r} is neither {SERVICE_MODEL!r} nor a task of "
            f"revision {active.revision.number}"
        )
    if version not in ("", model.version):
        raise UnknownVersion(f"model {name!r} is served in version {model.version}, not {version[:100]!r}")
    return model
