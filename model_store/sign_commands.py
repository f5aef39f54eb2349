"""`tosca sign`: vouch for a module file."""

import hashlib
import os
from pathlib import Path
from typing import Annotated

import typer

from model_store.console import checked, out, print_json, read_file
from model_store.errors import InvalidTrust
from model_store.manifest import TaskName
from model_store.signatures import (
    Signature,
    Signer,
    SignerList,
    make_private_key,
    public_text,
    read_private_key,
)
from model_store.signatures import sign as sign_digest

SUFFIX = ".sig"


def sign(
    module: Annotated[Path, typer.Argument(help="A module file, *.safetensors.")],
    key: Annotated[Path, typer.Option(help="Private key, PEM; see --new-key.")],
    new_key: Annotated[bool, typer.Option("--new-key", help="Make the private key first.")] = False,
    name: Annotated[
        str, typer.Option(callback=checked(TaskName), help="The signer's name in what --new-key prints.")
    ] = "signer",
) -> None:
    """Sign a module file with an ed25519 key. The signature is written beside it, as MODULE.sig.

    `tosca publish` takes it along, and a request to register sends it as X-Module-Signature. With
    --new-key the entry for the server's list of signers (TOSCA_TRUSTED_SIGNERS) is printed.

    Example: tosca sign birds.safetensors --key ci.pem
    """
    data = read_file(module)
    if new_key:
        _write_private(key, make_private_key())
    private = read_private_key(read_file(key))
    signature = sign_digest(hashlib.sha256(data).hexdigest(), private)
    beside = signature_path(module)
    try:
        beside.write_text(signature.model_dump_json() + "\n")
    except OSError as error:
        raise InvalidTrust(f"{beside}: {error.strerror}") from error
    if new_key:
        entry = Signer(name=name, public_key=public_text(private.public_key()))
        print_json(SignerList(signers=(entry,)).model_dump())
    else:
        out.print(f"signed {module} with key {signature.key_id}: {beside}")


def signature_path(module: Path) -> Path:
    """Where the signature of a module file lies."""
    return module.with_name(module.name + SUFFIX)


def read_signature(module: Path) -> Signature | None:
    """The signature beside a module file, if there is one. Raises InvalidTrust."""
    beside = signature_path(module)
    if not beside.exists():
        return None
    try:
        return Signature.model_validate_json(beside.read_bytes())
    except (OSError, ValueError) as error:
        raise InvalidTrust(f"{beside} is no signature: {str(error)[:200]}") from error


def _write_private(path: Path, pem: bytes) -> None:
    """Create a file that only its owner may read; an existing key is never overwritten."""
    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    except OSError as error:
        raise InvalidTrust(f"{path}: {error.strerror}") from error
    with os.fdopen(descriptor, "wb") as file:
        file.write(pem)
