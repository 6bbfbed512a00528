"""The main job: `awq-compile MODEL --target cpu` quantises, compiles, packages and verifies."""

from __future__ import annotations

import json
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final

import typer

from awq_compile.cli import options as o
from awq_compile.cli.console import Output, nbytes, seconds, shown
from awq_compile.cli.evaluate import (
    DEFAULT_WINDOW,
    cached,
    checkpoint_candidate,
    library_candidate,
    measure,
    model_candidates,
    show,
    windows_of_text,
)
from awq_compile.cli.quantize import calibration_spec, choose_method, choose_scheme, tell_unread_text
from awq_compile.errors import CompileError, UsageError
from awq_compile.limits import DEFAULT_PAGE

if TYPE_CHECKING:
    from awq_compile.artifact import DistWriter
    from awq_compile.awq.calibrate import CalibrationSpec
    from awq_compile.awq.checkpoint import QuantizedModel
    from awq_compile.awq.quantize import Method
    from awq_compile.chat.conv_template import ConvTemplate
    from awq_compile.cli.source import Source
    from awq_compile.evaluate import I64
    from awq_compile.formats import QuantScheme
    from awq_compile.limits import CompileOptions
    from awq_compile.models.config import ModelConfig
    from awq_compile.targets.base import TargetSpec
    from awq_compile.verification import Verification
    from awq_compile.verify.kernels import KernelVerification

    Checks = dict[str, Verification | KernelVerification]  # by target

DEFAULT_CONTEXT: Final = 8192  # a longer window of the model is opt-in: the KV cache is allocated for it
DEFAULT_PREFILL: Final = 512
DEFAULT_BATCH: Final = 8
_INT32_MAX: Final = 2**31 - 1

_NOT_REPORTED = ("seconds", "library_bytes", "parameters")  # times differ between equal runs; the rest is elsewhere


