"""Verifies the libraries of a DIST with nothing but what lies in it."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace

from awq_compile.errors import ArtifactError, ModelError
from awq_compile.formats import QuantScheme
from awq_compile.limits import CompileOptions
from awq_compile.manifest import Dist
from awq_compile.models.config import ModelConfig, read_config
from awq_compile.targets.base import TargetSpec
from awq_compile.verify.kernels import KernelVerification, verify_kernels
from awq_compile.verify.sidecar import CONFIG_FOLDER


def compiled_from(dist: Dist) -> tuple[ModelConfig, QuantScheme, CompileOptions]:
    """What the libraries of a DIST were compiled from, as it says itself."""
    try:
        config = read_config(dist.path / CONFIG_FOLDER, dist.path)
        return config, QuantScheme.parse(dist.manifest.scheme), CompileOptions.read(dist.manifest.options)
    except (ArtifactError, ModelError) as error:
        raise ArtifactError(
            f"{dist.path} does not say what it was compiled from: {error}", hint="compile again with this version"
        ) from None


def verify_target(
    dist: Dist, target: TargetSpec, progress: Callable[[str], None] = lambda _: None
) -> KernelVerification:
    """Executes every kernel of the library for `target`. Raises `EnvironmentMissingError` where nothing can."""
    started = time.monotonic()
    config, scheme, options = compiled_from(dist)
    found = verify_kernels(dist.library(target.name), config, scheme, target, options, progress=progress)
    return replace(found, seconds=time.monotonic() - started)
