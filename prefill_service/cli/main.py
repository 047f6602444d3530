"""``prefill-service``: serve, calibrate, plan, healthcheck, version."""

from __future__ import annotations

import argparse
import asyncio
import dataclasses
import logging
import sys
import types
import typing
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

import prefill_service
from prefill_service.cli.calibrate import add_calibrate
from prefill_service.cli.plan import add_arguments as add_plan_arguments
from prefill_service.config import ServiceConfig, load_config
from prefill_service.errors import Reason, ServiceError

CONFIG_ERROR, FAILURE = 2, 1

ALIASES = {
    "engine.model": "--model",
    "engine.ranks": "--ranks",
    "engine.device": "--device",
    "engine.dtype": "--dtype",
    "server.host": "--host",
    "server.port": "--port",
    "server.insecure": "--insecure",
    "storage.data_dir": "--data-dir",
    "vllm.max_model_len": "--max-model-len",
}

_SERVE_TEXT = """\
Serve the API until SIGTERM or SIGINT; the first one drains, the second one stops at once.

Each option can also stand in the TOML file given with --config, as NAME = VALUE under
[SECTION]: --engine-page-tokens 64 is page_tokens = 64 under [engine]. The command line wins.
"""


class _Parser(argparse.ArgumentParser):
    """Errors in one line; the usage is long."""

    def error(self, message: str) -> NoReturn:
        self.exit(CONFIG_ERROR, f"{self.prog}: {message}\n")


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit code: 0, 1 for failures, 2 for configuration."""
    args = _parser().parse_args(argv)
    try:
        return int(args.run(args))
    except ServiceError as error:
        print(f"prefill-service: {error}", file=sys.stderr)
        return CONFIG_ERROR if error.reason is Reason.CONFIG_INVALID else FAILURE


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="prefill-service", description=prefill_service.__doc__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND", parser_class=_Parser)
    serve = commands.add_parser(
        "serve",
        help="run the service",
        description=_SERVE_TEXT,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    serve.add_argument("--config", type=Path, metavar="FILE", help="TOML file with options")
    serve.add_argument(
        "--log-level", default="info", choices=["debug", "info", "warning", "error"],
        help="how much is logged to stderr (default: info)",
    )  # fmt: skip
    _add_config_options(serve)
    serve.set_defaults(run=_serve)
    add_calibrate(commands)
    check = commands.add_parser(
        "healthcheck", help="ask a running service for its health; exit code 0 if it serves"
    )
    check.add_argument("--address", default="127.0.0.1:50051", help="default: %(default)s")
    check.add_argument(
        "--service", default="",
        help="what to ask for: empty (all is ready), 'liveness' (the process serves), or a full "
        "service name such as prefill.v1.AnswerService; default: empty",
    )  # fmt: skip
    check.add_argument("--timeout", type=float, default=5.0, help="seconds; default: %(default)s")
    check.add_argument(
        "--tls-ca", type=Path, metavar="FILE", help="PEM of the server's CA: use TLS"
    )
    check.add_argument(
        "--tls-cert", type=Path, metavar="FILE", help="PEM client certificate (mTLS)"
    )
    check.add_argument("--tls-key", type=Path, metavar="FILE", help="PEM client key (mTLS)")
    check.set_defaults(run=_healthcheck)
    plan = commands.add_parser(
        "plan", help="show how a prefill would be spread over ranks, and why", allow_abbrev=False
    )
    add_plan_arguments(plan)
    plan.set_defaults(run=_plan)
    commands.add_parser("version", help="print the version").set_defaults(run=_version)
    return parser


def _add_config_options(parser: argparse.ArgumentParser) -> None:
    for section in dataclasses.fields(ServiceConfig):
        kind = typing.cast(Any, section.default_factory)
        group = parser.add_argument_group(section.name, kind.__doc__)
        hints = typing.get_type_hints(kind)
        defaults = kind()
        for option in dataclasses.fields(kind):
            _add_option(group, section.name, option, hints[option.name], defaults)


def _add_option(
    group: argparse._ArgumentGroup,
    section: str,
    option: dataclasses.Field[Any],
    hint: Any,
    defaults: object,
) -> None:
    key = f"{section}.{option.name}"
    flags = [f"--{section}-{option.name}".replace("_", "-")]
    if key in ALIASES:
        flags.insert(0, ALIASES[key])
    default = getattr(defaults, option.name)
    shown = f"{default}" if default not in ("", []) else "none"
    settings: dict[str, Any] = {
        "dest": key,
        "default": argparse.SUPPRESS,
        "help": f"{option.metadata['help']} (default: {shown})".replace("%", "%%"),
    }
    if hint is bool:
        settings["action"] = argparse.BooleanOptionalAction
    elif isinstance(hint, types.GenericAlias):
        settings |= {"action": "append", "metavar": "TEXT"}
        settings["help"] += "; may be repeated"
    else:
        settings |= {"type": hint, "metavar": {int: "N", float: "X", str: "TEXT"}[hint]}
    group.add_argument(*flags, **settings)
    if section == "vllm":
        earlier = f"--decoder-{option.name}".replace("_", "-")
        group.add_argument(earlier, **settings | {"help": argparse.SUPPRESS})


def _serve(args: argparse.Namespace) -> int:
    overrides: dict[str, dict[str, Any]] = {}
    for key, value in vars(args).items():
        section, _, name = key.partition(".")
        if name:
            overrides.setdefault(section, {})[name] = value
    config = load_config(args.config, overrides)
    if not config.engine.model:
        raise ServiceError(
            Reason.CONFIG_INVALID,
            "no model given: use --model, or model under [engine] in the file of --config",
            name="engine.model",
        )
    logging.basicConfig(
        level=args.log_level.upper(),
        format="%(asctime)s %(levelname)-7s %(name)s: %(message)s",
        stream=sys.stderr,
    )
    from prefill_service.service import Service

    async def run() -> None:
        await Service(config).run(announce=lambda line: print(line, flush=True))

    asyncio.run(run())
    return 0


def _healthcheck(args: argparse.Namespace) -> int:
    import grpc
    from grpc_health.v1 import health_pb2, health_pb2_grpc

    def read(path: Path | None) -> bytes | None:
        try:
            return path.read_bytes() if path else None
        except OSError as error:
            raise ServiceError(
                Reason.CONFIG_INVALID, f"cannot read {path}: {error.strerror}", path=path
            ) from error

    if args.tls_ca:
        credentials = grpc.ssl_channel_credentials(
            read(args.tls_ca), read(args.tls_key), read(args.tls_cert)
        )
        channel = grpc.secure_channel(args.address, credentials)
    else:
        channel = grpc.insecure_channel(args.address)
    with channel:
        request = health_pb2.HealthCheckRequest(service=args.service)
        try:
            response = health_pb2_grpc.HealthStub(channel).Check(request, timeout=args.timeout)
        except grpc.RpcError as error:
            text = f"{error.code().name}: {error.details()}"
            print(f"prefill-service: {args.address}: {text}", file=sys.stderr)
            return FAILURE
    status = health_pb2.HealthCheckResponse.ServingStatus.Name(response.status)
    print(status)
    return 0 if status == "SERVING" else FAILURE


def _plan(args: argparse.Namespace) -> int:
    from prefill_service.cli.plan import run

    return run(args)


def _version(args: argparse.Namespace) -> int:
    print(f"prefill-service {prefill_service.__version__}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
