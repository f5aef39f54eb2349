"""What goes over HTTP: requests and answers, with examples for the OpenAPI document."""

from datetime import datetime
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, FiniteFloat, model_validator

from model_store.answers import Answer
from model_store.impact import ImpactReport, TaskHealth
from model_store.manifest import Label, TaskName
from model_store.publishing import Outcome
from model_store.replicas import Replica
from model_store.revision import Revision
from model_store.revision_reader import ActiveFile
from model_store.selection import Selection
from service.drift import Drift
from service.questions import TimedAnswer
from service.reliability import Reliability
from service.replicas import Standing
from service.traffic import TaskTraffic, Traffic

_SHA = "9f86d081884c7d659a2feaa0c55ad015a3bf4f1b2b0b822cd15d6c15b0f00a08"

_PICTURE = (  # one pixel, PNG
    "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGAWjR9awAAAABJRU5ErkJggg=="
)


class Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", from_attributes=True)


class PredictQuery(BaseModel):
    """The query of a prediction request; parameters that are not known are passed over."""

    model_config = ConfigDict(frozen=True)

    task: str | None = Field(None, description="Let this task answer instead of choosing one.")
    top_k: int = Field(5, ge=1, description="How many (task, label) pairs to list at most.")
    selection: Selection = Field("lda", description="How the task is chosen.")
    coverage: float | None = Field(
        None, gt=0.0, lt=1.0, description="Also list every (task, label) that this coverage cannot rule out."
    )
    timings: bool = Field(False, description="Report milliseconds per stage.")
    return_cls: bool = Field(False, description="Give back the CLS vectors.")


class PredictRequest(Strict):
    """The JSON form of a prediction request: pictures, or CLS vectors kept from earlier answers."""

    images: list[str] | None = Field(
        None, description="Pictures, base64.", min_length=1, examples=[[_PICTURE]]
    )
    cls: list[list[FiniteFloat]] | None = Field(
        None, description="CLS vectors of pictures, as an answer with `return_cls` gave them.", min_length=1
    )
    backbone_fingerprint: str | None = Field(
        None, description="The backbone that computed `cls`; another one's vectors mean nothing here."
    )
    task: str | None = Field(None, description="Let this task answer instead of choosing one.")
    top_k: int | None = Field(None, ge=1, description="How many (task, label) pairs to list at most.")
    selection: Selection | None = Field(None, description="How the task is chosen.")
    coverage: float | None = Field(
        None, gt=0.0, lt=1.0, description="Also list every (task, label) that this coverage cannot rule out."
    )

    @model_validator(mode="after")
    def _one_form(self) -> "PredictRequest":
        if (self.images is None) == (self.cls is None):
            raise ValueError("give either images or cls")
        if (self.cls is None) != (self.backbone_fingerprint is None):
            raise ValueError("cls and backbone_fingerprint go together")
        return self


class ReceiptOut(Strict):
    """What answered: enough to compute the same answer again."""

    revision: int = Field(examples=[7])
    module_sha256: str = Field(examples=[_SHA])
    backbone_fingerprint: str = Field(examples=[_SHA])
    signer: str | None = Field(
        None, description="The trusted signer of the module, if signatures are checked.", examples=["ci"]
    )


class ChoiceOut(Strict):
    task: str = Field(examples=["textiles"])
    label: str = Field(examples=["local"])
    probability: float = Field(ge=0.0, le=1.0, examples=[0.04])


class Prediction(Strict):
    """The answer to one picture; `confidence` is the calibrated probability of (task, label), added over
    the tasks of a label space."""

    task: str = Field(examples=["textiles"])
    label: str = Field(examples=["nominal"])
    confidence: float = Field(ge=0.0, le=1.0, examples=[0.95])
    task_probability: float = Field(ge=0.0, le=1.0, examples=[0.999])
    alternatives: list[ChoiceOut] = Field(description="The next most probable pairs, most probable first.")
    p_value: float = Field(
        description="Share of the task's known pictures that look no more typical of it than this one.",
        gt=0.0,
        le=1.0,
        examples=[0.43],
    )
    abstained: bool = Field(description="The p-value is at or below the abstain level: do not rely on this.")
    prediction_set: list[ChoiceOut] | None = Field(
        None, description="With `coverage`: all pairs that it cannot rule out, most probable first."
    )
    receipt: ReceiptOut

    @classmethod
    def of(cls, answer: Answer) -> "Prediction":
        return cls.model_validate(answer, from_attributes=True, extra="ignore")


