"""Become `tosca ARGUMENTS`, with secrets read from files.

A variable NAME_FILE=/run/secrets/x becomes NAME with the file's content, so that a key is never in the
image, the compose file or `docker inspect`. The process is replaced, so that signals arrive at `tosca`.
"""

import os
import sys
from pathlib import Path

# NAME_FILE variables with a meaning of their own, in other programs or in service/settings.py.
LEFT_ALONE = {
    "TOSCA_KEYS_FILE",
    "AWS_WEB_IDENTITY_TOKEN_FILE",
    "AWS_SHARED_CREDENTIALS_FILE",
    "SSL_CERT_FILE",
}


def main() -> None:
    for name, path in list(os.environ.items()):
        if not name.endswith("_FILE") or not name.startswith(("AWS_", "TOSCA_", "AZURE_", "GOOGLE_")):
            continue
        target = name.removesuffix("_FILE")
        if name in LEFT_ALONE or target in os.environ:
            continue
        try:
            os.environ[target] = Path(path).read_text().strip()
        except OSError as error:
            sys.exit(f"{name}: {error}")
        del os.environ[name]
    os.execvp("tosca", ["tosca", *sys.argv[1:]])  # noqa: S606, S607


if __name__ == "__main__":
    main()
