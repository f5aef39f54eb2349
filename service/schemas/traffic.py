"""What each task has answered, whether its pictures changed, how right it was."""

from datetime import datetime

from pydantic import Field

from service.drift import Drift
from service.reliability import Reliability
from service.schemas.strict import Strict
from service.traffic import TaskTraffic, Traffic


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
