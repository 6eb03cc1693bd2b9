"""What is true of torch's private names; and that no other module uses any."""

from __future__ import annotations

import ast
import importlib
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from repository import PACKAGE
from torch._subclasses import FakeTensorMode
from torch.overrides import TorchFunctionMode
from transformers import BertConfig, PretrainedConfig

from qdq_surgery.hf.config_facts import attention_of, set_attention
from qdq_surgery.safety import torch_private

HOME = PACKAGE / "safety" / "torch_private.py"
FRAMES = PACKAGE / "trace" / "source_places.py"


class Seen(TorchFunctionMode):
    def __init__(self) -> None:
        super().__init__()
        self.calls: list[Any] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.calls.append(func)
        return func(*args, **kwargs or {})


def test_a_mode_sees_the_grad_mode_change_by_this_function() -> None:
    with Seen() as seen, torch.no_grad():
        assert not torch.is_grad_enabled()
    assert seen.calls.count(torch_private.set_grad_enabled) == 2


def test_a_mode_sees_nothing_where_functions_are_disabled() -> None:
    values = torch.ones(2)
    with Seen() as seen, torch_private.DisableTorchFunction():
        values.clone()
    assert seen.calls == []


class Asking(torch.nn.Module):
    def forward(self, values: torch.Tensor) -> torch.Tensor:
        return values + 1 if torch_private.is_exporting() else values - 1


@pytest.mark.parametrize("strict", [False, True])
def test_an_export_says_that_it_is_one_and_a_compiler_does_not(strict: bool) -> None:
    values = torch.ones(2)
    asking = Asking()
    exported = torch.export.export(asking, (values,), strict=strict).module()
    compiled = torch.compile(asking, backend="eager", fullgraph=True)
    assert [float(each(values)[0]) for each in (asking, exported, compiled)] == [0, 2, 0]


def test_tensors_without_values_are_fake() -> None:
    with FakeTensorMode():
        assert isinstance(torch.ones(2), torch_private.FakeTensor)


@pytest.mark.parametrize("function", [torch.add, torch.nn.functional.gelu, torch.nn.functional.softmax])
def test_a_qualified_name_leads_to_the_function(function: Any) -> None:
    first, *rest = torch_private.qualified_name(function).split(".")
    found = importlib.import_module(first)
    for name in rest:
        found = getattr(found, name)
    assert found is function


def test_integers_are_multiplied_to_the_last_one() -> None:
    one, other = torch.full((17, 8), 127, dtype=torch.int8), torch.full((8, 8), -128, dtype=torch.int8)
    assert torch_private.int_mm(one, other).tolist() == [[-127 * 128 * 8] * 8] * 17


def test_the_exporter_sets_its_flag() -> None:
    seen = []
    flags = torch_private.onnx_flags
    assert flags._is_onnx_exporting is False
    flags.set_onnx_exporting_flag(lambda: seen.append(flags._is_onnx_exporting))()
    assert seen == [True]


def test_the_exporter_logs_under_this_name() -> None:
    exporter = importlib.import_module(f"{torch_private.ONNX_EXPORTER_LOG}._registration")
    assert exporter.logger.name.startswith(torch_private.ONNX_EXPORTER_LOG)
    assert logging.getLogger(torch_private.ONNX_EXPORTER_LOG) in (exporter.logger, exporter.logger.parent)


@pytest.mark.parametrize(
    ("module", "name"),
    [
        (torch_private.vmap_calls, "vmap_impl"),
        (torch_private.functional_calls, "functional_call"),
        *((torch_private.function_transforms, name) for name in ("grad_impl", "_vjp_with_argnums", "linearize")),
    ],
)
def test_what_a_recording_refuses_is_python(module: Any, name: str) -> None:
    assert getattr(module, name).__code__.co_filename.startswith(str(Path(torch.__file__).parent))


def test_an_operator_of_a_graph_has_a_name_and_a_namespace() -> None:
    operator = torch.ops.aten.add.Tensor
    assert isinstance(operator, torch_private.OpOverload)
    assert (str(operator), operator.namespace) == ("aten.add.Tensor", "aten")
    assert isinstance(torch_private.to_copy, torch_private.OpOverload)
    assert torch_private.to_copy(torch.ones(2), dtype=torch.int64).tolist() == [1, 1]


def test_the_attention_of_a_config_is_where_transformers_keeps_it() -> None:
    config: PretrainedConfig = BertConfig()
    set_attention(config, "qdq_eager")
    assert attention_of(config) == config._attn_implementation == "qdq_eager"


def private_names(path: Path) -> set[str]:
    """Names of torch with an underscore in front, and ways to read the stack, that a file uses."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Attribute):
            names = [ast.unparse(node)]
        for name in names:
            first, *rest = name.split(".")
            if (first == "torch" and any(part[:1] == "_" != part[1:2] for part in rest)) or name == "sys._getframe":
                found.add(name)
    return found


def test_nobody_asks_for_what_is_true_in_every_compilation_of_earlier_releases() -> None:
    users = [path for path in PACKAGE.rglob("*.py") if "compiler.is_exporting" in path.read_text()]
    assert users == [HOME]  # which says why


def test_private_names_stay_in_their_places() -> None:
    users = {path: names for path in PACKAGE.rglob("*.py") if (names := private_names(path))}
    assert users.keys() == {HOME, FRAMES}
    assert users[FRAMES] == {"sys._getframe"}
