"""Verifies the libraries of a DIST with nothing but what lies in it."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace

from awq_compile.compiler import CompileOptions
from awq_compile.errors import ArtifactError, ModelError
from awq_compile.formats import QuantScheme
from awq_compile.manifest import Dist
from awq_compile.models.config import read_config
from awq_compile.targets.base import TargetSpec
from awq_compile.verify.kernels import KernelVerification, verify_kernels
from awq_compile.verify.sidecar import CONFIG_FOLDER


def verify_target(
    dist: Dist, target: TargetSpec, progress: Callable[[str], None] = lambda _: None
) -> KernelVerification:
    """Executes every kernel of the library for `target`. Raises `EnvironmentMissingError` where nothing can."""
    options = dist.manifest.options
    try:
        sizes = [int(options[key]) for key in ("context_window_size", "prefill_chunk_size", "max_batch_size")]
        config = read_config(dist.path / CONFIG_FOLDER)
    except (KeyError, TypeError, ValueError, ModelError) as error:
        raise ArtifactError(
            f"{dist.path} does not say what it was compiled from: {error}", hint="compile again with this version"
        ) from None
    started = time.monotonic()
    scheme = QuantScheme.parse(dist.manifest.scheme)
    library = dist.library(target.name)
    found = verify_kernels(library, config, scheme, target, CompileOptions(*sizes), progress=progress)
    return replace(found, seconds=time.monotonic() - started)
