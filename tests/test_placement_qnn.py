"""What HTP takes, as predicted; and that Qualcomm's execution provider says the same."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest

from htp_probes import Probe, probes
from optkit.model.loading import dynamic_dims, load, load_text, save
from optkit.package.contract import Placement
from optkit.package.placing import Placed
from optkit.package.placing import place as placed_by
from optkit.session import CannotRunError
from optkit.target import Target, load_target
from optkit_targets.qnn import runtime
from optkit_targets.qnn.constraints import GENERAL
from optkit_targets.qnn.operator_constraints import BY_OPERATOR
from optkit_targets.qnn.operators import OPERATORS
from optkit_targets.qnn.packager import QnnPackager
from optkit_targets.qnn.placement import devices, place
from optkit_targets.qnn.support import sentence, table

AGREEMENT = 0.99
HEAD = '<ir_version: 10, opset_import: ["" : 21]>\n'
UNIT = """g (float[1,4,8,8] x) => (float[1,4,8,8] y)
<float s = {0.05}, uint8 z = {128}, float t = {0.07}> {
  [q] xq = QuantizeLinear(x, s, z)
  [d] xd = DequantizeLinear(xq, s, z)
  [n] r = Sigmoid(xd)
  [oq] rq = QuantizeLinear(r, t, z)
  [od] y = DequantizeLinear(rq, t, z)
}"""


@pytest.fixture(scope="module")
def npu() -> Target:
    return load_target("snapdragon-8gen3-npu")


def placed(text: str, target: Target) -> dict[str, Placement]:
    return {each.node: each for each in place(load_text(HEAD + text), target)}


def test_floats_run_in_fp16(npu: Target) -> None:
    found = placed("g (float[4,8] x) => (float[4,8] y) { [n] y = Relu(x) }", npu)["n"]
    assert (found.device, found.precision, found.supported) == ("npu", "float16", True)
    assert found.reason.startswith("floats are computed in fp16")


def test_a_complete_unit_runs_in_integers(npu: Target) -> None:
    found = placed(UNIT, npu)
    assert {each.device for each in found.values()} == {"npu"}
    assert found["n"].precision == "int8"
    assert found["d"].reason.startswith("part of Sigmoid 'n'")
    assert found["q"].reason.startswith("converts between floats and integers")


def test_sixteen_bits_are_integers_too(npu: Target) -> None:
    wide = placed(UNIT.replace("uint8 z = {128}", "uint16 z = {32768}"), npu)
    assert wide["n"].precision == "int16"


def test_half_a_unit_computes_in_fp16(npu: Target) -> None:
    text = """g (float[4,8] x) => (float[4,8] y) <float s = {0.05}, uint8 z = {128}> {
      [q] xq = QuantizeLinear(x, s, z)
      [d] xd = DequantizeLinear(xq, s, z)
      [n] y = Sigmoid(xd)
    }"""
    found = placed(text, npu)
    assert (found["n"].device, found["n"].precision) == ("npu", "float16")


def test_an_operator_without_an_integer_form_says_so(npu: Target) -> None:
    found = placed(UNIT.replace("Sigmoid", "Celu"), npu)
    assert found["n"].device == "cpu"
    assert found["n"].reason == "HTP must have a form of the operator (Celu has none): Celu has no integer form"


def test_a_lone_conversion_is_left_to_the_cpu(npu: Target) -> None:
    text = "g (float[4,8] x) => (uint8[4,8] y) <float s = {0.05}, uint8 z = {128}> { [q] y = QuantizeLinear(x, s, z) }"
    found = placed(text, npu)["q"]
    assert found.device == "cpu"
    assert found.reason == "a lone Q or DQ node makes no partition: the provider leaves it to the CPU"


def test_a_refused_operator_takes_its_conversions_with_it(npu: Target) -> None:
    found = placed(UNIT.replace("Sigmoid", "Erf"), npu)
    assert {each.device for each in found.values()} == {"cpu"}
    assert found["d"].reason.startswith("part of Erf 'n': ")


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("g (float[N,8] x) => (float[N,8] y) { [n] y = Relu(x) }", "All dimensions must be known and at least 1"),
        ("g (double[4,8] x) => (double[4,8] y) { [n] y = Sigmoid(x) }", "The element type must be one that"),
        (
            "g (float[1,1,1,1,4,8] x) => (float[1,1,1,1,4,8] y) { [n] y = Relu(x) }",
            "No tensor may have more dimensions",
        ),
        ("g (float[4,8] x) => (float[4,8] y) { [n] y = Hardmax(x) }", "HTP must have a form of the operator"),
        (
            "g (float[1,4,8,8] x) => (float[1,4,6,6] y) { [n] y = MaxPool<kernel_shape=[2,2],dilations=[2,2]>(x) }",
            "Pooling takes no dilations, and gives no indices (dilations [2, 2])",
        ),
        (
            "g (float[4,8] x, int64[1] a) => (float[4,1] y) { [n] y = ReduceSum(x, a) }",
            "Settings that newer opsets give as inputs must be constants ('a' is computed)",
        ),
        (
            'g (float[2,4,8] x) => (float[2] y) { [n] y = Einsum<equation="abc->a">(x) }',
            "An equation must be a batched matrix product, its right side transposed or not, as the provider reads it",
        ),
    ],
)
def test_a_refusal_is_a_sentence(text: str, reason: str, npu: Target) -> None:
    found = placed(text, npu)["n"]
    assert (found.device, found.supported) == ("cpu", False)
    assert found.reason.startswith(reason)


def test_bodies_run_on_the_cpu(npu: Target) -> None:
    text = """g (float[4,8] x, bool c) => (float[4,8] y) {
      [a] r = Relu(x)
      [if] y = If (c) <then_branch = t () => (float[4,8] u) { [b] u = Relu(r) },
                       else_branch = e () => (float[4,8] v) { [c] v = Neg(r) }>
    }"""
    found = placed(text, npu)
    assert [found[name].device for name in ("a", "if", "b", "c")] == ["npu", "cpu", "cpu", "cpu"]
    assert "a context binary has no control flow" in found["b"].reason


def test_an_architecture_without_fp16_takes_integers_only() -> None:
    old = load_target("snapdragon-8gen3-npu:options.htp_arch=68")
    assert {each.device for each in placed(UNIT, old).values()} == {"npu"}
    found = placed("g (float[4,8] x) => (float[4,8] y) { [n] y = Sigmoid(x) }", old)["n"]
    assert found.reason == "Floats need an HTP that computes in fp16, from architecture 69 on (architecture 68)"


def test_a_shared_conversion_stays_with_its_first_reader(npu: Target) -> None:
    text = """g (float[4,8] x) => (float[4,8] y, float[4,8] w) <float s = {0.05}, uint8 z = {128}> {
      [q] xq = QuantizeLinear(x, s, z)
      [d] xd = DequantizeLinear(xq, s, z)
      [e] r = Erf(xd)
      [eq] rq = QuantizeLinear(r, s, z)
      [ed] y = DequantizeLinear(rq, s, z)
      [n] t = Sigmoid(xd)
      [oq] tq = QuantizeLinear(t, s, z)
      [od] w = DequantizeLinear(tq, s, z)
    }"""
    found = placed(text, npu)
    assert (found["d"].device, found["n"].device) == ("cpu", "npu")


def test_names_of_moved_layouts_are_the_models_own() -> None:
    assert devices({"conv_token_12": runtime.NPU, "": "CPU", "t": "CPUExecutionProvider"})["conv"] == "npu"


def test_every_rank_and_type_of_the_table_is_set() -> None:
    assert all(row.types or row.unit_types or row.rule for row in OPERATORS.values())
    assert all(low <= high for row in OPERATORS.values() for low, high in (row.ranks, row.unit_ranks))


def test_the_support_table_is_up_to_date() -> None:
    page = Path(__file__).resolve().parents[1] / "docs" / "snapdragon-support.md"
    assert page.read_text(encoding="utf-8") == table(), (
        "run: python -m optkit_targets.qnn.support > docs/snapdragon-support.md"
    )


def test_every_constraint_is_a_sentence() -> None:
    for constraint in (*GENERAL, *(each for held in BY_OPERATOR.values() for each in held)):
        assert sentence(constraint).endswith("."), constraint
        assert "\n" not in sentence(constraint), constraint


# --- asked of the provider itself -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def provider(tmp_path_factory: pytest.TempPathFactory) -> Iterator[runtime.Child]:
    pytest.importorskip("onnxruntime_qnn")
    with runtime.Child(tmp_path_factory.mktemp("qnn")) as child:
        yield child


def asked(probe: Probe, child: runtime.Child, folder: Path, target: Target) -> Mapping[str, str] | None:
    """Return the provider of each node, or None where the compiler fails on what the provider took."""
    save(probe.model(), folder / runtime.MODEL)
    try:
        found: Mapping[str, str] = child.ask("assign", folder=str(folder), provider=runtime.provider_options(target))
    except CannotRunError:
        return None
    return found


@pytest.mark.emulator
@pytest.mark.slow
def test_the_provider_agrees_on_operators(provider: runtime.Child, tmp_path: Path, npu: Target) -> None:
    """Every probe in one process: more than two hundred models, each beside a limit."""
    compared, wrong = 0, []
    for probe in probes():
        placements = place(probe.model(), npu)
        assigned = asked(probe, provider, tmp_path, npu)
        if assigned is None:
            compared += 1
            wrong += [probe.title for each in placements if each.node == "n" and each.supported]
            continue
        compared += sum(each.node in devices(assigned) for each in placements)
        wrong += [f"{probe.title}: {each}" for each in Placed(tuple(placements), devices(assigned)).disagreements]
    assert compared > 600
    assert len(wrong) <= (1 - AGREEMENT) * compared, "\n".join(wrong)


REAL = {
    "ad_autoencoder": {}, "mobilenet_v1_075": {}, "resnet20_cifar10": {}, "squeezenet1_1": {},
    "ultraface_rfb320": {}, "stories260k": {"N": 1, "T": 16}, "relu_lm": {"N": 1, "T": 16},
}  # fmt: skip


@pytest.mark.emulator
@pytest.mark.slow
@pytest.mark.parametrize("name", REAL)
def test_the_provider_agrees_on_real_models(name: str, shared: Path, npu: Target) -> None:
    pytest.importorskip("onnxruntime_qnn")
    path = shared / "data" / name / f"{name}.onnx"
    open_dims = dynamic_dims(load(path))
    model = load(path, {dim: REAL[name].get(dim, 1) for dim in open_dims})
    placed = placed_by(model, QnnPackager(), npu)
    assert placed.compared > 0.5 * len(model.graph)
    assert len(placed.disagreements) <= (1 - AGREEMENT) * placed.compared, placed.disagreements
