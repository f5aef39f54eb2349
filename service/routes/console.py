"""/console: the page for people. Static files, the same for everybody: all it shows comes from the API,
with the reader's own key."""

from typing import Any

from fastapi import FastAPI
from starlette.responses import RedirectResponse, Response
from starlette.staticfiles import StaticFiles

PATH = "/console"


class _PageFiles(StaticFiles):
    """Files that a browser asks about each time, so that no page of an older release stays in its cache."""

    def file_response(self, *args: Any, **kwargs: Any) -> Response:
        response = super().file_response(*args, **kwargs)
        response.headers["cache-control"] = "no-cache"
        return response


def add_console(app: FastAPI) -> None:
    """Serve the page at /console/, and lead there from /."""
    app.mount(PATH, _PageFiles(packages=[("service", "console_page")], html=True))

    @app.get("/", include_in_schema=False)
    async def to_console() -> RedirectResponse:
        return RedirectResponse(f"{PATH.lstrip('/')}/")  # relative, for servers behind a path