def build(
    model: Annotated[
        str | None,
        typer.Argument(
            metavar="MODEL",
            help="Hugging Face directory or model id, or a checkpoint of awq-compile quantize. "
            "Without it: the current directory, if it holds a config.json.",
            show_default=False,
        ),
    ] = None,
    target: Annotated[
        list[str] | None,
        typer.Option("--target", "-t", metavar="TARGET", help="What to compile for; repeatable.", show_default="cpu"),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option("--output", "-o", metavar="DIR", help="Directory to write.", show_default="dist/<model>-<scheme>"),
    ] = None,
    scheme: o.Scheme = None,
    bits: o.Bits = None,
    group_size: o.GroupSize = None,
    asymmetric: o.Asymmetric = False,
    head_bits: o.HeadBits = None,
    method: o.Method = "awq",
    calib: o.Calib = None,
    calib_samples: o.CalibSamples = None,
    calib_length: o.CalibLength = None,
    seed: o.Seed = 0,
    context_window_size: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Longest sequence, in tokens.",
            rich_help_panel=o.LIMITS,
            show_default=f"the model's, at most {DEFAULT_CONTEXT}",
        ),
    ] = None,
    prefill_chunk_size: Annotated[
        int | None,
        typer.Option(
            min=1, help="Prompt tokens in one pass.", rich_help_panel=o.LIMITS, show_default=str(DEFAULT_PREFILL)
        ),
    ] = None,
    max_batch_size: Annotated[
        int | None,
        typer.Option(min=1, help="Sequences at a time.", rich_help_panel=o.LIMITS, show_default=str(DEFAULT_BATCH)),
    ] = None,
    sliding_window_size: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Keep the last so many tokens of an endless sequence.",
            rich_help_panel=o.LIMITS,
            show_default="none: a sequence ends",
        ),
    ] = None,
    attention_sink_size: Annotated[
        int, typer.Option(min=0, help="First tokens that a sliding window keeps.", rich_help_panel=o.LIMITS)
    ] = 0,
    page_size: Annotated[
        int,
        typer.Option(
            help="Tokens in a page of the KV cache. Other than 16, MLC's engine must be told: kv_cache_page_size.",
            rich_help_panel=o.LIMITS,
        ),
    ] = DEFAULT_PAGE,
    cuda_graphs: Annotated[
        bool,
        typer.Option(
            "--cuda-graphs", help="On CUDA, replay the kernels of decoding as graphs.", rich_help_panel=o.GENERAL
        ),
    ] = False,
    conv_template: Annotated[
        str | None,
        typer.Option(
            metavar="FILE",
            help="Conversation template in MLC's form (JSON), or plain for none.",
            rich_help_panel=o.GENERAL,
            show_default="the model's chat template",
        ),
    ] = None,
    text: Annotated[
        Path | None,
        typer.Option(
            "--eval", metavar="FILE", help="Measure perplexity on this text, and report it.", rich_help_panel=o.GENERAL
        ),
    ] = None,
    eval_windows: Annotated[
        int | None,
        typer.Option(
            min=1,
            help=f"Only this many windows of {DEFAULT_WINDOW} tokens of it.",
            rich_help_panel=o.GENERAL,
            show_default="all",
        ),
    ] = None,
    dump: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Write the IR after every pass there.", rich_help_panel=o.GENERAL)
    ] = None,
    as_json: o.Json = False,
    verbose: o.Verbose = False,
) -> None:
    """Quantise MODEL to INT4 by AWQ, compile it by TVM, package it for the MLC runtime, and verify the result."""
    from awq_compile.artifact import DistWriter, check_output, check_writable, tokenizer_files
    from awq_compile.chat.select import select_template
    from awq_compile.cli.source import find_model
    from awq_compile.models.config import read_config
    from awq_compile.targets import resolve_target

    output = Output(as_json, verbose)
    targets = [resolve_target(name) for name in dict.fromkeys(target or ["cpu"])]
    if cuda_graphs and all(one.tvm_target["kind"] != "cuda" for one in targets):
        raise UsageError(
            f"--cuda-graphs is for CUDA, and what is compiled for is {', '.join(one.name for one in targets)}",
            hint="--target cuda:sm_90, or leave --cuda-graphs out",
        )
    asked_scheme = scheme is not None or any(v is not None for v in (bits, group_size, head_bits)) or asymmetric
    default = None if asked_scheme else _common_scheme(targets)
    chosen = choose_scheme(scheme or default, bits, group_size, asymmetric, head_bits)
    how = choose_method(method)
    for one in targets:
        one.check_scheme(chosen)
        one.check_tools()  # not hours later
    tell_unread_text(how, calib, output)
    source = find_model(model, output)
    if source.quantised:
        from awq_compile.awq.checkpoint import open_checkpoint

        quantised = open_checkpoint(source.path)
        if asked_scheme and quantised.scheme != chosen.in_order("NK"):
            raise UsageError(
                f"{shown(source.path)} is quantised as {quantised.scheme.name}, and {chosen.name} was asked for",
                hint="leave the scheme out, or give the original model",
            )
        chosen = chosen if asked_scheme else quantised.scheme
    final = out or Path("dist") / f"{source.name}-{chosen.name}"
    check_output(final)
    check_writable(DistWriter(final).path, "-o", final)
    if dump is not None:
        check_writable(dump, "--dump", dump)
    config = read_config(source.path)
    tokenizer_files(source.path)
    conversation = select_template(source.path, config, conv_template)
    for note in conversation.notes:
        output.step(f"conversation template: {note}")
    options = _options(
        config,
        context_window_size,
        prefill_chunk_size,
        max_batch_size,
        page_size,
        sliding_window_size,
        attention_sink_size,
        cuda_graphs,
    )
    _tell_memory(config, chosen, options, targets, output)
    windows = None
    if text is not None:  # an unusable text is said now, not when all else is done
        size = min(DEFAULT_WINDOW, options.context_window_size)
        windows = windows_of_text(text, source.path, size, eval_windows, "--eval")
    if not source.quantised:
        calibration = calibration_spec(config, calib, calib_samples, calib_length, seed)
        quantised = _quantised(source, chosen.in_order("NK"), calibration, how, output)
    job = _Job(
        source, quantised.in_order(chosen.linear.order), targets, options, conversation.template, final, dump, output
    )
    rows = []
    if text is not None and not source.quantised:
        rows = [cached(source, chosen.in_order("NK"), calibration, "rtn", output)]
        if how == "awq":
            rows.append(quantised.path)
    _tell(job.run(text, windows, rows), output)


def _common_scheme(targets: list[TargetSpec]) -> str:
    """The scheme that all targets take: the smallest group that one of them asks for, which every other reads.

    A phone among them makes it w4g32. Symmetric and NK: a target's own preference for KN is opt-in, by --scheme.
    """
    from awq_compile.formats import QuantScheme

    return min((target.default_scheme for target in targets), key=lambda name: QuantScheme.parse(name).linear.group)


