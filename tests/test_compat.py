"""Which vLLM is supported, and what is said of another one."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from prefill_service.compat import (
    VLLM_ANSWERS_TEXT,
    VLLM_RELEASES,
    check_vllm,
    joined,
    vllm_is,
)
from prefill_service.errors import Reason, ServiceError

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = {
    "vllm": "__version__ = '0.99.0'",
    "vllm.distributed": "def get_tensor_model_parallel_rank(): ...\n"
    "def get_tensor_model_parallel_world_size(): ...",
    "vllm.distributed.kv_transfer": "",
    "vllm.distributed.kv_transfer.kv_connector": "",
    "vllm.distributed.kv_transfer.kv_connector.v1": "",
    "vllm.distributed.kv_transfer.kv_connector.v1.base": "import abc\n"
    "class KVConnectorMetadata: ...\n"
    "class KVConnectorRole: ...\n"
    "class KVConnectorTransferResults: ...\n"
    "class KVConnectorBase_V1(abc.ABC):\n"
    "    def shutdown(self): ...\n"
    "    def get_transfer_results(self, finished_req_ids, step): ...\n"
    "    @abc.abstractmethod\n"
    "    def close_step(self): ...\n",
    "vllm.logger": "import logging\ninit_logger = logging.getLogger",
    "vllm.v1": "",
    "vllm.v1.core": "",
    "vllm.v1.core.sched": "",
    "vllm.v1.core.sched.async_scheduler": "class AsyncScheduler: ...",
    "vllm.v1.core.sched.scheduler": "class Scheduler: ...",
    "vllm.v1.request": "class RequestStatus: ...",
    "vllm.model_executor": "",
    "vllm.model_executor.models": "",
    "vllm.model_executor.models.utils": "def extract_layer_index(name): ...",
}


def run(folder: Path, package: dict[str, str], code: str) -> str:
    """Output of Python code that finds ``package`` as vLLM."""
    for name, source in package.items():
        path = folder.joinpath(*name.split("."))
        path.mkdir(parents=True, exist_ok=True)
        (path / "__init__.py").write_text(source)
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONPATH": f"{folder}:{ROOT}"},
        capture_output=True,
        text=True,
    )
    return done.stdout + done.stderr


@pytest.mark.parametrize(
    "version", ["0.31.0", "0.32.0", "0.32.1.dev4+gabc", "0.33.0", "0.33.0+cpu"]
)
def test_supported_releases(version: str) -> None:
    check_vllm(version, "this environment's")
    assert vllm_is(version, VLLM_RELEASES)


@pytest.mark.parametrize("version", ["0.30.2", "0.34.0", "1.0", "dev"])
def test_other_releases_are_refused_unless_asked_for(version: str) -> None:
    with pytest.raises(ServiceError) as caught:
        check_vllm(version, "http://host:8000's")
    assert caught.value.reason is Reason.DECODER_UNAVAILABLE
    assert f"http://host:8000's vLLM is {version}; supported is {VLLM_RELEASES}" in str(
        caught.value
    )
    assert "vllm.allow_any_version" in str(caught.value)
    check_vllm(version, "http://host:8000's", any_version=True)


def test_no_vllm_at_all() -> None:
    with pytest.raises(ServiceError, match="this environment's vLLM is not there"):
        check_vllm("", "this environment's", any_version=True)


def test_releases_that_send_no_text() -> None:
    assert not vllm_is("0.31.0", VLLM_ANSWERS_TEXT)
    assert vllm_is("0.32.0", VLLM_ANSWERS_TEXT)


def test_missing_names_are_listed(tmp_path: Path) -> None:
    package = {name: text for name, text in PACKAGE.items() if "model_executor" not in name}
    package["vllm.distributed"] = "def get_tensor_model_parallel_rank(): ..."
    output = run(tmp_path, package, "import prefill_service.kv.vllm_connector.vllm_names")
    error = output.strip().splitlines()[-1]
    assert (
        "lacks vllm.distributed.get_tensor_model_parallel_world_size, "
        f"vllm.model_executor.models.utils; the connector is made for {VLLM_RELEASES}" in error
    )


def test_changed_methods_are_listed(tmp_path: Path) -> None:
    code = """
from typing_extensions import override
from prefill_service.kv.vllm_connector.vllm_names import KVConnectorBase_V1, check_interface
class Connector(KVConnectorBase_V1):
    @override
    def shutdown(self): ...
    @override
    def get_transfer_results(self, finished_req_ids): ...
    @override
    def wait_for_save(self): ...
    def our_own(self): ...
check_interface(Connector)
"""
    error = run(tmp_path, PACKAGE, code).strip().splitlines()[-1]
    assert "KVConnectorBase_V1.close_step, which is new" in error
    assert "get_transfer_results(finished_req_ids), which now is (finished_req_ids, step)" in error
    assert "KVConnectorBase_V1.wait_for_save;" in error
    assert "shutdown" not in error
    assert "our_own" not in error


def test_missing_attributes_are_named(tmp_path: Path) -> None:
    code = """
from types import SimpleNamespace
from prefill_service.kv.vllm_connector.vllm_names import computes_nothing, failed_loads
assert computes_nothing(SimpleNamespace(total_num_scheduled_tokens=0))
failed_loads(SimpleNamespace(failed_requests=()))
"""
    error = run(tmp_path, PACKAGE, code).strip().splitlines()[-1]
    assert "lacks SimpleNamespace.failed_recving" in error


def test_vision_features_come_whole_or_by_video() -> None:
    features = torch.arange(12.0).view(4, 3)
    assert torch.equal(joined(features), features)
    assert torch.equal(joined(features.split((1, 3))), features)
