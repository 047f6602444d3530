"""Configuration: every option with its default, its help and what it accepts.

``cli.config_loading`` fills it from a TOML file and the command line.
"""

from __future__ import annotations

import contextlib
import math
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from prefill_service.attention_shape import BLOCK_TOKENS
from prefill_service.parallel.exchanges.catalog import EXCHANGES

HEARTBEAT_S = 1.0
"""Seconds between two heartbeats of a worker."""

AUTO = "auto"
"""Each prefix's exchange is chosen by the cost model; see docs/cost_model.md."""

LEAST_DECODER_BYTES = 512 << 20
"""Address space of a decoder process: the libraries alone map up to 400 MiB (OpenCV)."""


def _opt(
    default: Any,
    text: str,
    *,
    choices: tuple[str, ...] | tuple[int, ...] = (),
    low: float | None = None,
    high: float = math.inf,
) -> Any:
    """A dataclass field with its help text and the values it accepts.

    Args:
        default: the value without configuration; its type is the option's.
        text: one line of help.
        choices: the only values accepted.
        low: the least number accepted; without it numbers are more than 0.
        high: the greatest number accepted.
    """
    metadata = {"help": text, "choices": choices, "low": low, "high": high}
    return field(default=default, metadata=metadata)


@dataclass(slots=True)
class ServerConfig:
    """The gRPC server: address, TLS, limits."""

    host: str = _opt("127.0.0.1", "Address to bind; other than loopback it needs TLS or insecure.")
    port: int = _opt(50051, "Port to bind; 0 picks a free one.", low=0, high=65535)
    insecure: bool = _opt(False, "Allow a non-loopback address without TLS.")
    tls_cert: str = _opt("", "PEM certificate chain.")
    tls_key: str = _opt("", "PEM private key.")
    tls_client_ca: str = _opt("", "PEM of the CA that client certificates must come from (mTLS).")
    auth_token_file: str = _opt("", "File with the bearer token that clients must send.")
    reflection: bool = _opt(True, "Serve gRPC reflection.")
    drain_seconds: float = _opt(30.0, "How long running calls may go on after SIGTERM.", low=0)
    max_concurrent_calls: int = _opt(256, "Calls at once; more get RESOURCE_EXHAUSTED.")
    max_uploads: int = _opt(64, "Upload streams at once, not counted as calls.")
    max_peer_share: float = _opt(
        0.75, "Of calls and of uploads, what one address may have at once.", low=0, high=1
    )
    upload_idle_seconds: float = _opt(
        60.0, "An upload stream that sends nothing for so long ends; it can be resumed."
    )
    metrics_address: str = _opt("", "HOST:PORT for Prometheus at /metrics, plain HTTP; empty: off.")


@dataclass(slots=True)
class StorageConfig:
    """Where videos and jobs are stored, and how much of them."""

    data_dir: str = _opt("~/.local/share/prefill-service", "Videos, indexes and the job database.")
    import_roots: list[str] = field(
        default_factory=list, metadata={"help": "Folders ImportVideo may read from."}
    )
    max_upload_bytes: int = _opt(8 << 30, "Largest upload.")
    min_free_bytes: int = _opt(256 << 20, "Space that uploads leave free on the disk.", low=0)
    expire_hours: float = _opt(48.0, "Unused videos and unfinished uploads are removed after this.")


@dataclass(slots=True)
class VideoConfig:
    """Video decoders, and the limits of what they decode."""

    reader: str = _opt(
        "pyav",
        "Decoder; pyav seeks by a GOP plan, opencv reads in sequence.",
        choices=("pyav", "opencv"),
    )
    max_frame_pixels: int = _opt(4096 * 2304, "Largest width x height.")
    max_duration_s: float = _opt(6 * 3600.0, "Longest video.")
    max_frames: int = _opt(2_000_000, "Most frames in the container.")
    max_memory_bytes: int = _opt(
        4 << 30, "Address space of a decoder process (RLIMIT_AS).", low=LEAST_DECODER_BYTES
    )
    probe_timeout_s: float = _opt(120.0, "Wall clock for indexing one file.")
    stall_timeout_s: float = _opt(60.0, "Longest wait for the next frame.")
    spare_decoders: int = _opt(
        1, "Decoder processes that each rank, and the front end, has ready; 0: none.", low=0
    )