class StageTimings(Strict):
    """Milliseconds one picture spent in each stage."""

    decode_ms: float
    queue_ms: float
    backbone_ms: float
    selection_ms: float
    batch_size: int
    modules_evaluated: int


class PredictResponse(Strict):
    """One prediction for each picture, in order; `timings` and `cls` when asked for."""

    predictions: list[Prediction]
    timings: list[StageTimings] | None = None
    cls: list[list[float]] | None = Field(
        None, description="CLS vectors of the pictures; send them back in place of the pictures."
    )
    backbone_fingerprint: str | None = Field(None, description="What `cls` was computed by.")

    @classmethod
    def of(
        cls, answers: list[TimedAnswer], *, timings: bool = False, cls_of: str | None = None
    ) -> "PredictResponse":
        """`cls_of`: the fingerprint to give the CLS vectors out with."""
        return cls(
            predictions=[Prediction.of(one.answer) for one in answers],
            timings=[_stage_timings(one) for one in answers] if timings else None,
            cls=[one.cls_D.tolist() for one in answers] if cls_of else None,
            backbone_fingerprint=cls_of,
        )


def _stage_timings(one: TimedAnswer) -> StageTimings:
    timings = one.timings
    return StageTimings(
        decode_ms=1e3 * timings.decode.duration_s,
        queue_ms=1e3 * timings.queue.duration_s if timings.queue else 0.0,
        backbone_ms=1e3 * timings.backbone.duration_s if timings.backbone else 0.0,
        selection_ms=1e3 * timings.selection.duration_s,
        batch_size=timings.batch_size,
        modules_evaluated=one.answer.num_modules_evaluated,
    )


class StoredModule(Strict):
    """A reference to a module that lies in the store already."""

    module_sha256: str = Field(pattern=r"^[0-9a-f]{64}$", examples=[_SHA])


class TaskOut(Strict):
    """One active task and what its module file says about it."""

    task: str = Field(examples=["textiles"])
    labels: list[str] = Field(examples=[["global", "local", "nominal"]])
    label_space: str | None = Field(None, description="Tasks that share it answer together.")
    abstain_level: float | None = Field(None, description="Its own level, if not the server's.")
    module_sha256: str = Field(examples=[_SHA])
    size_bytes: int = Field(examples=[2_023_604])
    flow: str = Field(examples=["tosca"])
    metrics: dict[str, float] = Field(examples=[{"accuracy": 0.98, "ece": 0.02}])
    training: dict[str, Any]
    provenance: dict[str, str]
    signer: str | None = Field(None, description="The trusted signer of the module file.", examples=["ci"])

    @classmethod
    def of(cls, file: ActiveFile, signer: str | None) -> "TaskOut":
        manifest = file.manifest
        return cls(
            task=manifest.task,
            labels=list(manifest.labels),
            label_space=manifest.label_space,
            abstain_level=manifest.abstain_level,
            module_sha256=file.sha256,
            size_bytes=file.size_bytes,
            flow=manifest.flow,
            metrics=manifest.metrics,
            training=manifest.training,
            provenance=manifest.provenance,
            signer=signer,
        )


class TasksOut(Strict):
    revision: int = Field(examples=[7])
    backbone_fingerprint: str = Field(examples=[_SHA])
    tasks: list[TaskOut]


class HealthOut(Strict):
    """How a set of tasks does on one task's calibration set, in [0, 1]."""

    selection_accuracy: float
    accuracy: float
    ece: float
    num_vectors: int

    @classmethod
    def of(cls, health: TaskHealth | None) -> "HealthOut | None":
        return None if health is None else cls.model_validate(health)


class TaskImpactOut(Strict):
    task: str
    before: HealthOut | None
    after: HealthOut | None


