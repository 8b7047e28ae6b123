"""The CUDA backend where there is no GPU: its kernels over an emulation of CUDA, and the compiler's
word on them. The tests of the loss run on it too, as the capability "emulated_cuda"."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from support import backends
from support.problems import Problem, random_problem, relative_error, row_errors, solve, truth
from torch._subclasses.fake_tensor import FakeTensorMode

from unicom_ext import PartialMarginSoftmax, functional
from unicom_ext.margins import ArcFace, CombinedMargin
from unicom_ext.ops import library

CUDA_HOME = Path(os.environ.get("CUDA_HOME", "/usr/local/cuda"))
NVCC = shutil.which("nvcc", path=str(CUDA_HOME / "bin")) or shutil.which("nvcc")
# Of the toolkit, or of the wheel nvidia-cuda-nvdisasm.
DISASSEMBLERS = (CUDA_HOME / "bin", *Path(torch.__path__[0]).parent.glob("nvidia/*/bin"))
NVDISASM = shutil.which("nvdisasm", path=os.pathsep.join(map(str, DISASSEMBLERS)))
CSRC = backends.ROOT / "csrc"
KERNELS = sorted((CSRC / "cuda" / "kernels").glob("*.cu"))
BINDING = sorted(path for room in ("bind/cuda", "cuda/host", "cuda/kernels")
                 for path in (CSRC / room).glob("*.cpp"))  # fmt: skip
op = functional.partial_margin_softmax

needs_nvcc = pytest.mark.skipif(NVCC is None, reason="nvcc was not found: kernels not compiled")


@pytest.mark.first
@pytest.mark.slow
@pytest.mark.parametrize("part", ["loss", "tiles", "search", "rows"])
def test_kernels_under_sanitizers(part):
    """Every kernel on awkward sizes beside the CPU backend, under AddressSanitizer and
    UndefinedBehaviorSanitizer, in two orders of the threads."""
    program = backends.build_emulation("sanitized")
    done = subprocess.run([str(program), part], capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr[-4000:]
    assert done.stdout == "all the same\n"


# --- what only happens on GPUs


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_a_label_that_is_no_class_poisons_its_loss_only(reduction, emulated):
    problem = random_problem(40, 131, 37, reduction="none")
    labels = problem.labels.clone()
    labels[[3, 20]] = torch.tensor([131, -7])
    poisoned = Problem(problem.embeddings, labels, problem.prototypes, problem.options)
    good = torch.ones(40, dtype=torch.bool)
    good[[3, 20]] = False
    got = solve(op, poisoned.having(reduction=reduction))
    assert got.loss.isnan().any()
    if reduction == "none":
        assert torch.equal(got.loss.isnan(), ~good)
    if reduction != "mean":
        ignored = Problem(
            problem.embeddings, labels.masked_fill(~good, -100), problem.prototypes, problem.options
        )
        right = truth(ignored.having(reduction=reduction))
        assert relative_error(got.grad_embeddings, right.grad_embeddings) < 1e-5
        assert relative_error(got.grad_prototypes, right.grad_prototypes) < 1e-5
    assert got.grad_embeddings.isfinite().all()
    assert not got.grad_embeddings[~good].any()


def test_a_bad_label_is_named_when_values_are_checked(emulated):
    loss_fn = PartialMarginSoftmax(8, 50, sample_rate=0.5, check_inputs=True)
    labels = torch.tensor([1, 2, 99])
    with pytest.raises(ValueError, match=r"labels must be in \[0, 50\) .* got 99 at position 2"):
        loss_fn(torch.randn(3, 8), labels)
    assert int(loss_fn.step) == 0
    loss_fn.check_inputs = False
    assert loss_fn(torch.randn(3, 8), labels).isnan()
    assert loss_fn(torch.randn(3, 8), torch.tensor([1, 2, 49])).isfinite()


def test_no_memory_is_torch_s_error_of_no_memory(emulated):
    # So many classes, which all lie on one row, that the packed ones have no place anywhere.
    prototypes = torch.ones(1, 1 << 14).expand((1 << 32) - 1, 1 << 14)
    with pytest.raises(torch.OutOfMemoryError, match=r"CUDA out of memory\. .* allocate Byte \["):
        op(
            torch.ones(3, 1 << 14),
            torch.tensor([1, 2, 3]),
            prototypes,
            margin=CombinedMargin(),
            scale=1,
        )


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_probabilities_of_a_million_classes_keep_their_digits(precision, emulated):
    # A few classes hold nearly all of the probability, and the others about a millionth each, as
    # among a million classes; the batch divides by 8192. Plain halves would hold 1e-6 with two
    # digits and 1e-6 * 64 / 8192 as zero.
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(16, 64, generator=generator)
    w = torch.randn(700, 64, generator=generator)
    w[0] = x.mean(0)
    w[1:] -= (w[1:] @ w[0])[:, None] * w[0] / w[0].square().sum()
    x = w[0] + 0.2 * x
    problem = Problem(
        x, torch.ones(16, dtype=torch.int64), w,
        {"margin": CombinedMargin(), "scale": 15.0, "precision": precision, "reduction": "sum"},
        torch.tensor(1 / 8192),
    )  # fmt: skip
    got, right = solve(op, problem), truth(problem)
    small = right.grad_prototypes[2:].norm(dim=1)
    assert 1e-9 < small.median() * w.norm(dim=1).median() / 15 * 8192 / 16 < 3e-5
    errors = row_errors(got.grad_prototypes, right.grad_prototypes)[2:]
    assert errors.max() < (0.02 if precision == "fp16" else 0.12)


@pytest.mark.parametrize("upstream", [2.0**16, 1e-20])
def test_gradients_do_not_overflow_halves(upstream, emulated):
    # GradScaler's factor, and the opposite.
    problem = random_problem(33, 131, 37, closeness=1.0, precision="fp16")
    plain = solve(op, problem)
    scaled = solve(op, Problem(problem.embeddings, problem.labels, problem.prototypes,
                               problem.options, torch.tensor(upstream)))  # fmt: skip
    for a, b in zip(scaled[1:], plain[1:], strict=True):
        assert relative_error(a.double() / upstream, b) < 1e-5


# Kernels that all GPUs have, and those for Hopper: a compute capability and dimensions.
PATHS = {"general": (8, 70), "attention": (9, 70), "wide attention": (9, 250), "chunks": (9, 320)}


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_each_embedding_is_as_exact_at_any_share(precision, path, emulated):
    """What the others' upstream gradients are is nothing to a sample's."""
    capability, dim = PATHS[path]
    problem = random_problem(40, 150, dim, closeness=0.5, precision=precision, reduction="none")
    with backends.emulating(compute_capability=capability):
        alone = solve(op, replace(problem, upstream=torch.ones(40))).grad_embeddings
        upstream = torch.logspace(-6, 6, 40) * (-1) ** torch.arange(40)
        together = solve(op, replace(problem, upstream=upstream)).grad_embeddings
    assert row_errors(together / upstream[:, None], alone).max() < 1e-6


@pytest.mark.parametrize(
    ("path", "share"),
    [(path, -1e-8) for path in PATHS] + [("attention", 1e-20), ("wide attention", 1e-20)],
)
def test_prototypes_that_only_light_samples_see(path, share, emulated):
    """Half of the samples have a small share of the upstream gradient, and half of the classes are
    near these alone. What is summed chunk by chunk ends in halves at 1e-11 of the largest."""
    capability, dim = PATHS[path]
    generator = torch.Generator().manual_seed(0)
    side = torch.linalg.qr(torch.randn(dim, 2, generator=generator))[0].T * 2 * dim**0.5
    x = torch.randn(2, 30, dim, generator=generator) + side[:, None]
    w = torch.randn(2, 60, dim, generator=generator) + side[:, None]
    labels = torch.arange(30) + torch.tensor([[0], [60]])
    upstream = torch.tensor([1.0, share]).repeat_interleave(30)
    problem = Problem(x.flatten(0, 1), labels.flatten(), w.flatten(0, 1),
                      {"margin": ArcFace(0.3), "scale": 64.0, "precision": "fp16",
                       "reduction": "none"}, upstream)  # fmt: skip
    with backends.emulating(compute_capability=capability):
        got = solve(op, problem)
    errors = row_errors(got.grad_prototypes, truth(problem).grad_prototypes)
    assert errors.max() < 0.02


@pytest.mark.emulated
def test_twenty_steps_draw_what_the_cpu_draws(monkeypatch):
    labels = torch.randint(0, 1000, (32,), generator=torch.Generator().manual_seed(0))
    drawn = {}
    for backend in ("cpu", "emulated_cuda"):
        with monkeypatch.context() as patch:
            if backend != "cpu":
                backends.use(patch, backend)
            loss_fn = PartialMarginSoftmax(16, 1000, sample_rate=0.1, feature_rate=0.5, seed=5)
            drawn[backend] = []
            for _ in range(20):
                loss_fn(torch.randn(32, 16), labels)
                drawn[backend].append(loss_fn.last_selection)
    for a, b in zip(drawn["cpu"], drawn["emulated_cuda"], strict=True):
        assert torch.equal(a.class_index, b.class_index)
        assert torch.equal(a.feature_index, b.feature_index)


@pytest.mark.parametrize("precision", [0, 1, 2])
@pytest.mark.parametrize("centers", [1, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_shapes_for_the_compiler_are_those_of_the_operator(precision, centers, dtype, emulated):
    problem = random_problem(33, 131, 70, sampled=80, features=65, dtype=dtype, num_centers=centers)
    classes, features = problem.options["class_index"], problem.options["feature_index"]
    slot = torch.searchsorted(classes, problem.labels)
    tensors = (
        problem.embeddings,
        slot,
        problem.prototypes,
        classes,
        None,
        features,
        None,
        None,
        None,
    )
    codes = [False, False, precision, 1, 0, 1 << 20, False, centers, True]
    options = [1.0, 0.3, 0.0, 64.0, 2.0, 0.0], codes
    real = library.ops.loss(*tensors, *options)
    with FakeTensorMode():
        fake = torch.ops.unicom_ext.loss(
            *(t if t is None else torch.empty(t.shape, dtype=t.dtype, device="cuda")
              for t in tensors),
            *options,
        )  # fmt: skip
    for a, b in zip(real, fake, strict=True):
        assert a.shape == b.shape
        assert a.dtype == b.dtype


# --- the compiler


def test_the_sources_are_found():
    """A pattern that fits no file would compile nothing, and pass."""
    emulated = (backends.ROOT / "tests" / "emulation" / "kernels.cpp").read_text()
    assert KERNELS
    assert {path.name for path in KERNELS} == set(re.findall(r"cuda/kernels/(\w+\.cu)", emulated))
    assert len({path.parent for path in BINDING}) == 3


def compile_kernels(path: Path, out: Path) -> tuple[str, str]:
    """ptxas' report on one file, and whatever else the compiler said, for the lowest architecture
    that it is for: it has what later ones have, and they have no fewer registers. What runs on the
    host is compiled with the emulation."""
    lowest = "90a" if path.stem.endswith("_hopper") else "80"
    command = [
        NVCC, "-std=c++20", "-O3", "-cubin", str(path), "-o", str(out / f"{path.stem}.cubin"),
        "-gencode", f"arch=compute_{lowest},code=sm_{lowest}",
        "-Xptxas", "-v,-warn-spills", "-Werror", "all-warnings",
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, f"{path.name}:\n{done.stdout}{done.stderr}"
    return done.stdout + done.stderr, path.name


def demangled(name: str) -> str:
    """The kernel's name with its template arguments."""
    full = subprocess.run(["c++filt", name], capture_output=True, text=True, check=True).stdout
    full = full.replace("(anonymous namespace)::", "").replace("unicom::cuda::", "")
    return re.search(r"\w+_kernel(<.*>)?(?=\()", full)[0]


