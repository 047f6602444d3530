"""``prefill-service estimate``: how a prefill of some length would be spread, and why.

Nothing heavy is imported before the command runs.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from prefill_service.attention_shape import BLOCK_TOKENS
from prefill_service.errors import Reason, ServiceError

if TYPE_CHECKING:
    from prefill_service.cost_model.cost import CostModel
    from prefill_service.cost_model.request import SearchRequest
    from prefill_service.models.model_shape import ModelShape

_PRESET = "qwen3-vl-8b"
_MEMORY_GIB = 40.0


def add_estimate(commands: argparse._SubParsersAction[Any]) -> None:
    """Add the command to ``prefill-service``."""
    parser = commands.add_parser(
        "estimate", help="predict time, traffic and memory of a prefill for each exchange"
    )
    add = parser.add_argument
    model = parser.add_mutually_exclusive_group()
    model.add_argument("--model", metavar="FOLDER", help="checkpoint; its config.json is enough")
    model.add_argument("--preset", metavar="NAME", help=f"model by name (default: {_PRESET})")
    add("--tokens", type=int, required=True, metavar="N", help="tokens of the prompt")
    add("--ranks", type=int, required=True, metavar="R", help="ranks there are")
    add("--link", type=float, metavar="GB/S", help="bandwidth at which a rank receives")
    add("--latency", type=float, metavar="US", help="microseconds of one operation of an exchange")
    add(
        "--parallel-links",
        type=int,
        default=1,
        metavar="N",
        help="other ranks from which a rank receives at once at that bandwidth; ranks - 1 in a "
        "full mesh (default: 1)",
    )
    add(
        "--density",
        type=float,
        metavar="X",
        help="share of the pairs that attention computes (default: 1, exact)",
    )
    add(
        "--block-tokens",
        type=int,
        choices=(64, 128),
        default=BLOCK_TOKENS,
        help="keys per block, as engine.sparse_block_tokens (default: %(default)s)",
    )
    add(
        "--memory",
        type=float,
        metavar="GIB",
        help=f"for K and V on each rank (default: {_MEMORY_GIB:g})",
    )
    add("--profile", type=Path, metavar="FILE", help="cost model, as --save writes it")
    add("--probe", action="store_true", help="measure this machine's rates instead of assuming")
    add("--save", type=Path, metavar="FILE", help="write the cost model that was used")
    add("--all", action="store_true", help="every candidate, not only the best of each exchange")
    add("--json", action="store_true", help="everything as JSON")
    parser.set_defaults(run=_estimate)


def _estimate(args: argparse.Namespace) -> int:
    """Print the search result; returns the exit code.

    Raises:
        ServiceError: CONFIG_INVALID for options, KV_POOL_FULL if nothing fits.
    """
    from prefill_service.cost_model.profile import save_profile
    from prefill_service.cost_model.request import SearchRequest
    from prefill_service.cost_model.search import search_candidates
    from prefill_service.cost_model.search_table import best_of_each, result_json, table
    from prefill_service.parallel.exchanges.catalog import EXCHANGES

    for option in ("tokens", "ranks", "parallel_links"):
        value = getattr(args, option)
        _check(option, value, value >= 1, "1 or more")
    density = 1.0 if args.density is None else args.density
    _check("density", density, 0 < density <= 1, "more than 0 and at most 1")
    memory = _MEMORY_GIB if args.memory is None else args.memory
    _check("memory", memory, 0 < memory < float("inf"), "more than 0")
    shape = _shape(args)
    cost, assumed = _cost(args, shape)
    if args.save:
        save_profile(cost, args.save)
    request = SearchRequest(
        shape=shape,
        tokens=args.tokens,
        max_ranks=args.ranks,
        kv_memory_bytes=memory * 2**30,
        density=density,
        parallel_links=args.parallel_links,
        block_tokens=args.block_tokens,
    )
    found = search_candidates(request, cost)
    if not (args.model or args.preset):
        assumed.insert(0, shape.name)
    if args.density is None:
        assumed.append("exact attention (density 1)")
    if args.memory is None:
        assumed.append(f"{memory:g} GiB for K and V on each rank")
    if density < 1:
        names = ", ".join(exchange.name for exchange in EXCHANGES if exchange.sparse)
        assumed.append(f"that density with {names}, and dense attention with the others")
    if args.json:
        print(json.dumps(_context(request, cost, assumed) | result_json(found), indent=2))
        return 0
    print(f"{shape.name}, {args.tokens:,} tokens, up to {args.ranks} ranks")
    if assumed:
        print(f"assumed: {'; '.join(assumed)}")
    print(f"cost model ({cost.provenance}): {_rates(cost, shape)}\n")
    print(table(found.candidates if args.all else best_of_each(found), found.chosen))
    print(f"\n{found.reason}")
    return 0


def _shape(args: argparse.Namespace) -> ModelShape:
    from prefill_service.cost_model.presets import preset_shape
    from prefill_service.models.model_config import open_shape

    return open_shape(args.model) if args.model else preset_shape(args.preset or _PRESET)


def _cost(args: argparse.Namespace, shape: ModelShape) -> tuple[CostModel, list[str]]:
    """The cost model, and what of it nobody measured or gave."""
    from prefill_service.cost_model.cost import ASSUMED
    from prefill_service.cost_model.profile import load_profile

    if args.profile and args.probe:
        raise ServiceError(Reason.CONFIG_INVALID, "--profile and --probe exclude each other")
    assumed = []
    if args.profile:
        cost = load_profile(args.profile)
    else:
        cost = _probed(shape) if args.probe else ASSUMED
        if not args.probe:
            assumed.append(
                f"{1e-12 / cost.per_linear_flop:.0f} TFLOP/s in linear layers, "
                f"{1e-12 / cost.per_attention_flop:.0f} in attention, "
                f"{cost.per_pass * 1e6:.0f} us per layer and chunk"
            )
        if args.link is None:
            assumed.append(f"a link of {1e-9 / cost.per_byte:g} GB/s")
        if args.latency is None:
            assumed.append(f"{cost.per_call * 1e6:g} us latency")
    if args.link is not None:
        _check("link", args.link, 0 < args.link < float("inf"), "more than 0")
        cost = dataclasses.replace(cost, per_byte=1e-9 / args.link)
    if args.latency is not None:
        _check("latency", args.latency, 0 <= args.latency < float("inf"), "0 or more")
        cost = dataclasses.replace(cost, per_call=args.latency * 1e-6)
    return cost, assumed


def _probed(shape: ModelShape) -> CostModel:
    import torch

    from prefill_service.cost_model.cost import ASSUMED
    from prefill_service.cost_model.device_probe import probe_device
    from prefill_service.cost_model.fitting import fit

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    shape = dataclasses.replace(shape, dtype="float32" if device.type == "cpu" else "bfloat16")
    name = "CPU" if device.type == "cpu" else torch.cuda.get_device_name(device)
    threads = torch.get_num_threads()
    provenance = f"probe of {name}, {threads} threads, {shape.torch_dtype}; link not measured"
    return fit(probe_device(shape, device), ASSUMED, provenance)


def _rates(cost: CostModel, shape: ModelShape) -> str:
    fixed, token, pair = cost.rates(shape)
    return (
        f"A = {fixed * 1e3:.3g} ms per chunk, B = {token * 1e6:.3g} us per token, "
        f"C = {pair * 1e9:.3g} ns per pair"
    )


def _context(request: SearchRequest, cost: CostModel, assumed: list[str]) -> dict[str, object]:
    return {
        "model": _model(request.shape),
        "tokens": request.tokens,
        "max_ranks": request.max_ranks,
        "density": request.density,
        "kv_memory_bytes": request.kv_memory_bytes,
        "cost_model": dataclasses.asdict(cost),
        "assumed": assumed,
    }


def _model(shape: ModelShape) -> dict[str, object]:
    return {
        "name": shape.name,
        "layers": shape.num_layers,
        "hidden": shape.hidden,
        "intermediate": shape.intermediate,
        "q_heads": shape.q_heads,
        "kv_heads": shape.kv_heads,
        "head_dim": shape.head_dim,
        "bytes_per_element": shape.bytes_per_element,
    }


def _check(option: str, value: object, ok: bool, accepted: str) -> None:
    if not ok:
        name = f"--{option.replace('_', '-')}"
        raise ServiceError(
            Reason.CONFIG_INVALID, f"{name} = {value!r} is not accepted; expected {accepted}"
        )
