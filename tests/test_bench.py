"""`pitools bench`: the formula it compares with, what it writes, and what it refuses."""

import json
from pathlib import Path

import pytest
import torch
from test_cli import pitools

from pitools import integrate, kernels
from pitools.bench import PARTS, TINY, chosen, explain
from pitools.bench.elementwise import Elementwise, image, packed
from pitools.bench.parts import Settings, Shape, rollouts, sampling, velocities
from pitools.bench.timing import elapsed, interleaved

CPU = torch.device("cpu")


@pytest.mark.parametrize("shape", [*TINY, Shape("DiT", 2, 8, 8, 32, 4, 32), Shape("FLUX", 1, 8, 8, 8, 16, 32)])
def test_the_elementwise_formula_equals_the_plain_path(shape: Shape) -> None:
    policy = shape.policy(CPU)
    written, x = Elementwise.of(policy, shape.height, shape.width), policy.x_src
    with kernels.plain():
        expected = integrate(policy, x, 1.0, 0.0, "euler", step_size=1 / shape.substeps)
        u = policy.velocity(x, 0.5)
    mine = packed(written.rollout(image(x, shape.height, shape.width), 1.0, 0.0, shape.substeps))
    assert (mine - expected).norm() <= 1e-5 * expected.norm()
    mine = packed(written.velocity(image(x, shape.height, shape.width), 0.5))
    assert (mine - u).norm() <= 1e-5 * u.norm()


@pytest.mark.parametrize("part", [rollouts, velocities, sampling])
def test_all_sides_give_the_same(part, monkeypatch: pytest.MonkeyPatch) -> None:  # type: ignore[no-untyped-def]
    answers: list[torch.Tensor] = []

    def called(sides, *_):  # type: ignore[no-untyped-def]
        answers[:] = [side() for side in sides.values()]
        return dict.fromkeys(sides, 1.0)

    monkeypatch.setattr("pitools.bench.parts.interleaved", called)
    for case in part(Settings(CPU, TINY)):
        row = case.measure()
        assert row.difference < 1e-5
        assert len(answers) == len(row.milliseconds) >= 3
        assert all((answer - answers[0]).norm() <= 1e-5 * answers[0].norm() for answer in answers)


def test_operations_and_bytes_are_counted() -> None:
    shape = Shape("", 2, 3, 4, 5, 6, 7)
    assert shape.flops(7) == 7 * 2 * 12 * 5 * (2 * 2 * 6 + 20)
    assert shape.bytes == 4 * 2 * 12 * (5 * 6 + 5 + 1 + 3 * 6)


def test_sides_take_turns() -> None:
    order: list[str] = []
    taken = interleaved({name: lambda name=name: order.append(name) for name in "ab"}, CPU, rounds=3, shortest=1e-9)
    assert set(taken) == {"a", "b"}
    assert "".join(order) == "aabb" + "ab" * 3  # each is warmed up and then tried before the turns
    assert elapsed(lambda: None, CPU) > 0


def test_the_command_prints_tables_and_writes_json(tmp_path: Path) -> None:
    text = pitools("bench", "--tiny", "--device", "cpu", "--json", "bench.json", cwd=tmp_path)
    report = json.loads((tmp_path / "bench.json").read_text())
    assert set(report) == {"machine", "ceilings", "rows", "skipped", "rounds", "dtype", "counted"}
    assert report["ceilings"]["gflops"] > 0
    assert report["ceilings"]["gbytes"] > 0
    assert set(report["machine"]) == {"device", "processor", "threads", "torch", "compiler"}
    assert {row["part"] for row in report["rows"]} | set(report["skipped"]) == set(PARTS)
    for row in report["rows"]:
        times = row["milliseconds"]
        assert {"plain", "fused"} <= set(times)
        assert row["ratios"]["plain/fused"] == pytest.approx(times["plain"] / times["fused"])
        assert all(value > 0 for value in times.values())
        assert set(row["sizes"]) == {"B", "L", "K", "C"}
        if row["part"] in ("rollouts", "velocity", "sampling"):
            assert row["ratios"]["elementwise/fused"] == pytest.approx(times["elementwise"] / times["fused"])
            assert row["gflops"] > 0
        if row["part"] == "training":
            assert all(0 < row["policy_share"][side] < 1 for side in ("plain", "fused"))
        assert row["name"].split(",")[0] in text
    for told in ("threads", "GFLOP/s", "the best in this run", "medians of"):
        assert told in text


def test_only_chooses_parts(tmp_path: Path) -> None:
    pitools(
        "bench", "--tiny", "--device", "cpu", "--quick", "--only", "velocity,rollouts", "--json", "b.json", cwd=tmp_path
    )
    rows = json.loads((tmp_path / "b.json").read_text())["rows"]
    assert [row["part"] for row in rows] == ["rollouts"] * len(TINY) + ["velocity"] * len(TINY)
    assert chosen(None) == list(PARTS)


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--only", "rollouts,speed"], "'speed' is no part of the benchmark; the parts are rollouts, velocity"),
        (["--device", "quantum"], "--device quantum is not here"),
        (["--json", "nowhere/b.json"], "--json nowhere/b.json cannot be written"),
    ],
)
def test_a_mistake_is_one_clear_error(args: list[str], message: str, tmp_path: Path) -> None:
    text = pitools("bench", "--tiny", *args, cwd=tmp_path, code=2)
    assert message in text
    assert "Traceback" not in text


def test_explain_gives_a_reason_for_each_request_that_is_refused(tmp_path: Path) -> None:
    text = pitools("bench", "--explain", "--device", "cpu", "--json", "why.json", cwd=tmp_path)
    answers = {one["request"]: one for one in json.loads((tmp_path / "why.json").read_text())}
    assert all(name.split()[0] in text for name in answers)
    for one in answers.values():
        assert bool(one["reason"]) == (one["path"] in ("plain", "PyTorch")), one
    for request in ("bfloat16 state", "dopri5", "times with gradient", "inside torch.vmap", "within kernels.plain()"):
        assert answers[f"GM, {request}"]["path"] == "plain"
    assert answers["subclass of GMPolicy"]["path"] == "plain"
    assert "compiler" in answers["GM, no compiler"]["reason"]
    assert "Triton" in answers["GM, GPU without Triton"]["reason"]


def test_explain_leaves_the_kernels_as_they_were() -> None:
    before = kernels.native.library()  # type: ignore[attr-defined]
    explain(CPU)
    assert kernels.native.library() is before  # type: ignore[attr-defined]


def test_help_has_examples(tmp_path: Path) -> None:
    assert "pitools bench --explain" in pitools("bench", "--help", cwd=tmp_path)
