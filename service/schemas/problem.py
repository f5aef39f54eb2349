"""Refusals."""

from pydantic import BaseModel, Field


class ProblemOut(BaseModel):
    """A refusal, RFC 9457."""

    type: str = Field(examples=["urn:tosca:problem:unknown-task"])
    title: str = Field(examples=["Not Found"])
    status: int = Field(examples=[404])
    detail: str = Field(examples=["task 'birds' is not active in revision 7"])
    instance: str = Field(examples=["/tasks/birds"])
    request_id: str | None = Field(None, examples=["4bf92f3577b34da6a3ce929d0e0e4736"])
    revision: int | None = Field(None, description="With 412: the revision served.", examples=[7])
