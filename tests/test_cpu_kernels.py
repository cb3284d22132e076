"""The C kernels: against float64, row by row, across instruction sets, under sanitizers, and called wrongly."""

import platform
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from engine.block_weights import BLOCK, DenseWeight, Q4Affine, Q8Symmetric, Weight, quantize_q4
from engine.kernels import cpu_build
from engine.kernels.cpu_build import CpuKernelsUnavailableError, build_library, compile_to, find_compiler
from engine.kernels.cpu_native import NativeArena, NativeLinear, NativeMatrix, NativeThreads, to_q8

SHAPES = [(1, 32), (16, 32), (17, 64), (50, 96), (33, 576), (200, 160)]
DIGEST_MAIN = Path(__file__).with_name("cpu_kernels_main.c")


@pytest.fixture(scope="module")
def threads() -> NativeThreads:
    try:
        return NativeThreads(2)
    except CpuKernelsUnavailableError as error:
        pytest.skip(str(error))


def random_weight(kind: str, n: int, k: int) -> Weight:
    values = torch.randn(n, k) * torch.rand(n, 1)
    return quantize_q4(values) if kind == "q4" else to_q8(DenseWeight(values))


def reference(weight: Weight, x: Tensor) -> Tensor:
    """The same product in float64: activations rounded to int8 in blocks of 32, as the kernels round them."""
    blocks = x.reshape(len(x), -1, BLOCK)
    largest = blocks.abs().amax(dim=-1, keepdim=True)
    codes = (blocks * torch.where(largest > 0, 127 / largest, 0)).round()
    rounded = codes.double() * (largest.double() / 127)
    return rounded.flatten(1) @ weight.dequantize().double().T


@pytest.mark.parametrize("kind", ["q4", "q8"])
@pytest.mark.parametrize(("n", "k"), SHAPES)
@pytest.mark.parametrize("rows", [1, 3, 16, 37, 81])
def test_linear_matches_float64(threads: NativeThreads, kind: str, n: int, k: int, rows: int) -> None:
    weight, x = random_weight(kind, n, k), torch.randn(rows, k) * 3
    x[0, :BLOCK] = 0
    y = NativeLinear.from_weight(threads, weight)(x)
    expected = reference(weight, x)
    assert (y.double() - expected).abs().max() <= 2e-6 * k**0.5 * expected.abs().max().clamp(min=1)


@pytest.mark.parametrize("kind", ["q4", "q8"])
def test_rounded_activations_keep_the_product(threads: NativeThreads, kind: str) -> None:
    weight, x = random_weight(kind, 512, 1536), torch.randn(8, 1536)
    exact = x.double() @ weight.dequantize().double().T
    y = NativeLinear.from_weight(threads, weight)(x).double()
    assert (y - exact).norm() / exact.norm() < 0.01


@pytest.mark.parametrize("kind", ["q4", "q8"])
@pytest.mark.parametrize("k", [64, 576])
def test_rows_do_not_depend_on_their_neighbours(threads: NativeThreads, kind: str, k: int) -> None:
    linear = NativeLinear.from_weight(threads, random_weight(kind, 96, k))
    x = torch.randn(100, k) * torch.logspace(-3, 3, 100).unsqueeze(1)
    alone = torch.cat([linear(x[row : row + 1]) for row in range(100)])
    for rows in range(2, 101):
        assert torch.equal(linear(x[:rows]), alone[:rows]), rows
    order = torch.randperm(100)
    assert torch.equal(linear(x[order]), alone[order])


def test_packing_keeps_every_value() -> None:
    weights = [random_weight("q4", 37, 96), random_weight("q8", 50, 64)]
    arena = NativeArena(weights)
    for weight in weights:
        order = torch.randperm(weight.shape[0])
        matrix = NativeMatrix(arena, weight)  # type: ignore[arg-type]
        assert torch.equal(matrix.rows(order), weight.dequantize()[order])


def test_argmax_and_top_k_prefer_the_first_of_equals(threads: NativeThreads) -> None:
    codes = torch.randint(-3, 4, (203, 32), dtype=torch.int8)
    codes[150] = codes[7]
    weight = Q8Symmetric(codes, torch.ones(203, 1).half())
    x = torch.cat([codes[7:8].float(), torch.randn(9, 32)])
    linear = NativeLinear.from_weight(threads, weight)
    y = linear(x)
    by_value = y.sort(dim=-1, descending=True, stable=True)
    values, indices = threads.top_k(y, 10)
    assert torch.equal(values, by_value.values[:, :10]) and torch.equal(indices, by_value.indices[:, :10])
    assert linear.argmax(x) == by_value.indices[:, 0].tolist()


@pytest.mark.parametrize("k", [1, 5, 64, 100])
def test_top_k_of_every_length(threads: NativeThreads, k: int) -> None:
    x = torch.randint(0, 50, (7, 100)).float()
    values, indices = threads.top_k(x, k)
    expected = x.sort(dim=-1, descending=True, stable=True)
    assert torch.equal(values, expected.values[:, :k]) and torch.equal(indices, expected.indices[:, :k])


def test_threads_do_not_change_a_bit() -> None:
    weight, x = random_weight("q4", 333, 128), torch.randn(20, 128)
    counts = [NativeLinear.from_weight(_threads(count), weight)(x) for count in (1, 2, 5)]
    assert torch.equal(counts[0], counts[1]) and torch.equal(counts[0], counts[2])


