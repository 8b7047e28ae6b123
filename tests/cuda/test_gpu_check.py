"""What `make gpu-check` leaves behind, however it ends."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
import tarfile
import textwrap
import time
from dataclasses import replace
from pathlib import Path

import gpu_check
import pytest
from gpu_check import Command, Stage

pytestmark = pytest.mark.slow  # programs that it starts

BENCHMARKS = Path(gpu_check.__file__).parent


def says(name: str, code: str, seconds: float = 20) -> Stage:
    return Stage(name, seconds, (Command((sys.executable, "-c", code)),))


GOOD = says("good", "print('all is well')")
BAD = says("bad", "print('this is why'); raise SystemExit(3)")
SLOW = says("slow", "print('so far'); import time; time.sleep(60)", 1)


def packed(output: Path) -> tuple[dict, dict[str, str]]:
    """The record and every file of the archive."""
    with tarfile.open(output / "gpu-check.tar.gz") as archive:
        files = {m.name: archive.extractfile(m).read().decode() for m in archive.getmembers()}
    return json.loads(files["gpu/gpu-check.json"]), files


def run(tmp_path, first, stages, minutes=1.0):
    status = gpu_check.run(first, stages, tmp_path / "results", tmp_path / "out", minutes)
    return status, *packed(tmp_path / "out")


def statuses(record):
    return {stage["name"]: stage["status"] for stage in record["stages"]}


def test_a_stage_that_fails_or_takes_too_long_does_not_stop_the_others(tmp_path, capsys):
    status, record, files = run(tmp_path, GOOD, [BAD, SLOW, says("last", "print('the end')")])
    assert status == 1
    assert statuses(record) == {
        "good": 0, "bad": 3, "slow": "stopped: its time was over", "last": 0,
    }  # fmt: skip
    assert record["ended"] == "all stages"
    assert files["gpu/bad.log"].endswith("this is why\n")
    assert files["gpu/slow.log"].endswith("so far\n")
    assert record["stages"][3]["last_line"] == "the end"
    said = capsys.readouterr().out
    assert "this is why" in said
    assert said.endswith("failed: bad, slow\n")
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["gpu-check.tar.gz"]


@pytest.mark.parametrize(("tried", "seen"), [(GOOD, "on"), (BAD, "off"), (SLOW, "off")])
def test_what_fails_is_not_used_by_the_stages_that_follow(tmp_path, monkeypatch, tried, seen):
    monkeypatch.setenv("SOME_KERNELS", "on")
    tried = replace(tried, otherwise={"SOME_KERNELS": "off"})
    after = says("after", "import os; print(os.environ['SOME_KERNELS'])")
    _, record, _ = run(tmp_path, None, [tried, after, replace(after, name="later")])
    assert [stage["last_line"] for stage in record["stages"][1:]] == [seen, seen]


def test_when_all_passes(tmp_path, capsys):
    status, record, _ = run(tmp_path, None, [GOOD])
    assert status == 0
    assert capsys.readouterr().out.endswith("all stages passed\n")
    assert set(record["machine"]) >= {"gpu", "torch", "commit", "sources", "nvcc"}


def test_without_a_build_nothing_else_is_tried(tmp_path):
    status, record, _ = run(tmp_path, BAD, [GOOD])
    assert status == 1
    assert statuses(record) == {"bad": 3}
    assert record["ended"] == "bad failed"


def test_a_build_without_cuda_is_no_build(tmp_path):
    build = Stage("build", 20, GOOD.commands, lambda: "they were built without CUDA")
    status, record, _ = run(tmp_path, build, [GOOD])
    assert status == 1
    assert statuses(record) == {"build": "they were built without CUDA"}


def test_all_its_time_is_over(tmp_path):
    status, record, _ = run(
        tmp_path, None, [says("long", SLOW.commands[0].words[2], 60), GOOD], 0.03
    )
    assert status == 1
    assert statuses(record) == {
        "long": "stopped: its time was over", "good": "left out: no time is left",
    }  # fmt: skip


def test_a_tool_that_is_missing(tmp_path):
    _, record, _ = run(tmp_path, None, [Stage("tool", 5, (Command(("no-such-tool",)),)), GOOD])
    assert statuses(record) == {"tool": "no-such-tool was not found", "good": 0}


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL], ids=str)
def test_a_signal_in_the_middle(number, tmp_path):
    """What the running stage has written so far is there too."""
    script = f"""
        import sys
        sys.path.insert(0, {str(BENCHMARKS)!r})
        import gpu_check
        from pathlib import Path
        from gpu_check import Command, Run, Stage
        Run.every = 0.1
        tmp_path, python = Path({str(tmp_path)!r}), sys.executable
        long = '''
        import pathlib, subprocess, sys, time
        pathlib.Path(sys.argv[1], "shape.json").write_text("1")
        print("half", flush=True)
        child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
        pathlib.Path(sys.argv[1], "child").write_text(str(child.pid))
        time.sleep(60)
        '''.replace("\\n        ", "\\n")
        stages = [Stage("good", 20, (Command((python, "-c", "print(1)")),)),
                  Stage("long", 60, (Command((python, "-c", long, str(tmp_path / "results"))),)),
                  Stage("never", 20, (Command((python, "-c", "")),))]
        sys.exit(gpu_check.run(None, stages, tmp_path / "results", tmp_path / "out", 1.0))
        """
    process = subprocess.Popen([sys.executable, "-c", textwrap.dedent(script)])
    try:
        deadline = time.monotonic() + 60
        while True:
            assert time.monotonic() < deadline
            time.sleep(0.1)
            if (tmp_path / "out" / "gpu-check.tar.gz").exists():
                record, files = packed(tmp_path / "out")
                if "gpu/child" in files and "half" in files["gpu/long.log"]:
                    break
        process.send_signal(number)
        assert process.wait(20) == (143 if number == signal.SIGTERM else -signal.SIGKILL)
        record, files = packed(tmp_path / "out")
        cut = "cut: SIGTERM" if number == signal.SIGTERM else "running"
        assert statuses(record) == {"good": 0, "long": cut}
        assert files["gpu/shape.json"] == "1"
        child = Path(f"/proc/{int(files['gpu/child'])}")
        if number == signal.SIGTERM:
            assert record["ended"] == "by SIGTERM"
            assert not child.exists() or "(zombie)" in (child / "status").read_text()
    finally:
        process.kill()
        for left in (tmp_path / "results").glob("child"):
            subprocess.run(["kill", left.read_text()], check=False, stderr=subprocess.DEVNULL)


# ---- what is planned


def chosen(monkeypatch, tmp_path, *arguments):
    """What a command line would run: the build or None, and the stages."""
    ran = []
    monkeypatch.setattr(gpu_check, "run", lambda *given: ran.append(given) or 0)
    assert gpu_check.main([*arguments, "--output", str(tmp_path)]) == 0
    first, planned, _results, output, minutes = ran[0]
    assert output == tmp_path
    return first and first.name, [stage.name for stage in planned], minutes


def test_stages_are_chosen_by_name(monkeypatch, tmp_path, capsys):
    names = [stage.name for stage in gpu_check.stages()]
    assert chosen(monkeypatch, tmp_path) == ("build", names, 8)
    assert chosen(monkeypatch, tmp_path, "--only", "loss", "doctor")[:2] == (
        "build", ["doctor", "loss"],
    )  # fmt: skip
    first, later, minutes = chosen(monkeypatch, tmp_path, "--from", "racecheck", "--minutes", "4")
    assert (first, minutes) == ("build", 4)
    assert later == names[names.index("racecheck") :]
    with pytest.raises(SystemExit):
        gpu_check.main(["--only", "speed"])
    assert "invalid choice: 'speed'" in capsys.readouterr().err


def test_the_first_call_fits_its_eight_minutes():
    planned = [gpu_check.build(), *gpu_check.stages()]
    names = [stage.name for stage in planned]
    assert sum(stage.seconds for stage in planned[: names.index("racecheck")]) <= 8 * 60
    assert len(set(names)) == len(names)


def test_kernels_that_take_the_time_are_profiled():
    sources = (gpu_check.ROOT / "csrc" / "cuda" / "kernels").glob("*.cu")
    kernels = {name for path in sources for name in re.findall(r"(\w+_kernel)\(", path.read_text())}
    profiled = {name for name in kernels if re.search(gpu_check.PROFILED, name)}
    products = {"sum_exp_kernel", "probabilities_kernel", "product_kernel"}
    hopper = {name.replace("_kernel", "_hopper_kernel") for name in products}
    # Of float and double operands alone, which the profiled step does not have.
    others = {"unpack_prototypes_kernel", "kept_probabilities_kernel"}
    assert profiled == products | hopper | others


def test_binaries_of_other_sources_are_refused(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(gpu_check, "ROOT", tmp_path)
    monkeypatch.setattr(gpu_check, "PACKAGE", tmp_path)
    monkeypatch.setattr(gpu_check, "BUILT", tmp_path / "built.json")
    (tmp_path / "csrc").mkdir()
    source, binary = tmp_path / "csrc" / "a.cu", tmp_path / "_C_cuda.so"
    (tmp_path / "CMakeLists.txt").write_text("")
    source.write_text("1")
    binary.write_text("binary")
    assert "there is no built.json" in gpu_check.why_not_these_binaries()
    gpu_check.note_what_was_built()
    assert gpu_check.why_not_these_binaries() is None
    source.write_text("2")
    assert "other sources" in gpu_check.why_not_these_binaries()
    source.write_text("1")
    binary.write_text("another")
    assert "_C_cuda.so is not the one" in gpu_check.why_not_these_binaries()
    binary.unlink()
    assert "_C_cuda.so is missing" in gpu_check.why_not_these_binaries()
    monkeypatch.setattr(gpu_check, "stages", lambda: [GOOD])
    with pytest.raises(SystemExit):
        gpu_check.main(["--skip-build"])
    assert "--skip-build: the binaries in unicom_ext cannot be used" in capsys.readouterr().err