class ReplicaOut(Strict):
    """A replica by its record in the store."""

    replica_id: str = Field(examples=["host-1f0c9a3e"])
    is_this: bool = Field(description="Whether it is the one that answers.")
    is_live: bool = Field(description="Its record is younger than it says records of it get.")
    revision: int = Field(description="What it served when it wrote its record.", examples=[7])
    address: str | None = Field(examples=["http://10.0.0.7:8000"])
    age_s: float = Field(description="Seconds since its record was written, by the store's clock.")
    lifetime_s: float = Field(description="Seconds after which it counts as gone.", examples=[30.0])

    @classmethod
    def of(cls, replica: Replica, own_id: str) -> "ReplicaOut":
        record = replica.record
        return cls(
            replica_id=record.replica_id,
            is_this=record.replica_id == own_id,
            is_live=replica.is_live,
            revision=record.revision,
            address=record.address,
            age_s=round(replica.age_s, 3),
            lifetime_s=record.lifetime_s,
        )


class StandingOut(Strict):
    """How far a change has come among the live replicas, with `wait=all`."""

    all_serve: bool = Field(description="Whether every live replica serves the change, or a later one.")
    serving: list[ReplicaOut]
    behind: list[ReplicaOut]
    fault: str | None = Field(None, description="Why it is not known.")

    @classmethod
    def of(cls, standing: Standing, own_id: str) -> "StandingOut":
        return cls(
            all_serve=standing.all_serve,
            serving=[ReplicaOut.of(one, own_id) for one in standing.serving],
            behind=[ReplicaOut.of(one, own_id) for one in standing.behind],
            fault=standing.fault,
        )


class ChangeOut(Strict):
    """What a change did, or with a dry run would do."""

    revision: int = Field(
        description="The revision now served: what X-Minimum-Revision may ask for.", examples=[8]
    )
    published: bool = Field(description="False for a dry run, and when nothing had to change.")
    replaced_sha256: str | None = Field(None, description="The module that was active under this name.")
    harmed: list[str] = Field(description="Tasks that lose more than the margin.")
    impact: list[TaskImpactOut]
    num_unmeasured: int = Field(
        description="Active tasks left out of the report: of very many, those that changed and the tasks "
        "whose classes look most like theirs are measured.",
        examples=[0],
    )
    replicas: StandingOut | None = Field(None, description="With `wait=all`: which replicas serve it.")

    @classmethod
    def of(cls, outcome: Outcome, replicas: StandingOut | None = None) -> "ChangeOut":
        return cls(
            revision=outcome.active.revision.number,
            published=outcome.published,
            replaced_sha256=outcome.replaced_sha256,
            harmed=list(outcome.harmed),
            impact=_impact(outcome.impact),
            num_unmeasured=outcome.impact.num_unmeasured,
            replicas=replicas,
        )


def _impact(report: ImpactReport) -> list[TaskImpactOut]:
    return [
        TaskImpactOut(task=one.task, before=HealthOut.of(one.before), after=HealthOut.of(one.after))
        for one in report.tasks
    ]


class RevisionOut(Strict):
    number: int = Field(examples=[7])
    parent: int | None = Field(examples=[6])
    backbone_fingerprint: str = Field(examples=[_SHA])
    tasks: dict[str, str] = Field(examples=[{"textiles": _SHA}])
    reason: str = Field(examples=["add textiles"])
    author: str = Field(examples=["ops@host"])
    created_at: datetime

    @classmethod
    def of(cls, revision: Revision) -> "RevisionOut":
        return cls.model_validate(revision, from_attributes=True, extra="ignore")


class FeedbackRequest(Strict):
    """What a picture really showed."""

    request_id: str = Field(
        description="The `x-request-id` of the answer.",
        pattern=r"^[A-Za-z0-9._-]{1,128}$",
        examples=["4bf92f3577b34da6a3ce929d0e0e4736"],
    )
    index: int = Field(0, ge=0, description="Which picture of the request, from 0.")
    label: Label = Field(description="The true label.", examples=["nominal"])
    task: TaskName | None = Field(
        None,
        description="Its task; without, the label alone must match.",
        examples=["textiles"],
    )


class FeedbackOut(Strict):
    """The answer that was judged, and whether it was right."""

    task: str = Field(examples=["textiles"])
    label: str = Field(description="The label answered.", examples=["local"])
    confidence: float = Field(examples=[0.95])
    correct: bool
    counted: bool = Field(description="False when told before, or when its module is not active any more.")


