"""``prefill-service healthcheck``: ask a running service whether it serves."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from prefill_service.errors import Reason, ServiceError

if TYPE_CHECKING:
    import grpc

# gRPC asks a proxy named in the environment even for this very machine. A proxy's answer says
# nothing of the service: a container that is healthy would be restarted for ever.
NO_PROXY = (
    ("grpc.enable_http_proxy", 0),  # grpc_proxy, https_proxy, http_proxy
    ("grpc.address_http_proxy_enabled_addresses", ""),  # GRPC_ADDRESS_HTTP_PROXY
)


def add_healthcheck(commands: argparse._SubParsersAction[Any]) -> None:
    """Add the command to ``prefill-service``."""
    parser = commands.add_parser(
        "healthcheck",
        help="ask a running service for its health; exit code 0 if it serves",
        description="Ask a running service for its health; exit code 0 if it serves. It is asked "
        "directly, whatever proxy the environment names.",
    )
    add = parser.add_argument
    add(
        "--address",
        default="127.0.0.1:50051",
        metavar="HOST:PORT",
        help="of the service (default: %(default)s)",
    )
    add(
        "--service",
        default="",
        metavar="NAME",
        help="what to ask for: empty (all is ready), 'liveness' (the process serves), or a full "
        "service name such as prefill.v1.AnswerService (default: empty)",
    )
    add("--timeout", type=float, default=5.0, metavar="X", help="seconds (default: %(default)s)")
    add("--tls-ca", type=Path, metavar="FILE", help="PEM of the server's CA: use TLS")
    add("--tls-cert", type=Path, metavar="FILE", help="PEM client certificate (mTLS)")
    add("--tls-key", type=Path, metavar="FILE", help="PEM client key (mTLS)")
    parser.set_defaults(run=_healthcheck)


def _healthcheck(args: argparse.Namespace) -> int:
    import grpc
    from grpc_health.v1 import health_pb2, health_pb2_grpc

    with _open_channel(args) as channel:
        request = health_pb2.HealthCheckRequest(service=args.service)
        try:
            response = health_pb2_grpc.HealthStub(channel).Check(request, timeout=args.timeout)
        except grpc.RpcError as error:
            text = f"{error.code().name}: {error.details()}"
            print(f"prefill-service: {args.address}: {text}", file=sys.stderr)
            return 1
    status = health_pb2.HealthCheckResponse.ServingStatus.Name(response.status)
    print(status)
    return 0 if status == "SERVING" else 1


def _open_channel(args: argparse.Namespace) -> grpc.Channel:
    import grpc

    if not args.tls_ca:
        return grpc.insecure_channel(args.address, options=NO_PROXY)
    credentials = grpc.ssl_channel_credentials(
        root_certificates=_read_file(args.tls_ca),
        private_key=_read_file(args.tls_key),
        certificate_chain=_read_file(args.tls_cert),
    )
    return grpc.secure_channel(args.address, credentials, options=NO_PROXY)


def _read_file(path: Path | None) -> bytes | None:
    try:
        return path.read_bytes() if path else None
    except OSError as error:
        raise ServiceError(
            Reason.CONFIG_INVALID, f"cannot read {path}: {error.strerror}", path=path
        ) from error
