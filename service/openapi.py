"""The OpenAPI document of the service, as it is kept in the repository.

python -m service.openapi docs/openapi.json
"""

import json
import sys
from pathlib import Path

from service.app import create_app
from service.settings import Settings


def openapi_document() -> str:
    """The document of a service with every setting at its default, whatever the environment says."""
    document = create_app(Settings.model_construct()).openapi()
    return json.dumps(document, indent=1, ensure_ascii=False, sort_keys=True) + "\n"


if __name__ == "__main__":
    Path(sys.argv[1]).write_text(openapi_document())
