"""Pictures or CLS vectors to be answered, and their answers."""

from pydantic import BaseModel, ConfigDict, Field, FiniteFloat, model_validator

from model_store.answers import Answer
from model_store.selection import Selection
from service.questions import TimedAnswer
from service.schemas.strict import EXAMPLE_SHA256, Strict

_PICTURE = (  # one pixel, PNG
    "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGAWjR9awAAAABJRU5ErkJggg=="
)


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
    module_sha256: str = Field(examples=[EXAMPLE_SHA256])
    backbone_fingerprint: str = Field(examples=[EXAMPLE_SHA256])
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
