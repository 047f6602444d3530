"""Configuration: dataclasses with defaults, filled from a TOML file and the command line.

Precedence: command line, then file, then default. Unknown keys and bad values are refused
with the offending name and what would be accepted.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import os
import tomllib
import types
import typing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from prefill_service.errors import Reason, ServiceError

HEARTBEAT_S = 1.0
"""How often a rank says that it lives."""

EXCHANGES = ("gather", "ring", "ulysses", "usp", "pass_q", "multi_ring", "demand",
             "ulysses_gather")  # fmt: skip
"""``parallel.exchanges.ExchangeKind``, without importing torch."""

AUTO = "auto"
"""Each prefix's exchange is planned; see docs/planner.md."""

LEAST_DECODER_BYTES = 512 << 20
"""Address space: of a decoder process, the libraries alone map up to 400 MiB (OpenCV)."""


def _opt(default: Any, text: str, zero: bool = False) -> Any:
    """A dataclass field with its help text. Numbers are more than 0, or 0 too if ``zero``."""
    return field(default=default, metadata={"help": text, "zero": zero})


@dataclass(slots=True)
class ServerConfig:
    """The gRPC front."""

    host: str = _opt("127.0.0.1", "Address to bind; other than loopback it needs TLS or insecure.")
    port: int = _opt(50051, "Port to bind; 0 picks a free one.", zero=True)
    insecure: bool = _opt(False, "Allow a non-loopback address without TLS.")
    tls_cert: str = _opt("", "PEM certificate chain.")
    tls_key: str = _opt("", "PEM private key.")
    tls_client_ca: str = _opt("", "PEM of the CA that client certificates must come from (mTLS).")
    auth_token_file: str = _opt("", "File with the bearer token that clients must send.")
    reflection: bool = _opt(True, "Serve gRPC reflection.")
    drain_seconds: float = _opt(30.0, "How long running calls may go on after SIGTERM.", zero=True)
    max_concurrent_calls: int = _opt(256, "Calls at once; more get RESOURCE_EXHAUSTED.")
    metrics_address: str = _opt("", "HOST:PORT for Prometheus at /metrics, plain HTTP; empty: off.")


@dataclass(slots=True)
class StorageConfig:
    """Where videos and the job queue live."""

    data_dir: str = _opt("~/.local/share/prefill-service", "Videos, indexes and the job database.")
    import_roots: list[str] = field(
        default_factory=list,
        metadata={"help": "Folders ImportVideo may read from. None by default."},
    )
    max_upload_bytes: int = _opt(8 << 30, "Largest upload.")
    min_free_bytes: int = _opt(256 << 20, "Space that uploads leave free on the disk.", zero=True)
    expire_hours: float = _opt(48.0, "Unused videos and unfinished uploads are removed after this.")


@dataclass(slots=True)
class VideoConfig:
    """Limits of what is decoded, and how."""

    reader: str = _opt("pyav", "Decoder: pyav (GOP plan) or opencv (sequential).")
    max_frame_pixels: int = _opt(4096 * 2304, "Largest width x height.")
    max_duration_s: float = _opt(6 * 3600.0, "Longest video.")
    max_frames: int = _opt(2_000_000, "Most frames in the container.")
    max_memory_bytes: int = _opt(4 << 30, "Address space of a decoder process (RLIMIT_AS).")
    probe_timeout_s: float = _opt(120.0, "Wall clock for probing one file.")
    stall_timeout_s: float = _opt(60.0, "Longest wait for the next frame.")
    spare_decoders: int = _opt(
        1, "Decoder processes that each rank, and the front end, has ready; 0: none.", zero=True
    )


