"""GET /metrics, for Prometheus."""

import asyncio

from fastapi import APIRouter, Response
from prometheus_client.exposition import CONTENT_TYPE_PLAIN_0_0_4

from service.exposition import gather, render
from service.routes.state import State, problems

router = APIRouter(tags=["metrics"])
_BODY = {"content": {"text/plain": {"schema": {"type": "string"}}}, "description": "The text format 0.0.4"}


@router.get("/metrics", responses={200: _BODY, **problems()}, response_class=Response)
async def show_metrics(state: State) -> Response:
    """For Prometheus: every metric of docs/monitoring.md."""
    text = await asyncio.to_thread(render, state.engine.telemetry.metrics, gather(state))
    return Response(text, media_type=CONTENT_TYPE_PLAIN_0_0_4)
