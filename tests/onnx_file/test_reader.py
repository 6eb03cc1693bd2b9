"""An ONNX file is data from a stranger: it is looked through before a parser or a runtime sees it."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from exported import calibrated
from onnx import TensorProto, helper, numpy_helper

import qdq_surgery as qs
from qdq_surgery.onnx_file import reader as opening
from qdq_surgery.onnx_file.opened import open_file
from qdq_surgery.onnx_file.reader import MESSAGES, check_file, open_graph, open_proto
from qdq_surgery.prove.parity import certify
from qdq_surgery.serve.intermediates import probe, runtimes

FLOAT = TensorProto.FLOAT


def proto(*constants: onnx.TensorProto, nodes: list[onnx.NodeProto] | None = None, **more: Any) -> onnx.ModelProto:
    """``y = x + 0`` or ``nodes``, with more constants that nothing reads."""
    graph = helper.make_graph(
        nodes or [helper.make_node("Identity", ["x"], ["y"], name="n")],
        "graph",
        [helper.make_tensor_value_info("x", FLOAT, [2])],
        [helper.make_tensor_value_info("y", FLOAT, [2])],
        list(constants),
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=9, **more)


def external(location: str | None = "w.data", dims: tuple[int, ...] = (4,), **entries: str) -> onnx.TensorProto:
    tensor = TensorProto(name="w", dims=dims, data_type=FLOAT, data_location=TensorProto.EXTERNAL)
    for key, value in {**({} if location is None else {"location": location}), **entries}.items():
        tensor.external_data.add(key=key, value=value)
    return tensor


def holding(where: str, tensor: onnx.TensorProto) -> onnx.ModelProto:
    """A model with the tensor in some place."""
    inner = proto(tensor).graph
    if where == "initializer":
        return proto(tensor)
    if where == "sparse initializer":
        model = proto()
        indices = numpy_helper.from_array(np.arange(4), "i")
        model.graph.sparse_initializer.append(helper.make_sparse_tensor(tensor, indices, [8]))
        return model
    if where == "function":
        body = [helper.make_node("Constant", [], ["y"], value=tensor)]
        return proto(functions=[helper.make_function("d", "f", [], ["y"], body, [helper.make_opsetid("", 20)])])
    node = helper.make_node("Identity", ["x"], ["y"], name="n")
    kinds = {"attribute": tensor, "attributes": [tensor], "subgraph": inner, "subgraphs": [inner]}
    node.attribute.append(helper.make_attribute("extra", kinds[where]))
    return proto(nodes=[node])


def saved(model: onnx.ModelProto, folder: Path) -> Path:
    path = folder / "model.onnx"
    path.write_bytes(model.SerializeToString())
    return path


#: Whatever takes a file of the user's.
OPENERS: dict[str, Callable[[Path], Any]] = {
    "load_onnx": qs.load_onnx,
    "load_onnx on OpenVINO": lambda path: qs.load_onnx(path, "openvino"),
    "lint": lambda path: qs.lint(path, "onnxruntime"),
    "receipt": qs.receipt,
    "certify": lambda path: certify(calibrated("bert"), path, {}),
    "probe": lambda path: probe(open_file(path), {"x": np.zeros(2, np.float32)}, (), runtimes("onnxruntime")[0]),
}


@pytest.fixture
def opened(monkeypatch: pytest.MonkeyPatch) -> None:
    """No runtime and no parser may see the file."""
    onnxruntime, openvino = pytest.importorskip("onnxruntime"), pytest.importorskip("openvino")
    monkeypatch.setattr(onnxruntime, "InferenceSession", lambda *_, **__: pytest.fail("ONNX Runtime saw it"))
    monkeypatch.setattr(openvino, "Core", openvino.Core)
    monkeypatch.setattr(openvino.Core, "read_model", lambda *_: pytest.fail("OpenVINO saw it"), raising=False)
    monkeypatch.setattr(onnx, "load_model_from_string", lambda *_, **__: pytest.fail("a parser saw it"))


@pytest.mark.usefixtures("opened")
@pytest.mark.parametrize("opener", OPENERS)
def test_a_location_in_memory_never_reaches_a_runtime(opener: str, tmp_path: Path) -> None:
    path = saved(proto(external("*/_ORT_MEM_ADDR_/*", offset="4096", length="16")), tmp_path)
    with pytest.raises(qs.QdqSurgeryError, match=r"model\.onnx .*'w' lie in a file beside it.* an address in memory"):
        OPENERS[opener](path)


@pytest.mark.usefixtures("opened")
@pytest.mark.parametrize("opener", OPENERS)
@pytest.mark.parametrize("kind", ["fifo", "link to a fifo", "device", "folder"])
def test_special_files_are_refused_before_they_are_opened(kind: str, opener: str, tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    if kind == "fifo":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    else:
        os.mkfifo(tmp_path / "fifo")
        path.symlink_to("/dev/zero" if kind == "device" else "fifo")
    with pytest.raises(qs.QdqSurgeryError, match=r"model\.onnx is no (regular )?(file|ONNX file)"):
        OPENERS[opener](path)


def test_a_link_to_a_file_may_be_read(tmp_path: Path) -> None:
    """As in the hub's cache, where the weights are links, too."""
    blobs, view = tmp_path / "blobs", tmp_path / "snapshot"
    blobs.mkdir()
    view.mkdir()
    (blobs / "a").write_bytes(proto(external()).SerializeToString())
    (blobs / "b").write_bytes(bytes(16))
    (view / "model.onnx").symlink_to("../blobs/a")
    (view / "w.data").symlink_to("../blobs/b")
    assert check_file(view / "model.onnx") == view / "model.onnx"
    (view / "w.data").unlink()
    (view / "w.data").symlink_to("/etc/passwd")
    with pytest.raises(qs.ExportError, match="is not inside"):
        check_file(view / "model.onnx")