@dataclass(slots=True)
class EngineConfig:
    """The rank group."""

    model: str = _opt("", "Folder or hub id of the checkpoint.")
    ranks: int = _opt(2, "Ranks of the sequence-parallel group.")
    elastic: bool = _opt(
        True, "Serve several prefixes at once on parts of the ranks; pause long ones for short."
    )
    device: str = _opt("auto", "cpu, cuda or auto.")
    dtype: str = _opt("auto", "float32, bfloat16, float16 or auto (float32 on CPU).")
    exchange: str = _opt(
        "gather",
        "How ranks exchange keys: gather, ring, ulysses, usp, pass_q, multi_ring, demand, "
        "ulysses_gather, or auto.",
    )
    ulysses_degree: int = _opt(
        0, "Of usp and ulysses_gather: ranks that share heads; 0: chosen.", zero=True
    )
    chunk_tokens: int = _opt(
        0, "Tokens per chunk and rank; 0: 512 on CPU, 4096 on CUDA.", zero=True
    )
    mlp_chunk_tokens: int = _opt(
        1024, "Tokens that an MLP or norm takes at once; 0: a whole chunk.", zero=True
    )
    threads_per_rank: int = _opt(0, "CPU threads per rank; 0 shares the cores evenly.", zero=True)
    page_tokens: int = _opt(64, "Tokens per KV page.")
    sparse_from_tokens: int = _opt(
        0, "Queries that see fewer keys attend exactly; 0: measured at start-up.", zero=True
    )
    sparse_block_tokens: int = _opt(64, "Keys per block of sparse attention, 64 or 128.")
    balance_above: float = _opt(
        1.1,
        "Busiest rank over the mean from which on ranks attend to others' blocks; 0: never.",
        zero=True,
    )
    balance_least_gflop: float = _opt(
        1.5,
        "What that has to spare the busiest rank of a layer, billions of operations; 0: anything.",
        zero=True,
    )
    head_budgets: str = _opt("", "Profile of `calibrate`: how heads share the sparse budget.")
    kv_pool_bytes: int = _opt(
        0, "KV bytes kept for hand-off; 0: a quarter of the memory.", zero=True
    )
    kv_working_bytes: int = _opt(
        0, "KV bytes a rank computes with; 0: the ranks' share of a quarter of the device.",
        zero=True,
    )  # fmt: skip
    kv_offload: str = _opt("off", "Where KV beyond kv_working_bytes goes: off (refused) or host.")
    heartbeat_timeout_s: float = _opt(10.0, "A rank that is silent for longer is killed.")
    stall_timeout_s: float = _opt(300.0, "A busy rank without progress for longer is killed.")
    collective_timeout_s: float = _opt(600.0, "Timeout of one collective.")
    start_timeout_s: float = _opt(600.0, "Longest start of the group.")
    lease_ttl_s: float = _opt(30.0, "Leases not renewed for this long expire.")
    max_queued_jobs: int = _opt(64, "Jobs waiting at most; more get QUEUE_FULL.")


@dataclass(slots=True)
class DecoderConfig:
    """vLLM."""

    url: str = _opt("", "URL of a running vLLM; empty: the service starts its own.")
    max_model_len: int = _opt(
        0, "Context in tokens; 0: the model's, or what the KV space holds.", zero=True
    )
    block_size: int = _opt(0, "vLLM's block size; 0: vLLM's default.", zero=True)
    kv_cache_gib: float = _opt(1.0, "CPU KV space of the embedded vLLM, GiB.")
    gpu_memory_utilization: float = _opt(0.45, "Share of GPU memory for the embedded vLLM.")
    start_timeout_s: float = _opt(600.0, "Longest start of the embedded vLLM.")
    request_timeout_s: float = _opt(600.0, "Longest silence of vLLM within one answer.")
    extra_args: list[str] = field(
        default_factory=list, metadata={"help": "More arguments for the embedded vLLM."}
    )


@dataclass(slots=True)
class ServiceConfig:
    """Everything. One section per field; see ``prefill-service serve --help``."""

    server: ServerConfig = field(default_factory=ServerConfig)
    storage: StorageConfig = field(default_factory=StorageConfig)
    video: VideoConfig = field(default_factory=VideoConfig)
    engine: EngineConfig = field(default_factory=EngineConfig)
    decoder: DecoderConfig = field(default_factory=DecoderConfig)