@pytest.mark.first
@pytest.mark.slow
@needs_nvcc
def test_kernels_compile_without_warnings_and_spills(tmp_path, record_property):
    with ThreadPoolExecutor(2) as pool:
        reports = list(pool.map(lambda path: compile_kernels(path, tmp_path), KERNELS))
    table = []
    for report, name in reports:
        # What the compiler has to give up, such as the asynchrony of wgmma, is no warning to it.
        assert not re.search(r"\(C7\d+\)", report), report
        entries = re.split(r"(?=Compiling entry function)", report)[1:]
        assert entries, name
        for entry in entries:
            kernel, target = re.match(r"Compiling .*? '(\S+)' for '(\S+)'", entry).groups()
            spills = re.search(r"(\d+) bytes spill stores, (\d+) bytes spill loads", entry)
            registers = re.search(r"Used (\d+) registers", entry)[1]
            shared = re.search(r"(\d+) bytes smem", entry)
            assert spills.groups() == ("0", "0"), f"{kernel} spills on {target}: {spills[0]}"
            kernel = demangled(kernel)
            table.append((name, target, registers, shared[1] if shared else "0", kernel))
    lines = [f"{'registers':>9} {'static shared':>13}  kernel"]
    for name, target, registers, shared, kernel in sorted(table):
        lines.append(f"{registers:>9} {shared:>13}  {name} {target} {kernel}")
    record_property("summary", "\n".join(lines))


