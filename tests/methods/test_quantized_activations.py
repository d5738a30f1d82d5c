"""Activations rounded by group: the codes by hand, the kernel against them, and what it composes with."""

from __future__ import annotations

import copy
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from studio_state.pipeline import parse_pipeline
from tests.methods.driving import attached, forced, generate, make_session, prompt, tokens
from workers.mechanisms import native, packed_rows
from workers.mechanisms.fusing import fuse
from workers.mechanisms.operator_times import kind_of
from workers.mechanisms.packed_linear import Int4Linear, Int8Linear
from workers.mechanisms.packed_rows import FINE_GROUP
from workers.mechanisms.rounded_input import RoundedInput, by_group
from workers.mechanisms.scaled_input import ScaledInput
from workers.mechanisms.sparse_inputs import wrapped
from workers.mechanisms.weight_policy import Spot
from workers.methods import effective
from workers.policies.quantize.quarot import QuaRot
from workers.policies.sparsity.quantized_activations import QuantizedActivations

FORMATS = ["int8", "int4 of 32", "int4 of 64", "int4 of 256"]
KERNEL = pytest.mark.skipif(native.kernels().library is None, reason=native.kernels().told)
FINEST = 127 * 256 + 127  # the largest code of 16 bits: two bytes of which none is beyond 127
SHAPES = [(64, 64), (50, 96), (4100, 32), (1, 32), (3, 4096)]


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def packed(format: str, rows: int, width: int, bias: bool = False) -> Int8Linear | Int4Linear:
    source = nn.Linear(width, rows, bias=bias).requires_grad_(False)
    return Int8Linear.of(source) if format == "int8" else Int4Linear.of(source, int(format.rpartition(" ")[2]))


def test_codes_by_hand() -> None:
    x = torch.tensor([[127.0, -63.5, 0.5, 1.5], [0.0, 0.0, 0.0, 0.0]])
    codes, step = by_group(x, 4)
    assert codes.tolist() == [[[127.0, -64.0, 0.0, 2.0]], [[0.0, 0.0, 0.0, 0.0]]]  # halves go to the even code
    assert step.flatten().tolist() == [1.0, 0.0]
    codes, step = by_group(torch.tensor([[2.0, 0.5, -4.0]]), 2)
    assert codes.flatten().tolist() == [127.0, 32.0, -127.0, 0.0]  # 31.75; the last group is filled up
    assert step.flatten().tolist() == pytest.approx([2 / 127, 4 / 127])


def test_no_input_is_off_by_more_than_half_a_step() -> None:
    x = torch.randn(7, 200) * torch.rand(7, 200).exp()
    module = RoundedInput(wrapped(nn.Linear(200, 5).requires_grad_(False)))
    _, step = by_group(x, module.group)
    off = nn.functional.pad((module.transform(x) - x).abs(), (0, 56)).unflatten(-1, (-1, 64))
    assert (off <= step / 2 * (1 + 1e-5)).all()


