"""The gRPC port: its limits, and its life within that of the service."""

import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import grpc

from service.errors import CannotListen
from service.open_inference.grpc_service import InferenceService
from service.routes.state import ServiceState
from service.settings import Settings

log = logging.getLogger("tosca.server")
_IDENTITY_ONLY = 1  # bit 0 of grpc.compression_enabled_algorithms_bitset: no decompression bombs


@asynccontextmanager
async def serving_grpc(state: ServiceState) -> AsyncIterator[int | None]:
    """Answer gRPC while the block runs, on the port that is yielded; not at all without a port set.

    At the end new calls are refused, and those under way have `shutdown_timeout_s` to be answered. Raises
    CannotListen.
    """
    settings = state.settings
    if settings.grpc_port is None:
        yield None
        return
    server = grpc.aio.server(
        options=[
            ("grpc.max_receive_message_length", settings.max_body_bytes),
            ("grpc.max_metadata_size", settings.max_header_bytes),
            ("grpc.absolute_max_metadata_size", settings.max_header_bytes),
            ("grpc.compression_enabled_algorithms_bitset", _IDENTITY_ONLY),
            ("grpc.http2.bdp_probe", 0),  # else megabytes of every call arrive before its message is wanted
            # Two servers on one port each get half of the calls, which only processes of one service may.
            ("grpc.so_reuseport", int(settings.processes > 1)),
        ],
        maximum_concurrent_rpcs=settings.max_grpc_calls,
    )
    server.add_generic_rpc_handlers((InferenceService(state).handlers(),))
    port = _listen(server, settings)
    await server.start()
    log.info("grpc port: %s:%d", settings.host, port)
    try:
        yield port
    finally:
        await server.stop(settings.shutdown_timeout_s)


def _listen(server: grpc.aio.Server, settings: Settings) -> int:
    host = f"[{settings.host}]" if ":" in settings.host else settings.host
    address = f"{host}:{settings.grpc_port}"
    try:
        if settings.tls_certificate is None or settings.tls_key is None:
            return server.add_insecure_port(address)
        pair = settings.tls_key.read_bytes(), settings.tls_certificate.read_bytes()
        return server.add_secure_port(address, grpc.ssl_server_credentials([pair]))
    except (OSError, RuntimeError) as error:
        raise CannotListen(f"cannot listen on {address} for gRPC: {error}") from error
