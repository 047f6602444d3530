"""A client in a process of its own, to be killed in the middle of an answer or an upload.

python -m benchmarks.chaos.leaving_client ADDRESS VIDEO_ID
"""

from __future__ import annotations

import sys
from collections.abc import Iterator

from prefill_client import Client

TOKENS = 2000


def main() -> None:
    """Print a line for each piece of an endless answer."""
    address, video_id = sys.argv[1:]
    with Client(address) as client:
        for piece in _pieces(client, video_id):
            print(repr(piece), flush=True)


def _pieces(client: Client, video_id: str) -> Iterator[str]:
    return iter(
        client.ask(video_id, "What happens?", max_tokens=TOKENS, ignore_eos=True, quality="exact")
    )


if __name__ == "__main__":
    main()