def test_weights_beside_the_file_are_read(tmp_path: Path) -> None:
    (tmp_path / "w.data").write_bytes(np.arange(4, dtype=np.float32).tobytes())
    found = open_graph(saved(proto(external()), tmp_path)).graph.initializers["w"].const_value
    assert found is not None
    assert found.numpy().tolist() == [0, 1, 2, 3]


PLACES = ["initializer", "sparse initializer", "function", "attribute", "attributes", "subgraph", "subgraphs"]


@pytest.mark.parametrize("where", PLACES)
def test_every_tensor_is_looked_at(where: str, tmp_path: Path) -> None:
    path = saved(holding(where, external("../w.data")), tmp_path)
    with pytest.raises(qs.ExportError, match="is not inside the folder"):
        check_file(path)
    (tmp_path / "w.data").write_bytes(bytes(16))
    check_file(saved(holding(where, external()), tmp_path))


def test_the_table_of_messages_is_onnxs() -> None:
    """Every field by which a tensor can be reached, as onnx's own schema has it."""
    found: dict[str, dict[int, str]] = {}

    def holds(kind: Any, seen: tuple[str, ...] = ()) -> bool:
        inner = [each.message_type for each in kind.fields if each.message_type is not None]
        return kind.name == "TensorProto" or any(
            holds(each, (*seen, kind.name)) for each in inner if each.name not in (*seen, kind.name)
        )

    def walk(kind: Any) -> None:
        if kind.name in found:
            return
        inner = [each for each in kind.fields if each.message_type is not None and holds(each.message_type)]
        found[kind.name] = {} if kind.name == "TensorProto" else {each.number: each.message_type.name for each in inner}
        for each in inner:
            walk(each.message_type)

    walk(onnx.ModelProto.DESCRIPTOR)
    assert found == MESSAGES
    assert {each.number for each in onnx.ModelProto.DESCRIPTOR.fields} == opening._MODEL_FIELDS


@pytest.mark.parametrize(
    ("tensor", "found"),
    [
        (external("/etc/passwd"), "is not relative"),
        (external("C:w.data"), "is not relative"),
        (external("\\\\host\\w.data"), "is not relative"),
        (external("../other/w.data"), "is not inside"),
        (external("inner/../../w.data"), "is not inside"),
        (external("out"), "is not inside"),
        (external("fifo"), "is no regular file"),
        (external("inner"), "is no regular file"),
        (external("."), "is no regular file"),
        (external("loop"), "there is none at"),
        (external("gone.data"), "there is none at"),
        (external(""), "is no path"),
        (external(None, offset="0"), "is no path"),
        (external("w\0.data"), "is no path"),
        (external("x/_ORT_MEM_ADDR_/y"), "an address in memory"),
        (external(offset="-4"), "is no number of bytes"),
        (external(length="1e3"), "is no number of bytes"),
        (external(length="٣"), "is no number of bytes"),
        (external(offset="4"), "they need bytes 4 to 20 of its 16"),
        (external(length="17"), "they need bytes 0 to 17 of its 16"),
        (external(dims=(2**40, 2**40)), "they need bytes 0 to"),
        (external(dims=(-4,)), "an axis is negative"),
        (external(basepath="/etc"), "should not say it"),
    ],
)
def test_weights_that_lie_where_they_must_not(tensor: onnx.TensorProto, found: str, tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    (folder / "inner").mkdir(parents=True)
    (folder / "w.data").write_bytes(bytes(16))
    os.mkfifo(folder / "fifo")
    (folder / "loop").symlink_to("loop")
    (folder / "out").symlink_to("../w.data")
    (tmp_path / "w.data").write_bytes(bytes(16))
    with pytest.raises(qs.ExportError, match=found) as caught:
        check_file(saved(proto(tensor), folder))
    assert str(caught.value).startswith(f"{folder / 'model.onnx'} is no ONNX file that can be opened: ")
    assert str(caught.value).isprintable()


def test_a_location_said_twice(tmp_path: Path) -> None:
    tensor = external()
    tensor.external_data.add(key="location", value="/etc/passwd")
    with pytest.raises(qs.ExportError, match="'location' twice"):
        check_file(saved(proto(tensor), tmp_path))


BAD: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "holds 0 graphs"),
    "text": (b"this is no graph", "no field|cut off"),
    "text format": (b'ir_version: 8\ngraph { name: "g" }', "no field|cut off"),
    "two graphs": (proto().SerializeToString() * 2, "holds 2 graphs"),
    "cut off": (proto().SerializeToString()[:-3], "cut off|holds 0"),
    "an endless number": (b"\x08" + b"\xff" * 20, "has no end"),
    "many fields": (b"\x3a\x80\x89\x7a" + b"\x0a\x00" * 1_000_000, "too many fields"),
    "much that is no weight": (b"\x32\x81\x80\x80\x20" + bytes(2**26 + 1), "holds 0 graphs|beside its weights"),
    "a field of another format": (b"\xca\x3e\x00" + proto().SerializeToString(), "has no field 1001"),
}


