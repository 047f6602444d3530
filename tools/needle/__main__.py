"""Train the needle model: a tiny Qwen3-VL that answers questions on generated videos.

    python -m tools.needle --out build/needle              # everything, from nothing
    python -m tools.needle --out build/needle --minutes 5  # see the curve begin
    python -m tools.needle --evaluate assets/needle-qwen3-vl
    python -m tools.needle --mean A B --out build/both     # the mean of two checkpoints

Stops and goes on: the same command resumes where it was. Uses a GPU if there is one. The recipe,
with curves and accuracies, is in assets/needle-qwen3-vl/README.md.
"""

from __future__ import annotations

import argparse
import os
import sys
import threading
from pathlib import Path
from typing import Any

import torch

from tools.needle import checkpoint, language, perception
from tools.needle.training import Log

PHASES = "350:8:8:128,450:16:16:256,300:32:32:384,1100:16-48:16-1100:320,1100:24-512:24-1100:512"
"""Short videos, then sketches of up to 1,100 seconds, then sketches and whole videos mixed."""


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(
        prog="python -m tools.needle",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--out", type=Path, default=Path("build/needle"), help="%(default)s")
    parser.add_argument("--start", type=Path, help="checkpoint to begin from: skips perception")
    parser.add_argument("--name", default="language", help="of the language run (%(default)s)")
    parser.add_argument("--phases", default=PHASES, help="language stage: %(default)s")
    parser.add_argument("--rate", type=float, default=2e-3, help="its peak (%(default)s)")
    parser.add_argument("--warm-up", type=int, default=100, help="its steps (%(default)s)")
    parser.add_argument("--perception-steps", type=int, default=2600, help="%(default)s")
    parser.add_argument("--clips", type=int, default=160, help="its bank (%(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="%(default)s")
    parser.add_argument("--threads", type=int, default=0, help="of torch; 0: as it likes")
    parser.add_argument("--minutes", type=float, help="stop after these; the rest can follow")
    parser.add_argument("--evaluate", type=Path, metavar="CHECKPOINT", help="only this")
    parser.add_argument(
        "--mean", type=Path, nargs="+", metavar="CHECKPOINT", help="only average their weights"
    )
    parser.add_argument("--lengths", default="16,32,64,128,256,512,1024", help="%(default)s")
    parser.add_argument("--questions", type=int, default=100, help="per cell (%(default)s)")
    arguments = parser.parse_args()
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    try:
        _run(arguments)
    except ValueError as error:
        parser.error(str(error))
    except KeyboardInterrupt:
        sys.exit("stopped; the same command goes on from the last saved step")


def _run(arguments: argparse.Namespace) -> None:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    workers = os.cpu_count() or 1
    if arguments.evaluate:
        _evaluate(arguments, *checkpoint.load(arguments.evaluate), device=device, workers=workers)
        return
    if arguments.mean:
        checkpoint.save(*checkpoint.mean(arguments.mean), arguments.out / "checkpoint")
        return
    if arguments.minutes:
        # From outside the loop: a step, a rendering or an evaluation is cut short all the same.
        threading.Timer(arguments.minutes * 60, _interrupt).start()
    arguments.out.mkdir(parents=True, exist_ok=True)
    log = Log(arguments.out / "train.log")
    settings = language.LanguageSettings(
        language.parse_phases(arguments.phases),
        rate=arguments.rate,
        warm_up=arguments.warm_up,
        clips=arguments.clips,
        seed=arguments.seed,
        name=arguments.name,
    )
    if arguments.start:
        model, tokenizer = checkpoint.load(arguments.start)
        model.to(device)
    else:
        tokenizer = checkpoint.build_tokenizer()
        model = checkpoint.build_model(tokenizer, checkpoint.NeedleSpec(), arguments.seed)
        model.to(device)
        sight = perception.PerceptionSettings(steps=arguments.perception_steps, seed=arguments.seed)
        perception.train(model, tokenizer, sight, out=arguments.out, workers=workers, log=log)
    language.train(model, tokenizer, settings, out=arguments.out, workers=workers, log=log)
    folder = arguments.out / "checkpoint"
    checkpoint.save(model.cpu(), tokenizer, folder)
    log(f"saved {folder}")
    _evaluate(arguments, *checkpoint.load(folder), device=device, workers=workers)


def _interrupt() -> None:
    import signal

    os.kill(os.getpid(), signal.SIGINT)


def _evaluate(
    arguments: argparse.Namespace, model: Any, tokenizer: Any, *, device: torch.device, workers: int
) -> None:
    """Accuracy by task and length, on clips that training never saw."""
    lengths = [int(length) for length in arguments.lengths.split(",")]
    clips = language.held_out(
        model.to(device),
        tokenizer,
        min(50, arguments.clips),
        seed=language.HELD_OUT_SEED,
        workers=workers,
    )
    for length in lengths:
        for cell in language.evaluate(model, clips, [length], per_task=arguments.questions, seed=1):
            print(cell, flush=True)


if __name__ == "__main__":
    main()
