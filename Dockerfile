# GPU image (default):  docker build -t prefill-service .
# CPU image:            docker build -t prefill-service:cpu --target cpu .
# Bases are pinned by tag; give a digest with --build-arg GPU_BASE=...@sha256:... where you need one.
ARG GPU_BASE=vllm/vllm-openai:v0.32.0
ARG CPU_BASE=python:3.11-slim-bookworm

# ---- our three packages as wheels ------------------------------------------------------------
FROM ${CPU_BASE} AS wheels
WORKDIR /src
COPY pyproject.toml README.md LICENSE ./
COPY prefill_service prefill_service
COPY kernels kernels
COPY clients/python clients/python
RUN python3 -m pip wheel --no-cache-dir --no-deps --wheel-dir /wheels . ./kernels ./clients/python

# ---- CPU: everything in one virtual environment ----------------------------------------------
FROM ${CPU_BASE} AS cpu-environment
ENV PIP_NO_CACHE_DIR=1
# Its version follows the base image's distribution.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends libnuma1 \
    && rm -rf /var/lib/apt/lists/*
WORKDIR /src
COPY pyproject.toml ./
COPY clients/python/pyproject.toml clients/python/
COPY kernels/pyproject.toml kernels/
COPY deploy/constraints-cpu.txt deploy/
COPY tools/setup_env.py tools/
COPY --from=wheels /wheels /wheels
RUN python3 tools/setup_env.py --venv /opt/prefill-service --wheels /wheels/*.whl

FROM ${CPU_BASE} AS cpu
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends libnuma1 \
    && rm -rf /var/lib/apt/lists/* \
    && mkdir -p /home/prefill /data /cache \
    && chown 10001:0 /home/prefill /data /cache \
    && chmod g=u /home/prefill /data /cache
COPY --from=cpu-environment /opt/prefill-service /opt/prefill-service
# PATH first; the rest lets any numeric user run: no passwd entry, nothing but /cache to write to.
ENV PATH=/opt/prefill-service/bin:$PATH \
    HOME=/home/prefill \
    USER=prefill \
    HF_HOME=/cache/huggingface \
    VLLM_CACHE_ROOT=/cache/vllm \
    TRITON_CACHE_DIR=/cache/triton \
    TORCHINDUCTOR_CACHE_DIR=/cache/torchinductor \
    XDG_CACHE_HOME=/cache \
    PYTHONUNBUFFERED=1
USER 10001:0
WORKDIR /data
VOLUME ["/data", "/cache"]
EXPOSE 50051 9464
HEALTHCHECK --interval=30s --timeout=10s --start-period=15m --retries=3 \
    CMD ["prefill-service", "healthcheck"]
ENTRYPOINT ["prefill-service"]
CMD ["serve", "--help"]

# ---- GPU: vLLM's own image, which has torch, CUDA and vLLM -----------------------------------
FROM ${GPU_BASE} AS gpu
COPY --from=wheels /wheels /wheels
USER 0:0
RUN python3 -m pip install --no-cache-dir /wheels/*.whl \
    && mkdir -p /home/prefill /data /cache \
    && chown 10001:0 /home/prefill /data /cache \
    && chmod g=u /home/prefill /data /cache
ENV HOME=/home/prefill \
    USER=prefill \
    HF_HOME=/cache/huggingface \
    VLLM_CACHE_ROOT=/cache/vllm \
    TRITON_CACHE_DIR=/cache/triton \
    TORCHINDUCTOR_CACHE_DIR=/cache/torchinductor \
    XDG_CACHE_HOME=/cache \
    PYTHONUNBUFFERED=1
USER 10001:0
WORKDIR /data
VOLUME ["/data", "/cache"]
EXPOSE 50051 9464
HEALTHCHECK --interval=30s --timeout=10s --start-period=15m --retries=3 \
    CMD ["prefill-service", "healthcheck"]
ENTRYPOINT ["prefill-service"]
CMD ["serve", "--help"]
