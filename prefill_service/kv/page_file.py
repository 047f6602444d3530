"""A prefix's pages on one rank: a file in shared memory that consumers can map but not change."""

from __future__ import annotations

import fcntl
import mmap
import os
from dataclasses import dataclass, field

import torch
from torch import Tensor

from prefill_service.errors import ServiceError
from prefill_service.kv.manifest import KVLayout

# Since Linux 5.1, not yet named by the fcntl module: existing writable maps go on working,
# new ones and write(2) are refused.
_F_SEAL_FUTURE_WRITE = 0x10
_SEALS = fcntl.F_SEAL_GROW | fcntl.F_SEAL_SHRINK | _F_SEAL_FUTURE_WRITE | fcntl.F_SEAL_SEAL


@dataclass(eq=False)
class PageFile:
    """One prefix's shard on this rank. All fields are guarded by the store's condition.

    Attributes:
        fd: a sealed memfd of the file; -1 once it is closed.
        pages: [num_pages, *layout.page_shape] on the file's memory.
        checksums: xxh3_64 of each page's bytes, None until the page is sealed.
        error: why the prefix ended, if it did.
    """

    prefix_id: str
    epoch: int
    num_pages: int
    layout: KVLayout
    fd: int
    pages: Tensor
    checksums: list[int | None] = field(default_factory=list)
    error: ServiceError | None = None

    @classmethod
    def create(cls, prefix_id: str, epoch: int, num_pages: int, layout: KVLayout) -> PageFile:
        """Make room for so many pages.

        Raises:
            OSError: the system has no memory for it.
        """
        num_bytes = num_pages * layout.page_bytes
        fd = os.memfd_create("prefill-service-kv", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        try:
            os.ftruncate(fd, num_bytes)
            memory = mmap.mmap(fd, num_bytes)
            fcntl.fcntl(fd, fcntl.F_ADD_SEALS, _SEALS)
        except OSError:
            os.close(fd)
            raise
        # The tensor keeps the mapping alive and nobody closes it, so that a write that is under
        # way while the prefix is dropped stays harmless.
        flat = torch.frombuffer(memory, dtype=layout.torch_dtype)
        return cls(
            prefix_id=prefix_id,
            epoch=epoch,
            num_pages=num_pages,
            layout=layout,
            fd=fd,
            pages=flat.view(num_pages, *layout.page_shape),
            checksums=[None] * num_pages,
        )

    @property
    def num_bytes(self) -> int:
        """Size of the shared memory."""
        return self.num_pages * self.layout.page_bytes

    def close(self, error: ServiceError) -> None:
        """Give the memory up; what readers still map lives on. ``error`` is for who asks later."""
        self.error = self.error or error
        self.pages = torch.empty(0)
        os.close(self.fd)
        self.fd = -1

    def raise_error(self) -> None:
        """Raise the error that the prefix ended with, if it did.

        Each reader gets an exception of its own: one object that is raised again and again grows
        its traceback.
        """
        if self.error is not None:
            raise ServiceError.from_dict(self.error.to_dict())
