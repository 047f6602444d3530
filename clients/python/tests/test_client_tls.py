from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import grpc
import pytest
from client_helpers import Api, make_client
from fake_prefill_server import FakeServer

from prefill_client import TLS, RetryPolicy, UnavailableError


def certificate(folder: Path, name: str) -> tuple[Path, Path]:
    if shutil.which("openssl") is None:
        pytest.skip("needs the openssl command to make certificates")
    cert = folder / f"{name}.pem"
    key = folder / f"{name}.key"
    command = "openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -days 2 -batch"
    subprocess.run(
        [
            *command.split(),
            "-subj",
            f"/CN={name}",
            "-addext",
            "subjectAltName=DNS:video.test",
            "-keyout",
            key,
            "-out",
            cert,
        ],
        check=True,
        capture_output=True,
    )
    return cert, key


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tls")
    return certificate(folder, "server"), certificate(folder, "client")


@pytest.fixture(scope="module")
def tls_server(files):
    (cert, key), (client_cert, _) = files
    server = FakeServer(
        grpc.ssl_server_credentials(
            [(key.read_bytes(), cert.read_bytes())], client_cert.read_bytes(), True
        )
    )
    yield server
    server.close()


async def test_mutual_tls_with_a_token(kind, tls_server, files, clip):
    (ca, _), (cert, key) = files
    tls = TLS(ca=ca, cert=cert, key=key, server_name="video.test")
    api = Api(make_client(kind, tls_server.address, tls=tls, token="s3cret"))
    assert (await api.call("upload", clip)).size_bytes == clip.stat().st_size
    assert tls_server.state.metadata["authorization"] == "Bearer s3cret"


@pytest.mark.parametrize("given", ["plaintext", "system", "ca", "name"])
async def test_anything_less_is_refused(kind, tls_server, files, given):
    (ca, _), (cert, key) = files
    tls = {
        "plaintext": None,
        "system": True,
        "ca": TLS(ca=ca, server_name="video.test"),
        "name": TLS(ca=ca, cert=cert, key=key),
    }[given]
    api = Api(make_client(kind, tls_server.address, tls=tls, retry=RetryPolicy(1)))
    with pytest.raises(UnavailableError):
        await api.call("video", "vid_1")
