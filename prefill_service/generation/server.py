"""vLLM as the service sees it: launched and watched, or given by URL."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Mapping
from contextlib import aclosing, suppress
from pathlib import Path

import aiohttp
import torch

from prefill_service.compat import VLLM_ANSWERS_TEXT, check_vllm, vllm_is
from prefill_service.config import VllmConfig
from prefill_service.errors import Reason, ServiceError
from prefill_service.generation.detokenizer import load_tokenizer
from prefill_service.generation.engine_watch import EngineWatch
from prefill_service.generation.vllm_client import (
    GenerationEvent,
    GenerationRequest,
    VllmClient,
)
from prefill_service.generation.vllm_process import VllmProcess

logger = logging.getLogger(__name__)

_POLL_S = 2.0
_MAX_FAILED_CHECKS = 3
_MAX_BACKOFF_S = 60.0


class GenerationServer:
    """vLLM, embedded (``config.url`` empty) or somewhere else.

    ``start`` returns when it is ready. From then on a watcher notices its death or a failing
    ``/health``; the embedded one is restarted with back-off, a remote one is asked until it
    answers again.

    Args:
        config: URL or size and limits.
        model_path: folder or hub id of the checkpoint.
        dtype: ``"float32"``, ``"bfloat16"`` or ``"float16"``.
        log_dir: where the log (``vllm.log``) goes.
        runtime_dir: where an embedded vLLM's temporary files go; by default the system's folder.
        fp8: whether the checkpoint's weights are FP8.
    """

    def __init__(
        self,
        config: VllmConfig,
        model_path: str,
        dtype: str,
        log_dir: Path,
        *,
        runtime_dir: Path | None = None,
        fp8: bool = False,
    ) -> None:
        self._config = config
        self._model_path = model_path
        self._dtype = dtype
        self._fp8 = fp8
        self._log_path = log_dir / "vllm.log"
        self._runtime_dir = runtime_dir
        self._session: aiohttp.ClientSession | None = None
        self._process: VllmProcess | None = None
        self._client: VllmClient | None = None
        self._watcher: asyncio.Task[None] | None = None
        self._max_model_len = 0
        self._trouble = "vLLM has not been started"
        self._ready = False
        self._engine = EngineWatch(config.stall_timeout_s)

    @property
    def ready(self) -> bool:
        """Whether it answered its last health check."""
        return self._ready

    @property
    def trouble(self) -> str:
        """Why it is not ready; empty if it is."""
        return "" if self._ready else self._trouble

    @property
    def max_model_len(self) -> int:
        """Context in tokens; 0 before the first start."""
        return self._max_model_len

    @property
    def url(self) -> str:
        """Base URL of the server; empty before the first start."""
        return self._client.url if self._client is not None else ""

    @property
    def headers(self) -> Mapping[str, str]:
        """What every request to the server carries."""
        return self._client.headers if self._client is not None else {}

    @property
    def pid(self) -> int | None:
        """Process id of the embedded API server, while it runs."""
        return self._process.pid if self._process is not None else None

    async def start(self) -> None:
        """Launch (or find) vLLM and wait until it is ready.

        Raises:
            ServiceError: DECODER_UNAVAILABLE, with the end of vLLM's log.
        """
        # Connections are not reused: one that vLLM's death closed would fail the next request.
        connector = aiohttp.TCPConnector(limit=0, force_close=True)
        # It shares pages with us, and so the host: no proxy of the environment is asked.
        self._session = aiohttp.ClientSession(connector=connector, trust_env=False)
        try:
            await self._bring_up()
        except BaseException:
            await self.stop()
            raise
        self._watcher = asyncio.create_task(self._watch(), name="vllm-watcher")

    async def stop(self) -> None:
        """End the watcher, the embedded vLLM with all its processes, and all connections."""
        self._ready = False
        self._trouble = "vLLM has been stopped"
        if self._watcher is not None:
            self._watcher.cancel()
            with suppress(asyncio.CancelledError):
                await self._watcher
            self._watcher = None
        if self._process is not None:
            await self._process.kill()
            self._process = None
        if self._session is not None:
            await self._session.close()
            self._session = None

    async def generate(self, request: GenerationRequest) -> AsyncIterator[GenerationEvent]:
        """Stream an answer; see ``VllmClient.generate``.

        Raises:
            ServiceError: DECODER_UNAVAILABLE (not up, or it died), DECODER_FAILED.
        """
        client = self._client
        if client is None or not self._ready:
            raise ServiceError(Reason.DECODER_UNAVAILABLE, f"vLLM is not ready: {self._trouble}")
        try:
            with self._engine.follow() as note_sign:
                async with aclosing(client.generate(request)) as events:  # type: ignore[type-var]
                    async for event in events:
                        note_sign()
                        yield event
        except ServiceError as error:
            if error.reason == Reason.DECODER_FAILED:
                # A dying engine answers running requests with errors before it is gone.
                await client.check_health()
            raise

    # ---- life ---------------------------------------------------------------------------

    async def _bring_up(self) -> None:
        """Launch if embedded, wait for health, read the model's length."""
        assert self._session is not None
        url = self._config.url
        timeout_s = self._config.request_timeout_s
        if not url:
            device = "cuda" if torch.cuda.is_available() else "cpu"
            self._process = VllmProcess(
                self._config,
                self._model_path,
                self._dtype,
                device=device,
                log_path=self._log_path,
                runtime_dir=self._runtime_dir,
                fp8=self._fp8,
            )
            await self._process.launch()
            url = self._process.url
        api_key = self._process.api_key if self._process else _read_key(self._config)
        client = VllmClient(self._session, url, timeout_s, api_key=api_key)
        begin = time.monotonic()
        await self._until_healthy(client)
        await self._check_version(client)
        self._max_model_len = await client.max_model_len()
        self._client = client
        self._ready = True
        logger.info(
            "vLLM at %s is ready after %.1f s, context %d tokens",
            url,
            time.monotonic() - begin,
            self._max_model_len,
        )

    async def _check_version(self, client: VllmClient) -> None:
        version = await client.version()
        any_version = self._config.allow_any_version
        check_vllm(version, f"{client.url}'s", any_version=any_version)
        if not vllm_is(version, VLLM_ANSWERS_TEXT):
            client.tokenizer = await asyncio.to_thread(load_tokenizer, self._model_path)

    async def _until_healthy(self, client: VllmClient) -> None:
        deadline = time.monotonic() + self._config.start_timeout_s
        while True:
            if self._process is not None:
                self._process.list_memory()
            try:
                await client.check_health()
                return
            except ServiceError as error:
                if self._process is None:
                    raise  # a remote one is expected to be up
                if self._process.pid is None:
                    raise _unavailable(self._process.exit_text()) from error
                if time.monotonic() > deadline:
                    limit = f"{self._config.start_timeout_s:g} s"
                    raise _unavailable(
                        f"not healthy within {limit}; {self._process.exit_text()}"
                    ) from error
            await asyncio.sleep(0.5)

    async def _watch(self) -> None:
        """Notice trouble, then bring vLLM back, for ever."""
        while True:
            try:
                await self._until_trouble()
            finally:
                await self._engine.close()
            backoff = 1.0
            while not self._ready:
                try:
                    if self._process is not None:
                        await self._process.kill()
                    await self._bring_up()
                except Exception as error:  # the watcher must outlive whatever goes wrong
                    self._down(str(error))
                    logger.error("vLLM is not back yet, next try in %g s: %s", backoff, error)
                    await asyncio.sleep(backoff)
                    backoff = min(2 * backoff, _MAX_BACKOFF_S)

    async def _until_trouble(self) -> None:
        failures = 0
        while True:
            await self._pause()
            assert self._client is not None
            if self._process is not None:
                if self._process.pid is None:
                    self._down(self._process.exit_text())
                    return
                if trouble := self._engine.find_trouble(self._client.check_engine):
                    self._down(trouble)
                    return
            try:
                await self._client.check_health()
                failures = 0
            except ServiceError as error:
                failures += 1
                logger.warning("vLLM health check %d failed: %s", failures, error)
                if failures >= _MAX_FAILED_CHECKS:
                    self._down(error.message)
                    return

    async def _pause(self) -> None:
        """A while, or until the embedded process ends."""
        if self._process is None:
            await asyncio.sleep(_POLL_S)
        else:
            with suppress(TimeoutError):
                await asyncio.wait_for(self._process.wait(), _POLL_S)

    def _down(self, trouble: str) -> None:
        if self._ready:
            logger.error("vLLM is down: %s", trouble)
        self._ready = False
        self._trouble = trouble


def _unavailable(message: str) -> ServiceError:
    return ServiceError(Reason.DECODER_UNAVAILABLE, message)


def _read_key(config: VllmConfig) -> str:
    """The key of a vLLM that was started elsewhere; raises CONFIG_INVALID if it cannot be read."""
    if not config.api_key_file:
        return ""
    try:
        return Path(config.api_key_file).expanduser().read_text().strip()
    except (OSError, UnicodeDecodeError) as error:
        raise ServiceError(
            Reason.CONFIG_INVALID,
            f"vllm.api_key_file {config.api_key_file!r} cannot be read: {error}",
            name="vllm.api_key_file",
            value=config.api_key_file,
        ) from error