def load_config(path: Path | None, overrides: dict[str, dict[str, Any]]) -> ServiceConfig:
    """Defaults, then the TOML file, then ``overrides`` ({section: {name: value}}).

    Raises:
        ServiceError: CONFIG_INVALID, naming the key, the value and what is accepted.
    """
    config = ServiceConfig()
    if path is not None:
        try:
            with path.open("rb") as file:
                _apply(config, tomllib.load(file), str(path))
        except OSError as error:
            raise ServiceError(
                Reason.CONFIG_INVALID, f"cannot read {path}: {error.strerror}", path=path
            ) from error
        except tomllib.TOMLDecodeError as error:
            raise ServiceError(
                Reason.CONFIG_INVALID, f"{path} is not valid TOML: {error}", path=path
            ) from error
    _apply(config, overrides, "command line")
    validate(config)
    return config


def _apply(config: ServiceConfig, values: dict[str, Any], source: str) -> None:
    sections = {f.name: getattr(config, f.name) for f in dataclasses.fields(config)}
    for section, entries in values.items():
        if section not in sections:
            raise _invalid(section, entries, f"a section of {', '.join(sections)}", source)
        target = sections[section]
        hints = typing.get_type_hints(type(target))
        if not isinstance(entries, dict):
            raise _invalid(section, entries, "a table", source)
        for name, value in entries.items():
            if name not in hints:
                raise _invalid(f"{section}.{name}", value, f"one of {', '.join(hints)}", source)
            setattr(target, name, _convert(f"{section}.{name}", value, hints[name], source))


def _convert(name: str, value: Any, hint: Any, source: str) -> Any:
    if isinstance(hint, types.GenericAlias):
        if isinstance(value, list) and all(isinstance(item, str) for item in value):
            return value
        raise _invalid(name, value, "a list of strings", source)
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if isinstance(value, hint) and not (hint is int and isinstance(value, bool)):
        return value
    raise _invalid(name, value, f"a value of type {hint.__name__}", source)


def _invalid(name: str, value: object, accepted: str, source: str) -> ServiceError:
    return ServiceError(
        Reason.CONFIG_INVALID,
        f"{source}: {name} = {value!r} is not accepted; expected {accepted}",
        name=name,
        value=value,
        accepted=accepted,
    )


