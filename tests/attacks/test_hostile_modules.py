"""Forged module files: accepted where nothing is wrong with them, refused where well-formed and harmful."""

import contextlib
import resource
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from forged_modules import (
    FLOATS,
    GOOD,
    TENSORS,
    tensor,
    with_calibration,
    with_header,
    with_manifest,
    with_tensors,
)
from random_modules import backbone_manifest, build_bank, module_bytes, random_module, without_calibration

from model_store.errors import InvalidModule
from model_store.module_file import check_module, read_module

# -- files that nothing is wrong with ----------------------------------------------------------------


def test_the_unharmed_file_is_accepted() -> None:
    """Otherwise every refusal below could have another reason than the one meant."""
    read_module(GOOD)
    read_module(with_header(lambda header: None))
    read_module(with_manifest())
    read_module(with_tensors())
    read_module(with_calibration(128))
    check_module(read_module(with_tensors()), backbone_manifest())


def test_the_files_cover_every_kind_of_tensor() -> None:
    assert len(TENSORS) == 27 and len(FLOATS) == 19


# -- files that are well-formed and still harmful ----------------------------------------------------


@contextlib.contextmanager
def memory_limit(more_bytes: int) -> Iterator[None]:
    """Let this process take at most `more_bytes` of address space on top of what it has."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + more_bytes, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="reads /proc")
@pytest.mark.parametrize("bottleneck_dim", [4096, 65536])
def test_a_small_file_cannot_claim_gigabytes(bottleneck_dim: int) -> None:
    data = with_manifest(feature_dim=65536, bottleneck_dim=bottleneck_dim)
    with memory_limit(2**29), pytest.raises(InvalidModule):
        read_module(data)


def indefinite() -> bytes:
    """Every pair of features wholly and negatively correlated: no covariance of anything."""
    correlation = torch.full_like(tensor("statistics.correlation"), -127)
    return with_tensors(statistics__correlation=correlation)


def test_a_scatter_that_is_no_covariance_builds_no_bank() -> None:
    module = read_module(indefinite()).module
    for others in ([], [random_module("cars", per_class=3)]):
        with pytest.raises(InvalidModule, match="scatter is no covariance"):
            build_bank([module, *others])


def test_a_scatter_that_is_no_covariance_cannot_hide_behind_others() -> None:
    """Otherwise removing the others later would fail."""
    hiding = [random_module(f"task{i}", i, per_class=300, spread=3.0) for i in range(5)]
    with pytest.raises(InvalidModule, match="scatter is no covariance"):
        file = read_module(indefinite())
        check_module(file, backbone_manifest())
        build_bank([file.module, *hiding])


@pytest.mark.parametrize("weight", ["input scale", "head scale"])
def test_weights_that_overflow_are_refused_without_a_calibration_set_too(weight: str) -> None:
    """No golden outputs tell on them, and NaN would beat every other task's answer."""
    module = without_calibration(random_module("birds", luca_weight=3.0))
    assert module.standardisation is not None
    (module.standardisation.scale_D if weight == "input scale" else module.head.scale).fill_(3e38)
    assert not module.logits(module.statistics.mean_KD).isfinite().all()
    with pytest.raises(InvalidModule):
        check_module(read_module(module_bytes(module)), backbone_manifest())
