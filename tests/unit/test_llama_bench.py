"""The bench against llama.cpp: what is read from its programs, how rounds are summed up, what is said where it cannot run."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from studio_state.errors import StudioError, Unavailable
from workers.bench import llama_build, llama_cpp
from workers.bench.llama_build import Timing
from workers.bench.plan import Plan

TIMED = """[
  {"build_commit": "0c1e57098", "n_threads": 2, "flash_attn": 0, "n_gen": 8, "n_depth": 4, "avg_ts": 110.0,
   "samples_ns": [ 80000000, 66666667 ], "samples_ts": [ 100, 120 ] },
  {"build_commit": "0c1e57098", "n_threads": 2, "flash_attn": 1, "n_gen": 8, "n_depth": 4, "avg_ts": 90.5,
   "samples_ns": [ 88888889, 87912088 ], "samples_ts": [ 90, 91.0 ] }
]"""
LOADED = """load_tensors: loading model tensors, this can take a while... (mmap = true)
load_tensors:   CPU_Mapped model buffer size =    83.50 MiB
load_tensors:   CPU_REPACK model buffer size =   56.95 MiB
"""
COMPILED = [
    {"file": "/s/ggml/src/ggml.c", "command": "cc -O0 -c ggml.c"},
    {
        "file": "/s/ggml/src/ggml-cpu/repack.cpp",
        "command": "/usr/bin/cc -DGGML_USE_CPU_REPACK -DNDEBUG -D_GNU_SOURCE -I/s/include -fno-dse -O3 -std=gnu++17 -Wall -march=native -fopenmp -o x -c y",
    },
]
ROUNDS = {
    "baseline float32": [50.0, 50.0],
    "rtn:bits=4+lean-decode float32": [150.0, 150.0],
    "baseline bfloat16": [60.0, 60.0],
    "rtn+lean-decode bfloat16": [90.0, 90.0],
    "llama.cpp Q4_1": [100.0, 100.0],
    "llama.cpp Q4_0": [120.0, 120.0],
}


def test_speeds_are_read_from_llama_bench() -> None:
    assert llama_build.timings(TIMED) == [Timing(False, [100.0, 120.0]), Timing(True, [90.0, 91.0])]


def test_the_log_of_loading_tells_what_was_repacked() -> None:
    found = llama_build.buffers(LOADED)
    assert found == {"CPU_Mapped": pytest.approx(83.5 * 1.048576), "CPU_REPACK": pytest.approx(56.95 * 1.048576)}
    assert llama_build.buffers("nothing of the kind") == {}


def test_a_build_of_other_options_is_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PARETO_STUDIO_CACHE", str(tmp_path))
    for name in llama_build.TARGETS:
        tool = llama_build.home() / "build" / "bin" / name
        tool.parent.mkdir(parents=True, exist_ok=True)
        tool.touch()
    told = {"flags": "-O3", "compiler": "GNU 12"}
    for options, is_found in ((llama_build.OPTIONS, True), (("GGML_NATIVE=OFF",), False), (None, False)):
        written = {**told, "options": options} if options else told
        (llama_build.home() / "built.json").write_text(json.dumps(written), encoding="utf-8")
        assert (llama_build.found() is not None) == is_found


def test_flags_are_those_of_the_packed_products() -> None:
    assert llama_build.flags(json.dumps(COMPILED)) == "-DGGML_USE_CPU_REPACK -DNDEBUG -fno-dse -O3 -march=native -fopenmp"
    with pytest.raises(StudioError, match=r"CMake lists no ggml-cpu/repack\.cpp"):
        llama_build.flags(json.dumps(COMPILED[:1]))


def test_the_compiler_is_what_cmake_found() -> None:
    notes = 'set(CMAKE_CXX_COMPILER "/usr/bin/c++")\nset(CMAKE_CXX_COMPILER_ID "GNU")\nset(CMAKE_CXX_COMPILER_VERSION "12.2.0")\n'
    assert llama_build.compiler(notes) == "GNU 12.2.0"
    assert llama_build.compiler("") == "compiler unknown"


def test_lanes_are_held_against_the_fastest_of_either_side() -> None:
    found = llama_cpp.result(ROUNDS)
    assert (found.llama, found.baseline) == ("llama.cpp Q4_0", "baseline bfloat16")
    assert {n: (lane.median, lane.to_llama.value, lane.to_baseline.value) for n, lane in found.lanes.items()} == {
        "rtn:bits=4+lean-decode float32": (150.0, 1.25, 2.5),
        "rtn+lean-decode bfloat16": (90.0, 0.75, 1.5),
    }


def test_pairs_are_the_values_of_one_round() -> None:
    slower = [1.0, 0.5, 0.25, 0.8]  # a machine that is slower for all in some rounds
    lane = llama_cpp.result({n: [v[0] * s for s in slower] for n, v in ROUNDS.items()}).lanes["rtn+lean-decode bfloat16"]
    assert (lane.to_llama.value, lane.to_llama.n) == (pytest.approx(0.75), 4)
    assert (lane.to_llama.low, lane.to_llama.high) == (pytest.approx(0.75), pytest.approx(0.75))


def test_each_process_is_first_once() -> None:
    orders = [llama_cpp.rotated([dict, list, set], n) for n in range(4)]  # type: ignore[list-item]
    assert orders == [[dict, list, set], [list, set, dict], [set, dict, list], [dict, list, set]]


def test_the_last_line_is_the_result_as_json(capsys: pytest.CaptureFixture[str]) -> None:
    llama_cpp.tell(Plan("m", 2, pairs=2), "llama.cpp X: -O3", ROUNDS)
    lines = capsys.readouterr().out.splitlines()
    assert "rtn:bits=4+lean-decode float32 / llama.cpp Q4_0: 1.250 [1.250, 1.250], n = 2" in lines
    told = json.loads(lines[-1])
    assert (told["bench"], told["build"], told["fastest_llama"]) == ("llama-cpp", "llama.cpp X: -O3", "llama.cpp Q4_0")
    assert told["lanes"]["rtn+lean-decode bfloat16"]["to_baseline"] == {"value": 1.5, "low": 1.5, "high": 1.5, "n": 2}


def test_where_it_cannot_run_a_sentence_says_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PARETO_STUDIO_CACHE", str(tmp_path))
    assert "builds it once" in llama_cpp.why_left_out()
    with pytest.raises(Unavailable, match=r"austen-target is none; give a \.gguf file, or smollm2-135m, with --model"):
        llama_build.model_file("austen-target")
    monkeypatch.setenv("CXX", "no-such-compiler -m64")
    with pytest.raises(Unavailable, match=r"has no no-such-compiler; install a C and C\+\+ compiler"):
        llama_build.build(print)
    assert not list(tmp_path.iterdir())
