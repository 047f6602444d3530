"""Writes a prefix's pages on the rank that computes them, and seals them for readers."""

from __future__ import annotations

import threading

import torch
import xxhash
from torch import Tensor

from prefill_service.errors import Reason, ServiceError
from prefill_service.kv.page_file import PageFile


class ShardWriter:
    """Writes one prefix's pages on the rank that computes them. One writing thread."""

    def __init__(self, file: PageFile, changed: threading.Condition) -> None:
        self._file = file
        self._changed = changed

    def write(self, layer: int, first_page: int, k: Tensor, v: Tensor) -> None:
        """Store K and V of consecutive tokens of one run, from ``first_page`` onwards.

        Args:
            layer: index of the layer.
            first_page: page that takes the first token.
            k: [tokens, kv_heads, head_dim] after rotary embedding, on any device, in
                the layout's dtype. The last page may be filled partly.
            v: as ``k``.

        Raises:
            ServiceError: KV_MISMATCH if shape or dtype are not the layout's, or a page
                does not exist or is sealed; or the error the prefix was ended with.
        """
        layout = self._file.layout
        num_tokens = k.shape[0]
        pages = self._open_pages(first_page, layout.pages_for(num_tokens))
        expected = (num_tokens, layout.kv_heads, layout.head_dim)
        full, rest = divmod(num_tokens, layout.page_tokens)
        for which, source in enumerate((k, v)):
            if tuple(source.shape) != expected or source.dtype != layout.torch_dtype:
                raise ServiceError(
                    Reason.KV_MISMATCH,
                    f"{'KV'[which]} of layer {layer} is {tuple(source.shape)} {source.dtype}; "
                    f"the layout wants {expected} {layout.dtype}",
                    layer=layer,
                )
            host = source.detach().to("cpu")
            target = pages[:, layer, which]  # [pages, page_tokens, kv_heads, head_dim]
            if full:
                target[:full].copy_(host[: num_tokens - rest].view(full, *target.shape[1:]))
            if rest:
                target[full, :rest].copy_(host[num_tokens - rest :])

    def seal_pages(self, first_page: int, count: int) -> None:
        """Checksum pages and let consumers have them; they must not be written again.

        Raises:
            ServiceError: KV_MISMATCH if a page does not exist or is sealed already; or the
                error the prefix was ended with.
        """
        pages = self._open_pages(first_page, count)
        raw = pages.view(torch.uint8).numpy().reshape(count, -1)
        checksums = [xxhash.xxh3_64_intdigest(raw[page]) for page in range(count)]
        with self._changed:
            self._file.checksums[first_page : first_page + count] = checksums
            self._changed.notify_all()

    def fail(self, error: ServiceError) -> None:
        """End the prefix with an error, which all its readers get."""
        with self._changed:
            self._file.error = self._file.error or error
            self._changed.notify_all()

    @property
    def complete(self) -> bool:
        """Whether every page is sealed."""
        with self._changed:
            return self._file.error is None and None not in self._file.checksums

    def _open_pages(self, first_page: int, count: int) -> Tensor:
        """[count, *page_shape] of pages that may be written."""
        file = self._file
        end = first_page + count
        with self._changed:
            file.raise_error()
            sealed = [c for c in file.checksums[first_page:end] if c is not None]
            if first_page < 0 or end > file.num_pages or sealed:
                raise ServiceError(
                    Reason.KV_MISMATCH,
                    f"pages [{first_page}, {end}) of prefix {file.prefix_id} cannot be "
                    f"written: it has {file.num_pages} pages, {len(sealed)} of these sealed",
                    prefix_id=file.prefix_id,
                )
            return file.pages[first_page:end]
