"""A client for the service that needs httpx and nothing of what the service is made of.

    from service.client import Client

    with Client("http://localhost:8000") as client:
        print(client.predict("bird.jpg").label)

`AsyncClient` is the same for asyncio. A refusal is a `ServerRefused`, a server that cannot be reached a
`ServerUnreachable`; what is worth asking again is asked again, as `Retries` says.
"""

from model_store.answers import Choice, Receipt
from service.client.asynchronous import AsyncClient
from service.client.calls import Picture, Wishes
from service.client.errors import ClientError, ServerRefused, ServerUnreachable
from service.client.results import (
    Change,
    Health,
    Prediction,
    Readiness,
    Replica,
    Revision,
    Standing,
    Task,
    TaskImpact,
    Tasks,
)
from service.client.retries import Retries
from service.client.synchronous import Client

__all__ = [
    "AsyncClient",
    "Change",
    "Choice",
    "Client",
    "ClientError",
    "Health",
    "Picture",
    "Prediction",
    "Readiness",
    "Receipt",
    "Replica",
    "Retries",
    "Revision",
    "ServerRefused",
    "ServerUnreachable",
    "Standing",
    "Task",
    "TaskImpact",
    "Tasks",
    "Wishes",
]
