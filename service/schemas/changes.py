"""What a change of the active tasks did, to them and to the others."""

from pydantic import Field

from model_store.impact import ImpactReport, TaskHealth
from model_store.publishing import Outcome
from service.schemas.replicas import StandingOut
from service.schemas.strict import Strict


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