class DriftOut(Strict):
    """Whether a task's pictures look less typical of it than those it was made from (docs/monitoring.md)."""

    samples: int = Field(description="Pictures in the windows looked at.", examples=[640])
    statistic: float | None = Field(
        description="Decimal logarithm of the evidence for drift, from 0; null without samples.",
        examples=[0.2],
    )
    p_value: float | None = Field(
        description="Valid at any time, however often it is looked at.", ge=0.0, le=1.0, examples=[0.63]
    )
    mean_p_value: float | None = Field(
        description="Of the pictures: about 0.5 or above without drift.", ge=0.0, le=1.0, examples=[0.52]
    )
    drifting: bool | None = Field(description="The p-value is at or below the alarm rate.")

    @classmethod
    def of(cls, drift: Drift | None) -> "DriftOut":
        if drift is None:
            return cls(samples=0, statistic=None, p_value=None, mean_p_value=None, drifting=None)
        return cls(
            samples=drift.num_pictures,
            statistic=drift.log10_wealth,
            p_value=drift.p_value,
            mean_p_value=drift.mean_p_value,
            drifting=drift.is_drifting,
        )


class ReliabilityOut(Strict):
    """How right a task's present module was, by the labels that came back."""

    labels: int = Field(examples=[120])
    accuracy: float | None = Field(ge=0.0, le=1.0, examples=[0.94])
    ece: float | None = Field(ge=0.0, le=1.0, examples=[0.03])

    @classmethod
    def of(cls, reliability: Reliability) -> "ReliabilityOut":
        return cls(labels=reliability.num_labels, accuracy=reliability.accuracy, ece=reliability.ece)


class TaskTrafficOut(Strict):
    """What one task has answered since the service started."""

    task: str = Field(examples=["textiles"])
    images: int = Field(examples=[640])
    share: float = Field(description="Of all pictures answered.", ge=0.0, le=1.0, examples=[0.64])
    abstained: int = Field(examples=[12])
    confidence_histogram: list[int] = Field(
        description="Answers by confidence, in ten bins of equal width.",
        examples=[[0, 0, 0, 1, 3, 9, 20, 47, 120, 440]],
    )
    drift: DriftOut
    feedback: ReliabilityOut

    @classmethod
    def of(cls, task: str, traffic: TaskTraffic, num_images: int) -> "TaskTrafficOut":
        tally = traffic.tally
        return cls(
            task=task,
            images=tally.num_images,
            share=tally.num_images / num_images,
            abstained=tally.num_abstained,
            confidence_histogram=list(tally.confidence_histogram),
            drift=DriftOut.of(traffic.drift.judge()),
            feedback=ReliabilityOut.of(traffic.reliability),
        )


class TrafficOut(Strict):
    """What this process has answered since it started. Tasks beyond the number that are told apart count as
    `other_images`; those of tasks removed meanwhile stay in `images` alone."""

    since: datetime
    images: int = Field(examples=[1000])
    abstained: int = Field(examples=[31])
    other_images: int = Field(examples=[0])
    tasks: list[TaskTrafficOut]

    @classmethod
    def of(cls, traffic: Traffic) -> "TrafficOut":
        total = traffic.total
        return cls(
            since=traffic.since,
            images=total.num_images,
            abstained=total.num_abstained,
            other_images=traffic.others.num_images,
            tasks=[TaskTrafficOut.of(task, one, total.num_images) for task, one in traffic.tasks()],
        )


class Live(Strict):
    status: str = Field(examples=["live"])


class Ready(Strict):
    status: str = Field(examples=["ready"])
    revision: int = Field(examples=[7])
    num_tasks: int = Field(examples=[2])
    backbone: str = Field(examples=["vit_base_patch16_clip_quickgelu_224"])
    backbone_fingerprint: str = Field(examples=[_SHA])
    device: str = Field(examples=["cpu"])
    runtime: str = Field(examples=["torch-float32"])
    staleness_s: float = Field(description="Seconds since the store was last read.")
    is_stale: bool = Field(description="Others may have published what is not served here.")
    store_fault: str | None = Field(None, description="Why the store could not be read the last time.")


class ProblemOut(BaseModel):
    """A refusal, RFC 9457."""

    type: str = Field(examples=["urn:tosca:problem:unknown-task"])
    title: str = Field(examples=["Not Found"])
    status: int = Field(examples=[404])
    detail: str = Field(examples=["task 'birds' is not active in revision 7"])
    instance: str = Field(examples=["/tasks/birds"])
    request_id: str | None = Field(None, examples=["4bf92f3577b34da6a3ce929d0e0e4736"])
    revision: int | None = Field(None, description="With 412: the revision served.", examples=[7])