def _threads(count: int) -> NativeThreads:
    try:
        return NativeThreads(count)
    except CpuKernelsUnavailableError as error:
        pytest.skip(str(error))


def test_wrong_calls_raise(threads: NativeThreads) -> None:
    weight = random_weight("q4", 32, 64)
    assert isinstance(weight, Q4Affine)
    linear = NativeLinear.from_weight(threads, weight)
    with pytest.raises(ValueError, match=r"shape \(3, 64\)"):
        linear(torch.zeros(3, 32))
    with pytest.raises(ValueError, match="k is 9"):
        threads.top_k(torch.zeros(2, 8), 9)
    with pytest.raises(ValueError, match=r"torch\.float32"):
        threads.top_k(torch.zeros(2, 8, dtype=torch.float64), 2)
    with pytest.raises(ValueError, match="contiguous"):
        threads.top_k(torch.zeros(8, 2).T, 2)
    with pytest.raises(IndexError, match="32"):
        linear.matrix.rows(torch.tensor([32]))
    with pytest.raises(ValueError, match="does not fit"):
        NativeMatrix(linear.matrix.arena, weight)
    with pytest.raises(ValueError, match="shape"):
        NativeMatrix(NativeArena([weight]), Q4Affine(weight.codes, weight.scale[:, :1], weight.minimum))
    with pytest.raises(CpuKernelsUnavailableError, match="65 threads"):
        NativeThreads(65)


@pytest.fixture
def fresh_build(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.setenv("MEDUSA_CACHE", str(tmp_path))
    build_library.cache_clear()
    yield tmp_path
    build_library.cache_clear()


def test_a_machine_without_compiler_gets_the_reason(fresh_build: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setenv("PATH", "")
    monkeypatch.setattr(cpu_build.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(CpuKernelsUnavailableError, match="install gcc or clang"):
        build_library()


def test_a_compiler_that_fails_leaves_nothing_behind(fresh_build: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    compiler = fresh_build / "broken-cc"
    compiler.write_text('#!/bin/sh\n[ "$1" = --version ] && exit 0\necho "no such header" >&2\nexit 1\n')
    compiler.chmod(0o755)
    monkeypatch.setenv("CC", str(compiler))
    with pytest.raises(CpuKernelsUnavailableError, match="no such header"):
        build_library()
    assert [path.name for path in fresh_build.iterdir()] == ["broken-cc"]


def test_an_unwritable_cache_is_named(fresh_build: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (fresh_build / "file").touch()
    monkeypatch.setenv("MEDUSA_CACHE", str(fresh_build / "file" / "below"))
    with pytest.raises(CpuKernelsUnavailableError, match="MEDUSA_CACHE"):
        build_library()


def test_sources_decide_the_name(threads: NativeThreads, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    compiler = find_compiler()
    before = cpu_build._fingerprint(compiler)
    for path in cpu_build.SOURCES.glob("*.[ch]"):
        (tmp_path / path.name).write_bytes(path.read_bytes())
    monkeypatch.setattr(cpu_build, "SOURCES", tmp_path)
    assert cpu_build._fingerprint(compiler) == before
    (tmp_path / "api.c").write_text((tmp_path / "api.c").read_text() + "\n")
    assert cpu_build._fingerprint(compiler) != before


def digest(folder: Path, *flags: str, threads: int = 1) -> str:
    """Build the random decoder with `flags`, run it, and return what it printed of its bits."""
    program = folder / "main"
    try:
        compile_to(program, find_compiler(), ("-w", *flags), [DIGEST_MAIN])
    except CpuKernelsUnavailableError as error:
        pytest.skip(str(error))
    done = subprocess.run([program, str(threads)], capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    found = re.search(r"digest ([0-9a-f]{16})", done.stdout)
    assert found, done.stdout
    return found.group(1)


def _has_cpu_flags(*names: str) -> bool:
    try:
        flags = Path("/proc/cpuinfo").read_text().split()
    except OSError:
        return False
    return all(name in flags for name in names)


PATHS = {
    "AVX512 VNNI": (("-DWITHOUT_AMX",), ("avx512_vnni",)),
    "AVX512": (("-march=skylake-avx512",), ("avx512bw", "avx512dq", "avx512vl")),
    "AVX2 with VNNI": (("-march=alderlake",), ("avx_vnni",)),
    "AVX2": (("-march=haswell",), ("avx2", "fma", "f16c")),
    "portable": (("-march=haswell", "-DONLY_PORTABLE"), ("fma",)),
}


@pytest.mark.slow
@pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="names x86 instruction sets")
def test_all_instruction_sets_give_the_same_bits(threads: NativeThreads, tmp_path: Path) -> None:
    found = {"native": digest(tmp_path, threads=3)}
    for name, (flags, needs) in PATHS.items():
        if _has_cpu_flags(*needs):
            found[name] = digest(tmp_path, *flags)
    assert len(found) > 1 and len(set(found.values())) == 1, found


@pytest.mark.slow
@pytest.mark.parametrize("sanitizer", ["address,undefined", "thread"])
def test_sanitizers_find_nothing(threads: NativeThreads, tmp_path: Path, sanitizer: str) -> None:
    flags = (f"-fsanitize={sanitizer}", "-fno-sanitize-recover=all", "-O1", "-g")
    assert digest(tmp_path, *flags, threads=3) == digest(tmp_path)
