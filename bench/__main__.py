"""Command line of the benchmarks: ``python -m bench <command> --help``."""

from __future__ import annotations

import argparse
import sys
import time
from dataclasses import asdict
from functools import partial
from importlib import import_module

import torch
from tqdm import tqdm

from bench import (
    depthwise_conv2d,
    group_mix,
    machine,
    reparam,
    report,
    roofline,
    segmented,
    table,
    verdicts,
)
from bench.allocator import keep_freed_memory
from bench.implementations import is_ours, why_not
from bench.predict import tables as predictions
from bench.problem import DTYPES, PASSES
from bench.schedule import Schedule
from bench.shapes import SUITES, layers
from lkconv import backends


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"expected a positive number, got {text}")
    return value


def _seconds(text: str) -> float:
    value = float(text)
    if not value > 0:
        raise argparse.ArgumentTypeError(f"expected a positive number of seconds, got {text}")
    return value


def _add_common(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--threads", type=_positive, help="CPU threads (default: torch's own choice)")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m bench", description="Benchmarks of lkconv.")
    commands = parser.add_subparsers(dest="command", required=True)
    conv = commands.add_parser(
        "depthwise_conv2d",
        help="the layers of real models against every peer",
        description="Measures lkconv and every peer on layers of real models. Each result is compared with a "
        "float64 reference first; a wrong one is not timed.",
    )
    conv.add_argument(
        "--suite", nargs="+", choices=SUITES, default=["replknet"], metavar="SUITE",
        help=f"one or more of {', '.join(SUITES)}; all: every layer of a real model",
    )  # fmt: skip
    conv.add_argument(
        "--dtype", nargs="+", choices=DTYPES, default=["float32"], metavar="DTYPE", help="several allowed"
    )
    conv.add_argument(
        "--pass", dest="passes", nargs="+", choices=(*PASSES, "all"), default=["all"], metavar="PASS"
    )
    _add_common(conv)
    conv.add_argument(
        "--batch", type=_positive, help="default: a CPU row of about a second, 32 (or 64) on a GPU"
    )
    conv.add_argument("--filter", default="", help="only layers whose name contains this")
    conv.add_argument("--quick", action="store_true", help="fewer repeats and smaller CPU batches")
    conv.add_argument(
        "--compile", action="store_true", help="also measure F.conv2d under torch.compile (slow)"
    )
    conv.add_argument("--tf32", action="store_true", help="allow TF32 on a GPU, for everyone")
    conv.add_argument(
        "--backend", nargs="+", choices=[b.name for b in backends.BACKENDS], default=[], metavar="BACKEND",
        help="lkconv's backends, rows for each (default: its own choice), such as: cuda triton",
    )  # fmt: skip
    conv.add_argument(
        "--budget", type=_seconds, metavar="SECONDS",
        help="end within this time: most important rows first, the rest is listed as not run",
    )  # fmt: skip
    conv.add_argument("--compact", action="store_true", help="one line a layer")
    conv.add_argument("--json", metavar="FILE", help="write all rows, after every layer")
    conv.add_argument("--plot", metavar="FILE.png", help="draw speed-ups and rooflines")
    conv.add_argument("--base", metavar="FILE", help="compare with an earlier --json file")
    conv.set_defaults(run=_depthwise_conv2d)
    for name, text in (
        ("overhead", "call overhead on a tiny input, in microseconds"),
        ("memory", "peak extra memory of a training step"),
        ("scaling", "time against N and C, which is linear"),
    ):
        command = commands.add_parser(name, help=text, description=text)
        _add_common(command)
        command.add_argument("--json", metavar="FILE", help="write the result")
        if name == "overhead":
            text = "before each call, pass over two tensors of so many megabytes: they fill the caches"
            command.add_argument("--behind", type=float, default=0, metavar="MB", help=text)
        command.set_defaults(run=partial(_module, name))
    mix = commands.add_parser(
        "group_mix",
        help="Group-Mix attention of GroupMixFormer against PyTorch",
        description=group_mix.__doc__,
    )
    group_mix.add_arguments(mix)
    _add_common(mix)
    mix.set_defaults(run=group_mix.run)
    slices = commands.add_parser(
        "segmented",
        help="windows on slices of channels (InceptionNeXt) against PyTorch",
        description=segmented.__doc__,
    )
    segmented.add_arguments(slices)
    _add_common(slices)
    slices.set_defaults(run=segmented.run)
    blocks = commands.add_parser("reparam", help="blocks as branches, fused and merged: time and memory")
    reparam.add_arguments(blocks)
    blocks.set_defaults(run=reparam.run)
    tables = commands.add_parser("table", help="Markdown tables of --json files", description=table.__doc__)
    table.add_arguments(tables)
    tables.set_defaults(run=table.run, device="cpu", threads=None)
    predict = commands.add_parser(
        "predict",
        help="GPU kernels' times from their machine code; needs no GPU",
        description="Counts instructions in the machine code of the CUDA and Triton kernels and predicts "
        "the times of layers on an H200. Nothing is measured.",
    )
    predictions.add_arguments(predict)
    predict.set_defaults(run=predictions.run, device="cpu", threads=None)
    demo = commands.add_parser("demo", help="a 31x31 layer and a real network, before and after")
    demo.add_argument(
        "--out", default="demo_out", metavar="DIR", help="folder of the pictures (default: demo_out)"
    )
    demo.add_argument("--threads", type=_positive, help="CPU threads (default: torch's own choice)")
    demo.set_defaults(run=partial(_module, "demo"), device="cpu")
    return parser


def _module(name: str, arguments: argparse.Namespace) -> int:
    return import_module(f"bench.{name}").main(arguments)


def _settings(arguments: argparse.Namespace) -> depthwise_conv2d.Settings:
    return depthwise_conv2d.Settings(
        dtypes=tuple(dict.fromkeys(arguments.dtype)),
        passes=PASSES if "all" in arguments.passes else tuple(dict.fromkeys(arguments.passes)),
        device=arguments.device,
        batch=arguments.batch,
        quick=arguments.quick,
        compiled=arguments.compile,
        tf32=arguments.tf32,
        backends=tuple(dict.fromkeys(arguments.backend)),
        seconds=arguments.budget,
    )


def _check_backends(settings: depthwise_conv2d.Settings) -> None:
    device = torch.device(settings.device)
    for backend in settings.backends:
        for dtype in settings.dtypes:
            if reason := why_not(backend, device, getattr(torch, dtype)):
                sys.exit(f"bench: --backend {backend} with {dtype} on {settings.device}: {reason}")


def _depthwise_conv2d(arguments: argparse.Namespace) -> int:
    started = time.monotonic()
    chosen = tuple(layer for layer in layers(*arguments.suite) if arguments.filter in layer.name)
    if not chosen:
        sys.exit(f"bench: no layer of {', '.join(arguments.suite)} has {arguments.filter!r} in its name")
    base = report.load(arguments.base)["rows"] if arguments.base else None
    settings = _settings(arguments)
    _check_backends(settings)
    print(machine.describe(machine.machine(settings.device)), flush=True)
    ceilings = None
    if settings.device == "cuda":
        depthwise_conv2d.set_up_gpu(settings)
        ceilings = roofline.ceilings(settings.device, settings.dtypes)
    planned = depthwise_conv2d.schedule(chosen, settings, started)
    rows: list[dict] = []

    def save() -> None:
        if arguments.json:
            facts = {**asdict(settings), "suites": arguments.suite}
            report.save(arguments.json, rows, facts, ceilings, _not_run(planned, settings))

    show = report.format_cell_compact if arguments.compact else report.format_cell
    for cell in depthwise_conv2d.run(planned, settings, partial(tqdm, unit="cell", dynamic_ncols=True)):
        rows += cell
        tqdm.write(show(cell))
        sys.stdout.flush()
        save()
    if ceilings is None and (arguments.json or arguments.plot):
        ceilings = roofline.ceilings(settings.device, settings.dtypes)
    save()
    _print_summary(rows, ceilings, base, planned, settings)
    if arguments.plot and rows:
        from bench import plots

        plots.draw(rows, ceilings, arguments.plot)
    wrong = any(not row["correct"] for row in rows if is_ours(row["implementation"]))
    return 1 if wrong or planned.failures else 0


def _not_run(planned: Schedule, settings: depthwise_conv2d.Settings) -> list[dict]:
    return [
        {"layer": layer.name, "batch": settings.batch_of(layer), "dtype": dtype,
         "precision": settings.precision(dtype), "pass": pass_name, "reason": reason}
        for (layer, dtype, pass_name), reason in planned.left_out
    ]  # fmt: skip


def _print_summary(rows, ceilings, base, planned: Schedule, settings: depthwise_conv2d.Settings) -> None:
    copy_gbps = (ceilings or {}).get("copy_gbps")
    print(f"\n{report.format_summary(rows, copy_gbps)}")
    if settings.device == "cuda":
        print(f"\n{verdicts.format_verdicts(verdicts.evaluate(rows, copy_gbps), copy_gbps)}")
    if planned.left_out:
        print(f"\n{report.format_not_run(_not_run(planned, settings), len(planned))}")
    if base is not None:
        print(f"\n{report.format_comparison(rows, base)}")
    sys.stdout.flush()


def main(argv: list[str] | None = None) -> int:
    arguments = _parser().parse_args(argv)
    if arguments.device == "cuda" and not torch.cuda.is_available():
        sys.exit("bench: --device cuda: this torch sees no CUDA GPU")
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    keep_freed_memory()
    return arguments.run(arguments)


if __name__ == "__main__":
    sys.exit(main())