def _quantised(
    source: Source, scheme: QuantScheme, calibration: CalibrationSpec, method: Method, output: Output
) -> QuantizedModel:
    """The checkpoint from the cache, made or finished now when it is not there yet."""
    from awq_compile.awq.checkpoint import is_checkpoint, open_checkpoint
    from awq_compile.cli.source import cached_checkpoint, quantised

    folder = cached_checkpoint(source, scheme, calibration, method)
    if is_checkpoint(folder):
        output.step(f"quantised before: {shown(folder)}")
        return open_checkpoint(folder)
    return quantised(source, folder, scheme, calibration, method, output)


def _options(
    config: ModelConfig,
    context: int | None,
    prefill: int | None,
    batch: int | None,
    page: int,
    window: int | None,
    sink: int,
    cuda_graphs: bool,
) -> CompileOptions:
    """The limits, with the model's own context window as the largest, unless an attention window slides over it."""
    from awq_compile.limits import CompileOptions

    most = config.context_window_size
    for option, size in (("context", context), ("sliding", window)):
        if size is not None and size > most:
            raise UsageError(
                f"--{option}-window-size {size} is more than the model's own {most}", hint=f"at most {most}"
            )
    if context is not None and window is not None:
        raise UsageError(
            "--context-window-size and --sliding-window-size exclude each other: a sequence either ends or slides"
        )
    most_batch = _INT32_MAX // config.vocab_size  # kernels count the elements of (sequences, vocabulary) in int32
    if batch is not None and batch > most_batch:
        raise UsageError(
            f"--max-batch-size {batch} is more than {most_batch}, which the model's vocabulary of "
            f"{config.vocab_size} allows: their product must be below 2^31",
            hint=f"--max-batch-size {DEFAULT_BATCH}",
        )
    context = window or context or min(most, DEFAULT_CONTEXT)
    return CompileOptions(
        context_window_size=context,
        prefill_chunk_size=min(prefill or DEFAULT_PREFILL, context),
        max_batch_size=batch or DEFAULT_BATCH,
        page_size=page,
        sliding_window_size=window,
        attention_sink_size=sink,
        cuda_graphs=cuda_graphs,
    )


def _tell_memory(
    config: ModelConfig, scheme: QuantScheme, options: CompileOptions, targets: list[TargetSpec], output: Output
) -> None:
    """What the compiled model will hold in memory, before any work."""
    from awq_compile.models.parameters import model_parameters

    parameters = sum(p.nbytes for p in model_parameters(config, scheme))
    element = max({"float16": 2, "float32": 4}[target.dtype] for target in targets)
    cache = options.kv_cache_bytes(config.num_layers, config.num_kv_heads, config.head_dim, element)
    output.step(
        f"memory of the compiled model: {nbytes(parameters)} of parameters, and {nbytes(cache)} of KV cache "
        f"for each sequence of {options.cached_tokens} tokens"
    )


@dataclass(frozen=True)
class Built:
    """What the main job made."""

    path: Path
    report: dict[str, Any]
    checkpoint: Path
    compile_seconds: dict[str, float]
    verification: Checks


