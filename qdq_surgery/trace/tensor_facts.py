"""What a forward may ask of a tensor, and what a graph makes of the answer.

A torch call is an operation unless its name stands here. A *fact* is the same for every call that the graph holds for.
An answer that is *checked* becomes a decision of the graph. Everything else that gives Python a value is refused.
"""

from __future__ import annotations

__all__ = ["CHECKED", "DATA", "DTYPES", "FACTS", "refusal"]

#: Follow from what a graph is chosen by: rank, dtype and device of the arguments.
FACTS = frozenset(
    """
    dim ndim ndimension dtype device is_cuda is_cpu is_meta is_floating_point is_complex is_signed layout is_sparse
    is_sparse_csr is_quantized is_nested itemsize element_size names has_names is_mkldnn is_xpu is_mps is_xla
    is_mtia is_ipu is_maia is_vulkan get_device __hash__ __dir__
    """.split()
)

#: Of these, what autocast changes, or may change.
DTYPES = frozenset({"dtype", "is_floating_point", "device", "is_cuda", "is_cpu", "itemsize", "element_size"})

#: May differ from call to call.
CHECKED = frozenset("is_contiguous stride storage_offset is_same_size is_neg is_conj nbytes".split())

#: Need the values in a tensor.
DATA = frozenset(
    """
    __bool__ __nonzero__ is_nonzero item tolist __int__ __long__ __float__ __index__ __complex__ numpy __array__
    __contains__ equal allclose nonzero __repr__ __format__
    """.split()
)

_GRADIENTS = frozenset(
    """
    requires_grad is_leaf grad_fn grad grad_dtype retains_grad output_nr is_inference _backward_hooks _grad _grad_fn
    _post_accumulate_grad_hooks _base _is_view volatile
    """.split()
)
_MEMORY = frozenset(
    """
    _version data_ptr storage storage_type untyped_storage _typed_storage _storage __cuda_array_interface__ _cdata
    __dlpack__ __dlpack_device__ is_shared is_pinned is_set_to name
    """.split()
)
_CHANGES = frozenset(
    """
    register_hook register_post_accumulate_grad_hook retain_grad backward share_memory_ __deepcopy__ __reduce_ex__
    __setstate__ set_ apply_ map_ map2_
    """.split()
)


def refusal(name: str) -> str | None:
    """Why no graph can hold a call of ``name``, in words that follow the place in the source."""
    if name in DATA:
        return f"decides by the values of a tensor ({name})"
    if name in _GRADIENTS:
        return f"asks how gradients are recorded ({name}), which a graph does not know"
    if name in _MEMORY:
        return f"asks where a tensor lies in memory ({name}), which changes from call to call"
    if name in _CHANGES:
        return f"changes how a tensor is stored or differentiated ({name}), which a graph would lose"
    return None
