"""The watch that every page of the browser tests is under."""

from dataclasses import dataclass, field

from playwright.sync_api import Page, Request

REPORT_VIOLATIONS = """
document.addEventListener("securitypolicyviolation", (event) =>
  console.error(`violation of ${event.violatedDirective}: ${event.blockedURI}`));
"""
# Chromium's own line for an answer with status 400 or more; what the page made of it is what tests look at.
_REFUSED = "Failed to load resource"


@dataclass
class Watch:
    """What a page must not do: complain, violate its policy, ask another server."""

    origin: str
    complaints: list[str] = field(default_factory=list)
    strangers: list[str] = field(default_factory=list)

    def over(self, page: Page) -> None:
        page.on("console", lambda message: self._complain(message.type, message.text))
        page.on("pageerror", lambda error: self._complain("error", str(error)))
        page.on("request", self._see)

    def _complain(self, kind: str, text: str) -> None:
        if kind in ("error", "warning") and not text.startswith(_REFUSED):
            self.complaints.append(text)

    def _see(self, request: Request) -> None:
        if not request.url.startswith((self.origin + "/", f"blob:{self.origin}/")):
            self.strangers.append(request.url)