@KERNEL
@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("rows", [1, 2, 3, 4, 7, 64])
def test_the_kernel_multiplies_the_codes_with_the_stored_weights(format: str, shape: tuple[int, int], rows: int) -> None:
    group = 32 if format == "int8" else int(format.rpartition(" ")[2])
    module = RoundedInput(packed(format, shape[0], -(-shape[1] // group) * group, bias=True))
    x = torch.randn(rows, module.in_features)
    assert module.product is not None
    exact = module.transform(x.double().float()).double() @ module.matrix().double().T + module.bias.double()
    size = x.double().abs() @ module.matrix().double().abs().T  # what the errors of a sum are measured by
    assert ((module(x) - exact).abs() <= 3e-6 * size + 1e-6).all()
    assert torch.equal(module(x), torch.cat([module(row[None]) for row in x]))  # each row by itself, bit by bit


@KERNEL
@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("rows", [1, 2, 3, 4, 7, 32])
def test_inputs_that_no_policy_rounds_keep_16_bits(format: str, shape: tuple[int, int], rows: int) -> None:
    group = 32 if format == "int8" else int(format.rpartition(" ")[2])
    module = packed(format, shape[0], -(-shape[1] // group) * group, bias=True)
    x, shared = torch.randn(rows, module.in_features), FINE_GROUP if format == "int8" else group
    assert module.product() is not None
    weights = module.matrix().double()
    codes, step = by_group(x, shared, FINEST)
    size = x.double().abs() @ weights.abs().T
    rounded = (codes.double() * step).flatten(-2)[:, : module.in_features] @ weights.T + module.bias.double()  # type: ignore[union-attr]
    assert ((module(x) - rounded).abs() <= 3e-6 * size + 1e-6).all()
    steps = step.expand_as(codes).flatten(-2)[:, : module.in_features].double()
    exact = x.double() @ weights.T + module.bias.double()  # type: ignore[union-attr]
    assert ((module(x) - exact).abs() <= steps / 2 @ weights.abs().T + 3e-6 * size + 1e-6).all()
    assert torch.equal(module(x), torch.cat([module(row[None]) for row in x]))
    moved = copy.deepcopy(module)
    module.codes.zero_() if isinstance(module, Int8Linear) else module.packed.zero_()
    assert not torch.equal(moved(x), module(x))  # a copy reads its own weights


@KERNEL
@pytest.mark.parametrize("group", [32, 256])
@pytest.mark.parametrize("code", [0, 15])
@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_the_largest_sums_of_integers_fit(group: int, code: int, sign: float) -> None:
    grid = torch.stack((torch.ones(2, 64), torch.zeros(2, 64)), -1).bfloat16()
    module = Int4Linear.stored(torch.full((64, 2 * group), code, dtype=torch.uint8), grid, None)
    x = torch.full((2, 2 * group), sign)
    x[1, ::2] = 0.0
    exact = x @ module.matrix().T
    assert (module(x) - exact).abs().max() <= 1e-6 * exact.abs().max()
    assert (RoundedInput(module)(x) - exact).abs().max() <= 1e-6 * exact.abs().max()


@KERNEL
@pytest.mark.parametrize("code", [127, -127])
@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_the_largest_sums_beside_8_bits_fit(code: int, sign: float) -> None:
    module = Int8Linear(torch.full((5, 3 * FINE_GROUP), code, dtype=torch.int8), torch.ones(5, dtype=torch.bfloat16), None)
    x = torch.full((2, 3 * FINE_GROUP), sign)
    x[1, ::2] = 0.0
    exact = x @ module.matrix().T
    assert (module(x) - exact).abs().max() <= 1e-6 * exact.abs().max()
    assert (RoundedInput(module)(x) - exact).abs().max() <= 1e-6 * exact.abs().max()


@KERNEL
@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("around", [RoundedInput, nn.Sequential])
def test_the_number_of_threads_does_not_change_a_number(format: str, around: type[nn.Module]) -> None:
    module, x = around(packed(format, 1030, 512)), torch.randn(5, 512)
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            found.append(module(x))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])


@KERNEL
@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("around", [RoundedInput, nn.Sequential])
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_a_number_that_is_none_is_not_hidden_and_touches_its_own_row_only(
    format: str, around: type[nn.Module], bad: float
) -> None:
    module, x = around(packed(format, 70, 256)), torch.randn(3, 256)
    clean = module(x)
    x[1, 5] = bad
    assert not module(x)[1].isfinite().any()
    assert torch.equal(module(x)[::2], clean[::2])
    assert not module(torch.zeros(2, 256)).any()


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_many_rows_and_few_see_the_same_rounded_inputs(format: str, dtype: torch.dtype) -> None:
    module, x = RoundedInput(packed(format, 96, 256)), torch.randn(packed_rows.ROWS + 1, 256).to(dtype)
    many, few = module(x), torch.cat([module(x[:40]), module(x[40:])])
    assert many.dtype == few.dtype == dtype
    assert (many - few).abs().max() <= (1e-5 if dtype == torch.float32 else 2**-6) * many.abs().max()


@KERNEL
def test_a_profiler_sees_products() -> None:
    module = RoundedInput(packed("int4 of 32", 64, 64))
    with torch.profiler.profile() as profile:
        module(torch.randn(1, 64))
    assert packed_rows.INT4 in {event.name for event in profile.events() or []}
    assert kind_of(packed_rows.INT4) == kind_of(packed_rows.INT8) == "products"


@pytest.mark.parametrize("format", FORMATS)
def test_maps_of_one_input_fuse_and_keep_their_numbers_and_bytes(format: str) -> None:
    parts = [RoundedInput(packed(format, n, 256)) for n in (64, 192)]
    both = fuse(parts)
    assert both is not None
    x = torch.randn(3, 256)
    assert torch.equal(both.whole(x), torch.cat([p(x) for p in parts], -1))
    assert both.whole.nbytes() == sum(p.inner.nbytes() for p in parts)


def test_behind_a_scale_the_scaled_inputs_are_rounded() -> None:
    inner, scale = packed("int4 of 32", 64, 64), torch.rand(64) + 0.5
    policy = QuantizedActivations()
    made = policy.replacement(ScaledInput(inner, scale), Spot("one"))
    assert isinstance(made, ScaledInput)
    assert isinstance(made.inner, RoundedInput)
    x = torch.randn(2, 64)
    assert torch.equal(made(x), made.inner(x * scale))


@pytest.mark.parametrize("bias", [False, True])
def test_a_rotated_map_keeps_its_own_bias(bias: bool) -> None:
    source = nn.Linear(64, 48, bias=bias).requires_grad_(False)
    turned = QuaRot(bits=8, activation_bits=16).replacement(source, Spot("one"))
    made = QuantizedActivations().replacement(turned, Spot("one"))  # type: ignore[arg-type]
    x = torch.randn(3, 64)
    assert (made(x) - turned(x)).abs().max() <= 0.03 * turned(x).abs().max()  # type: ignore[misc]
    assert (made(torch.zeros(1, 64)) == (source.bias if bias else 0)).all()  # type: ignore[misc]


@pytest.mark.parametrize("stack", ["rtn:bits=4", "rtn:bits=8", "gptq:bits=4", "awq:bits=4"])
def test_a_model_of_packed_weights_stays_close_and_lean_decode_changes_no_token(stack: str) -> None:
    session = make_session()
    plain, rounded, lean = (stack, f"{stack}+quantized-activations", f"{stack}+quantized-activations+lean-decode")
    found = {}
    for text in (plain, rounded, lean):
        with attached(session, *effective(parse_pipeline(text))):
            found[text] = (forced(session, prompt(40), prompt(8, 1)), tokens(generate(session, [prompt(40)])))
            count = sum(isinstance(m, RoundedInput) and m.product is not None for m in session.model.modules())
            assert bool(count) == (text != plain and native.kernels().library is not None)
    off = (found[rounded][0] - found[plain][0]).abs().mean()
    assert 0 < off < 0.1 * found[plain][0].std()
    assert found[lean][1] == found[rounded][1]


PROGRAM = """
import torch
from torch import nn
from workers.mechanisms.native import kernels
from workers.mechanisms.packed_linear import Int4Linear, Int8Linear
from workers.mechanisms.rounded_input import RoundedInput
torch.manual_seed(0)
for inner in (Int8Linear.of(nn.Linear(64, 50, bias=False)), Int4Linear.of(nn.Linear(64, 50, bias=False), 32)):
    module, x = RoundedInput(inner), torch.randn(3, 64)
    exact = module.transform(x) @ module.matrix().T
    assert module.product is None
    assert (module(x) - exact).abs().max() <= 2**-7 * exact.abs().max()
print(kernels().told)
"""


@pytest.mark.parametrize(
    ("compiler", "told"), [("no-such-compiler", "this machine has no C compiler no-such-compiler"), ("false", "false failed")]
)
def test_without_a_compiler_the_library_computes_the_same_and_it_is_told(compiler: str, told: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM],
        env={**os.environ, "CC": compiler},
        cwd=Path(native.__file__).parents[2],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert told in done.stdout


@KERNEL
def test_what_is_compiled_is_kept_and_not_compiled_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PARETO_STUDIO_CACHE", str(tmp_path))
    first = native._compiled(["cc"])
    written = first.stat().st_mtime_ns
    assert native._compiled(["cc"]) == first
    assert first.stat().st_mtime_ns == written
    assert [p.name for p in first.parent.iterdir()] == [first.name]  # no draft is left


@KERNEL
def test_the_kernel_shares_the_threads_of_torch() -> None:
    mapped = Path("/proc/self/maps")
    if not mapped.is_file():
        pytest.skip("only Linux tells what is loaded")
    RoundedInput(packed("int8", 1024, 1024))(torch.randn(1, 1024))
    assert len({line.split()[-1] for line in mapped.read_text().splitlines() if line.endswith("/libgomp.so.1")}) <= 1


def test_alone_it_rounds_what_goes_into_plain_maps() -> None:
    session = make_session()
    before = forced(session, prompt(40), prompt(8, 1))
    with attached(session, QuantizedActivations()):
        assert not torch.equal(forced(session, prompt(40), prompt(8, 1)), before)
    assert torch.equal(forced(session, prompt(40), prompt(8, 1)), before)