@pytest.mark.slow
@needs_nvcc
@pytest.mark.skipif(NVDISASM is None, reason="nvdisasm was not found: machine code not read")
def test_the_machine_code_for_hopper_is_hopper_s(tmp_path):
    for source in (path for path in KERNELS if path.stem.endswith("_hopper")):
        cubin = tmp_path / "kernels.cubin"
        subprocess.run([NVCC, "-std=c++20", "-O3", "-cubin", str(source), "-o", str(cubin),
                        "-gencode", "arch=compute_90a,code=sm_90a"], check=True)  # fmt: skip
        code = subprocess.run([NVDISASM, "-c", str(cubin)], capture_output=True, text=True)
        kernels = re.split(r"(?=\.section\s+\.text\.)", code.stdout)[1:]
        assert kernels
        for kernel in kernels:
            found = set(re.findall(r"\b(HGMMA|UTMALDG|HMMA|LDGSTS|LDSM|LDL|STL)\b", kernel))
            assert found == {"HGMMA", "UTMALDG"}, kernel.splitlines()[0]
            # Nothing in the main loop waits for memory or gives up the first-level cache.
            loop = kernel[kernel.index("HGMMA") : kernel.rindex("HGMMA")]
            assert not re.search(r"MEMBAR|CCTL", loop), kernel.splitlines()[0]


@pytest.mark.slow
@needs_nvcc
def test_the_binding_compiles(tmp_path):
    torch_include = Path(torch.__path__[0]) / "include"
    for source in BINDING:
        command = [
            "c++", "-std=c++20", "-fsyntax-only", "-Wall", "-Wextra", "-Werror",
            "-DUSE_CUDA", "-DTORCH_TARGET_VERSION=0x020b000000000000",
            "-isystem", str(CUDA_HOME / "include"), "-isystem", str(torch_include),
            str(source),
        ]  # fmt: skip
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