@dataclass(slots=True)
class EngineConfig:
    """The workers that prefill: model, ranks, attention, KV memory, time limits."""

    model: str = _opt("", "Folder or hub id of the checkpoint.")
    ranks: int = _opt(2, "Ranks of the sequence-parallel group.", low=1, high=64)
    elastic: bool = _opt(
        True, "Serve several prefixes at once on parts of the ranks; pause long ones for short."
    )
    device: str = _opt("auto", "Where the model computes.", choices=("auto", "cpu", "cuda"))
    dtype: str = _opt(
        "auto",
        "Of weights and activations; auto: float32 on CPU, else the checkpoint's.",
        choices=("auto", "float32", "bfloat16", "float16"),
    )
    exchange: str = _opt(
        "gather",
        "How ranks exchange keys; auto: chosen for each prefix.",
        choices=(*(kind.name for kind in EXCHANGES), AUTO),
    )
    ulysses_degree: int = _opt(
        0,
        f"Of {' and '.join(kind.name for kind in EXCHANGES if kind.two_dimensional)}: "
        "ranks that share heads; 0: chosen.",
        low=0,
    )
    chunk_tokens: int = _opt(0, "Tokens per chunk and rank; 0: 512 on CPU, 4096 on CUDA.", low=0)
    mlp_chunk_tokens: int = _opt(
        1024, "Tokens that an MLP or norm takes at once; 0: a whole chunk.", low=0
    )
    threads_per_rank: int = _opt(0, "CPU threads per rank; 0 shares the cores evenly.", low=0)
    text_from_tokens: int = _opt(
        1024, "Longer questions are prefilled on the ranks, not by vLLM; 0: none.", low=0
    )
    page_tokens: int = _opt(64, "Tokens per KV page.", low=1, high=1024)
    sparse_from_tokens: int = _opt(
        0, "Queries that see fewer keys attend exactly; 0: measured at start-up.", low=0
    )
    sparse_block_tokens: int = _opt(
        BLOCK_TOKENS, "Keys per block of sparse attention.", choices=(64, 128)
    )
    balance_above: float = _opt(
        1.1,
        "Busiest rank over the mean from which on ranks attend to others' blocks; 0: never.",
        low=0,
    )
    balance_least_gflop: float = _opt(
        1.5,
        "What that has to spare the busiest rank of a layer, billions of operations; 0: anything.",
        low=0,
    )
    head_budgets: str = _opt("", "Profile of `calibrate`: how heads share the sparse budget.")
    kv_pool_bytes: int = _opt(0, "KV bytes kept for hand-off; 0: a quarter of the memory.", low=0)
    kv_transport: str = _opt("unix", "How vLLM gets KV pages from the ranks; unix: on one host.")
    kv_working_bytes: int = _opt(
        0, "KV bytes a rank computes with; 0: its part of a quarter of the device.", low=0
    )
    kv_offload: str = _opt(
        "off", "Where KV beyond kv_working_bytes goes; off: refused.", choices=("off", "host")
    )
    heartbeat_timeout_s: float = _opt(10.0, "A rank that is silent for longer is killed.")
    stall_timeout_s: float = _opt(300.0, "A busy rank without progress for longer is killed.")
    collective_timeout_s: float = _opt(600.0, "Timeout of one collective.")
    start_timeout_s: float = _opt(600.0, "Longest start of the group.")
    lease_ttl_s: float = _opt(30.0, "Leases not renewed for this long expire.")
    max_queued_jobs: int = _opt(64, "Jobs waiting at most; more get QUEUE_FULL.")


@dataclass(slots=True)
class VllmConfig:
    """vLLM, which generates the answers."""

    url: str = _opt("", "URL of a running vLLM; empty: the service starts its own.")
    api_key_file: str = _opt("", "File with the API key of the vLLM at url, if it wants one.")
    max_model_len: int = _opt(
        0, "Context in tokens; 0: the model's, or what the KV space holds.", low=0
    )
    block_size: int = _opt(0, "vLLM's block size; 0: vLLM's default.", low=0)
    kv_cache_gib: float = _opt(1.0, "CPU KV space of the embedded vLLM, GiB.")
    gpu_memory_utilization: float = _opt(
        0.45, "Fraction of GPU memory for the embedded vLLM.", high=1
    )
    start_timeout_s: float = _opt(600.0, "Longest start of the embedded vLLM.")
    request_timeout_s: float = _opt(600.0, "Longest silence of vLLM within one answer.")
    stall_timeout_s: float = _opt(
        120.0, "An embedded vLLM whose engine takes longer for a single token is restarted."
    )
    max_question_tokens: int = _opt(
        0, "Most tokens of a request's messages; 0: what the context leaves.", low=0
    )
    generation_config: str = _opt(
        "auto",
        "Sampling defaults; auto: the checkpoint's generation_config.json, vllm: none.",
        choices=("auto", "vllm"),
    )
    prefill_step_s: float = _opt(
        0.1, "Longest step in which vLLM takes in nothing but questions' text."
    )
    prefill_share: float = _opt(
        0.33,
        "Part of a step that long questions get while others are answered; 0: vLLM's scheduler.",
        low=0,
        high=0.9,
    )
    allow_any_version: bool = _opt(False, "Accept releases of vLLM that are not supported.")
    extra_args: list[str] = field(
        default_factory=list, metadata={"help": "More arguments for the embedded vLLM."}
    )


@dataclass(slots=True)
class ServiceConfig:
    """The whole configuration; each field is a section of the TOML file."""

    server: ServerConfig = field(default_factory=ServerConfig)
    storage: StorageConfig = field(default_factory=StorageConfig)
    video: VideoConfig = field(default_factory=VideoConfig)
    engine: EngineConfig = field(default_factory=EngineConfig)
    vllm: VllmConfig = field(default_factory=VllmConfig)


def split_address(address: str) -> tuple[str, int]:
    """Split ``HOST:PORT``; an IPv6 host stands in brackets.

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
    """Return the CPU threads of each rank: as configured, or the cores shared evenly."""
    if engine.threads_per_rank:
        return engine.threads_per_rank
    cores = len(os.sched_getaffinity(0))
    return max(1, cores // engine.ranks)


def resolve_kv_pool_bytes(engine: EngineConfig) -> int:
    """Return the KV bytes of all ranks: as configured, or a quarter of the memory."""
    return engine.kv_pool_bytes or memory_bytes() // 4


def memory_bytes() -> int:
    """Return the memory of this machine, or of the cgroup where that is less."""
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    with contextlib.suppress(OSError, ValueError):  # no cgroup v2, or "max"
        memory = min(memory, int(Path("/sys/fs/cgroup/memory.max").read_text()))
    return memory