@pytest.mark.parametrize("case", BAD)
def test_bytes_that_are_no_model(case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(opening, "_MOST_FIELDS", 100_000)
    monkeypatch.setattr(onnx, "load_model_from_string", lambda *_, **__: pytest.fail("a parser saw it"))
    content, found = BAD[case]
    (tmp_path / "model.onnx").write_bytes(content)
    with pytest.raises(qs.ExportError, match=found):
        check_file(tmp_path / "model.onnx")


def test_graphs_in_graphs(tmp_path: Path) -> None:
    graph = b""
    for _ in range(40):
        for number in (6, 5, 1):  # of an attribute's graph, a node's attribute, a graph's node
            graph = bytes([number << 3 | 2, len(graph) & 0x7F | 0x80, len(graph) >> 7]) + graph
    (tmp_path / "model.onnx").write_bytes(bytes([7 << 3 | 2, len(graph) & 0x7F | 0x80, len(graph) >> 7]) + graph)
    with pytest.raises(qs.ExportError, match="nested deeper than 32"):
        check_file(tmp_path / "model.onnx")


@pytest.mark.parametrize("name", ["model.ort", "model.xml", "model.onnx.txt", "model"])
def test_a_name_by_which_a_runtime_would_choose_another_parser(name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(proto().SerializeToString())
    with pytest.raises(qs.ExportError, match=r"does not end in \.onnx"):
        check_file(tmp_path / name)


def test_a_path_with_a_nul() -> None:
    with pytest.raises(qs.ExportError, match="holds a NUL") as caught:
        check_file("mo\0del.onnx")
    assert "\0" not in str(caught.value)


make = helper.make_node


@pytest.mark.parametrize(
    ("nodes", "found"),
    [
        ([make("Identity", ["y"], ["y"], name="n")], "'n' .* reads 'y', which nothing makes before it"),
        ([make("Erf", ["z"], ["y"]), make("Erf", ["x"], ["z"])], "reads 'z', which nothing makes before it"),
        ([make("Erf", ["x"], ["y"]), make("Erf", ["x"], ["y"])], "makes 'y', which another node makes"),
        ([make("DequantizeLinear", ["x"], ["y"])], "not what ONNX's operator takes"),
        ([make("Reshape", ["x", ""], ["y"])], "not what ONNX's operator takes"),
        ([make("Reshape", [], ["y"], domain="com.acme")], "reads or makes nothing"),
        ([make("Cast", ["x"], ["y"])], "lacks the attribute 'to'"),
        ([make("Transpose", ["x"], ["y"], perm="no")], "an attribute 'perm' of another type"),
        ([make("Erf", ["x"], ["z"])], "no node makes its output 'y'"),
    ],
)
def test_graphs_that_are_none(nodes: list[onnx.NodeProto], found: str, tmp_path: Path) -> None:
    with pytest.raises(qs.ExportError, match=found):
        open_proto(saved(proto(nodes=nodes), tmp_path))


def test_graphs_that_are_fine(tmp_path: Path) -> None:
    result = helper.make_tensor_value_info("z", FLOAT, [2])
    body = helper.make_graph([make("Add", ["x", "x"], ["z"])], "b", [], [result])
    choose = make("If", ["c"], ["y"], then_branch=body, else_branch=body)
    constant = make("Constant", [], ["c"], value=numpy_helper.from_array(np.array(True)))
    assert len(open_proto(saved(proto(nodes=[constant, choose]), tmp_path)).graph.node) == 2


def test_bytes_that_are_not_those_of_the_shape(tmp_path: Path) -> None:
    tensor = numpy_helper.from_array(np.zeros(4, np.float32), "w")
    tensor.dims[:] = [2**40]
    with pytest.raises(qs.ExportError, match="'w' have 16 bytes, which are not those of their shape"):
        check_file(saved(proto(tensor), tmp_path))


def test_text_that_is_no_utf8(tmp_path: Path) -> None:
    model = proto()
    model.metadata_props.add(key="k", value="????")
    (tmp_path / "model.onnx").write_bytes(model.SerializeToString().replace(b"????", b"\xff" * 4))
    with pytest.raises(qs.ExportError, match="is no UTF-8"):
        check_file(tmp_path / "model.onnx")