def validate(config: ServiceConfig) -> None:
    """Check ranges and combinations.

    Raises:
        ServiceError: CONFIG_INVALID.
    """

    def check(ok: bool, name: str, value: object, accepted: str) -> None:
        if not ok:
            raise _invalid(name, value, accepted, "configuration")

    engine, decoder, video = config.engine, config.decoder, config.video
    storage, server = config.storage, config.server
    check(0 <= server.port <= 65535, "server.port", server.port, "0 to 65535")
    check(bool(server.tls_cert) == bool(server.tls_key), "server.tls_key", server.tls_key,
          "tls_cert and tls_key together")  # fmt: skip
    if server.metrics_address:
        try:
            split_address(server.metrics_address)
        except ValueError:
            check(False, "server.metrics_address", server.metrics_address,
                  "HOST:PORT, port 0 to 65535")  # fmt: skip
    check(storage.data_dir != "", "storage.data_dir", storage.data_dir, "a folder")
    for root in storage.import_roots:
        check(Path(root).expanduser().is_absolute(), "storage.import_roots", root,
              "absolute paths")  # fmt: skip
    check(video.reader in ("pyav", "opencv"), "video.reader", video.reader, "pyav or opencv")
    check(video.max_memory_bytes >= LEAST_DECODER_BYTES, "video.max_memory_bytes",
          video.max_memory_bytes, f"{LEAST_DECODER_BYTES} or more")  # fmt: skip
    check(1 <= engine.ranks <= 64, "engine.ranks", engine.ranks, "1 to 64")
    check(engine.device in ("auto", "cpu", "cuda"), "engine.device", engine.device,
          "auto, cpu or cuda")  # fmt: skip
    exchanges = (*EXCHANGES, AUTO)
    check(engine.exchange in exchanges, "engine.exchange", engine.exchange, " or ".join(exchanges))
    check(engine.ranks % (engine.ulysses_degree or 1) == 0, "engine.ulysses_degree",
          engine.ulysses_degree, f"a divisor of the {engine.ranks} ranks")  # fmt: skip
    check(engine.dtype in ("auto", "float32", "bfloat16", "float16"), "engine.dtype", engine.dtype,
          "auto, float32, bfloat16 or float16")  # fmt: skip
    check(engine.kv_offload in ("off", "host"), "engine.kv_offload", engine.kv_offload,
          "off or host")  # fmt: skip
    check(1 <= engine.page_tokens <= 1024, "engine.page_tokens", engine.page_tokens, "1 to 1024")
    check(engine.sparse_block_tokens in (64, 128), "engine.sparse_block_tokens",
          engine.sparse_block_tokens, "64 or 128")  # fmt: skip
    check(engine.balance_above == 0 or engine.balance_above >= 1, "engine.balance_above",
          engine.balance_above, "0, or 1 or more")  # fmt: skip
    check(engine.heartbeat_timeout_s > HEARTBEAT_S, "engine.heartbeat_timeout_s",
          engine.heartbeat_timeout_s, f"more than {HEARTBEAT_S:g}, the heartbeat")  # fmt: skip
    check(not decoder.url or decoder.url.startswith(("http://", "https://")), "decoder.url",
          decoder.url, "an http:// or https:// URL")  # fmt: skip
    check(0 < decoder.gpu_memory_utilization <= 1, "decoder.gpu_memory_utilization",
          decoder.gpu_memory_utilization, "more than 0 and at most 1")  # fmt: skip
    for section in dataclasses.fields(config):
        values = getattr(config, section.name)
        for option in dataclasses.fields(values):
            name, value = f"{section.name}.{option.name}", getattr(values, option.name)
            if isinstance(value, (int, float)) and not isinstance(value, bool):
                zero = value == 0 and option.metadata["zero"]
                check(0 < value < math.inf or zero, name, value,
                      "0 or more" if option.metadata["zero"] else "more than 0")  # fmt: skip


def split_address(address: str) -> tuple[str, int]:
    """Host and port of ``HOST:PORT``; an IPv6 host stands in brackets.

    Raises:
        ValueError: it is neither.
    """
    host, _, port = address.rpartition(":")
    bracketed = host.startswith("[") and host.endswith("]")
    if not host.strip("[]") or (":" in host) != bracketed:
        raise ValueError(f"{address!r} is not HOST:PORT")
    if not (port.isascii() and port.isdigit() and int(port) <= 65535):
        raise ValueError(f"{address!r} has no port from 0 to 65535")
    return host.strip("[]"), int(port)


def resolve_threads(engine: EngineConfig) -> int:
    """CPU threads per rank: the cores shared evenly, at least one."""
    if engine.threads_per_rank:
        return engine.threads_per_rank
    cores = len(os.sched_getaffinity(0))
    return max(1, cores // engine.ranks)


def resolve_kv_pool_bytes(engine: EngineConfig) -> int:
    """KV bytes over all ranks: as configured, or a quarter of what this machine or cgroup has."""
    return engine.kv_pool_bytes or memory_bytes() // 4


def memory_bytes() -> int:
    """Memory of this machine, or of the cgroup where that is less."""
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    with contextlib.suppress(OSError, ValueError):  # no cgroup v2, or "max"
        memory = min(memory, int(Path("/sys/fs/cgroup/memory.max").read_text()))
    return memory