@dataclass(frozen=True)
class _Job:
    """Everything decided: what to compile, for what, to where."""

    source: Source
    model: QuantizedModel
    targets: list[TargetSpec]
    options: CompileOptions
    conversation: ConvTemplate
    final: Path
    dump: Path | None
    output: Output

    def run(self, text: Path | None, windows: I64 | None, measured: list[Path]) -> Built:
        """Writes the DIST: parameters, tokenizer, configuration, libraries, report, manifest.

        With `windows` of `text`, the report carries perplexities: of the original and the checkpoints `measured`
        (round-to-nearest, AWQ) when MODEL was floating-point, and of the library.
        """
        from awq_compile.artifact import DistWriter, versions
        from awq_compile.chat.config import chat_config
        from awq_compile.contract.check import require_contract
        from awq_compile.deploy.package import package_files
        from awq_compile.manifest import CHAT_CONFIG, dump_json
        from awq_compile.models.parameters import model_parameters
        from awq_compile.report import build_report, render_html

        model, name = self.model, self.source.name
        recorded = {"method": model.method, **asdict(self.options)}
        with DistWriter(self.final) as dist:
            self.output.step("packaging the parameters")
            parameter_bytes = dist.write_parameters(model_parameters(model.config, model.scheme), model)
            tokenizer = dist.write_tokenizer(model.path)
            config = chat_config(
                model.config,
                model.scheme,
                self.options,
                self.conversation,
                tokenizer_dir=model.path,
                tokenizer_files=tokenizer,
            )
            dist.write_text(CHAT_CONFIG, config)
            dist.write_text("lib/config.json", (model.path / "config.json").read_text(encoding="utf-8"))
            compiled, took = self._compile(dist)
            usage = {target: facts["memory_usage"] for target, facts in compiled.items()}
            for file, text_of_app in package_files(dist.libraries, json.loads(config), parameter_bytes, usage).items():
                dist.write_text(file, text_of_app)
            dist.manifest(name, model.scheme, recorded)  # what the runtime needs to open it for the next two steps
            checks = self._verify(dist)
            evaluation = None
            if text is not None and windows is not None:
                evaluation = self._evaluate(dist, text, windows, measured, checks)
            facts = {target: check.to_json() for target, check in checks.items()}
            report = build_report(
                name, model, dist.path, dist.libraries, compiled, facts, recorded, versions(), evaluation
            )
            dist.write_text("report.json", dump_json(report))
            dist.write_text("report.html", render_html(report))
            dist.manifest(name, model.scheme, recorded)
            require_contract(dist.path)
            dist.commit()
        return Built(self.final, report, model.path, took, checks)

    def _compile(self, dist: DistWriter) -> tuple[dict[str, Any], dict[str, float]]:
        """(report data, seconds), by target name."""
        from awq_compile.artifact import disk_errors
        from awq_compile.compiler import compile_library

        model = self.model
        compiled: dict[str, Any] = {}
        took: dict[str, float] = {}
        for target in self.targets:
            self.output.step(f"compiling for {target.name}")
            library = dist.library_path(
                self.source.name, model.scheme, target.name, target.library_suffix, target.tvm_target
            )
            folder = self.dump / target.name.replace(":", "-") if self.dump else None
            started = time.monotonic()
            with disk_errors(self.final):
                found = compile_library(model.config, model.scheme, target, self.options, library, dump=folder)
            took[target.name] = time.monotonic() - started
            compiled[target.name] = {k: v for k, v in asdict(found).items() if k not in _NOT_REPORTED}
        return compiled, took

    def _verify(self, dist: DistWriter) -> Checks:
        """Compares what can run here with torch, and device kernels with float64; a difference stops the job."""
        from awq_compile.verification import verify_library

        found = {}
        for target in self.targets:
            self.output.step(f"verifying the library for {target.name}")
            check = verify_library(dist.path, self.model, target)
            if check.ran and not check.passed:
                raise CompileError(
                    f"the library for {target.name}: {check.words()}",
                    hint="this is a bug in awq-compile: --dump DIR shows what each pass did",
                )
            found[target.name] = check
        return found

    def _evaluate(
        self, dist: DistWriter, text: Path, windows: I64, measured: list[Path], checks: Checks
    ) -> dict[str, Any]:
        """Perplexities, of what this machine can run."""
        candidates = []
        if measured:
            candidates = model_candidates(self.source.path, self.model.scheme, *measured)
        else:
            label = f"{self.model.method} {self.model.scheme.name}, torch"
            candidates = [checkpoint_candidate(self.model.path, self.model.method, label)]
        if any(checks[target.name].ran and target.runs_here for target in self.targets):
            candidates.append(library_candidate(dist.path, "compiled library"))
        return measure(candidates, text, windows, self.output)


def _tell(built: Built, output: Output) -> None:
    """Where things are, and how large."""
    from awq_compile.verification import Verification

    report = built.report
    size = report["sizes"]
    output.say(f"{shown(built.path)}: {report['model']} as {report['scheme']}")
    output.say(
        f"  parameters  {nbytes(size['parameter_bytes'])}, {size['bits_per_weight']:.2f} bits per weight "
        f"({nbytes(size['float16_bytes'])} in float16)"
    )
    for name, entry in report["libraries"].items():
        check = built.verification[name]
        took = seconds(built.compile_seconds[name])
        output.say(f"  library     {entry['path']}, {nbytes(entry['nbytes'])}, compiled in {took}; {check.words()}")
    output.say(f"  checkpoint  {shown(built.checkpoint)}")
    output.say(f"  report      {shown(built.path / 'report.html')}")
    if any(isinstance(check, Verification) and check.ran for check in built.verification.values()):
        output.say(f'next: awq-compile run {shown(built.path)} --prompt "…"')
    if report["evaluation"]:
        show(report["evaluation"], output)
    took_all = {"compile": built.compile_seconds}
    output.result({"dist": str(built.path), "checkpoint": str(built.checkpoint), "seconds": took_all, "report": report})
