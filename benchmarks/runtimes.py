"""Products by other runtimes, where they are installed: torch's CSR, ONNX Runtime, OpenVINO. Tensors of torch in and out."""

from __future__ import annotations

import importlib.util
import warnings
from typing import Any

import numpy as np
import torch
from torch import Tensor

from secateur.runtime.candidates import Run

TORCH_CSR, ORT, OPENVINO = "torch CSR float32", "ONNX Runtime float32", "OpenVINO int8"
PACKAGES = {ORT: ("onnx", "onnxruntime"), OPENVINO: ("openvino",)}


def missing() -> dict[str, str]:
    """Runtimes that are not installed, and the package that is not there."""
    absent = {n: [p for p in packages if importlib.util.find_spec(p) is None] for n, packages in PACKAGES.items()}
    return {name: packages[0] for name, packages in absent.items() if packages}


def torch_csr(weight: Tensor) -> Run:
    """The fastest form of torch's CSR: 32-bit indices, and for several rows the product transposed."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that it is a prototype
        wide = weight.to_sparse_csr()
        crow, columns = wide.crow_indices().to(torch.int32), wide.col_indices().to(torch.int32)
        csr = torch.sparse_csr_tensor(crow, columns, wide.values(), wide.shape)

    def run(x: Tensor) -> Tensor:
        if len(x) == 1:
            return torch.mv(csr, x[0])[None]
        return (csr @ x.t().contiguous()).t().contiguous()

    return run


def onnxruntime(weight: Tensor, threads: int) -> Run:
    """A ``Gemm`` with the weight as ``(out, in)``."""
    import onnxruntime as ort
    from onnx import TensorProto, helper, numpy_helper

    out, columns = weight.shape
    graph = helper.make_graph(
        [helper.make_node("Gemm", ["x", "w"], ["y"], transB=1)],
        "linear",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["rows", columns])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["rows", out])],
        [numpy_helper.from_array(weight.float().numpy(), "w")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
    options = ort.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")  # others are timed in this process
    session = ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return lambda x: torch.from_numpy(session.run(None, {"x": x.numpy()})[0])


def openvino(weight: Tensor, rows: int, threads: int) -> tuple[Run, str]:
    """An int8 product of so many rows, which leaves zeros out where the processor has AMX; and the primitive that does it."""
    import openvino as ov
    from openvino import opset13 as ops

    columns = weight.shape[1]
    scale = weight.float().abs().amax(1, keepdim=True).clamp(min=1e-8) / 127
    quantised = (weight.float() / scale).round().to(torch.int8).numpy()
    x = ops.parameter([rows, columns], np.float32, name="x")
    low, high = np.float32(-4.0), np.float32(4.0 * 127 / 128)
    activations = ops.fake_quantize(x, low, high, low, high, 256)
    w = ops.multiply(ops.convert(ops.constant(quantised), np.float32), ops.constant(scale.numpy()))
    model = ov.Model([ops.matmul(activations, w, False, True)], [x], "linear")
    config: dict[str, Any] = {"INFERENCE_NUM_THREADS": threads, "CPU_SPARSE_WEIGHTS_DECOMPRESSION_RATE": 0.4}
    compiled = ov.Core().compile_model(model, "CPU", config)
    kinds = {str(n.get_rt_info()["primitiveType"].value) for n in compiled.get_runtime_model().get_ordered_ops()
             if "FullyConnected" in str(n.get_rt_info()["layerType"].value)}  # fmt: skip
    request = compiled.create_infer_request()

    def run(x: Tensor) -> Tensor:
        return torch.from_numpy(request.infer({0: x.numpy()}, share_inputs=True, share_outputs=True)[0])

    return run, ", ".join(sorted(kinds))
