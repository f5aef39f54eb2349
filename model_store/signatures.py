"""Who vouches for a module file: detached ed25519 signatures over its SHA-256, and whose signatures count.

A signature lies beside the module in the store, or comes with the request that registers it; the module
file itself does not know of it, so its identity stays the same whoever signs.
"""

import base64
import binascii
import hashlib
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
    load_pem_private_key,
)
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from model_store.errors import InvalidTrust, UntrustedModule
from model_store.manifest import Sha256, TaskName

KeyId = Annotated[str, Field(pattern=r"^[0-9a-f]{16}$")]
_CONTEXT = b"tosca module signature, version 1\n"  # no signature made for another purpose fits


class Signature(BaseModel):
    """One signer's word for one module file."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    format_version: Literal[1] = 1
    module_sha256: Sha256
    key_id: KeyId
    signature: str = Field(min_length=88, max_length=88, description="64 bytes, base64.")


class Signer(BaseModel):
    """A trusted signer: a name for people, and the raw public key in base64."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: TaskName
    public_key: str = Field(min_length=44, max_length=44)


class SignerList(BaseModel):
    """The allow-list as it is kept in a file."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    format_version: Literal[1] = 1
    signers: tuple[Signer, ...] = Field(max_length=1000)


@dataclass(frozen=True, slots=True)
class Trust:
    """Whose signatures count, and whether a module needs one."""

    key_of: dict[str, tuple[str, Ed25519PublicKey]]  # key id to the signer's name and key
    is_required: bool = False

    @classmethod
    def nobody(cls) -> "Trust":
        """Signatures are neither asked for nor looked at."""
        return cls({})

    @classmethod
    def read(cls, path: Path, *, is_required: bool) -> "Trust":
        """The allow-list in a file; a signer may have several keys. Raises InvalidTrust."""
        try:
            listed = SignerList.model_validate_json(path.read_bytes())
            keys = [(one.name, _public_key(one.public_key)) for one in listed.signers]
        except (OSError, ValidationError, ValueError) as error:
            raise InvalidTrust(f"list of signers {path}: {str(error)[:300]}") from error
        return cls({key_id(key): (name, key) for name, key in keys}, is_required)

    def signer_of(self, sha256: str, signatures: Iterable[Signature]) -> str | None:
        """The first trusted signer whose signature holds for a module; None without one.

        Raises UntrustedModule when one is required.
        """
        for one in signatures:
            name = self.signer_by(one)
            if name is not None and one.module_sha256 == sha256:
                return name
        if self.is_required:
            raise UntrustedModule(
                f"module {sha256[:12]}… has no valid signature of the {len(self.key_of)} trusted signers"
            )
        return None

    def signer_by(self, signature: Signature) -> str | None:
        """The trusted signer of a signature that holds for the module it names."""
        name, key = self.key_of.get(signature.key_id, (None, None))
        if key is None:
            return None
        message = _message(signature.module_sha256)
        try:
            key.verify(base64.b64decode(signature.signature, validate=True), message)
        except (InvalidSignature, binascii.Error, ValueError):
            return None
        return name


def make_private_key() -> bytes:
    """A new ed25519 private key, PEM (PKCS 8, not encrypted)."""
    key = Ed25519PrivateKey.generate()
    return key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())


def read_private_key(pem: bytes) -> Ed25519PrivateKey:
    """Raises InvalidTrust for anything but an unencrypted ed25519 key."""
    try:
        key = load_pem_private_key(pem, password=None)
    except (ValueError, TypeError) as error:
        raise InvalidTrust(f"not a private key in PEM: {error}") from error
    if not isinstance(key, Ed25519PrivateKey):
        raise InvalidTrust(f"expected an ed25519 key, got {type(key).__name__}")
    return key


def sign(sha256: str, key: Ed25519PrivateKey) -> Signature:
    """The signature of `key` over the SHA-256 of a module file."""
    signed = base64.b64encode(key.sign(_message(sha256))).decode()
    return Signature(module_sha256=sha256, key_id=key_id(key.public_key()), signature=signed)


def public_text(key: Ed25519PublicKey) -> str:
    """The public key as the list of signers holds it: 32 raw bytes, base64."""
    return base64.b64encode(key.public_bytes(Encoding.Raw, PublicFormat.Raw)).decode()


def key_id(key: Ed25519PublicKey) -> str:
    """The first 16 hex digits of the SHA-256 of the raw public key."""
    return hashlib.sha256(key.public_bytes(Encoding.Raw, PublicFormat.Raw)).hexdigest()[:16]


def _public_key(text: str) -> Ed25519PublicKey:
    return Ed25519PublicKey.from_public_bytes(base64.b64decode(text, validate=True))


def _message(sha256: str) -> bytes:
    return _CONTEXT + sha256.encode()
