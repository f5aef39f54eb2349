"""The least a FastAPI service can do: read the body, return an answer from memory.

It reads TOSCA_PORT, so that what starts the service for tests can start it.
Example: TOSCA_PORT=9000 python -m benchmarks.peers.bare_fastapi
"""

import os

import uvicorn
from fastapi import FastAPI, Request

app = FastAPI()
ANSWER: dict[str, list[dict[str, object]]] = {
    "predictions": [{"task": "digits", "label": "3", "confidence": 0.99, "p_value": 0.5}]
}


@app.get("/health/ready")
async def ready() -> dict[str, str]:
    return {"status": "ready"}


@app.post("/predict")
async def predict(request: Request) -> dict[str, list[dict[str, object]]]:
    await request.body()
    return ANSWER


if __name__ == "__main__":
    uvicorn.run(app, port=int(os.environ["TOSCA_PORT"]), log_level="warning", access_log=False)
